"""Forward passes of diffusers' attention, feed-forward and transformer blocks of Stable Diffusion,
without the settings that it leaves at their defaults.

diffusers looks at each of them in every call; a division by 1 and an added 0 are kernels of full
size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_2d import Transformer2DModelOutput
from torch import Tensor, nn

from sd_lora.adapters.fast.copies import Stack
from sd_lora.adapters.fast.layers import Forward
from sd_lora.adapters.fast.products import Geglu
from sd_lora.adapters.fast.routed import RoutedStack

Project = Callable[[Tensor], Tensor]


def self_attention(attention: Any, stack: Stack | RoutedStack) -> Forward:
    """Attention of the input, by one product for query, key and value."""
    heads, to_out, general = attention.heads, attention.to_out[0], type(attention).forward

    def forward(
        hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None, **more: Any,
    ) -> Tensor:  # fmt: skip
        if attention_mask is not None or encoder_hidden_states is not None:
            return general(attention, hidden_states, encoder_hidden_states, attention_mask, **more)
        return to_out(_attend(heads, *stack(hidden_states)))

    return forward


def cross_attention(
    attention: Any, keys_values: Callable[[Any, nn.Module], tuple[Tensor, ...]]
) -> Forward:
    """Attention of the text, whose keys and values are there already. keys_values: of a text, for
    an attention."""
    heads, to_q, to_out = attention.heads, attention.to_q, attention.to_out[0]
    general = type(attention).forward

    def forward(
        hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None, **more: Any,
    ) -> Tensor:  # fmt: skip
        if attention_mask is not None:
            return general(attention, hidden_states, encoder_hidden_states, attention_mask, **more)
        known = keys_values(encoder_hidden_states, attention)
        return to_out(_attend(heads, to_q(hidden_states), *known))

    return forward


def _attend(heads: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of (B, tokens, width)."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def geglu(module: Any) -> Forward:
    """a·gelu(b) of the projection (a, b)."""
    return lambda hidden_states: Geglu.apply(module.proj(hidden_states))


def transformer_block(block: Any) -> Forward:
    """Attention of the input, of the text, and the feed-forward layers, each added to its input."""
    norm1, norm2, norm3 = block.norm1, block.norm2, block.norm3
    attn1, attn2 = block.attn1, block.attn2
    widen, _, narrow = block.ff.net

    def forward(
        hidden_states: Tensor, attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None, encoder_attention_mask: Tensor | None = None,
        *_: object, **__: object,
    ) -> Tensor:  # fmt: skip
        h = hidden_states
        h = attn1(norm1(h), None, attention_mask) + h
        h = attn2(norm2(h), encoder_hidden_states, encoder_attention_mask) + h
        return narrow(widen(norm3(h))) + h

    return forward


@dataclass(eq=False)
class BlockParts:
    """The layers of a transformer block, as functions of tokens (B, tokens, width), and its heads.

    qkv: query, key and value of the input. query: of the input, for the text. widen: a and b of
    GEGLU.
    """

    norm1: nn.Module
    qkv: Stack | RoutedStack
    out1: Project
    norm2: nn.Module
    query: Project
    out2: Project
    norm3: nn.Module
    widen: Project
    narrow: Project
    heads1: int
    heads2: int


Pass = Callable[[BlockParts, Tensor, Tensor, Tensor], Tensor]


def block_pass(parts: BlockParts, h: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Output of a transformer block for tokens (B, tokens, width) and the text's keys and values
    (B, text tokens, width).

    Of the parts alone, so that a compiler makes one program for all blocks of a width.
    """
    h = parts.out1(_attend(parts.heads1, *parts.qkv(parts.norm1(h)))) + h
    h = parts.out2(_attend(parts.heads2, parts.query(parts.norm2(h)), key, value)) + h
    return parts.narrow(Geglu.apply(parts.widen(parts.norm3(h)))) + h


@dataclass
class Way:
    """How a model's transformer blocks compute. compute: `block_pass`, or a compiled one. blocks:
    number of those that do."""

    compute: Pass = block_pass
    blocks: int = 0


def whole_block(
    block: Any, parts: BlockParts, general: Forward,
    keys_values: Callable[[Any, nn.Module], tuple[Tensor, ...]], way: Way,
) -> Forward:  # fmt: skip
    """A transformer block as one function of its parts. general: where attention has masks."""
    attn2 = block.attn2

    def forward(
        hidden_states: Tensor, attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None, encoder_attention_mask: Tensor | None = None,
        *_: object, **__: object,
    ) -> Tensor:  # fmt: skip
        if attention_mask is not None or encoder_attention_mask is not None:
            return general(
                hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask
            )
        key, value = keys_values(encoder_hidden_states, attn2)
        return way.compute(parts, hidden_states, key, value)

    return forward


def transformer(model: Any, project_in: Project, project_out: Project) -> Forward:
    """Norm, projection to tokens, blocks, projection back, added to the input.

    project_in, project_out: of tokens (B, H·W, width), 1×1 convolutions too.
    """
    norm, blocks, general = model.norm, list(model.transformer_blocks), type(model).forward

    def forward(
        hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None, encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True, **more: Any,
    ) -> Any:  # fmt: skip
        if attention_mask is not None or encoder_attention_mask is not None:
            return general(
                model, hidden_states, encoder_hidden_states, attention_mask=attention_mask,
                encoder_attention_mask=encoder_attention_mask, return_dict=return_dict, **more,
            )  # fmt: skip
        h = project_in(norm(hidden_states).flatten(2).transpose(1, 2))
        for block in blocks:
            if model.gradient_checkpointing and torch.is_grad_enabled():
                h = model._gradient_checkpointing_func(block, h, None, encoder_hidden_states)
            else:
                h = block(h, None, encoder_hidden_states)
        out = hidden_states + project_out(h).transpose(1, 2).view(hidden_states.shape)
        return Transformer2DModelOutput(sample=out) if return_dict else (out,)

    return forward
