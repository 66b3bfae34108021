"""Sets of `datasets`: by hub name, folder or file; loaded whole or streamed."""

import os
from collections import deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from sd_lora.config.sources import SourceSpec
from sd_lora.data.images.decode import read_file
from sd_lora.data.sources.metadata_files import captions_in, csv_rows
from sd_lora.data.sources.samples import (
    Sample,
    Source,
    fill_empty_captions,
    has_empty_caption,
)
from sd_lora.errors import RunError, UsageError, did_you_mean
from sd_lora.findings import Finding

FORMATS = {
    ".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".arrow": "arrow",
}  # fmt: skip
"""File extension → builder of `datasets`."""


def open_dataset(spec: SourceSpec) -> Source:
    """Open a split of a set as a source with a sample a row.

    The image column holds images, or structs with their bytes or path; in a csv or json file also
    paths, relative to the file. The caption column holds a text or a list of texts. The prompt
    replaces missing and empty captions, and all captions if captions = prompt.

    Each call of a stream's `rows` reads it again, row by row, and replaces its findings.

    Raises:
        UsageError: a set that cannot be loaded, or lacks the columns.
    """
    loaded = _load(spec)
    column = None if spec.captions == "prompt" else spec.caption_column
    if column is None and spec.prompt is None:
        raise UsageError(f"dataset {spec.dataset} has neither a caption column nor a prompt")
    if spec.captions not in ("auto", "prompt"):
        raise UsageError(
            f"dataset {spec.dataset}: captions = {spec.captions} is for folders; a set has "
            "captions in its caption column (auto) or from the prompt (prompt)"
        )
    base = _folder_of_paths(spec)
    loaded = _with_encoded_images(loaded, spec, column, base)
    findings: list[Finding] = []
    if spec.streaming:
        return Source(
            spec, partial(_streamed_samples, spec, loaded, column, base, findings), findings
        )
    captions: Any = [None] * len(loaded)
    if column is not None:
        captions = loaded.select_columns([column])[column]
    samples = []
    for row, value in enumerate(captions):
        read = partial(_row_bytes, loaded, row, spec.image_column, base)
        samples += _samples_of_row(spec, row, value, read, findings)
    if not samples:
        raise UsageError(
            f"dataset {spec.dataset} has no row to train"
            + "".join(f"\n  {f.line()}" for f in findings[:5])
        )
    return Source(spec, partial(iter, samples), findings, len(samples))


def _folder_of_paths(spec: SourceSpec) -> Path | None:
    """The folder of a csv or json file, to which its paths are relative; None for other sets."""
    file = Path(str(spec.dataset)).expanduser()
    return file.parent if file.is_file() and file.suffix.lower() != ".parquet" else None


def _load(spec: SourceSpec) -> Any:
    import datasets  # a second of import

    name = os.path.expanduser(str(spec.dataset))
    local, config, files = Path(name), spec.config_name, None
    if local.is_file():
        builder = FORMATS.get(local.suffix.lower())
        if builder is None:
            endings = ", ".join(FORMATS)
            raise UsageError(f"dataset {name} is a file, but has none of the endings {endings}")
        if builder == "csv":  # pandas takes surplus fields of all rows for names of rows
            deque(csv_rows(local), maxlen=0)
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
        remedy = ". Choose one with --split (in [[sources]]: split)" * ("split" in reason.lower())
        raise UsageError(f"{where} could not be loaded: {reason.rstrip('.')}{remedy}") from None


def _load_stream(builder: Any, split: str) -> Any:
    if hasattr(builder.config, "fragment_scan_options"):  # of parquet
        from pyarrow.dataset import ParquetFragmentScanOptions

        # by default pyarrow keeps all bytes read from a file (github.com/apache/arrow#39808):
        # 1 GB after 50,000 rows of 20 kB, instead of a quarter of it
        builder.config.fragment_scan_options = ParquetFragmentScanOptions(
            pre_buffer=False, use_buffered_stream=True
        )
    return builder.as_streaming_dataset(split=split)


def _load_saved(datasets: Any, folder: Path, spec: SourceSpec) -> Any:
    """Load a split written by `save_to_disk`."""
    loaded = datasets.load_from_disk(str(folder))
    if isinstance(loaded, datasets.DatasetDict):
        if spec.split not in loaded:
            raise ValueError(f"no such split; it has {', '.join(loaded)}")
        loaded = loaded[spec.split]
    return loaded.to_iterable_dataset() if spec.streaming else loaded


