"""Command line and configuration files → TrainConfig."""

import argparse
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from sd_lora.config.kohya import read_dataset_config
from sd_lora.config.rows import Mode, Option
from sd_lora.config.schema import (
    FORMER_NAMES,
    OPTIONS,
    SECTIONS,
    TrainConfig,
    with_present_names,
)
from sd_lora.config.translate.diffusers import BESIDE_OPTIONS, REFUSED, WITHOUT_EFFECT
from sd_lora.config.translate.kohya import TRANSLATIONS
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

DESCRIPTION = (
    "Train a Stable Diffusion LoRA: attention and convolutions, UNet and text encoder. "
    "Flags may be shortened to a unique prefix."
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def build_parser(
    mode: Mode | None = None, prog: str | None = None, xl: bool = False
) -> argparse.ArgumentParser:
    """The parser of all flags, which leaves their values as texts.

    With a mode, the help shows the flags of this mode alone, with SDXL's defaults if `xl` is True.
    """
    parser = _Parser(prog=prog, argument_default=argparse.SUPPRESS, description=DESCRIPTION)
    parser.add_argument(
        "--config", metavar="FILE", help="TOML or JSON file with any of the options below"
    )
    groups = {name: parser.add_argument_group(name) for name in SECTIONS}
    for name, option in OPTIONS.items():
        if option.kind == "list" or (name == "mode" and mode):
            continue  # tables are in files alone; a script has its mode
        if mode and option.only not in (None, mode):
            continue  # so that prefixes are as unique as in the script of this mode
        groups[option.section].add_argument(f"--{name}", **_argument(option, mode, xl))
        if option.formerly:
            hidden = _argument(option, mode, xl) | {"help": argparse.SUPPRESS}
            groups[option.section].add_argument(f"--{option.formerly}", **hidden)
    for name in WITHOUT_EFFECT:
        parser.add_argument(f"--{name}", action="store_true", help=argparse.SUPPRESS)
    return parser


def _argument(option: Option, mode: Mode | None, xl: bool) -> dict[str, Any]:
    """The arguments of `add_argument` for an option."""
    text = _help(option, mode, xl)
    if option.kind == "bool":
        return {"action": argparse.BooleanOptionalAction, "help": text}
    if option.kind == "dict":
        return {"nargs": "+", "metavar": "PATTERN=N", "help": text}
    metavar = {"int": "N", "float": "X", "str": "TEXT"}[option.kind]
    if option.choices:
        metavar = "{" + ",".join(option.choices) + "}"
    if option.without_value:
        return {"nargs": "?", "const": option.without_value, "metavar": metavar, "help": text}
    return {"metavar": metavar, "help": text}


def _help(option: Option, mode: Mode | None, xl: bool) -> str:
    """Help of an option, with its default."""
    if mode in option.of_scripts:
        return f"{option.help.replace('%', '%%')} (default: {option.of_scripts[mode]})"
    modes = [mode] if mode else [*option.modes]
    words = [
        f"{value}" + f" ({name})" * (not mode)
        for name in modes
        if (value := option.default_for(name, xl)) is not None
    ]
    if not xl:
        words += [f"{v} ({name}, SDXL)" for name, v in option.sdxl.items() if name in modes]
    default = " / ".join(words) if option.modes else option.default
    text = option.help.replace("%", "%%")
    return text if default in (None, False, "") else f"{text} (default: {default})"


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
        for name, entry in entries.items():
            if name in values:
                problems.append(Problem(name, f"{path}: {name} is given twice"))
            elif name in OPTIONS or name in FORMER_NAMES:
                values[name] = entry
            else:
                problems.append(_unknown_key(path, name, entry))
    return {name: value for name, value in values.items() if value is not None}, problems


def _unknown_key(path: str, name: str, entry: object) -> Problem:
    """The problem of a key that is no option."""
    if name in REFUSED:
        return Problem(name, f"{path}: {name} {REFUSED[name]}")
    text = f"{path}: {name!r} is not an option"
    if isinstance(entry, dict):
        return Problem(name, text, f"Tables are {', '.join(sorted(SECTIONS))}")
    here = translation(name)
    return Problem(name, text, f"Here it is {here}" if here else _near(name))


def _near(name: str) -> str:
    return did_you_mean(name, OPTIONS).strip()


def translation(name: str) -> str | None:
    """The option here for a name of another trainer: "--rank"; None if it is not known."""
    if name in TRANSLATIONS:
        return TRANSLATIONS[name]
    for option in OPTIONS.values():
        if name in option.names.values() and name != option.name:
            return f"--{option.name}"
    return None


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


def _unknown_flag(word: str) -> Problem:
    """The problem of a word that is no flag."""
    flag = word.partition("=")[0]
    name = flag.lstrip("-")
    if not word.startswith("-"):
        return Problem(word, f"{word!r} is not expected here; a value with spaces needs quotes")

    def stands_for(known: str) -> bool:
        return name == known or (len(name) > 3 and known.startswith(name))

    for refused, reason in REFUSED.items():
        if stands_for(refused):
            return Problem(refused, f"--{refused} {reason}")
    for option in OPTIONS.values():
        if option.only and stands_for(option.name):
            text = f"{option.name} has an effect in {option.only} runs only"
            return Problem(option.name, text, "Leave it out")
    here = translation(name)
    if here:
        return Problem(name, f"unknown flag {flag}: here it is {here} (docs/flags.md)")
    near = did_you_mean(flag, [f"--{n}" for n in OPTIONS]).strip()
    return Problem(name, f"unknown flag {flag}", near)


def _take_foreign(words: Iterable[str]) -> tuple[list[str], list[Problem]]:
    """Words without other trainers' flags and their values, and a problem for each such flag.

    Before argparse takes a foreign name for the start of one of ours.
    """
    kept: list[str] = []
    problems: list[Problem] = []
    foreign = False
    for word in words:
        if word.startswith("--"):
            name = word.partition("=")[0].removeprefix("--")
            foreign = name not in OPTIONS and translation(name) is not None
            if foreign:
                problems.append(_unknown_flag(word))
        if not foreign:
            kept.append(word)
    return kept, problems


def _unknown(rest: Sequence[str]) -> list[Problem]:
    """Problems of the words that argparse does not know; those after an unknown flag are its
    values."""
    problems, after_flag = [], False
    for word in rest:
        is_flag = word.startswith("-") and not re.match(r"-\.?\d", word)
        if is_flag or not after_flag:
            problems.append(_unknown_flag(word))
        after_flag = is_flag or after_flag
    return problems


def _value(name: str, given: Any) -> Any:
    """A flag's value from its text; a text that is none stays one, for the row's own message."""
    option = OPTIONS[FORMER_NAMES.get(name, name)]
    convert = {"int": int, "float": float}.get(option.kind)
    if option.kind == "dict":
        return dict(_pattern(option, word) for word in given)
    try:
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


def parse(argv: Sequence[str], script: str | None = None, prog: str | None = None) -> TrainConfig:
    """The configuration of a command line.

    Args:
        argv: the words after the program's name.
        script: the script of `SCRIPTS` that they are for; None lets `--mode` or the file say the
            mode, and the model its family.
        prog: the program's name in help texts.

    Raises:
        UsageError: all unknown and refused flags and keys, wrong values and contradictions.
    """
    known = SCRIPTS[script] if script else None
    mode = known.mode if known else None
    words, problems = _take_foreign(argv)
    parser = build_parser(mode, prog, known is not None and known.family == "sdxl")
    namespace, rest = parser.parse_known_args([_expanded(word, known) for word in words])
    problems += _unknown(rest)
    flags = vars(namespace)
    file = flags.pop("config", None)
    idle = {name for name in WITHOUT_EFFECT if flags.pop(name, False)}
    values, faults = _read(file) if file else ({}, [])
    problems += faults
    for name, given in flags.items():
        try:
            values[name] = _value(name, given)
        except UsageError as error:
            problems += error.problems
    values, notes = with_present_names(values)
    if idle and values.get("train_text_encoder"):
        text = "pre_compute_text_embeddings contradicts train_text_encoder"
        problems.append(Problem("pre_compute_text_embeddings", text))
    try:
        if values.get("dataset_config"):
            values = with_dataset_options(str(values["dataset_config"]), values)
    except UsageError as error:
        problems.append(Problem("dataset_config", str(error)))
    if known:
        problems += _take_from_script(values, known, file)
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
