"""Numbers that are not sound are named, and nothing of the kind is saved."""

import json
import multiprocessing
import os
import re
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

import sd_lora
from sd_lora.adapters.inject import deltas_of
from sd_lora.config.schema import TrainConfig
from sd_lora.data.batches.stream import Batch, BatchItem
from sd_lora.errors import RunError
from sd_lora.findings import Finding
from sd_lora.folders import disown
from sd_lora.report.digest import Digest
from sd_lora.report.events import Warned
from sd_lora.report.log_file import LogFile
from sd_lora.training import loop, losses
from sd_lora.training.checkpoint_folders import checkpoints
from sd_lora.training.losses import LossLog
from sd_lora.training.run import Run
from sd_lora.training.setup import prepare
from sd_lora.training.soundness import refuse_ruined, tell_silent
from tests.training.runs import images, text_to_image


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images(tmp_path_factory.mktemp("data") / "images", 4)


def warnings(events: list[object], code: str) -> list[Finding]:
    told = [finding for e in events if isinstance(e, Warned) for finding in e.findings]
    return [finding for finding in told if finding.code == code]


def test_a_ruined_model_is_not_saved(tiny_sd1: Path, data: Path, tmp_path: Path) -> None:
    """A sound model passes, and is as it was: modes, gradients, random state. Factors with a NaN
    are refused by the module's name, and finite factors with which the loss is not finite by it."""
    config = text_to_image(
        tiny_sd1, data, tmp_path, train_text_encoder=True, lora_dropout=0.5, max_train_steps=1
    )
    run = prepare(config)
    modes = [module.training for model in run.models.values() for module in model.modules()]
    state = torch.get_rng_state()
    refuse_ruined(run, 1, loop.batch_loss)
    assert torch.equal(torch.get_rng_state(), state)
    assert modes == [m.training for model in run.models.values() for m in model.modules()]
    assert all(parameter.grad is None for parameter in run.parameters)
    name, delta = next(iter(deltas_of(run.models["text_encoder"]).items()))
    delta.lora_B.data[0, 0] = float("nan")
    with pytest.raises(RunError, match=rf"1 modules hold NaN .* step 1 \(text_encoder {name}"):
        refuse_ruined(run, 1, loop.batch_loss)
    delta.lora_B.data[0, 0] = 0
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_v"
    deltas_of(run.models["unet"])[name].lora_B.data.fill_(3e38)
    with pytest.raises(RunError, match="after step 1 the loss on images of this step is nan"):
        refuse_ruined(run, 1, loop.batch_loss)


