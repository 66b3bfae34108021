"""Where the tools write: one file, in one format, verified before it takes its name."""

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sd_lora.adapters.deltas import Delta
from sd_lora.adapters.state import make_delta
from sd_lora.errors import RunError, UsageError, did_you_mean
from sd_lora.files import mib
from sd_lora.folders import free_bytes
from sd_lora.formats import comfyui, diffusers, kohya, metadata
from sd_lora.formats.adapter_files import (
    COMFYUI,
    DIFFUSERS,
    KOHYA,
    LYCORIS,
    Format,
    held_by,
    write_file,
)
from sd_lora.formats.canonical import Adapter, Lazy, count, each
from sd_lora.formats.lycoris import NEAR_ONE
from sd_lora.formats.names import naming_of
from sd_lora.formats.verify import Verified, fitted, misfits, verify
from sd_lora.models.families import Family
from sd_lora.models.meta_pipeline import MetaPipeline

T = TypeVar("T")
Progress = Callable[[Iterable[T], int, str], Iterable[T]]
"""(items, their number, the work on them) → the items, under a bar."""

FORMATS = {"diffusers": DIFFUSERS, "kohya": KOHYA, "lycoris": LYCORIS, "comfyui": COMFYUI}
DTYPES = {
    "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16,
    "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16,
}  # fmt: skip


def silently(items: Iterable[T], total: int, label: str) -> Iterable[T]:
    """A `Progress` that shows nothing."""
    return items


@dataclass(frozen=True)
class Output:
    """Path, format and dtype of a file to write.

    path: of the .safetensors file. to: "diffusers", "kohya", "lycoris", or "comfyui" for DoRA; None
    takes the first of kohya, diffusers, lycoris that is exact. dtype: "float32", "float16",
    "bfloat16", or "auto": the source's where it holds every number exactly, else float32.
    meta_pipeline: of the file's model; None takes the published one of its family. check: whether
    to verify.
    """

    path: Path
    to: str | None = None
    dtype: str = "auto"
    overwrite: bool = False
    check: bool = True
    meta_pipeline: MetaPipeline | None = None

    def __post_init__(self) -> None:
        if self.path.suffix != ".safetensors":
            raise UsageError(f"{self.path}: give the output a name that ends with .safetensors")
        if os.path.isdir(self.path):  # os.path's: False for a name that the system refuses
            raise UsageError(f"{self.path} is a folder")
        if os.path.exists(self.path) and not self.overwrite:
            raise UsageError(f"{self.path} exists: take another name, or --overwrite")
        for value, known in ((self.to, FORMATS), (self.dtype, {"auto", *DTYPES})):
            if value is not None and value not in known:
                hint = did_you_mean(value, known)
                raise UsageError(f"{value!r} is none of {', '.join(sorted(known))}.{hint}")


@dataclass(frozen=True)
class Origin:
    """The source of an output: its dtype, and its header.

    prediction_type: None if unknown. record: our own part of the header. facts: the source's keys
    that stay true. computed: whether the factors are singular vectors, approximations anyway, and
    not the source's own.
    """

    dtype: torch.dtype = torch.float32
    prediction_type: str | None = "epsilon"
    computed: bool = False
    record: Mapping[str, object] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Written:
    """A file that a tool wrote."""

    path: Path
    format: Format
    family: Family
    dtype: torch.dtype
    modules: int
    verified: Verified | None
    notes: list[str] = field(default_factory=list)


def format_for(adapter: Adapter, to: str | None) -> Format:
    """The format to write: the one asked for, or the first exact one.

    Raises:
        UsageError: the format asked for has no form for a delta; with a remedy.
    """
    if to is None:
        to = "kohya" if kohya.can_write(adapter) else "lycoris"
        to = "diffusers" if to == "lycoris" and diffusers.can_write(adapter) else to
    if to == "comfyui" and not comfyui.is_decomposed(adapter):
        raise UsageError("--to comfyui is for DoRA, and the file has none: --to kohya or lycoris")
    can = {"kohya": kohya.can_write, "diffusers": diffusers.can_write}.get(to)
    if can is not None and not can(adapter):
        raise UsageError(_inexpressible(adapter, to))
    return FORMATS[to]


def _inexpressible(adapter: Adapter, to: str) -> str:
    kinds: dict[str, int] = {}
    rules: dict[str, set[bool]] = {}
    for component, _, delta in each(adapter):
        rules.setdefault(component, set()).add(delta.magnitude is not None)
        kind = "DoRA" if delta.magnitude is not None else delta.method
        kind = "bias or norm" if len(delta.shape) == 1 else kind
        if kind not in ("lora", "lora_fa") and not (kind == "DoRA" and to == "diffusers"):
            kinds[kind] = kinds.get(kind, 0) + 1
    mixed = [component for component, found in rules.items() if len(found) > 1]
    if not kinds and mixed:
        return (
            f"diffusers' readers take all of {mixed[0]} as DoRA or none of it, and the file has "
            "both: --to lycoris keeps every tensor, --rank N and --model MODEL write the nearest "
            "plain LoRA"
        )
    if not kinds:
        return f"{to}'s readers take no text encoder of which so little is adapted: --to kohya"
    what = ", ".join(f"{count} × {kind}" for kind, count in sorted(kinds.items()))
    base = " and --model MODEL" if {"DoRA", "oft"} & {*kinds} else ""
    vectors = ", --drop_vectors leaves biases and norms out" if "bias or norm" in kinds else ""
    return (
        f"{to}'s readers have no form for {what}. --rank N{base} writes the nearest plain LoRA and "
        f"states its error{vectors}; `sd-lora bake` makes a merged model; --to lycoris keeps every "
        "tensor"
    )


