"""Adapted layers: a low-rank update around an untouched frozen layer.

h = W₀x + (α/r)·B(Ax), Hu et al. 2021, equation 3. A convolution's A is the k×k kernel, its B the
1×1 one, as in LoCon and peft, so that ΔW = (α/r)·B·A reshapes to the kernel of the base.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd_lora.adapters.functional import lowrank_linear, pointwise

INITS = ("kaiming", "gaussian")


class AdaptedLayer(nn.Module):
    """A frozen layer `base` plus a trained update; subclasses say what the update is.

    The base is wrapped, never changed: `eject` gives back the identical object. Attributes that
    the wrapper lacks (`weight`, `in_channels`, …) are the base's, for model code that asks.
    """

    base: Any

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self._unmerged: Tensor | None = None  # the base's own weight while merged

    def delta_weight(self) -> Tensor:
        """Returns ΔW in the base weight's shape, at least in float32."""
        raise NotImplementedError

    @property
    def is_merged(self) -> bool:
        return self._unmerged is not None

    @torch.no_grad()
    def merge(self) -> None:
        """Puts W + ΔW in the base's place, keeping W itself. Merging twice is one merge."""
        if self.is_merged:
            return
        weight = self.base.weight
        delta = self.delta_weight()
        merged = (weight.to(delta.dtype) + delta).to(weight.dtype)
        self._unmerged, weight.data = weight.data, merged

    def unmerge(self) -> None:
        """Restores the base's weight, bit for bit: it is the tensor that was kept."""
        if self._unmerged is not None:
            self.base.weight.data = self._unmerged.to(self.base.weight.device)
            self._unmerged = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base" or name.startswith("__"):  # half-built, as in copy and pickle
                raise
            return getattr(self.base, name)


class _LoRA(AdaptedLayer):
    """The low-rank pair: lora_A (r, in…) and lora_B (out, r…), float32 whatever the base is.

    Args:
        base: the layer to adapt.
        rank: r, at least 1.
        alpha: α; the update is scaled by α/r.
        dropout: probability of zeroing an input element of the update during training.
        init: "kaiming" (uniform, a = √5, as loralib and peft) or "gaussian" (std 1/r) for A;
            B starts at zero, so the first output is the base's.
        generator: a CPU generator for A.
    """

    kinds: tuple[type[nn.Module], ...] = ()

    def __init__(
        self,
        base: Any,
        rank: int = 4,
        alpha: float | None = None,
        dropout: float = 0.0,
        init: str = "kaiming",
        generator: torch.Generator | None = None,
    ) -> None:
        if type(base) not in self.kinds:
            raise ValueError(f"{type(self).__name__} does not adapt {type(base).__name__}")
        if rank < 1:
            raise ValueError(f"rank must be at least 1, not {rank}")
        if init not in INITS:
            raise ValueError(f"init must be one of {', '.join(INITS)}, not {init!r}")
        super().__init__(base)
        self.rank, self.dropout = rank, dropout
        self.alpha = float(rank if alpha is None else alpha)
        weight = base.weight
        ones = (1,) * (weight.dim() - 2)
        A = torch.empty(rank, *weight.shape[1:])
        if init == "kaiming":
            nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
        else:
            nn.init.normal_(A, std=1 / rank, generator=generator)
        self.lora_A = nn.Parameter(A.to(weight.device))
        self.lora_B = nn.Parameter(torch.zeros(weight.shape[0], rank, *ones, device=weight.device))

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def delta_weight(self) -> Tensor:
        dtype = torch.promote_types(torch.float32, self.base.weight.dtype)
        A, B = self.lora_A.to(dtype), self.lora_B.to(dtype)
        return (self.scale * B.flatten(1) @ A.flatten(1)).view(self.base.weight.shape)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha:g}"


def _compute_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class LoRALinear(_LoRA):
    """A low-rank update of `nn.Linear`: lora_A (r, in), lora_B (out, r)."""

    kinds = (nn.Linear,)

    def _is_plain(self) -> bool:
        """Whether the fused path means the same: no dropout, frozen base, nobody listening."""
        base = self.base
        listened = bool(base._forward_hooks or base._forward_pre_hooks)
        frozen = not any(p.requires_grad for p in base.parameters())
        return frozen and not listened and not (self.dropout and self.training)

    def forward(self, x: Tensor) -> Tensor:
        if self.is_merged:
            return self.base(x)
        dtype = _compute_dtype(x)
        x = x.to(dtype)
        A, B = self.lora_A.to(dtype), self.lora_B.to(dtype)
        if self._is_plain():
            bias = self.base.bias
            W, bias = self.base.weight.to(dtype), None if bias is None else bias.to(dtype)
            return lowrank_linear(x, W, bias, A, B, self.scale)
        return self.base(x) + F.linear(F.linear(self._drop(x), A) * self.scale, B)


class _LoRAConv(_LoRA):
    """A low-rank update of a convolution: lora_A (r, in/groups, k…), lora_B (out, r, 1…).

    A runs with the base's own stride, padding, padding_mode and dilation. With groups, each group
    of inputs meets the same A and its own rows of B: that is what ΔW = B·A in the kernel's shape
    (out, in/groups, k…) means, so merged and unmerged are the same function for any rank.
    """

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if self.is_merged:
            return y
        dtype, groups = _compute_dtype(x), self.base.groups
        A, B = self.lora_A.to(dtype), self.lora_B.to(dtype)
        if groups > 1:
            A = A.repeat(groups, *(1,) * (A.dim() - 1))  # (r·groups, in/groups, k…)
        h = self.base._conv_forward(self._drop(x.to(dtype)), A, None)
        return y + pointwise(h * self.scale, B, groups)


class LoRAConv1d(_LoRAConv):
    """A low-rank update of `nn.Conv1d`."""

    kinds = (nn.Conv1d,)


class LoRAConv2d(_LoRAConv):
    """A low-rank update of `nn.Conv2d`."""

    kinds = (nn.Conv2d,)


class LoRAConv3d(_LoRAConv):
    """A low-rank update of `nn.Conv3d`."""

    kinds = (nn.Conv3d,)


LAYERS: dict[type[nn.Module], type[_LoRA]] = {
    kind: layer
    for layer in (LoRALinear, LoRAConv1d, LoRAConv2d, LoRAConv3d)
    for kind in layer.kinds
}
