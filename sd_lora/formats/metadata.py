"""The header of a file: the keys of A1111, ComfyUI and model sites, and our own.

Readers of this project trust the tensors first.
"""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath

from sd_lora.errors import UsageError
from sd_lora.files import HASH_KEY
from sd_lora.formats import diffusers, kohya
from sd_lora.formats.canonical import Adapter, each, file_rank
from sd_lora.models.families import SHORT_PREDICTIONS, Family

OWN_KEY = "sd_lora"
"""Our own record (configuration, base model, images), as JSON."""


def _most_common(values: Sequence[float | str]) -> str:
    value = Counter(values).most_common(1)[0][0]
    return value if isinstance(value, str) else f"{value:g}"


def build(
    adapter: Adapter,
    family: Family | None,
    name: str,
    prediction_type: str | None = "epsilon",
    extra: Mapping[str, object] | None = None,
    facts: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """The metadata of a safetensors header: every value a string.

    Args:
        adapter: the deltas to write.
        family: of Stable Diffusion; None for another model, with fewer keys.
        name: of the output, shown by model sites.
        prediction_type: a key of `SHORT_PREDICTIONS`; None if unknown.
        extra: our own record, kept as JSON.
        facts: further keys (`ss_…`, `modelspec.…`), for example those of a converted file.
    """
    metadata = {"format": "pt", **(facts or {}), **network(adapter)}
    metadata |= {"ss_output_name": name, "sd_lora_version": version("sd_lora"), HASH_KEY: ""}
    if family is not None:
        metadata |= {
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.implementation": "diffusers",
            "modelspec.title": name,
            "ss_base_model_version": family.base_versions[prediction_type or "epsilon"],
            "ss_v2": str(family.name == "sd2"),
        }
        if prediction_type is not None:
            short = SHORT_PREDICTIONS[prediction_type]
            architecture = f"{family.architectures[prediction_type]}/lora"
            metadata |= {
                "modelspec.architecture": architecture,
                "modelspec.prediction_type": short,
            }
    if extra:
        metadata[OWN_KEY] = json.dumps(extra, sort_keys=True)
    return metadata


def date() -> str:
    """The time of a file in ISO form, UTC: SOURCE_DATE_EPOCH's seconds, for equal bytes of equal
    runs, or now.

    Raises:
        UsageError: a SOURCE_DATE_EPOCH that is no number of seconds.
    """
    seconds = os.environ.get("SOURCE_DATE_EPOCH")
    try:
        time = datetime.fromtimestamp(int(seconds), UTC) if seconds else datetime.now(UTC)
    except (ValueError, OverflowError, OSError):
        raise UsageError(
            f"the environment variable SOURCE_DATE_EPOCH is {seconds!r}, and not a number of "
            "seconds since 1970: unset it, or give one"
        ) from None
    return time.strftime("%Y-%m-%dT%H:%M:%S")


def shared_name(place: str) -> str:
    """A folder's or file's name without its place on this machine; a hub id as it is."""
    path = Path(place).expanduser()
    is_id = place.count("/") == 1 and not place.startswith((".", "/", "~")) and "\\" not in place
    if is_id and not path.exists():
        return place
    name = PureWindowsPath(place).name
    return path.resolve().name if name in ("", "..") else name


def without_places(record: object) -> object:
    """A record with the names alone of files and folders in full, in tables of any depth."""
    if isinstance(record, dict):
        return {key: without_places(value) for key, value in record.items()}
    if isinstance(record, list):
        return [without_places(value) for value in record]
    kinds: tuple[type[PurePath], ...] = (PurePosixPath, PureWindowsPath)
    if isinstance(record, str) and (
        record.startswith("~") or any(kind(record).is_absolute() for kind in kinds)
    ):
        return shared_name(record)
    return record


def method_in(header: Mapping[str, str]) -> str | None:
    """The method by a header's `ss_network_args`, as `network` writes it; None if it has none."""
    try:
        method = json.loads(header.get("ss_network_args", "{}")).get("algo")
    except (ValueError, AttributeError, RecursionError):
        return None
    return method if isinstance(method, str) else None


def network(adapter: Adapter) -> dict[str, str]:
    """The keys about ranks and method, as in the file: kohya's has one alpha, diffusers' none,
    meaning the rank.
    """
    ranks, conv_ranks, alphas, conv_alphas, methods = [], [], [], [], []
    decomposed = False
    for _, _, delta in each(adapter):
        decomposed |= delta.magnitude is not None
        if delta.method != "full":
            methods.append(delta.method)
        if delta.rank is None:
            continue
        rank = file_rank(delta) or 0
        ranks.append(rank)
        alphas.append(delta.alpha)
        if any(k > 1 for k in delta.shape[2:]):
            conv_ranks.append(rank)
            conv_alphas.append(delta.alpha)
    plain = kohya.can_write(adapter)
    dim, conv_dim = _most_common(ranks or [0]), _most_common(conv_ranks or [0])
    if plain:
        alpha = conv_alpha = f"{kohya.common_alpha(adapter):g}"
    elif diffusers.can_write(adapter):
        alpha, conv_alpha = dim, conv_dim
    else:
        alpha, conv_alpha = _most_common(alphas or [1]), _most_common(conv_alphas or [1])
    args = {} if plain else {"algo": _most_common(methods or ["full"])}
    if conv_ranks:
        args |= {"conv_dim": conv_dim, "conv_alpha": conv_alpha}
    if decomposed:
        args["dora_wd"] = "True"
    keys = {
        "ss_network_module": "networks.lora" if plain else "lycoris.kohya",
        "ss_network_dim": dim,
        "ss_network_alpha": alpha,
    }
    return keys | ({"ss_network_args": json.dumps(args)} if args else {})
