"""The score of learning: its arithmetic in closed form; sampling equals the pipeline's."""

import math
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from sd_lora.models.load import load_parts
from sd_lora.sampling.features import Vectors
from sd_lora.sampling.interval import Interval
from sd_lora.sampling.judge import Judge, copied, score
from sd_lora.sampling.sampler import round_trip, sample
from sd_lora.sampling.score import PromptImages, Prompts, Score, Taught
from tests.tiny import pipeline_of

CPU = torch.device("cpu")
SIZE = (64, 64)


class SeenColours:
    """An image's embedding is its mean colour; it follows its prompt as far as that colour's red is
    the number that the prompt says."""

    def __init__(self, images: Sequence[Image.Image]) -> None:
        means = np.stack([np.asarray(i, dtype=np.float32).mean((0, 1)) for i in images])
        self.red = torch.from_numpy(means[:, 0])
        self.subject = self.style = Vectors(F.normalize(torch.from_numpy(means)))

    def follows(self, prompts: Sequence[str], about: Collection[str] = ()) -> Tensor:
        return 1 - (self.red - torch.tensor([float(p) for p in prompts])).abs() / 255


class Colours:
    """Features in closed form, and how many images they have looked at."""

    name, blind, seen = "colours", "shapes", 0

    def look(self, images: Sequence[Image.Image]) -> SeenColours:
        self.seen += len(images)
        return SeenColours(images)


def plain(*colour: int) -> Image.Image:
    return Image.new("RGB", SIZE, colour)


RED, GREEN, YELLOW = plain(255, 0, 0), plain(0, 255, 0), plain(255, 255, 0)


def test_an_interval_is_students() -> None:
    """Mean ± t·s/√n by hand: of 0.8, 0.9, 1.0, s is 0.1 and t of two degrees of freedom 4.303."""
    interval = Interval((0.8, 0.9, 1.0))
    assert interval.mean == pytest.approx(0.9)
    assert interval.high - 0.9 == pytest.approx(4.303 * 0.1 / math.sqrt(3))
    assert interval.low + interval.high == pytest.approx(1.8)
    assert interval.text() == "90 % ± 25"
    assert Interval((0.5,)).half == math.inf
    assert (Interval((0.5,)).text(), Interval((math.nan,)).text()) == ("50 %", "not told")
    assert Interval((-0.001,)).text() == "0 %"
    assert Interval(tuple(range(31))).half == pytest.approx(
        2.042 * math.sqrt(31 * 32 / 12) / math.sqrt(31), rel=3e-3
    )


def test_a_copy_is_a_training_image_at_its_place() -> None:
    """An image, its mirror image and a slightly noised one are copies; moved by six pixels, or on
    another ground, it is none."""
    ramp = Image.linear_gradient("L").resize(SIZE).rotate(90).convert("RGB")
    shape = ramp.copy()
    shape.paste((200, 30, 90), (10, 20, 40, 60))
    training = [GREEN, shape]
    assert copied(shape, training)
    assert copied(ImageOps.mirror(shape), training)
    noise = np.random.default_rng(0).normal(0, 8, (64, 64, 3))
    noised = (np.asarray(shape) + noise).clip(0, 255).astype(np.uint8)
    assert copied(Image.fromarray(noised), training)
    moved = ramp.copy()
    moved.paste((200, 30, 90), (16, 14, 46, 54))
    assert not copied(moved, training)
    assert not copied(Image.composite(YELLOW, shape, ramp.convert("L")), training)


def test_the_score_in_closed_form() -> None:
    """With mean colours for features and red for the subject, all numbers can be written down: the
    base draws green (cosine 0 to red) and the LoRA yellow (1/√2), red or a copy."""
    prompts = Prompts(["255"] * 2, ["0"] * 2, ["0"])
    before = [PromptImages([GREEN] * 2, [GREEN] * 2, [GREEN])] * 3
    after = [
        PromptImages([YELLOW, YELLOW], [GREEN, GREEN], [GREEN]),
        PromptImages([YELLOW, RED], [YELLOW, GREEN], [GREEN]),
        PromptImages([RED, RED], [GREEN, RED], [GREEN]),
    ]
    taught = Taught([plain(255, 255, 255), RED], [plain(250, 0, 0), plain(200, 0, 0)])
    result = score(Colours(), taught, prompts, before, after)
    half = 1 / math.sqrt(2)
    assert result.fidelity.values == pytest.approx((half, (1 + half) / 2, 1))
    assert result.copies.values == (0, 0.5, 1)
    assert result.followed.values == pytest.approx((1, 1, 1))
    assert result.class_leak.values == pytest.approx((0, half / 2, 0.5))
    assert result.unrelated_leak.values == result.base_leak.values == (0, 0, 0)
    # one of three images is red, and its prompt asks for none
    assert result.harm.values == pytest.approx((0, 1 / 3, 1 / 3))
    assert result.followed_before.values == (1, 1, 1)
    assert result.redrawn.values == (0, 0, 0)
    # both real images are red: cosine 1 of red ones, 1/√2 of yellow ones
    assert result.similarity.values == pytest.approx((half, (1 + half) / 2, 1))
    assert result.drift.values == pytest.approx((0, 0, 0))
    judge = Judge(Colours(), taught, prompts, before)
    # each is compared with the other one's original, and both are red
    assert judge.reachable([YELLOW, RED]) == pytest.approx((half + 1) / 2)
    own = Judge(Colours(), Taught([], [RED, GREEN, plain(200, 0, 0)]), prompts, before)
    assert own.reachable([RED, GREEN, RED]) == pytest.approx(2 / 3)  # red, other than its own
    assert "copies: 50 % of the images repeat a training image" in result.text()
    assert result.numbers()["copies"]["mean"] == 0.5


