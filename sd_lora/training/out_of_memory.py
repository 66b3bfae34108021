"""Out of memory: known by the errors of any allocator, and told with the flags that take less."""

import errno
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache

from sd_lora.config.rows import LOWER, Work
from sd_lora.config.schema import OPTIONS, RunConfig
from sd_lora.errors import RunError, UsageError
from sd_lora.training.processes import with_half_or_full


class OutOfMemory(RunError):
    """A device, or the machine, without enough memory for a part of a run."""


_TEXTS = (
    "out of memory",  # MPS, and drivers
    "not enough memory",  # CPU on Windows
    "can't allocate memory",  # CPU on Linux: DefaultCPUAllocator
    "cannot allocate memory",  # safetensors, by the system's words
    "alloc_failed",  # CUBLAS_STATUS_ALLOC_FAILED, CUDNN_STATUS_ALLOC_FAILED
    "bad_alloc",
    "could not create a primitive",  # oneDNN on a CPU, of scratch memory
    "unable to find an engine to execute",  # cuDNN, which tries all, of scratch memory
    "unable to find a valid cudnn algorithm",
)
"""Words of allocators whose errors have no class of their own."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is used up."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if not isinstance(error, Exception) or isinstance(error, UsageError | RunError):
        return False
    words = str(error).lower()
    return any(text in words for text in _TEXTS)


def wanted(error: BaseException) -> str:
    """The size that an allocator refused, in words: "2.00 GiB could not be allocated"."""
    found = re.search(r"ried to allocate ([\d.]+) ?([KMGT]iB|bytes)", str(error))
    if found is None:
        return "a tensor could not be allocated"
    return f"{found[1]} {found[2]} could not be allocated"


def let_go(error: BaseException | None) -> None:
    """Free the tensors that the frames of an error hold, and the allocator's cached blocks."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__
    clear_device_cache(garbage_collection=True)


def remedies(config: RunConfig, work: Work) -> list[tuple[str, Any]]:
    """Options that take less memory in some work, with the value that does, by their cost; without
    those that a run has already."""
    found = {
        name: option.less_memory[work]
        for name, option in OPTIONS.items()
        if work in option.less_memory
    }
    config = with_half_or_full(config)
    ranked = sorted((place, name, value) for name, (place, value) in found.items())
    return [(name, value) for _, name, value in ranked if getattr(config, name) != value]


def flag(name: str, value: object) -> str:
    """A remedy as a message has it: "--fit auto", "--gradient_checkpointing", "a lower --rank"."""
    if value == LOWER:
        return f"a lower --{name}"
    return f"--{name}" if value is True else f"--{name} {value}"


@contextmanager
def told_by(error_of: Callable[[BaseException], OutOfMemory]) -> Iterator[None]:
    """Raise an error for people where memory is used up. error_of: makes it of the allocator's."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        let_go(error)
        raise error_of(error) from None


def memory_for(work: Work, config: RunConfig) -> AbstractContextManager[None]:
    """A context that raises OutOfMemory, with remedies, where memory is used up in some work."""

    def error_of(error: BaseException) -> OutOfMemory:
        on_card = torch.cuda.is_available()  # what a GPU alone can do helps nobody else
        found = [(n, v) for n, v in remedies(config, work) if on_card or not OPTIONS[n].without_gpu]
        flags = [flag(name, value) for name, value in found]
        return OutOfMemory(
            f"out of memory while {work}: {wanted(error)}. Less memory: "
            f"{'; '.join([*flags, 'close other programs that hold it'])}"
        )

    return told_by(error_of)
