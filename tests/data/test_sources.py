"""Where samples come from, and the errors of folders that are not as they should be."""

import json
from collections import Counter
from pathlib import Path

import datasets
import pytest
from PIL import Image

from sd_lora.data.images import Framing
from sd_lora.data.sources import Sample, captioned_folder, named_dataset, prompted_folder
from sd_lora.data.stream import Order, Stream
from sd_lora.errors import RunError, UsageError


def picture(path: Path, size: tuple[int, int] = (8, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path)
    return path


def jsonl(folder: Path, *rows: object) -> None:
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8")


def test_metadata_jsonl_and_csv(tmp_path: Path) -> None:
    """Both metadata layouts, nested folders, lists of captions, and notes of what is left out."""
    picture(tmp_path / "a.png")
    picture(tmp_path / "sub" / "b.png")
    picture(tmp_path / "orphan.png")
    jsonl(tmp_path, {"file_name": "a.png", "text": ["one", "two"]}, "")
    (tmp_path / "sub" / "metadata.csv").write_text("file_name,text\nb.png,\n")
    source = captioned_folder(str(tmp_path), "image", "text")
    assert [(Path(s.name).name, s.captions) for s in source.samples] == [
        ("a.png", ("one", "two")),
        ("b.png", ("",)),
    ]
    assert source.notes == [
        "without a caption, not trained: orphan.png",
        "trained with an empty caption: b.png",
    ]


def test_text_files_beside_pictures(tmp_path: Path) -> None:
    """Without metadata, .txt and .caption files are the captions (a BOM is no part of them)."""
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    (tmp_path / "a.txt").write_text("\ufeffa red square\n", encoding="utf-8")
    (tmp_path / "b.caption").write_text("another")
    source = captioned_folder(str(tmp_path), "image", "text")
    assert [s.captions for s in source.samples] == [("a red square",), ("another",)]


def test_odd_metadata_is_read_as_written(tmp_path: Path) -> None:
    """What metadata names is trained whatever its extension; captions may hold line separators
    and quoted newlines."""
    picture(tmp_path / "a.png").rename(tmp_path / "a.jfif")
    jsonl(tmp_path, {"file_name": "a.jfif", "text": "one\u2028two"})
    (sample,) = captioned_folder(str(tmp_path), "image", "text").samples
    assert sample.captions == ("one\u2028two",)
    assert sample.picture().size == (8, 8)
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").write_text('file_name,text\na.jfif,"one\ntwo"\n')
    (sample,) = captioned_folder(str(tmp_path), "image", "text").samples
    assert sample.captions == ("one\ntwo",)
    (tmp_path / "metadata.csv").write_text("file_name,txt\na.jfif,one,surplus\n")
    with pytest.raises(UsageError, match="no caption column 'text'"):
        captioned_folder(str(tmp_path), "image", "text")


def test_a_picture_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """A picture that vanishes, or that the system will not give, is an error by name."""
    path = picture(tmp_path / "a.png")
    (sample,) = prompted_folder(str(tmp_path), "a photo", "instance_data_dir").samples
    path.unlink()
    with pytest.raises(RunError, match=r"a\.png could not be read: No such file"):
        sample.picture()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "metadata.jsonl has no rows"),
        (
            [{"file_name": "a.png", "caption": "x"}],
            r"line 1 has no caption column 'text'; it has caption",
        ),
        ([{"file_name": "a.png", "txt": "x"}], "Did you mean txt"),
        ([{"file_name": "b.png", "text": "x"}], "line 1 names b.png, which is not there"),
        ([{"text": "x"}], "line 1 has no file_name"),
        ([{"file_name": "a.png", "text": "x"}, "{broken"], "line 2: not JSON"),
        (["[1, 2]"], "line 1: not an object"),
        ([{"file_name": "a.png", "text": None}], "must be a text"),
    ],
)
def test_broken_metadata_is_named_by_line(rows: list, message: str, tmp_path: Path) -> None:
    """Every fault of a metadata file is an error with its line and the remedy."""
    picture(tmp_path / "a.png")
    jsonl(tmp_path, *rows)
    with pytest.raises(UsageError, match=message):
        captioned_folder(str(tmp_path), "image", "text")


