"""Loading a base model, each part once: from a diffusers folder, a hub id or a single file."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    EDMEulerScheduler,
    UNet2DConditionModel,
)
from huggingface_hub.constants import HF_HUB_CACHE
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sd_lora.errors import UsageError
from sd_lora.models.caption_encoder import PIECE, CaptionEncoder
from sd_lora.models.diffusers_folder import (
    check_classes,
    check_folder,
    expand_home,
    hub_options,
    part_config,
    pipeline_index,
    read_part,
    tokenizer_of,
)
from sd_lora.models.families import (
    Family,
    Task,
    detect_family,
    detect_task,
    refuse_task,
)
from sd_lora.models.meta_pipeline import MetaPipeline, part_class
from sd_lora.models.noise_scheduler import build_scheduler
from sd_lora.models.single_file import SingleFile
from sd_lora.models.vae import load_replacement, replacement_config, standard_config

CLIP_TOKENIZER = "openai/clip-vit-large-patch14"
"""Hub id of the tokenizer that all Stable Diffusion models share: single files have none."""

_LEAST_TOKENS = 514
"""A CLIP vocabulary has at least 256 symbols, as many word ends, and two special tokens."""


@dataclass
class Parts:
    """The parts of a loaded base model, on the CPU, in evaluation mode, frozen.

    family: of the model.
    text_encoders: component ("text_encoder", "text_encoder_2") → text encoder, in the order of
        their outputs for the UNet.
    tokenizers: the same component → its tokenizer.
    vae, unet, scheduler: as diffusers has them.
    zero_unconditional: whether the absence of a caption is zeros to the model, and not an empty
        caption.
    """

    family: Family
    text_encoders: dict[str, CLIPTextModel | CLIPTextModelWithProjection]
    tokenizers: dict[str, CLIPTokenizer]
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    scheduler: DDPMScheduler | EDMEulerScheduler
    zero_unconditional: bool = False

    @property
    def task(self) -> Task:
        """Task of the UNet: text to image, inpainting."""
        return detect_task(self.unet.config)

    @property
    def pixels_per_latent(self) -> int:
        """Pixels along one side of a latent: 8 for the published models."""
        return _halvings_factor(self.vae.config)

    @property
    def models(self) -> dict[str, nn.Module]:
        """Component → model for a LoRA to adapt."""
        return {self.family.denoiser: self.unet, **self.text_encoders}

    def caption_encoder(self, **options: Any) -> CaptionEncoder:
        """Return the model's caption encoder; options: the fields of `CaptionEncoder`."""
        return CaptionEncoder(
            self.family,
            self.tokenizers,
            zero_unconditional=self.zero_unconditional,
            **options,
        )

    @property
    def meta_pipeline(self) -> MetaPipeline:
        """The components of this model without weights."""
        meta_pipeline = MetaPipeline.of_models(self.models, self.family)
        return replace(meta_pipeline, pixels_per_latent=self.pixels_per_latent)


def _halvings_factor(config: Mapping[str, Any]) -> int:
    """Return the factor by which a VAE or UNet shrinks its input's sides: 2 to its halvings."""
    return 2 ** (len(config["block_out_channels"]) - 1)


