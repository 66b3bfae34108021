"""LoRA files on disk: each written in every exact format, whole or not at all, and read again."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from sd_lora.adapters.deltas import Delta
from sd_lora.adapters.inject import adapted_layers, eject
from sd_lora.adapters.layers import AdaptedEmbedding
from sd_lora.adapters.state import attach_updates, deltas_from_state
from sd_lora.errors import RunError, UsageError
from sd_lora.formats import diffusers, kohya, lycoris, metadata, peft
from sd_lora.formats.canonical import (
    Adapter,
    canonical_name,
    check_finite,
    live_names,
    read_models,
)
from sd_lora.formats.names import from_kohya

LYCORIS_END = "_lycoris.safetensors"


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file so that it is there whole or not at all: beside, fsync, rename.

    Raises:
        RunError: the disk is full or the folder cannot be written; nothing is left behind.
    """
    beside = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        size = f"{len(data) / 2**20:.1f} MiB"
        raise RunError(f"{path} ({size}) could not be written: {error.strerror or error}") from None


@dataclass(frozen=True)
class Format:
    """One kind of file: its name for an adapter called `name`, its tensors, who reads it.

    end: of the file's name; the diffusers file has a name of its own. use: what to do with it, with
    places for {file}, its {folder} and the {base} model.
    """

    title: str
    end: str
    write: Callable[[Adapter], dict[str, Tensor]]
    use: str

    def file_name(self, name: str) -> str:
        return self.end if self.end == diffusers.FILE_NAME else f"{name}{self.end}"


_TO_PIPELINE = (
    'diffusers: StableDiffusionPipeline.from_pretrained("{base}").load_lora_weights("{folder}")'
)
_DIFFUSERS = Format("diffusers", diffusers.FILE_NAME, diffusers.write, _TO_PIPELINE)
_TO_FOLDERS = "A1111, Forge: copy {file} to models/Lora;  ComfyUI: to models/loras"
_KOHYA = Format("kohya", "_kohya.safetensors", kohya.write, _TO_FOLDERS)
_LYCORIS = Format("LyCORIS", LYCORIS_END, lycoris.write, _TO_FOLDERS)


def formats_of(adapter: Adapter) -> tuple[list[Format], list[str]]:
    """Returns every format that has an exact form for the adapter, and notes on who reads them.

    LoRA: diffusers' and kohya's. DoRA of it: diffusers' alone, for the others' readers disagree on
    its norm. Everything else: LyCORIS'.
    """
    deltas = [d for modules in adapter.values() for d in modules.values()]
    decomposed = any(d.magnitude is not None for d in deltas)
    full = {
        f"{c} {n}.bias" for c, ms in adapter.items() for n, d in ms.items() if d.method == "full"
    }
    biases = {f"{c} {n}" for c, ms in adapter.items() for n in ms if n.endswith(".bias")}
    if kohya.can_write(adapter):
        return [_DIFFUSERS, _KOHYA], []
    if diffusers.can_write(adapter):
        return [_DIFFUSERS], [
            "DoRA is written for diffusers alone: A1111 and ComfyUI normalise it otherwise, so no "
            "file would be exact there"
        ]
    notes = ["diffusers' load_lora_weights has no form for this kind of update"]
    if decomposed:
        notes.append(
            "A1111 and ComfyUI normalise weight-decomposed updates otherwise: the file is exact in "
            "LyCORIS and sd_lora.load_adapter"
        )
        alone = "LyCORIS, or sd_lora.load_adapter: {file}"
        return [dataclasses.replace(_LYCORIS, use=alone)], notes
    if biases - full:  # A1111 reads a bias beside `diff` or `w_norm`, and not beside LoRA
        notes.append("A1111 passes over trained biases: the file is exact in ComfyUI")
        alone = "ComfyUI: copy {file} to models/loras"
        return [dataclasses.replace(_LYCORIS, use=alone)], notes
    return [_LYCORIS], notes


def write_adapter(
    adapter: Adapter,
    folder: Path,
    family: str,
    name: str,
    prediction_type: str = "epsilon",
    extra: Mapping[str, object] | None = None,
) -> list[Path]:
    """Writes an adapter in each of its formats; returns the paths.

    Raises:
        UsageError: an unknown family.
        RunError: factors that are not finite, or a file that could not be written; none is left
            then.
    """
    if family not in ("sd1", "sd2"):
        raise UsageError(f"family {family!r} cannot be written yet; 'sd1' and 'sd2' can")
    check_finite(adapter)
    header = metadata.build(adapter, family, name, prediction_type, extra)
    written: list[Path] = []
    for kind in formats_of(adapter)[0]:
        path = folder / kind.file_name(name)
        try:
            write_whole(path, save(kind.write(adapter), header))
        except RunError:
            for earlier in written:
                earlier.unlink(missing_ok=True)
            raise
        written.append(path)
    return written


