"""Command line and configuration files → TrainConfig."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sd_lora.config.flags import build_parser, show_help
from sd_lora.config.kohya import read_dataset_config
from sd_lora.config.options.dreambooth import NO_PROMPT
from sd_lora.config.options.run import PUBLISHED
from sd_lora.config.options.sources import FOLDER
from sd_lora.config.presets import OF_MODE
from sd_lora.config.rows import FAMILIES, Mode, Option
from sd_lora.config.schema import (
    FORMER_NAMES,
    OPTIONS,
    SECTIONS,
    SHORT_NAMES,
    TrainConfig,
    with_present_names,
)
from sd_lora.config.translate.diffusers import BESIDE_OPTIONS, DIFFUSERS, SWITCHES
from sd_lora.config.translate.peers import Peer, known_elsewhere
from sd_lora.config.translate.rows import Given, Row
from sd_lora.config.values import read_table
from sd_lora.errors import Problem, UsageError, did_you_mean, refuse


@dataclass(frozen=True)
class Script:
    """A command line: its mode, its required family, and its letter in the rows.

    flags: of diffusers' script of that name, whose unique prefixes carry over.
    """

    mode: Mode
    family: str | None
    letter: str

    @property
    def flags(self) -> frozenset[str]:
        """All flags of the script."""
        of_letter = [names for key, names in BESIDE_OPTIONS.items() if self.letter in key]
        beside = (names.split() for names in of_letter)
        own = [name for name, option in OPTIONS.items() if self.letter in option.scripts]
        return frozenset(own).union(*beside)


SCRIPTS: dict[str, Script] = {
    "train_text_to_image_lora.py": Script("text_to_image", None, "A"),
    "train_text_to_image_lora_sdxl.py": Script("text_to_image", "sdxl", "B"),
    "train_dreambooth_lora.py": Script("dreambooth", None, "C"),
    "train_dreambooth_lora_sdxl.py": Script("dreambooth", "sdxl", "D"),
}
"""Scripts of diffusers 0.42.1, examples/text_to_image and examples/dreambooth."""


def read_config_file(path: str) -> dict[str, Any]:
    """Option → value of a TOML or JSON file: at the top, or in tables of any of the sections.

    JSON as a run's config.json has it, where null stands for an option that is not given.

    Raises:
        UsageError: no such file, broken TOML or JSON; all unknown keys at once.
    """
    values, problems = _read(path)
    refuse(problems)
    return values


def _read(path: str) -> tuple[dict[str, Any], list[Problem]]:
    """Options of a file, and a problem for each key that is none; raises UsageError for a file that
    cannot be parsed."""
    data = read_table(path, "config file", "a table of options")
    values: dict[str, Any] = {}
    problems: list[Problem] = []
    for key, value in data.items():
        entries = value if isinstance(value, dict) and key in SECTIONS else {key: value}
        if isinstance(value, dict) and key not in SECTIONS and key not in OPTIONS:
            text = f"{path}: {key!r} is not an option"
            problems.append(Problem(key, text, f"Tables are {', '.join(sorted(SECTIONS))}"))
            entries = {name: entry for name, entry in value.items() if name not in OPTIONS}
        for name, entry in entries.items():
            if name in values:
                problems.append(Problem(name, f"{path}: {name} is given twice"))
            elif name in OPTIONS or name in FORMER_NAMES:
                values[name] = entry
            else:
                problems.append(_unknown_key(path, name))
    return {name: value for name, value in values.items() if value is not None}, problems


def _unknown_key(path: str, name: str) -> Problem:
    """The problem of a key that is no option."""
    found = known_elsewhere(name)
    if found is None:
        return Problem(name, f"{path}: {name!r} is not an option", _near(name))
    _, row = found
    if not row.here:
        return Problem(name, f"{path}: {name} {row.reason}")
    return Problem(name, f"{path}: {name!r} is not an option", f"Here it is {row.here}")


LIKENESS = 0.8
"""Share of letters that a flag has in common with the one that was meant: a slip of the finger, and
not another word."""


def _near(name: str, as_flag: bool = False) -> str:
    """Hint with the option that was meant, if the name is a slip of it."""
    flags = [f"--{option}" for option in OPTIONS]  # so that a slip in a short name is near too
    return did_you_mean(f"--{name}", flags, LIKENESS).strip().replace("--", "--" * as_flag)


def with_dataset_options(path: str, values: dict[str, Any]) -> dict[str, Any]:
    """Values, completed by the options in kohya's dataset configuration; those of buckets only
    where there are buckets."""
    _, settings, _ = read_dataset_config(path)
    together = settings | values
    idle = {n for n in settings if any(together.get(o) is False for o in OPTIONS[n].requires)}
    return {name: value for name, value in together.items() if name in values or name not in idle}


def _expanded(word: str, script: Script | None) -> str:
    """A shortened flag in full if it is unique among those of diffusers' script."""
    flag, equals, value = word.partition("=")
    name = flag.removeprefix("--")
    if not flag.startswith("--") or not name or name in OPTIONS or script is None:
        return word
    matches = [n for n in script.flags if n.startswith(name)]
    return f"--{matches[0]}{equals}{value}" if len(matches) == 1 else word


