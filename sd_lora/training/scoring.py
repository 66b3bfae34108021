"""Scoring of a run: its prompts are drawn by the base and after some steps, and scored."""

import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from PIL import Image

from sd_lora.config.rows import Work
from sd_lora.config.schema import RunConfig
from sd_lora.config.wildcards import expanded
from sd_lora.data.batches.caption_rules import longest_form
from sd_lora.data.cache.store import digest_of
from sd_lora.data.sources.samples import Sample
from sd_lora.errors import Problem, RunError, UsageError
from sd_lora.findings import Finding
from sd_lora.models.families import Family
from sd_lora.report.events import ImagesScored, Warned, counting
from sd_lora.report.page_images import SAMPLES
from sd_lora.report.sheets import Sheet
from sd_lora.sampling.features import Features, load_features, placed
from sd_lora.sampling.judge import Judge
from sd_lora.sampling.parameters import Parameters
from sd_lora.sampling.sampler import can_generate_images, num_denoising_steps, sample
from sd_lora.sampling.score import KIND_SEEDS, SETS, PromptImages, Prompts, Score, Taught, sets_of
from sd_lora.training.class_images import numbered
from sd_lora.training.looks import timed
from sd_lora.training.out_of_memory import is_out_of_memory, let_go, memory_for
from sd_lora.training.processes import on_main
from sd_lora.training.run import Run
from sd_lora.training.sample_schedule import DECODE_FORWARDS
from sd_lora.training.samples import (
    drawn_at_once,
    guidance_rescale_of,
    reference_of,
)
from sd_lora.training.scores import Scores

T = TypeVar("T")

NUM_PROMPTS = 6
"""Most captions that are drawn."""

NUM_REAL = 32
"""Most images that drawn ones are compared with."""

MOST_SIDE = 1024
"""Longest side of these in pixels."""

PLACES = (
    "", " on a white background", " in the snow", " on the beach", " on the grass", " at night"
)  # fmt: skip
"""Behind a caption that all images share, and behind the class's prompt: Ruiz et al. 2023,
"DreamBooth", section 4, puts the subject elsewhere as well."""

UNRELATED = {
    "car": "a photo of a red car on the grass",
    "star": "a photo of a yellow star on a blue background",
    "house": "a photo of a house in the snow",
    "tree": "a photo of a green tree on a white background",
    "fish": "a photo of a fish",
    "boat": "a photo of a boat at night",
    "cup": "a photo of a blue cup on a white background",
    "flower": "a photo of a red flower on the grass",
    "mushroom": "a photo of a mushroom at night",
    "cat": "a photo of a cat on the beach",
    "heart": "a photo of a pink heart on a grey background",
    "robot": "a photo of a robot in the snow",
}
"""Thing → a prompt of it, which a LoRA of something else should leave alone; the first NUM_PROMPTS
that are not spoken of are drawn."""

_WORD = re.compile(r"\w+")

KINDS = {"subject": "subject", "of_class": "class", "unrelated": "unrelated"}
"""Kind of prompts → its name in those of sheets."""

AT_ONCE = 4
"""Images drawn together."""

PARTS = 4
"""Scores of a run after its start, where no option says when."""


def prompts_for(
    captions: Sequence[str | None], instance_prompt: str | None, class_prompt: str | None
) -> Prompts:
    """The prompts that are drawn: the instance prompt, or the one caption that there is, in several
    places, else the first captions; the class's in the same places; unrelated ones, of things that
    no caption and no prompt names."""
    own = list(dict.fromkeys(caption for caption in captions if caption))
    spoken = (*own, instance_prompt or "", class_prompt or "")
    named = {word for text in spoken for word in _WORD.findall(text.lower())}
    unrelated = [t for thing, t in UNRELATED.items() if not named & {thing, f"{thing}s"}]
    one = instance_prompt or (own[0] if len(own) == 1 else None)
    own = [one + place for place in PLACES] if one else own[:NUM_PROMPTS]
    of_class = (
        [expanded(class_prompt, numbered(0, i)) + place for i, place in enumerate(PLACES)]
        if class_prompt
        else []
    )
    return Prompts(own, of_class, unrelated[:NUM_PROMPTS])


