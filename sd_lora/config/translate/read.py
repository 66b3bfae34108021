"""A file or a command line of another trainer → its settings.

Commands: sd-scripts, diffusers' scripts, SimpleTuner; `--config_file` and the like are read. Files:
JSON, TOML, YAML, or a script of the shell, of Windows or PowerShell with a command in it.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sd_lora.config.command_line import SCRIPTS
from sd_lora.config.schema import OPTIONS
from sd_lora.config.translate.files import TABLES, load
from sd_lora.config.translate.peers import PEERS, Peer
from sd_lora.errors import UsageError, near_path


@dataclass(frozen=True)
class Settings:
    """Settings of another trainer as they were found.

    fixed: options that the program's name stands for. assumed: settings that it stands for.
    """

    peer: str
    values: dict[str, Any]
    folder: Path = Path()
    fixed: dict[str, Any] = field(default_factory=dict)
    assumed: dict[str, Any] = field(default_factory=dict)


PROGRAMS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "train_network.py": ("sd-scripts", {}),
    "sdxl_train_network.py": ("sd-scripts", {"sdxl": True}),
    "train.py": (None, {}),
    "simpletuner": ("simpletuner", {}),
    **{script: ("diffusers", {}) for script in SCRIPTS},
    "train_dreambooth_lora_sd15_advanced.py": ("diffusers", {}),
    "train_dreambooth_lora_sdxl_advanced.py": ("diffusers", {}),
}
"""Name of a program in a command → trainer, and settings that the name stands for."""

ADVANCED = {
    "train_dreambooth_lora_sd15_advanced.py": "train_dreambooth_lora.py",
    "train_dreambooth_lora_sdxl_advanced.py": "train_dreambooth_lora_sdxl.py",
}
CONFIGS = ("config_file", "config-path", "config_path", "config")
"""Flags that name a file of settings."""

FOREIGN = re.compile(
    r"(flux|sd3|lumina|hunyuan_image|anima)\w*_train_network\.py|\w*_train\.py|train_db\.py"
    r"|fine_tune\.py|\w*textual_inversion\w*\.py"
    r"|train_(control_?net|dreambooth|text_to_image)\w*\.py"
)
"""Names of programs that train something else."""


def read(words: Sequence[str], peer: str | None = None) -> Settings:
    """The settings in a file, or in the words of a command.

    Args:
        words: a file's name, a command in one text, or its words.
        peer: the trainer, of `PEERS`; None to tell it by the names.

    Raises:
        UsageError: no settings, an unreadable file, or a program that trains something else.
    """
    if not words:
        raise UsageError("give a file or a command of another trainer")
    path = Path(words[0]).expanduser()
    if len(words) == 1 and path.is_file():
        if path.suffix.lower() in TABLES:
            return _of_table(load(path), path, peer)
        text = _text(path)
        return _of_words(_command_in(text, path), peer, path.parent)
    if len(words) == 1 and re.search(r"\s-", words[0]):
        return _of_words(_command_in(words[0], None), peer, Path())
    if len(words) == 1 and not words[0].startswith("-"):
        near = near_path(path, Path.is_file)
        raise UsageError(f"{words[0]} is no file, and no command with flags{near}")
    return _of_words(list(words), peer, Path())


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None


def _of_table(table: Any, path: Path, peer: str | None) -> Settings:
    """The settings of a parsed file."""
    if not isinstance(table, dict):
        raise UsageError(
            f"{path} holds no settings; a list of datasets is read with the file that names it"
        )
    if isinstance(table.get("datasets"), list) and "config" not in table:
        raise UsageError(
            f"{path} is sd-scripts' dataset config: sd-lora train --dataset_config {path} reads it"
        )
    if peer is None and isinstance(table.get("config"), dict) and "process" in table["config"]:
        peer = "ai-toolkit"
    if peer is None and "LoRA_type" in table:
        peer = "kohya_ss"
    if peer in (None, "sd-scripts"):  # sections of a config_file are flattened there
        flat: dict[str, Any] = {}
        for key, value in table.items():
            flat |= value if isinstance(value, dict) and key not in OPTIONS else {key: value}
        if peer == "sd-scripts" or _likeliest(flat) == "sd-scripts":
            table, peer = flat, "sd-scripts"
    name = peer or _likeliest(table)
    return Settings(name, table, path.parent)


def _likeliest(table: Mapping[str, Any]) -> str:
    """The trainer that knows most of the names.

    Raises:
        UsageError: none knows half of them.
    """
    counts: dict[str, int] = {}
    for name, peer in PEERS.items():
        known = peer.prepare(dict(table))
        told = {setting for setting in known if setting in peer.all_rows}
        counts[name] = len(told - {*peer.derived}) if name != "ai-toolkit" else 0
    best = max(counts, key=lambda name: counts[name])
    if 2 * counts[best] < len(table) or not counts[best]:
        names = ", ".join(PEERS)
        raise UsageError(f"these are settings of no known trainer; say which by --from: {names}")
    return best


def _command_in(text: str, path: Path | None) -> list[str]:
    """The words of the command in a text, with variables set before it put in.

    Raises:
        UsageError: no line with flags.
    """
    windows = path is not None and path.suffix.lower() in (".bat", ".cmd", ".ps1")
    windows = windows or bool(re.search(r"(^|[\s\"'=])[A-Za-z]:\\", text))
    joined = re.sub(r"[ \t][\\^`][ \t]*\r?\n", " ", text)
    variables = {
        name: value.strip().strip("\"'")
        for name, value in re.findall(
            r"^\s*(?:export\s+|set\s+|\$)?(\w+)\s*=\s*(.*?)\s*(?:#.*)?$", joined, re.MULTILINE
        )
    }
    lines = [line for line in joined.splitlines() if re.search(r"\s--?\w", line)]
    lines = [line for line in lines if not line.lstrip().startswith(("#", "::", "rem "))]
    if not lines:
        raise UsageError("there is no command with flags in it")
    line = max(lines, key=lambda found: found.count("--"))
    lexer = shlex.shlex(line, posix=True, punctuation_chars=False)
    lexer.whitespace_split, lexer.commenters = True, ""
    if windows:
        lexer.escape = ""
    try:
        words = list(lexer)
    except ValueError as error:
        raise UsageError(f"the command has an open quote: {error}") from None
    return [_filled(word, variables) for word in words]


def _filled(word: str, variables: Mapping[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        name = next(group for group in match.groups() if group)
        return variables.get(name, match[0])

    return re.sub(r"\$\{(\w+)\}|\$env:(\w+)|\$(\w+)|%(\w+)%", value, word)


def _of_words(words: list[str], peer: str | None, folder: Path) -> Settings:
    """The settings of a command's words."""
    start = next(
        (i for i, w in enumerate(words) if Path(w.replace("\\", "/")).name in PROGRAMS), -1
    )
    if start < 0 and peer is None:
        other = next((w for w in words if FOREIGN.fullmatch(Path(w.replace("\\", "/")).name)), None)
        file = next((w for w in words if Path(w).suffix.lower() in TABLES), None)
        if file and Path(file).is_file() and "run.py" in " ".join(words):
            return _of_table(load(Path(file)), Path(file), "ai-toolkit")
        if other:
            raise UsageError(f"{other} trains no LoRA of Stable Diffusion 1, 2 or XL")
    program = Path(words[start].replace("\\", "/")).name if start >= 0 else ""
    named, assumed = PROGRAMS.get(program, (None, {}))
    flags = _flags(words[start + 1 :], program)
    if program == "train.py" and any(name in flags for name in ("config-path", "config_path")):
        named = "onetrainer"
    config = next((flags[name] for name in CONFIGS if name in flags), None)
    values: dict[str, Any] = {}
    if config is not None and peer != "ai-toolkit":
        path = folder / Path(str(config)).expanduser()
        path = path if path.is_file() or path.suffix else path.with_suffix(".toml")
        inner = _of_table(load(path), path, peer or named)
        named, values = inner.peer, values | inner.values
        flags = {key: value for key, value in flags.items() if key not in CONFIGS}
    values |= flags
    name = peer or named or _likeliest(values)
    if not values:
        raise UsageError("there are no flags to translate")
    return Settings(name, values, folder, _of_script(program, values), assumed)


