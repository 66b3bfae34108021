"""All that the host gives a recorded pass, by its form."""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

from torch import Tensor

from sd_lora.training.batch_loss import Question, Weights

T = TypeVar("T")


@dataclass(frozen=True)
class Given:
    """All that the host gives a pass."""

    question: Question
    weights: Weights
    accumulation_steps: int


def parts_of(values: Any, place: str = "") -> dict[str, Any]:
    """Place → part of a dataclass of dataclasses that is none itself, in order."""
    found: dict[str, Any] = {}
    for field in fields(values):
        value, name = getattr(values, field.name), f"{place}{field.name}"
        found |= parts_of(value, f"{name}.") if is_dataclass(value) else {name: value}
    return found


def tensors_of(values: Any) -> list[Tensor]:
    """All tensors of a dataclass of dataclasses, in order."""
    return [part for part in parts_of(values).values() if isinstance(part, Tensor)]


def changed(values: T, change: Callable[[Tensor], Tensor]) -> T:
    """A dataclass of dataclasses with each of its tensors changed."""
    assert is_dataclass(values)
    new: dict[str, Any] = {}
    for name in (field.name for field in fields(values)):
        value = getattr(values, name)
        if isinstance(value, Tensor):
            new[name] = change(value)
        elif is_dataclass(value) and not isinstance(value, type):
            new[name] = changed(value, change)
    return replace(values, **new)  # type: ignore[type-var]


def form_of(given: Given) -> tuple[object, ...]:
    """The form of all passes that one recording computes: which tensors there are, their shapes,
    dtypes and whether they need a gradient, and all numbers that are in none."""
    return tuple(
        (place, tuple(part.shape), part.dtype, part.requires_grad)
        if isinstance(part, Tensor)
        else (place, part)
        for place, part in parts_of(given).items()
    )