def subject_prompt_of(config: RunConfig, samples: Sequence[Sample]) -> str | None:
    """The prompt of the one subject as its captions are made, with trigger word, prefix and suffix,
    the longest of its wildcards' words; None without one."""
    if config.subject_prompt is None or not samples:
        return None
    return longest_form((config.subject_prompt,), samples[0].source.rules)[0]


@dataclass(frozen=True)
class PlannedScores:
    """Prompts that a run draws for its scores, and the features that look at the images."""

    features: Features
    prompts: Prompts


def planned_scores(
    config: RunConfig, family: Family, samples: Sequence[Sample]
) -> PlannedScores | None:
    """The scores of a run that is not loaded yet; None without features.

    Raises:
        UsageError: no features in the folder, a base that draws no image from a prompt, or images
            without a caption.
    """
    if not config.score_features:
        return None
    if not can_generate_images(family):
        raise _refused(f"{family.label} draws no image from a prompt, and so none is scored")
    class_prompt = config.score_class_prompt or config.class_prompt
    own = subject_prompt_of(config, samples)
    prompts = prompts_for(_captions(samples), own, class_prompt)
    if not prompts.subject:
        raise _refused("captions are drawn and scored, and no image has one")
    try:
        return PlannedScores(load_features(Path(config.score_features).expanduser()), prompts)
    except UsageError as error:
        raise _refused(str(error)) from None


def _captions(samples: Sequence[Sample]) -> list[str]:
    return [longest_form(sample.captions, sample.source.rules)[0] for sample in samples]


def _refused(text: str) -> UsageError:
    text = f"score_features: {text}"
    return UsageError(text, [Problem("score_features", text)])


def scores_of(run: Run, planned: PlannedScores | None) -> Scores | None:
    """The scores to come of a run; None without features."""
    if planned is None:
        return None
    config = run.config
    every = config.score_every or math.ceil(run.plan.num_steps / PARTS)
    digests = [sample.digest for sample in run.images.instances.samples]
    held_out = run.images.held_out.set.samples if run.images.held_out else []
    guidance = (config.validation_guidance_scale, guidance_rescale_of(run))
    drawn = (config.validation_steps, *guidance, _side(run))
    identity = digest_of(
        str(config.score_features), planned.features.name, config.score_kind,
        str(config.score_sets), *map(str, planned.prompts.kinds), *digests,
        *(sample.digest for sample in held_out), *map(str, drawn),
    )  # fmt: skip
    return Scores(
        planned.features, planned.prompts, every, config.score_sets, identity,
        2 * config.validation_steps + DECODE_FORWARDS, config.early_stopping_patience,
    )  # fmt: skip


def taught_to(run: Run, kind: str = "subject") -> Taught:
    """The images that a run is to learn, with their captions, and those held out of it."""

    def shown(samples: Sequence[Sample]) -> list[Image.Image]:
        found = [image for s in samples[:NUM_REAL] if (image := reference_of(run, s))]
        for image in found:  # features see no more, and they stay for the whole run
            image.thumbnail((MOST_SIDE, MOST_SIDE))
        return found

    instances = run.images.instances.samples
    real = shown(instances)
    held_out = shown(run.images.held_out.set.samples) if run.images.held_out else []
    return Taught(real, held_out or real, kind, frozenset(_captions(instances)))


def drawn_sets(
    run: Run, prompts: Prompts, label: str, sets: int = SETS, at_once: int = AT_ONCE
) -> list[PromptImages]:
    """Sets of images of all prompts, by the models as they are. label: of the progress bar."""
    steps, side = run.config.validation_steps, _side(run)
    a_set = sum(num_denoising_steps(len(texts), at_once, steps) for texts in prompts.kinds)
    with counting(run.emit, label, sets * a_set, "denoising step") as advance:

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
                guidance_rescale=guidance_rescale_of(run),
                batch_size=at_once,
                on_step=advance,
            )

        return sets_of(prompts, images, sets)


def columns_of(run: Run, prompts: Prompts, step: int = 0) -> list[Parameters]:
    """How the first set's image of each prompt is drawn."""
    config, side = run.config, _side(run)
    return [
        Parameters(
            text, KIND_SEEDS * kind + i, config.validation_steps,
            config.validation_guidance_scale, (side, side), config.base_model,
            run.output_dir.resolve().name, step, guidance_rescale=guidance_rescale_of(run),
        )
        for kind, texts in enumerate(prompts.kinds)
        for i, text in enumerate(texts)
    ]  # fmt: skip


