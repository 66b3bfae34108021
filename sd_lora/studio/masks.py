"""Masks drawn on the page of images, written where `mask_files` reads them."""

import base64
import binascii
import io
from http import HTTPStatus
from pathlib import Path
from urllib.parse import quote

from PIL import Image
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from sd_lora.data.images.decode import decode_with_mask, read_file
from sd_lora.errors import UsageError
from sd_lora.files import write_whole
from sd_lora.studio.form import FOLDER, ON
from sd_lora.studio.image_set import Entry
from sd_lora.studio.new import DRAFT
from sd_lora.studio.opened import inside
from sd_lora.studio.page import action, page, problem, render, see, studio_of

PREFIX = "data:image/png;base64,"

BLACK = (0, 0, 0)
"""Colour below a mask's own transparency, as in a run: not trained."""

SHOWN = 1024
"""Longest side in pixels of a mask as it is shown and drawn."""

ENDING = "-masklabel.png"
"""Of a new mask, beside its image: OneTrainer's name, which means nothing else."""


def place_of(entry: Entry) -> Path:
    """The file of an image's mask: the one that a run reads, or a new one.

    Raises:
        UsageError: a mask that is no PNG.
    """
    if entry.mask is None:
        return entry.path.with_name(entry.path.stem + ENDING)
    if entry.mask.suffix.lower() != ".png":
        raise UsageError(f"its mask is {entry.mask}: only a mask as PNG is drawn on")
    return entry.mask


def write_mask(entry: Entry, drawn: bytes) -> Path | None:
    """Write the mask of an image in the image's own size; returns its file. One that is white all
    over says nothing, and a file that was drawn here is removed then: None.

    drawn: a PNG of any size: white is trained, black is not.

    Raises:
        UsageError: no mask, a mask without anything to train, or one that is no PNG.
        RunError: an image or mask that cannot be decoded, or a file that cannot be written.
    """
    place = place_of(entry)
    mask = decode_with_mask(drawn, "the drawn mask", BLACK)[0].convert("L")
    low, high = mask.getextrema()
    if high == 0:
        raise UsageError("nothing of the image would be trained: take it out of the folder instead")
    if low == 255 and place.name.endswith(ENDING):
        place.unlink(missing_ok=True)
        return None
    size = decode_with_mask(read_file(entry.path), entry.path.name)[0].size
    buffer = io.BytesIO()
    mask.resize(size, Image.Resampling.BILINEAR).save(buffer, "PNG", optimize=True)
    write_whole(place, buffer.getvalue())
    return place


@page
def mask(request: Request) -> Response:
    """The mask of an image."""
    studio = studio_of(request)
    folder = inside(studio.store, request.query_params.get(FOLDER, ""))
    entry = studio.sets.of(folder).entries.get(request.query_params.get("name", ""))
    if entry is None or entry.mask is None:
        return problem("there is no such mask", HTTPStatus.NOT_FOUND)
    path = inside(studio.store, entry.mask)
    shown = decode_with_mask(read_file(path), path.name, BLACK)[0].convert("L")
    shown.thumbnail((SHOWN, SHOWN))
    buffer = io.BytesIO()
    shown.save(buffer, "PNG")
    return Response(buffer.getvalue(), media_type="image/png")


@action
def draw(request: Request, form: dict[str, str]) -> Response:
    """Write the mask that was drawn on an image."""
    studio = studio_of(request)
    folder = inside(studio.store, form.get(FOLDER, ""))
    text = form.get("mask", "")
    try:
        drawn = base64.b64decode(text.removeprefix(PREFIX), validate=True)
    except binascii.Error:
        drawn = b""
    if not drawn or not text.startswith(PREFIX):
        raise UsageError("a mask comes as a PNG")
    place = studio.sets.change_mask(
        folder, form.get("name", ""), lambda entry: write_mask(entry, drawn)
    )
    if place is None:
        return render(request, "said.html.j2", text="all of it is trained")
    used = studio.store.kept(DRAFT, {}).get("mask_files") == ON
    text = "mask saved" if used else "mask saved, not used yet: see above"
    return render(request, "said.html.j2", text=text)


@action
def use(request: Request, form: dict[str, str]) -> Response:
    """Train with masks, or without: the option `mask_files` of the draft."""
    studio = studio_of(request)
    draft = dict(studio.store.kept(DRAFT, {}))
    draft.pop("mask_files", None)
    studio.store.keep(DRAFT, draft | ({"mask_files": ON} if form.get("use") else {}))
    folder = inside(studio.store, form.get(FOLDER, ""))
    return see(f"/images?folder={quote(str(folder))}")


ROUTES = [
    Route("/images/mask", mask),
    Route("/images/mask", draw, methods=["POST"]),
    Route("/images/masks", use, methods=["POST"]),
]
