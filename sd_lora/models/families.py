"""The families of Stable Diffusion, one row each: components, names, noise, conditions."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sd_lora.errors import UsageError

SHORT_PREDICTIONS = {
    "epsilon": "epsilon", "v_prediction": "v", "sample": "sample", "flow_prediction": "flow",
}  # fmt: skip
"""Prediction type → its name in a LoRA file's header (ModelSpec knows the first two)."""

_BY_BETAS = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class Task:
    """The purpose of a UNet, known by its input channels beyond the latents' own.

    name: in code and metadata.
    label: for people.
    refused: reason why no training is possible here; "" otherwise.
    """

    name: str
    label: str
    refused: str = ""


TEXT_TO_IMAGE = Task("text_to_image", "text to image")
INPAINTING = Task("inpainting", "inpainting")
_PAIRS = "its training needs pairs of images, which no data source here has"
TASKS: dict[int | None, Task] = {
    0: TEXT_TO_IMAGE,
    5: INPAINTING,  # a mask, and the latents of the image outside it
    4: Task("instruct_pix2pix", "InstructPix2Pix", _PAIRS),
    1: Task("depth", "depth to image", "its training needs depth maps, which are not made here"),
    3: Task("upscaling", "upscaling", "its training needs small images and a noise level"),
}


_NOISE_SCHEDULE = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
}


@dataclass(frozen=True)
class Family:
    """One family.

    name: in code and metadata.
    label: for people.
    pipelines: task → diffusers' class.
    cross_attention_dim: width of the text for its UNet, by which its LoRA files are known.
    kohya_prefixes: component → beginning of kohya's keys.
    original_names: whether kohya's files call the UNet's modules as the original code does
        (`input_blocks_4_1`) and not as diffusers does.
    text_encoders: components, in the order in which their outputs are joined.
    denoiser: component that predicts the noise.
    noise_schedule: "_class_name" of its scheduler and arguments for the class. Training draws a
        timestep from 0 to num_train_timesteps - 1, and the denoiser is told this number.
    max_timestep: the family was trained on timesteps below this one; None: on all.
    base_versions: prediction type → kohya's name of the base.
    architectures: prediction type → Stability's name of the architecture (ModelSpec).
    penultimate: whether the text encoders' last hidden state but one is read, without final norm.
    time_ids: numbers about an image for the UNet, beside the pooled text: "original_size", "crop",
        "target_size" (two each), "aesthetic_score".
    """

    name: str
    label: str
    pipelines: Mapping[str, str]
    cross_attention_dim: int
    kohya_prefixes: Mapping[str, str]
    original_names: bool
    text_encoders: tuple[str, ...] = ("text_encoder",)
    denoiser: str = "unet"
    noise_schedule: Mapping[str, Any] = field(default_factory=lambda: _NOISE_SCHEDULE)
    max_timestep: int | None = None
    base_versions: Mapping[str, str] = field(default_factory=dict)
    architectures: Mapping[str, str] = field(default_factory=dict)
    penultimate: bool = False
    time_ids: tuple[str, ...] = ()

    @property
    def vae_scaling(self) -> float:
        """Factor on its VAE's latents: `scaling_factor`."""
        return 0.13025 if self.is_xl else 0.18215

    @property
    def components(self) -> tuple[str, ...]:
        """Components for a LoRA to adapt: "unet", "text_encoder", …"""
        return (self.denoiser, *self.text_encoders)

    @property
    def is_xl(self) -> bool:
        """Whether its UNet takes pooled text and time ids: SDXL and its refiner."""
        return bool(self.time_ids)


_ONE_ENCODER = {"unet": "lora_unet", "text_encoder": "lora_te"}
_TWO_ENCODERS = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
_SECOND_ENCODER = {"unet": "lora_unet", "text_encoder_2": "lora_te"}  # ComfyUI's, for an only one
_PIPELINES = {
    "text_to_image": "StableDiffusionPipeline",
    "inpainting": "StableDiffusionInpaintPipeline",
}
_XL_PIPELINES = {
    "text_to_image": "StableDiffusionXLPipeline",
    "inpainting": "StableDiffusionXLInpaintPipeline",
}

