"""Verification: load a file into a fresh pipeline and compare every module with the trained one.

Loaders lose modules and rescale weights with a log line at best, so a line from one is a failure
here, and so is a parameter left without a value.
"""

import copy
import logging
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sd_lora.adapters.deltas import Delta
from sd_lora.adapters.state import make_delta
from sd_lora.errors import RunError, UsageError
from sd_lora.formats.adapter_files import DIFFUSERS, KOHYA, Format
from sd_lora.formats.canonical import Adapter, Lazy, Modules, canonical_name
from sd_lora.formats.kohya import diffusers_reads
from sd_lora.formats.lora_file import open_lora
from sd_lora.models.families import Family
from sd_lora.models.meta_pipeline import MetaPipeline, without_progress_bars

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""Largest accepted ‖ΔW − loaded‖ / ‖ΔW‖ of a module by the file's dtype; float32
gives 1e-7, and a factor that is rounded to float16 is off by up to 5e-4, to bfloat16 by 4e-3."""

_LOADERS = ("diffusers", "transformers", "peft", "accelerate", "huggingface_hub")


@dataclass(frozen=True)
class Verified:
    """One verified file: how many modules were compared, and the largest relative error of a ΔW."""

    path: Path
    modules: int
    worst_error: float

    @property
    def error_text(self) -> str:
        """The error in words: "every number equal", or "worst error 3e-04"."""
        return f"worst error {self.worst_error:.0e}" if self.worst_error else "every number equal"


@dataclass(frozen=True)
class Loaded:
    """The result of diffusers' loader: the adapter, and every logged line."""

    adapter: Adapter
    complaints: list[str]


