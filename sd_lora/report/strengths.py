"""A LoRA file by strength: losses, scores of images, and the verdict on them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from sd_lora.report.intervals import interval, is_better
from sd_lora.report.verdict import (
    CALIBRATED,
    GOOD,
    OVER,
    ROUGH,
    THRESHOLDS,
    UNDER,
    Verdict,
    percent,
    too_much,
)
from sd_lora.sampling.score import PromptImages, Score

Key = TypeVar("Key", int, float)

AS_NEAR = 0.1
"""Most fidelity less, in the mean, with which images can pass for as near to the subject; the
verdict of a run calls more of it lost (`most_lost`)."""

ALIKE = 0.02
"""Fidelity less that no eye sees, whatever its interval."""


@dataclass
class Judged:
    """A LoRA file by strength; strength 0 is the base.

    kind: "subject" or "style". features: name of those that scored. losses: strength → loss of each
    item. changes: component → part → ‖ΔW‖ / ‖W‖. images: strength →
    sets of images. scores, values: strength → their score, and the measures of each image (see
    `Judge.judge`). The last three are empty without features.
    """

    path: Path
    losses: dict[float, Sequence[float]] = field(default_factory=dict)
    changes: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    images: dict[float, list[PromptImages]] = field(default_factory=dict)
    scores: dict[float, Score] = field(default_factory=dict)
    values: dict[float, Mapping[str, Sequence[float]]] = field(default_factory=dict)
    kind: str = "subject"
    features: str = ""

    @property
    def strengths(self) -> list[float]:
        """All strengths but the base's."""
        return [strength for strength in self.losses if strength]

    def against(self, strength: float, other: float) -> tuple[float, float]:
        """Difference of the losses at two strengths, and its 95 % interval's half, in parts of the
        base's loss."""
        base = sum(self.losses[0.0]) / len(self.losses[0.0])
        mean, half = interval(self.losses[strength], self.losses[other])
        return mean / base, half / base

    @property
    def best(self) -> float:
        """The strength with the smallest loss of those that are better than 1 beyond the interval;
        else 1."""
        better = [s for s in self.strengths if is_better(self.losses[s], self.losses[1.0])]
        return min(better, key=lambda s: sum(self.losses[s]), default=1.0)

    def too_much(self, strength: float) -> list[str]:
        """What is too much in the images at a strength, in words, as in a run's; a style is meant
        to reach other prompts."""
        score = self.scores[strength]
        named = {"copies": score.copies}
        if self.kind == "subject":
            named |= {"leak": score.unrelated_leak, "harm": score.harm, "redrawn": score.redrawn}
        else:
            named["changed"] = score.harm
        known = {name: one for name, one in named.items() if not math.isnan(one.mean)}
        doubts = {f"{n}_doubt": one.half for n, one in known.items() if math.isfinite(one.half)}
        return too_much({name: one.mean for name, one in known.items()} | doubts)

    @property
    def fine(self) -> list[float]:
        """The strengths whose images have too much of nothing."""
        return [strength for strength in self.scores if not self.too_much(strength)]

    @property
    def nearest(self) -> float | None:
        """The least strength whose images are as near to the subject as the nearest ones, of the
        fine strengths, or of all where none is fine; None without images."""
        if not self.scores:
            return None
        near = {strength: self.near_at(strength) for strength in self.fine or self.scores}
        return min(as_near(near))

    def near_at(self, strength: float) -> Sequence[float]:
        """Fidelity of each image at a strength, of copies 0."""
        return self.values[strength]["fidelity"]

    @property
    def verdict(self) -> Verdict:
        """The verdict, by the images where there are some, else by the loss."""
        return by_images(self) if self.scores else by_loss(self)

    def numbers(self) -> dict[str, Any]:
        """Everything, for JSON."""
        rows, verdict = [], self.verdict

        def known(number: float) -> float | None:  # JSON has no NaN
            return number if math.isfinite(number) else None

        for strength in self.strengths:
            mean, half = self.against(strength, 0.0)
            losses = self.losses[strength]
            row: dict[str, Any] = {"strength": strength, "loss": known(sum(losses) / len(losses))}
            row |= {"against_base": known(mean), "doubt": known(half)}
            if strength in self.scores:
                row["score"] = self.scores[strength].numbers()
            rows.append(row)
        return {
            "file": str(self.path),
            "state": verdict.state,
            "verdict": verdict.text,
            "best_strength": self.best,
            "nearest_strength": self.nearest,
            "base_loss": sum(self.losses[0.0]) / len(self.losses[0.0]),
            "strengths": rows,
            "changes": self.changes,
        }


def by_loss(judged: Judged) -> Verdict:
    """The verdict by the loss alone: it says more on images that the LoRA has not been trained on,
    for on others no other strength is better."""
    gain, doubt = judged.against(1.0, 0.0)
    best, state = judged.best, GOOD
    if not math.isfinite(gain):
        state, why = OVER, "at strength 1 it is not finite: the file's ΔW are too large"
    elif gain > doubt:
        state = OVER
        why = f"at strength 1 it is {percent(gain)} ± {percent(doubt)} above the base's"
    elif -gain <= doubt:
        state = UNDER
        why = (
            f"at strength 1 it is {percent(-gain)} ± {percent(doubt)} below the base's, which may "
            "be chance: the file has learned nothing of these images, or is for another base model"
        )
    else:
        why = f"at strength 1 it is {percent(-gain)} ± {percent(doubt)} below the base's"
        less, margin = judged.against(best, 1.0)
        if best != 1:
            state = OVER if best < 1 else UNDER
            why += f", and at {best:g} by a further {percent(-less)} ± {percent(margin)}"
        else:
            why += ", and no other strength is better"
    numbers = {"gain": -gain, "gain_doubt": doubt, "best_strength": best}
    return Verdict(state, f"By the loss of these images, {state}: {why}.", "", numbers)


