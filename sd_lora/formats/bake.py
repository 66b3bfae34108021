"""LoRAs merged into a base model for good: a pipeline folder, or a single checkpoint."""

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from sd_lora.errors import RunError, UsageError
from sd_lora.files import PICKLES, Spec, mib, write_fault, write_tensors
from sd_lora.formats.approximate import Loss, squared_norm
from sd_lora.formats.canonical import each
from sd_lora.formats.checkpoints import Checkpoint, Slot
from sd_lora.formats.family_of_file import family_by_tensors
from sd_lora.formats.lora_file import LoRAFile, open_lora
from sd_lora.formats.merge import check_weights
from sd_lora.formats.output import DTYPES, Progress, silently
from sd_lora.formats.rounding import check_rounding, rounded
from sd_lora.models.checkpoint_file import DESCRIPTION, CheckpointFile
from sd_lora.seeds import generator_for

TOLERATED = 0.05
"""The largest ‖got − ΔW‖ / ‖ΔW‖ without a warning; float16 rounds a usual ΔW, of 1 % of ‖W‖, by
2 %."""

_WEIGHTS = re.compile(r"\.(safetensors|bin|msgpack|h5|onnx|pt|ckpt)$|\.index(\.\w+)?\.json$")

_ACTIVE = (*PICKLES, ".pkl", ".pickle", ".joblib", ".npy", ".py", ".pyc", ".so", ".dll", ".sh")
"""Ends of names of pickles and code."""


@dataclass(frozen=True)
class Baked:
    """The result of baking.

    path: of the model. changed: number of parameters. dtypes: of these, as they are stored.
    rounding: ‖got − ΔW‖² and ‖ΔW‖² over all of them, where got is the change that the file holds.
    notes: for the user.
    """

    path: Path
    changed: int
    dtypes: list[str]
    rounding: Loss
    notes: list[str]

    @property
    def kept(self) -> str:
        """The dtype and its rounding, in words."""
        kinds = " and ".join(self.dtypes) or "none"
        return f"in {kinds}: ‖got − ΔW‖ / ‖ΔW‖ = {self.rounding.error:.2%}"


def bake(
    base: Checkpoint,
    sources: Sequence[Path],
    weights: Sequence[float],
    out: Path,
    dtype: str = "keep",
    overwrite: bool = False,
    progress: Progress = silently,
    rounding: str = "nearest",
) -> Baked:
    """Write the base with W + Σ weightᵢ·(Wᵢ' − W) in place of every adapted W.

    Every method and rule is exact here, weight-decomposed ones too: each delta is composed with the
    base's own W. Everything else of the model is copied unchanged.

    Args:
        base: a diffusers folder or a single checkpoint.
        sources: LoRA files.
        weights: one a file.
        out: a folder for a folder, a .safetensors file for a checkpoint.
        dtype: "keep", or "float32", "float16", "bfloat16" for the files with adaptable parts.
        overwrite: whether to replace an existing output.
        progress: shows the work.
        rounding: "nearest", or "stochastic", see `formats.rounding`; the same bytes at each call.

    Raises:
        UsageError: a LoRA that cannot be read or does not fit, or an output that exists.
        RunError: a value beyond the dtype, or a failed write; nothing is left.
    """
    if dtype not in ("keep", *DTYPES):
        raise UsageError(f"dtype {dtype!r} is none of keep, {', '.join(DTYPES)}")
    check_rounding(rounding)
    check_weights(sources, weights)
    _check_output(base, out, overwrite)
    loras = list(zip((_opened(path, base) for path in sources), weights, strict=True))
    total = sum(len(tensors) for tensors in base.files.values())
    bar = iter(progress(range(total), total, "baking"))
    baker = _Baker(base, loras, dtype, rounding == "stochastic", bar)
    if not base.path.is_dir():
        ((name, tensors),) = base.files.items()
        baker.write(name, out)
        ema = sum(key.startswith("model_ema.") for key in tensors)
        notes = [f"{ema} averaged weights (model_ema.) are those of before"] if ema else []
        return baker.result(out, notes)
    beside, aside = (out.with_name(f".{out.name}.{end}") for end in ("part", "before"))
    try:
        _remove(beside)
        beside.mkdir(parents=True)  # it must be new: a link laid there is not followed
        notes = _copy_rest(base, beside)
        for name in base.files:
            baker.write(name, beside / _safetensors_name(name))
        _remove(aside)
        if out.exists():
            os.replace(out, aside)
        os.replace(beside, out)
        _remove(aside)
    except OSError as error:
        need, reason = (
            sum(p.stat().st_size for p in _files_below(base.path)),
            write_fault(error, out),
        )
        raise RunError(f"{out} ({mib(need)}) could not be written: {reason}") from None
    finally:
        with suppress(OSError):
            if aside.exists() and not out.exists():
                os.replace(aside, out)
            _remove(beside)
    return baker.result(out, notes)