def _side(run: Run) -> int:
    return run.images.crop_settings.resolution


def looked(run: Run, features: Features, work: Callable[[], T]) -> T:
    """The result of work with features, which are on the run's device meanwhile: beside the models,
    of which no step needs memory then. On the CPU where there is no room for them, and where the
    device lacks an operator, as MPS does; with a warning, and for the rest of the run."""
    device, scores = run.accelerator.device, run.scores
    if scores and scores.on_cpu:
        return work()
    try:
        with placed(features, device):
            return work()
    except RuntimeError as error:
        lacking = is_out_of_memory(error) or isinstance(error, NotImplementedError)
        if device.type == "cpu" or not lacking:
            raise
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        let_go(error)
    run.emit(Warned([Finding("scored-on-cpu", device.type, reason)]))
    if scores:
        scores.on_cpu = True
    return work()


def draw_base(run: Run) -> None:
    """Draw the base's images, before anything is trained or restored; its score is step 0's."""
    scores = run.scores
    if scores is None or not (run.main or run.joint):
        return
    with timed(run, "scores"):
        _draw_base(run, scores)


def _draw_base(run: Run, scores: Scores) -> None:
    with memory_for("drawing images to score", run.config):
        before = _drawn(run, scores, "images to score, by the base")
    taught = taught_to(run, run.config.score_kind)
    scores.judge = looked(
        run, scores.features, lambda: Judge(scores.features, taught, scores.prompts, before)
    )
    scores.base = before
    scores.taught = shown_real(run, len(scores.prompts.subject))


def _drawn(run: Run, scores: Scores, label: str) -> list[PromptImages]:
    return drawn_sets(run, scores.prompts, label, scores.sets, drawn_at_once(run))


def score_is_due(run: Run, step: int) -> bool:
    """Whether images are to be drawn and scored after a step."""
    return run.scores is not None and run.scores.is_due(step, run.plan.num_steps)


def score_if_due(run: Run, step: int) -> None:
    """Draw and score images after a step where that is due, and tell of them. All processes must
    do it. Too little memory for it costs a warning and not the run."""
    scores = run.scores
    if scores is None or not score_is_due(run, step):
        return

    def score() -> tuple[dict[str, list[float]], Score]:
        judge = scores.judge
        assert judge is not None
        work: Work = "drawing images to score"
        with memory_for(work, run.config), run.averaged():
            is_base = step == 0 and run.start is None  # ΔW is 0
            label = f"images to score, at step {step}"
            images = scores.base if is_base else _drawn(run, scores, label)
        if run.main:
            _write_sheet(run, scores, images, step)
        return looked(run, scores.features, lambda: judge.judge(images))

    try:
        with timed(run, "scores"):
            values, found = score() if run.joint else on_main(run.accelerator, score)
    except RunError as error:
        if run.joint:
            raise
        run.emit(Warned([Finding("not-scored", f"step {step}", str(error))]))
        return
    scores.rows[step], scores.told[step] = values, found.numbers()
    run.emit(ImagesScored(step, found, scores.record()))


def _write_sheet(run: Run, scores: Scores, images: Sequence[PromptImages], step: int) -> None:
    """Write the first set's images of a step below the base's, a sheet each kind of prompts; those
    of the subject below the images that they are to be like. A sheet of all kinds has 18 columns,
    too many for a page."""
    columns = iter(columns_of(run, scores.prompts, step))
    for kind, name in KINDS.items():
        before, after = (getattr(of[0], kind) for of in (scores.base, images))
        rows: dict[str, Sequence[Image.Image | None]] = {}
        if kind == "subject":
            rows["images of the folder"] = scores.taught
        rows |= {"the base": before, f"step {step}": after}
        path = run.output_dir / SAMPLES / f"score-{step:06}-{name}.png"
        if after:
            drawn = [*itertools.islice(columns, len(after))]
            Sheet([*rows.values()], [*rows], drawn, side=128).write(path)


def shown_real(run: Run, count: int) -> list[Image.Image | None]:
    """A sheet's row of images that are trained, and nothing behind the last of them."""
    found = [reference_of(run, s) for s in run.images.instances.samples[:count]]
    return [*found, *[None] * (count - len(found))]
