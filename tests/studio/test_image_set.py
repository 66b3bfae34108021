"""Captions are edited where they are kept, and images are never changed."""

import json
import shutil
from pathlib import Path

import pytest

from sd_lora.check import as_json, check
from sd_lora.config.schema import TrainConfig
from sd_lora.errors import UsageError
from sd_lora.studio.image_set import Sets, edited
from sd_lora.studio.images import _facts, _report
from sd_lora.studio.keeper import Keeper
from sd_lora.studio.page import Studio
from sd_lora.studio.progress import Watch
from sd_lora.studio.store import Store


@pytest.fixture
def folder(root: Path, tmp_path: Path) -> Path:
    """Eight images, the first with a caption beside it."""
    place = tmp_path / "images"
    shutil.copytree(root / "sample_data/dreambooth/instance", place)
    first = min(place.glob("*.png"))
    first.with_suffix(".txt").write_text("1girl, red hat, smile\n")
    return place


def test_captions_are_written_beside_their_images(folder: Path) -> None:
    """An edit changes the text file of its image alone; undone, all is as it was."""
    images = {path: path.read_bytes() for path in folder.glob("*.png")}
    sets = Sets()
    first, second = sorted(sets.of(folder).entries)[:2]
    before = sets.write(folder, {first: "a dog", second: "two dogs"})
    assert before == {first: "1girl, red hat, smile", second: ""}
    assert (folder / first).with_suffix(".txt").read_text() == "a dog"
    assert (folder / second).with_suffix(".txt").read_text() == "two dogs"
    assert len([*folder.glob("*.txt")]) == 2
    sets.write(folder, before)
    assert Sets().of(folder).entries[first].caption == "1girl, red hat, smile"
    assert {path: path.read_bytes() for path in folder.glob("*.png")} == images
    with pytest.raises(UsageError, match="there is no image"):
        sets.write(folder, {"../images/x.png": "out"})


def test_lines_of_metadata_are_written_in_their_place(root: Path, tmp_path: Path) -> None:
    """Of metadata.jsonl one line changes, and its other keys and lines stay."""
    folder = tmp_path / "images"
    shutil.copytree(root / "sample_data/captioned", folder)
    place = folder / "metadata.jsonl"
    lines = place.read_text().splitlines()
    row = json.loads(lines[3])
    lines[3] = json.dumps(row | {"source": "mine"})
    place.write_text("\n".join(lines) + "\n")
    sets = Sets()
    assert sets.of(folder).entries[row["file_name"]].caption == row["text"]
    sets.write(folder, {row["file_name"]: 'a "snail" é'})
    after = place.read_text().splitlines()
    assert json.loads(after[3]) == row | {"text": 'a "snail" é', "source": "mine"}
    assert after[:3] + after[4:] == lines[:3] + lines[4:]
    (folder / "metadata.csv").write_text("file_name,text\n00-white.png,x\n")
    place.unlink()
    with pytest.raises(UsageError, match="read alone"):
        Sets().write(folder, {"00-white.png": "y"})


def test_many_captions_are_edited_at_once(folder: Path) -> None:
    """Find and replace, words before and behind, tags removed and moved; others stay."""
    (first, *_) = entries = [*Sets().of(folder).entries.values()]
    expected = {
        ("replace", "red", "blue"): "1girl, blue hat, smile",
        ("prefix", "", "sks, "): "sks, 1girl, red hat, smile",
        ("suffix", "", ", best"): "1girl, red hat, smile, best",
        ("remove", "red hat", ""): "1girl, smile",
        ("first", "smile", ""): "smile, 1girl, red hat",
    }
    for (name, find, text), caption in expected.items():
        new = edited(name, entries, find, text)
        assert new[first.name] == caption
        assert len(new) == (8 if name in ("prefix", "suffix") else 1)
    assert Sets().of(folder).tags(5)[0] == ("1girl", 1)
    with pytest.raises(UsageError, match="give the words"):
        edited("replace", entries, "", "x")


def test_the_page_has_the_crops_of_the_check(folder: Path, tmp_path: Path, tiny_sd1: Path) -> None:
    """The facts of each image are those of `sd-lora check --json`, behind a bar in the output."""
    shutil.copy(min(folder.glob("*.png")), folder / "copy.png")
    config = TrainConfig(
        mode="dreambooth", instance_data_dir=str(folder), instance_prompt="a dog",
        pretrained_model_name_or_path=str(tiny_sd1), output_dir=str(tmp_path / "out"),
    )  # fmt: skip
    text = as_json(check(config, page=False))
    store = Store(tmp_path / "state")
    keeper = Keeper(store)
    studio = Studio(store, keeper, Watch(keeper))
    job = store.job(store.add("check", "images", [], folder=str(folder), state="done"))
    keeper.log_of(job).write_text(f"loading …\nchecking: 50%|██\rchecking: 100%\r{text}\n")
    facts = _facts(studio, job)
    images = json.loads(text)["images"]
    assert len(facts) >= len(images) == 9
    assert {name: row["crop"] for name, row in facts.items() if "crop" in row} == {
        row["name"]: row["crop"] for row in images
    }
    alike = [name for name, row in facts.items() if row.get("alike")]
    assert str(folder / "copy.png") in alike
    assert len(alike) >= 2
    keeper.log_of(job).write_text("error: no images\n")
    assert _report(studio, job)["error"].endswith("no images")
