"""`datasets` sets: by their name on the hub, from a folder or a file, at once or as a stream."""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from sd_lora.config.sources import SourceSpec
from sd_lora.data.images.decode import read_file
from sd_lora.data.sources.metadata_files import texts
from sd_lora.data.sources.samples import (
    EMPTY_CAPTION,
    NO_CAPTION,
    Sample,
    Source,
    filled,
    has_empty,
)
from sd_lora.errors import RunError, UsageError, did_you_mean
from sd_lora.findings import Finding

FORMATS = {
    ".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".arrow": "arrow",
}  # fmt: skip
"""The builders of `datasets` for single files."""


def open_set(spec: SourceSpec) -> Source:
    """Returns a source of the rows of a split of a set.

    The image column holds images, or structs with their bytes or path; of a csv or json file
    also paths, relative to the file. The caption column holds a text or a list of texts; where it
    is missing or empty the prompt is the caption, and of all rows if captions = prompt.

    A stream is read anew by each call of `rows`, a row at a time, and so are its findings.

    Raises:
        UsageError: a set that cannot be loaded, or without the columns.
    """
    loaded = _load(spec)
    column = None if spec.captions == "prompt" else spec.caption_column
    if column is None and spec.prompt is None:
        raise UsageError(f"dataset {spec.dataset} has neither a caption column nor a prompt")
    if spec.captions not in ("auto", "prompt"):
        raise UsageError(
            f"dataset {spec.dataset}: captions = {spec.captions} is for folders; of a set they "
            "come from its caption column or are the prompt"
        )
    base = _base(spec)
    loaded = _checked(loaded, spec, column, base)
    findings: list[Finding] = []
    if spec.streaming:
        return Source(spec, partial(_stream, spec, loaded, column, base, findings), findings)
    captions: Any = [None] * len(loaded)
    if column is not None:
        captions = loaded.select_columns([column])[column]
    samples = []
    for row, value in enumerate(captions):
        read = partial(_row_bytes, loaded, row, spec.image_column, base)
        samples += _sample(spec, row, value, read, findings)
    if not samples:
        raise UsageError(
            f"dataset {spec.dataset} has no row to train"
            + "".join(f"\n  {f.line()}" for f in findings[:5])
        )
    return Source(spec, partial(iter, samples), findings, len(samples))


def _base(spec: SourceSpec) -> Path | None:
    """Returns the folder that paths in a csv or json file are relative to; None for other sets."""
    file = Path(str(spec.dataset)).expanduser()
    return file.parent if file.is_file() and file.suffix.lower() != ".parquet" else None


def _load(spec: SourceSpec) -> Any:
    import datasets  # a second of import, for those who use it

    name = os.path.expanduser(str(spec.dataset))
    local, config, files = Path(name), spec.config_name, None
    if local.is_file():
        builder = FORMATS.get(local.suffix.lower())
        if builder is None:
            raise UsageError(f"dataset {name} is a file, but not one of {', '.join(FORMATS)}")
        name, files = builder, str(local)
    try:
        if any((local / file).is_file() for file in ("dataset_dict.json", "state.json")):
            return _load_saved(datasets, local, spec)
        options = {"data_files": files, "revision": spec.revision, "cache_dir": spec.cache_dir}
        if spec.streaming:
            return _load_stream(datasets.load_dataset_builder(name, config, **options), spec.split)
        return datasets.load_dataset(name, config, split=spec.split, **options)
    except (OSError, ValueError, ConnectionError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:300]
        where = f"dataset {spec.dataset} (split {spec.split})"
        raise UsageError(f"{where} could not be loaded: {reason}") from None


def _load_stream(builder: Any, split: str) -> Any:
    if hasattr(builder.config, "fragment_scan_options"):  # of parquet
        from pyarrow.dataset import ParquetFragmentScanOptions

        # by default pyarrow keeps all that it has read of a file (github.com/apache/arrow#39808):
        # 1 GB after 50,000 rows of 20 kB, instead of a quarter of that
        builder.config.fragment_scan_options = ParquetFragmentScanOptions(
            pre_buffer=False, use_buffered_stream=True
        )
    return builder.as_streaming_dataset(split=split)


def _load_saved(datasets: Any, folder: Path, spec: SourceSpec) -> Any:
    """Returns a set that was written by `save_to_disk`."""
    loaded = datasets.load_from_disk(str(folder))
    if isinstance(loaded, datasets.DatasetDict):
        if spec.split not in loaded:
            raise ValueError(f"no such split; it has {', '.join(loaded)}")
        loaded = loaded[spec.split]
    return loaded.to_iterable_dataset() if spec.streaming else loaded


