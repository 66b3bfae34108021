"""The way in which a step goes through the device: the same samples and losses with less memory, or
in less time."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sd_lora.errors import UsageError


@dataclass(frozen=True)
class Fit:
    """Means by which a step takes less memory than its options say, or less time.

    The samples of a step, their noise and their weights stay as they are, so a step's loss and
    gradient differ by the order of float sums alone; dropout masks of the deltas are others.

    checkpointing: activations are recomputed, though `gradient_checkpointing` is off. at_once: most
    images that go forward and backward together; None: all of a micro-batch. compiled: transformer
    blocks compute by compiled programs.
    """

    checkpointing: bool = False
    at_once: int | None = None
    compiled: bool = False

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Fit":
        """The means of a checkpoint; raises UsageError for those of another version."""
        if unknown := [*record.keys() - asdict(cls()).keys()]:
            raise UsageError(
                f"the checkpoint's way to fit has {', '.join(unknown)}: it is of another version, "
                "which alone can go on with it"
            )
        return cls(**record)

    @property
    def text(self) -> str:
        """The means that take less memory, in words; "" for a step as its options say it."""
        most = "1 image" if self.at_once == 1 else f"at most {self.at_once} images"
        words = ["gradient checkpointing"] * self.checkpointing
        return ", ".join(words + [f"{most} at once"] * (self.at_once is not None))

    def record(self) -> dict[str, Any]:
        """The means that are used, as a checkpoint and a LoRA file hold them."""
        return {name: value for name, value in asdict(self).items() if value}

    def numbers(self) -> dict[str, float]:
        """The same for a row of the log."""
        return {name: float(value) for name, value in self.record().items()}
