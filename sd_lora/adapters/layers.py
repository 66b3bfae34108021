"""Adapted layers: an update around an untouched frozen layer, one class per kind of layer.

h = W₀x + (α/r)·B(Ax), Hu et al. 2021, equation 3, where the update has that form and is added;
else the layer computes with W' = `Delta.compose(W₀)`, exactly the weight that `merge` puts in.
"""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd_lora.adapters.deltas import Delta


class AdaptedLayer(nn.Module):
    """A frozen layer `base` plus a trained update of one or more of its parameters.

    The base is wrapped, never changed: `eject` gives back the identical object. An adapted
    parameter that model code asks for (`layer.weight`) is the effective one, W'; every other
    attribute that the wrapper lacks (`in_channels`, `bias`, …) is the base's. This class itself
    works for any module and computes with W'; its subclasses know cheaper ways.

    Args:
        base: the layer to adapt.
        deltas: parameter path in the base ("weight", "bias", "out_proj.weight") → its update.
        dropout: probability of zeroing an input element of the update in training.
        neuron_dropout: probability of zeroing an element of h = A x in training.
        module_dropout: probability of leaving out the whole update in training.

    Each dropout divides what it keeps by 1 − p, so the update's mean in training is the update.

    Raises:
        ValueError: what this kind of layer cannot do exactly, with the reason.
    """

    base: Any
    paths: ClassVar[tuple[str, ...]] = ("weight",)
    """The parameters that a target of this kind adapts, those of them that the base has."""
    transposed: ClassVar[bool] = False
    """Whether the weight is (in, out): ΔW is transposed into it."""
    takes_input_dropout: ClassVar[bool] = False

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
        self._adds = weight is not None and weight.magnitude is None
        self._scales = weight is not None and self._can_scale(weight)
        self._has_bias = "bias" in deltas
        self.dropout, self.neuron_dropout = dropout, neuron_dropout
        self.module_dropout, self.strength = module_dropout, 1.0
        self._unmerged: dict[str, nn.Parameter] = {}  # the base's own parameters while merged
        if dropout and not self.takes_input_dropout:
            raise ValueError(f"dropout of the input means nothing for a {type(base).__name__}")
        factors = self._cheap()
        if neuron_dropout and factors is None:
            raise ValueError("neuron_dropout drops elements of A x: it is for lora with rule add")
        if neuron_dropout and factors is not None and len(factors[0]) != self.delta.rank:
            raise ValueError("neuron_dropout would drop elements of A x and not those of its start")

    @classmethod
    def check(cls, base: Any) -> None:
        """Raises ValueError with the reason why this layer cannot be adapted exactly."""

    @classmethod
    def start(cls, base: Any, delta: Delta) -> None:
        """Makes a fresh update of the weight fit for this layer."""

    @classmethod
    def adaptable(cls, base: Any) -> list[str]:
        """Returns the paths of the base's parameters that a target adapts."""
        own = dict(base.named_parameters())
        return [path for path in cls.paths if path in own]

    @classmethod
    def weight_of(cls, base: Any, path: str) -> Tensor:
        """Returns a frozen parameter in the layout of its update, (out, in/groups, k…)."""
        W = base.get_parameter(path).detach()
        return W.T if cls.transposed and W.dim() == 2 else W

    @property
    def delta(self) -> Delta:
        """The update of the layer's weight."""
        # past nn.Module's lookups, which took a tenth of a small layer's time
        return self._modules["deltas"]._modules["weight"]  # type: ignore[union-attr, return-value]

    @property
    def is_merged(self) -> bool:
        # a compiled model is guarded by a dictionary's length, and not by its truth (torch 2.13)
        return len(self._unmerged) > 0

    def deltas_by_path(self) -> dict[str, Delta]:
        """Returns parameter path → update."""
        return {key.replace("/", "."): delta for key, delta in self.deltas.items()}  # type: ignore[misc]

    def effective(self, path: str = "weight", strength: float | None = None) -> Tensor:
        """Returns W' in the base parameter's layout, at least in float32."""
        delta: Any = self.deltas[path.replace(".", "/")]
        strength = self.strength if strength is None else strength
        return self._layout(delta.compose(self.weight_of(self.base, path), strength))

    def delta_weight(self, path: str = "weight", strength: float | None = None) -> Tensor:
        """Returns what merging adds to a parameter, in its layout, at least in float32."""
        delta: Any = self.deltas[path.replace(".", "/")]
        strength = self.strength if strength is None else strength
        if delta.magnitude is None:
            change = delta.weight()
            return self._layout(change if strength == 1 else strength * change)
        return self.effective(path, strength) - self._layout(self.weight_of(self.base, path))

    def _layout(self, t: Tensor) -> Tensor:
        """Takes a weight from its update's layout to the base's, or back."""
        return t.T if self.transposed and t.dim() == 2 else t

    @torch.no_grad()
    def merge(self) -> None:
        """Puts W' in the base's place, keeping W itself. Merging twice is one merge.

        The parameter object is exchanged, not its data: a weight that another layer shares (tied
        embeddings) stays what it is there.
        """
        if self.is_merged:
            return
        merged = {path: self.effective(path) for path in self.deltas_by_path()}
        for path, W in merged.items():
            own = self.base.get_parameter(path)
            self._unmerged[path] = own
            self._put(path, nn.Parameter(W.to(own.dtype).contiguous(), requires_grad=False))

    def unmerge(self) -> None:
        """Restores the base's parameters, bit for bit: they are the ones that were kept."""
        for path, own in self._unmerged.items():
            now = self.base.get_parameter(path)
            if own.device != now.device or own.dtype != now.dtype:  # moved while merged
                own.data = own.data.to(now.device, now.dtype)
            self._put(path, own)
        self._unmerged = {}

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self.is_merged:  # whoever loaded W' and the update would have the update twice
            raise RuntimeError("a merged layer has no state to save: unmerge or eject it before")
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self.is_merged:  # torch's load_state_dict would load W into W'
            raise RuntimeError("a merged layer cannot load a state: unmerge the model before that")
        super()._load_from_state_dict(*args, **kwargs)

    def _put(self, path: str, parameter: nn.Parameter) -> None:
        module, _, name = path.rpartition(".")
        setattr(self.base.get_submodule(module), name, parameter)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_merged:
            return self.base(*args, **kwargs)
        strength = self.strength
        if self.module_dropout and self.training:
            # the CPU's generator: the branch must not wait for a GPU
            if torch.rand(()) < self.module_dropout:
                strength = 0.0
            else:
                strength = strength / (1 - self.module_dropout)
        deltas: Any = [d for d in self.deltas.values() if d.rank_dropout] if self.training else []
        for delta in deltas:
            delta.dropping = True
        try:
            return self._forward(strength, *args, **kwargs)
        finally:
            for delta in deltas:
                delta.dropping = False

    def _forward(self, strength: float, *args: Any, **kwargs: Any) -> Any:
        """The layer with W + strength·(W' − W)."""
        changed = {}
        for path in self.deltas_by_path():
            changed[path] = self.effective(path, strength).to(self.base.get_parameter(path).dtype)
        return torch.func.functional_call(self.base, changed, args, kwargs)

    def _cheap(self) -> tuple[Tensor, Tensor] | None:
        """Returns A and B if the update is B·A, added, and nothing else but a bias is updated."""
        return self.delta.low_rank() if self._adds else None

    @staticmethod
    def _can_scale(delta: Delta) -> bool:
        """Whether W' x is W x + ΔW x, scaled output by output: DoRA of B·A."""
        m = delta.magnitude
        return m is not None and m.shape[0] == delta.shape[0] and delta.low_rank() is not None

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x

    def _drop_neurons(self, h: Tensor) -> Tensor:
        return F.dropout(h, self.neuron_dropout, self.training) if self.neuron_dropout else h

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base", "deltas") or name.startswith("__"):  # half-built, as in copies
                raise
        return self._now(name) if name in self.deltas else getattr(self.base, name)

    def _now(self, path: str) -> Any:
        """Returns what the layer computes with in a parameter's place, in the base's dtype."""
        own = self.base
        for name in path.split("."):
            own = getattr(own, name)
        if self.is_merged or path.replace(".", "/") not in self.deltas:
            return own
        return self.effective(path).to(own.dtype)


