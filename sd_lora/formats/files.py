"""LoRA files on disk: writing both exports whole or not at all, and reading either."""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from sd_lora.adapters.inject import adapt, adapted_layers, load_lora_state_dict
from sd_lora.adapters.targets import Target
from sd_lora.errors import RunError, UsageError
from sd_lora.formats import diffusers, kohya, metadata
from sd_lora.formats.canonical import Adapter, Factors, check_finite, live_names, read_models
from sd_lora.formats.names import from_kohya


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


def export_names(name: str) -> tuple[str, str]:
    """Returns the two file names of an export called `name`: diffusers' and kohya's."""
    return diffusers.FILE_NAME, f"{name}_kohya.safetensors"


def write_adapter(
    adapter: Adapter,
    folder: Path,
    family: str,
    name: str,
    prediction_type: str = "epsilon",
    extra: Mapping[str, object] | None = None,
) -> list[Path]:
    """Writes the diffusers and the kohya file of an adapter; returns their paths.

    Raises:
        UsageError: an unknown family.
        RunError: factors that are not finite, or a file that could not be written; none of the
            two is left then.
    """
    if family not in ("sd1", "sd2"):
        raise UsageError(f"family {family!r} cannot be written yet; 'sd1' and 'sd2' can")
    check_finite(adapter)
    header = metadata.build(adapter, family, name, prediction_type, extra)
    tables = (diffusers.write(adapter), kohya.write(adapter))
    paths = [folder / file_name for file_name in export_names(name)]
    written: list[Path] = []
    for path, tensors in zip(paths, tables, strict=True):
        try:
            write_whole(path, save(tensors, header))
        except RunError:
            for earlier in written:
                earlier.unlink(missing_ok=True)
            raise
        written.append(path)
    return paths


def save_adapter(
    models: Mapping[str, nn.Module], folder: str | Path, family: str = "sd1", name: str = ""
) -> list[Path]:
    """Writes the adapter of injected models in both formats; returns the paths.

    Args:
        models: component ("unet", "text_encoder") → injected model.
        folder: where `pytorch_lora_weights.safetensors` and `<name>_kohya.safetensors` go.
        family: "sd1" or "sd2".
        name: of the kohya file; the folder's name by default.

    Raises:
        UsageError: no adapter in the models, or an unknown family.
        RunError: factors that are not finite, or a file that could not be written; nothing is left
            half-written.
    """
    folder = Path(folder)
    name = name or folder.resolve().name
    return write_adapter(read_models(models), folder, family, name)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Returns a safetensors file's tensors, or raises UsageError naming what is wrong with it."""
    if not path.is_file():
        raise UsageError(f"{path} is not a file")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path} is not a readable safetensors file: {error}") from None


def read_adapter(path: Path, models: Mapping[str, nn.Module]) -> Adapter:
    """Returns the adapter of a file of either format.

    Args:
        path: the file.
        models: component → model; kohya's names can only be read with the model's own at hand.

    Raises:
        UsageError: not a LoRA of a format that can be read, naming the first key that says so.
    """
    tensors = read_tensors(path)
    keys = list(tensors)
    if diffusers.detect(keys):
        return diffusers.read(tensors)
    if kohya.detect(keys):
        names = {component: live_names(component, model) for component, model in models.items()}
        return kohya.read(tensors, from_kohya(names))
    first = f"its first key is {keys[0]!r}" if keys else "it is empty"
    raise UsageError(f"{path} is no LoRA that can be read yet: {first}")


def load_adapter(models: Mapping[str, nn.Module], path: str | Path) -> dict[str, list[str]]:
    """Injects the adapter of a file into bare models; returns component → adapted module names.

    Args:
        models: component ("unet", "text_encoder") → model without adapters.
        path: a file, or a folder that holds `pytorch_lora_weights.safetensors`.

    Raises:
        UsageError: what cannot be read, a component or module that the models lack, shapes that
            differ. The models are then as they were.
    """
    path = Path(path)
    path = path / diffusers.FILE_NAME if path.is_dir() else path
    adapter = read_adapter(path, models)
    live = {component: _live_factors(component, models, adapter) for component in adapter}
    for component, factors in live.items():
        targets = [Target(name, f.rank, f.alpha) for name, f in factors.items()]
        adapt(models[component], targets)
        state: dict[str, Tensor] = {}
        for name, f in factors.items():
            state[f"{name}.lora_A"], state[f"{name}.lora_B"] = f.A, f.B
            state[f"{name}.alpha"] = torch.tensor(f.alpha)
        load_lora_state_dict(models[component], state)
    return {component: list(factors) for component, factors in live.items()}


def _live_factors(
    component: str, models: Mapping[str, nn.Module], adapter: Adapter
) -> dict[str, Factors]:
    """Returns live module name → factors, all checked to fit the model."""
    if component not in models:
        raise UsageError(f"the file adapts {component}, which was not given: {', '.join(models)}")
    model = models[component]
    if adapted_layers(model):
        raise UsageError(f"{component} has adapters already: eject them first")
    names = live_names(component, model)
    for name, f in adapter[component].items():
        if name not in names:
            raise UsageError(f"the file adapts {name}, which the {component} has not")
        weight = getattr(model.get_submodule(names[name]), "weight", None)
        shape = (f.B.shape[0], *f.A.shape[1:])
        if weight is None or tuple(weight.shape) != shape or f.B.shape[1] != f.rank:
            own = "no weight" if weight is None else str(tuple(weight.shape))
            raise UsageError(f"{component} {name} is {own} in the model and {shape} in the file")
    order = [name for name in names if name in adapter[component]]
    return {names[name]: adapter[component][name] for name in order}
