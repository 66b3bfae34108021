"""Variants: a method with its rule, options and dropouts; and fresh deltas of one."""

import inspect
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sd_lora.adapters import methods as methods  # fills METHODS
from sd_lora.adapters import oft as oft  # and this one
from sd_lora.adapters.deltas import METHODS, Delta
from sd_lora.adapters.named_elsewhere import in_our_words
from sd_lora.errors import UsageError, did_you_mean

RULES = ("add", "decompose")
_SUPPLIED = ("weight", "reference", "scale")  # arguments of `create` that are no options


@dataclass(frozen=True)
class Variant:
    """A method, its rule and options, and its dropouts in training.

    method: a name of `deltas.METHODS`.
    rule: "add" or "decompose" (DoRA).
    rslora: True for s = α/√r.
    dropout, neuron_dropout, rank_dropout, module_dropout: probabilities in [0, 1), see `inject`.
    options: of the method, see its `create`.

    Raises:
        UsageError: an unknown method, rule or option (all unknown options at once), or a
            probability out of range.
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
        method_class(self.method)
        check_rule(self.rule)
        for name in ("dropout", "neuron_dropout", "rank_dropout", "module_dropout"):
            p = getattr(self, name)
            if not 0 <= p < 1:
                raise UsageError(f"{name} must be a probability in [0, 1), not {p}")
        check_options(self.method, self.options)


def check_rule(rule: str) -> None:
    """Refuse a rule that is none of `RULES`, by a UsageError."""
    if rule not in RULES:
        raise UsageError(f"rule must be {' or '.join(RULES)} (DoRA), not {rule!r}")


def check_options(method: str, options: Mapping[str, Any], others: Iterable[str] = ()) -> None:
    """Refuse options that a method has not, all at once.

    Args:
        method: a method's name.
        options: name → value.
        others: further names that may have been meant.

    Raises:
        UsageError: an unknown option, with our name where another library calls it so.
    """
    arguments = inspect.signature(method_class(method).create).parameters.items()
    known = [n for n, p in arguments if p.kind is p.KEYWORD_ONLY and n not in _SUPPLIED]
    problems = []
    for name, value in options.items():
        if name not in known:
            hint = did_you_mean(name, ({*known, *others} - {name}))
            unknown = (
                f"{method} has no option {name!r}.{hint} Its options: {', '.join(known) or 'none'}"
            )
            problems.append(in_our_words(name, value) or unknown)
    if problems:
        raise UsageError("\n".join(problems))


def method_class(name: str) -> type["Delta"]:
    """Class of a method; raises UsageError, with a suggestion, for an unknown name."""
    if name not in METHODS:
        raise UsageError(
            f"unknown method {name!r}.{did_you_mean(name, METHODS)} "
            f"Methods: {', '.join(METHODS)}. For DoRA, use any of them with the rule decompose"
        )
    return METHODS[name]


def method_by_tensor_names(names: frozenset[str]) -> type["Delta"] | None:
    """First registered method with all these tensor names; None if there is none."""
    matching = (m for m in METHODS.values() if names and names <= {*m.tensor_names})
    return next(matching, None)


def new_delta(
    variant: Variant,
    weight: Tensor,
    rank: int = 1,
    alpha: float | None = None,
    generator: torch.Generator | None = None,
    reference: Tensor | None = None,
) -> Delta:
    """Fresh delta of a weight, on its device.

    Args:
        variant: method, rule, options and dropouts.
        weight: the frozen weight W (out, in/groups, k…).
        rank, alpha: r and α; s = α/r, and α/√r with rslora (Kalajdzievski 2023, equation 4).
        generator: of the initial tensors, on the CPU.
        reference: the weight before quantisation, for the init "loftq".

    Raises:
        ValueError: an option or rule that this weight cannot follow, with the reason.
    """
    cls = method_class(variant.method)
    root = math.sqrt(rank) if variant.rslora else 1.0
    alpha = float(rank if alpha is None else alpha) * root  # every reader's α/r is then α/√r
    supplied = {"weight": weight, "reference": reference, "scale": alpha / rank}
    known = inspect.signature(cls.create).parameters
    options = dict(variant.options) | {name: supplied[name] for name in _SUPPLIED if name in known}
    # drawn on the CPU, as its generator is, also where tensors are made elsewhere by themselves
    with torch.device("cpu"):
        tensors = cls.create(tuple(weight.shape), rank, generator, **options)
    dtype = torch.promote_types(torch.float32, weight.dtype)
    tensors = {name: t.to(weight.device, dtype) for name, t in tensors.items()}
    delta = cls(tuple(weight.shape), tensors, alpha)
    if delta.rank is None:
        delta.alpha = 1.0
    delta.rank_dropout = variant.rank_dropout
    if variant.rule == "decompose":
        if weight.dim() < 2:
            raise ValueError("the rule decompose scales the rows of a matrix, and this is a vector")
        # m would scale the quantised weight without the residual
        if delta.quantization_residual is not None:
            raise ValueError("the init loftq works with the rule add only")
        delta.init_magnitude(weight)
    return delta
