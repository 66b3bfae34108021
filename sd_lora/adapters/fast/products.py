"""Operators of the fast path, with the tensors that each saves and its gradients.

Frozen tensors get no gradient. The scale s = α/r is in B already (`copies`).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sd_lora.adapters.fast.gemm import TORCH, gemm_of


class StackedSum(torch.autograd.Function):
    """n adapted linears of one input, each sum accumulated inside its GEMM: y_i = W_i x + b_i +
    B_i(A_i x).

    In: x (…, in); W (n·out, in); bias (n·out) or None; A (n·r, in); B (n, out, r). Out: n tensors
    (…, out), views of one.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor
    ) -> tuple[Tensor, ...]:
        x2, gemm = x.reshape(-1, x.shape[-1]), gemm_of(W)
        h = gemm.linear(A, x2)  # (n·r, N): see `low_rank`
        y = gemm.linear(x2, W, bias)  # (N, n·out)
        outs, r = y.split(B.shape[1], 1), B.shape[2]
        for out, low, up in zip(outs, h.split(r), B, strict=True):
            out.addmm_(low.t(), up.t())
        ctx.save_for_backward(x2, W, A, B, h)
        ctx.shape = x.shape
        return tuple(out.view(*x.shape[:-1], -1) for out in outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gs: Tensor):  # type: ignore[no-untyped-def]
        x2, W, A, B, h = ctx.saved_tensors
        (_, out, r), gemm = B.shape, gemm_of(W)
        # layer by layer: on a CPU a batched product of these takes three times as long
        by_layer = [g.reshape(-1, out) for g in gs]
        dh = _joined([gemm.linear(up.t(), g) for g, up in zip(by_layer, B, strict=True)])
        dB = _joined([gemm.linear(low, g.t()) for g, low in zip(by_layer, h.split(r), strict=True)])
        dB = dB.view(-1, r, out).transpose(1, 2).contiguous()
        dx = None
        if ctx.needs_input_grad[0]:
            dx = gemm.linear(dh.t(), A.t())
            for g, weight in zip(by_layer, W.split(out), strict=True):
                dx = gemm.onto(dx, g, weight.t())
            dx = dx.view(ctx.shape)
        return dx, None, None, gemm.linear(dh, x2.t()), dB


def _joined(parts: list[Tensor]) -> Tensor:
    """Rows below each other."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class StackedJoint(torch.autograd.Function):
    """The same from one GEMM, y = [x, h]·[W, B]ᵀ with h = A x.

    Its accumulator is float32, so an update below the last bit of W x in bfloat16 is kept, which a
    sum of two rounded outputs loses.

    In: x (…, in); WB (n·out, in + n·r), W beside the block diagonal of B; bias (n·out) or None;
    A (n·r, in); B (n, out, r), the view of the blocks in WB. Out: n tensors (…, out).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, WB: Tensor, bias: Tensor | None, A: Tensor, B: Tensor
    ) -> tuple[Tensor, ...]:
        x2 = x.reshape(-1, x.shape[-1])
        h = x2 @ A.t()  # (N, n·r)
        y = F.linear(torch.cat([x2, h], 1), WB, bias)
        # x itself, which attention has saved too, and not the wider copy
        ctx.save_for_backward(x2, h, WB, A)
        ctx.shape, ctx.blocks = x.shape, B.shape
        return tuple(out.view(*x.shape[:-1], -1) for out in y.split(B.shape[1], 1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gs: Tensor):  # type: ignore[no-untyped-def]
        x2, h, WB, A = ctx.saved_tensors
        (n, out, r), width, dx = ctx.blocks, A.shape[1], None
        g = gs[0] if n == 1 else torch.cat(gs, -1)
        g = g.reshape(-1, n * out)
        if ctx.needs_input_grad[0]:
            G = g @ WB  # (N, in + n·r): the gradients of x by W, and of h
            dh = G[:, width:]
            dx = torch.addmm(G[:, :width], dh, A).view(ctx.shape)
        else:
            dh = g @ WB[:, width:]
        if n == 1:
            dB = (g.t() @ h).view(n, out, r)
        else:
            by_layer = g.view(-1, n, out).permute(1, 2, 0)  # (n, out, N)
            dB = torch.bmm(by_layer, h.view(-1, n, r).transpose(0, 1))
        return dx, None, None, dh.t() @ x2, dB


class _FrozenLinear(torch.autograd.Function):
    """See `frozen_linear`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(W)
        y = gemm_of(W).linear(x.reshape(-1, x.shape[-1]), W, bias)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor):  # type: ignore[no-untyped-def]
        (W,) = ctx.saved_tensors
        dx = gemm_of(W).linear(g.reshape(-1, g.shape[-1]), W.t())
        return dx.view(*g.shape[:-1], -1), None, None


def frozen_linear(x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
    """W x + b of x (…, in), W (out, in) and a bias (out) or None that get no gradient."""
    if gemm_of(W) is TORCH:
        return F.linear(x, W, bias)
    return _FrozenLinear.apply(x, W, bias)


class Geglu(torch.autograd.Function):
    """a·gelu(b) of h = (a, b) (…, 2·width), Shazeer 2020; gelu(b) is computed again in the
    backward pass."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.save_for_backward(h)
        a, b = h.chunk(2, -1)
        return F.gelu(b).mul_(a)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor):  # type: ignore[no-untyped-def]
        (h,) = ctx.saved_tensors
        a, b = h.chunk(2, -1)
        da, db = F.gelu(b).mul_(g), torch.ops.aten.gelu_backward(g * a, b)
        return torch.cat([da, db], -1)
