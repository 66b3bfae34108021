"""The methods, one class each. Tensor names are peft's for LoRA and LyCORIS' for the others.

A new method is a class here, or anywhere, with `@sd_lora.register_method(name)`.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from sd_lora.adapters.deltas import Delta, register_method, without_autocast
from sd_lora.errors import UsageError

INITS = ("kaiming", "gaussian", "orthogonal", "svd", "pissa", "loftq")
"""How LoRA's tensors can start, see `LoRA.create`."""


def _tucker_product(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Σ core[i, j, k…] a[i, out] b[j, in], (out, in, k…)."""
    return torch.einsum("ij...,ip,jq->pq...", core, a, b)


def _kaiming_uniform(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Initial values of an inner factor, a = √5, as in loralib and peft."""
    return nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5), generator=generator)


def _is_larger_than_1x1(shape: tuple[int, ...]) -> bool:
    return any(k > 1 for k in shape[2:])


@register_method("lora")
class LoRA(Delta):
    """ΔW = s·B·A (Hu et al. 2021). In a convolution A is k×k and B is 1×1; with `tucker`,
    ΔW = s·B·C·A with a 1×1 A and the core C = lora_mid (r, r, k…) (LoCon).

    After the init PiSSA, ΔW = s·(B·A − B₀·A₀): the frozen weight stays whole, where the paper
    subtracts s·B₀·A₀ from it. The function is the same, and the file an ordinary LoRA of rank 2r.
    After the init LoftQ the same, where s·B₀·A₀ is the quantisation error: the quantised layer adds
    it to its own product, so that the file's ΔW is for the full-precision weight.
    """

    tensor_names = ("lora_A", "lora_B", "lora_mid", "start_A", "start_B", "lost_A", "lost_B")
    cores = ("lora_mid",)
    frozen: ClassVar[tuple[str, ...]] = ("start_A", "start_B", "lost_A", "lost_B")
    lora_A: Tensor
    lora_B: Tensor
    lora_mid: Tensor | None

    @classmethod
    def create(
        cls,
        shape: tuple[int, ...],
        rank: int,
        generator: torch.Generator | None,
        *,
        init: str = "kaiming",
        tucker: bool = False,
        weight: Tensor | None = None,
        reference: Tensor | None = None,
        scale: float = 1.0,
    ) -> dict[str, Tensor]:
        """Initial tensors.

        Args:
            shape, rank, generator: see `Delta.create`.
            init: of A, with B = 0: "kaiming" (uniform, a = √5, as in loralib and peft), "gaussian"
                (std 1/r), "orthogonal" (orthonormal rows), "svd" (the principal right singular
                vectors of W, so that the delta reads the inputs that W amplifies most). Of A and B:
                "pissa" (principal singular vectors of W, Meng et al. 2024, section 3), "loftq"
                (principal singular vectors of the quantisation error, Li et al. 2023, equation 6
                with one step).
            tucker: give kernels above 1×1 a core.
            weight: W, for the inits svd, pissa and loftq.
            reference: W before quantisation, for the init loftq.
            scale: s.

        Raises:
            ValueError: an init that this weight cannot have, with the reason.
            UsageError: an unknown init.
        """
        ones = (1,) * len(shape[2:])
        tucker = tucker and _is_larger_than_1x1(shape)
        A = torch.empty(rank, shape[1], *(ones if tucker else shape[2:]))
        tensors = {"lora_A": A, "lora_B": torch.zeros(shape[0], rank, *ones)}
        if tucker:
            tensors["lora_mid"] = _kaiming_uniform((rank, rank, *shape[2:]), generator)
        if init == "kaiming":
            tensors["lora_A"] = _kaiming_uniform(tuple(A.shape), generator)
        elif init == "gaussian":
            nn.init.normal_(A, std=1 / rank, generator=generator)
        elif init == "orthogonal":
            nn.init.orthogonal_(A, generator=generator)
        elif init in ("svd", "pissa", "loftq"):
            if tucker:
                raise ValueError(f"the init {init} gives two factors, and tucker has three")
            tensors |= cls._principal_factors(init, weight, reference, rank, scale)
        else:
            raise UsageError(f"init must be one of {', '.join(INITS)}, not {init!r}")
        return tensors

    @staticmethod
    def _principal_factors(
        init: str, W: Tensor | None, reference: Tensor | None, rank: int, scale: float
    ) -> dict[str, Tensor]:
        """Tensors of the inits svd, pissa and loftq, from a singular value decomposition."""
        if W is None or W.is_meta:
            raise ValueError(
                f"the init {init} is computed from the weight, which has no values on the meta "
                "device: load the model first"
            )
        if init == "loftq":
            if reference is None:
                raise ValueError(
                    "the init loftq starts from the quantisation error: it needs a quantised base "
                    "and reference=, the model before quantisation"
                )
            if reference.shape != W.shape:
                raise ValueError(
                    f"W is {tuple(W.shape)}, its reference {tuple(reference.shape)}: they must be "
                    "the same layer"
                )
            W = reference.to(W.device, W.dtype) - W
        U, S, Vh = torch.linalg.svd(W.flatten(1).float(), full_matrices=False)
        if rank > len(S):
            raise ValueError(
                f"rank {rank} is too high for the init {init}: W has {len(S)} singular vectors"
            )
        if init == "svd":
            return {"lora_A": Vh[:rank].reshape(rank, *W.shape[1:])}
        root = (S[:rank] / scale).sqrt()
        ones = (1,) * (W.dim() - 2)
        A = (root[:, None] * Vh[:rank]).reshape(rank, *W.shape[1:])
        B = (U[:, :rank] * root).reshape(len(W), rank, *ones)
        name = "start" if init == "pissa" else "lost"
        return {"lora_A": A, "lora_B": B, f"{name}_A": A, f"{name}_B": B}

    def _rank(self) -> int:
        if self.lora_A is None or self.lora_B is None:
            raise ValueError("lora_A and lora_B come in pairs")
        for name in ("start", "lost"):
            if (getattr(self, f"{name}_A") is None) != (getattr(self, f"{name}_B") is None):
                raise ValueError(f"{name}_A and {name}_B come in pairs")
        if self.lora_B.shape[1] != self.lora_A.shape[0]:
            raise ValueError(
                f"lora_A {tuple(self.lora_A.shape)} and lora_B {tuple(self.lora_B.shape)} are of "
                "different ranks"
            )
        return int(self.lora_A.shape[0])

    def fit(self, shape: tuple[int, ...] | None) -> None:
        super().fit(shape)
        ones = (1,) * len(self.shape[2:])  # files may have a 1×1 convolution's factors as matrices
        if self.lora_mid is None:
            self.lora_A.data = self.lora_A.data.reshape(-1, *self.shape[1:])
        self.lora_B.data = self.lora_B.data.reshape(self.shape[0], -1, *ones)

    def _matrix_shape(self) -> tuple[int, ...]:
        A, B = self.lora_A, self.lora_B
        if self.lora_mid is None and self.initial_factors is None and B[0].numel() == len(A):
            return len(B), A[0].numel()  # at once: a file has hundreds
        return super()._matrix_shape()

    def _shape_of(self, matrix: tuple[int, ...]) -> tuple[int, ...]:
        kernel = self.lora_A.shape[2:] if self.lora_mid is None else self.lora_mid.shape[2:]
        return (matrix[0], self.lora_A.shape[1], *kernel)

    def low_rank(self) -> tuple[Tensor, Tensor]:
        A, B = self.lora_A, self.lora_B
        if self.lora_mid is not None:
            with without_autocast(A):
                A = torch.einsum("rs...,si->ri...", self.lora_mid, A.flatten(1))
        initial = self.initial_factors
        if initial is None:
            return self._drop_ranks(A), B
        # a rank is dropped from both products: ΔW starts at zero in training, too
        A = self._drop_ranks(torch.stack((A, initial[0])), dim=1).flatten(0, 1)
        return A, torch.cat((B, -initial[1]), 1)

    @property
    def initial_factors(self) -> tuple[Tensor, Tensor] | None:
        """A₀ and B₀ after the inits pissa and loftq, else None."""
        for name in ("start", "lost"):
            A, B = getattr(self, f"{name}_A"), getattr(self, f"{name}_B")
            if A is not None and B is not None:
                return A, B
        return None

    @property
    def quantization_residual(self) -> tuple[Tensor, Tensor] | None:
        """A₀ and B₀ after the init loftq, else None."""
        return self.initial_factors if self.lost_A is not None else None

    def matrix(self) -> Tensor:
        A, B = self.low_rank()
        return B.flatten(1) @ A.flatten(1)

    def norm(self) -> Tensor:
        A, B = (f.flatten(1) for f in self.low_rank())  # ‖BA‖² = Σ (BᵀB) ⊙ (AAᵀ), r×r
        return self.scale * ((B.T @ B) * (A @ A.T)).sum().clamp(min=0).sqrt()

    def scale_by(self, ratio: float | Tensor) -> None:
        if self.initial_factors is not None:
            raise ValueError(
                "after the inits pissa and loftq ΔW is a difference and cannot be scaled: use "
                "another init, or no limit of norms"
            )
        super().scale_by(ratio)

    def zero_input_row(self, index: int) -> None:
        for factor in (self.lora_A, *(self.initial_factors or ())[:1]):
            factor.data[:, index] = 0


