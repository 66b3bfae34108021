"""OFT: a weight's outputs turned in blocks, in the form that files of LyCORIS and sd-scripts have.

Qiu et al. 2023, "Controlling Text-to-Image Diffusion by Orthogonal Finetuning".
"""

import math

import torch
from torch import Tensor

from sd_lora.adapters.deltas import Delta, register_method, without_autocast
from sd_lora.errors import UsageError

BLOCK_SIZE = 16
"""Outputs in a block, at most, where no size is given."""


def turn_of(Q: Tensor) -> Tensor:
    """Rᵀ − I of Cayley's R = (I + Q)(I − Q)⁻¹, section 3.3 there: −2 (I + Q)⁻¹ Q, and 0 at Q = 0.

    Q: skew-symmetric, (…, b, b).
    """
    with without_autocast(Q):
        # I + Q is never singular, and `solve` would have the host wait for a card to say so
        return torch.linalg.solve_ex(
            torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device) + Q, -2 * Q
        )[0]


def bounded(blocks: Tensor, limit: float) -> Tensor:
    """Q = B − Bᵀ of a file's blocks B (…, b, b).

    limit: of ‖Q‖, the Frobenius norm over all blocks, if it is above 0 (COFT): a larger Q is scaled
    down to it.
    """
    Q = blocks - blocks.mT
    norm = float(Q.norm()) + 1e-8
    return Q * (limit / norm) if 0 < limit < norm else Q


@register_method("oft")
class OFT(Delta):
    """W' = D Rᵀ W: R turns the outputs of each block of b, and keeps all lengths and angles of W's
    columns; with `rescaled` a diagonal D is trained, a factor an output, else D = I.

    Q = (U − Uᵀ) / (2√(b − 1)), U a block's strictly upper triangle, `oft_skew`: (blocks, b(b−1)/2).
    A learning rate means the same at any b: where each number moves by the rate η, as with Adam or
    Lion, a row of Q, b − 1 numbers, moves by η/2, and so a row of Rᵀ − I ≈ −2Q by η. The angle by
    which a step turns an output is the rate, in radians; without the root it grows as √(b − 1).
    """

    tensor_names = ("oft_skew", "rescale")
    of_base = True
    oft_skew: Tensor
    rescale: Tensor | None

    @classmethod
    def create(
        cls,
        shape: tuple[int, ...],
        rank: int,
        generator: torch.Generator | None,
        *,
        block_size: int | None = None,
        rescaled: bool = False,
    ) -> dict[str, Tensor]:
        """Initial tensors, of no rotation.

        Args:
            shape, rank, generator: see `Delta.create`; there is no rank, and nothing is drawn.
            block_size: of a block at most: the largest divisor of the outputs is taken. By default
                up to `BLOCK_SIZE` and, if there is one, no larger than the number of blocks:
                LyCORIS' own reader takes no others.
            rescaled: train a factor of each output.

        Raises:
            ValueError: a number of outputs without such a divisor above 1.
        """
        limit, outputs = block_size or BLOCK_SIZE, shape[0]
        sizes = [b for b in range(2, min(limit, outputs) + 1) if outputs % b == 0]
        if not sizes:
            raise ValueError(
                f"oft turns outputs in blocks of 2 to {limit}, and {outputs} outputs have no "
                "divisor among these: give a larger block size, or leave out this target"
            )
        readable = [b for b in sizes if b * b <= outputs]
        size = sizes[-1] if block_size or not readable else readable[-1]
        tensors = {"oft_skew": torch.zeros(outputs // size, size * (size - 1) // 2)}
        return tensors | ({"rescale": torch.ones(outputs)} if rescaled else {})

    @classmethod
    def of_blocks(
        cls, blocks: Tensor, limit: float, rescale: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Tensors of a file's blocks B (blocks, b, b), whose Q is B − Bᵀ.

        limit: see `bounded`.
        """
        Q = bounded(blocks.double(), limit)
        rows, columns = torch.triu_indices(Q.shape[-1], Q.shape[-1], 1)
        dtype = torch.promote_types(torch.float32, blocks.dtype)
        skew = (Q[:, rows, columns] * _divisor(Q.shape[-1])).to(dtype)
        return {"oft_skew": skew} | ({} if rescale is None else {"rescale": rescale.flatten()})

    @property
    def block_size(self) -> int:
        """b, of b(b − 1)/2 numbers a block."""
        return (1 + math.isqrt(1 + 8 * self.oft_skew.shape[1])) // 2

    def _rank(self) -> None:
        skew, rescale = self.oft_skew, self.rescale
        if skew is None or skew.dim() != 2:
            raise ValueError("oft needs oft_skew, a row of numbers a block")
        if self.block_size * (self.block_size - 1) // 2 != skew.shape[1]:
            raise ValueError(f"{skew.shape[1]} numbers are no block's upper triangle")
        if rescale is not None and rescale.numel() != len(skew) * self.block_size:
            raise ValueError(
                f"rescale has {rescale.numel()} numbers, and the blocks turn "
                f"{len(skew) * self.block_size} outputs"
            )

    def fit(self, shape: tuple[int, ...] | None) -> None:
        """See `Delta.fit`; the tensors alone have a number of outputs, and 0 stands for inputs."""
        outputs = len(self.oft_skew) * self.block_size
        if shape is not None and (len(shape) < 2 or shape[0] != outputs):
            raise ValueError(
                f"oft_skew turns {len(self.oft_skew)} × {self.block_size} outputs, and the weight "
                f"is {tuple(shape)}"
            )
        if shape is None:
            self.shape = (outputs, 0)
        else:
            self._fit_magnitude(tuple(shape), None)

    def blocks(self) -> Tensor:
        """The blocks of a file, (blocks, b, b): the upper triangle of Q."""
        b = self.block_size
        rows, columns = torch.triu_indices(b, b, 1, device=self.oft_skew.device)
        upper = self.oft_skew.new_zeros(len(self.oft_skew), b, b)
        upper[:, rows, columns] = self.oft_skew / _divisor(b)
        return upper

    def by_itself(self) -> Tensor:
        """D Rᵀ − I, (blocks, b, b)."""
        upper = self.blocks()
        turn = turn_of(upper - upper.mT)
        if self.rescale is None:
            return turn
        factors = self.rescale.view(*turn.shape[:2], 1)
        # at D = I the second part is 0, so that ΔW is 0 to the bit
        return factors * turn + (factors - 1) * torch.eye(
            turn.shape[-1], dtype=turn.dtype, device=turn.device
        )

    def change(self, W: Tensor) -> Tensor:
        turn = self.by_itself()
        with without_autocast(turn):
            W = W.to(torch.promote_types(W.dtype, turn.dtype))
            rows = W.reshape(*turn.shape[:2], -1)
            return (turn @ rows).reshape(W.shape)

    def weight(self) -> Tensor:
        raise UsageError("it is of the method oft, whose ΔW depends on the base: give --model")

    def scale_by(self, ratio: float | Tensor) -> None:
        raise ValueError("ΔW of oft is a rotation of W and cannot be scaled")


def _divisor(block_size: int) -> float:
    """2√(b − 1), see `OFT`."""
    return 2 * math.sqrt(max(1, block_size - 1))