@dataclass(frozen=True)
class Base:
    """A base model, found and recognised, its weights not yet read.

    name: folder, hub id or file.
    family, task: of its UNet.
    unet_config: of its UNet.
    vae_config: of the VAE in use, perhaps a replacement.
    own_vae_config: of the base's own VAE.
    single: the single file; None for a folder or hub id.
    index: the pipeline's model_index.json; {} for a single file.
    vae: folder, hub id or file of a replacement VAE; None for the base's own.
    options: `revision`, `cache_dir` and `variant` of `from_pretrained`.
    prediction_type: "epsilon" or "v_prediction" instead of the model's own.
    """

    name: str
    family: Family
    task: Task
    unet_config: Mapping[str, Any]
    vae_config: Mapping[str, Any]
    own_vae_config: Mapping[str, Any]
    single: SingleFile | None
    index: Mapping[str, Any]
    vae: str | None
    options: Mapping[str, Any]
    prediction_type: str | None = None

    @property
    def pixels_per_latent(self) -> int:
        """Pixels along one side of a latent: 8 for the published models."""
        return _halvings_factor(self.vae_config)

    @property
    def latent_multiple(self) -> int:
        """Divisor of the latents' sides, for the UNet's halvings: 8 for SD1 and SD2, 4 for SDXL."""
        return _halvings_factor(self.unet_config)

    @property
    def width(self) -> int:
        """Channels of the UNet's first blocks: 320 for Stable Diffusion, 384 for the refiner."""
        return int(self.unet_config["block_out_channels"][0])

    @cached_property
    def resolution(self) -> int:
        """Side in pixels of the model's training images."""
        size = self.unet_config.get("sample_size") or 64
        return (size if isinstance(size, int) else max(size)) * self.pixels_per_latent

    def notes(self) -> list[str]:
        """Return notes for the user: a replacement VAE with another scaling of its latents, and
        objects of a pickle that were not read.
        """
        own, used = (c.get("scaling_factor") for c in (self.own_vae_config, self.vae_config))
        notes = []
        if own != used:
            notes.append(
                f"the VAE {self.vae} scales its latents by {used}, the base's own by {own}: is it "
                "of another family?"
            )
        if self.single and self.single.left_out:
            classes = ", ".join(self.single.left_out[:4])
            notes.append(f"objects of other classes in {self.name} were left out: {classes}")
        return notes

    def load(
        self,
        *,
        dtype: torch.dtype = torch.float32,
        vae_dtype: torch.dtype = torch.float32,
        tokenizer_name: str | None = None,
        zero_terminal_snr: bool | None = None,
        flow_shift: float | None = None,
    ) -> Parts:
        """Read the parts. Text encoders are float32: each caption is encoded once, exactly.

        dtype: of the UNet.
        vae_dtype: of the VAE.
        tokenizer_name: folder or hub id of another tokenizer; a single file has none of its own.
        zero_terminal_snr: whether the betas are rescaled until the last step is pure noise; None:
            the model's own setting.
        flow_shift: shift of a flow-matching model's noise levels; None: the scheduler's, or 1.

        Raises:
            UsageError: a part is missing or broken, or the scheduler is of another kind.
        """
        scheduler = self._load_scheduler(zero_terminal_snr, flow_shift)
        encoders = self.family.text_encoders
        tokenizers = {c: self._load_tokenizer(c, tokenizer_name) for c in encoders}
        # first, for the peak of memory: while it is read, its file's pages are mapped beside it
        unet = self._load_part(self.family.denoiser, dtype)
        parts = Parts(
            family=self.family,
            text_encoders={c: self._load_part(c, torch.float32) for c in encoders},
            tokenizers=tokenizers,
            vae=self._load_vae(vae_dtype),
            unet=unet,
            scheduler=scheduler,
            zero_unconditional=self.family.is_xl
            and bool(self.index.get("force_zeros_for_empty_prompt", not self.family.max_timestep)),
        )
        for component, encoder in parts.text_encoders.items():
            tokenizer = tokenizers[component]
            _check_tokenizer(tokenizer, encoder, tokenizer_name or self.name)
            limit = encoder.config.max_position_embeddings
            tokenizer.model_max_length = min(tokenizer.model_max_length, limit)
        for model in (*parts.models.values(), parts.vae):
            model.requires_grad_(False).eval()
        return parts

    def caption_encoder(self, tokenizer_name: str | None = None, **options: Any) -> CaptionEncoder:
        """Return a caption encoder for counting tokens: only the tokenizers are loaded.

        tokenizer_name: as in `load`.
        options: the fields of `CaptionEncoder`.

        Raises:
            UsageError: a tokenizer is missing.
        """
        tokenizers = {c: self._load_tokenizer(c, tokenizer_name) for c in self.family.text_encoders}
        for tokenizer in tokenizers.values():
            tokenizer.model_max_length = min(tokenizer.model_max_length, PIECE + 2)
        return CaptionEncoder(self.family, tokenizers, **options)

    @cached_property
    def meta_pipeline(self) -> MetaPipeline:
        """The components of this base without weights."""
        configs: dict[str, Any] = {self.family.denoiser: self.unet_config}
        hub = hub_options(self.options)
        for component in self.family.text_encoders:
            if self.single:
                configs[component] = self.single.configs[component]
                continue
            read = partial(CLIPTextConfig.from_pretrained, self.name, subfolder=component, **hub)
            configs[component] = read_part(component, self.name, read).to_dict()
        return MetaPipeline(self.family, configs, self.name, self.pixels_per_latent)

    def _load_part(self, part: str, dtype: torch.dtype) -> Any:
        if self.single:
            return self.single.load(part, dtype)
        weights = dict(self.options) | {"torch_dtype": dtype, "output_loading_info": True}
        load = partial(part_class(part).from_pretrained, self.name, subfolder=part, **weights)
        return read_part(part, self.name, load)

    def _load_vae(self, dtype: torch.dtype) -> AutoencoderKL:
        if self.vae is None:
            return self._load_part("vae", dtype)
        return load_replacement(self.vae, self.vae_config, self.options, dtype)

    def _load_tokenizer(self, component: str, other: str | None) -> CLIPTokenizer:
        """Return a text encoder's tokenizer: the base's own, or another folder's or hub id's."""
        folder, cache_dir = tokenizer_of(component), self.options["cache_dir"]
        if not other and not self.single:
            options = hub_options(self.options) | {"subfolder": folder}
            load = partial(CLIPTokenizer.from_pretrained, self.name, **options)
            return read_part(folder, self.name, load)
        name = expand_home(other or CLIP_TOKENIZER)
        path = Path(name)
        subfolder = next((f for f in (folder, "tokenizer") if (path / f).is_dir()), "")
        options = {"cache_dir": cache_dir, "subfolder": subfolder}
        load = partial(CLIPTokenizer.from_pretrained, name, **options)
        try:
            tokenizer = read_part("tokenizer", name, load)
            if len(tokenizer) < _LEAST_TOKENS:  # without a file transformers makes an empty one
                where = f"not a folder here, and not in the cache {cache_dir or HF_HUB_CACHE}"
                where = "it has no vocabulary" if path.is_dir() else where
                raise UsageError(f"the tokenizer {name} was not found: {where}")
        except UsageError as error:
            if other:
                raise
            raise UsageError(
                f"{self.name} is a single file, which holds no tokenizer: {error}. Give the "
                "tokenizer folder of any Stable Diffusion model with --tokenizer_name, or run once "
                "with a connection to the hub"
            ) from None
        if subfolder == "tokenizer_2":
            return tokenizer
        # CLIP's tokenizer for OpenCLIP's encoders, which were trained with padding 0, CLIP's own
        # with the end id
        open_clip = self.family.name == "sd2" or component == "text_encoder_2"
        tokenizer = copy.deepcopy(tokenizer)
        zero = tokenizer.convert_ids_to_tokens(0)
        tokenizer.pad_token = zero if open_clip else tokenizer.eos_token
        return tokenizer

    def _load_scheduler(
        self, zero_terminal_snr: bool | None, flow_shift: float | None
    ) -> DDPMScheduler | EDMEulerScheduler:
        prediction_type = self.prediction_type
        if self.single:
            kind = prediction_type or self.single.prediction_type
            if kind is None:
                raise UsageError(
                    f"{self.name} does not say its prediction type, as no file of "
                    f"{self.family.label} does: give --prediction_type epsilon for a model of 512 "
                    "pixels (2-base), v_prediction for one of 768 (2, 2.1)"
                )
            config = self.single.scheduler_config(kind)
        else:
            hub = hub_options(self.options)
            read = partial(DDPMScheduler.load_config, self.name, subfolder="scheduler", **hub)
            config = dict(read_part("scheduler", self.name, read))
        return build_scheduler(
            self.name, self.family, config, prediction_type, zero_terminal_snr, flow_shift,
            self.resolution,
        )  # fmt: skip


