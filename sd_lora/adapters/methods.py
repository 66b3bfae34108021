"""The methods, one class each. Tensor names are those of the files: peft's for LoRA, LyCORIS' for
the rest. To add one, write its class here, or anywhere with `@sd_lora.register_method(name)`.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from sd_lora.adapters.deltas import Delta, register_method, unrounded
from sd_lora.errors import UsageError

INITS = ("kaiming", "gaussian", "orthogonal", "pissa", "loftq")


def _tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Σ core[i, j, k…] a[i, out] b[j, in] → (out, in, k…)."""
    return torch.einsum("ij...,ip,jq->pq...", core, a, b)


def _kaiming(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    return nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5), generator=generator)


def _has_kernel(shape: tuple[int, ...]) -> bool:
    return any(k > 1 for k in shape[2:])


@register_method("lora")
class LoRA(Delta):
    """ΔW = s·B·A (Hu et al. 2021). A convolution's A is the k×k kernel, its B the 1×1 one; with
    `tucker`, B·C·A with a 1×1 A, the core C = lora_mid (r, r, k…) carrying the kernel (LoCon).

    From a PiSSA start, ΔW = s·(B·A − B₀·A₀): the frozen weight stays whole where the paper
    subtracts s·B₀·A₀ from it, which is the same function and an ordinary LoRA of rank 2r. From a
    LoftQ start likewise: there s·B₀·A₀ is what quantisation lost, and the quantised layer adds it
    to its own product; so the file's ΔW is that of the full-precision weight.
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
        """init: of A: "kaiming" (uniform, a = √5, as loralib and peft), "gaussian" (std 1/r),
        "orthogonal" (orthonormal rows), each with B = 0; or of both: "pissa" (the principal
        singular vectors of W, Meng et al. 2024, section 3), "loftq" (those of what quantisation
        lost, Li et al. 2023, equation 6 with one step)."""
        ones = (1,) * len(shape[2:])
        tucker = tucker and _has_kernel(shape)
        A = torch.empty(rank, shape[1], *(ones if tucker else shape[2:]))
        tensors = {"lora_A": A, "lora_B": torch.zeros(shape[0], rank, *ones)}
        if tucker:
            tensors["lora_mid"] = _kaiming((rank, rank, *shape[2:]), generator)
        if init == "kaiming":
            tensors["lora_A"] = _kaiming(tuple(A.shape), generator)
        elif init == "gaussian":
            nn.init.normal_(A, std=1 / rank, generator=generator)
        elif init == "orthogonal":
            nn.init.orthogonal_(A, generator=generator)
        elif init in ("pissa", "loftq"):
            if tucker:
                raise ValueError(f"the init {init} is for two factors, not for tucker's three")
            tensors |= cls._principal(init, weight, reference, rank, scale)
        else:
            raise UsageError(f"init must be one of {', '.join(INITS)}, not {init!r}")
        return tensors

    @staticmethod
    def _principal(
        init: str, W: Tensor | None, reference: Tensor | None, rank: int, scale: float
    ) -> dict[str, Tensor]:
        if W is None or W.is_meta:
            raise ValueError(f"the init {init} is computed from the weight, and here is none")
        if init == "loftq":
            if reference is None:
                raise ValueError(
                    "the init loftq makes up for what quantisation lost: it needs a quantised "
                    "base and reference=, the model before quantisation"
                )
            if reference.shape != W.shape:
                raise ValueError(f"W is {tuple(W.shape)}, its reference {tuple(reference.shape)}")
            W = reference.to(W.device, W.dtype) - W
        U, S, Vh = torch.linalg.svd(W.flatten(1).float(), full_matrices=False)
        if rank > len(S):
            raise ValueError(f"the init {init} has {len(S)} singular vectors, not rank {rank}")
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
        ones = (1,) * len(self.shape[2:])  # a 1×1 convolution's factors may come as matrices
        if self.lora_mid is None:
            self.lora_A.data = self.lora_A.data.reshape(-1, *self.shape[1:])
        self.lora_B.data = self.lora_B.data.reshape(self.shape[0], -1, *ones)

    def _natural_shape(self, matrix: Tensor) -> tuple[int, ...]:
        kernel = self.lora_A.shape[2:] if self.lora_mid is None else self.lora_mid.shape[2:]
        return (matrix.shape[0], self.lora_A.shape[1], *kernel)

    def low_rank(self) -> tuple[Tensor, Tensor]:
        A, B = self.lora_A, self.lora_B
        if self.lora_mid is not None:
            with unrounded(A):
                A = torch.einsum("rs...,si->ri...", self.lora_mid, A.flatten(1))
        start = self.start
        if start is None:
            return self._drop_ranks(A), B
        # a rank is dropped together with its start: ΔW begins at zero in training, too
        A = self._drop_ranks(torch.stack((A, start[0])), dim=1).flatten(0, 1)
        return A, torch.cat((B, -start[1]), 1)

    @property
    def start(self) -> tuple[Tensor, Tensor] | None:
        """A₀ and B₀, if ΔW starts from them."""
        for name in ("start", "lost"):
            A, B = getattr(self, f"{name}_A"), getattr(self, f"{name}_B")
            if A is not None and B is not None:
                return A, B
        return None

    @property
    def lost(self) -> tuple[Tensor, Tensor] | None:
        """A₀ and B₀ if s·B₀·A₀ is what quantisation lost of the weight."""
        return self.start if self.lost_A is not None else None

    def matrix(self) -> Tensor:
        A, B = self.low_rank()
        return B.flatten(1) @ A.flatten(1)

    def norm(self) -> Tensor:
        A, B = (f.flatten(1) for f in self.low_rank())  # ‖BA‖² = Σ (BᵀB) ⊙ (AAᵀ), r×r
        return self.scale * ((B.T @ B) * (A @ A.T)).sum().clamp(min=0).sqrt()

    def shrink(self, ratio: float) -> None:
        if self.start is not None:
            raise ValueError("an update with a start is no product that could be scaled down")
        super().shrink(ratio)

    def zero_input_row(self, index: int) -> None:
        for factor in (self.lora_A, *(self.start or ())[:1]):
            factor.data[:, index] = 0


@register_method("lora_fa")
class LoRAFA(LoRA):
    """LoRA with a frozen A (Zhang et al. 2023): only B is trained, and no input is kept for A."""

    frozen = ("lora_A", "lora_mid", *LoRA.frozen)


@register_method("loha")
class LoHa(Delta):
    """ΔW = s·(w1_a·w1_b) ⊙ (w2_a·w2_b) (Hyeon-Woo et al. 2022, FedPara), of rank up to r².

    With `tucker` each half has a core t (r, r, k…) and both sides transposed, as in LyCORIS.
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
        core = tucker and _has_kernel(shape)

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
        first = self._drop_ranks(self.hada_w1_b)  # ΔW is linear in it: the mean is kept
        if self.hada_t1 is not None and self.hada_t2 is not None:
            half = _tucker(self.hada_t1, self.hada_w1_a, first)
            return half * _tucker(self.hada_t2, self.hada_w2_a, self.hada_w2_b)
        return (self.hada_w1_a @ first.flatten(1)) * (self.hada_w2_a @ self.hada_w2_b.flatten(1))

    def zero_input_row(self, index: int) -> None:
        self.hada_w1_b.data[:, index] = 0


