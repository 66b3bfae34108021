"""kohya's module names: a prefix for the component, and underscores for dots."""

from collections.abc import Container, Iterable, Mapping

from sd_lora.errors import UsageError

PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te", "": "lycoris"}
"""Component → prefix, for SD1 and SD2; LyCORIS' own for a model by itself."""


def kohya_name(component: str, name: str) -> str:
    """Returns `lora_unet_down_blocks_0_…` for a canonical module name."""
    return f"{PREFIXES[component]}_{name.replace('.', '_')}"


def from_kohya(
    component_names: Mapping[str, Iterable[str]], used: Container[str]
) -> dict[str, tuple[str, str]]:
    """Returns kohya name → (component, canonical name).

    Underscores do not say which of them were dots (`to_q`, `mid_block`), so the way back needs
    the model's own names.

    Raises:
        UsageError: one of the names `used` in a file that means two modules of the model.
    """
    names: dict[str, tuple[str, str]] = {}
    for component, live in component_names.items():
        for name in live:
            key = kohya_name(component, name)
            if key in names and key in used:
                raise UsageError(f"{key} in the file is both {names[key][1]} and {name}")
            names[key] = (component, name)
    return names
