"""The curves of a run's validation and scores on its page, and the table of its images."""

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from typing import Any

FIGHTS, BY_HEART = "learned more slowly than the rest", "learned faster than the rest"
"""Findings of the ledger on an image."""

Curves = dict[str, list[float | None]]
"""Name → numbers, the horizontal axis first."""

NAMES = {"trained": "trained images", "held out": "images held out"}
"""Group of images → its words."""


def by_step(record: Mapping[str, Any]) -> Curves:
    """The validation loss of each group by step, and the base model's line.

    record: "validation" of `report.json`; nothing for one of another form.
    """
    with suppress(LookupError, TypeError, AttributeError):
        rows = record["rows"]
        curves = {"step": [_number(row["step"]) for row in rows]}
        for group in record["base"]:
            curves[NAMES[group]] = [_number(row[group]["loss"]) for row in rows]
            curves[f"base model, {NAMES[group]}"] = [_number(record["base"][group]["loss"])] * len(
                rows
            )
        return curves if rows else {}
    return {}


def by_timestep(record: Mapping[str, Any]) -> Curves:
    """The validation loss by timestep of the group that is compared, after the step that is
    exported, and the base model's.

    record: as of `by_step`.
    """
    with suppress(LookupError, TypeError, AttributeError):
        group, rows = record["judged_by"], {row["step"]: row for row in record["rows"]}
        last = rows[record.get("exported", max(rows))]
        return {
            "timestep": [(first + end) / 2 for first, end in record["timesteps"]],
            f"after {_number(last['step']):g} steps": [*map(_number, last[group]["levels"])],
            "base model": [*map(_number, record["base"][group]["levels"])],
        }
    return {}


SCORED = {
    "fidelity": "fidelity", "followed": "prompts followed", "class_leak": "class leak",
    "unrelated_leak": "unrelated leak", "harm": "harm", "redrawn": "redrawn", "copies": "copies",
    "similarity": "similarity", "drift": "drift",
}  # fmt: skip
"""Measure of a score → its words."""


MEANINGS = {
    "fidelity": "how much images of what is learned look like it: 0 % as the base’s images, 100 % "
    "as real ones",
    "prompts followed": "how well images of what is learned follow their prompts",
    "class leak": "how far images of its class have moved towards what is learned",
    "unrelated leak": "how far images of other prompts have moved towards what is learned",
    "harm": "how much less images of other prompts follow their prompts than the base’s images do",
    "redrawn": "how unlike images of other things are to the base’s of the same seed: 0 % equal, "
    "100 % nothing alike",
    "copies": "how many images repeat a training image",
    "similarity": "how like images of what is learned are to real ones, as others publish it",
    "drift": "how far images of other prompts have moved from the base’s, as others publish it",
    "merit": "fidelity, 0 for copies, less unrelated leak and harm (of a style, fidelity less "
    "harm): the number that picks the best step",
}
"""Words of a measure → its meaning, for people who read it for the first time."""


def scores_by_step(record: Mapping[str, Any]) -> Curves:
    """The numbers of the scores by step, in percent, half of the interval of each where there is
    one, and the merit.

    record: "scores" of `report.json`; nothing for one of another form.
    """
    with suppress(LookupError, TypeError, AttributeError):
        rows = record["rows"]
        for name in ("features", "blind", "images", "best"):  # beside the curves
            str(record[name])
        curves = {"step": [_number(row["step"]) for row in rows]}
        for name, words in SCORED.items():
            found = [_number(row["score"].get(name, {}).get("mean")) for row in rows]
            if any(value is not None for value in found):
                curves[words] = [None if value is None else 100 * value for value in found]
                lows = [_number(row["score"].get(name, {}).get("low")) for row in rows]
                if any(low is not None for low in lows):
                    curves[f"{words} ±"] = [
                        None if value is None or low is None else 100 * (value - low)
                        for value, low in zip(found, lows, strict=True)
                    ]
        curves["merit"] = [100 * row["merit"] for row in rows]
        return curves if rows else {}
    return {}


def _number(value: object) -> float | None:
    """A number of a record, also one that was not finite; raises TypeError for anything else."""
    if value is None or isinstance(value, int | float):
        return value
    raise TypeError(value)


def shortest(name: str, names: Sequence[str]) -> str:
    """The pattern of the shortest end of a path that no other path has, as --leave_out reads it;
    "" where none is of this path alone."""
    whole = f"/{name}".replace("\\", "/")
    others = [f"/{other}".replace("\\", "/") for other in names if other != name]
    for count in range(1, whole.count("/") + 1):
        pattern = _pattern("/".join(whole.split("/")[-count:]))
        if not any(fnmatchcase(other, f"*/{pattern}") for other in others):
            return pattern
    return ""


def _pattern(text: str) -> str:
    """A pattern of a text. Commas part patterns and spaces around them fall away, so that these are
    any one sign."""
    escaped = re.sub(r"[*?[]", r"[\g<0>]", text).replace(",", "?")
    return re.sub(r"^\s|\s$", "?", escaped)


def _picture(value: object) -> str:
    """A picture in a data URI; "" for anything else."""
    return value if isinstance(value, str) and _PICTURE.fullmatch(value) else ""


_PICTURE = re.compile(r"data:image/jpeg;base64,[A-Za-z0-9+/=]+")


def images_of(ledger: Sequence[Any], pictures: bool = True) -> list[dict[str, Any]]:
    """The rows of the table of images: name, path, times seen, or "held out", loss against the rest
    and its change, in words, the finding, the picture in a data URI, or "", the loss of each window
    in words, and the points of its line in a drawing of LINE pixels.

    ledger: of `report.json`; nothing for one of another form.
    """
    with suppress(LookupError, TypeError, ValueError, OverflowError, AttributeError):
        names = [str(image["name"]) for image in ledger]
        files = [str(image.get("file", image["name"])) for image in ledger]
        return [
            {
                "name": name,
                "path": file,
                "seen": "held out" if image.get("held_out") else int(image["seen"]),
                "loss": _ratio(image["loss"]),
                "change": _ratio(image["change"]),
                "finding": str(image["finding"]),
                "picture": _picture(image.get("picture")) if pictures else "",
                "windows": [*map(_ratio, image.get("windows", []))],
                "line": _line([*map(_number, image.get("windows", []))]),
            }
            for name, file, image in zip(names, files, ledger, strict=True)
        ]
    return []


def window_of(record: Mapping[str, Any]) -> dict[str, int]:
    """Number of trained images, and steps of a window of the ledger: "image_set" of `report.json`;
    zeros for one of another form."""
    with suppress(LookupError, TypeError, ValueError, OverflowError):
        return {"trained": int(record["trained"]), "window": int(record["window"])}
    return {"trained": 0, "window": 0}


LINE = (90, 28)
"""Width and height of the drawing of an image's loss: the rest's is in the middle, half of it at
the lower edge, and twice as much at the upper one."""


def _line(windows: Sequence[float | None]) -> str:
    """The points of an SVG polyline through the losses of windows; "" of fewer than two."""
    width, height = LINE
    step, points = width / max(1, len(windows) - 1), []
    for number, value in enumerate(windows):
        if value is not None and value > 0:
            up = max(-1.0, min(1.0, math.log2(value)))
            points.append(f"{number * step:.1f},{height / 2 * (1 - up):.1f}")
    return " ".join(points) if len(points) > 1 else ""


def _ratio(value: object) -> str:
    """A loss against the rest, in words; a dash where it is not known."""
    number = _number(value)
    return "–" if number is None else f"{number:.2f}"