class _Collector(logging.Handler):
    def __init__(self, messages: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(f"{record.name}: {record.getMessage()}")


@contextmanager
def captured_complaints() -> Iterator[list[str]]:
    """Collect every warning that the loaders log or raise within a `with` block, unprinted."""
    messages: list[str] = []
    handler = _Collector(messages)
    loggers = [logging.getLogger(name) for name in _LOADERS]
    before = [(logger.level, logger.handlers, logger.propagate) for logger in loggers]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for logger in loggers:
            logger.handlers, logger.propagate = [handler], False
            logger.setLevel(logging.WARNING)
        try:
            yield messages
        finally:
            for logger, (level, handlers, propagate) in zip(loggers, before, strict=True):
                logger.handlers, logger.propagate = handlers, propagate
                logger.setLevel(level)
            about_later_versions = (DeprecationWarning, FutureWarning, PendingDeprecationWarning)
            messages += [
                str(w.message) for w in caught if not issubclass(w.category, about_later_versions)
            ]


def loaded_adapter(pipeline: "DiffusionPipeline") -> Adapter:
    """The adapter in a pipeline's peft layers.

    Raises:
        RunError: a parameter on the meta device, which would compute with uninitialised memory.
    """
    adapter: dict[str, Lazy] = {}
    for component in ("unet", "text_encoder", "text_encoder_2"):
        model = getattr(pipeline, component, None)
        layers: dict[str, Any] = {}
        for name, layer in model.named_modules() if model is not None else ():
            if not (isinstance(getattr(layer, "lora_A", None), nn.ModuleDict) and layer.lora_A):
                continue  # no peft layer, or one whose adapter was taken out again
            if any(p.is_meta for n, p in layer.named_parameters() if "lora_" in n):
                raise RunError(f"{component} {name} was left without a value by the loader")
            layers[canonical_name(component, name)] = layer
        if layers:
            adapter[component] = Lazy(layers, partial(_loaded, layers))
    return adapter


def _loaded(layers: Mapping[str, Any], name: str) -> Delta:
    layer = layers[name]
    (key,) = layer.lora_A.keys()
    A, B = layer.lora_A[key].weight.detach(), layer.lora_B[key].weight.detach()
    parts = {"lora_A": A, "lora_B": B, "alpha": torch.tensor(layer.scaling[key] * len(A))}
    if key in layer.lora_magnitude_vector:
        parts["magnitude"] = layer.lora_magnitude_vector[key].weight.detach().flatten()
    return make_delta(name, parts)


def _errors(want: Delta, have: Delta) -> list[float]:
    """The relative errors of ΔW and, of a weight-decomposed delta, of its magnitude."""

    def error(a: Tensor, b: Tensor) -> float:
        if a.numel() != b.numel():
            return float("inf")
        return float((b.reshape(a.shape) - a).norm() / a.norm().clamp(min=1e-12))

    # in float64, so that comparing adds no error
    exact = [copy.deepcopy(delta).double() for delta in (want, have)]
    factors = [delta.low_rank() for delta in exact]
    if factors[0] is None or factors[1] is None:
        errors = [error(*(delta.by_itself() for delta in exact))]
    else:
        (A, B), (C, D) = ((f.flatten(1) for f in pair) for pair in factors if pair)
        if len(B) != len(D) or A.shape[1] != C.shape[1]:
            return [float("inf")]
        errors = [_product_error(A, exact[0].scale * B, C, exact[1].scale * D)]
    magnitudes = [delta.magnitude for delta in exact]
    if magnitudes[0] is not None and magnitudes[1] is not None:
        errors.append(error(magnitudes[0], magnitudes[1]))
    elif magnitudes[0] is not magnitudes[1]:
        errors.append(float("inf"))
    return errors


def _product_error(A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> float:
    """‖BA − DC‖ / ‖BA‖ without either product: for SDXL's modules they take minutes.

    With [B −D] = QR, ‖[B −D] [A; C]‖ = ‖R [A; C]‖, whose entries cancel as those of ΔW do.
    """
    if A.shape == C.shape and torch.equal(A, C) and torch.equal(B, D):
        return 0.0
    difference = torch.linalg.qr(torch.cat((B, -D), 1)).R @ torch.cat((A, C))
    whole = torch.linalg.qr(B).R @ A
    return float(difference.norm() / whole.norm().clamp(min=1e-12))


@torch.no_grad()
def compare(
    trained: Adapter, loaded: Adapter, tolerance: float = TOLERANCE[torch.float32]
) -> tuple[int, float, list[str]]:
    """Number of modules compared, largest relative error of a ΔW, and the faults.

    One module's ΔW at a time: those of a whole SD1.5 take 7 GB.
    """
    wrong, worst, count = [], 0.0, 0
    for component in trained.keys() | loaded.keys():
        want, have = trained.get(component, {}), loaded.get(component, {})
        wrong += [f"{component} {name} was not loaded" for name in want.keys() - have.keys()]
        wrong += [f"{component} {name} was never trained" for name in have.keys() - want.keys()]
        for name in want.keys() & have.keys():
            count += 1
            for error in _errors(want[name], have[name]):
                worst = max(worst, error)
                if not error <= tolerance:
                    wrong.append(f"{component} {name} is off by {error:.1%}")
    return count, worst, sorted(wrong)


def misfits(adapter: Adapter, meta_pipeline: MetaPipeline) -> Iterator[str]:
    """Yield the parts of an adapter without a place in a model: components, modules, shapes."""
    places = places_in(meta_pipeline)
    for component, modules in adapter.items():
        if component not in places:
            yield f"{meta_pipeline.family.label} has no {component}"
            continue
        for name, delta in modules.items():
            if fault := misfit(component, name, delta, places, meta_pipeline):
                yield fault


Places = Mapping[str, Mapping[str, tuple[int, ...]]]
"""Component → delta name → shape of a model's parameter."""


def places_in(meta_pipeline: MetaPipeline) -> Places:
    """The parameters of a model by delta names."""
    return {component: shapes_of(component, meta_pipeline) for component in meta_pipeline.configs}


def misfit(
    component: str, name: str, delta: Delta, places: Places, meta_pipeline: MetaPipeline
) -> str | None:
    """How a delta, which gets the model's shape, has no place in a model; None if it has one."""
    if component not in places:
        return f"{meta_pipeline.family.label} has no {component}"
    if name not in places[component]:
        return f"{component} {name} is no module of {meta_pipeline.source}"
    try:
        delta.fit(places[component][name])
    except (ValueError, RuntimeError) as error:
        return f"{component} {name}: {error}"
    return None


def published_for(adapter: Adapter, family: Family) -> MetaPipeline:
    """The published base of a family, or, by the width of the adapter's conv_in, that of its
    inpainting model and the like.
    """
    base, unet = MetaPipeline.of_family(family), adapter.get("unet", {})
    if "conv_in" not in unet:
        return base
    try:
        shape = unet["conv_in"].shape
    except UsageError:  # a broken delta is reported elsewhere
        return base
    return base.with_inputs(shape[1]) if len(shape) > 1 and shape[1] else base


def is_other_base(wrong: Sequence[str], adapter: Adapter) -> bool:
    """Whether the misfits are so many that the file is for another base, and not a broken one."""
    return len(wrong) > 2 and 2 * len(wrong) > sum(len(modules) for modules in adapter.values())


def other_base(base: MetaPipeline, wrong: Sequence[str]) -> str:
    """A line on a file that was made for an unpublished base, with its misfits to one of these."""
    return (
        f"made for another base than the published ones ({wrong[0]}): give --model to check "
        f"against it, instead of {base.source}"
    )


def fitted(adapter: Adapter, meta_pipeline: MetaPipeline) -> Adapter:
    """An adapter without `misfits`, in the model's own shapes: some files have the factors of a 1×1
    convolution as matrices, and those of a linear layer as kernels.
    """
    return {
        component: Lazy(
            modules,
            partial(_fit, component, modules=modules, shapes=shapes_of(component, meta_pipeline)),
        )
        for component, modules in adapter.items()
    }


def shapes_of(component: str, meta_pipeline: MetaPipeline) -> dict[str, tuple[int, ...]]:
    """Canonical delta name → shape of every parameter of a component."""
    return {
        canonical_name(component, name.removesuffix(".weight")): shape
        for name, shape in meta_pipeline.shapes(component).items()
    }


def _fit(
    component: str, name: str, modules: Modules, shapes: Mapping[str, tuple[int, ...]]
) -> Delta:
    shape, delta = shapes[name], modules[name]
    delta.fit(shape)
    return delta


def load_into_pipeline(
    path: Path, meta_pipeline: MetaPipeline, components: Collection[str]
) -> Loaded:
    """Load a file by diffusers' own loader into a fresh pipeline of the family.

    Args:
        path: of the file.
        meta_pipeline: of the pipeline.
        components: adapted by the file; diffusers rightly complains about the others.
    """
    pipeline = meta_pipeline.pipeline()
    with captured_complaints() as complaints, without_progress_bars():
        try:
            pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
            complaints.append(" ".join(str(error).split()))
    # diffusers looks for a first text encoder's in the refiner's files too, which has none
    sought = {*meta_pipeline.family.components, "text_encoder"}
    expected = [f"prefix='{c}'" for c in sought if c not in components]
    complaints = [
        c for c in complaints if not ("No LoRA keys" in c and any(e in c for e in expected))
    ]
    return Loaded(loaded_adapter(pipeline), complaints)


def verify(
    path: Path, adapter: Adapter, meta_pipeline: MetaPipeline, kind: Format = DIFFUSERS
) -> Verified:
    """Load a file into a fresh pipeline, and compare every module's ΔW with the trained one.

    The file is read back by our own reader as well; for a LyCORIS file, unknown to diffusers, this
    is all.

    Raises:
        RunError: a loader's complaint, a module lost, added or left empty, or a wrong ΔW.
    """
    lora = open_lora(path, meta_pipeline.layout)
    tolerance = TOLERANCE.get(lora.dtype, TOLERANCE[torch.float32])
    count, worst, wrong = 0, 0.0, list(lora.problems())
    if not wrong:
        count, worst, wrong = compare(adapter, lora.adapter, tolerance)
    family = meta_pipeline.family
    layout = meta_pipeline.layout if family.original_names else None
    if kind is DIFFUSERS or (kind is KOHYA and diffusers_reads(adapter, layout, family)):
        loaded = load_into_pipeline(path, meta_pipeline, adapter)
        count, error, lost = compare(adapter, loaded.adapter, tolerance)
        worst, wrong = max(worst, error), [*loaded.complaints, *sorted({*wrong, *lost})]
    if lora.dtype is torch.float16 and any("is off by" in line for line in wrong):
        wrong = [*wrong[:9], "float16 holds nothing below 6e-8: take bfloat16 or float32"]
    _refuse(path, wrong)
    return Verified(path, count, worst)


def verify_file(
    path: Path, meta_pipeline: MetaPipeline, is_given: bool = True
) -> tuple[Verified | None, list[str]]:
    """Compare diffusers' result of loading any file with the file's contents.

    is_given: whether the model is the user's own, and not the published one of the file's family.

    Returns the comparison (None for a file without a loader in diffusers), and everything lost,
    rescaled or complained about.

    Raises:
        UsageError: not a whole LoRA, or one that does not fit the model.
    """
    lora = open_lora(path, meta_pipeline.layout)
    lora.check()
    if wrong := list(misfits(lora.adapter, meta_pipeline)):
        if not is_given and is_other_base(wrong, lora.adapter):
            raise UsageError(f"{path} was {other_base(meta_pipeline, wrong)}")
        raise UsageError(f"{path} does not fit {meta_pipeline.source}: {wrong[0]}")
    adapter = fitted(lora.adapter, meta_pipeline)
    if lora.format not in (DIFFUSERS.title, KOHYA.title):
        return None, []
    loaded = load_into_pipeline(lora.path, meta_pipeline, adapter)
    tolerance = TOLERANCE.get(lora.dtype, TOLERANCE[torch.float32])
    count, worst, wrong_ones = compare(adapter, loaded.adapter, tolerance)
    return Verified(lora.path, count, worst), [*loaded.complaints, *wrong_ones]


def _refuse(path: Path, wrong: Sequence[str]) -> None:
    if wrong:
        more = f"\n  … and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise RunError(
            f"{path} was written but does not load as trained; do not use it:\n  "
            + "\n  ".join(wrong[:10])
            + more
        )
