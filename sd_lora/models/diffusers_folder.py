"""A pipeline's folder or hub id: its configurations and weights, read and checked part by part."""

import inspect
import pickle
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.utils import logging
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_CACHE

from sd_lora.errors import UsageError
from sd_lora.files import PARSER_ERRORS, reason_of
from sd_lora.hub import check_model_path
from sd_lora.models.families import Family, refuse_other_pipelines
from sd_lora.models.meta_pipeline import PART_CLASSES, without_progress_bars

_PART_FILES: dict[str, tuple[str, ...]] = {
    "scheduler": ("scheduler_config.json",),
    "tokenizer": ("tokenizer.json", "vocab.json"),
    "tokenizer_2": ("tokenizer.json", "vocab.json"),
}
"""Part → alternatives for the file in its folder."""


def expand_home(name: str) -> str:
    """Return an existing path with its ~ expanded, as loaders do not; a hub id as it is."""
    path = Path(name).expanduser()
    return str(path) if path.exists() else name


def tokenizer_of(component: str) -> str:
    """Return the folder of a text encoder's tokenizer: "tokenizer" or "tokenizer_2"."""
    return component.replace("text_encoder", "tokenizer")


def hub_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options for files that have no variants: `revision` and `cache_dir`."""
    return {key: options[key] for key in ("revision", "cache_dir")}


def pipeline_index(name: str, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a pipeline's model_index.json.

    name: its folder or hub id.
    options: `revision` and `cache_dir`.

    Raises:
        UsageError: no model or no index there, or a pipeline without training here.
    """
    check_model_path(name)
    read = partial(DiffusionPipeline.load_config, name, **hub_options(options))
    index = read_part("model_index.json", name, read)
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise UsageError(f"the model_index.json of {name} is not a pipeline's index")
    refuse_other_pipelines(index["_class_name"])
    return index


def part_config(cls: Any, name: str, part: str, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the configuration of a model's part, with its class's defaults filled in.

    cls: the part's class.
    name: folder or hub id of the model.
    part: the part's folder; "" for a VAE's own repository.
    options: `revision` and `cache_dir`.

    Raises:
        UsageError: not found, broken, or of another class.
    """
    path = Path(name).expanduser() / part
    if Path(name).expanduser().is_dir() and not (path / "config.json").is_file():
        where = f"{part}/config.json" if part else "config.json"
        raise UsageError(f"{name} lacks {where}: the model folder is incomplete")
    read = partial(cls.load_config, name, subfolder=part, **hub_options(options))
    part = part or "vae"
    config = read_part(part, name, read)
    if not isinstance(config, dict):
        raise UsageError(f"the configuration of the {part} of {name} is not a table of settings")
    if config.get("_class_name", cls.__name__) != cls.__name__:
        raise UsageError(
            f"the {part} of {name} is a {config['_class_name']}; {cls.__name__} is needed here"
        )
    defaults = inspect.signature(cls.__init__).parameters
    known = {n: p.default for n, p in defaults.items() if p.default is not inspect.Parameter.empty}
    return known | config


def check_folder(path: Path, family: Family) -> None:
    """Raise UsageError with the first file missing in a local diffusers folder."""
    needed = {"scheduler": _PART_FILES["scheduler"]}
    for component in family.text_encoders:
        needed[component] = ("config.json",)
        needed[tokenizer_of(component)] = _PART_FILES[tokenizer_of(component)]
    for part, names in needed.items():
        if not any((path / part / name).is_file() for name in names):
            raise UsageError(f"{path} lacks {part}/{names[0]}: the model folder is incomplete")


def check_classes(name: str, index: Mapping[str, Any], family: Family) -> None:
    """Raise UsageError if the index names another class for a part than Stable Diffusion's."""
    for part in (*family.components, "vae"):
        entry = index.get(part)
        found = entry[1] if isinstance(entry, list | tuple) and len(entry) == 2 else None
        wanted = PART_CLASSES[part]
        if found != wanted and entry is not None:
            kind = f"a {found}" if found else "nothing"
            raise UsageError(
                f"the model_index.json of {name} names {kind} as its {part}; {family.label} has a "
                f"{wanted} there"
            )


def read_part(part: str, name: str, load: Callable[[], Any]) -> Any:
    """Return the result of a from_pretrained; a failure becomes an error with the part's name.

    Loaders fill in random weights where the files lack some, with a warning; here this is an error.

    part: "unet", "scheduler", "tokenizer", …
    name: folder or hub id of the model.
    load: the call, a `partial` whose options the error can name.

    Raises:
        UsageError: not found, broken, or weights are missing or left over.
    """
    try:
        with without_progress_bars(), without_warnings(), warnings.catch_warnings():
            # diffusers still passes an option removed from huggingface_hub
            warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")
            loaded = load()
    except (pickle.UnpicklingError, EOFError):
        raise UsageError(
            f"the {part} of {name} could not be loaded: its file does not hold weights; it is cut "
            "off, or a git-lfs pointer: run `git lfs pull`, or download the file again"
        ) from None
    except PARSER_ERRORS as error:
        where = ""
        if not Path(name).expanduser().exists():
            where = (
                "there is no such folder here, and as a hub id it is neither in the cache "
                f"{_cache_of(load)} nor reachable, or lacks this part: "
            )
        where = _hint_at_variant(part, name, load) or where + reason_of(error)
        raise UsageError(f"the {part} of {name} could not be loaded: {where}") from None
    if not isinstance(loaded, tuple):
        return loaded
    model, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise UsageError(
            f"the {part} of {name} lacks {len(missing)} of its weights ({missing[0]}, …): the "
            "files are incomplete or of another model"
        )
    others = sorted(info["unexpected_keys"])
    if others and part in ("unet", "vae"):  # text encoders' old files have buffers
        raise UsageError(
            f"the {part} of {name} has {len(others)} weights that a {part} does not have "
            f"({others[0]}, …): the file is another model's, or a training tool left them in it"
        )
    return model


def _hint_at_variant(part: str, name: str, load: Callable[[], Any]) -> str:
    """Return a hint at --variant if a part's weights exist as variants alone; else ""."""
    part = _options_of(load).get("subfolder", part)
    folder = Path(name).expanduser() / part
    if not folder.is_dir():
        options = {"cache_dir": _cache_of(load)}
        options |= {k: v for k, v in _options_of(load).items() if k == "revision" and v}
        try:
            config = try_to_load_from_cache(name, f"{part}/config.json", **options)
        except ValueError:  # not a hub id
            return ""
        folder = Path(config).parent if isinstance(config, str) else folder
    names = [path.name for path in folder.glob("*") if path.suffix in (".safetensors", ".bin")]
    found = {
        m[1] for n in names if (m := re.search(r"\.(\w+)(?:-\d+-of-\d+)?\.(?:safetensors|bin)$", n))
    }
    if _options_of(load).get("variant") or not found or any(n.count(".") == 1 for n in names):
        return ""
    return f"its weights are there as variant {' and '.join(sorted(found))} alone: give --variant"


def _options_of(load: Callable[[], Any]) -> dict[str, Any]:
    return load.keywords if isinstance(load, partial) else {}


def _cache_of(load: Callable[[], Any]) -> str:
    """Return the cache folder of a loader."""
    return str(_options_of(load).get("cache_dir") or HF_HUB_CACHE)


@contextmanager
def without_warnings() -> Iterator[None]:
    """Silence diffusers' warnings about casts, empty lists and other files; errors are raised."""
    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)
