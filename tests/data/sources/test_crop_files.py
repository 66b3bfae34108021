"""Crops by hand: the part of an image that is trained is the one that was chosen, and no other."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from sd_lora.check import Checked, as_json, check
from sd_lora.config.schema import TrainConfig
from sd_lora.config.sources import SourceSpec
from sd_lora.data.batches.stream import ImageSet
from sd_lora.data.cache.latents import LatentTable, PixelSettings
from sd_lora.data.images.buckets import CropSettings, pixels_of
from sd_lora.data.images.hand_crops import MIDDLE, HandCrop, corner_at, frame_of
from sd_lora.data.sources.crop_files import CROPS, read_crops, write_crops
from sd_lora.data.sources.open import open_source
from sd_lora.errors import UsageError
from tests.data.sources.test_folders import codes, image, opened


def checked(folder: Path, model: Path, **more: object) -> Checked:
    options = {"aspect_ratio_buckets": False} | more
    config = TrainConfig(
        mode="dreambooth", instance_data_dir=str(folder), instance_prompt="a dog", resolution=64,
        pretrained_model_name_or_path=str(model), output_dir=str(folder.parent / "out"),
        data_cache_dir=str(folder.parent / "cache"), **options,
    )  # fmt: skip
    return check(config, page=False)


def table(images: ImageSet) -> LatentTable:
    return LatentTable(PixelSettings(images.crop_settings.interpolation), "a VAE", "memory")


def test_the_chosen_part_is_trained(tmp_path: Path, tiny_sd1: Path) -> None:
    """Of an image that is red, green and blue from left to right, the middle of the crop chooses
    the colour; mirrored it is the same part; each choice is another latent and other data of the
    run; random crops leave a chosen one alone, and `check` shows it."""
    folder = tmp_path / "images"
    folder.mkdir()
    whole = Image.new("RGB", (192, 64))
    for left, colour in ((0, "red"), (64, "lime"), (128, "blue")):
        whole.paste(Image.new("RGB", (64, 64), colour), (left, 0))
    whole.save(folder / "a.png")
    found = {}
    choices = {"red": HandCrop(0, 0.5), "blue": HandCrop(1.0, 0.2), "lime": None}
    for name, chosen in choices.items():
        write_crops(folder, {"a.png": chosen})
        run = checked(folder, tiny_sd1, center_crop=chosen is None)
        images = run.images.instances
        assert not images.is_random(0)
        crop = images.crop(0)
        (row,) = json.loads(as_json(run))["images"]
        assert (row["crop"], row["hand_crop"]) == ([*crop.corner], chosen and [*chosen.numbers])
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


def test_a_smaller_crop_is_its_box_of_the_source(tmp_path: Path, tiny_sd1: Path) -> None:
    """The pixels and the mask of a crop by hand that is a part of the largest are those of the
    source resized by PIL and cut, and, but for the filter's reach at the edges, those of its box
    cut and resized; another size is another latent and other data of the run. SDXL's corner is
    that of the box in the whole image resized alike. A box of fewer pixels than its bucket is a
    warning with both, or gets a bucket of its own size."""
    folder = tmp_path / "images"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (2, 192, 384, 3), dtype=np.uint8)
    whole, mask = map(Image.fromarray, noise)
    whole.save(folder / "a.png")
    mask.save(folder / "a-masklabel.png")
    found = []
    for part, box in ((0.5, (48, 24, 144, 120)), (0.25, (72, 48, 120, 96))):
        write_crops(folder, {"a.png": HandCrop(0.25, 0.375, part)})
        run = checked(folder, tiny_sd1, mask_files=True)
        images = run.images.instances
        crop, loaded = images.crop(0), table(images).read(images.samples[0], images.crop(0), False)
        left, top = crop.corner
        place = (left, top, left + 64, top + 64)
        cut = whole.resize(crop.resized, Image.Resampling.LANCZOS).crop(place)
        assert torch.equal(loaded.pixels, pixels_of(cut, False))
        resized = pixels_of(whole.crop(box).resize((64, 64), Image.Resampling.LANCZOS), False)
        inner = (slice(None), slice(4, 60), slice(4, 60))
        assert torch.equal(loaded.pixels[inner], resized[inner])
        white = mask.convert("L").resize(crop.resized, Image.Resampling.BOX).crop(place)
        weights = pixels_of(white.convert("RGB"), False)[:1].div(2).add(0.5)
        assert torch.equal(loaded.mask, F.avg_pool2d(weights, 8))
        assert crop.original == whole.size
        assert crop.resized == (round(128 / part), round(64 / part))
        places = zip(crop.corner, box[:2], crop.resized, whole.size, strict=True)
        assert all(place * old == own * new for place, own, new, old in places)
        assert frame_of(images.samples[0].hand_crop, whole.size, (64, 64)) == (
            *box[:2], box[2] - box[0], box[3] - box[1]
        )  # fmt: skip
        mirrored = crop.corner_of(True)
        assert mirrored == (crop.resized[0] - 64 - crop.corner[0], crop.corner[1])
        flipped = table(images).read(images.samples[0], crop, True).pixels
        assert torch.equal(flipped, loaded.pixels.flip(-1))
        warned = [f.line() for f in run.findings if f.code == "upscaled"]
        assert len(warned) == (part < 0.3)
        assert all("by its crop by hand, enlarged 1.33 times" in line for line in warned)
        found.append((table(images).key(images.samples[0], crop, False), run.plan.content))
    assert all(len({*column}) == 2 for column in zip(*found, strict=True))
    buckets = {"aspect_ratio_buckets": True, "bucket_step": 8}
    write_crops(folder, {"a.png": HandCrop(0.25, 0.375, 0.125)})
    for more, bucket, warnings in (({}, (88, 40), 1), ({"bucket_no_upscale": True}, (48, 24), 0)):
        run = checked(folder, tiny_sd1, **buckets, **more)
        assert run.images.instances.crop(0).size == bucket
        assert sum(f.code == "upscaled" for f in run.findings) == warnings


def test_a_crop_by_hand_fits_every_shape() -> None:
    """A crop lies in its image for every middle, size, shape and bucket, and is the one that the
    studio draws; the largest in the middle is the crop of a run without choices."""
    for step in (None, 64):
        settings = CropSettings(512, step, random_crop=False)
        for size in ((1920, 1080), (700, 2001), (513, 512), (64, 64)):
            bucket = settings.bucket(size)
            assert settings.crop(size, bucket, None, MIDDLE) == settings.crop(size, bucket, None)
            for numbers in ((0.0, 0.0), (1.0, 1.0, 0.05), (0.3, 0.9, 0.613), (0.3, 0.9, 0.9999)):
                chosen = HandCrop(*numbers)
                crop = settings.crop(size, bucket, None, chosen)
                assert crop.corner == corner_at(chosen, crop.resized, bucket)
                sides = zip(crop.corner, crop.resized, bucket, chosen[:2], strict=True)
                for place, whole, side, part in sides:
                    assert 0 <= place <= whole - side
                    inner = side / 2 <= part * whole <= whole - side / 2
                    assert not inner or abs(place + side / 2 - part * whole) <= 0.5
                left, top, *frame = frame_of(chosen, size, bucket)
                shown = [v * new / old for v, new, old in zip(
                    (left, top, *frame), 2 * crop.resized, 2 * size, strict=True)]  # fmt: skip
                assert shown == pytest.approx([*crop.corner, *bucket], abs=1.1)


def test_entries_without_an_image_are_told(tmp_path: Path) -> None:
    """Each folder has its own file, which is no other file; a name without its image, and a file
    beside numbered folders, are warnings, and names are found in either Unicode form."""
    for name in ("cafe\u0301.png", "sub/b.png"):
        image(tmp_path / name)
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("x")
    write_crops(tmp_path, {"caf\u00e9.png": HandCrop(0.25, 0.5), "gone.png": MIDDLE})
    write_crops(tmp_path / "sub", {"b.png": HandCrop(0.5, 1, 0.25)})
    source = opened(tmp_path, prompt="x")
    assert {Path(s.name).name: s.hand_crop for s in source.rows()} == {
        "cafe\u0301.png": (0.25, 0.5, 1), "b.png": (0.5, 1.0, 0.25)
    }  # fmt: skip
    assert ("warning", "orphan-crop", "gone.png") in codes(source)
    assert not [code for code in codes(source) if CROPS in code[2]]
    kohya = tmp_path / "kohya"
    image(kohya / "3_dog" / "a.png")
    write_crops(kohya / "3_dog", {"a.png": HandCrop(0, 0)})
    write_crops(kohya, {"a.png": HandCrop(0, 0)})
    (numbered,) = open_source(SourceSpec(path=str(kohya)))
    assert [s.hand_crop for s in numbered.rows()] == [(0, 0, 1)]
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
        ('{"a.png": [0.5, 0.5, 0.01]}', "0.01"),
        ('{"a.png": [0.5, 0.5, 1, 1]}', "from 0.05 to 1, its size"),
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
        write_crops(tmp_path, {"b.png": MIDDLE})
    assert (tmp_path / CROPS).read_text() == text
