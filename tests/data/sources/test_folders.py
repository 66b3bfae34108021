"""Folders of images: every file is trained or reported, also files of systems and other tools."""

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from sd_lora.config.sources import CaptionRules, SourceSpec, read_specs
from sd_lora.data.images.decode import decode_with_mask
from sd_lora.data.sources.folder_captions import caption_of_name
from sd_lora.data.sources.open import Source, open_source
from sd_lora.errors import UsageError


def image(path: Path, size: tuple[int, int] = (8, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path, path.suffix[1:].upper().replace("JPG", "JPEG"))
    return path


def jsonl(folder: Path, *rows: object) -> None:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    text = "\n".join(lines)
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8")


def opened(folder: Path, **changes: object) -> Source:
    """The single source of a folder."""
    (source,) = open_source(SourceSpec(path=str(folder), **changes))  # type: ignore[arg-type]
    return source


def captions(source: Source) -> dict[str, tuple[str, ...]]:
    """Image → captions, with paths relative to the source's folder."""
    root = Path(str(source.spec.path))
    return {str(Path(s.name).relative_to(root)): s.captions for s in source.rows()}


def codes(source: Source) -> list[tuple[str, str, str]]:
    """(level, code, path relative to the folder) of the findings."""
    root = Path(str(source.spec.path))
    return [(f.level, f.code, os.path.relpath(f.name, root)) for f in source.findings]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_folder_of_everything(tmp_path: Path) -> None:
    """Images with odd names are trained, hidden files counted, all others reported with the reason,
    in the same order on any file system; nothing in the folder is changed."""
    for name in ("b.PNG", "A b.jpg", "ünï/cödé 画.webp", "sub/deep/c.png", "lonely.png"):
        image(tmp_path / name)
    for stem in ("b", "A b", "ünï/cödé 画", "sub/deep/c", "orphan"):
        (tmp_path / f"{stem}.txt").write_text(f"\ufeff {stem}\n", encoding="utf-8")
    image(tmp_path / "bad.png")
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    image(tmp_path / "empty.png")
    (tmp_path / "empty.caption").write_text(" \n")
    for name in (".DS_Store", "Thumbs.db", "notes.md"):
        (tmp_path / name).write_text("x")
    image(tmp_path / "__MACOSX" / "b.png")
    image(tmp_path / ".git" / "b.png")
    before = tree(tmp_path)
    source = opened(tmp_path)
    assert captions(source) == {
        "A b.jpg": ("A b",),
        "b.PNG": ("b",),
        "empty.png": ("",),
        "sub/deep/c.png": ("sub/deep/c",),
        "ünï/cödé 画.webp": ("ünï/cödé 画",),
    }
    assert list(captions(source)) == sorted(captions(source))
    assert source.count == 5
    assert sorted(codes(source)) == [
        ("left out", "missing-caption", "lonely.png"),
        ("left out", "non-utf8-caption", "bad.png"),
        ("note", "hidden", "."),
        ("note", "other-file", "notes.md"),
        ("warning", "empty-caption", "empty.png"),
        ("warning", "orphan-caption", "orphan.txt"),
    ]
    texts = {f.code: f.text for f in source.findings}
    assert texts["hidden"].startswith("4 hidden files and folders: .DS_Store, .git")
    assert "lonely.txt or" in texts["missing-caption"]
    assert "not UTF-8 text (byte 3): save it as UTF-8" in texts["non-utf8-caption"]
    assert tree(tmp_path) == before


def test_a_prompt_is_the_caption_of_what_has_none(tmp_path: Path) -> None:
    """A prompt replaces missing and empty captions; an unreadable caption is left out still."""
    for name in ("a.png", "b.png", "c.png", "d.png"):
        image(tmp_path / name)
    (tmp_path / "a.txt").write_text("an a")
    (tmp_path / "b.txt").write_text("")
    (tmp_path / "c.txt").write_bytes(b"\xff")
    source = opened(tmp_path, prompt="a thing")
    assert captions(source) == {"a.png": ("an a",), "b.png": ("a thing",), "d.png": ("a thing",)}
    assert codes(source) == [
        ("left out", "non-utf8-caption", "c.png"),
        ("warning", "empty-caption", "b.png"),
    ]


def test_generated_class_images_keep_their_words(tmp_path: Path) -> None:
    """A class image that was generated has the words written beside it, whatever the others'
    captions come from; a user's own text file there is a note where it is not read."""
    for name in ("class-0-00000", "class-0-00001", "own"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"words of {name}")
    (tmp_path / "class-0-00001.txt").unlink()
    found = opened(tmp_path, captions="prompt", prompt="a dog", kind="class")
    assert captions(found) == {
        "class-0-00000.png": ("words of class-0-00000",),
        "class-0-00001.png": ("a dog",),
        "own.png": ("a dog",),
    }
    assert codes(found) == [("note", "sidecar-ignored", "own.txt")]
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "own.png", "text": "mine"}')
    found = opened(tmp_path, captions="auto", prompt="a dog", kind="class")
    assert captions(found)["class-0-00000.png"] == ("words of class-0-00000",)
    assert captions(found)["own.png"] == ("mine",)


