"""kohya's module names: a prefix for the component, and underscores for dots."""

from collections.abc import Iterable, Mapping

PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te", "": "lycoris"}
"""Component → prefix, for SD1 and SD2; LyCORIS' own for a model by itself."""


def kohya_name(component: str, name: str) -> str:
    """Returns `lora_unet_down_blocks_0_…` for a canonical module name."""
    return f"{PREFIXES[component]}_{name.replace('.', '_')}"


def from_kohya(component_names: Mapping[str, Iterable[str]]) -> dict[str, tuple[str, str]]:
    """Returns kohya name → (component, canonical name).

    Underscores do not say which of them were dots (`to_q`, `mid_block`), so the way back needs
    the model's own names.
    """
    return {
        kohya_name(component, name): (component, name)
        for component, names in component_names.items()
        for name in names
    }
