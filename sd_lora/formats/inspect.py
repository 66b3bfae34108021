"""The contents of a LoRA file: a table for people, a record for scripts, and its problems."""

import hashlib
import json
import math
import re
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from sd_lora.adapters.deltas import Delta
from sd_lora.errors import UsageError
from sd_lora.files import HASH_KEY, mib
from sd_lora.formats import diffusers
from sd_lora.formats.base_fit import Fit, fit_of, fit_of_any
from sd_lora.formats.canonical import Adapter, Lazy, count, file_rank
from sd_lora.formats.family_of_file import family_by_header, known_family
from sd_lora.formats.lora_file import LoRAFile, open_lora
from sd_lora.formats.metadata import OWN_KEY
from sd_lora.formats.output import Progress, silently
from sd_lora.formats.verify import misfit, places_in, published_for
from sd_lora.models.families import Family
from sd_lora.models.meta_pipeline import MetaPipeline


@dataclass
class Block:
    """The deltas of a part of a model. norm: ‖ΔW‖, the Frobenius norm over its modules."""

    component: str
    name: str
    modules: int = 0
    linear: int = 0
    conv: int = 0
    vectors: int = 0
    ranks: list[int] = field(default_factory=list)
    alphas: list[float] = field(default_factory=list)
    methods: list[str] = field(default_factory=list)
    norm: float = 0.0

    def add(self, delta: Delta, norm: float) -> None:
        self.modules += 1
        if len(delta.shape) == 1:
            self.vectors += 1
        elif any(k > 1 for k in delta.shape[2:]):
            self.conv += 1
        else:
            self.linear += 1
        rank = file_rank(delta)
        if rank:
            self.ranks.append(rank)
            self.alphas.append(round(delta.alpha, 6))
        method = delta.method if delta.magnitude is None else f"{delta.method}+dora"
        if method not in self.methods:
            self.methods.append(method)
        self.norm = math.hypot(self.norm, norm)


@dataclass
class Inspection:
    """A file's contents.

    readers: program → "exact", or its losses. notes: remarks that are no faults of the file.
    """

    path: Path
    size: int
    format: str
    dtype: str
    family: str | None
    family_by: str
    components: list[Block]
    blocks: list[Block]
    readers: dict[str, str]
    notes: list[str]
    problems: list[str]
    header: dict[str, str]

    def as_json(self) -> str:
        """Everything as JSON, ranks and alphas as counts."""
        record = asdict(self) | {"path": str(self.path)}
        for kind in ("components", "blocks"):
            for block in record[kind]:
                block["ranks"] = _counts(block["ranks"])
                block["alphas"] = _counts(block["alphas"])
        return json.dumps(record, indent=2)  # ASCII, which every stream can encode


def inspect(
    path: Path, meta_pipeline: MetaPipeline | None = None, progress: Progress = silently
) -> Inspection:
    """Read a LoRA file and describe its contents and its problems.

    Args:
        path: any readable LoRA file or folder.
        meta_pipeline: of its model; None takes the published one of its family.
        progress: shows the work.

    Raises:
        UsageError: not a LoRA file, or keys of no format.
    """
    lora = open_lora(path, meta_pipeline.layout if meta_pipeline else None)
    family, how, base = None, "nothing in the file says it", meta_pipeline
    if meta_pipeline is not None:
        family, how = meta_pipeline.family, f"as {meta_pipeline.source} is"
    elif known := known_family(lora):
        family, how = known
        base = published_for(lora.adapter, family)
    read = _read(lora, base, progress)
    problems = [*read.problems, *_of_header(lora, family)]
    if not read.places:
        fit = Fit()
    elif base is None:
        fit = fit_of_any(lora, read.whole(lora))
    else:
        fit = fit_of(lora, base, read.misfits, is_given=meta_pipeline is not None)
    problems += fit.problems
    notes = [*lora.notes(), *fit.notes]
    return Inspection(
        path=lora.path,
        size=lora.path.stat().st_size,
        format=lora.format,
        dtype=str(lora.dtype)[6:],
        family=family.name if family else None,
        family_by=how,
        components=sorted(read.components.values(), key=_order),
        blocks=sorted(read.blocks.values(), key=_order),
        readers=fit.readers if not read.broken else {},
        notes=notes,
        problems=problems,
        header=lora.header,
    )


@dataclass
class _Read:
    """The deltas of a file, each made once: sums by component and block.

    places: of those that can be read whole. broken: how many cannot.
    """

    places: list[tuple[str, str]] = field(default_factory=list)
    components: dict[str, Block] = field(default_factory=dict)
    blocks: dict[tuple[str, str], Block] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    misfits: list[str] = field(default_factory=list)
    broken: int = 0

    def whole(self, lora: LoRAFile) -> Adapter:
        """The deltas that can be made."""
        kept: dict[str, list[str]] = {}
        for component, name in self.places:
            kept.setdefault(component, []).append(name)
        return {c: Lazy(names, lora.adapter[c].__getitem__) for c, names in kept.items()}