def test_links(tmp_path: Path) -> None:
    """Links in a loop end, each folder is read once and under its own name, broken links are
    reported, and two names of one file are two images."""
    root = tmp_path / "root"
    image(root / "real" / "a.png")
    image(tmp_path / "elsewhere" / "b.png")
    image(tmp_path / "sibling.png")
    (root / "a link to real").symlink_to(root / "real")
    (root / "out").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(root)
    (root / "real" / "up").symlink_to(root)
    (root / "real" / "self").symlink_to(".")
    (root / "real" / "out of it").symlink_to(tmp_path)
    (root / "real" / "dead.png").symlink_to("nowhere.png")
    (root / "real" / "turns.png").symlink_to("turns.png")
    (root / "real" / "same.png").symlink_to("a.png")
    source = opened(root, prompt="x")
    assert list(captions(source)) == ["out/b.png", "real/a.png", "real/same.png"]
    assert sorted(codes(source)) == [
        ("left out", "broken-link", "real/dead.png"),
        ("left out", "broken-link", "real/turns.png"),
        ("note", "link-loop", "out/back"),
        ("note", "link-loop", "real/out of it"),
        ("note", "link-loop", "real/self"),
        ("note", "link-loop", "real/up"),
        ("note", "linked-twice", "a link to real"),
    ]
    (root / "metadata.jsonl").write_text('{"file_name": "a link to real/a.png", "text": "an a"}')
    assert captions(opened(root)) == {"real/a.png": ("an a",)}


def test_stem_clashes_and_second_captions(tmp_path: Path) -> None:
    """Two images of one stem share the caption; this and an unread caption file are warnings."""
    for name in ("a.jpg", "a.png", "b.c.png"):
        image(tmp_path / name)
    for name in ("a.txt", "a.caption", "b.c.TXT"):
        (tmp_path / name).write_text(name)
    source = opened(tmp_path)
    assert captions(source) == {"a.jpg": ("a.txt",), "a.png": ("a.txt",), "b.c.png": ("b.c.TXT",)}
    assert codes(source) == [
        ("warning", "second-caption", "a.caption"),
        ("warning", "stem-clash", "a.jpg"),
    ]
    assert "a.jpg and a.png share the caption in a.txt" in source.findings[1].text


def test_one_caption_extension(tmp_path: Path) -> None:
    """A caption_extension, with or without its dot, is the only one read; an error lists others."""
    image(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "a.tags.txt").write_text("tags")
    assert captions(opened(tmp_path, caption_extension=".tags.txt")) == {"a.png": ("tags",)}
    assert captions(opened(tmp_path, caption_extension="TXT")) == {"a.png": ("text",)}
    message = r"no captions: .* a\.caption beside each image.* fits none of a.tags.txt, a.txt"
    with pytest.raises(UsageError, match=message):
        opened(tmp_path, caption_extension=".caption")


@pytest.mark.parametrize(
    ("stem", "caption"),
    [
        ("red_car_0012", "red car"),
        ("red car (3)", "red car"),
        ("red-car-2 (3)", "red-car"),
        ("car2", "car2"),
        ("a 1957 car", "a 1957 car"),
        ("0012", ""),
        ("(1)", ""),
        ("_car_", "car"),
    ],
)
def test_captions_from_names(stem: str, caption: str) -> None:
    """The caption of a name has no counter at its end, and spaces for underscores."""
    assert caption_of_name(Path(f"{stem}.png")) == caption


