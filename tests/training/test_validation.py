"""Validation and ledger: they compare, choose their images by content, and change nothing."""

import json
import math
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

import sd_lora
from sd_lora.data.batches.stream import BatchItem
from sd_lora.data.images.buckets import Crop
from sd_lora.errors import UsageError
from sd_lora.report.events import TrainingStarted, Warned
from sd_lora.report.intervals import interval
from sd_lora.terminal import Terminal
from sd_lora.training.checkpoint_folders import find
from sd_lora.training.ledger import BY_HEART, FIGHTS, MOST_SHOWN, Ledger
from sd_lora.training.scores import difference, merit
from sd_lora.training.setup import prepare
from sd_lora.training.state_files import read_state
from sd_lora.training.validation import HELD_OUT, NUM_ITEMS, TRAINED, hold_out
from tests.training.runs import images, text_to_image

SHORT = {
    "targets": "attention", "rank": 2, "max_train_steps": 4, "lora_dropout": 0.3, "use_ema": True,
    "train_text_encoder": True, "checkpointing_steps": 2, "train_batch_size": 2,
}  # fmt: skip


ENCODER = Path(__file__).parents[2] / "sample_data" / "encoder"
SCORED = {"score_features": str(ENCODER), "score_every": 4, "validation_steps": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images(tmp_path_factory.mktemp("data") / "images", 5)


def test_it_changes_nothing_and_resumes(tiny_sd1: Path, data: Path, tmp_path: Path) -> None:
    """With and without validation, log, digest and LoRA files are the same bytes, dropout, average
    and a trained text encoder included; the base's line is that of step 0, and the trained model's
    another. A run resumed in its middle ends with the validation, scores and ledger of the
    undisturbed one.
    """
    for name, every in (("without", 0), ("with", 1), ("again", 1)):
        folder = tmp_path / name / "same"
        more = {"resume_from_checkpoint": str(tmp_path / "with/same/checkpoint-2")}
        changes = SHORT | {"validate_every": every} | (more if name == "again" else {})
        changes |= SCORED if every else {}
        sd_lora.train(text_to_image(tiny_sd1, data, folder, **changes))
    with_it, without, again = (tmp_path / name / "same" for name in ("with", "without", "again"))
    log = (with_it / "training_log.jsonl").read_bytes()
    assert log == (without / "training_log.jsonl").read_bytes()
    digests = {(folder / "digest.json").read_bytes() for folder in (with_it, without, again)}
    assert len(digests) == 1
    for name in ("pytorch_lora_weights.safetensors", "same_kohya.safetensors"):
        tensors = [(folder / name).read_bytes()[-20_000:] for folder in (with_it, without)]
        assert tensors[0] == tensors[1]
    states = [read_state(folder / "checkpoint-4") for folder in (with_it, again)]
    assert states[0]["validation"] == states[1]["validation"]
    assert states[0]["scores"] == states[1]["scores"]
    ledgers = [state["ledger"] for state in states]
    assert torch.equal(*(ledger["seen"] for ledger in ledgers))
    assert all(map(torch.equal, *(ledger["tables"] for ledger in ledgers)))
    assert sum(ledgers[0]["seen"].tolist()) == 2 + 2 + 1 + 2
    records = [json.loads((f / "report.json").read_text()) for f in (with_it, without, again)]
    record = records[0]["validation"]
    assert record == records[2]["validation"]
    assert records[0]["scores"] == records[2]["scores"]
    assert [row["step"] for row in records[0]["scores"]["rows"]] == [0, 4]
    sheets = sorted(path.name for path in (with_it / "samples").glob("score-000004*"))
    assert sheets == ["score-000004-subject.png", "score-000004-unrelated.png"]
    assert not records[1].get("scores")
    assert not records[1].get("validation")
    assert [row["step"] for row in record["rows"]] == [0, 1, 2, 3, 4]
    assert record["rows"][0][TRAINED] == record["base"][TRAINED]
    assert record["rows"][-1][TRAINED]["loss"] != record["base"][TRAINED]["loss"]
    levels = record["base"][TRAINED]["levels"]
    assert sum(levels) / len(levels) == pytest.approx(record["base"][TRAINED]["loss"])
    page = (with_it / "report.html").read_text()
    assert "base model, trained images" in page
    assert (
        "11 images of the same prompts and seeds each time, measured by encoder of drawings" in page
    )


def test_held_out_images_are_chosen_by_content(tiny_sd1: Path, data: Path, tmp_path: Path) -> None:
    """One of five images is measured at each part of the timesteps and not trained; in any order
    of the files the same one, with all its copies. None left to train is an error."""
    run = prepare(text_to_image(tiny_sd1, data, tmp_path / "out", holdout=1))
    assert run.images.held_out is not None
    (held,) = run.images.held_out.set.samples
    told = [finding.name for finding in run.images.findings if finding.code == "held-out"]
    assert told == [held.name]
    samples = run.images.instances.samples
    assert len(samples) == 4
    assert held.digest not in {sample.digest for sample in samples}
    items = run.validation.items
    assert [len(items[group]) for group in (TRAINED, HELD_OUT)] == [NUM_ITEMS] * 2
    timesteps = run.validation.timesteps
    assert [t * NUM_ITEMS // 1000 for t in timesteps] == [*range(NUM_ITEMS)]
    pairs = [(sample, (64, 64)) for sample in (*samples, held, held)]
    for seed in range(5):
        random.Random(seed).shuffle(pairs)
        assert [sample.digest for sample, _ in hold_out(pairs, 1)[1]] == [held.digest] * 2
    with pytest.raises(UsageError, match="holdout 5 leaves none of 5 different images"):
        hold_out(pairs, 5)
    run.accelerator.free_memory()


def test_the_interval_is_of_pairs() -> None:
    """Losses of a tenfold spread that all fall by 1 % ± 0.1 %: the interval is that of the paired
    differences, by hand."""
    before = [10.0**i for i in range(-2, 2)]
    now = [b - 0.01 - 0.001 * (-1) ** i for i, b in enumerate(before)]
    mean, half = interval(now, before)
    assert mean == pytest.approx(-0.01)
    assert half == pytest.approx(3.182 * 0.001 * math.sqrt(4 / 3) / 2)


def losses_of(steps: int) -> list[tuple[list[BatchItem], torch.Tensor, torch.Tensor]]:
    """Steps of two of ten images whose losses span a hundredfold by timestep and halve over the
    run; image 3 keeps its loss, image 7 falls to a quarter."""
    rng = random.Random(0)
    crop = Crop((8, 8), (8, 8), (0, 0), (8, 8))
    found = []
    for step in range(steps):
        drawn = [rng.randrange(1000) for _ in range(2)]
        chosen = [rng.randrange(10) for _ in range(2)]
        items = [BatchItem((0,), "instance", i, None, False, crop, 1.0, (0, 2)) for i in chosen]
        halvings = [{3: 0.0, 7: 2.0}.get(i, 1.0) * step / steps for i in chosen]
        losses = [
            (1 + i) * 10 ** (-2 * t / 1000) * 0.5**h * math.exp(rng.gauss(0, 0.3))
            for i, t, h in zip(chosen, drawn, halvings, strict=True)
        ]
        values = torch.tensor(losses)
        found.append((items, values, torch.tensor(drawn)))
    return found


def test_the_ledger_names_the_odd_images() -> None:
    """Of ten images of other levels whose losses fall alike, the one that does not fall and the one
    that falls twice as far are named, and no other; reading each step alone or 100 at once gives
    the same numbers to the bit."""
    found = []
    for every in (1, 100):
        ledger = Ledger([f"{i}.png" for i in range(10)], (0, 1000), 5)
        for step, (items, losses, t) in enumerate(losses_of(3000)):
            ledger.add(step, items, losses, t)
            if (step + 1) % every == 0:
                ledger.flush(Accelerator(), step + 1)
        assert len(ledger.tables) <= 16
        found.append(ledger)
    assert all(map(torch.equal, *(ledger.tables for ledger in found)))
    assert found[0].means == found[1].means
    assert sum(found[0].seen.tolist()) == 6000
    named = {row["name"]: row["finding"] for row in found[0].record()}
    assert len(named) == 10
    odd = {name: finding for name, finding in named.items() if finding}
    assert odd == {"3.png": FIGHTS, "7.png": BY_HEART}


def test_a_silent_ledger_has_its_images() -> None:
    """Two images, or ten in fewer than four windows, are not compared and yet told with the times
    that they were seen and the losses of their windows; of more than are told, those that are
    compared come first."""
    few, early = (
        Ledger(["a.png", "b.png"], (0, 1000), 5),
        Ledger([*map(str, range(10))], (0, 1000), 9),
    )
    for step, (items, losses, t) in enumerate(losses_of(27)):
        early.add(step, items, losses, t)
        of_two = [replace(item, index=item.index % 2) for item in items]
        few.add(step, of_two, losses, t)
    for ledger, windows in ((few, 6), (early, 3)):
        ledger.flush(Accelerator(), 27)
        rows = ledger.record()
        assert [row["index"] for row in rows] == [*range(len(ledger.names))]
        assert sum(row["seen"] for row in rows) == 54
        assert {(row["loss"], row["change"], row["finding"]) for row in rows} == {(None, None, "")}
        assert {len(row["windows"]) for row in rows} == {windows}
    many = Ledger([f"{i}" for i in range(MOST_SHOWN + 50)], (0, 1000), 5)
    for step, (items, losses, t) in enumerate(losses_of(600)):
        many.add(step, [replace(item, index=item.index + 220) for item in items], losses, t)
    many.flush(Accelerator(), 600)
    rows = many.record()
    assert len(rows) == MOST_SHOWN
    assert {row["index"] for row in rows[:10]} == {*range(220, 230)}
    assert all(row["loss"] for row in rows[:10])
    assert [row["index"] for row in rows[10:]] == [*range(MOST_SHOWN - 10)]


def test_a_run_ends_early_at_its_best(
    tiny_sd1: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run whose rate ruins it after two good steps ends by its patience, and its LoRA file and
    digest are those of a run of its best step; the best checkpoint outlives a limit of one, and is
    named for resuming. Terminal and page say when it ended, and of which step the files are.
    Started again, it writes the same file, and trains no step; where the best checkpoint is gone, a
    warning says that the files are of the last one."""
    rules = {
        "learning_rate": 1e-3, "lr_scheduler": "piecewise_constant",
        "lr_step_rules": "1:2,1000:6,1", "validate_every": 1, "targets": "attention", "rank": 2,
    }  # fmt: skip
    folder = tmp_path / "early" / "same"
    patient = {"early_stopping_patience": 2, "checkpoints_total_limit": 1}
    config = text_to_image(tiny_sd1, data, folder, **rules, **patient, max_train_steps=12)
    with Terminal() as terminal:
        result = sd_lora.train(config, [terminal])
    best = json.loads((folder / "best.json").read_text())["step"]
    assert 1 <= best <= 3
    measured = json.loads((folder / "report.json").read_text())["validation"]
    assert measured["rows"][-1]["step"] == best + 2
    assert measured["exported"] == best
    early = f"ended early after step {best + 2}: nothing better since step {best}, of which the"
    assert early in (folder / "report.html").read_text()
    assert early in capsys.readouterr().out
    kept = sorted(path.name for path in folder.glob("checkpoint-*"))
    assert kept == sorted(f"checkpoint-{step}" for step in (best, best + 2))
    assert find(folder, "best").path == folder / f"checkpoint-{best}"
    short = tmp_path / "short" / "same"
    whole = sd_lora.train(text_to_image(tiny_sd1, data, short, **rules, max_train_steps=best))
    assert result.digest == whole.digest
    again = sd_lora.train(config.replace(resume_from_checkpoint="latest"))
    assert again.digest == whole.digest
    assert again.losses == []
    shutil.rmtree(folder / f"checkpoint-{best}")
    events: list[object] = []
    lost = sd_lora.train(config.replace(resume_from_checkpoint="latest"), [events.append])
    codes = [f.code for e in events if isinstance(e, Warned) for f in e.findings]
    assert codes == ["best-gone"]
    assert lost.digest != whole.digest


def test_a_run_ends_early_by_its_scores(tiny_sd1: Path, data: Path, tmp_path: Path) -> None:
    """With features the merit of the images decides: the files are those of the step that has the
    most, the run ends after its patience, and best.json says the merit that the record has."""
    rules = {
        "learning_rate": 1e-3, "lr_scheduler": "piecewise_constant", "targets": "attention",
        "lr_step_rules": "1:2,1000:9,1", "rank": 2, **SCORED, "score_every": 1, "validate_every": 3,
    }  # fmt: skip
    folder = tmp_path / "early" / "same"
    config = text_to_image(
        tiny_sd1, data, folder, **rules, early_stopping_patience=2, max_train_steps=9
    )
    result = sd_lora.train(config)
    record = json.loads((folder / "report.json").read_text())
    assert record["spent"].keys() == {"training", "validation", "scores"}
    merits = {row["step"]: row["merit"] for row in record["scores"]["rows"]}
    best = max(merits, key=merits.__getitem__)
    assert 0 < best <= 7
    assert max(merits) == best + 2
    assert record["scores"]["exported"] == record["scores"]["best"] == best
    told = json.loads((folder / "best.json").read_text())
    assert (told["step"], told["merit"]) == (best, pytest.approx(merits[best]))
    assert record["peak_bytes"] > 2**20
    assert record["early"].startswith(f"ended early after step {best + 2}: ")
    short = tmp_path / "short" / "same"
    plain = {name: value for name, value in rules.items() if name not in SCORED}
    whole = sd_lora.train(text_to_image(tiny_sd1, data, short, **plain, max_train_steps=best))
    assert result.digest == whole.digest


def test_features_that_cannot_serve_are_told_early(
    tiny_sd1: Path, data: Path, tmp_path: Path
) -> None:
    """A folder without a vision model, and images without a caption, are told before a step; the
    first before the base model is loaded."""
    empty = tmp_path / "empty"
    empty.mkdir()
    config = text_to_image(tiny_sd1, data, tmp_path / "out", **SCORED)
    events: list[object] = []
    with pytest.raises(UsageError, match="score_features: .*holds no config.json"):
        sd_lora.train(config.replace(score_features=str(empty)), [events.append])
    (empty / "config.json").write_text('{"model_type": "dinov2"')
    with pytest.raises(UsageError, match="cannot be opened as a vision model: "):
        sd_lora.train(config.replace(score_features=str(empty)), [events.append])
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(data / "0.png", bare)
    (bare / "metadata.jsonl").write_text('{"file_name": "0.png", "text": ""}')
    with pytest.raises(UsageError, match="no image has one"):
        sd_lora.train(config.replace(train_data_dir=str(bare)), [events.append])
    assert not any(isinstance(e, TrainingStarted) for e in events)


def test_scores_of_another_kind_are_left_out(tiny_sd1: Path, data: Path, tmp_path: Path) -> None:
    """A run that is resumed with scores of another kind, or with its first ones between two, begins
    them anew and does not compare the two. Where images are scored the best checkpoint is kept,
    with no validation and no option, and not where the option says so."""
    rules = {"targets": "attention", "rank": 2, "checkpointing_steps": 2, "validate_every": 0}
    config = text_to_image(tiny_sd1, data, tmp_path / "run", **rules, max_train_steps=2)
    assert not config.keeps_best
    config = config.replace(**SCORED | {"score_every": 1})
    sd_lora.train(config)
    assert (tmp_path / "run" / "best.json").is_file()
    assert config.keeps_best
    assert not config.replace(keep_best=False).keeps_best
    more = {"max_train_steps": 4, "resume_from_checkpoint": "latest"}
    for number, changes in enumerate(
        ({"score_class_prompt": "a photo of a thing"}, {"score_kind": "style"}, {"score_every": 3})
    ):
        place = shutil.copytree(tmp_path / "run", tmp_path / f"again{number}")
        sd_lora.train(config.replace(output_dir=str(place), **more | changes))
        record = json.loads((place / "report.json").read_text())["scores"]
        steps = [row["step"] for row in record["rows"]]
        assert steps == ([0, 1, 2, 3, 4] if "score_every" in changes else [2, 3, 4])
        assert len(record["since_three_quarters"]) == 2


def test_the_difference_of_merits_is_of_pairs() -> None:
    """Means of each measure with its sign; images that differ among each other and not from one
    step to the other leave no doubt; the doubts of the measures add up as those of independent
    means; a measure without images counts nothing."""
    before = {"fidelity": [0.1, 0.9], "unrelated_leak": [], "harm": [0.0, 0.4]}
    now = {"fidelity": [0.2, 1.0], "unrelated_leak": [], "harm": [0.1, 0.7]}
    assert merit(before) == pytest.approx(0.5 - 0.2)
    mean, half = difference(now, before)
    assert mean == pytest.approx(0.1 - 0.2)
    assert half == pytest.approx(
        12.706 * 0.1
    )  # harms differ by 0.1 and 0.3, fidelities by 0.1 twice
