"""The start of a run from a LoRA file: its ΔW become those of the injected deltas, exactly."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from sd_lora.adapters.deltas import Delta
from sd_lora.adapters.inject import adapted_layers, delta_name
from sd_lora.adapters.layers import AdaptedLayer
from sd_lora.adapters.oft import OFT
from sd_lora.adapters.targets import PRESETS
from sd_lora.config.rows import MODES
from sd_lora.config.schema import OPTIONS
from sd_lora.errors import Problem, UsageError
from sd_lora.formats.adapter_files import read_adapter
from sd_lora.formats.canonical import Adapter, canonical_name, count, each, live_names, plain


@dataclass(frozen=True)
class Form:
    """Rank and alpha of a file's delta; alpha is None where no positive one gives its scale."""

    rank: int
    alpha: float | None

    @classmethod
    def of(cls, delta: Delta, rslora: bool) -> "Form | None":
        """The form of a delta in a run that scales by α/r, or by α/√r; None without a rank."""
        factors = plain(delta)
        rank = delta.rank if factors is None else len(factors[0])
        if not rank:
            return None
        alpha = delta.alpha if factors is None else factors[2]
        alpha /= math.sqrt(rank) if rslora else 1
        return cls(rank, alpha if alpha > 0 else None)


@dataclass(frozen=True)
class Structure:
    """The modules and ranks of a LoRA file. forms: component → live module name → its form, None
    for a delta without a rank."""

    forms: dict[str, dict[str, Form | None]]

    @classmethod
    def of(cls, path: Path, models: Mapping[str, nn.Module], rslora: bool) -> "Structure":
        """The structure of a LoRA file, or of a checkpoint of a run that started from one.

        Args:
            path: the file, or a folder with one.
            models: component → model without adapters.
            rslora: whether the run scales by α/√r.

        Raises:
            UsageError: a file that cannot be read.
        """
        forms: dict[str, dict[str, Form | None]] = {}
        for component, modules in _read(path, models).items():
            model = models.get(component)
            live = live_names(component, model) if model is not None else {}
            forms[component] = {
                live[name]: Form.of(modules[name], rslora) for name in modules if name in live
            }
        return cls(forms)

    def usual(self, component: str) -> Form:
        """The most frequent form in a component, or in all where it has none."""
        own = [form for form in self.forms.get(component, {}).values() if form]
        every = [form for forms in self.forms.values() for form in forms.values() if form]
        most = Counter(own or every).most_common(1)
        return most[0][0] if most else Form(DEFAULT_RANK, None)


DEFAULT_RANK, DEFAULT_TARGETS = (OPTIONS[n].default_for(MODES[0]) for n in ("rank", "targets"))
"""Of a run from a LoRA file that has no ranks, or nothing for the UNet."""


@dataclass(frozen=True)
class Place:
    """A run's delta, in its layer. path: of the parameter."""

    delta: Delta
    layer: AdaptedLayer
    path: str


@dataclass(frozen=True)
class Start:
    """A LoRA file that fits a run's deltas. places: component and canonical name → delta. unread:
    number of its modules in text encoders whose outputs do not reach the UNet."""

    path: Path
    adapter: Adapter
    places: dict[tuple[str, str], Place]
    unread: int

    def apply(self) -> None:
        """Give the run's deltas the ΔW of the file, in place.

        Ranks beyond the file's have B = 0, and modules that it has not stay as injected: at zero.
        Alphas stay the run's, and B is scaled so that ΔW is the file's.
        """
        for component, name, delta in each(self.adapter):
            if place := self.places.get((component, name)):
                _take(delta, place)

    @property
    def note(self) -> str:
        """The file, the number of its modules, and of those that it has not, for the summary."""
        number = count(self.adapter) - self.unread
        rest = len(self.places) - number
        others = f", {rest} others at zero" * bool(rest)
        unread = f"; {self.unread} of text encoders' last layers do nothing here" * bool(
            self.unread
        )
        return f"starts from {self.path}: {number} modules of it{others}{unread}"


def start_from(path: Path, models: Mapping[str, nn.Module]) -> Start:
    """Read a LoRA file, in anybody's format, for injected models, which stay as they are.

    Args:
        path: a LoRA file or a folder with one.
        models: component → injected model.

    Raises:
        UsageError: a file that cannot be read; modules of it that have no place here, with the
            flags that give them one.
    """
    adapter = _read(path, models)
    places = _places(models)
    unread = {
        (component, name)
        for component, model in models.items()
        if component != "unet"
        for name in live_names(component, model)
        # an adapted text encoder has all modules that are read: the others are in its last layers
        if re.fullmatch(PRESETS["text"], name) and (component, name) not in places
    }
    misfits = [
        f"{component} {name} {wrong}"
        for component, name, delta in each(adapter)
        if (component, name) not in unread
        if (wrong := _misfit(delta, places.get((component, name))))
    ]
    if misfits:
        shown = "; ".join(misfits[:3]) + f"; … {len(misfits) - 3} more" * (len(misfits) > 3)
        flags = " ".join(_flags(adapter))
        raise UsageError(
            f"init_lora {path} does not fit this run: {shown}. Its modules and ranks have a place "
            f"with {flags}; `sd-lora resize` cuts ranks"
        )
    num_unread = sum((component, name) in unread for component, name, _ in each(adapter))
    return Start(path, adapter, places, num_unread)


