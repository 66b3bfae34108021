"""Masks among a folder's images: used where asked for, left out by name, never trained."""

import json
import os
from pathlib import Path

import pytest

from sd_lora.config.sources import SourceSpec
from sd_lora.data.sources.open import Source, open_source
from sd_lora.errors import UsageError
from tests.data.sources.test_folders import codes, image, opened


def masks(source: Source) -> dict[str, str | None]:
    """Image → its mask, both relative to the source's folder."""
    root = source.spec.path
    return {
        os.path.relpath(s.name, root): s.mask and os.path.relpath(s.mask.name, root)
        for s in source.rows()
    }


NAMES = {
    "a.png": "a-masklabel.png", "b.jpg": "b_mask.png", "c.png": "c.mask.png",
    "d.webp": "d-Mask.webp", "e.png": "masks/e.png",
    "f.png": "mask/f_mask.png", "sub/g.png": "sub/g-masklabel.png",
}  # fmt: skip
"""Image → its mask, as OneTrainer, cloneofsimo's lora and others name it."""


def test_masks_of_every_program(tmp_path: Path) -> None:
    """Masks beside their images, by all names, are left out and named as masks, also where
    metadata name them; with mask_files each is the mask of its image, and nothing of it is a
    finding. Photos with such a name, and no image beside them, are images."""
    for name in (*NAMES, *NAMES.values(), "in_a_mask.png", "x-condlabel.png", "lost-masklabel.png"):
        image(tmp_path / name)
    rows = [
        {"file_name": name, "text": "x"} for name in (*NAMES, "in_a_mask.png", "a-masklabel.png")
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    aside = [("left out", "not-a-subject", f"{n}.png") for n in ("lost-masklabel", "x-condlabel")]
    plain = opened(tmp_path)
    assert masks(plain) == dict.fromkeys([*NAMES, "in_a_mask.png"])
    left_out = [("left out", "mask-file", mask) for mask in NAMES.values()]
    assert sorted(codes(plain)) == sorted(left_out + aside)
    assert "the mask of" in next(f.text for f in plain.findings if f.code == "mask-file")
    used = opened(tmp_path, mask_files=True)
    assert masks(used) == NAMES | {"in_a_mask.png": None}
    assert sorted(codes(used)) == sorted([*aside, ("warning", "no-mask", "in_a_mask.png")])


@pytest.mark.parametrize("used", [False, True])
def test_a_subjects_folder_and_numbered_folders(used: bool, tmp_path: Path) -> None:
    """In a folder that is read without its subfolders, masks in one of these are found, too, and in
    kohya's numbered folders."""
    for name in ("10_sks dog/a.png", "10_sks dog/a-masklabel.png", "10_sks dog/masks/b.png"):
        image(tmp_path / name)
    image(tmp_path / "10_sks dog" / "b.png")
    (kohya,) = open_source(SourceSpec(path=str(tmp_path), mask_files=used))
    subject = opened(tmp_path / "10_sks dog", recursive=False, prompt="sks", mask_files=used)
    for source in (kohya, subject):
        want = {"a.png": "a-masklabel.png", "b.png": "masks/b.png"}
        assert masks(source) == (want if used else dict.fromkeys(want))
        assert [code for _, code, _ in codes(source)] == ([] if used else ["mask-file"] * 2)


def test_a_folder_of_masks(tmp_path: Path) -> None:
    """A mask_folder has the masks by name, in the same subfolders or in none, and wins over masks
    beside the images; inside of the source it is not trained. Without any mask it is an error."""
    for name in ("a.png", "sub/b.jpg", "sub/a.png", "c.png", "c_mask.png"):
        image(tmp_path / "data" / name)
    for name in ("a.png", "b.png", "sub/a_mask.png"):
        image(tmp_path / "data" / "conditioning" / name)
    folder = str(tmp_path / "data" / "conditioning")
    source = opened(tmp_path / "data", prompt="x", mask_folder=folder)
    assert masks(source) == {
        "a.png": "conditioning/a.png",
        "c.png": None,
        "sub/a.png": "conditioning/sub/a_mask.png",
        "sub/b.jpg": "conditioning/b.png",
    }
    assert codes(source) == [
        ("left out", "mask-file", "c_mask.png"), ("warning", "no-mask", "c.png"),
    ]  # fmt: skip
    image(tmp_path / "empty" / "z.png")
    with pytest.raises(UsageError, match=r"has no mask with the name of an image in .*holds z.png"):
        opened(tmp_path / "data", prompt="x", mask_folder=str(tmp_path / "empty"))
    with pytest.raises(UsageError, match="mask_folder .* does not exist"):
        opened(tmp_path / "data", prompt="x", mask_folder=str(tmp_path / "nowhere"))
