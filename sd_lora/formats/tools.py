"""The tools for one LoRA file, convert and resize, one delta at a time."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sd_lora.adapters.deltas import Delta
from sd_lora.errors import UsageError
from sd_lora.files import HASH_KEY
from sd_lora.formats.approximate import (
    Cut,
    Loss,
    Spectrum,
    nearest,
    nearest_to,
    shared_ranks,
)
from sd_lora.formats.canonical import Adapter, Lazy, count, each, is_plain, plain
from sd_lora.formats.family_of_file import family_of, prediction_type
from sd_lora.formats.lora_file import LoRAFile, open_lora
from sd_lora.formats.metadata import OWN_KEY, without_places
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
from sd_lora.models.families import Family

if TYPE_CHECKING:
    from sd_lora.formats.checkpoints import Checkpoint


@dataclass
class Result:
    """The result of a tool: the file, the errors of approximations, and notes.

    losses: (component, delta name) → error. ranks: → kept rank.
    """

    written: Written
    losses: dict[tuple[str, str], Loss] = field(default_factory=dict)
    ranks: dict[tuple[str, str], int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def error(self) -> float:
        """‖ΔW − BA‖ / ‖ΔW‖ over all that was approximated, in the Frobenius norm."""
        return Loss.sum(self.losses.values()).error


def opened(
    path: Path, output: Output, family: str | None, base: "Checkpoint | None" = None
) -> tuple[LoRAFile, Family]:
    """Open a LoRA file, make every delta once, and find its family and its place there.

    base: for methods whose ΔW is a function of it.

    Raises:
        UsageError: any fault of the file, an unknown family, or a module or shape that the model
            has not.
    """
    layout = output.meta_pipeline.layout if output.meta_pipeline else None
    lora = open_lora(path, layout, base=base.weight if base else None)
    lora.check()
    row = output.meta_pipeline.family if output.meta_pipeline else family_of(lora, family)
    check_place(lora.adapter, output, row, str(path))
    return lora, row


def convert(
    source: Path,
    output: Output,
    family: str | None = None,
    cut: Cut | None = None,
    base: "Checkpoint | None" = None,
    drop_vectors: bool = False,
    progress: Progress = silently,
) -> Result:
    """Write a LoRA file in another format, dtype or family's names.

    Args:
        source: any readable LoRA file or folder.
        output: path, format and dtype.
        family: "sd1", "sd2", "sdxl" or "sdxl_refiner", where the file does not name it.
        cut: ranks for approximating deltas without a form in the format; the rest stays exact.
        base: the base model, needed for the ΔW of a weight-decomposed delta or OFT, and ComfyUI's
            form.
        drop_vectors: leave out biases and norms, for which a plain LoRA has no form.
        progress: shows the work.

    Raises:
        UsageError: an unreadable file, or one without a form in this format, with a remedy.
        RunError: a failed write, or a file that does not load exactly; none is left.
    """
    lora, row = opened(source, output, family, base)
    adapter: Adapter = lora.adapter
    notes = list(lora.notes())
    if cut is not None and output.to in ("lycoris", "comfyui"):
        raise UsageError(
            f"--to {output.to} keeps every delta as it is: `sd-lora resize` cuts ranks, and --to "
            "kohya or diffusers approximates what they have no form for"
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
        weight = base.weight if base else None
        return Result(write(adapter, output, row, origin_of(lora, row), weight), notes=notes)
    only = _has_no_diffusers_form if output.to == "diffusers" else _is_not_plain
    result = cut_to(adapter, cut, base, output, row, origin_of(lora, row), progress, only)
    if not result.losses:
        notes.append("nothing needed approximating (`sd-lora resize` cuts ranks)")
    result.notes += notes
    return result


def _is_not_plain(delta: Delta) -> bool:
    return len(delta.shape) > 1 and (delta.needs_base or plain(delta) is None)


def _has_no_diffusers_form(delta: Delta) -> bool:
    return len(delta.shape) > 1 and not is_plain({"unet": {"": delta}}, decomposed=True)


def _without_vectors(adapter: Adapter) -> tuple[Adapter, int]:
    keep = {
        c: Lazy([n for n, d in ms.items() if len(d.shape) > 1], ms.__getitem__)
        for c, ms in adapter.items()
    }
    return {c: ms for c, ms in keep.items() if ms}, count(adapter) - count(keep)


# what describes the tensors of the source and not those that are written
_OF_TENSORS = ("ss_network_", "sshs_", "lora_adapter_metadata", "format", "sd_lora", "ss_output_")


def kept_facts(header: Mapping[str, str]) -> dict[str, str]:
    """Header keys of a source that stay true of a file made from it."""
    return {k: v for k, v in header.items() if not k.startswith(_OF_TENSORS)}


def origin_of(lora: LoRAFile, family: Family) -> Origin:
    """The origin of a file made from another one."""
    kind, facts = prediction_type(lora.header, family), kept_facts(lora.header)
    return Origin(lora.dtype, kind, record=record_of(lora), facts=facts)


def record_of(lora: LoRAFile) -> dict[str, object]:
    """Where an output came from, for our own part of its header."""
    record: dict[str, object] = {"source": lora.path.name}
    if HASH_KEY in lora.header:
        record["source_hash"] = lora.header[HASH_KEY]
    with suppress(ValueError, RecursionError):  # a foreign header may hold anything
        record["source_record"] = without_places(json.loads(lora.header.get(OWN_KEY, "")))
    return record


def whole_change(
    component: str, name: str, delta: Delta, base: "Checkpoint | None"
) -> torch.Tensor:
    """W' − W of a delta, in its own shape.

    Raises:
        UsageError: a weight-decomposed delta or OFT without a base model, or with another shape
            than the base's.
    """
    if not delta.needs_base:
        return delta.weight()
    if base is None:
        what = f"of the method {delta.method}" if delta.of_base else "weight-decomposed (DoRA)"
        raise UsageError(
            f"{component} {name} is {what}: its ΔW depends on the base model, so give the base as "
            "--model"
        )
    W = base.weight(component, name).float()
    try:
        delta.fit(tuple(W.shape))
    except ValueError as error:
        what = f"{component} {name}"
        raise UsageError(f"{what} does not fit {base.path}: {error}") from None
    return delta.compose(W) - W


def resize(
    source: Path,
    output: Output,
    cut: Cut | None,
    family: str | None = None,
    base: "Checkpoint | None" = None,
    progress: Progress = silently,
    mean_rank: int | None = None,
) -> Result:
    """Write a LoRA cut to fewer ranks, each delta to its nearest one; the error is stated.

    Args:
        source: any LoRA file; biases and norms stay as they are.
        output: where and how.
        cut: how many ranks to keep; None with `mean_rank`.
        family: where the file does not say it.
        base: the base model, for weight-decomposed deltas.
        progress: shows the work.
        mean_rank: the parameters of all deltas together are those of this rank, see `shared_ranks`.

    Raises:
        UsageError, RunError: see `convert`.
    """
    if (cut is None) == (mean_rank is None) or (mean_rank is not None and mean_rank < 1):
        raise UsageError(
            "give mean_rank, at least 1, or what each delta keeps: rank, energy or ratio"
        )
    lora, row = opened(source, output, family)
    ranks: dict[tuple[str, str], int] = {}
    if mean_rank is not None:
        spectra = {}
        words = "comparing singular values"
        for component, name, delta in progress(each(lora.adapter), count(lora.adapter), words):
            if len(delta.shape) > 1:
                of_base = delta.needs_base
                change = whole_change(component, name, delta, base) if of_base else None
                spectra[component, name] = Spectrum.of(delta, change)
        ranks = shared_ranks(spectra, mean_rank)
    origin = origin_of(lora, row)
    result = cut_to(
        lora.adapter, cut or Cut(rank=mean_rank), base, output, row, origin, progress, ranks=ranks
    )
    result.notes += lora.notes()
    return result


def cut_to(
    adapter: Adapter,
    cut: Cut,
    base: "Checkpoint | None",
    output: Output,
    family: Family,
    origin: Origin,
    progress: Progress,
    only: Callable[[Delta], bool] = lambda delta: len(delta.shape) > 1,
    ranks: Mapping[tuple[str, str], int] | None = None,
) -> Result:
    """Cut the deltas that `only` names, once each, and writes the result.

    ranks: (component, delta name) → its rank, in place of the cut.
    """
    losses: dict[tuple[str, str], Loss] = {}
    kept: dict[tuple[str, str], int] = {}
    with Spool(output.path.parent) as spool:
        for component, name, delta in progress(each(adapter), count(adapter), "cutting ranks"):
            near, own = delta, (ranks or {}).get((component, name))
            mine = cut if own is None else Cut(rank=own)
            if only(delta):
                if not delta.needs_base:
                    near, loss = nearest(delta, mine)
                else:
                    near, loss = nearest_to(whole_change(component, name, delta, base), mine)
                losses[component, name] = loss
                kept[component, name] = near.rank or 0
            spool.add(component, name, near)
        if losses:
            error = Loss.sum(losses.values()).error
            record = {**origin.record, "approximation_error": error}
            origin = dataclasses.replace(origin, record=record, computed=True)
        written = write(spool.adapter, output, family, origin)
    return Result(written, losses, kept)
