"""Anybody's LoRA file → the canonical form, by its keys alone: no model is needed.

Every key must be of one format: a file with one key too many is refused by this key's name, and
nothing is left out.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
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
from sd_lora.formats import (
    checkpoint_keys,
    comfyui,
    diffusers,
    file_names,
    lycoris,
    of_base,
    peft,
    positions,
)
from sd_lora.formats.canonical import Adapter, Lazy, method_tensors
from sd_lora.formats.metadata import method_in
from sd_lora.models.families import FAMILIES
from sd_lora.models.original_names import Layout

Places = dict[str, dict[str, dict[str, str]]]
"""Component → canonical delta name → kind of tensor → the file's key."""

Weights = Callable[[str, str], Tensor]
"""(Component, delta name) → the base's W."""

_OTHER_MODEL = "a LoRA of {}, and not of a Stable Diffusion UNet"

_WHAT_IT_IS = (
    ("model.diffusion_model.", "a whole checkpoint: `sd-lora extract` makes a LoRA of it"),
    ("first_stage_model.", "a checkpoint's VAE, or a whole checkpoint"),
    ("cond_stage_model.", "a checkpoint's text encoder, or a whole checkpoint"),
    ("conditioner.embedders.", "an SDXL checkpoint: `sd-lora extract` makes a LoRA of it"),
    ("control_model.", "a ControlNet"),
    ("controlnet_", "a ControlNet"),
    ("emb_params", "a textual-inversion embedding"),
    ("string_to_param", "a textual-inversion embedding"),
    ("decoder.", "a VAE"),
    ("ip_adapter.", "an IP-Adapter"),
)
"""Beginning of a key of no LoRA → the file's kind."""

_OTHER_MODELS = (
    (r"motion_modules", "a motion LoRA of AnimateDiff, for its motion modules"),
    (r"(double|single)_blocks|single_transformer_blocks", _OTHER_MODEL.format("Flux")),
    (r"joint_blocks", _OTHER_MODEL.format("Stable Diffusion 3")),
    (r"lora_prior_", _OTHER_MODEL.format("Kandinsky or Stable Cascade")),
    (r"(^|[._])blocks[._]\d+[._]\w*?(Wqkv|mlp_fc|skip_linear)", _OTHER_MODEL.format("HunyuanDiT")),
    (
        r"(^|[._])blocks[._]\d+[._](self|cross)_attn|(^|[._])blocks[._]\d+[._]ffn",
        _OTHER_MODEL.format("a video transformer (Wan)"),
    ),
    (
        r"^(base_model\.model\.)?(lora_)?transformer[._]",
        _OTHER_MODEL.format("a diffusion transformer (Flux, SD3, …)"),
    ),
)
"""Pattern of a key → another kind of model that the LoRA is for."""
_OF_OTHER_MODEL = re.compile("|".join(pattern for pattern, _ in _OTHER_MODELS))