def test_folders_without_pictures_or_captions(tmp_path: Path) -> None:
    """Missing, empty, picture-less and caption-less folders, and captions that are not UTF-8."""
    with pytest.raises(UsageError, match="does not exist"):
        captioned_folder(str(tmp_path / "none"), "image", "text")
    with pytest.raises(UsageError, match="holds no pictures: it is empty"):
        captioned_folder(str(tmp_path), "image", "text")
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(UsageError, match="holds no pictures: it holds notes.md"):
        prompted_folder(str(tmp_path), "a photo", "instance_data_dir")
    with pytest.raises(UsageError, match="is a file, not a folder"):
        prompted_folder(str(tmp_path / "notes.md"), "a photo", "instance_data_dir")
    picture(tmp_path / "a.png")
    with pytest.raises(UsageError, match=r"no captions: give it a metadata.jsonl"):
        captioned_folder(str(tmp_path), "image", "text")
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UsageError, match="not UTF-8 text"):
        captioned_folder(str(tmp_path), "image", "text")


def test_a_prompted_folder_says_what_it_leaves_out(tmp_path: Path) -> None:
    """DreamBooth folders take pictures only (the script opens every file) and say so."""
    picture(tmp_path / "a.png")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / ".DS_Store").write_text("x")
    source = prompted_folder(str(tmp_path), "a photo", "instance_data_dir")
    assert [s.captions for s in source.samples] == [("a photo",)]
    assert source.notes == ["instance_data_dir: not pictures, left out: notes.txt"]


def test_a_datasets_set(tmp_path: Path) -> None:
    """A local parquet set gives the same bytes and captions; wrong columns are named."""
    path = picture(tmp_path / "pictures" / "a.png")
    rows = {"image": [{"bytes": path.read_bytes(), "path": None}], "text": ["a red square"]}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "set" / "train.parquet")
    load = (str(tmp_path / "set"), None, str(tmp_path / "cache"))
    (sample,) = named_dataset(*load, "image", "text").samples
    assert sample.read() == path.read_bytes()
    assert sample.captions == ("a red square",)
    with pytest.raises(
        UsageError, match="no caption column 'txt'; it has image, text. Did you mean text"
    ):
        named_dataset(*load, "image", "txt")
    with pytest.raises(UsageError, match="column 'text' holds .*, not pictures"):
        named_dataset(*load, "text", "text")
    with pytest.raises(UsageError, match="could not be loaded"):
        named_dataset(str(tmp_path / "nowhere"), None, str(tmp_path / "cache"), "image", "text")


def samples(n: int) -> list[Sample]:
    return [Sample(f"{i}.png", lambda: b"", (f"caption {i}",)) for i in range(n)]


@pytest.mark.parametrize("repeats", [1, 3])
def test_every_epoch_shows_every_picture(repeats: int) -> None:
    """Each epoch is another permutation with every picture exactly `repeats` times; nothing is
    dropped where a batch runs over an epoch's end."""
    order = Order(samples(7), "instance", repeats, False, seed=0)
    length = 7 * repeats
    epochs = [[order.slot(e * length + i).index for i in range(length)] for e in range(4)]
    assert all(Counter(epoch) == Counter(list(range(7)) * repeats) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert [order.slot(i).index for i in (3, length * 2 + 1, 3)] == [
        epochs[0][3],
        epochs[2][1],
        epochs[0][3],
    ]


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 1), (2, 1), (1, 2), (4, 1), (2, 2)])
def test_any_split_of_a_global_batch_is_the_same_samples(processes: int, accumulation: int) -> None:
    """Processes × accumulation × batch = 8 see the same slots in all, instances and class alike,
    and instances pair with class samples one to one."""
    batch = 8 // processes // accumulation

    def stream(process: int) -> Stream:
        instance = Order(samples(5), "instance", 1, True, seed=1)
        prior = Order(samples(11), "class", 1, True, seed=1)
        return Stream(instance, prior, batch, process, processes, Framing(8), {}, 100)

    one = Stream(
        Order(samples(5), "instance", 1, True, seed=1),
        Order(samples(11), "class", 1, True, seed=1),
        8, 0, 1, Framing(8), {}, 100,
    )  # fmt: skip
    for step in range(6):
        want = {slot.address for slot in one.slots(step)}
        got = [
            slot
            for micro in range(step * accumulation, (step + 1) * accumulation)
            for process in range(processes)
            for slot in stream(process).slots(micro)
        ]
        assert len(got) == 16
        assert {slot.address for slot in got} == want
        assert Counter(slot.kind for slot in got) == {"instance": 8, "class": 8}


def test_class_pictures_are_all_used() -> None:
    """11 class pictures beside 5 instances: the class order rotates through all of them."""
    order = Order(samples(11), "class", 1, False, seed=0)
    assert {order.slot(i).index for i in range(11)} == set(range(11))


def test_captions_of_a_picture_take_turns() -> None:
    """A picture with several captions is shown with each of them over the epochs."""
    order = Order([Sample("a", lambda: b"", ("one", "two", "three"))], "instance", 1, False, 0)
    assert {order.slot(i).caption for i in range(40)} == {"one", "two", "three"}
