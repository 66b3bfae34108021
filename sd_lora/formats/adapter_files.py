"""LoRA files on disk: each written in every exact format, whole or not at all, and read again."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sd_lora.adapters.deltas import Delta
from sd_lora.adapters.inject import adapted_layers, eject
from sd_lora.adapters.layers import AdaptedEmbedding
from sd_lora.adapters.linear_conv import AdaptedConvTranspose
from sd_lora.adapters.state import attach_deltas, deltas_from_state
from sd_lora.errors import RunError, UsageError
from sd_lora.files import Spec, TensorFile, write_tensors
from sd_lora.formats import comfyui, diffusers, file_names, kohya, lycoris, metadata, peft
from sd_lora.formats.canonical import (
    Adapter,
    Modules,
    canonical_name,
    check_finite,
    each,
    live_names,
    read_models,
)
from sd_lora.formats.lora_file import find_file, open_lora
from sd_lora.formats.names import ALONE, PREFIXES, Naming, naming_of, of_live
from sd_lora.formats.rounding import balanced
from sd_lora.models.families import family_named
from sd_lora.models.original_names import Layout

BUILT_IN = ("lora", "lora_fa", "loha", "lokr", "oft", "full")
"""Methods that other programs know; `register_method` may have added more."""


@dataclass(frozen=True)
class Format:
    """A kind of file: its name for an adapter called `name`, its tensors, its programs.

    end: of the file's name; the diffusers file has a name of its own. use: a line on how to use it,
    with places for {file}, its {name} in a prompt, and a {prompt}; "" if `python_code` says it.
    """

    title: str
    end: str
    write: Callable[[Adapter, Naming], Iterator[tuple[str, Tensor]]]
    use: str

    def file_name(self, name: str) -> str:
        return self.end if self.end == file_names.DIFFUSERS else f"{name}{self.end}"

    def how_to_use(self, file: Path, prompt: str) -> str:
        """A line on how to use a file; "" if `python_code` says it."""
        return self.use.format(file=file.name, name=file.stem, prompt=prompt)


DIFFUSERS = Format("diffusers", file_names.DIFFUSERS, diffusers.write, "")
_TO_FOLDERS = (
    "A1111, Forge: copy {file} to models/Lora, and write the prompt: {prompt} <lora:{name}:1>\n"
    "  ComfyUI: copy it to models/loras, and put the node Load LoRA behind the model"
)
KOHYA = Format("kohya", file_names.KOHYA_END, kohya.write, _TO_FOLDERS)
LYCORIS = Format("LyCORIS", file_names.LYCORIS_END, lycoris.write, _TO_FOLDERS)
_TO_COMFYUI = "ComfyUI: copy {file} to models/loras;  Forge: to models/Lora"
COMFYUI = Format("ComfyUI", file_names.COMFYUI_END, lycoris.write, _TO_COMFYUI)

_ONLY_KOHYA = (
    "diffusers does not read kohya's names of {what}: the kohya file is for A1111 and ComfyUI alone"
)


def _not_for_diffusers(adapter: Adapter, naming: Naming) -> list[str]:
    """A note on a kohya file that diffusers does not read whole."""
    family = naming.family
    layout = naming.layout if family and family.original_names else None
    if not kohya.diffusers_reads(adapter):
        return [_ONLY_KOHYA.format(what="so small a part of a text encoder")]
    if not kohya.diffusers_reads(adapter, family=family):
        return [
            "diffusers and A1111 do not read kohya's names of the refiner's text encoder: the "
            "kohya file is whole in ComfyUI alone"
        ]
    if not kohya.diffusers_reads(adapter, layout):
        return [_ONLY_KOHYA.format(what="an upsampler as the refiner's")]
    return []


_DORA = (
    "DoRA has a file of its own for ComfyUI and Forge, whose norm is another one: exact on this "
    "base. A1111 normalises over the inputs, which is off by up to 29 times ΔW: `sd-lora bake` "
    "makes a model for it"
)


def formats_of(adapter: Adapter, naming: Naming | None = None) -> tuple[list[Format], list[str]]:
    """Every format with an exact form for the adapter, and notes on programs that cannot load it.

    naming: of kohya's file; without one the notes leave the family's own names out.

    LoRA: diffusers' and kohya's. DoRA of it: diffusers'. Everything else: LyCORIS'. Of deltas with
    magnitudes ComfyUI has a file of its own, since its norm is another one.
    """
    if kohya.can_write(adapter):
        notes = _not_for_diffusers(adapter, naming) if naming else []
        return [DIFFUSERS, KOHYA] if diffusers.can_write(adapter) else [KOHYA], notes
    if diffusers.can_write(adapter):
        return [DIFFUSERS, COMFYUI], [_DORA]
    full = {f"{c} {n}.bias" for c, n, delta in each(adapter) if delta.method == "full"}
    biases = {f"{c} {n}" for c, modules in adapter.items() for n in modules if n.endswith(".bias")}
    notes = ["diffusers' load_lora_weights has no form for this kind of delta"]
    methods = {delta.method for _, _, delta in each(adapter)}
    notes += [comfyui.STRENGTH_OF_OFT] * ("oft" in methods)
    if own := sorted(methods - {*BUILT_IN}):
        notes.append(f"only sd_lora.load_adapter reads the method {' and '.join(own)}")
        return [dataclasses.replace(LYCORIS, use="sd_lora.load_adapter: {file}")], notes
    if comfyui.is_decomposed(adapter):
        others = dataclasses.replace(LYCORIS, use="LyCORIS, or sd_lora.load_adapter: {file}")
        return [others, *([COMFYUI] if "" not in adapter else [])], [*notes, _DORA]
    if biases - full:  # A1111 reads a bias beside `diff` or `w_norm`, and not beside LoRA
        notes.append("A1111 passes over trained biases: the file is exact in ComfyUI")
        alone = "ComfyUI: copy {file} to models/loras"
        return [dataclasses.replace(LYCORIS, use=alone)], notes
    return [LYCORIS], notes


def held_by(kind: Format, adapter: Adapter, weight: comfyui.Weights | None) -> Adapter:
    """The adapter as a file of this format has it. weight: W of the base, for ComfyUI's."""
    return comfyui.rescaled(adapter, weight) if kind is COMFYUI else adapter


