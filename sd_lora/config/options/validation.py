"""Options of the validation loss: its images, and the steps between two measurements."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from sd_lora.config.rows import Section, section
from sd_lora.errors import Problem

if TYPE_CHECKING:
    from sd_lora.config.schema import TrainConfig

option = section("validation")


class ValidationLossOptions(Section):
    """Validation loss."""

    # fmt: off
    validate_every: int | None = option(None,
        "optimiser steps between validations, whose loss is on fixed noise that is never trained; "
        "0 for none; if not given, spread evenly over the run, at least 384 images apart (768 with "
        "images held out); a run that is resumed with more steps validates at others",
        ge=0, may_change=True, kohya="validate_every_n_steps")
    holdout: int | None = option(None,
        "images that are validated and not trained; if not given, none of fewer than 40, of more "
        "a tenth, at most 8",
        ge=0, unless={"validate_every": (0,)})
    score_features: str | None = option(None,
        "folder of a vision model (DINO, CLIP, SigLIP) by which images are scored that the run "
        "draws: fidelity, copies, prompts followed, leak and harm; none if not given",
        in_record="name", may_change=True)
    score_every: int | None = option(None,
        "optimiser steps between scores; a quarter of the run if not given",
        ge=1, requires={"score_features": None}, may_change=True)
    score_sets: int = option(1,
        "images of each prompt in a score, each from a seed of its own; from 2 on it has intervals",
        ge=1, requires={"score_features": None}, may_change=True)
    score_kind: str = option("subject",
        "what the images share, by which fidelity and leak are told",
        choices=("subject", "style"), may_change=True)
    score_class_prompt: str | None = option(None,
        "prompt of the subject's class, 'a photo of a dog', for the leak into it; class_prompt if "
        "not given",
        requires={"score_features": None}, may_change=True)
    keep_best: bool | None = option(None,
        "save a checkpoint, and keep it, at each validation whose loss is the best so far, or "
        "each score that is; best.json names it, and a run resumes it by the name best; if not "
        "given, where images are scored",
        may_change=True)
    early_stopping_patience: int | None = option(None,
        "validations (scores, where images are scored) in a row without a better one after which "
        "the run ends; its files are then those of the best one",
        ge=1, may_change=True)
    # fmt: on

    @property
    def recomputes(self) -> bool:
        """Whether a step computes all activations again, one more forward pass beside which samples
        and validations take less of the time."""
        return bool(self.gradient_checkpointing)  # type: ignore[attr-defined]

    @property
    def keeps_best(self) -> bool:
        """Whether checkpoints of the best validation or score are saved and kept."""
        asked = bool(self.score_features) if self.keep_best is None else self.keep_best
        return asked or self.early_stopping_patience is not None


def contradictions(config: "TrainConfig") -> Iterator[Problem]:
    """Yield options for the best step where nothing is measured, and where it is not kept."""
    if config.keep_best is False and config.early_stopping_patience is not None:
        text = "early_stopping_patience ends a run with the files of its best step, which is kept"
        yield Problem("keep_best", f"--no-keep_best: {text}", "Leave one of the two out")
    if config.validate_every == 0 and not config.score_features:
        for name in ("keep_best", "early_stopping_patience"):
            if getattr(config, name):
                yield Problem(name, f"{name} has no effect with validate_every 0", "Leave it out")


FEWEST = 40
"""Images from which on some are held out if `holdout` is not given: a subject of 5 to 15 images
would lose more by each image than the run learns from its loss."""


def num_held_out(holdout: int | None, images: int) -> int:
    """Number of images held out. holdout: the option. images: usable ones, different by content."""
    if holdout is not None:
        return holdout
    return min(8, images // 10) if images >= FEWEST else 0