def test_file_names_as_captions(tmp_path: Path) -> None:
    """captions = filename ignores caption files, with a note; a bare counter is an empty one."""
    image(tmp_path / "a_cat_01.png")
    image(tmp_path / "02.png")
    (tmp_path / "02.txt").write_text("x")
    source = opened(tmp_path, captions="filename", prompt="a pet")
    assert captions(source) == {"02.png": ("a pet",), "a_cat_01.png": ("a cat",)}
    assert codes(source) == [
        ("warning", "empty-caption", "02.png"),
        ("note", "sidecar-ignored", "02.txt"),
    ]


def test_dreambooth_folders(tmp_path: Path) -> None:
    """captions = prompt reads only the images of this folder, and reports all other files."""
    image(tmp_path / "a.png")
    image(tmp_path / "sub" / "b.png")
    image(tmp_path / "sub" / "deep" / "c.png")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "a.txt").write_text("x")
    jsonl(tmp_path, {"file_name": "a.png", "text": "y"})
    source = opened(tmp_path, captions="prompt", prompt="a photo", recursive=False)
    assert captions(source) == {"a.png": ("a photo",)}
    assert sorted(codes(source)) == [
        ("left out", "subfolder", "sub"),
        ("note", "folder-without-images", "nothing"),
        ("note", "metadata-ignored", "metadata.jsonl"),
        ("note", "sidecar-ignored", "a.txt"),
        ("warning", "more-in-subfolders", "."),
    ]
    assert any("a folder with 2 images" in f.text for f in source.findings)


@pytest.mark.parametrize("recursive", [False, True])
def test_samples_of_a_run_are_no_images(tmp_path: Path, recursive: bool) -> None:
    """A run's output folder among the images is left out, however its parent is read; given as the
    folder of images it is an error."""
    image(tmp_path / "a.png")
    image(tmp_path / "out" / "before_after.png")
    (tmp_path / "out" / "training_log.jsonl").touch()
    source = opened(tmp_path, captions="prompt", prompt="a photo", recursive=recursive)
    assert captions(source) == {"a.png": ("a photo",)}
    assert codes(source) == [("left out", "run-folder", "out")]
    with pytest.raises(UsageError, match="out is the output folder of a run"):
        opened(tmp_path / "out", captions="prompt", prompt="a photo", recursive=recursive)


def test_metadata_jsonl_and_csv(tmp_path: Path) -> None:
    """Both metadata layouts, nested folders, lists of captions; images without a row are left out,
    and caption files beside the images are not read."""
    for name in ("a.png", "sub/b.png", "lonely.png"):
        image(tmp_path / name)
    (tmp_path / "lonely.txt").write_text("x")
    jsonl(tmp_path, {"file_name": "a.png", "text": ["one", "two"]}, "")
    (tmp_path / "sub" / "metadata.csv").write_text("file_name,text\nb.png,\n")
    source = opened(tmp_path)
    assert captions(source) == {"a.png": ("one", "two"), "sub/b.png": ("",)}
    assert sorted(codes(source)) == [
        ("left out", "missing-caption", "lonely.png"),
        ("note", "sidecar-ignored", "lonely.txt"),
        ("warning", "empty-caption", "sub/b.png"),
    ]


def test_rows_that_do_not_fit_the_folder(tmp_path: Path) -> None:
    """Rows for missing images, several rows for one image, rows without a caption and rows with an
    image outside of the folder are findings with their line, not errors."""
    root = tmp_path / "root"
    image(root / "a.png")
    image(root / "b.png")
    image(tmp_path / "outside.png")
    jsonl(
        root,
        {"file_name": "a.png", "text": "one"},
        {"file_name": "gone.png", "text": "x"},
        {"file_name": "./a.png", "text": "two"},
        {"file_name": "b.png", "text": None},
        {"file_name": "../outside.png", "text": "out"},
    )
    source = opened(root)
    assert [s.captions for s in opened(root, prompt="p").rows()][2] == ("p",)
    assert [s.captions for s in source.rows()] == [("out",), ("one", "two")]
    assert sorted(codes(source)) == [
        ("left out", "missing-caption", "b.png"),
        ("left out", "missing-image", "gone.png"),
        ("note", "outside-folder", "../outside.png"),
        ("warning", "named-twice", "a.png"),
    ]
    texts = {f.code: f.text for f in source.findings}
    assert "line 2 names it; the file does not exist" in texts["missing-image"]
    assert "line 1 and " in texts["named-twice"]
    assert "line 4 has no caption" in texts["missing-caption"]