@torch.no_grad()
def _read(lora: LoRAFile, base: MetaPipeline | None, progress: Progress) -> _Read:
    read, places = _Read(), places_in(base) if base else {}
    zero: list[str] = []
    silent: list[str] = []
    layers = {c: num_layers(modules) for c, modules in lora.places.items()}
    names = [(c, n) for c, modules in lora.places.items() for n in modules]
    for component, name in progress(names, len(names), "reading"):
        try:
            delta = lora.adapter[component][name]
        except UsageError as error:
            read.problems.append(str(error))
            continue
        norm = float(delta.norm())
        read.places.append((component, name))
        if base and (fault := misfit(component, name, delta, places, base)):
            read.misfits.append(fault)
        part = block_of(component, name, layers[component])
        read.components.setdefault(component, Block(component, "")).add(delta, norm)
        read.blocks.setdefault((component, part), Block(component, part)).add(delta, norm)
        if norm == 0 and delta.magnitude is None:
            scaled = delta.alpha == 0 and all(t.any() for t in delta.tensors().values())
            (silent if scaled else zero).append(f"{component} {name}")
    read.broken = len(read.problems)
    if read.broken:
        whole = len(read.places)
        read.problems.append(f"the table is of the {whole} deltas that can be read whole")
    if zero:
        read.problems.append(f"{len(zero)} deltas are zero ({zero[0]}, …): they were never trained")
    if silent:
        read.problems.append(
            f"{len(silent)} deltas have alpha 0 ({silent[0]}, …), so that ΔW = α/r·BA is zero; "
            "sd-scripts takes alpha 0 for alpha = rank"
        )
    return read


def _of_header(lora: LoRAFile, family: Family | None) -> Iterator[str]:
    """Yield contradictions between the header and the tensors."""
    said = family_by_header(lora.header)
    if said is not None and family is not None and said is not family:
        yield f"the header says {said.label}, the tensors {family.label}: the tensors are right"
    if lora.header.get(HASH_KEY) and lora.path.suffix == ".safetensors":
        if body_hash(lora.path) != lora.header[HASH_KEY]:
            yield f"{HASH_KEY} in the header is not that of this file: its tensors were changed"
    if lora.format == "diffusers" and diffusers.HEADER_KEY not in lora.header:
        if not any("alpha" in kinds for ms in lora.places.values() for kinds in ms.values()):
            if "sd_lora_version" not in lora.header:
                yield (
                    "the file has no alpha, so everybody takes alpha = rank: if it was trained "
                    "with another, its strength is not as trained"
                )
    if lora.format == "kohya":
        none = sum("alpha" not in kinds for ms in lora.places.values() for kinds in ms.values())
        some = count(lora.adapter)
        if 0 < none < some:
            yield f"{none} of {some} modules have no alpha; readers disagree on what that means"


def body_hash(path: Path) -> str:
    """SHA-256 of everything after a safetensors header: kohya's `sshs_model_hash`."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        file.seek(8 + length)
        return hashlib.file_digest(file, "sha256").hexdigest()


_UNET_BLOCK = re.compile(r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)")
_LAYER = re.compile(r"text_model\.encoder\.layers\.(\d+)\.")


def num_layers(modules: Iterable[str]) -> int:
    """Layers of a text encoder, by the names of modules in them; 0 for a UNet."""
    return 1 + max((int(m[1]) for n in modules if (m := _LAYER.match(n))), default=-1)


def block_of(component: str, name: str, layers: int) -> str:
    """The part of the model that a module belongs to."""
    if match := _UNET_BLOCK.match(name):
        return match[1]
    if match := _LAYER.match(name):
        chunk = max(1, math.ceil(layers / 4))
        first = int(match[1]) // chunk * chunk
        last = min(first + chunk, layers) - 1
        return f"layers {first}–{last}" if last > first else f"layer {first}"
    return "ends"


def _order(block: Block) -> tuple[str, tuple[int, int]]:
    return ("" if block.component == "unet" else block.component), order_of(block.name)


def order_of(part: str) -> tuple[int, int]:
    """Key of a part's place in its model, in the order of computation."""
    number = int(match[0]) if (match := re.search(r"\d+", part)) else 0
    sides = ("down", "mid", "up", "layer", "ends")
    return next((i for i, s in enumerate(sides) if part.startswith(s)), 0), number


