"""A frozen convolution and its LoRA, forward and backward, on plain or on unrolled inputs.

oneDNN copies a kernel into an order of its own in each call, and that copy takes several times the
product's time where the kernel is wide and the image small: one core of an AMD EPYC (Zen 5), 3×3,
2560→1280 at 8², takes 186 ms forward and backward in float32, and 108 in bfloat16. The same
convolution as a product of W and the input's columns (im2col: Chellapilla et al. 2006) reads W as
it is: 45 and 25 ms. A copy made once would be as quick, and twice the kernel's memory, for the
backward pass needs the other order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sd_lora.adapters.fast.copies import ConvFactors
from sd_lora.adapters.fast.gemm import Gemm, gemm_of

Pair = tuple[Tensor | None, Tensor | None]
"""Working copies of a convolution's A and B, or their gradients; None of a frozen one."""

WIDE = 320
"""Least width, on both sides, of a kernel that is multiplied with columns: SD 1.5 begins there."""

OUTPUTS_A_PIXEL = 5
"""Least output channels for each pixel of the output with which columns pay. They then take a fifth
of the kernel's bytes at most. Time of both passes against the plain ones, 3×3, widths 320 to 2560:
with so many 0.5 to 0.6 (float32) and 0.7 to 0.9 (bfloat16), with more 0.1 to 0.6, with half as many
0.85 and 0.97."""


def layout_of(device: torch.device) -> torch.memory_format:
    """The order of an image's numbers on a device: pixel by pixel (channels_last) on a CPU, whose
    library convolves so and else copies to and fro; a pointwise convolution and a transformer's
    tokens then are the image as it stands."""
    return torch.channels_last if device.type == "cpu" else torch.contiguous_format


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
        """The columns of an input, (N, k·k·C)."""
        if self.pointwise:
            return rows(x)
        (high, wide), (down, right) = self.kernel, self.padding
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, right, right, down, down))
        windows = padded.unfold(1, high, self.stride[0]).unfold(2, wide, self.stride[1])
        return windows.permute(0, 1, 2, 4, 5, 3).reshape(self.pixels, -1)

    def output(self, y: Tensor) -> Tensor:
        """An output (B, out, H, W) of its rows."""
        return y.view(self.batch, self.height, self.width, -1).permute(0, 3, 1, 2)

    def input_gradient(self, dcolumns: Tensor) -> Tensor:
        """The gradient of the input from that of its columns, which are summed in float32."""
        if self.pointwise:
            return self.output(dcolumns)
        (high, wide), (down, right), (step, across) = self.kernel, self.padding, self.stride
        parts = dcolumns.view(self.batch, self.height, self.width, high, wide, -1)
        size = self.size[0] + 2 * down, self.size[1] + 2 * right
        dx = parts.new_zeros(self.batch, *size, parts.shape[-1], dtype=torch.float32)
        for i in range(high):
            down_from = slice(i, i + step * self.height, step)
            for j in range(wide):
                across_from = slice(j, j + across * self.width, across)
                dx[:, down_from, across_from] += parts[:, :, :, i, j]
        inner = dx[:, down : size[0] - down, right : size[1] - right]
        return inner.to(dcolumns.dtype).contiguous().permute(0, 3, 1, 2)


def rows(x: Tensor) -> Tensor:
    """The pixels of an image (B, C, H, W) as rows (B·H·W, C)."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def matrix(W: Tensor) -> Tensor:
    """A kernel (out, C, k, k) as a matrix (out, k·k·C) of columns."""
    return W.permute(0, 2, 3, 1).reshape(W.shape[0], -1)


def is_pointwise(W: Tensor) -> bool:
    """Whether a kernel is one pixel."""
    return W.shape[2:] == (1, 1)


def may_unroll(W: Tensor) -> bool:
    """Whether a kernel is one whose convolution columns can make faster."""
    fits = W.device.type == "cpu" and W.dtype in (torch.float32, torch.bfloat16)
    return fits and (is_pointwise(W) or min(W.shape[:2]) >= WIDE)


def columns_of(
    shape: Sequence[int], W: Tensor, stride: Any, padding: Any
) -> tuple[Columns, Gemm] | None:
    """The columns of a convolution's input (B, C, H, W) and the products with its kernel; None
    where torch's own convolution is as fast."""
    if not may_unroll(W) or len(shape) != 4:
        return None
    columns = Columns(shape, W, stride, padding)
    pays = columns.pointwise or (
        min(W.shape[:2]) >= WIDE and columns.pixels * OUTPUTS_A_PIXEL <= W.shape[0]
    )
    return (columns, gemm_of(W)) if pays else None


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
        """W x + b + B(A x), and A x: (B, r, H, W), or (r, pixels)."""
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
        y = gemm.linear(of_x, matrix(base.weight), base.bias)
        if A is None or B is None:
            return columns.output(y), None
        low = gemm.linear(matrix(A), of_x)
        return columns.output(gemm.onto(y, low.t(), B.flatten(1))), low

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
        dlow = gemm.linear(B.flatten(1).t(), g)
        dA = gemm.linear(dlow, columns.of(x).t()).view(A.shape[0], *A.shape[2:], -1)
        dB = gemm.linear(low, g.t()).t()
        pair = dA.permute(0, 3, 1, 2), dB[..., None, None]
    if wants_x:
        dcolumns = gemm.linear(g, matrix(W).t())
        if dlow is not None:
            dcolumns = gemm.onto(dcolumns, dlow.t(), matrix(A).t())
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
        return columns.output(gemm.linear(columns.of(x), matrix(W), bias))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor):  # type: ignore[no-untyped-def]
        (W,) = ctx.saved_tensors
        found = columns_of(ctx.input, W, ctx.stride, ctx.padding)
        if found is not None:
            columns, gemm = found
            dx = columns.input_gradient(gemm.linear(rows(g), matrix(W).t()))
        else:
            # the kernels read the input's shape and layout, and no number of it
            layout = torch.channels_last if ctx.channels_last else torch.contiguous_format
            like = torch.empty(ctx.input, dtype=g.dtype, device=g.device, memory_format=layout)
            dx = conv_backward(g, like, W, ctx.stride, ctx.padding, True, False)[0]
        return dx, None, None, None, None
