"""Adapted layers: deltas around an untouched frozen layer, one class per type of layer.

h = W₀x + (α/r)·B(Ax), Hu et al. 2021, equation 3, for a delta B·A with the rule add; all others
compute with W' = `Delta.compose(W₀)`, the same weight as after `merge`.
"""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd_lora.adapters.deltas import Delta


class AdaptedLayer(nn.Module):
    """A frozen layer `base` with trained deltas of one or more of its parameters.

    The base is wrapped, never changed: `eject` gives back the identical object. Model code that
    reads an adapted parameter (`layer.weight`) gets the effective one, W'; all other attributes
    (`in_channels`, `bias`, …) are the base's. This class works for any module and computes with W';
    its subclasses have cheaper ways.

    Args:
        base: the layer to adapt.
        deltas: parameter path in the base ("weight", "bias", "out_proj.weight") → delta.
        dropout: probability of zeroing an input element of the delta in training.
        neuron_dropout: probability of zeroing an element of h = A x in training.
        module_dropout: probability of leaving out the layer's deltas in training.

    Each dropout divides the rest by 1 − p, so that the mean of ΔW in training is ΔW.

    Raises:
        ValueError: an option that this type of layer cannot follow exactly, with the reason.
    """

    base: Any
    parameter_paths: ClassVar[tuple[str, ...]] = ("weight",)
    """The parameters adapted in a target of this type, as far as the base has them."""
    transposed: ClassVar[bool] = False
    """True for a weight (in, out/groups, k…): ΔW is transposed into it, group by group."""
    supports_input_dropout: ClassVar[bool] = False
    """True if `dropout` can be above 0."""

    def __init__(
        self,
        base: Any,
        deltas: Mapping[str, Delta],
        dropout: float = 0.0,
        neuron_dropout: float = 0.0,
        module_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.base = base
        self.deltas = nn.ModuleDict({path.replace(".", "/"): d for path, d in deltas.items()})
        weight = deltas.get("weight") if {*deltas} <= {"weight", "bias"} else None
        self._adds_weight = weight is not None and weight.magnitude is None
        self._scales_outputs = weight is not None and self._is_low_rank_dora(weight)
        self._has_bias_delta = "bias" in deltas
        self.dropout, self.neuron_dropout = dropout, neuron_dropout
        self.module_dropout, self.strength = module_dropout, 1.0
        self.rank_mask: Tensor | None = None  # (batch, rank), see `merging.mask_ranks`
        self._originals: dict[str, nn.Parameter] = {}  # the base's own parameters while merged
        if dropout and not self.supports_input_dropout:
            raise ValueError(
                f"dropout: a {type(base).__name__} has no input elements to drop; leave out "
                "dropout or this target"
            )
        factors = self._low_rank_factors()
        if neuron_dropout and factors is None:
            raise ValueError(
                "neuron_dropout drops elements of A x: it works only with the methods lora and "
                "lora_fa and the rule add"
            )
        if neuron_dropout and factors is not None and len(factors[0]) != self.delta.rank:
            raise ValueError(
                "neuron_dropout does not work with the inits pissa and loftq: it would drop "
                "elements of A x and keep those of A₀ x"
            )

    @classmethod
    def check(cls, base: Any) -> None:
        """Raise ValueError, with the reason, for a layer that cannot be adapted exactly."""

    @classmethod
    def prepare_delta(cls, base: Any, delta: Delta) -> None:
        """Change a fresh delta of the weight where this layer needs it."""

    @classmethod
    def paths_in(cls, base: Any) -> list[str]:
        """Paths of the parameters to adapt in this base."""
        own = dict(base.named_parameters())
        return [path for path in cls.parameter_paths if path in own]

    @classmethod
    def weight_of(cls, base: Any, path: str) -> Tensor:
        """A frozen parameter in its delta's layout, (out, in/groups, k…)."""
        return cls.swap_layout(base, base.get_parameter(path).detach())

    @classmethod
    def swap_layout(cls, base: Any, t: Tensor) -> Tensor:
        """A parameter from the base's layout to its delta's, or back: the swap is its own inverse.

        With groups, the inputs of a group stand beside its own outputs in both layouts.
        """
        if not cls.transposed or t.dim() < 2:
            return t
        groups = getattr(base, "groups", 1)
        if groups == 1:
            return t.transpose(0, 1)
        return t.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)

    @property
    def delta(self) -> Delta:
        """Delta of the layer's weight."""
        # without nn.Module's look-ups, a tenth of a small layer's time
        return self._modules["deltas"]._modules["weight"]  # type: ignore[union-attr, return-value]

    @property
    def is_merged(self) -> bool:
        """True between `merge` and `unmerge`."""
        # torch.compile guards on a dictionary's length but not on its truth (torch 2.13)
        return len(self._originals) > 0

    @property
    def is_idle(self) -> bool:
        """True if the layer computes as its base because B is zero, as that of a fresh LoRA is.
        Of deltas without factors that is not known."""
        factors = None if self._has_bias_delta else self._low_rank_factors()
        return factors is not None and not bool(factors[1].any())

    def deltas_by_path(self) -> dict[str, Delta]:
        """Parameter path → delta."""
        return {key.replace("/", "."): delta for key, delta in self.deltas.items()}  # type: ignore[misc]

    def effective_weight(self, path: str = "weight", strength: float | None = None) -> Tensor:
        """W' in the base parameter's layout, float32 or higher."""
        delta: Any = self.deltas[path.replace(".", "/")]
        strength = self.strength if strength is None else strength
        W = delta.compose(self.weight_of(self.base, path), strength)
        return self.swap_layout(self.base, W)

    def delta_weight(self, path: str = "weight", strength: float | None = None) -> Tensor:
        """W' − W of a parameter, in its layout, float32 or higher: `merge` adds it."""
        delta: Any = self.deltas[path.replace(".", "/")]
        strength = self.strength if strength is None else strength
        if delta.magnitude is None:
            of_base = delta.of_base  # else W is not asked for: a quantised one takes time
            dW = delta.change(self.weight_of(self.base, path)) if of_base else delta.weight()
            return self.swap_layout(self.base, dW if strength == 1 else strength * dW)
        return self.effective_weight(path, strength) - self.swap_layout(
            self.base, self.weight_of(self.base, path)
        )

    @torch.no_grad()
    def merge(self) -> None:
        """Replace W by W' in the base, and keep W for `unmerge`. A second merge does nothing.

        The parameter object is exchanged, not its data: another layer that shares the weight (tied
        embeddings) keeps W.
        """
        if self.is_merged:
            return
        merged = {path: self.effective_weight(path) for path in self.deltas_by_path()}
        for path, W in merged.items():
            own = self.base.get_parameter(path)
            self._originals[path] = own
            self._set_parameter(
                path, nn.Parameter(W.to(own.dtype).contiguous(), requires_grad=False)
            )

    def unmerge(self) -> None:
        """Put the base's own parameters back, bit for bit."""
        for path, own in self._originals.items():
            now = self.base.get_parameter(path)
            if own.device != now.device or own.dtype != now.dtype:  # moved while merged
                own.data = own.data.to(now.device, now.dtype)
            self._set_parameter(path, own)
        self._originals = {}

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self.is_merged:  # loading W' and the delta would add the delta twice
            raise RuntimeError(
                "a merged layer cannot be saved, for its state would hold the delta twice: call "
                "unmerge or eject first"
            )
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self.is_merged:  # torch's load_state_dict would load W into W'
            raise RuntimeError("a merged layer cannot load a state: unmerge the model first")
        super()._load_from_state_dict(*args, **kwargs)

    def _set_parameter(self, path: str, parameter: nn.Parameter) -> None:
        module, _, name = path.rpartition(".")
        setattr(self.base.get_submodule(module), name, parameter)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_merged or (not self.strength and not torch.is_grad_enabled()):
            return self.base(*args, **kwargs)  # with gradients, factors get zeros
        strength = self.strength
        if self.module_dropout and self.training:
            # drawn on the CPU: a branch on a GPU's number would wait for the GPU
            if torch.rand(()) < self.module_dropout:
                strength = 0.0
            else:
                strength = strength / (1 - self.module_dropout)
        deltas: Any = [d for d in self.deltas.values() if d.rank_dropout] if self.training else []
        for delta in deltas:
            delta.drops_ranks = True
        try:
            return self._forward(strength, *args, **kwargs)
        finally:
            for delta in deltas:
                delta.drops_ranks = False

    def _forward(self, strength: float, *args: Any, **kwargs: Any) -> Any:
        """The layer's output with W + strength·(W' − W)."""
        effective = {}
        for path in self.deltas_by_path():
            W = self.effective_weight(path, strength)
            effective[path] = W.to(self.base.get_parameter(path).dtype)
        return torch.func.functional_call(self.base, effective, args, kwargs)

    def _low_rank_factors(self) -> tuple[Tensor, Tensor] | None:
        """A and B if the weight's delta is B·A with the rule add, and at most a bias has another
        delta; else None."""
        return self.delta.low_rank() if self._adds_weight else None

    @staticmethod
    def _is_low_rank_dora(delta: Delta) -> bool:
        """True for DoRA of B·A: W' x is W x + ΔW x times one number an output."""
        m = delta.magnitude
        return m is not None and m.shape[0] == delta.shape[0] and delta.low_rank() is not None

    def _drop_inputs(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x

    def _drop_neurons(self, h: Tensor, rank_dim: int = -1) -> Tensor:
        """h = A x after the dropout of its elements, and without the ranks that are masked.

        rank_dim: of h, whose first dimension is the batch.
        """
        h = F.dropout(h, self.neuron_dropout, self.training) if self.neuron_dropout else h
        if self.rank_mask is None:
            return h
        shape = [1] * h.dim()
        shape[0], shape[rank_dim] = len(h), h.shape[rank_dim]
        repeats = h.shape[rank_dim] // self.rank_mask.shape[1]  # groups of a convolution
        return h * self.rank_mask.to(h.dtype).repeat(1, repeats).view(shape)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base", "deltas") or name.startswith("__"):  # half-built, as in copy.copy
                raise
        return self._effective_parameter(name) if name in self.deltas else getattr(self.base, name)

    def _effective_parameter(self, path: str) -> Any:
        """W' of an adapted parameter in the base's dtype, or the base's own parameter."""
        own = self.base
        for name in path.split("."):
            own = getattr(own, name)
        if self.is_merged or path.replace(".", "/") not in self.deltas:
            return own
        return self.effective_weight(path).to(own.dtype)


class AdaptedEmbedding(AdaptedLayer):
    """`nn.Embedding`, weight (rows, dim): ΔW = (s·B·A)ᵀ with A (r, rows) and B (dim, r).

    The row `padding_idx` is not trained, as in torch. With `max_norm` the looked-up rows of W' are
    scaled down to it. The base is not called then: it rewrites its own weight at each call.
    """

    transposed = True

    @classmethod
    def prepare_delta(cls, base: Any, delta: Delta) -> None:
        if base.padding_idx is not None:
            delta.zero_input_row(base.padding_idx)

    @classmethod
    def check(cls, base: Any) -> None:
        if base.sparse:
            raise ValueError(
                "an Embedding with sparse=True needs sparse gradients, and a delta's are dense: "
                "set sparse=False, or leave out this target"
            )

    def effective_weight(self, path: str = "weight", strength: float | None = None) -> Tensor:
        W, padding = super().effective_weight(path, strength), self.base.padding_idx
        if path != "weight" or padding is None or self.delta.magnitude is None:
            return W
        # a magnitude would rescale the padding row
        trained = torch.arange(len(W), device=W.device) != padding
        return torch.where(trained[:, None], W, self.base.weight.to(W.dtype))

    def _forward(self, strength: float, input: Tensor) -> Tensor:
        factors = self._low_rank_factors()
        if factors is None:
            W = self.effective_weight("weight", strength).to(self.base.weight.dtype)
            rows = self._look_up(input, W)
        else:
            rows = self._look_up(input, self.base.weight)
            A, B = factors[0].to(rows.dtype), factors[1].to(rows.dtype)
            h = self._drop_neurons(self._look_up(input, A.T))
            rows = rows + F.linear(h * (strength * self.delta.scale), B)
        return rows if self.base.max_norm is None else self._limit_norms(rows)

    def _look_up(self, ids: Tensor, weight: Tensor) -> Tensor:
        frequency = self.base.scale_grad_by_freq
        return F.embedding(ids, weight, self.base.padding_idx, scale_grad_by_freq=frequency)

    def _limit_norms(self, rows: Tensor) -> Tensor:
        """Rows scaled down to a p-norm of at most max_norm, with torch's own rounding."""
        p, max_norm = self.base.norm_type, self.base.max_norm
        norm = torch.linalg.vector_norm(rows, p, dim=-1, keepdim=True)
        # 1e-7 is torch's ε
        limited = torch.where(norm > max_norm, rows * (max_norm / (norm + 1e-7)), rows)
        with torch.no_grad():  # torch's operator has no gradient, and its sum another last bit
            own = rows.detach().flatten(0, -2).clone()
            torch.embedding_renorm_(own, torch.arange(len(own), device=own.device), max_norm, p)
            rounding = own.view_as(rows) - limited
        return limited + rounding


class AdaptedAttention(AdaptedLayer):
    """`nn.MultiheadAttention`: packed or separate input projections, and the output projection."""

    parameter_paths = (
        "in_proj_weight",
        "q_proj_weight",
        "k_proj_weight",
        "v_proj_weight",
        "out_proj.weight",
    )

    @property
    def out_proj(self) -> SimpleNamespace:
        """Effective output projection. In eval mode without gradients a TransformerEncoderLayer
        runs its own kernel with these weights and never calls this layer."""
        return SimpleNamespace(
            weight=self._effective_parameter("out_proj.weight"),
            bias=self._effective_parameter("out_proj.bias"),
        )


class AdaptedNorm(AdaptedLayer):
    """LayerNorm, GroupNorm, RMSNorm, BatchNorm: weight and bias, by the method full."""

    parameter_paths = ("weight", "bias")

    @classmethod
    def check(cls, base: Any) -> None:
        if not cls.paths_in(base):
            raise ValueError(f"this {type(base).__name__} has no weight and no bias to train")
