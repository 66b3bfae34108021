"""The files of a base model, one tensor at a time: a diffusers folder or a single checkpoint.

Every tensor's key is read as its parameters, in canonical names; OpenCLIP's three input projections
share one tensor, and its text projection is stored transposed.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from sd_lora.errors import UsageError, near_path
from sd_lora.files import PICKLES, sha256_of
from sd_lora.formats.canonical import canonical_name
from sd_lora.models.checkpoint_file import CheckpointFile
from sd_lora.models.families import FAMILIES, SHORT_PREDICTIONS, Family
from sd_lora.models.meta_pipeline import MetaPipeline
from sd_lora.models.original_names import Layout, open_clip_parameter, unet_from_original
from sd_lora.models.single_file import SingleFile


@dataclass(frozen=True)
class Slot:
    """The place of a parameter in a tensor: a third of the rows (None: all), and its layout.

    name: of the delta: the parameter's without a final ".weight".
    """

    component: str
    name: str
    third: int | None = None
    transposed: bool = False

    def view(self, tensor: Tensor) -> Tensor:
        """The parameter as a view of its tensor."""
        if self.third is not None:
            tensor = tensor.unflatten(0, (3, -1))[self.third]
        return tensor.T if self.transposed else tensor


class Checkpoint:
    """A base model on disk.

    files: path relative to the folder (or the file's name) → its tensors. In a folder only
    adaptable components are opened; a single checkpoint has all parts in one file. indexes: of
    sharded parts. Files are opened at their first use.

    Args:
        path: of the folder or file.
        variant: of a folder's weights, for example "fp16"; parts without it are taken without.

    Raises:
        UsageError: neither a diffusers folder nor a checkpoint of Stable Diffusion, or a part
            without weights.
    """

    def __init__(self, path: Path, variant: str | None = None) -> None:
        if not os.path.exists(path):
            raise UsageError(f"{path} does not exist: no such folder or file{near_path(path)}")
        self.path = path
        self.variant = variant
        self.indexes: set[str] = set()
        self._components: dict[str, str] = {}
        if path.is_dir():
            self.meta_pipeline = MetaPipeline.of_folder(str(path))
        else:
            self.meta_pipeline = _meta_pipeline_of(path, self.files[path.name])

    @cached_property
    def files(self) -> dict[str, CheckpointFile]:
        if not self.path.is_dir():
            return {self.path.name: CheckpointFile(self.path)}
        files = {}
        for component in self.family.components:
            weights, index = weight_files(self.path / component, self.variant)
            self.indexes |= {str(index.relative_to(self.path))} if index else set()
            for file in weights:
                name = str(file.relative_to(self.path))
                files[name] = CheckpointFile(file)
                self._components[name] = component
        return files

    @property
    def family(self) -> Family:
        return self.meta_pipeline.family

    @cached_property
    def _scheduler(self) -> dict[str, object]:
        """A folder's configuration of its scheduler; {} without one."""
        try:
            text = (self.path / "scheduler/scheduler_config.json").read_text(encoding="utf-8")
            found = json.loads(text)
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    @property
    def prediction_type(self) -> str | None:
        """A key of `SHORT_PREDICTIONS` by a folder's scheduler, "v_prediction" by a single file's
        key `v_pred`, as ComfyUI reads it; None if the model does not say it."""
        if any(_V_PREDICTION in tensors for tensors in self.files.values()):
            return "v_prediction"
        said = self._scheduler.get("prediction_type")
        return str(said) if said in SHORT_PREDICTIONS else None

    @property
    def has_zero_terminal_snr(self) -> bool:
        """Whether the last timestep is noise alone, by a folder's scheduler or the key `ztsnr`."""
        marked = any(_ZERO_TERMINAL_SNR in tensors for tensors in self.files.values())
        return marked or self._scheduler.get("rescale_betas_zero_snr") is True

    def slots(self, file: str, key: str) -> list[Slot]:
        """The parameters in a tensor; none for the VAE and other frozen parts.

        In a single file these are the model's: OpenCLIP's has a layer more than SD2 uses, and both
        have buffers.
        """
        if self.files and file in self._components:  # filled with the files
            component = self._components[file]
            slots = [Slot(component, canonical_name(component, key.removesuffix(".weight")))]
        else:
            slots = _slots_of_single(key, self.meta_pipeline.layout)
        return [slot for slot in slots if (slot.component, slot.name) in self._known]

    @cached_property
    def _known(self) -> set[tuple[str, str]]:
        return {
            (component, canonical_name(component, name.removesuffix(".weight")))
            for component, model in self.meta_pipeline.models.items()
            for name, _ in model.named_parameters()
        }

    @cached_property
    def places(self) -> dict[tuple[str, str], tuple[str, str, Slot]]:
        """(component, delta name) → file, key and place there."""
        return {
            (slot.component, slot.name): (file, key, slot)
            for file, tensors in self.files.items()
            for key in tensors
            for slot in self.slots(file, key)
        }

    def weight(self, component: str, name: str) -> Tensor:
        """The parameter of a delta's name.

        Raises:
            UsageError: the checkpoint has none.
        """
        if (component, name) not in self.places:
            raise UsageError(f"{self.path} has no {component} {name}")
        file, key, slot = self.places[component, name]
        return slot.view(self.files[file][key])

    def rounding(self, component: str, name: str) -> Tensor:
        """Half the distance of the stored dtype's numbers at each value of `weight`."""
        file, key, slot = self.places[component, name]
        return slot.view(self.files[file].rounding(key))

    def shape(self, component: str, name: str) -> tuple[int, ...]:
        """The shape of `weight`, without reading it. Raises UsageError like `weight`."""
        if (component, name) not in self.places:
            raise UsageError(f"{self.path} has no {component} {name}")
        file, key, slot = self.places[component, name]
        _, shape = self.files[file].spec(key)
        return tuple(slot.view(torch.empty(shape, device="meta")).shape)


def weight_files(folder: Path, variant: str | None = None) -> tuple[list[Path], Path | None]:
    """The files of a part's weights: one, or the shards of an index, and the index.

    Raises:
        UsageError: none, with the names of the files found.
    """
    if variant and not any(f".{variant}." in path.name for path in folder.glob("*")):
        variant = None
    dot = f".{variant}" if variant else ""
    for stem in ("diffusion_pytorch_model", "model"):
        index = folder / f"{stem}.safetensors.index{dot}.json"
        if (folder / f"{stem}{dot}.safetensors").is_file():
            return [folder / f"{stem}{dot}.safetensors"], None
        if index.is_file():
            try:
                names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
                return [folder / Path(name).name for name in sorted(set(names))], index
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UsageError(f"{index} is no index of weights: {error}") from None
    for stem in ("diffusion_pytorch_model", "pytorch_model"):
        if (folder / f"{stem}{dot}.bin").is_file():
            return [folder / f"{stem}{dot}.bin"], None
    there = sorted(p.name for p in folder.glob("*")) if folder.is_dir() else []
    other = {m[1] for n in there if (m := re.search(r"\.(\w+)\.(?:safetensors|bin)$", n))}
    hint = f"; --variant {min(other)} is there" if other and not variant else ""
    raise UsageError(f"{folder} has no weights (found {', '.join(there) or 'nothing'}){hint}")


def base_hash(name: str, variant: str | None = None, **hub: str | None) -> str | None:
    """SHA-256 of the base UNet's weights: of its file, of its shards one after another, or of a
    whole single checkpoint; None if there are no such files.

    name: the base model. variant, hub: options of `from_pretrained`.
    """
    path = Path(name).expanduser()
    try:
        if path.is_file():  # of a single checkpoint: the hash that sites show
            return sha256_of(path)
        folder = path / "unet"
        if not folder.is_dir():
            from huggingface_hub import try_to_load_from_cache  # 0.1 s: for models of the hub

            cached = try_to_load_from_cache(name, "unet/config.json", **hub)
            if not isinstance(cached, str):
                return None
            folder = Path(cached).parent
        return sha256_of(*weight_files(folder, variant)[0])
    except (UsageError, OSError):
        return None


_V_PREDICTION, _ZERO_TERMINAL_SNR = "v_pred", "ztsnr"
"""Keys without numbers that say how a single file was trained."""

_UNET = ("model.diffusion_model.", "diffusion_model.")
_CLIP = {
    "cond_stage_model.transformer.": "text_encoder",
    "conditioner.embedders.0.transformer.": "text_encoder",
}
_OPEN_CLIP = {
    "cond_stage_model.model.": "text_encoder",
    "conditioner.embedders.0.model.": "text_encoder_2",  # the refiner's only one
    "conditioner.embedders.1.model.": "text_encoder_2",
}
_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.")
_IN_LAYER = (
    *("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"),
    *(f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")),
)
_OUTSIDE = (
    "text_projection.weight",
    *(f"text_model.final_layer_norm.{kind}" for kind in ("weight", "bias")),
    *(f"text_model.embeddings.{kind}_embedding.weight" for kind in ("token", "position")),
)


def _meta_pipeline_of(path: Path, tensors: CheckpointFile) -> MetaPipeline:
    """The model of a single file by its own tensors; of a part of one, the family's published."""
    family = _family_of(path, tensors)
    short = _UNET[1]
    shapes = {
        f"{_UNET[0]}{key.removeprefix(short)}" if key.startswith(short) else key: shape
        for key, shape in tensors.shapes.items()
    }
    single = SingleFile(path, shapes, tensors.header)
    try:
        single.check_keys("unet")
        parts = {part: c for part, c in single.configs.items() if part != "vae"}
    except UsageError:
        return MetaPipeline.of_family(family)
    return MetaPipeline(FAMILIES[single.family], parts, str(path))


def _family_of(path: Path, tensors: CheckpointFile) -> Family:
    """The family of a single file: by the width of the text that its UNet attends to, or, for an
    unpublished width, by its text encoders.
    """
    for key in tensors:
        if key.startswith(_UNET) and key.endswith(".attn2.to_k.weight"):
            width = tensors.spec(key)[1][-1]
            for family in FAMILIES.values():
                if family.cross_attention_dim == width:
                    return family
            break
    if any(key.startswith("conditioner.embedders.1.") for key in tensors):
        return FAMILIES["sdxl"]
    if any(key.startswith("conditioner.embedders.0.model.") for key in tensors):
        return FAMILIES["sdxl_refiner"]
    if any(key.startswith("cond_stage_model.model.") for key in tensors):
        return FAMILIES["sd2"]
    if any(key.startswith("cond_stage_model.transformer.") for key in tensors):
        return FAMILIES["sd1"]
    first = next(iter(tensors), None)
    kinds = f".safetensors, {', '.join(PICKLES)}"
    raise UsageError(
        f"{path} is no checkpoint of Stable Diffusion 1.x, 2.x or XL (its first key is {first!r}): "
        f"give a diffusers folder or a single file ({kinds})"
    )


def _slots_of_single(key: str, layout: Layout) -> list[Slot]:
    for prefix in _UNET:
        if key.startswith(prefix):
            module, _, kind = key[len(prefix) :].rpartition(".")
            found = unet_from_original(module, layout)
            name = found if kind == "weight" else f"{found}.{kind}"
            return [Slot("unet", name)] if found and name else []
    for prefix, component in _CLIP.items():
        if key.startswith(prefix):
            name = key[len(prefix) :].removesuffix(".weight")
            return [Slot(component, canonical_name(component, name))]
    for prefix, component in _OPEN_CLIP.items():
        if key.startswith(prefix):
            return list(_open_clip_slots(component, key[len(prefix) :]))
    return []


def _open_clip_slots(component: str, key: str) -> Iterator[Slot]:
    names: list[str] = list(_OUTSIDE)
    if block := _BLOCK.match(key):
        layer = f"text_model.encoder.layers.{block[1]}"
        names = [f"{layer}.{module}.{kind}" for module in _IN_LAYER for kind in ("weight", "bias")]
    for name in names:
        place = open_clip_parameter(name)
        if place and place[0] == key:
            yield Slot(component, name.removesuffix(".weight"), place[1], place[2])
