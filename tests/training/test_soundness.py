"""Numbers that are not sound are named, and nothing of the kind is saved."""

from pathlib import Path

import pytest
import torch

import sd_lora
from sd_lora.adapters.inject import deltas_of
from sd_lora.errors import RunError
from sd_lora.findings import Finding
from sd_lora.report.events import Warned
from sd_lora.training import loop, losses
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
    ("rate", "message"),
    [(1e38, "the update of step 1 is beyond float32"), (1e12, "after step 1 the loss .* is nan")],
)
def test_a_rate_that_ruins_the_last_step(
    rate: float, message: str, tiny_sd1: Path, data: Path, tmp_path: Path
) -> None:
    """A run whose only step ruins the model ends with an error, and leaves neither checkpoint nor
    LoRA file."""
    config = text_to_image(tiny_sd1, data, tmp_path, learning_rate=rate, max_train_steps=1)
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


def test_modules_without_a_gradient(tiny_sd1: Path, data: Path, tmp_path: Path) -> None:
    """In the first step B alone has a gradient, and that is no warning; a module of which no factor
    has one is named."""
    events: list[object] = []
    config = text_to_image(tiny_sd1, data, tmp_path, train_text_encoder=True)
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