def save_adapter(
    models: Mapping[str, nn.Module], folder: str | Path, family: str = "sd1", name: str = ""
) -> list[Path]:
    """Writes the adapter of injected models in every format that has an exact form for it.

    Args:
        models: component ("unet", "text_encoder") → injected model.
        folder: where `pytorch_lora_weights.safetensors` and `<name>_kohya.safetensors` go, or
            `<name>_lycoris.safetensors` for the methods that need it.
        family: "sd1" or "sd2".
        name: of the kohya or LyCORIS file; the folder's name by default.

    Returns:
        The paths.

    Raises:
        UsageError: no adapter in the models, an adapted embedding, or an unknown family.
        RunError: factors that are not finite, or a file that could not be written; nothing is left
            half-written.
    """
    folder = Path(folder)
    name = name or folder.resolve().name
    for component, model in models.items():
        for module, layer in adapted_layers(model).items():
            if isinstance(layer, AdaptedEmbedding):
                raise UsageError(
                    f"{component} {module} is an Embedding, which no reader of LoRA files takes: "
                    "keep `lora_state_dict`, or eject it"
                )
    return write_adapter(read_models(models), folder, family, name)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Returns a safetensors file's tensors, or raises UsageError naming what is wrong with it."""
    if not path.is_file():
        raise UsageError(f"{path} is not a file")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path} is not a readable safetensors file: {error}") from None


def read_header(path: Path) -> dict[str, str]:
    """Returns a readable safetensors file's metadata."""
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def read_adapter(path: Path, models: Mapping[str, nn.Module]) -> Adapter:
    """Returns the adapter of a file of any of the formats, or of a peft folder.

    Args:
        path: the file or folder.
        models: component → model; kohya's names can only be read with the model's own at hand,
            and peft's whole modules need the model's weights.

    Raises:
        UsageError: not an adapter of a format that can be read, naming the key that says so.
    """
    if peft.is_folder(path):
        if len(models) != 1:
            raise UsageError(f"{path} is a peft folder, for one model: {', '.join(models)} given")
        ((component, model),) = models.items()
        tensors = read_tensors(path / peft.WEIGHTS_NAME)
        deltas = peft.read(tensors, peft.read_config(path), model)
        return {component: {canonical_name(component, n): d for n, d in deltas.items()}}
    tensors = read_tensors(path)
    keys = list(tensors)
    if lycoris.detect(keys):
        names = {component: live_names(component, model) for component, model in models.items()}
        stems = {key.partition(".")[0] for key in keys}
        return lycoris.read(tensors, from_kohya(names, stems))
    if "" in models and keys:  # what safetensors wrote of `lora_state_dict`
        return {"": deltas_from_state(tensors)}
    if diffusers.detect(keys):
        return diffusers.read(tensors, read_header(path))
    first = f"its first key is {keys[0]!r}" if keys else "it is empty"
    raise UsageError(f"{path} is no LoRA that can be read yet: {first}")


def load_adapter(
    models: Mapping[str, nn.Module] | nn.Module, path: str | Path
) -> dict[str, list[str]]:
    """Injects the adapter of a file into bare models; returns component → names of its updates.

    Args:
        models: component ("unet", "text_encoder") → model without adapters, or one model by
            itself, whose component is "".
        path: a file in diffusers', kohya's or LyCORIS' format, a folder that holds
            `pytorch_lora_weights.safetensors`, a folder of `PeftModel.save_pretrained`, or, for
            one model, the file of its `lora_state_dict`.

    Raises:
        UsageError: what cannot be read, a component or module that the models lack, shapes that
            differ. The models are then as they were.
    """
    models = {"": models} if isinstance(models, nn.Module) else models
    path = Path(path)
    if (path / diffusers.FILE_NAME).is_file():
        path = path / diffusers.FILE_NAME
    adapter = read_adapter(path, models)
    live = {component: _live(component, models, adapter) for component in adapter}
    trainable = [p for model in models.values() for p in model.parameters() if p.requires_grad]
    done = []
    try:
        for component, deltas in live.items():
            attach_updates(models[component], deltas)
            done.append(models[component])
    except UsageError as error:
        for model in done:
            eject(model)
        for parameter in trainable:
            parameter.requires_grad_(True)
        raise UsageError(f"{component}: {error}" if component else str(error)) from None
    return {component: list(deltas) for component, deltas in live.items()}


def _live(component: str, models: Mapping[str, nn.Module], adapter: Adapter) -> dict[str, Delta]:
    """Returns live update name → update, in the model's order."""
    if component not in models:
        raise UsageError(f"the file adapts {component}, which was not given: {', '.join(models)}")
    names = live_names(component, models[component])
    for name in adapter[component]:
        if name not in names:
            raise UsageError(f"the file adapts {name}, which the {component} has not")
    return {live: adapter[component][n] for n, live in names.items() if n in adapter[component]}
