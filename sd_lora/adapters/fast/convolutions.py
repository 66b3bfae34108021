"""A frozen convolution and its LoRA, forward and backward, on plain or on unrolled inputs.

oneDNN copies a kernel into an order of its own in each call, and that copy takes several times the
product's time where the kernel is wide and the image small: one core of an AMD EPYC (Zen 5), 3×3,
2560→1280 at 8², takes 84 ms in float32 and 50 in bfloat16, and as much again backwards. The same
convolution as a product of W and the input's columns (im2col: Chellapilla et al. 2006) reads W as
it is: 25 and 14 ms, and 28 and 18 backwards. A copy made once would be quicker still (20 and 10),
and twice the kernel's memory, for the backward pass needs the other order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sd_lora.adapters.fast.copies import ConvFactors
from sd_lora.adapters.fast.gemm import TORCH, Gemm, gemm_of, is_wide

Pair = tuple[Tensor | None, Tensor | None]
"""Working copies of a convolution's A and B, or their gradients; None of a frozen one."""

OUTPUTS_A_PIXEL = 5
"""Least output channels for each pixel of the output with which columns pay. They then take a fifth
of the kernel's bytes at most. Time of both passes against the plain ones, 3×3, widths 320 to 2560:
with so many 0.6 to 0.7 (float32) and 0.6 to 1.0 (bfloat16), with more 0.3 to 0.9,
with half as many 0.8 to 1.1 and 1.1 to 1.3."""


class Columns:
    """The places of a convolution as a product with its kernel: rows of pixels (N, channels), N of
    the batch and the output's height and width.

    shape: of the input (B, C, H, W).
    """

    def __init__(self, shape: Sequence[int], W: Tensor, stride: Any, padding: Any) -> None:
        self.kernel, self.stride, self.padding = W.shape[2:], stride, padding
        self.batch, self.size = shape[0], (shape[2], shape[3])
        self.height, self.width = (
            (size + 2 * pad - kernel) // step + 1
            for size, pad, kernel, step in zip(self.size, padding, self.kernel, stride, strict=True)
        )
        self.pointwise = (*self.kernel, *stride, *padding) == (1, 1, 1, 1, 0, 0)

    @property
    def pixels(self) -> int:
        """Pixels of the output, of the whole batch."""
        return self.batch * self.height * self.width

    def of(self, x: Tensor) -> Tensor:
        """The columns of an input, (N, C·k·k)."""
        if self.pointwise:
            return rows(x)
        columns = F.unfold(x, self.kernel, 1, self.padding, self.stride)
        return columns.transpose(1, 2).reshape(-1, columns.shape[1])

    def output(self, y: Tensor) -> Tensor:
        """An output (B, out, H, W) of its rows, in the layout that norms read."""
        return y.view(self.batch, self.height, self.width, -1).permute(0, 3, 1, 2).contiguous()

    def input_gradient(self, dcolumns: Tensor) -> Tensor:
        """The gradient of the input from that of its columns, which are summed in float32."""
        if self.pointwise:
            return self.output(dcolumns)
        parts = dcolumns.float().view(self.batch, -1, dcolumns.shape[1]).transpose(1, 2)
        dx = F.fold(parts, self.size, self.kernel, 1, self.padding, self.stride)
        return dx.to(dcolumns.dtype)


def rows(x: Tensor) -> Tensor:
    """The pixels of an image (B, C, H, W) as rows (B·H·W, C)."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def may_unroll(W: Tensor) -> bool:
    """Whether a kernel is one whose convolution columns can make faster."""
    return W.device.type == "cpu" and W.dtype in (torch.float32, torch.bfloat16) and is_wide(W)


def columns_of(
    shape: Sequence[int], W: Tensor, stride: Any, padding: Any
) -> tuple[Columns, Gemm] | None:
    """The columns of a convolution's input (B, C, H, W) and the products with its kernel; None
    where torch's own convolution is as fast."""
    if not may_unroll(W) or len(shape) != 4:
        return None
    columns, gemm = Columns(shape, W, stride, padding), gemm_of(W)
    pays = columns.pixels * OUTPUTS_A_PIXEL <= W.shape[0]
    # torch's own 1×1 convolution in float32 is a product by MKL
    return (columns, gemm) if pays or (columns.pointwise and gemm is not TORCH) else None


