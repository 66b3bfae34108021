"""Learning rates and optimisers of other trainers: AdamW alone is here."""

from typing import Any

from sd_lora.config.translate.rows import Given, Taken, number

ADAPTIVE = ("prodigy", "dadapt")
"""Beginnings of optimisers whose learning rate is a factor near 1."""

RATE_FACTOR = 0.1
"""Rates from here on are factors of an optimiser that finds its own: AdamW diverges at them."""


def is_factor(rate: Any, optimizer: Any) -> bool:
    """Whether a learning rate is a factor of an optimiser that finds its own rate."""
    return str(optimizer).lower().startswith(ADAPTIVE) or number(rate) >= RATE_FACTOR


def own_rate(rate: Any, optimizer: Any, name: str = "learning_rate") -> Taken:
    """A learning rate, unless it is a factor that AdamW would diverge at."""
    if is_factor(rate, optimizer):
        reason = f"is a factor of {optimizer or 'their optimiser'}; AdamW's own default is used"
        return Taken("absent", reason=reason)
    return Taken("same", {name: rate})


def optimizer(value: Any, given: Given) -> Taken:
    """AdamW in either form; others are told."""
    word = str(value or "AdamW").lower().replace("_", "").replace("-", "")
    if word in ("adamw", "torch.optim.adamw"):
        return Taken("needless", reason="is the optimiser here")
    if word in ("adamw8bit", "pagedadamw8bit", "bnbadamw8bit"):
        return Taken("otherwise", {"use_8bit_adam": True}, "is AdamW's 8-bit form")
    reason = "is not there: AdamW is used; mind the learning rate, theirs is for another optimiser"
    return Taken("absent", reason=reason)