def as_near(near: Mapping[Key, Sequence[float]]) -> list[Key]:
    """The keys of images that are as near to the subject as the nearest ones: the difference, image
    by image, is within its interval and small, or so small that it does not matter.

    near: key → fidelity of each image, of the same prompts and seeds.
    """
    nearest = max(near, key=lambda key: fmean(near[key]))

    def is_as_near(key: Key) -> bool:
        if len(near[key]) < 2:
            return fmean(near[key]) >= fmean(near[nearest])
        less, half = interval(near[nearest], near[key])
        return less <= max(ALIKE, min(half, AS_NEAR))

    return [key for key in near if is_as_near(key)]


def by_images(judged: Judged) -> Verdict:
    """The verdict by the images that were drawn, at strength 1, and the strength to take."""
    near, at_one, least = judged.nearest or 1.0, judged.scores[1.0], THRESHOLDS["least_fidelity"]
    found = judged.scores[near]
    state, why = GOOD, f"fidelity is {at_one.fidelity.text()}"
    if over := judged.too_much(1.0):
        state, why = OVER, f"{why}; {'; '.join(over)}"
        why += f"; at strength {near:g} fidelity is {found.fidelity.text()}" * (near != 1)
    elif near > 1:
        state = UNDER
        why = f"fidelity is {at_one.fidelity.text()} at strength 1 and {found.fidelity.text()} at "
        why += f"{near:g}"
    elif near < 1 and (worse := _worse(at_one, found, judged.kind)):
        state = OVER
        why = f"strength {near:g} is as near to the subject ({found.fidelity.text()}, at 1 "
        why += f"{at_one.fidelity.text()}{', its copies counting 0' * (at_one.copies.mean > 0)}), "
        why += f"and strength 1 has {', '.join(worse)}"
    elif at_one.fidelity.mean < least:
        state = UNDER
        why += ", less than half of the way to real images"
    numbers = {"fidelity": at_one.fidelity.mean, "nearest_strength": near}
    advice = f"Take it at strength {near:g}." * (state != UNDER or near > 1)
    if not judged.fine or (state == OVER and found.fidelity.mean < least):
        advice = "Train it shorter or at a lower rate: no strength here is good."
    doubt = "" if judged.features in CALIBRATED else ROUGH
    return Verdict(state, f"By its images{doubt}, {state}: {why}.", advice, numbers)


def _worse(then: Score, now: Score, kind: str) -> list[str]:
    """What one score has more of than another, beyond its interval, in words; a style is meant to
    reach other prompts."""
    of_subject = (
        ("unrelated leak", then.unrelated_leak, now.unrelated_leak),
        ("harm", then.harm, now.harm),
        ("redrawn", then.redrawn, now.redrawn),
    )
    return [
        f"{name} {a.text()} and not {b.text()}"
        for name, a, b in (
            ("copies", then.copies, now.copies),
            ("class leak", then.class_leak, now.class_leak),
            *(of_subject if kind == "subject" else ()),
        )
        if a.mean - b.mean > max(a.half, b.half)
    ]


def best_of(found: Sequence[Judged]) -> str:
    """The file to take of several, in words: by images the one with the least leak and harm of
    those that are fine at some strength and there as near to the subject as any; by the loss the
    least one, if beyond chance."""

    def near(one: Judged) -> Score:
        return one.scores[one.nearest or 1.0]

    def side_effects(one: Judged) -> float:
        score = near(one)
        known = (score.class_leak.mean, score.unrelated_leak.mean, score.harm.mean)
        return sum(value for value in known if not math.isnan(value))

    if all(one.scores for one in found):
        fine = {i: one for i, one in enumerate(found) if one.fine}
        if not fine:
            return "Of these files none is good at any strength: train shorter or at a lower rate."
        close = as_near({i: one.near_at(one.nearest or 1.0) for i, one in fine.items()})
        taken = min((fine[i] for i in close), key=side_effects)
        why = told(near(taken))
        return f"Of these files take {taken.path} at strength {taken.nearest:g}: {why}."
    taken = min(found, key=lambda one: sum(one.losses[one.best]))
    rest = [one for one in found if one is not taken]
    if not all(is_better(taken.losses[taken.best], one.losses[one.best]) for one in rest):
        return "By the loss of these images, no file is better than all others beyond chance."
    return f"By the loss of these images, take {taken.path} at strength {taken.best:g}."


def told(score: Score) -> str:
    """The numbers of a score that are known, in a line."""
    named = {
        "fidelity": score.fidelity,
        "copies": score.copies,
        "prompts": score.followed,
        "class leak": score.class_leak,
        "unrelated leak": score.unrelated_leak,
        "harm": score.harm,
        "redrawn": score.redrawn,
    }
    return ", ".join(
        f"{name} {one.text()}" for name, one in named.items() if not math.isnan(one.mean)
    )


def lines(found: Sequence[Judged]) -> Iterator[str]:
    """Yield lines for a terminal: a table a file, and its verdict."""
    for one in found:
        yield f"{one.path}:"
        for strength in one.strengths:
            mean, half = one.against(strength, 0.0)
            text = f"  strength {strength:<4g}  loss {100 * mean:+z.1f} % ± {100 * half:.1f}"
            if strength in one.scores:
                text += f"; {told(one.scores[strength])}"
            yield text
        for component, parts in one.changes.items():
            if not parts:
                continue
            part, change = max(parts.items(), key=lambda item: item[1])
            yield f"  ‖ΔW‖ of {component} is at most {percent(change)} of ‖W‖, in {part}"
        yield f"  {one.verdict.text}"
    if len(found) > 1:
        yield best_of(found)
