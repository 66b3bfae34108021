"""Table of layer classes and their adapted classes, and the wrapping of one layer."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from sd_lora.adapters.deltas import Delta
from sd_lora.adapters.layers import AdaptedAttention, AdaptedEmbedding, AdaptedLayer, AdaptedNorm
from sd_lora.adapters.linear_conv import (
    AdaptedConv,
    AdaptedConvTranspose,
    AdaptedLinear,
    AdaptedTransposedLinear,
)
from sd_lora.adapters.quantized import AdaptedQuantized

_MATRIX_LAYERS: dict[str, type[AdaptedLayer]] = {
    "torch.nn.modules.linear.Linear": AdaptedLinear,
    "torch.nn.modules.conv.Conv1d": AdaptedConv,
    "torch.nn.modules.conv.Conv2d": AdaptedConv,
    "torch.nn.modules.conv.Conv3d": AdaptedConv,
    "torch.nn.modules.conv.ConvTranspose1d": AdaptedConvTranspose,
    "torch.nn.modules.conv.ConvTranspose2d": AdaptedConvTranspose,
    "torch.nn.modules.conv.ConvTranspose3d": AdaptedConvTranspose,
    "torch.nn.modules.sparse.Embedding": AdaptedEmbedding,
    "torch.nn.modules.activation.MultiheadAttention": AdaptedAttention,
    "transformers.pytorch_utils.Conv1D": AdaptedTransposedLinear,
    "bitsandbytes.nn.modules.Linear8bitLt": AdaptedQuantized,
    "bitsandbytes.nn.modules.Linear4bit": AdaptedQuantized,
    "bitsandbytes.nn.modules.LinearNF4": AdaptedQuantized,
    "bitsandbytes.nn.modules.LinearFP4": AdaptedQuantized,
    "sd_lora.models.quantized_base.QuantizedLinear": AdaptedQuantized,
}
"""Layer class → adapted class, of layers with a weight matrix.

Classes are named, so that no library is imported here. A subclass may compute something else, so
only the exact class counts.
"""

_NORM_LAYERS: dict[str, type[AdaptedLayer]] = {
    "torch.nn.modules.normalization.LayerNorm": AdaptedNorm,
    "torch.nn.modules.normalization.GroupNorm": AdaptedNorm,
    "torch.nn.modules.normalization.RMSNorm": AdaptedNorm,
    "torch.nn.modules.batchnorm.BatchNorm1d": AdaptedNorm,
    "torch.nn.modules.batchnorm.BatchNorm2d": AdaptedNorm,
    "torch.nn.modules.batchnorm.BatchNorm3d": AdaptedNorm,
}
"""Layer class → adapted class, of layers without a matrix: for the method full alone."""


def adapted_classes(method: str) -> dict[str, type[AdaptedLayer]]:
    """Layer class → adapted class, of all layers for a method."""
    return _MATRIX_LAYERS | _NORM_LAYERS if method == "full" else _MATRIX_LAYERS


def adapted_class_of(base: nn.Module, method: str = "lora") -> type[AdaptedLayer] | None:
    """Adapted class of a layer for a method; None if there is none."""
    cls = adapted_classes(method).get(f"{type(base).__module__}.{type(base).__qualname__}")
    weight = base._parameters.get("weight")
    if cls is AdaptedLinear and weight is not None and type(weight) is not nn.Parameter:
        # torchao keeps nn.Linear and puts its own tensor class into it
        quantized = getattr(type(weight), "dequantize", None) is not Tensor.dequantize
        return AdaptedQuantized if quantized else None
    return cls


def wrap(base: Any, deltas: Mapping[str, Delta], **dropouts: float) -> AdaptedLayer:
    """Wrap one layer with deltas.

    Args:
        base: any module. A class without a row in the tables computes W' at each call.
        deltas: parameter path ("weight", "bias", "out_proj.weight", …) → delta.
        dropouts: see `AdaptedLayer`.

    Raises:
        ValueError: a layer, parameter or dropout that cannot be exact, with the reason.
    """
    cls = adapted_class_of(base, "full") or AdaptedLayer
    if not {*deltas} & {*cls.parameter_paths}:
        cls = AdaptedLayer  # a bias alone
    cls.check(base)
    own = dict(base.named_parameters())
    for path, delta in deltas.items():
        if path not in own:
            # torch.nn.utils.weight_norm and others compute the weight in a hook
            raise ValueError(f"this {type(base).__name__} has no parameter {path!r}")
        W = cls.weight_of(base, path)
        delta.fit(tuple(W.shape))
        if not W.is_meta:
            delta.to(W.device)
    return cls(base, deltas, **dropouts)
