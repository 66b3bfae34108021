"""A translation as text: our TOML, and the table of answers."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from sd_lora.config.schema import OPTIONS, SECTIONS
from sd_lora.config.translate.rows import Kind
from sd_lora.config.translate.translation import Line, Translation
from sd_lora.errors import counted

TITLES: dict[Kind, str] = {
    "same": "taken as is",
    "otherwise": "taken with another meaning",
    "needless": "not needed here",
    "absent": "not there",
}
SECRETS = re.compile(r"(token|api_key|password|secret)$")
"""Names of settings whose values are not shown."""


def to_toml(translation: Translation, source: str) -> str:
    """The options as TOML, which `sd-lora train --config` reads.

    source: name of the file or program that they come from, for the first line.
    """
    lines = [f"# {source} of {translation.peer.label}, by sd-lora translate"]
    lost = [line.name for line in translation.lines if line.taken.kind == "absent"]
    lines += [f"# not there: {', '.join(lost)}"] * bool(lost)
    lines += [f"# still to give: {problem.line()}" for problem in translation.problems]
    return "\n".join(lines) + "\n" + options_toml(translation.values)


def options_toml(values: Mapping[str, Any]) -> str:
    """Options as TOML, in tables of their sections. values: option → value."""
    lines: list[str] = []
    for section in SECTIONS:
        rows = {
            n: v
            for n, v in values.items()
            if OPTIONS[n].section == section and not SECRETS.search(n)
        }
        plain = {name: value for name, value in rows.items() if OPTIONS[name].kind != "list"}
        if plain:
            ordered = [name for name in OPTIONS if name in plain]
            lines += ["", f"[{section}]"]
            lines += [f"{name} = {toml_value(plain[name])}" for name in ordered]
    for table in values.get("sources") or []:
        lines += ["", "[[sources]]"]
        lines += [f"{name} = {toml_value(value)}" for name, value in table.items()]
    return "".join(f"{line}\n" for line in lines)


def toml_value(value: Any) -> str:
    """A value in TOML; a text with backslashes in single quotes, where nothing is an escape."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        pairs = (f"{toml_value(str(key))} = {toml_value(entry)}" for key, entry in value.items())
        return "{ " + ", ".join(pairs) + " }"
    if isinstance(value, list):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, int | float):
        return repr(value)
    text = str(value)
    if "\\" in text and "'" not in text and text.isprintable():
        return f"'{text}'"
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def to_table(translation: Translation) -> str:
    """The answer to each setting, by kind; settings with the same reason share a line."""
    given = [line for line in translation.lines if not line.default]
    counts = {kind: sum(line.taken.kind == kind for line in given) for kind in TITLES}
    numbers = ", ".join(f"{counts[kind]} {title}" for kind, title in TITLES.items())
    lines = [f"{translation.peer.label}: {counted(len(given), 'setting')}: {numbers}"]
    for kind, title in TITLES.items():
        rows = [line for line in given if line.taken.kind == kind]
        if rows:
            lines += ["", f"{title}:"]
            lines += _grouped(rows) if kind == "needless" else _rows(rows)
    theirs = [line for line in translation.lines if line.default]
    if theirs:
        lines += ["", "not said, and otherwise here:", *_rows(theirs)]
    if translation.problems:
        lines += ["", "still to give:"]
        lines += [f"  {problem.line()}" for problem in translation.problems]
    return "\n".join(lines)


def _rows(lines: Iterable[Line]) -> list[str]:
    found = []
    for line in lines:
        left = line.name if line.value is True else f"{line.name} = {_shown(line)}"
        same = line.taken.kind == "same" and [*line.taken.values] == [line.name]
        values = ", ".join(_short(name, value) for name, value in line.taken.values.items())
        right = f" → {values}" if values and not same else ""
        reason = "" if line.taken.kind == "same" else line.taken.reason
        found.append(f"  {left}{right}" + (f": {reason}" if reason else ""))
    return found


def _grouped(lines: Iterable[Line]) -> list[str]:
    groups: dict[str, list[str]] = {}
    for line in lines:
        groups.setdefault(line.taken.reason, []).append(line.name)
    return [f"  {', '.join(names)}: {reason}" for reason, names in groups.items()]


def _short(name: str, value: Any) -> str:
    if OPTIONS[name].kind == "list":
        return "[[sources]] " + " and ".join(str(table.get("path")) for table in value)
    return f"{name} = {toml_value(value)}"


def _shown(line: Line) -> str:
    """A setting's value in one short line; that of a secret is left out."""
    if SECRETS.search(line.name):
        return "…"
    value = line.value
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return f"{len(value)} of them"
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    text = text.replace("\n", " ")
    return text if len(text) <= 60 else text[:59] + "…"