def _counts(values: list[Any]) -> dict[str, int]:
    return {str(value): count for value, count in sorted(Counter(values).items())}


_SHOWN = (
    ("modelspec.title", "title"),
    ("ss_output_name", "name"),
    ("ss_base_model_version", "base version"),
    ("ss_sd_model_name", "base model"),
    ("modelspec.prediction_type", "prediction"),
    ("ss_network_module", "network"),
    ("ss_num_train_images", "images"),
    ("ss_steps", "steps"),
    ("ss_learning_rate", "learning rate"),
    ("ss_resolution", "resolution"),
    ("ss_training_comment", "comment"),
    ("modelspec.date", "date"),
    ("sd_lora_version", "sd_lora"),
)


def text(found: Inspection, width: int = 100) -> str:
    """An inspection as lines of at most `width` characters."""
    family = f"{found.family} ({found.family_by})" if found.family else found.family_by
    lines = [
        *_wrapped("", str(found.path), width),
        *_wrapped(
            "  ", f"{found.format} keys, {mib(found.size)}, {found.dtype}; family {family}", width
        ),
        "",
        *_table(found.components, found.blocks, width),
    ]
    if found.notes:
        lines.append("")
    for note in found.notes:
        lines += _wrapped("  note: ", note, width)
    if found.readers:
        lines += ["", "loaded by"]
        for program, verdict in found.readers.items():
            lines += _wrapped(f"  {program:<10} ", verdict, width)
    shown = [(label, found.header[key]) for key, label in _SHOWN if found.header.get(key)]
    if shown:
        lines += ["", f"header ({len(found.header)} keys{_ours(found.header)})"]
        for label, value in shown:
            lines += _wrapped(f"  {label:<14} ", value, width)
    lines += ["", "problems" if found.problems else "no problems found"]
    for problem in found.problems[:12]:
        lines += _wrapped("  - ", problem, width)
    if len(found.problems) > 12:
        lines.append(f"  … and {len(found.problems) - 12} more (--json lists all)")
    return "\n".join(lines)


def _ours(header: Mapping[str, str]) -> str:
    return ", with the training configuration" if '"config"' in header.get(OWN_KEY, "") else ""


def _wrapped(head: str, value: str, width: int) -> list[str]:
    # a header may hold anything, and a terminal obeys what it is sent
    shown = "".join(c if c.isprintable() else " " for c in value)
    words, lines, line = shown.split(), [], head
    for word in words:
        while len(word) > width - len(head):  # a caption or path without a space
            lines.append(line + word[: width - len(line)])
            word, line = word[width - len(line) :], " " * len(head)
        if len(line) + len(word) > width:
            lines.append(line.rstrip())
            line = " " * len(head)
        line += word + " "
    return [*lines, line.rstrip()]


def _table(components: list[Block], blocks: list[Block], width: int) -> list[str]:
    if not components:
        return ["  no delta could be read whole"]
    head = f"  {'':<20} {'modules':>7} {'linear':>6} {'conv':>5} {'rank':>9} {'alpha':>11}  "
    head += f"{'method':<12} {'‖ΔW‖':>9}"
    loudest = max((_loudness(block) for block in blocks), default=0.0) or 1.0
    lines = [head[:width]]
    for component in components:
        lines.append(_row(component.component, component))
        for block in blocks:
            if block.component == component.component:
                room = min(12, max(0, width - 90))
                bar = "▇" * round(room * _loudness(block) / loudest)
                lines.append(f"{_row('  ' + block.name, block)} {bar}".rstrip())
    if any("+dora" in m for block in components for m in block.methods):
        lines.append("  +dora: ‖ΔW‖ is of the directions alone; their magnitudes need the base")
    if any(method == "oft" for block in components for method in block.methods):
        lines.append("  oft: ‖ΔW‖ is of the rotation less the identity; ΔW itself needs the base")
    if any(block.vectors for block in components):
        count = sum(block.vectors for block in components)
        lines.append(f"  with {count} biases and norms among the modules")
    return lines


def _loudness(block: Block) -> float:
    """The root mean square of a block's ‖ΔW‖: comparable between blocks of different sizes."""
    return block.norm / math.sqrt(block.modules)


def _row(label: str, block: Block) -> str:
    method = "+".join(block.methods) if len(block.methods) < 3 else f"{len(block.methods)} methods"
    return (
        f"  {label:<20} {block.modules:>7} {block.linear:>6} {block.conv:>5} "
        f"{_range(block.ranks):>9} {_range(block.alphas):>11}  {method[:12]:<12} {block.norm:>9.3g}"
    )


def _range(values: list[Any]) -> str:
    if not values:
        return "–"
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:.4g}–{high:.4g}"
