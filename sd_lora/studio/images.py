"""The page of images: crops by bucket, findings and captions of a folder."""

import hashlib
import io
import json
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any

from PIL import Image
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from sd_lora.data.images.decode import decode_with_mask, read_file
from sd_lora.data.images.hand_crops import LEAST_PART, MIDDLE, HandCrop, frame_of
from sd_lora.data.sources.crop_files import is_crop
from sd_lora.data.sources.samples import printable_path
from sd_lora.errors import RunError, UsageError
from sd_lora.files import write_whole
from sd_lora.studio.form import FOLDER, ON, request_of
from sd_lora.studio.image_set import BULK, Entry, ImageSet, edited
from sd_lora.studio.keeper import last_lines
from sd_lora.studio.new import DRAFT
from sd_lora.studio.opened import inside, open_folder
from sd_lora.studio.page import Studio, action, gone, page, problem, render, studio_of
from sd_lora.studio.repeats import parts_of
from sd_lora.studio.store import Job

BLOCK = 60
"""Images of a part of the page: it is asked for when it comes near the window."""

SIDE = 320
"""Longest side of a thumbnail in pixels."""

LARGE = 1024
"""Longest side of an image that a mask is drawn on."""

MOST_TAGS = 60

ALIKE = ("duplicate", "near-duplicate", "in-both-sets")
"""Codes of findings on images that repeat another one."""


@page
def show(request: Request) -> Response:
    """The images of a folder, or the choice of one."""
    studio = studio_of(request)
    draft = dict(studio.store.kept(DRAFT, {}))
    asked = request.query_params.get(FOLDER, "")
    if request.query_params.get("from") == "draft" and draft.get(FOLDER):
        asked = str(open_folder(studio.store, draft[FOLDER]))
    if not asked:
        return render(request, "images_none.html.j2", opened=studio.store.opened())
    folder = inside(studio.store, asked)
    found = studio.sets.of(folder, anew=True)
    check = _check_of(studio, folder)
    entries = _wanted(request, found, _facts(studio, check))
    return render(
        request, "images.html.j2", folder=folder, found=found, entries=entries, block=BLOCK,
        tags=found.tags(MOST_TAGS), bulk={name: words for name, (words, _) in BULK.items()},
        blocks=range(0, len(entries), BLOCK), query=_query(request), check=check,
        report=_report(studio, check), undo=bool(studio.store.kept(f"undo {folder}", {})),
        captioner=studio.store.kept("captioner", ""), parts=parts_of(found),
        masks=sum(e.mask is not None for e in found.entries.values()),
        uses_masks=draft.get("mask_files") == ON or bool(draft.get("mask_folder")),
    )  # fmt: skip


def _query(request: Request) -> dict[str, str]:
    return {n: request.query_params.get(n, "") for n in ("words", "bucket", "only")}


def _wanted(request: Request, found: ImageSet, facts: Mapping[str, Any]) -> list[Entry]:
    """The images that a page's filters leave."""
    query = _query(request)
    words = query["words"].lower()
    entries = [e for e in found.entries.values() if words in f"{e.name}\n{e.caption}".lower()]
    if query["bucket"]:
        entries = [e for e in entries if _bucket(facts.get(_key(e))) == query["bucket"]]
    only = {
        "findings": lambda e: bool(facts.get(_key(e), {}).get("findings")),
        "uncaptioned": lambda e: not e.caption,
        "alike": lambda e: bool(facts.get(_key(e), {}).get("alike")),
    }.get(query["only"])
    entries = list(filter(only, entries))
    if query["only"] == "alike":  # side by side
        entries.sort(key=lambda e: (facts[_key(e)]["alike"], e.name))
    return entries


def _key(entry: Entry) -> str:
    return printable_path(entry.path)


def _bucket(facts: Mapping[str, Any] | None) -> str:
    return "×".join(map(str, facts["bucket"])) if facts and facts.get("bucket") else ""


@page
def block(request: Request) -> Response:
    """Some of the images, from a number on."""
    studio = studio_of(request)
    folder = inside(studio.store, request.query_params.get(FOLDER, ""))
    found = studio.sets.of(folder)
    facts = _facts(studio, _check_of(studio, folder))
    number = request.query_params.get("first", "")
    first = int(number) if number.isdecimal() else 0
    entries = _wanted(request, found, facts)[first : first + BLOCK]
    cards = [(entry, _cropped(entry, facts.get(_key(entry), {}))) for entry in entries]
    return render(request, "image_block.html.j2", folder=folder, cards=cards, bucket_of=_bucket)