def _checked(loaded: Any, spec: SourceSpec, column: str | None, base: Path | None) -> Any:
    """Returns the set with its images left as bytes, after a look at its columns."""
    import datasets

    name, features = spec.dataset, loaded.features
    if features is None:  # a stream may say nothing of itself
        first = next(_rows(loaded, spec), None)
        if first is None:
            raise UsageError(f"dataset {name} has no rows")
        features = datasets.Dataset.from_list([first]).features
    for flag, wanted in (("image_column", spec.image_column), ("caption_column", column)):
        if wanted is not None and wanted not in features:
            remedy = (
                ", or give a caption for all: --captions_from prompt and --caption_default (in "
                "[[sources]]: captions and prompt)"
                if flag == "caption_column"
                else ""
            )
            raise UsageError(
                f"dataset {name} has no {flag.replace('_', ' ')} {wanted!r}; it has "
                f"{', '.join(features)}.{did_you_mean(wanted, features)} "
                f"Choose one with --{flag}{remedy}"
            )
    kind = features[spec.image_column]
    struct = isinstance(kind, dict) and bool(kind.keys() & {"bytes", "path"})
    binary = isinstance(kind, datasets.Value) and "binary" in kind.dtype
    path = isinstance(kind, datasets.Value) and base is not None and _is_text(kind)
    if not (isinstance(kind, datasets.Image) or struct or binary or path):
        raise UsageError(f"dataset {name}: column {spec.image_column!r} holds {kind}, not images")
    if column is not None:
        words = getattr(features[column], "feature", features[column])
        words = words[0] if isinstance(words, list) else words
        if not _is_text(words):
            raise UsageError(f"dataset {name}: column {column!r} holds {words}, not texts")
    if isinstance(kind, datasets.Image):
        loaded = loaded.cast_column(spec.image_column, datasets.Image(decode=False))
    return loaded


def _is_text(kind: Any) -> bool:
    # a column of nothing but None is one of missing captions; Json has texts and lists of them
    words = ("string", "large_string", "null")
    return getattr(kind, "dtype", "") in words or type(kind).__name__ == "Json"


def _bytes_of(value: Any, base: Path | None) -> bytes:
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, bytes):
        return value
    if isinstance(value, str) and "://" in value:  # streamed from the hub or out of an archive
        import fsspec

        with fsspec.open(value, "rb") as file:
            return file.read()
    if isinstance(value, str):
        return read_file(base / value if base else Path(value))
    raise OSError("the row has no image")


def _row_bytes(dataset: Any, row: int, column: str, base: Path | None) -> bytes:
    return _bytes_of(dataset[row][column], base)


def _sample(
    spec: SourceSpec, row: int, value: Any, read: partial[bytes], findings: list[Finding]
) -> list[Sample]:
    """Returns the sample of a row, or none and a finding that says why."""
    parts = [spec.config_name] if spec.config_name else []
    parts += [spec.split] if spec.split != "train" else []
    name = ", ".join([str(spec.dataset), *parts, f"row {row}"])
    try:
        captions = texts(value, name, str(spec.caption_column))
    except UsageError as error:
        findings.append(
            Finding("left out", "bad-caption", name, str(error).removeprefix(f"{name}: "))
        )
        return []
    if not captions and spec.prompt is None:
        findings.append(
            Finding("left out", "missing-caption", name, f"it has no caption. {NO_CAPTION}")
        )
        return []
    if has_empty(captions):
        findings.append(Finding("warning", "empty-caption", name, EMPTY_CAPTION))
    return [Sample(name, read, filled(captions, spec.prompt) or (str(spec.prompt),), spec)]


def _rows(stream: Any, spec: SourceSpec) -> Iterator[dict[str, Any]]:
    """Yields the rows of a stream; raises RunError where it breaks."""
    import datasets

    row = 0
    try:
        for value in stream:
            yield value
            row += 1
    except (OSError, ValueError, ConnectionError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:300]
        raise RunError(f"dataset {spec.dataset} broke off at row {row}: {reason}") from error


def _stream(
    spec: SourceSpec, stream: Any, column: str | None, base: Path | None, findings: list[Finding]
) -> Iterator[Sample]:
    findings.clear()  # those of an earlier reading
    for number, row in enumerate(_rows(stream, spec)):
        read = partial(_bytes_of, row[spec.image_column], base)
        yield from _sample(spec, number, row[column] if column else None, read, findings)
