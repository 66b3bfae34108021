"""`report.html`: a run on one page, or several side by side, that asks nothing of other places.

It is made from the output folder alone: `report.json`, `training_log.jsonl`, `config.json` and the
images below `samples`. Curves are drawn by uPlot 1.6 (MIT), which stands in the page.
"""

import base64
import io
import json
import math
import os
import re
import shlex
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from PIL import Image

from sd_lora.config.schema import TrainConfig
from sd_lora.data.check.page import template_at
from sd_lora.errors import RunError, UsageError
from sd_lora.files import write_whole
from sd_lora.folders import RUN_LOG
from sd_lora.report.events import (
    CheckpointSaved,
    Event,
    ImagesScored,
    LoraSaved,
    RunEnded,
    SamplesDrawn,
    StepsLogged,
    TrainingStarted,
)
from sd_lora.report.log_file import LogFile
from sd_lora.report.measured import by_step, by_timestep, images_of, scores_by_step
from sd_lora.report.proposals import strengths_line
from sd_lora.report.record import Record, read_json, read_record, texts_in
from sd_lora.report.summary import duration, shares_of
from sd_lora.report.verdict import verdict_of

PAGE, SEVERAL, SAMPLES = "report.html", "runs.html", "samples"
OF_STRENGTH = "strength-"
"""Start of the name of a folder of samples at another strength, within those of their step."""
HERE = Path(__file__).parent

K = TypeVar("K", int, float)

MOST_POINTS = 2000
"""Points of a curve: a longer log is averaged over as many steps as needed."""

MOST_BYTES, SHEET_BYTES = 5_500_000, 1_500_000
"""Bytes of all samples of a page, and of all sheets of scored images; beyond, they are made
smaller, and then fewer. Pictures of 200 images, curves and their tables take less than 2 MB."""

SIDES, SHEET_SIDES = (512, 384, 256, 160, 96), (1400, 1000, 700)
"""Longest sides of a sample and of a sheet on the page, the first that fits."""

TRIED = 12
"""Images by whose bytes the others' are judged."""

REWRITE_EVERY = 30.0
"""Seconds between two writes of the page while a run goes on."""


class RunPage:
    """Keeps a run's page, as a listener: after samples and checkpoints, else at most each 30 s."""

    def __init__(self, config: TrainConfig) -> None:
        self.folder, self.record = config.output_path, Record(config)
        self._written = -REWRITE_EVERY

    def __call__(self, event: Event) -> None:
        """Take an event, and write the page where it is due; warns of a page that cannot be."""
        try:
            self.record(event)
            if self._is_due(event):
                self.record.write()
                write_page([self.folder], self.folder / PAGE)
                self._written = time.monotonic()
        except (RunError, UsageError, OSError, ValueError) as error:
            # a run does not end for want of its page
            warnings.warn(f"{self.folder / PAGE} is not written: {error}", stacklevel=2)

    def _is_due(self, event: Event) -> bool:
        if isinstance(event, StepsLogged):
            return time.monotonic() - self._written >= REWRITE_EVERY
        return isinstance(
            event,
            TrainingStarted | SamplesDrawn | ImagesScored | CheckpointSaved | LoraSaved | RunEnded,
        )


@dataclass(frozen=True)
class Drawn:
    """Sample images of a run. prompts: one a column. steps: of the rows. images: step → files.
    strengths: strength → files, of the last step. parameters: of its first image."""

    prompts: list[str]
    images: dict[int, list[Path]]
    strengths: dict[float, list[Path]] = field(default_factory=dict)
    parameters: str = ""

    @property
    def steps(self) -> list[int]:
        return sorted(self.images)


def samples_of(folder: Path, last: int) -> Drawn:
    """The single images `samples/step-000100/00.png`, in their order, and their prompts; of the
    last step those at other strengths, too, `samples/step-000100/strength-0.5/00.png`.

    last: number of steps done; later images are of an earlier run.
    """
    images: dict[int, list[Path]] = {}
    for place in sorted((folder / SAMPLES).glob("step-*")):
        number = place.name.removeprefix("step-")
        if place.is_dir() and number.isdecimal() and int(number) <= last:
            files = sorted(place.glob("*.png"))
            images |= {int(number): files} if files else {}
    if not images:
        return Drawn([], {})
    texts = []
    for path in images[max(images)]:
        text = ""
        with suppress(OSError), Image.open(path) as image:
            text = str(image.info.get("parameters", ""))
        texts.append(text)
    prompts = [text.partition("\nNegative")[0] for text in texts]
    strengths: dict[float, list[Path]] = {}
    for place in images[max(images)][0].parent.glob(f"{OF_STRENGTH}*"):
        number, files = place.name.removeprefix(OF_STRENGTH), sorted(place.glob("*.png"))
        if _STRENGTH.fullmatch(number) and len(files) == len(texts):
            strengths[float(number)] = files
    return Drawn(prompts, images, dict(sorted(strengths.items())), texts[0])


