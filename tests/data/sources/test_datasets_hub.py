"""Sets of `datasets`: all forms give the same bytes and captions, loaded whole or streamed."""

import json
import os
import pickle
import zipfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sd_lora.config.sources import SourceSpec
from sd_lora.data.images.decode import decode_with_mask
from sd_lora.data.sources.open import Source, open_source
from sd_lora.errors import RunError, UsageError


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "images" / f"{i}.png" for i in range(4)]
    paths[0].parent.mkdir()
    for i, path in enumerate(paths):
        Image.new("RGB", (8 + i, 8), "red").save(path)
    return paths


def made(images: list[Path], texts: list | None = None) -> datasets.Dataset:
    """A set of the images, one of them given by its path alone."""
    texts = ["one", ["two"], "", None] if texts is None else texts
    texts = [text if isinstance(text, list) or text is None else [text] for text in texts]
    rows = [{"bytes": p.read_bytes(), "path": None} for p in images]
    rows[1] = {"bytes": None, "path": str(images[1])}
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "text": datasets.List(datasets.Value("string")),
            "label": datasets.Value("int64"),
        }
    )
    return datasets.Dataset.from_dict({"image": rows, "text": texts, "label": [0] * 4}, features)


def opened(tmp_path: Path, dataset: object, **changes: object) -> Source:
    spec = SourceSpec(dataset=str(dataset), cache_dir=str(tmp_path / "cache"), **changes)  # type: ignore[arg-type]
    (source,) = open_source(spec)
    return source


def check(source: Source, images: list[Path]) -> None:
    """Assert the rows of `made`, read twice, and their findings."""
    for _ in range(2):
        samples = list(source.rows())
        assert [s.name for s in samples] == [f"{source.spec.dataset}, row {i}" for i in range(3)]
        assert [s.captions for s in samples] == [("one",), ("two",), ("",)]
        assert [s.read() for s in samples] == [p.read_bytes() for p in images[:3]]
        assert [
            decode_with_mask(s.read(), s.name)[0].size for s in pickle.loads(pickle.dumps(samples))
        ] == [
            (8, 8),
            (9, 8),
            (10, 8),
        ]
        assert [(f.level, f.code, f.name.split(", ")[1]) for f in source.findings] == [
            ("warning", "empty-caption", "row 2"),
            ("left out", "missing-caption", "row 3"),
        ]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", ["folder", "file", "saved", "splits", "arrow"])
def test_forms_of_local_sets(
    form: str, streaming: bool, images: list[Path], tmp_path: Path
) -> None:
    """A folder of parquet, a parquet or arrow file, and a folder of save_to_disk are the same set,
    streamed or not; a stream's findings come with its rows, once."""
    dataset, folder = made(images), tmp_path / "set"
    path = folder
    if form in ("folder", "file"):
        folder.mkdir()
        path = folder / "train.parquet"
        dataset.to_parquet(path)
        path = folder if form == "folder" else path
    elif form == "splits":
        datasets.DatasetDict({"train": dataset}).save_to_disk(folder)
    else:
        dataset.save_to_disk(folder)
        path = next(folder.glob("*.arrow")) if form == "arrow" else folder
    source = opened(tmp_path, path, streaming=streaming)
    assert source.count == (None if streaming else 3)
    check(source, images)


def test_a_prompt_fills_gaps(images: list[Path], tmp_path: Path) -> None:
    """The prompt is the caption of rows with a blank one, or of all rows if no column is read."""
    made(images).to_parquet(tmp_path / "a.parquet")
    source = opened(tmp_path, tmp_path / "a.parquet", prompt="p")
    assert [s.captions for s in source.rows()] == [("one",), ("two",), ("p",), ("p",)]
    assert [f.code for f in source.findings] == ["empty-caption"]
    for changes in ({"captions": "prompt"}, {"caption_column": None}):
        source = opened(tmp_path, tmp_path / "a.parquet", prompt="p", **changes)
        assert {s.captions for s in source.rows()} == {("p",)}
    with pytest.raises(UsageError, match="neither a caption column nor a prompt"):
        opened(tmp_path, tmp_path / "a.parquet", caption_column=None)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_tables_of_paths(suffix: str, streaming: bool, images: list[Path], tmp_path: Path) -> None:
    """A csv or json file names images relative to itself; a missing image is an error
    on reading."""
    names = ["images/0.png", str(images[1]), "images/gone.png"]
    table = tmp_path / f"table{suffix}"
    if suffix == ".csv":
        table.write_text("image,text\n" + "\n".join(f"{name},a" for name in names))
    else:
        table.write_text("\n".join(json.dumps({"image": n, "text": "a"}) for n in names))
    samples = list(opened(tmp_path, table, streaming=streaming).rows())
    assert [s.read() for s in samples[:2]] == [p.read_bytes() for p in images[:2]]
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        samples[2].read()


