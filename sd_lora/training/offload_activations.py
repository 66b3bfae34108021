"""Activations that wait in the memory of the CPU from the forward pass to the backward pass.

A forward pass falls into laps, from one start of a block of the UNet to the next. Tensors that
autograd saves in a lap are copied to the CPU while it and the next one compute, and then leave the
device. They come back before the backward pass reaches their lap, while the lap after it computes;
so the saved tensors of two laps at most are there at once. With gradient checkpointing a block
saves its inputs alone; what it saves when it is computed again stays on the device for its own
backward pass.

By `torch.autograd.graph.saved_tensors_hooks`. A storage is copied once, however many nodes save
views of it, and one that something else still holds is not copied back.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sd_lora.training.lane import Lane

LEAST = 2**20
"""Bytes of a storage that is worth a copy: smaller ones take the bus less time than the host needs
to ask for them, and are few beside the others."""


class Parked:
    """A storage of a device whose bytes are on the CPU, from where they come back.

    there: its bytes on the device, while they are needed.
    """

    def __init__(self, tensor: Tensor, lane: Lane) -> None:
        storage = tensor.untyped_storage()
        self.lane, self.size, self._origin = lane, storage.nbytes(), weakref.ref(storage)
        self.there: Tensor | None = None
        self.event: Any = None
        self.home = lane.home(self.size)
        self.event = lane.copy(self.home, _bytes_of(storage, tensor.device))

    @property
    def origin(self) -> Any:
        """The storage itself, while anything holds it."""
        return self._origin()

    def set_out(self) -> None:
        """Begin to copy the bytes back."""
        if self.there is None and self.origin is None:
            self.there = self.lane.there(self.size)
            self.event = self.lane.copy(self.there, self.home)

    def storage(self) -> Any:
        """The storage of the bytes on the device."""
        if (origin := self.origin) is not None:
            return origin
        self.set_out()
        assert self.there is not None
        self.arrive()
        return self.there.untyped_storage()

    def arrive(self) -> None:
        """Let all that is computed from now on wait for the copy."""
        self.lane.join(self.event)
        self.event = None

    def leave(self) -> None:
        """Free the bytes on the device; those on the CPU stay."""
        self.arrive()
        self.there = None

    def __del__(self) -> None:
        self.lane.join(self.event)  # else another tensor would get memory that is still written


def _bytes_of(storage: Any, device: torch.device) -> Tensor:
    empty = torch.empty(0, dtype=torch.uint8, device=device)
    return empty.set_(storage, 0, (storage.nbytes(),), (1,))


@dataclass(frozen=True)
class View:
    """A saved tensor, as a view of a parked storage."""

    parked: Parked
    dtype: torch.dtype
    start: int
    shape: torch.Size
    stride: tuple[int, ...]

    def whole(self) -> Tensor:
        """The tensor again, on the device."""
        storage = self.parked.storage()
        empty = torch.empty(0, dtype=self.dtype, device=self.parked.lane.device)
        return empty.set_(storage, self.start, self.shape, self.stride)


@dataclass(eq=False)
class Lap:
    """A part of a forward pass. before: the lap before it. saved: its storages, which the graph
    holds."""

    before: "Lap | None" = None
    saved: "weakref.WeakSet[Parked]" = field(default_factory=weakref.WeakSet)


class Activations:
    """A UNet whose saved activations wait on the CPU.

    Args:
        unet: its modules are hooked from now on.
        blocks: name → block, between whose starts the laps are.
        kept: tensors that stay: parameters, buffers, working copies.
        device: of the run.
    """

    def __init__(
        self,
        unet: nn.Module,
        blocks: Mapping[str, nn.Module],
        kept: Callable[[], Iterable[Tensor]],
        device: torch.device,
    ) -> None:
        self.lane, self._kept = Lane(device), kept
        self.lap: Lap | None = None  # of the forward pass that is on its way
        self._stays: set[int] = set()
        self._parked: dict[int, weakref.ref[Parked]] = {}  # storage → itself
        # of the lap before, and of this one: the computation would wait for the last copy of a lap
        # that has only just ended
        self._leaving: tuple[list[tuple[Parked, Tensor]], ...] = ([], [])
        self.near: list[Lap] = []  # whose bytes are on the device
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        unet.register_forward_pre_hook(lambda *_: self._begin())
        unet.register_forward_hook(lambda *_: self._end(), always_call=True)
        for block in blocks.values():
            block.register_forward_pre_hook(lambda *_: self._next_lap())
            block.register_forward_hook(lambda _, __, out: self._watch(out))

    def _begin(self) -> None:
        self._end()  # of a pass that a signal has ended
        if torch.is_grad_enabled():
            self._stays = {t.untyped_storage()._cdata for t in self._kept()}
            self._parked.clear()
            self.lap, self.near = Lap(), []
            self._hooks.__enter__()

    def _end(self) -> None:
        if self.lap is not None:
            self._hooks.__exit__()
            self._let_go()
            self._let_go()
            self.lap = None

    def _next_lap(self) -> None:
        if self.lap is not None:  # else a block is computed again, or without gradients
            self._let_go()
            self.lap = Lap(self.lap)

    def _let_go(self) -> None:
        """Let the tensors of the lap before the last one leave the device when they are copied."""
        gone, last = self._leaving
        for parked, _ in gone:
            parked.arrive()
        self._leaving = last, []

    def _watch(self, out: Tensor) -> None:
        """Bring the lap of a block when its backward pass is about to begin."""
        if self.lap is not None and out.requires_grad:
            out.register_hook(lambda _, lap=self.lap: self._reach(lap))

    def _reach(self, lap: Lap) -> None:
        """Have the saved tensors of a lap on the device, those of the lap before on their way."""
        following = [lap] if lap.before is None else [lap, lap.before]
        needed = [parked for near in following for parked in near.saved]
        for parked in {p for near in self.near for p in near.saved} - {*needed}:
            parked.leave()
        for parked in needed:
            parked.set_out()
        self.near = following

    def _pack(self, tensor: Tensor) -> Tensor | View:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if (
            self.lap is None
            or tensor.device.type != self.lane.device.type
            or storage.nbytes() < LEAST
            or key in self._stays
        ):
            # an output that is saved as itself would hold the graph that holds it
            return tensor if tensor.is_leaf else tensor.detach()
        known = self._parked.get(key)
        parked = known() if known else None
        if parked is None or parked.origin is None:  # else another storage had its place
            parked = Parked(tensor, self.lane)
            self._parked[key] = weakref.ref(parked)
            self._leaving[-1].append((parked, tensor))
        self.lap.saved.add(parked)
        return View(
            parked, tensor.dtype, int(tensor.storage_offset()), tensor.shape, tensor.stride()
        )

    def _unpack(self, saved: Tensor | View) -> Tensor:
        return saved.whole() if isinstance(saved, View) else saved
