"""Rounding to a dtype: to the nearest number, or at random to one of two neighbours; and factors
that float16 can hold.

A change that is smaller than half the distance of neighbouring numbers vanishes if each number is
rounded to the nearest. Rounded at random, with the probability by which a number lies nearer to a
neighbour, each keeps its mean, and so does every sum over many of them.
"""

import copy
from functools import partial

import torch
from torch import Tensor

from sd_lora.adapters.deltas import Delta
from sd_lora.adapters.methods import LoRA
from sd_lora.errors import UsageError, did_you_mean
from sd_lora.formats.canonical import Adapter, Lazy, Modules

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


def balanced(adapter: Adapter, dtype: torch.dtype) -> Adapter:
    """An adapter with factors A and B that float16 rounds by no more than half a unit.

    Below 6e-5 its numbers lose bits, and B of a short run is smaller; above 65504 it has none.
    A·2⁻ᵖ and B·2ᵖ, with maxima alike, have the same product to the last bit, for a power of two
    changes an exponent alone. Factors that lose nothing, and files of other dtypes, stay as they
    are.
    """
    if dtype is not torch.float16:
        return adapter
    return {c: Lazy(ms, partial(_balanced, ms, dtype)) for c, ms in adapter.items()}


@torch.no_grad()
def _balanced(modules: Modules, dtype: torch.dtype, name: str) -> Delta:
    delta = modules[name]
    if not isinstance(delta, LoRA) or delta.initial_factors is not None:
        return delta
    A, B = delta.lora_A, delta.scale * delta.lora_B  # files have the scale in B
    if not (_loses_bits(A, dtype) or _loses_bits(B, dtype)):
        return delta
    exponents = [torch.frexp(factor.abs().max()).exponent for factor in (A, B)]
    p = torch.div(exponents[0] - exponents[1], 2, rounding_mode="floor")
    delta = copy.deepcopy(delta)
    delta.lora_A.mul_(torch.ldexp(torch.ones(()), -p))
    delta.lora_B.mul_(torch.ldexp(torch.ones(()), p))
    return delta


def _loses_bits(factor: Tensor, dtype: torch.dtype) -> bool:
    """Whether a dtype rounds a factor, other than zero, by more than half a unit of each number."""
    error = (factor.to(dtype).to(factor.dtype) - factor).norm()
    return not bool(error <= torch.finfo(dtype).eps / 2 * factor.norm())
