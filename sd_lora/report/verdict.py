"""The verdict on a run in words, with its numbers: has it learned, too little, enough, too much?

It is a function of `report.json`: scores of images where the run has them, else validation, and
changes of the weights. `THRESHOLDS` is the table of its numbers; `benchmarks/verdict.py` measures
how often it is right.
"""

import math
import shlex
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

UNDER, GOOD, OVER = "undertrained", "well trained", "overtrained"

THRESHOLDS = {
    "still_falling": 0.10,
    "most_gain": math.inf,
    "most_apart": math.inf,
    "most_change": math.inf,
    "most_rise": 0.0,
    "least_fidelity": 0.5,
    "most_lost": 0.1,
    "most_copies": 0.5,
    "most_leak": 0.25,
    "most_harm": 0.25,
    "most_redrawn": 0.6,
    "most_spread": 0.33,
    "most_changed": 0.55,
}
"""Name → number. With 1 as the base model's validation loss:

still_falling: share of the whole fall that came after three quarters of the steps, above which more
steps would help.
most_gain: fall of the loss on trained images above which they are learned by heart.
most_apart: fall on trained images beyond that on images held out, above which the same is said.
most_rise: rise of the judged loss since its best step, beyond its interval, above which a run went
too far.
most_change: ‖ΔW‖ / ‖W‖ of a part above which the LoRA overrides the base.
least_fidelity: fidelity of the images below which more steps would help.
most_lost: fall of the merit, beyond its interval, since the best step, above which a run went too
far.
most_copies: share of the subject's images that repeat a training image, above which it is learned
by heart.
most_leak, most_harm: of a subject, leak into unrelated images, and what other prompts are followed
less, above which the LoRA overrides the base. A style is meant to reach all prompts.
most_redrawn: of a subject, unlikeness of unrelated images to the base's from the same seed, above
which the same is said; most_spread: the same where they have moved towards the subject (TOWARDS).
most_changed: of a style, how much less images without its word show what they are asked for, above
which things are lost in it.

Copies, leak, harm, redrawn and changed are above their number where the whole of their interval is.

Those that are infinite are off: the losses of good runs and of those that are far too long lie too
near to each other. The limits of images are of 48 runs that two readers have looked at
(benchmarks/README.md). The other rules are intervals of differences, and need no number.
"""


CALIBRATED = ("encoder of drawings",)
"""Features for which the thresholds of images were measured."""

ROUGH = " (limits measured on drawings: a rough guess here)"
"""Behind the verdict by other features."""


@dataclass(frozen=True)
class Verdict:
    """state: UNDER, GOOD or OVER. found, advice: sentences. numbers: those that it was made of."""

    state: str
    found: str
    advice: str
    numbers: Mapping[str, float]

    @property
    def text(self) -> str:
        """The paragraph."""
        return f"{self.found} {self.advice}".strip()


@dataclass(frozen=True)
class Folder:
    """What a run's output folder holds, as its advice names it.

    name: of the folder, for a shell. file: the LoRA file. checkpoints: their steps.
    """

    name: str
    file: str
    checkpoints: Collection[int]

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Folder":
        """That of a record, whose folder and files may not be known."""
        files = record.get("files") or ("the LoRA file",)
        folder = shlex.quote(str(record.get("folder", "RUN")))
        return cls(folder, str(files[0]), record.get("checkpoints", ()))


