"""Options of training: batch, length, precision, learning rates, optimiser."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from sd_lora.config.optimizers import (
    OPTIMIZERS,
    WITHOUT_MOMENTS,
    Optimizer,
    canonical,
    is_import_path,
    optimizer_facts,
)
from sd_lora.config.options.device import DeviceOptions
from sd_lora.config.options.saving import SavingOptions
from sd_lora.config.rows import LOWER, PLAIN_LORA, SAME, SCHEDULES, Steps, by_mode, section
from sd_lora.errors import Problem, did_you_mean

if TYPE_CHECKING:
    from sd_lora.config.schema import TrainConfig

_NUMBER = r"(\d+(?:\.\d+)?)"
_TIME = re.compile(rf"(?:{_NUMBER}h)? *(?:{_NUMBER}m)? *(?:{_NUMBER}s)?")

_SIZE = re.compile(rf"{_NUMBER} *Gi?B?", re.IGNORECASE)
"""A size of memory: a card of "8 GB" has 8 GiB."""

option = section("training")


def _using(option: str) -> tuple[str, ...]:
    """The schedules that use an option."""
    return tuple(name for name, options in SCHEDULES.items() if option in options)


class TrainingOptions(DeviceOptions, SavingOptions):
    """Batch, length, precision, learning rates and optimiser."""

    # fmt: off
    train_batch_size: int = option(None,
        "images per process and micro-batch (instances; class images come on top)",
        ge=1, modes=by_mode(16, 4), may_change=True, header="ss_batch_size_per_device",
        scripts="ABCD", kohya=SAME, onetrainer="batch_size", simpletuner=SAME,
        dataset_key="batch_size", ai_toolkit="train.batch_size",
        less_memory={"drawing images to score": (1, LOWER)},
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
        of_all_jobs=True, requires={"memory_budget": (None,)},
        may_change=True, less_memory={"a step": (1, True)}, costs="a third slower",
        header="ss_gradient_checkpointing", scripts="ABCD", kohya=SAME,
        onetrainer="unet.gradient_checkpointing", simpletuner=SAME,
        ai_toolkit="train.gradient_checkpointing",
        main="less memory, about a third slower")
    memory_budget: str | None = option(None,
        "memory of a step, such as 8GB: as few activations are recomputed as keep it below, by "
        "count, in place of all with gradient_checkpointing",
        unless={"offload_activations": (True,)}, may_change=True)
    fit: str = option("off",
        "after an out-of-memory of the largest batch, which is tried before the first step: off "
        "says which flags take less; auto takes gradient checkpointing, then fewer images at once, "
        "with the same samples a step",
        choices=("off", "auto"), may_change=True,
        main="auto: less memory where the largest batch does not fit")
    mixed_precision: str | None = option(None,
        "precision of the frozen base; accelerate's configuration if not given; auto: bf16 on a "
        "GPU that has it, else fp16, float32 on a CPU; the LoRA is float32",
        of_all_jobs=True, choices=("no", "fp16", "bf16", "auto"), scripts="ABCD", kohya=SAME,
        less_memory={"a step": (5, "bf16"), "loading the base model": (1, "bf16"),
            "bringing the models to the device": (1, "bf16"),
            "drawing sample images": (2, "bf16")},
        onetrainer="train_dtype", simpletuner=SAME, ai_toolkit="train.dtype",
        main="of the frozen base; the LoRA is float32")
    allow_tf32: bool = option(False,
        "TF32 products on Ampere GPUs and later; convolutions use it always", of_all_jobs=True,
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
    weight_decay_pattern: dict[str, Annotated[float, Field(ge=0)]] | None = option(None,
        "weight-decay factors by module: pattern=factor …, as lr_pattern; 0 for none",
        summary=("optimiser", "factors of the decay by module {}"))
    scale_weight_norms: float | None = option(None,
        "scale each delta down to this Frobenius norm after each step; off if not given",
        gt=0, unless={"method": ("oft",)}, header="ss_scale_weight_norms", kohya=SAME)
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
    lr_min_ratio: float = option(0.0,
        "share of the learning rate at which a falling schedule ends",
        ge=0, lt=1, requires={"lr_scheduler": _using("lr_min_ratio")},
        summary=("schedule", "down to {:g} of the rate"), kohya="lr_scheduler_min_lr_ratio",
        onetrainer="learning_rate_min_factor")
    lr_decay_steps: Steps = option(0.2,
        "optimiser steps of warmup_stable_decay's fall, or below 1 their share of the run",
        gt=0, requires={"lr_scheduler": _using("lr_decay_steps")},
        summary=("schedule", "{:g} of decay"), kohya=SAME)
    lr_step_rules: str | None = option(None,
        "piecewise_constant's factors, each with the step before which it holds, and the last one: "
        "1:100,0.1:200,0.01",
        requires={"lr_scheduler": _using("lr_step_rules")}, summary=("schedule", "{}"))
    lr_points: str | None = option(None,
        "file of schedule points: a step, or a share of the run as 25%, and the factor of the "
        "rate there in each line, straight lines between",
        requires={"lr_scheduler": _using("lr_points")}, summary=("schedule", "of {}"))
    optimizer: str = option("adamw",
        "optimiser (docs/optimizers.md), or a class by its path: package.module.Class",
        choices=tuple(OPTIMIZERS), or_import_path=True,
        package={name: facts.package for name, facts in OPTIMIZERS.items() if facts.package},
        without_gpu=dict.fromkeys(("adamw8bit", "lion8bit"),
            "saves no GPU memory, and bitsandbytes before 0.50 stops at the first step"),
        formerly="use_8bit_adam", former_values={True: "adamw8bit", False: None},
        less_memory={"a step": (4, "adamw8bit"), "updating the weights": (1, "adamw8bit")},
        summary=("optimiser", "{}"), scripts="D", kohya="optimizer_type",
        onetrainer="optimizer.optimizer", ai_toolkit="train.optimizer", simpletuner=SAME)
    optimizer_args: dict[str, bool | int | float | str | list[float] | None] | None = option(None,
        "arguments of the optimiser: key=value …",
        summary=("optimiser", "{}"), kohya=SAME)
    adam_beta1: float = option(0.9,
        "beta1 of AdamW and its variants",
        ge=0, lt=1, unless={"optimizer": WITHOUT_MOMENTS}, scripts="ABCD", simpletuner=SAME)
    adam_beta2: float = option(0.999,
        "beta2 of AdamW and its variants",
        ge=0, lt=1, unless={"optimizer": WITHOUT_MOMENTS}, scripts="ABCD", simpletuner=SAME)
    adam_weight_decay: float | None = option(None,
        "weight decay, of any optimiser",
        ge=0, modes=by_mode(0.01, 0.01), sdxl={"dreambooth": 0.0001}, scripts="ABCD",
        onetrainer="optimizer.weight_decay", simpletuner=SAME,
        ai_toolkit="train.optimizer_params.weight_decay")
    adam_weight_decay_text_encoder: float | None = option(None,
        "weight decay of the text encoders' LoRA; adam_weight_decay if not given",
        ge=0, modes=by_mode(None, None), sdxl={"dreambooth": 0.001},
        requires={"train_text_encoder": None}, scripts="D")
    adam_epsilon: float = option(1e-08,
        "epsilon of AdamW and its variants",
        gt=0, unless={"optimizer": WITHOUT_MOMENTS}, scripts="ABCD", simpletuner=SAME,
        ai_toolkit="train.optimizer_params.eps")
    max_grad_norm: float = option(1.0,
        "gradients are scaled down to this norm; 0 for no limit",
        ge=0, header="ss_max_grad_norm", scripts="ABCD", kohya=SAME,
        onetrainer="clip_grad_norm", simpletuner=SAME, ai_toolkit="train.max_grad_norm")
    on_nan: str = option("stop",
        "a step whose numbers are not finite: stop the run, skip the update, at most 9 times in a "
        "row (skip waits for the device in each step), or restore the last good checkpoint, at "
        "most 3 times in a run, and go on with other noise up to that step",
        choices=("stop", "skip", "restore"), may_change=True)
    # fmt: on

    @property
    def time_limit(self) -> float | None:
        """Seconds after which the run ends; None without a limit, 0 for words that are no time."""
        if self.max_train_time is None:
            return None
        parts = _TIME.fullmatch(self.max_train_time.strip())
        numbers = [float(number) for number in parts.groups("0")] if parts else [0.0]
        return sum(n * unit for n, unit in zip(numbers, (3600, 60, 1), strict=False))

    @property
    def budget(self) -> int | None:
        """Bytes of `memory_budget`; None without one, 0 for words that are no size."""
        if self.memory_budget is None:
            return None
        found = _SIZE.fullmatch(self.memory_budget.strip())
        return int(float(found[1]) * 2**30) if found else 0

    @property
    def optimizer_facts(self) -> Optimizer:
        """Facts of the optimiser with its arguments."""
        return optimizer_facts(self.optimizer, self.optimizer_args)


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


def with_optimizer(values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Values in which the optimiser's usual rate and schedule stand in place of a preset's or a
    mode's.

    given: the values of them that are no preset's.
    """
    name, args = values.get("optimizer"), values.get("optimizer_args")
    name = canonical(name) if isinstance(name, str) else None
    facts = optimizer_facts(name or "", args if isinstance(args, dict) else None)
    own: dict[str, Any] = {}
    if facts.finds_rate:
        rate = own["learning_rate"] = given.get("learning_rate") or 1.0
        own |= {"text_encoder_lr": rate} if values.get("train_text_encoder") else {}
    of_preset = values.get("lr_scheduler")
    if facts.schedules and of_preset and of_preset not in facts.schedules:
        usual = own["lr_scheduler"] = facts.schedules[0]
        if "lr_warmup_steps" not in SCHEDULES[usual]:
            own["lr_warmup_steps"] = None
    own = {name: value for name, value in own.items() if given.get(name) is None}
    together = dict(values) | own | ({"optimizer": name} if name else {})
    return {n: v for n, v in together.items() if v is not None or n in given}


