"""Layers that compute W x + b, linear and convolutions: their cheap ways to be adapted."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sd_lora.adapters.functional import lowrank_linear, pointwise
from sd_lora.adapters.layers import AdaptedLayer


def _compute_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class AdaptedProduct(AdaptedLayer):
    """A layer that computes W x + b: linear layers and convolutions, which share what follows.

    With B·A added, the base's output and the pair's are summed; with B·A decomposed (DoRA) both
    are scaled output by output; everything else computes with W'. Dropout of the input is the
    update's alone: W x + (W' − W)·drop(x).
    """

    takes_input_dropout = True
    keeps_kernel: ClassVar[bool] = False
    """Whether W x must always be the base's own."""

    def _forward(self, strength: float, input: Tensor) -> Tensor:  # called by keyword, too
        factors, drops = self._cheap(), bool(self.dropout and self.training)
        if factors is not None:
            y = self._added_to(input, *factors, strength * self.delta.scale)
        elif self._scales and not drops:
            y = self._scaled(strength, input)
        elif drops or self.keeps_kernel:
            change = self.delta_weight("weight", strength).to(input.dtype)
            y = self.base(input) + self._times(self._drop(input), change)
        else:
            return super()._forward(strength, input)
        return self._bias_change(strength, y)

    def _added_to(self, input: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
        """Returns W x + b + s·B(A x)."""
        return self.base(input) + self._pair(input, A, B, s)

    def _scaled(self, strength: float, input: Tensor) -> Tensor:
        """Returns y + k·((c − 1)·(y − b) + c·ΔW x) for y = W x + b: exactly y while c is 1."""
        factors = self.delta.low_rank()
        assert factors is not None
        gain = self.delta.gain(self.weight_of(self.base, "weight"), *factors)
        y, update = self.base(input), self._pair(input, *factors, self.delta.scale)
        own = y if self.base.bias is None else y - self._channels(self.base.bias, y)
        more, c = strength * (gain - 1), strength * gain
        return y + self._channels(more, y) * own + self._channels(c, y) * update

    def _pair(self, input: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
        """Returns s·B(A x) under the dropouts."""
        raise NotImplementedError

    def _times(self, input: Tensor, weight: Tensor) -> Tensor:
        """Returns the product with another weight in W's place, without bias."""
        raise NotImplementedError

    def _channels(self, values: Tensor, y: Tensor) -> Tensor:
        """Returns one value an output, shaped to go with y."""
        return values.to(y.dtype)

    def _bias_change(self, strength: float, y: Tensor) -> Tensor:
        if not self._has_bias:
            return y
        change = strength * self.deltas["bias"].weight()  # type: ignore[operator]
        return y + self._channels(change, y)


class AdaptedLinear(AdaptedProduct):
    """`nn.Linear`, weight (out, in)."""

    def _is_plain(self) -> bool:
        """Whether the fused path means the same: no dropout, frozen base, nobody listening."""
        base = self.base
        # accelerate and diffusers put their hooks into a `forward` of the instance's own
        listened = bool(base._forward_hooks or base._forward_pre_hooks or "forward" in vars(base))
        frozen = not any(p.requires_grad for p in base.parameters())
        drops = self.training and (self.dropout or self.neuron_dropout)
        return frozen and not listened and not drops

    def _added_to(self, input: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
        if not self._is_plain():
            return super()._added_to(input, A, B, s)
        dtype = _compute_dtype(input)
        W, bias = self._plain()
        bias = None if bias is None else bias.to(dtype)
        return lowrank_linear(input.to(dtype), W.to(dtype), bias, A.to(dtype), B.to(dtype), s)

    def _plain(self) -> tuple[Tensor, Tensor | None]:
        """Returns W (out, in) and the bias."""
        return self.base.weight, self.base.bias

    def _pair(self, input: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
        dtype = _compute_dtype(input)
        h = F.linear(self._drop(input.to(dtype)), A.to(dtype))
        return F.linear(self._drop_neurons(h) * s, B.to(dtype))

    def _times(self, input: Tensor, weight: Tensor) -> Tensor:
        return F.linear(input, weight)


class AdaptedConv1D(AdaptedLinear):
    """transformers' `Conv1D` (GPT-2): a linear layer whose weight is (in, out)."""

    transposed = True

    def _forward(self, strength: float, x: Tensor) -> Tensor:
        return super()._forward(strength, x)

    def _plain(self) -> tuple[Tensor, Tensor | None]:
        return self.base.weight.T, self.base.bias

    def _times(self, input: Tensor, weight: Tensor) -> Tensor:
        return input @ weight


class AdaptedConv(AdaptedProduct):
    """`nn.Conv1d`, `Conv2d`, `Conv3d`: A runs with the base's stride, padding, padding_mode and
    dilation. With groups, each group of inputs meets the same A and its own rows of B: that is
    what ΔW = B·A in the kernel's shape (out, in/groups, k…) means, so merged and unmerged are the
    same function for any rank.
    """

    def _pair(self, input: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
        dtype, groups = _compute_dtype(input), self.base.groups
        A, B = A.to(dtype), B.to(dtype)
        if groups > 1:
            A = A.repeat(groups, *(1,) * (A.dim() - 1))  # (r·groups, in/groups, k…)
        h = self._times(self._drop(input.to(dtype)), A)
        return pointwise(self._drop_neurons(h) * s, B, groups)

    def _times(self, input: Tensor, weight: Tensor) -> Tensor:
        return self.base._conv_forward(input, weight, None)

    def _channels(self, values: Tensor, y: Tensor) -> Tensor:
        return values.to(y.dtype).view(-1, *(1,) * len(self.base.kernel_size))
