"""Methods whose ΔW is a function of the frozen weight W: (IA)³, GLoRA, BOFT.

Their files are read as the ΔW that they are on a base at hand; all are linear in W. OFT is one too,
and a method of its own (`sd_lora.adapters.oft`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sd_lora.adapters.oft import bounded, turn_of
from sd_lora.errors import UsageError

Parts = Mapping[str, Tensor]


def _ia3(W: Tensor, parts: Parts) -> Tensor:
    """W ⊙ w, one number an output or input (Liu et al. 2022)."""
    axis = 1 if bool(parts["on_input"]) else 0
    shape = [1] * W.dim()
    shape[axis] = W.shape[axis]
    return W * parts["weight"].to(W).reshape(shape)


def _glora(W: Tensor, parts: Parts) -> Tensor:
    """s·(W·A + B), A and B of rank r (Chavan et al. 2023), as LyCORIS has it: with a1·a2 and b1·b2
    since 2024, with a2·a1 and b2·b1 before, which the shapes show.
    """
    a, b = ([parts[f"{x}{i}.weight"].to(W).flatten(1) for i in "12"] for x in "ab")
    if a[0].shape[0] != W.shape[1] or b[0].shape[0] != W.shape[0]:
        a, b = a[::-1], b[::-1]
    rank = a[0].shape[1]
    alpha = float(parts["alpha"]) if "alpha" in parts else rank
    moved = torch.einsum("oi...,ij->oj...", W, a[0] @ a[1])
    return (moved + (b[0] @ b[1]).reshape(W.shape)) * (alpha / rank)


def _boft(W: Tensor, parts: Parts) -> Tensor:
    """(R − I)W, R a product of butterfly stages of blocks along the outputs (Liu et al. 2024).

    Each block is R of OFT, transposed; ‖Q‖ over all is at most alpha·outputs, if that is above 0.
    """
    Q = bounded(parts["oft_blocks"].float(), float(parts.get("alpha", 0.0)) * len(W))
    R = (turn_of(Q) + torch.eye(Q.shape[-1])).mT
    turned, half = W, R.shape[-1] // 2
    for stage, rotations in enumerate(R):
        reach = 2**stage * half
        mixed = turned.unflatten(0, (-1, 2, reach)).transpose(1, 2).flatten(0, 2)
        mixed = torch.einsum("bij,bj...->bi...", rotations, mixed.unflatten(0, (len(R[0]), -1)))
        turned = mixed.flatten(0, 1).unflatten(0, (-1, reach, 2)).transpose(1, 2).flatten(0, 2)
    if "rescale" in parts:
        turned = turned * parts["rescale"].to(W).reshape(-1, *[1] * (W.dim() - 1))
    return turned - W


@dataclass(frozen=True)
class Method:
    """One method. needs: kinds of tensor that every delta has; may: further ones."""

    title: str
    needs: tuple[str, ...]
    may: tuple[str, ...]
    change: Callable[[Tensor, Parts], Tensor]


METHODS = (
    Method("(IA)³", ("weight", "on_input"), (), _ia3),
    Method("GLoRA", tuple(f"{x}{i}.weight" for x in "ab" for i in "12"), ("alpha",), _glora),
    Method("BOFT", ("oft_blocks",), ("rescale", "alpha"), _boft),
)

KINDS = frozenset(kind for method in METHODS for kind in (*method.needs, *method.may))


@torch.no_grad()
def change(title: str, method: Method, W: Tensor, parts: Parts) -> Tensor:
    """ΔW of a method on W. title: of the delta, for messages.

    Raises:
        UsageError: tensors that do not fit W.
    """
    try:
        return method.change(W.float(), parts).reshape(W.shape)
    except (RuntimeError, ValueError, IndexError, ZeroDivisionError):
        shapes = ", ".join(f"{kind} {tuple(tensor.shape)}" for kind, tensor in parts.items())
        raise UsageError(
            f"{title}: {shapes} of {method.title} do not fit the base's weight {tuple(W.shape)}"
        ) from None


def method_of(kinds: Mapping[str, object]) -> Method | None:
    """The method whose tensors these are; None if there is none."""
    for method in METHODS:
        if {*method.needs} <= {*kinds} <= {*method.needs, *method.may}:
            return method
    return None