@dataclass(frozen=True)
class LoRAFile:
    """An opened LoRA file; its deltas are made at each access.

    format: "diffusers", "kohya", "LyCORIS", "peft", "checkpoint", or that of `positions`.
    dtype: of most of its factors.
    places: the keys of each delta. embeddings: keys of bundled textual inversions, which are no
    part of the adapter.
    """

    path: Path
    format: str
    adapter: Adapter
    header: dict[str, str]
    dtype: torch.dtype
    file: TensorFile | peft.Joined
    places: Places
    embeddings: list[str]

    def check(self) -> None:
        """Make every delta once; raises UsageError at the first that the file has not whole, and
        for magnitudes that are ComfyUI's."""
        if comfyui.MARK.items() <= self.header.items():
            raise UsageError(
                f"{self.path} is for ComfyUI alone: its DoRA has magnitudes for ComfyUI's norm, "
                "which no other reader has. Take the diffusers or LyCORIS file of the same LoRA"
            )
        for problem in self.problems():
            raise UsageError(f"{self.path}: {problem}")

    def notes(self) -> Iterator[str]:
        """Yield remarks on parts of the file that are no part of the adapter."""
        if self.embeddings:
            words = ", ".join(sorted({key.split(".")[1] for key in self.embeddings}))
            yield f"embeddings of {words} are bundled with the LoRA, and are left out"
        if self.file.left_out:
            yield f"objects of other classes were left out: {', '.join(self.file.left_out[:4])}"

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
    base: Weights | None = None,
) -> LoRAFile:
    """Open a LoRA file or folder of any of the formats, and sort its keys.

    Args:
        path: a .safetensors file, a pickled one, a folder of peft or with one LoRA file in it, or
            a run's checkpoint.
        layout: of the UNet, for original names; by default the published families'.
        live: kohya names of the file → (component, canonical name) of models at hand, by them.
        base: W by component and delta name, for methods whose ΔW is a function of it.

    Raises:
        UsageError: not a LoRA, mixed formats, or a key of no format, with its name. The tensors are
            checked when they are read: see `LoRAFile.check`.
    """
    path = find_file(path)
    folders = peft.folders_of(path)
    file: TensorFile | peft.Joined
    if folders:
        file = peft.Joined(folders)
    else:
        file = TensorFile(path, lists=True)
    layout = layout or Layout()
    configs = {component: peft.read_config(folder) for component, folder in folders.items()}
    if folders:
        path = file.path
    if not len(file):
        raise UsageError(f"{path} is no LoRA: it has no tensors")
    embeddings = [key for key in file if key.startswith(_BUNDLED)]
    keys = [key for key in file if not key.startswith(_BUNDLED)]
    if live is None:
        _refuse_other_models(path, keys)
    found = positions.places(str(path), {key: file.shape(key) for key in keys})
    title, header = positions.TITLE, {} if folders else file.header
    scaled: Mapping[str, Mapping[str, Any] | None] = {}
    if found is None:
        title, found = _by_names(path, file, keys, layout, live, base is not None)
        scaled = configs if "" not in configs else dict.fromkeys(found, configs[""])
        if title == "diffusers" and not configs:
            scaled = _configs(path, header)
    places, seen = _with_refiners_encoder(found, file), set[tuple[str, str]]()
    adapter = {
        component: Lazy(
            modules, partial(_make, file, component, modules, scaled.get(component), base, seen)
        )
        for component, modules in places.items()
    }
    kinds = {kind for kind, _ in kinds_and_keys(places)}
    if title == "kohya" and kinds & {"magnitude", "lora_mid", "diff", *method_tensors()}:
        title = "LyCORIS"
    dtypes = Counter(file.spec(key)[0] for kind, key in kinds_and_keys(places) if kind != "alpha")
    dtype = max(dtypes, key=lambda d: dtypes[d]) if dtypes else torch.float32
    return LoRAFile(
        path, "peft" if configs else title, adapter, header, dtype, file, places, embeddings
    )


def _by_names(
    path: Path,
    file: TensorFile | peft.Joined,
    keys: list[str],
    layout: Layout,
    live: Callable[[set[str]], Mapping[str, tuple[str, str]]] | None,
    with_base: bool,
) -> tuple[str, Places]:
    """The format of a file by its keys, and their places.

    Raises:
        UsageError: see `open_lora`.
    """
    known_here = live({key.partition(".")[0] for key in keys}) if live else {}
    parsers: dict[str, Callable[[str], tuple[str, str, str] | None]] = {
        "kohya": lambda key: lycoris.parse(key, layout, known_here, with_base),
        "diffusers": lambda key: diffusers.parse(key, layout),
        checkpoint_keys.TITLE: checkpoint_keys.parse,
    }
    parsed = {title: {key: parse(key) for key in keys} for title, parse in parsers.items()}
    known = {title: sum(p is not None for p in found.values()) for title, found in parsed.items()}
    title = max(known, key=lambda t: known[t])
    if known[title] < len(keys) or not keys:
        raise UsageError(f"{path} {_refusal(parsed, known, file.header)}")
    stages = [key for key in keys if key.endswith(".oft_blocks") and len(file.shape(key)) == 4]
    if stages and not with_base:
        raise UsageError(f"{path} is of the method BOFT, {lycoris.WAY_OUT} (key {stages[0]!r})")
    return title, _places(path, parsed[title])


