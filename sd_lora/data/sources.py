"""Where samples come from: folders with prompts, folders with captions, and `datasets` sets."""

import csv
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from sd_lora.data.images import decode, is_picture
from sd_lora.errors import RunError, UsageError, did_you_mean


@dataclass(frozen=True)
class Sample:
    """One picture: its name for messages, its bytes when asked, and one or more captions."""

    name: str
    read: Callable[[], bytes]
    captions: tuple[str, ...]

    def picture(self) -> Image.Image:
        """Returns the decoded picture; raises RunError by name if that cannot be done."""
        try:
            data = self.read()
        except OSError as error:
            reason = error.strerror or error
            raise RunError(f"{self.name} could not be read: {reason}") from None
        return decode(data, self.name)


@dataclass(frozen=True)
class Source:
    """Samples, and what the user must know about how they were found."""

    samples: list[Sample]
    notes: list[str] = field(default_factory=list)


def _names(items: list[str]) -> str:
    return ", ".join(items[:5]) + (f" and {len(items) - 5} more" if len(items) > 5 else "")


def _folder(path: str, what: str) -> Path:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        kind = "is a file, not a folder" if folder.exists() else "does not exist"
        raise UsageError(f"{what} {path} {kind}")
    return folder


def _no_pictures(folder: Path, what: str) -> UsageError:
    found = sorted(p.name for p in folder.iterdir())
    has = f"it holds {_names(found)}" if found else "it is empty"
    return UsageError(f"{what} {folder} holds no pictures: {has}")


def prompted_folder(path: str, prompt: str, what: str) -> Source:
    """Returns every picture of a folder (not of its subfolders) with one prompt: DreamBooth.

    Raises:
        UsageError: a folder that is missing or holds no pictures.
    """
    folder = _folder(path, what)
    entries = sorted(folder.iterdir())
    samples = [Sample(str(p), p.read_bytes, (prompt,)) for p in entries if is_picture(p)]
    if not samples:
        raise _no_pictures(folder, what)
    others = [p.name for p in entries if not is_picture(p) and not p.name.startswith(".")]
    notes = [f"{what}: not pictures, left out: {_names(others)}"] if others else []
    return Source(samples, notes)


def captioned_folder(path: str, image_column: str, caption_column: str) -> Source:
    """Returns the pictures of a folder tree with their captions.

    Captions come from `metadata.jsonl` or `metadata.csv` files (the imagefolder layout of
    `datasets`: a file_name relative to the metadata file, and a caption column), or, where there
    is none, from `.txt` or `.caption` files beside the pictures.

    Raises:
        UsageError: a folder that is missing or holds no pictures, a caption column that is not
            there, a row that cannot be read or names a missing picture.
    """
    folder = _folder(path, "train_data_dir")
    pictures = sorted(p for p in folder.rglob("*") if is_picture(p))
    tables = sorted((*folder.rglob("metadata.jsonl"), *folder.rglob("metadata.csv")))
    if not pictures and not tables:
        raise _no_pictures(folder, "train_data_dir")
    captions: dict[Path, tuple[str, ...]] = {}
    for table in tables:
        captions |= _table_captions(table, image_column, caption_column)
    if not tables:
        captions = _sidecar_captions(pictures)
        if not captions:
            raise UsageError(
                f"{folder} has pictures and no captions: give it a metadata.jsonl with lines like "
                f'{{"file_name": "{pictures[0].name}", "{caption_column}": "a photo of …"}}, or a '
                f"{pictures[0].stem}.txt beside each picture"
            )
    # what metadata names is trained, whatever its extension: if it is no picture, decoding says so
    known = sorted(captions)
    orphans = [str(p.relative_to(folder)) for p in pictures if p.resolve() not in captions]
    notes = [f"without a caption, not trained: {_names(orphans)}"] if orphans else []
    empty = [p.name for p in known if "" in captions[p]]
    if empty:
        notes.append(f"trained with an empty caption: {_names(empty)}")
    return Source([Sample(str(p), p.read_bytes, captions[p]) for p in known], notes)


