"""Sample images that a run draws: before, during and after training."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from PIL import Image

from sd_lora.adapters.merging import set_strength
from sd_lora.config.sample_prompts import SamplePrompt, read_prompts, size_faults
from sd_lora.data.batches.caption_rules import longest_form
from sd_lora.data.images.decode import colour, decode_with_mask
from sd_lora.data.sources.samples import Sample
from sd_lora.errors import Problem, RunError, UsageError
from sd_lora.findings import Finding
from sd_lora.models.noise_scheduler import usual_rescale
from sd_lora.report.events import SamplesDrawn, Warned, counting
from sd_lora.report.page_images import OF_STRENGTH, SAMPLES
from sd_lora.report.sheets import Sheet, write_image
from sd_lora.sampling.parameters import Parameters
from sd_lora.sampling.sampler import can_generate_images, num_denoising_steps, sample
from sd_lora.training.interruption import SAMPLE_FILE, Requests
from sd_lora.training.looks import timed
from sd_lora.training.output_folder import SHEET
from sd_lora.training.run import Run
from sd_lora.training.sample_schedule import DECODE_FORWARDS, SampleSchedule, usual_number

AFTER = "samples after training"
"""Label of the bar of the last samples."""


@dataclass(frozen=True)
class Wanted:
    """A sample image to draw. asked: with its seed. reference: the training image above it."""

    asked: SamplePrompt
    reference: Sample

    def parameters(self, run: Run, step: int) -> Parameters:
        """How the run draws it after a step."""
        asked, config, name = self.asked, run.config, run.output_dir.resolve().name
        side = run.images.crop_settings.resolution
        return Parameters(
            asked.prompt,
            asked.seed or 0,
            asked.steps or config.validation_steps,
            config.validation_guidance_scale if asked.guidance is None else asked.guidance,
            (asked.width or side, asked.height or side),
            config.base_model,
            name,
            step,
            run.text.caption_encoder.clip_skip,
            asked.negative,
            () if asked.strength == 1 else ((name, asked.strength),),
            guidance_rescale=guidance_rescale_of(run),
        )

    def with_seed(self, seed: int) -> "Wanted":
        """The same with another seed."""
        return replace(self, asked=replace(self.asked, seed=seed))

    def at(self, strength: float) -> "Wanted":
        """The same with so many times the strength of the adapter."""
        return replace(self, asked=replace(self.asked, strength=strength * self.asked.strength))


def _number(run: Run) -> int:
    """Sample images of what is learned in each set, where no prompts are asked for; of the steps
    that were planned, also in a run that ends early."""
    asked, of_class = run.config.num_validation_images, bool(run.images.classes)
    if asked is not None:
        return asked
    return usual_number(
        run.schedule.plan, _forwards(run.config.validation_steps), beside=int(of_class)
    )


def _forwards(sampler_steps: int) -> int:
    """Forward passes of the UNet for an image, whose guidance takes two a sampler step."""
    return 2 * sampler_steps + DECODE_FORWARDS


def wanted_samples(run: Run, now: Sequence[SamplePrompt] = ()) -> list[Wanted]:
    """The sample images of a run, with the seeds 0, 1, 2, … where no other is asked for.

    One a prompt of `sample_prompts`; else `num_validation_images` of what is learned, and where
    class images are trained, one more by a class prompt, to show what the class has become. now:
    other prompts, in place of the run's.
    """
    if not run.config.draws_samples:
        return []
    count, classes, pairs = _number(run), run.images.classes, _of_subject(run)
    if asked := now or run.asked_prompts:
        wanted = [Wanted(prompt, pairs[i % len(pairs)].reference) for i, prompt in enumerate(asked)]
    else:
        wanted = [pairs[i % len(pairs)] for i in range(count)]
        wanted += itertools.islice(_one_a_caption(classes.samples), 1) if classes else []
    return [w if w.asked.seed is not None else w.with_seed(i) for i, w in enumerate(wanted)]


def guidance_rescale_of(run: Run) -> float:
    """φ of the sample images' rescaled guidance: the one asked for, or the base's."""
    own = run.config.validation_guidance_rescale
    return usual_rescale(run.parts.scheduler) if own is None else own


def prompts_of(run: Run) -> list[str]:
    """Distinct prompts to draw samples of: those given, or captions, at least one."""
    asked = run.asked_prompts or [wanted.asked for wanted in _of_subject(run)]
    return list(dict.fromkeys(prompt.prompt for prompt in asked))


def _of_subject(run: Run) -> list[Wanted]:
    """Training images, at most one a sample image and at least one, each with the prompt of the
    run, else with its caption."""
    config, instances = run.config, run.images.instances.samples
    prompt = config.validation_prompt or config.subject_prompt
    given = SamplePrompt(prompt or "")
    each = (Wanted(given, s) for s in instances) if prompt else _one_a_caption(instances)
    number = max(1, _number(run), len(run.asked_prompts))
    return list(itertools.islice(each, number))


def _one_a_caption(samples: Sequence[Sample]) -> Iterator[Wanted]:
    """Yield the first sample of each caption."""
    seen = set()
    for shown in samples:
        caption = longest_form(shown.captions, shown.source.rules)[0]
        if caption not in seen:
            seen.add(caption)
            yield Wanted(SamplePrompt(caption), shown)


def check_sample_sizes(prompts: Sequence[SamplePrompt], pixels_per_latent: int) -> None:
    """Raise UsageError, with all places, for sizes that a model cannot draw."""
    if faults := size_faults(prompts, pixels_per_latent):
        text = "\n".join(faults)
        raise UsageError(text, [Problem("sample_prompts", text)])


def schedule_of(run: Run) -> SampleSchedule:
    """The schedule of a run's samples."""
    if not can_generate_images(run.parts.family):
        return SampleSchedule(run.plan, 0)
    area = run.images.crop_settings.resolution**2
    drawn = [wanted.parameters(run, 0) for wanted in wanted_samples(run)]
    cost = (_forwards(p.steps) * p.size[0] * p.size[1] / area for p in drawn)
    return SampleSchedule(run.plan, round(sum(cost)))


