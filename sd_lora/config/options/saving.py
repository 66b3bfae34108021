"""Options of the weights that a run samples, saves and exports: moving average, checkpoints."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from sd_lora.config.rows import SAME, Section, section
from sd_lora.errors import Problem

if TYPE_CHECKING:
    from sd_lora.config.schema import TrainConfig

option = section("training")


class SavingOptions(Section):
    """Moving average, checkpoints and LoRA files in mid-run."""

    # fmt: off
    use_ema: bool = option(False,
        "sample and export a moving average of the LoRA over the steps (docs/optimizers.md)",
        summary=("optimiser", "with a moving average"), simpletuner=SAME)
    ema_decay: float | None = option(None,
        "constant decay of the moving average, such as 0.99; by ema_length if not given",
        gt=0, lt=1, requires={"use_ema": None}, simpletuner=SAME)
    ema_length: float | None = option(None,
        "length of the moving average as a share of the run, EDM2's sigma_rel; 0.1 "
        "if neither is given; `sd-lora export --ema_length` makes others afterwards",
        ge=0.01, lt=0.25, requires={"use_ema": None})
    checkpointing_steps: int = option(500,
        "optimiser steps between checkpoints",
        ge=1, may_change=True, scripts="ABCD", kohya="save_every_n_steps",
        onetrainer="backup_after", simpletuner="checkpoint_step_interval",
        ai_toolkit="save.save_every",
        main="steps between checkpoints")
    save_lora_every: int | None = option(None,
        "optimiser steps between LoRA files in mid-run, in the output folder's folders lora-STEP; "
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
    push_to_hub: bool = option(False,
        "upload the LoRA files with a model card and sample images to the hub at the end; that the "
        "token may write there is proved before anything is loaded",
        may_change=True, scripts="ABCD", simpletuner=SAME, ai_toolkit="save.push_to_hub")
    hub_model_id: str | None = option(None,
        "repository of the upload, owner/name; the token's owner and the output folder's name if "
        "not given",
        requires={"push_to_hub": None}, may_change=True, scripts="ABCD",
        kohya="huggingface_repo_id", simpletuner=SAME, ai_toolkit="save.hf_repo_id")
    hub_private_repo: bool = option(False,
        "make that repository, if it is new, a private one",
        requires={"push_to_hub": None}, may_change=True, ai_toolkit="save.hf_private")
    hub_license: str | None = option(None,
        "licence in the model card, by its name on the hub, such as cc-by-4.0, for a base under "
        "another one than the family's published base, whose it is if not given",
        may_change=True)
    hub_token: str | None = option(None,
        "token of the upload, which stands in no file of the run; that of HF_TOKEN or of `hf auth "
        "login` if not given",
        may_change=True, scripts="ABCD", in_record="no")
    # fmt: on

    @property
    def resumes(self) -> bool:
        """Whether the run may go on from a checkpoint."""
        return self.resume_from_checkpoint is not None


def contradictions(config: "TrainConfig") -> Iterator[Problem]:
    """Yield two kinds of moving average, and one of an optimiser that averages itself."""
    if config.ema_decay is not None and config.ema_length is not None:
        text = "ema_decay and ema_length are two kinds of moving average"
        yield Problem("ema_length", text, "Give one of them")
    if config.optimizer_facts.averages and config.use_ema:
        text = f"use_ema excludes {config.optimizer}, which averages its steps itself"
        yield Problem("use_ema", text, "Leave it out")
