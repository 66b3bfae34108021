"""A frozen base in 4 or 8 bits: linear layers that keep their weight in few bits, and compute with
the values that these stand for.

Dettmers et al. 2023, "QLoRA: Efficient finetuning of quantized LLMs", section 3: the weight is
stored quantised, and made whole for each product, forward and backward; no gradient reaches it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 64
"""Weights with one scale of nf4, as in QLoRA."""


def _rows_of_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rounded to 255 steps between minus and plus each row's largest entry."""
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
    return (weight / scale).round().to(torch.int8), scale


def _rows_of_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Each row scaled so that its largest entry is the largest of float8_e4m3fn, 448."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / largest
    return (weight / scale).to(torch.float8_e4m3fn), scale


def _whole_rows(stored: Tensor, scale: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return (stored.float() * scale).to(dtype)  # rounded once


def _blocks_of_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """4 bits for each weight, the nearest of 16 quantiles of a normal distribution, and a scale for
    each BLOCK of them."""
    if weight.is_meta:
        blocks = math.ceil(weight.numel() / BLOCK)
        packed = weight.new_empty((weight.numel() + 1) // 2, 1, dtype=torch.uint8)
        return packed, weight.new_empty(blocks)
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight.contiguous(), blocksize=BLOCK, quant_type="nf4")
    return packed, state.absmax


def _whole_blocks(stored: Tensor, scale: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    if stored.is_meta:
        return stored.new_empty(shape, dtype=dtype)
    from bitsandbytes.functional import QuantState, dequantize_4bit

    state = QuantState(scale, shape, None, BLOCK, "nf4", dtype)
    return dequantize_4bit(stored, state)


@dataclass(frozen=True)
class Format:
    """A form of stored weights.

    store: weight (out, in), float32 → stored values and scales, float32. whole: these, a shape and
    a dtype → the weight.
    """

    store: Callable[[Tensor], tuple[Tensor, Tensor]]
    whole: Callable[[Tensor, Tensor, torch.Size, torch.dtype], Tensor]
    dtype: torch.dtype


FORMATS = {
    "int8": Format(_rows_of_int8, _whole_rows, torch.int8),
    "fp8": Format(_rows_of_fp8, _whole_rows, torch.float8_e4m3fn),
    "nf4": Format(_blocks_of_nf4, _whole_blocks, torch.uint8),
}
"""Name → format: 8, 8 and 4.5 bits a weight."""


class _Product(torch.autograd.Function):
    """W x, which keeps neither x nor W for its backward pass, but what W is made of."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: "QuantizedLinear") -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.whole(x.dtype))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g @ ctx.layer.whole(g.dtype), None


class QuantizedLinear(nn.Module):
    """A frozen linear layer whose weight is stored in few bits.

    weight: the stored values, as uint8, and scale: the bits of the scales, as int32, so that no
    cast of the model to another float dtype rounds them. bias: as it was.
    """

    def __init__(self, linear: nn.Linear, form: str, device: torch.device | None = None) -> None:
        """Store a layer. device: computes it; None: the weight's own, where it stays."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.form = form
        weight = linear.weight.detach()
        stored, scale = FORMATS[form].store(weight.to(device or weight.device).float())
        stored, scale = stored.to(weight.device), scale.to(weight.device)
        self.weight = nn.Parameter(stored.view(torch.uint8), requires_grad=False)
        self.scale = nn.Buffer(scale.view(torch.int32))
        self.bias = linear.bias

    def whole(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values (out, in) that the stored ones stand for."""
        row = FORMATS[self.form]
        shape = torch.Size((self.out_features, self.in_features))
        return row.whole(self.weight.view(row.dtype), self.scale.view(torch.float32), shape, dtype)

    def forward(self, input: Tensor) -> Tensor:
        device = input.device.type
        if not input.is_meta and torch.is_autocast_enabled(device):
            input = input.to(torch.get_autocast_dtype(device))
        out: Tensor = _Product.apply(input, self)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.form}"


def is_quantized(name: str, module: nn.Module) -> bool:
    """Whether a UNet's module is stored in few bits: the linear layers of its transformers, 86 % of
    SDXL's weights and 28 % of SD 1.5's. Those of the timestep are few, and all blocks hear them."""
    return type(module) is nn.Linear and ".attentions." in f".{name}."


def quantize_base(unet: nn.Module, form: str, device: torch.device | None = None) -> None:
    """Store the linear layers of a UNet's transformers in few bits, in place, one after the other.

    device: computes it; None: the weights' own. They stay where they are.
    """
    names = [name for name, module in unet.named_modules() if is_quantized(name, module)]
    for name in names:
        parent, _, own = name.rpartition(".")
        holder: Any = unet.get_submodule(parent)
        setattr(holder, own, QuantizedLinear(getattr(holder, own), form, device))