def test_redrawn_and_drift_of_unrelated_images() -> None:
    """Of images of unrelated prompts alone, redrawn is one less the mean likeness of each and the
    base's from the same seed. Drift is half of that where likeness is a cosine, as peft's image
    benchmark has it (method_comparison/image-gen/run.py)."""
    prompts = Prompts(["255"], ["0"], ["0", "0"])
    before = [PromptImages([GREEN], [GREEN], [GREEN, YELLOW])]
    after = [PromptImages([RED], [RED], [RED, YELLOW])]
    result = score(Colours(), Taught([RED]), prompts, before, after)
    assert result.drift.values == pytest.approx(((1 - (0 + 1) / 2) / 2,))
    assert "drift of unrelated ones 25 %" in result.text()
    assert result.redrawn.values == pytest.approx((0.5,))
    assert "other things are 50 % unlike the base's of the same seed" in result.text()
    style = score(Colours(), Taught([RED], kind="style"), prompts, before, after)
    assert math.isnan(style.drift.mean + style.similarity.mean)  # they are of subjects
    assert style.redrawn == result.redrawn


def test_the_values_of_each_image() -> None:
    """Their means are the score's numbers, of harm over all images, but a copy is worth nothing.
    Each image is looked at once for all of them."""
    prompts = Prompts(["255"] * 2, ["0"] * 2, ["0"])
    before = [PromptImages([GREEN] * 2, [GREEN] * 2, [GREEN])] * 2
    after = [
        PromptImages([YELLOW, RED], [YELLOW, GREEN], [GREEN]),
        PromptImages([YELLOW, YELLOW], [GREEN, RED], [GREEN]),
    ]
    real = [plain(250, 0, 0), plain(200, 0, 0)]
    colours = Colours()
    judge = Judge(colours, Taught([RED], real), prompts, before)
    assert colours.seen == 2 + 2 * 5
    values, whole = judge.judge(after)
    assert colours.seen == 2 + 4 * 5
    half = 1 / math.sqrt(2)
    assert values["fidelity"] == pytest.approx([half, 0, half, half])
    assert whole.fidelity.mean == pytest.approx((3 * half + 1) / 4)
    for name in ("unrelated_leak", "harm"):
        mean = sum(values[name]) / len(values[name])
        assert mean == pytest.approx(whole.intervals[name].mean)
    assert len(values["harm"]) == 2 * 3
    style, _ = Judge(Colours(), Taught([RED], real, "style"), prompts, before).judge(after)
    assert [*style] == ["fidelity", "harm"]  # a style is meant to reach other prompts
    assert max(values["harm"]) > 0


def test_a_judge_of_one_set_and_of_the_subject_alone() -> None:
    """Without held-out images the training images are the reference, one image's level being its
    likeness to itself; without other prompts leak and harm are not told; one set has no interval.
    The same judge scores one checkpoint after the other."""
    judge = Judge(
        Colours(), Taught([RED]), Prompts(["255"], [], []), [PromptImages([GREEN], [], [])]
    )
    first, second = (judge.judge([PromptImages([image], [], [])])[1] for image in (YELLOW, RED))
    assert first.fidelity.values == pytest.approx((1 / math.sqrt(2),))
    assert (second.fidelity.values, second.copies.values) == ((1,), (1,))
    assert math.isnan(first.class_leak.mean + first.harm.mean)
    assert "leak: class not told" in first.text()
    assert "no interval" in first.text()
    assert first.numbers()["harm"]["mean"] is first.numbers()["fidelity"]["high"] is None
    assert judge.fidelity([YELLOW, RED, GREEN]).tolist() == pytest.approx([1 / math.sqrt(2), 1, 0])


