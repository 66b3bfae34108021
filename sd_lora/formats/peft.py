"""peft's keys and folders: `<module>.lora_A.weight`, `….hada_w1_a`, with adapter_config.json."""

import json
import math
import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sd_lora.adapters.deltas import Delta
from sd_lora.adapters.layer_classes import adapted_class_of
from sd_lora.adapters.layers import AdaptedAttention, AdaptedLayer
from sd_lora.adapters.state import locate, make_delta, refuse_overflow
from sd_lora.errors import UsageError
from sd_lora.files import Shape, Spec, TensorFile

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

_ENDS = {
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "lora_embedding_A": "lora_A",
    "lora_embedding_B": "lora_B",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
}
_KEY = re.compile(rf"(?P<name>.+?)\.(?P<end>{'|'.join(map(re.escape, _ENDS))}|(?:hada|lokr)_\w+)\Z")


def group(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Module name → our tensor name → tensor, and the tensors of no delta."""
    grouped: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        match = _KEY.match(key)
        if match is None:
            rest[key] = tensor
        else:
            kind = _ENDS.get(match["end"], match["end"])
            # a magnitude is one an output: (out,), or (1, out, 1, 1) for a convolution
            value = tensor.flatten() if kind == "magnitude" else tensor
            kinds = grouped.setdefault(match["name"], {})
            if kind in kinds:
                raise UsageError(f"{key} is in the file by two names")
            kinds[kind] = value
    return grouped, rest


def is_folder(path: Path) -> bool:
    return os.path.isfile(path / CONFIG_NAME)


def weights_of(path: Path) -> Path:
    """The file of a folder's tensors, or raises UsageError."""
    for name in (WEIGHTS_NAME, "adapter_model.bin"):
        if (path / name).is_file():
            return path / name
    raise UsageError(f"{path} has {CONFIG_NAME} and no {WEIGHTS_NAME}")


_COMPONENTS = ("unet", "text_encoder", "text_encoder_2")


def folders_of(path: Path) -> dict[str, Path]:
    """Component → folder of `PeftModel.save_pretrained`, of one below another; "" for a folder that
    is one itself; {} for others.
    """
    if is_folder(path):
        return {"": path}
    return {c: path / c for c in _COMPONENTS if is_folder(path / c)}


class Joined(Mapping[str, Tensor]):
    """The tensors of peft folders, with the component before each key where there is one.

    folders: as of `folders_of`. path: of the first one's weights, or, of several, their folder.
    """

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self._files = {c: TensorFile(weights_of(folder)) for c, folder in folders.items()}
        self._places = {
            f"{c}.{key}" if c else key: (file, key)
            for c, file in self._files.items()
            for key in file
        }
        first = next(iter(self._files.values())).path
        self.path = first if len(folders) == 1 else first.parent.parent
        self.header: dict[str, str] = {}
        self.left_out = [name for file in self._files.values() for name in file.left_out]

    def __getitem__(self, key: str) -> Tensor:
        file, own = self._places[key]
        return file[own]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def shape(self, key: str) -> Shape:
        """Return a tensor's shape without reading the tensor."""
        file, own = self._places[key]
        return file.shape(own)

    def spec(self, key: str) -> Spec:
        """Return a tensor's dtype and shape."""
        file, own = self._places[key]
        return file.spec(own)


def read_config(path: Path) -> dict[str, Any]:
    """The configuration of a peft folder; raises UsageError naming unreadable parts."""
    try:
        config = json.loads((path / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path / CONFIG_NAME} cannot be read: {error}") from None
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind not in ("LORA", "LOHA", "LOKR"):
        raise UsageError(
            f"{path} holds a peft adapter of type {kind}; LORA, LOHA, LOKR can be read"
        )
    _refuse_other_functions(path, config)
    return config


_KEEPS_BASE = (None, True, False, "gaussian", "orthogonal", "eva", "lycoris")
"""Values of `init_lora_weights` that leave the base unchanged; pissa, olora, corda, lora_ga and
loftq change it, so that B·A alone is not the trained function."""


def _refuse_other_functions(path: Path, config: Mapping[str, Any]) -> None:
    """Raise UsageError if the folder's function is not W + s·ΔW on the untouched base."""
    init = config.get("init_lora_weights")
    if init not in _KEEPS_BASE:
        raise UsageError(
            f"{path} was made with init_lora_weights {init!r}, which changes the base too: convert "
            "it by peft's save_pretrained(…, path_initial_model_for_weight_conversion=…)"
        )
    for name in ("alora_invocation_tokens", "layer_replication", "use_qalora", "lora_bias"):
        if config.get(name):
            raise UsageError(f"{path} was made with {name}, which cannot be read yet")


def read(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], model: nn.Module
) -> dict[str, Delta]:
    """Delta name → delta, from a folder of `PeftModel.save_pretrained` for `model`.

    Biases and modules_to_save are whole in the file; their deltas are the differences from the
    model.
    A MultiheadAttention's out_proj gets α/r·B·A like everything else; peft 0.21 itself adds it
    twice (its merge calls the inner layer's merge once more).

    Raises:
        UsageError: a key without a place in the model, or tensors that do not fit together.
    """
    grouped, rest = group(_stripped(tensors))
    deltas: dict[str, Delta] = {}
    modules = dict(model.named_modules())
    for name, parts in grouped.items():
        packed = name in modules and adapted_class_of(modules[name]) is AdaptedAttention
        own = f"{name}.in_proj_weight" if packed else name
        holder = name.removesuffix(".out_proj")  # peft gives out_proj the attention's own scale
        inner = holder in modules and adapted_class_of(modules[holder]) is AdaptedAttention
        if own in deltas:
            raise UsageError(f"{own} is in the file by two names")
        deltas[own] = rescale(make_delta(own, parts), config, [holder if inner else name])
    for key, value in rest.items():
        name = key.removesuffix(".weight")
        if name in deltas:
            raise UsageError(f"{key} is in the file both whole and as a delta")
        module_name, path = locate(model, name)
        module = model.get_submodule(module_name)
        if path not in dict(module.named_parameters()):
            raise UsageError(f"the file has {key!r}, which the model has not")
        cls = adapted_class_of(module, "full") or AdaptedLayer
        W = cls.swap_layout(module, cls.weight_of(module, path))  # in the layer's layout, as theirs
        if W.shape != value.shape:
            raise UsageError(f"{key} is {tuple(value.shape)} and the model's {tuple(W.shape)}")
        if not value.is_floating_point():
            raise UsageError(f"{key} holds {value.dtype} and not floating-point numbers")
        diff = value.to(W).float() - W.float()
        deltas[name] = make_delta(name, {"diff": cls.swap_layout(module, diff)})
    return deltas


def _stripped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a folder by the model's own names.

    Without the base's tensors that peft saves beside the deltas: an embedding's own weight, and the
    originals of modules that are there whole.
    """
    names = {
        key: re.sub(r"^base_model\.model\.|\.base_layer(?=\.)|\.modules_to_save(?=\.)", "", key)
        for key in tensors
    }
    present = {*names.values()}
    updated = {name.rpartition(".lora_")[0] for name in present}
    stripped: dict[str, Tensor] = {}
    for key, name in names.items():
        if key.endswith(".base_layer.weight") and name.removesuffix(".weight") in updated:
            continue
        if ".original_module." in name and name.replace(".original_module.", ".") in present:
            continue
        if name in stripped and not _same(stripped[name], tensors[key]):  # peft's own are
            raise UsageError(f"{key} is in the file by two names")
        stripped[name] = tensors[key]
    return stripped


def _same(a: Tensor, b: Tensor) -> bool:
    alike = a.dtype is b.dtype and a.shape == b.shape
    return alike and torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))


_UNREADABLE = (
    KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError, re.error,
)  # fmt: skip


def scale_of(config: Mapping[str, Any], names: Collection[str], rank: int | None = None) -> float:
    """α/r, or α/√r, of a module by a peft configuration.

    Args:
        config: with r, lora_alpha (or alpha), and patterns.
        names: of the module, one of which must match a pattern.
        rank: of the tensors, trusted above the configuration's.

    Raises:
        UsageError: an r or an alpha that is not a number above 0, or wrong patterns.
    """

    def of(pattern: str, default: str) -> float:
        for key, value in (config.get(pattern) or {}).items():  # peft's rule: the end, at a dot
            if any(_fits(key, name) for name in names):
                return float(value)
        return float(config[default])

    try:
        r = of("rank_pattern", "r")
        alpha = of("alpha_pattern", "lora_alpha" if "lora_alpha" in config else "alpha")
        own = r if rank is None else rank
        scale = alpha / (math.sqrt(own) if config.get("use_rslora") else own)
    except UsageError:
        raise
    except _UNREADABLE as error:
        raise UsageError(f"r or alpha of {min(names)} cannot be read: {error!r}") from None
    if not (r > 0 and 0 <= scale < math.inf):
        raise UsageError(f"r = {r:g} and alpha = {alpha:g} of {min(names)} make no scale")
    return scale


_MOST_WAYS = 23.0
"""log₂ of the ways in which Python's matcher may try a pattern on a name: a second at the worst."""


def _fits(pattern: str, name: str) -> bool:
    """Whether a pattern of a configuration is the end of a name, at a dot: peft's rule.

    Raises:
        UsageError: a pattern that could take Python's matcher for ever.
        re.error: a broken pattern.
    """
    if not re.search(r"[^\w.]", pattern):  # a name, as nearly always; a dot is any letter
        start = len(name) - len(pattern)
        same = start >= 0 and all(p in (".", c) for p, c in zip(pattern, name[start:], strict=True))
        return same and (not start or name[start - 1] == ".")
    bones = "".join(re.sub(r"\\.|\[\^?\]?[^\]]*\]", "x", pattern).split())
    ways = math.log2(len(name) + 1) * len(re.findall(r"[*+{]", bones)) + bones.count("?")
    ways += sum(math.log2(part.count("|") + 1) for part in re.split(r"[()]", bones))
    # a repeated group tries exponentially many ways; the flag x hides one behind blanks
    if ways > _MOST_WAYS or re.search(r"\)[*+{]|\(\?[^:=!<]", bones):
        raise UsageError(f"the configuration's pattern {pattern!r} could take for ever to match")
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def rescale(delta: Delta, config: Mapping[str, Any], names: Collection[str]) -> Delta:
    """Give a delta the scale of a peft configuration; returns it. Raises: see `scale_of`."""
    scale = scale_of(config, names, delta.rank)
    if delta.rank is not None:
        delta.alpha = scale * delta.rank
    else:  # a LoKr of two whole matrices: peft scales it, everybody else does not
        delta.scale_by(scale)
    refuse_overflow(min(names), delta)
    return delta