def write(
    adapter: Adapter,
    output: Output,
    family: Family,
    origin: Origin,
    weight: comfyui.Weights | None = None,
) -> Written:
    """Write an adapter; the file gets its name after it is verified.

    weight: W of the base, for ComfyUI's form of DoRA.

    Raises:
        UsageError: no form for it in this format, or no place for it in this model.
        RunError: values beyond the dtype, a failed write, or a file that does not load exactly;
            nothing is left then.
    """
    kind = format_for(adapter, output.to)
    meta_pipeline = output.meta_pipeline or MetaPipeline.of_family(family)
    if output.check:
        adapter = fitted(adapter, meta_pipeline)
    facts = {**origin.facts, **(comfyui.MARK if kind is COMFYUI else {})}
    adapter = held_by(kind, adapter, weight)
    naming = naming_of(family, meta_pipeline.layout)
    notes: list[str] = []
    if output.dtype == "auto":
        dtype = origin.dtype if origin.dtype in DTYPES.values() else torch.float32
        short = str(dtype)[6:]
        if not origin.computed and not _is_exact(kind.write(adapter, naming), dtype):
            notes.append(
                f"written in float32, for {short} would round factors that take up a scale or a "
                f"weight; --dtype {short} takes half the room"
            )
            dtype = torch.float32
    else:
        dtype = DTYPES[output.dtype]
    header = metadata.build(
        adapter, family, output.path.stem, origin.prediction_type, origin.record, facts
    )
    beside = output.path.with_name(f".{output.path.stem}.unverified.safetensors")
    try:
        write_file(beside, kind, adapter, naming, header, dtype)
        verified = verify(beside, adapter, meta_pipeline, kind) if output.check else None
        _rename(beside, output.path)
    except RunError as error:
        text = str(error).replace(str(beside), str(output.path))
        raise RunError(text.replace("; do not use it", "; it was not kept")) from None
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
    return Written(output.path, kind, family, dtype, count(adapter), verified, notes)


def _rename(beside: Path, path: Path) -> None:
    try:
        os.replace(beside, path)
    except OSError as error:
        raise RunError(f"{path} could not be written: {error.strerror or error}") from None


def check_place(adapter: Adapter, output: Output, family: Family, what: str) -> None:
    """Raise UsageError if an adapter has modules or shapes that the model has not."""
    meta_pipeline = output.meta_pipeline or MetaPipeline.of_family(family)
    wrong = list(misfits(adapter, meta_pipeline)) if output.check else []
    if wrong:
        other = ": for a LoRA of another model give its folder as --model" * (
            not output.meta_pipeline
        )
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise UsageError(
            f"{what} does not fit {meta_pipeline.source}{other}, or --no_verify to write it "
            f"unchecked: {wrong[0]}{more}"
        )


def _is_exact(tensors: Iterator[tuple[str, Tensor]], dtype: torch.dtype) -> bool:
    rounded = (t for key, t in tensors if not key.endswith(NEAR_ONE))
    return all(torch.equal(t.to(dtype).to(t.dtype), t) for t in rounded)


class Spool:
    """Computed deltas on disk, one small file each, beside the output: slow work is done once,
    and memory holds one. A context manager; the files go at its end.
    """

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._folder = tempfile.TemporaryDirectory(prefix=".sd-lora-", dir=folder)
        except OSError as error:
            a_file = isinstance(error, FileExistsError | NotADirectoryError)
            reason = "it is a file" if a_file else error.strerror or error
            raise RunError(f"nothing can be written into {folder}: {reason}") from None
        self._paths: dict[str, dict[str, Path]] = {}
        self._count = 0

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, *exception: object) -> None:
        self._folder.cleanup()

    def add(self, component: str, name: str, delta: Delta) -> None:
        """Keep a delta. Raises RunError if the disk is full."""
        path = Path(self._folder.name) / f"{self._count}.safetensors"
        self._count += 1
        tensors = {k: t.contiguous() for k, t in delta.tensors().items()}
        if delta.rank is not None:
            tensors["alpha"] = torch.tensor(delta.alpha, dtype=torch.float64)
        try:
            save_file(tensors, path)
        except (OSError, SafetensorError) as error:
            size, free = sum(t.nbytes for t in tensors.values()), free_bytes(path)
            raise RunError(
                f"{path} ({mib(size)}) could not be written: {error} ({mib(free)} free)"
            ) from None
        self._paths.setdefault(component, {})[name] = path

    @property
    def adapter(self) -> Adapter:
        """The added deltas, read anew at each access."""
        return {c: Lazy(paths, partial(_kept, paths)) for c, paths in self._paths.items()}


def _kept(paths: Mapping[str, Path], name: str) -> Delta:
    return make_delta(name, load_file(paths[name]))
