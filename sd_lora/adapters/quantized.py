"""Linear layers with a quantised frozen weight: ours, bitsandbytes int8, nf4 and fp4, torchao."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from sd_lora.adapters.linear_conv import AdaptedLinear


def dequantize(base: Any) -> Tensor:
    """Full-precision values (out, in) of a quantised linear layer's weight.

    Raises:
        ValueError: a weight without quantised values yet, or in a form without gradients.
    """
    weight = base.weight
    if hasattr(base, "whole"):  # a run's `base_precision`
        return base.whole()
    if hasattr(weight, "quant_state"):  # bitsandbytes, 4 bit
        from bitsandbytes.functional import dequantize_4bit

        if weight.quant_state is None:
            raise ValueError("its 4-bit weight is not quantised yet: move the model to its device")
        if getattr(weight.quant_state, "packing_format_for_cpu", False):
            raise ValueError(
                "a call in eval mode on the CPU has repacked its 4-bit weight for good, in a form "
                "without gradients: load the model again and adapt it before the first call"
            )
        return dequantize_4bit(weight.data, weight.quant_state)
    if hasattr(weight, "SCB"):  # bitsandbytes, int8: rows divided by their largest entry
        # the first forward pass moves CB and SCB from the weight to the layer's state
        CB = base.state.CB if base.state.CB is not None else weight.CB
        SCB = base.state.SCB if base.state.SCB is not None else weight.SCB
        if CB is None or SCB is None:
            raise ValueError("its int8 weight is not quantised yet: move the model to its device")
        return CB.float() * (SCB.float() / 127)[:, None]
    return weight.dequantize()  # torchao


class AdaptedQuantized(AdaptedLinear):
    """A linear layer with a quantised weight: its own kernel computes W x, and ΔW x is added.

    It cannot be merged: W + ΔW would be quantised again, and change. The adapter's file can be
    merged into the full-precision model.
    """

    always_calls_base = True

    def __init__(self, base: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(base, *args, **kwargs)
        if hasattr(base, "support_avx512bf16_for_cpu"):
            # else bitsandbytes 0.50 repacks a 4-bit weight for good at the first call in eval mode,
            # and gradients to earlier layers are zero from the first validation on the CPU on
            base.support_avx512bf16_for_cpu = False

    @classmethod
    def check(cls, base: Any) -> None:
        dequantize(base)

    @classmethod
    def weight_of(cls, base: Any, path: str) -> Tensor:
        return dequantize(base).detach() if path == "weight" else super().weight_of(base, path)

    def _can_fuse(self) -> bool:
        return False

    def _forward(self, strength: float, input: Tensor) -> Tensor:
        y = super()._forward(strength, input)
        residual = self.delta.quantization_residual if "weight" in self.deltas else None
        if residual is None:
            return y
        A, B = (factor.to(y.dtype) for factor in residual)  # a part of W, without dropout
        return y + F.linear(F.linear(input.to(y.dtype), A) * self.delta.scale, B)

    def merge(self) -> None:
        raise ValueError(
            f"a {type(self.base).__name__} with a quantised weight is not merged, for W + ΔW would "
            "be rounded again: load the adapter's file into the full-precision model and merge it "
            "there"
        )

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            return self.base.weight  # in its quantised format, for code of that library
        return super().__getattr__(name)
