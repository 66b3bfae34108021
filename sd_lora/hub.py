"""Names of models: folders and files here, or ids of the hub."""

from pathlib import Path

from sd_lora.errors import UsageError, near_path


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a hub id, owner/model."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and "\\" not in name


def check_model_path(name: str) -> None:
    """Check a base model's path: a pipeline's folder, or a file; hub ids are not looked up.

    Raises:
        UsageError: nothing there, or a folder without a pipeline's index.
    """
    path = Path(name).expanduser()
    if path.is_dir() and not (path / "model_index.json").is_file():
        names = sorted(p.name for p in path.iterdir())
        single = [n for n in names if n.endswith((".safetensors", ".ckpt"))]
        hint = f"; to train {single[0]}, give its own path" if single else ""
        raise UsageError(
            f"{path} is not a diffusers folder: it has no model_index.json (found "
            f"{', '.join(names[:6]) or 'nothing'}){hint}"
        )
    if not path.exists() and not is_hub_id(name):
        raise UsageError(
            f"model {name} does not exist: there is no such folder or file{near_path(path)}"
        )


def check_hub_id(name: str, files: tuple[str, ...], cache_dir: str | None = None) -> str:
    """The note that a name is about to be looked up on the hub; "" for a path, or a cached model.

    name: of a model. files: of which one is in the cache of a model that was downloaded. cache_dir:
    folder of the cache; huggingface_hub's own if None.

    Raises:
        UsageError: an id whose owner is a folder here, so that a path was meant, or that is not in
            the cache while HF_HUB_OFFLINE is set.
    """
    path = Path(name).expanduser()
    if path.exists() or not is_hub_id(name):
        return ""
    from huggingface_hub import constants, try_to_load_from_cache  # 0.1 s

    try:
        cached = any(isinstance(try_to_load_from_cache(name, f, cache_dir), str) for f in files)
    except ValueError:  # no valid id
        cached = False
    if cached:
        return ""
    nowhere = f"there is no such folder or file{near_path(path)}"
    if path.parent.is_dir():
        raise UsageError(f"model {name} does not exist: {nowhere}")
    if constants.HF_HUB_OFFLINE:
        raise UsageError(
            f"model {name} does not exist: {nowhere}; as a hub id it is not in the cache "
            f"{cache_dir or constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids to ask the hub"
        )
    return f"there is no folder {name} here: asking the hub for it"
