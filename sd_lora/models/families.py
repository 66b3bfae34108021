"""The families of Stable Diffusion that can be trained, as rows of a table."""

from collections.abc import Mapping
from dataclasses import dataclass

from sd_lora.errors import UsageError


@dataclass(frozen=True)
class Family:
    """One family: its name in code and metadata, and its name for people."""

    name: str
    label: str


FAMILIES = {
    "sd1": Family("sd1", "Stable Diffusion 1.x"),
    "sd2": Family("sd2", "Stable Diffusion 2.x"),
}

# _class_name in model_index.json → what it is, for an error that says so
_KNOWN_OTHERS = {
    "StableDiffusionXL": "Stable Diffusion XL",
    "StableDiffusion3": "Stable Diffusion 3",
    "Flux": "Flux",
    "PixArt": "PixArt",
    "KolorsPipeline": "Kolors",
    "Kandinsky": "Kandinsky",
    "StableCascade": "Stable Cascade",
    "IFPipeline": "DeepFloyd IF",
}


def refuse_other_pipelines(class_name: str) -> None:
    """Raises UsageError, naming what it is, for a pipeline class that is not SD1 or SD2."""
    for prefix, label in _KNOWN_OTHERS.items():
        if class_name.startswith(prefix):
            raise UsageError(
                f"this is a {label} model ({class_name}); today SD 1.x and 2.x can be trained"
            )
    if class_name != "StableDiffusionPipeline":
        raise UsageError(
            f"model_index.json says {class_name!r}; today StableDiffusionPipeline folders of "
            "SD 1.x and 2.x can be trained"
        )


def detect(unet_config: Mapping[str, object]) -> Family:
    """Returns the family of a UNet's configuration.

    SD2's UNet is SD1's with linear projections around its attention (and a head count a level).

    Raises:
        UsageError: added conditions (SDXL), or input channels of an inpainting or other model.
    """
    if unet_config.get("addition_embed_type") is not None:
        raise UsageError(
            "this UNet takes added conditions (addition_embed_type = "
            f"{unet_config['addition_embed_type']!r}), as Stable Diffusion XL's; today SD 1.x and "
            "2.x can be trained"
        )
    channels = unet_config.get("in_channels")
    if channels != unet_config.get("out_channels"):
        kind = {9: "an inpainting", 8: "an InstructPix2Pix", 5: "a depth"}.get(channels)  # type: ignore[call-overload]
        raise UsageError(
            f"this is {kind or 'a'} UNet with {channels} input channels; today text-to-image UNets "
            "of SD 1.x and 2.x can be trained"
        )
    return FAMILIES["sd2" if unet_config.get("use_linear_projection") else "sd1"]
