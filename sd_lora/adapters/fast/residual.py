"""A residual block as one function: x + conv₂(silu(norm₂(conv₁(silu(norm₁(x))) + t))), whose
convolutions are frozen or plain LoRA.

It saves its input, the middle and the rank-wide products. The norms' outputs and the activations
are computed again in the backward pass: torch keeps four tensors of the block's size, and one node
of the graph costs as much host time here as each of ten there.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sd_lora.adapters.fast.convolutions import Convolution, Pair, layout_of

aten = torch.ops.aten


def laid_out(x: Tensor) -> Tensor:
    """An image in the order in which norms and convolutions read it."""
    return x.contiguous(memory_format=layout_of(x.device))


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
        dy = aten.silu_backward(laid_out(dz), y)
        return aten.native_group_norm_backward(
            dy, x, mean, rstd, self.weight, *self._sizes(x), (True, False, False)
        )[0]


@dataclass(frozen=True)
class Block:
    """The parts of a block. shortcut: of the input where it changes its width, else None."""

    norm1: Norm
    conv1: Convolution
    norm2: Norm
    conv2: Convolution
    shortcut: Convolution | None

    def __call__(self, x: Tensor, time: Tensor) -> Tensor:
        """The output for x (B, C, H, W) and the projected time embedding (B, out, 1, 1)."""
        pairs = [*self.conv1.pair(), *self.conv2.pair()]
        pairs += self.shortcut.pair() if self.shortcut else (None, None)
        return _Residual.apply(self, laid_out(x), time, *pairs)


class _Residual(torch.autograd.Function):
    """See `Block`."""

    @staticmethod
    def forward(ctx: Any, block: Block, x: Tensor, time: Tensor, *pairs: Tensor | None) -> Tensor:
        A1, B1, A2, B2, A3, B3 = pairs
        y, *of_x = block.norm1(x)
        middle, low1 = block.conv1.product(F.silu(y, inplace=True), A1, B1)
        middle = laid_out(middle.add_(time))
        y, *of_middle = block.norm2(middle)
        out, low2 = block.conv2.product(F.silu(y, inplace=True), A2, B2)
        low3 = None
        if block.shortcut is None:
            out.add_(x)
        else:
            short, low3 = block.shortcut.product(x, A3, B3)
            out.add_(short)
        ctx.block, ctx.width = block, time.shape
        ctx.save_for_backward(x, middle, *of_x, *of_middle, low1, low2, low3, *pairs)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor):  # type: ignore[no-untyped-def]
        x, middle, mean1, rstd1, mean2, rstd2, low1, low2, low3, *pairs = ctx.saved_tensors
        (A1, B1, A2, B2, A3, B3), block = pairs, ctx.block
        wants_x, wants_time = ctx.needs_input_grad[1:3]
        learns1 = A1 is not None
        y = block.norm2(middle)[0]
        z = y if A2 is None else F.silu(y)
        dz, pair2 = block.conv2.gradients(g, z, low2, A2, B2, wants_x or wants_time or learns1)
        dx: Any = None
        dtime = None
        pair1: Pair = (None, None)
        if dz is not None:
            dmiddle = block.norm2.gradient(dz, y, middle, mean2, rstd2)
            if wants_time:
                dtime = dmiddle.sum((2, 3)).view(ctx.width)
            y = block.norm1(x)[0] if wants_x or learns1 else x
            z = F.silu(y) if learns1 else y
            dz, pair1 = block.conv1.gradients(dmiddle, z, low1, A1, B1, wants_x)
            dx = block.norm1.gradient(dz, y, x, mean1, rstd1) if wants_x else None
        pair3: Pair = (None, None)
        if block.shortcut is None:
            dx = dx.add_(g) if wants_x else None
        else:
            short, pair3 = block.shortcut.gradients(g, x, low3, A3, B3, wants_x)
            dx = dx.add_(short) if wants_x else None
        return None, dx, dtime, *pair1, *pair2, *pair3