@register_method("lokr")
class LoKr(Delta):
    """ΔW = s·w1 ⊗ w2 (Yeh et al. 2024, LyCORIS), each a matrix or a product a·b of rank r; with
    `tucker`, w2 of a convolution has the core lokr_t2. Without any rank, s = 1."""

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
        """factor: the size of w1's sides, -1: as near to the square root as divisors go.
        full_matrix: w2 is whole, whatever the rank. decompose_both: w1 is a product, too."""
        (out1, out2), (in1, in2) = factorization(shape[0], factor), factorization(shape[1], factor)
        kernel = shape[2:]
        tensors = {}
        if decompose_both and not full_matrix and rank < max(out1, in1) / 2:
            tensors["lokr_w1_a"] = _kaiming((out1, rank), generator)
            tensors["lokr_w1_b"] = _kaiming((rank, in1), generator)
        else:
            tensors["lokr_w1"] = _kaiming((out1, in1), generator)
        if full_matrix or rank >= max(out2, in2) / 2:
            tensors["lokr_w2"] = torch.zeros(out2, in2, *kernel)
        elif tucker and _has_kernel(shape):
            tensors["lokr_t2"] = _kaiming((rank, rank, *kernel), generator)
            tensors["lokr_w2_a"] = _kaiming((rank, out2), generator)
            tensors["lokr_w2_b"] = torch.zeros(rank, in2)
        else:
            tensors["lokr_w2_a"] = _kaiming((out2, rank), generator)
            tensors["lokr_w2_b"] = torch.zeros(rank, in2 * math.prod(kernel))
        return tensors

    def _half(self, half: str) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Returns w, a and b of one half, "1" or "2"."""
        w, a, b = (getattr(self, f"lokr_w{half}{part}") for part in ("", "_a", "_b"))
        return w, a, b

    def _rank(self) -> int | None:
        rank = None
        for half in ("1", "2"):
            w, a, b = self._half(half)
            if (a is None) != (b is None) or (a is None) == (w is None):
                raise ValueError(f"lokr needs lokr_w{half}, or lokr_w{half}_a and lokr_w{half}_b")
            rank = rank if b is None else int(b.shape[0])
        if self.lokr_t2 is not None and self.lokr_w2_a is None:
            raise ValueError("lokr_t2 comes with lokr_w2_a and lokr_w2_b")
        return rank

    def matrix(self) -> Tensor:
        w1, a1, b1 = self._half("1")
        w2, a2, b2 = self._half("2")
        core: Tensor | None = self.lokr_t2  # type: ignore[assignment]
        # one half alone drops ranks: ΔW is linear in each, so its mean is kept
        if a2 is not None and b2 is not None:
            b2 = self._drop_ranks(b2)
            w2 = a2 @ b2.flatten(1) if core is None else _tucker(core, a2, b2)
        elif b1 is not None:
            b1 = self._drop_ranks(b1)
        if a1 is not None and b1 is not None:
            w1 = a1 @ b1
        assert w1 is not None
        assert w2 is not None
        # as matrices: the columns of w1 ⊗ w2 then run over (in1, in2, k…), for every kernel
        return torch.kron(w1, w2.flatten(1))


def factorization(dimension: int, factor: int = -1) -> tuple[int, int]:
    """Returns (m, n), m ≤ n, m·n = dimension: m = factor if it divides, else the largest divisor
    up to it that is at most √dimension; -1 is no bound (LyCORIS' choice for LoKr)."""
    if factor > 0 and dimension % factor == 0:
        return min(factor, dimension // factor), max(factor, dimension // factor)
    bound = math.isqrt(dimension) if factor < 0 else min(factor, math.isqrt(dimension))
    m = next(m for m in range(max(bound, 1), 0, -1) if dimension % m == 0)
    return m, dimension // m


@register_method("full")
class Full(Delta):
    """ΔW itself, of full rank, without scale: for small targets, norms and biases."""

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
        pass  # zero at the start, and an embedding gives its padding row no gradient
