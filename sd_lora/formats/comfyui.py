"""DoRA as ComfyUI and Forge compute it: LyCORIS' keys, with magnitudes for their own norm.

Of a magnitude m an output, DoRA makes W' = m · (W + ΔW) / ‖W + ΔW‖, and ComfyUI (`weight_decompose`
of comfy/weight_adapter/base.py, for all methods with factors; Forge has the same function)
m · (W + ΔW) / (‖W‖ + ε). So a file with m · (‖W‖ + ε) / ‖W + ΔW‖ is exact there, at every strength,
on the base that W is of. All other readers would take these numbers for m. A magnitude an input has
the right norm there, and stays.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from sd_lora.adapters.deltas import Delta
from sd_lora.adapters.inject import adapted_layers, delta_name
from sd_lora.adapters.merging import unmerged
from sd_lora.adapters.state import make_delta
from sd_lora.errors import UsageError
from sd_lora.formats.canonical import Adapter, Lazy, Modules, canonical_name, each

MARK = {"sd_lora_dora": "ComfyUI"}
"""Header of a file whose magnitudes are for ComfyUI."""

STRENGTH_OF_OFT = (
    "ComfyUI applies the strength of OFT twice, so that 0.5 there is 0.25; Forge does not know OFT"
)
"""Of every file of this method, at other strengths than 1."""

_EPSILON = torch.finfo(torch.float32).eps

Weights = Callable[[str, str], Tensor]
"""Component and canonical delta name → W."""


def is_decomposed(adapter: Adapter) -> bool:
    """Whether any delta has a magnitude."""
    return any(delta.magnitude is not None for _, _, delta in each(adapter))


def weights_of(models: Mapping[str, nn.Module]) -> Weights:
    """The frozen weights of injected models."""
    layers = {
        (component, canonical_name(component, delta_name(name, path))): (layer, path)
        for component, model in models.items()
        for name, layer in adapted_layers(model).items()
        for path in layer.deltas_by_path()
    }

    def weight(component: str, name: str) -> Tensor:
        layer, path = layers[component, name]
        with unmerged(layer):
            return layer.weight_of(layer.base, path).to("cpu", copy=True)

    return weight


def rescaled(adapter: Adapter, weight: Weights | None) -> Adapter:
    """An adapter with ComfyUI's magnitudes, each delta made at its access.

    weight: W of the base; None raises UsageError.
    """
    if weight is None:
        raise UsageError(
            "ComfyUI's magnitudes depend on the weights of the base: give its folder or checkpoint "
            "as --model"
        )
    return {c: Lazy(ms, partial(_rescaled, c, ms, weight)) for c, ms in adapter.items()}


@torch.no_grad()
def _rescaled(component: str, modules: Modules, weight: Weights, name: str) -> Delta:
    delta = copy.deepcopy(modules[name])
    if delta.magnitude is None:
        return delta
    W = weight(component, name).float()
    try:
        delta.fit(tuple(W.shape))
    except ValueError as error:
        raise UsageError(f"{component} {name} does not fit the base: {error}") from None
    if delta.method == "full":  # it has no magnitude in ComfyUI
        return make_delta(f"{component} {name}", {"diff": delta.compose(W) - W})
    if delta.magnitude.shape[0] == len(W):
        norms = [V.flatten(1).norm(dim=1) for V in (W, W + delta.change(W))]
        tiny = torch.finfo(torch.float32).tiny
        ratio = (norms[0] + _EPSILON) / norms[1].clamp(min=tiny)
        delta.magnitude.mul_(ratio.view(delta.magnitude.shape))
    return delta


def losses_of_oft(
    places: Mapping[tuple[str, str], Mapping[str, str]], file: Mapping[str, Tensor]
) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Losses of OFT in ComfyUI (comfy/weight_adapter/oft.py): it passes over the factors of
    outputs, and bounds ‖Q‖ by alpha, where others take alpha times the outputs.

    places: component and name → kind of tensor → key.
    """
    rescaled = [p for p, kinds in places.items() if "oft_blocks" in kinds and "rescale" in kinds]
    yield "passes over {n} factors of outputs (rescale)", rescaled
    bounded = []
    for place, kinds in places.items():
        if "oft_blocks" in kinds and "alpha" in kinds:
            blocks, alpha = file[kinds["oft_blocks"]].float(), float(file[kinds["alpha"]])
            if blocks.dim() > 2 and 0 < alpha < float((blocks - blocks.mT).norm()):
                bounded.append(place)
    yield "bounds {n} rotations otherwise", bounded
