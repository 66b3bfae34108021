"""Everything that a run can be told: one frozen dataclass, read from flags and TOML files.

Flags carry the names and per-mode defaults of diffusers' example scripts, unique prefixes
included, so that their command lines carry over. Defaults < file < flags.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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
    only: Mode | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """Declares a field.

    Args:
        section: the TOML table and help group it belongs to.
        help: what it is, with its unit.
        default: its value when nothing is said.
        modes: defaults that differ by mode; `default` is then None and means these.
        only: the one mode in which it means something.
        choices: the allowed values.
    """
    metadata = {
        "section": section,
        "help": help,
        "modes": modes or {},
        "only": only,
        "choices": choices,
    }
    return dataclasses.field(default=default, metadata=metadata)


def _per_mode(text_to_image: Any, dreambooth: Any) -> dict[str, Any]:
    return {"text_to_image": text_to_image, "dreambooth": dreambooth}


_T2I: Mode = "text_to_image"
_DB: Mode = "dreambooth"


@dataclass(frozen=True)
class TrainConfig:
    """One run's configuration; see the help of each field.

    Raises:
        UsageError: all contradictions and values out of range at once.
    """

    # fmt: off
    mode: Mode = option("run", "what is trained: captioned pictures, or one subject by DreamBooth", "text_to_image", choices=MODES)
    output_dir: str = option("run", "folder for the LoRA files, checkpoints and samples", modes=_per_mode("sd-model-finetuned-lora", "lora-dreambooth-model"))
    seed: int | None = option("run", "seed of everything that is drawn; drawn itself, and printed, when not given")
    report_to: str | None = option("run", "tracker: tensorboard, wandb, comet_ml, all or none; tensorboard if it is installed when not given")
    logging_dir: str = option("run", "folder for the tracker's files, inside output_dir", "logs")
    local_rank: int = option("run", "set by launchers; the LOCAL_RANK environment variable wins", -1)

    pretrained_model_name_or_path: str | None = option("model", "base model: a diffusers folder or a hub id (required)")
    revision: str | None = option("model", "hub revision of the base model")
    variant: str | None = option("model", "file variant of the base model, such as fp16")
    tokenizer_name: str | None = option("model", "another tokenizer: a folder or a hub id")
    cache_dir: str | None = option("model", "folder for downloaded models and data sets")

    train_data_dir: str | None = option("data", "folder of pictures with metadata.jsonl, metadata.csv or .txt captions", only=_T2I)
    dataset_name: str | None = option("data", "a `datasets` set: a hub name or a local folder", only=_T2I)
    dataset_config_name: str | None = option("data", "the set's configuration", only=_T2I)
    image_column: str = option("data", "column that holds the picture", "image", only=_T2I)
    caption_column: str = option("data", "column that holds the caption, or a list of captions", "text", only=_T2I)
    max_train_samples: int | None = option("data", "train on this many pictures, chosen by the seed", only=_T2I)
    instance_data_dir: str | None = option("data", "folder with pictures of the subject", only=_DB)
    instance_prompt: str | None = option("data", "prompt for the subject, with a rare word, such as 'a photo of sks dog'", only=_DB)
    repeats: int = option("data", "how often each subject picture counts per epoch", 1, only=_DB)
    with_prior_preservation: bool = option("data", "train on class pictures too, so that the class is not forgotten", False, only=_DB)
    class_data_dir: str | None = option("data", "folder with class pictures; filled up to num_class_images", only=_DB)
    class_prompt: str | None = option("data", "prompt for the class, such as 'a photo of a dog'", only=_DB)
    num_class_images: int = option("data", "generate class pictures up to this many", 100, only=_DB)
    sample_batch_size: int = option("data", "class pictures generated at once", 4, only=_DB)
    prior_loss_weight: float = option("data", "weight of the class pictures' loss", 1.0, only=_DB)
    prior_generation_precision: str | None = option("data", "precision for generating class pictures; fp16 on a GPU, else fp32, when not given", only=_DB, choices=("no", "fp32", "fp16", "bf16"))
    resolution: int = option("data", "side of the training squares in pixels", 512)
    center_crop: bool = option("data", "crop from the middle instead of a random place", False)
    random_flip: bool = option("data", "mirror pictures half of the time", False)
    image_interpolation_mode: str = option("data", "filter for resizing", "lanczos", choices=("nearest", "nearest_exact", "bilinear", "bicubic", "box", "hamming", "lanczos"))
    dataloader_num_workers: int = option("data", "processes that decode pictures which cannot be cached", 0)

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
    train_text_encoder: bool = option("adapter", "adapt the text encoder too", False)

    train_batch_size: int = option("training", "pictures per process and micro-batch (subject pictures; class pictures come on top)", modes=_per_mode(16, 4))
    num_train_epochs: int = option("training", "epochs, unless max_train_steps is given", modes=_per_mode(100, 1))
    max_train_steps: int | None = option("training", "optimiser steps; overrides num_train_epochs")
    gradient_accumulation_steps: int = option("training", "micro-batches per optimiser step", 1)
    gradient_checkpointing: bool = option("training", "recompute activations to save memory, about a third slower", False)
    mixed_precision: str | None = option("training", "precision of the frozen base; what accelerate is configured for when not given; LoRA parameters are float32 always", choices=("no", "fp16", "bf16"))
    allow_tf32: bool = option("training", "TF32 matrix products on Ampere GPUs and later", False)
    learning_rate: float = option("training", "learning rate after warm-up", modes=_per_mode(1e-4, 5e-4))
    text_encoder_lr: float | None = option("training", "learning rate of the text encoder's LoRA; learning_rate when not given")
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
    adam_weight_decay: float = option("training", "AdamW's weight decay", 1e-2)
    adam_weight_decay_text_encoder: float | None = option("training", "weight decay of the text encoder's LoRA; adam_weight_decay when not given")
    adam_epsilon: float = option("training", "AdamW's epsilon", 1e-8)
    max_grad_norm: float = option("training", "gradients are scaled down to this norm", 1.0)
    checkpointing_steps: int = option("training", "optimiser steps between checkpoints", 500)
    checkpoints_total_limit: int | None = option("training", "keep this many checkpoints, the newest ones")
    save_precision: str = option("training", "precision of the LoRA files; checkpoints keep float32", "fp32", choices=("fp32", "fp16", "bf16"))
    resume_from_checkpoint: str | None = option("training", "a checkpoint folder, its name inside output_dir, or latest")

    prediction_type: str | None = option("objective", "what the model predicts; the base's scheduler says when not given", choices=("epsilon", "v_prediction"))
    snr_gamma: float | None = option("objective", "gamma of min-SNR weighting; 5 is usual; off when not given")
    noise_offset: float = option("objective", "strength of a constant added to each noise channel; 0.05 to 0.1 for darker darks", 0.0)

    validation_prompt: str | None = option("validation", "prompt of the sample pictures; the training prompts when not given")
    num_validation_images: int = option("validation", "sample pictures before, during and after training; 0 for none", 4)
    validation_epochs: int = option("validation", "epochs between samples during training, when validation_prompt is given", modes=_per_mode(1, 50))
    validation_steps: int = option("validation", "sampler steps of the sample pictures (DPM-Solver++)", 25)
    validation_guidance_scale: float = option("validation", "guidance scale of the sample pictures", 7.5)
    # fmt: on

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UsageError(
                f"mode {self.mode!r} is unknown; there are {', '.join(MODES)}."
                f"{did_you_mean(str(self.mode), MODES)}"
            )
        for field in dataclasses.fields(self):
            if field.metadata["modes"] and getattr(self, field.name) is None:
                object.__setattr__(self, field.name, field.metadata["modes"][self.mode])
        object.__setattr__(self, "output_dir", str(Path(self.output_dir).expanduser()))
        problems = [*self._wrong_values(), *self._contradictions()]
        if problems:
            raise UsageError("\n".join(problems))

    def _wrong_values(self) -> list[str]:
        """Returns what is out of its range, or of another type than it should be."""
        problems = []
        for field in dataclasses.fields(self):
            value, choices = getattr(self, field.name), field.metadata["choices"]
            if value is None:
                continue
            wrong = type_problem(field, value)
            if wrong:
                problems.append(f"{field.name} {wrong}, not {value!r}")
            elif choices and value not in choices:
                hint = did_you_mean(str(value), choices)
                problems.append(
                    f"{field.name} is one of {', '.join(choices)}, not {value!r}.{hint}"
                )
            elif field.name in AT_LEAST and value < AT_LEAST[field.name]:
                least = AT_LEAST[field.name]
                problems.append(f"{field.name} must be at least {least}, not {value}")
            elif field.name in ABOVE_ZERO and value <= 0:
                problems.append(f"{field.name} must be above 0, not {value}")
            elif field.name in BELOW_ONE and not 0 <= value < 1:
                problems.append(f"{field.name} must be at least 0 and below 1, not {value}")
            elif isinstance(value, float) and not math.isfinite(value):
                problems.append(f"{field.name} must be a finite number, not {value}")
            elif isinstance(value, dict):
                problems += self._wrong_patterns(field.name, value)
        return problems

    @staticmethod
    def _wrong_patterns(name: str, table: dict[str, Any]) -> list[str]:
        whole = name == "rank_pattern"
        kinds, least = (int, "a whole number of at least 1") if whole else (int | float, "above 0")
        return [
            f"{name} {pattern!r} must be {least}, not {value!r}"
            for pattern, value in table.items()
            if isinstance(value, bool)
            or not isinstance(value, kinds)
            or not (value > 0 and math.isfinite(value))
        ]

    def _contradictions(self) -> list[str]:
        problems = []
        for field in dataclasses.fields(self):
            only = field.metadata["only"]
            if only and only != self.mode and getattr(self, field.name) != field.default:
                problems.append(f"{field.name} means something in {only} runs only")
        if not self.pretrained_model_name_or_path:
            problems.append("pretrained_model_name_or_path is required: a folder or a hub id")
        if self.mode == "text_to_image":
            if bool(self.train_data_dir) == bool(self.dataset_name):
                got = "both" if self.train_data_dir else "neither"
                problems.append(f"give one of train_data_dir and dataset_name, not {got}")
        else:
            problems += self._dreambooth_contradictions()
        if self.text_encoder_lr is not None and not self.train_text_encoder:
            problems.append("text_encoder_lr needs train_text_encoder")
        return problems + self._adapter_contradictions()

    def _adapter_contradictions(self) -> list[str]:
        """Returns the settings that the method has no use for."""
        plain_lora = self.method in ("lora", "lora_fa")
        wants = {
            "init_lora_weights": (plain_lora, "method lora or lora_fa"),
            "use_tucker": (self.method != "full", "another method than full"),
            "use_rslora": (self.method != "full", "another method than full"),
            "rank_dropout": (self.method != "full", "another method than full"),
            "neuron_dropout": (plain_lora and not self.use_dora, "method lora without use_dora"),
            "loraplus_lr_ratio": (self.method == "lora", "method lora"),
            "lokr_factor": (self.method == "lokr", "method lokr"),
            "lokr_full_matrix": (self.method == "lokr", "method lokr"),
            "lokr_decompose_both": (self.method == "lokr", "method lokr"),
        }
        problems = [
            f"{name} needs {what}"
            for name, (met, what) in wants.items()
            if getattr(self, name) and not met
        ]
        if self.method == "full":  # what has no rank has no use for one
            ranks = ("lora_alpha", "conv_rank", "conv_alpha", "rank_pattern", "alpha_pattern")
            given = [name for name in ranks if getattr(self, name) is not None]
            given += ["rank"] if self.rank != FIELDS["rank"].default else []
            problems += [f"{name} needs another method than full" for name in given]
        if self.lokr_decompose_both and self.lokr_full_matrix:
            problems.append("lokr_decompose_both has no effect with lokr_full_matrix")
        if self.init_lora_weights == "pissa" and (self.use_tucker or self.scale_weight_norms):
            problems.append(
                "init_lora_weights pissa goes with neither use_tucker nor scale_weight_norms"
            )
        return problems

    def _dreambooth_contradictions(self) -> list[str]:
        problems = []
        if not self.instance_data_dir:
            problems.append("instance_data_dir is required: a folder with pictures of the subject")
        if not self.instance_prompt:
            problems.append("instance_prompt is required, such as 'a photo of sks dog'")
        if self.with_prior_preservation:
            for name in ("class_data_dir", "class_prompt"):
                if not getattr(self, name):
                    problems.append(f"with_prior_preservation needs {name}")
        else:
            for name in ("class_data_dir", "class_prompt"):
                if getattr(self, name):
                    problems.append(f"{name} has no effect without with_prior_preservation")
        return problems

    def as_dict(self) -> dict[str, Any]:
        """Returns every field, defaults resolved."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.as_dict(), indent=2, sort_keys=True)


