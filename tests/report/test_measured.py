"""The curves of validation and scores have the numbers of the record."""

from typing import Any

import pytest

from sd_lora.report.measured import by_step, by_timestep, scores_by_step


def group(loss: float | None, *levels: float | None) -> dict[str, Any]:
    """The losses of a group of images, as `report.json` has them."""
    return {"loss": loss, "levels": list(levels)}


VALIDATION = {
    "judged_by": "held out",
    "timesteps": [[0, 99], [100, 399], [400, 999]],
    "base": {"trained": group(0.5, 0.9, 0.4, 0.2), "held out": group(0.6, 1.0, 0.5, 0.3)},
    "rows": [
        {"step": 0, "trained": group(0.5, 0.9, 0.4, 0.2), "held out": group(0.6, 1.0, 0.5, 0.3)},
        {"step": 20, "trained": group(0.3, 0.7, 0.2, 0.0), "held out": group(0.4, 0.8, 0.3, 0.1)},
        {"step": 40, "trained": group(None, None, 0.1, 0.0), "held out": group(0.7, 1.5, 0.4, 0.2)},
    ],
}


def test_losses_by_step() -> None:
    """Each group has its loss at each step, None where it was not finite, and the base's as a line
    of as many points."""
    assert by_step(VALIDATION) == {
        "step": [0, 20, 40],
        "trained images": [0.5, 0.3, None],
        "base model, trained images": [0.5, 0.5, 0.5],
        "images held out": [0.6, 0.4, 0.7],
        "base model, images held out": [0.6, 0.6, 0.6],
    }


@pytest.mark.parametrize(
    ("more", "name", "levels"),
    [
        ({}, "after 40 steps", [1.5, 0.4, 0.2]),
        ({"exported": 20}, "after 20 steps", [0.8, 0.3, 0.1]),
        ({"judged_by": "trained"}, "after 40 steps", [None, 0.1, 0.0]),
    ],
)
def test_losses_by_timestep(more: dict[str, Any], name: str, levels: list[float | None]) -> None:
    """The levels are those of the exported step, else of the last one, of the group that is
    compared, over the middle of each part of the timesteps; beside them the base's."""
    record = VALIDATION | more
    assert by_timestep(record) == {
        "timestep": [49.5, 249.5, 699.5],
        name: levels,
        "base model": record["base"][record["judged_by"]]["levels"],
    }


def row(step: int, merit: float, **score: dict[str, float | None]) -> dict[str, Any]:
    """A row of the scores."""
    return {"step": step, "merit": merit, "score": score}


SCORES = {
    "features": "dinov2", "blind": "reads no text", "images": 18, "best": 10,
    "rows": [
        row(0, -0.125, fidelity={"mean": 0.0, "low": None, "high": None}, harm={"mean": None}),
        row(
            10, 0.5, fidelity={"mean": 0.75, "low": 0.5, "high": 1.0}, harm={"mean": None},
            drift={"mean": 0.25},
        ),
    ],
}  # fmt: skip


def test_scores_by_step() -> None:
    """Means are in percent, with half of the interval where a step has one; a measure that features
    do not tell at any step is no curve, one that a step lacks is None there. The sign of the merit
    stays."""
    assert scores_by_step(SCORES) == {
        "step": [0, 10],
        "fidelity": [0.0, 75.0],
        "fidelity ±": [None, 25.0],
        "drift": [None, 25.0],
        "merit": [-12.5, 50.0],
    }


@pytest.mark.parametrize(
    ("read", "record", "broken"),
    [
        (by_step, VALIDATION, {"rows": []}),
        (by_step, VALIDATION, {"rows": [{"step": "<b>", "trained": group(0.1)}]}),
        (by_timestep, VALIDATION, {"exported": 30}),
        (by_timestep, VALIDATION, {"judged_by": "class images"}),
        (scores_by_step, SCORES, {"rows": []}),
        (scores_by_step, SCORES, {"rows": [row(0, 0.1, harm={"mean": "a lot"})]}),
    ],
)
def test_a_record_of_another_form_has_no_curves(
    read: Any, record: dict[str, Any], broken: dict[str, Any]
) -> None:
    """Rows that are missing, a step that has none, an unknown group and words in the place of
    numbers give nothing, and no error; without these the record has curves."""
    assert read(record)
    assert read(record | broken) == {}
