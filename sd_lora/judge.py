"""`sd-lora judge`: how much has a LoRA learned of images, and at which strength is it best?

Anybody's file is measured as a run measures itself: the loss of each image at the same noise and
timesteps, here by strength. A LoRA that has learned too little is better beyond strength 1, one
that has learned too much below it. With features of images it is looked at as well: prompts drawn
by the base and at each strength, and scored (sampling/score.py).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from sd_lora.config.schema import TrainConfig
from sd_lora.errors import UsageError
from sd_lora.report.events import Event, FindingMade, Listener, Progress, counting, to_all
from sd_lora.report.sheets import Sheet
from sd_lora.report.strengths import Judged
from sd_lora.sample import Loras, Mix, fitting, name_of
from sd_lora.sampling.features import Features
from sd_lora.sampling.parameters import Parameters
from sd_lora.sampling.sampler import can_generate_images, num_denoising_steps, sample
from sd_lora.sampling.score import (
    KIND_SEEDS,
    SETS,
    Judge,
    PromptImages,
    Prompts,
    Taught,
    sets_of,
)
from sd_lora.training.changes import changes_of
from sd_lora.training.measure import measured
from sd_lora.training.run import Run
from sd_lora.training.samples import reference_of
from sd_lora.training.setup import prepared_run
from sd_lora.training.validation import TRAINED

NUM_PROMPTS = 6
"""Most captions that are drawn."""

NUM_REAL = 32
"""Most images that drawn ones are compared with."""

PLACES = (
    "", " on a white background", " in the snow", " on the beach", " on the grass", " at night"
)  # fmt: skip
"""Behind a caption that all images share, and behind the class's prompt: Ruiz et al. 2023,
"DreamBooth", section 4, puts the subject elsewhere as well."""

UNRELATED = (
    "a photo of a red car on the grass",
    "a photo of a yellow star on a blue background",
    "a photo of a house in the snow",
    "a photo of a green tree on a white background",
    "a photo of a fish",
    "a photo of a boat at night",
)
"""Prompts of other things, which a LoRA should leave alone."""

AT_ONCE = 4
"""Images drawn together."""


def judge(
    files: Sequence[Path],
    config: TrainConfig,
    strengths: Sequence[float],
    features: Features | None = None,
    class_prompt: str | None = None,
    listeners: Sequence[Listener] = (),
) -> tuple[list[Judged], Sheet | None]:
    """Measure LoRA files, and draw and score their images where there are features.

    Args:
        config: of a run on the images, for data, precision and objective; it trains nothing.
        strengths: to measure, beside 0 and 1.
        class_prompt: the subject's without its own word: "a photo of a dog".

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
        prompts = prompts_for(run.validation.captions, class_prompt)
        if features:
            _refuse_undrawn(prompts, run)
        for finding in run.summary.findings:
            of_images(FindingMade(finding))
        found, loras = [Judged(path) for path in files], Loras(run.parts)
        loras.put_on(Mix())
        base = _losses(run)
        with counting(run.emit, "measuring", len(found) * len(some), "strength") as advance:
            for one in found:
                one.losses[0.0] = base
                for strength in some:
                    loras.put_on(Mix(((one.path, strength),)))
                    one.losses[strength] = _losses(run)
                    advance()
                one.changes = changes_of(run.parts.models)
        sheet = None
        if features:
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


def _losses(run: Run) -> Sequence[float]:
    for model in run.parts.models.values():
        model.to(run.accelerator.device)
    return measured(run, 0)[TRAINED]


def prompts_for(captions: Sequence[str | None], class_prompt: str | None) -> Prompts:
    """The prompts that are drawn: the first captions, or the one that there is in several places;
    the class's in the same places; unrelated ones."""
    own = list(dict.fromkeys(caption for caption in captions if caption))[:NUM_PROMPTS]
    own = [own[0] + place for place in PLACES] if len(own) == 1 else own
    of_class = [class_prompt + place for place in PLACES] if class_prompt else []
    return Prompts(own, of_class, UNRELATED)


def _look(
    run: Run,
    loras: Loras,
    found: Sequence[Judged],
    features: Features,
    prompts: Prompts,
) -> Sheet:
    """Draw the prompts by the base and by each file at each strength, and score them."""
    samples = run.images.instances.samples[:NUM_REAL]
    real = [image for shown in samples if (image := reference_of(run, shown))]
    loras.put_on(Mix())
    before = _drawn(run, prompts, "drawing by the base")
    # by its own caption an image is repeated rightly
    trained = real if set(prompts.subject) - {*run.validation.captions} else []
    scale = Judge(features, Taught(trained, real), prompts, before)
    for one in found:
        one.images[0.0] = before
        for strength in one.strengths:
            mix = Mix(((one.path, strength),))
            loras.put_on(mix)
            one.images[strength] = _drawn(run, prompts, f"drawing by {mix.label}")
            one.scores[strength] = scale.score(one.images[strength])
    return _sheet(run, prompts, real, found)


def _kinds(prompts: Prompts) -> tuple[Sequence[str], ...]:
    return prompts.subject, prompts.of_class, prompts.unrelated


def _drawn(run: Run, prompts: Prompts, label: str) -> list[PromptImages]:
    """Sets of images of all prompts, by the models as they are."""
    steps, side = run.config.validation_steps, _side(run)
    a_set = sum(num_denoising_steps(len(texts), AT_ONCE, steps) for texts in _kinds(prompts))
    with counting(run.emit, label, SETS * a_set, "denoising step") as advance:

        def images(texts: Sequence[str], first: int) -> Iterator[Image.Image]:
            return sample(
                run.parts,
                run.text.caption_encoder,
                texts,
                range(first, first + len(texts)),
                size=(side, side),
                device=run.accelerator.device,
                steps=steps,
                guidance_scale=run.config.validation_guidance_scale,
                batch_size=AT_ONCE,
                on_step=advance,
            )

        return sets_of(prompts, images)


def _side(run: Run) -> int:
    return run.images.crop_settings.resolution


def _sheet(
    run: Run, prompts: Prompts, real: Sequence[Image.Image], found: Sequence[Judged]
) -> Sheet:
    """The images of the first set of seeds: a row for the base, and one a file and strength."""
    config = run.config
    columns = [
        Parameters(
            text, KIND_SEEDS * kind + i, config.validation_steps,
            config.validation_guidance_scale, (_side(run), _side(run)), config.base_model,
        )
        for kind, texts in enumerate(_kinds(prompts))
        for i, text in enumerate(texts)
    ]  # fmt: skip
    shown = real[: len(columns)]
    rows: list[Sequence[Image.Image | None]] = [[*shown, *[None] * (len(columns) - len(shown))]]
    labels = ["images of the folder"]
    for one in found:
        for strength, sets in one.images.items():
            if strength or one is found[0]:
                first = sets[0]
                rows.append([*first.subject, *first.of_class, *first.unrelated])
                labels.append(f"{name_of(one.path)} {strength:g}" if strength else "the base")
    return Sheet(rows, labels, columns, side=128)