def conv_backward(
    g: Tensor, x: Any, W: Tensor, stride: Any, padding: Any, wants_x: bool, wants_W: bool
) -> tuple[Any, Any]:
    """Gradients of a convolution's input and kernel."""
    dx, dW, _ = torch.ops.aten.convolution_backward(
        g, x, W, None, stride, padding, (1, 1), False, (0, 0), 1, (wants_x, wants_W, False)
    )
    return dx, dW


@dataclass(frozen=True)
class Convolution:
    """A convolution of a block. factors: its working copies, None of a frozen one."""

    base: nn.Conv2d
    factors: ConvFactors | None

    def pair(self) -> Pair:
        return (self.factors.A, self.factors.B) if self.factors else (None, None)

    def product(
        self, x: Tensor, A: Tensor | None, B: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """W x + b + B(A x), and A x: (B, r, H, W), or rows of it."""
        base: Any = self.base
        form = base.stride, base.padding
        found = columns_of(x.shape, base.weight, *form)
        if found is None:
            y = torch.conv2d(x, base.weight, base.bias, *form)
            if A is None or B is None:
                return y, None
            low = torch.conv2d(x, A, None, *form)
            return y.add_(torch.conv2d(low, B)), low
        columns, gemm = found
        of_x = columns.of(x)
        y = gemm.linear(of_x, base.weight.flatten(1), base.bias)
        if A is None or B is None:
            return columns.output(y), None
        low = gemm.linear(of_x, A.flatten(1))
        return columns.output(gemm.onto(y, low, B.flatten(1))), low

    def gradients(
        self, g: Tensor, x: Tensor, low: Tensor | None, A: Tensor | None, B: Tensor | None,
        wants_x: bool,
    ) -> tuple[Any, Pair]:  # fmt: skip
        """Gradients of x, and of A and B. x: of a frozen one its shape alone counts."""
        base: Any = self.base
        dx: Any = None
        form = base.stride, base.padding
        found = columns_of(x.shape, base.weight, *form)
        if found is not None:
            return _by_columns(*found, base.weight, g, x, low, A, B, wants_x)
        if wants_x:
            dx = conv_backward(g, x, base.weight, *form, True, False)[0]
        if A is None or B is None:
            return dx, (None, None)
        dlow, dB = conv_backward(g, low, B, (1, 1), (0, 0), True, True)
        more, dA = conv_backward(dlow, x, A, *form, wants_x, True)
        return dx.add_(more) if wants_x else None, (dA, dB)


def _by_columns(
    columns: Columns, gemm: Gemm, W: Tensor, g: Tensor, x: Tensor, low: Any, A: Any, B: Any,
    wants_x: bool,
) -> tuple[Any, Pair]:  # fmt: skip
    """See `Convolution.gradients`."""
    g, dcolumns, dlow, dx = rows(g), None, None, None
    pair: Pair = (None, None)
    if A is not None:
        dlow = gemm.linear(g, B.flatten(1).t())
        pair = (dlow.t() @ columns.of(x)).view(A.shape), (g.t() @ low).view(B.shape)
    if wants_x:
        dcolumns = gemm.linear(g, W.flatten(1).t())
        if dlow is not None:
            dcolumns = gemm.onto(dcolumns, dlow, A.flatten(1).t())
        dx = columns.input_gradient(dcolumns)
    return dx, pair


class FrozenConv(torch.autograd.Function):
    """A frozen convolution that saves its weight alone: torch keeps the input, which only a
    gradient of the weight would need."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, stride: Any, padding: Any
    ) -> Tensor:
        ctx.save_for_backward(W)
        ctx.input, ctx.stride, ctx.padding = x.shape, stride, padding
        ctx.channels_last = x.dim() == 4 and not x.is_contiguous()
        found = columns_of(x.shape, W, stride, padding)
        if found is None:
            return F.conv2d(x, W, bias, stride, padding)
        columns, gemm = found
        return columns.output(gemm.linear(columns.of(x), W.flatten(1), bias))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor):  # type: ignore[no-untyped-def]
        (W,) = ctx.saved_tensors
        found = columns_of(ctx.input, W, ctx.stride, ctx.padding)
        if found is not None:
            columns, gemm = found
            dx = columns.input_gradient(gemm.linear(rows(g), W.flatten(1).t()))
        else:
            # the kernels read the input's shape and layout, and no number of it
            layout = torch.channels_last if ctx.channels_last else torch.contiguous_format
            like = torch.empty(ctx.input, dtype=g.dtype, device=g.device, memory_format=layout)
            dx = conv_backward(g, like, W, ctx.stride, ctx.padding, True, False)[0]
        return dx, None, None, None, None
