"""Pictures of a run's images for its page."""

import base64
import io
from pathlib import Path

import numpy as np
from PIL import Image

from sd_lora.training.setup import prepare
from sd_lora.training.thumbnails import SIDE, add_thumbnails, image_rows
from tests.training.runs import images, text_to_image


def test_a_picture_shows_the_image_and_its_crop(tiny_sd1: Path, tmp_path: Path) -> None:
    """Inside the crop are the image's own colours, outside they are a third as far from grey; an
    image that is gone by now has no picture; each picture is made once."""
    folder = images(tmp_path / "wide", 3, (96, 64))
    Image.new("RGB", (192, 128), (250, 10, 10)).save(folder / "0.png")
    run = prepare(text_to_image(tiny_sd1, folder, tmp_path / "out", resolution=64))
    names = [Path(sample.name).name for sample in run.images.instances.samples]
    red, gone = names.index("0.png"), names.index("1.png")
    (folder / "1.png").unlink()
    rows: list[dict] = [{"index": red}, {"index": gone}]
    add_thumbnails(run, rows)
    assert "picture" not in rows[1]
    coded = rows[0]["picture"].partition(",")[2]
    with Image.open(io.BytesIO(base64.b64decode(coded))) as picture:
        shown = np.asarray(picture.convert("RGB"), float)
    assert shown.shape == (SIDE * 2 // 3, SIDE, 3)
    kept, pale = shown[:, 20:76].mean((0, 1)), shown[:, :12].mean((0, 1))
    np.testing.assert_allclose(kept, (250, 10, 10), atol=12)
    np.testing.assert_allclose(pale - 128, 0.3 * (np.array((250, 10, 10)) - 128), atol=12)
    (folder / "0.png").unlink()
    add_thumbnails(run, again := [{"index": red}])
    assert again[0]["picture"] == rows[0]["picture"]


def test_images_held_out_are_among_the_rows(tiny_sd1: Path, tmp_path: Path) -> None:
    """Of three images one is held out: its row is the last, with its name and its own picture, and
    without a loss; the others have been seen as often as the ledger knows, which is never."""
    folder = images(tmp_path / "data", 3)
    run = prepare(text_to_image(tiny_sd1, folder, tmp_path / "out", holdout=1))
    assert run.images.held_out is not None
    rows = image_rows(run)
    own, (held,) = run.images.instances.samples, run.images.held_out.set.samples
    assert [row["name"] for row in rows] == [*(sample.name for sample in own), held.name]
    assert [row.get("held_out", False) for row in rows] == [False, False, True]
    assert {(row["seen"], row["loss"]) for row in rows} == {(0, None)}
    assert len({row["picture"] for row in rows}) == 3
