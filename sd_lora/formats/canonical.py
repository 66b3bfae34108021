"""The one form in the middle: component → canonical module name → the factors of its update.

Formats read into it and write from it; nothing else knows a file's key names. Canonical names are
diffusers' and transformers' own, with one rule added: a text encoder's always start with
`text_model.`, which transformers 5 left out of CLIPTextModel and kept in
CLIPTextModelWithProjection. Files with that level load in every tool; files without do not.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sd_lora.adapters.inject import adapted_layers
from sd_lora.errors import RunError, UsageError


@dataclass(frozen=True)
class Factors:
    """One module's update ΔW = (alpha/rank)·B·A, unfolded.

    A: (rank, in…), B: (out, rank, 1…), both as the layer holds them.
    """

    A: Tensor
    B: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def delta(self) -> Tensor:
        """Returns ΔW flattened to (out, in·k…), in float64 so that comparing adds no error."""
        return self.scale * self.B.double().flatten(1) @ self.A.double().flatten(1)


Adapter = dict[str, dict[str, Factors]]
"""Component ("unet", "text_encoder") → canonical module name → factors."""


def canonical_name(component: str, name: str) -> str:
    """Returns the canonical form of a live module's name."""
    if component.startswith("text_encoder") and not name.startswith(("text_model.", "text_proj")):
        return f"text_model.{name}"
    return name


def live_names(component: str, model: nn.Module) -> dict[str, str]:
    """Returns canonical name → live name of every module of `model`."""
    return {canonical_name(component, name): name for name, _ in model.named_modules() if name}


def read_models(models: Mapping[str, nn.Module]) -> Adapter:
    """Returns the adapter that the injected `models` (component → model) hold, on the CPU.

    Raises:
        UsageError: none of the models has an adapter.
    """
    adapter: Adapter = {}
    for component, model in models.items():
        layers = adapted_layers(model)
        if layers:
            adapter[component] = {
                canonical_name(component, name): Factors(
                    layer.lora_A.detach().cpu().clone(),
                    layer.lora_B.detach().cpu().clone(),
                    float(layer.alpha),
                )
                for name, layer in layers.items()
            }
    if not adapter:
        raise UsageError(f"no adapter in {', '.join(models)}: call sd_lora.inject first")
    return adapter


def check_finite(adapter: Adapter) -> None:
    """Raises RunError naming the first module whose factors hold a NaN or an infinity."""
    for component, modules in adapter.items():
        for name, f in modules.items():
            if not (torch.isfinite(f.A).all() and torch.isfinite(f.B).all()):
                raise RunError(f"{component} {name} holds NaN or infinite values; not written")
