"""The ledger of a run's images: how the loss of each compares with that of all at equal timesteps.

Losses differ tenfold by timestep, and so their logarithms are compared with the running mean of all
images at nearby timesteps. An image's distance from it has its own level, by its contents; its
change over the run tells whether the image is learned more slowly than the rest, or faster.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from statistics import NormalDist, median
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from sd_lora.data.batches.stream import BatchItem, ImageSet
from sd_lora.diffusion.timesteps import Timesteps
from sd_lora.report.measured import BY_HEART, FIGHTS

LEVELS = 20
"""Equal parts of the trained timesteps, within which losses are compared."""

MEMORY = 64
"""Losses of a part after which its running mean forgets."""

LEAST = 4
"""Losses of a part from which on its mean is one to compare with."""

WINDOWS = 16
"""Most windows of a run; when there are more, neighbours are joined."""

MOST_IMAGES = 10_000
"""Images of the largest set that has a ledger: its windows take 4 MB in a checkpoint."""

MOST_SHOWN = 200
"""Trained images of `report.json`: first those whose losses have changed most against the rest."""

CHANGE = 1.10
"""Change of an image's loss against the rest, as a factor, below which nothing is said of it."""

DOUBT = 0.01
"""Chance that an image of a set is named although all are learned alike."""


@dataclass
class Ledger:
    """Counts, sums and squares of each image's distances, window by window.

    names: of the images, by index. span: the first trained timestep and the one after the last.
    width: steps of a window. means: timesteps' part → number of losses, mean logarithm. tables:
    one a window, (3, images), float64. seen: losses of each image. waiting: steps done, indices,
    losses and timesteps that are not read yet.
    """

    names: Sequence[str]
    span: tuple[int, int]
    width: int
    means: list[list[float]] = field(default_factory=lambda: [[0, 0.0] for _ in range(LEVELS)])
    tables: list[Tensor] = field(default_factory=list)
    waiting: list[tuple[int, list[int], list[int], Tensor, Tensor]] = field(default_factory=list)

    @classmethod
    def of(cls, images: ImageSet, timesteps: Timesteps, samples_per_step: int) -> "Ledger":
        """An empty ledger, in whose first windows each image is seen about four times. An image at
        several resolutions has a line for each."""
        side, samples = images.crop_settings.resolution, images.samples
        names = [
            s.name if s.resolution in (None, side) else f"{s.name} at {s.resolution}"
            for s in samples
        ]
        width = max(1, math.ceil(4 * len(names) / samples_per_step))
        kept = names if len(names) <= MOST_IMAGES else []
        return cls(kept, (timesteps.first, timesteps.last), width)

    def __post_init__(self) -> None:
        self.seen = torch.zeros(len(self.names), dtype=torch.float64)

    def add(self, step: int, items: Sequence[BatchItem], losses: Tensor, t: Tensor) -> None:
        """Keep the losses of trained instances, on the device. step: number of steps done before.

        losses, t: (B,).
        """
        if not self.names:
            return
        own = [i for i, item in enumerate(items) if _counts(item)]
        if own:
            indices = [items[i].index for i in own]
            # all of them: an index made of numbers of the host waits for the device
            self.waiting.append((step, indices, own, losses, t))

    def flush(self, accelerator: Accelerator, before: int) -> None:
        """Read the losses of the steps before a number of steps, on all processes together, and
        take them in the order of their steps."""
        kept = [row for row in self.waiting if row[0] >= before]
        read = [row for row in self.waiting if row[0] < before]
        self.waiting = kept
        rows = torch.full((0, 4), -1.0, device=accelerator.device)
        if read:
            steps = [step for step, indices, *_ in read for _ in indices]
            indices = [index for _, indices, *_ in read for index in indices]
            known = torch.tensor([steps, indices], dtype=torch.float32, device=accelerator.device)
            starts = accumulate((len(t) for *_, t in read), initial=0)
            places = [s + o for s, (_, _, own, *_) in zip(starts, read, strict=False) for o in own]
            place = torch.tensor(places, device=accelerator.device)
            losses = torch.cat([values.float() for *_, values, _ in read])[place]
            t = torch.cat([values.float() for *_, values in read])[place]
            rows = torch.stack([*known, losses, t], dim=1)
        if accelerator.num_processes > 1:
            rows = accelerator.gather(accelerator.pad_across_processes(rows, dim=0, pad_index=-1))
        found = [row for row in rows.tolist() if row[0] >= 0]
        for step, index, loss, t in sorted(found, key=lambda row: row[0]):
            self._take(int(step), int(index), loss, int(t))

    def _take(self, step: int, index: int, loss: float, t: int) -> None:
        """Take one loss of an image."""
        if not (math.isfinite(loss) and loss > 0):
            return
        first, last = self.span
        mean = self.means[min(LEVELS - 1, (t - first) * LEVELS // (last - first))]
        distance = math.log(loss) - mean[1]
        if mean[0] >= LEAST:
            table = self._table(step)
            table[:, index] += torch.tensor([1.0, distance, distance**2], dtype=torch.float64)
        mean[0] += 1
        mean[1] += distance / min(mean[0], MEMORY)
        self.seen[index] += 1

    def _table(self, step: int) -> Tensor:
        """The table of a step's window."""
        while step // self.width >= WINDOWS:
            self.width *= 2
            even = [*self.tables, *([self._empty()] * (len(self.tables) % 2))]
            self.tables = [a + b for a, b in zip(even[::2], even[1::2], strict=True)]
        while len(self.tables) <= step // self.width:
            self.tables.append(self._empty())
        return self.tables[step // self.width]

    def _empty(self) -> Tensor:
        return torch.zeros(3, len(self.names), dtype=torch.float64)

    def state(self) -> dict[str, Any]:
        """The ledger as a checkpoint holds it."""
        return {
            "width": self.width,
            "means": [[*mean] for mean in self.means],
            "tables": [table.clone() for table in self.tables],
            "seen": self.seen.clone(),
        }

    def load(self, state: Mapping[str, Any] | None) -> None:
        """Take a checkpoint's ledger; None: an empty one. Losses that wait are forgotten."""
        self.waiting.clear()
        if state is not None:
            self.width, self.seen = state["width"], state["seen"].clone()
            self.means = [[*mean] for mean in state["means"]]
            self.tables = [table.clone() for table in state["tables"]]

    def record(self) -> list[dict[str, Any]]:
        """The images for `report.json`, those that fight the rest first: name, times seen, loss
        against the rest in the last half and in each window, its change since the first quarter,
        and the finding, or "". Loss and change are None where too little is known to compare."""
        found = self._compared()
        ranked = sorted(found, key=lambda index: -abs(found[index][1]))
        others = [index for index in range(len(self.names)) if index not in found]
        shown = sorted(ranked[:MOST_SHOWN], key=lambda index: -found[index][1])
        rows: list[dict[str, Any]] = []
        for index in [*shown, *others[: MOST_SHOWN - len(shown)]]:
            level, change, doubt = found.get(index, (None, None, math.inf))
            row = {
                "index": index,
                "name": self.names[index],
                "seen": int(self.seen[index]),
                "loss": None if level is None else math.exp(level),
                "change": None if change is None else math.exp(change),
                "finding": "" if change is None else _finding(change, doubt),
                "windows": [_ratio(table, index) for table in self.tables],
            }
            rows.append(row)
        return rows

    def _compared(self) -> dict[int, tuple[float, float, float]]:
        """Index of an image → logarithm of its loss against the rest in the last half, change of it
        since the first quarter, against the others' median, and the margin of the change. Nothing
        of fewer than four windows or three images, and of an image that was seen too little."""
        count = len(self.tables)
        if count < 4 or len(self.names) < 3:
            return {}
        tables = torch.stack(self.tables)  # (windows, 3, images)
        early, late = tables[: max(1, count // 4)].sum(0), tables[count // 2 :].sum(0)
        rows = {}
        for index in range(len(self.names)):
            n, m = float(early[0, index]), float(late[0, index])
            if n < 2 or m < 2:
                continue
            start, end = float(early[1, index]) / n, float(late[1, index]) / m
            spread = float(early[2, index]) - n * start**2 + float(late[2, index]) - m * end**2
            error = math.sqrt(max(0.0, spread) / (n + m - 2) * (1 / n + 1 / m))
            rows[index] = (end, end - start, error)
        if not rows:
            return {}
        middle = median(change for _, change, _ in rows.values())
        limit = NormalDist().inv_cdf(1 - DOUBT / (2 * len(rows)))
        return {
            i: (end, change - middle, limit * error) for i, (end, change, error) in rows.items()
        }


def _counts(item: BatchItem) -> bool:
    return item.kind == "instance" and not item.preserves and item.stratum is not None


def _ratio(table: Tensor, index: int) -> float | None:
    """An image's loss against the rest in a window; None where it was not seen."""
    count, total, _ = table[:, index].tolist()
    return math.exp(total / count) if count else None


def _finding(change: float, doubt: float) -> str:
    """The finding on a change of the logarithm of the loss against the rest. doubt: its margin."""
    if abs(change) < max(math.log(CHANGE), doubt):
        return ""
    return FIGHTS if change > 0 else BY_HEART
