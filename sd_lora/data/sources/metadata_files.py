"""Metadata files: an image and its captions in each row; errors name the line."""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd_lora.config.sources import SourceSpec
from sd_lora.data.sources.samples import printable_path
from sd_lora.errors import UsageError, did_you_mean
from sd_lora.files import utf8_text

METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
"""Name of metadata files in a folder: the imagefolder layout of `datasets`."""


@dataclass(frozen=True, slots=True)
class MetadataRow:
    """A row of a metadata file.

    where: file and line, for messages.
    name: of the image, as written in the file.
    captions: () without a caption.
    """

    where: str
    name: str
    captions: tuple[str, ...]


def read_text(path: Path) -> str:
    """Read a UTF-8 text file without its byte order mark; raises UsageError with its name."""
    try:
        return utf8_text(path)
    except UsageError as error:
        raise UsageError(f"{printable_path(path)} {error}") from None


def read_metadata(path: Path, spec: SourceSpec) -> list[MetadataRow]:
    """Read the rows of a metadata file.

    `.jsonl` and `.csv` as in `datasets`: a file_name, and the caption column with a text or a
    list of texts. `.json` as in kohya's tools: {image: {"caption": …, "tags": …}}, and so is a
    `.jsonl` of rows with an image_path; caption and tags are joined.

    Raises:
        UsageError: an unreadable or empty file, or a row without image or caption column, with
            its line.
    """
    readers = {".jsonl": _json_lines, ".csv": _csv_lines, ".json": _kohya_rows}
    read = readers.get(path.suffix.lower())
    if read is None:
        raise UsageError(
            f"{printable_path(path)} is not a metadata file: these end in {', '.join(readers)}"
        )
    rows = [_metadata_row(row, where, spec) for where, row in read(path)]
    if not rows:
        raise UsageError(f"{printable_path(path)} has no rows")
    return rows


def _json_object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UsageError(f"{where}: not an object but {text.strip()[:40]}")
    return value


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(read_text(path).split("\n"), 1):  # a caption may hold U+2028
        if line.strip():
            where = f"{printable_path(path)}, line {number}"
            yield where, _json_object(line, where)


def _csv_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    name, reader = printable_path(path), csv.DictReader(io.StringIO(read_text(path), newline=""))
    try:
        for row in reader:
            yield f"{name}, line {reader.line_num}", {str(k): v for k, v in row.items()}
    except csv.Error as error:
        raise UsageError(f"{name}, line {reader.line_num}: not CSV: {error}") from None


def _kohya_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, row in _json_object(read_text(path), printable_path(path)).items():
        where = f"{printable_path(path)}, {name!r}"
        if not isinstance(row, dict):
            raise UsageError(f"{where}: not an object with a caption but {row!r:.40}")
        yield where, {**row, "image_path": name}


def _metadata_row(row: dict[str, Any], where: str, spec: SourceSpec) -> MetadataRow:
    image, column = spec.image_column, str(spec.caption_column)
    if isinstance(row.get("image_path"), str) and image != "image_path":
        return MetadataRow(where, row["image_path"], _kohya_captions(row, where, spec))
    name = row.get("file_name", row.get(f"{image}_file_name", row.get(image)))
    if not isinstance(name, str) or "\0" in name:
        raise UsageError(f"{where} has no file_name (found {', '.join(map(str, row))})")
    if column not in row:
        columns = [key for key in row if key != "file_name"]
        raise UsageError(
            f"{where} has no caption column {column!r}; it has {', '.join(columns) or 'none'}."
            f"{did_you_mean(column, columns)} Choose one with --caption_column"
        )
    return MetadataRow(where, name, captions_in(row[column], where, column))


def _kohya_captions(row: dict[str, Any], where: str, spec: SourceSpec) -> tuple[str, ...]:
    """Captions with the tags appended: to each line, if wildcards choose a line."""
    comma = f"{spec.rules.caption_separator} "
    tags = comma.join(captions_in(row.get("tags"), where, "tags"))

    def append_tags(caption: str) -> str:
        lines = caption.split("\n") if spec.rules.wildcards else [caption]
        return "\n".join(comma.join(part for part in (line, tags) if part) for line in lines)

    captions = captions_in(row.get("caption"), where, "caption")
    return tuple(map(append_tags, captions)) or ((tags,) if tags else ())


def captions_in(value: object, where: str, column: str) -> tuple[str, ...]:
    """Captions of a cell: a text, a list of texts, or None; () without any.

    Raises:
        UsageError: another type, with where and column.
    """
    found = list(value) if isinstance(value, list | tuple) else [value]
    if not all(isinstance(text, str | None) for text in found):
        raise UsageError(f"{where}: {column} must be a text or a list of texts, not {value!r:.80}")
    return tuple(text for text in found if isinstance(text, str))
