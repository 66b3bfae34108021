"""One base model for several runs: its frozen tensors are in memory once."""

import copy
from collections.abc import Callable, Sequence
from typing import TypeVar

from accelerate import Accelerator
from torch import nn

from sd_lora.config.schema import RunConfig
from sd_lora.models.load import Base, Parts

T = TypeVar("T")


class SharedBase:
    """A base model that is loaded once, and given to each run as modules of its own.

    A run may adapt, merge and move its modules as if it were alone: a parameter that one of them
    exchanges is exchanged there only, and one that is moved is moved for all.

    load: reads the parts of a base for a run.
    """

    def __init__(self, load: Callable[[Base, RunConfig, Accelerator], Parts]) -> None:
        self._load = load
        self._parts: Parts | None = None

    def parts(self, base: Base, config: RunConfig, accelerator: Accelerator) -> Parts:
        """The parts of a run. Text encoders that learn are its own: they are in the precision of
        the run, and frozen ones in float32."""
        if self._parts is None:
            self._parts = self._load(base, config, accelerator)
        encoders = [] if config.trains_text else [*self._parts.text_encoders.values()]
        return with_tensors_of(self._parts, [self._parts.unet, self._parts.vae, *encoders])

    def unet(self) -> nn.Module:
        """One more UNet of the same tensors, without adapters."""
        assert self._parts is not None
        return with_tensors_of(self._parts.unet, [self._parts.unet])

    def let_go(self) -> None:
        """Keep the UNet alone: the runs have the other parts as long as they need them."""
        if self._parts is not None:
            self._parts.text_encoders.clear()
            del self._parts.vae


def with_tensors_of(thing: T, models: Sequence[nn.Module]) -> T:
    """A copy of models, or of an object that holds them, with the same parameters and buffers."""
    tensors = [t for model in models for t in (*model.parameters(), *model.buffers())]
    return copy.deepcopy(thing, {id(t): t for t in tensors})