AT_LEAST: dict[str, float] = {
    "adam_weight_decay": 0,
    "adam_weight_decay_text_encoder": 0,
    "checkpoints_total_limit": 1,
    "conv_rank": 1,
    "dataloader_num_workers": 0,
    "gradient_accumulation_steps": 1,
    "lokr_factor": 1,
    "lr_num_cycles": 1,
    "lr_warmup_steps": 0,
    "max_train_samples": 1,
    "max_train_steps": 1,
    "noise_offset": 0,
    "num_class_images": 1,
    "num_train_epochs": 1,
    "num_validation_images": 0,
    "prior_loss_weight": 0,
    "rank": 1,
    "repeats": 1,
    "resolution": 1,
    "sample_batch_size": 1,
    "train_batch_size": 1,
    "validation_epochs": 1,
    "validation_steps": 1,
    "checkpointing_steps": 1,
}
ABOVE_ZERO = frozenset(
    (
        "adam_epsilon",
        "conv_alpha",
        "learning_rate",
        "lora_alpha",
        "loraplus_lr_ratio",
        "max_grad_norm",
        "scale_weight_norms",
        "snr_gamma",
        "text_encoder_lr",
    )
)
DROPOUTS = ("lora_dropout", "neuron_dropout", "rank_dropout", "module_dropout")
BELOW_ONE = frozenset(("adam_beta1", "adam_beta2", *DROPOUTS))
CHANGEABLE = frozenset(
    (
        "allow_tf32 cache_dir checkpointing_steps checkpoints_total_limit class_data_dir "
        "dataloader_num_workers dataset_name gradient_accumulation_steps gradient_checkpointing "
        "instance_data_dir learning_rate local_rank logging_dir max_train_steps num_train_epochs "
        "num_validation_images output_dir pretrained_model_name_or_path prior_generation_precision "
        "report_to resume_from_checkpoint sample_batch_size save_precision seed text_encoder_lr "
        "train_batch_size train_data_dir validation_epochs validation_guidance_scale validation_prompt "
        "validation_steps"
    ).split()
)
"""What a resumed run may have otherwise than the run it goes on with.

Places of files, what is shown, and learning rates (a run that diverged is resumed with a lower
one); batch, accumulation and seed are compared by what they make of the data's order.
"""


def type_name(field: dataclasses.Field) -> str:
    """Returns a field's plain type: "int", "float", "bool", "str" or "dict"."""
    text = str(field.type) if not isinstance(field.type, type) else field.type.__name__
    for name in ("dict", "bool", "float", "int"):
        if text.startswith(name):
            return name
    return "str"


def type_problem(field: dataclasses.Field, value: object) -> str:
    """Returns what a value should have been ("must be a whole number"), or an empty string."""
    kind = type_name(field)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = {
        "bool": isinstance(value, bool),
        "int": number and isinstance(value, int),
        "float": number,
        "str": isinstance(value, str),
        "dict": isinstance(value, dict),
    }
    words = {
        "bool": "must be true or false",
        "int": "must be a whole number",
        "float": "must be a number",
        "str": "must be a text",
        "dict": "must be a table of pattern = number",
    }
    return "" if fits[kind] else words[kind]


FIELDS: dict[str, dataclasses.Field] = {f.name: f for f in dataclasses.fields(TrainConfig)}
