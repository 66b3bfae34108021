"""Loading a base model's parts, each once: a diffusers folder, a hub id, or a single checkpoint."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
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
from sd_lora.models.families import (
    Family,
    Task,
    detect,
    detect_task,
    refuse_task,
)
from sd_lora.models.folder import (
    CLASSES,
    check_classes,
    check_folder,
    on_disk,
    part_config,
    pipeline_index,
    read_part,
    tokenizer_of,
)
from sd_lora.models.meta_pipeline import MetaPipeline
from sd_lora.models.single import SingleFile
from sd_lora.models.vae import load_other, other_config, standard_config

CLIP_TOKENIZER = "openai/clip-vit-large-patch14"
"""The hub id of the vocabulary that all Stable Diffusion models share: single checkpoints have none
in them."""


_LEAST_TOKENS = 514
"""A CLIP vocabulary has at least 256 symbols, as many word ends, and two special tokens."""


@dataclass
class Parts:
    """The parts of a Stable Diffusion model, on the CPU, in evaluation mode, frozen.

    text_encoders, tokenizers: component ("text_encoder", "text_encoder_2") → its encoder and
    tokenizer, in the order in which the UNet reads their outputs. zero_unconditional: whether the
    model knows the absence of a prompt as zeros, and not as an empty prompt.
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
        """What the UNet is made for."""
        return detect_task(self.unet.config)

    @property
    def pixels_per_latent(self) -> int:
        """How many pixels a latent spans on a side: 8 for the published models."""
        return _vae_factor(self.vae.config)

    @property
    def models(self) -> dict[str, nn.Module]:
        """Component → what a LoRA may adapt."""
        return {"unet": self.unet, **self.text_encoders}

    def caption_encoder(self, **options: Any) -> CaptionEncoder:
        """Returns how captions are read; see `CaptionEncoder` for the options."""
        return CaptionEncoder(
            self.family,
            self.tokenizers,
            zero_unconditional=self.zero_unconditional,
            **options,
        )

    @property
    def meta_pipeline(self) -> MetaPipeline:
        """The modules that a LoRA of this model is made for."""
        return MetaPipeline.of_models(self.models, self.family)


def _vae_factor(config: Mapping[str, Any]) -> int:
    return 2 ** (len(config["block_out_channels"]) - 1)


