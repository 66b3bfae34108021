"""Several LoRAs into one: Σ weightᵢ·ΔWᵢ, exactly, or cut to fewer ranks with the error stated."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from sd_lora.adapters.deltas import Delta
from sd_lora.adapters.methods import Full
from sd_lora.adapters.state import sum_of
from sd_lora.errors import UsageError
from sd_lora.formats.approximate import Cut
from sd_lora.formats.canonical import Adapter, Lazy, plain
from sd_lora.formats.checkpoints import Checkpoint
from sd_lora.formats.family_of_file import prediction_type
from sd_lora.formats.lora_file import LoRAFile
from sd_lora.formats.output import Origin, Output, Progress, silently, write
from sd_lora.formats.tools import Result, cut_to, kept_facts, opened, record_of, whole_change
from sd_lora.models.families import Family


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
        """Read `[FILE:]PATTERN=NUMBER`, files counted from 1. Raises UsageError."""
        match = re.fullmatch(r"(?:(\d+):)?(.+)=([^=]+)", text)
        try:
            if match is not None and math.isfinite(factor := float(match[3])):
                re.compile(match[2])
                return cls(match[2], factor, None if match[1] is None else int(match[1]))
        except (ValueError, re.error):
            pass
        raise UsageError(
            f"block weight {text!r} is not [FILE:]PATTERN=NUMBER, such as up_blocks=0.5 or "
            "2:text_encoder=0"
        )

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
    """Write one LoRA whose every ΔW is Σ weightᵢ·ΔWᵢ.

    Without a cut it is exact: ranks are concatenated. With one, each sum is cut to fewer ranks and
    its error stated; methods without an exact sum (LoHa, LoKr, DoRA) need one.

    Args:
        sources: LoRA files of one family.
        weights: one a file.
        output: path, format and dtype.
        family: where the files do not name it.
        blocks: factors on the weights of some modules; the first that covers a module counts.
        cut: number of ranks to keep.
        base: the base model, for weight-decomposed deltas.
        progress: shows the work.

    Raises:
        UsageError: files of different families or shapes, a sum without an exact form, a block
            weight without modules.
        RunError: a failed write, or a file that does not load exactly; none is left.
    """
    check_weights(sources, weights)
    found = [opened(path, output, family) for path in sources]
    loras, row = [lora for lora, _ in found], _one_family(found)
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
    notes = _notes(loras, len(silent))
    sums: Adapter = {
        c: Lazy(kept, partial(_sum, loras, factors, c, cut is not None, base))
        for c, ns in names.items()
        if (kept := [n for n in ns if (c, n) not in silent])
    }
    if not sums:
        raise UsageError("every module has weight 0: nothing is left to write")
    record: dict[str, object] = {
        "merged": [
            record_of(lora) | {"weight": weight}
            for lora, weight in zip(loras, weights, strict=True)
        ]
    }
    if blocks:
        record["blocks"] = [vars(block) for block in blocks]
    dtype = loras[0].dtype if len({lora.dtype for lora in loras}) == 1 else torch.float32
    kinds = {prediction_type(lora.header, row) for lora in loras}
    if len(kinds) > 1:
        notes.append("the files are for models of different predictions, by their headers")
    origin = Origin(
        dtype,
        kinds.pop() if len(kinds) == 1 else None,
        record=record,
        facts=_shared(loras),
    )
    if cut is None:
        return Result(write(sums, output, row, origin), notes=notes)
    result = cut_to(sums, cut, base, output, row, origin, progress)
    result.notes += notes
    return result


def _notes(loras: list[LoRAFile], silent: int) -> list[str]:
    notes = [note for lora in loras for note in lora.notes()]
    return [*notes, *([f"{silent} modules have weight 0 and were left out"] if silent else [])]


def _one_family(found: Sequence[tuple[LoRAFile, Family]]) -> Family:
    """The family of all files; raises UsageError naming two that differ."""
    first, family = found[0]
    for lora, row in found:
        if row is not family:
            raise UsageError(
                f"{first.path} is for {family.label} and {lora.path} for {row.label}: LoRAs of "
                "different families have no sum"
            )
    return family


def _shared(loras: Sequence[LoRAFile]) -> dict[str, str]:
    """Header keys with the same value in all sources: a number of training images is not the
    sum's.
    """
    first, *others = (kept_facts(lora.header) for lora in loras)
    return {k: v for k, v in first.items() if all(other.get(k) == v for other in others)}


def check_weights(sources: Sequence[Path], weights: Sequence[float]) -> None:
    """Raise UsageError if there is not one finite weight a file."""
    if len(weights) != len(sources):
        raise UsageError(f"{len(sources)} files and {len(weights)} weights: give one weight a file")
    for weight in weights:
        if not math.isfinite(weight):
            raise UsageError(f"a weight must be a finite number, not {weight}")


def _factors(
    loras: Sequence[LoRAFile], weights: Sequence[float], blocks: Sequence[BlockWeight]
) -> list[dict[tuple[str, str], float]]:
    """(component, name) → factor, one table a file.

    Raises:
        UsageError: a pattern without modules, or a wrong file number.
    """
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
    """Σ factorᵢ·ΔWᵢ of one module: by its factors, or, if `dense`, else as a whole ΔW."""
    summands: list[tuple[Delta, float]] = []
    for lora, table in zip(loras, factors, strict=True):
        factor = table.get((component, name), 0.0)
        if factor:
            delta = lora.adapter[component][name]
            # of OFT's shape a file has the outputs alone
            known = [d for d, _ in summands if 0 not in d.shape]
            if known and 0 not in delta.shape and delta.shape != known[0].shape:
                _match(lora, component, name, delta, known[0])
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
    changes = [factor * whole_change(component, name, d, base) for d, factor in summands]
    shape = max((change.shape for change in changes), key=len)  # 1×1 convolutions come as matrices
    return Full(tuple(shape), {"diff": sum(change.reshape(shape) for change in changes)})  # type: ignore[dict-item]


def _match(lora: LoRAFile, component: str, name: str, delta: Delta, first: Delta) -> None:
    try:
        delta.fit(first.shape)  # the factors of a 1×1 convolution come as matrices in some files
    except ValueError:
        raise UsageError(
            f"{component} {name} is {delta.shape} in {lora.path} and {first.shape} in another file"
        ) from None
