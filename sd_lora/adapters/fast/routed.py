"""Fast forward passes of routed layers: W x for all items at once, B(A x) model by model.

Where a model has no items in a pass, nothing of it is computed.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sd_lora.adapters.fast.copies import ConvFactors, Factors, joined_biases, side_by_side
from sd_lora.adapters.fast.residual import (
    Tensors,
    convolved,
    gradient_by_base,
    gradients_of_pair,
    low_of,
)
from sd_lora.adapters.routed import RoutedLayer, Routes

Pair = tuple[Tensor, Tensor]
"""A and B."""

Route = tuple[slice, Factors]
"""Rows of a model's items, and its working copies."""


def _routes(routes: Routes, factors: Sequence[Factors | None], number: int) -> list[Route]:
    """The rows with factors among `number` rows of a tensor."""
    rows = routes.rows(number)
    return [(r, f) for r, f in zip(rows, factors, strict=True) if f and r.start < r.stop]


class RoutedStack:
    """Routed linears with one input, of one shape and in each model of one rank, computed as one.

    factors: working copies of each model's; None of a model that has none of these layers. batched:
    A (models, n·r, in) and B (models, n, out, r) of all, where every model has them, of one rank.
    """

    def __init__(self, layers: Sequence[RoutedLayer]) -> None:
        bases: list[Any] = [layer.base for layer in layers]
        self.bias, self.routes = joined_biases(bases), layers[0].routes
        of_models = [[*of_one] for of_one in zip(*(layer.layers for layer in layers), strict=True)]
        ranks = [of_one[0].delta.rank if of_one[0] else 0 for of_one in of_models]
        n, (self.out, *_) = len(layers), bases[0].weight.shape
        self.joint = bases[0].weight.dtype.itemsize < 4
        self.batched: Pair | None = None
        if self.joint:
            self.W, pairs = _beside(bases, ranks)
        else:
            self.W = side_by_side(bases)
            pairs = [self._pair(n, r) for r in ranks]
            if len({*ranks}) == 1:
                A, B = self._pair(n, ranks[0], len(ranks))
                self.batched, pairs = (A, B), [*zip(A, B, strict=True)]
        self.factors: list[Factors | None] = []
        for of_one, pair, r in zip(of_models, pairs, ranks, strict=True):
            if r == 0:
                self.factors.append(None)
                continue
            factors = Factors(of_one, pair, [*pair[0].split(r), *pair[1]])
            views = zip(factors.into, factors.masters, strict=True)
            factors.into = [view.view(master.shape) for view, master in views]
            self.factors.append(factors)

    def _pair(self, n: int, r: int, *models: int) -> Pair:
        """Memory for A (…, n·r, in) and B (…, n, out, r)."""
        width = self.W.shape[1]
        return self.W.new_empty(*models, n * r, width), self.W.new_empty(*models, n, self.out, r)

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """Each layer's output, (…, out)."""
        found = _routes(self.routes, self.factors, x[..., 0].numel())
        pairs = [tensor for _, f in found for tensor in (f.A, f.B)]
        rows = [rows for rows, _ in found]
        if self.joint:
            # its zeros beside NaN of one model would be NaN for the others; this one's A x is NaN,
            # too, after an update that is not finite
            self.W.data[:, x.shape[-1] :].nan_to_num_()
            return _RoutedJoint.apply(x, self.W, self.bias, self.out, rows, *pairs)
        if self.batched and len({*self.routes.counts}) == 1:  # the same number of items each
            return _BatchedSum.apply(x, self.W, self.bias, *self.batched, *pairs)
        return _RoutedSum.apply(x, self.W, self.bias, self.out, rows, *pairs)

    @staticmethod
    def most(layer: RoutedLayer) -> int:
        """Most layers of a stack whose block diagonals have a quarter of W's numbers."""
        weight: Any = layer.base.weight
        if weight.dtype.itemsize >= 4:
            return sys.maxsize
        ranks: list[Any] = [own.delta.rank for own in layer.layers if own is not None]
        return max(1, weight.shape[1] // 4 // sum(ranks))

    def forward_of_one(self) -> Any:
        """The forward pass of a stack of one layer."""
        return lambda input: self(input)[0]


def _beside(bases: Sequence[Any], ranks: Sequence[int]) -> tuple[Tensor, list[Pair]]:
    """W (n·out, in + n·Σr) with memory for each model's B beside the weights, which become views of
    it, and A and B of each model, as in a `Stack`."""
    n, (out, *_) = len(bases), bases[0].weight.shape
    width = bases[0].weight[0].numel()
    row = width + n * sum(ranks)
    pitch = -(-row // 8) * 8  # GEMMs read rows of 16 bytes
    W = bases[0].weight.detach().new_zeros(n * out, pitch)[:, :row]
    pairs, place = [], width
    for r in ranks:
        block = W.as_strided((n, out, r), (out * pitch + r, pitch, 1), place)
        pairs.append((W.new_empty(n * r, width), block))
        place += n * r
    for base, rows in zip(bases, W[:, :width].split(out), strict=True):
        rows.copy_(base.weight.detach().flatten(1))
        base.weight.data = rows.view(base.weight.shape)
    return W, pairs


class _RoutedSum(torch.autograd.Function):
    """n routed linears of one input: y_i = W_i x + b_i + B_i(A_i x), with the factors of each
    row's model.

    In: x (…, in); W (n·out, in); bias (n·out) or None; out; rows: of each pair that follows, among
    those of x as a matrix; A (n·r, in) and B (n, out, r). Out: n tensors (…, out), views of one.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, out: int, rows: list[slice],
        *pairs: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        x2 = x.reshape(-1, x.shape[-1])
        y = F.linear(x2, W, bias)
        lows = []
        for part, A, B in zip(rows, pairs[::2], pairs[1::2], strict=True):
            low = x2[part] @ A.t()
            mine = y[part].split(out, 1)
            for of_layer, h, up in zip(mine, low.split(B.shape[2], 1), B, strict=True):
                of_layer.addmm_(h, up.t())
            lows.append(low)
        ctx.save_for_backward(x2, W, *lows, *pairs)
        ctx.shape, ctx.out, ctx.rows = x.shape, out, rows
        return tuple(of_layer.view(*x.shape[:-1], -1) for of_layer in y.split(out, 1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gs: Tensor):  # type: ignore[no-untyped-def]
        x2, W, *saved = ctx.saved_tensors
        lows, pairs = saved[: len(ctx.rows)], saved[len(ctx.rows) :]
        by_layer = [g.reshape(-1, ctx.out) for g in gs]
        dx = _by_frozen(by_layer, W) if ctx.needs_input_grad[0] else None
        found: list[Tensor] = []
        for part, low, A, B in zip(ctx.rows, lows, pairs[::2], pairs[1::2], strict=True):
            mine = [g[part] for g in by_layer]
            dlow = torch.cat([g @ up for g, up in zip(mine, B, strict=True)], 1)
            of_layers = zip(mine, low.split(B.shape[2], 1), strict=True)
            found += [dlow.t() @ x2[part], torch.stack([g.t() @ h for g, h in of_layers])]
            if dx is not None:
                dx[part].addmm_(dlow, A)
        return None if dx is None else dx.view(ctx.shape), None, None, None, None, *found


class _RoutedJoint(torch.autograd.Function):
    """The same from one GEMM, y = [x, h]·[W, B₁, B₂, …]ᵀ, where h has A_j x in the columns of a
    row's own model j and zeros in the others': the accumulator is float32, as in `StackedJoint`.

    In: x (…, in); W (n·out, in + n·Σr) of `_beside`; bias; out; rows; pairs, of which the B are
    views of W. Out: n tensors (…, out).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, out: int, rows: list[slice],
        *pairs: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        width = x.shape[-1]
        x2 = x.reshape(-1, width)
        both = x2.new_zeros(len(x2), W.shape[1])
        both[:, :width] = x2
        columns = []
        for part, A, B in zip(rows, pairs[::2], pairs[1::2], strict=True):
            start = B.storage_offset() - W.storage_offset()
            columns.append(slice(start, start + len(A)))
            both[part, columns[-1]] = x2[part] @ A.t()
        y = F.linear(both, W, bias)
        ctx.save_for_backward(x2, both[:, width:].contiguous(), W, *pairs)
        ctx.shape, ctx.out, ctx.rows, ctx.columns = x.shape, out, rows, columns
        return tuple(of_layer.view(*x.shape[:-1], -1) for of_layer in y.split(out, 1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gs: Tensor):  # type: ignore[no-untyped-def]
        x2, h, W, *pairs = ctx.saved_tensors
        width = x2.shape[1]
        by_layer = [g.reshape(-1, ctx.out) for g in gs]
        # gradients of x by W, and of h; those of other models' columns are nobody's
        G = torch.cat(by_layer, 1) @ W
        dx = G[:, :width].contiguous() if ctx.needs_input_grad[0] else None
        found: list[Tensor] = []
        for part, own, A, B in zip(ctx.rows, ctx.columns, pairs[::2], pairs[1::2], strict=True):
            dlow = G[part, own]
            low = h[part, own.start - width : own.stop - width].split(B.shape[2], 1)
            of_layers = zip(by_layer, low, strict=True)
            found += [dlow.t() @ x2[part], torch.stack([g[part].t() @ hi for g, hi in of_layers])]
            if dx is not None:
                dx[part].addmm_(dlow, A)
        return None if dx is None else dx.view(ctx.shape), None, None, None, None, *found


class _BatchedSum(torch.autograd.Function):
    """The same where m models of one rank have the same number of items each: their products are
    one batched product. On one core it takes half of the time of four small ones.

    In: x (…, in), a model's rows after another's; W (n·out, in); bias; A (m, n·r, in) and
    B (m, n, out, r), of which the pairs that follow are views, for their gradients.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, *pairs: Tensor
    ) -> tuple[Tensor, ...]:
        models, n, out, r = B.shape
        x3 = x.reshape(models, -1, x.shape[-1])
        low = torch.bmm(x3, A.mT)  # (m, rows, n·r)
        y = F.linear(x3, W, bias)
        outs = y.split(out, 2)
        for of_layer, h, up in zip(outs, low.split(r, 2), B.unbind(1), strict=True):
            of_layer.baddbmm_(h, up.mT)
        ctx.save_for_backward(x3, W, low, A, B)
        ctx.shape = x.shape
        return tuple(of_layer.reshape(*x.shape[:-1], out) for of_layer in outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gs: Tensor):  # type: ignore[no-untyped-def]
        x3, W, low, A, B = ctx.saved_tensors
        models, _, out, r = B.shape
        by_layer = [g.reshape(models, -1, out) for g in gs]
        ups = B.unbind(1)
        dlow = torch.cat([torch.bmm(g, up) for g, up in zip(by_layer, ups, strict=True)], 2)
        dA = torch.bmm(dlow.mT, x3)
        lows = low.split(r, 2)
        dB = torch.stack([torch.bmm(g.mT, h) for g, h in zip(by_layer, lows, strict=True)], 1)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = _by_frozen([g.flatten(0, 1) for g in by_layer], W).view_as(x3)
            dx = dx.baddbmm_(dlow, A).view(ctx.shape)
        pairs = [tensor for pair in zip(dA, dB, strict=True) for tensor in pair]
        return dx, None, None, None, None, *pairs


def _by_frozen(by_layer: Sequence[Tensor], W: Tensor) -> Tensor:
    """The gradient of x by n products W_i x. by_layer: gradients of their outputs, (N, out)."""
    first, *others = zip(by_layer, W.split(by_layer[0].shape[1]), strict=True)
    dx = first[0] @ first[1]
    for g, weight in others:
        dx.addmm_(g, weight)
    return dx


class RoutedConvolution:
    """A routed convolution, of a residual block or by itself. factors: of each model, or None."""

    def __init__(self, layer: RoutedLayer) -> None:
        base: Any = layer.base
        self.base: nn.Conv2d = base
        self.routes = layer.routes
        of_models: list[Any] = [*layer.layers]
        self.factors = [ConvFactors(own) if own is not None else None for own in of_models]

    def _found(self, x: Tensor) -> list[Route]:
        return _routes(self.routes, self.factors, len(x))

    def tensors(self) -> Tensors:
        """A and B of each model that has items."""
        found = _routes(self.routes, self.factors, sum(self.routes.counts))
        return [tensor for _, f in found for tensor in (f.A, f.B)]

    def product(self, x: Tensor, tensors: Tensors) -> tuple[Tensor, Tensors]:
        """W x + b + B(A x), and A x of each model."""
        y, lows = convolved(self.base, x), []
        rows = [rows for rows, _ in self._found(x)]
        for part, A, B in zip(rows, tensors[::2], tensors[1::2], strict=True):
            low = low_of(self.base, x[part], A)
            y[part].add_(torch.conv2d(low, B))
            lows.append(low)
        return y, lows

    def gradients(
        self, g: Tensor, x: Tensor, lows: Tensors, tensors: Tensors, wants_x: bool
    ) -> tuple[Any, Tensors]:
        """See `residual.Part`."""
        dx = gradient_by_base(self.base, g, x) if wants_x else None
        rows, found = [rows for rows, _ in self._found(x)], list[Tensor]()
        for part, low, A, B in zip(rows, lows, tensors[::2], tensors[1::2], strict=True):
            more, pair = gradients_of_pair(self.base, g[part], x[part], low, A, B, wants_x)
            found += pair
            if dx is not None:
                dx[part].add_(more)
        return dx, found

    def forward(self, input: Tensor) -> Tensor:
        """W x + b + B(A x), by one function."""
        return _RoutedConv.apply(self, input, *self.tensors())


class _RoutedConv(torch.autograd.Function):
    """A `RoutedConvolution` by itself."""

    @staticmethod
    def forward(ctx: Any, conv: RoutedConvolution, x: Tensor, *tensors: Tensor) -> Tensor:
        y, lows = conv.product(x, tensors)
        ctx.conv, ctx.number = conv, len(lows)
        ctx.save_for_backward(x, *lows, *tensors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor):  # type: ignore[no-untyped-def]
        x, *saved = ctx.saved_tensors
        lows, tensors = saved[: ctx.number], saved[ctx.number :]
        dx, found = ctx.conv.gradients(g, x, lows, tensors, ctx.needs_input_grad[1])
        return None, dx, *found
