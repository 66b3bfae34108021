"""Parts of diffusers' UNet that are computed together, with the layers inside them.

Only exact classes with the settings of Stable Diffusion are taken; all else stays as it is.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from sd_lora.adapters.fast.convolutions import Convolution
from sd_lora.adapters.fast.copies import ConvFactors, Factors, FrozenStack, Stack
from sd_lora.adapters.fast.layers import (
    Forward,
    is_conv,
    is_hooked,
    is_plain_conv,
    is_plain_linear,
    models_of,
)
from sd_lora.adapters.fast.products import frozen_linear
from sd_lora.adapters.fast.residual import Block, Norm
from sd_lora.adapters.fast.routed import RoutedConvolution, RoutedStack
from sd_lora.adapters.linear_conv import AdaptedConv
from sd_lora.adapters.routed import RoutedLayer
from sd_lora.training.fast import blocks

Plain = Collection[nn.Module]
"""The adapted layers that are plain LoRA."""


@dataclass
class Shared:
    """Outputs of layers that share one input through the whole model: keys and values of the text,
    by attention, and time projections, by residual block.

    They are found by the input itself, for a block may be computed again in the backward pass, when
    another forward pass has come between. of_text, of_time: stack → the modules that read its
    outputs, in order. keys_values, times: input and reader → outputs.
    """

    of_text: list[tuple[Stack | RoutedStack, list[nn.Module]]] = field(default_factory=list)
    of_time: list[tuple[Stack | RoutedStack | FrozenStack, list[nn.Module]]] = field(
        default_factory=list
    )
    keys_values: dict[tuple[int, nn.Module], tuple[Tensor, ...]] = field(default_factory=dict)
    times: dict[tuple[int, nn.Module], Tensor] = field(default_factory=dict)
    inputs: list[Tensor] = field(default_factory=list)  # kept, so that no other has their identity

    def read_text(
        self, sample: object = None, timestep: object = None,
        encoder_hidden_states: Any = None, *_: object, **__: object,
    ) -> None:  # fmt: skip
        """Compute all keys and values of the text (B, tokens, width), of the UNet's arguments."""
        self.inputs.append(encoder_hidden_states)
        for stack, readers in self.of_text:
            outs = iter(stack(encoder_hidden_states))
            for reader in readers:
                self.keys_values[id(encoder_hidden_states), reader] = next(outs), next(outs)

    def read_time(self, temb: Tensor) -> None:
        """Compute all projections of the time embedding (B, width)."""
        self.inputs.append(temb)
        x = F.silu(temb)
        for stack, readers in self.of_time:
            for reader, out in zip(readers, stack(x), strict=True):
                self.times[id(temb), reader] = out[:, :, None, None]

    def text_of(self, text: Any, reader: nn.Module) -> tuple[Tensor, ...]:
        """The keys and values of a text (B, tokens, width) for an attention."""
        key = id(text), reader
        return self.keys_values[key if key in self.keys_values else (self._known(text), reader)]

    def time_of(self, temb: Tensor, reader: nn.Module) -> Tensor:
        """The projection of a time embedding (B, width) for a residual block."""
        key = id(temb), reader
        return self.times[key if key in self.times else (self._known(temb), reader)]

    def _known(self, tensor: Tensor) -> int:
        """The identity of an input that autograd has given back as another object, with the same
        memory (`torch.autograd.graph.saved_tensors_hooks`)."""
        return next(id(own) for own in self.inputs if _place(own) == _place(tensor))

    @property
    def weights(self) -> list[Tensor]:
        """Frozen weights that are computed with for all blocks at once."""
        return [stack.W for stack, _ in (*self.of_text, *self.of_time)]

    def forget(self) -> None:
        """Let the tensors of a step go."""
        self.keys_values.clear()
        self.times.clear()
        self.inputs.clear()