def _with_encoded_images(
    loaded: Any, spec: SourceSpec, column: str | None, base: Path | None
) -> Any:
    """Check the columns of a set, and keep its images as encoded bytes."""
    import datasets

    features = _features(loaded, spec)
    _check_columns_exist(features, spec, column)
    kind = features[spec.image_column]
    struct = isinstance(kind, dict) and bool(kind.keys() & {"bytes", "path"})
    binary = isinstance(kind, datasets.Value) and "binary" in kind.dtype
    path = isinstance(kind, datasets.Value) and base is not None and _is_text(kind)
    if not (isinstance(kind, datasets.Image) or struct or binary or path):
        raise UsageError(
            f"dataset {spec.dataset}: column {spec.image_column!r} holds {kind}, not images"
        )
    if column is not None:
        texts = getattr(features[column], "feature", features[column])
        texts = texts[0] if isinstance(texts, list) else texts
        if not _is_text(texts):
            raise UsageError(f"dataset {spec.dataset}: column {column!r} holds {texts}, not texts")
    if isinstance(kind, datasets.Image):
        loaded = loaded.cast_column(spec.image_column, datasets.Image(decode=False))
    return loaded


def _features(loaded: Any, spec: SourceSpec) -> Any:
    """Column → type; of a stream without types, from its first row."""
    import datasets

    if loaded.features is not None:
        return loaded.features
    first = next(_rows(loaded, spec), None)
    if first is None:
        raise UsageError(f"dataset {spec.dataset} has no rows")
    return datasets.Dataset.from_list([first]).features


def _check_columns_exist(features: Any, spec: SourceSpec, column: str | None) -> None:
    remedy = (
        ", or give a caption for all: --captions_from prompt and --caption_default (in "
        "[[sources]]: captions and prompt)"
    )
    for flag, wanted in (("image_column", spec.image_column), ("caption_column", column)):
        if wanted is None or wanted in features:
            continue
        raise UsageError(
            f"dataset {spec.dataset} has no {flag.replace('_', ' ')} {wanted!r}; it has "
            f"{', '.join(features)}.{did_you_mean(wanted, features)} "
            f"Choose one with --{flag}{remedy * (flag == 'caption_column')}"
        )


def _is_text(kind: Any) -> bool:
    # a column of None alone ("null") has missing captions; Json has texts and lists of them
    text_types = ("string", "large_string", "null")
    return getattr(kind, "dtype", "") in text_types or type(kind).__name__ == "Json"


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


def _samples_of_row(
    spec: SourceSpec, row: int, value: Any, read: partial[bytes], findings: list[Finding]
) -> list[Sample]:
    """The sample of a row in a list; an empty list and a finding for a row that is left out."""
    parts = [spec.config_name] if spec.config_name else []
    parts += [spec.split] if spec.split != "train" else []
    name = ", ".join([str(spec.dataset), *parts, f"row {row}"])
    try:
        captions = captions_in(value, name, str(spec.caption_column))
    except UsageError as error:
        findings.append(Finding("bad-caption", name, str(error).removeprefix(f"{name}: ")))
        return []
    if not captions and spec.prompt is None:
        findings.append(Finding("missing-caption", name, "no caption"))
        return []
    if has_empty_caption(captions):
        findings.append(Finding("empty-caption", name))
    captions = fill_empty_captions(captions, spec.prompt) or (str(spec.prompt),)
    return [Sample(name, read, captions, spec)]


def _rows(stream: Any, spec: SourceSpec) -> Iterator[dict[str, Any]]:
    """Yield the rows of a stream; raises RunError if it breaks off."""
    import datasets

    row = 0
    try:
        for value in stream:
            yield value
            row += 1
    except (OSError, ValueError, ConnectionError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:300]
        raise RunError(f"dataset {spec.dataset} broke off at row {row}: {reason}") from error


def _streamed_samples(
    spec: SourceSpec, stream: Any, column: str | None, base: Path | None, findings: list[Finding]
) -> Iterator[Sample]:
    findings.clear()  # of an earlier reading
    for number, row in enumerate(_rows(stream, spec)):
        read = partial(_bytes_of, row[spec.image_column], base)
        yield from _samples_of_row(spec, number, row[column] if column else None, read, findings)