def _cropped(entry: Entry, facts: Mapping[str, Any]) -> Mapping[str, Any]:
    """The facts of an image, with its crop as it is now, by hand or not. frame: left, top, width
    and height of its crop in pixels of the image; by_hand: whether somebody chose it; part: of
    the largest crop; enlarged: how many times."""
    if facts.get("crop") is None:
        return facts
    chosen = entry.hand_crop or MIDDLE
    frame = frame_of(chosen, facts["size"], facts["bucket"])
    by_hand = entry.hand_crop is not None
    random = facts["random_crop"] and not by_hand
    own = {
        "frame": [round(side, 2) for side in frame],
        "by_hand": by_hand,
        "part": chosen.part,
        "random_crop": random,
    }
    return {**facts, **own, "enlarged": facts["bucket"][0] / frame[2]}


@action
def crop(request: Request, form: dict[str, str]) -> Response:
    """Write the crop of an image; without numbers it is cropped as the run says."""
    studio = studio_of(request)
    folder = inside(studio.store, form.get(FOLDER, ""))
    chosen = None
    if form.keys() & {"x", "y", "part"}:
        texts = form.get("x", ""), form.get("y", ""), form.get("part", "1")
        try:
            numbers = [round(float(text), 5) for text in texts]
        except ValueError:
            raise UsageError("a crop by hand is two numbers, or three") from None
        if not is_crop(numbers):
            raise UsageError(
                f"a crop's middle lies in the image, from 0 to 1, and its size is {LEAST_PART} to "
                f"1 of the largest, but not in {numbers}"
            )
        chosen = HandCrop(*numbers)
    studio.sets.crop(folder, form.get("name", ""), chosen)
    return render(request, "said.html.j2", text="crop saved" if chosen else "cropped as before")


@page
def thumbnail(request: Request) -> Response:
    """A small form of an image, made when it is first asked for."""
    studio = studio_of(request)
    folder = inside(studio.store, request.query_params.get(FOLDER, ""))
    entry = studio.sets.of(folder).entries.get(request.query_params.get("name", ""))
    if entry is None:
        return problem("there is no such image", HTTPStatus.NOT_FOUND)
    path = inside(studio.store, entry.path)
    side = LARGE if "large" in request.query_params else SIDE
    about = f"{path} {path.stat().st_mtime_ns} {path.stat().st_size} {side}"
    place = studio.store.folder / "thumbnails" / hashlib.sha256(about.encode()).hexdigest()[:32]
    if not place.is_file():
        place.parent.mkdir(exist_ok=True)
        write_whole(place, small(path, side))
    kept = {"cache-control": "private, max-age=86400"}
    return FileResponse(place, media_type="image/webp", headers=kept)


def small(path: Path, side: int) -> bytes:
    """An upright image of at most `side` pixels as WebP; grey for one that cannot be decoded."""
    try:
        image, _ = decode_with_mask(read_file(path), path.name)
    except (RunError, OSError):
        image = Image.new("RGB", (8, 8), "#888888")
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80)
    return buffer.getvalue()


@action
def caption(request: Request, form: dict[str, str]) -> Response:
    """Write the caption of an image."""
    studio = studio_of(request)
    folder = inside(studio.store, form.get(FOLDER, ""))
    name, text = form.get("name", ""), form.get("caption", "")
    studio.sets.write(folder, {name: text.replace("\r\n", "\n").strip()})
    return render(request, "said.html.j2", text="saved")


@action
def many(request: Request, form: dict[str, str]) -> Response:
    """Edit the captions of all images that the filters leave."""
    studio = studio_of(request)
    folder = inside(studio.store, form.get(FOLDER, ""))
    facts = _facts(studio, _check_of(studio, folder))
    entries = _wanted(request, studio.sets.of(folder), facts)
    find, text = form.get("find", ""), form.get("text", "")
    new = edited(form.get("edit", ""), entries, find, text)
    if new:
        studio.store.keep(f"undo {folder}", studio.sets.write(folder, new))
    return gone(request, str(request.url).replace("/images/many", "/images"))


