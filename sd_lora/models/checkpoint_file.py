"""The tensors of a checkpoint, 8-bit ones with their scales: W = stored · scale.

ComfyUI's scaled checkpoints have `X.scale_weight` beside `X.weight` and a mark `scaled_fp8`; newer
ones have `X.weight_scale`, and a description `X.comfy_quant` or one of all layers in the header. A
scale is one number, one an output, or one for each of equal blocks.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from sd_lora.errors import UsageError
from sd_lora.files import PARSER_ERRORS, TensorFile

_SCALES = ("scale_weight", "weight_scale")
_BESIDE = (*_SCALES, "scale_input", "input_scale", "comfy_quant")
_MARK = "scaled_fp8"
DESCRIPTION = "_quantization_metadata"
"""Header key of all layers' descriptions."""

_LINEAR = ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise")
"""Formats of a description in which W is stored · scale; others pack or rotate the numbers."""


class CheckpointFile(TensorFile):
    """A file's tensors by key, with their scales multiplied in (float32) and no key for these.

    path: of the file.
    scale_keys: key of a scaled weight → key of its scale.
    beside: keys of all scales, marks and descriptions.

    Raises:
        UsageError: as `TensorFile`; numbers that are packed or rotated, with the layer's name.
    """

    def __init__(self, path: Path) -> None:
        self.scale_keys: dict[str, str] = {}
        self.beside: dict[str, None] = {}
        super().__init__(path)
        stored = [*super().__iter__()]
        known = {*stored}
        for key in stored:
            stem, _, end = key.rpartition(".")
            if end == _MARK or (end in _BESIDE and f"{stem}.weight" in known):
                self.beside[key] = None
            if key in self.beside and end in _SCALES:
                self.scale_keys[f"{stem}.weight"] = key
            if key in self.beside and end == "comfy_quant":
                self._refuse_other(stem, _parsed(bytes(self.stored(key).flatten().tolist())))
        layers = _parsed(self.header.get(DESCRIPTION, "{}")).get("layers")
        for stem, said in layers.items() if isinstance(layers, dict) else ():
            self._refuse_other(stem, said if isinstance(said, dict) else {})

    def _refuse_other(self, stem: str, said: dict[str, object]) -> None:
        kind = str(said.get("format", _LINEAR[0]))
        if kind not in _LINEAR or said.get("convrot"):
            kind = f"{kind}, rotated" if kind in _LINEAR else kind
            raise UsageError(
                f"{self.path} holds {stem} in the format {kind}, which cannot be read: take the "
                "model in float16, bfloat16 or scaled float8"
            )

    def stored(self, key: str) -> Tensor:
        """A tensor as it is in the file."""
        return super().__getitem__(key)

    def __getitem__(self, key: str) -> Tensor:
        tensor = self.stored(key)
        if key not in self.scale_keys:
            return tensor
        return tensor.float() * self._scale(key)

    def __iter__(self) -> Iterator[str]:
        return (key for key in super().__iter__() if key not in self.beside)

    def __len__(self) -> int:
        return super().__len__() - len(self.beside)

    def _scale(self, key: str) -> Tensor:
        """The scale of a key in float32, in a shape that broadcasts to the tensor's."""
        blocks = self._blocks(key)
        for dim, (size, parts) in enumerate(zip(self.shape(key), blocks.shape, strict=True)):
            if parts > 1:
                blocks = blocks.repeat_interleave(size // parts, dim)
        return blocks

    def _blocks(self, key: str) -> Tensor:
        """The scale of a key in float32: along each dimension one or a divisor of the tensor's.

        Raises:
            UsageError: a scale of another shape.
        """
        scale, shape = self.stored(self.scale_keys[key]), self.shape(key)
        sizes = [*scale.shape]
        while len(sizes) > len(shape) and sizes[-1] == 1:
            sizes.pop()
        sizes += [1] * (len(shape) - len(sizes))
        fits = len(sizes) == len(shape) and all(
            s and not n % s for n, s in zip(shape, sizes, strict=True)
        )
        if not scale.is_floating_point() or not fits:
            raise UsageError(
                f"{self.path}: {self.scale_keys[key]} is {str(scale.dtype)[6:]} "
                f"{tuple(scale.shape)}, no scale of a weight {shape} that can be read"
            )
        return scale.reshape(sizes).float()

    def rescaled(
        self, key: str, W: Tensor, round_to: Callable[[Tensor, torch.dtype], Tensor]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """A scaled weight's key and its scale's with their tensors for another W, and the W that
        they hold.

        A scale grows where a number of its block would be beyond the stored dtype.

        Args:
            key: of the weight.
            W: float32.
            round_to: tensor and dtype → the tensor in it.
        """
        dtype, _ = self.spec(key)
        limit = _largest(dtype)
        own, blocks = self.stored(self.scale_keys[key]), self._blocks(key)
        parts = [n for size, s in zip(W.shape, blocks.shape, strict=True) for n in (s, size // s)]
        inner = tuple(range(1, len(parts), 2))
        reached = (W.abs().reshape(parts).amax(inner) if parts else W.abs()) / limit
        new = torch.where(reached > blocks, reached, blocks).to(own.dtype)
        divisor = new.float().clamp(min=torch.finfo(torch.float32).tiny)
        for dim, (size, count) in enumerate(zip(W.shape, blocks.shape, strict=True)):
            divisor = divisor.repeat_interleave(size // count, dim)
        quotient = round_to((W / divisor).clamp(-limit, limit), dtype)
        scale = new.reshape(own.shape)
        return {key: quotient, self.scale_keys[key]: scale}, quotient.float() * divisor

    def rounding(self, key: str) -> Tensor:
        """Half the distance of neighbouring numbers of the stored dtype, at each value of a tensor:
        the most that rounding to it may have changed."""
        stored = self.stored(key)
        if stored.dtype.is_floating_point:
            info = torch.finfo(stored.dtype)
            exponent = torch.frexp(stored.float()).exponent - 1
            distance = torch.ldexp(torch.full(stored.shape, info.eps), exponent)
            distance = distance.clamp(min=info.smallest_normal * info.eps)
        else:
            distance = torch.ones(stored.shape)
        return distance / 2 * (self._scale(key).abs() if key in self.scale_keys else 1.0)


def _largest(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).max if dtype.is_floating_point else torch.iinfo(dtype).max


def _parsed(text: bytes | str) -> dict[str, object]:
    """A description's table; {} for one that cannot be read."""
    try:
        found = json.loads(text)
    except PARSER_ERRORS:
        return {}
    return found if isinstance(found, dict) else {}
