"""The relative size of a LoRA's changes, part by part."""

import math
from collections.abc import Mapping

import torch
from torch import nn

from sd_lora.adapters.inject import adapted_layers
from sd_lora.formats.canonical import canonical_name
from sd_lora.formats.inspect import block_of, num_layers, order_of


@torch.no_grad()
def changes_of(models: Mapping[str, nn.Module]) -> dict[str, dict[str, float]]:
    """Component → part → ‖ΔW‖ / ‖W‖, Frobenius norms over the adapted weights of the part.

    models: component → injected model.
    """
    found: dict[str, dict[str, float]] = {}
    for component, model in models.items():
        squares: dict[str, tuple[float, float]] = {}
        layers = adapted_layers(model)
        names = {name: canonical_name(component, name) for name in layers}
        count = num_layers(names.values())
        for name, layer in layers.items():
            part = block_of(component, names[name], count)
            for path, delta in layer.deltas_by_path().items():
                W = layer.weight_of(layer.base, path).to(next(delta.parameters()).device).float()
                own = delta.change(W).norm() if delta.of_base else delta.norm()
                change, base = squares.get(part, (0.0, 0.0))
                squares[part] = change + float(own) ** 2, base + float(W.norm()) ** 2
        found[component] = {
            part: math.sqrt(change / base) if base else 0.0
            for part, (change, base) in sorted(squares.items(), key=lambda item: order_of(item[0]))
        }
    return found
