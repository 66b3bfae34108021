"""Settings of another trainer → options, with an answer for every setting."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sd_lora.config.contradictions import LEAVE_OUT
from sd_lora.config.schema import OPTIONS, TrainConfig
from sd_lora.config.translate.peers import Peer
from sd_lora.config.translate.rows import UNUSED, Given, Row, Taken, is_off, typed
from sd_lora.errors import Problem, UsageError, did_you_mean


@dataclass(frozen=True)
class Line:
    """One setting: name and value there, the answer, and whether it is their default."""

    name: str
    value: Any
    taken: Taken
    default: bool = False


@dataclass(frozen=True)
class Translation:
    """Options by name, the answer to each setting, and the problems that are left.

    problems: options that are required and not in the settings, such as the base model.
    """

    peer: Peer
    values: dict[str, Any]
    lines: list[Line]
    problems: list[Problem]


def translate(
    peer: Peer,
    settings: dict[str, Any],
    folder: Path = Path(),
    fixed: Mapping[str, Any] = MappingProxyType({}),
    assumed: Mapping[str, Any] = MappingProxyType({}),
) -> Translation:
    """The options that mean the same as another trainer's settings.

    Args:
        peer: of `PEERS`.
        settings: name there → value, as its file or command line has them.
        folder: that of the file, for files that it names.
        fixed: options that the command's program stands for, such as the mode.
        assumed: settings that it stands for.

    Raises:
        UsageError: settings that train something else than a LoRA of Stable Diffusion 1, 2 or XL.
    """
    own = peer.prepare(dict(settings))
    given = Given(own)
    given.folder = folder
    given.update(assumed)
    theirs = {**assumed, **peer.defaults(given)}
    for name, value in theirs.items():
        given[name] = value
    names = [*theirs, *(name for name in own if name not in theirs)]
    unsaid = {*theirs, *peer.derived}
    inner = (table for table in settings.values() if isinstance(table, dict))
    said = {*settings, *chain.from_iterable(inner)}
    lines = [
        Line(
            (name if name in said else peer.shown.get(name, name)).removeprefix(UNUSED),
            given[name],
            _answer(peer, name, given),
            name in unsaid,
        )
        for name in names
    ]
    lines = _settled(lines)
    values = dict(fixed)
    for kind in ("same", "absent", "otherwise"):  # a list by block goes before a rank for all
        for line in lines:
            for name, value in line.taken.values.items() if line.taken.kind == kind else ():
                tables = isinstance(value, dict) and isinstance(values.get(name), dict)
                values[name] = values[name] | value if tables else value
    return _sound(peer, values, lines)


def _answer(peer: Peer, name: str, given: Given) -> Taken:
    row: Row | None = peer.row(name)
    if row is None and is_off(given[name]):
        return Taken("needless", reason="is off")
    if row is None:
        near = did_you_mean(name, peer.all_rows, 0.85).strip()
        reason = f"is not known of {peer.label}" + (f". {near}" if near else "")
        return Taken("absent", reason=reason)
    try:
        return typed(row.take(given[name], given), OPTIONS)
    except UsageError:
        raise
    except (ValueError, TypeError) as error:
        return Taken("absent", reason=str(error))


def _settled(lines: list[Line]) -> list[Line]:
    """The lines without their defaults that change nothing here."""
    return [line for line in lines if not line.default or line.taken.values]


def _sound(peer: Peer, values: dict[str, Any], lines: list[Line]) -> Translation:
    """The translation without options that have no effect, or that are not possible here."""
    while True:
        try:
            TrainConfig(**values)
            return Translation(peer, values, lines, [])
        except UsageError as error:
            problems = error.problems or [Problem("sources", str(error))]
        wrong = {p.field: p for p in problems if p.field in values and p.field not in REQUIRED}
        if not wrong:
            return Translation(peer, values, lines, problems)
        values = {name: value for name, value in values.items() if name not in wrong}
        lines = [_without(line, wrong, "dataset_config" in values) for line in lines]


REQUIRED = ("mode", "sources")


def _without(line: Line, wrong: dict[str, Problem], has_dataset_config: bool) -> Line:
    """A line without the options that cannot be taken."""
    lost = [name for name in line.taken.values if name in wrong]
    if not lost:
        return line
    values = {name: value for name, value in line.taken.values.items() if name not in wrong}
    problem = wrong[lost[0]]
    kind, reason = "absent", problem.text
    if problem.remedy == LEAVE_OUT:
        kind, reason = "needless", problem.text.removeprefix(f"{lost[0]} ")
        if reason.endswith("with dataset_config") and has_dataset_config:
            kind, reason = "absent", "belongs in [general] of the dataset's file"
    if values:
        reason = f"{line.taken.reason}; {problem.text}"
        return dataclasses.replace(line, taken=Taken(line.taken.kind, values, reason))
    return dataclasses.replace(line, taken=Taken(kind, {}, reason))  # type: ignore[arg-type]
