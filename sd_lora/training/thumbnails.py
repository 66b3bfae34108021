"""The images of a run for its page, with small pictures: whole, and pale outside the crop."""

from contextlib import suppress
from typing import Any

from PIL import Image

from sd_lora.data.batches.stream import ImageSet
from sd_lora.data.check.page import data_uri
from sd_lora.training.run import Run
from sd_lora.training.samples import reference_of

SIDE = 96
"""Longest side in pixels; about 2 KB each."""


def image_rows(run: Run) -> list[dict[str, Any]]:
    """The run's images for `report.json`, with their pictures: those of the ledger, then, with
    "held_out", those that are not trained."""
    held_out = run.images.held_out
    others = held_out.set.samples if held_out else []
    rows = [
        row | {"file": run.images.instances.samples[row["index"]].name}
        for row in run.ledger.record()
    ]
    rows += [
        {"index": i, "name": sample.name, "file": sample.name, "seen": 0, "loss": None,
         "change": None, "finding": "", "windows": [], "held_out": True}
        for i, sample in enumerate(others)
    ]  # fmt: skip
    add_thumbnails(run, rows)
    return rows


def add_thumbnails(run: Run, images: list[dict[str, Any]]) -> None:
    """Give rows of images a "picture", a data URI; those of streamed and lost images none.

    A picture is made once a run: `run.thumbnails` keeps them.
    """
    held_out = run.images.held_out
    for row in images:
        shown = held_out.set if held_out and row.get("held_out") else run.images.instances
        key = ("held out" if shown is not run.images.instances else "trained", row["index"])
        if key not in run.thumbnails:
            run.thumbnails[key] = ""
            with suppress(Exception):  # a run does not end for want of its page
                run.thumbnails[key] = _thumbnail(run, shown, row["index"])
        if picture := run.thumbnails[key]:
            row["picture"] = picture


def _thumbnail(run: Run, shown: ImageSet, index: int) -> str:
    whole = reference_of(run, shown.samples[index])
    if whole is None:
        return ""
    crop = shown.shown_crop(index)
    whole.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    scale = whole.width / crop.resized[0]
    left, top = crop.corner
    box = [left, top, left + crop.size[0], top + crop.size[1]]
    kept = whole.crop(tuple(round(scale * value) for value in box))  # type: ignore[arg-type]
    pale = Image.blend(whole, Image.new("RGB", whole.size, "#808080"), 0.7)
    pale.paste(kept, (round(scale * left), round(scale * top)))
    return data_uri(pale)
