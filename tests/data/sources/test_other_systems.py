"""Folders that were made on another system: names in another Unicode form, UTF-16, backslashes."""

import json
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from sd_lora.config.sources import SourceSpec
from sd_lora.data.sources.open import open_source


def captions_of(folder: Path, **options: object) -> dict[str, tuple[str, ...]]:
    """File name → captions of a folder's samples, and no finding but those asserted."""
    (source,) = open_source(SourceSpec(path=str(folder), **options))
    assert source.findings == []
    return {Path(sample.name).name: sample.captions for sample in source.rows()}


@pytest.mark.parametrize(("on_disk", "written"), [("NFC", "NFD"), ("NFD", "NFC")])
@pytest.mark.parametrize("origin", ["jsonl", "stem", "sidecar"])
def test_names_in_another_form(origin: str, on_disk: str, written: str, tmp_path: Path) -> None:
    """A name is found where macOS wrote its accents apart and another system did not, in metadata,
    in kohya's metadata without extensions, in a subfolder's name, and beside a caption file."""
    name, folder = (unicodedata.normalize(on_disk, text) for text in ("fée.png", "été"))
    other_name, other_folder = (unicodedata.normalize(written, text) for text in (name, folder))
    assert name != other_name
    (tmp_path / folder).mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / folder / name)
    options = {}
    if origin == "sidecar":
        (tmp_path / folder / other_name).with_suffix(".txt").write_text("a", encoding="utf-8")
    elif origin == "jsonl":
        row = {"file_name": f"{other_folder}/{other_name}", "text": "a"}
        (tmp_path / "metadata.jsonl").write_text(json.dumps(row), encoding="utf-8")
    else:
        text = json.dumps({f"{other_folder}/{Path(other_name).stem}": {"caption": "a"}})
        (tmp_path / "meta.json").write_text(text, encoding="utf-8")
        options = {"metadata_file": str(tmp_path / "meta.json")}
    assert captions_of(tmp_path, **options) == {name: ("a",)}


def test_both_forms_are_two_images(tmp_path: Path) -> None:
    """Where both forms exist, each is its own image with its own caption, in metadata and beside
    caption files: the exact name comes first."""
    names = [unicodedata.normalize(form, "fée.png") for form in ("NFC", "NFD")]
    for number, name in enumerate(names):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(str(number), encoding="utf-8")
    if len({path.name for path in tmp_path.glob("*.png")}) == 1:
        pytest.skip("this file system keeps one of them")
    expected = {name: (str(number),) for number, name in enumerate(names)}
    assert captions_of(tmp_path) == expected
    for path in tmp_path.glob("*.txt"):
        path.unlink()
    rows = [{"file_name": name, "text": str(number)} for number, name in enumerate(names)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert captions_of(tmp_path) == expected


def test_paths_written_on_windows(tmp_path: Path) -> None:
    """A file_name with backslashes is found."""
    (tmp_path / "sub").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "sub" / "a.png")
    row = json.dumps({"file_name": "sub\\a.png", "text": "b"})
    (tmp_path / "metadata.jsonl").write_text(row, encoding="utf-8")
    assert captions_of(tmp_path) == {"a.png": ("b",)}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le"])
def test_captions_in_utf_16_are_named(encoding: str, tmp_path: Path) -> None:
    """A caption file in UTF-16, with its mark or without, is no caption: the finding names the
    file, the encoding and the remedy."""
    for name, used in (("a", encoding), ("b", "utf-8")):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("a dog", encoding=used)
    (source,) = open_source(SourceSpec(path=str(tmp_path)))
    assert [Path(sample.name).name for sample in source.rows()] == ["b.png"]
    (finding,) = source.findings
    assert (finding.code, finding.level) == ("non-utf8-caption", "left out")
    assert "a.txt is UTF-16" in finding.line()
    assert "save it as UTF-8" in finding.line()
