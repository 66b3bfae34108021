"""The verdict on a run in words, with its numbers: has it learned, too little, enough, too much?

It is a function of `report.json`: validation, ledger, changes of the weights. `THRESHOLDS` is the
table of its numbers; `benchmarks/verdict.py` measures how often it is right.
"""

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

UNDER, GOOD, OVER = "undertrained", "trained", "overtrained"

THRESHOLDS = {
    "still_falling": 0.10,
    "most_gain": math.inf,
    "most_apart": math.inf,
    "most_change": math.inf,
}
"""Name → number. With 1 as the base model's validation loss:

still_falling: share of the whole fall that came after three quarters of the steps, above which more
steps would help.
most_gain: fall of the loss on trained images above which they are learned by heart.
most_apart: fall on trained images beyond that on images held out, above which the same is said.
most_change: ‖ΔW‖ / ‖W‖ of a part above which the LoRA overrides the base.

The last three are off until runs of many subjects have shown where they lie; the other rules are
intervals of differences, and need no number.
"""


@dataclass(frozen=True)
class Verdict:
    """state: UNDER, GOOD or OVER. text: a paragraph. numbers: those that it was made of."""

    state: str
    text: str
    numbers: Mapping[str, float]


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
        if judged != "trained":
            found["held_out_gain"] = 1 - last[judged]["loss"] / base[judged]["loss"]
        if parts := [c for part in record["changes"].values() for c in part.values()]:
            found["change"] = max(parts)
        return {name: float(value) for name, value in found.items()}
    return {}


def verdict_of(
    record: Mapping[str, Any], thresholds: Mapping[str, float] = THRESHOLDS
) -> Verdict | None:
    """The verdict on a run; None where its record has too little to judge by."""
    n = numbers_of(record)
    if not n:
        return None
    t, over, under = thresholds, [], []
    if n["rise"] > n["rise_doubt"]:
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
            "steps, and it goes on"
        )
    state = OVER if over else UNDER if under else GOOD
    settled = f"the validation loss fell by {percent(n['gain'])} and has settled"
    reasons = "; ".join(over or under or [settled])
    return Verdict(state, f"{_HEADS[state]}: {reasons}. {_advice(state, n)}", n)


_HEADS = {
    UNDER: "By the loss alone (not calibrated yet), undertrained",
    GOOD: "By the loss alone (not calibrated yet), trained",
    OVER: "By the loss alone (not calibrated yet), overtrained",
}


def _advice(state: str, n: Mapping[str, float]) -> str:
    """The file to take, its strength, and the remedy."""
    best, last = round(n["best"]), round(n["last"])
    if state == UNDER:
        return "Go on with more --steps, or raise --learning_rate."
    less = "try the last file at less strength (sd-lora sample --strengths 0.4 0.6 0.8 1)"
    if state == OVER and 0 < best < last:
        return f"Take the step {best} (--keep_best keeps it), or {less}."
    if state == OVER:
        return f"Take an earlier step or a lower --learning_rate, or {less}."
    if 0 < best < last:
        return f"The steps {best} and {last} differ by nothing that matters: take the last file."
    return "Take the last file at strength 1."


def percent(share: float) -> str:
    """A share in percent, with a digit behind the point where it is small."""
    return f"{100 * share:.1f} %" if abs(share) < 0.1 else f"{100 * share:.0f} %"
