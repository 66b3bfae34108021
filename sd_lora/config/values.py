"""Values of configurations: tables read from files, and pydantic's errors in plain words."""

import json
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from sd_lora.config.rows import Option
from sd_lora.errors import Problem, UsageError, did_you_mean

KINDS: dict[str, type] = {"bool": bool, "int": int, "float": float, "str": str}
"""Kind of an option that has a single value → its type."""

TYPES = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "string": "a text",
    "dict": "a table of pattern = number",
    "list": "a list of tables, [[sources]] in TOML",
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
        raise UsageError(f"{called} {path} does not exist")
    kind = "JSON" if file.suffix.lower() == ".json" else "TOML"
    try:
        text = file.read_text(encoding="utf-8-sig")
        table = json.loads(text) if kind == "JSON" else tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # of TOML, JSON and UTF-8 alike
        raise UsageError(f"{path} is not {kind}: {error}") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    if not isinstance(table, dict):
        raise UsageError(f"{path} needs {needs}, and is {table!r:.40}")
    return table


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
        meaning = "a whole number of at least 1" if option.item == "int" else "above 0"
        return Problem(name, f"{name} {pattern!r} must be {meaning}, not {value!r}")
    if details["type"] in ("choice", "literal_error"):
        text = f"{name} is one of {', '.join(option.choices)}, not {value!r}"
        near = did_you_mean(str(value), option.choices).strip()
        return Problem(name, text, near or f"It means: {option.help}")
    if details["type"] == "finite_number":
        return Problem(name, f"{name} must be a finite number, not {value}")
    if details["type"] in ("greater_than", "greater_than_equal", "less_than", "multiple_of"):
        return Problem(name, f"{name} must be {option.range_text()}, not {value}")
    return Problem(name, f"{name} must be {TYPES[option.kind]}, not {value!r}")


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
