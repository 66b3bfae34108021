"""The scripts that train the embedded base: images are as captioned, and training resumes."""

import random
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "dev"))


def runs(row: np.ndarray) -> int:
    """Number of runs of True in a row."""
    return int((np.diff(row.astype(int), prepend=0) == 1).sum())


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_scene_holds_as_many_things_as_it_says(count: int) -> None:
    """A line through the middle of red circles on white meets so many of them."""
    import images

    for seed in range(5):
        scene = images.Scene("circle", "red", size="small", count=count, seed=seed)
        middle = np.asarray(images.draw(scene))[30:34].astype(int).mean(0)
        assert runs(middle[:, 0] - middle[:, 1] > 90) == count
    assert images.caption(scene) == {
        1: "a photo of a small red circle on a white background",
        2: "a photo of two small red circles on a white background",
        3: "a photo of three small red circles on a white background",
    }[count]  # fmt: skip


@pytest.mark.parametrize("side", ["left", "right"])
def test_two_things_stand_where_the_caption_says(side: str) -> None:
    """Of a red and a blue thing, the red one is on the side that the caption names for it."""
    import images

    scene = images.Scene("circle", "red", position=side, other=("square", "blue"))
    pixels = np.asarray(images.draw(scene)).astype(int)
    redness = (pixels[..., 0] - pixels[..., 2]).mean(0)
    left, right = redness[:32].mean(), redness[32:].mean()
    assert (left > 20 > -20 > right) if side == "left" else (left < -20 < 20 < right)
    far = {"left": "right", "right": "left"}[side]
    assert images.caption(scene).startswith(
        f"a photo of a red circle on the {side} and a blue square on the {far}"
    )


def test_a_caption_answers_what_a_classifier_is_asked() -> None:
    """Every answer about a scene that counts in the score stands in the scene's full caption."""
    import images
    import score_tiny_sd

    rng = random.Random(0)
    for _ in range(400):
        scene = images.random_scene(rng)
        said, text = score_tiny_sd.answers(scene), images.caption(scene)
        assert said.get("thing", scene.thing) in text
        assert str(said.get("colour", "")) in text
        assert said.get("background", "") in text
        assert said.get("style", "") in text
        assert ("on the left and" in text) == ("left" in said and scene.position == "left")


def test_normalising_the_latents_keeps_the_images() -> None:
    """`normalised` gives each latent channel mean 0 and deviation 2 and scales the posterior's
    deviation alike, and the decoder returns the same images."""
    import pretrain_tiny_sd
    from pretrain_vae import build_vae

    torch.manual_seed(0)
    vae, x = build_vae().eval().requires_grad_(False), torch.rand(8, 3, 32, 32) * 2 - 1
    vae.quant_conv.bias.add_(torch.randn(8))  # no channel is at 0 to start with
    before = vae.encode(x).latent_dist
    images = vae.decode(before.mean).sample
    pretrain_tiny_sd.normalised(vae, before.mean)
    after = vae.encode(x).latent_dist
    torch.testing.assert_close(after.mean.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(after.mean.std((0, 2, 3)), torch.full((4,), 2.0), atol=1e-4, rtol=0)
    ratio = 2 / before.mean.std((0, 2, 3))
    torch.testing.assert_close(after.std, before.std * ratio.view(1, 4, 1, 1))
    torch.testing.assert_close(vae.decode(after.mean).sample, images, atol=1e-4, rtol=1e-4)


def test_a_training_that_was_stopped_goes_on_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps, then two more by the same command, give bit for bit the weights, the average and
    the optimiser's state of four steps."""
    import patterns
    import pretrain_vae

    monkeypatch.setattr(pretrain_vae, "NUM_CORPUS", 32)
    monkeypatch.setattr(pretrain_vae, "NUM_UNSEEN", 16)
    (tmp_path / "photos").mkdir()
    patterns.pattern(random.Random(0)).resize((96, 96)).save(tmp_path / "photos" / "a.png")

    def state(work: str, *totals: int) -> dict[str, torch.Tensor]:
        (tmp_path / work).mkdir()
        for steps in totals:
            options = {"photos": tmp_path / "photos", "seed": 0, "threads": 1, "batch": 2}
            rates = {"vae_steps": steps, "vae_lr": 1e-3, "cooldown": 0.0}
            pretrain_vae.train_vae(Namespace(work=tmp_path / work, **options, **rates))
        saved = torch.load(tmp_path / work / "vae.pt")
        moments = saved["optimizer"]["state"].items()
        flat = {f"{i}.{k}": v for i, group in moments for k, v in group.items()}
        return saved["vae"] | {f"average.{k}": v for k, v in saved["average"].items()} | flat

    stopped, whole = state("stopped", 2, 4), state("whole", 4)
    assert stopped.keys() == whole.keys()
    assert all(torch.equal(stopped[name], whole[name]) for name in whole)
