"""Fast forward passes of routed layers: W x for all items at once, B(A x) model by model.

Where a model has no items in a pass, nothing of it is computed. In a dtype below float32 the sum of
W x and B(A x) is rounded once more than in a `Stack`, whose tensor of W beside B is for one model.
"""

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
        self.W, self.bias = side_by_side(bases), joined_biases(bases)
        self.out, self.routes = len(self.W) // len(bases), layers[0].routes
        of_models = [[*of_one] for of_one in zip(*(layer.layers for layer in layers), strict=True)]
        ranks = [of_one[0] and of_one[0].delta.rank for of_one in of_models]
        n, width = len(layers), self.W.shape[1]
        self.batched: Pair | None = None
        if len({*ranks}) == 1:
            A = self.W.new_empty(len(ranks), n * ranks[0], width)
            self.batched = A, self.W.new_empty(len(ranks), n, self.out, ranks[0])
        self.factors: list[Factors | None] = []
        for place, (of_one, r) in enumerate(zip(of_models, ranks, strict=True)):
            if r is None:
                self.factors.append(None)
                continue
            if self.batched:
                pair = self.batched[0][place], self.batched[1][place]
            else:
                pair = self.W.new_empty(n * r, width), self.W.new_empty(n, self.out, r)
            factors = Factors(of_one, pair, [*pair[0].split(r), *pair[1]])
            views = zip(factors.into, factors.masters, strict=True)
            factors.into = [view.view(master.shape) for view, master in views]
            self.factors.append(factors)

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """Each layer's output, (…, out)."""
        found = _routes(self.routes, self.factors, x[..., 0].numel())
        pairs = [tensor for _, f in found for tensor in (f.A, f.B)]
        rows = [rows for rows, _ in found]
        if self.batched and len({*self.routes.counts}) == 1:  # the same number of items each
            return _BatchedSum.apply(x, self.W, self.bias, *self.batched, *pairs)
        return _RoutedSum.apply(x, self.W, self.bias, self.out, rows, *pairs)

    def forward_of_one(self) -> Any:
        """The forward pass of a stack of one layer."""
        return lambda input: self(input)[0]


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
