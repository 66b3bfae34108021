"""The result of one check of the machine."""

from dataclasses import dataclass, field

from sd_lora.errors import Problem


@dataclass
class Part:
    """Facts that a check found. facts: label → text. faults: with them no training can run.
    warnings: reasons why one is slower, or an option of it fails."""

    facts: dict[str, str] = field(default_factory=dict)
    faults: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)
