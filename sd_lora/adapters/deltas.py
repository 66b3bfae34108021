"""Deltas: ΔW of a weight, by a method, and the two rules that compose it with the frozen W.

A method is one class (see `methods`) with two duties: its initial tensors (`create`), and ΔW from
them (`matrix`), in the weight's layout (out, in/groups, k…). The rules:

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
    """Class decorator: add a method to `METHODS`.

    Files tell a method by the names of its tensors, so no two may share one, but for a class and
    its base, as LoRA-FA and LoRA.

    Raises:
        ValueError: the name is taken, or a tensor name is another method's.
    """

    def add(method: type[Delta]) -> type[Delta]:
        if name in METHODS:
            raise ValueError(
                f"method {name!r} is registered already: {METHODS[name].__name__}; choose "
                "another name"
            )
        for other, known in METHODS.items():
            shared = {*known.tensor_names} & {*method.tensor_names}
            if shared and not issubclass(method, known):
                raise ValueError(
                    f"methods {name!r} and {other!r} both have tensors called {min(shared)}: files "
                    "could not tell them apart; choose other names"
                )
        METHODS[name] = method
        method.method = name
        return method

    return add


class Delta(nn.Module):
    """ΔW of one weight: a method's tensors, their scale s = α/r, and a magnitude with DoRA.

    Args:
        shape: of the weight, (out, in/groups, k…); None: the shape of the tensors.
        tensors: the method's tensors by name; lower precisions are cast to float32.
        alpha: α; by default the rank, so that s = 1.
        magnitude: m of the rule decompose, (out, 1, …) as in peft and LyCORIS, or (1, in, …) as in
            older LyCORIS files; None for the rule add.

    Raises:
        ValueError: tensors that give no ΔW of this shape.
    """

    method: ClassVar[str] = ""
    """The registered name."""
    tensor_names: ClassVar[tuple[str, ...]] = ()
    """The names of all tensors, as in the files."""
    frozen: ClassVar[tuple[str, ...]] = ()
    """The names of the tensors that are not trained."""
    cores: ClassVar[tuple[str, ...]] = ()
    """The names of Tucker cores, the tensors that carry a k×k kernel."""
    of_base: ClassVar[bool] = False
    """True if ΔW is a function of the frozen W: `change` then has it, and `weight` has not."""
    rank: int | None = None
    """r; None for a method without rank, whose scale is 1."""

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
        self.rank_dropout, self.drops_ranks = 0.0, False
        self.register_parameter("magnitude", None)
        if magnitude is not None:
            self.magnitude = nn.Parameter(_at_least_float32(magnitude))
        self.fit(shape)

    @classmethod
    def create(
        cls, shape: tuple[int, ...], rank: int, generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        """Initial tensors by name, on the CPU. Options of a method are keyword-only arguments.

        Args:
            shape: of the weight, (out, in/groups, k…).
            rank: r.
            generator: of random numbers, on the CPU.
        """
        raise NotImplementedError

    def _rank(self) -> int | None:
        """Rank of the tensors; raises ValueError for tensors that do not fit together."""
        return None

    def matrix(self) -> Tensor:
        """ΔW / s from the tensors alone, in any shape with the weight's number of elements."""
        raise NotImplementedError

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """Factors A (r, in/groups, k…) and B (out, r, 1…) with ΔW = s·B·A; None without them.

        A layer with factors never computes ΔW. In its forward pass with `rank_dropout` they are a
        random draw.
        """
        return None

    def zero_input_row(self, index: int) -> None:
        """Set ΔW of one input, an embedding's padding row, to zero in a fresh delta.

        The input's column of the inner factors becomes zero, and stays so: the look-up gives it no
        gradient.

        Raises:
            ValueError: a method whose ΔW cannot leave out one row.
        """
        raise ValueError(
            f"{self.method} cannot leave out one row, and this embedding has a padding_idx: use "
            "another method"
        )

    @property
    def scale(self) -> float:
        """s = α/r, or 1 without rank."""
        return self.alpha / self.rank if self.rank else 1.0

    def weight(self) -> Tensor:
        """ΔW in the weight's shape and the tensors' dtype, also under autocast.

        Autocast rounds the product with x only, as it does for the merged weight.
        """
        with without_autocast(next(self.parameters())):
            return (self.scale * self.matrix()).reshape(self.shape)

    def change(self, W: Tensor) -> Tensor:
        """ΔW on the frozen weight W; of most methods it is the same on any."""
        return self.weight()

    def by_itself(self) -> Tensor:
        """The delta as far as it is known without W: ΔW, or of a method `of_base` the map that
        makes it of W."""
        return self.weight()

    @property
    def needs_base(self) -> bool:
        """Whether W' − W is known on a base alone."""
        return self.of_base or self.magnitude is not None

    def compose(self, W: Tensor, strength: float = 1.0) -> Tensor:
        """W' at the strength 1, else W + strength·(W' − W); float32 or higher."""
        delta = self.change(W)
        W = W.to(torch.promote_types(W.dtype, delta.dtype))
        if self.magnitude is None:
            return W + (delta if strength == 1 else strength * delta)
        V = W + delta
        composed = V * (self.magnitude / self._norm_like_magnitude(V))
        return composed if strength == 1 else W + strength * (composed - W)

    def init_magnitude(self, W: Tensor) -> None:
        """Switch to the rule decompose: m starts as the norm of each output's row of W + ΔW."""
        with torch.no_grad():
            V = W.to(torch.promote_types(torch.float32, W.dtype)) + self.change(W)
            ones = (1,) * (V.dim() - 1)
            self.magnitude = nn.Parameter(V.new_ones(len(V), *ones))
            self.magnitude.copy_(self._norm_like_magnitude(V))

    def _norm_like_magnitude(self, V: Tensor) -> Tensor:
        """‖V‖ over all dimensions of size 1 in m, in m's shape."""
        over = [d for d, size in enumerate(self.magnitude.shape) if size == 1]
        per_output = self.magnitude.shape[0] == len(V)
        squares = (V * V).flatten(1).sum(1) if per_output else (V * V).sum(over)
        return _safe_sqrt(squares).view(self.magnitude.shape)

    @property
    def quantization_residual(self) -> tuple[Tensor, Tensor] | None:
        """A₀ and B₀ if s·B₀·A₀ is the weight's quantisation error (LoftQ), else None."""
        return None

    def output_scale(self, W: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """c = m / ‖W + ΔW‖, (out,), for one m an output.

        With it, W'x = c·(W x + ΔW x) needs neither W + ΔW nor its gradient:
        ‖W + sBA‖² = ‖W‖² + 2s ⟨W Aᵀ, B⟩ + s² ⟨B (A Aᵀ), B⟩, row by row.

        Args:
            W: the frozen weight.
            A, B: from `low_rank`, the same draw as in ΔW x.
        """
        assert self.magnitude is not None
        A, B = A.flatten(1), self.scale * B.flatten(1)
        W = W.to(torch.promote_types(W.dtype, A.dtype)).flatten(1)
        with without_autocast(W):
            squares = (W * W).sum(1) + (B * (2 * (W @ A.T) + B @ (A @ A.T))).sum(1)
        return self.magnitude.flatten() / _safe_sqrt(squares)

    def fit(self, shape: tuple[int, ...] | None) -> None:
        """Give ΔW the shape of the weight, (out, in/groups, k…); None: the shape of the tensors.

        Raises:
            ValueError: another number of outputs, or of inputs times kernel size; a magnitude of
                another shape.
        """
        matrix = self._matrix_shape()
        from_tensors, own_shape = shape is None, self._shape_of(matrix)
        shape = own_shape if shape is None else tuple(shape)
        rows, columns = matrix[0], math.prod(matrix[1:])
        if (rows, columns) != (shape[0], math.prod(shape[1:])):
            raise ValueError(f"ΔW is {rows}×{columns} and the weight {shape}")
        if len(own_shape) > 2 and _kernel(own_shape) != _kernel(shape):
            raise ValueError(f"ΔW is {own_shape} and the weight {shape}")
        self._fit_magnitude(shape, None if not from_tensors else (rows, columns))

    def _fit_magnitude(self, shape: tuple[int, ...], at_most: tuple[int, int] | None) -> None:
        """Set the weight's shape, and give the magnitude its form; see `fit`.

        at_most: rows and columns of ΔW, while the kernel, and so the shape, is not known.
        """
        self.shape, ones = shape, (1,) * (len(shape) - 1)
        m, rows = self.magnitude, shape[0]
        if m is not None and m.dim() == 0:
            raise ValueError(
                "the magnitude is one number for the whole weight, not one an output or input"
            )
        if m is None:
            return
        if at_most is not None:  # (1, in, …) cannot be checked before the kernel is known
            rows, columns = at_most
            if not (m.shape[0] == m.numel() == rows or m.shape[0] == 1 <= m.numel() <= columns):
                raise ValueError(
                    f"a magnitude of {tuple(m.shape)} does not fit ΔW of {rows}×{columns}"
                )
            return
        if m.shape[0] == m.numel() == rows:
            m.data = m.data.reshape(rows, *ones)
        elif ones and m.shape[0] == 1 and m.numel() == shape[1]:
            m.data = m.data.reshape(1, shape[1], *ones[1:])
        else:
            raise ValueError(f"a magnitude of {tuple(m.shape)} does not fit the weight {shape}")

    @torch.no_grad()
    def _matrix_shape(self) -> tuple[int, ...]:
        """The shape of `matrix()`, computed without values."""
        meta = {n: t.to("meta") for n, t in self.state_dict().items()}
        return tuple(torch.func.functional_call(self, meta, strict=False).shape)

    def _shape_of(self, matrix: tuple[int, ...]) -> tuple[int, ...]:
        """ΔW's shape as far as the tensors have it, of that of `matrix()`."""
        return matrix

    def forward(self) -> Tensor:
        """`matrix()`."""
        return self.matrix()

    def norm(self) -> Tensor:
        """Frobenius norm of ΔW, or of the map of a method `of_base`."""
        return torch.linalg.vector_norm(self.by_itself())

    def scale_by(self, ratio: float | Tensor) -> None:
        """Multiply ΔW by `ratio`, spread evenly over the trained tensors, its factors.

        Raises:
            ValueError: a ΔW that is no product of its trained tensors.
        """
        factors = [p for name, p in self.named_parameters() if name != "magnitude"]
        with torch.no_grad():
            root = ratio ** (1 / len(factors))
            for factor in factors:
                factor.mul_(root)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, trained and frozen, with the magnitude and without alpha."""
        return {k: v.detach() for k, v in self.state_dict(keep_vars=True).items()}

    def _drop_ranks(self, factor: Tensor, dim: int = 0) -> Tensor:
        """Zero ranks with probability p and divide the others by 1 − p.

        Only in a layer's forward pass in training: merging and norms see the whole ΔW.
        """
        p = self.rank_dropout
        if not (p and self.drops_ranks):
            return factor
        shape = [1] * factor.dim()
        shape[dim] = -1
        keep = torch.rand(factor.shape[dim], device=factor.device) >= p
        return factor * (keep.to(factor.dtype) / (1 - p)).view(shape)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Delta":
        """Move and cast as any module, but never below float32: `model.half()` changes the base
        model and no bit of the trained tensors."""

        def keep_precision(t: Tensor) -> Tensor:
            moved = fn(t)
            if t.is_floating_point() and moved.dtype.itemsize < t.dtype.itemsize:
                return t.to(moved.device, torch.promote_types(torch.float32, moved.dtype))
            return moved

        return super()._apply(keep_precision, recurse)

    def extra_repr(self) -> str:
        rule = "add" if self.magnitude is None else "decompose"
        return f"{self.method}, rank={self.rank}, alpha={self.alpha:g}, {rule}"


def without_autocast(t: Tensor) -> AbstractContextManager[Any]:
    """Context without autocast on the device of `t`; the meta device has no autocast."""
    return nullcontext() if t.is_meta else torch.autocast(t.device.type, enabled=False)


def _kernel(shape: tuple[int, ...]) -> list[int]:
    """Kernel size without trailing ones: peft pads a Conv1d's to two dimensions."""
    kernel = list(shape[2:])
    while kernel and kernel[-1] == 1:
        kernel.pop()
    return kernel


def _safe_sqrt(squares: Tensor) -> Tensor:
    """√ of at least the smallest float: a row of zeros gives m / ‖V‖ = 0 and not 0 / 0."""
    return squares.clamp(min=torch.finfo(squares.dtype).tiny).sqrt()


def _at_least_float32(t: Tensor) -> Tensor:
    # a copy: training must not write into the tensors of a file or state
    dtype = torch.promote_types(torch.float32, t.dtype)
    return t.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
