"""LoRA files of a checkpoint: as the run would have written them after that step."""

from pathlib import Path

from sd_lora.errors import UsageError
from sd_lora.formats.adapter_files import dated, formats_of, write_formats
from sd_lora.formats.checkpoints import Checkpoint
from sd_lora.formats.family_of_file import family_of
from sd_lora.formats.file_names import lora_paths
from sd_lora.formats.lora_file import open_lora
from sd_lora.formats.names import naming_of
from sd_lora.formats.verify import Verified, fitted, misfits, verify
from sd_lora.models.families import Family
from sd_lora.models.meta_pipeline import MetaPipeline
from sd_lora.training.checkpoint import read_progress
from sd_lora.training.checkpoint_folders import fault, step_of
from sd_lora.training.export import file_dtype
from sd_lora.training.output_folder import LORA_PREFIX, moved, unverified_folder
from sd_lora.training.state_files import read_state


def export_checkpoint(
    path: Path, out: Path | None, overwrite: bool, meta_pipeline: MetaPipeline | None
) -> tuple[list[Verified], list[str]]:
    """Write and verify the LoRA files of a checkpoint; returns them, and notes.

    Args:
        path: the checkpoint's folder.
        out: folder of the files; None: `lora-STEP` beside the checkpoint.
        overwrite: replace files that are there.
        meta_pipeline: of the model; None: of the run's base, if it is here, or else the published
            one of its family.

    Raises:
        UsageError: no checkpoint, a damaged one, another model, or files that are there.
        RunError: as for a run's own files.
    """
    if found := fault(path):
        raise UsageError(f"{path} is no whole checkpoint of a run: {found}")
    lora = open_lora(path)
    lora.check()
    name, settings = lora.header["ss_output_name"], read_progress(path).settings
    if meta_pipeline is None:
        meta_pipeline = _of_base(settings["pretrained_model_name_or_path"], family_of(lora))
    for wrong in misfits(lora.adapter, meta_pipeline):
        raise UsageError(f"{path} does not fit {meta_pipeline.source}: {wrong}")
    adapter = fitted(lora.adapter, meta_pipeline)
    place = out or path.absolute().parent / f"{LORA_PREFIX}{step_of(path)}"
    there = [file.name for file in lora_paths(place, name) if file.exists()]
    if there and not overwrite:
        raise UsageError(f"{place} has {', '.join(there)}: --overwrite replaces them, --out FOLDER")
    with unverified_folder(place) as folder:
        naming = naming_of(meta_pipeline.family, meta_pipeline.layout)
        paths = write_formats(
            adapter, folder, name, dated(lora.header), naming, file_dtype(settings)
        )
        kinds = zip(paths, formats_of(adapter)[0], strict=True)
        files = moved([verify(file, adapter, meta_pipeline, kind) for file, kind in kinds])
    return files, list(_notes(path))


def _notes(path: Path) -> list[str]:
    """A note on new words, whose files need the base's text encoders."""
    words = read_state(path)["tokens"]
    if not words:
        return []
    names = ", ".join(dict.fromkeys(key.partition(".")[2] for key in words))
    return [f"the new words {names} are not written: the run itself does, when it is resumed"]


def _of_base(base: str, family: Family) -> MetaPipeline:
    """The meta pipeline of a run's base; of its family where the base is not here."""
    path = Path(base).expanduser()
    try:
        return Checkpoint(path).meta_pipeline if path.is_file() else MetaPipeline.of_folder(base)
    except UsageError:
        return MetaPipeline.of_family(family)
