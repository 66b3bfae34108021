"""Configuration files: TOML or JSON → options by name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sd_lora.config.foreign_flags import MANY, known_elsewhere, near
from sd_lora.config.schema import FORMER_NAMES, OPTIONS, SECTIONS
from sd_lora.config.values import read_table
from sd_lora.errors import Problem, UsageError, refuse

THEIRS = (".yaml", ".yml", ".sh", ".bat", ".cmd", ".ps1")
"""Ends of names of other trainers' configurations and commands."""

WHOLE = 5
"""Unknown keys, other trainers' among them, from which a file is taken for one of theirs: a line
for each key would then tell nothing."""

JOBS = "jobs"
"""Key of the tables of several runs in one file."""

ONE_RUN = "[[jobs]] are several runs, which `sd-lora train` and `sd-lora check` take"


def read_config_file(path: str) -> dict[str, Any]:
    """Option → value of a TOML or JSON file: at the top, or in tables of any of the sections.

    JSON as a run's config.json has it, where null stands for an option that is not given.

    Raises:
        UsageError: no such file, broken TOML or JSON, a file of several jobs; all unknown keys at
            once.
    """
    values, problems, tables = read(path)
    refuse([*problems, *refused_jobs(path, tables)])
    return values


def refused_jobs(path: str | None, tables: object) -> list[Problem]:
    """The problem of jobs where one run is asked for. tables: None without jobs."""
    return [] if tables is None else [Problem(JOBS, f"{path}: {ONE_RUN}")]


def read(path: str) -> tuple[dict[str, Any], list[Problem], Any]:
    """Options of a file, a problem for each key that is none, and its jobs as it has them, None
    without.

    Raises:
        UsageError: a file that cannot be parsed.
    """
    if Path(path).suffix.lower() in THEIRS:
        way = f"`sd-lora translate {path} --out my.toml` reads other trainers' files"
        raise UsageError(f"{path} is no configuration of sd-lora, which is TOML or JSON. {way}")
    data = read_table(path, "config file", "a table of options")
    jobs = data.pop(JOBS, None)
    values, problems = options_of(data, path)
    foreign = sum(known_elsewhere(p.field.lstrip("-")) is not None for p in problems)
    if foreign >= MANY:
        way = f"sd-lora translate {path} --out my.toml"
        if len(problems) >= WHOLE:
            text = f"{path} is another trainer's configuration: {len(problems)} of its settings"
            raise UsageError(f"{text} are not of sd-lora. `{way}` writes one that is")
        problems.append(Problem("", f"settings of other trainers: `{way}` translates them"))
    return values, problems, jobs


def options_of(data: Mapping[str, Any], path: str) -> tuple[dict[str, Any], list[Problem]]:
    """Options of a table, and a problem for each key that is none. path: of its file."""
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
        jobs = "Did you mean [[jobs]]?" if name in ("job", "Jobs") else ""
        return Problem(name, f"{path}: {name!r} is not an option", jobs or near(name))
    _, row = found
    if not row.here:
        return Problem(name, f"{path}: {name} {row.reason}")
    return Problem(name, f"{path}: {name!r} is not an option", f"Here it is {row.here}")