@dataclass(frozen=True)
class _Foreign:
    """A flag that is no option here, with its words; peer and row where its name is known."""

    name: str
    words: list[str]
    peer: Peer
    row: Row


def _take_foreign(words: Iterable[str]) -> tuple[list[str], list[_Foreign]]:
    """Words without other trainers' flags and their values, and these flags.

    Before argparse takes a foreign name for the start of one of ours.
    """
    kept: list[str] = []
    foreign: list[_Foreign] = []
    values = kept
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if not _is_flag(word):
            # a switch of diffusers' scripts takes no value, so the next word is none of its own
            (kept if foreign and foreign[-1].name in SWITCHES else values).append(word)
            continue
        ours = name in OPTIONS or name in FORMER_NAMES or name in SHORT_NAMES
        found = None if ours else known_elsewhere(name)
        if found is None:
            values = kept
            kept.append(word)
        else:
            values = [value] if equals else []
            foreign.append(_Foreign(name, values, *found))
    return kept, foreign


def _is_flag(word: str) -> bool:
    return word.startswith("-") and not re.match(r"-\.?\d", word)


def _answered(
    foreign: Sequence[_Foreign], values: dict[str, Any]
) -> tuple[list[str], list[Problem]]:
    """Notes on flags of diffusers' scripts that ask for what happens anyway, and a problem for each
    other foreign flag.

    values: the options that are given.
    """
    notes: list[str] = []
    problems: list[Problem] = []
    given = Given(values)
    given.update({flag.name: flag.words[0] if flag.words else True for flag in foreign})
    for flag in foreign:
        if flag.name in DIFFUSERS:
            taken = flag.row.take(given[flag.name], given)
            if taken.kind == "needless":
                notes.append(f"--{flag.name} {taken.reason}")
            else:
                problems.append(Problem(flag.name, f"--{flag.name} {taken.reason}"))
        elif flag.row.here:
            text = f"unknown flag --{flag.name}: here it is {flag.row.here} (docs/flags.md)"
            problems.append(Problem(flag.name, text))
        else:
            problems.append(Problem(flag.name, f"--{flag.name} {flag.row.reason}"))
    peers = [flag.peer.label for flag in foreign if flag.name not in DIFFUSERS]
    if len(peers) >= MANY:
        text = "these are flags of other trainers: sd-lora translate, with the whole command after "
        problems.append(Problem("", f"{text}it, writes a configuration of them"))
    return notes, problems


MANY = 3
"""Foreign flags from which a command is likely one of another trainer."""


def _unknown(rest: Sequence[str]) -> list[Problem]:
    """Problems of the words that argparse does not know; those after an unknown flag are its
    values."""
    problems, after_flag = [], False
    for word in rest:
        if _is_flag(word) or not after_flag:
            problems.append(_unknown_flag(word))
        after_flag = _is_flag(word) or after_flag
    return problems


def _unknown_flag(word: str) -> Problem:
    """The problem of a word that is no flag."""
    flag = word.partition("=")[0]
    name = flag.lstrip("-")
    if not word.startswith("-"):
        return Problem(word, f"{word!r} is not expected here; a value with spaces needs quotes")
    for option in OPTIONS.values():
        shortened = len(name) > 3 and option.name.startswith(name)
        if option.only and (name == option.name or shortened):
            text = f"{option.name} has an effect in {option.only} runs only"
            return Problem(option.name, text, "Leave it out")
    return Problem(name, f"unknown flag {flag}", _near(name, as_flag=True))


def _value(name: str, given: Any) -> Any:
    """A flag's value from its text; a text that is none stays one, for the row's own message."""
    option = OPTIONS[FORMER_NAMES.get(name, name)]
    convert = {"int": int, "float": float, "steps": float}.get(option.kind)
    if option.kind == "dict":
        return dict(_pattern(option, word) for word in given)
    try:
        if option.kind == "ints":
            return [int(word) for word in given]
        return convert(given) if convert else given
    except ValueError:
        return given


def _pattern(option: Option, word: str) -> tuple[str, Any]:
    """A word `pattern=number` as a pair."""
    pattern, _, number = word.rpartition("=")
    try:
        return pattern, int(number) if option.item == "int" else float(number)
    except ValueError:
        raise UsageError(
            f"--{option.name} {word!r} is not pattern=number",
            [Problem(option.name, f"--{option.name} {word!r} is not pattern=number")],
        ) from None