def find_base(
    name: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | None = None,
    vae: str | None = None,
    prediction_type: str | None = None,
) -> Base:
    """Find a base model and recognise it by its configurations alone.

    name: a diffusers folder, a hub id such as "stable-diffusion-v1-5/stable-diffusion-v1-5", or a
        single file (.safetensors, .ckpt) in the original layout.
    revision, variant, cache_dir: as in diffusers' `from_pretrained`.
    vae: a replacement VAE: a folder, a hub id or a file.
    prediction_type: "epsilon" or "v_prediction" instead of the model's own; SD 2's models with
        v-prediction were made for larger images.

    Raises:
        UsageError: not found, a part is missing, another model than Stable Diffusion (with its
            name), or a VAE of other latents than the UNet's.
    """
    name, vae = expand_home(name), expand_home(vae) if vae else None
    options = {"revision": revision, "cache_dir": cache_dir, "variant": variant}
    single: SingleFile | None = None
    index: Mapping[str, Any] = {}
    path = Path(name)
    if path.is_file():
        single = SingleFile.open(path)
        unet_config: Any = dict(single.configs["unet"])
        if single.family == "sd2" and prediction_type == "v_prediction":
            unet_config["sample_size"] = 96
    else:
        index = pipeline_index(name, options)
        unet_config = part_config(UNet2DConditionModel, name, "unet", options)
    family, task = detect_family(unet_config), detect_task(unet_config)
    refuse_task(task, family)
    if path.is_dir():
        check_folder(path, family)
    if single:
        of_file = not vae or Path(vae).is_file()
        if revision or (variant and of_file):
            raise UsageError(f"{name} is a file: leave out --revision and --variant")
        if "vae" not in single.configs and not vae:
            raise UsageError(
                f"{name} has no VAE in it: give one with --pretrained_vae_model_name_or_path"
            )
        own: Mapping[str, Any] = single.configs.get("vae") or standard_config(family)
    else:
        check_classes(name, index, family)
        own = part_config(AutoencoderKL, name, "vae", options)
    vae_config = replacement_config(vae, own, options) if vae else own
    found = (name, family, task, unet_config, vae_config, own)
    base = Base(*found, single, index, vae, options, prediction_type)
    _check_vae(base)
    return base


