"""Options of training: batch, length, precision, learning rates, checkpoints."""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from sd_lora.config.rows import SAME, SCHEDULES, Section, Steps, by_mode, section
from sd_lora.errors import Problem

if TYPE_CHECKING:
    from sd_lora.config.schema import TrainConfig

_NUMBER = r"(\d+(?:\.\d+)?)"
_TIME = re.compile(rf"(?:{_NUMBER}h)? *(?:{_NUMBER}m)? *(?:{_NUMBER}s)?")

option = section("training")


def _using(option: str) -> tuple[str, ...]:
    """The schedules that use an option."""
    return tuple(name for name, options in SCHEDULES.items() if option in options)


class TrainingOptions(Section):
    """Batch, length, precision, learning rates, optimiser and checkpoints."""

    # fmt: off
    train_batch_size: int = option(None,
        "images per process and micro-batch (instances; class images come on top)",
        ge=1, modes=by_mode(16, 4), may_change=True, header="ss_batch_size_per_device",
        scripts="ABCD", kohya=SAME, onetrainer="batch_size", simpletuner=SAME,
        dataset_key="batch_size", ai_toolkit="train.batch_size",
        short="batch", main="images per step and process")
    num_train_epochs: int | None = option(None,
        "epochs, unless max_train_steps is given; if neither is, the length is that of the "
        "preset, and without one of subject for DreamBooth and style for captions",
        ge=1, of_scripts=by_mode(100, 1), may_change=True, scripts="ABCD", kohya="max_train_epochs",
        onetrainer="epochs", simpletuner=SAME)
    max_train_steps: int | None = option(None,
        "optimiser steps; overrides num_train_epochs",
        ge=1, may_change=True, scripts="ABCD", kohya=SAME, simpletuner=SAME,
        ai_toolkit="train.steps",
        short="steps", main="length; by purpose and images if not given")
    max_train_time: str | None = option(None,
        "end after this time, such as 90m, 2h or 1h30m, with a checkpoint to go on from",
        may_change=True)
    gradient_accumulation_steps: int = option(1,
        "micro-batches per optimiser step",
        ge=1, may_change=True, header="ss_gradient_accumulation_steps", scripts="ABCD",
        kohya=SAME, onetrainer=SAME, simpletuner=SAME, ai_toolkit="train.gradient_accumulation")
    gradient_checkpointing: bool = option(False,
        "recompute activations to save memory, about a third slower",
        may_change=True, header="ss_gradient_checkpointing", scripts="ABCD", kohya=SAME,
        onetrainer="unet.gradient_checkpointing", simpletuner=SAME,
        ai_toolkit="train.gradient_checkpointing",
        main="less memory, about a third slower")
    mixed_precision: str | None = option(None,
        "precision of the frozen base; accelerate's configuration if not given; auto: bf16 on a "
        "GPU that has it, else fp16, float32 on a CPU; the LoRA is float32",
        choices=("no", "fp16", "bf16", "auto"), scripts="ABCD", kohya=SAME,
        onetrainer="train_dtype", simpletuner=SAME, ai_toolkit="train.dtype",
        main="of the frozen base; the LoRA is float32")
    allow_tf32: bool = option(False,
        "TF32 matrix products on Ampere GPUs and later",
        without_gpu="has no effect", may_change=True, scripts="ABCD", simpletuner=SAME)
    learning_rate: float | None = option(None,
        "learning rate after warm-up",
        gt=0, modes=by_mode(0.0001, 0.0005), sdxl={"dreambooth": 0.0001}, may_change=True,
        scripts="ABCD", kohya="unet_lr", onetrainer=SAME, simpletuner=SAME, ai_toolkit="train.lr",
        short="lr", main="learning rate after warm-up")
    text_encoder_lr: float | None = option(None,
        "learning rate of the text encoders' LoRA; learning_rate if not given",
        gt=0, modes=by_mode(None, None), sdxl={"dreambooth": 5e-06},
        requires={"train_text_encoder": None}, may_change=True, scripts="D", kohya=SAME,
        onetrainer="text_encoder.learning_rate", simpletuner=SAME,
        ai_toolkit="train.text_encoder_lr")
    text_encoder_2_lr: float | None = option(None,
        "learning rate of the LoRA of SDXL's second text encoder; text_encoder_lr if not "
        "given",
        gt=0, requires={"train_text_encoder": None}, may_change=True,
        onetrainer="text_encoder_2.learning_rate")
    text_encoder_stop_step: int | None = option(None,
        "optimiser step after which the text encoders' LoRA stops learning",
        ge=0, requires={"train_text_encoder": None},
        onetrainer="text_encoder.stop_training_after")
    text_encoder_2_stop_step: int | None = option(None,
        "the same for SDXL's second text encoder; text_encoder_stop_step if not given",
        ge=0, requires={"train_text_encoder": None})
    embedding_lr: float | None = option(None,
        "learning rate of the new words' embeddings; text_encoder_lr, or else learning_rate, "
        "if not given",
        gt=0, requires={"token_abstraction": None}, may_change=True,
        onetrainer="embedding_learning_rate", ai_toolkit="train.embedding_lr")
    embedding_stop_step: int | None = option(None,
        "optimiser step after which the new words stop learning",
        ge=0, requires={"token_abstraction": None})
    loraplus_lr_ratio: float | None = option(None,
        "LoRA+: learning rate of B divided by that of A; 16 is usual; off if not given",
        gt=0, requires={"method": ("lora",)}, summary=("learning rate", "B × {:g} (LoRA+)"),
        kohya=SAME)
    lr_pattern: dict[str, Annotated[float, Field(gt=0)]] | None = option(None,
        "learning-rate factors by module: pattern=factor …, at the end of names; "
        "'down_blocks.0.*'=0.5 for a block",
        summary=("learning rate", "factors by module {}"))
    scale_weight_norms: float | None = option(None,
        "scale each delta down to this Frobenius norm after each step; off if not given",
        gt=0, header="ss_scale_weight_norms", kohya=SAME)
    scale_lr: bool = option(False,
        "multiply the learning rates by batch x accumulation x processes",
        scripts="ABCD", onetrainer="learning_rate_scaler")
    lr_scheduler: str = option("constant",
        "learning-rate schedule",
        choices=tuple(SCHEDULES), header="ss_lr_scheduler", scripts="ABCD", kohya=SAME,
        onetrainer="learning_rate_scheduler", simpletuner=SAME, ai_toolkit="train.lr_scheduler")
    lr_warmup_steps: Steps = option(500,
        "optimiser steps of warm-up, or below 1 their share of the run: 0.1 (none for constant)",
        ge=0, requires={"lr_scheduler": _using("lr_warmup_steps")}, only_warns=True,
        scripts="ABCD", kohya=SAME, onetrainer="learning_rate_warmup_steps", simpletuner=SAME)
    lr_num_cycles: int = option(1,
        "restarts of cosine_with_restarts",
        ge=1, requires={"lr_scheduler": _using("lr_num_cycles")},
        summary=("schedule", "{} cycles"), scripts="CD",
        kohya="lr_scheduler_num_cycles", simpletuner=SAME)
    lr_power: float = option(1.0,
        "power of polynomial",
        requires={"lr_scheduler": _using("lr_power")}, summary=("schedule", "power {:g}"),
        scripts="CD", kohya="lr_scheduler_power", simpletuner=SAME)
    use_8bit_adam: bool = option(False,
        "8-bit AdamW of bitsandbytes (extra: 8bit)",
        package=("bitsandbytes", "8bit"),
        without_gpu="saves no GPU memory, and bitsandbytes before 0.50 stops at the first step",
        scripts="ABCD", kohya="optimizer_type",
        onetrainer="optimizer.optimizer", ai_toolkit="train.optimizer")
    adam_beta1: float = option(0.9,
        "AdamW's beta1",
        ge=0, lt=1, scripts="ABCD", simpletuner=SAME)
    adam_beta2: float = option(0.999,
        "AdamW's beta2",
        ge=0, lt=1, scripts="ABCD", simpletuner=SAME)
    adam_weight_decay: float | None = option(None,
        "AdamW's weight decay",
        ge=0, modes=by_mode(0.01, 0.01), sdxl={"dreambooth": 0.0001}, scripts="ABCD",
        onetrainer="optimizer.weight_decay", simpletuner=SAME,
        ai_toolkit="train.optimizer_params.weight_decay")
    adam_weight_decay_text_encoder: float | None = option(None,
        "weight decay of the text encoders' LoRA; adam_weight_decay if not given",
        ge=0, modes=by_mode(None, None), sdxl={"dreambooth": 0.001},
        requires={"train_text_encoder": None}, scripts="D")
    adam_epsilon: float = option(1e-08,
        "AdamW's epsilon",
        gt=0, scripts="ABCD", simpletuner=SAME, ai_toolkit="train.optimizer_params.eps")
    max_grad_norm: float = option(1.0,
        "gradients are scaled down to this norm; 0 for no limit",
        ge=0, header="ss_max_grad_norm", scripts="ABCD", kohya=SAME,
        onetrainer="clip_grad_norm", simpletuner=SAME, ai_toolkit="train.max_grad_norm")
    on_nan: str = option("stop",
        "a step whose gradient is not finite: stop the run, or skip the update, at most 9 times in "
        "a row; skip waits for the device in each step",
        choices=("stop", "skip"), may_change=True)
    checkpointing_steps: int = option(500,
        "optimiser steps between checkpoints",
        ge=1, may_change=True, scripts="ABCD", kohya="save_every_n_steps",
        onetrainer="backup_after", simpletuner="checkpoint_step_interval",
        ai_toolkit="save.save_every",
        main="steps between checkpoints")
    save_lora_every: int | None = option(None,
        "optimiser steps between LoRA files in mid-run, in the folders lora-STEP of output_dir; "
        "at the end alone if not given",
        ge=1, may_change=True)
    save_lora_every_epochs: int | None = option(None,
        "the same in epochs",
        ge=1, may_change=True, kohya="save_every_n_epochs")
    checkpoint_minutes: float | None = option(None,
        "minutes after which a checkpoint is saved as well; by steps alone if not given",
        gt=0, may_change=True)
    checkpoints_total_limit: int | None = option(None,
        "number of checkpoints to keep, the newest ones",
        ge=1, may_change=True, scripts="ABCD", kohya="save_last_n_steps_state",
        onetrainer="rolling_backup_count", simpletuner=SAME,
        ai_toolkit="save.max_step_saves_to_keep")
    keep_every: int | None = option(None,
        "keep the checkpoints at multiples of so many steps, beside the newest ones",
        ge=1, requires={"checkpoints_total_limit": None}, may_change=True)
    save_precision: str = option("fp32",
        "precision of the LoRA files; checkpoints keep float32",
        choices=("fp32", "fp16", "bf16"), may_change=True, kohya=SAME,
        onetrainer="output_dtype", ai_toolkit="save.dtype")
    resume_from_checkpoint: str | None = option(None,
        "a checkpoint folder, its name in the run's folder, latest, or latest-if-any: as latest, "
        "and anew where there is none",
        may_change=True, scripts="ABCD", kohya="resume", onetrainer="continue_last_backup",
        simpletuner=SAME, in_record="no",
        main="a checkpoint, or latest")
    # fmt: on

    @property
    def time_limit(self) -> float | None:
        """Seconds after which the run ends; None without a limit, 0 for words that are no time."""
        if self.max_train_time is None:
            return None
        parts = _TIME.fullmatch(self.max_train_time.strip())
        numbers = [float(number) for number in parts.groups("0")] if parts else [0.0]
        return sum(n * unit for n, unit in zip(numbers, (3600, 60, 1), strict=False))


