"""The score of learning: its arithmetic in closed form, and its agreement with the eye."""

import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sd_lora.models.load import Parts, load_parts
from sd_lora.sampling.sampler import sample
from sd_lora.sampling.score import (
    PromptImages,
    Score,
    distinctive_patches,
    latent_patches,
    nearest_distances,
    pixel_drift,
    score,
    subject_distance,
)
from tests.tiny import pipeline_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base() -> Parts:
    return load_parts(str(Path(__file__).parents[2] / "sample_data/tiny-sd"))


def images_of(folder: Path) -> list[Image.Image]:
    return [Image.open(p).convert("RGB") for p in sorted(folder.glob("*.png"))]


def test_distances_and_drift_in_closed_form() -> None:
    """Nearest distances, distinctive patches and means on numbers that can be checked by hand."""
    known = torch.tensor([[0.0, 0.0], [10.0, 0.0]])
    image = torch.tensor([[0.0, 1.0], [10.0, 3.0], [5.0, 0.0], [0.0, 0.0], [10.0, 0.0]])
    assert nearest_distances(image, known).tolist() == [1.0, 3.0, 5.0, 0.0, 0.0]
    others = torch.tensor([[5.0, 1.0], [10.0, 3.0]])  # distances 5, 0, 1, …; a fifth of five counts
    assert distinctive_patches(image, others, known).tolist() == [[5.0, 0.0]]  # 5 - 1
    drawn = torch.tensor([[[5.0, 2.0], [9.0, 9.0]], [[5.0, 0.0], [1.0, 1.0]]])
    particular = [torch.tensor([[5.0, 0.0]]), torch.tensor([[9.0, 9.0]])]
    assert subject_distance(particular[:1], drawn) == pytest.approx((2 + 0) / 2)
    assert subject_distance(particular, drawn, same=True) == pytest.approx((0 + 0) / 2)
    black, grey = Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4), (51, 51, 51))
    assert pixel_drift([black, black], [black, grey]) == pytest.approx(0.1)
    result = Score(before=0.6, after=0.3, held_out=0.1, class_drift=0.0, unrelated_drift=0.0)
    assert result.learned == pytest.approx(0.6)
    assert result.margin == pytest.approx(0.3)


def test_patches_do_not_depend_on_place(base: Parts, root: Path) -> None:
    """(N, 225, 16) patches of 16×16 latents with 4 channels, the same each time; an image is at
    distance 0 from itself in any order of its patches."""
    mascots = images_of(root / "sample_data/dreambooth/instance")[:2]
    first = latent_patches(base, mascots, CPU)
    assert first.shape == (2, 15 * 15, 4 * 2 * 2)
    torch.randn(100)
    assert torch.equal(latent_patches(base, mascots, CPU), first)
    shuffled = first[:, torch.randperm(225)]
    assert subject_distance(list(first), shuffled[:1]) == subject_distance(list(first), first[:1])
    assert subject_distance([first[0]], shuffled[:1]) == 0


def test_the_score_sees_the_subject(base: Parts, root: Path) -> None:
    """Real images of the subject, in place of a LoRA's, score about 1; striped orange monsters stay
    far below, and the base model's own images score 0."""
    sys.path.insert(0, str(root / "dev"))
    import images as drawing

    rng = random.Random(5)
    scenes = [drawing.random_scene(rng) for _ in range(400)]
    monsters = [drawing.draw(s) for s in scenes if s.thing == "monster"][:8]
    orange = [
        drawing.draw(
            drawing.Scene("monster", "orange", "striped", "black", "big", body="round",
                          background=place, seed=i)
        )
        for i, place in enumerate(drawing.BACKGROUNDS[:8])
    ]  # fmt: skip
    things = [drawing.draw(s) for s in scenes if s.thing != "monster"][:16]
    real = images_of(root / "sample_data/dreambooth/holdout")
    instance = images_of(root / "sample_data/dreambooth/instance")

    def learned(after: list[Image.Image]) -> float:
        before = PromptImages(monsters, monsters, things)
        return score(base, before, PromptImages(after, monsters, things), real, CPU).learned

    assert learned(instance) > 0.9
    assert learned(orange) < 0.35
    assert learned(monsters) == 0


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