@pytest.mark.parametrize(
    ("optimizer", "rate", "message"),
    [
        ("torch.optim.Adam", 1e38, "the update of step 1 is beyond float32"),
        ("adamw", 1e38, "modules hold NaN or infinite values after step 1"),
        ("adamw", 1e12, "after step 1 the loss .* is nan"),
    ],
)
def test_a_rate_that_ruins_the_last_step(
    optimizer: str, rate: float, message: str, tiny_sd1: Path, data: Path, tmp_path: Path
) -> None:
    """A run whose only step ruins the model ends with an error, and leaves neither checkpoint nor
    LoRA file."""
    config = text_to_image(
        tiny_sd1, data, tmp_path, optimizer=optimizer, learning_rate=rate, max_train_steps=1
    )
    with pytest.raises(RunError, match=message):
        sd_lora.train(config)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_skipped_steps(
    tiny_sd1: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With on_nan skip a step with a NaN gradient changes no factor and no moment, is told with its
    images, and has no row in the log; too many in a row end the run."""
    original, seen = loop.batch_loss, []
    bad = {2}

    def poisoned(run: Run, batch: object, step: int) -> torch.Tensor:
        loss = original(run, batch, step)
        if not torch.is_grad_enabled():  # the check before a save
            return loss
        moments = [state["exp_avg_sq"] for state in run.optimizer.state.values()]
        seen.append([tensor.detach().clone() for tensor in (*run.parameters, *moments)])
        return loss * float("nan") if step + 1 in bad else loss

    monkeypatch.setattr(loop, "batch_loss", poisoned)
    events: list[object] = []
    config = text_to_image(tiny_sd1, data, tmp_path, on_nan="skip", max_train_steps=4)
    result = sd_lora.train(config, [events.append])
    assert len(result.losses) == 3
    (told,) = warnings(events, "skipped-step")
    assert told.name == "step 2"
    assert "the loss became nan. Images of the step: " in told.text
    assert all(torch.equal(a, b) for a, b in zip(seen[1], seen[2], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(seen[2], seen[3], strict=True))
    bad |= {1, 2, 3, 4}
    monkeypatch.setattr(losses, "MOST_SKIPPED", 3)
    with pytest.raises(RunError, match="the loss became nan at step 3, as in the 2 before it"):
        sd_lora.train(config.replace(overwrite_output_dir=True))


def test_going_back(
    tiny_sd1: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With on_nan restore a run goes back to its last checkpoint, or to its start, and does the
    steps up to the bad one with the same images and captions and other noise; those after it are
    as ever. Resumed from before or after, it ends with the same digest. After three times in vain
    it ends, with the bad step in no checkpoint."""
    original = loop.batch_loss
    bad = {(1, 0), (5, 0)}  # step, draw of its noise
    items: dict[int, list[tuple[BatchItem, ...]]] = {}
    factors: dict[int, list[torch.Tensor]] = {}

    def poisoned(run: Run, batch: Batch, step: int) -> torch.Tensor:
        loss = original(run, batch, step)
        if not torch.is_grad_enabled():  # the check before a save, and the look back at the end
            return loss
        items.setdefault(step + 1, []).append(tuple(batch.items))
        found = torch.cat([p.detach().flatten().clone() for p in run.parameters])
        factors.setdefault(step + 1, []).append(found)
        draw = run.stream.draw_of(run.plan.epochs.micro_batch(step))
        return loss * float("nan") if (step + 1, draw) in bad else loss

    monkeypatch.setattr(loop, "batch_loss", poisoned)
    events: list[object] = []
    config = text_to_image(
        tiny_sd1, data, tmp_path, on_nan="restore", max_train_steps=8, checkpointing_steps=2,
        lora_dropout=0.3, lr_scheduler="cosine", targets="attention", train_batch_size=2,
    )  # fmt: skip

    def digest(config: TrainConfig) -> Digest:
        run = prepare(config, [events.append])
        run.restore()
        try:
            assert loop.train_steps(run, LossLog(run)) == 8
        finally:
            disown(run.output_dir)
        return run.digest()

    whole = digest(config)
    told = warnings(events, "went-back")
    assert [finding.name for finding in told] == ["step 1", "step 5"]
    assert "the loss became nan at step 1; back to the start, 1 of at most 3 times" in told[0].text
    assert "back to checkpoint-4, 2 of at most 3 times" in told[1].text
    assert [row["step"] for row in LogFile(tmp_path / "training_log.jsonl").rows()] == [
        *range(1, 9)
    ]
    assert {step: len(tries) for step, tries in items.items() if len(tries) > 1} == {
        1: 2, 2: 2, 5: 2, 6: 2,  # found when the checkpoint of the second of them was due
    }  # fmt: skip
    for step in (1, 5):
        assert torch.equal(*factors[step])
    changed = {
        step: [replace(a, address=b.address) == b and a != b for a, b in zip(*tries, strict=True)]
        for step, tries in items.items() if len(tries) > 1
    }  # fmt: skip
    assert all(all(changed[step]) for step in (1, 5))
    for step in (2, 6):
        assert items[step][0] == items[step][1]
    for step in (4, 6):  # before the second return, which happens again, and after it
        latest = config.replace(resume_from_checkpoint=f"checkpoint-{step}")
        assert digest(latest) == whole
    bad |= {(3, draw) for draw in range(9)}
    with pytest.raises(
        RunError, match=r"nan at step 3: .*Images of .* It went back 3 times before"
    ):
        digest(config.replace(output_dir=str(tmp_path / "in vain")))
    assert [path.name for path in checkpoints(tmp_path / "in vain")] == ["checkpoint-2"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_two_processes_go_back_as_one(
    tiny_sd1: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers of one process alone that are not finite send both back, to the start and to a
    checkpoint: the data and, to 1e-5, the losses are those of one process with the whole batch."""
    original = loop.batch_loss

    def poisoned(run: Run, batch: Batch, step: int) -> torch.Tensor:
        draw = run.stream.draw_of(run.plan.epochs.micro_batch(step))
        last = run.accelerator.process_index == run.accelerator.num_processes - 1
        bad = torch.is_grad_enabled() and last and (step, draw) in {(0, 0), (2, 0)}
        return original(run, batch, step) * (float("nan") if bad else 1)

    monkeypatch.setattr(loop, "batch_loss", poisoned)
    config = text_to_image(
        tiny_sd1, data, tmp_path / "one", on_nan="restore", max_train_steps=4, train_batch_size=2,
        checkpointing_steps=2, targets="attention",
    )  # fmt: skip
    of_two = config.replace(output_dir=str(tmp_path / "two"), train_batch_size=1)

    def process(rank: int, port: int) -> None:
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
        os.environ |= {name: str(value) for name, value in own.items()}
        AcceleratorState._reset_state(reset_partial_state=True)
        sd_lora.train(of_two)
        os._exit(0)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=process, args=(rank, port)) for rank in range(2)]
    for started in processes:
        started.start()
    events: list[object] = []
    sd_lora.train(config, [events.append])
    for started in processes:
        started.join(60)
    assert [started.exitcode for started in processes] == [0, 0]
    told = [finding.text for finding in warnings(events, "went-back")]
    assert [re.search(r"back to (\S+ ?\S+), \d of", text)[1] for text in told] == [
        "the start", "checkpoint-2",
    ]  # fmt: skip
    places = (tmp_path / "one", tmp_path / "two")
    one, two = (json.loads((place / "digest.json").read_bytes())["data"] for place in places)
    assert one == two
    one, two = ([r["loss"] for r in LogFile(p / "training_log.jsonl").rows()] for p in places)
    assert len(one) == 4
    assert one == pytest.approx(two, rel=1e-5)


def test_modules_without_a_gradient(tiny_sd1: Path, data: Path, tmp_path: Path) -> None:
    """In the first step B alone has a gradient, and that is no warning; a module of which no factor
    has one is named."""
    events: list[object] = []
    config = text_to_image(
        tiny_sd1, data, tmp_path, train_text_encoder=True, targets="attention+conv"
    )
    run = prepare(config)
    run.emit = events.append
    loop.accumulate(run, 0, run.stream.batch(0), 0)
    tell_silent(run, 0)
    assert not events
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    delta = deltas_of(run.models["unet"])[name]
    delta.lora_B.grad.zero_()
    delta.lora_A.grad = None
    tell_silent(run, 0)
    (told,) = warnings(events, "no-gradient")
    assert f"1 of 112 trained modules have no gradient: unet {name}; they cannot" in told.text


def test_a_loss_scale_that_falls_for_ever(tiny_sd1: Path, data: Path, tmp_path: Path) -> None:
    """fp16's loss scale below 1e-4, after 30 overflows in a row, is reported with the remedy."""
    run = prepare(text_to_image(tiny_sd1, data, tmp_path))
    log = LossLog(run)
    for scale, ends in ((1.0, False), (1e-5, True)):
        run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        run.accelerator.scaler.scale(torch.ones(1))
        log.add(1, torch.ones(()), torch.tensor(float("inf")))
        if not ends:
            log.flush()
            continue
        with pytest.raises(RunError, match=r"has fallen to 1\.0e-05 at step 1.*Take bf16"):
            log.flush()