def contradictions(config: "TrainConfig") -> Iterator[Problem]:
    """Yield arguments that the optimiser has not, rates, schedules and methods that do not go with
    it, schedules whose shape is not given, and limits of time and memory that are none."""
    if config.time_limit == 0:
        text = f"max_train_time must be a time above 0, not {config.max_train_time!r}"
        yield Problem("max_train_time", text, "Write 90m, 2h or 1h30m")
    if config.memory_budget is not None and not config.budget:
        text = f"memory_budget must be a size above 0, not {config.memory_budget!r}"
        yield Problem("memory_budget", text, "Write 8GB or 7.5GB")
    yield from _arguments(config)
    yield from _moments(config)
    yield from _rates(config)
    yield from _schedules(config)
    name, facts = config.optimizer, config.optimizer_facts
    if facts.averages and config.scale_weight_norms is not None:
        text = f"scale_weight_norms excludes {name}, which trains at another point than it exports"
        yield Problem("scale_weight_norms", text, "Leave it out")
    if name == "adamwriemannian" and config.method not in PLAIN_LORA:
        text = f"adamwriemannian preconditions pairs A and B, and method {config.method} has none"
        yield Problem("optimizer", text, f"Methods: {', '.join(PLAIN_LORA)}")


_AS_OPTIONS = {
    "lr": "learning_rate", "weight_decay": "adam_weight_decay",
    "betas": "adam_beta1 and adam_beta2", "eps": "adam_epsilon",
}  # fmt: skip
"""Argument of optimisers in general → the options that are it here."""