_BUNDLED = "bundle_emb."
"""Beginning of the keys of textual inversions that OneTrainer and A1111 keep beside a LoRA."""


def _refuse_other_models(path: Path, keys: Iterable[str]) -> None:
    """Raise UsageError for a LoRA of another kind of model, by the first key that shows it."""
    for key in filter(_OF_OTHER_MODEL.search, keys):
        what = next(what for pattern, what in _OTHER_MODELS if re.search(pattern, key))
        raise UsageError(f"{path} is {what} (key {key!r})")


def find_file(path: Path) -> Path:
    """The LoRA file of a path: itself, a peft folder, a checkpoint's, or a folder's only file but
    ComfyUI's.

    Raises:
        UsageError: no file, or several, with their names.
    """
    if not os.path.isdir(path):  # False, too, for a name that the system refuses
        return path
    if peft.folders_of(path):
        return path
    if checkpoint_keys.is_folder(path):
        return path / file_names.FACTORS
    if (path / file_names.DIFFUSERS).is_file():
        return path / file_names.DIFFUSERS
    try:
        ends = (".safetensors", ".bin", ".pt")
        found = sorted(p for p in path.iterdir() if p.suffix in ends)
        found = [p for p in found if not p.name.endswith(file_names.COMFYUI_END)]
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


_REFINER = ("ss_base_model_version", FAMILIES["sdxl_refiner"].base_versions["epsilon"])


def _with_refiners_encoder(places: Places, file: TensorFile | peft.Joined) -> Places:
    """The places with `lora_te_` as the refiner's text encoder, in a file that is the refiner's.

    It is the only one there, and a second one elsewhere. Its width, 1280, or the header says it.
    """
    modules = places.get("text_encoder", {})
    keys = [key for kinds in modules.values() for key in kinds.values()]
    if "text_encoder_2" in places or not all(key.startswith("lora_te_") for key in keys):
        return places
    widths = {
        file.spec(kinds["lora_A"])[1][1:2]
        for name, kinds in modules.items()
        if "lora_A" in kinds and name.endswith("_proj")
    }
    if not modules or not (file.header.get(_REFINER[0]) == _REFINER[1] or widths == {(1280,)}):
        return places
    return {"text_encoder_2" if c == "text_encoder" else c: ms for c, ms in places.items()}


def _make(
    file: Mapping[str, Tensor],
    component: str,
    modules: Mapping[str, Mapping[str, str]],
    config: Mapping[str, object] | None,
    base: Weights | None,
    seen: set[tuple[str, str]],
    name: str,
) -> Delta:
    """One delta of a file; raises UsageError naming it. seen: those that were made before."""
    parts = {}
    for kind, key in modules[name].items():
        tensor = file[key]
        flat = kind == diffusers.FLAT
        parts["magnitude" if flat else kind] = tensor.flatten() if flat else tensor
    title, place = f"{component} {name}" if component else name, (component, name)
    method = of_base.method_of(parts)
    if "oft_blocks" in parts and parts["oft_blocks"].dim() < 4:
        parts = lycoris.with_rotation(title, parts)
    elif method is not None and base is not None:
        parts = {"diff": of_base.change(title, method, base(component, name), parts)}
    elif lycoris.SPARSE <= {*parts}:
        parts = lycoris.with_sparse(title, parts)
    delta = make_delta(title, parts, place in seen)
    seen.add(place)
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
    if not unknown:
        return "holds bundled embeddings and no LoRA"
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
            return f"is of the method {method}, {lycoris.WAY_OUT} (key {first!r})"
    algorithm = method_in(header)
    if algorithm and algorithm not in METHODS:
        return (
            f"is of the method {algorithm!r}, which is not registered here: import the module "
            "of its class (sd_lora.register_method) first"
        )
    if whole:
        return f"is no LoRA that can be read: its first key is {first!r}"
    return f"has {len(unknown)} keys that are not of the {title} format, the first {first!r}"