@register_method("lora_fa")
class LoRAFA(LoRA):
    """LoRA with a frozen A (Zhang et al. 2023): only B is trained, and no input is stored for A."""

    frozen = ("lora_A", "lora_mid", *LoRA.frozen)


@register_method("loha")
class LoHa(Delta):
    """ΔW = s·(w1_a·w1_b) ⊙ (w2_a·w2_b) (Hyeon-Woo et al. 2022, FedPara), of rank up to r².

    With `tucker` each product has a core t (r, r, k…) and transposed factors, as in LyCORIS.
    """

    tensor_names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
    cores = ("hada_t1", "hada_t2")
    hada_w1_a: Tensor
    hada_w1_b: Tensor
    hada_w2_a: Tensor
    hada_w2_b: Tensor
    hada_t1: Tensor | None
    hada_t2: Tensor | None

    @classmethod
    def create(
        cls,
        shape: tuple[int, ...],
        rank: int,
        generator: torch.Generator | None,
        *,
        tucker: bool = False,
    ) -> dict[str, Tensor]:
        out, columns = shape[0], math.prod(shape[1:])
        core = tucker and _is_larger_than_1x1(shape)

        def normal(std: float, *size: int) -> Tensor:
            return nn.init.normal_(torch.empty(size), std=std, generator=generator)

        tensors = {}
        for half, std in (("1", 0.1), ("2", 0.0)):  # LyCORIS' values; w2_a = 0 makes ΔW zero
            tensors[f"hada_w{half}_a"] = normal(std, *((rank, out) if core else (out, rank)))
            tensors[f"hada_w{half}_b"] = normal(1.0, rank, shape[1] if core else columns)
            if core:
                tensors[f"hada_t{half}"] = normal(0.1, rank, rank, *shape[2:])
        tensors["hada_w2_a"].zero_()
        return tensors

    def _rank(self) -> int:
        if any(getattr(self, name) is None for name in self.tensor_names[:4]):
            raise ValueError("loha needs hada_w1_a, hada_w1_b, hada_w2_a and hada_w2_b")
        if (self.hada_t1 is None) != (self.hada_t2 is None):
            raise ValueError("hada_t1 and hada_t2 come in pairs")
        return int(self.hada_w1_b.shape[0])

    def matrix(self) -> Tensor:
        first = self._drop_ranks(self.hada_w1_b)  # ΔW is linear in it, which keeps its mean
        if self.hada_t1 is not None and self.hada_t2 is not None:
            half = _tucker_product(self.hada_t1, self.hada_w1_a, first)
            return half * _tucker_product(self.hada_t2, self.hada_w2_a, self.hada_w2_b)
        return (self.hada_w1_a @ first.flatten(1)) * (self.hada_w2_a @ self.hada_w2_b.flatten(1))

    def zero_input_row(self, index: int) -> None:
        self.hada_w1_b.data[:, index] = 0


