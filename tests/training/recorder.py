"""A recorder of operators on the CPU that keeps what a CUDA graph keeps of a work: the operators
with the tensors that they read and write, and nothing of Python. Each tensor has its own memory, so
it proves nothing of a card's pool, streams and generators."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
READS = (aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default)
"""Operators by which the host reads a tensor: a recorded number would be the same for ever."""


class _Operators(TorchDispatchMode):
    """Keeps all operators that are called within it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        leaves = tree_leaves(out)
        if func in READS:
            raise RuntimeError(f"{func} gives the host a number")
        if func is torch.ops.aten.lift_fresh.default and args[0].dim():
            raise RuntimeError("a tensor is made of numbers of the host")
        self.calls.append((func, args, kwargs or {}, [x for x in leaves if isinstance(x, Tensor)]))
        return out


class Recorder:
    """`record(work)` does a work and returns what does it again: its operators alone, on the same
    tensors. recorded: number of works. replayed: of the times that any of them was done again."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        with _Operators() as kept:
            work()
        self.recorded += 1

        @torch.no_grad()
        def replay() -> None:
            self.replayed += 1
            for func, args, kwargs, outs in kept.calls:
                leaves = tree_leaves(func(*args, **kwargs))
                again = [x for x in leaves if isinstance(x, Tensor)]
                for out, new in zip(outs, again, strict=True):
                    # views and operators in place have written where the first ones stand
                    if out.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                        out.detach().copy_(new)

        return replay
