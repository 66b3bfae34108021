"""Tensors and models on their way from the host to a card."""

from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)

_WAITS = "sd_lora_waits"
"""Attribute of a tensor that waits; it stays with it when modules around it get other names."""


def let_wait(tensors: Iterable[Tensor]) -> None:
    """Let tensors stay where they are when their model is brought to a device."""
    for tensor in tensors:
        setattr(tensor, _WAITS, True)


def brought(model: Model, device: torch.device | str) -> Model:
    """The model on a device, but for its tensors that wait elsewhere."""
    tensors = _named(model)
    if len(tensors) == len([*model.parameters(), *model.buffers()]):
        return model.to(device)
    for tensor in tensors.values():
        _move(tensor, torch.device(device))
    return model


def put_aside(model: nn.Module) -> None:
    """Move a model to the CPU, but for modules that learn: the optimiser's states and averages of
    them stay where they are."""
    kept = set[Tensor]()
    for module in model.modules():
        if any(p.requires_grad for p in module.parameters(recurse=False)):
            kept.update((*module.parameters(recurse=False), *module.buffers(recurse=False)))
    for tensor in _named(model).values():
        if tensor not in kept:
            _move(tensor, torch.device("cpu"))


def places_of(model: nn.Module) -> dict[str, torch.device]:
    """Name → device of a model's tensors, for `put_back`."""
    return {name: tensor.device for name, tensor in _named(model).items()}


def put_back(model: nn.Module, places: Mapping[str, torch.device]) -> None:
    """Move each tensor of a model to its place; one that has come since stays."""
    for name, tensor in _named(model).items():
        if name in places:
            _move(tensor, places[name])


def _named(model: nn.Module) -> dict[str, Tensor]:
    """Name → tensor of a model, those that wait left out."""
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: tensor for name, tensor in named if not hasattr(tensor, _WAITS)}


def _move(tensor: Tensor, device: torch.device) -> None:
    tensor.data = tensor.data.to(device)
    if tensor.grad is not None:
        tensor.grad.data = tensor.grad.data.to(device)


class Fetched:
    """A tensor on its way from a card to the host, which goes on until it asks for the numbers."""

    def __init__(self, tensor: Tensor) -> None:
        on_cuda = tensor.device.type == "cuda"  # elsewhere the copy is done at once
        self._here = tensor.to("cpu", non_blocking=on_cuda)
        self._done = torch.cuda.Event() if on_cuda else None
        if self._done:
            self._done.record()

    def numbers(self) -> list[float]:
        """The numbers of a tensor of one dimension, for whose copy alone the host waits."""
        if self._done:
            self._done.synchronize()
        return self._here.tolist()


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device. The host does not wait for a CUDA device, which has work of the step
    before: a copy from memory that the system may move would.

    Pinned memory comes from torch's own cache, which gives it out again once the card has read it.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
