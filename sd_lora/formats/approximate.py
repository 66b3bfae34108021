"""The nearest plain LoRA to any delta, by singular vectors, with its error.

By Eckart and Young (1936) the first r singular triplets of ΔW are its best approximation of rank r,
and the squared error is the sum of the squared singular values left out. Large matrices take the
randomised method of Halko, Martinsson and Tropp (2011, algorithm 4.4); its result is a projection
of ΔW, so the error is known exactly there too: ‖ΔW‖² − Σ σᵢ².
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from sd_lora.adapters.deltas import Delta
from sd_lora.adapters.methods import LoRA
from sd_lora.errors import UsageError

_EXACT = 256
"""Up to this many rows or columns the whole decomposition is as quick as the randomised one."""

Triplets = tuple[Tensor, Tensor, Tensor]
"""U (rows, n), σ (n,) descending, Vᵀ (n, columns), in float64."""


@dataclass(frozen=True)
class Cut:
    """The number of singular values to keep: the smallest of these bounds.

    rank: at most this many. conv_rank: for kernels above 1×1 instead; None is the rank. energy: as
    few as hold this share of Σ σ², in (0, 1]. ratio: values of at least σ₁/ratio, above 1.
    """

    rank: int | None = None
    conv_rank: int | None = None
    energy: float | None = None
    ratio: float | None = None

    def __post_init__(self) -> None:
        for name in ("rank", "conv_rank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be a whole number of at least 1, not {value}")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UsageError(f"energy is a share in (0, 1], not {self.energy:g}")
        if self.ratio is not None and not self.ratio >= 1:
            raise UsageError(f"ratio must be at least 1, not {self.ratio:g}")
        if self.rank is None and self.energy is None and self.ratio is None:
            raise UsageError("give a rank, an energy or a ratio to keep")

    def limit(self, shape: tuple[int, ...]) -> int | None:
        """The largest rank for a weight of this shape; None if it depends on the values."""
        kernel = any(k > 1 for k in shape[2:])
        return self.conv_rank if kernel and self.conv_rank is not None else self.rank

    def count(self, sigma: Tensor, total: float, shape: tuple[int, ...]) -> int:
        """How many of the singular values σ (descending) to keep, at least one."""
        keep = len(sigma)
        if self.ratio is not None:
            keep = min(keep, int((sigma * self.ratio >= sigma[0]).sum()))
        if self.energy == 1:  # all but rounding
            keep = min(keep, int((sigma > len(sigma) * 2.0**-52 * sigma[0]).sum()))
        elif self.energy is not None:
            held = torch.cumsum(sigma**2, 0)
            enough = self.energy * total * (1 - 1e-12)  # a sum of all of them is all of it
            keep = min(keep, int((held < enough).sum()) + 1)
        limit = self.limit(shape)
        return max(1, keep if limit is None else min(keep, limit))


@dataclass
class Loss:
    """The error of an approximation, of one delta or of many: ‖ΔW − BA‖² and ‖ΔW‖²."""

    lost: float = 0.0
    total: float = 0.0

    @property
    def error(self) -> float:
        """‖ΔW − BA‖ / ‖ΔW‖, in the Frobenius norm."""
        return math.sqrt(self.lost / self.total) if self.total else 0.0

    def __add__(self, other: "Loss") -> "Loss":
        return Loss(self.lost + other.lost, self.total + other.total)

    @classmethod
    def sum(cls, losses: Iterable["Loss"]) -> "Loss":
        return sum(losses, cls())


def squared_norm(t: Tensor) -> float:
    """‖t‖², the squared Frobenius norm, summed in float64."""
    return float(torch.linalg.vector_norm(t, dtype=torch.float64)) ** 2


@dataclass(frozen=True)
class Spectrum:
    """Singular values of a ΔW (n,), descending, and the parameters of each rank of its LoRA."""

    sigma: Tensor
    cost: int

    @classmethod
    @torch.no_grad()
    def of(cls, delta: Delta, change: Tensor | None = None) -> "Spectrum":
        """The spectrum of a delta. change: its ΔW, where it is not its own alone (DoRA)."""
        factors = delta.low_rank() if change is None else None
        if factors is None:
            matrix = delta.weight() if change is None else change
            sigma, width = torch.linalg.svdvals(matrix.flatten(1)), sum(matrix.flatten(1).shape)
            return cls(sigma.double(), width)
        A, B = (f.flatten(1).double() for f in factors)
        Ra, Rb = torch.linalg.qr(A.T).R, torch.linalg.qr(delta.scale * B).R
        return cls(torch.linalg.svdvals(Rb @ Ra.T), A.shape[1] + len(B))


Key = TypeVar("Key")


def shared_ranks(spectra: Mapping[Key, Spectrum], mean_rank: int) -> dict[Key, int]:
    """Ranks that differ, of as many parameters in all as `mean_rank` for each has, at most.

    Each delta keeps one rank; then come the singular values that lower the joint squared error most
    by parameter, σ² / cost, until the next one does not fit. No other choice of as many parameters
    has a smaller error: a greedy one is best where each step has at most the gain by cost of those
    before (Dantzig 1957, of the knapsack).
    """
    ranks = dict.fromkeys(spectra, 1)
    left = sum((mean_rank - 1) * spectrum.cost for spectrum in spectra.values())
    gains = [
        (float(sigma) ** 2 / spectrum.cost, index, key)
        for key, spectrum in spectra.items()
        for index, sigma in enumerate(spectrum.sigma[1:])
    ]
    for gain, _, key in sorted(gains, key=lambda entry: (-entry[0], entry[1])):
        left -= spectra[key].cost
        if left < 0 or not gain:
            break
        ranks[key] += 1
    return ranks


@torch.no_grad()
def nearest(delta: Delta, cut: Cut) -> tuple[Delta, Loss]:
    """The nearest plain LoRA to a delta of the rule add, and its error.

    A delta of the form B·A, with no more ranks than the cut allows, is returned unchanged.

    Raises:
        UsageError: a weight-decomposed delta or OFT: its ΔW depends on the base weight.
    """
    if delta.needs_base:
        raise UsageError("a weight-decomposed delta (DoRA) or OFT has a ΔW on its base model alone")
    factors = delta.low_rank()
    if factors is None:
        return nearest_to(delta.weight(), cut)
    A, B = (f.flatten(1).double() for f in factors)
    Qb, Rb = torch.linalg.qr(delta.scale * B)
    Qa, Ra = torch.linalg.qr(A.T)
    U, sigma, Vh = torch.linalg.svd(Rb @ Ra.T)
    n = len(sigma)
    total = float((sigma**2).sum())
    keep = cut.count(sigma, total, delta.shape)
    if keep >= len(A):
        return delta, Loss(0.0, total)
    return _lora((Qb @ U[:, :n], sigma, Vh[:n] @ Qa.T), keep, total, delta.shape)


@torch.no_grad()
def nearest_to(weight: Tensor, cut: Cut) -> tuple[Delta, Loss]:
    """The nearest plain LoRA to a ΔW (out, in/groups, k…), and its error."""
    matrix = weight.flatten(1).double()
    total = squared_norm(matrix)
    smallest = min(matrix.shape)
    limit = cut.limit(tuple(weight.shape))
    wanted = min(smallest, 64 if limit is None else limit)
    while True:
        triplets = _triplets(matrix, wanted)
        sigma = triplets[1]
        keep = cut.count(sigma, total, tuple(weight.shape))
        # fewer than were found: more would change nothing; else energy or ratio may want more
        if len(sigma) == smallest or keep < wanted or (limit is not None and wanted >= limit):
            return _lora(triplets, keep, total, tuple(weight.shape))
        wanted = min(2 * wanted, smallest)


def _triplets(matrix: Tensor, wanted: int) -> Triplets:
    rows, columns = matrix.shape
    width = wanted + 16
    if min(rows, columns) <= max(_EXACT, width):
        U, sigma, Vh = torch.linalg.svd(matrix, full_matrices=False)
        return U, sigma, Vh
    generator = torch.Generator().manual_seed(0)  # a function of the matrix alone
    # the subspace is looked for in float32, at half the cost; what is kept of ΔW in it is float64
    rough = matrix.float()
    rough /= rough.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    Q = torch.linalg.qr(rough @ torch.randn(columns, width, generator=generator)).Q
    for _ in range(4):  # subspace iterations: σ⁹ decays where σ hardly does
        Q = torch.linalg.qr(rough.T @ Q).Q
        Q = torch.linalg.qr(rough @ Q).Q
    Q = torch.linalg.qr(Q.double()).Q
    U, sigma, Vh = torch.linalg.svd(Q.T @ matrix, full_matrices=False)
    return (Q @ U)[:, :wanted], sigma[:wanted], Vh[:wanted]


def _lora(
    triplets: Triplets, keep: int, total: float, shape: tuple[int, ...]
) -> tuple[Delta, Loss]:
    U, sigma, Vh = (t[..., :keep] if i < 2 else t[:keep] for i, t in enumerate(triplets))
    root = sigma.sqrt()  # shared evenly: both factors stay within half precision's range
    ones = (1,) * len(shape[2:])
    A = (root[:, None] * Vh).float().reshape(keep, *shape[1:])
    B = (U * root).float().reshape(shape[0], keep, *ones)
    lost = max(0.0, total - float((sigma**2).sum()))
    return LoRA(shape, {"lora_A": A, "lora_B": B}), Loss(lost, total)
