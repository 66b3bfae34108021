"""kohya's dataset configuration → sources and options of a run; free of torch.

`[general]`, `[[datasets]]` and `[[datasets.subsets]]` of sd-scripts' `--dataset_config`, in TOML or
JSON: a subset's keys go before its dataset's, and these before `[general]`.
"""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sd_lora.config.options.images import ImageOptions
from sd_lora.config.options.per_source import PerSourceOptions
from sd_lora.config.options.training import TrainingOptions
from sd_lora.config.rows import Option, Section
from sd_lora.config.sources import RULES, CaptionRules, SourceSpec, problems
from sd_lora.config.values import KINDS, read_table, wrong_type
from sd_lora.errors import UsageError, did_you_mean
from sd_lora.findings import Finding


def by_dataset_key(options: type[Section]) -> dict[str, Option]:
    """Key of kohya's dataset configuration → row of an option."""
    rows = [Option.of(name, info) for name, info in options.model_fields.items()]
    return {row.dataset_key: row for row in rows if row.dataset_key}


SUBSET: dict[str, type] = {
    "image_dir": str,
    "metadata_file": str,
    "is_reg": bool,
    "alpha_mask": bool,
}
"""Keys of a subset alone."""

PER_SOURCE = by_dataset_key(PerSourceOptions)
"""Key → row of an option that each source has of its own."""

OF_RUN = by_dataset_key(TrainingOptions) | by_dataset_key(ImageOptions)
"""Key → row of an option that all sources share."""

SHARED = {key: KINDS[option.kind] for key, option in PER_SOURCE.items()}
SHARED |= {"class_tokens": str, "random_crop": bool}
"""Keys of a subset, or of a dataset for its subsets, or of [general] for all."""

DATASET = {key: KINDS[option.kind] for key, option in OF_RUN.items()}
"""Keys of a dataset, or of [general] for all."""

OF_SOURCES = {
    "resolution": "resolutions",
    "min_bucket_reso": "bucket_min_side",
    "max_bucket_reso": "bucket_max_side",
}
"""Key in which datasets may differ → key of a source that holds it then."""

UNSUPPORTED: dict[str, tuple[tuple[Any, ...] | None, str]] = {
    "color_aug": ((False,), "colours are trained as they are"),
    "face_crop_aug_range": ((), "faces are not looked for; crop the images yourself"),
    "secondary_separator": (("",), "a tag is what stands between two caption_separators"),
    "caption_dropout_every_n_epochs": ((0,), "use caption_dropout_rate"),
    "token_warmup_min": (None, "token_warmup_step says it"),
    "token_warmup_step": ((0,), "all tags are shown from the first step on"),
    "cache_info": ((False,), "the folder is never written to; sizes and digests are kept anyway"),
    "custom_attributes": (({},), "no loss here reads them"),
    "resize_interpolation": (("",), "say image_interpolation_mode of the run instead"),
    "validation_split": ((0,), "give the run a validation set of its own"),
    "validation_seed": (None, "validation_split says it"),
    "network_multiplier": ((1,), "the network has the same strength for all images"),
    "debug_dataset": ((False,), "look at the images with sd-lora check"),
    "prior_loss_weight": ((), "it is a setting of the run: say --prior_loss_weight"),
}
"""Key → values without effect (None: all), and the reason to refuse the others."""


@dataclass
class _Reading:
    path: str
    problems: list[str] = field(default_factory=list)
    unsupported: dict[str, str] = field(default_factory=dict)
    notes: list[Finding] = field(default_factory=list)

    def note(self, code: str, where: str, text: str) -> None:
        self.notes.append(Finding(code, f"{self.path}, {where}", text))


