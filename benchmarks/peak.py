"""The most memory that a step asks a card for, against the bytes that `check` counts.

    python -m tests.card --run benchmarks/peak.py [CELL …]

On the CUDA device of tests/card, whose memory is the host's: each allocation counts as on a card,
in blocks of 512 bytes, until nothing holds it. What cuDNN and CUDA take for themselves is no part
of it. UNets are of the published sizes with random weights. A CELL is family,targets,batch and,
with activations computed again, checkpointed: "sdxl,all,1,checkpointed". On one core SD 1.5 takes
half a minute, SDXL at 1024² three.
"""

import gc
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent))
from gpu import DTYPE, GIB, SIDES, Cell, Step, conditions, config_of, counted

from sd_lora.models.published_configs import CONFIGS

CELLS = (
    "sd1,attention,1", "sd1,all,1", "sd1,all,1,checkpointed", "sd1,all,4",
    "sdxl,all,1,checkpointed",
)  # fmt: skip


def peak(cell: Cell, name: str) -> float:
    """GiB at most in a second step of a candidate, with its optimiser's state there already."""
    config = config_of(CONFIGS[cell.family]["unet"])
    with torch.device("cuda"):
        given = conditions(config, DTYPE, SIDES[cell.family] // 8, cell.batch)
    step = Step(name, config, cell, given)
    step()
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() / GIB


def main() -> None:
    print("| step | ours GiB | counted GiB | counted ÷ ours | peft GiB |\n" + "|---" * 5 + "|")
    for words in sys.argv[1:] or CELLS:
        family, targets, batch, *again = words.split(",")
        if again not in ([], ["checkpointed"]):
            raise SystemExit(f"{words} is no CELL")
        cell = Cell(family, targets, int(batch), bool(again))
        count = counted(cell).peak / GIB
        ours = peak(cell, "ours")
        gc.collect()
        theirs = peak(cell, "peft")
        gc.collect()
        row = (words, f"{ours:.3f}", f"{count:.3f}", f"{count / ours:.3f}", f"{theirs:.3f}")
        print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
