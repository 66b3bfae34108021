"""Recorders of a work: on a CUDA device its kernels, on a CPU its operators."""

import gc
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from operator import attrgetter, getitem
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

Work = Callable[[], Sequence[Tensor]]
"""A computation on tensors that stay where they are, with its results."""

aten = torch.ops.aten

READS = (aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default)
"""Operators by which the host reads a tensor: a recorded number would be the same for ever."""


class Recorder(ABC):
    """Records works.

    exact: whether the same bits are asked for as of a plain pass; a run then says nothing of it but
    why it goes on without. least: passes for which a recording is to be used, several times those
    that make its own time up. slowest: seconds of a plain pass beyond which the gain is a few
    hundredths. compiled: whether compiled programs can be recorded.
    """

    exact: ClassVar[bool] = False
    least: ClassVar[int] = 0
    slowest: ClassVar[float] = math.inf
    compiled: ClassVar[bool] = True

    @abstractmethod
    def __call__(self, work: Work) -> Work:
        """Record a work; returns a function that does it once more."""


class CudaRecorder(Recorder):
    """Records on the current CUDA device; all recordings compute in the same memory."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Work) -> Work:
        """Record a work, which is not done meanwhile."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        gc.collect()  # a tensor that is collected while a graph is recorded would spoil it
        results: Sequence[Tensor] = ()
        try:
            # other threads, which load images, may ask for memory meanwhile
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                results = work()
        except BaseException:  # torch leaves its own stream in place where the end fails, too
            torch.cuda.set_stream(stream)
            self._release(graph, stream.device_index)
            raise

        def replay() -> Sequence[Tensor]:
            graph.replay()
            return results

        return replay

    def _release(self, graph: Any, device: int) -> None:
        """Give up the memory of a graph whose recording the card has not ended: torch 2.13 keeps
        it for the life of the process (pytorch#190348 mends that), and asks for an end first."""
        try:
            graph.pool()  # of an ended one, which gives it up by itself
        except Exception:
            private: Any = torch._C
            for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
                with suppress(Exception):
                    getattr(private, name)(device, self.pool)


class OperatorRecorder(Recorder):
    """Records a work's operators on a CPU, below autograd, as one program without modules and
    graphs of gradients; each of them gives the same bits as in the work.

    On the embedded base a recording takes 0.3 s, and a pass of 52 ms 12 less. A pass of a large
    model has hardly more operators, and is arithmetic.
    """

    exact, least, slowest, compiled = True, 100, 0.5, False

    def __call__(self, work: Work) -> Work:
        """Record a work, which is done meanwhile.

        A number that comes from the host without an operator (`tolist`) is the same in each replay:
        another batch tells.

        Raises:
            RuntimeError: an operator gives the host a tensor's number, or a tensor is made of
                several numbers of the host, or read as another dtype.
        """
        with Operators() as operators:
            results = work()
        program, tensors = operators.program(results)

        @torch.no_grad()
        def replay() -> Sequence[Tensor]:
            return program(*tensors)

        return replay


Form = tuple[Any, ...]
"""Where in its storage a tensor stands, and how. Autograd gives saved tensors back as other
objects, so a tensor is known by its storage and its form."""


def storage_of(tensor: Tensor) -> object:
    """The identity of a tensor's storage."""
    return tensor.untyped_storage()._cdata


def form_of(tensor: Tensor) -> Form:
    """The form of a tensor in its storage."""
    return tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), tensor.dtype


class Operators(TorchDispatchMode):
    """Keeps all operators that are called within it, as a graph.

    Views are none of them: what reads one gets it from the tensor that was made with its storage,
    and those of tensors that stay are taken once.
    """

    def __init__(self) -> None:
        super().__init__()
        self._graph = Graph()
        self._made: dict[object, dict[Form, Node]] = {}  # storages of the work's own tensors
        self._stays: dict[tuple[object, Form], Node] = {}  # all others that it reads or writes
        self._staying: list[Tensor] = []  # the same

    def program(self, results: Sequence[Tensor]) -> tuple[Callable[..., Any], list[Tensor]]:
        """A function that computes the results once more, and its arguments."""
        self._graph.output(tuple(self._node(tensor) for tensor in results))
        return compiled(self._graph), self._staying

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in READS:
            raise RuntimeError(f"{func} gives the host a number")
        if func is aten.lift_fresh.default and args[0].dim():
            raise RuntimeError("a tensor is made of numbers of the host")
        if func is aten.lift_fresh.default:  # one number, which stays; torch made it by no operator
            self._made.pop(storage_of(args[0]), None)
        out = func(*args, **kwargs)
        read = {storage_of(tensor) for tensor in tensors_in((args, kwargs))}
        if not func._schema.is_mutable and all(storage_of(t) in read for t in tensors_in(out)):
            return out  # views, or numbers of the form
        node = self._graph.call_function(func, *tree_map_only(Tensor, self._node, (args, kwargs)))
        for index, tensor in enumerate([out] if isinstance(out, Tensor) else out or ()):
            if isinstance(tensor, list | tuple):
                raise RuntimeError(f"{func} gives lists of tensors beside others")
            if isinstance(tensor, Tensor) and storage_of(tensor) not in read:
                part = (node, index)
                of_tensor = node if tensor is out else self._graph.call_function(getitem, part)
                self._made[storage_of(tensor)] = {form_of(tensor): of_tensor}
        return out

    def _node(self, tensor: Tensor) -> Node:
        """The node of a tensor that is read."""
        storage, form = storage_of(tensor), form_of(tensor)
        if storage not in self._made:
            return self._stays.get((storage, form)) or self._stay(tensor, storage, form)
        forms = self._made[storage]
        if form not in forms:
            (*_, dtype), node = next(iter(forms.items()))
            *place, wanted = form
            if dtype != wanted:
                raise RuntimeError("a tensor's bytes are read as another dtype")
            forms[form] = self._graph.call_function(torch.as_strided, (node, *place))
        return forms[form]

    def _stay(self, tensor: Tensor, storage: object, form: Form) -> Node:
        """The node of a tensor that stays where it is."""
        first = next(iter(self._graph.nodes), None)
        with self._graph.inserting_before(first):
            node = self._stays[storage, form] = self._graph.placeholder(f"t{len(self._stays)}")
        self._staying.insert(0, tensor.detach())
        return node


def tensors_in(values: Any) -> Iterator[Tensor]:
    """The tensors among an operator's arguments or results."""
    return (leaf for leaf in tree_iter(values) if isinstance(leaf, Tensor))


def compiled(graph: Graph) -> Callable[..., Any]:
    """A graph as a function that calls torch's operators without looking their names up, which is
    a twentieth of the embedded base's pass. (A view by `torch.as_strided` takes 1.0 µs, and by the
    operator 2.6.)"""
    code = graph.python_code("self")
    known: dict[str, Any] = {**code.globals}

    def own(found: re.Match[str]) -> str:
        name, function = found[0].replace(".", "_"), attrgetter(found[1])(torch)
        # of an operator the one without a check of its arguments' classes
        known[name] = getattr(function, "_op", function)
        return name

    source = re.sub(r"\btorch\.(ops\.\w+\.\w+\.\w+|as_strided)\b", own, code.src)
    exec(source, known)  # noqa: S102  as torch.fx does with it
    return partial(known["forward"], None)


def told(error: BaseException) -> str:
    """The kind and the first line of the error behind others: the end of a spoiled recording raises
    one of its own."""
    while error.__context__ is not None:
        error = error.__context__
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
