"""A pipeline's folder or hub id: what it says of itself, read and checked part by part."""

import inspect
import pickle
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_CACHE
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from sd_lora.errors import UsageError
from sd_lora.models.families import Family, refuse_other_pipelines
from sd_lora.models.meta_pipeline import without_bars
from sd_lora.models.recognise import FAILURES, reason

CLASSES: dict[str, Any] = {
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
}
_PART_FILES: dict[str, tuple[str, ...]] = {
    "scheduler": ("scheduler_config.json",),
    "tokenizer": ("tokenizer.json", "vocab.json"),
    "tokenizer_2": ("tokenizer.json", "vocab.json"),
}


def on_disk(name: str) -> str:
    """Returns a path that exists with its ~ resolved, which loaders do not; other names as they
    are: hub ids."""
    path = Path(name).expanduser()
    return str(path) if path.exists() else name


def tokenizer_of(component: str) -> str:
    """Returns the folder of a text encoder's tokenizer."""
    return component.replace("text_encoder", "tokenizer")


def pipeline_index(name: str, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns a pipeline's model_index.json, or raises UsageError if there is none of ours."""
    path = Path(name).expanduser()
    if path.is_dir() and not (path / "model_index.json").is_file():
        found = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing"
        single = sorted(p for p in path.iterdir() if p.suffix in (".safetensors", ".ckpt"))
        hint = f"; to train {single[0].name}, give its own path" if single else ""
        raise UsageError(
            f"{path} is no diffusers folder: it has no model_index.json (found {found}){hint}"
        )
    if not path.is_dir() and (
        name.startswith((".", "/", "~")) or name.count("/") != 1 or "\\" in name
    ):
        raise UsageError(f"model {name} does not exist: there is no such folder or file")
    hub = {key: options[key] for key in ("revision", "cache_dir")}
    index = read_part("model_index.json", name, partial(DiffusionPipeline.load_config, name, **hub))
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise UsageError(f"the model_index.json of {name} is not a pipeline's index")
    refuse_other_pipelines(index["_class_name"])
    return index


def part_config(cls: Any, name: str, part: str, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the configuration of a part, or raises UsageError."""
    path = Path(name).expanduser() / part
    if Path(name).expanduser().is_dir() and not (path / "config.json").is_file():
        where = f"{part}/config.json" if part else "config.json"
        raise UsageError(f"{name} lacks {where}: the model folder is incomplete")
    hub = {key: options[key] for key in ("revision", "cache_dir")}
    read = partial(cls.load_config, name, subfolder=part, **hub)
    what = part or "vae"  # another VAE's lies at the root
    config = read_part(what, name, read)
    if not isinstance(config, dict):
        raise UsageError(f"the configuration of the {what} of {name} is not a table of settings")
    if config.get("_class_name", cls.__name__) != cls.__name__:
        raise UsageError(
            f"the {what} of {name} is a {config['_class_name']}; {cls.__name__} is what "
            "can be used here"
        )
    defaults = inspect.signature(cls.__init__).parameters
    known = {n: p.default for n, p in defaults.items() if p.default is not inspect.Parameter.empty}
    return known | config


def check_folder(path: Path, family: Family) -> None:
    """Raises UsageError naming what a local diffusers folder lacks."""
    needed = {"scheduler": _PART_FILES["scheduler"]}
    for component in family.text_encoders:
        needed[component] = ("config.json",)
        needed[tokenizer_of(component)] = _PART_FILES[tokenizer_of(component)]
    for part, names in needed.items():
        if not any((path / part / name).is_file() for name in names):
            raise UsageError(f"{path} lacks {part}/{names[0]}: the model folder is incomplete")


def check_classes(name: str, index: Mapping[str, Any], family: Family) -> None:
    """Raises UsageError for a part of another class than Stable Diffusion's, by its index."""
    for part in (*family.components, "vae"):
        entry = index.get(part)
        found = entry[1] if isinstance(entry, list | tuple) and len(entry) == 2 else None
        wanted = CLASSES[part].__name__
        if found != wanted and entry is not None:
            kind = f"a {found}" if found else "nothing"
            raise UsageError(
                f"the model_index.json of {name} names {kind} as its {part}; {family.label} has a "
                f"{wanted} there"
            )


def read_part(what: str, name: str, load: Callable[[], Any]) -> Any:
    """Runs one from_pretrained, turning its failure into an error that names the part.

    Loaders report weights that the files lack and go on with random ones; here that is an error.
    """
    try:
        with without_bars(), quiet(), warnings.catch_warnings():
            # diffusers passes on an option that huggingface_hub has taken away
            warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")
            loaded = load()
    except (pickle.UnpicklingError, EOFError):
        raise UsageError(
            f"the {what} of {name} could not be loaded: its file is no file of weights; it is cut "
            "off, or a pointer that git-lfs has not exchanged for what it stands for"
        ) from None
    except FAILURES as error:
        where = ""
        if not Path(name).expanduser().exists():
            where = (
                "there is no such folder here, and as a hub id it is neither in the cache "
                f"{_cache(load)} nor reachable, or lacks this part: "
            )
        where = _variants(what, name, load) or where + reason(error)
        raise UsageError(f"the {what} of {name} could not be loaded: {where}") from None
    if not isinstance(loaded, tuple):
        return loaded
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise UsageError(
            f"the {what} of {name} lacks {len(missing)} of its weights ({missing[0]}, …): the "
            "files are incomplete or of another model"
        )
    others = sorted(info["unexpected_keys"])
    if others and what in ("unet", "vae"):  # text encoders' old files have buffers
        raise UsageError(
            f"the {what} of {name} has {len(others)} weights that are none of its own "
            f"({others[0]}, …): it is another model's, or something was left in it"
        )
    return model


def _variants(what: str, name: str, load: Callable[[], Any]) -> str:
    """Returns that a part has its weights in variants alone; empty if that is not what is wrong."""
    what = _given(load).get("subfolder", what)
    folder = Path(name).expanduser() / what
    if not folder.is_dir():
        options = {"cache_dir": _cache(load)}
        options |= {k: v for k, v in _given(load).items() if k == "revision" and v}
        try:
            config = try_to_load_from_cache(name, f"{what}/config.json", **options)
        except ValueError:  # no hub id
            return ""
        folder = Path(config).parent if isinstance(config, str) else folder
    names = [path.name for path in folder.glob("*") if path.suffix in (".safetensors", ".bin")]
    found = {
        m[1] for n in names if (m := re.search(r"\.(\w+)(?:-\d+-of-\d+)?\.(?:safetensors|bin)$", n))
    }
    if _given(load).get("variant") or not found or any(n.count(".") == 1 for n in names):
        return ""
    return f"its weights are there as variant {' and '.join(sorted(found))} alone: give --variant"


def _given(load: Callable[[], Any]) -> dict[str, Any]:
    return load.keywords if isinstance(load, partial) else {}


def _cache(load: Callable[[], Any]) -> str:
    """Returns the cache that a loader looks into."""
    return str(_given(load).get("cache_dir") or HF_HUB_CACHE)


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps diffusers from warning of each cast, that it leaves an empty list in float32, and of
    looking for other files; what goes wrong is raised."""
    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)
