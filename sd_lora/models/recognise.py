"""A checkpoint's file: opened without trust, and named if it is of a model of another kind."""

import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers.loaders.single_file_utils import infer_diffusers_model_type
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sd_lora.errors import UsageError

Shape = tuple[int, ...]

PICKLES = (".ckpt", ".pt", ".pth", ".bin")

# what diffusers, torch and safetensors raise over foreign bytes
FAILURES = (
    ArithmeticError,
    AttributeError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    SafetensorError,
    TypeError,
    ValueError,
)

UNET, VAE = "model.diffusion_model.", "first_stage_model."
SD2, SDXL = "cond_stage_model.model.", "conditioner.embedders.1.model."
REFINER = "conditioner.embedders.0.model."
OPEN_CLIP = (SD2, SDXL, REFINER)
PREFIXES = {
    "unet": (UNET,),
    "vae": (VAE,),
    "text_encoder": ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer.", SD2),
    "text_encoder_2": (SDXL, REFINER),
}
"""Part → what its keys may begin with."""

CONV_IN = f"{UNET}input_blocks.0.0.weight"
PROJ_IN = f"{UNET}middle_block.1.proj_in.weight"
TEXT_KEYS = f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight"
ADDED = f"{UNET}label_emb.0.0.weight"

# What other models are called: by diffusers' names of them, by ends of keys (in sizes that it does
# not know), by starts of keys, by what is in a UNet of these families, and by its input channels.
_TYPES = {
    "sd35": "Stable Diffusion 3.5",
    "sd3": "Stable Diffusion 3",
    "flux-": "Flux",
    "stable_cascade": "Stable Cascade",
    "animatediff": "an AnimateDiff motion module",
    "controlnet": "a ControlNet",
}
_PIXART = {"blocks.0.mlp.fc1.weight", "blocks.0.cross_attn.kv_linear.weight"}
_ENDS = {
    "adaln_single.linear.weight": "PixArt",
    "clip_txt_mapper.weight": "Stable Cascade",
    "channelwise.0.weight": "Stable Cascade",
    "joint_blocks.0.x_block.mlp.fc1.weight": "Stable Diffusion 3",
    "img_attn.norm.key_norm.scale": "Flux",
    "temporal_transformer.norm.weight": "an AnimateDiff motion module",
    "input_hint_block.0.weight": "a ControlNet",
}
_STARTS = {
    (UNET,): f"incomplete: its UNet has no {CONV_IN}",
    (VAE, "encoder.conv_in.", "decoder.conv_in."): "a VAE alone",
    ("cond_stage_model.", "conditioner.", "text_model.", "transformer.res"): "a text encoder alone",
    ("input_blocks.", "diffusion_model.", "conv_in."): "a UNet alone, without a checkpoint's names",
}
_INSIDE = {
    "control_model.": "a ControlNet",
    "time_stack.": "Stable Video Diffusion",
    "motion_modules.": "an AnimateDiff model",
    f"{UNET}label_emb.weight": "an upscaler",
}
_CHANNELS = {5: "a depth", 7: "an upscaling", 8: "an InstructPix2Pix"}


