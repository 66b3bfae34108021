"""The form of a new run: its fields are the rows of `config/options/`, its checks the command
line's.

given: option → text, of fields that are filled in; under `FOLDER` the folder of images, which
stands first on a command line.
"""

import hashlib
import os
import shlex
import subprocess
import tomllib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd_lora.config.command_line import parse
from sd_lora.config.config_file import read_config_file
from sd_lora.config.flags import is_flag
from sd_lora.config.options.run import named_after
from sd_lora.config.options.sources import FOLDER as PLACES
from sd_lora.config.presets import OF_MODE, preset
from sd_lora.config.rows import PRESETS, Mode, Option
from sd_lora.config.schema import OPTIONS, SECTIONS, TrainConfig
from sd_lora.config.translate.peers import PEERS
from sd_lora.config.translate.read import peer_of, read
from sd_lora.config.translate.text import options_toml, to_table
from sd_lora.config.translate.translation import translate
from sd_lora.data.check.places import check_places
from sd_lora.data.sources.open import has_captions
from sd_lora.errors import Problem, UsageError
from sd_lora.files import write_whole
from sd_lora.training.output_folder import resumed_checkpoint

FOLDER = "folder"

ON, OFF = "on", "off"

FIRST = ("pretrained_model_name_or_path", "instance_prompt", "output_dir")
"""Options that nearly every run gives, beside the folder and the purpose."""

Given = Mapping[str, str]


@dataclass(frozen=True)
class Field:
    """An option on the page.

    usual: its value if it is not given, as a text. value: as given. changed: it differs from the
    usual one. problem: its mistake, or "". words: by which the search finds it.
    """

    option: Option
    usual: str
    value: str
    problem: str

    @property
    def name(self) -> str:
        return self.option.name

    @property
    def label(self) -> str:
        return self.option.name.replace("_", " ")

    @property
    def changed(self) -> bool:
        return self.value not in ("", self.usual)

    @property
    def choices(self) -> tuple[str, ...]:
        """Values to choose from; none for a field to type into."""
        if self.option.kind == "bool":
            return (ON, OFF)
        return () if self.option.or_import_path else self.option.choices

    @property
    def words(self) -> str:
        """Words by which a search finds it: its names here and elsewhere, and its help."""
        names = (self.option.name, self.label, self.option.short or "", *self.option.names.values())
        return " ".join([*names, self.option.help]).lower()

    @property
    def hint(self) -> str:
        """Its range, or its form where it takes several words."""
        forms = {"dict": "KEY=VALUE …", "ints": "numbers", "list": "tables of TOML"}
        return self.option.range_text() or forms.get(self.option.kind, "")


def text_of(value: Any, option: Option) -> str:
    """A value as its field shows it."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return ON if value else OFF
    if option.kind == "dict" and isinstance(value, dict):
        return " ".join(shlex.quote(f"{key}={entry}") for key, entry in value.items())
    if option.kind == "list":
        return options_toml({option.name: value}).strip()
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def usual_text(option: Option, given: Given) -> str:
    """An option's value where it is not given: of the purpose, of the folder, or by default."""
    mode: Mode = _mode(given)
    name = given.get("preset", "")
    if option.name in (folder := _named_after(given)):
        return folder[option.name]
    if given.get(FOLDER) and option.name == "preset":
        return OF_MODE[mode]
    purpose = preset(name if name in PRESETS else OF_MODE[mode]) if _has_purpose(given) else None
    if purpose and option.name in purpose.options:
        return text_of(purpose.options[option.name], option)
    if purpose and option.name in purpose.sd:
        sd, xl = (text_of(table.get(option.name), option) for table in (purpose.sd, purpose.sdxl))
        return sd if sd == xl else f"{sd}, SDXL: {xl}"
    return text_of(option.default_for(mode), option)


def _has_purpose(given: Given) -> bool:
    return bool(given.get("preset") or given.get(FOLDER))


def _named_after(given: Given) -> dict[str, str]:
    with suppress(OSError, ValueError, RuntimeError):
        return named_after(given[FOLDER]) if given.get(FOLDER) else {}
    return {}


def _mode(given: Given) -> Mode:
    """The mode that the fields stand for; a folder of images is not looked into."""
    if given.get("mode") in PLACES:
        return given["mode"]  # type: ignore[return-value]
    subject = given.get("instance_prompt") or given.get(PLACES["dreambooth"])
    return "dreambooth" if subject else "text_to_image"


def sections(given: Given, problems: Mapping[str, str]) -> dict[str, list[Field]]:
    """Section → fields of all options, and first "main": those that most people need.

    problems: option → its mistake.
    """
    fields = {
        name: Field(option, usual_text(option, given), given.get(name, ""), problems.get(name, ""))
        for name, option in OPTIONS.items()
    }
    shown = {*FIRST, "preset"}
    main = [f for f in fields.values() if f.option.main and f.name not in shown]
    shown |= {field.name for field in main}
    rest = [field for field in fields.values() if field.name not in shown]
    found = {"first": [fields[name] for name in FIRST], "main": main}
    return found | {s: [f for f in rest if f.option.section == s] for s in SECTIONS}


def plain_words(name: str, text: str) -> list[str]:
    """The words of a field, which are values; raises UsageError for one that would be a flag."""
    try:
        words = shlex.split(text)
    except ValueError:
        words = text.split()
    if wrong := [word for word in words if is_flag(word)]:
        line = f"{name}: {wrong[0]!r} begins like a flag"
        raise UsageError(line, [Problem(name, line)])
    return words


