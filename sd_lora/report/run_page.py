"""`report.html`: a run on one page, or several side by side, that asks nothing of other places.

It is made from the output folder alone: `report.json`, `training_log.jsonl`, `config.json` and the
images below `samples`. Curves are drawn by uPlot 1.6 (MIT), which stands in the page.
"""

import base64
import io
import json
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from PIL import Image

from sd_lora.data.check.page import printable
from sd_lora.errors import RunError
from sd_lora.files import write_whole
from sd_lora.report.events import (
    CheckpointSaved,
    Event,
    LoraSaved,
    RunEnded,
    SamplesDrawn,
    StepsLogged,
    TrainingStarted,
)
from sd_lora.report.log_file import LogFile
from sd_lora.report.record import Record, read_record
from sd_lora.report.summary import duration

PAGE, SAMPLES = "report.html", "samples"
HERE = Path(__file__).parent

MOST_POINTS = 2000
"""Points of a curve: a longer log is averaged over as many steps as needed."""

MOST_BYTES = 9_000_000
"""Bytes of all images of a page; beyond, they are made smaller."""

REWRITE_EVERY = 30.0
"""Seconds between two writes of the page while a run goes on."""


class RunPage:
    """Keeps a run's page, as a listener: after samples and checkpoints, else at most each 30 s."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.record = folder, Record(folder)
        self._written = -REWRITE_EVERY

    def __call__(self, event: Event) -> None:
        """Take an event, and write the page where it is due; warns of a failed write."""
        self.record(event)
        now = time.monotonic()
        if isinstance(event, StepsLogged) and now - self._written < REWRITE_EVERY:
            return
        seen = StepsLogged | TrainingStarted | SamplesDrawn | CheckpointSaved | LoraSaved | RunEnded
        if isinstance(event, seen):
            self._written = now
            try:
                self.record.write()
                write_page([self.folder], self.folder / PAGE)
            except RunError as error:  # a run does not end for want of its page
                warnings.warn(str(error), stacklevel=2)


@dataclass(frozen=True)
class Drawn:
    """Sample images of a run. prompts: one a column. steps: of the rows. images: step → files."""

    prompts: list[str]
    images: dict[int, list[Path]]

    @property
    def steps(self) -> list[int]:
        return sorted(self.images)


def samples_of(folder: Path) -> Drawn:
    """The single images `samples/step-000100/00.png`, in their order, and their prompts."""
    images: dict[int, list[Path]] = {}
    for place in sorted((folder / SAMPLES).glob("step-*")):
        number = place.name.removeprefix("step-")
        if place.is_dir() and number.isdecimal():
            files = sorted(place.glob("*.png"))
            images |= {int(number): files} if files else {}
    prompts: list[str] = []
    for path in images[max(images)] if images else []:
        with Image.open(path) as image:
            prompts.append(str(image.info.get("parameters", "")).partition("\nNegative")[0])
    return Drawn(prompts, images)


def curves_of(rows: Sequence[Mapping[str, float]]) -> dict[str, list[float | None]]:
    """Name → numbers of a log, "step" first, and "loss, smoothed": an exponential mean of 20 steps.

    A log of more than `MOST_POINTS` rows is averaged over neighbours.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    curves: dict[str, list[float | None]] = {
        name: [row.get(name) for row in rows] for name in names
    }
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


def data_uri(path: Path, side: int) -> str:
    """An image as WebP in a data URI, at most `side` pixels; a small one without loss."""
    return _encoded(path, path.stat().st_mtime_ns, side)


@lru_cache(maxsize=1024)
def _encoded(path: Path, written: int, side: int) -> str:
    with Image.open(path) as image:
        small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=88, method=4, lossless=max(small.size) <= 128)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _pictures(drawn: Sequence[Drawn]) -> list[dict[int, list[str]]]:
    """Step → images as data URIs, of each run, small enough for `MOST_BYTES` together."""
    for side in (512, 384, 256, 160, 96):
        found = [
            {step: [data_uri(path, side) for path in files] for step, files in d.images.items()}
            for d in drawn
        ]
        if sum(len(u) for run in found for uris in run.values() for u in uris) <= MOST_BYTES:
            break
    return found


def differing_options(folders: Sequence[Path]) -> dict[str, list[str]]:
    """Option → its value in each run, of those that differ."""
    configs = []
    for folder in folders:
        path = folder / "config.json"
        configs.append(json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {})
    names = sorted({name for config in configs for name in config} - {"output_dir"})
    values = {name: [json.dumps(c.get(name)).strip('"') for c in configs] for name in names}
    return {name: row for name, row in values.items() if len(set(row)) > 1}


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,  # prompts, names and captions are not ours
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["printable"] = printable
    environment.filters["duration"] = duration
    return environment.get_template("run_page.html.j2")


def page_of(folders: Sequence[Path]) -> str:
    """The page of a run, or of several.

    Raises:
        UsageError: a folder that is none of a run.
    """
    records = [read_record(folder) for folder in folders]
    names = [folder.resolve().name for folder in folders]
    drawn = [samples_of(folder) for folder in folders]
    logs = [LogFile(folder / "training_log.jsonl").rows() for folder in folders]
    runs: list[dict[str, Any]] = []
    for number, record in enumerate(records):
        curves = curves_of(logs[number])
        runs.append(
            {
                "name": names[number],
                "record": {"rows": {}, "notes": [], "findings": [], "changes": {}, "usage": []}
                | {"files": [], "num_steps": 0, "step": 0, "replayed": None}
                | record,
                "curves": curves,
                "rate": _rate(record, len(logs[number])),
                "prompts": drawn[number].prompts,
                "steps": drawn[number].steps,
            }
        )
    pictures = _pictures(drawn)
    data = [
        {"name": run["name"], "curves": run["curves"], "steps": run["steps"], "images": found}
        for run, found in zip(runs, pictures, strict=True)
    ]
    script = (HERE / "uplot" / "uPlot.iife.min.js").read_text(encoding="utf-8")
    return _template().render(
        runs=runs,
        pictures=pictures,
        differing=differing_options(folders) if len(folders) > 1 else {},
        data=_for_script(data),
        uplot=script,
        uplot_css=(HERE / "uplot" / "uPlot.min.css").read_text("utf-8"),
    )


def _for_script(data: object) -> str:
    """JSON that may stand in a script element."""
    return json.dumps(data, ensure_ascii=False).replace("<", "\\u003c").replace("\u2028", "\\u2028")


def _rate(record: Mapping[str, Any], rows: int) -> str:
    """Steps a second over the whole run, in words."""
    seconds = float(record.get("seconds") or 0)
    return f"{rows / seconds:.3g} steps/s" if seconds and rows else ""


def write_page(folders: Sequence[Path], path: Path) -> None:
    """Write the page, whole or not at all; raises RunError on a failed write."""
    write_whole(path, page_of(folders).encode())
