"""Texts of a run: the summary before the first step, and the lines after the last one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sd_lora.data.check.page import report_lines
from sd_lora.errors import counted
from sd_lora.files import mib
from sd_lora.findings import Finding

if TYPE_CHECKING:  # pages of runs are read without torch
    from sd_lora.formats.verify import Verified


@dataclass
class Summary:
    """Facts of a run, known before its first step.

    rows: label → text. notes: hints that deserve a thought. findings: of the data check.
    """

    rows: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def text(self) -> str:
        """Lines for a terminal."""
        width = max(map(len, self.rows))
        lines = [f"  {label:<{width}}  {text}" for label, text in self.rows.items()]
        lines += [f"  note: {note}" for note in self.notes]
        lines += ["  found in the data (sd-lora check shows it):"] if self.findings else []
        return "\n".join([*lines, *(f"    {line}" for line in report_lines(self.findings))])


def duration(seconds: float) -> str:
    """Time for people: "2 h 05 min", "3 min 07 s", "41 s"."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours} h {m:02} min" if hours else f"{m} min {s:02} s" if m else f"{s} s"


def adapted_modules(names: Mapping[str, Sequence[str]], parameters: Mapping[str, int]) -> str:
    """Line "unet 46 modules (120,320 parameters), text_encoder …".

    names: component → adapted modules. parameters: component → number of trained parameters.
    """
    return ", ".join(
        f"{component} {counted(len(modules), 'module')} ({parameters[component]:,} parameters)"
        for component, modules in names.items()
    )


def verified_files(files: "Sequence[Verified]") -> str:
    """A line for each verified file: path, size, modules, worst error."""
    return "\n".join(
        f"  {f.path}  {mib(f.path.stat().st_size)}, verified: {f.modules} modules load as trained "
        f"({f.error_text})"
        for f in files
    )


def shares_of(spent: Mapping[str, float], seconds: float) -> str:
    """The time of a process by kinds of work: "of the time 88 % in training, 7 % in samples"; ""
    where none is known.

    spent: kind → seconds. seconds: of all that the process did, other work too; of a resumed run
    neither has those before. 0: not known, as in records of earlier versions.
    """
    known = {kind: time for kind, time in spent.items() if time > 0}
    whole = max(seconds, sum(known.values()))
    ranked = sorted(known, key=lambda kind: -known[kind])
    parts = (f"{100 * known[kind] / whole:.0f} % in {kind}" for kind in ranked)
    return f"of the time {', '.join(parts)}" if known else ""
