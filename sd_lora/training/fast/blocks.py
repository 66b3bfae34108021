"""Forward passes of diffusers' attention, feed-forward and transformer blocks of Stable Diffusion,
without the settings that it leaves at their defaults.

diffusers looks at each of them in every call; a division by 1 and an added 0 are kernels of full
size.
"""

from collections.abc import Callable, Mapping
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
    attention: Any, keys_values: Mapping[tuple[int, nn.Module], tuple[Tensor, ...]]
) -> Forward:
    """Attention of the text, whose keys and values are there already."""
    heads, to_q, to_out = attention.heads, attention.to_q, attention.to_out[0]
    general = type(attention).forward

    def forward(
        hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None, **more: Any,
    ) -> Tensor:  # fmt: skip
        if attention_mask is not None:
            return general(attention, hidden_states, encoder_hidden_states, attention_mask, **more)
        known = keys_values[id(encoder_hidden_states), attention]
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