def test_an_image_may_be_repeated_by_its_caption() -> None:
    """Copies are looked for among the prompts that are no captions of training images; where all
    are, they are not told, and a repeated image keeps its worth."""
    prompts, before = Prompts(["255", "250"], [], []), [PromptImages([GREEN] * 2, [], [])]
    after = [PromptImages([RED, RED], [], [])]

    def judged(*captions: str) -> tuple[list[float], Score]:
        judge = Judge(Colours(), Taught([RED], captions=captions), prompts, before)
        values, whole = judge.judge(after)
        return values["fidelity"], whole

    values, whole = judged()
    assert (values, whole.copies.values) == ([0, 0], (1,))
    values, whole = judged("255")
    assert (values, whole.copies.values) == ([1, 0], (1,))
    values, whole = judged("255", "250")
    assert values == [1, 1]
    assert math.isnan(whole.copies.mean)
    assert "copies: not looked for" in whole.text()
    assert whole.numbers()["copies"]["mean"] is None


def test_sets_that_do_not_fit_are_refused() -> None:
    """The message says which set, how many images and how many prompts."""
    prompts, one = Prompts(["255"], ["0"], []), PromptImages([RED], [GREEN], [])
    with pytest.raises(ValueError, match="no set of images"):
        Judge(Colours(), Taught([RED]), prompts, [])
    with pytest.raises(ValueError, match="no prompt with the subject"):
        Judge(Colours(), Taught([RED]), Prompts([], ["0"], []), [one])
    with pytest.raises(ValueError, match="no image of what was taught"):
        Judge(Colours(), Taught([]), prompts, [one])
    with pytest.raises(ValueError, match="set 2 has 0 images for 1 prompts of `of_class`"):
        Judge(Colours(), Taught([RED]), prompts, [one, PromptImages([RED], [], [])])
    with pytest.raises(ValueError, match="1 sets of images before and 2 after"):
        score(Colours(), Taught([RED]), prompts, [one], [one, one])


def test_an_image_does_not_depend_on_its_batch(tiny_sd1: Path) -> None:
    """Sampling is a function of prompt and seed: in one batch or one by one, in any order."""
    parts = load_parts(str(tiny_sd1))
    prompts = ["a photo", "a house", "a photo"]

    def draw(words: list[str], seeds: list[int], size: int) -> list[np.ndarray]:
        drawn = sample(
            parts,
            parts.caption_encoder(),
            words,
            seeds,
            size=(64, 64),
            device=CPU,
            steps=3,
            batch_size=size,
        )
        return [np.asarray(p).astype(int) for p in drawn]

    together, alone = draw(prompts, [1, 2, 3], 3), draw(prompts[::-1], [3, 2, 1], 1)[::-1]
    for a, b in zip(together, alone, strict=True):
        assert np.abs(a - b).max() <= 1
    assert np.abs(together[0] - together[2]).max() > 1


def test_sampling_equals_the_pipelines(tiny_sd1: Path, tiny_sd2: Path) -> None:
    """Our images equal those of diffusers' pipeline with the same scheduler and noise, for epsilon
    and for v-prediction."""
    from diffusers import DPMSolverMultistepScheduler

    for path in (tiny_sd1, tiny_sd2):
        parts = load_parts(str(path))
        pipeline = pipeline_of(parts)
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(parts.scheduler.config)
        pipeline.set_progress_bar_config(disable=True)
        theirs = pipeline(
            "a photo",
            num_inference_steps=4,
            guidance_scale=5.0,
            generator=torch.Generator().manual_seed(3),
            height=64,
            width=64,
        ).images[0]
        (ours,) = sample(
            parts,
            parts.caption_encoder(),
            ["a photo"],
            [3],
            size=(64, 64),
            device=CPU,
            steps=4,
            guidance_scale=5.0,
        )
        assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs)).max() <= 1


def test_a_round_trip_is_the_vaes(tiny_sd1: Path) -> None:
    """Images encoded and decoded equal those of diffusers' own image processor around the VAE, to
    a level of 255, at any size."""
    from diffusers.image_processor import VaeImageProcessor

    parts, process = load_parts(str(tiny_sd1)), VaeImageProcessor(vae_scale_factor=8)
    pixels = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    images = [Image.fromarray(pixels), Image.fromarray(pixels[:, :64])]
    for image, drawn in zip(images, round_trip(parts, images), strict=True):
        with torch.no_grad():
            latent = parts.vae.encode(process.preprocess(image)).latent_dist.mode()
            wanted = process.postprocess(parts.vae.decode(latent).sample, output_type="pil")[0]
        assert np.abs(np.asarray(drawn, int) - np.asarray(wanted, int)).max() <= 1
