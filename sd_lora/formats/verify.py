"""Does the file do what was trained? Load it into a fresh pipeline and compare every module.

Loaders lose modules and rescale weights with a log line at best, so a line from one is a failure
here, and so is a parameter that was left without a value.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from sd_lora.errors import RunError
from sd_lora.formats.canonical import Adapter, Factors, canonical_name
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
            if A.is_meta or B.is_meta:
                raise RunError(f"{component} {name} was left without a value by the loader")
            factors = Factors(A, B, alpha=layer.scaling[key] * len(A))
            adapter.setdefault(component, {})[canonical_name(component, name)] = factors
    return adapter


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
            delta = want[name].delta()
            error = (have[name].delta() - delta).abs().max() / delta.abs().max().clamp(min=1e-12)
            worst, count = max(worst, float(error)), count + 1
            if not error <= TOLERANCE:
                wrong.append(f"{component} {name} is off by {error:.1%} of its largest entry")
    return count, worst, sorted(wrong)


def verify(path: Path, adapter: Adapter, parts: Parts) -> Verified:
    """Loads a file into a fresh pipeline and compares every module's ΔW with the trained one.

    Raises:
        RunError: a loader's complaint, a module lost, added or left empty, or a ΔW that is off.
    """
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
    wrong = [*complaints, *wrong]
    if wrong:
        more = f"\n  … and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise RunError(
            f"{path} was written but does not load as trained; do not use it:\n  "
            + "\n  ".join(wrong[:10])
            + more
        )
    return Verified(path, count, worst)
