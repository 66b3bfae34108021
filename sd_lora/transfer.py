"""Tensors on their way from the host to a card."""

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device. The host does not wait for a CUDA device, which has work of the step
    before: a copy from memory that the system may move would.

    Pinned memory comes from torch's own cache, which gives it out again once the card has read it.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