def _arguments(config: "TrainConfig") -> Iterator[Problem]:
    """Names in `optimizer_args` that the optimiser does not take."""
    name, facts = config.optimizer, config.optimizer_facts
    taken = facts.args if name in OPTIMIZERS else (*(config.optimizer_args or {}),)
    for key in config.optimizer_args or {}:
        general = _AS_OPTIONS.get(key)
        of_moments = key not in ("lr", "weight_decay")
        if general and not (of_moments and (key in taken or not facts.moments)):
            yield Problem("optimizer_args", f"optimizer_args {key} is {general} here")
        elif key not in taken:
            near = did_you_mean(key, taken).strip()
            rest = f"{name} takes {', '.join(taken)}" if taken else f"{name} takes none"
            yield Problem("optimizer_args", f"{key} is no argument of {name}", near or rest)


def _moments(config: "TrainConfig") -> Iterator[Problem]:
    """Options of AdamW's moments with an imported class, whose arguments nobody knows here."""
    betas, name = "betas=0.9,0.99", config.optimizer
    own = {"adam_beta1": betas, "adam_beta2": betas, "adam_epsilon": "eps=1e-6"}
    for option, argument in own.items() if is_import_path(name) else ():
        if getattr(config, option) != TrainingOptions.model_fields[option].default:
            text = f"{option} does not reach {name}, a class by its import path"
            yield Problem(option, text, f"Give the class's own: --optimizer_args {argument}")