def test_rows_name_images_in_folders_that_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image named by a row is trained though it is hidden or its folder is not read; its path
    begins with the folder's path as given."""
    image(tmp_path / "root" / "sub" / "a.png")
    image(tmp_path / "root" / "sub" / "b.png")
    image(tmp_path / "root" / ".c.png")
    names = ("sub/a.png", ".c.png")
    jsonl(tmp_path / "root", *({"file_name": name, "text": "x"} for name in names))
    monkeypatch.chdir(tmp_path)
    source = opened(Path("root"), recursive=False)
    assert [s.name for s in source.rows()] == ["root/.c.png", "root/sub/a.png"]
    (finding,) = [f for f in source.findings if f.code == "subfolder"]
    assert (finding.level, finding.text[:22]) == ("left out", "a folder with 1 image;")


def test_odd_metadata_is_read_as_written(tmp_path: Path) -> None:
    """Images named in metadata are trained with any extension; captions may hold line separators
    and quoted newlines."""
    image(tmp_path / "a.png").rename(tmp_path / "a.jfif")
    jsonl(tmp_path, {"file_name": "a.jfif", "text": "one\u2028two"})
    (sample,) = opened(tmp_path).rows()
    assert sample.captions == ("one\u2028two",)
    assert decode_with_mask(sample.read(), sample.name)[0].size == (8, 8)
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").write_text('file_name,text\na.jfif,"one\ntwo"\n')
    assert captions(opened(tmp_path)) == {"a.jfif": ("one\ntwo",)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "file_name,text\na.png,1girl, solo, red hair\nb.png,1boy\nc.png\n",
            r"header has 2 fields \(file_name, text\), but line 2 has 4, line 4 has 1\. A",
        ),
        ('file_name,text\nb.png,"1boy\nhat"\n\na.png,"1girl\n', "line 5: not CSV: unexpected end"),
        ('file_name,text\na.png,"a" b\n', "line 2: not CSV: .* a quote inside it is written twice"),
        ("file_name,txt\na.png,one\n", "line 2 has no caption column 'text'; it has txt"),
    ],
)
def test_csv_that_would_lose_a_caption(text: str, message: str, tmp_path: Path) -> None:
    """Commas without quotes, and quotes without an end, are errors with their lines: as a folder's
    metadata and as a set of `datasets`, where pandas would shift the columns."""
    for name in "abc":
        image(tmp_path / f"{name}.png")
    (tmp_path / "metadata.csv").write_text(text)
    with pytest.raises(UsageError, match=message):
        opened(tmp_path)
    if "txt" not in text:
        with pytest.raises(UsageError, match=message):
            open_source(SourceSpec(dataset=str(tmp_path / "metadata.csv")))