def read_dataset_config(path: str) -> tuple[list[SourceSpec], dict[str, Any], list[Finding]]:
    """Sources, options of the run by the names of their flags, and findings.

    A caption_prefix or suffix stays around the tags here; kohya shuffles it with them. Without
    caption_extension, .txt files are read beside kohya's .caption. A resolution of two numbers
    stands for the square of its area, rounded down to a multiple of 8.

    Raises:
        UsageError: no such file, not TOML or JSON; all keys that are unknown, of a wrong type,
            contradictory or unsupported, at once.
    """
    reading = _Reading(path)
    data = read_table(path, "dataset config", "[[datasets]]")
    general, datasets = data.get("general", {}), data.get("datasets")
    for key in data:
        if key not in ("general", "datasets"):
            hint = did_you_mean(key, ("general", "datasets"))
            reading.problems.append(f"{key!r} is not [general] or [[datasets]].{hint}")
    if not _are_tables([general]) or not _are_tables(datasets) or not datasets:
        raise UsageError(f"{path}: needs [[datasets]] with [[datasets.subsets]] (and [general])")
    _check_keys(general, SHARED | DATASET, "[general]", reading)
    specs: list[SourceSpec] = []
    settings: list[dict[str, Any]] = []
    masks: dict[str, bool] = {}
    owners: list[int] = []  # of each source, the index of its dataset
    for number, dataset in enumerate(datasets, 1):
        where = f"dataset {number}"
        own = {key: value for key, value in dataset.items() if key != "subsets"}
        _check_keys(own, SHARED | DATASET, where, reading)
        settings.append({k: v for k, v in (general | own).items() if k in DATASET})
        subsets = dataset.get("subsets", [])
        if not _are_tables(subsets) or not subsets:
            reading.problems.append(f"{where} has no [[datasets.subsets]]")
            continue
        folders: list[tuple[str, str]] = []
        for place, subset in enumerate(subsets, 1):
            label = f"{where}, subset {place}"
            if not _check_keys(subset, SUBSET | SHARED, label, reading):
                continue
            values = {k: v for k, v in (general | own).items() if k in SHARED} | subset
            masks[label] = values.get("alpha_mask", False)
            _add_source(values, label, folders, specs, reading)
        owners += [number - 1] * (len(specs) - len(owners))
    own_settings = _differing(settings, reading)
    merged = _merged(settings, reading)
    if any("resolutions" in values for values in own_settings):
        merged["resolution"] = max(v["resolutions"][0] for v in own_settings if "resolutions" in v)
    _add_mask(merged, masks, reading)
    problems = list(reading.problems)
    if reading.unsupported:
        what = "; ".join(f"{key}: {reason}" for key, reason in reading.unsupported.items())
        problems.append(f"not supported here, remove it or set it to nothing: {what}")
    if problems:
        raise UsageError(f"{path} cannot be used\n  " + "\n  ".join(problems))
    if not specs:
        raise UsageError(f"{path}: every subset is left out: num_repeats is 0")
    specs = [replace(s, **own_settings[i]) for s, i in zip(specs, owners, strict=True)]
    return specs, merged, reading.notes


def _are_tables(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(table, dict) for table in value)


def _check_keys(
    table: dict[str, Any], allowed: dict[str, type], where: str, reading: _Reading
) -> bool:
    """Note wrong keys of a table and wrong types; returns whether there are none.

    Keys with a wrong value are removed, so that later code does not meet them.
    """
    fine = True
    for key, value in list(table.items()):
        if key in UNSUPPORTED:
            idle, reason = UNSUPPORTED[key]
            if idle is not None and value not in idle:
                reading.unsupported[f"{key} ({where})"] = reason
            del table[key]
            continue
        if key not in allowed:
            homes = {"[[datasets.subsets]]": SUBSET, "[[datasets]] or [general]": DATASET}
            home = next((name for name, keys in homes.items() if key in keys), None)
            known = SUBSET | SHARED | DATASET
            text = f"belongs in {home}" if home else f"is unknown.{did_you_mean(key, known)}"
        elif key == "resolution" and _is_pair(value):
            continue
        elif right := wrong_type(allowed[key], value):
            text = f"must be {right}, not {value!r}"
        else:
            continue
        reading.problems.append(f"{where}: {key} {text}")
        del table[key]
        fine = False
    return fine


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(side) is int for side in value)


def _add_source(
    values: dict[str, Any],
    label: str,
    folders: list[tuple[str, str]],
    specs: list[SourceSpec],
    reading: _Reading,
) -> None:
    """Add the source of a subset, if it has one of its own."""
    folder, table = values.get("image_dir"), values.get("metadata_file")
    if folder is None and table is None:
        reading.problems.append(f"{label} has no image_dir")
        return
    folder = folder or str(Path(str(table)).parent)
    if values.get("num_repeats", 1) == 0:
        reading.note("no-repeats", label, f"num_repeats of {folder} is 0")
        return
    same = (str(Path(folder)), table or "")
    if same in folders:
        text = f"{folder} is in this dataset already; as with kohya, the first one counts"
        reading.note("subset-twice", label, text)
        return
    folders.append(same)
    rules = _rules(values, label, reading)
    own = {name: value for name, value in _own(values).items() if name not in RULES}
    spec = SourceSpec(
        path=folder,
        layout="plain",
        recursive=False,
        captions="metadata" if table else "sidecar",
        metadata_file=table,
        prompt=values.get("class_tokens"),
        kind="class" if values.get("is_reg") else "instance",
        random_crop=values.get("random_crop", False),
        rules=rules,
        **own | {"mask_folder": own.get("mask_folder") or None},
    )
    reading.problems += [f"{label}: {text}" for text in problems(spec)]
    if table is None and spec.caption_extension is None:
        text = "no caption_extension: .txt files are read, and kohya's own default, .caption"
        reading.note("caption-extension", label, text)
    specs.append(spec)


