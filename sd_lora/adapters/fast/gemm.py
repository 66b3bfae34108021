"""The library that multiplies matrices, by weight.

torch multiplies float32 on a CPU by MKL, which leaves AVX-512 out on processors that are not
Intel's: 70 to 110 GFLOP/s of 64 and more rows on one core of an AMD EPYC (Zen 5), where oneDNN,
which torch has as well and takes for bfloat16, reaches 150 to 230 on the plain weights, stored
either way (benchmarks/README.md).
"""

import platform
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

WIDE = 320
"""Least width, on both sides, of a weight that anything but torch's own choice multiplies: SD 1.5
begins there. The embedded base ends at 256, and keeps its numbers to the bit."""


class Gemm(NamedTuple):
    """Products with one weight.

    linear: of x (N, in), W (out, in) and a bias (out) → x Wᵀ + b (N, out). onto: of y (N, out), x
    and W → y + x Wᵀ; y is lost.
    """

    linear: Callable[..., Tensor]
    onto: Callable[[Tensor, Tensor, Tensor], Tensor]


TORCH = Gemm(F.linear, lambda y, x, W: y.addmm_(x, W.t()))


def gemm_of(W: Tensor) -> Gemm:
    """The fastest products with a weight (out, in)."""
    fits = W.device.type == "cpu" and W.dtype == torch.float32 and is_wide(W)
    # a compiler chooses by itself, and has no form of the sum
    takes = fits and not torch.compiler.is_compiling() and _is_slow_in_mkl()
    return (onednn() or TORCH) if takes else TORCH


def is_wide(W: Tensor) -> bool:
    """Whether a weight (out, in, …) is wide on both sides."""
    return min(W.shape[:2]) >= WIDE


@cache
def onednn() -> Gemm | None:
    """oneDNN's products, by operators that torch's compiler uses and that are no public API; None
    where they are not there, or do not give torch's own numbers."""
    with suppress(Exception):  # another version may have other operators, or none
        one: Any = torch.ops.mkldnn._linear_pointwise
        found = Gemm(
            lambda x, W, bias=None: one(x, W, bias, "none", [], ""),
            lambda y, x, W: one.binary(x, y, W, None, "add"),
        )
        return found if is_right(found) else None
    return None


def is_right(gemm: Gemm) -> bool:
    """Whether products give torch's own numbers, of weights stored either way."""
    x, y, bias = (torch.arange(n * 1.0).sin() for n in (15, 12, 4))
    x, y, W = x.view(3, 5), y.view(3, 4), torch.arange(20.0).cos().view(5, 4).t()
    for weight in (W, W.contiguous()):
        right = [F.linear(x, weight), F.linear(x, weight, bias), y + F.linear(x, weight)]
        found = [gemm.linear(x, weight), gemm.linear(x, weight, bias), gemm.onto(y + 0, x, weight)]
        if not all(torch.allclose(a, b, 1e-5, 1e-5) for a, b in zip(found, right, strict=True)):
            return False
    return True


@cache
def _is_slow_in_mkl() -> bool:
    """Whether torch multiplies by MKL on a processor whose AVX-512 MKL leaves out."""
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.backends.mkl.is_available()
    text = platform.processor()  # Linux leaves it out
    with suppress(OSError):
        text += Path("/proc/cpuinfo").read_text("utf-8", "replace")
    return wide and "AuthenticAMD" in text
