"""Which kind of update: a method with its rule, options and dropouts; a fresh one for a weight."""

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sd_lora.adapters import methods as methods  # fills METHODS
from sd_lora.adapters.deltas import METHODS, Delta
from sd_lora.errors import UsageError, did_you_mean

RULES = ("add", "decompose")
_GIVEN = ("weight", "reference", "scale")  # what `create` may ask for besides its options


@dataclass(frozen=True)
class Variant:
    """What kind of update: a method, its rule and options, and what is dropped in training.

    method: a name of `deltas.METHODS`. rule: "add" or "decompose" (DoRA). rslora: s = α/√r.
    options: the method's own, see its `create`. The four dropouts are probabilities in [0, 1).
    """

    method: str = "lora"
    rule: str = "add"
    rslora: bool = False
    dropout: float = 0.0
    neuron_dropout: float = 0.0
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        method_named(self.method)
        if self.rule not in RULES:
            raise UsageError(f"rule must be {' or '.join(RULES)}, not {self.rule!r}")
        for name in ("dropout", "neuron_dropout", "rank_dropout", "module_dropout"):
            p = getattr(self, name)
            if not 0 <= p < 1:
                raise UsageError(f"{name} is a probability in [0, 1), not {p}")


def method_named(name: str) -> type["Delta"]:
    """Returns a method's class, or raises UsageError with a suggestion."""
    if name not in METHODS:
        raise UsageError(
            f"unknown method {name!r}.{did_you_mean(name, METHODS)} "
            f"Methods: {', '.join(METHODS)}; DoRA is the rule decompose of any of them"
        )
    return METHODS[name]


def method_of(names: frozenset[str]) -> type["Delta"] | None:
    """Returns the method whose tensors have these names, the first registered, if there is one."""
    fitting = (m for m in METHODS.values() if names and names <= {*m.tensor_names})
    return next(fitting, None)


def new_delta(
    variant: Variant,
    weight: Tensor,
    rank: int = 1,
    alpha: float | None = None,
    generator: torch.Generator | None = None,
    reference: Tensor | None = None,
) -> Delta:
    """Returns a fresh update of `weight` (out, in/groups, k…), on its device.

    Args:
        variant: which kind of update.
        weight: the frozen weight W.
        rank, alpha: r and α; s = α/r, and α/√r with rslora (Kalajdzievski 2023, equation 4).
        generator: a CPU generator of the initial tensors.
        reference: the weight before quantisation, for the init "loftq".

    Raises:
        UsageError: an option that the method has not.
        ValueError: a request that this weight cannot meet, with its reason.
    """
    cls = method_named(variant.method)
    known = inspect.signature(cls.create).parameters
    names = [n for n, p in known.items() if p.kind is p.KEYWORD_ONLY and n not in _GIVEN]
    for name in variant.options:
        if name not in names:
            raise UsageError(
                f"{variant.method} has no option {name!r}.{did_you_mean(name, names)} "
                f"Its options: {', '.join(names) or 'none'}"
            )
    root = math.sqrt(rank) if variant.rslora else 1.0
    alpha = float(rank if alpha is None else alpha) * root  # so that everybody's α/r is α/√r
    given = {"weight": weight, "reference": reference, "scale": alpha / rank}
    options = dict(variant.options) | {name: given[name] for name in _GIVEN if name in known}
    tensors = cls.create(tuple(weight.shape), rank, generator, **options)
    dtype = torch.promote_types(torch.float32, weight.dtype)
    tensors = {name: t.to(weight.device, dtype) for name, t in tensors.items()}
    delta = cls(tuple(weight.shape), tensors, alpha)
    if delta.rank is None:
        delta.alpha = 1.0
    delta.rank_dropout = variant.rank_dropout
    if variant.rule == "decompose":
        if weight.dim() < 2:
            raise ValueError("decompose rescales the rows of a matrix, and this is a vector")
        if delta.lost is not None:  # a magnitude would rescale Q and not what is added to it
            raise ValueError("the init loftq goes with the rule add alone")
        delta.decompose(weight)
    return delta
