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


@pytest.mark.parametrize("name", ["vae", "encoder"])
def test_a_training_that_was_stopped_goes_on_exactly(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps, then two more by the same command, give bit for bit the weights, the average and
    the optimiser's state of four steps."""
    import patterns
    import pretrain_encoder
    import pretrain_vae

    sizes = {
        "NUM_CORPUS": 32,
        "NUM_STYLES": 4,
        "NUM_SCENES": 4,
        "NUM_SUBJECTS": 8,
        "NUM_COMPARED": 8,
    }
    few = dict.fromkeys(pretrain_encoder.BATCHES, 4)
    monkeypatch.setattr(pretrain_encoder, "BATCHES", few)
    for module in (pretrain_vae, pretrain_encoder):
        monkeypatch.setattr(module, "NUM_UNSEEN", 16)
        for size in sizes.keys() & vars(module):
            monkeypatch.setattr(module, size, sizes[size])
    train, last, net = {
        "vae": (pretrain_vae.train_vae, "vae", "vae"),
        "encoder": (pretrain_encoder.train_all, "comparison", "net"),
    }[name]
    (tmp_path / "photos").mkdir()
    patterns.pattern(random.Random(0)).resize((96, 96)).save(tmp_path / "photos" / "a.png")

    def state(work: str, *totals: int) -> dict[str, torch.Tensor]:
        (tmp_path / work).mkdir()
        for steps in totals:
            options = {"photos": tmp_path / "photos", "seed": 0, "threads": 1, "batch": 4}
            rates = {"vae_steps": steps, "vae_lr": 1e-3, "cooldown": 0.0}
            stages = dict.fromkeys(pretrain_encoder.STAGES, 1) | {"comparison": steps}
            rates |= {"steps": stages, "every": 2}
            options["out"] = tmp_path / work / "out"
            train(Namespace(work=tmp_path / work, **options, **rates))
        saved = torch.load(tmp_path / work / f"{last}.pt")
        moments = saved["optimizer"]["state"].items()
        flat = {f"{i}.{k}": v for i, group in moments for k, v in group.items()}
        return saved[net] | {f"average.{k}": v for k, v in saved["average"].items()} | flat

    stopped, whole = state("stopped", 2, 4), state("whole", 4)
    assert stopped.keys() == whole.keys()
    assert all(torch.equal(stopped[name], whole[name]) for name in whole)


def test_likeness_falls_with_the_part_that_is_shared() -> None:
    """A pose is like itself by 1; without half of its pixels by 1/4, since above three quarters
    each percent counts twice; and not at all like another colour."""
    import subjects
    from PIL import Image

    def sticker(*colours: tuple[int, int, int]) -> Image.Image:
        image = Image.new("RGBA", (72, 72))
        for i, colour in enumerate(colours):
            image.paste((*colour, 255), (10 + 20 * i, 10, 30 + 20 * i, 30))
        return image

    red, blue = (255, 0, 0), (0, 0, 255)
    assert subjects.likeness(sticker(red, blue), sticker(red, blue)) == 1
    assert subjects.likeness(sticker(red, blue), sticker(red, red)) == pytest.approx(0.25)
    assert subjects.likeness(sticker(red), sticker(blue)) == 0


def test_the_loss_of_likeness_in_closed_form() -> None:
    """Two subjects in the plane, three images each: 0 where every cosine is as wanted, and the
    squared errors where it is not."""
    import pretrain_encoder

    like = torch.tensor([[1.0, 1.0, 0.5]] * 2)
    half = [0.5, 0.75**0.5, 0.0, 0.0]
    embedded = torch.tensor([[1.0, 0, 0, 0]] * 2 + [half] + [[0, 0, 1.0, 0]] * 2 + [half])
    embedded[5] = torch.tensor([0, 0, 0.5, 0.75**0.5])
    assert float(pretrain_encoder.likeness_loss(embedded, like)) == pytest.approx(0, abs=1e-6)
    embedded[3:5] = torch.tensor([0.6, 0, 0.8, 0])  # 0.6 to the other subject, 0.4 to its third
    error = 2 * (0.4 - 0.5) ** 2 / 2  # of two anchors; the mean over 2 subjects and 1 kind
    # cosines with the other subject: 0.6 of 4 pairs in each direction, 0.3 with the one's third
    foreign = (8 * (0.6 - 0.1) ** 2 + 2 * (0.3 - 0.1) ** 2) / (2 * 2 * 3)
    hardest = (0.6 - 0.1) ** 2  # the nearest of the others, of every anchor
    total = float(pretrain_encoder.likeness_loss(embedded, like))
    assert total == pytest.approx(4 * error + 2 * foreign + hardest, rel=1e-4)
