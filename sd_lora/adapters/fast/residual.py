"""A residual block as one function: x + conv₂(silu(norm₂(conv₁(silu(norm₁(x))) + t))), whose
convolutions are frozen or plain LoRA.

It saves its input, the middle and the rank-wide products. The norms' outputs and the activations
are computed again in the backward pass: torch keeps four tensors of the block's size, and one node
of the graph costs as much host time here as each of ten there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sd_lora.adapters.fast.copies import ConvFactors

aten = torch.ops.aten
Tensors = Sequence[Tensor]


class Part(Protocol):
    """A convolution of a block, frozen or with trained factors beside it."""

    def tensors(self) -> Tensors:
        """Working copies of its factors; none of a frozen one."""

    def product(self, x: Tensor, tensors: Tensors) -> tuple[Tensor, Tensors]:
        """The output, and the rank-wide products for `gradients`."""

    def gradients(
        self, g: Tensor, x: Tensor, lows: Tensors, tensors: Tensors, wants_x: bool
    ) -> tuple[Any, Tensors]:
        """Gradients of x, None if it is not wanted, and of the tensors. x: of a frozen one its
        shape alone counts."""


@dataclass(frozen=True)
class Convolution:
    """A convolution of a block. factors: its working copies, None of a frozen one."""

    base: nn.Conv2d
    factors: ConvFactors | None

    def tensors(self) -> Tensors:
        """A and B."""
        return (self.factors.A, self.factors.B) if self.factors else ()

    def product(self, x: Tensor, tensors: Tensors) -> tuple[Tensor, Tensors]:
        """W x + b + B(A x), and A x."""
        y = convolved(self.base, x)
        if not tensors:
            return y, ()
        A, B = tensors
        low = low_of(self.base, x, A)
        return y.add_(torch.conv2d(low, B)), (low,)

    def gradients(
        self, g: Tensor, x: Tensor, lows: Tensors, tensors: Tensors, wants_x: bool
    ) -> tuple[Any, Tensors]:
        """See `Part`."""
        dx = gradient_by_base(self.base, g, x) if wants_x else None
        if not tensors:
            return dx, ()
        A, B = tensors
        more, pair = gradients_of_pair(self.base, g, x, lows[0], A, B, wants_x)
        return dx.add_(more) if dx is not None else None, pair


def convolved(base: Any, x: Tensor) -> Tensor:
    """W x + b."""
    return torch.conv2d(x, base.weight, base.bias, base.stride, base.padding)


def low_of(base: Any, x: Tensor, A: Tensor) -> Tensor:
    """A x, with the stride and padding of a convolution."""
    return torch.conv2d(x, A, None, base.stride, base.padding)


def gradient_by_base(base: Any, g: Tensor, x: Tensor) -> Tensor:
    """The gradient of x by W x."""
    return _conv_backward(g, x, base.weight, base.stride, base.padding, True, False)[0]


def gradients_of_pair(
    base: Any, g: Tensor, x: Tensor, low: Tensor, A: Tensor, B: Tensor, wants_x: bool
) -> tuple[Any, tuple[Tensor, Tensor]]:
    """The gradient of x by B(A x), None if it is not wanted, and those of A and B."""
    dlow, dB = _conv_backward(g, low, B, (1, 1), (0, 0), True, True)
    dx, dA = _conv_backward(dlow, x, A, base.stride, base.padding, wants_x, True)
    return dx, (dA, dB)


def _conv_backward(
    g: Tensor, x: Any, W: Tensor, stride: Any, padding: Any, wants_x: bool, wants_W: bool
) -> tuple[Any, Any]:
    dx, dW, _ = aten.convolution_backward(
        g, x, W, None, stride, padding, (1, 1), False, (0, 0), 1, (wants_x, wants_W, False)
    )
    return dx, dW


class Norm:
    """silu(GroupNorm(x)) with a frozen norm, and its gradient."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        self.weight, self.bias = norm.weight, norm.bias
        self.groups, self.eps = norm.num_groups, norm.eps

    def _sizes(self, x: Tensor) -> tuple[int, int, int, int]:
        return x.shape[0], x.shape[1], x.shape[2] * x.shape[3], self.groups

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The output before silu, mean and 1/σ."""
        return torch.native_group_norm(x, self.weight, self.bias, *self._sizes(x), self.eps)

    def gradient(self, dz: Tensor, y: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
        """The gradient of x from that of silu(y)."""
        dy = aten.silu_backward(dz.contiguous(), y)
        return aten.native_group_norm_backward(
            dy, x, mean, rstd, self.weight, *self._sizes(x), (True, False, False)
        )[0]


@dataclass(frozen=True)
class Block:
    """The parts of a block. shortcut: of the input where it changes its width, else None."""

    norm1: Norm
    conv1: Part
    norm2: Norm
    conv2: Part
    shortcut: Part | None

    def __call__(self, x: Tensor, time: Tensor) -> Tensor:
        """The output for x (B, C, H, W) and the projected time embedding (B, out, 1, 1)."""
        parts = self.conv1, self.conv2, self.shortcut
        tensors = [part.tensors() if part else () for part in parts]
        flat = [tensor for of_part in tensors for tensor in of_part]
        return _Residual.apply(self, x.contiguous(), time, [*map(len, tensors)], *flat)


class _Residual(torch.autograd.Function):
    """See `Block`. sizes: numbers of tensors of its three convolutions."""

    @staticmethod
    def forward(
        ctx: Any, block: Block, x: Tensor, time: Tensor, sizes: list[int], *tensors: Tensor
    ) -> Tensor:
        first, second, third = _split(tensors, sizes)
        y, *of_x = block.norm1(x)
        middle, lows1 = block.conv1.product(F.silu(y, inplace=True), first)
        middle = middle.add_(time).contiguous()
        y, *of_middle = block.norm2(middle)
        out, lows2 = block.conv2.product(F.silu(y, inplace=True), second)
        lows3: Tensors = ()
        if block.shortcut is None:
            out.add_(x)
        else:
            short, lows3 = block.shortcut.product(x, third)
            out.add_(short)
        ctx.block, ctx.width = block, time.shape
        ctx.sizes = [4, *map(len, (lows1, lows2, lows3)), *sizes]
        ctx.save_for_backward(x, middle, *of_x, *of_middle, *lows1, *lows2, *lows3, *tensors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor):  # type: ignore[no-untyped-def]
        x, middle, *saved = ctx.saved_tensors
        of_norms, lows1, lows2, lows3, first, second, third = _split(saved, ctx.sizes)
        (mean1, rstd1, mean2, rstd2), block = of_norms, ctx.block
        wants_x, wants_time = ctx.needs_input_grad[1:3]
        y = block.norm2(middle)[0]
        z = F.silu(y) if second else y
        wants_z = wants_x or wants_time or bool(first)
        dz, of_second = block.conv2.gradients(g, z, lows2, second, wants_z)
        dx: Any = None
        dtime = None
        of_first: Tensors = ()
        if dz is not None:
            dmiddle = block.norm2.gradient(dz, y, middle, mean2, rstd2)
            if wants_time:
                dtime = dmiddle.sum((2, 3)).view(ctx.width)
            y = block.norm1(x)[0] if wants_x or first else x
            z = F.silu(y) if first else y
            dz, of_first = block.conv1.gradients(dmiddle, z, lows1, first, wants_x)
            dx = block.norm1.gradient(dz, y, x, mean1, rstd1) if wants_x else None
        of_third: Tensors = ()
        if block.shortcut is None:
            dx = dx.add_(g) if wants_x else None
        else:
            short, of_third = block.shortcut.gradients(g, x, lows3, third, wants_x)
            dx = dx.add_(short) if wants_x else None
        return None, dx, dtime, None, *of_first, *of_second, *of_third


def _split(tensors: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensors]:
    """Tensors in parts of these numbers."""
    left = iter(tensors)
    return [[*islice(left, size)] for size in sizes]