@dataclass(frozen=True)
class Base:
    """A base model that has been found and named, its weights not yet read.

    name: folder, hub id or file. vae_config: of the VAE that is used; own_vae_config: of the base's
    own. single: the file, if it is one. index: the pipeline's own model_index.json, {} of a file.
    vae: where another VAE comes from. options: `revision`, `cache_dir` and `variant` of
    `from_pretrained`.
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

    @cached_property
    def resolution(self) -> int:
        """The side in pixels of the images that the model was made for."""
        size = self.unet_config.get("sample_size") or 64
        return (size if isinstance(size, int) else max(size)) * _vae_factor(self.vae_config)

    def notes(self) -> list[str]:
        """Returns what a user must know of the base: a VAE that scales its latents otherwise."""
        own, used = (c.get("scaling_factor") for c in (self.own_vae_config, self.vae_config))
        if own == used:
            return []
        return [
            f"the VAE {self.vae} scales its latents by {used}, the base's own by {own}: is it of "
            "another family?"
        ]

    def load(
        self,
        *,
        dtype: torch.dtype = torch.float32,
        vae_dtype: torch.dtype = torch.float32,
        tokenizer_name: str | None = None,
        prediction_type: str | None = None,
        zero_terminal_snr: bool | None = None,
    ) -> Parts:
        """Reads the parts; text encoders are float32: captions are read once, with all digits.

        Args:
            dtype, vae_dtype: of the UNet and of the VAE.
            tokenizer_name: another tokenizer's folder or hub id; a single file has none.
            prediction_type: if it is to differ from what the model says.
            zero_terminal_snr: whether the betas are rescaled so that the last step is pure noise,
                if that is to differ from what the model says.

        Raises:
            UsageError: what is missing or broken.
        """
        scheduler = self._scheduler(prediction_type, zero_terminal_snr)
        encoders = self.family.text_encoders
        tokenizers = {c: self._tokenizer(c, tokenizer_name) for c in encoders}
        # before the others: while it is read, its file's pages are mapped beside it
        unet = self._part("unet", dtype)
        parts = Parts(
            family=self.family,
            text_encoders={c: self._part(c, torch.float32) for c in encoders},
            tokenizers=tokenizers,
            vae=self._vae(vae_dtype),
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
        """Returns how captions are read, for counting tokens: the tokenizers alone are loaded.

        Args:
            tokenizer_name: as `load` has it.
            options: of `CaptionEncoder`.

        Raises:
            UsageError: a tokenizer that is missing.
        """
        tokenizers = {c: self._tokenizer(c, tokenizer_name) for c in self.family.text_encoders}
        for tokenizer in tokenizers.values():
            tokenizer.model_max_length = min(tokenizer.model_max_length, PIECE + 2)
        return CaptionEncoder(self.family, tokenizers, **options)

    @cached_property
    def meta_pipeline(self) -> MetaPipeline:
        """The modules that a LoRA is for, without weights."""
        configs: dict[str, Any] = {"unet": self.unet_config}
        hub = {key: self.options[key] for key in ("revision", "cache_dir")}
        for component in self.family.text_encoders:
            if self.single:
                configs[component] = self.single.configs[component]
                continue
            read = partial(CLIPTextConfig.from_pretrained, self.name, subfolder=component, **hub)
            configs[component] = read_part(component, self.name, read).to_dict()
        return MetaPipeline(self.family, configs, self.name)

    def _part(self, part: str, dtype: torch.dtype) -> Any:
        if self.single:
            return self.single.load(part, dtype)
        weights = dict(self.options) | {"torch_dtype": dtype, "output_loading_info": True}
        load = partial(CLASSES[part].from_pretrained, self.name, subfolder=part, **weights)
        return read_part(part, self.name, load)

    def _vae(self, dtype: torch.dtype) -> AutoencoderKL:
        if self.vae is None:
            return self._part("vae", dtype)
        return load_other(self.vae, self.vae_config, self.options, dtype)

    def _tokenizer(self, component: str, other: str | None) -> CLIPTokenizer:
        hub = {key: self.options[key] for key in ("revision", "cache_dir")}
        folder = tokenizer_of(component)
        if not other and not self.single:
            load = partial(CLIPTokenizer.from_pretrained, self.name, subfolder=folder, **hub)
            return read_part(folder, self.name, load)
        name = on_disk(other or CLIP_TOKENIZER)
        place = Path(name)
        inside = next((f for f in (folder, "tokenizer") if (place / f).is_dir()), "")
        options = {"cache_dir": hub["cache_dir"], "subfolder": inside}
        load = partial(CLIPTokenizer.from_pretrained, name, **options)
        try:
            tokenizer = read_part("tokenizer", name, load)
            if len(tokenizer) < _LEAST_TOKENS:  # transformers makes an empty one of nothing
                cache = hub["cache_dir"] or HF_HUB_CACHE
                where = f"there is no such folder, and it is not in the cache {cache}"
                where = "it has no vocabulary" if place.is_dir() else where
                raise UsageError(f"the tokenizer {name} is not there: {where}")
        except UsageError as error:
            if other:
                raise
            raise UsageError(
                f"{self.name} is a single file, which holds no tokenizer: {error}. Give the "
                "tokenizer folder of any Stable Diffusion with --tokenizer_name, or go online once"
            ) from None
        own = inside == "tokenizer_2"
        if not own:  # OpenCLIP's encoders were trained with id 0 as padding, CLIP's with the end
            open_clip = self.family.name == "sd2" or component == "text_encoder_2"
            tokenizer = copy.deepcopy(tokenizer)
            zero = tokenizer.convert_ids_to_tokens(0)
            tokenizer.pad_token = zero if open_clip else tokenizer.eos_token
        return tokenizer

    def _scheduler(
        self, prediction_type: str | None, zero_terminal_snr: bool | None
    ) -> DDPMScheduler | EDMEulerScheduler:
        if self.single:
            kind = prediction_type or self.single.prediction_type
            if kind is None:
                raise UsageError(
                    f"{self.name} does not say what it predicts, as no file of {self.family.label} "
                    "does: give --prediction_type, epsilon for models of 512 pixels (2-base), "
                    "v_prediction for those of 768 (2, 2.1)"
                )
            config = self.single.scheduler_config(kind)
        else:
            hub = {key: self.options[key] for key in ("revision", "cache_dir")}
            read = partial(DDPMScheduler.load_config, self.name, subfolder="scheduler", **hub)
            config = dict(read_part("scheduler", self.name, read))
        changes: dict[str, Any] = {"prediction_type": prediction_type} if prediction_type else {}
        if zero_terminal_snr is not None:
            changes["rescale_betas_zero_snr"] = zero_terminal_snr
        if changes.get("rescale_betas_zero_snr", config.get("rescale_betas_zero_snr")):
            changes["timestep_spacing"] = "trailing"  # sampling must start from the last step
        kind = str(config.get("_class_name"))
        edm = kind.startswith("EDM")
        if not edm and not {"beta_start", "trained_betas"} & config.keys():
            raise UsageError(
                f"the scheduler of {self.name} is a {kind}, which has no betas: a model that was "
                "trained so (by flow matching, say) is none of Stable Diffusion's, and is not "
                "trained here"
            )
        if edm and zero_terminal_snr:
            raise UsageError(
                f"{self.name} is an EDM model, whose noise levels have no betas to rescale: leave "
                "out rescale_betas_zero_snr"
            )
        cls = EDMEulerScheduler if edm else DDPMScheduler
        return read_part("scheduler", self.name, partial(cls.from_config, config, **changes))


def find_base(
    name: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | None = None,
    vae: str | None = None,
    prediction_type: str | None = None,
) -> Base:
    """Finds a base model and says what it is, from its configurations alone.

    Args:
        name: a diffusers folder, a hub id such as "stable-diffusion-v1-5/stable-diffusion-v1-5", or
            a single checkpoint (.safetensors, .ckpt) in the original layout.
        revision, variant, cache_dir: as in diffusers' `from_pretrained`.
        vae: another VAE: a folder, a hub id or a file.
        prediction_type: what the caller knows of a single file; SD 2's with v-prediction were made
            for larger images.

    Raises:
        UsageError: nothing there, a missing part, a model that is no Stable Diffusion (named as
            what it is), a VAE of other latents than the UNet's.
    """
    name, vae = on_disk(name), on_disk(vae) if vae else None
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
    family, task = detect(unet_config), detect_task(unet_config)
    refuse_task(task, family)
    if path.is_dir():
        check_folder(path, family)
    if single:
        of_file = not vae or Path(vae).is_file()
        if revision or (variant and of_file):
            raise UsageError(f"{name} is a file: revision and variant mean nothing for it")
        if "vae" not in single.configs and not vae:
            raise UsageError(
                f"{name} has no VAE in it: give one with --pretrained_vae_model_name_or_path"
            )
        own: Mapping[str, Any] = single.configs.get("vae") or standard_config(family)
    else:
        check_classes(name, index, family)
        own = part_config(AutoencoderKL, name, "vae", options)
    vae_config = other_config(vae, own, options) if vae else own
    found = (name, family, task, unet_config, vae_config, own)
    base = Base(*found, single, index, vae, options)
    _check_vae(base)
    return base


def load_parts(name: str, **options: Any) -> Parts:
    """Finds a base model and reads its parts in float32; see `find_base` and `Base.load`."""
    where = ("revision", "variant", "cache_dir", "vae")
    found = find_base(name, **{key: options.pop(key) for key in where if key in options})
    return found.load(**options)


def _check_vae(base: Base) -> None:
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
            f"the VAE of {base.vae or base.name} is for images of {max(ends)} channels, and "
            "training is on red, green and blue"
        )


def _check_tokenizer(tokenizer: CLIPTokenizer, text_encoder: Any, name: str) -> None:
    """Raises UsageError for a tokenizer that cannot be this text encoder's.

    transformers 5 builds an empty one, without a word, where the vocabulary's file is missing.
    """
    size, known = len(tokenizer), text_encoder.config.vocab_size
    if not _LEAST_TOKENS <= size <= known:
        raise UsageError(
            f"the tokenizer of {name} has {size} tokens and the text encoder knows {known}: its "
            "files are missing, broken, or of another model"
        )