def _rules(values: dict[str, Any], label: str, reading: _Reading) -> CaptionRules:
    """The caption rules of a subset, its prefix and suffix taken out of the tags."""
    comma, mark = values.get("caption_separator", ","), values.get("keep_tokens_separator")
    around = {key: values.get(key, "") for key in ("caption_prefix", "caption_suffix")}
    keep = values.get("keep_tokens", 0)
    if comma and keep > 0:  # kohya counts the prefix's tags among those that are kept
        in_prefix = around["caption_prefix"]
        keep = 0 if mark and mark in in_prefix else max(0, keep - in_prefix.count(comma))
    for key, text in around.items():
        if mark and mark in text:  # kept in place anyway
            parts = [part.strip(f" {comma}") for part in text.split(mark)]
            around[key] = f"{comma} ".join(part for part in parts if part)
            around[key] = (
                f"{around[key]}{comma}" if key == "caption_prefix" else f"{comma} {around[key]}"
            )
    moves = values.get("shuffle_caption", False) or values.get("caption_tag_dropout_rate", 0) > 0
    if moves and any(around.values()):
        text = (
            "caption_prefix and caption_suffix stay in place; kohya shuffles and drops their tags"
        )
        reading.note("prefix-in-place", label, text)
    own = _own(values) | around | {"keep_tokens": keep, "keep_tokens_separator": mark or None}
    return CaptionRules(**{name: value for name, value in own.items() if name in RULES})


def _own(values: dict[str, Any]) -> dict[str, Any]:
    """Option → value, of the keys of a subset that are options of a source."""
    return {
        row.name: float(values[key]) if row.kind == "float" else values[key]
        for key, row in PER_SOURCE.items()
        if key in values
    }


def _differing(datasets: list[dict[str, Any]], reading: _Reading) -> list[dict[str, Any]]:
    """Take out of the datasets the keys in which they may differ and do; returns, for each, the
    options of its sources that these become."""
    own: list[dict[str, Any]] = [{} for _ in datasets]
    for key, name in OF_SOURCES.items():
        said = {i: values[key] for i, values in enumerate(datasets) if key in values}
        if len({repr(_plain(value)) for value in said.values()}) < 2:
            continue
        for i, value in said.items():
            del datasets[i][key]
            if key == "resolution":
                value = _side(value, datasets[i].get("enable_bucket", False), reading)
            if value < 1:
                reading.problems.append(f"dataset {i + 1}: {key} must be at least 1, not {value}")
            own[i][name] = [value] if key == "resolution" else value
        silent = [str(i + 1) for i in range(len(datasets)) if i not in said]
        if silent:
            text = f"says nothing of {key}, in which the others differ: the run's holds there"
            reading.note("setting-shared", f"dataset {', '.join(silent)}", text)
    return own


def _merged(datasets: list[dict[str, Any]], reading: _Reading) -> dict[str, Any]:
    """The options on which all datasets agree, by our names."""
    merged: dict[str, Any] = {}
    for key in DATASET:
        said = {n: values[key] for n, values in enumerate(datasets, 1) if key in values}
        if not said:
            continue
        first, value = next(iter(said.items()))
        for number, other in said.items():
            if _plain(other) != _plain(value):
                reading.problems.append(
                    f"dataset {first} has {key} = {value}, dataset {number} has {other}: a run has "
                    "one; train them one after the other, or make them agree"
                )
                break
        silent = [str(n) for n in range(1, len(datasets) + 1) if n not in said]
        if silent:
            text = f"says nothing of {key}: it is {value} there too, for a run has one"
            reading.note("setting-shared", f"dataset {', '.join(silent)}", text)
        merged[OF_RUN[key].name] = value
    if "resolution" in merged:
        merged["resolution"] = _side(
            merged["resolution"], merged.get("aspect_ratio_buckets", False), reading
        )
    for key, value in merged.items():
        if type(value) is int and value < 1:
            reading.problems.append(f"{key} must be at least 1, not {value}")
    return merged


def _plain(value: Any) -> Any:
    return value[0] if isinstance(value, list) and value[0] == value[1] else value


def _side(resolution: Any, buckets: bool, reading: _Reading) -> int:
    """The side of the square of a resolution's area."""
    if not isinstance(resolution, list):
        return resolution
    width, height = resolution
    if width == height or min(width, height) < 1:
        return min(width, height)
    side = max(8, math.isqrt(width * height) // 8 * 8)
    became = (
        "the area of its buckets" if buckets else "squares: say enable_bucket = true for others"
    )
    text = f"{width}×{height} is read as {side}×{side}, {became}"
    reading.note("resolution-area" if buckets else "resolution", "resolution", text)
    return side


def _add_mask(merged: dict[str, Any], masks: dict[str, bool], reading: _Reading) -> None:
    if len(set(masks.values())) > 1:
        on, off = (next(k for k, v in masks.items() if v is value) for value in (True, False))
        reading.problems.append(
            f"{on} has alpha_mask, {off} has not: a run masks the loss of all images or of none "
            "(an image without transparency is not masked)"
        )
    elif any(masks.values()):
        merged["alpha_mask"] = True
