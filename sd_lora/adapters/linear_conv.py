"""Adapted linear layers and convolutions, without ΔW where A and B are enough."""

import copy
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sd_lora.adapters.layers import AdaptedLayer
from sd_lora.adapters.low_rank import low_rank_linear, pointwise_conv


def _compute_dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype, or the input's without autocast; the meta device has none."""
    device = x.device.type
    autocast = not x.is_meta and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast else x.dtype


class AdaptedAffine(AdaptedLayer):
    """A layer that computes W x + b: linear layers and convolutions.

    The rule add sums the outputs of base and B·A; the rule decompose (DoRA) of B·A also scales each
    output; all other deltas compute with W'. The dropout of inputs is for the delta alone:
    W x + (W' − W)·drop(x).
    """

    supports_input_dropout = True
    always_calls_base: ClassVar[bool] = False
    """True if only the base itself can compute W x."""

    def _forward(self, strength: float, input: Tensor) -> Tensor:  # called by keyword, too
        factors, drops = self._low_rank_factors(), bool(self.dropout and self.training)
        if factors is not None:
            y = self._forward_add(input, *factors, strength * self.delta.scale)
        elif self._scales_outputs and not drops:
            y = self._forward_dora(strength, input)
        elif drops or self.always_calls_base:
            dW = self.delta_weight("weight", strength).to(input.dtype)
            y = self.base(input) + self._apply_weight(self._drop_inputs(input), dW)
        else:
            return super()._forward(strength, input)
        return self._add_bias_delta(strength, y)

    def _forward_add(self, input: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
        """W x + b + s·B(A x)."""
        return self.base(input) + self._low_rank_product(input, A, B, s)

    def _forward_dora(self, strength: float, input: Tensor) -> Tensor:
        """y + k·((c − 1)·(y − b) + c·ΔW x) for y = W x + b and k = strength: y itself while c = 1
        and ΔW = 0."""
        factors = self.delta.low_rank()
        assert factors is not None
        c = self.delta.output_scale(self.weight_of(self.base, "weight"), *factors)
        y, dy = self.base(input), self._low_rank_product(input, *factors, self.delta.scale)
        Wx = y if self.base.bias is None else y - self._per_output(self.base.bias, y)
        of_Wx, of_dy = strength * (c - 1), strength * c
        return y + self._per_output(of_Wx, y) * Wx + self._per_output(of_dy, y) * dy

    def _low_rank_product(self, input: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
        """s·B(A x) with the dropouts of inputs and neurons."""
        raise NotImplementedError

    def _apply_weight(self, input: Tensor, weight: Tensor) -> Tensor:
        """The layer's product with another weight in W's place, without bias."""
        raise NotImplementedError

    def _per_output(self, values: Tensor, y: Tensor) -> Tensor:
        """One value an output, in the dtype and the dimensions of y."""
        return values.to(y.dtype)

    def _add_bias_delta(self, strength: float, y: Tensor) -> Tensor:
        if not self._has_bias_delta:
            return y
        db = strength * self.deltas["bias"].weight()  # type: ignore[operator]
        return y + self._per_output(db, y)


class AdaptedLinear(AdaptedAffine):
    """`nn.Linear`, weight (out, in)."""

    def _can_fuse(self) -> bool:
        """True if `low_rank_linear` gives the same: no dropout, no masked ranks, a frozen base
        without hooks."""
        base = self.base
        # accelerate and diffusers hook a layer by a `forward` in the instance's own dictionary
        hooked = bool(base._forward_hooks or base._forward_pre_hooks or "forward" in vars(base))
        frozen = not any(p.requires_grad for p in base.parameters())
        drops = self.training and (self.dropout or self.neuron_dropout)
        return frozen and not hooked and not drops and self.rank_mask is None

    def _forward_add(self, input: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
        if not self._can_fuse():
            return super()._forward_add(input, A, B, s)
        dtype = _compute_dtype(input)
        W, bias = self._weight_and_bias()
        bias = None if bias is None else bias.to(dtype)
        return low_rank_linear(input.to(dtype), W.to(dtype), bias, A.to(dtype), B.to(dtype), s)

    def _weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        """W (out, in) and the bias."""
        return self.base.weight, self.base.bias

    def _low_rank_product(self, input: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
        dtype = _compute_dtype(input)
        h = F.linear(self._drop_inputs(input.to(dtype)), A.to(dtype))
        return F.linear(self._drop_neurons(h) * s, B.to(dtype))

    def _apply_weight(self, input: Tensor, weight: Tensor) -> Tensor:
        return F.linear(input, weight)


class AdaptedTransposedLinear(AdaptedLinear):
    """transformers' `Conv1D` (GPT-2): a linear layer whose weight is (in, out)."""

    transposed = True

    def _forward(self, strength: float, x: Tensor) -> Tensor:
        return super()._forward(strength, x)

    def _weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        return self.base.weight.T, self.base.bias

    def _apply_weight(self, input: Tensor, weight: Tensor) -> Tensor:
        return input @ weight


class AdaptedConv(AdaptedAffine):
    """`nn.Conv1d`, `Conv2d`, `Conv3d`: A has the base's stride, padding, padding_mode and dilation.

    With groups, each group of inputs is multiplied by the same A and by its own rows of B, as in
    ΔW = B·A of the kernel's shape (out, in/groups, k…). Hence merged and unmerged layers are the
    same function at any rank.
    """

    def _low_rank_product(self, input: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
        dtype, groups = _compute_dtype(input), self.base.groups
        A, B = A.to(dtype), B.to(dtype)
        if groups > 1:
            A = A.repeat(groups, *(1,) * (A.dim() - 1))  # (r·groups, in/groups, k…)
        A = self.swap_layout(self.base, A)
        h = self._apply_weight(self._drop_inputs(input.to(dtype)), A)
        return pointwise_conv(self._drop_neurons(h, 1) * s, B, groups)

    def _apply_weight(self, input: Tensor, weight: Tensor) -> Tensor:
        return self.base._conv_forward(input, weight, None)

    def _per_output(self, values: Tensor, y: Tensor) -> Tensor:
        return values.to(y.dtype).view(-1, *(1,) * len(self.base.kernel_size))


_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class AdaptedConvTranspose(AdaptedConv):
    """`nn.ConvTranspose1d`, `ConvTranspose2d`, `ConvTranspose3d`, weight (in, out/groups, k…).

    In its delta's layout, (out, in/groups, k…), ΔW = s·B·A as in `AdaptedConv`: A is a transposed
    convolution with the base's stride, padding, output padding and dilation, B is 1×1.
    """

    transposed = True

    def _forward(
        self, strength: float, input: Tensor, output_size: Sequence[int] | None = None
    ) -> Tensor:
        if output_size is None:
            return super()._forward(strength, input)
        base = copy.copy(self.base)  # the same parameters, with the padding that gives this size
        base.output_padding = base._output_padding(
            *(input, list(output_size), base.stride, base.padding, base.kernel_size),
            *(len(base.kernel_size), base.dilation),
        )
        sized = AdaptedConvTranspose(base, self.deltas_by_path(), self.dropout, self.neuron_dropout)
        return sized.train(self.training)._forward(strength, input)

    def _apply_weight(self, input: Tensor, weight: Tensor) -> Tensor:
        base = self.base
        return _CONV_TRANSPOSE[len(base.kernel_size)](
            *(input, weight, None, base.stride, base.padding, base.output_padding),
            *(base.groups, base.dilation),
        )