def _sidecar_captions(pictures: list[Path]) -> dict[Path, tuple[str, ...]]:
    captions: dict[Path, tuple[str, ...]] = {}
    for picture in pictures:
        for suffix in (".txt", ".caption"):
            sidecar = picture.with_suffix(suffix)
            if sidecar.is_file():
                captions[picture.resolve()] = (_text(sidecar).strip(),)
                break
    return captions


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8"
        ) from None


def _rows(table: Path) -> list[tuple[int, dict[str, Any]]]:
    """Returns (line number, row) of a metadata file."""
    if table.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(_text(table), newline=""))
        return [(reader.line_num, {str(k): v for k, v in row.items()}) for row in reader]
    rows = []
    for number, line in enumerate(_text(table).split("\n"), 1):  # a caption may hold U+2028
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UsageError(f"{table}, line {number}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise UsageError(f"{table}, line {number}: not an object but {line.strip()[:40]}")
        rows.append((number, row))
    return rows


def _captions(value: object, where: str, column: str) -> tuple[str, ...]:
    texts = value if isinstance(value, list | tuple) else [value]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise UsageError(f"{where}: {column} must be a text or a list of texts, not {value!r}")
    return tuple(texts)


def _table_captions(
    table: Path, image_column: str, caption_column: str
) -> dict[Path, tuple[str, ...]]:
    captions = {}
    rows = _rows(table)
    if not rows:
        raise UsageError(f"{table} has no rows")
    for number, row in rows:
        where = f"{table}, line {number}"
        name = row.get("file_name", row.get(f"{image_column}_file_name", row.get(image_column)))
        if not isinstance(name, str):
            raise UsageError(f"{where} has no file_name (found {', '.join(map(str, row))})")
        if caption_column not in row:
            columns = [key for key in row if key != "file_name"]
            raise UsageError(
                f"{where} has no caption column {caption_column!r}; it has "
                f"{', '.join(columns) or 'none'}.{did_you_mean(caption_column, columns)} "
                "Choose one with --caption_column"
            )
        path = table.parent / name
        if not path.is_file():
            raise UsageError(f"{where} names {name}, which is not there")
        captions[path.resolve()] = _captions(row[caption_column], where, caption_column)
    return captions


def _row_bytes(dataset: Any, row: int, column: str) -> bytes:
    picture = dataset[row][column]
    return picture["bytes"] if picture["bytes"] is not None else Path(picture["path"]).read_bytes()


def named_dataset(
    name: str,
    config_name: str | None,
    cache_dir: str | None,
    image_column: str,
    caption_column: str | None,
    prompt: str | None = None,
) -> Source:
    """Returns the train split of a `datasets` set: a hub name, or a local folder of parquet files.

    Without a caption column, or where a caption is missing, `prompt` is the caption.

    Raises:
        UsageError: a set that cannot be loaded, without a train split, or without the columns.
    """
    import datasets  # a second of import, for those who use it

    try:
        loaded = datasets.load_dataset(name, config_name, cache_dir=cache_dir)
    except (OSError, ValueError, ConnectionError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"dataset {name} could not be loaded: {reason}") from None
    if "train" not in loaded:
        raise UsageError(f"dataset {name} has no train split; it has {', '.join(loaded)}")
    dataset = loaded["train"]
    for flag, column in (("image_column", image_column), ("caption_column", caption_column)):
        if column is None:
            continue
        if column not in dataset.column_names:
            raise UsageError(
                f"dataset {name} has no {flag.replace('_', ' ')} {column!r}; it has "
                f"{', '.join(dataset.column_names)}."
                f"{did_you_mean(column, dataset.column_names)} Choose one with --{flag}"
            )
    if not isinstance(dataset.features[image_column], datasets.Image):
        kind = dataset.features[image_column]
        raise UsageError(f"dataset {name}: column {image_column!r} holds {kind}, not pictures")
    texts = [None] * len(dataset)
    if caption_column is not None:
        texts = dataset.select_columns([caption_column])[caption_column]
    dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
    samples = []
    for row, text in enumerate(texts):
        where = f"{name}, row {row}"
        captions = (prompt,) if prompt and not text else _captions(text, where, str(caption_column))
        samples.append(Sample(where, partial(_row_bytes, dataset, row, image_column), captions))
    return Source(samples)
