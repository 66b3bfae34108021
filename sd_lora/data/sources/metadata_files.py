"""Metadata files: an image and its captions in each row, and errors that name the line."""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd_lora.config.sources import SourceSpec
from sd_lora.data.sources.samples import shown
from sd_lora.errors import UsageError, did_you_mean

TABLES = ("metadata.jsonl", "metadata.csv")
"""The names of metadata files in a folder: the imagefolder layout of `datasets`."""


@dataclass(frozen=True, slots=True)
class Row:
    """where: file and line, for messages. name: of the image, as written. captions: () where
    the row has none."""

    where: str
    name: str
    captions: tuple[str, ...]


def text_of(path: Path) -> str:
    """Returns a text file without its byte order mark; raises UsageError by name."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        what = f"is not UTF-8 text (byte {error.start}): save it as UTF-8"
    except OSError as error:
        what = f"cannot be read: {error.strerror}"
    raise UsageError(f"{shown(path)} {what}")


def read_table(table: Path, spec: SourceSpec) -> list[Row]:
    """Returns the rows of a metadata file.

    `.jsonl` and `.csv` are those of `datasets`: a file_name, and the caption column with a text or
    a list of texts. `.json` is kohya's: {image: {"caption": …, "tags": …}}, and so is a `.jsonl`
    of rows with an image_path; their caption and tags are joined.

    Raises:
        UsageError: a file that cannot be read, has no rows, or a row without image or caption
            column, by line.
    """
    known = {".jsonl": _json_lines, ".csv": _csv_lines, ".json": _kohya_rows}
    read = known.get(table.suffix.lower())
    if read is None:
        raise UsageError(f"{shown(table)} is no metadata file: those end in {', '.join(known)}")
    rows = [_row(row, where, spec) for where, row in read(table)]
    if not rows:
        raise UsageError(f"{shown(table)} has no rows")
    return rows


def _json(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UsageError(f"{where}: not an object but {text.strip()[:40]}")
    return value


def _json_lines(table: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(text_of(table).split("\n"), 1):  # a caption may hold U+2028
        if line.strip():
            where = f"{shown(table)}, line {number}"
            yield where, _json(line, where)


def _csv_lines(table: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text_of(table), newline=""))
    try:
        for row in reader:
            yield f"{shown(table)}, line {reader.line_num}", {str(k): v for k, v in row.items()}
    except csv.Error as error:
        raise UsageError(f"{shown(table)}, line {reader.line_num}: not CSV: {error}") from None


def _kohya_rows(table: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, row in _json(text_of(table), shown(table)).items():
        where = f"{shown(table)}, {name!r}"
        if not isinstance(row, dict):
            raise UsageError(f"{where}: not an object with a caption but {row!r:.40}")
        yield where, {**row, "image_path": name}


def _row(row: dict[str, Any], where: str, spec: SourceSpec) -> Row:
    image, column = spec.image_column, str(spec.caption_column)
    if isinstance(row.get("image_path"), str) and image != "image_path":
        return Row(where, row["image_path"], _kohya_captions(row, where, spec))
    name = row.get("file_name", row.get(f"{image}_file_name", row.get(image)))
    if not isinstance(name, str) or "\0" in name:
        raise UsageError(f"{where} has no file_name (found {', '.join(map(str, row))})")
    if column not in row:
        columns = [key for key in row if key != "file_name"]
        raise UsageError(
            f"{where} has no caption column {column!r}; it has {', '.join(columns) or 'none'}."
            f"{did_you_mean(column, columns)} Choose one with --caption_column"
        )
    return Row(where, name, texts(row[column], where, column))


def _kohya_captions(row: dict[str, Any], where: str, spec: SourceSpec) -> tuple[str, ...]:
    """Returns captions with the tags behind them: behind each line, where one will be chosen."""
    comma = f"{spec.rules.caption_separator} "
    tags = comma.join(texts(row.get("tags"), where, "tags"))

    def tagged(caption: str) -> str:
        lines = caption.split("\n") if spec.rules.wildcards else [caption]
        return "\n".join(comma.join(part for part in (line, tags) if part) for line in lines)

    captions = texts(row.get("caption"), where, "caption")
    return tuple(map(tagged, captions)) or ((tags,) if tags else ())


def texts(value: object, where: str, column: str) -> tuple[str, ...]:
    """Returns a text or a list of texts as a tuple, () for none; raises UsageError for others."""
    found = list(value) if isinstance(value, list | tuple) else [value]
    if not all(isinstance(text, str | None) for text in found):
        raise UsageError(f"{where}: {column} must be a text or a list of texts, not {value!r:.80}")
    return tuple(text for text in found if isinstance(text, str))
