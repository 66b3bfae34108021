"""Which layers the fast path takes, and their forward passes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sd_lora.adapters.fast.convolutions import (
    FrozenConv,
    is_pointwise,
    layout_of,
    may_unroll,
)
from sd_lora.adapters.fast.copies import ConvFactors
from sd_lora.adapters.fast.products import frozen_linear
from sd_lora.adapters.layers import AdaptedLayer
from sd_lora.adapters.linear_conv import AdaptedConv, AdaptedLinear
from sd_lora.adapters.methods import LoRA
from sd_lora.adapters.routed import RoutedLayer

Forward = Callable[..., Any]


def fast_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a model that are plain LoRA: adapted, or routed to several adapters."""
    known = (AdaptedLayer, RoutedLayer)
    return [m for m in dict.fromkeys(model.modules()) if isinstance(m, known) and takes(m)]


def models_of(layer: Any) -> list[Any]:
    """The adapted layers that compute a layer: itself, or those of each model of a routed one."""
    if not isinstance(layer, RoutedLayer):
        return [layer]
    return [own for own in layer.layers if own is not None]


def is_conv(layer: Any) -> bool:
    """Whether an adapted or routed layer is a convolution."""
    return isinstance(layer, AdaptedLayer | RoutedLayer) and isinstance(layer.base, nn.Conv2d)


def takes(layer: nn.Module) -> bool:
    """Whether a layer is plain LoRA on a plain `nn.Linear` or `nn.Conv2d`: no other method, rule,
    init, dropout or trained bias, nothing quantised, sharded or hooked."""
    if isinstance(layer, RoutedLayer):
        return all(map(takes, models_of(layer))) and not is_hooked(layer)
    if type(layer) not in (AdaptedLinear, AdaptedConv):
        return False
    assert isinstance(layer, AdaptedLayer)
    if {*layer.deltas} != {"weight"} or type(layer.delta) is not LoRA:
        return False
    delta, base = layer.delta, layer.base
    whole = {name for name, tensor in delta.tensors().items() if tensor is not None}
    drops = layer.dropout or layer.neuron_dropout or layer.module_dropout or delta.rank_dropout
    return (
        whole == {"lora_A", "lora_B"}
        and not drops
        and all(p.requires_grad for p in delta.parameters())
        and (is_plain_conv(base) if isinstance(layer, AdaptedConv) else is_plain_linear(base))
        and not is_hooked(layer)
    )


def is_usual(layer: AdaptedLayer) -> bool:
    """Whether a layer computes W + ΔW now: not merged, of strength 1, with all ranks."""
    return not layer._originals and layer.strength == 1 and layer.rank_mask is None


def is_hooked(module: nn.Module) -> bool:
    """Whether a call of a module does more than its class says."""
    hooks = (
        module._forward_hooks, module._forward_pre_hooks, module._backward_hooks,
        module._backward_pre_hooks,
    )  # fmt: skip
    # accelerate and diffusers hook a layer by a `forward` in the instance's own dictionary
    return any(hooks) or "forward" in vars(module)


def _has_plain_tensors(module: nn.Module) -> bool:
    """Frozen parameters of torch's own class and of one float dtype, without parametrisations."""
    own = [p for p in module._parameters.values() if p is not None]
    return (
        module._parameters.get("weight") is not None
        and not any(p.requires_grad or type(p) is not nn.Parameter for p in own)
        and len({p.dtype for p in own}) == 1
        and own[0].dtype in (torch.float32, torch.bfloat16, torch.float16)
        and not is_hooked(module)
    )


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module is a frozen `nn.Linear` and nothing else."""
    return type(module) is nn.Linear and _has_plain_tensors(module)


def is_plain_conv(module: nn.Module) -> bool:
    """Whether a module is a frozen `nn.Conv2d` and nothing else."""
    return (
        type(module) is nn.Conv2d
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
        and module.groups == 1
        and module.dilation == (1, 1)
        and _has_plain_tensors(module)
    )


def lay_out(model: nn.Module, device: torch.device) -> None:
    """Store a model's frozen kernels in the order of the images on a device, with their numbers.

    Wherever a UNet computes, and not on the fast path alone: the order of sums goes by it, and a
    sample of a run is the one of its file. A model whose group norms are trained stays as it is:
    torch's gradient of such a weight alone, without its input's, ends the process there (2.13).
    """
    if any(map(_is_trained_norm, model.modules())):
        return
    for module in filter(is_plain_conv, model.modules()):
        kernel: Any = module.weight
        if not is_pointwise(kernel):  # the same either way, and perhaps a part of a stack
            kernel.data = kernel.data.contiguous(memory_format=layout_of(device))


def _is_trained_norm(module: nn.Module) -> bool:
    """Whether a module is a group norm that learns, or that an adapter changes."""
    norm = module.base if isinstance(module, AdaptedLayer) else module
    return isinstance(norm, nn.GroupNorm) and any(p.requires_grad for p in module.parameters())


def frozen_conv(conv: Any) -> Forward:
    """W x + b, saving nothing but the weight."""
    return lambda input: FrozenConv.apply(input, conv.weight, conv.bias, conv.stride, conv.padding)


def frozen(linear: Any) -> Forward:
    """W x + b of a linear layer."""
    return lambda input: frozen_linear(input, linear.weight, linear.bias)


def adapted_conv(layer: Any, factors: ConvFactors) -> Forward:
    """W x + b + B(A x), of torch's own operators: a function of our own saves no operator here, and
    its calls cost more (45 µs, benchmarks/README.md), but for a W that columns make faster."""
    base = layer.base
    form = base.stride, base.padding
    of_base = frozen_conv(base) if may_unroll(base.weight) else None

    def forward(input: Tensor) -> Tensor:
        h = torch.conv2d(input, factors.A, None, *form)
        y = of_base(input) if of_base else torch.conv2d(input, base.weight, base.bias, *form)
        return torch.conv2d(h, factors.B).add_(y)  # y of one pixel is a view, which stays

    return forward
