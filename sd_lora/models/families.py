"""The families of Stable Diffusion, as rows of a table: what they are called, and by whom."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from sd_lora.errors import UsageError


@dataclass(frozen=True)
class Family:
    """One family.

    name, label: in code and metadata, and for people. cross_attention_dim: width of the text that
    its UNet attends to, by which its files are known. kohya_prefixes: component → what kohya's keys
    start with. original_names: whether kohya's files call the UNet's modules as the original code
    does (`input_blocks_4_1`) and not as diffusers does. base_versions, architectures: prediction
    type → kohya's and Stability's words for it. trainable: whether this project trains it today.
    """

    name: str
    label: str
    pipeline: str
    cross_attention_dim: int
    kohya_prefixes: Mapping[str, str]
    original_names: bool
    base_versions: Mapping[str, str] = field(default_factory=dict)
    architectures: Mapping[str, str] = field(default_factory=dict)
    trainable: bool = True

    @property
    def components(self) -> tuple[str, ...]:
        """What a LoRA may adapt: "unet", "text_encoder", …"""
        return tuple(self.kohya_prefixes)


_ONE_ENCODER = {"unet": "lora_unet", "text_encoder": "lora_te"}
_TWO_ENCODERS = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}

FAMILIES = {
    "sd1": Family(
        name="sd1",
        label="Stable Diffusion 1.x",
        pipeline="StableDiffusionPipeline",
        cross_attention_dim=768,
        kohya_prefixes=_ONE_ENCODER,
        original_names=False,
        base_versions={"epsilon": "sd_v1", "v_prediction": "sd_v1_v"},
        architectures={
            "epsilon": "stable-diffusion-v1",
            "v_prediction": "stable-diffusion-v1",
        },
    ),
    "sd2": Family(
        name="sd2",
        label="Stable Diffusion 2.x",
        pipeline="StableDiffusionPipeline",
        cross_attention_dim=1024,
        kohya_prefixes=_ONE_ENCODER,
        original_names=False,
        base_versions={"epsilon": "sd_v2", "v_prediction": "sd_v2_v"},
        architectures={
            "epsilon": "stable-diffusion-v2-512",
            "v_prediction": "stable-diffusion-v2-768-v",
        },
    ),
    "sdxl": Family(
        name="sdxl",
        label="Stable Diffusion XL",
        pipeline="StableDiffusionXLPipeline",
        cross_attention_dim=2048,
        kohya_prefixes=_TWO_ENCODERS,
        original_names=True,
        base_versions={"epsilon": "sdxl_base_v1-0", "v_prediction": "sdxl_base_v1-0"},
        architectures={
            "epsilon": "stable-diffusion-xl-v1-base",
            "v_prediction": "stable-diffusion-xl-v1-base",
        },
        trainable=False,
    ),
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


def family_named(name: str) -> Family:
    """Returns a family, or raises UsageError naming those there are."""
    if name not in FAMILIES:
        raise UsageError(f"unknown family {name!r}; families: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def refuse_other_pipelines(class_name: str) -> None:
    """Raises UsageError, naming what it is, for a pipeline class that cannot be trained."""
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

    SDXL's UNet takes added conditions; SD2's is SD1's with linear projections around its attention
    (and a head count a level).

    Raises:
        UsageError: other added conditions, or input channels of an inpainting or other model.
    """
    added = unet_config.get("addition_embed_type")
    if added not in (None, "text_time"):
        raise UsageError(f"this UNet takes added conditions (addition_embed_type = {added!r})")
    channels = unet_config.get("in_channels")
    if channels != unet_config.get("out_channels"):
        kind = {9: "an inpainting", 8: "an InstructPix2Pix", 5: "a depth"}.get(channels)  # type: ignore[call-overload]
        raise UsageError(
            f"this is {kind or 'a'} UNet with {channels} input channels; today text-to-image UNets "
            "can be adapted"
        )
    if added:
        return FAMILIES["sdxl"]
    return FAMILIES["sd2" if unet_config.get("use_linear_projection") else "sd1"]


def trainable_family(unet_config: Mapping[str, object]) -> Family:
    """Returns the family of a UNet's configuration, or raises UsageError if it is not trained."""
    family = detect(unet_config)
    if not family.trainable:
        raise UsageError(
            "this UNet takes added conditions (addition_embed_type = "
            f"{unet_config['addition_embed_type']!r}), as {family.label}'s; today SD 1.x and 2.x "
            "can be trained"
        )
    return family
