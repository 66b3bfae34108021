"""Layers of one base with the deltas of several models, each for its own items of a batch.

W x is computed once for all items; each model's B(A x) is added to its own. Chen et al. 2023,
"Punica", and Ye et al. 2023, "mLoRA", do so for language models.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from sd_lora.adapters.inject import adapted_layers, replace_module
from sd_lora.adapters.linear_conv import AdaptedAffine


@dataclass
class Routes:
    """The division of a batch: its first `counts[0]` items are the first model's, and so on. It
    changes from pass to pass, and a model may have none."""

    counts: tuple[int, ...]

    def rows(self, number: int) -> list[slice]:
        """The rows of each model among `number` rows of a tensor that has as many of each item."""
        ends = accumulate(self.counts, initial=0)
        of_each = number // max(1, sum(self.counts))
        return [slice(start * of_each, end * of_each) for start, end in pairwise(ends)]


class RoutedLayer(nn.Module):
    """A frozen layer with plain LoRA of several models: h = W x + s·B(A x) with each item's own B,
    A and s.

    Args:
        base: the layer; its parameters may be those of the models' own layers.
        layers: the adapted layer of each model, whose factors are read in each pass; None of a
            model that leaves this layer as it is.
        routes: of the batch.
    """

    def __init__(
        self, base: nn.Module, layers: Sequence[AdaptedAffine | None], routes: Routes
    ) -> None:
        super().__init__()
        self.base, self.routes = base, routes
        self.layers = tuple(layers)  # no submodules: they belong to their models

    def forward(self, input: Tensor) -> Tensor:
        y = self.base(input)
        parts = []
        for rows, layer in zip(self.routes.rows(len(y)), self.layers, strict=True):
            part = y[rows]
            factors = layer._low_rank_factors() if layer is not None and len(part) else None
            if factors is not None and layer is not None:
                scale = layer.delta.scale
                part = part + layer._low_rank_product(input[rows], *factors, scale)
            parts.append(part)
        return torch.cat(parts)


def route(model: nn.Module, models: Sequence[nn.Module], routes: Routes) -> dict[str, RoutedLayer]:
    """Replace layers of a model by routed ones of other, adapted models of its architecture.

    Args:
        model: the base, without adapters.
        models: those whose deltas it computes.
        routes: of the batches that go through it.

    Returns:
        Name of a module → its layer.
    """
    found: dict[str, list[Any]] = {}
    for place, adapted in enumerate(models):
        for name, layer in adapted_layers(adapted).items():
            found.setdefault(name, [None] * len(models))[place] = layer
    routed = {
        name: RoutedLayer(model.get_submodule(name), layers, routes)
        for name, layers in found.items()
    }
    for name, own in routed.items():
        replace_module(model, name, own)
    return routed
