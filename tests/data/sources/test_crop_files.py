"""Crops by hand: the part of an image that is trained is the one that was chosen, and no other."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from sd_lora.check import Checked, as_json, check
from sd_lora.config.schema import TrainConfig
from sd_lora.config.sources import SourceSpec
from sd_lora.data.batches.stream import ImageSet
from sd_lora.data.cache.latents import LatentTable, PixelSettings
from sd_lora.data.images.buckets import CropSettings
from sd_lora.data.images.centres import MIDDLE, corner_at
from sd_lora.data.sources.crop_files import CROPS, read_crops, write_crops
from sd_lora.data.sources.open import open_source
from sd_lora.errors import UsageError
from tests.data.sources.test_folders import codes, image, opened


def checked(folder: Path, model: Path, center_crop: bool) -> Checked:
    config = TrainConfig(
        mode="dreambooth", instance_data_dir=str(folder), instance_prompt="a dog", resolution=64,
        pretrained_model_name_or_path=str(model), output_dir=str(folder.parent / "out"),
        data_cache_dir=str(folder.parent / "cache"), center_crop=center_crop,
        aspect_ratio_buckets=False,
    )  # fmt: skip
    return check(config, page=False)


def table(images: ImageSet) -> LatentTable:
    return LatentTable(PixelSettings(images.crop_settings.interpolation), "a VAE", "memory")


def test_the_chosen_part_is_trained(tmp_path: Path, tiny_sd1: Path) -> None:
    """Of an image that is red, green and blue from left to right, the centre chooses the colour;
    mirrored it is the same part; each choice is another latent and other data of the run; random
    crops leave a chosen one alone, and `check` shows it."""
    folder = tmp_path / "images"
    folder.mkdir()
    whole = Image.new("RGB", (192, 64))
    for left, colour in ((0, "red"), (64, "lime"), (128, "blue")):
        whole.paste(Image.new("RGB", (64, 64), colour), (left, 0))
    whole.save(folder / "a.png")
    found = {}
    for name, centre in (("red", (0, 0.5)), ("blue", (1.0, 0.2)), ("lime", None)):
        write_crops(folder, {"a.png": centre})
        run = checked(folder, tiny_sd1, center_crop=centre is None)
        images = run.images.instances
        assert not images.is_random(0)
        crop = images.crop(0)
        (row,) = json.loads(as_json(run))["images"]
        assert (row["crop"], row["centre"]) == ([*crop.corner], centre and [*centre])
        keys = []
        for flip in (False, True):
            loaded = table(images).read(images.samples[0], crop, flip)
            seen = torch.tensor([[1.0, -1, -1], [-1, 1, -1], [-1, -1, 1]])[
                ("red", "lime", "blue").index(name)
            ]
            assert torch.equal(loaded.pixels, seen[:, None, None].expand(3, 64, 64))
            keys.append(table(images).key(images.samples[0], crop, flip))
        assert crop.corner_of(True)[0] == 128 - crop.corner[0]
        found[name] = (*keys, run.plan.content)
    assert all(len({*column}) == 3 for column in zip(*found.values(), strict=True))
    assert not (folder / CROPS).exists()  # the last choice is taken back


def test_a_centre_fits_every_shape() -> None:
    """A crop lies in its image for every centre, shape and bucket; the middle is the crop of a run
    without choices."""
    for step in (None, 64):
        settings = CropSettings(512, step, random_crop=False)
        for size in ((1920, 1080), (700, 2001), (513, 512), (64, 64)):
            bucket = settings.bucket(size)
            assert settings.crop(size, bucket, None, MIDDLE) == settings.crop(size, bucket, None)
            resized = settings.resized(size, bucket)
            for centre in ((0.0, 0.0), (1.0, 1.0), (0.3, 0.9)):
                corner = corner_at(centre, resized, bucket)
                for place, whole, side, part in zip(corner, resized, bucket, centre, strict=True):
                    assert 0 <= place <= whole - side
                    inner = side / 2 <= part * whole <= whole - side / 2
                    assert not inner or abs(place + side / 2 - part * whole) <= 0.5


def test_entries_without_an_image_are_told(tmp_path: Path) -> None:
    """Each folder has its own file, which is no other file; a name without its image, and a file
    beside numbered folders, are warnings, and names are found in either Unicode form."""
    for name in ("cafe\u0301.png", "sub/b.png"):
        image(tmp_path / name)
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("x")
    write_crops(tmp_path, {"caf\u00e9.png": (0.25, 0.5), "gone.png": (0, 0)})
    write_crops(tmp_path / "sub", {"b.png": (0.5, 1)})
    source = opened(tmp_path, prompt="x")
    assert {Path(s.name).name: s.centre for s in source.rows()} == {
        "cafe\u0301.png": (0.25, 0.5), "b.png": (0.5, 1.0)
    }  # fmt: skip
    assert ("warning", "orphan-crop", "gone.png") in codes(source)
    assert not [code for code in codes(source) if CROPS in code[2]]
    kohya = tmp_path / "kohya"
    image(kohya / "3_dog" / "a.png")
    write_crops(kohya / "3_dog", {"a.png": (0, 0)})
    write_crops(kohya, {"a.png": (0, 0)})
    (numbered,) = open_source(SourceSpec(path=str(kohya)))
    assert [s.centre for s in numbered.rows()] == [(0, 0)]
    assert [f.code for f in numbered.findings] == ["orphan-crop"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[", "is no JSON"),
        ("[1]", "holds no object"),
        ('{"a.png": [0.5, 1.2], "b.png": [0, 0]}', r"'a.png': \[0.5, 1.2\]"),
        ('{"a.png": [0.5, NaN]}', "NaN"),
        ('{"a.png": [true, 0]}', "true"),
        ('{"a.png": 0.5}', "0.5"),
        ('{"../a.png": [0.5, 0.5]}', "name of an image in its folder"),
    ],
)
def test_wrong_files_are_refused(text: str, said: str, tmp_path: Path) -> None:
    """Anything but names and pairs of parts is an error with the file and the entry."""
    (tmp_path / CROPS).write_text(text)
    with pytest.raises(UsageError, match=said) as error:
        read_crops(tmp_path / CROPS)
    assert str(tmp_path / CROPS) in str(error.value)
    with pytest.raises(UsageError):
        write_crops(tmp_path, {"b.png": (0, 0)})
    assert (tmp_path / CROPS).read_text() == text
