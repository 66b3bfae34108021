"""`sd-lora judge`: how much has a LoRA learned of images, and at which strength is it best?

Anybody's file is measured as a run measures itself: the loss of each image at the same noise and
timesteps, here by strength. A LoRA that has learned too little is better beyond strength 1, one
that has learned too much below it. With features of images it is looked at as well: prompts drawn
by the base and at each strength, and scored (sampling/score.py).
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from PIL import Image

from sd_lora.config.schema import TrainConfig
from sd_lora.errors import UsageError
from sd_lora.formats.file_names import name_of
from sd_lora.report.events import Event, FindingMade, Listener, Progress, counting, to_all
from sd_lora.report.sheets import Sheet
from sd_lora.report.strengths import Judged
from sd_lora.sample import Loras, Mix, fitting
from sd_lora.sampling.features import Features
from sd_lora.sampling.judge import Judge
from sd_lora.sampling.sampler import can_generate_images
from sd_lora.sampling.score import Prompts
from sd_lora.training.changes import changes_of
from sd_lora.training.measure import measured
from sd_lora.training.out_of_memory import memory_for
from sd_lora.training.run import Run
from sd_lora.training.scoring import (
    columns_of,
    drawn_sets,
    looked,
    prompts_for,
    shown_real,
    subject_prompt_of,
    taught_to,
)
from sd_lora.training.setup import prepared_run
from sd_lora.training.validation import TRAINED


def judge(
    files: Sequence[Path],
    config: TrainConfig,
    strengths: Sequence[float],
    features: Features | None = None,
    class_prompt: str | None = None,
    kind: str = "subject",
    listeners: Sequence[Listener] = (),
) -> tuple[list[Judged], Sheet | None]:
    """Measure LoRA files, and draw and score their images where there are features.

    Args:
        config: of a run on the images, for data, precision and objective; it trains nothing.
        strengths: to measure, beside 0 and 1.
        class_prompt: the subject's without its own word: "a photo of a dog".
        kind: what the images share: "subject" or "style".

    Returns:
        The files by strength, and the sheet of the first set of images.

    Raises:
        UsageError, RunError: for people.
    """
    some, tell = sorted({*strengths, 1.0} - {0.0}), to_all(listeners)

    def of_images(event: Event) -> None:  # warnings on settings are of a training
        if isinstance(event, Progress | FindingMade):
            tell(event)

    with prepared_run(config, [of_images]) as run:
        _refuse_misfits(files, run)
        samples = run.images.instances.samples
        own = subject_prompt_of(run.config, samples)
        prompts = prompts_for(run.validation.captions, own, class_prompt)
        if features:
            _refuse_undrawn(prompts, run)
        for finding in run.summary.findings:
            of_images(FindingMade(finding))
        looks = features.name if features else ""
        found = [Judged(path, kind=kind, features=looks) for path in files]
        loras = Loras(run.parts)
        loras.put_on(Mix())
        base = losses_of(run)
        with counting(run.emit, "measuring", len(found) * len(some), "strength") as advance:
            for one in found:
                one.losses[0.0] = base
                for strength in some:
                    loras.put_on(Mix(((one.path, strength),)))
                    one.losses[strength] = losses_of(run)
                    advance()
                one.changes = changes_of(run.parts.models)
        sheet = None
        if features:
            with memory_for("drawing images to score", run.config):
                sheet = _look(run, loras, found, features, prompts)
    return found, sheet


def _refuse_misfits(files: Sequence[Path], run: Run) -> None:
    """Raise UsageError for files that do not fit the model, all at once."""
    faults = []
    for path in files:
        try:
            fitting(path, run.config.base_model, run.meta_pipeline)
        except UsageError as error:
            faults.append(str(error))
    if faults:
        raise UsageError("\n".join(faults))


def _refuse_undrawn(prompts: Prompts, run: Run) -> None:
    """Raise UsageError where there are no images to draw."""
    if not can_generate_images(run.parts.family):
        raise UsageError(f"{run.parts.family.label} draws no image from a prompt: no --features")
    if not prompts.subject:
        raise UsageError("--features draws the captions, and no image has one: give --prompt")


def losses_of(run: Run) -> Sequence[float]:
    """Loss of each item, by the model as it is."""
    with memory_for("checking the model", run.config):
        for model in run.parts.models.values():
            model.to(run.accelerator.device)
        return measured(run, 0)[TRAINED]


def _look(
    run: Run,
    loras: Loras,
    found: Sequence[Judged],
    features: Features,
    prompts: Prompts,
) -> Sheet:
    """Draw the prompts by the base and by each file at each strength, and score them."""
    loras.put_on(Mix())
    rounds = 1 + sum(len(one.strengths) for one in found)
    before = drawn_sets(run, prompts, f"drawing, 1 of {rounds}: by the base")
    number = 1
    taught = taught_to(run, found[0].kind)
    scale = looked(run, features, lambda: Judge(features, taught, prompts, before))
    for one in found:
        one.images[0.0] = before
        for strength in one.strengths:
            mix = Mix(((one.path, strength),))
            loras.put_on(mix)
            number += 1
            label = f"drawing, {number} of {rounds}: by {mix.label}"
            one.images[strength] = drawn = drawn_sets(run, prompts, label)
            judged = looked(run, features, partial(scale.judge, drawn))
            one.values[strength], one.scores[strength] = judged
    return _sheet(run, prompts, found)


def _sheet(run: Run, prompts: Prompts, found: Sequence[Judged]) -> Sheet:
    """The images of the first set of seeds: a row for the base, and one a file and strength."""
    columns = columns_of(run, prompts)
    rows: list[Sequence[Image.Image | None]] = [shown_real(run, len(columns))]
    labels = ["images of the folder"]
    for one in found:
        for strength, sets in one.images.items():
            if strength or one is found[0]:
                first = sets[0]
                rows.append([*first.subject, *first.of_class, *first.unrelated])
                labels.append(f"{name_of(one.path)} {strength:g}" if strength else "the base")
    return Sheet(rows, labels, columns, side=128)