def numbers_of(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a verdict, of a run's record; none where it was not validated after its start,
    or has another form.

    gain, held_out_gain: fall of the loss since the base. late: the part of the gain after three
    quarters of the steps. rise: of the judged loss since the best step. …_doubt: half the interval
    of each. best, last: steps. change: largest ‖ΔW‖ / ‖W‖ of a part.
    """
    with suppress(
        LookupError, TypeError, ZeroDivisionError, ValueError, AttributeError, StopIteration
    ):
        measured = record["validation"]
        rows, base = measured["rows"], measured["base"]
        if len(rows) < 2:
            return {}
        end = measured.get("exported", rows[-1]["step"])  # earlier in a run that ended early
        last = {row["step"]: row for row in rows}[end]
        judged = measured["judged_by"]
        found = {"best": measured["best"], "last": last["step"]}
        for name, since, group, sign in (
            ("gain", "since_base", "trained", -1),
            ("late", "since_three_quarters", "trained", -1),
            ("rise", "since_best", judged, 1),
        ):
            mean, half = measured[since]
            found[name] = sign * mean / base[group]["loss"]
            found[f"{name}_doubt"] = half / base[group]["loss"]
        if not any(0 < row["step"] <= 0.75 * end for row in rows):
            found |= {
                "late": 0.0,
                "late_doubt": 0.0,
            }  # nothing was measured before the last quarter
        if judged != "trained":
            found["held_out_gain"] = 1 - last[judged]["loss"] / base[judged]["loss"]
        if parts := [c for part in record["changes"].values() for c in part.values()]:
            found["change"] = max(parts)
        return {name: float(value) for name, value in found.items()}
    return {}


OF_SUBJECT = {"leak": "unrelated_leak", "harm": "harm", "redrawn": "redrawn"}
"""Number of the verdict on a subject → its measure."""


def scored_numbers_of(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a verdict by scores of images; none where there are fewer than two, or they
    have another form.

    fidelity, copies, harm, leak and redrawn (of unrelated prompts) of a subject, changed (the harm
    of a style, which is meant to reach all prompts) and class_leak, those that are known: of the
    last score, or of the one that was exported. …_doubt: half the interval of each, 0 of one set of
    seeds. lost: of the merit since the best step, lost_doubt: half its interval. best, last: steps.
    at_best: fidelity at the best step.
    """
    with suppress(LookupError, TypeError, ValueError, AttributeError):
        measured = record["scores"]
        rows = {row["step"]: row for row in measured["rows"]}
        if len(rows) < 2:
            return {}
        last = measured.get("exported", max(rows))
        if record.get("ended") and "exported" not in measured and last < record["step"]:
            return {}  # of an earlier part of the run, which scored
        of_subject = "unrelated_leak" in measured["measures"]
        named = {"fidelity": "fidelity", "copies": "copies", "class_leak": "class_leak"}
        named |= OF_SUBJECT if of_subject else {"changed": "harm"}
        lost, doubt = measured["since_best"] if last == max(rows) else (0.0, 0.0)
        found = {"lost": -lost, "lost_doubt": doubt, "best": measured["best"], "last": last}
        found["at_best"] = rows[found["best"]]["score"]["fidelity"]["mean"]
        for name, key in named.items():
            told = rows[last]["score"].get(key, {"mean": None})  # an older record lacks some
            if told["mean"] is None:
                continue
            low = told.get("low")
            found |= {name: told["mean"], f"{name}_doubt": 0 if low is None else told["mean"] - low}
        return {name: float(value) for name, value in found.items()} if "fidelity" in found else {}
    return {}


def verdict_of(
    record: Mapping[str, Any], thresholds: Mapping[str, float] = THRESHOLDS
) -> Verdict | None:
    """The verdict on a run, by scores of its images where it has them, else by its losses; None
    where its record has too little to judge by. Of a run that has not ended it advises nothing."""
    there = Folder.of(record)
    if seen := scored_numbers_of(record):
        known = record["scores"].get("features") in CALIBRATED
        verdict = _by_images(seen, thresholds, "" if known else ROUGH, there)
    elif measured := numbers_of(record):
        verdict = _by_loss(measured, thresholds, there)
    else:
        return None
    if record.get("ended") is not False:
        return verdict
    found = verdict.found[0].lower() + verdict.found[1:]
    return replace(verdict, found=f"So far, {found}", advice="The run has not ended.")


CLASS_TAKEN = 0.5
"""Leak into the class above which a verdict speaks of it. It makes no run overtrained: without
class images each run has it at once, and some want it."""

TOWARDS = 0.02
"""Leak into unrelated images from which on these have taken something of the subject. A house that
is green in place of blue is another house; the demo's LoRA redraws 42 % so, at a leak of 0.1 %."""

TOO_MUCH = (
    ("copies", "most_copies", "{} of the images repeat a training image"),
    ("leak", "most_leak", "other prompts went {} of the way to what was learned"),
    ("harm", "most_harm", "other prompts are followed {} less than by the base"),
    ("redrawn", "most_redrawn", "images of other things are {} unlike the base's of the same seed"),
    ("spread", "most_spread", "images of other things are {} redrawn, towards what was learned"),
    ("changed", "most_changed", "images without its word show {} less of what they are asked for"),
)
"""Number, its threshold, and the sentence of what is above it."""


def too_much(n: Mapping[str, float], t: Mapping[str, float] = THRESHOLDS) -> list[str]:
    """What is too much in the images of a LoRA, in words.

    n: numbers, of a style `changed` in place of leak, harm and redrawn, and half the interval of
    each as …_doubt. t: thresholds.
    """
    if n.get("leak", 0.0) > TOWARDS and n.get("redrawn", 0.0) <= t["most_redrawn"]:
        spread = {f"spread{end}": n.get(f"redrawn{end}", 0.0) for end in ("", "_doubt")}
        n = {**n, **spread}
    return [
        text.format(_around(n, name))
        for name, limit, text in TOO_MUCH
        if n.get(name, 0.0) - n.get(f"{name}_doubt", 0.0) > t[limit]
    ]


def _around(n: Mapping[str, float], name: str) -> str:
    """A number with its interval, where there is one."""
    doubt = n.get(f"{name}_doubt", 0.0)
    return f"{percent(n[name])} ± {percent(doubt)}" if doubt else percent(n[name])


def _by_images(
    n: Mapping[str, float], t: Mapping[str, float], doubt: str, there: Folder
) -> Verdict:
    """The verdict by scores of images. doubt: words of features that are not calibrated."""
    over, under = too_much(n, t), []
    seen = f"fidelity is {_around(n, 'fidelity')} (0 % the base's images, 100 % real ones)"
    if n["fidelity"] < t["least_fidelity"]:
        under.append(seen)
    if is_worse := n["lost"] > max(n["lost_doubt"], t["most_lost"]):
        fallen = (
            f"since step {n['best']:.0f} the merit, fidelity less leak and harm, has fallen by "
            f"{percent(n['lost'])} ± {percent(n['lost_doubt'])}"
        )
        if max(n["at_best"], n["fidelity"]) < t["least_fidelity"] and not over:
            under.append(fallen)  # it was never learned, and other prompts have not lost too much
        else:
            over.insert(0, fallen)
    state = OVER if over else UNDER if under else GOOD
    named = {
        "leak": "leak into other prompts", "harm": "harm", "changed": "harm",
        "class_leak": "leak into the class", "redrawn": "other images redrawn",
    }  # fmt: skip
    told = [
        seen,
        *(
            f"{words} {_around(n, name)}" if n[name] > 0 else f"no {words}"
            for name, words in named.items()
            if name in n
        ),
    ]
    reasons = "; ".join(over or under or [", ".join(told)])
    words = f"By its images{doubt}, {state}: {reasons}."
    if n.get("class_leak", 0.0) - n.get("class_leak_doubt", 0.0) > CLASS_TAKEN:
        words += (
            f" Other things of its class are drawn as it ({_around(n, 'class_leak')} of the way): "
            "class images or preserved answers keep what their captions say (docs/objectives.md)."
        )
    return Verdict(state, words, _advice(state, n, there, is_worse), n)


def _by_loss(n: Mapping[str, float], t: Mapping[str, float], there: Folder) -> Verdict:
    """The verdict by losses."""
    over, under = [], []
    if is_worse := n["rise"] > max(n["rise_doubt"], t["most_rise"]):
        over.append(
            f"the validation loss has risen by {percent(n['rise'])} ± {percent(n['rise_doubt'])} "
            f"since step {n['best']:.0f}"
        )
    if "held_out_gain" in n and n["gain"] - n["held_out_gain"] > t["most_apart"]:
        over.append(
            f"it fell by {percent(n['gain'])} on the trained images and by "
            f"{percent(n['held_out_gain'])} on those held out: they are learned by heart"
        )
    if n["gain"] > t["most_gain"]:
        over.append(
            f"on noise that was never trained the loss of the trained images fell by "
            f"{percent(n['gain'])}, as far as it falls when images are learned by heart"
        )
    if n.get("change", 0.0) > t["most_change"]:
        over.append(f"‖ΔW‖ is {percent(n['change'])} of ‖W‖ in one part of the model")
    share = n["late"] / n["gain"] if n["gain"] > 0 else 0.0
    if n["gain"] <= n["gain_doubt"]:
        under.append(
            f"the validation loss fell by {percent(n['gain'])} ± {percent(n['gain_doubt'])}, "
            "which may be chance"
        )
    elif share > t["still_falling"] and n["late"] > n["late_doubt"]:
        under.append(
            f"{percent(share)} of the fall of the validation loss came in the last quarter of the "
            "steps: it was still falling at the end"
        )
    state = OVER if over else UNDER if under else GOOD
    settled = f"the validation loss fell by {percent(n['gain'])} and has settled"
    reasons = "; ".join(over or under or [settled])
    words = f"By the loss alone, a rough guess, {state}: {reasons}."
    return Verdict(state, words, _advice(state, n, there, is_worse), n)


def _advice(state: str, n: Mapping[str, float], there: Folder, is_worse: bool) -> str:
    """The file to take, its strength, and the remedy. is_worse: whether the last step is worse than
    the best one, beyond chance."""
    best, last = round(n["best"]), round(n["last"])
    if state == UNDER and is_worse:
        return "More steps have not helped: try another --learning_rate, captions or images."
    if state == UNDER:
        return "Go on with more --steps, or raise --learning_rate."
    less = f"less strength (sd-lora judge {there.name} --model M --images FOLDER says how much)"
    if state == OVER and is_worse and best in there.checkpoints and 0 < best < last:
        taken = f"sd-lora export {there.name}/checkpoint-{best}"
        return f"Take step {best} ({taken}), or try {there.file} at {less}."
    if state == OVER and is_worse and 0 < best < last:
        return (
            f"Step {best} was better, and no checkpoint of it is left (--keep_best keeps it): "
            f"try {there.file} at {less}, or train anew."
        )
    if state == OVER:
        return f"Take an earlier step or a lower --learning_rate, or try {there.file} at {less}."
    if 0 < best < last:
        same = f"The steps {best} and {last} differ by nothing that matters"
        return f"{same}: take {there.file}, of step {last}, at strength 1."
    return f"Take {there.file}, of step {last}, at strength 1."


def percent(share: float) -> str:
    """A share in percent, with a digit behind the point where it is small."""
    return f"{100 * share:z.1f} %" if abs(share) < 0.1 else f"{100 * share:.0f} %"
