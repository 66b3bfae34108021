"""The checks of the machine, as a table, and their results in words and for scripts."""

import json
from collections.abc import Callable, Sequence
from importlib import import_module

from sd_lora.doctor.part import Part
from sd_lora.errors import Problem

CHECKS = {
    "system": "machine.system",
    "libraries": "machine.libraries",
    "build of torch": "device.build",
    "device": "device.accelerator",
    "precisions": "device.precisions",
    "attention": "device.attention",
    "CPU and memory": "machine.cpu",
    "disks": "machine.disks",
    "extras": "machine.extras",
    "options for GPUs": "device.options",
    "last run": "machine.last_run",
}
"""Name of a check → its function, in a file of this folder: one that cannot be imported, for want
of torch, costs its own checks alone."""


def examine(checks: Sequence[str] = tuple(CHECKS)) -> dict[str, Part]:
    """The results of checks, by their names; a check that fails is a fault of the machine."""
    return {name: _done(name) for name in checks}


def _done(name: str) -> Part:
    file, _, function = CHECKS[name].partition(".")
    try:
        check: Callable[[], Part] = getattr(import_module(f"sd_lora.doctor.{file}"), function)
        return check()
    except Exception as error:  # a doctor tells of a broken library, and does not fall ill by it
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        return Part(
            faults=[Problem(name, text, "The libraries above show the cause, if it is one")]
        )


def can_train(parts: dict[str, Part]) -> bool:
    """Whether a training can run."""
    return not any(part.faults for part in parts.values())


def verdict(parts: dict[str, Part]) -> str:
    """The result in a line."""
    faults = sum(len(part.faults) for part in parts.values())
    warnings = sum(len(part.warnings) for part in parts.values())
    words = (
        "a training can run here" if not faults else f"no training can run here: faults {faults}"
    )
    return words + f", warnings {warnings}" * bool(warnings)


def lines(parts: dict[str, Part]) -> str:
    """The lines for a terminal: facts by check, and below them faults and warnings."""
    shown = []
    for name, part in parts.items():
        if part == Part():
            continue
        width = max(map(len, part.facts), default=0)
        shown += [name, *(f"  {label:<{width}}  {text}" for label, text in part.facts.items())]
        for kind, found in (("fault", part.faults), ("warning", part.warnings)):
            shown += [f"  {kind}: {problem.line()}" for problem in found]
    if can_train(parts):  # else an error says it
        shown.append(verdict(parts))
    return "\n".join(shown)


def as_json(parts: dict[str, Part]) -> str:
    """The same for scripts."""
    checks = [
        {
            "name": name,
            "facts": part.facts,
            "faults": [_row(problem) for problem in part.faults],
            "warnings": [_row(problem) for problem in part.warnings],
        }
        for name, part in parts.items()
    ]
    everything = {"can_train": can_train(parts), "verdict": verdict(parts), "checks": checks}
    return json.dumps(everything, indent=2)


def _row(problem: Problem) -> dict[str, str]:
    return {"name": problem.field, "text": problem.text, "remedy": problem.remedy}