class AdaptedEmbedding(AdaptedLayer):
    """`nn.Embedding`, weight (rows, dim): ΔW = (s·B·A)ᵀ with A (r, rows) and B (dim, r).

    The row `padding_idx` is not trained, as in the base. With `max_norm` the looked-up rows of W'
    are scaled down to it; the base itself rewrites its weight at each call, and is not called.
    """

    transposed = True

    @classmethod
    def start(cls, base: Any, delta: Delta) -> None:
        if base.padding_idx is not None:
            delta.zero_input_row(base.padding_idx)

    @classmethod
    def check(cls, base: Any) -> None:
        if base.sparse:
            raise ValueError("sparse=True wants sparse gradients, and the update's are dense")

    def effective(self, path: str = "weight", strength: float | None = None) -> Tensor:
        W, row = super().effective(path, strength), self.base.padding_idx
        if path != "weight" or row is None or self.delta.magnitude is None:
            return W
        others = torch.arange(len(W), device=W.device) != row  # a magnitude would rescale it
        return torch.where(others[:, None], W, self.base.weight.to(W.dtype))

    def _forward(self, strength: float, input: Tensor) -> Tensor:
        factors = self._cheap()
        if factors is None:
            W = self.effective("weight", strength).to(self.base.weight.dtype)
            rows = self._look_up(input, W)
        else:
            rows = self._look_up(input, self.base.weight)
            A, B = factors[0].to(rows.dtype), factors[1].to(rows.dtype)
            h = self._drop_neurons(self._look_up(input, A.T))
            rows = rows + F.linear(h * (strength * self.delta.scale), B)
        return rows if self.base.max_norm is None else self._renorm(rows)

    def _look_up(self, ids: Tensor, weight: Tensor) -> Tensor:
        frequency = self.base.scale_grad_by_freq
        return F.embedding(ids, weight, self.base.padding_idx, scale_grad_by_freq=frequency)

    def _renorm(self, rows: Tensor) -> Tensor:
        p, most = self.base.norm_type, self.base.max_norm
        norm = torch.linalg.vector_norm(rows, p, dim=-1, keepdim=True)
        shrunk = torch.where(norm > most, rows * (most / (norm + 1e-7)), rows)  # torch's ε
        with torch.no_grad():  # torch's own operator sums in another order: its last bit is taken
            own = rows.detach().flatten(0, -2).clone()
            torch.embedding_renorm_(own, torch.arange(len(own), device=own.device), most, p)
            rounding = own.view_as(rows) - shrunk
        return shrunk + rounding


class AdaptedAttention(AdaptedLayer):
    """`nn.MultiheadAttention`: its packed or separate input projections and its output's."""

    paths = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")

    @property
    def out_proj(self) -> SimpleNamespace:
        """The effective output projection: in eval without gradients a TransformerEncoderLayer
        calls its own kernel with these weights instead of this forward."""
        return SimpleNamespace(weight=self._now("out_proj.weight"), bias=self._now("out_proj.bias"))


class AdaptedNorm(AdaptedLayer):
    """LayerNorm, GroupNorm, RMSNorm, BatchNorm: their gain and their shift, by the method full."""

    paths = ("weight", "bias")

    @classmethod
    def check(cls, base: Any) -> None:
        if not cls.adaptable(base):
            raise ValueError(f"this {type(base).__name__} has no gain and no shift to train")