@dataclass
class _Baker:
    """Write a base's files with the deltas in them."""

    base: Checkpoint
    loras: Sequence[tuple[LoRAFile, float]]
    dtype: str
    stochastic: bool
    bar: Iterator[int]
    changed: int = 0
    dtypes: dict[str, None] = field(default_factory=dict)
    loss: Loss = field(default_factory=Loss)

    def write(self, name: str, path: Path) -> None:
        tensors = self.base.files[name]
        specs = {key: self._spec(tensors, key) for key in tensors}
        header = {k: v for k, v in tensors.header.items() if k != "modelspec.hash_sha256"}
        if self.dtype == "keep":
            specs |= {key: tensors.spec(key) for key in tensors.beside}
        else:  # plain numbers need no scales
            header.pop(DESCRIPTION, None)
        stream = (pair for key in tensors for pair in self._tensors(name, key, specs[key][0]))
        rest = specs.keys() - {*tensors} - {*tensors.scale_keys.values()}
        stored = ((key, tensors.stored(key)) for key in sorted(rest))
        write_tensors(path, specs, chain(stream, stored), {"format": "pt"} | header)

    def _spec(self, tensors: CheckpointFile, key: str) -> Spec:
        dtype, shape = tensors.spec(key)
        number = dtype.is_floating_point or key in tensors.scale_keys
        return (DTYPES[self.dtype] if number and self.dtype != "keep" else dtype), shape

    def result(self, path: Path, notes: list[str]) -> Baked:
        dtypes = [*self.dtypes]
        if self.loss.error > TOLERATED:
            notes = [*notes, _remedy(self.loss.error, dtypes, self.stochastic)]
        return Baked(path, self.changed, dtypes, self.loss, notes)

    @torch.no_grad()
    def _tensors(self, name: str, key: str, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Yield a key's tensor, and its scale if there is one to keep."""
        next(self.bar, None)
        tensors = self.base.files[name]
        slots = [s for s in self.base.slots(name, key) if self._updates(s)]
        scaled = self.dtype == "keep" and key in tensors.scale_keys
        if not slots and scaled:
            yield from ((k, tensors.stored(k)) for k in (key, tensors.scale_keys[key]))
        elif not slots:
            tensor = tensors[key]
            yield key, self._finite(key, tensor, tensor.to(dtype), slots)
        else:
            yield from self._changed(name, key, dtype, slots, scaled)

    def _changed(
        self, name: str, key: str, dtype: torch.dtype, slots: Sequence[Slot], scaled: bool
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield a key's tensor with all deltas of its slots, and its scale if there is one."""
        tensors = self.base.files[name]
        before = tensors[key]
        wide = torch.float64 if before.dtype is torch.float64 else torch.float32
        before = before.to(wide)
        after = before.clone()
        for slot in slots:
            W = slot.view(before)
            for lora, weight in self._updates(slot):
                delta = lora.adapter[slot.component][slot.name]
                delta.fit(tuple(W.shape))
                slot.view(after).add_(weight * (delta.compose(W) - W))
            self.changed += 1
        address = ("bake", name, key)
        round_to = partial(rounded, generator=generator_for(*address) if self.stochastic else None)
        if scaled:
            found, got = tensors.rescaled(key, self._finite(key, after, after, slots), round_to)
        else:
            found = {key: self._finite(key, after, round_to(after, dtype), slots)}
            got = found[key].to(wide)
        self.dtypes[str(found[key].dtype)[6:]] = None
        for slot in slots:
            self.loss.lost += squared_norm(slot.view(got) - slot.view(after))
            self.loss.total += squared_norm(slot.view(after) - slot.view(before))
        yield from found.items()

    def _finite(self, key: str, tensor: Tensor, cast: Tensor, slots: Sequence[Slot]) -> Tensor:
        """`cast`, the tensor in another dtype. Raises RunError if it is finite no more."""
        if tensor.is_floating_point() and not _is_finite(cast):
            if _is_finite(tensor):
                raise RunError(
                    f"{key} reaches {tensor.abs().max():.3g}, more than {str(cast.dtype)[6:]} "
                    "holds: take --dtype bfloat16 or float32"
                )
            if slots:
                raise RunError(f"{key} of {self.base.path} holds NaN or infinite values")
        return cast

    def _updates(self, slot: Slot) -> list[tuple[LoRAFile, float]]:
        return [pair for pair in self.loras if slot.name in pair[0].adapter.get(slot.component, {})]


def _remedy(error: float, dtypes: Sequence[str], stochastic: bool) -> str:
    """A note on a change that the stored dtype rounds away."""
    finer = "float32" if "float16" in dtypes else "float16"
    if stochastic:
        return (
            f"rounding at random to {' and '.join(dtypes)} adds noise of {error:.0%} of the change "
            f"and keeps its mean; --dtype {finer} keeps the change itself"
        )
    return (
        f"rounding to {' and '.join(dtypes)} loses {error:.0%} of the change: --dtype {finer} "
        "keeps it, --rounding stochastic keeps its mean in the same room"
    )


def _is_finite(tensor: Tensor) -> bool:
    eight_bits = tensor.dtype.itemsize == 1  # torch has no isfinite of these
    return bool(torch.isfinite(tensor.float() if eight_bits else tensor).all())


def _opened(path: Path, base: Checkpoint) -> LoRAFile:
    """Open a LoRA and checks that every delta has its place in the base."""
    lora = open_lora(path, base.meta_pipeline.layout)
    lora.check()
    known = family_by_tensors(lora)
    for component, name, delta in each(lora.adapter):
        try:
            delta.fit(base.shape(component, name))
        except ValueError as error:  # UsageError is one
            kinds = f" (this is a LoRA for {known[0].label}: {known[1]})" if known else ""
            raise UsageError(
                f"{path} does not fit {base.path}, {base.family.label}{kinds}: {component} {name}: "
                f"{error}"
            ) from None
    return lora


def _check_output(base: Checkpoint, out: Path, overwrite: bool) -> None:
    if out.exists() and not overwrite:
        raise UsageError(f"{out} exists: take another name, or --overwrite")
    if out.resolve() == base.path.resolve():
        raise UsageError(f"{out} is the base model itself: give the output another name")
    if base.path.is_dir():
        inside = out.resolve().is_relative_to(base.path.resolve())
        if inside or base.path.resolve().is_relative_to(out.resolve()):
            raise UsageError(f"{out} and {base.path} lie in each other: take another place")
        if out.is_file():
            raise UsageError(f"{out} is a file, and a pipeline folder is written")
        if out.exists() and not (out / "model_index.json").is_file():
            raise UsageError(f"{out} is no pipeline folder, so it is not replaced by one")
    elif out.suffix != ".safetensors" or out.is_dir():
        raise UsageError(f"{out}: a checkpoint is written into a file that ends with .safetensors")


def _safetensors_name(name: str) -> Path:
    """Where a file of weights goes: pickled ones as loaders look for them first."""
    path = Path(name)
    if path.suffix == ".safetensors":
        return path
    stem = path.stem
    if stem.startswith("pytorch_model"):
        stem = stem.removeprefix("pytorch_")
    return path.with_name(f"{stem}.safetensors")


def _copy_rest(base: Checkpoint, out: Path) -> list[str]:
    """Copy everything but the parts' weights; returns notes on files left out, and on copied ones
    that can run code."""
    left_out, active = [], []
    for source in _files_below(base.path):
        name = source.relative_to(base.path)
        if str(name) in base.files:
            continue
        adapted = len(name.parts) == 1 or name.parts[0] in base.family.components
        if adapted and _WEIGHTS.search(source.name) and str(name) not in base.indexes:
            left_out.append(str(name))
            continue
        active += [str(name)] * (source.suffix.lower() in _ACTIVE)
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        with open(source, "rb") as old, open(out / name, "wb") as new:
            shutil.copyfileobj(old, new)
            os.fsync(new.fileno())
    notes = {
        "left out, for they hold the unchanged weights": left_out,
        "copied from the base, and programs that load them may run code in them": active,
    }
    return [f"{note}: {', '.join(names)}" for note, names in notes.items() if names]


def _files_below(folder: Path) -> Iterator[Path]:
    """Yield the files in a folder, also behind links, without the side files of downloads."""
    seen = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        folders[:] = sorted(f for f in folders if f not in (".git", ".cache"))
        if real in seen:  # a link in a loop
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(parent) / name for name in sorted(names))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
