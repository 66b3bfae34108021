"""Write the tables of docs/scale.md: several GPUs and many subjects, from the counts of memory.md.

python dev/write_scale_page.py

The trained bytes and the operations of a step are those of docs/memory.md, which
dev/write_memory_page.py counts. Rates of cards and links are their makers' figures.
"""

import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from write_memory_page import CARDS, replaced

from sd_lora.config.presets import preset

DOCS = Path(__file__).parent.parent / "docs"

LINKS = {
    "NVLink 3": 300e9,
    "PCIe 4.0 ×16": 25e9,
    "100 Gb/s": 12.5e9,
    "10 Gb/s": 1.25e9,
    "1 Gb/s": 0.125e9,
}
"""Link → bytes a second in one direction: NVIDIA's A100 paper, PCI-SIG less protocol, Ethernet."""

SHARE = 0.4
"""Share of a card's rate that training reaches: an assumption, said on the page."""

LEAST_STEPS = 300
"""Steps below which a run is taken to be too short, whatever its batch: an assumption."""

AROUND = 60
"""Seconds of a run outside its steps (loading, encoding, samples, export): an assumption."""

PROCESSES = 8


@dataclass(frozen=True)
class Row:
    """A row of memory.md. frozen, trained: bytes, the latter 16 a parameter. tflop: operations of a
    step, in 10¹²."""

    model: str
    preset: str
    frozen: float
    trained: float
    tflop: float

    @property
    def parameters(self) -> float:
        """Trained parameters."""
        return self.trained / 16

    @property
    def gradients(self) -> float:
        """Bytes of the gradients that processes exchange in a step: float32."""
        return 4 * self.parameters

    def seconds(self, card: str) -> float:
        """Seconds of a step on a card at `SHARE` of its rate."""
        return self.tflop / (CARDS[card] * SHARE)

    def exchange(self, link: str, processes: int = PROCESSES) -> float:
        """Seconds of a ring all-reduce: each process sends 2·(n - 1)/n of the gradients (Patarasuk
        and Yuan 2009, section 4)."""
        return 2 * (processes - 1) / processes * self.gradients / LINKS[link]

    def efficiency(self, card: str, link: str) -> float:
        """Share of the time that is training, if nothing of the exchange is hidden behind it."""
        step = self.seconds(card)
        return step / (step + self.exchange(link))


def rows(page: str) -> Iterator[Row]:
    """Yield the presets' rows of memory.md."""
    pattern = r"^\| ([^|]+) \| `--preset (\w+)` \| (\S+) \| (\S+) \| \S+ \| \S+ \| \d+ \| (\S+) \|$"
    for model, name, frozen, trained, tflop in re.findall(pattern, page, re.M):
        yield Row(model, name, float(frozen) * 2**30, float(trained) * 2**30, float(tflop))


def exchange_rows(found: list[Row]) -> list[str]:
    """Lines: parameters, bytes a step, and the share of time that is training, by link."""
    lines = []
    for row in found:
        shares = [f"{row.efficiency('A100', link):.1%}" for link in LINKS]
        sizes = [f"{row.parameters / 1e6:.1f}", f"{row.gradients / 2**20:.0f}"]
        lines.append("| " + " | ".join([row.model, f"`{row.preset}`", *sizes, *shares]) + " |")
    return lines


def shard_rows(found: list[Row]) -> list[str]:
    """Lines: GiB of the frozen UNet on each of n GPUs, GiB that 2 of them send in a step, and MiB
    of the LoRA's gradients and AdamW's moments, of which ZeRO-2 would keep 1/n on each.

    FSDP gathers the UNet for the forward pass, and again for the backward one: each process sends
    (n - 1)/n of its bytes twice (Zhao et al. 2023, section 3.2).
    """
    lines = []
    for row in found:
        if row.preset == "style":  # which trains the UNet alone
            unet = row.frozen / 2**30
            cells = [f"{unet / n:.2f}" for n in (1, 2, 4, 8)]
            cells += [f"{2 * unet / 2:.2f}", f"{12 * row.parameters / 2**20:.0f}"]
            lines.append(f"| {row.model} | " + " | ".join(cells) + " |")
    return lines


def most_rows() -> list[str]:
    """Lines: by preset and images, the steps on one GPU, and the GPUs that leave `LEAST_STEPS`."""
    lines = []
    for name, numbers in (("subject", (8, 30)), ("character", (30, 200)), ("style", (50, 500))):
        options, length = preset(name).options, preset(name).length
        for number in numbers:
            batch = options["train_batch_size"]
            steps = length.num_steps(number, batch)
            most = max(1, steps // LEAST_STEPS)
            lines.append(f"| `{name}` | {number} | {batch} | {steps} | {most} |")
    return lines


def subject_rows(found: list[Row], subjects: int = 1000, images: int = 8) -> list[str]:
    """Lines: seconds of one subject on a card, and the cards for many subjects a day."""
    lines = []
    for row in found:
        if row.preset != "subject":
            continue
        chosen = preset("subject")
        steps = chosen.length.num_steps(images, chosen.options["train_batch_size"])
        cells = []
        for card in CARDS:
            seconds = steps * row.seconds(card) + AROUND
            cells.append(f"{seconds:.0f} s, {math.ceil(subjects * seconds / 86_400)}")
        lines.append(f"| {row.model} | {steps} | " + " | ".join(cells) + " |")
    return lines


def main() -> int:
    """Write the page; returns the exit code."""
    found = list(rows((DOCS / "memory.md").read_text(encoding="utf-8")))
    path = DOCS / "scale.md"
    page = path.read_text(encoding="utf-8")
    head = "| model | preset | parameters, M | MiB a step | " + " | ".join(LINKS) + " |"
    page = replaced(page, "exchange", head, exchange_rows(found))
    head = (
        "| model | 1 GPU | 2 GPUs | 4 GPUs | 8 GPUs | GiB sent a step by each of 2 | ZeRO-2, MiB |"
    )
    page = replaced(page, "shards", head, shard_rows(found))
    head = "| preset | images | batch | steps on one GPU | GPUs at most |"
    page = replaced(page, "most", head, most_rows())
    head = "| model | steps | " + " | ".join(CARDS) + " |"
    page = replaced(page, "subjects", head, subject_rows(found))
    path.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