_STRENGTH = re.compile(r"\d{1,3}(\.\d{1,6})?")


def curves_of(rows: Sequence[Mapping[str, float]]) -> dict[str, list[float | None]]:
    """Name → numbers of a log, "step" first, and "loss, smoothed": an exponential mean of 20 steps.

    A log of more than `MOST_POINTS` rows is averaged over neighbours.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    curves = {name: [_finite(row.get(name)) for row in rows] for name in names}
    total, weight, smooth = 0.0, 0.0, []
    for value in curves.get("loss", []):
        if value is not None:
            total, weight = 0.95 * total + 0.05 * value, 0.95 * weight + 0.05
        smooth.append(total / weight if weight else None)
    if smooth:
        curves["loss, smoothed"] = smooth
    every = -(-len(rows) // MOST_POINTS)
    return {name: _thinned(values, every) for name, values in curves.items()} if every else {}


def _thinned(values: list[float | None], every: int) -> list[float | None]:
    """Means of `every` neighbours, to six digits."""
    parts = (values[i : i + every] for i in range(0, len(values), every))
    known = ([v for v in part if v is not None] for part in parts)
    return [float(f"{sum(part) / len(part):.6g}") if part else None for part in known]


def _finite(value: object) -> float | None:
    """A number of a log; None for one that no chart can show."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def data_uri(path: Path, side: int) -> str:
    """An image as WebP in a data URI, at most `side` pixels; one of at most 128 without loss; grey
    for one that cannot be read."""
    try:
        return _encoded(path, path.stat().st_mtime_ns, side)
    except OSError:
        return _uri(Image.new("RGB", (8, 8), "#888888"))


@lru_cache(maxsize=4096)
def _encoded(path: Path, written: int, side: int) -> str:
    with Image.open(path) as image:
        size, small = image.size, image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    return _uri(small, lossless=max(size) <= 128)