@pytest.mark.parametrize("name", ["metadata.json", "metadata.jsonl", "rows.json"])
def test_json_arrays_are_metadata(name: str, tmp_path: Path) -> None:
    """An array of rows is read under any of the names; an object called metadata.json, which other
    programs write about a model, leaves the caption files alone; an object of captions is read
    where it is asked for."""
    image(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("from the text file")
    rows = json.dumps([{"file_name": "a.png", "text": ["one", "two"]}], indent=1)
    (tmp_path / name).write_text(rows, encoding="utf-8-sig")
    asked = {"metadata_file": str(tmp_path / name)} if name == "rows.json" else {}
    assert captions(opened(tmp_path, **asked)) == {"a.png": ("one", "two")}
    (tmp_path / name).write_text(json.dumps({"a": "three"}))
    if name == "metadata.json":
        assert captions(opened(tmp_path)) == {"a.png": ("from the text file",)}
    if name == "rows.json":
        assert captions(opened(tmp_path, **asked)) == {"a.png": ("three",)}
    (tmp_path / name).write_text('[{"file_name": "a.png", "text": "x"}, 3]')
    with pytest.raises(UsageError, match="row 2: not an object but 3"):
        opened(tmp_path, **asked)


def test_texts_in_utf_16_and_nul_bytes_are_named(tmp_path: Path) -> None:
    """A caption in UTF-16 is called so, with its mark and without it; a NUL byte alone would pass
    as UTF-8: the image is left out, and a row of metadata with such a caption is an error."""
    texts = {"a": "ä".encode("utf-16"), "b": "bb".encode("utf-16-le"), "c": b"c", "d": b"ddd\0d"}
    for name, data in texts.items():
        image(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_bytes(data)
    source = opened(tmp_path)
    assert captions(source) == {"c.png": ("c",)}
    texts = {Path(f.name).name: f.text for f in source.findings if f.code == "non-utf8-caption"}
    assert all("is UTF-16, as Notepad's" in texts[name] for name in ("a.png", "b.png"))
    assert "holds NUL bytes (the first is byte 3)" in texts["d.png"]
    jsonl(tmp_path, {"file_name": "a.png", "text": "a\0"})
    with pytest.raises(UsageError, match="line 1: text holds a NUL character"):
        opened(tmp_path)


def test_captions_that_are_no_texts(tmp_path: Path) -> None:
    """A caption of 100 MiB is not read, nor is a pipe that nobody writes to, or a link to a device
    without an end: each is told at once, and the image is left out."""
    for name in "abcd":
        image(tmp_path / f"{name}.png")
    with open(tmp_path / "a.txt", "wb") as file:
        file.truncate(100 * 2**20)
    os.mkfifo(tmp_path / "b.txt")
    (tmp_path / "c.txt").symlink_to("/dev/zero")
    (tmp_path / "d.txt").write_text("d")
    source = opened(tmp_path)
    assert captions(source) == {"d.png": ("d",)}
    texts = {Path(f.name).name: f.text for f in source.findings if f.level == "left out"}
    assert "has 100.0 MiB, and such a text has 1.0 MiB at most" in texts["a.png"]
    assert {"b.png", "c.png"} <= texts.keys()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "metadata.jsonl has no rows"),
        (
            [{"file_name": "a.png", "caption": "x"}],
            r"line 1 has no caption column 'text'; it has caption",
        ),
        ([{"file_name": "a.png", "txt": "x"}], "Did you mean txt"),
        (
            [{"file_name": "b.png", "text": "x"}],
            "no image to train:\n.*names it; the file does not exist",
        ),
        ([{"file_name": "a.jfif", "text": None}], "no image to train:\n.*line 1 has no caption"),
        ([{"text": "x"}], "line 1 has no file_name"),
        ([{"file_name": "\0", "text": "x"}], "line 1: the file_name holds a NUL"),
        ([{"file_name": "a.png", "text": "x"}, "{broken"], "line 2: not JSON"),
        (["3"], "line 1: not an object"),
        (["[1, 2]"], "row 1: not an object"),
        (["[" * 100_000], "not JSON"),
        ([{"file_name": "a.png", "text": 3}], "line 1: text must be a text"),
        ([b"caf\xe9"], "not UTF-8 text"),
    ],
)
def test_broken_metadata_is_named_by_line(rows: list, message: str, tmp_path: Path) -> None:
    """Every fault of a metadata file is an error with its line and the remedy."""
    image(tmp_path / "a.png")
    image(tmp_path / "b.png").rename(tmp_path / "a.jfif")
    if rows and isinstance(rows[0], bytes):
        (tmp_path / "metadata.jsonl").write_bytes(rows[0])
    else:
        jsonl(tmp_path, *rows)
    with pytest.raises(UsageError, match=message):
        opened(tmp_path, captions="metadata")