def draw_samples(
    run: Run, label: str, now: Sequence[SamplePrompt] = (), strength: float = 1.0
) -> list[Image.Image]:
    """Sample images of the model as it is now; none on processes that are not needed for them.

    label: of the progress bar. now: prompts in place of the run's. strength: of the adapter, a
    factor to that of each prompt.
    """
    wanted = [wanted.at(strength) for wanted in wanted_samples(run, now)]
    drawn = [(one.parameters(run, 0), one.asked.strength) for one in wanted]
    if not drawn or not (run.main or run.joint) or not can_generate_images(run.parts.family):
        return []
    side = run.images.crop_settings.resolution
    groups = []
    for like, of_group in itertools.groupby(drawn, _alike):
        fits = like[0][0] * like[0][1] <= side**2  # training has room for so many
        group = [parameters for parameters, _ in of_group]
        groups.append((like, group, drawn_at_once(run) if fits else 1))
    total = sum(
        num_denoising_steps(len(group), at_once, like[1]) for like, group, at_once in groups
    )
    images: list[Image.Image] = []
    bar = counting(run.emit, label, total, "denoising step")
    with timed(run, "samples"), bar as advance:
        for (size, steps, guidance, negative, strength), group, at_once in groups:
            with _strength(run, strength):
                images += sample(
                    run.parts,
                    run.text.caption_encoder,
                    [p.prompt for p in group],
                    [p.seed for p in group],
                    size=size,
                    device=run.accelerator.device,
                    negative=negative or None,
                    steps=steps,
                    guidance_scale=guidance,
                    guidance_rescale=guidance_rescale_of(run),
                    batch_size=at_once,
                    on_step=advance,
                )
    return images


def draw_after(run: Run) -> dict[float, list[Image.Image]]:
    """Strength → sample images after training: at 1, and at those of the schedule."""
    found = {1.0: draw_samples(run, AFTER)}
    for strength in run.schedule.strengths:
        found[strength] = draw_samples(run, f"samples at strength {strength:g}", (), strength)
    return found


def drawn_at_once(run: Run) -> int:
    """Images of the size of training images that are drawn together: training has room for them."""
    return min(4, run.config.train_batch_size)


def _alike(drawn: tuple[Parameters, float]) -> tuple[tuple[int, int], int, float, str, float]:
    """Settings that images of one call of the sampler share: size, steps, guidance scale, negative
    prompt, and strength of the adapter."""
    p, strength = drawn
    return p.size, p.steps, p.guidance_scale, p.negative, strength


@contextmanager
def _strength(run: Run, strength: float) -> Iterator[None]:
    """Another strength of the adapter in a block; 1 is that of training."""
    for model in run.models.values() if strength != 1 else ():
        set_strength(model, strength)
    try:
        yield
    finally:
        for model in run.models.values() if strength != 1 else ():
            set_strength(model, 1.0)


def sample_sheet(
    run: Run, rows: dict[str, list[Image.Image]], step: int, now: Sequence[SamplePrompt] = ()
) -> Sheet:
    """The sheet of sample images, below the training images.

    rows: label → sample images; the last ones are drawn after `step` steps. now: their prompts, in
    place of the run's.
    """
    wanted = wanted_samples(run, now)
    references = [reference_of(run, w.reference) for w in wanted]
    shown: dict[str, list[Image.Image | None]] = {}
    if any(references):
        shown["trained on"] = references
    shown |= {label: [*images] for label, images in rows.items()}
    return Sheet([*shown.values()], [*shown], [w.parameters(run, step) for w in wanted])


def reference_of(run: Run, shown: Sample) -> Image.Image | None:
    """A training image, whole; None for a streamed one, and for a file that is gone by now."""
    try:
        data, background = shown.read(), colour(run.config.alpha_background)
        return decode_with_mask(data, shown.name, background)[0]
    except (OSError, RunError):
        return None


