"""Parts of diffusers' UNet whose layers share an input, and their forward passes.

Only exact classes with the settings of Stable Diffusion are taken; all else stays as it is.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from sd_lora.adapters.fast.copies import FrozenStack, Stack
from sd_lora.adapters.fast.layers import Forward, is_hooked, is_plain_linear
from sd_lora.adapters.fast.products import Geglu, NormSilu
from sd_lora.adapters.linear_conv import AdaptedLinear


@dataclass
class Shared:
    """Outputs of layers that share one input through the whole model, of the current forward pass:
    keys and values of the text, by attention, and time projections, by residual block.

    of_text, of_time: stack → the modules that read its outputs, in order.
    """

    of_text: list[tuple[Stack, list[nn.Module]]] = field(default_factory=list)
    of_time: list[tuple[Stack | FrozenStack, list[nn.Module]]] = field(default_factory=list)
    keys_values: dict[nn.Module, tuple[Tensor, ...]] = field(default_factory=dict)
    times: dict[nn.Module, Tensor] = field(default_factory=dict)

    def read_text(
        self, sample: object = None, timestep: object = None,
        encoder_hidden_states: Tensor | None = None, *_: object, **__: object,
    ) -> None:  # fmt: skip
        """Compute all keys and values of the text (B, tokens, width), of the UNet's arguments."""
        text: Any = encoder_hidden_states
        for stack, readers in self.of_text:
            outs = iter(stack(text))
            for reader in readers:
                self.keys_values[reader] = next(outs), next(outs)

    def read_time(self, temb: Tensor) -> None:
        """Compute all projections of the time embedding (B, width)."""
        temb = F.silu(temb)
        for stack, readers in self.of_time:
            for reader, out in zip(readers, stack(temb), strict=True):
                self.times[reader] = out[:, :, None, None]

    def forget(self) -> None:
        self.keys_values.clear()
        self.times.clear()


@dataclass
class Parts:
    """What is found in a UNet.

    stacks: with working copies. stacked: the adapted linears in them. forwards: module → forward
    pass. shared: what its layers share.
    """

    stacks: list[Stack] = field(default_factory=list)
    stacked: set[nn.Module] = field(default_factory=set)
    forwards: dict[nn.Module, Forward] = field(default_factory=dict)
    shared: Shared = field(default_factory=Shared)

    @classmethod
    def of(cls, model: nn.Module, plain: Mapping[nn.Module, object]) -> "Parts":
        """Those of a model. plain: its adapted layers that are plain LoRA."""
        parts = cls()
        for module in model.modules():
            if type(module) is GEGLU and not is_hooked(module):
                parts.forwards[module] = _geglu(module)
        attentions = [m for m in model.modules() if _is_usual_attention(m)]
        for attention in attentions:
            linears = [attention.to_q, attention.to_k, attention.to_v]
            if not attention.is_cross_attention and _alike(linears, plain):
                (stack,) = parts._stacked([linears])
                parts.forwards[attention] = _self_attention(attention, stack)
        if type(model) is not UNet2DConditionModel or model.encoder_hid_proj is not None:
            return parts
        parts._add_text(attentions, plain)
        if not is_hooked(model.down_blocks[0]):
            resnets = [m for m in model.modules() if _is_usual_resnet(m)]
            parts._add_time(model.down_blocks[0], resnets, plain)
        return parts

    def _stacked(self, groups: Iterable[list[AdaptedLinear]]) -> list[Stack]:
        stacks = [Stack(linears) for linears in groups]
        for stack, linears in zip(stacks, groups, strict=True):
            self.stacks.append(stack)
            self.stacked.update(linears)
        return stacks

    def _add_text(self, attentions: list[Any], plain: Mapping[nn.Module, object]) -> None:
        """One stack of keys and values for all cross-attentions of a width."""
        cross = [a for a in attentions if a.is_cross_attention]
        cross = [a for a in cross if _alike([a.to_k, a.to_v], plain)]
        for alike in _by(cross, lambda a: _form(a.to_k)):
            (stack,) = self._stacked([[linear for a in alike for linear in (a.to_k, a.to_v)]])
            self.shared.of_text.append((stack, alike))
            self.forwards |= {a: _cross_attention(a, self.shared.keys_values) for a in alike}

    def _add_time(
        self, first: nn.Module, resnets: list[Any], plain: Mapping[nn.Module, object]
    ) -> None:
        """One stack of time projections for all residual blocks of a width.

        first: the UNet's first block, which gets the time embedding as all others do.
        """
        adapted = [r for r in resnets if _alike([r.time_emb_proj], plain)]
        frozen = [r for r in resnets if is_plain_linear(r.time_emb_proj)]
        for alike in _by(adapted, lambda r: _form(r.time_emb_proj)):
            (stack,) = self._stacked([[r.time_emb_proj for r in alike]])
            self.shared.of_time.append((stack, alike))
        for alike in _by(frozen, lambda r: r.time_emb_proj.weight.shape):
            stack = FrozenStack([r.time_emb_proj for r in alike])
            self.shared.of_time.append((stack, alike))
        self.forwards |= {r: _resnet(r, self.shared.times) for r in (*adapted, *frozen)}
        # outside of every block whose activations are computed again
        self.forwards[first] = _first_block(first, self.shared)