def load_parts(name: str, **options: Any) -> Parts:
    """Find a base model and read its parts; options: those of `find_base` and `Base.load`."""
    to_find = ("revision", "variant", "cache_dir", "vae", "prediction_type")
    found = find_base(name, **{key: options.pop(key) for key in to_find if key in options})
    return found.load(**options)


def _check_vae(base: Base) -> None:
    """Raise UsageError for a VAE of other latents or other images than the UNet's."""
    config, wanted = base.vae_config, base.unet_config["out_channels"]
    channels = config.get("latent_channels", 4)
    if channels != wanted:
        raise UsageError(
            f"the VAE of {base.vae or base.name} has {channels} latent channels, and the UNet of "
            f"{base.name} reads {wanted}: it is another model's VAE"
        )
    ends = {config.get("in_channels", 3), config.get("out_channels", 3)}
    if ends != {3}:
        raise UsageError(
            f"the VAE of {base.vae or base.name} is for images of {max(ends)} channels; images "
            "here have 3 (red, green, blue)"
        )


def _check_tokenizer(tokenizer: CLIPTokenizer, text_encoder: Any, name: str) -> None:
    """Raise UsageError for a tokenizer of another text encoder.

    Where the vocabulary's file is missing, transformers 5 silently builds an empty tokenizer.
    """
    size, known = len(tokenizer), text_encoder.config.vocab_size
    if not _LEAST_TOKENS <= size <= known:
        raise UsageError(
            f"the tokenizer of {name} has {size} tokens and the text encoder knows {known}: its "
            "files are missing, broken, or of another model"
        )