RATES = ("learning_rate", "text_encoder_lr", "text_encoder_2_lr", "embedding_lr")
MULTIPLES = ("loraplus_lr_ratio", "lr_pattern")

ONE_EACH = "Leave it out; prodigyplusschedulefree finds one for each group"

LEAST_FACTOR = 0.1
"""Rates below are rates of AdamW, and no factors: diffusers' script warns below it, too."""


def _rates(config: "TrainConfig") -> Iterator[Problem]:
    """Rates that do not go with an optimiser that finds its own."""
    name, facts, usual = config.optimizer, config.optimizer_facts, "Leave it out: 1 is usual"
    if not facts.finds_rate:
        return
    given = {rate: value for rate in RATES if (value := getattr(config, rate)) is not None}
    for rate, value in given.items():
        if facts.own_steps and value != 1:
            text = f"{rate} excludes relative_step, by which {name} takes steps of its own size"
            yield Problem(rate, text, "Leave one of them out")
        elif value < LEAST_FACTOR:
            text = f"{rate} {value:g} would be a factor of the rate that {name} finds"
            yield Problem(rate, text, usual)
        elif facts.one_rate and value != given.get("learning_rate"):
            text = f"{rate} {value:g}: {name} finds one rate for all parameters"
            yield Problem(rate, text, ONE_EACH)
    for other in MULTIPLES if facts.one_rate else ():
        if getattr(config, other) is not None:
            text = f"{other} excludes {name}, which has one rate for all parameters"
            yield Problem(other, text, ONE_EACH)
    if config.scale_lr:
        text = f"scale_lr excludes {name}, which finds the rate of any batch"
        yield Problem("scale_lr", text, "Leave it out")


def _schedules(config: "TrainConfig") -> Iterator[Problem]:
    """A schedule that the optimiser makes useless or wrong, and one without its shape."""
    facts, schedule = config.optimizer_facts, config.lr_scheduler
    if facts.schedules and schedule not in facts.schedules:
        why = "takes steps of its own size" if facts.own_steps else "averages its steps instead"
        text = f"lr_scheduler {schedule} excludes {config.optimizer}, which {why}"
        yield Problem("lr_scheduler", text, f"It goes with {' or '.join(facts.schedules)}")
    for shape in ("lr_step_rules", "lr_points"):
        if schedule in _using(shape) and not getattr(config, shape):
            yield Problem(shape, f"lr_scheduler {schedule} needs {shape}")
    if config.lr_step_rules and not step_rules(config.lr_step_rules):
        text = f"lr_step_rules {config.lr_step_rules!r} is not factor:step,…,factor"
        yield Problem("lr_step_rules", text, "For instance 1:100,0.1:200,0.01, steps increasing")


def step_rules(text: str) -> list[tuple[float, float]]:
    """Factors of "1:100,0.1:200,0.01", each with the step before which it holds, infinity for the
    last one; none for a text of another form."""
    *rules, last = text.split(",")
    try:
        parts = [(float(factor), int(step)) for factor, step in (r.split(":") for r in rules)]
        found = [*parts, (float(last), math.inf)]
    except ValueError:
        return []
    steps = [step for _, step in found]
    rises = all(a < b for a, b in zip([0, *steps], steps, strict=False))
    return found if rises and all(0 <= factor < math.inf for factor, _ in found) else []
