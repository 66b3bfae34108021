"""`sd-lora caption`: captions of a folder's images, proposed by an image-to-text model."""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from tqdm.auto import tqdm

from sd_lora.data.images.decode import decode_with_mask, read_file
from sd_lora.errors import RunError, counted
from sd_lora.models.captioner import Captioner
from sd_lora.sample import best_device, known_device
from sd_lora.studio.image_set import Entry, Sets, by_place
from sd_lora.training import out_of_memory
from sd_lora.training.out_of_memory import OutOfMemory, told_by


def wanted(sets: Sets, folder: Path, overwrite: bool) -> list[Entry]:
    """The images that get a caption: those without one, or all.

    Raises:
        UsageError: no folder, no images, or captions in a file that is read alone.
    """
    found = sets.of(folder, anew=True)
    entries = [e for e in found.entries.values() if overwrite or not (e.caption or "").strip()]
    by_place(found, [entry.name for entry in entries])
    return entries


def run(args: argparse.Namespace) -> str:
    """Caption the images that the flags ask for; returns lines for the terminal.

    Captions are written after each batch, so that an interrupted command goes on where it ended.

    Raises:
        UsageError, RunError: for people.
    """
    sets, folder = Sets(), args.folder.expanduser()
    entries = wanted(sets, folder, args.overwrite)
    if not entries:
        return f"all images in {folder} have captions already: --overwrite replaces them"
    device = known_device(args.device) if args.device else best_device()
    captioner = Captioner.load(args.captioner.expanduser(), device, args.prompt)
    notes: list[str] = []
    written = 0
    with tqdm(total=len(entries), desc="captions", unit="image", dynamic_ncols=True) as bar:
        for start in range(0, len(entries), args.batch):
            batch = entries[start : start + args.batch]
            with told_by(partial(_out_of_memory, device)):
                new = _captions(captioner, batch, args, notes)
            sets.write(folder, new)
            written += len(new)
            bar.update(len(batch))
    lines = [f"{counted(written, 'caption')} written in {folder}"]
    lines += [f"  not written: {note}" for note in notes[:20]]
    lines += [f"  … and {len(notes) - 20} more"] * (len(notes) > 20)
    if not written:
        raise RunError("\n".join(lines))
    return "\n".join(lines)


def _out_of_memory(device: torch.device, error: BaseException) -> OutOfMemory:
    return OutOfMemory(
        f"{device} has too little memory to caption so many images at once, "
        f"{out_of_memory.wanted(error)}: give a lower --batch, or a smaller --captioner. The "
        "captions that are written stay"
    )


def _captions(
    captioner: Captioner, batch: Sequence[Entry], args: argparse.Namespace, notes: list[str]
) -> dict[str, str]:
    """Image → its caption; adds notes on images without one."""
    images = {}
    for entry in batch:
        try:
            images[entry.name], _ = decode_with_mask(read_file(entry.path), entry.name)
        except (RunError, OSError) as error:
            notes.append(f"{entry.name}: {error}")
    if not images:
        return {}
    texts = captioner.captions([*images.values()], args.max_tokens)
    found = dict(zip(images, texts, strict=True))
    notes += [f"{name}: the model says nothing of it" for name, text in found.items() if not text]
    return {name: text for name, text in found.items() if text}