class TensorsOfFile:
    """A file's tensors, each read when it is asked for. Raises UsageError: what is broken, how."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise UsageError(f"{path} is not a file")
        if path.suffix not in (".safetensors", *PICKLES):
            kinds = ", ".join(PICKLES)
            raise UsageError(f"{path} is no checkpoint by its name: .safetensors, {kinds} are")
        self.header: dict[str, str] = {}
        try:
            if path.suffix in PICKLES:
                tensors = _unpickle(path)
                self.shapes = {key: tuple(t.shape) for key, t in tensors.items()}
                self._read = tensors.__getitem__
                return
            file = safe_open(path, "pt")
            self.header = file.metadata() or {}
            self.shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
            self._read = file.get_tensor
        except UsageError:
            raise
        except Exception as error:  # foreign parsers over foreign bytes: it is the file's fault
            raise UsageError(f"{path} cannot be read: {_cut(path) or reason(error)}") from None

    def __getitem__(self, key: str) -> Tensor:
        return self._read(key)


def _cut(path: Path) -> str | None:
    """Returns what a file lacks at its end, None if that is not what is wrong or not known."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(9)
        if start == b"version h":
            return "it is a git-lfs pointer, which stands for the file: run `git lfs pull`"
        if size < 9:
            return f"it is cut off: it has {size} bytes"
        if start.startswith(b"PK"):
            return "it is cut off or damaged: a zip's table of contents, at its end, is not there"
        length = int.from_bytes(start[:8], "little")
        if path.suffix in PICKLES or start[8:] != b"{":
            return None
        if 8 + length > size:
            return f"it is cut off: its header has {length} bytes, and the whole file {size}"
        try:
            file.seek(8)
            table = json.loads(file.read(length))
            end = max(t["data_offsets"][1] for name, t in table.items() if name != "__metadata__")
            lost = 8 + length + end - size
        except FAILURES:
            return None
    return f"it is cut off: {lost} of {lost + size} bytes are missing" if lost > 0 else None


def _unpickle(path: Path) -> dict[str, Tensor]:
    """Returns a pickle's tensors, mapped (those of torch before 1.6: read). No code in it runs."""
    try:
        mapped = zipfile.is_zipfile(path)
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise UsageError(
            f"{path} was not opened: it is cut off or no pickle of tensors alone "
            f"({reason(error)}), and any other may run code as it is read. Take a .safetensors "
            "file of it from where you trust"
        ) from None
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict):
        raise UsageError(f"{path} holds a {type(found).__name__} and not tensors by name")
    for key, t in found.items():
        if not isinstance(key, str) or not isinstance(t, Tensor):
            raise UsageError(f"{path} holds {key!r}, a {type(t).__name__} and no tensor")
        # one number of the file may be a tensor of any size, by strides of 0
        size = t.numel() * t.element_size()
        if t.layout is not torch.strided or t.is_meta or size > path.stat().st_size:
            raise UsageError(f"{path}: {key!r} has no values of its own in the file")
    return found


def reason(error: Exception) -> str:
    """Returns what an error found, on a line, without torch's advice to open the file anyway."""
    lines = (line for line in str(error).splitlines() if not line.startswith("Weights only load"))
    found = " ".join(" ".join(lines).split())[:200]
    return found if " " in found else f"{type(error).__name__} {found}".strip()


def other_kind(shapes: Mapping[str, Shape]) -> str | None:
    """Returns what a file is that is no checkpoint of SD1, SD2 or SDXL; None if it is one."""
    if len(shapes.get(CONV_IN, ())) == 4:
        channels, width = shapes[CONV_IN][1], shapes.get(TEXT_KEYS, (0,))[-1]
        inside = next((v for k, v in _INSIDE.items() if any(k in key for key in shapes)), None)
        if inside or channels not in (4, 9):
            return inside or f"{_CHANNELS.get(channels, 'a')} model with {channels} input channels"
        return "Stable Diffusion 2.1 unCLIP" if ADDED in shapes and width == 1024 else None
    if any(re.match(r"(.*\.)?(lora_|lycoris_|hada_w|lokr_w)", key) for key in shapes):
        return "a LoRA file, not a model: give the model that it was trained on"
    both = {key.removeprefix(UNET): shape for key, shape in shapes.items()} | dict(shapes)
    if both.keys() >= _PIXART:  # which diffusers takes for Sana
        return "PixArt"
    try:
        objects = {key: SimpleNamespace(shape=shape) for key, shape in both.items()}
        kind = infer_diffusers_model_type(objects)
    except FAILURES:
        kind = "v1"  # as it says of whatever it does not know
    if kind != "v1":
        known = (label for start, label in _TYPES.items() if kind.startswith(start))
        return next(known, f"a model of another kind ({kind})")
    ends = (label for end, label in _ENDS.items() if any(key.endswith(end) for key in both))
    starts = (label for start, label in _STARTS.items() if any(k.startswith(start) for k in shapes))
    first = next(iter(shapes), None)
    return next(ends, None) or next(starts, f"no model known here (its first tensor: {first!r})")
