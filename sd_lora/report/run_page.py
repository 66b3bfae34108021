"""`report.html`: a run on one page, or several side by side, that asks nothing of other places.

It is made from the output folder alone: `report.json`, `training_log.jsonl`, `config.json` and the
images below `samples`. Curves are drawn by uPlot 1.6 (MIT), which stands in the page.
"""

import json
import math
import os
import re
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sd_lora.config.schema import TrainConfig
from sd_lora.data.check.page import template_at
from sd_lora.errors import RunError, UsageError
from sd_lora.files import size_text, write_whole
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
from sd_lora.report.measured import (
    LINE,
    MEANINGS,
    by_step,
    by_timestep,
    images_of,
    scores_by_step,
    window_of,
)
from sd_lora.report.page_images import (
    SHEET_BYTES,
    SHEET_SIDES,
    fitting,
    samples_of,
    sheets_of,
    uris,
)
from sd_lora.report.proposals import place_of, proposals_of, strengths_line
from sd_lora.report.record import Record, read_json, read_record, texts_in
from sd_lora.report.summary import duration, shares_of
from sd_lora.report.verdict import verdict_of

PAGE, SEVERAL = "report.html", "runs.html"
HERE = Path(__file__).parent

MOST_POINTS = 2000
"""Points of a curve: a longer log is averaged over as many steps as needed."""

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
    if not every:
        return {}
    curves = {name: _thinned(values, every) for name, values in curves.items()}
    steps = curves.get("step", [])
    rounded = [None if step is None else round(step) for step in steps]
    return curves | ({"step": [*rounded]} if steps else {})


def _thinned(values: list[float | None], every: int) -> list[float | None]:
    """Means of `every` neighbours, to six digits, or as many as it has before the point."""
    parts = (values[i : i + every] for i in range(0, len(values), every))
    known = ([v for v in part if v is not None] for part in parts)
    means = [sum(part) / len(part) if part else None for part in known]
    return [None if m is None else float(f"{m:.6g}") if abs(m) < 1e6 else m for m in means]


def _finite(value: object) -> float | None:
    """A number of a log; None for one that no chart can show."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None


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
    drawn, side = fitting(found)
    scored = [sheets_of(f, r["step"]) for f, r in zip(folders, records, strict=True)]
    sheets, sheet_side = fitting(scored, SHEET_SIDES, SHEET_BYTES)
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
            "verdict": verdict_of({**record, "folder": place_of(folders[number])}),
            "images": images[number],
            "window": window_of(record["image_set"]),
            "proposals": proposals_of(folder, images[number], record["alike"]),
            "by_timestep": by_timestep(record["validation"]),
            "rate": _rate(record, len(logs[number])),
            "unet": unet_of(record["changes"]),
            "drawn": {
                title: {
                    "prompts": d.prompts,
                    "steps": d.steps,
                    "images": uris(d.images, pixels),
                    "strengths": uris(d.strengths, pixels),
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
        line=LINE,
        meanings=MEANINGS,
        runs=runs,
        differing=differing_options(folders) if len(folders) > 1 else {},
        data=_for_script(data),
        uplot=script,
        uplot_css=(HERE / "uplot" / "uPlot.min.css").read_text("utf-8"),
    )


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
    """Steps a second over the whole run, and memory and time, by kinds of work, of the process that
    ended it, in words."""
    seconds = record["seconds"]
    rate = [f"{rows / seconds:.3g} steps/s"] if seconds and rows else []
    if peak := record["peak_bytes"]:
        rate.append(f"at most {size_text(peak)} of memory")
    spent = {kind: s for kind, s in record["spent"].items() if isinstance(s, int | float)}
    return "; ".join([*rate, *filter(None, [shares_of(spent, record["process_seconds"])])])


def write_page(folders: Sequence[Path], path: Path) -> None:
    """Write the page, whole or not at all; raises RunError on a failed write."""
    write_whole(path, page_of(folders).encode())