def _uri(image: Image.Image, lossless: bool = False) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=88, method=4, lossless=lossless)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _fitting(
    drawn: Sequence[Drawn], sides: Sequence[int] = SIDES, most: int = MOST_BYTES
) -> tuple[list[Drawn], int]:
    """The images that a page holds of all runs, and their side: smaller ones if there are many, and
    of still more every second, third, … step, always with the first and the last, and none at other
    strengths. Their bytes are those of TRIED of them."""
    rows = [row for d in drawn for row in (*d.images.values(), *d.strengths.values())]
    files = [path for row in rows for path in row]
    some = files[:: max(1, -(-len(files) // TRIED))]
    for side in sides:
        total = len(files) * fmean([len(data_uri(path, side)) for path in some] or [0])
        if total <= most:
            break
    every = math.ceil(total / most)
    if every <= 1:
        return [*drawn], side
    return [
        replace(
            d, images={s: d.images[s] for s in {*d.steps[::every], *d.steps[-1:]}}, strengths={}
        )
        for d in drawn
    ], side


def sheets_of(folder: Path, last: int) -> Drawn:
    """The sheets of scored images, `samples/score-000100.png`. last: number of steps done."""
    found = {}
    for path in sorted((folder / SAMPLES).glob("score-*.png")):
        number = path.stem.removeprefix("score-")
        if number.isdecimal() and int(number) <= last:
            found[int(number)] = [path]
    words = "images that are scored, of the first seeds, below those of the folder and the base's"
    return Drawn([words] if found else [], found)


def differing_options(folders: Sequence[Path]) -> dict[str, list[str]]:
    """Option → its value in each run, of those that differ; of absolute paths the last name.

    Raises:
        UsageError: a config.json that cannot be read.
    """
    paths = [folder / "config.json" for folder in folders]
    configs = [read_json(path) if path.is_file() else {} for path in paths]
    names = sorted({name for config in configs for name in config})
    values = {name: [_value(config.get(name)) for config in configs] for name in names}
    return {name: row for name, row in values.items() if len(set(row)) > 1}


def _value(value: Any) -> str:
    """An option's value on the page."""
    text = json.dumps(value, ensure_ascii=False).strip('"')
    for path in filter(os.path.isabs, texts_in(value)):
        text = text.replace(path, Path(path).name)
    return text


def page_of(folders: Sequence[Path]) -> str:
    """The page of a run, or of several.

    Raises:
        UsageError: a folder that is none of a run.
    """
    records = [read_record(folder) for folder in folders]
    names = _names(folders)
    found = [samples_of(f, r["step"]) for f, r in zip(folders, records, strict=True)]
    drawn, side = _fitting(found)
    scored = [sheets_of(f, r["step"]) for f, r in zip(folders, records, strict=True)]
    sheets, sheet_side = _fitting(scored, SHEET_SIDES, SHEET_BYTES)
    images = [images_of(record["ledger"], pictures=len(folders) == 1) for record in records]
    logs = [LogFile(folder / RUN_LOG).rows() for folder in folders]
    runs = [
        {
            "number": number,
            "name": names[number],
            "record": record,
            "curves": curves_of(logs[number]),
            "measured": by_step(record["validation"]),
            "scored": scores_by_step(record["scores"]),
            "verdict": verdict_of(record),
            "images": images[number],
            "compare": _compare(folders[number], images[number]),
            "by_timestep": by_timestep(record["validation"]),
            "rate": _rate(record, len(logs[number])),
            "unet": unet_of(record["changes"]),
            "drawn": {
                title: {
                    "prompts": d.prompts,
                    "steps": d.steps,
                    "images": _uris(d.images, pixels),
                    "strengths": _uris(d.strengths, pixels),
                    "line": "" if d.strengths else strengths_line(folder, record, d.parameters),
                }
                for title, d, pixels in (
                    ("Samples", drawn[number], side),
                    ("Scored images", sheets[number], sheet_side),
                )
                if d.steps
            },
        }
        for number, (folder, record) in enumerate(zip(folders, records, strict=True))
    ]
    shown = ("name", "curves", "measured", "scored", "by_timestep", "drawn")
    data = [{name: run[name] for name in shown} for run in runs]
    script = (HERE / "uplot" / "uPlot.iife.min.js").read_text(encoding="utf-8")
    return template_at(HERE / "run_page.html.j2").render(
        duration=duration,
        runs=runs,
        differing=differing_options(folders) if len(folders) > 1 else {},
        data=_for_script(data),
        uplot=script,
        uplot_css=(HERE / "uplot" / "uPlot.min.css").read_text("utf-8"),
    )


def _uris(rows: Mapping[K, Sequence[Path]], side: int) -> dict[K, list[str]]:
    """Step or strength → images in data URIs, in ascending order."""
    return {key: [data_uri(path, side) for path in rows[key]] for key in sorted(rows)}


def unet_of(changes: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The UNet's parts as boxes of a drawing: name, change, and place, from (0, 0) at the top left:
    down to the middle and up again. Nothing where its parts are not known."""
    found = changes.get("unet")
    if not isinstance(found, Mapping):
        return []
    named = {m[0]: (m[1], int(m[2] or 0)) for name in found if (m := _BLOCK.fullmatch(str(name)))}
    depth = 1 + max((number for _, number in named.values()), default=0)
    places = {
        name: {"down": (i, i), "mid": (depth, depth), "up": (depth + 1 + i, depth - 1 - i)}[side]
        for name, (side, i) in named.items()
    }
    most = max((found[name] for name in places), default=0) or 1
    return [
        {"name": name, "change": found[name], "share": found[name] / most, "x": x, "y": y}
        for name, (x, y) in places.items()
    ]


_BLOCK = re.compile(r"(down|mid|up)_blocks?(?:\.(\d{1,2}))?")


def _compare(folder: Path, images: Sequence[Mapping[str, Any]]) -> str:
    """The command that tries a run without the first image that its ledger names; "" for none."""
    named = [str(image["file"]) for image in images if image["finding"]]
    words = ["sd-lora", "compare", folder.resolve().name, "--leave_out", *named[:1]]
    return shlex.join(words) if named else ""


def _names(folders: Sequence[Path]) -> list[str]:
    """Names of runs, with their parents' where two are alike."""
    paths = [folder.resolve() for folder in folders]
    names = [path.name for path in paths]
    return [
        n if names.count(n) == 1 else f"{p.parent.name}/{n}"
        for n, p in zip(names, paths, strict=True)
    ]


def _for_script(data: object) -> str:
    """JSON that may stand in a script element."""
    return json.dumps(data, ensure_ascii=False).replace("<", "\\u003c").replace("\u2028", "\\u2028")


def _rate(record: Mapping[str, Any], rows: int) -> str:
    """Steps a second over the whole run, and the time of the process that ended it by kinds of
    work, in words."""
    seconds = record["seconds"]
    rate = [f"{rows / seconds:.3g} steps/s"] if seconds and rows else []
    spent = {kind: s for kind, s in record["spent"].items() if isinstance(s, int | float)}
    return "; ".join([*rate, *filter(None, [shares_of(spent, record["process_seconds"])])])


def write_page(folders: Sequence[Path], path: Path) -> None:
    """Write the page, whole or not at all; raises RunError on a failed write."""
    write_whole(path, page_of(folders).encode())