def test_metadata_that_lies_elsewhere(tmp_path: Path) -> None:
    """metadata_file names images relative to the folder; kohya's json joins captions and tags."""
    image(tmp_path / "root" / "a.png")
    image(tmp_path / "root" / "b.png")
    table = tmp_path / "meta.json"
    table.write_text(
        json.dumps({"a.png": {"caption": "one\ntwo", "tags": "t"}, "b.png": {"tags": "t, u"}})
    )
    root = tmp_path / "root"
    assert captions(opened(root, metadata_file=str(table))) == {
        "a.png": ("one\ntwo, t",),
        "b.png": ("t, u",),
    }
    rules = CaptionRules(wildcards=True)
    assert captions(opened(root, metadata_file=str(table), rules=rules))["a.png"] == (
        "one, t\ntwo, t",
    )
    rows = tmp_path / "meta.jsonl"
    rows.write_text(json.dumps({"image_path": str(root / "a.png"), "caption": "x", "tags": "y"}))
    source = opened(root, metadata_file=str(rows))
    assert captions(source) == {"a.png": ("x, y",)}
    assert codes(source) == [("left out", "missing-caption", "b.png")]
    with pytest.raises(UsageError, match=r"meta\.txt is not a metadata file"):
        opened(root, metadata_file=str(tmp_path / "meta.txt"))