FAMILIES = {
    "sd1": Family(
        name="sd1",
        label="Stable Diffusion 1.x",
        pipelines=_PIPELINES,
        cross_attention_dim=768,
        kohya_prefixes=_ONE_ENCODER,
        original_names=False,
        base_versions={"epsilon": "sd_v1", "v_prediction": "sd_v1_v", "sample": "sd_v1"},
        architectures={
            "epsilon": "stable-diffusion-v1",
            "v_prediction": "stable-diffusion-v1",
            "sample": "stable-diffusion-v1",
        },
    ),
    "sd2": Family(
        name="sd2",
        label="Stable Diffusion 2.x",
        pipelines=_PIPELINES,
        cross_attention_dim=1024,
        kohya_prefixes=_ONE_ENCODER,
        original_names=False,
        base_versions={"epsilon": "sd_v2", "v_prediction": "sd_v2_v", "sample": "sd_v2"},
        architectures={
            "epsilon": "stable-diffusion-v2-512",
            "v_prediction": "stable-diffusion-v2-768-v",
            "sample": "stable-diffusion-v2-512",
        },
    ),
    "sdxl": Family(
        name="sdxl",
        label="Stable Diffusion XL",
        pipelines=_XL_PIPELINES,
        cross_attention_dim=2048,
        kohya_prefixes=_TWO_ENCODERS,
        original_names=True,
        text_encoders=("text_encoder", "text_encoder_2"),
        base_versions=dict.fromkeys(SHORT_PREDICTIONS, "sdxl_base_v1-0"),
        architectures=dict.fromkeys(SHORT_PREDICTIONS, "stable-diffusion-xl-v1-base"),
        penultimate=True,
        time_ids=("original_size", "crop", "target_size"),
    ),
    "sdxl_refiner": Family(
        name="sdxl_refiner",
        label="Stable Diffusion XL refiner",
        pipelines={"text_to_image": "StableDiffusionXLImg2ImgPipeline"},
        cross_attention_dim=1280,
        kohya_prefixes=_SECOND_ENCODER,
        original_names=True,
        text_encoders=("text_encoder_2",),
        max_timestep=200,  # Podell et al. 2023, section 2.5: trained on the first 200 noise levels
        base_versions=dict.fromkeys(_BY_BETAS, "sdxl_refiner_v1-0"),
        architectures=dict.fromkeys(_BY_BETAS, "stable-diffusion-xl-v1-refiner"),
        penultimate=True,
        time_ids=("original_size", "crop", "aesthetic_score"),
    ),
}

_OTHER_PIPELINES = {
    "StableDiffusion3": "Stable Diffusion 3",
    "StableDiffusionLatentUpscale": "a latent upscaler",
    "StableDiffusionUpscale": "Stable Diffusion's upscaler",
    "StableDiffusionInstructPix2Pix": "InstructPix2Pix",
    "StableDiffusionXLInstructPix2Pix": "InstructPix2Pix for Stable Diffusion XL",
    "StableDiffusionDepth2Img": "Stable Diffusion 2's depth model",
    "StableDiffusionControlNet": "a ControlNet pipeline",
    "StableDiffusionGLIGEN": "GLIGEN",
    "StableDiffusionImageVariation": "Stable Diffusion Image Variations",
    "StableDiffusionLDM3D": "LDM3D",
    "StableDiffusionPanorama": "a panorama pipeline",
    "StableDiffusionXLControlNet": "a ControlNet pipeline",
    "StableUnCLIP": "Stable unCLIP",
    "StableVideo": "Stable Video Diffusion",
    "StableCascade": "Stable Cascade",
    "LatentConsistency": "a latent consistency model",
    "Flux": "Flux",
    "PixArt": "PixArt",
    "Kolors": "Kolors",
    "Kandinsky": "Kandinsky",
    "Sana": "Sana",
    "AuraFlow": "AuraFlow",
    "Hunyuan": "Hunyuan",
    "Lumina": "Lumina",
    "QwenImage": "Qwen-Image",
    "ZImage": "Z-Image",
    "AnimateDiff": "AnimateDiff",
    "Wuerstchen": "Würstchen",
    "LDMTextToImage": "latent diffusion before Stable Diffusion",
    "IFPipeline": "DeepFloyd IF",
    "IFImg2Img": "DeepFloyd IF",
}
"""Beginning of a pipeline's class → name of the model, for the error."""