def rounded(
    tensors: Iterator[tuple[str, Tensor]], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors in the dtype of a file.

    Raises:
        RunError: a value beyond the dtype, with its key.
    """
    for key, tensor in tensors:
        cast = tensor if key.endswith(lycoris.NEAR_ONE) else tensor.to(dtype)
        if not torch.isfinite(cast).all():
            largest, limit = tensor.abs().max(), torch.finfo(dtype).max
            raise RunError(
                f"{key} reaches {largest:.3g}, and {str(dtype)[6:]} ends at {limit:.3g}: take "
                "bfloat16 or float32"
            )
        yield key, cast


def write_file(
    path: Path,
    kind: Format,
    adapter: Adapter,
    naming: Naming,
    header: Mapping[str, str],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write an adapter in one format, module by module.

    Raises:
        UsageError: two modules of one name, or one without a name in this format.
        RunError: a value beyond the dtype, or a file that could not be written; none is left then.
    """
    adapter = balanced(adapter, dtype)
    specs: dict[str, Spec] = {}
    for key, tensor in rounded(kind.write(adapter, naming), dtype):
        if key in specs:
            raise UsageError(f"two modules are both {key} in {kind.title}'s names")
        specs[key] = tensor.dtype, tuple(tensor.shape)
    write_tensors(path, specs, rounded(kind.write(adapter, naming), dtype), header)


def write_adapter(
    adapter: Adapter,
    folder: Path,
    family: str | None,
    name: str,
    prediction_type: str = "epsilon",
    extra: Mapping[str, object] | None = None,
    facts: Mapping[str, str] | None = None,
    layout: Layout | None = None,
    dtype: torch.dtype = torch.float32,
    weight: comfyui.Weights | None = None,
) -> list[Path]:
    """Write an adapter in each of its formats; returns the paths.

    Args:
        adapter: the trained deltas.
        folder: of the files.
        family: "sd1", "sd2", "sdxl" or "sdxl_refiner"; None for another model.
        name: of the kohya or LyCORIS file.
        prediction_type, extra, facts: see `metadata.build`.
        layout: of a UNet that differs from the published one.
        dtype: of the files.
        weight: W of the base, for deltas with magnitudes.

    Raises:
        UsageError: an unknown family.
        RunError: factors that are not finite, or a failed write; no file is left.
    """
    row = None if family is None else family_named(family)
    header = metadata.build(adapter, row, name, prediction_type, extra, facts)
    if row is not None:
        header = dated(header)
    kinds, naming = formats_of(adapter)[0], naming_of(row, layout)
    return write_formats(adapter, kinds, folder, name, header, naming, dtype, weight)


def dated(header: Mapping[str, str]) -> dict[str, str]:
    """A header with the date of its writing, where it has none."""
    return {"modelspec.date": metadata.date(), **header}


def write_formats(
    adapter: Adapter,
    kinds: Sequence[Format],
    folder: Path,
    name: str,
    header: Mapping[str, str],
    naming: Naming,
    dtype: torch.dtype = torch.float32,
    weight: comfyui.Weights | None = None,
) -> list[Path]:
    """Write an adapter in several formats, with one header; returns the paths.

    kinds: of `formats_of`. name, weight: see `write_adapter`. The others: see `write_file`.

    Raises:
        RunError: factors that are not finite, or a failed write; no file is left.
    """
    check_finite(adapter)
    written: list[Path] = []
    for kind in kinds:
        path = folder / kind.file_name(name)
        marked = {**header, **(comfyui.MARK if kind is COMFYUI else {})}
        try:
            held = held_by(kind, adapter, weight)
            write_file(path, kind, held, naming, marked, dtype)
        except (RunError, UsageError):
            for earlier in written:
                earlier.unlink(missing_ok=True)
            raise
        written.append(path)
    return written


def layout_of(models: Mapping[str, nn.Module]) -> Layout | None:
    """The layout of the UNet among live models, by its configuration; None without one."""
    config: Any = getattr(models.get("unet"), "config", None)
    return Layout.of(config) if config is not None and "up_block_types" in config else None


def save_adapter(
    models: Mapping[str, nn.Module], folder: str | Path, family: str = "sd1", name: str = ""
) -> list[Path]:
    """Write the adapter of injected models in every format with an exact form for it.

    Args:
        models: component ("unet", "text_encoder", "text_encoder_2") → injected model; "" for one
            model of any kind.
        folder: for `pytorch_lora_weights.safetensors` and `<name>_kohya.safetensors`, or
            `<name>_lycoris.safetensors` for methods that need it.
        family: "sd1", "sd2", "sdxl" or "sdxl_refiner"; ignored for a model of another kind.
        name: of the kohya or LyCORIS file; the folder's name by default.

    Returns:
        The paths.

    Raises:
        UsageError: no adapter in the models, an adapted embedding, or an unknown family.
        RunError: factors that are not finite, or a failed write; no file is left half-written.
    """
    folder = Path(folder)
    name = name or folder.resolve().name
    for component, model in models.items():
        for module, layer in adapted_layers(model).items():
            if isinstance(layer, AdaptedEmbedding | AdaptedConvTranspose):
                raise UsageError(
                    f"{component} {module}: no reader of LoRA files takes the class "
                    f"{type(layer.base).__name__}: keep `lora_state_dict`, or eject it"
                )
    alone = None if "" in models else family
    layout, weight = layout_of(models), comfyui.weights_of(models)
    return write_adapter(read_models(models), folder, alone, name, layout=layout, weight=weight)


def read_adapter(path: Path, models: Mapping[str, nn.Module]) -> Adapter:
    """The adapter of a file of any of the formats, or of a peft folder, for live models.

    Args:
        path: the file or folder.
        models: component → model; the names of other models can be read with the model at hand
            only, and peft's whole modules need its weights. A model by itself ("") can be any
            component of the file.

    Raises:
        UsageError: not an adapter of a known format, with the key that shows it.
    """
    path = find_file(path)
    if len(models) == 1:
        ((component, model),) = models.items()
        deltas = _deltas_by_live_names(path, model)
        if deltas is not None:
            return {component: {canonical_name(component, n): d for n, d in deltas.items()}}
    elif peft.is_folder(path):
        raise UsageError(f"{path} is a peft folder, for one model: {', '.join(models)} given")
    if "" in models:
        models = dict.fromkeys((*_COMPONENTS, ""), models[""])
    lora = open_lora(path, layout_of(models), partial(_live_stems, models))
    lora.check()
    return lora.adapter


_COMPONENTS = ("unet", "text_encoder", "text_encoder_2")


def _deltas_by_live_names(path: Path, model: nn.Module) -> dict[str, Delta] | None:
    """Delta name → delta, of a peft folder or a file of `lora_state_dict`; None for other files."""
    if peft.is_folder(path):
        tensors = dict(TensorFile(peft.weights_of(path)))
        return peft.read(tensors, peft.read_config(path), model)
    if os.path.isdir(path):  # a peft folder for each component
        return None
    file, children = TensorFile(path), {name for name, _ in model.named_children()}
    # LoRA files have a component's or kohya's name in front, or `.weight` at the end
    named = any(key.partition(".")[0] in children for key in file)
    if not named or any(key.endswith(".weight") for key in file):
        return None
    return deltas_from_state(dict(file))


def _live_stems(models: Mapping[str, nn.Module], stems: set[str]) -> dict[str, tuple[str, str]]:
    """Kohya name → (component, canonical name) of live models, for the stems of a file."""
    known: dict[str, tuple[str, str]] = {}
    for component, model in models.items():
        names = {component: live_names(component, model)}
        mine = (p for p, of in PREFIXES.items() if of == component or p == ALONE and not component)
        for prefix in mine:
            plain = {s.replace(prefix, ALONE, 1): s for s in stems if s.startswith(f"{prefix}_")}
            for stem, place in of_live(names, plain).items():
                if stem in plain:
                    known[plain[stem]] = place
    return known


def load_adapter(
    models: Mapping[str, nn.Module] | nn.Module, path: str | Path
) -> dict[str, list[str]]:
    """Inject the adapter of a file into bare models; returns component → names of its deltas.

    Args:
        models: component ("unet", "text_encoder", "text_encoder_2") → model without adapters, or
            one model of any kind, whose component is "": a UNet, a text encoder, your own.
        path: a LoRA file in anybody's format (see docs/files.md), a folder with one, a folder of
            `PeftModel.save_pretrained`, or, for one model, the file of its `lora_state_dict`.

    Raises:
        UsageError: a file that cannot be read, a component or module that the models lack, other
            shapes. The models are unchanged then.
    """
    models = {"": models} if isinstance(models, nn.Module) else models
    if not isinstance(models, Mapping):
        raise UsageError(
            f"load_adapter takes a model, or component → model, and no {type(models).__name__}: as "
            'in load_adapter({"unet": pipe.unet, "text_encoder": pipe.text_encoder}, path)'
        )
    adapter = read_adapter(Path(path), models)
    try:
        targets = _targets(models, adapter)
        live = {component: _live(component, targets, adapter) for component in adapter}
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    trainable = [p for model in models.values() for p in model.parameters() if p.requires_grad]
    done = []
    try:
        for component, deltas in live.items():
            attach_deltas(targets[component], deltas)
            done.append(targets[component])
    except UsageError as error:
        for model in done:
            eject(model)
        for parameter in trainable:
            parameter.requires_grad_(True)
        where = f"{path}: {component}" if component else str(path)
        raise UsageError(f"{where}: {error}") from None
    return {"" if "" in models else c: list(deltas) for c, deltas in live.items()}


def _targets(models: Mapping[str, nn.Module], adapter: Adapter) -> Mapping[str, nn.Module]:
    """Component of the file → model; a model by itself is the file's only component."""
    if "" not in models:
        return models
    if len(adapter) > 1:
        given = ", ".join(f'"{component}": …' for component in adapter)
        raise UsageError(
            f"the file adapts {' and '.join(adapter)}, and one model was given: "
            f"load_adapter({{{given}}}, path)"
        )
    return dict.fromkeys(adapter, models[""])


def _live(component: str, models: Mapping[str, nn.Module], adapter: Adapter) -> dict[str, Delta]:
    """Live delta name → delta, in the model's order."""
    if component not in models:
        raise UsageError(f"the file adapts {component}, which was not given: {', '.join(models)}")
    model = models[component]
    names = live_names(component, model)
    modules: Modules = adapter[component]
    for name in modules:
        if name not in names:
            raise UsageError(
                f"the file adapts {name}, which the {component or 'model'} has not "
                f"(a {type(model).__name__} was given)"
            )
    return {live: modules[n] for n, live in names.items() if n in modules}
