"""Several runs over one base in one file: `[[jobs]]`."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os.path import expanduser, isabs, realpath
from typing import Any

from sd_lora.config.config_file import JOBS, options_of
from sd_lora.config.options.run import folder_of_job
from sd_lora.config.schema import OPTIONS, TrainConfig, with_present_names
from sd_lora.errors import Problem

NAME = "name"
"""Key of a job's own name."""


@dataclass(frozen=True)
class Job:
    """One run of several. name: its own; "" of a run that is the only one."""

    name: str
    config: TrainConfig


Found = tuple[dict[str, Any], list[str]]
"""Options of a job, and hints on how they were given."""


def read_tables(
    tables: Any, shared: Mapping[str, Any], flags: Mapping[str, Any], path: str
) -> tuple[dict[str, Found], list[Problem]]:
    """The jobs' names and options, and a problem for each mistake in their tables.

    A job's output folder is one of its name in the common one, unless its table names another.

    Args:
        tables: the value of `jobs` in a file.
        shared: option → value of the file's top, for jobs that do not name it, and of flags.
        flags: option → value of the command line, for all jobs.
        path: of the file.
    """
    if not isinstance(tables, list) or not tables or not all(isinstance(t, dict) for t in tables):
        text = f"{path}: jobs must be a list of tables, [[jobs]] in TOML, not {tables!r:.40}"
        return {}, [Problem(JOBS, text)]
    found: dict[str, Found] = {}
    problems: list[Problem] = []
    places: dict[str, str] = {}
    for number, table in enumerate(tables, 1):
        name = table.get(NAME)
        label = f"{path}: job {name if isinstance(name, str) else number}"
        problems += _wrong_name(name, label, found)
        own, faults = options_of({k: v for k, v in table.items() if k != NAME}, label)
        problems += faults
        problems += [
            Problem(option, f"{label}: {option} is one for all jobs", "Put it before [[jobs]]")
            for option in own
            if option in OPTIONS and OPTIONS[option].of_all_jobs
        ]
        values, notes = with_present_names({**shared, **own, **flags})
        folder = folder_of_job(str(name), {k: v for k, v in own.items() if k not in flags}, values)
        (place,) = (realpath(expanduser(place)) for place in folder.values())
        if place in places:
            text = f"{label}: its output folder {place} is that of {places[place]}, too"
            problems.append(Problem(JOBS, text, "Each job needs its own"))
        places.setdefault(place, f"job {name}")
        values |= folder
        found[str(name)] = values, notes
    return found, problems


def _wrong_name(name: Any, label: str, before: Mapping[str, Found]) -> list[Problem]:
    """The problem of a job's name, which is that of a folder and a file."""
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
        text = f"{label}: needs a name of letters, digits, _, - and ., not {name!r:.40}"
        return [Problem(NAME, text)]
    twice = Problem(NAME, f"{label}: another job has this name")
    return [twice] if name in before else []


def between(jobs: Sequence[Job]) -> list[Problem]:
    """The problems of whole configurations with each other: options that a preset has changed for
    one job and that all share, and places that several would write to.

    jobs: of one file, each with its presets and defaults.
    """
    problems = []
    for name, option in OPTIONS.items():
        values = {job.name: getattr(job.config, name) for job in jobs}
        different = {str(value) for value in values.values()}
        if option.of_all_jobs and len(different) > 1:
            said = ", ".join(f"{job} has {value}" for job, value in values.items())
            text = f"{name} is one for all jobs, and by their options and presets {said}"
            problems.append(Problem(name, text, "Put it before [[jobs]]"))
    writes = {
        "hub_model_id": lambda job: True,
        "logging_dir": lambda job: isabs(job.config.logging_dir),
    }
    for name, holds in writes.items():
        taken = [str(value) for job in jobs if holds(job) and (value := getattr(job.config, name))]
        if len(set(taken)) < len(taken):
            text = f"{name} {taken[0]} is that of several jobs, which would write over each other"
            problems.append(Problem(name, text, "Give each its own, or leave it out"))
    return problems


def told_once(of_jobs: Mapping[str, list[Problem]], number: int) -> list[Problem]:
    """The problems of jobs with their names; one that all have, once and without.

    number: of all jobs.
    """
    names: dict[Problem, list[str]] = {}
    for name, problems in of_jobs.items():
        for problem in dict.fromkeys(problems):
            names.setdefault(problem, []).append(name)
    return [
        problem
        if len(those) == number
        else Problem(problem.field, f"job {', '.join(those)}: {problem.text}", problem.remedy)
        for problem, those in names.items()
    ]
