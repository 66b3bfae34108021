"""The digest of a run: equal runs have equal ones, also where they were resumed."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from sd_lora.files import write_whole

FILE = "digest.json"


@dataclass(frozen=True)
class Digest:
    """Hashes of a run, hexadecimal.

    data: seed, order of the images, images and captions. losses: of all steps. tensors: trained
    ones at the end, as exported.
    """

    data: str
    losses: str
    tensors: str

    @property
    def whole(self) -> str:
        """The hash of the three."""
        return hashlib.sha256(f"{self.data} {self.losses} {self.tensors}".encode()).hexdigest()

    @property
    def text(self) -> str:
        """One line; its parts tell where two runs differ."""
        parts = ", ".join(f"{name} {value[:8]}" for name, value in asdict(self).items())
        return f"digest {self.whole[:16]} ({parts})"

    def write(self, folder: Path) -> None:
        """Write the hashes in full; raises RunError if the disk refuses them."""
        values = {"digest": self.whole, **asdict(self)}
        write_whole(folder / FILE, json.dumps(values, indent=1).encode())


def with_loss(before: str, step: int, loss: float | None) -> str:
    """The hash of the losses up to a step. before: up to the one before it; "" at the start.
    loss: exact to the last bit; None for a step that was left out."""
    return hashlib.sha256(f"{before} {step} {loss!r}".encode()).hexdigest()
