"""What an update is: a method's ΔW behind one registry, and the two rules that compose it.

A method is one class (see `methods`): how its tensors start (`create`) and what ΔW they mean
(`matrix`), in the layout (out, in/groups, k…) of the weight. A rule composes ΔW with the frozen W:

- add:        W' = W + ΔW
- decompose:  W' = m · (W + ΔW) / ‖W + ΔW‖, one magnitude m per output (DoRA, Liu et al. 2024,
  equation 5; its gradient is the true one, without the detached norm of their section 4.3).
"""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

METHODS: dict[str, type["Delta"]] = {}
"""Method name → class. Open: `register_method` adds one."""


def register_method(name: str) -> Callable[[type["Delta"]], type["Delta"]]:
    """Class decorator that adds a method to `METHODS`."""

    def add(method: type[Delta]) -> type[Delta]:
        if name in METHODS:
            raise ValueError(f"method {name!r} is registered already: {METHODS[name].__name__}")
        METHODS[name] = method
        method.method = name
        return method

    return add


class Delta(nn.Module):
    """One weight's update: the method's tensors, their scale s = α/r, perhaps a magnitude.

    Args:
        shape: of the weight, (out, in/groups, k…); None takes the one that the tensors have.
        tensors: the method's tensors by name; below float32 they are raised to it.
        alpha: α; the rank by default, so that s = 1.
        magnitude: m of the rule decompose, (out, 1, …) as peft and LyCORIS have it, or
            (1, in, …) as older LyCORIS files; None for the rule add.

    Raises:
        ValueError: tensors that do not make up a ΔW of this shape.
    """

    method: ClassVar[str] = ""
    tensor_names: ClassVar[tuple[str, ...]] = ()
    frozen: ClassVar[tuple[str, ...]] = ()  # those that are not trained
    cores: ClassVar[tuple[str, ...]] = ()  # those that carry a k×k kernel by themselves: tucker
    rank: int | None = None  # None: the method has no rank and no scale

    def __init__(
        self,
        shape: tuple[int, ...] | None,
        tensors: Mapping[str, Tensor],
        alpha: float | None = None,
        magnitude: Tensor | None = None,
    ) -> None:
        super().__init__()
        for name in self.tensor_names:
            tensor = tensors.get(name)
            if tensor is not None:
                tensor = _at_least_float32(tensor)
            if name in self.frozen or tensor is None:
                self.register_buffer(name, tensor)
            else:
                self.register_parameter(name, nn.Parameter(tensor))
        self.rank = self._rank()
        self.alpha = float((self.rank or 1) if alpha is None else alpha)
        self.rank_dropout, self.dropping = 0.0, False
        self.register_parameter("magnitude", None)
        if magnitude is not None:
            self.magnitude = nn.Parameter(_at_least_float32(magnitude))
        self.fit(shape)

    @classmethod
    def create(
        cls, shape: tuple[int, ...], rank: int, generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        """Returns the initial tensors, on the CPU; options are keyword-only arguments."""
        raise NotImplementedError

    def _rank(self) -> int | None:
        return None

    def matrix(self) -> Tensor:
        """Returns ΔW / s from the tensors alone, reshapable to (out, in/groups, k…)."""
        raise NotImplementedError

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """Returns (A, B) with ΔW = s·B·A if there is such a form: the cheap way to apply it.

        A: (r, in/groups, k…), B: (out, r, 1…). In a layer's forward pass under `rank_dropout`, a
        draw of it.
        """
        return None

    def zero_input_row(self, index: int) -> None:
        """Keeps ΔW at zero for one input, an embedding's padding row, without a mask.

        Its column of the inner factors is set to zero, and the look-up gives it no gradient.
        """
        raise ValueError(f"{self.method} cannot leave out one row, and this one has a padding_idx")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank if self.rank else 1.0

    def weight(self) -> Tensor:
        """Returns ΔW in the weight's shape, in the dtype of the tensors, under autocast too: what
        is rounded there is the product with x, as it will be for the merged weight."""
        with unrounded(next(self.parameters())):
            return (self.scale * self.matrix()).reshape(self.shape)

    def compose(self, W: Tensor, strength: float = 1.0) -> Tensor:
        """Returns W', at least in float32; with a strength k, W + k·(W' − W)."""
        delta = self.weight()
        W = W.to(torch.promote_types(W.dtype, delta.dtype))
        if self.magnitude is None:
            return W + (delta if strength == 1 else strength * delta)
        V = W + delta
        composed = V * (self.magnitude / self._norm(V))
        return composed if strength == 1 else W + strength * (composed - W)

    def decompose(self, W: Tensor) -> None:
        """Takes the rule decompose: m starts as the norm of each output's weights in W + ΔW."""
        with torch.no_grad():
            V = W.to(torch.promote_types(torch.float32, W.dtype)) + self.weight()
            ones = (1,) * (V.dim() - 1)
            self.magnitude = nn.Parameter(V.new_ones(len(V), *ones))
            self.magnitude.copy_(self._norm(V))

    def _norm(self, V: Tensor) -> Tensor:
        """‖V‖ over every dimension that m does not have."""
        over = [d for d, size in enumerate(self.magnitude.shape) if size == 1]
        per_output = self.magnitude.shape[0] == len(V)
        squares = (V * V).flatten(1).sum(1) if per_output else (V * V).sum(over)
        return _root(squares).view(self.magnitude.shape)

    @property
    def lost(self) -> tuple[Tensor, Tensor] | None:
        """A₀ and B₀ if s·B₀·A₀ is what quantisation lost of the weight: LoftQ."""
        return None

    def gain(self, W: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """Returns c = m / ‖W + ΔW‖, (out,), for one m an output and what `low_rank` gave: the
        same draw of it that ΔW x is computed with.

        With it, W'x = c·(W x + ΔW x) needs neither W + ΔW nor its gradient:
        ‖W + sBA‖² = ‖W‖² + 2s ⟨W Aᵀ, B⟩ + s² ⟨B (A Aᵀ), B⟩, row by row.
        """
        assert self.magnitude is not None
        A, B = A.flatten(1), self.scale * B.flatten(1)
        W = W.to(torch.promote_types(W.dtype, A.dtype)).flatten(1)
        with unrounded(W):
            squares = (W * W).sum(1) + (B * (2 * (W @ A.T) + B @ (A @ A.T))).sum(1)
        return self.magnitude.flatten() / _root(squares)

    def fit(self, shape: tuple[int, ...] | None) -> None:
        """Gives ΔW the shape of the weight, (out, in/groups, k…); None: that of the tensors.

        Raises:
            ValueError: ΔW has another number of outputs, or of inputs times kernel.
        """
        with torch.no_grad():
            meta = {n: t.to("meta") for n, t in self.state_dict().items()}
            own = torch.func.functional_call(self, meta, strict=False)
        natural, own_shape = shape is None, self._natural_shape(own)
        shape = own_shape if shape is None else tuple(shape)
        rows, columns = own.shape[0], own[0].numel()
        if (rows, columns) != (shape[0], math.prod(shape[1:])):
            raise ValueError(f"ΔW is {rows}×{columns} and the weight {shape}")
        if len(own_shape) > 2 and _kernel(own_shape) != _kernel(shape):
            raise ValueError(f"ΔW is {own_shape} and the weight {shape}")
        self.shape, ones = shape, (1,) * (len(shape) - 1)
        m = self.magnitude
        if m is not None and m.dim() == 0:
            raise ValueError("a magnitude that is one number for the whole weight")
        if m is None:
            return
        if natural:  # (1, in, …) tells little before the kernel is known
            if not (m.shape[0] == m.numel() == rows or m.shape[0] == 1 <= m.numel() <= columns):
                raise ValueError(f"a magnitude of {tuple(m.shape)} for ΔW of {rows}×{columns}")
            return
        if m.shape[0] == m.numel() == rows:
            m.data = m.data.reshape(rows, *ones)
        elif ones and m.shape[0] == 1 and m.numel() == shape[1]:
            m.data = m.data.reshape(1, shape[1], *ones[1:])
        else:
            raise ValueError(f"a magnitude of {tuple(m.shape)} for the weight {shape}")

    def _natural_shape(self, matrix: Tensor) -> tuple[int, ...]:
        return tuple(matrix.shape)

    def forward(self) -> Tensor:
        """Returns `matrix()`."""
        return self.matrix()

    def norm(self) -> Tensor:
        """Returns the Frobenius norm of ΔW."""
        return torch.linalg.vector_norm(self.weight())

    def shrink(self, ratio: float) -> None:
        """Multiplies ΔW by `ratio`, spread evenly over the trained tensors whose product it is."""
        factors = [p for name, p in self.named_parameters() if name != "magnitude"]
        with torch.no_grad():
            for factor in factors:
                factor.mul_(ratio ** (1 / len(factors)))

    def tensors(self) -> dict[str, Tensor]:
        """Returns the method's tensors, trained and frozen, and the magnitude: all but alpha."""
        return {k: v.detach() for k, v in self.state_dict(keep_vars=True).items()}

    def _drop_ranks(self, factor: Tensor, dim: int = 0) -> Tensor:
        """Zeroes ranks with probability p and divides the rest by 1 − p, in a layer's forward pass
        in training alone: what is merged, measured or asked for then is the update itself."""
        p = self.rank_dropout
        if not (p and self.dropping):
            return factor
        shape = [1] * factor.dim()
        shape[dim] = -1
        keep = torch.rand(factor.shape[dim], device=factor.device) >= p
        return factor * (keep.to(factor.dtype) / (1 - p)).view(shape)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Delta":
        """Moves and casts as any module, but never below float32: `model.half()` halves the base
        and leaves the trained tensors their bits."""

        def keep_masters(t: Tensor) -> Tensor:
            moved = fn(t)
            if t.is_floating_point() and moved.dtype.itemsize < t.dtype.itemsize:
                return t.to(moved.device, torch.promote_types(torch.float32, moved.dtype))
            return moved

        return super()._apply(keep_masters, recurse)

    def extra_repr(self) -> str:
        rule = "add" if self.magnitude is None else "decompose"
        return f"{self.method}, rank={self.rank}, alpha={self.alpha:g}, {rule}"


def unrounded(t: Tensor) -> AbstractContextManager[Any]:
    """Returns a context without autocast where `t` is; a meta tensor's device has none."""
    return nullcontext() if t.is_meta else torch.autocast(t.device.type, enabled=False)


def _kernel(shape: tuple[int, ...]) -> list[int]:
    """Returns the kernel without trailing ones: peft pads a Conv1d's to two dimensions."""
    kernel = list(shape[2:])
    while kernel and kernel[-1] == 1:
        kernel.pop()
    return kernel


def _root(squares: Tensor) -> Tensor:
    """A row of zeros has a tiny norm, so that m / ‖V‖ is 0 and not 0 / 0."""
    return squares.clamp(min=torch.finfo(squares.dtype).tiny).sqrt()


def _at_least_float32(t: Tensor) -> Tensor:
    # a copy: training must not write into the tensors of the file or state that it came from
    dtype = torch.promote_types(torch.float32, t.dtype)
    return t.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
