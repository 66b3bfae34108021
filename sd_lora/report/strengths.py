"""A LoRA file by strength: losses, scores of images, and the verdict on them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from sd_lora.report.intervals import interval, is_better
from sd_lora.report.verdict import GOOD, OVER, THRESHOLDS, UNDER, Verdict, percent, too_much
from sd_lora.sampling.score import PromptImages, Score

AS_NEAR = 0.1
"""Most fidelity less, in the mean, with which images can pass for as near to the subject; the
verdict of a run calls more of it lost (`most_lost`)."""


@dataclass
class Judged:
    """A LoRA file by strength; strength 0 is the base.

    losses: strength → loss of each item. changes: component → part → ‖ΔW‖ / ‖W‖. images: strength →
    sets of images. scores, values: strength → their score, and the measures of each image (see
    `Judge.judge`). The last three are empty without features.
    """

    path: Path
    losses: dict[float, Sequence[float]] = field(default_factory=dict)
    changes: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    images: dict[float, list[PromptImages]] = field(default_factory=dict)
    scores: dict[float, Score] = field(default_factory=dict)
    values: dict[float, Mapping[str, Sequence[float]]] = field(default_factory=dict)

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

    @property
    def nearest(self) -> float | None:
        """The least strength whose images are as near to the subject as the nearest ones: the
        difference, image by image, is within its interval; None without images."""
        if not self.scores:
            return None
        near = {strength: values["fidelity"] for strength, values in self.values.items()}
        nearest = max(near, key=lambda strength: fmean(near[strength]))

        def is_as_near(strength: float) -> bool:
            if len(near[strength]) < 2:
                return fmean(near[strength]) >= fmean(near[nearest])
            less, half = interval(near[nearest], near[strength])
            return less <= min(half, AS_NEAR)

        return min(filter(is_as_near, near))

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


def by_images(judged: Judged) -> Verdict:
    """The verdict by the images that were drawn, of the strength to take; what is too much in the
    images of a run is too much here."""
    near, at_one = judged.nearest or 1.0, judged.scores[1.0]
    found = judged.scores[near]
    worse = [
        f"{name} {then.text()} and not {now.text()}"
        for name, then, now in (
            ("copies", at_one.copies, found.copies),
            ("class leak", at_one.class_leak, found.class_leak),
            ("unrelated leak", at_one.unrelated_leak, found.unrelated_leak),
            ("harm", at_one.harm, found.harm),
        )
        if then.mean - now.mean > max(then.half, now.half)
    ]
    state, why = GOOD, f"fidelity is {at_one.fidelity.text()}"
    if near > 1:
        state = UNDER
        why = f"fidelity is {at_one.fidelity.text()} at strength 1 and {found.fidelity.text()} at "
        why += f"{near:g}"
    elif near < 1 and worse:
        state = OVER
        why = f"strength {near:g} is as near to the subject ({found.fidelity.text()}, at 1 "
        why += f"{at_one.fidelity.text()}), and strength 1 has {', '.join(worse)}"
    elif at_one.fidelity.mean < THRESHOLDS["least_fidelity"]:
        state = UNDER
        why += ", less than half of the way to real images"
    numbers = {"fidelity": at_one.fidelity.mean, "nearest_strength": near}
    advice = f"Take it at strength {near:g}." * (state != UNDER or near > 1)
    if over := too_much(_numbers(found)):
        state, why = OVER, f"{why}; at strength {near:g} {'; '.join(over)}"
        advice = f"Take it at less strength than {near:g}, or train it shorter or at a lower rate."
    return Verdict(state, f"By its images, {state}: {why}.", advice, numbers)


def _numbers(score: Score) -> dict[str, float]:
    """The numbers of a score that can be too much, those that are known, as a run's verdict has
    them."""
    named = {"copies": score.copies, "leak": score.unrelated_leak, "harm": score.harm}
    known = {name: one for name, one in named.items() if not math.isnan(one.mean)}
    doubts = {f"{n}_doubt": one.half for n, one in known.items() if math.isfinite(one.half)}
    return {name: one.mean for name, one in known.items()} | doubts


def best_of(found: Sequence[Judged]) -> str:
    """The file to take of several, in words: by images the one with the least leak and harm of
    those that are as near to the subject as any; by the loss the least one, if beyond chance."""

    def near(one: Judged) -> Score:
        return one.scores[one.nearest or 1.0]

    def side_effects(one: Judged) -> float:
        score = near(one)
        known = (score.class_leak.mean, score.unrelated_leak.mean, score.harm.mean)
        return sum(value for value in known if not math.isnan(value))

    if all(one.scores for one in found):
        least = max(map(near, found), key=lambda score: score.fidelity.mean).fidelity.low
        taken = min((o for o in found if near(o).fidelity.mean >= least), key=side_effects)
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
            text = f"  strength {strength:<4g}  loss {100 * mean:+.1f} % ± {100 * half:.1f}"
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
