"""Fast forward passes of routed layers: W x for all items at once, B(A x) model by model.

Where a model has no items in a pass, nothing of it is computed.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sd_lora.adapters.fast.convolutions import Convolution, conv_backward
from sd_lora.adapters.fast.copies import ConvFactors, Factors, joined_biases
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
        self.bias = joined_biases(bases, bases[0].weight.device)
        self.routes = layers[0].routes
        of_models = [[*of_one] for of_one in zip(*(layer.layers for layer in layers), strict=True)]
        ranks = [of_one[0].delta.rank if of_one[0] else 0 for of_one in of_models]
        n, (self.out, *_) = len(layers), bases[0].weight.shape
        self.joint = bases[0].weight.dtype.itemsize < 4
        self.batched: Pair | None = None
        if self.joint:
            self.W, pairs = _beside(bases, ranks)
        else:
            self.W = _side_by_side(bases)
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


def _side_by_side(bases: Sequence[Any]) -> Tensor:
    """The weights of linears of one shape as one tensor (n·out, in), of which they become views."""
    if len(bases) == 1:
        return bases[0].weight.detach().flatten(1)
    W = torch.cat([base.weight.detach().flatten(1) for base in bases])
    for base, rows in zip(bases, W.split(len(W) // len(bases)), strict=True):
        base.weight.data = rows.view(base.weight.shape)
    return W


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
            low = A @ x2[part].t()  # (n·r, rows): see `low_rank`
            mine = y[part].split(out, 1)
            for of_layer, h, up in zip(mine, low.split(B.shape[2]), B, strict=True):
                of_layer.addmm_(h.t(), up.t())
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
            dlow = torch.cat([up.t() @ g.t() for g, up in zip(mine, B, strict=True)])
            of_layers = zip(mine, low.split(B.shape[2]), strict=True)
            found += [dlow @ x2[part], torch.stack([(h @ g).t() for g, h in of_layers])]
            if dx is not None:
                dx[part].addmm_(dlow.t(), A)
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


@dataclass(frozen=True)
class RoutedConvolution(Convolution):
    """A routed convolution, of a residual block or by itself. of_models: working copies of each
    model's factors, or None."""

    routes: Routes
    of_models: Sequence[ConvFactors | None]

    @classmethod
    def of(cls, layer: RoutedLayer) -> "RoutedConvolution":
        """That of a layer."""
        base: Any = layer.base
        owns: list[Any] = [*layer.layers]
        found = [ConvFactors(own) if own is not None else None for own in owns]
        return cls(base, None, layer.routes, found)

    def _found(self, number: int) -> list[tuple[slice, int]]:
        """The rows of each model that has items, among `number`, and its rank."""
        found = _routes(self.routes, self.of_models, number)
        return [(rows, len(factors.A)) for rows, factors in found]

    def pair(self) -> tuple[Tensor | None, Tensor | None]:
        """A (Σr, in, k, k) and B (out, Σr, 1, 1) of all models that have items."""
        found = _routes(self.routes, self.of_models, sum(self.routes.counts))
        if not found:
            return None, None
        return torch.cat([f.A for _, f in found]), torch.cat([f.B for _, f in found], 1)

    def product(
        self, x: Tensor, A: Tensor | None, B: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """W x + b + B(A x), and each item's A x in the first of as many ranks as any model has."""
        base: Any = self.base
        y = torch.conv2d(x, base.weight, base.bias, base.stride, base.padding)
        if A is None or B is None:
            return y, None
        low = y.new_zeros(len(y), max(r for _, r in self._found(len(x))), *y.shape[2:])
        for rows, r, Aj, Bj in self._each(len(x), A, B):
            own = torch.conv2d(x[rows], Aj, None, base.stride, base.padding)
            y[rows].add_(torch.conv2d(own, Bj))
            low[rows, :r] = own
        return y, low

    def gradients(
        self, g: Tensor, x: Tensor, low: Tensor | None, A: Tensor | None, B: Tensor | None,
        wants_x: bool,
    ) -> tuple[Any, Any]:  # fmt: skip
        """Gradients of x, and of A and B."""
        base: Any = self.base
        form = base.stride, base.padding
        dx = conv_backward(g, x, base.weight, *form, True, False)[0] if wants_x else None
        if A is None or B is None or low is None:
            return dx, (None, None)
        of_A, of_B = [], []
        for rows, r, Aj, Bj in self._each(len(x), A, B):
            own = low[rows, :r].contiguous()
            dlow, dB = conv_backward(g[rows], own, Bj, (1, 1), (0, 0), True, True)
            more, dA = conv_backward(dlow, x[rows], Aj, *form, wants_x, True)
            of_A.append(dA)
            of_B.append(dB)
            if dx is not None:
                dx[rows].add_(more)
        return dx, (torch.cat(of_A), torch.cat(of_B, 1))

    def _each(
        self, number: int, A: Tensor, B: Tensor
    ) -> Iterator[tuple[slice, int, Tensor, Tensor]]:
        """Yield rows, rank, A and B of each model that has items."""
        found = self._found(number)
        ranks = [r for _, r in found]
        for (rows, r), Aj, Bj in zip(found, A.split(ranks), B.split(ranks, 1), strict=True):
            yield rows, r, Aj, Bj

    def forward(self, input: Tensor) -> Tensor:
        """W x + b + B(A x), by one function."""
        return _RoutedConv.apply(self, input, *self.pair())


class _RoutedConv(torch.autograd.Function):
    """A `RoutedConvolution` by itself."""

    @staticmethod
    def forward(
        ctx: Any, conv: RoutedConvolution, x: Tensor, A: Tensor | None, B: Tensor | None
    ) -> Tensor:
        y, low = conv.product(x, A, B)
        ctx.conv = conv
        ctx.save_for_backward(x, low, A, B)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor):  # type: ignore[no-untyped-def]
        x, *saved = ctx.saved_tensors
        dx, pair = ctx.conv.gradients(g, x, *saved, ctx.needs_input_grad[1])
        return None, dx, *pair
