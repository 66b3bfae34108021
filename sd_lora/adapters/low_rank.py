"""Low-rank products, forward and backward: y = W x + b + s·B(A x), s = α/r.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1. The scale goes
into the product of width r, never onto the output, and each direction adds to the frozen product
inside one GEMM: against `base(x) + s * up(down(x))` this saves two passes over the
activations (benchmarks/README.md has the measured ratios).

h = A x and its gradient stand as r rows of N numbers, not as N rows of r: MKL computes columns of
its result at once, and of 8 there is nothing to gain. At rank 8 the six products of a layer take
0.4 to 0.8 of their time so, and at 32 the same.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


class _LowRankLinear(torch.autograd.Function):
    """Forward and backward of `low_rank_linear`."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, s: float
    ) -> Tensor:
        x2 = x.reshape(-1, x.shape[-1])  # (N, in)
        h = torch.addmm(x2.new_empty(1), A, x2.t(), beta=0, alpha=s)  # (r, N), scaled
        y = F.linear(x, W, bias)
        y.view(-1, y.shape[-1]).addmm_(h.t(), B.t())
        # only A's gradient needs the input: LoRA-FA, with a frozen A, keeps none
        keep = x2 if ctx.needs_input_grad[3] else None  # type: ignore[attr-defined]
        ctx.save_for_backward(keep, W, A, B, h)  # type: ignore[arg-type]
        ctx.s, ctx.x_shape = s, x.shape  # type: ignore[attr-defined]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):  # type: ignore[no-untyped-def]
        x2, W, A, B, h = ctx.saved_tensors
        g2 = g.reshape(-1, g.shape[-1])  # (N, out)
        dh = torch.addmm(g2.new_empty(1), B.t(), g2.t(), beta=0, alpha=ctx.s)  # (r, N)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (g2 @ W).addmm_(dh.t(), A).view(ctx.x_shape)
        dA = dh @ x2 if ctx.needs_input_grad[3] else None
        dB = (h @ g2).t() if ctx.needs_input_grad[4] else None
        return dx, None, None, dA, dB, None


def low_rank_linear(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, s: float
) -> Tensor:
    """W x + b + s·B(A x), (…, out), for a frozen W and b: they get no gradient.

    Args:
        x: input (…, in).
        W, bias: frozen weight (out, in) and bias (out,).
        A, B: factors (r, in) and (out, r). All tensors are of one dtype.
        s: scale.
    """
    return _LowRankLinear.apply(x, W, bias, A, B, s)


_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def pointwise_conv(h: Tensor, B: Tensor, groups: int) -> Tensor:
    """1×1 convolution of h (N, r·groups, …) with B (out, r, 1…), group by group."""
    return _CONV[B.dim() - 2](h, B, groups=groups)