def write_before_after(
    run: Run, before: list[Image.Image], after: dict[float, list[Image.Image]] | None
) -> Path | None:
    """Write the sheet of sample images before and after training, and those at other strengths
    alone; None without samples.

    before: of the base. after: of `draw_after`; None: drawn now.
    """
    if not before:
        return None
    path, steps = run.output_dir / SHEET, run.plan.num_steps
    after = after or draw_after(run)
    whole = after.pop(1.0)
    sheet = sample_sheet(run, {"before": before, f"after {steps} steps": whole}, steps)
    for strength, images in after.items():
        name = f"{_name(steps)}/{OF_STRENGTH}{strength:g}"
        _write_alone(run, images, name, steps, strength=strength)
    tell_samples(run, steps, whole)
    sheet.write(path)  # the last: where it is, nothing is drawn again
    return path


def tell_samples(run: Run, step: int, images: Sequence[Image.Image]) -> None:
    """Write the sample images of a step, 0 for the base, alone for the page, and tell of them."""
    if images:
        _write_alone(run, images, _name(step), step)
        prompts = [wanted.asked.prompt for wanted in wanted_samples(run)]
        run.emit(SamplesDrawn(step, prompts, images))


def _write_alone(
    run: Run,
    images: Sequence[Image.Image],
    name: str,
    step: int,
    now: Sequence[SamplePrompt] = (),
    strength: float = 1.0,
) -> None:
    """Write each sample image, with its parameters, into a folder of `samples`. now, strength: see
    `draw_samples`."""
    for number, (image, drawn) in enumerate(zip(images, wanted_samples(run, now), strict=True)):
        path = run.output_dir / SAMPLES / name / f"{number:02}.png"
        write_image(path, image, [drawn.at(strength).parameters(run, step)])


def samples_are_due(run: Run, step: int) -> bool:
    """Whether samples are drawn after a step; the run's end has its own."""
    return step in run.schedule.steps


def show_samples(run: Run, step: int, requests: Requests | None = None) -> None:
    """Draw the samples that are due after a step, and those of a request, and write their sheets.

    requests: their file may ask for samples; a signal among them ends the drawing at once, and then
    there is no sheet.
    """
    text = [requests.take_sample() if requests and run.main else None]
    if requests and run.accelerator.num_processes > 1:
        broadcast_object_list(text)
    # joint work is left by all or by none
    with requests.drawing() if requests and not run.joint else nullcontext():
        if samples_are_due(run, step) or (text[0] is not None and not text[0].strip()):
            _show(run, step, _name(step))
        if text[0] and text[0].strip():
            _show_requested(run, step, text[0])
    run.accelerator.wait_for_everyone()


def _show_requested(run: Run, step: int, text: str) -> None:
    """Draw the prompts of a request. A mistake in them, or too little memory for them, costs a
    warning and not the run."""
    try:
        prompts = read_prompts(text)
        check_sample_sizes(prompts, run.parts.pixels_per_latent)
        _show(run, step, f"now-{step:06}", prompts)
    except (UsageError, RunError, torch.OutOfMemoryError) as error:
        if run.joint and not isinstance(error, UsageError):
            raise
        run.emit(Warned([Finding("sample-request", f"the file {SAMPLE_FILE}", str(error))]))


def _show(run: Run, step: int, name: str, now: Sequence[SamplePrompt] = ()) -> None:
    """Draw samples, and write them and their sheet. name: of the sheet, and of the images' folder.
    now: prompts in place of the run's."""
    images = draw_samples(run, f"samples at step {step}", now)
    if not images or not run.main:
        return
    rows = {} if now else {"before": _base_answer(run, len(images))}
    rows = {label: row for label, row in rows.items() if row} | {f"step {step}": images}
    if now:
        _write_alone(run, images, name, step, now)
    else:
        tell_samples(run, step, images)
    sample_sheet(run, rows, step, now).write(run.output_dir / SAMPLES / f"{name}.png")


def _base_answer(run: Run, count: int) -> list[Image.Image]:
    """The samples of the base, as they were written; none where they are of other prompts."""
    found = []
    with suppress(OSError):
        for path in sorted((run.output_dir / SAMPLES / _name(0)).glob("*.png")):
            with Image.open(path) as image:
                found.append(image.convert("RGB"))
    return found if len(found) == count else []


def show_missing_samples(run: Run) -> None:
    """Draw the samples of the step that a run goes on from, if it ended between the checkpoint and
    their sheet."""
    step = run.first_step
    missing = [run.saved is not None and samples_are_due(run, step)]
    missing[0] &= not (run.output_dir / SAMPLES / f"{_name(step)}.png").exists()
    if broadcast_object_list(missing)[0]:  # processes look at different times
        with run.averaged():
            show_samples(run, step)


def _name(step: int) -> str:
    """The name of a step's samples."""
    return f"step-{step:06}"
