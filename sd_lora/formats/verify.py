"""Does the file do what was trained? Load it into a fresh pipeline and compare every module.

Loaders lose modules and rescale weights with a log line at best, so a line from one is a failure
here, and so is a parameter that was left without a value.
"""

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sd_lora.adapters.deltas import Delta
from sd_lora.adapters.state import make_delta
from sd_lora.errors import RunError
from sd_lora.formats.canonical import Adapter, canonical_name
from sd_lora.formats.files import LYCORIS_END, read_adapter
from sd_lora.models.load import Parts, bare_pipeline, without_bars

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

TOLERANCE = 1e-5
"""Largest accepted error of a ΔW, relative to its own largest entry; float32 gives 1e-7."""

_LOADERS = ("diffusers", "transformers", "peft")


@dataclass(frozen=True)
class Verified:
    """One verified file: how many modules were compared, and the largest relative error of a ΔW."""

    path: Path
    modules: int
    worst_error: float


class _Collector(logging.Handler):
    def __init__(self, messages: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(f"{record.name}: {record.getMessage()}")


@contextmanager
def captured_complaints() -> Iterator[list[str]]:
    """Collects every warning that the loaders log or raise within a `with` block, unprinted."""
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


def loaded_adapter(pipeline: "StableDiffusionPipeline") -> Adapter:
    """Returns the adapter that a pipeline's peft layers hold.

    Raises:
        RunError: a parameter on the meta device, which would compute with uninitialised memory.
    """
    adapter: Adapter = {}
    for component in ("unet", "text_encoder"):
        layer: Any
        for name, layer in getattr(pipeline, component).named_modules():
            if not (isinstance(getattr(layer, "lora_A", None), nn.ModuleDict) and layer.lora_A):
                continue  # no peft layer, or one whose adapter was taken out again
            (key,) = layer.lora_A.keys()
            A, B = layer.lora_A[key].weight.detach(), layer.lora_B[key].weight.detach()
            parts = {"lora_A": A, "lora_B": B, "alpha": torch.tensor(layer.scaling[key] * len(A))}
            if key in layer.lora_magnitude_vector:
                parts["magnitude"] = layer.lora_magnitude_vector[key].weight.detach().flatten()
            if any(tensor.is_meta for tensor in parts.values()):
                raise RunError(f"{component} {name} was left without a value by the loader")
            delta = make_delta(name, parts)
            adapter.setdefault(component, {})[canonical_name(component, name)] = delta
    return adapter


def _errors(want: Delta, have: Delta) -> list[float]:
    """Returns the relative errors of ΔW and, of a weight-decomposed update, of its magnitude."""

    def error(a: Tensor, b: Tensor) -> float:
        if a.numel() != b.numel():
            return float("inf")
        return float((b.reshape(a.shape) - a).abs().max() / a.abs().max().clamp(min=1e-12))

    # in float64, so that comparing adds no error
    exact = [copy.deepcopy(delta).double() for delta in (want, have)]
    errors = [error(exact[0].weight(), exact[1].weight())]
    magnitudes = [delta.magnitude for delta in exact]
    if magnitudes[0] is not None and magnitudes[1] is not None:
        errors.append(error(magnitudes[0], magnitudes[1]))
    elif magnitudes[0] is not magnitudes[1]:
        errors.append(float("inf"))
    return errors


@torch.no_grad()
def compare(trained: Adapter, loaded: Adapter) -> tuple[int, float, list[str]]:
    """Returns (modules compared, largest relative error of a ΔW, what is wrong).

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
                if not error <= TOLERANCE:
                    wrong.append(f"{component} {name} is off by {error:.1%} of its largest entry")
    return count, worst, sorted(wrong)


def verify(path: Path, adapter: Adapter, parts: Parts) -> Verified:
    """Loads a file into a fresh pipeline and compares every module's ΔW with the trained one.

    A LyCORIS file, for which diffusers has no loader, is read back and compared.

    Raises:
        RunError: a loader's complaint, a module lost, added or left empty, or a ΔW that is off.
    """
    if path.name.endswith(LYCORIS_END):
        return _verify_reading(path, adapter, parts)
    pipeline = bare_pipeline(parts)
    with captured_complaints() as complaints, without_bars():
        try:
            pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
        except (RuntimeError, ValueError, LookupError, TypeError) as error:
            complaints.append(" ".join(str(error).split()))
    count, worst, wrong = compare(adapter, loaded_adapter(pipeline))
    # diffusers says of every component without keys that there are none: right if it has no adapter
    expected = [f"prefix='{c}'" for c in ("unet", "text_encoder") if c not in adapter]
    complaints = [
        c for c in complaints if not ("No LoRA keys" in c and any(e in c for e in expected))
    ]
    _refuse(path, [*complaints, *wrong])
    return Verified(path, count, worst)


def _verify_reading(path: Path, adapter: Adapter, parts: Parts) -> Verified:
    """diffusers has no loader for LyCORIS' methods: the file is read back instead."""
    models = {"unet": parts.unet, "text_encoder": parts.text_encoder}
    count, worst, wrong = compare(adapter, read_adapter(path, models))
    _refuse(path, wrong)
    return Verified(path, count, worst)


def _refuse(path: Path, wrong: list[str]) -> None:
    if wrong:
        more = f"\n  … and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise RunError(
            f"{path} was written but does not load as trained; do not use it:\n  "
            + "\n  ".join(wrong[:10])
            + more
        )
