"""The end of several processes by an error: told once, by the first to know it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from sd_lora.errors import RunError, UsageError
from sd_lora.training.checkpoint_folders import RESUME

KEY = "sd_lora/told"
"""Key of the launcher's store, under which the first process leaves its error."""


@contextmanager
def told_once() -> Iterator[None]:
    """Mark the errors of a block that another process tells as `told`, before they are raised.

    A process that ends takes the others out of their exchanges: gloo raises in them, and with NCCL
    the launcher ends them. These errors are consequences, and are raised as RunErrors without a
    traceback.

    Raises:
        RunError: in place of a lost connection; not yet told if no process has left an error, as
            when one was killed.
    """
    try:
        yield
    except (UsageError, RunError) as error:
        error.told = _is_told(str(error))
        raise
    except (RuntimeError, ConnectionError) as error:
        if not _has_joined():
            raise
        lost = "peer" in str(error) or isinstance(error, dist.DistError | ConnectionError)
        told = _is_told("a lost connection" if lost else f"a bug: {error}")
        if not (told or lost):
            raise
        ended = RunError(
            "another process of this run has ended without a message: it was killed, or its "
            f"machine is gone. Continue with the same command and {RESUME}"
        )
        ended.told = told
        raise ended from None


def _has_joined() -> bool:
    """Whether this process has met others; some builds of torch cannot."""
    return dist.is_available() and dist.is_initialized()


def _is_told(error: str) -> bool | None:
    """Whether another process has left an error; else this one's is left. None: there is one
    process, or the launcher is gone."""
    if not _has_joined():
        return None
    from torch.distributed import distributed_c10d

    try:
        store = distributed_c10d._get_default_store()
        ours = f"{dist.get_rank()}: {error}"
        return store.compare_set(KEY, "", ours).decode() != ours
    except (RuntimeError, ConnectionError):
        return None
