"""What is done to LoRA files: convert, merge, resize; one update at a time."""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from sd_lora.adapters.deltas import Delta
from sd_lora.adapters.methods import Full
from sd_lora.adapters.state import sum_of
from sd_lora.errors import UsageError
from sd_lora.formats.approximate import Cut, Loss, nearest, nearest_to
from sd_lora.formats.canonical import Adapter, Lazy, each, file_rank, is_plain, plain
from sd_lora.formats.checkpoints import Checkpoint
from sd_lora.formats.metadata import OWN_KEY
from sd_lora.formats.output import (
    Origin,
    Output,
    Progress,
    Spool,
    Written,
    check_place,
    silently,
    write,
)
from sd_lora.formats.reading import LoRAFile, open_lora
from sd_lora.formats.recognise import family_of, prediction_type
from sd_lora.formats.tensors import HASH_KEY
from sd_lora.models.families import Family


@dataclass
class Result:
    """What a tool did: the file, what was approximated by how much, and what to know about it.

    losses: (component, update name) → what was left out. ranks: → ranks before and after.
    """

    written: Written
    losses: dict[tuple[str, str], Loss] = field(default_factory=dict)
    ranks: dict[tuple[str, str], tuple[int | None, int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def error(self) -> float:
        """‖ΔW − BA‖ / ‖ΔW‖ over all that was approximated, in the Frobenius norm."""
        return Loss.sum(self.losses.values()).error


def opened(path: Path, output: Output, family: str | None) -> tuple[LoRAFile, Family]:
    """Opens a LoRA file, makes every update once, and finds its family and its place there.

    Raises:
        UsageError: anything wrong in the file, a family that nothing says, a module or shape that
            the model has not.
    """
    lora = open_lora(path, output.skeleton.layout if output.skeleton else None)
    lora.check()
    row = output.skeleton.family if output.skeleton else family_of(lora, family)
    check_place(lora.adapter, output, row, str(path))
    return lora, row


def convert(
    source: Path,
    output: Output,
    family: str | None = None,
    cut: Cut | None = None,
    base: Checkpoint | None = None,
    drop_vectors: bool = False,
    progress: Progress = silently,
) -> Result:
    """Writes a LoRA file in another format, dtype or family's names.

    Args:
        source: any LoRA file or folder that can be read.
        output: where and how.
        family: "sd1", "sd2" or "sdxl", where the file does not say it.
        cut: how to approximate what the format has no form for; the rest stays exact.
        base: the base model, on which alone a weight-decomposed update has a ΔW.
        drop_vectors: leave out biases and norms, which no plain LoRA can hold.
        progress: shows the work.

    Raises:
        UsageError: what cannot be read, or has no form in that format, with what would do instead.
        RunError: a file that could not be written or does not load as it should; none is left.
    """
    lora, row = opened(source, output, family)
    adapter: Adapter = lora.adapter
    notes: list[str] = []
    if cut is not None and output.to == "lycoris":
        raise UsageError(
            "--to lycoris keeps every update as it is: `sd-lora resize` cuts ranks, and --to kohya "
            "or diffusers approximates what they have no form for"
        )
    if drop_vectors:
        adapter, dropped = _without_vectors(adapter)
        notes.append(f"{dropped} biases and norms were left out, as asked")
    if cut is not None and output.to in ("kohya", "diffusers"):
        for component, name, delta in each(adapter):
            if len(delta.shape) == 1:
                raise UsageError(
                    f"{component} {name} is a bias or a norm, which no plain LoRA can hold: "
                    "--drop_vectors leaves these out, `sd-lora bake` keeps them"
                )
    if cut is None:
        return Result(write(adapter, output, row, _origin(lora)), notes=notes)
    only = _has_no_diffusers_form if output.to == "diffusers" else _is_not_plain
    result = _cut(adapter, cut, base, output, row, _origin(lora), progress, only)
    if not result.losses:
        notes.append("nothing needed approximating (`sd-lora resize` cuts ranks)")
    result.notes += notes
    return result


def _is_not_plain(delta: Delta) -> bool:
    return len(delta.shape) > 1 and (delta.magnitude is not None or plain(delta) is None)


def _has_no_diffusers_form(delta: Delta) -> bool:
    return len(delta.shape) > 1 and not is_plain({"unet": {"": delta}}, decomposed=True)


def _without_vectors(adapter: Adapter) -> tuple[Adapter, int]:
    keep = {
        c: Lazy([n for n, d in ms.items() if len(d.shape) > 1], ms.__getitem__)
        for c, ms in adapter.items()
    }
    return {c: ms for c, ms in keep.items() if ms}, count(adapter) - count(keep)


def count(adapter: Adapter) -> int:
    """Returns how many updates an adapter has."""
    return sum(len(modules) for modules in adapter.values())


# what describes the tensors of the source and not those that are written
_OF_TENSORS = ("ss_network_", "sshs_", "lora_adapter_metadata", "format", "sd_lora", "ss_output_")


def kept_facts(header: Mapping[str, str]) -> dict[str, str]:
    """Returns what of a source's header stays true of a file that is made from it."""
    return {k: v for k, v in header.items() if not k.startswith(_OF_TENSORS)}


def _origin(lora: LoRAFile) -> Origin:
    kind, facts = prediction_type(lora.header), kept_facts(lora.header)
    return Origin(lora.dtype, kind, _record(lora), facts)


def _record(lora: LoRAFile) -> dict[str, object]:
    """Returns where an output came from, for our own part of its header."""
    record: dict[str, object] = {"source": lora.path.name}
    if HASH_KEY in lora.header:
        record["source_hash"] = lora.header[HASH_KEY]
    with suppress(ValueError, RecursionError):  # a foreign header may hold anything
        record["source_record"] = json.loads(lora.header.get(OWN_KEY, ""))
    return record


@dataclass(frozen=True)
class BlockWeight:
    """A factor for the modules of one file, or of all: `2:unet.up_blocks=0.5`.

    pattern: a regular expression that matches the beginning of `component.module` at a dot, with or
    without the component.
    """

    pattern: str
    factor: float
    file: int | None = None

    @classmethod
    def parse(cls, text: str) -> "BlockWeight":
        """Reads `[FILE:]PATTERN=NUMBER`, files counted from 1. Raises UsageError."""
        match = re.fullmatch(r"(?:(\d+):)?(.+)=([^=]+)", text)
        try:
            assert match is not None
            re.compile(match[2])
            number = None if match[1] is None else int(match[1])
            return cls(match[2], float(match[3]), number)
        except (AssertionError, ValueError, re.error):
            raise UsageError(
                f"block weight {text!r} is not [FILE:]PATTERN=NUMBER, such as up_blocks=0.5 or "
                "2:text_encoder=0"
            ) from None

    def covers(self, file: int, component: str, name: str) -> bool:
        """Whether the factor is for a module of the file of this number."""
        if self.file not in (None, file):
            return False
        regex = rf"(?:{self.pattern})(?:\..*)?"
        return any(re.fullmatch(regex, n) for n in (f"{component}.{name}", name))


def merge(
    sources: Sequence[Path],
    weights: Sequence[float],
    output: Output,
    family: str | None = None,
    blocks: Sequence[BlockWeight] = (),
    cut: Cut | None = None,
    base: Checkpoint | None = None,
    progress: Progress = silently,
) -> Result:
    """Writes one LoRA whose every ΔW is Σ weightᵢ·ΔWᵢ.

    Without a cut it is exact: ranks are concatenated. With one, each sum is cut to fewer ranks and
    its error stated; methods without an exact sum (LoHa, LoKr, DoRA) need one.

    Args:
        sources: LoRA files of one family.
        weights: one a file.
        output: where and how.
        family: where the files do not say it.
        blocks: factors on the weights of some modules; of those that cover one, the first counts.
        cut: how many ranks to keep.
        base: the base model, for weight-decomposed updates.
        progress: shows the work.

    Raises:
        UsageError: files of different families or shapes, a sum that has no exact form, a block
            weight that covers nothing.
        RunError: a file that could not be written or does not load as it should; none is left.
    """
    if len(weights) != len(sources):
        raise UsageError(f"{len(sources)} files and {len(weights)} weights: give one weight a file")
    found = [opened(path, output, family) for path in sources]
    loras, rows = [lora for lora, _ in found], [row for _, row in found]
    for lora, row in found:
        if row is not rows[0]:
            raise UsageError(
                f"{loras[0].path} is for {rows[0].label} and {lora.path} for {row.label}: LoRAs of "
                "different families have no sum"
            )
    factors = _factors(loras, weights, blocks)
    names: dict[str, dict[str, None]] = {}
    for lora in loras:
        for component, modules in lora.adapter.items():
            names.setdefault(component, {}).update(dict.fromkeys(modules))
    silent = {
        (c, n)
        for c, ns in names.items()
        for n in ns
        if not any(factors[i].get((c, n)) for i in range(len(loras)))
    }
    notes = [f"{len(silent)} modules have weight 0 and were left out"] if silent else []
    sums: Adapter = {
        c: Lazy(kept, partial(_sum, loras, factors, c, cut is not None, base))
        for c, ns in names.items()
        if (kept := [n for n in ns if (c, n) not in silent])
    }
    if not sums:
        raise UsageError("every module has weight 0: nothing is left to write")
    record: dict[str, object] = {
        "merged": [
            _record(lora) | {"weight": weight} for lora, weight in zip(loras, weights, strict=True)
        ]
    }
    if blocks:
        record["blocks"] = [vars(block) for block in blocks]
    dtype = loras[0].dtype if len({lora.dtype for lora in loras}) == 1 else torch.float32
    origin = Origin(dtype, prediction_type(loras[0].header), record)
    if cut is None:
        return Result(write(sums, output, rows[0], origin), notes=notes)
    result = _cut(sums, cut, base, output, rows[0], origin, progress)
    result.notes += notes
    return result


def _factors(
    loras: Sequence[LoRAFile], weights: Sequence[float], blocks: Sequence[BlockWeight]
) -> list[dict[tuple[str, str], float]]:
    """Returns (component, name) → factor, one table a file. Raises UsageError: a pattern that
    covers nothing, or a file number that is none."""
    used: set[BlockWeight] = set()
    tables = []
    for number, (lora, weight) in enumerate(zip(loras, weights, strict=True), start=1):
        table: dict[tuple[str, str], float] = {}
        for component, modules in lora.adapter.items():
            for name in modules:
                block = next((b for b in blocks if b.covers(number, component, name)), None)
                table[component, name] = weight * (1.0 if block is None else block.factor)
                used |= {b for b in blocks if b.covers(number, component, name)}
        tables.append(table)
    for block in blocks:
        if block not in used:
            raise UsageError(
                f"block weight {block.pattern!r} covers no module"
                + (f" of file {block.file} of {len(loras)}" if block.file is not None else "")
            )
    return tables


@torch.no_grad()
def _sum(
    loras: Sequence[LoRAFile],
    factors: Sequence[Mapping[tuple[str, str], float]],
    component: str,
    dense: bool,
    base: Checkpoint | None,
    name: str,
) -> Delta:
    """Returns Σ factorᵢ·ΔWᵢ of one module: by its factors, or, if `dense`, else as a whole ΔW."""
    summands: list[tuple[Delta, float]] = []
    for lora, table in zip(loras, factors, strict=True):
        factor = table.get((component, name), 0.0)
        if factor:
            delta = lora.adapter[component][name]
            if summands and delta.shape != summands[0][0].shape:
                _match(lora, component, name, delta, summands[0][0])
            summands.append((delta, factor))
    label = f"{component} {name}"
    by_factors = all(plain(d) is not None and d.magnitude is None for d, _ in summands)
    whole = all(isinstance(d, Full) and d.magnitude is None for d, _ in summands)
    if by_factors or whole or not dense:
        try:
            return sum_of(label, summands)
        except UsageError as error:
            raise UsageError(
                f"{error}. --rank N writes the nearest LoRA of rank N and states its error"
            ) from None
    total = sum(factor * whole_change(label, component, name, d, base) for d, factor in summands)
    return Full(summands[0][0].shape, {"diff": total})  # type: ignore[dict-item]


def _match(lora: LoRAFile, component: str, name: str, delta: Delta, first: Delta) -> None:
    try:
        delta.fit(first.shape)  # the factors of a 1×1 convolution come as matrices in some files
    except ValueError:
        raise UsageError(
            f"{component} {name} is {delta.shape} in {lora.path} and {first.shape} in another file"
        ) from None


def whole_change(
    label: str, component: str, name: str, delta: Delta, base: Checkpoint | None
) -> torch.Tensor:
    """Returns W' − W of an update, in its own shape.

    Raises:
        UsageError: a weight-decomposed update without a base model, or on one that it does not fit.
    """
    if delta.magnitude is None:
        return delta.weight()
    if base is None:
        raise UsageError(
            f"{label} is weight-decomposed (DoRA): its ΔW depends on the base model, so give the "
            "base as --model"
        )
    W = base.weight(component, name).float()
    try:
        delta.fit(tuple(W.shape))
    except ValueError as error:
        raise UsageError(f"{label} does not fit {base.path}: {error}") from None
    return delta.compose(W) - W


def resize(
    source: Path,
    output: Output,
    cut: Cut,
    family: str | None = None,
    base: Checkpoint | None = None,
    progress: Progress = silently,
) -> Result:
    """Writes a LoRA cut to fewer ranks, each update to its nearest one; the error is stated.

    Args:
        source: any LoRA file; biases and norms stay as they are.
        output: where and how.
        cut: how many ranks to keep.
        family: where the file does not say it.
        base: the base model, for weight-decomposed updates.
        progress: shows the work.

    Raises:
        UsageError, RunError: see `convert`.
    """
    lora, row = opened(source, output, family)
    return _cut(lora.adapter, cut, base, output, row, _origin(lora), progress)


def _cut(
    adapter: Adapter,
    cut: Cut,
    base: Checkpoint | None,
    output: Output,
    family: Family,
    origin: Origin,
    progress: Progress,
    only: Callable[[Delta], bool] = lambda delta: len(delta.shape) > 1,
) -> Result:
    """Cuts the updates that `only` names, once each, and writes the result."""
    losses: dict[tuple[str, str], Loss] = {}
    ranks: dict[tuple[str, str], tuple[int | None, int]] = {}
    with Spool(output.path.parent) as spool:
        for component, name, delta in progress(each(adapter), count(adapter), "cutting ranks"):
            near = delta
            if only(delta):
                label, before = f"{component} {name}", file_rank(delta)
                if delta.magnitude is None:
                    near, loss = nearest(delta, cut)
                else:
                    change = whole_change(label, component, name, delta, base)
                    near, loss = nearest_to(change, cut)
                losses[component, name] = loss
                ranks[component, name] = (before, near.rank or 0)
            spool.add(component, name, near)
        if losses:
            error = Loss.sum(losses.values()).error
            record = {**origin.record, "approximation_error": error}
            origin = dataclasses.replace(origin, record=record)
        written = write(spool.adapter, output, family, origin)
    return Result(written, losses, ranks)