def _take_folder(
    folder: str, values: dict[str, Any], has_captions: Callable[[str], bool], for_check: bool
) -> list[Problem]:
    """Set the place of the images and, where they are not given, the mode and the preset by a
    folder; a problem for a folder without captions and prompt, unless it is to be checked."""
    problems = []
    if not (values.get("instance_prompt") or "mode" in values):
        try:
            captioned = has_captions(folder)
            if not captioned and for_check:
                values["instance_prompt"] = NO_PROMPT
            elif not captioned:
                text = f"{folder} has no captions, so its images need a prompt"
                remedy = "Give --prompt 'a photo of sks dog'"
                problems = [Problem("instance_prompt", text, remedy)]
        except UsageError as error:
            problems = [Problem("train_data_dir", str(error))]
    mode = "dreambooth" if values.get("instance_prompt") else "text_to_image"
    values.setdefault("mode", mode)
    values.setdefault(FOLDER[values["mode"]], folder)
    values.setdefault("preset", OF_MODE[values["mode"]])
    return problems


def parse(
    argv: Sequence[str],
    script: str | None = None,
    prog: str | None = None,
    has_captions: Callable[[str], bool] = lambda folder: False,
    for_check: bool = False,
) -> TrainConfig:
    """The configuration of a command line.

    Args:
        argv: the words after the program's name.
        script: the script of `SCRIPTS` that they are for; None lets `--mode` or the file say the
            mode, and the model its family.
        prog: the program's name in help texts.
        has_captions: whether the images of a folder have captions; the folder may be given first,
            without a flag.
        for_check: whether a folder is enough: its family's published model, or Stable Diffusion
            1.x, stands for a missing base model, and `NO_PROMPT` for a missing prompt.

    Raises:
        UsageError: all unknown and refused flags and keys, wrong values and contradictions.
    """
    known = SCRIPTS[script] if script else None
    mode = known.mode if known else None
    show_help(argv, mode, prog, known is not None and known.family == "sdxl")
    folder = argv[0] if argv and not known and not _is_flag(argv[0]) else None
    words = argv[1:] if folder else argv
    words, foreign = _take_foreign(_expanded(word, known) for word in words)
    parser = build_parser(mode, prog, known is not None and known.family == "sdxl")
    namespace, rest = parser.parse_known_args(words)
    problems = _unknown(rest)
    flags = vars(namespace)
    file, folder = flags.pop("config", None), flags.pop("folder", folder)
    unread: list[Problem] = []
    try:
        values, faults = _read(file) if file else ({}, [])
    except UsageError as error:
        values, faults, unread = {}, [], [Problem("config", str(error))]
    problems += faults
    for name, given in flags.items():
        try:
            values[name] = _value(name, given)
        except UsageError as error:
            problems += error.problems
    values, notes = with_present_names(values)
    more_notes, faults = _answered(foreign, values)
    notes += more_notes
    problems += faults
    if unread:  # the options in it are unknown, so that nothing can be said of their values
        refuse([*unread, *problems])
    try:
        if values.get("dataset_config"):
            values = with_dataset_options(str(values["dataset_config"]), values)
    except UsageError as error:
        problems.append(Problem("dataset_config", str(error)))
    if folder:
        problems += _take_folder(folder, values, has_captions, for_check)
    if known:
        problems += _take_from_script(values, known, file)
        notes += _without_prior(values)
    if for_check and not values.get("pretrained_model_name_or_path"):
        family = values.get("family") or FAMILIES[0]
        values["pretrained_model_name_or_path"] = f"{PUBLISHED}{family}"
    try:
        config = TrainConfig(**values)
    except UsageError as error:
        problems += error.problems or [Problem("", str(error))]
    refuse(problems)
    return config.with_notes(notes)


def _take_from_script(values: dict[str, Any], script: Script, file: str | None) -> list[Problem]:
    """Set the mode, family and defaults of a script; a problem for each that is given otherwise."""
    problems = []
    if not values.get("preset"):  # which has a length of its own
        for name, option in OPTIONS.items():
            if option.of_scripts:
                values.setdefault(name, option.of_scripts[script.mode])
    if values.setdefault("mode", script.mode) != script.mode:
        text = f"{file} is for {values['mode']}, and this script is for {script.mode}"
        problems.append(Problem("mode", text))
    if script.family and values.setdefault("family", script.family) != script.family:
        text = f"family is {values['family']}, and this script is for {script.family}"
        problems.append(Problem("family", text))
    return problems


def _without_prior(values: dict[str, Any]) -> list[str]:
    """Leave out the class's folder and prompt without prior preservation, as diffusers' scripts do;
    a note for each."""
    if values["mode"] != "dreambooth" or values.get("with_prior_preservation"):
        return []
    names = [name for name in ("class_data_dir", "class_prompt") if values.pop(name, None)]
    return [f"{name} is left out: it needs with_prior_preservation" for name in names]
