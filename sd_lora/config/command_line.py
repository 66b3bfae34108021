"""Command line and configuration file → TrainConfig, or several of them."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from sd_lora.config.config_file import read as read_file
from sd_lora.config.config_file import refused_jobs
from sd_lora.config.flags import Parser, build_parser, is_flag, show_help
from sd_lora.config.foreign_flags import answered, take_foreign, unknown_words
from sd_lora.config.jobs import Job, between, read_tables, told_once
from sd_lora.config.kohya import read_dataset_config
from sd_lora.config.options.dreambooth import NO_PROMPT
from sd_lora.config.options.run import PUBLISHED, named_after
from sd_lora.config.options.sources import ELSEWHERE, FOLDER
from sd_lora.config.presets import OF_MODE
from sd_lora.config.rows import FAMILIES, Mode, Option
from sd_lora.config.schema import (
    FORMER_NAMES,
    OPTIONS,
    TrainConfig,
    with_present_names,
)
from sd_lora.config.spelling import Spelling, spelling_of
from sd_lora.config.translate.diffusers import BESIDE_OPTIONS
from sd_lora.config.values import plain_value
from sd_lora.errors import Problem, UsageError, refuse


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
    """A word `pattern=number`, or `key=value`, as a pair."""
    if option.item == "value":
        key, equals, value = word.partition("=")
        if equals and key:
            return key, plain_value(value)
        text = f"--{option.name} {word!r} is not key=value"
        raise UsageError(text, [Problem(option.name, text)])
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
    """Set the place of the images and, where they are not given, the mode, the preset and the
    output folder by a folder; a problem for a folder without captions and prompt, unless it is to
    be checked."""
    for name in FOLDER.values():  # a file's gives way
        values.pop(name, None)
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
            problems = [Problem(FOLDER["text_to_image"], str(error))]
    mode = values.setdefault("mode", _mode_of(values))
    values[FOLDER[mode]] = folder
    for option, value in {"preset": OF_MODE[mode], **named_after(folder)}.items():
        values.setdefault(option, value)
    return problems


def _mode_of(values: Mapping[str, Any]) -> Mode:
    """The mode of a run by its other options: a prompt for the subject, or a folder of it, is for
    DreamBooth."""
    of_subject = any(values.get(name) for name in ("instance_prompt", FOLDER["dreambooth"]))
    captioned = values.get(FOLDER["text_to_image"])
    return "dreambooth" if of_subject and not captioned else "text_to_image"


def _without_folder(argv: Sequence[str], prog: str | None, mode: str) -> Problem:
    """The problem of a command without images, with the command that has them."""
    words = [word if re.fullmatch(r"[\w./:=+-]+", word) else f'"{word}"' for word in argv]
    command = " ".join([prog or "sd-lora train", "FOLDER", *(words or ["--model", "MODEL"])])
    text = "no folder of images is given"
    return Problem(FOLDER[mode], text, f"Put it first: {command}")


def _folder_among(words: Sequence[str], first: str) -> str | None:
    """The folder of images among the words that are of no flag: the first one of the command, or a
    folder that exists.

    words: those that argparse does not know. first: of the command.
    """
    of_no_flag = takewhile(lambda word: not is_flag(word), words)
    return next((w for w in of_no_flag if w == first or Path(w).expanduser().is_dir()), None)


def _flags_of(parser: Parser, folder: str | None) -> tuple[dict[str, str], list[Problem]]:
    """Option → the word that gave it, and a problem for each that is given in two ways.

    folder: given as a word without a flag.
    """
    flags: dict[str, list[str]] = {}
    for name, found in parser.given.items():
        present = FORMER_NAMES.get(name, name)
        # a former switch may stand beside the option: diffusers' --optimizer AdamW --use_8bit_adam
        switch = name != present and OPTIONS[present].former_values
        flags.setdefault(name if switch else present, []).extend(found)
    first = ["FOLDER"] * bool(folder) + flags.pop("folder", [])
    given = {name: found[-1] for name, found in flags.items()}
    if first:
        flags["folder"] = first + [f for name in FOLDER.values() for f in flags.pop(name, [])]
        given |= dict.fromkeys(FOLDER.values(), first[-1])
    problems = []
    for name, found in flags.items():
        *ways, last = dict.fromkeys(flag.replace("--no-", "--") for flag in found)
        if ways:
            text = f"{', '.join(ways)} and {last} are the same option"
            problems.append(Problem(name, text, "Give one of them"))
    return given, problems


@dataclass(frozen=True)
class _Read:
    """The options of a command line and its file, as they were found.

    values: option → value. flags: those that the command line gives. jobs: tables of the file,
    None without. folder: of images, given without the option's name. file: path of the
    configuration. spelling: names of the options. notes, problems: on the way.
    """

    values: dict[str, Any]
    flags: dict[str, Any]
    jobs: Any
    folder: str | None
    file: str | None
    spelling: Spelling
    notes: list[str]
    problems: list[Problem]


def _read_words(argv: Sequence[str], script: Script | None, parser: Parser) -> _Read:
    """Read all options of a command line."""
    words, foreign = take_foreign(_expanded(word, script) for word in argv)
    namespace, rest = parser.parse_known_args(words)
    flags = vars(namespace)
    folder = None if script else _folder_among(rest, argv[0] if argv else "")
    if folder is not None:
        rest.remove(folder)
    given, problems = _flags_of(parser, folder)
    problems += unknown_words(rest, bool(folder or parser.given.get("folder")))
    file, folder = flags.pop("config", None), flags.pop("folder", folder)
    unread: list[Problem] = []
    try:
        values, faults, jobs = read_file(file) if file else ({}, [], None)
    except UsageError as error:
        values, faults, jobs, unread = {}, [], None, [Problem("config", str(error))]
    spelling = spelling_of(OPTIONS, given, [*values] if file else None, script is not None)
    problems += faults
    by_flag = {}
    for name, value in flags.items():
        try:
            by_flag[name] = _value(name, value)
        except UsageError as error:
            problems += error.problems
    values, notes = with_present_names(values | by_flag)
    more_notes, faults = answered(foreign, values)
    problems += faults
    if unread:  # the options in it are unknown, so that nothing can be said of their values
        refuse([*unread, *problems])
    found = notes + more_notes
    return _Read(values, by_flag, jobs, folder, file, spelling, found, problems)


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
        has_captions: whether the images of a folder have captions; the folder may be given without
            a flag.
        for_check: whether a folder is enough: its family's published model, or Stable Diffusion
            1.x, stands for a missing base model, and `NO_PROMPT` for a missing prompt.

    Raises:
        UsageError: all unknown and refused flags and keys, wrong values and contradictions, by the
            names that the person gave.
    """
    read = _read_line(argv, script, prog)
    words = _Words(argv, SCRIPTS[script] if script else None, prog, has_captions, for_check)
    refused = refused_jobs(read.file, read.jobs)
    return _configured(replace(read, problems=[*read.problems, *refused]), words)


