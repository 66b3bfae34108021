"""Everything that a run can be told: one frozen dataclass, read from flags and TOML files.

Flags carry the names and per-mode defaults of diffusers' example scripts, unique prefixes
included, so that their command lines carry over. Defaults < file < flags.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sd_lora.config.contradictions import problems_of
from sd_lora.config.sources import CACHES, CAPTIONS, LAYOUTS, LEFTOVERS, SourceSpec, read_specs
from sd_lora.errors import UsageError, did_you_mean

Mode = Literal["text_to_image", "dreambooth"]
METHODS = ("lora", "lora_fa", "loha", "lokr", "full")
"""The adapters' methods, here without importing torch for them."""
MODES: tuple[Mode, ...] = ("text_to_image", "dreambooth")


def option(
    section: str,
    help: str,
    default: Any = None,
    *,
    modes: Mapping[str, Any] | None = None,
    xl: Mapping[str, Any] | None = None,
    only: Mode | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """Declares a field.

    Args:
        section: the TOML table and help group it belongs to.
        help: what it is, with its unit.
        default: its value when nothing is said.
        modes: defaults that differ by mode; `default` is then None and means these.
        xl: those of them that are others for SDXL, as diffusers has scripts of its own for it; they
            are known when the base model is, and None until then.
        only: the one mode in which it means something.
        choices: the allowed values.
    """
    metadata = {
        "section": section,
        "help": help,
        "modes": modes or {},
        "xl": xl or {},
        "only": only,
        "choices": choices,
    }
    return dataclasses.field(default=default, metadata=metadata)


def _per_mode(text_to_image: Any, dreambooth: Any) -> dict[str, Any]:
    return {"text_to_image": text_to_image, "dreambooth": dreambooth}


_T2I: Mode = "text_to_image"
_DB: Mode = "dreambooth"
FAMILY_NAMES = ("sd1", "sd2", "sdxl", "sdxl_refiner")
"""The families' names, here without importing diffusers for them."""


@dataclass(frozen=True)
class TrainConfig:
    """One run's configuration; see the help of each field.

    Raises:
        UsageError: all contradictions and values out of range at once.
    """

    # fmt: off
    mode: Mode = option("run", "what is trained: captioned images, or one subject by DreamBooth", "text_to_image", choices=MODES)
    output_dir: str = option("run", "folder for the LoRA files, checkpoints and samples", modes=_per_mode("sd-model-finetuned-lora", "lora-dreambooth-model"))
    seed: int | None = option("run", "seed of everything that is drawn; drawn itself, and printed, when not given")
    report_to: str | None = option("run", "tracker: tensorboard, wandb, comet_ml, all or none; tensorboard if it is installed when not given")
    logging_dir: str = option("run", "folder for the tracker's files, inside output_dir", "logs")
    local_rank: int = option("run", "set by launchers; the LOCAL_RANK environment variable wins", -1)

    pretrained_model_name_or_path: str | None = option("model", "base model: a diffusers folder, a hub id, or a single .safetensors or .ckpt checkpoint (required)")
    revision: str | None = option("model", "hub revision of the base model")
    variant: str | None = option("model", "file variant of the base model, such as fp16")
    tokenizer_name: str | None = option("model", "another tokenizer: a folder or a hub id; single checkpoints have none in them")
    pretrained_vae_model_name_or_path: str | None = option("model", "another VAE: a folder, a hub id or a single file")
    vae_precision: str = option("model", "precision of the VAE; SDXL's own overflows in fp16", "fp32", choices=("fp32", "fp16", "bf16"))
    family: str | None = option("model", "what the base must be; an error if it is not; any when not given", choices=FAMILY_NAMES)
    cache_dir: str | None = option("model", "folder for downloaded models and data sets")

    train_data_dir: str | None = option("data", "folder of images with metadata.jsonl, metadata.csv or .txt captions", only=_T2I)
    dataset_name: str | None = option("data", "a `datasets` set: a hub name or a local folder")
    dataset_config_name: str | None = option("data", "the set's configuration")
    streaming: bool = option("data", "read the set row by row, as it comes, instead of downloading it first: for sets that are larger than the disk; needs cached latents", False)
    sources: list[dict[str, Any]] | None = option("data", "several sources in one run: [[sources]] tables of a TOML file, each with a path or dataset, repeats, weight, and its own rules for captions")
    dataset_config: str | None = option("data", "kohya's dataset configuration: a TOML or JSON file with [[datasets]] and [[datasets.subsets]]")
    data_layout: str = option("data", "what subfolders are: kohya's 'N_token class' folders with their repeats, or a plain tree; kohya's where nothing else is there when auto", "auto", choices=LAYOUTS)
    captions_from: str = option("data", "where captions come from: metadata files, sidecar files (.txt, .caption), the images' file names, or caption_default for all; metadata, else sidecars when auto", "auto", choices=CAPTIONS)
    caption_default: str | None = option("data", "caption of images that have none; they are left out when not given", only=_T2I)
    caption_extension: str | None = option("data", "extension of caption files; .txt and .caption when not given")
    strict: bool = option("data", "stop where the check of the data leaves an image out or warns", False)
    image_column: str = option("data", "column that holds the image", "image")
    caption_column: str | None = option("data", "column that holds the caption, or a list of captions; in dreambooth runs instance_prompt when not given", modes=_per_mode("text", None))
    max_train_samples: int | None = option("data", "train on this many images, chosen by the seed", only=_T2I)
    instance_data_dir: str | None = option("data", "folder with images of the subject", only=_DB)
    instance_prompt: str | None = option("data", "prompt for the subject, with a rare word, such as 'a photo of sks dog'", only=_DB)
    repeats: int = option("data", "how often each image counts per epoch; sources and kohya's folders have their own", 1)
    with_prior_preservation: bool = option("data", "train on class images too, so that the class is not forgotten", False, only=_DB)
    class_data_dir: str | None = option("data", "folder with class images; filled up to num_class_images", only=_DB)
    class_prompt: str | None = option("data", "prompt for the class, such as 'a photo of a dog'", only=_DB)
    num_class_images: int = option("data", "generate class images up to this many", 100, only=_DB)
    sample_batch_size: int = option("data", "class images generated at once", 4, only=_DB)
    prior_loss_weight: float = option("data", "weight of the class images' loss", 1.0)
    prior_generation_precision: str | None = option("data", "precision for generating class images; fp16 on a GPU, else fp32, when not given", only=_DB, choices=("no", "fp32", "fp16", "bf16"))
    resolution: int | None = option("data", "side in pixels of the training squares, or of the square whose area buckets have; what the base was made for when not given: 512, 768 for SD 2 with v-prediction, 1024 for SDXL")
    aspect_ratio_buckets: bool = option("data", "train each image in the shape that is nearest to its own, of as many pixels as resolution²; otherwise, as diffusers' scripts do, in squares of the resolution that its shorter side is resized to", True)
    bucket_step: int | None = option("data", "sides of buckets are multiples of this many pixels; what VAE and UNet halve without a rest when not given: 64, 32 for SDXL")
    bucket_min_side: int | None = option("data", "shortest side of a bucket in pixels; half the resolution when not given")
    bucket_max_side: int | None = option("data", "longest side of a bucket in pixels; twice the resolution when not given")
    bucket_no_upscale: bool = option("data", "never enlarge an image: one that is smaller than its bucket gets one of its own size, rounded down", False)
    bucket_min_pictures: int = option("data", "images × repeats that a bucket needs; those of smaller ones go to the next bucket", 1)
    bucket_leftovers: str = option("data", "what becomes of a bucket's last, unfilled batch: smaller has fewer images, pad-batch is filled with some that do not count (all shapes alike), repeat with some that are seen once more", "smaller", choices=LEFTOVERS)
    center_crop: bool | None = option("data", "crop from the middle, --no-center_crop: at a random place, drawn each time; the middle of buckets and a random place of squares when not given")
    random_flip: bool = option("data", "mirror images half of the time", False)
    alpha_background: str = option("data", "colour that transparent images are laid on: a name or #rrggbb", "white")
    alpha_mask: bool = option("data", "train opaque parts of images alone: opacity is the mask of the loss", False)
    image_interpolation_mode: str = option("data", "filter for resizing", "lanczos", choices=("nearest", "nearest_exact", "bilinear", "bicubic", "box", "hamming", "lanczos"))
    max_token_length: int = option("data", "tokens of a caption that are read, a multiple of 75: longer ones are read in pieces of 75, as A1111 and ComfyUI do, and cut here", 75)
    weighted_prompts: bool = option("data", "captions may weigh words, as in 'a (red)1.3 car++' (compel's syntax; extra: compel)", False)
    shuffle_caption: bool = option("data", "shuffle the tags of captions each time", False)
    keep_tokens: int = option("data", "tags at the start of captions that are neither shuffled nor dropped", 0)
    keep_tokens_separator: str | None = option("data", "mark in captions, such as |||: what stands before it is neither shuffled nor dropped")
    caption_separator: str = option("data", "what stands between tags", ",")
    caption_tag_dropout: float = option("data", "part of the tags that are left out each time", 0.0)
    caption_prefix: str | None = option("data", "put before each caption, with a space")
    caption_suffix: str | None = option("data", "put after each caption, with a space")
    wildcards: bool = option("data", "captions may have {a|b}: one of them each time; of captions with several lines one is read", False)
    trigger_word: str | None = option("data", "first tag of each caption that does not have it already")
    caption_dropout: float = option("data", "part of the training images that are shown without their caption, so that guidance learns too; 0.1 is usual. Without a caption is zeros for SDXL, as its guidance has it, and the empty prompt for SD 1 and 2; class images keep theirs", 0.0)
    clip_skip: int = option("data", "layers that the text encoders leave out at the end, as in diffusers: A1111's and kohya's clip skip 2 is 1 here; SDXL's last layer but one, which it always reads, is 0", 0)
    dataloader_num_workers: int = option("data", "processes that read batches ahead: images which cannot be cached, and caches on disk", 0)
    cache_latents: str = option("data", "where latents are kept: disk (shared by all runs, by content), memory, no; disk if it has room when auto", "auto", choices=CACHES)
    cache_text_embeddings: str = option("data", "where the embeddings of captions are kept, as cache_latents", "auto", choices=CACHES)
    data_cache_dir: str | None = option("data", "folder of the caches on disk; $SD_LORA_CACHE or ~/.cache/sd_lora when not given")
    data_cache_limit: float = option("data", "size in GiB beyond which the longest unused entries of the caches on disk are removed", 50.0)

    targets: str = option("adapter", "what is adapted in the UNet: attention, transformer, conv, all, or regular expressions, joined by +", "attention")
    rank: int = option("adapter", "rank r", 4)
    lora_alpha: float | None = option("adapter", "alpha; the update is scaled by alpha / rank; equal to the rank when not given")
    conv_rank: int | None = option("adapter", "rank of convolutions larger than 1x1; equal to rank when not given")
    conv_alpha: float | None = option("adapter", "alpha of these convolutions; conv_rank, or else lora_alpha, when not given")
    rank_pattern: dict[str, int] | None = option("adapter", "ranks by module: pattern=rank …, as in peft")
    alpha_pattern: dict[str, float] | None = option("adapter", "alphas by module: pattern=alpha …, as in peft")
    method: str = option("adapter", "what the update is: lora, lora_fa (A is frozen), loha, lokr, full (of full rank)", "lora", choices=METHODS)
    use_dora: bool = option("adapter", "train a magnitude per output beside the update's direction (DoRA), with any method", False)
    use_rslora: bool = option("adapter", "scale by alpha / sqrt(rank) instead of alpha / rank", False)
    init_lora_weights: str | None = option("adapter", "how lora starts: kaiming when not given; pissa starts from the base's principal singular vectors", choices=("kaiming", "gaussian", "orthogonal", "pissa"))
    use_tucker: bool = option("adapter", "give convolutions larger than 1x1 a small core instead of a large factor (lora, loha, lokr)", False)
    lokr_factor: int | None = option("adapter", "side of lokr's first factor; near the square root when not given")
    lokr_full_matrix: bool = option("adapter", "keep lokr's second factor whole, whatever the rank", False)
    lokr_decompose_both: bool = option("adapter", "give lokr's first factor the rank too", False)
    lora_dropout: float = option("adapter", "probability of dropping an input element of the update", 0.0)
    neuron_dropout: float = option("adapter", "probability of dropping an element between the factors A and B", 0.0)
    rank_dropout: float = option("adapter", "probability of dropping a rank of the update", 0.0)
    module_dropout: float = option("adapter", "probability of dropping a module's whole update", 0.0)
    train_bias: str = option("adapter", "biases that are trained too: none, those of adapted layers (lora_only), all", "none", choices=("none", "lora_only", "all"))
    modules_to_save: str | None = option("adapter", "UNet modules to train whole, such as conv_norm_out: patterns at the end of names, joined by +")
    train_text_encoder: bool = option("adapter", "adapt the text encoders too", False)
    text_encoder_rank: int | None = option("adapter", "rank in the text encoders; rank when not given; 0 leaves them out")
    text_encoder_alpha: float | None = option("adapter", "alpha in the text encoders; text_encoder_rank, or else lora_alpha, when not given")
    text_encoder_2_rank: int | None = option("adapter", "rank in SDXL's second text encoder; text_encoder_rank when not given; 0 leaves it out")
    text_encoder_2_alpha: float | None = option("adapter", "alpha in SDXL's second text encoder; text_encoder_2_rank, or else text_encoder_alpha, when not given")
    token_abstraction: str | None = option("adapter", "new words, joined by commas, whose embeddings are trained beside the LoRA (pivotal tuning), such as '<monster>'; captions must use them")
    num_new_tokens_per_abstraction: int = option("adapter", "vectors of each new word", 2)
    initializer_token: str | None = option("adapter", "words whose embeddings new words start from, such as 'monster'; random when not given")

    train_batch_size: int = option("training", "images per process and micro-batch (subject images; class images come on top)", modes=_per_mode(16, 4))
    num_train_epochs: int = option("training", "epochs, unless max_train_steps is given", modes=_per_mode(100, 1))
    max_train_steps: int | None = option("training", "optimiser steps; overrides num_train_epochs")
    gradient_accumulation_steps: int = option("training", "micro-batches per optimiser step", 1)
    gradient_checkpointing: bool = option("training", "recompute activations to save memory, about a third slower", False)
    mixed_precision: str | None = option("training", "precision of the frozen base; what accelerate is configured for when not given; LoRA parameters are float32 always", choices=("no", "fp16", "bf16"))
    allow_tf32: bool = option("training", "TF32 matrix products on Ampere GPUs and later", False)
    learning_rate: float = option("training", "learning rate after warm-up", modes=_per_mode(1e-4, 5e-4), xl={"dreambooth": 1e-4})
    text_encoder_lr: float | None = option("training", "learning rate of the text encoders' LoRA; learning_rate when not given", modes=_per_mode(None, None), xl={"dreambooth": 5e-6})
    text_encoder_2_lr: float | None = option("training", "learning rate of the LoRA of SDXL's second text encoder; text_encoder_lr when not given")
    text_encoder_stop_step: int | None = option("training", "optimiser step after which the text encoders' LoRA is left as it is")
    text_encoder_2_stop_step: int | None = option("training", "the same for SDXL's second text encoder; text_encoder_stop_step when not given")
    embedding_lr: float | None = option("training", "learning rate of the new words' embeddings; text_encoder_lr, or else learning_rate, when not given")
    embedding_stop_step: int | None = option("training", "optimiser step after which the new words are left as they are")
    loraplus_lr_ratio: float | None = option("training", "LoRA+: learning rate of B over that of A; 16 is usual; off when not given")
    lr_pattern: dict[str, float] | None = option("training", "learning-rate factors by module: pattern=factor …, at the end of names; 'down_blocks.0.*'=0.5 for a block")
    scale_weight_norms: float | None = option("training", "scale each update down to this Frobenius norm after each step; off when not given")
    scale_lr: bool = option("training", "multiply the learning rates by batch x accumulation x processes", False)
    lr_scheduler: str = option("training", "learning-rate schedule", "constant", choices=("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"))
    lr_warmup_steps: int = option("training", "optimiser steps of warm-up (none for constant)", 500)
    lr_num_cycles: int = option("training", "restarts of cosine_with_restarts", 1)
    lr_power: float = option("training", "power of polynomial", 1.0)
    use_8bit_adam: bool = option("training", "8-bit AdamW of bitsandbytes (extra: 8bit)", False)
    adam_beta1: float = option("training", "AdamW's beta1", 0.9)
    adam_beta2: float = option("training", "AdamW's beta2", 0.999)
    adam_weight_decay: float = option("training", "AdamW's weight decay", modes=_per_mode(1e-2, 1e-2), xl={"dreambooth": 1e-4})
    adam_weight_decay_text_encoder: float | None = option("training", "weight decay of the text encoders' LoRA; adam_weight_decay when not given", modes=_per_mode(None, None), xl={"dreambooth": 1e-3})
    adam_epsilon: float = option("training", "AdamW's epsilon", 1e-8)
    max_grad_norm: float = option("training", "gradients are scaled down to this norm; 0 for no limit", 1.0)
    checkpointing_steps: int = option("training", "optimiser steps between checkpoints", 500)
    checkpoints_total_limit: int | None = option("training", "keep this many checkpoints, the newest ones")
    save_precision: str = option("training", "precision of the LoRA files; checkpoints keep float32", "fp32", choices=("fp32", "fp16", "bf16"))
    resume_from_checkpoint: str | None = option("training", "a checkpoint folder, its name inside output_dir, or latest")

    prediction_type: str | None = option("objective", "what the model predicts; the base's scheduler says when not given", choices=("epsilon", "v_prediction"))
    rescale_betas_zero_snr: bool | None = option("objective", "end the schedule in pure noise (zero terminal SNR), for v-prediction models that were trained so; as the base's scheduler says when not given")
    do_edm_style_training: bool = option("objective", "weigh the losses as EDM does: by SNR / (SNR + 1) for v-prediction, which changes nothing for epsilon; EDM models are always trained so", False)
    min_timestep: int = option("objective", "timesteps below this are not trained", 0)
    max_timestep: int | None = option("objective", "timesteps from this on are not trained; 1000, for SDXL's refiner 200, when not given")
    snr_gamma: float | None = option("objective", "gamma of min-SNR weighting; 5 is usual; off when not given")
    noise_offset: float = option("objective", "strength of a constant added to each noise channel; 0.05 to 0.1 for darker darks", 0.0)

    validation_prompt: str | None = option("validation", "prompt of the sample images; the training prompts when not given")
    num_validation_images: int = option("validation", "sample images before, during and after training; 0 for none", 4)
    validation_epochs: int = option("validation", "epochs between samples during training, when validation_prompt is given", modes=_per_mode(1, 50))
    validation_steps: int = option("validation", "sampler steps of the sample images (DPM-Solver++)", 25)
    validation_guidance_scale: float = option("validation", "guidance scale of the sample images", 7.5)
    # fmt: on

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UsageError(
                f"mode {self.mode!r} is unknown; there are {', '.join(MODES)}."
                f"{did_you_mean(str(self.mode), MODES)}"
            )
        for field in dataclasses.fields(self):
            # what SDXL has otherwise waits until the base is known: `for_base`
            settled = self.mode not in field.metadata["xl"]
            if field.metadata["modes"] and getattr(self, field.name) is None and settled:
                object.__setattr__(self, field.name, field.metadata["modes"][self.mode])
        object.__setattr__(self, "output_dir", str(Path(self.output_dir).expanduser()))
        problems = problems_of(self)
        if problems:
            raise UsageError("\n".join(problems))
        if self.sources is not None:
            general = SourceSpec(prompt=self.caption_default or self.instance_prompt)
            read_specs(self.sources, general, "sources")  # said before anything is read

    def for_base(self, family: str, resolution: int) -> "TrainConfig":
        """Returns the configuration for a base model, with the defaults that depend on it.

        Args:
            family: its family's name.
            resolution: side in pixels of the images that it was made for.

        Raises:
            UsageError: another family than `family` says, or options that it has no use for.
        """
        if self.family is not None and self.family != family:
            raise UsageError(
                f"{self.pretrained_model_name_or_path} is a model of family {family}, and family "
                f"says {self.family} (--family, which the _sdxl scripts set)"
            )
        changes: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            xl, modes = field.metadata["xl"], field.metadata["modes"]
            if self.mode in xl and getattr(self, field.name) is None:
                changes[field.name] = (xl if family.startswith("sdxl") else modes)[self.mode]
        changes["resolution"] = self.resolution or resolution
        if not self.train_text_encoder:  # a default for it is not a wish for it
            changes |= {"text_encoder_lr": None, "adam_weight_decay_text_encoder": None}
        given = {n for n in FIELDS if n.startswith("text_encoder_2_")}
        given = {n for n in given if getattr(self, n) is not None}
        if given and family != "sdxl":
            raise UsageError(f"{min(given)} needs two text encoders, and {family} has one")
        return dataclasses.replace(self, **changes)

    @property
    def side(self) -> int:
        """The resolution in pixels, once the base is known."""
        if self.resolution is None:
            raise ValueError("resolution is the base model's, and for_base has not been called")
        return self.resolution

    def as_dict(self) -> dict[str, Any]:
        """Returns every field, defaults resolved."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.as_dict(), indent=2, sort_keys=True)


CHANGEABLE = frozenset(
    (
        "allow_tf32 cache_dir checkpointing_steps checkpoints_total_limit class_data_dir "
        "cache_latents cache_text_embeddings data_cache_dir data_cache_limit dataset_config "
        "dataloader_num_workers dataset_name embedding_lr gradient_accumulation_steps "
        "gradient_checkpointing instance_data_dir learning_rate local_rank logging_dir max_train_steps num_train_epochs "
        "family num_validation_images output_dir pretrained_model_name_or_path "
        "pretrained_vae_model_name_or_path prior_generation_precision tokenizer_name "
        "report_to resume_from_checkpoint sample_batch_size save_precision seed sources strict text_encoder_2_lr "
        "text_encoder_lr train_batch_size train_data_dir validation_epochs validation_guidance_scale validation_prompt "
        "validation_steps"
    ).split()
)
"""What a resumed run may have otherwise than the run it goes on with.

Places of files, what is shown, and learning rates (a run that diverged is resumed with a lower
one); batch, accumulation and seed are compared by what they make of the data's order.
"""


FIELDS: dict[str, dataclasses.Field] = {f.name: f for f in dataclasses.fields(TrainConfig)}