@register_method("lokr")
class LoKr(Delta):
    """ΔW = s·w1 ⊗ w2 (Yeh et al. 2024, LyCORIS), each a matrix or a product a·b of rank r.

    With `tucker`, w2 of a convolution has the core lokr_t2. With two matrices there is no rank, and
    s = 1.
    """

    tensor_names = (
        *("lokr_w1", "lokr_w1_a", "lokr_w1_b"),
        *("lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    )
    cores = ("lokr_t2",)

    @classmethod
    def create(
        cls,
        shape: tuple[int, ...],
        rank: int,
        generator: torch.Generator | None,
        *,
        factor: int = -1,
        full_matrix: bool = False,
        decompose_both: bool = False,
        tucker: bool = False,
    ) -> dict[str, Tensor]:
        """Initial tensors.

        Args:
            shape, rank, generator: see `Delta.create`.
            factor: size of w1's sides; -1: the largest divisors up to the square root.
            full_matrix: w2 is a full matrix at any rank.
            decompose_both: w1 is a product, too.
            tucker: give kernels above 1×1 a core.
        """
        (out1, out2), (in1, in2) = factorization(shape[0], factor), factorization(shape[1], factor)
        kernel = shape[2:]
        tensors = {}
        if decompose_both and not full_matrix and rank < max(out1, in1) / 2:
            tensors["lokr_w1_a"] = _kaiming_uniform((out1, rank), generator)
            tensors["lokr_w1_b"] = _kaiming_uniform((rank, in1), generator)
        else:
            tensors["lokr_w1"] = _kaiming_uniform((out1, in1), generator)
        if full_matrix or rank >= max(out2, in2) / 2:
            tensors["lokr_w2"] = torch.zeros(out2, in2, *kernel)
        elif tucker and _is_larger_than_1x1(shape):
            tensors["lokr_t2"] = _kaiming_uniform((rank, rank, *kernel), generator)
            tensors["lokr_w2_a"] = _kaiming_uniform((rank, out2), generator)
            tensors["lokr_w2_b"] = torch.zeros(rank, in2)
        else:
            tensors["lokr_w2_a"] = _kaiming_uniform((out2, rank), generator)
            tensors["lokr_w2_b"] = torch.zeros(rank, in2 * math.prod(kernel))
        return tensors

    def _factor(self, number: str) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The matrix w, or a and b of the product, of factor "1" or "2"; None for the others."""
        w, a, b = (getattr(self, f"lokr_w{number}{part}") for part in ("", "_a", "_b"))
        return w, a, b

    def _rank(self) -> int | None:
        rank = None
        for n in ("1", "2"):
            w, a, b = self._factor(n)
            if (a is None) != (b is None) or (a is None) == (w is None):
                raise ValueError(f"lokr needs lokr_w{n}, or lokr_w{n}_a and lokr_w{n}_b")
            rank = rank if b is None else int(b.shape[0])
        if self.lokr_t2 is not None and self.lokr_w2_a is None:
            raise ValueError("lokr_t2 comes with lokr_w2_a and lokr_w2_b")
        return rank

    def matrix(self) -> Tensor:
        w1, a1, b1 = self._factor("1")
        w2, a2, b2 = self._factor("2")
        core: Tensor | None = self.lokr_t2  # type: ignore[assignment]
        # only one factor drops ranks: ΔW is linear in each, which keeps its mean
        if a2 is not None and b2 is not None:
            b2 = self._drop_ranks(b2)
            w2 = a2 @ b2.flatten(1) if core is None else _tucker_product(core, a2, b2)
        elif b1 is not None:
            b1 = self._drop_ranks(b1)
        if a1 is not None and b1 is not None:
            w1 = a1 @ b1
        assert w1 is not None
        assert w2 is not None
        # as matrices: the columns of w1 ⊗ w2 then run over (in1, in2, k…), for every kernel
        return torch.kron(w1, w2.flatten(1))


def factorization(dimension: int, factor: int = -1) -> tuple[int, int]:
    """Sides m ≤ n of LoKr's two factors, m·n = dimension, as LyCORIS chooses them.

    m is `factor` if it divides the dimension, else the largest divisor up to `factor` and
    √dimension; -1 is no bound.
    """
    if factor > 0 and dimension % factor == 0:
        return min(factor, dimension // factor), max(factor, dimension // factor)
    bound = math.isqrt(dimension) if factor < 0 else min(factor, math.isqrt(dimension))
    m = next(m for m in range(max(bound, 1), 0, -1) if dimension % m == 0)
    return m, dimension // m


@register_method("full")
class Full(Delta):
    """ΔW as one tensor, of full rank and without scale: for small targets, norms and biases."""

    tensor_names = ("diff",)
    diff: Tensor

    @classmethod
    def create(
        cls, shape: tuple[int, ...], rank: int, generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        return {"diff": torch.zeros(shape)}

    def matrix(self) -> Tensor:
        return self.diff

    def zero_input_row(self, index: int) -> None:
        pass  # ΔW starts at zero, and an embedding gives its padding row no gradient
