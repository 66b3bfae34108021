"""Sample images that a run draws: before, during and after training."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from accelerate.utils import broadcast_object_list
from PIL import Image

from sd_lora.data.batches.caption_rules import longest_form
from sd_lora.data.images.decode import colour, decode_with_mask
from sd_lora.data.sources.samples import Sample
from sd_lora.errors import RunError
from sd_lora.report.events import SamplesDrawn, counting
from sd_lora.report.run_page import SAMPLES
from sd_lora.report.sheets import Sheet, write_image
from sd_lora.sampling.parameters import Parameters
from sd_lora.sampling.sampler import can_generate_images, num_denoising_steps, sample
from sd_lora.training.output_folder import SHEET
from sd_lora.training.run import Run

AFTER = "samples after training"
"""Label of the bar of the last samples."""


@dataclass(frozen=True)
class Wanted:
    """A sample image to draw. reference: the training image shown above it."""

    prompt: str
    reference: Sample


def wanted_samples(run: Run) -> list[Wanted]:
    """The sample images of a run, drawn with the seeds 0, 1, 2, …

    `num_validation_images` of the subject, and where class images are trained, one more by a class
    prompt, to show what the class has become.
    """
    count, classes, pairs = run.config.num_validation_images, run.images.classes, _of_subject(run)
    wanted = [pairs[i % len(pairs)] for i in range(count)]
    if count and classes:
        wanted += itertools.islice(_one_a_caption(classes.samples), 1)
    return wanted


def prompts_of(run: Run) -> list[str]:
    """Distinct prompts to draw samples of: the one given, or captions, at least one."""
    return list(dict.fromkeys(wanted.prompt for wanted in _of_subject(run)))


def _of_subject(run: Run) -> list[Wanted]:
    """Training images, at most one a sample image and at least one, each with the prompt of the
    run, else with its caption."""
    config, instances = run.config, run.images.instances.samples
    prompt = config.validation_prompt or config.instance_prompt
    each = (Wanted(prompt, s) for s in instances) if prompt else _one_a_caption(instances)
    return list(itertools.islice(each, max(1, config.num_validation_images)))


def _one_a_caption(samples: Sequence[Sample]) -> Iterator[Wanted]:
    """Yield the first sample of each caption."""
    seen = set()
    for shown in samples:
        caption = longest_form(shown.captions, shown.source.rules)[0]
        if caption not in seen:
            seen.add(caption)
            yield Wanted(caption, shown)


def draw_samples(run: Run, label: str) -> list[Image.Image]:
    """Sample images of the model as it is now; none on processes that are not needed for them.

    label: of the progress bar.
    """
    prompts = [wanted.prompt for wanted in wanted_samples(run)]
    if not prompts or not (run.main or run.joint) or not can_generate_images(run.parts.family):
        return []
    steps, batch_size = run.config.validation_steps, min(4, run.config.train_batch_size)
    total = num_denoising_steps(len(prompts), batch_size, steps)
    with counting(run.emit, label, total, "denoising step") as advance:
        images = sample(
            run.parts,
            run.text.caption_encoder,
            prompts,
            range(len(prompts)),
            size=(run.images.crop_settings.resolution,) * 2,
            device=run.accelerator.device,
            steps=steps,
            guidance_scale=run.config.validation_guidance_scale,
            batch_size=batch_size,  # training has room for it
            on_step=advance,
        )
        return list(images)


def sample_sheet(run: Run, rows: dict[str, list[Image.Image]], step: int) -> Sheet:
    """The sheet of sample images, below the training images.

    rows: label → sample images; the last ones are drawn after `step` steps.
    """
    config, resolution = run.config, run.images.crop_settings.resolution
    wanted = wanted_samples(run)
    columns = [
        Parameters(
            w.prompt,
            seed,
            config.validation_steps,
            config.validation_guidance_scale,
            (resolution, resolution),
            config.base_model,
            run.output_dir.resolve().name,
            step,
            run.text.caption_encoder.clip_skip,
        )
        for seed, w in enumerate(wanted)
    ]
    references = [_reference(run, w.reference) for w in wanted]
    shown: dict[str, list[Image.Image | None]] = {}
    if any(references):
        shown["trained on"] = references
    shown |= {label: [*images] for label, images in rows.items()}
    return Sheet(list(shown.values()), list(shown), columns)


def _reference(run: Run, shown: Sample) -> Image.Image | None:
    """A training image, whole; None for a streamed one, and for a file that is gone by now."""
    try:
        data, background = shown.read(), colour(run.config.alpha_background)
        return decode_with_mask(data, shown.name, background)[0]
    except (OSError, RunError):
        return None


def write_before_after(
    run: Run, before: list[Image.Image], after: list[Image.Image] | None
) -> Path | None:
    """Write the sheet of sample images before and after training; None without samples.

    before: of the base. after: None: drawn now.
    """
    if not before:
        return None
    path, steps = run.output_dir / SHEET, run.plan.num_steps
    after = after or draw_samples(run, AFTER)
    sheet = sample_sheet(run, {"before": before, f"after {steps} steps": after}, steps)
    write_alone(run, after, steps)
    sheet.write(path)  # the last: where it is, nothing is drawn again
    return path


def write_alone(run: Run, images: Sequence[Image.Image], step: int) -> None:
    """Write each sample image of a step, 0 for the base, with its parameters, for the page."""
    parameters = sample_sheet(run, {}, step).columns if images else []
    for number, (image, drawn) in enumerate(zip(images, parameters, strict=True)):
        folder = run.output_dir / SAMPLES / f"step-{step:06}"
        write_image(folder / f"{number:02}.png", image, [drawn])


def samples_are_due(run: Run, step: int) -> bool:
    """Whether an epoch that asks for samples ends with this step; never at the run's end."""
    every = run.config.validation_epochs * run.plan.epochs.num_steps
    crossed = int(step / every) > int((step - 1) / every)
    return bool(run.config.validation_prompt) and crossed and step < run.plan.num_steps


def show_samples(
    run: Run, step: int, drawing: Callable[[], AbstractContextManager[None]] = nullcontext
) -> None:
    """Draw sample images in mid-run, and write their sheet.

    drawing: a context that may be left early; then there is no sheet.
    """
    with nullcontext() if run.joint else drawing():  # joint work is left by all or by none
        images = draw_samples(run, f"samples at step {step}")
        if images and run.main:
            prompts, path = [wanted.prompt for wanted in wanted_samples(run)], _sheet_of(run, step)
            write_alone(run, images, step)
            sample_sheet(run, {f"step {step}": images}, step).write(path)
            run.emit(SamplesDrawn(step, prompts, images, path))
    run.accelerator.wait_for_everyone()


def show_missing_samples(run: Run) -> None:
    """Draw the samples of the step that a run goes on from, if it ended between the checkpoint and
    their sheet."""
    step = run.first_step
    missing = [run.saved is not None and samples_are_due(run, step)]
    missing[0] &= not _sheet_of(run, step).exists()
    if broadcast_object_list(missing)[0]:  # processes look at different times
        with run.averaged():
            show_samples(run, step)


def _sheet_of(run: Run, step: int) -> Path:
    return run.output_dir / SAMPLES / f"step-{step:06}.png"
