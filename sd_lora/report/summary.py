"""What a run says: a summary before the first step, a bar while it works, a summary after."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from tqdm.auto import tqdm

from sd_lora.files import mib
from sd_lora.formats.files import Format
from sd_lora.formats.verify import Verified

T = TypeVar("T")


@dataclass
class Summary:
    """The lines shown before training, and what the user must know about them.

    rows: label → text. notes: what is worth a thought. findings: lines on images and captions.
    """

    rows: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)

    def text(self) -> str:
        width = max(map(len, self.rows))
        lines = [f"  {label:<{width}}  {text}" for label, text in self.rows.items()]
        lines += [f"  note: {note}" for note in self.notes]
        lines += ["  found in the data (sd-lora check shows it):"] if self.findings else []
        return "\n".join([*lines, *(f"    {line}" for line in self.findings)])


def say(text: str, main: bool = True) -> None:
    """Prints a line, on the main process alone."""
    if main:
        print(text, flush=True)


def progress(items: Sequence[T], label: str, main: bool) -> Iterator[T]:
    """Yields items under a progress bar with rate and ETA."""
    return iter(tqdm(items, desc=label, disable=not main, leave=False, dynamic_ncols=True))


def checking(items: Iterable[T], total: int | None) -> Iterator[T]:
    """Yields what was checked under a progress bar."""
    return iter(tqdm(items, "checking", total, unit="image", leave=False, dynamic_ncols=True))


def counting(items: Iterable[T], label: str, total: int, shown: bool) -> Iterator[T]:
    """Yields items under a progress bar with rate and ETA, whose number is known elsewhere."""
    return iter(tqdm(items, label, total, disable=not shown, leave=False, dynamic_ncols=True))


def step_bar(total: int, done: int, main: bool) -> tqdm:
    """Returns the bar of optimiser steps."""
    return tqdm(
        total=total,
        initial=done,
        desc="training",
        unit="step",
        disable=not main,
        dynamic_ncols=True,
    )


def duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours} h {m:02} min" if hours else f"{m} min {s:02} s" if m else f"{s} s"


def adapted(names: Mapping[str, Sequence[str]], parameters: Mapping[str, int]) -> str:
    """Returns "unet 46 modules (120,320 parameters), text_encoder …"."""
    return ", ".join(
        f"{component} {len(modules)} modules ({parameters[component]:,} parameters)"
        for component, modules in names.items()
    )


def verified(files: Sequence[Verified]) -> str:
    return "\n".join(
        f"  {f.path}  {mib(f.path.stat().st_size)}, verified: {f.modules} modules load as trained "
        f"(worst error {f.worst_error:.0e})"
        for f in files
    )


def how_to_use(pipeline: str, paths: Sequence[Path], formats: Sequence[Format]) -> str:
    """Returns what to do with the files, one of each format; pipeline: the code that loads it."""
    return "\n".join(
        "  " + kind.use.format(pipeline=pipeline, folder=path.parent, file=path.name)
        for path, kind in zip(paths, formats, strict=True)
    )
