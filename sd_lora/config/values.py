"""Values of configurations: tables read from files, and pydantic's errors in plain words."""

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from sd_lora.config.rows import Option
from sd_lora.errors import Problem, UsageError, did_you_mean, near_path
from sd_lora.files import utf8_text

KINDS: dict[str, type] = {"bool": bool, "int": int, "float": float, "str": str}
"""Kind of an option that has a single value → its type."""

TYPES = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "steps": "a whole number, or a share of the run below 1, such as 0.1",
    "str": "a text",
    "string": "a text",
    "ints": "whole numbers, such as [512, 768]",
    "dict": "a table of pattern = number",
    "list": "a list of tables, [[sources]] in TOML",
    "value": "a number, a text, true, false or a list of numbers",
}
"""Kind of a value → its description."""


def read_table(path: str, called: str, needs: str) -> dict[str, Any]:
    """The table in a TOML or JSON file, told apart by the name's end.

    Args:
        path: of the file; a byte order mark, as Windows' editors write it, is left out.
        called: the file's name in messages, "config file".
        needs: its contents in messages, "a table of options".

    Raises:
        UsageError: no such file, no permission, not TOML or JSON, or no table.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UsageError(f"{called} {path} does not exist{near_path(file, Path.is_file)}")
    kind = "JSON" if file.suffix.lower() == ".json" else "TOML"
    try:
        text = utf8_text(file)
    except UsageError as error:
        raise UsageError(f"{path} {error}") from None
    try:
        table = parsed(text, kind)
    except ValueError as error:
        hint = f". {_REMEDY[kind]}" * bool(re.search("escape|hex value", str(error), re.I))
        raise UsageError(f"{path} is not {kind}: {error}{hint}") from None
    if not isinstance(table, dict):
        raise UsageError(f"{path} needs {needs}, and is {table!r:.40}")
    if broken := list(_broken_paths(table)):
        raise UsageError(f"{path}: {'; '.join(broken)}. {_REMEDY[kind]}")
    return table


DEEPEST = 50
"""Levels of a configuration's tables: ours and other trainers' have five at most."""

_DOTTED = re.compile(rf"(?:[\w-]+\s*\.\s*){{{DEEPEST}}}")


def parsed(text: str, kind: str) -> Any:
    """The contents of a TOML or JSON text; raises ValueError, also for more than `DEEPEST` levels.

    kind: "TOML" or "JSON".
    """
    nested = f"its tables are nested more than {DEEPEST} deep"
    if kind == "TOML" and _DOTTED.search(text):  # tomllib takes memory by the square of it
        raise ValueError(nested)
    try:
        found = json.loads(text) if kind == "JSON" else tomllib.loads(text)
    except RecursionError:
        raise ValueError(nested) from None
    level = [found]
    for _ in range(DEEPEST + 1):
        tables = [value for value in level if isinstance(value, dict | list)]
        inner = [value.values() if isinstance(value, dict) else value for value in tables]
        level = [value for values in inner for value in values]
    if level:
        raise ValueError(nested)
    return found


_PATH_KEY = re.compile(r"(.*_)?(dir|path|file|config|dataset|name)")
"""Key of a path, in our files and kohya's."""

_REMEDY = {
    "TOML": "In double quotes a backslash begins an escape: write a Windows path in single quotes, "
    "'C:\\images\\new', or with /, \"C:/images/new\"",
    "JSON": 'A backslash begins an escape: write a Windows path with /, "C:/images/new", or with '
    'two, "C:\\\\images\\\\new"',
}


def _broken_paths(table: object, key: str = "") -> Iterator[str]:
    """Yield a line for each path in which `\\t`, `\\n`, … became a tab, a line break, ….

    table: the value of a key, in tables of any depth.
    """
    if isinstance(table, dict):
        for name, value in table.items():
            yield from _broken_paths(value, str(name))
    elif isinstance(table, list):
        for value in table:
            yield from _broken_paths(value, key)
    elif isinstance(table, str) and re.search(r"[\t\n\r\b\f\x1b]", table):
        if _PATH_KEY.fullmatch(key) or re.match("[A-Za-z]:", table):
            as_written = table.translate(_ESCAPES)
            yield f'{key} = "{as_written}" holds a control character where a backslash is meant'


_ESCAPES = str.maketrans(
    {"\t": r"\t", "\n": r"\n", "\r": r"\r", "\b": r"\b", "\f": r"\f", "\x1b": r"\e"}
)


def problems_of(
    error: ValidationError, options: Mapping[str, Option], called: str = "an option"
) -> list[Problem]:
    """The wrong values of a configuration, one problem an option.

    options: name → row. called: name of a row in messages.
    """
    problems: dict[str, Problem] = {}
    for details in error.errors(include_url=False):
        name = str(details["loc"][0])
        if name not in options:
            text = f"{name!r} is not {called}"
            problem = Problem(name, text, did_you_mean(name, options).strip())
        else:
            problem = _problem(options[name], details)
        problems.setdefault(name, problem)
    return list(problems.values())


def _problem(option: Option, details: Any) -> Problem:
    """The problem of one option's value."""
    name, value = option.name, details["input"]
    if len(details["loc"]) > 1 and option.kind == "dict":
        pattern = details["loc"][1]
        least = "at least 0" if "ge" in details.get("ctx", {}) else "above 0"
        meaning = {"int": "a whole number of at least 1", "value": TYPES["value"]}.get(
            option.item, least
        )
        return Problem(name, f"{name} {pattern!r} must be {meaning}, not {value!r}")
    if details["type"] in ("choice", "literal_error"):
        text = f"{name} is one of {', '.join(option.choices)}, not {value!r}"
        near = did_you_mean(str(value), option.choices).strip()
        return Problem(name, text, near or f"It means: {option.help}")
    if details["type"] == "nul":
        return Problem(name, f"{name} holds a NUL character: {value!r}")
    if details["type"] == "finite_number":
        return Problem(name, f"{name} must be a finite number, not {value}")
    if details["type"].startswith(("greater_than", "less_than", "multiple_of")):
        return Problem(name, f"{name} must be {option.range_text()}, not {value}")
    return Problem(name, f"{name} must be {TYPES[option.kind]}, not {value!r}")


def plain_value(text: str) -> Any:
    """A text as the value that it writes: "true", "0.5", "0.9,0.99"; else the text itself."""
    word = text.strip().strip("()[]")
    if word.lower() in ("true", "false"):
        return word.lower() == "true"
    for convert in (int, float, lambda w: [float(part) for part in w.split(",") if part.strip()]):
        with suppress(ValueError):
            return convert(word) if word else text
    return text


@cache
def _adapter(kind: type) -> TypeAdapter[Any]:
    return TypeAdapter(kind, config=ConfigDict(strict=True, allow_inf_nan=False))


def wrong_type(kind: type, value: object) -> str:
    """Description of the right type ("a whole number") if a value of TOML or JSON has another;
    empty if it fits."""
    try:
        _adapter(kind).validate_python(value)
    except ValidationError:
        return TYPES[kind.__name__]
    return ""