def _several(option: Option, text: str) -> list[str]:
    words = plain_words(option.name, text)
    return [_flag(option), *words] if words else []


def _flag(option: Option) -> str:
    return f"--{option.short or option.name}"


def _single(option: Option, text: str) -> list[str]:
    flag = _flag(option)
    return [f"{flag}={text}"] if text.startswith("-") else [flag, text]


def _switch(option: Option, text: str) -> list[str]:
    return {ON: [f"--{option.name}"], OFF: [f"--no-{option.name}"]}.get(text, [])


WORDS: dict[str, Callable[[Option, str], list[str]]] = {
    "bool": _switch,
    "dict": _several,
    "ints": _several,
}
"""Kind of an option → its words on a command line; of others a flag and its text."""


@dataclass(frozen=True)
class Request:
    """A run as the form asks for it.

    words: of the command line, after `train`. config: the configuration, None with `problems`:
    option, or "" → the mistakes. toml: of the options that are given.
    """

    words: list[str]
    config: TrainConfig | None
    problems: dict[str, str]
    toml: str = ""

    @property
    def unchecked(self) -> list[str]:
        """Mistakes with which no image can be checked: a check needs neither model nor prompt."""
        needless = ("instance_prompt", "pretrained_model_name_or_path")
        return [text for name, text in self.problems.items() if name not in needless]

    @property
    def command(self) -> str:
        """The command that does the same, for a shell of this system."""
        words = ["sd-lora", "train", *self.words]
        return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def request_of(given: Given, folder: Path, places: bool = False) -> Request:
    """The run that the fields ask for, checked as on the command line.

    Args:
        given: see the module.
        folder: of the studio's own files, for tables that no flag can hold.
        places: whether paths are checked too, as before a run.
    """
    words, wrong = _words(given, folder)
    problems = list(wrong)
    config = None
    try:
        config = parse(words, None, "sd-lora train", has_captions)
        if places and not problems:
            check_places(config, resumed_checkpoint)
    except UsageError as error:
        problems += error.problems or [Problem("", str(error))]
    told: dict[str, str] = {}
    for problem in problems:
        field, line = _field_of(problem, given), problem.line().removeprefix("--")
        told[field] = f"{told[field]}\n{line}" if field in told else line
    if told or config is None:
        return Request(words, None, told)
    return Request(words, config, {}, _toml(given, config))


def _field_of(problem: Problem, given: Given) -> str:
    """The field beside which a mistake is shown; "" for none of them."""
    if problem.field in PLACES.values() and not given.get(problem.field):
        return FOLDER
    return problem.field if problem.field in OPTIONS else ""


def _words(given: Given, folder: Path) -> tuple[list[str], list[Problem]]:
    """The words of a command line, and mistakes that no command line could hold."""
    words, problems = [], []
    if place := given.get(FOLDER, "").strip():
        words.append(str(Path(place).expanduser()) if place.startswith(("-", "~")) else place)
    tables = {name: given[name] for name in given if _is_table(name) and given[name].strip()}
    try:
        if tables:
            words += ["--config", str(_tables_file(tables, folder))]
    except UsageError as error:
        problems += error.problems
    for name, option in OPTIONS.items():
        text = given.get(name, "").strip()
        if not text or _is_table(name):
            continue
        try:
            words += WORDS.get(option.kind, _single)(option, text)
        except UsageError as error:
            problems += error.problems
    return words, problems


def _is_table(name: str) -> bool:
    return name in OPTIONS and OPTIONS[name].kind == "list"


def _tables_file(tables: Given, folder: Path) -> Path:
    """A configuration with tables alone, under a name of its own contents."""
    values: dict[str, Any] = {}
    for name, text in tables.items():
        try:
            found = tomllib.loads(text)[name]
        except (ValueError, LookupError) as error:
            line = f"{name} is no list of [[{name}]] tables of TOML: {error}"
            raise UsageError(line, [Problem(name, line)]) from None
        values[name] = found
    data = options_toml(values).encode()
    path = folder / "tables" / f"{hashlib.sha256(data).hexdigest()[:12]}.toml"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        write_whole(path, data)
    return path


def _toml(given: Given, config: TrainConfig) -> str:
    """The options that are given, and those that the folder stands for, as TOML."""
    names = {name for name, text in given.items() if name in OPTIONS and text.strip()}
    names |= {"mode", "output_dir", *config.places}
    names |= {"preset"} if config.preset else set()
    values = {name: getattr(config, name) for name in OPTIONS if name in names}
    return options_toml(values)


def imported(source: str) -> tuple[dict[str, str], str]:
    """Fields for the configuration or command of another trainer, or for one of ours; and a text on
    what became of each setting.

    source: a path, or a command.

    Raises:
        UsageError: no settings, or of another kind of training.
    """
    path = Path(source.strip()).expanduser()
    with suppress(OSError, UsageError):  # another trainer's
        if path.is_file() and path.suffix.lower() in (".toml", ".json"):
            values = read_config_file(str(path))
            return _fields(values), f"{path.name} is a configuration of sd-lora: taken as it is"
    settings = read([source.strip()])
    translation = translate(
        peer_of(settings), settings.values, settings.folder, settings.fixed, settings.assumed
    )
    return _fields(translation.values), to_table(translation)


def _fields(values: Mapping[str, Any]) -> dict[str, str]:
    found = {name: text_of(value, OPTIONS[name]) for name, value in values.items()}
    return {name: text for name, text in found.items() if text}


TRAINERS: Sequence[str] = tuple(peer.label for peer in PEERS.values())
"""Trainers whose configurations can be imported."""
