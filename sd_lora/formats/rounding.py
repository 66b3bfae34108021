"""Rounding of a tensor to a dtype: to the nearest number, or at random to one of two neighbours.

A change that is smaller than half the distance of neighbouring numbers vanishes if each number is
rounded to the nearest. Rounded at random, with the probability by which a number lies nearer to a
neighbour, each keeps its mean, and so does every sum over many of them.
"""

import torch
from torch import Tensor

from sd_lora.errors import UsageError, did_you_mean

ROUNDINGS = ("nearest", "stochastic")


def check_rounding(name: str) -> None:
    """Raise UsageError for a name that is none of `ROUNDINGS`."""
    if name not in ROUNDINGS:
        hint = did_you_mean(name, ROUNDINGS)
        raise UsageError(f"rounding {name!r} is none of {', '.join(ROUNDINGS)}.{hint}")


def rounded(x: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> Tensor:
    """A tensor in a dtype.

    Args:
        x: float32 or float64.
        dtype: floating-point, or an integer one that can hold the values.
        generator: of the random choice between neighbours; None rounds to the nearest.
    """
    if not dtype.is_floating_point:
        if generator is None:
            return x.round().to(dtype)
        return (x + torch.rand(x.shape, generator=generator)).floor().to(dtype)
    near = x.to(dtype)
    if generator is None or dtype.itemsize >= x.dtype.itemsize:
        return near
    bits = near.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[dtype.itemsize])
    value = near.to(x.dtype)
    beyond = x - value
    # floats are sign and magnitude: the next larger magnitude is the next integer
    step = torch.where(beyond.sign() == value.sign(), 1, -1).to(bits.dtype)
    least = torch.where(beyond < 0, torch.iinfo(bits.dtype).min + 1, 1).to(bits.dtype)
    other = torch.where(value == 0, least, bits + step)
    distance = other.view(dtype).to(x.dtype) - value
    share = torch.where(distance.isfinite() & (beyond != 0), beyond / distance, 0.0)
    taken = torch.rand(x.shape, generator=generator) < share
    return torch.where(taken, other, bits).view(dtype)
