"""Which layer is adapted by which class, and how one layer is wrapped."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from sd_lora.adapters.deltas import Delta
from sd_lora.adapters.layers import AdaptedAttention, AdaptedEmbedding, AdaptedLayer, AdaptedNorm
from sd_lora.adapters.products import AdaptedConv, AdaptedConv1D, AdaptedLinear
from sd_lora.adapters.quantized import AdaptedQuantized

_RANKED: dict[str, type[AdaptedLayer]] = {
    "torch.nn.modules.linear.Linear": AdaptedLinear,
    "torch.nn.modules.conv.Conv1d": AdaptedConv,
    "torch.nn.modules.conv.Conv2d": AdaptedConv,
    "torch.nn.modules.conv.Conv3d": AdaptedConv,
    "torch.nn.modules.sparse.Embedding": AdaptedEmbedding,
    "torch.nn.modules.activation.MultiheadAttention": AdaptedAttention,
    "transformers.pytorch_utils.Conv1D": AdaptedConv1D,
    "bitsandbytes.nn.modules.Linear8bitLt": AdaptedQuantized,
    "bitsandbytes.nn.modules.Linear4bit": AdaptedQuantized,
    "bitsandbytes.nn.modules.LinearNF4": AdaptedQuantized,
    "bitsandbytes.nn.modules.LinearFP4": AdaptedQuantized,
}
"""Exact class → adapted class. By name, so that none of the libraries is imported for it. A
subclass may compute something else, so it is not taken for the plain layer."""

_NORMS: dict[str, type[AdaptedLayer]] = {
    "torch.nn.modules.normalization.LayerNorm": AdaptedNorm,
    "torch.nn.modules.normalization.GroupNorm": AdaptedNorm,
    "torch.nn.modules.normalization.RMSNorm": AdaptedNorm,
    "torch.nn.modules.batchnorm.BatchNorm1d": AdaptedNorm,
    "torch.nn.modules.batchnorm.BatchNorm2d": AdaptedNorm,
    "torch.nn.modules.batchnorm.BatchNorm3d": AdaptedNorm,
}


def kinds(method: str) -> dict[str, type[AdaptedLayer]]:
    """Returns class name → adapted class of what a method can adapt: norms have no matrix."""
    return _RANKED | _NORMS if method == "full" else _RANKED


def kind_of(base: nn.Module, method: str = "lora") -> type[AdaptedLayer] | None:
    """Returns the adapted class for this layer, or None if there is none."""
    kind = kinds(method).get(f"{type(base).__module__}.{type(base).__qualname__}")
    weight = base._parameters.get("weight")
    if kind is AdaptedLinear and weight is not None and type(weight) is not nn.Parameter:
        # torchao leaves a plain Linear with a tensor of its own in it
        quantized = getattr(type(weight), "dequantize", None) is not Tensor.dequantize
        return AdaptedQuantized if quantized else None
    return kind


def wrap(base: Any, deltas: Mapping[str, Delta], **dropouts: float) -> AdaptedLayer:
    """Returns `base` with these updates (parameter path → update).

    Args:
        base: any module; of a kind without a class of its own, W' is computed at each call.
        deltas: "weight", "bias", "out_proj.weight", … → its update.
        dropouts: see AdaptedLayer.

    Raises:
        ValueError: what cannot be done exactly, with the reason.
    """
    kind = kind_of(base, "full") or AdaptedLayer
    if not {*deltas} & {*kind.paths}:
        kind = AdaptedLayer  # a bias alone
    kind.check(base)
    own = dict(base.named_parameters())
    for path, delta in deltas.items():
        if path not in own:
            # torch.nn.utils.weight_norm and its like compute the weight in a hook
            raise ValueError(f"{path!r} is no parameter of this {type(base).__name__}")
        W = kind.weight_of(base, path)
        delta.fit(tuple(W.shape))
        if not W.is_meta:
            delta.to(W.device)
    return kind(base, deltas, **dropouts)