class ResolvedTraining(TrainingOptions):
    """Options of training on a known base model: every rate is a number."""

    learning_rate: float
    adam_weight_decay: float

    def learning_rate_of(self, component: str) -> float:
        """Learning rate of a component's deltas: its own, or else the more general one."""
        rates: list[float | None] = [self.learning_rate]
        rates += [self.text_encoder_lr] if component != "unet" else []
        rates += [self.text_encoder_2_lr] if component == "text_encoder_2" else []
        return next(rate for rate in reversed(rates) if rate is not None)

    def num_warmup_steps(self, num_steps: int) -> int:
        """Optimiser steps of warm-up in a run of `num_steps`; 0 for a schedule without."""
        if self.lr_scheduler not in _using("lr_warmup_steps"):
            return 0
        wanted = self.lr_warmup_steps
        return round(wanted * num_steps) if wanted < 1 else int(wanted)

    def weight_decay_of(self, component: str) -> float:
        """Weight decay of a component's deltas."""
        own = self.adam_weight_decay_text_encoder
        return self.adam_weight_decay if component == "unet" or own is None else own

    @property
    def new_words_learning_rate(self) -> float:
        """Learning rate of the embeddings of new words."""
        own = self.embedding_lr
        return self.learning_rate_of("text_encoder") if own is None else own

    def stop_step_of(self, component: str) -> int | None:
        """Number of steps after which a text encoder's LoRA stops learning; None: never."""
        own = getattr(self, f"{component}_stop_step")
        return self.text_encoder_stop_step if own is None else own


def contradictions(config: "TrainConfig") -> Iterator[Problem]:
    """Yield a limit of time that is none."""
    if config.time_limit == 0:
        text = f"max_train_time must be a time above 0, not {config.max_train_time!r}"
        yield Problem("max_train_time", text, "Write 90m, 2h or 1h30m")
