"""Small pictures of a run's images, for its page: whole, and pale outside the crop."""

from contextlib import suppress
from typing import Any

from PIL import Image

from sd_lora.data.check.page import data_uri
from sd_lora.training.run import Run
from sd_lora.training.samples import reference_of

SIDE = 96
"""Longest side in pixels; about 2 KB each."""


def add_thumbnails(run: Run, images: list[dict[str, Any]]) -> None:
    """Give rows of the ledger a "picture", a data URI; those of streamed and lost images none.

    A picture is made once a run: `run.thumbnails` keeps them.
    """
    for row in images:
        index = row["index"]
        if index not in run.thumbnails:
            run.thumbnails[index] = ""
            with suppress(Exception):  # a run does not end for want of its page
                run.thumbnails[index] = _thumbnail(run, index)
        if picture := run.thumbnails[index]:
            row["picture"] = picture


def _thumbnail(run: Run, index: int) -> str:
    instances = run.images.instances
    whole = reference_of(run, instances.samples[index])
    if whole is None:
        return ""
    crop = instances.shown_crop(index)
    whole.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    scale = whole.width / crop.resized[0]
    left, top = crop.corner
    box = [left, top, left + crop.size[0], top + crop.size[1]]
    kept = whole.crop(tuple(round(scale * value) for value in box))  # type: ignore[arg-type]
    shown = Image.blend(whole, Image.new("RGB", whole.size, "#808080"), 0.7)
    shown.paste(kept, (round(scale * left), round(scale * top)))
    return data_uri(shown)
