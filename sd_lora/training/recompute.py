"""Activations that are computed again in the backward pass: of all blocks of a model, or of some.

A block is the least part whose activations a model of diffusers or transformers can compute again:
a residual block or a transformer block of the UNet, a layer of a text encoder.
"""

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from sd_lora.config.schema import RunConfig
from sd_lora.files import size_text


@dataclass(frozen=True)
class Recomputed:
    """The blocks whose activations are computed again.

    number: of blocks that there are. share: of a step's operations that are done twice. peak: bytes
    of a step by count, with all that is held beside it. budget: bytes.
    """

    blocks: frozenset[str]
    number: int
    share: float
    peak: int
    budget: int

    @property
    def text(self) -> str:
        """In words: "7.6 of 8.0 GiB by count, 12 of 38 blocks recomputed (+9 % operations)"."""
        chosen = f"{len(self.blocks)} of {self.number} blocks recomputed"
        more = f" (+{self.share:.0%} operations)" * bool(self.blocks)
        peak, budget = size_text(self.peak), size_text(self.budget)
        return f"a step takes {peak} of {budget} by count, {chosen}{more}"


def without_budget(config: RunConfig, checkpointing: bool = False) -> RunConfig:
    """A run's configuration without its budget, whose blocks are given beside it.

    checkpointing: whether all are computed again.
    """
    config = config.replace(memory_budget=None)
    return config.replace(gradient_checkpointing=True) if checkpointing else config


CHECKPOINTING = (
    "enable_gradient_checkpointing",
    "activation_checkpointing_enable",
    "gradient_checkpointing_enable",
)
"""Methods that enable it: of diffusers, of transformers, of older transformers."""

Call = Callable[..., Any]


class All(Container[str]):
    """The names of all blocks."""

    def __contains__(self, name: object) -> bool:
        return True


def _plain(name: str, call: Call) -> Call:
    return call


def enable_checkpointing(
    models: Mapping[str, nn.Module], blocks: Container[str] | None = None, seen: Call = _plain
) -> None:
    """Compute activations again in the backward pass from now on.

    Args:
        models: component → model, not wrapped.
        blocks: names of their blocks, "unet/down_blocks.0.resnets.0"; None: all.
        seen: function of a block's name and its computation that returns what is computed in its
            place, for counting.
    """
    blocks = All() if blocks is None else blocks
    for component, model in models.items():
        method = getattr(model, next(name for name in CHECKPOINTING if hasattr(model, name)))
        names = {module: f"{component}/{name}" for name, module in model.named_modules()}
        layers = [m for m in names if isinstance(m, GradientCheckpointingLayer)]
        if not layers:  # of diffusers, which gives its function the block
            method(lambda block, *args, of=names: _go(of[block], blocks, seen, block, *args))
            continue
        method()
        for layer in layers:  # of transformers, whose function gets the layer's computation
            of_layer: Any = layer
            of_layer.gradient_checkpointing = names[layer] in blocks
            of_layer._gradient_checkpointing_func = partial(_go, names[layer], blocks, seen)


def _go(name: str, blocks: Container[str], seen: Call, call: Call, *args: Any) -> Any:
    """Compute a block, and compute it again in the backward pass if it is one of these."""
    if name not in blocks:
        return call(*args)
    # a CUDA graph has no dropout, and may not ask for the generator's state while it is recorded
    draws = not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
    return checkpoint(seen(name, call), *args, use_reentrant=False, preserve_rng_state=draws)
