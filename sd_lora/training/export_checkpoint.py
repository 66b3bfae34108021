"""LoRA files of a checkpoint: as the run would have written them after that step."""

import dataclasses
import json
from pathlib import Path

from sd_lora.adapters.deltas import Delta
from sd_lora.config.schema import TrainConfig
from sd_lora.errors import UsageError
from sd_lora.formats.adapter_files import COMFYUI, formats_of
from sd_lora.formats.checkpoints import Checkpoint
from sd_lora.formats.comfyui import Weights
from sd_lora.formats.family_of_file import family_of
from sd_lora.formats.file_names import is_file_name, lora_paths
from sd_lora.formats.lora_file import LoRAFile, open_lora
from sd_lora.formats.metadata import OWN_KEY
from sd_lora.formats.verify import Verified, fitted, misfits
from sd_lora.models.families import Family
from sd_lora.models.meta_pipeline import MetaPipeline
from sd_lora.training.average import WORDS, reconstructed
from sd_lora.training.checkpoint import read_progress, state_of
from sd_lora.training.checkpoint_folders import checkpoints, fault, step_of
from sd_lora.training.conditioning import restored_words
from sd_lora.training.data import base_of
from sd_lora.training.export import file_dtype, write_verified, write_words
from sd_lora.training.output_folder import LORA_PREFIX


def export_checkpoint(
    path: Path,
    out: Path | None,
    overwrite: bool,
    model: str | None,
    ema_length: float | None = None,
) -> tuple[list[Verified], list[Path]]:
    """Write and verify the LoRA files of a checkpoint, and those of new words; returns both.

    Args:
        path: the checkpoint's folder.
        out: folder of the files; None: `lora-STEP` beside the checkpoint.
        overwrite: replace files that are there.
        model: the base model; None: the run's, or, without new words, the published one of its
            family where that is not here.
        ema_length: relative length of another moving average than the run's.

    Raises:
        UsageError: no checkpoint, a damaged one, another model, files that are there, or no moving
            averages of which the wanted one could be made.
        RunError: as for a run's own files.
    """
    if found := fault(path):
        raise UsageError(f"{path} is no whole checkpoint of a run: {found}")
    lora = open_lora(path)
    lora.check()
    name, progress = lora.header.get("ss_output_name", ""), read_progress(path)
    if not is_file_name(name):
        raise UsageError(f"{path}: its header calls the run {name!r:.60}, which is no file's name")
    place = out or path.absolute().parent / f"{LORA_PREFIX}{progress.step}"
    settings = progress.settings
    there = [file.name for file in lora_paths(place, name) if file.exists()]
    if there and not overwrite:
        raise UsageError(f"{place} has {', '.join(there)}: --overwrite replaces them, --out FOLDER")
    config = TrainConfig(**settings)
    if ema_length is not None:
        config = config.replace(ema_length=ema_length)  # refuses a run without, or with a decay
        lora = _averaged(lora, path, ema_length)
    if model:
        config = config.with_base(model)
    meta_pipeline = _of_base(config.base_model, None if model else family_of(lora))
    for wrong in misfits(lora.adapter, meta_pipeline):
        raise UsageError(f"{path} does not fit {meta_pipeline.source}: {wrong}")
    words = state_of(path)["tokens"] if ema_length is None else None
    tokens = restored_words(config, base_of(config), words) if words else None
    adapter, weight = fitted(lora.adapter, meta_pipeline), _weight_of(config.base_model)
    kinds = [kind for kind in formats_of(adapter)[0] if weight or kind is not COMFYUI]
    header = lora.header
    files = write_verified(
        adapter, kinds, place, name, header, meta_pipeline, file_dtype(settings), weight
    )
    if tokens is None:
        return files, []
    architecture = header["modelspec.architecture"].removesuffix("/lora")
    record = json.loads(header[OWN_KEY])
    return files, write_words(tokens, place, name, record, architecture)


def _averaged(lora: LoRAFile, path: Path, length: float) -> LoRAFile:
    """The LoRA of a checkpoint with the moving average of another length in place of its own.

    Raises:
        UsageError: a run with new words, whose averages are not made.
    """
    step = step_of(path)
    there = [p for p in checkpoints(path.parent) if step_of(p) <= step and not fault(p)]
    snapshots = {step_of(p): state_of(p)["average"] for p in {path, *there}}
    values = reconstructed(snapshots, length)
    if any(key.startswith(WORDS) for key in values):
        raise UsageError("--ema_length is for LoRAs without new words: leave it out")
    adapter: dict[str, dict[str, Delta]] = {}
    for component, modules in lora.places.items():
        for name, keys in modules.items():
            delta = adapter.setdefault(component, {})[name] = lora.adapter[component][name]
            for kind, key in keys.items():
                if key in values:
                    delta.tensors()[kind].copy_(values[key])
    return dataclasses.replace(lora, adapter=adapter)


def _weight_of(base: str) -> Weights | None:
    """The weights of a base that is here; None for one of the hub: DoRA for ComfyUI needs them."""
    path = Path(base).expanduser()
    return Checkpoint(path).weight if path.exists() else None


def _of_base(base: str, family: Family | None) -> MetaPipeline:
    """The meta pipeline of a base; of its family, if that is given, where the base is not here."""
    path = Path(base).expanduser()
    try:
        return Checkpoint(path).meta_pipeline if path.is_file() else MetaPipeline.of_folder(base)
    except UsageError:
        if family is None:
            raise
        return MetaPipeline.of_family(family)
