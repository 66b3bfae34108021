"""Tensors and models on their way from the host to a card."""

from collections.abc import Iterable
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
    """The model on a device, but for its tensors that wait elsewhere. A module that learns does not
    go to the CPU: what an optimiser and averages have of it stays where it is."""
    kept = set[Tensor]()
    for module in model.modules() if torch.device(device).type == "cpu" else ():
        if any(p.requires_grad for p in module.parameters(recurse=False)):
            kept.update((*module.parameters(recurse=False), *module.buffers(recurse=False)))
    tensors = [*model.parameters(), *model.buffers()]
    moved = [t for t in tensors if not (hasattr(t, _WAITS) or t in kept)]
    if len(moved) == len(tensors):
        return model.to(device)
    for tensor in moved:
        tensor.data = tensor.data.to(device)
        if tensor.grad is not None:
            tensor.grad.data = tensor.grad.data.to(device)
    return model


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device. The host does not wait for a CUDA device, which has work of the step
    before: a copy from memory that the system may move would.

    Pinned memory comes from torch's own cache, which gives it out again once the card has read it.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
