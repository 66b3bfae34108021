"""The verdict: each of its rules alone, in words with its numbers, and silence where too little is
known."""

from typing import Any

import pytest

from sd_lora.report.verdict import GOOD, OVER, THRESHOLDS, UNDER, numbers_of, verdict_of


def record(
    losses: list[float],
    best: int,
    rise: tuple[float, float] = (0.0, 0.01),
    held_out: list[float] | None = None,
    change: float = 0.05,
) -> dict[str, Any]:
    """A run of validations at the steps 0, 100, 200, …, the base's loss first."""
    groups = {"trained": losses} | ({"held out": held_out} if held_out else {})
    rows = [
        {"step": 100 * i, **{g: {"loss": values[i]} for g, values in groups.items()}}
        for i in range(len(losses))
    ]
    return {
        "validation": {
            "base": {g: {"loss": values[0]} for g, values in groups.items()}, "rows": rows,
            "judged_by": [*groups][-1], "best": best, "since_best": [*rise],
            "since_base": [losses[-1] - losses[0], 0.02],
            "since_three_quarters": [losses[-1] - losses[3 * len(losses) // 4], 0.01],
        },
        "changes": {"unet": {"down_blocks.0": change}},
        "files": ["a.safetensors", "a_kohya.safetensors"], "folder": "out",
    }  # fmt: skip


SETTLED = [1.0, 0.85, 0.82, 0.81, 0.81]


@pytest.mark.parametrize(
    ("run", "state", "words"),
    [
        (record(SETTLED, 400), GOOD, "fell by 19 % and has settled. Take a.safetensors, of"),
        (record(SETTLED, 200), GOOD, "The steps 200 and 400 differ by nothing that matters"),
        (record([1.0, 0.995, 0.99, 0.99, 0.99], 0), UNDER, "fell by 1.0 % ± 2.0 %, which may be"),
        (record([1.0, 0.95, 0.9, 0.85, 0.8], 400), UNDER, "25 % of the fall of the validation"),
        (record(SETTLED, 100, (0.05, 0.01)), OVER, "risen by 5.0 % ± 1.0 % since step 100. Step"),
        (record(SETTLED, 100, (0.05, 0.06)), GOOD, "differ by nothing that matters"),
        (record(SETTLED, 400, held_out=[1.0] * 5), OVER, "by 0.0 % on those held out"),
        (record([1.0, 0.3, 0.2, 0.2, 0.2], 400), OVER, "fell by 80 %, as far as it falls when"),
        (record(SETTLED, 400, change=0.9), OVER, "‖ΔW‖ is 90 % of ‖W‖ in one part of the model"),
    ],
)  # fmt: skip
def test_each_rule_alone(run: dict[str, Any], state: str, words: str) -> None:
    """A run that breaks one rule has its state, and the sentence with its number; a rise within
    chance is none."""
    thresholds = THRESHOLDS | {"most_gain": 0.5, "most_apart": 0.15, "most_change": 0.5}
    verdict = verdict_of(run, thresholds)
    assert verdict is not None
    assert verdict.state == state
    assert words in verdict.text


def test_two_validations_do_not_tell_what_goes_on() -> None:
    """With the start and one validation the whole fall is since three quarters of the steps: that
    says nothing of whether it goes on; with one between, the same numbers do."""
    run = record([1.0, 0.8], 100)
    run["validation"]["since_three_quarters"] = [-0.2, 0.01]
    verdict = verdict_of(run)
    assert verdict is not None
    assert verdict.state == GOOD
    run = record([1.0, 1.0, 0.8], 200)
    run["validation"]["since_three_quarters"] = [-0.2, 0.01]
    verdict = verdict_of(run)
    assert verdict is not None
    assert verdict.state == UNDER


def scored(
    fidelity: float = 0.8,
    leak: float = 0.02,
    harm: float = 0.01,
    copies: float = 0.0,
    redrawn: float = 0.3,
    at_best: float | None = None,
    since_best: tuple[float, float] = (0.0, 0.0),
    best: int = 400,
    width: float = 0.0,
) -> dict[str, Any]:
    """A run with scores at the steps 0 and 400; its losses say that it is undertrained."""
    numbers = {
        "fidelity": fidelity, "class_leak": None, "unrelated_leak": leak, "harm": harm,
        "copies": copies, "redrawn": redrawn,
    }  # fmt: skip
    lows = {name: None if value is None else value - width for name, value in numbers.items()}
    score = {name: {"mean": value, "low": lows[name]} for name, value in numbers.items()}
    rows = [{"step": step, "merit": 0.5, "score": score} for step in (0, 100, 400)]
    if at_best is not None:
        rows[1]["score"] = score | {"fidelity": {"mean": at_best, "low": None}}
    measures = ["fidelity", "unrelated_leak", "harm"]
    scores = {"rows": rows, "best": best, "since_best": [*since_best], "measures": measures}
    return record([1.0, 0.995, 0.99, 0.99, 0.99], 0) | {"scores": scores}


@pytest.mark.parametrize(
    ("run", "state", "words"),
    [
        (scored(), GOOD, "fidelity is 80 % (0 % the base's images, 100 % real ones), leak into"),
        (scored(fidelity=0.3), UNDER, "fidelity is 30 %"),
        (scored(leak=0.5), OVER, "other prompts went 50 % of the way to what was learned"),
        (scored(harm=0.3), OVER, "other prompts are followed 30 % less than by the base"),
        (scored(redrawn=0.45, leak=0.05), OVER, "are 45 % redrawn, towards what was learned"),
        (scored(redrawn=0.45, leak=0.01), GOOD, "other images redrawn 45 %"),
        (scored(redrawn=0.7), OVER, "other things are 70 % unlike the base's of the same seed"),
        (scored(copies=1.0), OVER, "100 % of the images repeat a training image"),
        (scored(leak=0.5, width=0.125), OVER, "went 50 % ± 12 % of the way to what was learned"),
        (scored(leak=0.5, width=0.3), GOOD, "leak into other prompts 50 % ± 30 %, harm 1.0 % ± 30"),
        (scored(since_best=(-0.2, 0.1), best=100), OVER, "harm, has fallen by 20 %"),
        (scored(fidelity=0.3, since_best=(-0.2, 0.1), best=100), UNDER, "steps have not helped"),
        (scored(fidelity=0.7, at_best=0.45, since_best=(-0.2, 0.1), best=100), OVER, "fallen"),
        (scored(fidelity=0.3, at_best=0.8, since_best=(-0.2, 0.1), best=100), OVER, "has fallen"),
        (scored(since_best=(-0.04, 0.01), best=100), GOOD, "100 and 400 differ by nothing that"),
        (scored(since_best=(-0.2, 0.3), best=100), GOOD, "100 and 400 differ by nothing that"),
    ],
)  # fmt: skip
def test_each_rule_of_images(run: dict[str, Any], state: str, words: str) -> None:
    """Scores come before losses, and each rule alone gives its state and its sentence."""
    thresholds = {"least_fidelity": 0.5, "most_copies": 0.5, "most_leak": 0.3, "most_harm": 0.2}
    verdict = verdict_of(run, THRESHOLDS | thresholds)
    assert verdict is not None
    assert verdict.state == state
    assert words in verdict.text
    assert verdict.text.startswith(
        "By its images (limits measured on drawings: a rough guess here), "
    )
    run["scores"]["features"] = "encoder of drawings"
    own = verdict_of(run, THRESHOLDS | thresholds)
    assert own is not None
    assert own.text.startswith(f"By its images, {state}")


def test_a_style_may_reach_other_prompts() -> None:
    """A leak into other prompts, no part of a style's merit, and what they show a little less of
    their own for it make no style overtrained; the leak is not told as if there were none. Where
    they show half less, things are lost in it."""
    run = scored(leak=0.9, harm=0.4)
    run["scores"]["measures"].remove("unrelated_leak")
    verdict = verdict_of(run)
    assert verdict is not None
    assert verdict.state == GOOD
    assert "leak" not in verdict.text
    lost = scored(leak=0.9, harm=0.6)
    lost["scores"]["measures"].remove("unrelated_leak")
    verdict = verdict_of(lost)
    assert verdict is not None
    assert verdict.state == OVER
    assert "images without its word show 60 % less of what they are asked for" in verdict.text


def test_a_class_that_is_taken_is_spoken_of() -> None:
    """Where other things of the class are drawn as the subject, the verdict says so and what keeps
    them; that alone makes nothing overtrained."""
    run = scored()
    for row in run["scores"]["rows"]:
        row["score"]["class_leak"] = {"mean": 0.9, "low": 0.8}
    verdict = verdict_of(run)
    assert verdict is not None
    assert verdict.state == GOOD
    assert "its class are drawn as it (90 % ± 10.0 % of the way): class images or" in verdict.text


def test_what_is_not_known_is_not_told() -> None:
    """Numbers that a model of images cannot tell are in no sentence, as 0 or otherwise."""
    run = scored()
    for row in run["scores"]["rows"]:
        for name in ("harm", "copies", "unrelated_leak"):
            row["score"][name] = {"mean": None, "low": None}
        row["score"].pop("redrawn", None)  # as in a record of an earlier version
    verdict = verdict_of(run)
    assert verdict is not None
    assert verdict.text.endswith(
        "100 % real ones). Take a.safetensors, of step 400, at strength 1."
    )


def test_a_run_that_goes_on_gets_no_advice() -> None:
    """A verdict in mid-run says so, and names no file: there is none yet."""
    verdict = verdict_of(scored() | {"ended": False})
    assert verdict is not None
    assert verdict.text.startswith("So far, by its images")
    assert verdict.text.endswith(" The run has not ended.")


def test_a_step_that_is_better_by_chance_is_not_named() -> None:
    """Images that are copies at each step: an earlier one that was better by chance is no advice;
    harm counts also where no unrelated prompt tells of a leak."""
    run = scored(copies=1.0, since_best=(-0.001, 0.5), best=100) | {"checkpoints": [100]}
    verdict = verdict_of(run)
    assert verdict is not None
    assert "Take an earlier step or a lower --learning_rate" in verdict.text
    run = scored(harm=0.6)
    for row in run["scores"]["rows"]:
        row["score"]["unrelated_leak"] = {"mean": None, "low": None}
    verdict = verdict_of(run)
    assert verdict is not None
    assert verdict.state == OVER


def test_advice_names_what_is_there() -> None:
    """The better step is named with its command where its checkpoint is left, and else with the
    flag that would have kept it."""
    run = record(SETTLED, 100, (0.05, 0.01))
    gone, there = verdict_of(run), verdict_of(run | {"checkpoints": [100, 400]})
    assert gone is not None
    assert there is not None
    assert "Step 100 was better, and no checkpoint of it is left (--keep_best" in gone.text
    assert "Take step 100 (sd-lora export out/checkpoint-100), or" in there.text


def test_too_little_is_no_verdict() -> None:
    """Records without a validation after the start, and records of another form, have no verdict
    and raise nothing."""
    odd: list[Any] = [{}, {"rows": "x"}, {"rows": [{}, {}], "base": 3}]
    short = record([1.0], 0)["validation"]
    found = [verdict_of({"validation": value, "changes": {}}) for value in (*odd, short)]
    assert found == [None] * 4
    assert numbers_of({}) == {}