@action
def propose(request: Request, form: dict[str, str]) -> Response:
    """Start the command that captions the images by a model."""
    studio = studio_of(request)
    folder = inside(studio.store, form.get(FOLDER, ""))
    model = form.get("captioner", "").strip()
    if not Path(model).expanduser().is_dir() or not model:
        raise UsageError(f"name the folder of an image-to-text model, not {model!r}")
    studio.store.keep("captioner", model)
    words = [str(folder), f"--captioner={model}"]
    if prompt := form.get("prompt", "").strip():
        words.append(f"--prompt={prompt}")
    words += ["--overwrite"] if "overwrite" in form else []
    number = studio.store.add("caption", f"caption {folder.name}", words, folder=str(folder))
    studio.keeper.look()
    return gone(request, f"/shelf/{number}")


@action
def undo(request: Request, form: dict[str, str]) -> Response:
    """Take the last edit of many captions back."""
    studio = studio_of(request)
    folder = inside(studio.store, form.get(FOLDER, ""))
    before = studio.sets.write(folder, studio.store.kept(f"undo {folder}", {}))
    studio.store.keep(f"undo {folder}", before)
    return gone(request, str(request.url).replace("/images/undo", "/images"))


@action
def check(request: Request, form: dict[str, str]) -> Response:
    """Check the folder with the options of the draft: crops, buckets, findings."""
    studio = studio_of(request)
    folder = inside(studio.store, form.get(FOLDER, ""))
    draft = dict(studio.store.kept(DRAFT, {})) | {FOLDER: str(folder), "sources": ""}
    asked = request_of(draft, studio.store.folder)
    words = [str(folder)] if asked.unchecked else asked.words
    number = studio.store.add("check", "images", [*words, "--json"], folder=str(folder))
    studio.keeper.look()
    return render(request, "image_check.html.j2", check=studio.store.job(number), folder=folder)


@page
def check_of(request: Request) -> Response:
    """Whether a check has ended: then the page is loaded anew."""
    job = studio_of(request).store.job(request.path_params["number"])
    if job is None:
        return problem("there is no such check")
    if job.is_over:
        return Response(headers={"hx-refresh": "true"})
    return render(request, "image_check.html.j2", check=job, folder=job.folder)


def _check_of(studio: Studio, folder: Path) -> Job | None:
    """The newest check of a folder."""
    jobs = studio.store.jobs("kind = 'check' AND title = 'images' AND folder = ?", str(folder))
    over = [job for job in jobs if job.is_over]
    found = over or jobs
    return found[-1] if found else None


def _report(studio: Studio, check: Job | None) -> dict[str, Any]:
    """The output of a check; empty without one, and of a failed one its error."""
    if check is None or not check.is_over:
        return {}
    log = studio.keeper.log_of(check)
    key = (check.id, log.stat().st_mtime_ns if log.is_file() else 0)
    if studio.reports.get("key") != key:
        studio.reports.clear()
        studio.reports |= {"key": key, "report": _parsed(log)}
    found: dict[str, Any] = studio.reports["report"]
    return found


def _parsed(log: Path) -> dict[str, Any]:
    lines = last_lines(log)
    begins = [number for number, line in enumerate(lines) if line == "{"]
    if begins:
        try:
            found = json.loads("\n".join(lines[begins[-1] :]))
            return found if isinstance(found, dict) else {}
        except ValueError:
            pass
    return {"error": "\n".join(lines[-12:])}


def _facts(studio: Studio, check: Job | None) -> dict[str, dict[str, Any]]:
    """Path of an image → the facts of a check: size, bucket, crop, findings."""
    report = _report(studio, check)
    if "facts" not in studio.reports or not report:
        facts: dict[str, dict[str, Any]] = {}
        for row in report.get("images", []):
            facts.setdefault(row["name"], {}).update(row)
        for finding in report.get("findings", []):
            of_image = facts.setdefault(finding["name"], {})
            of_image.setdefault("findings", []).append(finding)
            if finding["code"] in ALIKE and finding.get("other"):
                of_image["alike"] = finding["other"]
                facts.setdefault(finding["other"], {})["alike"] = finding["other"]
        if not report:
            return facts
        studio.reports["facts"] = facts
    found: dict[str, dict[str, Any]] = studio.reports["facts"]
    return found


ROUTES = [
    Route("/images", show),
    Route("/images/block", block),
    Route("/images/thumbnail", thumbnail),
    Route("/images/caption", caption, methods=["POST"]),
    Route("/images/crop", crop, methods=["POST"]),
    Route("/images/many", many, methods=["POST"]),
    Route("/images/propose", propose, methods=["POST"]),
    Route("/images/undo", undo, methods=["POST"]),
    Route("/images/check", check, methods=["POST"]),
    Route("/images/check/{number:int}", check_of),
]
