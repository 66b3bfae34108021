"""Metadata files: an image and its captions in each row; errors name the line."""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd_lora.config.sources import SourceSpec
from sd_lora.data.sources.folders import list_names
from sd_lora.data.sources.samples import printable_path
from sd_lora.errors import UsageError, did_you_mean
from sd_lora.files import utf8_text

METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
"""Names of metadata files in a folder: the imagefolder layout of `datasets`."""

JSON_NAME = "metadata.json"
"""Read only with an array of rows in it: other programs write objects under this name, about a
model or a download."""


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


def is_metadata(path: Path) -> bool:
    """Whether a file of a folder holds metadata of its images, by its name."""
    if path.name != JSON_NAME:
        return path.name in METADATA_NAMES
    try:
        with open(path, "rb") as file:
            return file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    except OSError:
        return False


LARGEST = 2**32
"""Bytes of a metadata file: a million rows of four kilobytes."""


def read_text(path: Path, largest: int = LARGEST) -> str:
    """Read a UTF-8 text file without its byte order mark; raises UsageError with its name."""
    try:
        return utf8_text(path, largest)
    except UsageError as error:
        raise UsageError(f"{printable_path(path)} {error}") from None


def read_metadata(path: Path, spec: SourceSpec) -> list[MetadataRow]:
    """Read the rows of a metadata file.

    `.jsonl` and `.csv` as in `datasets`: a file_name, and the caption column with a text or a
    list of texts. `.json`: an array of such rows; or, as in kohya's tools, {image: {"caption": …,
    "tags": …}} or {image: caption}. A row with an image_path is kohya's in each of them: caption
    and tags are joined.

    Raises:
        UsageError: an unreadable or empty file, or a row without image or caption column, with
            its line.
    """
    readers = {".jsonl": _json_lines, ".csv": csv_rows, ".json": _json_rows}
    read = readers.get(path.suffix.lower())
    if read is None:
        raise UsageError(
            f"{printable_path(path)} is not a metadata file: these end in {', '.join(readers)}"
        )
    rows = [_metadata_row(row, where, spec) for where, row in read(path)]
    if not rows:
        raise UsageError(f"{printable_path(path)} has no rows")
    return rows


Rows = Iterator[tuple[str, dict[str, Any]]]
"""Rows with their place: file and line, for messages."""


def _json_value(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: not JSON: {error}") from None


def _json_lines(path: Path) -> Rows:
    text, name = read_text(path), printable_path(path)
    if text.lstrip().startswith("["):  # an array, saved under the name of JSON lines
        yield from _array_rows(_json_value(text, name), name)
        return
    for number, line in enumerate(text.split("\n"), 1):  # a caption may hold U+2028
        if line.strip():
            where = f"{name}, line {number}"
            value = _json_value(line, where)
            if not isinstance(value, dict):
                raise UsageError(f"{where}: not an object but {line.strip()[:40]}")
            yield where, value


def csv_rows(path: Path) -> Rows:
    """The rows of a CSV file by its header.

    Raises:
        UsageError: a quote that is not closed; all rows with another number of fields than the
            header, at once: their commas would tear a caption apart.
    """
    name = printable_path(path)
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    rows: list[tuple[int, list[str]]] = []
    line = 1
    try:
        for row in reader:
            if row:
                rows.append((line, row))
            line = reader.line_num + 1
    except csv.Error as error:
        raise UsageError(
            f"{name}, line {line}: not CSV: {error}. A text that begins with a quote ends with "
            'one, and a quote inside it is written twice: a.png,"a ""red"" car, parked"'
        ) from None
    if not rows:
        return
    header = rows[0][1]
    wrong = [f"line {n} has {len(row)}" for n, row in rows if len(row) != len(header)]
    if wrong:
        raise UsageError(
            f"{name}: the header has {len(header)} fields ({', '.join(header)}), but "
            f'{list_names(wrong)}. A text with commas stands in quotes: a.png,"1girl, solo"'
        )
    for n, row in rows[1:]:
        yield f"{name}, line {n}", dict(zip(header, row, strict=True))


def _json_rows(path: Path) -> Rows:
    name = printable_path(path)
    value = _json_value(read_text(path), name)
    if isinstance(value, list):
        yield from _array_rows(value, name)
        return
    if not isinstance(value, dict):
        raise UsageError(f"{name}: neither an object nor an array of rows but {value!r:.40}")
    for image, row in value.items():
        row = {"caption": row} if isinstance(row, str) else row
        if not isinstance(row, dict):
            raise UsageError(f"{name}, {image!r}: not an object with a caption but {row!r:.40}")
        yield f"{name}, {image!r}", {**row, "image_path": image}


def _array_rows(rows: list[Any], name: str) -> Rows:
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UsageError(f"{name}, row {number}: not an object but {row!r:.40}")
        yield f"{name}, row {number}", row


def _metadata_row(row: dict[str, Any], where: str, spec: SourceSpec) -> MetadataRow:
    image, column = spec.image_column, str(spec.caption_column)
    if isinstance(row.get("image_path"), str) and image != "image_path":
        return MetadataRow(where, row["image_path"], _kohya_captions(row, where, spec))
    name = row.get("file_name", row.get(f"{image}_file_name", row.get(image)))
    if isinstance(name, str) and "\0" in name:
        raise UsageError(f"{where}: the file_name holds a NUL character: {name!r:.80}")
    if not isinstance(name, str):
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
        UsageError: another type, or a NUL character, with where and column.
    """
    found = list(value) if isinstance(value, list | tuple) else [value]
    if any(isinstance(text, str) and "\0" in text for text in found):
        raise UsageError(f"{where}: {column} holds a NUL character: {value!r:.80}")
    if not all(isinstance(text, str | None) for text in found):
        raise UsageError(f"{where}: {column} must be a text or a list of texts, not {value!r:.80}")
    return tuple(text for text in found if isinstance(text, str))
