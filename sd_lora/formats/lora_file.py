"""Anybody's LoRA file → the canonical form, by its keys alone: no model is needed.

Every key must be of one format: a file with one key too many is refused by this key's name, and
nothing is left out.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sd_lora.adapters.deltas import METHODS, Delta
from sd_lora.adapters.state import make_delta
from sd_lora.errors import UsageError
from sd_lora.files import TensorFile
from sd_lora.formats import checkpoint_keys, diffusers, file_names, lycoris, peft
from sd_lora.formats.canonical import Adapter, Lazy, method_tensors
from sd_lora.formats.metadata import method_in
from sd_lora.models.original_names import Layout

Places = dict[str, dict[str, dict[str, str]]]
"""Component → canonical delta name → kind of tensor → the file's key."""

_WHAT_IT_IS = (
    ("model.diffusion_model.", "a whole checkpoint: `sd-lora extract` makes a LoRA of it"),
    ("first_stage_model.", "a checkpoint's VAE, or a whole checkpoint"),
    ("cond_stage_model.", "a checkpoint's text encoder, or a whole checkpoint"),
    ("conditioner.embedders.", "an SDXL checkpoint: `sd-lora extract` makes a LoRA of it"),
    ("control_model.", "a ControlNet"),
    ("controlnet_", "a ControlNet"),
    ("emb_params", "a textual-inversion embedding"),
    ("string_to_param", "a textual-inversion embedding"),
    ("clip_g", "a textual-inversion embedding of SDXL"),
    ("bundle_emb.", "a LoRA with an embedding bundled: this project reads files of a LoRA alone"),
    ("transformer.", "a LoRA of a diffusion transformer (Flux, SD3, …) and not of a UNet"),
    ("lora_transformer_", "a LoRA of a diffusion transformer (Flux, SD3, …) and not of a UNet"),
    ("lora_unet_double_blocks_", "a LoRA of Flux"),
    ("lora_unet_joint_blocks_", "a LoRA of Stable Diffusion 3"),
    ("lora_prior_", "a LoRA of Kandinsky or Stable Cascade"),
    ("decoder.", "a VAE"),
    ("ip_adapter.", "an IP-Adapter"),
)


@dataclass(frozen=True)
class LoRAFile:
    """An opened LoRA file; its deltas are made at each access.

    format: "diffusers", "kohya", "LyCORIS", "peft", "checkpoint". dtype: of most of its factors.
    places: the keys of each delta.
    """

    path: Path
    format: str
    adapter: Adapter
    header: dict[str, str]
    dtype: torch.dtype
    file: Mapping[str, Tensor]
    places: Places

    def check(self) -> None:
        """Make every delta once; raises UsageError at the first that the file has not whole."""
        for problem in self.problems():
            raise UsageError(f"{self.path}: {problem}")

    def problems(self) -> Iterator[str]:
        """Yield the problems of each delta: partners, shapes, values."""
        for component, modules in self.places.items():
            for name in modules:
                try:
                    self.adapter[component][name]
                except UsageError as error:
                    yield str(error)


def open_lora(
    path: Path,
    layout: Layout | None = None,
    live: Callable[[set[str]], Mapping[str, tuple[str, str]]] | None = None,
) -> LoRAFile:
    """Open a LoRA file or folder of any of the formats, and sort its keys.

    Args:
        path: a .safetensors file, a pickled one, a folder of peft or with one LoRA file in it, or
            a run's checkpoint.
        layout: of the UNet, for original names; by default the published families'.
        live: kohya names of the file → (component, canonical name) of models at hand, by them.

    Raises:
        UsageError: not a LoRA, mixed formats, or a key of no format, with its name. The tensors are
            checked when they are read: see `LoRAFile.check`.
    """
    path = find_file(path)
    folder = path if os.path.isdir(path) else None
    if folder is not None:
        path = peft.weights_of(folder)
    file = TensorFile(path)
    layout = layout or Layout()
    config = peft.read_config(folder) if folder else None
    if not len(file):
        raise UsageError(f"{path} is no LoRA: it has no tensors")
    known_here = live({key.partition(".")[0] for key in file}) if live else {}
    parsers: dict[str, Callable[[str], tuple[str, str, str] | None]] = {
        "kohya": lambda key: lycoris.parse(key, layout, known_here),
        "diffusers": lambda key: diffusers.parse(key, layout),
        checkpoint_keys.TITLE: checkpoint_keys.parse,
    }
    parsed = {title: {key: parse(key) for key in file} for title, parse in parsers.items()}
    known = {title: sum(p is not None for p in found.values()) for title, found in parsed.items()}
    title = max(known, key=lambda t: known[t])
    if known[title] < len(file):
        raise UsageError(f"{path} {_refusal(parsed, known, file.header)}")
    places = _places(path, parsed[title])
    header = {} if folder else file.header
    scaled = dict.fromkeys(places, config) if config else {}
    if title == "diffusers" and not config:
        scaled = _configs(path, header)
    adapter = {
        component: Lazy(modules, partial(_make, file, component, modules, scaled.get(component)))
        for component, modules in places.items()
    }
    kinds = {kind for kind, _ in kinds_and_keys(places)}
    if title == "kohya" and kinds & {"magnitude", "lora_mid", "diff", *method_tensors()}:
        title = "LyCORIS"
    dtypes = Counter(file.spec(key)[0] for kind, key in kinds_and_keys(places) if kind != "alpha")
    dtype = max(dtypes, key=lambda d: dtypes[d]) if dtypes else torch.float32
    return LoRAFile(path, "peft" if config else title, adapter, header, dtype, file, places)