_TRAINABLE_PIPELINES = {
    *(f"StableDiffusion{kind}Pipeline" for kind in ("", "Img2Img", "Inpaint", "PAG")),
    *(f"StableDiffusionXL{kind}Pipeline" for kind in ("", "Img2Img", "Inpaint", "PAG")),
}
"""Pipelines over the families' own parts."""

_TRAINABLE = (
    "Stable Diffusion 1.x, 2.x, XL and its refiner can be trained, and their inpainting models"
)


def family_named(name: str) -> Family:
    """Return a family by its name; raise UsageError with the names there are."""
    if name not in FAMILIES:
        raise UsageError(f"unknown family {name!r}; families: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def _beginning_of(word: str, beginnings: Iterable[str]) -> str | None:
    return next((start for start in beginnings if word.startswith(start)), None)


def refuse_other_pipelines(class_name: str) -> None:
    """Raise UsageError, with the model's name, for a pipeline class that cannot be trained."""
    known = _beginning_of(class_name, _OTHER_PIPELINES)
    if known:
        raise UsageError(f"this is {_OTHER_PIPELINES[known]} ({class_name}); {_TRAINABLE}")
    if class_name not in _TRAINABLE_PIPELINES:
        raise UsageError(f"model_index.json says {class_name!r}; {_TRAINABLE}")


def detect_family(unet_config: Mapping[str, object]) -> Family:
    """Return the family of a UNet's configuration.

    The UNets of SDXL and its refiner take added conditions; the refiner attends to text as wide as
    the pooled one. SD2's UNet is SD1's with linear projections around its attention (and a head
    count a level).

    Raises:
        UsageError: other added conditions: no Stable Diffusion UNet.
    """
    added = unet_config.get("addition_embed_type")
    hidden = unet_config.get("encoder_hid_dim_type")
    if added not in (None, "text_time") or hidden is not None:
        key = "addition_embed_type" if hidden is None else "encoder_hid_dim_type"
        raise UsageError(
            f"this UNet takes conditions of another kind ({key} = {hidden or added!r}); "
            f"{_TRAINABLE}"
        )
    if added:
        pooled = _int(unet_config, "projection_class_embeddings_input_dim")
        pooled -= 5 * _int(unet_config, "addition_time_embed_dim")  # the refiner has 5 time ids
        refines = unet_config.get("cross_attention_dim") == pooled
        return FAMILIES["sdxl_refiner" if refines else "sdxl"]
    return FAMILIES["sd2" if unet_config.get("use_linear_projection") else "sd1"]


def _int(config: Mapping[str, object], key: str) -> int:
    value = config.get(key)
    return value if isinstance(value, int) else 0


def detect_task(unet_config: Mapping[str, object]) -> Task:
    """Return the task of a UNet, by its number of input channels beyond the output's.

    Raises:
        UsageError: channels of no known kind.
    """
    channels, given = unet_config.get("in_channels", 4), unet_config.get("out_channels", 4)
    extra = channels - given if isinstance(channels, int) and isinstance(given, int) else None
    if extra not in TASKS:
        raise UsageError(
            f"this is a UNet with {channels} input and {given} output channels: not one of Stable "
            f"Diffusion; {_TRAINABLE}"
        )
    return TASKS[extra]


def refuse_task(task: Task, family: Family) -> None:
    """Raise UsageError for a UNet whose task is known and not trained here."""
    if task.refused:
        raise UsageError(
            f"this is {family.label}'s {task.label} model: {task.refused}; {_TRAINABLE}"
        )
    if task.name not in family.pipelines:
        raise UsageError(f"there is no {task.label} model of {family.label}; {_TRAINABLE}")