class Parts:
    """The parts of a model that are computed together.

    factors: with working copies. inside: the adapted layers and convolutions that a larger part
    computes. forwards: module → forward pass. shared: outputs that its layers share. way: by which
    transformer blocks compute. self_attentions: attention → its query, key and value.

    waiting: modules of blocks whose frozen weights are on the device only while a block computes;
    layers that are computed for all blocks at once stay there.
    """

    def __init__(self, model: nn.Module, plain: Plain, waiting: Collection[nn.Module]) -> None:
        self.factors: list[Factors] = []
        self.inside: set[nn.Module] = set()
        self.forwards: dict[nn.Module, Forward] = {}
        self.shared = Shared()
        self.way = blocks.Way()
        self.self_attentions: dict[nn.Module, Stack | RoutedStack] = {}
        self._plain, self._waiting = plain, waiting
        if type(model) is not UNet2DConditionModel:
            return
        unet: Any = model
        modules = list(model.modules())
        attentions = [m for m in modules if _is_usual_attention(m)]
        self._add_self_attentions([a for a in attentions if not a.is_cross_attention])
        if model.encoder_hid_proj is None:
            self._add_text([a for a in attentions if a.is_cross_attention])
        if not is_hooked(unet.down_blocks[0]):
            self._add_resnets(unet.down_blocks[0], [m for m in modules if _is_usual_resnet(m)])
        for module in modules:
            if _is_usual_geglu(module):
                self.forwards[module] = blocks.geglu(module)
            elif _is_usual_block(module):
                self._add_block(module)
            elif _is_usual_transformer(module):
                self._add_transformer(module)

    def stack(self, layers: list[Any], shared: bool = False) -> Stack | RoutedStack:
        """Linears that are computed as one. shared: by several blocks."""
        self.inside.update(layers)
        if isinstance(layers[0], RoutedLayer):
            routed = RoutedStack(layers)
            self.factors += filter(None, routed.factors)
            return routed
        stack = Stack(layers, apart=layers[0] in self._waiting and not shared)
        self.factors.append(stack)
        return stack

    def alone(self, layer: Any) -> blocks.Project:
        """A linear by itself, or a 1×1 convolution, which is one."""
        return self.stack([layer]).forward_of_one()

    def routed_conv(self, layer: RoutedLayer) -> RoutedConvolution:
        """A convolution of several models."""
        conv = RoutedConvolution.of(layer)
        self.factors += filter(None, conv.of_models)
        return conv

    def _alike(self, linears: list[Any]) -> bool:
        """Whether linears are plain LoRA, and can be one stack."""
        return all(linear in self._plain for linear in linears) and len({*map(_form, linears)}) == 1

    def _add_self_attentions(self, attentions: list[Any]) -> None:
        """One stack of query, key and value for each."""
        for attention in attentions:
            linears = [attention.to_q, attention.to_k, attention.to_v]
            # of several models the block diagonals are as many times as wide
            fits = not isinstance(linears[0], RoutedLayer) or _most(linears[0]) >= len(linears)
            if self._alike(linears) and fits:
                stack = self.self_attentions[attention] = self.stack(linears)
                self.forwards[attention] = blocks.self_attention(attention, stack)

    def _add_text(self, attentions: list[Any]) -> None:
        """One stack of keys and values for all cross-attentions of a width."""
        known = [a for a in attentions if self._alike([a.to_k, a.to_v])]
        for same in _by(known, lambda a: _form(a.to_k)):
            for alike in _parts(same, _most(same[0].to_k) // 2):
                linears = [linear for a in alike for linear in (a.to_k, a.to_v)]
                stack = self.stack(linears, shared=True)
                self.shared.of_text.append((stack, alike))
            for attention in same:
                forward = blocks.cross_attention(attention, self.shared.text_of)
                self.forwards[attention] = forward

    def _add_resnets(self, first: nn.Module, resnets: list[Any]) -> None:
        """Each residual block as one function, and one stack of time projections for a width.

        first: the UNet's first block, which gets the time embedding as all others do, and is
        outside of every block whose activations are computed again.
        """
        known = [r for r in resnets if all(map(self._is_known, _convs(r)))]
        adapted = [r for r in known if self._alike([r.time_emb_proj])]
        frozen = [r for r in known if is_plain_linear(r.time_emb_proj)]
        for same in _by(adapted, lambda r: _form(r.time_emb_proj)):
            for alike in _parts(same, _most(same[0].time_emb_proj)):
                stack = self.stack([r.time_emb_proj for r in alike], shared=True)
                self.shared.of_time.append((stack, alike))
        for alike in _by(frozen, lambda r: r.time_emb_proj.weight.shape):
            stacked = FrozenStack([r.time_emb_proj for r in alike], _device(self._plain))
            self.shared.of_time.append((stacked, alike))
        for resnet in (*adapted, *frozen):
            self.forwards[resnet] = _resnet(self._block(resnet), resnet, self.shared.time_of)
        self.forwards[first] = _first_block(first, self.shared)

    def _is_known(self, conv: nn.Module) -> bool:
        return is_plain_conv(conv) or (is_conv(conv) and conv in self._plain)

    def _block(self, resnet: Any) -> Block:
        first, second, *shortcut = (self._convolution(conv) for conv in _convs(resnet))
        norms = Norm(resnet.norm1), Norm(resnet.norm2)
        return Block(norms[0], first, norms[1], second, shortcut[0] if shortcut else None)

    def _convolution(self, conv: Any) -> Convolution:
        self.inside.add(conv)
        if isinstance(conv, RoutedLayer):
            return self.routed_conv(conv)
        if not isinstance(conv, AdaptedConv):
            return Convolution(conv, None)
        factors = ConvFactors(conv)
        self.factors.append(factors)
        return Convolution(conv.base, factors)

    def _add_block(self, block: Any) -> None:
        """A transformer block as one function, where its attentions are stacks."""
        self.forwards[block] = general = blocks.transformer_block(block)
        texts = {reader for _, readers in self.shared.of_text for reader in readers}
        if block.attn1 not in self.self_attentions or block.attn2 not in texts:
            return
        widen, _, narrow = block.ff.net
        if not _is_usual_geglu(widen):
            return
        parts = blocks.BlockParts(
            block.norm1, self.self_attentions[block.attn1], self._product(block.attn1.to_out[0]),
            block.norm2, self._product(block.attn2.to_q), self._product(block.attn2.to_out[0]),
            block.norm3, self._product(widen.proj), self._product(narrow),
            block.attn1.heads, block.attn2.heads,
        )  # fmt: skip
        self.forwards[block] = blocks.whole_block(
            block, parts, general, self.shared.text_of, self.way
        )
        self.way.blocks += 1

    def _product(self, linear: Any) -> blocks.Project:
        """The product of a linear layer: of its stack, where it is plain LoRA."""
        if linear not in self._plain:
            return linear
        alone = self.forwards[linear] = self.alone(linear)
        return alone

    def _add_transformer(self, model: Any) -> None:
        """A transformer whose projections are linear layers, or 1×1 convolutions, which are."""
        projections = model.proj_in, model.proj_out
        if all(is_plain_linear(p) or _is_pointwise(p) or p in self._plain for p in projections):
            project_in, project_out = map(self._projection, projections)
            self.forwards[model] = blocks.transformer(model, project_in, project_out)

    def _projection(self, module: Any) -> blocks.Project:
        if is_conv(module):
            return self.alone(module)
        if not isinstance(module, nn.Conv2d):
            return module
        self.inside.add(module)
        weight = module.weight.detach().flatten(1)
        return lambda tokens: frozen_linear(tokens, weight, module.bias)


def _device(plain: Iterable[Any]) -> torch.device:
    """The device of the trained tensors, where a model computes."""
    return next(models_of(next(iter(plain)))[0].delta.parameters()).device


def _place(tensor: Tensor) -> tuple[object, ...]:
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape


def _form(linear: Any) -> tuple[object, ...]:
    """The shape, bias and rank, of a routed one in each model, that linears of a stack share."""
    ranks = [own and own.delta.rank for own in getattr(linear, "layers", [linear])]
    return linear.base.weight.shape, linear.base.bias is None, *ranks


def _most(linear: Any) -> int:
    """Most linears of a stack."""
    return (RoutedStack if isinstance(linear, RoutedLayer) else Stack).most(linear)


def _by(modules: Iterable[Any], form: Callable[[Any], object]) -> list[list[Any]]:
    """Modules grouped by form, in order."""
    groups: dict[object, list[Any]] = {}
    for module in modules:
        groups.setdefault(form(module), []).append(module)
    return list(groups.values())


def _parts(modules: list[Any], most: int) -> list[list[Any]]:
    """Modules in parts of at most so many; of one at least."""
    size = max(1, most)
    return [modules[i : i + size] for i in range(0, len(modules), size)]


def _convs(resnet: Any) -> list[Any]:
    """The convolutions of a residual block: two, and a shortcut where its width changes."""
    convs = resnet.conv1, resnet.conv2, resnet.conv_shortcut
    return [conv for conv in convs if conv is not None]


def _resnet(
    block: Block, module: nn.Module, times: Callable[[Tensor, nn.Module], Tensor]
) -> Forward:
    def forward(input_tensor: Tensor, temb: Tensor, *_: object, **__: object) -> Tensor:
        return block(input_tensor, times(temb, module))

    return forward


def _first_block(block: Any, shared: Shared) -> Forward:
    general = partial(type(block).forward, block)

    def forward(hidden_states: Tensor, temb: Tensor, *args: Any, **kwargs: Any) -> Any:
        shared.read_time(temb)
        return general(hidden_states, temb, *args, **kwargs)

    return forward


def _is(module: nn.Module, cls: type) -> bool:
    return type(module) is cls and not is_hooked(module)


def _is_usual_attention(module: Any) -> bool:
    unset = ("spatial_norm", "group_norm", "norm_q", "norm_k", "norm_cross")
    return (
        _is(module, Attention)
        and type(module.processor) is AttnProcessor2_0
        and all(getattr(module, name, None) is None for name in unset)
        and not module.residual_connection
        and module.rescale_output_factor == 1
        and module.to_out[1].p == 0
        and module.to_k is not None
        and module.inner_kv_dim == module.inner_dim
    )


def _is_usual_resnet(module: Any) -> bool:
    return (
        _is(module, ResnetBlock2D)
        and module.time_embedding_norm == "default"
        and module.time_emb_proj is not None
        and not (module.skip_time_act or module.up or module.down)
        and module.output_scale_factor == 1
        and module.dropout.p == 0
        and type(module.nonlinearity) is nn.SiLU
        and all(_is_frozen_norm(norm) for norm in (module.norm1, module.norm2))
    )


def _is_frozen_norm(norm: nn.Module) -> bool:
    return (
        isinstance(norm, nn.GroupNorm)
        and _is(norm, nn.GroupNorm)
        and norm.affine
        and not any(p.requires_grad for p in norm.parameters())
    )


def _is_usual_geglu(module: Any) -> bool:
    return _is(module, GEGLU)


def _is_usual_block(module: Any) -> bool:
    return (
        _is(module, BasicTransformerBlock)
        and module.norm_type == "layer_norm"
        and module.pos_embed is None
        and module.attn2 is not None
        and not module.only_cross_attention
        and module._chunk_size is None
        and [type(part) for part in module.ff.net[:2]] == [GEGLU, nn.Dropout]
        and len(module.ff.net) == 3
        and module.ff.net[1].p == 0
        and not is_hooked(module.ff)
    )


def _is_usual_transformer(module: Any) -> bool:
    return _is(module, Transformer2DModel) and module.is_input_continuous


def _is_pointwise(module: Any) -> bool:
    """Whether a module is a frozen 1×1 convolution."""
    return (
        is_plain_conv(module)
        and module.kernel_size == (1, 1)
        and module.stride == (1, 1)
        and module.padding == (0, 0)
    )
