"""Cards: their memory and nominal rates, for the prediction of a run: bounds, none measured here.

Rates are those of dense products with float32 sums, without sparsity: GeForce cards have twice as
much with fp16 sums, which PyTorch does not use.
"""

import re
from dataclasses import dataclass, replace

import torch

from sd_lora.errors import UsageError, did_you_mean
from sd_lora.training.memory import GIB, StepBytes

HERE = "here"
"""Name of the card of this machine."""


@dataclass(frozen=True)
class Card:
    """A card.

    memory: GiB. half, full: TFLOP/s in bf16 or fp16, and in float32. bandwidth: of its memory,
    GB/s. precision: of a run with `--mixed_precision auto`.
    """

    name: str
    memory: float
    half: float
    full: float
    bandwidth: float
    precision: str = "bf16"

    @property
    def kind(self) -> str:
        """Its name without the memory, plainly written: "rtx3060"."""
        return _plain(re.sub(r" \d+GB$", "", self.name))

    def least_seconds(self, count: StepBytes, precision: str) -> float:
        """The time below which no step can be: each kernel computes, or moves its bytes, at the
        card's full rate, whichever takes longer (the roofline of Williams et al. 2009), and the
        optimiser reads and writes its tensors once.

        precision: of the run, a key of `DTYPES`.
        """
        rate = 1e12 * (self.half if precision in ("bf16", "fp16") else self.full)
        speed = 1e9 * self.bandwidth
        passes = sum(max(flop / rate, moved / speed) for flop, moved in count.kernels)
        return passes + 2 * count.trained / speed


CARDS = {
    card.name: card
    for card in (
        Card("GTX 1060 6GB", 6, 4.4, 4.4, 192, "fp16"),
        Card("GTX 1080 Ti 11GB", 11, 11.3, 11.3, 484, "fp16"),
        Card("RTX 2060 6GB", 6, 25.8, 6.5, 336, "fp16"),
        Card("RTX 2080 Ti 11GB", 11, 56.9, 13.4, 616, "fp16"),
        Card("RTX 3050 8GB", 8, 18.2, 9.1, 224),
        Card("RTX 3060 12GB", 12, 25.6, 12.7, 360),
        Card("RTX 3060 Ti 8GB", 8, 32.4, 16.2, 448),
        Card("RTX 3070 8GB", 8, 40.6, 20.3, 448),
        Card("RTX 3080 10GB", 10, 59.5, 29.8, 760),
        Card("RTX 3090 24GB", 24, 71, 35.6, 936),
        Card("RTX 4060 8GB", 8, 30, 15.1, 272),
        Card("RTX 4060 Ti 8GB", 8, 44, 22.1, 288),
        Card("RTX 4060 Ti 16GB", 16, 44, 22.1, 288),
        Card("RTX 4070 12GB", 12, 58, 29.1, 504),
        Card("RTX 4080 16GB", 16, 97.5, 48.7, 717),
        Card("RTX 4090 24GB", 24, 165, 82.6, 1008),
        Card("RTX 5070 12GB", 12, 61.7, 30.9, 672),
        Card("RTX 5080 16GB", 16, 112.6, 56.3, 960),
        Card("RTX 5090 32GB", 32, 209.5, 104.8, 1792),
        Card("T4 16GB", 16, 65, 8.1, 320, "fp16"),
        Card("V100 16GB", 16, 125, 15.7, 900, "fp16"),
        Card("L4 24GB", 24, 121, 30.3, 300),
        Card("A10 24GB", 24, 125, 31.2, 600),
        Card("L40S 48GB", 48, 362, 91.6, 864),
        Card("RTX A6000 48GB", 48, 155, 38.7, 768),
        Card("A100 40GB", 40, 312, 19.5, 1555),
        Card("A100 80GB", 80, 312, 19.5, 2039),
        Card("H100 80GB", 80, 989, 67, 3350),
        Card("H200 141GB", 141, 989, 67, 4800),
    )
}
"""Name → card, with the nominal rates of NVIDIA; they were not compared with its data sheets once
more, and no card was at hand to measure one."""


def card_named(name: str) -> Card:
    """A card by its name, upper and lower case, spaces and its maker alike: "rtx3060", "8GB" for
    any card of this memory, of which the slowest is taken; `HERE` for that of this machine.

    Raises:
        UsageError: no such card, or several of different memory, with their names.
    """
    if name == HERE:
        return _here()
    wanted = _plain(name)
    found = [card for card in CARDS.values() if _plain(card.name) == wanted]
    found = found or [card for card in CARDS.values() if card.kind == wanted]
    if memory := re.fullmatch(r"(\d+)gb", wanted):
        same = [c for c in CARDS.values() if c.memory == int(memory[1]) and c.precision == "bf16"]
        slowest = sorted(same, key=lambda c: c.half)[:1]
        found = [replace(c, name=f"{name} (rates of {c.name})") for c in slowest]
    if len(found) == 1:
        return found[0]
    names = ", ".join(card.name for card in found or CARDS.values())
    several = "several cards have that name" if found else "it is not in the table"
    hint = "" if found else did_you_mean(name, CARDS)
    raise UsageError(f"card {name!r}: {several}.{hint} One of: {names}, or {HERE}")


def _plain(name: str) -> str:
    """A name without spaces, its maker and its kind: "rtx306012gb"."""
    plain = re.sub(r"nvidia|geforce|tesla|sxm\d?|pcie|hbm3|laptop gpu|[^a-z0-9]", "", name.lower())
    return re.sub(r"gib$", "gb", plain)


def _here() -> Card:
    """The card that torch sees, with its own memory; its rates are those of the table."""
    if not torch.cuda.is_available():
        raise UsageError(
            f'card {HERE}: torch sees none on this machine; name one: --card "RTX 3060 12GB"'
        )
    name = torch.cuda.get_device_name()
    memory = torch.cuda.get_device_properties(0).total_memory / GIB
    # "NVIDIA A100-SXM4-80GB": the memory is asked for
    kind = _plain(re.sub(r"[ -]\d+GB.*$", "", name))
    like = [card for card in CARDS.values() if card.kind == kind]
    if not like:
        raise UsageError(
            f"card {HERE}: the rates of {name} are not in the table; name one like it: "
            f"{', '.join(CARDS)}"
        )
    card = min(like, key=lambda c: abs(c.memory - memory))
    return replace(card, name=name, memory=memory)