def test_splits(images: list[Path], tmp_path: Path) -> None:
    """Another split, a part of a split, and a missing split."""
    (tmp_path / "set").mkdir()
    for name in ("train", "test"):
        made(images, ["a", "b", "c", name]).to_parquet(tmp_path / "set" / f"{name}.parquet")
    last = [list(opened(tmp_path, tmp_path / "set", split=s).rows())[-1] for s in ("train", "test")]
    assert [s.captions for s in last] == [("train",), ("test",)]
    assert opened(tmp_path, tmp_path / "set", split="test[:2]").count == 2
    for streaming in (False, True):
        with pytest.raises(UsageError, match=r"split tset\) could not be loaded.*test.*--split"):
            opened(tmp_path, tmp_path / "set", split="tset", streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"caption_column": "txt"}, "no caption column 'txt'; it has image, text, label. Did you"),
        ({"image_column": "img"}, "no image column 'img'.* Choose one with --image_column"),
        ({"image_column": "text"}, "column 'text' holds .*, not images"),
        ({"caption_column": "label"}, "column 'label' holds .*, not texts"),
        ({"captions": "sidecar"}, "captions = sidecar is for folders"),
    ],
)
def test_wrong_columns(
    changes: dict, message: str, streaming: bool, images: list[Path], tmp_path: Path
) -> None:
    """Columns that are missing or of another type are named before an image is read."""
    made(images).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(UsageError, match=message):
        opened(tmp_path, tmp_path / "a.parquet", streaming=streaming, **changes)


def test_sets_that_cannot_be_loaded(images: list[Path], tmp_path: Path) -> None:
    """A missing set, a file of another format, and a set without any caption are errors."""
    with pytest.raises(UsageError, match="nowhere .*could not be loaded"):
        opened(tmp_path, tmp_path / "nowhere")
    with pytest.raises(UsageError, match="is a file, but has none of the endings .parquet"):
        opened(tmp_path, images[0])
    made(images, [None] * 4).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(UsageError, match="has no row to train\n.*row 0: no caption; write"):
        opened(tmp_path, tmp_path / "a.parquet")


def test_a_stream_holds_one_row_at_a_time(images: list[Path], tmp_path: Path) -> None:
    """Rows are read only on request, and the error of a broken stream names the row."""
    made(images).to_parquet(tmp_path / "a.parquet")
    source = opened(tmp_path, tmp_path / "a.parquet", streaming=True)
    assert source.findings == []
    rows = source.rows()
    next(rows)
    assert source.findings == []
    (tmp_path / "set").mkdir()
    row = json.dumps({"image": {"path": str(images[0])}, "text": "a"})
    (tmp_path / "set" / "1.jsonl").write_text(f"{row}\n" * 3)
    (tmp_path / "set" / "2.jsonl").write_text("{broken")
    rows = opened(tmp_path, tmp_path / "set", streaming=True).rows()
    assert [next(rows).read() for _ in range(3)] == [images[0].read_bytes()] * 3
    with pytest.raises(RunError, match=r"set broke off at row 3: JSON parse error"):
        next(rows)


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_that_are_not_as_the_others(
    streaming: bool, images: list[Path], tmp_path: Path
) -> None:
    """A json column may hold texts and lists of texts; rows with other values are left out."""
    lines = [{"image": str(images[0]), "text": text} for text in ("x", ["y", "z"], 3, None)]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = opened(tmp_path, tmp_path / "b.jsonl", streaming=streaming)
    assert [s.captions for s in source.rows()] == [("x",), ("y", "z")]
    assert [f.code for f in source.findings] == ["bad-caption", "missing-caption"]
    assert source.findings[0].text == "text must be a text or a list of texts, not 3"


def test_images_in_archives(images: list[Path], tmp_path: Path) -> None:
    """Images that a stream names by addresses, for example in a zip file, are read from there."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(images[0], "a.png")
    row = {"image": f"zip://a.png::{tmp_path / 'a.zip'}", "text": "x"}
    (tmp_path / "b.jsonl").write_text(json.dumps(row))
    (sample,) = opened(tmp_path, tmp_path / "b.jsonl", streaming=True).rows()
    assert sample.read() == images[0].read_bytes()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_a_stream_does_not_fill_memory(tmp_path: Path) -> None:
    """A stream of 200 MB takes less than half of that in memory; by default pyarrow would keep all
    of the file."""

    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    kind = pa.schema({"image": pa.struct({"bytes": pa.binary()}), "text": pa.string()})
    with pq.ParquetWriter(tmp_path / "a.parquet", kind, compression="none") as file:
        for _ in range(50):
            rows = [{"image": {"bytes": os.urandom(40_000)}, "text": "x"} for _ in range(100)]
            file.write_table(pa.Table.from_pylist(rows, kind))
    source = opened(tmp_path, tmp_path / "a.parquet", streaming=True)
    next(source.rows())
    before, most = resident(), 0.0
    for number, sample in enumerate(source.rows()):
        assert len(sample.read()) == 40_000
        if number % 100 == 99:
            most = max(most, resident())
    assert number == 4999
    assert most - before < 100e6
