"""Learning rates, optimisers and their arguments of other trainers."""

from typing import Any

from sd_lora.config.optimizers import (
    OPTIMIZERS,
    called_elsewhere,
    is_import_path,
    optimizer_facts,
)
from sd_lora.config.translate.rows import Given, Row, Taken, number, taking
from sd_lora.config.values import plain_value

ADAPTIVE = ("prodigy", "dadapt")
"""Beginnings of optimisers whose learning rate is a factor near 1."""

RATE_FACTOR = 0.1
"""Rates from here on are factors of an optimiser that finds its own: AdamW diverges at them."""


def is_factor(rate: Any, optimizer: Any) -> bool:
    """Whether a learning rate is a factor of an optimiser that finds its own, and is not here."""
    ours = called_elsewhere(str(optimizer))
    if (ours and OPTIMIZERS[ours].finds_rate) or (not ours and is_import_path(str(optimizer))):
        return False
    return str(optimizer).lower().startswith(ADAPTIVE) or number(rate) >= RATE_FACTOR


def own_rate(rate: Any, optimizer: Any, name: str = "learning_rate") -> Taken:
    """A learning rate, unless it is a factor that AdamW would diverge at."""
    if is_factor(rate, optimizer):
        reason = f"is a factor of {optimizer or 'their optimiser'}; AdamW's own default is used"
        return Taken("absent", reason=reason)
    return Taken("same", {name: rate})


THEIR_DEFAULTS: dict[tuple[str, str], dict[str, Any]] = {
    ("kohya", "prodigy"): {"use_bias_correction": False, "safeguard_warmup": False},
    ("kohya", "adafactor"): {"relative_step": True, "scale_parameter": True},
    ("ai_toolkit", "prodigy"): {"use_bias_correction": False, "safeguard_warmup": False},
}
"""(Peer, optimiser here) → arguments that are others there where none are given."""


def optimizer(peer: str) -> Row:
    """The row of an optimiser's name. peer: of `config.rows.PEERS`."""

    def take(value: Any, given: Given) -> Taken:
        name = str(value or "AdamW")
        ours = called_elsewhere(name)
        if ours == "adamw":
            return Taken("needless", reason="is the optimiser here")
        if ours:
            args = THEIR_DEFAULTS.get((peer, ours))
            return Taken("same", {"optimizer": ours} | ({"optimizer_args": args} if args else {}))
        if is_import_path(name):
            reason = "is imported as it is, with its arguments"
            return Taken("otherwise", {"optimizer": name}, reason)
        reason = (
            "is not there: AdamW is used; mind the learning rate, theirs is for another optimiser"
        )
        return Taken("absent", reason=reason)

    return taking("--optimizer", "", take)


def argument(key: str, optimizer_key: str, option: str = "") -> Row:
    """The row of an argument of an optimiser.

    Args:
        key: its name here.
        optimizer_key: the setting that names the optimiser.
        option: the option that it is with AdamW and its variants.
    """

    def take(value: Any, given: Given) -> Taken:
        name = str(given.get(optimizer_key) or "AdamW")
        ours = called_elsewhere(name) or name
        if value in (None, ""):
            return Taken("needless", reason="is not given")
        if option and optimizer_facts(ours, None).moments:
            return Taken("otherwise", {option: number(value)}, "is that of AdamW and its variants")
        if key in optimizer_facts(ours, None).args or is_import_path(ours):
            plain = plain_value(value) if isinstance(value, str) else value
            return Taken("otherwise", {"optimizer_args": {key: plain}}, "is an argument there, too")
        return Taken("absent", reason="belongs to another optimiser")

    return taking(f"--{option}" if option else "--optimizer_args", "", take)


def betas(optimizer_key: str) -> Row:
    """The row of both betas in one setting: a list, or a text with a comma."""

    def take(value: Any, given: Given) -> Taken:
        parts = str(value).strip("()[] ").split(",") if isinstance(value, str) else [*value]
        name = str(given.get(optimizer_key) or "AdamW")
        ours = called_elsewhere(name) or name
        numbers = [number(part) for part in parts]
        if "betas" in optimizer_facts(ours, None).args or is_import_path(ours):
            return Taken("otherwise", {"optimizer_args": {"betas": numbers}}, "is an argument")
        if len(numbers) != 2:
            raise ValueError(f"is two numbers, not {value!r}")
        pair = dict(zip(("adam_beta1", "adam_beta2"), numbers, strict=True))
        return Taken("otherwise", pair, "is two options")

    return taking("--adam_beta1 --adam_beta2", "is two options", take)


ARGUMENTS = (
    "amsgrad", "beta3", "clip_threshold", "d0", "d_coef", "d_limiter", "decay_rate", "decouple",
    "factored", "growth_rate", "momentum", "nesterov", "ns_steps", "prodigy_steps",
    "relative_step", "safeguard_warmup", "scale_parameter", "schedulefree_c", "split_groups",
    "split_groups_mean", "use_bias_correction", "use_schedulefree", "use_speed",
    "use_stableadamw", "warmup_init", "weight_lr_power",
)  # fmt: skip
"""Arguments of optimisers that other trainers pass by these names."""


def arguments(optimizer_key: str, before: str = "") -> dict[str, Row]:
    """Name there → row of each of `ARGUMENTS`. before: the beginning of their names there."""
    return {f"{before}{key}": argument(key, optimizer_key) for key in ARGUMENTS}


def argument_text(value: Any, given: Given) -> Taken:
    """SimpleTuner's arguments as a text, "weight_decay=0.01,d_coef=2", or a table."""
    words = [word.partition("=") for word in str(value).split(",")]
    pairs = value if isinstance(value, dict) else {k.strip(): v for k, _, v in words if v}
    found: dict[str, Any] = {}
    unknown = []
    for key, part in pairs.items():
        if key == "weight_decay":
            found["adam_weight_decay"] = number(part)
            continue
        taken = argument(key, "optimizer", _OF_ADAMW.get(key, "")).take(part, given)
        found |= {k: v for k, v in taken.values.items() if k != "optimizer_args"}
        if own := taken.values.get("optimizer_args"):
            found["optimizer_args"] = found.get("optimizer_args", {}) | own
        unknown += [key] if taken.kind == "absent" else []
    if unknown and not found:
        return Taken("absent", reason=f"belongs to another optimiser: {', '.join(unknown)}")
    left = f"; {', '.join(unknown)} of another optimiser is left out" if unknown else ""
    return Taken("otherwise", found, f"is options, and arguments of the optimiser{left}")


_OF_ADAMW = {"beta1": "adam_beta1", "beta2": "adam_beta2", "eps": "adam_epsilon"}
