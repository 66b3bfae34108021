"""Working copies of a model's factors, and the layers that share an input as one stack.

The trained tensors stay as they are: float32, one for each factor, under their names. Beside them
stand copies in the base's dtype, written by one operator after each optimiser step; their
gradients go back to the trained tensors by one more.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sd_lora.adapters.fast.products import StackedJoint, StackedSum, frozen_linear
from sd_lora.adapters.linear_conv import AdaptedConv, AdaptedLinear


class Factors:
    """Working copies of some layers' factors.

    masters: the trained A's, then the B's. scales: s of each layer. into: views of the copies, one
    for each master. buffers: the copies of A and B as the layers read them. A, B: the same, linked
    to the masters' gradients by the current forward pass.
    """

    def __init__(
        self,
        layers: Sequence[AdaptedLinear | AdaptedConv],
        buffers: tuple[Tensor, Tensor],
        into: Sequence[Tensor],
    ) -> None:
        deltas: list[Any] = [layer.delta for layer in layers]
        self.masters = [d.lora_A for d in deltas] + [d.lora_B for d in deltas]
        self.scales = [float(delta.scale) for delta in deltas]
        self.buffers, self.into = buffers, list(into)
        self.A, self.B = buffers


class ConvFactors(Factors):
    """Those of one convolution."""

    def __init__(self, layer: AdaptedConv) -> None:
        weight, delta = layer.base.weight, cast(Any, layer.delta)
        A, B = (torch.empty_like(t, dtype=weight.dtype) for t in (delta.lora_A, delta.lora_B))
        super().__init__([layer], (A, B), (A, B))


class Stack(Factors):
    """Linears with one input, of one shape and rank, computed as one; a 1×1 convolution is one, of
    tokens.

    Several weights become views of one tensor, with their numbers and names: whoever writes a
    model's base weights into a file copies them first. In a dtype below float32 that tensor has B
    beside W, for `StackedJoint`, as a block diagonal: its zeros grow with the square of n.

    apart: W is on the device only while its block computes, so B stands in a tensor of its own, and
    `fill` writes it beside each W that arrives.
    """

    def __init__(self, layers: Sequence[AdaptedLinear | AdaptedConv], apart: bool = False) -> None:
        bases = [layer.base for layer in layers]
        weight: Tensor = bases[0].weight.detach().flatten(1)
        n, (out, width), r = len(layers), weight.shape, layers[0].delta.rank
        assert r is not None
        device = next(layers[0].delta.parameters()).device
        at = weight.device if apart else device  # of W
        A = weight.new_empty(n * r, width, device=device)
        self.layers, self.apart = list(layers), apart
        self.joint = weight.dtype.itemsize < 4
        if self.joint:
            row = width + n * r
            pitch = -(-row // 8) * 8  # GEMMs read rows of 16 bytes
            self.W = weight.new_zeros(n * out, pitch, device=at)[:, :row]
            self._diagonal = (n, out, r), (out * pitch + r, pitch, 1), width
            B = self.W.as_strided(*self._diagonal)
        else:
            here = n == 1 and weight.device == at
            self.W = weight if here else weight.new_empty(n * out, width, device=at)
            B = weight.new_empty(n, out, r, device=device)
        if self.W is not weight:
            for base, rows in zip(bases, self.W[:, :width].split(out), strict=True):
                rows.copy_(base.weight.flatten(1))
                base.weight.data = rows.view(base.weight.shape)
        self.bias = joined_biases(bases, at)
        if apart and self.joint:
            B = weight.new_empty(n, out, r, device=device)
        super().__init__(layers, (A, B), [*A.split(r), *B])
        self.into = [v.view(m.shape) for v, m in zip(self.into, self.masters, strict=True)]

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """Each layer's output, (…, out)."""
        return self.product.apply(x, self.W, self.bias, self.A, self.B)

    def forward_of_one(self) -> Callable[[Tensor], Tensor]:
        """The forward pass of a stack's only layer."""
        return lambda input: self(input)[0]

    def fill(self) -> None:
        """Write B beside a W that has come to the device."""
        if self.joint:
            W = self.W.data  # which counts no change, as in `Copies`
            size, stride, column = self._diagonal
            W.as_strided(size, stride, W.storage_offset() + column).copy_(self.buffers[1])

    @staticmethod
    def most(layer: AdaptedLinear) -> int:
        """Most layers of a stack whose block diagonal has a quarter of W's numbers."""
        weight: Tensor = layer.base.weight
        if weight.dtype.itemsize >= 4:
            return sys.maxsize
        assert layer.delta.rank is not None
        return max(1, weight.shape[1] // 4 // layer.delta.rank)

    @property
    def product(self) -> Any:
        return StackedJoint if self.joint else StackedSum


class FrozenStack:
    """Frozen linears with one input and of one shape, computed as one on a device."""

    def __init__(self, bases: Sequence[nn.Linear], device: torch.device) -> None:
        out = bases[0].out_features
        self.W = torch.cat([base.weight.detach() for base in bases]).to(device)
        for base, rows in zip(bases, self.W.split(out), strict=True):
            base.weight.data = rows
        self.bias, self.out = joined_biases(bases, device), out

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        return frozen_linear(x, self.W, self.bias).split(self.out, -1)


def joined_biases(bases: Sequence[nn.Linear], device: torch.device) -> Tensor | None:
    """The biases of linears as one tensor (n·out) on a device; None without."""
    if bases[0].bias is None:
        return None
    return torch.cat([base.bias.detach() for base in bases]).to(device)


class Copies:
    """All working copies of a model: `refresh` before each step's forward pass."""

    def __init__(self, factors: Sequence[Factors]) -> None:
        self.factors = list(factors)
        self.masters = [master for f in self.factors for master in f.masters]
        # by `data`, which counts no change: where a model goes forward twice before a step, the
        # first pass's graph has saved the copies, and finds the same numbers in them
        self._into = [view.data for f in self.factors for view in f.into]
        self._scales = [s for f in self.factors for s in [*(1.0 for _ in f.scales), *f.scales]]
        self._scaled = [i for i, s in enumerate(self._scales) if s != 1]

    def refresh(self) -> None:
        """Copy the masters, B with its scale, and link the copies' gradients to them.

        In each step, for no count of a tensor's changes is to be trusted: fused optimisers leave it
        as it is (torch 2.13).
        """
        with torch.no_grad():
            torch._foreach_copy_(self._into, self.masters)
            self._scale(self._into)
        linked = iter(_Linked.apply(self, *self.masters))
        for factors in self.factors:
            factors.A, factors.B = next(linked), next(linked)

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self._into[0].device

    def forget(self) -> None:
        """Let the graph of the last forward pass go."""
        for factors in self.factors:
            factors.A, factors.B = factors.buffers

    def _scale(self, tensors: Sequence[Tensor | None]) -> None:
        """Multiply by s, in place, what belongs to each B."""
        there = [(t, self._scales[i]) for i in self._scaled if (t := tensors[i]) is not None]
        if there:
            torch._foreach_mul_([t for t, _ in there], [s for _, s in there])

    def gradients(self, of_buffers: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients of the masters from those of the copies, which nothing else reads."""
        found: list[Tensor | None] = []
        for factors, *pair in zip(self.factors, of_buffers[::2], of_buffers[1::2], strict=True):
            n = len(factors.scales)
            for gradient, master in zip(pair, factors.masters[::n], strict=True):
                of_each = None if gradient is None else gradient.view(n, *master.shape)
                found += [None] * n if of_each is None else of_each.unbind()
        there = {i: gradient for i, gradient in enumerate(found) if gradient is not None}
        if any(gradient.dtype != self.masters[i].dtype for i, gradient in there.items()):
            likes = [self.masters[i] for i in there]
            flat = likes[0].new_empty(sum(like.numel() for like in likes))
            parts = flat.split([like.numel() for like in likes])
            wide = [part.view_as(like) for part, like in zip(parts, likes, strict=True)]
            torch._foreach_copy_(wide, [*there.values()])
            for i, gradient in zip(there, wide, strict=True):
                found[i] = gradient
        self._scale(found)
        return found


class _Linked(torch.autograd.Function):
    """The copies as functions of the masters."""

    @staticmethod
    def forward(ctx: Any, copies: Copies, *masters: Tensor) -> tuple[Tensor, ...]:
        ctx.copies = copies
        ctx.set_materialize_grads(False)
        return tuple(buffer.detach() for f in copies.factors for buffer in f.buffers)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gs: Tensor | None):  # type: ignore[no-untyped-def]
        return None, *ctx.copies.gradients(gs)
