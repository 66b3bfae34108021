"""The bench of learning: its lessons, its cells, and the arithmetic of its table."""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "dev"), str(ROOT / "benchmarks")]


def test_every_cell_is_a_run_that_can_be_trained(tmp_path: Path) -> None:
    """Each row makes a configuration of each lesson; a row's changes are in it where they mean
    something for the lesson, and the images are in its folder."""
    import learning

    for row in learning.ROWS:
        for name, lesson in learning.LESSONS.items():
            work = tmp_path / row / name
            config = learning.config_of(learning.Cell(row, name, 4, 1), tmp_path, work)
            kept = learning.changes(row, lesson)
            assert {k: getattr(config, k) for k in kept} == kept
            assert config.seed == 1
            assert len([*(work / "images").glob("*.png")]) == 4


def test_lessons_hold_nothing_out_that_is_trained() -> None:
    """The images of a lesson are the same at every call; none of the held-out images is among 30
    that are trained on, nor twice among them, and there is a prompt for each kind."""
    import learning

    for lesson in learning.LESSONS.values():
        trained = [np.asarray(image).tobytes() for image, _ in lesson.images(30)]
        held_out = [np.asarray(image).tobytes() for image in lesson.held_out]
        assert trained[:4] == [np.asarray(image).tobytes() for image, _ in lesson.images(4)]
        assert len({*trained, *held_out}) == 38
        prompts = lesson.prompts
        assert (len(prompts.subject), len(prompts.unrelated)) == (6, 6)
        assert len(prompts.of_class) == (4 if lesson.way else 6)
        assert all(lesson.word in text for text in prompts.subject)
        assert not any("sks" in t or "ohwx" in t for t in (*prompts.of_class, *prompts.unrelated))


def test_a_cell_runs_and_its_images_are_scored_anew(tmp_path: Path, monkeypatch) -> None:
    """Two steps of training, and one sampler step of one set of images: a cell's line, sheet and
    images are there, nothing is missing then but the cell of as many steps as its row says, and a
    score from the images on disk is that of the run, to the last digit."""
    import argparse

    import cells
    import learning

    from sd_lora.sampling.features import load_features

    monkeypatch.setattr(cells, "SAMPLER_STEPS", 1)
    monkeypatch.setattr(cells, "SETS", 1)
    monkeypatch.setitem(learning.OF_SUBJECT, "num_class_images", 4)
    cell = learning.Cell("recipe", "mascot", 4, 0, steps=2)
    features = load_features(learning.SAMPLE_DATA / "encoder")
    line = learning.run_cell(cell, tmp_path, features)
    assert (tmp_path / "sheets" / f"{cell.name}.png").is_file()
    assert not (tmp_path / "work" / cell.name).exists()
    args = argparse.Namespace(
        out=tmp_path, rows=["recipe"], lessons=["mascot"], images=[4], seeds=[0], steps=2
    )
    assert [*learning.missing(args)] == []
    rows_own = argparse.Namespace(**vars(args) | {"steps": None})
    assert [*learning.missing(rows_own)] == [learning.Cell("recipe", "mascot", 4, 0)]
    shown = argparse.Namespace(**vars(args), file=tmp_path / "picture.png", all=True)
    learning.write_picture(shown)
    with Image.open(shown.file) as picture:
        assert picture.height > 3 * 128  # what was trained on, the base, and what the LoRA draws
    damaged = line | {"score": {}}
    (tmp_path / "cells.jsonl").write_text(json.dumps(damaged) + "\n")
    learning.rescore(tmp_path, features)
    (again,) = learning.done_cells(tmp_path)
    assert again == json.loads(json.dumps(line))


def test_the_bench_goes_on_and_the_table_counts(tmp_path: Path) -> None:
    """A torn last line is a cell to do again. Means and intervals are Student's, and differences
    from the first row are taken pair by pair: an offset that is the same in all pairs has none."""
    import argparse

    import learning

    def line(row: str, seed: int, fidelity: float) -> str:
        score = {name: {"mean": 0.0} for name in (*learning.MEASURES, "copies")}
        score |= {"fidelity": {"mean": fidelity}, "reachable": 0.8}
        cell = vars(learning.Cell(row, "mascot", 8, seed))
        return json.dumps(cell | {"cpu_seconds": 60.0, "score": score}) + "\n"

    lines = [line("recipe", seed, f) for seed, f in enumerate((0.7, 0.8, 0.9))]
    lines += [line("ema", seed, f) for seed, f in enumerate((0.75, 0.85))]
    (tmp_path / "cells.jsonl").write_text("".join(lines) + line("ema", 2, 0.95)[:40])
    args = argparse.Namespace(
        out=tmp_path,
        rows=["recipe", "ema"],
        lessons=["mascot"],
        images=[8],
        seeds=[0, 1, 2],
        steps=None,
    )
    assert [*learning.missing(args)] == [learning.Cell("ema", "mascot", 8, 2)]
    table = learning.table(learning.done_cells(tmp_path))
    assert "| recipe | mascot | 3 | 80 ± 25 | 100 ± 31 |  |" in table  # 4.303 · 0.1 / √3
    assert "| ema | mascot | 2 | 80 ± 64 | 100 ± 79 | 5 ± 0 |" in table  # 12.706 · 0.0707 / √2
