"""Linear layers with a quantised frozen weight: bitsandbytes int8, nf4 and fp4, and torchao."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from sd_lora.adapters.products import AdaptedLinear


def dequantize(base: Any) -> Tensor:
    """Returns the full-precision values of a quantised linear layer's weight, (out, in)."""
    weight = base.weight
    if hasattr(weight, "quant_state"):  # bitsandbytes, 4 bit
        from bitsandbytes.functional import dequantize_4bit

        if weight.quant_state is None:
            raise ValueError("its 4-bit weight is not quantised yet: move the model to its device")
        if getattr(weight.quant_state, "packing_format_for_cpu", False):
            raise ValueError(
                "a call in eval mode on the CPU has repacked its 4-bit weight, for good, in a form "
                "without gradients: load the model anew and adapt it before it is called"
            )
        return dequantize_4bit(weight.data, weight.quant_state)
    if hasattr(weight, "SCB"):  # bitsandbytes, int8: rows scaled by their largest entry
        # the first forward pass moves both from the weight to the layer's state
        CB = base.state.CB if base.state.CB is not None else weight.CB
        SCB = base.state.SCB if base.state.SCB is not None else weight.SCB
        if CB is None or SCB is None:
            raise ValueError("its int8 weight is not quantised yet: move the model to its device")
        return CB.float() * (SCB.float() / 127)[:, None]
    return weight.dequantize()  # torchao


class AdaptedQuantized(AdaptedLinear):
    """A linear layer with a quantised weight: its own kernel computes W x, the update is added,
    and nothing is ever quantised again.

    It is not merged: rounding W + ΔW back to the grid would change it. The adapter's file merges
    into the full-precision model.
    """

    keeps_kernel = True

    def __init__(self, base: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(base, *args, **kwargs)
        if hasattr(base, "support_avx512bf16_for_cpu"):
            # else bitsandbytes 0.50 repacks a 4-bit weight at the first call in eval, for good, and
            # gradients to earlier layers are then zero: after one validation on the CPU
            base.support_avx512bf16_for_cpu = False

    @classmethod
    def check(cls, base: Any) -> None:
        dequantize(base)

    @classmethod
    def weight_of(cls, base: Any, path: str) -> Tensor:
        return dequantize(base).detach() if path == "weight" else super().weight_of(base, path)

    def _is_plain(self) -> bool:
        return False

    def _forward(self, strength: float, input: Tensor) -> Tensor:
        y = super()._forward(strength, input)
        lost = self.delta.lost if "weight" in self.deltas else None
        if lost is None:
            return y
        A, B = (factor.to(y.dtype) for factor in lost)  # part of W: no dropout touches it
        return y + F.linear(F.linear(input.to(y.dtype), A) * self.delta.scale, B)

    def merge(self) -> None:
        raise ValueError(
            f"a {type(self.base).__name__} with a quantised weight is not merged, for it would be "
            "rounded again: load the adapter's file into the full-precision model and merge there"
        )

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            return self.base.weight  # what quantised code expects, in its own format
        return super().__getattr__(name)