def _read(path: Path, models: Mapping[str, nn.Module]) -> Adapter:
    """The adapter of a file to start from; raises UsageError, with the option's name."""
    try:
        return read_adapter(path, models)
    except UsageError as error:
        raise UsageError(f"init_lora {error}", [Problem("init_lora", str(error))]) from None


def _places(models: Mapping[str, nn.Module]) -> dict[tuple[str, str], Place]:
    """Component and canonical name → a run's delta."""
    places: dict[tuple[str, str], Place] = {}
    for component, model in models.items():
        for module, layer in adapted_layers(model).items():
            for path, delta in layer.deltas_by_path().items():
                name = canonical_name(component, delta_name(module, path))
                places[component, name] = Place(delta, layer, path)
    return places


def _is_plain(delta: Delta) -> bool:
    """Whether a delta is B·A of trained factors alone."""
    return {k for k in delta.tensors() if k != "magnitude"} == {"lora_A", "lora_B"}


@torch.no_grad()
def _misfit(theirs: Delta, place: Place | None) -> str:
    """Why a file's delta has no place in a run, as a predicate; "" if it has."""
    if place is None:
        return "is not adapted"
    ours = place.delta
    try:
        theirs.fit(ours.shape)
    except ValueError as error:
        return f"is of another shape: {error}"
    if theirs.magnitude is not None and ours.magnitude is None:
        return "has a magnitude (--use_dora)"
    factors = theirs.low_rank()
    if _is_plain(ours) and factors is not None:
        rank, own = len(factors[0]), ours.rank or 0
        return f"has rank {rank}, and {own} here" if rank > own else ""
    shapes = [
        {k: tuple(t.shape) for k, t in d.tensors().items() if k != "magnitude"}
        for d in (theirs, ours)
    ]
    if shapes[0] == shapes[1]:
        return ""
    if theirs.method != ours.method:
        return f"is of the method {theirs.method}, and {ours.method} here"
    return "has tensors of other shapes"


@torch.no_grad()
def _take(theirs: Delta, place: Place) -> None:
    """Give a run's delta the ΔW of a file's, and the rule decompose the magnitude for it."""
    ours = place.delta
    theirs.fit(ours.shape)
    ratio, own = theirs.scale / ours.scale, ours.tensors()
    factors = theirs.low_rank()
    if _is_plain(ours) and factors is not None:
        A, B = (factor.float() for factor in factors)
        rank = len(A)
        own["lora_A"][:rank] = A.reshape(rank, *own["lora_A"].shape[1:])
        own["lora_B"].zero_()
        own["lora_B"][:, :rank] = ratio * B.reshape(len(B), rank, *own["lora_B"].shape[2:])
    else:
        for key, tensor in theirs.tensors().items():
            if key != "magnitude":
                own[key].copy_(tensor)
        if ratio != 1:
            ours.scale_by(ratio)
    magnitude = ours.magnitude
    if magnitude is None:
        return
    if theirs.magnitude is None:  # then W' = W + ΔW at the start
        W = place.layer.weight_of(place.layer.base, place.path)
        ours.init_magnitude(W.to(magnitude.device))
    else:
        ours.magnitude = theirs.magnitude
    magnitude.copy_(ours.magnitude)
    ours.magnitude = magnitude  # the optimiser's


_TARGETS = ("attention", "transformer", "attention+conv", "transformer+conv", "all")


def _flags(adapter: Adapter) -> Iterator[str]:
    """Yield the flags that give each module of a file a place, as far as options name them."""
    ranks: dict[str, int] = {}
    for component, _, delta in each(adapter):
        large = any(size > 1 for size in delta.shape[2:])
        option = "conv_rank" if large else "rank" if component == "unet" else f"{component}_rank"
        factors = delta.low_rank()
        rank = len(factors[0]) if factors is not None else delta.rank or 0
        ranks[option] = max(ranks.get(option, 0), rank)
    methods = {delta.method for _, _, delta in each(adapter) if delta.low_rank() is None}
    names = [*adapter.get("unet", ())]
    for targets in _TARGETS:
        patterns = "|".join(PRESETS[preset] for preset in targets.split("+"))
        if all(re.fullmatch(patterns, name) for name in names):
            yield f"--targets {targets}"
            break
    yield from (f"--method {method}" for method in methods if len(methods) == 1)
    if any(component != "unet" for component in adapter):
        yield "--train_text_encoder"
    yield from (f"--{option} {rank}" for option, rank in ranks.items() if rank)
    sizes = [delta.block_size for _, _, delta in each(adapter) if isinstance(delta, OFT)]
    yield from (f"--oft_block_size {size}" for size in {max(sizes, default=0)} - {0})
    if any(delta.magnitude is not None for _, _, delta in each(adapter)):
        yield "--use_dora"