def test_folders_that_cannot_be_trained(tmp_path: Path) -> None:
    """Folders that are missing, empty, without images or captions are errors with their content."""
    with pytest.raises(UsageError, match="source .*none does not exist"):
        opened(tmp_path / "none")
    with pytest.raises(UsageError, match="holds no images: it is empty"):
        opened(tmp_path)
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(UsageError, match="class_data_dir .*holds no images: it holds notes.md"):
        opened(tmp_path, captions="prompt", prompt="x", label="class_data_dir")
    with pytest.raises(UsageError, match="is a file, not a folder"):
        opened(tmp_path / "notes.md")
    image(tmp_path / "a.png")
    with pytest.raises(
        UsageError,
        match=r"no captions: add a metadata.jsonl .* caption for all with --caption_default",
    ):
        opened(tmp_path)
    with pytest.raises(UsageError, match=r"has no metadata.jsonl or metadata.csv"):
        opened(tmp_path, captions="metadata")
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UsageError, match="no image to train:\n.*not UTF-8 text"):
        opened(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_named(tmp_path: Path) -> None:
    """A folder and a caption without permission are left out; all other images are trained."""
    for name in ("a.png", "b.png", "locked/c.png"):
        image(tmp_path / name)
    (tmp_path / "b.txt").write_text("x")
    (tmp_path / "b.txt").chmod(0)
    (tmp_path / "locked").chmod(0)
    try:
        source = opened(tmp_path, prompt="x")
        with pytest.raises(UsageError, match="cannot be read: Permission denied"):
            opened(tmp_path / "locked")
    finally:
        (tmp_path / "locked").chmod(0o700)
    assert captions(source) == {"a.png": ("x",)}
    assert codes(source) == [
        ("left out", "unreadable-folder", "locked"),
        ("left out", "unreadable-caption", "b.png"),
    ]


def test_names_that_are_no_text(tmp_path: Path) -> None:
    """A file with a name that is not UTF-8 is trained, and its name can be printed."""
    path = os.fsencode(tmp_path) + b"/\xff.png"
    os.rename(image(tmp_path / "a.png"), path)
    (sample,) = opened(tmp_path, prompt="x").rows()
    assert sample.name.encode("utf-8").endswith(b"\\xff.png")
    assert sample.read()


def test_samples_travel_and_rows_can_be_read_again(tmp_path: Path) -> None:
    """A sample survives pickling with its specification; a vanished image is an OSError."""
    path = image(tmp_path / "a.png")
    source = opened(tmp_path, prompt="x", repeats=3)
    assert [s.name for s in source.rows()] == [s.name for s in source.rows()] == [str(path)]
    (sample,) = pickle.loads(pickle.dumps(list(source.rows())))
    assert sample.source == source.spec
    assert sample.read() == path.read_bytes()
    assert replace(sample, size=(1, 2)).size == (1, 2)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.png"):
        sample.read()


@pytest.fixture
def kohya(tmp_path: Path) -> Path:
    """A folder in kohya's layout, with other files beside it."""
    for name in ("10_sks dog/a.png", "10_sks dog/b.png", "2_my_cat/c.png", "spare/d.png"):
        image(tmp_path / name)
    image(tmp_path / "0_off" / "e.png")
    (tmp_path / "3_empty").mkdir()
    (tmp_path / "log").mkdir()
    (tmp_path / "10_sks dog" / "a.txt").write_text("a dog on grass")
    (tmp_path / "10_around").symlink_to(tmp_path)
    return tmp_path


def test_kohya_folders(kohya: Path) -> None:
    """Each numbered folder is a source with its repeats, and sidecars, else class tokens, as
    captions; a folder without a number is reported."""
    spec = SourceSpec(path=str(kohya), repeats=2)
    dog, cat = open_source(spec)
    assert (dog.spec.repeats, cat.spec.repeats) == (20, 4)
    assert captions(dog) == {"a.png": ("a dog on grass",), "b.png": ("sks dog",)}
    assert captions(cat) == {"c.png": ("my_cat",)}
    assert [(f.level, f.code, Path(f.name).name) for f in dog.findings] == [
        ("note", "link-loop", "10_around"),
        ("left out", "no-repeats", "0_off"),
        ("note", "folder-without-images", "3_empty"),
        ("note", "folder-without-images", "log"),
        ("left out", "folder-without-number", "spare"),
    ]
    assert "1 image not trained: rename the folder, for example to 1_spare" in dog.findings[4].text
    assert cat.findings == []
    first, second = open_source(replace(spec, captions="prompt", prompt="a pet"))
    assert captions(first) == {"a.png": ("a pet",), "b.png": ("a pet",)}
    assert captions(second) == {"c.png": ("a pet",)}


def test_metadata_may_name_images_without_extension(tmp_path: Path) -> None:
    """kohya's tools write names without extension: the image is found; of two with the same stem
    the first is taken, with a warning."""
    for name in ("a.png", "b.png", "b.jpg"):
        image(tmp_path / "in" / name)
    table = tmp_path / "captions.json"
    table.write_text(json.dumps({"a": {"caption": "one"}, "b": {"caption": "two"}}))
    (source,) = open_source(SourceSpec(path=str(tmp_path / "in"), metadata_file=str(table)))
    assert captions(source) == {"a.png": ("one",), "b.jpg": ("two",)}
    assert [(f.level, f.code, Path(f.name).name) for f in source.findings] == [
        ("warning", "stem-clash", "b.jpg"),
        ("left out", "missing-caption", "b.png"),
    ]


def test_many_repeats_are_a_warning(tmp_path: Path) -> None:
    """A year at the start of a folder's name is read as repeats, with a warning."""
    image(tmp_path / "2023_holiday" / "a.png")
    (source,) = open_source(SourceSpec(path=str(tmp_path)))
    assert source.spec.repeats == 2023
    assert [(f.level, f.code) for f in source.findings] == [("warning", "many-repeats")]


def test_kohya_folders_are_only_taken_for_such(kohya: Path) -> None:
    """An image with a caption beside the numbered folders makes them plain folders, with a warning.
    With layout = kohya, or if the image has no caption, the image is reported instead."""
    image(kohya / "beside.png")
    for spec in (SourceSpec(path=str(kohya)), SourceSpec(path=str(kohya), layout="kohya")):
        codes = [f.code for f in open_source(spec)[0].findings]
        assert codes.count("outside-folders") == 1
    source = opened(kohya, prompt="x")
    assert source.count == 6
    assert [f.code for f in source.findings].count("number-not-read") == 3
    sources = open_source(SourceSpec(path=str(kohya), layout="kohya"))
    assert len(sources) == 2
    (finding,) = [f for f in sources[0].findings if f.code == "outside-folders"]
    assert (finding.level, finding.name) == ("left out", str(kohya / "beside.png"))
    plain = opened(kohya, prompt="x", layout="plain")
    assert [f.code for f in plain.findings] == ["link-loop"]
    with pytest.raises(
        UsageError,
        match="no numbered folders with images, for example 10_sks dog .* has no folders",
    ):
        open_source(SourceSpec(path=str(kohya / "spare"), layout="kohya"))


DEFAULTS = SourceSpec(dataset="d", repeats=3, rules=CaptionRules(caption_prefix="p"))


def test_tables_of_sources() -> None:
    """Tables take fields of sources and rules, and defaults for the others except the place of the
    images; class images take no caption rules of the instance images."""
    first, second = read_specs(
        [
            {"path": "a", "weight": 2, "shuffle_caption": True, "random_crop": True},
            {"dataset": "b", "streaming": True, "repeats": 1, "kind": "class", "prompt": "x"},
        ],
        DEFAULTS,
        "my.toml",
    )
    rules = CaptionRules(caption_prefix="p", shuffle_caption=True)
    assert first == SourceSpec(path="a", repeats=3, weight=2.0, rules=rules, random_crop=True)
    assert isinstance(first.weight, float)
    assert (second.path, second.dataset, second.repeats) == (None, "b", 1)
    assert second.rules == CaptionRules()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, "needs either a path (of a folder) or a dataset"),
        ({"path": "a", "dataset": "b"}, "needs either a path"),
        ({"path": "a", "repeat": 2}, "'repeat' is not an option of a source. Did you mean repeats"),
        ({"path": "a", "label": "x"}, "'label' is not an option"),
        ({"path": "a", "repeats": 2.0}, "repeats must be a whole number, not 2.0"),
        ({"path": "a", "repeats": True}, "repeats must be a whole number, not True"),
        ({"path": "a", "repeats": 0}, "repeats must be at least 1"),
        ({"path": "a", "random_crop": 1}, "random_crop must be true or false"),
        ({"path": 3}, "path must be a text"),
        ({"path": "a", "weight": 0}, "weight must be"),
        ({"path": "a", "weight": float("inf")}, "weight must be"),
        ({"path": "a", "caption_dropout": 1.0}, "caption_dropout must be at least 0 and below 1"),
        ({"path": "a", "caption_tag_dropout": float("nan")}, "caption_tag_dropout must be"),
        ({"path": "a", "kind": "clas"}, "kind is one of instance, class, not 'clas'. Did"),
        ({"path": "a", "layout": "flat"}, "layout is one of auto, plain, kohya"),
        ({"path": "a", "captions": "prompt"}, "captions = prompt needs a prompt"),
        ({"path": "a", "streaming": True}, "streaming is for a dataset"),
        ({"dataset": "a", "recursive": True}, "recursive is for folders"),
        ({"dataset": "a", "captions": "sidecar"}, "captions = sidecar is for folders"),
        ({"path": "a", "caption_separator": ""}, "caption_separator must not be empty"),
        ({"path": "a", "keep_tokens": -1}, "keep_tokens must be at least 0"),
        ({"path": "a", "caption_extension": "."}, "caption_extension must be like .txt"),
    ],
)
def test_tables_that_cannot_be_meant(table: dict, message: str) -> None:
    """Each fault of a table is one line with its source."""
    with pytest.raises(UsageError) as caught:
        read_specs([{"path": "fine"}, table], DEFAULTS, "my.toml")
    head, line = str(caught.value).split("\n")
    assert head == "my.toml: [[sources]] cannot be read"
    assert line.startswith("  source 2")
    assert message in line


def test_all_faults_of_all_tables_come_at_once() -> None:
    """One error names all faults of the file."""
    with pytest.raises(UsageError) as caught:
        read_specs([{"path": "a", "x": 1, "repeats": 0}, {}, 3], DEFAULTS, "f")  # type: ignore[list-item]
    assert str(caught.value).count("\n") == 4


def test_the_order_of_a_folder_is_not_the_file_systems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples and findings have one order, in whatever order the system lists a folder."""
    for name in ("a.png", "b.png", "s/a.png", "t/c.png", "x.md", "y.md"):
        image(tmp_path / name) if name.endswith("png") else (tmp_path / name).write_text("")
    listdir: Callable = os.listdir
    seen = []
    for reverse in (False, True):
        monkeypatch.setattr(os, "listdir", lambda p, r=reverse: sorted(listdir(p), reverse=r))
        source = opened(tmp_path, prompt="x")
        seen.append((captions(source), list(captions(source)), source.findings))
    assert seen[0] == seen[1]