def _of_script(program: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Options that the name of a script of diffusers stands for: mode, family, and its defaults; a
    length only where none is given."""
    script = SCRIPTS.get(ADVANCED.get(program, program))
    if script is None:
        return {}
    fixed: dict[str, Any] = {"mode": script.mode}
    fixed |= {"family": script.family} if script.family else {}
    fixed |= {n: o.of_scripts[script.mode] for n, o in OPTIONS.items() if o.of_scripts}
    if "max_train_steps" in values:
        del fixed["num_train_epochs"]
    return fixed


def _flags(words: Sequence[str], program: str) -> dict[str, Any]:
    """Name → value of the flags: a text, a list of several, or True for a flag that stands
    alone."""
    found: dict[str, Any] = {}
    name = ""
    for word in words:
        if re.match(r"--?[A-Za-z]", word):
            flag, equals, value = word.lstrip("-").partition("=")
            name = _whole_name(flag, program)
            found[name] = value if equals else True
        elif name:
            before = found[name]
            found[name] = word if before is True else [*_listed(before), word]
    return found


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _whole_name(flag: str, program: str) -> str:
    """A flag in full, if it is the unique start of one of diffusers' script."""
    script = SCRIPTS.get(ADVANCED.get(program, program))
    if script is None or flag in script.flags or flag in OPTIONS:
        return flag
    matches = [name for name in script.flags if name.startswith(flag)]
    return matches[0] if len(matches) == 1 else flag


def peer_of(settings: Settings) -> Peer:
    """The trainer of settings."""
    return PEERS[settings.peer]
