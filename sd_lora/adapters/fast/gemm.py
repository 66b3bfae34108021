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
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST = 2_000_000
"""Multiplications, rows × in × out, from which a product is oneDNN's. A call of it costs 9 µs more
than one of torch's own: 64 × 144→144 takes 24 and 27 µs, 256 × 96→96 32 and 47, and 256 × 96→768
169 and 357."""


DEEP = 16
"""Least products in each sum that oneDNN adds to another tensor: of 8, 1024 × 8→2560 takes it 1.8
ms, and torch 0.9; of 32, 1024 × 32→320 0.11 and 0.19."""


class Gemm(NamedTuple):
    """Products with one weight.

    linear: of x (N, in), W (out, in) and a bias (out) → x Wᵀ + b (N, out). onto: of y (N, out), x
    and W → y + x Wᵀ; y is lost.
    """

    linear: Callable[..., Tensor]
    onto: Callable[[Tensor, Tensor, Tensor], Tensor]


TORCH = Gemm(F.linear, lambda y, x, W: y.addmm_(x, W.t()))


def gemm_of(W: Tensor) -> Gemm:
    """The fastest products with a weight (out, in), and with the narrow ones of its LoRA."""
    fits = W.device.type == "cpu" and W.dtype == torch.float32
    # a compiler chooses by itself, and has no form of the sum
    takes = fits and not torch.compiler.is_compiling() and _is_slow_in_mkl()
    return (by_work() or TORCH) if takes else TORCH


@cache
def by_work() -> Gemm | None:
    """Products by oneDNN from `LEAST` multiplications on, and by torch below; None without
    oneDNN's."""
    one = onednn()
    if one is None:
        return None

    def of(x: Tensor, W: Tensor) -> Gemm:
        return one if x.shape[0] * W.numel() >= LEAST and is_dense(W) else TORCH

    def onto(y: Tensor, x: Tensor, W: Tensor) -> Tensor:
        return (of(x, W) if W.shape[1] >= DEEP else TORCH).onto(y, x, W)

    return Gemm(lambda x, W, bias=None: of(x, W).linear(x, W, bias), onto)


@cache
def onednn() -> Gemm | None:
    """oneDNN's products, by operators that torch's compiler uses and that are no public API; None
    where they are not there, or do not give torch's own numbers."""
    with suppress(Exception):  # another version may have other operators, or none
        one: Any = torch.ops.mkldnn._linear_pointwise
        linear, binary = one.default, one.binary
        found = Gemm(
            lambda x, W, bias=None: linear(x, W, bias, "none", [], ""),
            lambda y, x, W: binary(x, y, W, None, "add"),
        )
        return found if is_right(found) else None
    return None


def is_right(gemm: Gemm) -> bool:
    """Whether products give torch's own numbers, of inputs and weights stored either way, or as
    a part of wider ones."""
    x, y, bias = (torch.arange(n * 1.0).sin() for n in (15, 12, 4))
    x, y, W = x.view(3, 5), y.view(3, 4), torch.arange(20.0).cos().view(5, 4).t()
    right = [F.linear(x, W), F.linear(x, W, bias), y + F.linear(x, W)]
    for own, weight in product(*map(_stored, (x, W))):
        found = [gemm.linear(own, weight), gemm.linear(own, weight, bias)]
        found.append(gemm.onto(y + 0, own, weight))
        if not all(torch.allclose(a, b, 1e-5, 1e-5) for a, b in zip(found, right, strict=True)):
            return False
    return True


def is_dense(W: Tensor) -> bool:
    """Whether a matrix has a place of its own, by rows or by columns. oneDNN has no fast kernel for
    a weight that is a part of a wider one: 16 × 64→2048 takes it 43 ms, and torch 0.05."""
    return W.is_contiguous() or W.t().is_contiguous()


def _stored(matrix: Tensor) -> list[Tensor]:
    """A matrix by rows, by columns, and as a part of a wider one."""
    part = F.pad(matrix, (1, 2))[:, 1:-2]
    return [matrix.contiguous(), matrix.t().contiguous().t(), part]


@cache
def _is_slow_in_mkl() -> bool:
    """Whether torch multiplies by MKL on a processor whose AVX-512 MKL leaves out."""
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.backends.mkl.is_available()
    text = platform.processor()  # Linux leaves it out
    with suppress(OSError):
        text += Path("/proc/cpuinfo").read_text("utf-8", "replace")
    return wide and "AuthenticAMD" in text
