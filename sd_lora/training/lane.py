"""Copies between the memory of a device and that of the CPU, beside the device's computation.

A card has a stream of its own for them; on every other device a copy is done when it is asked for.
https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-streams
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from sd_lora.files import mib
from sd_lora.training.out_of_memory import is_out_of_memory


class Lane:
    """The way of copies between a device and the CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def home(self, size: int) -> Tensor:
        """Bytes on the CPU, pinned where a card reads them; none are counted on the meta device."""
        if self.device.type == "meta":
            with _disable_current_modes():
                return self.there(size)
        pinned = self.device.type == "cuda"
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        except RuntimeError as error:
            if not (pinned and is_out_of_memory(error)):
                raise
            raise MemoryError(  # CUDA's words for it are those of a full card
                f"{mib(size)} of the CPU's memory could not be pinned for what waits there: {error}"
            ) from None

    def there(self, size: int) -> Tensor:
        """Bytes on the device."""
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def copy(self, to: Tensor, source: Tensor) -> Any:
        """Copy a tensor; returns the event for `join`, None where it is done already."""
        if self.stream is None:
            if self.device.type != "meta":
                to.copy_(source)
            return None
        # `to` may have its memory of a tensor that kernels before this still read
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            to.copy_(source, non_blocking=True)
            return self.stream.record_event()

    def join(self, event: Any) -> None:
        """Let all that is computed from now on wait for a copy."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)