def find_file(path: Path) -> Path:
    """The LoRA file of a path: itself, a peft folder, a checkpoint's, or a folder's only file.

    Raises:
        UsageError: no file, or several, with their names.
    """
    if not os.path.isdir(path):  # False, too, for a name that the system refuses
        return path
    if peft.is_folder(path):
        peft.weights_of(path)
        return path
    if checkpoint_keys.is_folder(path):
        return path / file_names.FACTORS
    if (path / file_names.DIFFUSERS).is_file():
        return path / file_names.DIFFUSERS
    try:
        found = sorted(p for p in path.iterdir() if p.suffix in (".safetensors", ".bin", ".pt"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    if len(found) == 1:
        return found[0]
    have = ", ".join(p.name for p in found[:4]) or "no .safetensors or .bin file"
    raise UsageError(f"{path} is a folder with {have}: give the LoRA file itself")


def _configs(path: Path, header: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    try:
        return diffusers.configs(header)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def kinds_and_keys(places: Places) -> Iterator[tuple[str, str]]:
    """Yield the kind of tensor and the key of everything in a file."""
    for modules in places.values():
        for kinds in modules.values():
            yield from kinds.items()


def _places(path: Path, parsed: Mapping[str, tuple[str, str, str] | None]) -> Places:
    places: Places = {}
    for key, place in parsed.items():
        assert place is not None
        component, name, kind = place
        kinds = places.setdefault(component, {}).setdefault(name, {})
        if kind in kinds:
            raise UsageError(f"{path}: {kinds[kind]!r} and {key!r} are the same tensor's names")
        kinds[kind] = key
    return places


def _make(
    file: TensorFile,
    component: str,
    modules: Mapping[str, Mapping[str, str]],
    config: Mapping[str, object] | None,
    name: str,
) -> Delta:
    """One delta of a file; raises UsageError naming it."""
    parts = {}
    for kind, key in modules[name].items():
        tensor = file[key]
        flat = kind == diffusers.FLAT
        parts["magnitude" if flat else kind] = tensor.flatten() if flat else tensor
    delta = make_delta(f"{component} {name}" if component else name, parts)
    if config is not None and "alpha" not in parts and delta.method != "full":
        # patterns may be written for a transformers without `text_model.` in its names
        names = {name, name.removeprefix("text_model.")}
        peft.rescale(delta, config, names)
    return delta


def _refusal(
    parsed: Mapping[str, Mapping[str, object]], known: Mapping[str, int], header: Mapping[str, str]
) -> str:
    """Why a file whose keys are not all of one format is refused."""
    title = max(known, key=lambda t: known[t])
    unknown = [key for key, place in parsed[title].items() if place is None]
    first = min(unknown)
    whole = not known[title]
    for start, what in _WHAT_IT_IS:
        if any(key.startswith(start) for key in unknown):
            return f"is {what} (key {first!r})"
    other = next((t for t in known if t != title), title)
    mixed = [key for key in unknown if parsed[other][key] is not None]
    if mixed:
        return (
            f"mixes two formats: {known[title]} keys are {title}'s and {len(mixed)} {other}'s "
            f"({min(mixed)!r}), so that every loader passes over some of them"
        )
    for end, method in lycoris.OTHER_METHODS.items():
        if any(key.endswith(f".{end}") for key in unknown):
            return f"is of the method {method}, which cannot be read yet (key {first!r})"
    algorithm = method_in(header)
    if algorithm and algorithm not in METHODS:
        return (
            f"is of the method {algorithm!r}, which is not registered here: import the module "
            "of its class (sd_lora.register_method) first"
        )
    if whole:
        return f"is no LoRA that can be read: its first key is {first!r}"
    return f"has {len(unknown)} keys that are not of the {title} format, the first {first!r}"