def _form(linear: AdaptedLinear) -> tuple[object, ...]:
    """What linears of a stack have in common."""
    return linear.delta.shape, linear.delta.rank, linear.base.bias is None


def _alike(linears: list[Any], plain: Mapping[nn.Module, object]) -> bool:
    return all(linear in plain for linear in linears) and len({*map(_form, linears)}) == 1


def _by(modules: Iterable[Any], form: Callable[[Any], object]) -> list[list[Any]]:
    """Modules grouped by form, in order."""
    groups: dict[object, list[Any]] = {}
    for module in modules:
        groups.setdefault(form(module), []).append(module)
    return list(groups.values())


def _is_usual_attention(module: Any) -> bool:
    return (
        type(module) is Attention
        and type(module.processor) is AttnProcessor2_0
        and not is_hooked(module)
        and all(
            getattr(module, name, None) is None
            for name in ("spatial_norm", "group_norm", "norm_q", "norm_k", "norm_cross")
        )
        and not module.residual_connection
        and module.rescale_output_factor == 1
        and module.to_out[1].p == 0
        and module.to_k is not None
        and module.to_k.out_features == module.to_q.out_features
    )


def _self_attention(attention: Any, stack: Stack) -> Forward:
    heads, to_out, general = attention.heads, attention.to_out[0], type(attention).forward

    def forward(
        hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None, **more: Any,
    ) -> Tensor:  # fmt: skip
        if attention_mask is not None or encoder_hidden_states is not None:
            return general(attention, hidden_states, encoder_hidden_states, attention_mask, **more)
        return to_out(_attend(heads, *stack(hidden_states)))

    return forward


def _cross_attention(
    attention: Any, keys_values: Mapping[nn.Module, tuple[Tensor, ...]]
) -> Forward:
    heads, to_q, to_out = attention.heads, attention.to_q, attention.to_out[0]
    general = type(attention).forward

    def forward(
        hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None, **more: Any,
    ) -> Tensor:  # fmt: skip
        if attention_mask is not None:
            return general(attention, hidden_states, encoder_hidden_states, attention_mask, **more)
        return to_out(_attend(heads, to_q(hidden_states), *keys_values[attention]))

    return forward


def _attend(heads: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of (B, tokens, width)."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _is_usual_resnet(module: Any) -> bool:
    return (
        type(module) is ResnetBlock2D
        and not is_hooked(module)
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
        type(norm) is nn.GroupNorm
        and not is_hooked(norm)
        and norm.affine
        and not any(p.requires_grad for p in norm.parameters())
    )


def _norm_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    return NormSilu.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps)


def _resnet(block: Any, times: Mapping[nn.Module, Tensor]) -> Forward:
    norm1, conv1, norm2, conv2 = block.norm1, block.conv1, block.norm2, block.conv2
    shortcut = block.conv_shortcut

    def forward(input_tensor: Tensor, temb: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        h = conv1(_norm_silu(norm1, input_tensor)).add_(times[block])
        h = conv2(_norm_silu(norm2, h))
        return h.add_(input_tensor if shortcut is None else shortcut(input_tensor))

    return forward


def _first_block(block: Any, shared: Shared) -> Forward:
    general = type(block).forward

    def forward(hidden_states: Tensor, temb: Tensor, *args: Any, **kwargs: Any) -> Any:
        shared.read_time(temb)
        return general(block, hidden_states, temb, *args, **kwargs)

    return forward


def _geglu(module: Any) -> Forward:
    return lambda hidden_states: Geglu.apply(module.proj(hidden_states))