def parse_jobs(
    argv: Sequence[str],
    script: str | None = None,
    prog: str | None = None,
    has_captions: Callable[[str], bool] = lambda folder: False,
    for_check: bool = False,
) -> list[Job]:
    """The jobs of a command line whose file has `[[jobs]]`; of any other its one run, a job without
    a name.

    A job has the options of its table, and those of the file's top that it does not name itself;
    flags are for all. Arguments and errors are those of `parse`, the mistakes of all jobs at once.
    """
    read = _read_line(argv, script, prog)
    words = _Words(argv, SCRIPTS[script] if script else None, prog, has_captions, for_check)
    if read.jobs is None:
        return [Job("", _configured(read, words))]
    tables, faults = read_tables(read.jobs, read.values, read.flags, str(read.file))
    problems = [*read.problems, *faults]
    if read.folder:
        text = "FOLDER holds the images of one run, and the file has [[jobs]]"
        problems.append(Problem("folder", text, "Name a folder in each job"))
    jobs, of_jobs = [], {}
    for name, (values, notes) in tables.items():
        one = replace(read, values=values, folder=None, notes=read.notes + notes, problems=[])
        try:
            jobs.append(Job(name, _configured(one, words)))
        except UsageError as error:
            of_jobs[name] = error.problems or [Problem("", str(error))]
    problems += told_once(of_jobs, len(tables))
    refuse(problems or between(jobs))
    return jobs


@dataclass(frozen=True)
class _Words:
    """The arguments of `parse`; script: the row."""

    argv: Sequence[str]
    script: Script | None
    prog: str | None
    has_captions: Callable[[str], bool]
    for_check: bool


def _read_line(argv: Sequence[str], script: str | None, prog: str | None) -> _Read:
    """Show the help where it is asked for, else read all options."""
    known = SCRIPTS[script] if script else None
    mode, xl = (known.mode, known.family == "sdxl") if known else (None, False)
    show_help(argv, mode, prog, xl)
    return _read_words(argv, known, build_parser(mode, prog, xl))


def _configured(read: _Read, words: _Words) -> TrainConfig:
    """The configuration of options as they were found."""
    values, problems, known = read.values, read.problems, words.script
    with read.spelling.in_errors():
        try:
            if values.get("dataset_config"):
                values = with_dataset_options(str(values["dataset_config"]), values)
        except UsageError as error:
            problems.append(Problem("dataset_config", str(error)))
        if known:
            problems += _take_from_script(values, known, read.file)
            read.notes.extend(_without_prior(values))
        elif read.folder:
            problems += _take_folder(read.folder, values, words.has_captions, words.for_check)
        else:
            values.setdefault("mode", _mode_of(values))
            if not (read.file or any(map(values.get, (*FOLDER.values(), *ELSEWHERE)))):
                problems.append(_without_folder(words.argv, words.prog, values["mode"]))
        if words.for_check and not values.get("pretrained_model_name_or_path"):
            family = values.get("family") or FAMILIES[0]
            values["pretrained_model_name_or_path"] = f"{PUBLISHED}{family}"
        try:
            config = TrainConfig(**values)
        except UsageError as error:
            told = {problem.field for problem in problems}
            found = error.problems or [Problem("", str(error))]
            problems += [problem for problem in found if problem.field not in told]
        refuse(problems)
    return config.with_notes(read.notes).with_spelling(read.spelling)


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
