"""The forecast of a run: its rows, and warnings on settings that will not do as meant."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import sd_lora
from sd_lora import terminal
from sd_lora.check import Checked, check
from sd_lora.config.command_line import parse
from sd_lora.config.presets import preset
from sd_lora.config.rows import PRESETS, SCHEDULES
from sd_lora.config.schema import RunConfig, TrainConfig
from sd_lora.errors import UsageError
from sd_lora.report.events import Event, Warned
from sd_lora.training.forecast import USUAL_WIDTH, warnings_of
from sd_lora.training.lr_schedules import build_lr_scheduler
from sd_lora.training.plan import Plan
from sd_lora.training.processes import Device, chosen_precision
from sd_lora.training.setup import prepare
from tests.training.runs import dreambooth, images, text_to_image

CPU = Device("cpu", "no")


@pytest.fixture(scope="module")
def checked(tiny_sd1: Path, tmp_path_factory: pytest.TempPathFactory) -> Checked:
    """A DreamBooth run of 11 images, as the launch script plans it without a length."""
    folder = tmp_path_factory.mktemp("set")
    words = dreambooth(tiny_sd1, images(folder / "data", 11), folder / "out", train_batch_size=4)
    config = words.replace(max_train_steps=None, num_train_epochs=1)
    return check(config, page=False)


@pytest.mark.parametrize(
    ("option", "idle", "works"),
    [
        ("multires_noise_iterations", {"multires_noise_iterations": 1},
         {"multires_noise_iterations": 2}),
        ("immiscible_noise", {"immiscible_noise": 1}, {"immiscible_noise": 2}),
        ("stratified_timesteps", {"stratified_timesteps": True, "train_batch_size": 1},
         {"stratified_timesteps": True, "train_batch_size": 1, "gradient_accumulation_steps": 2}),
    ],
)  # fmt: skip
def test_noise_and_timesteps_that_change_nothing_are_told(
    checked: Checked, option: str, idle: dict[str, Any], works: dict[str, Any]
) -> None:
    """Values without effect are named with the reason, and those beside them are not."""
    for options, wanted in ((idle, [option]), (works, [])):
        found = warnings_of(changed(checked.plan, **options), CPU, USUAL_WIDTH)
        assert [f.name for f in found if f.code == "no-effect"] == wanted


def changed(plan: Plan, **options: object) -> Plan:
    """A plan with other options; its number of steps too, where they name it."""
    config = plan.config.replace(**options)
    assert isinstance(config, RunConfig)
    return Plan.of(config, plan.images, 1)


def test_a_warning_says_that_the_rate_is_never_reached(checked: Checked) -> None:
    """For all schedules, warm-ups (steps and shares) and lengths: the warning is there if and only
    if no step of the schedule has the rate that was asked for; it names the highest one. Points of
    a file, and rules, have no warm-up but what they say."""
    rate, told = 1e-4, 0
    for schedule in SCHEDULES.keys() - {"points", "piecewise_constant"}:
        for warmup in (0, 1, 5, 6, 7, 500, 0.1, 0.5, 0.95):
            for steps in (1, 6, 30):
                options = {"lr_scheduler": schedule, "lr_warmup_steps": warmup}
                plan = changed(checked.plan, **options, max_train_steps=steps, learning_rate=rate)
                optimizer = torch.optim.SGD([torch.zeros(1)], lr=rate)
                scheduler = build_lr_scheduler(optimizer, plan.config, steps)
                rates = []
                for _ in range(steps):
                    rates.append(optimizer.param_groups[0]["lr"])
                    optimizer.step()
                    scheduler.step()
                found = [
                    f for f in warnings_of(plan, CPU, USUAL_WIDTH) if f.code == "warmup-too-long"
                ]
                assert bool(found) == (max(rates) < rate * (1 - 1e-9)), (options, steps, rates)
                if found:
                    told += 1
                    assert f"rises to {max(rates):.2g} " in found[0].text
    assert told > 20


@pytest.mark.parametrize(
    ("options", "device", "code", "words"),
    [
        ({"num_train_epochs": 1}, CPU, "few-steps", ("3 steps", "275", "--steps 275")),
        ({"num_train_epochs": 7}, CPU, None, ()),
        ({"num_train_epochs": 7, "learning_rate": 1e-4}, CPU, "few-steps", ("21 steps", "0.0001")),
        ({"learning_rate": 1e-4}, CPU, "narrow-base", ("320 channels", "has 48", "--lr 2e-3")),
        ({"lr_warmup_steps": 100}, CPU, "no-effect", ("100", "constant", "constant_with_warmup")),
        ({"lr_warmup_steps": 0}, CPU, None, ()),
        ({"train_batch_size": 6, "gradient_accumulation_steps": 2}, CPU, "batch-above-set",
         ("12 images", "has 11")),
        ({"train_batch_size": 11}, CPU, None, ()),
        ({"allow_tf32": True}, CPU, "gpu-option", ("allow_tf32", "no effect")),
        ({"optimizer": "adamw8bit"}, CPU, "gpu-option", ("optimizer", "0.50")),
        ({"allow_tf32": True, "optimizer": "adamw8bit"}, Device("cuda", "fp16", "L4"), None, ()),
        ({}, Device("cpu", "fp16"), "fp16-on-cpu", ("float32", "--mixed_precision no")),
        ({}, Device("cpu", "bf16"), None, ()),
        ({}, Device("cpu", "no", "", "nvidia-smi"), "card-not-seen", ("nvidia-smi",)),
    ],
)  # fmt: skip
def test_each_warning_has_its_cause_and_numbers(
    checked: Checked, options: dict, device: Device, code: str | None, words: tuple[str, ...]
) -> None:
    """Each setting gives its warning and no other, with its numbers and remedy; its neighbour, a
    right one, gives none."""
    length = {} if "num_train_epochs" in options else {"max_train_steps": 100}
    plan = changed(checked.plan, **length, **options)
    found = warnings_of(plan, device, 48 if code == "narrow-base" else USUAL_WIDTH)
    assert [finding.code for finding in found] == [code] * bool(code)
    line = "".join(finding.line() for finding in found)
    assert all(word in line for word in words), line


def test_a_presets_warm_up_is_not_the_users_mistake(checked: Checked) -> None:
    """A preset's warm-up beside a constant schedule that is given: nobody asked for it."""
    plain = {"mode": "dreambooth", "instance_data_dir": "d", "instance_prompt": "x"}
    plain |= {"pretrained_model_name_or_path": "m", "lr_scheduler": "constant"}
    config = TrainConfig(**plain, preset="subject").resolve("sd1", 64)
    assert warnings_of(replace(checked.plan, config=config, num_steps=400), CPU, USUAL_WIDTH) == []


def test_a_run_warns_before_weights_are_read_as_check_does(
    tiny_sd1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The warnings of a run are those of check, and come before any weights: the base has none.
    The terminal prints a line each; a strict run is strict about its images alone.
    Check warns of finished work in the output folder, which a run refuses."""
    base = tmp_path / "base"
    shutil.copytree(tiny_sd1, base, ignore=shutil.ignore_patterns("*.safetensors"))
    data = images(tmp_path / "data", 3)
    config = text_to_image(
        base, data, tmp_path / "out", lr_scheduler="cosine", learning_rate=1e-4, strict=True
    )
    events: list[Event] = []
    with terminal.Terminal() as shown, pytest.raises((UsageError, sd_lora.RunError)):
        prepare(config, [events.append, shown])
    warned = [event for event in events if isinstance(event, Warned)]
    checked = check(config, page=False)
    assert [[*event.findings] for event in warned] == [checked.warnings]
    codes = [finding.code for finding in checked.warnings]
    assert codes == ["warmup-too-long", "few-steps", "batch-above-set", "narrow-base"]
    assert all(finding in checked.findings for finding in checked.warnings)
    lines = [f"warning: {finding.line()}" for finding in checked.warnings]
    assert all(line in capsys.readouterr().out for line in lines[:1])
    assert checked.verdict.endswith("warnings: 4")

    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "out_kohya.safetensors").touch()  # a run would refuse it
    earlier = check(config, page=False).warnings[4]
    assert (earlier.code, "out_kohya.safetensors" in earlier.details) == ("earlier-work", True)


def test_the_rows_are_those_of_check(tiny_sd1: Path, tmp_path: Path) -> None:
    """Check and run say the same rates (those of the optimiser's groups), schedule and device."""
    data = images(tmp_path / "data")
    options = {
        "train_text_encoder": True, "text_encoder_lr": 2e-4, "scale_lr": True,
        "loraplus_lr_ratio": 16.0, "lr_scheduler": "polynomial", "lr_power": 2.0,
        "lr_warmup_steps": 0.5, "mixed_precision": "bf16",
    }  # fmt: skip
    config = text_to_image(tiny_sd1, data, tmp_path / "out", **options)
    said, run = check(config, page=False).rows, prepare(config)
    rows = {
        "learning rate": "unet 0.004, text_encoder 0.0008, B × 16 (LoRA+)",
        "schedule": "polynomial after 3 steps of warm-up (0.5 of the run), power 2",
        "device": "cpu, base in bfloat16",
    }
    assert {name: said[name] for name in rows} == rows
    assert {name: run.summary.rows[name] for name in rows} == rows
    rates = {group["initial_lr"] / group["multiple"] for group in run.optimizer.param_groups}
    assert rates == {0.004, 0.0008}


def test_a_share_is_its_number_of_steps(tiny_sd1: Path, tmp_path: Path) -> None:
    """A warm-up of half of 4 steps trains as one of 2 steps, to the last bit, stopped and resumed
    too; the header has the steps, and the configuration the share."""
    data = images(tmp_path / "data")
    options = {"max_train_steps": 4, "lr_scheduler": "cosine", "checkpointing_steps": 2}

    def train(name: str, warmup: float, **more: object) -> list[dict]:
        folder = tmp_path / name
        config = text_to_image(tiny_sd1, data, folder, **options, lr_warmup_steps=warmup, **more)
        files = sd_lora.train(config).files
        with safe_open(files[1].path, "pt") as file:
            assert file.metadata()["ss_lr_warmup_steps"] == "2"
        return [json.loads(line) for line in (folder / "training_log.jsonl").open()]

    losses = train("steps", 2)
    assert train("share", 0.5) == losses
    assert train("share", 0.5, resume_from_checkpoint="checkpoint-2") == losses
    saved = json.loads((tmp_path / "share" / "config.json").read_text())
    assert saved["lr_warmup_steps"] == 0.5


@pytest.mark.parametrize("text", ["500", "500.0", "0", "0.1", "2.5", "-0.5", "10%", "nan"])
def test_steps_or_a_share(text: str) -> None:
    """A flag's number of steps is whole, or a share below 1; others are told with the reason."""
    words = ["--model", "m", "--train_data_dir", "d", "--lr_warmup_steps", text]
    right = {"500": 500, "500.0": 500, "0": 0, "0.1": 0.1}
    if text in right:
        value = parse([*words, "--lr_scheduler", "cosine"]).lr_warmup_steps
        assert (value, type(value)) == (right[text], type(right[text]))
        return
    with pytest.raises(UsageError, match=r"^--lr_warmup_steps must be .*(whole|at least 0|finite)"):
        parse(words)


def test_a_card_that_torch_does_not_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """nvidia-smi on the PATH beside a torch that sees no card: named, with this torch's version and
    the remedy for its kind of build; not where the card is hidden on purpose."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # on a machine with a card too
    seen: Callable[[], str] = lambda: Device.of(torch.device("cpu"), "no").unseen_card  # noqa: E731
    monkeypatch.setattr(torch.version, "cuda", None)
    assert torch.__version__ in seen()
    assert "pip install" in seen()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "update the driver" in seen()
    for name, value in (("CUDA_VISIBLE_DEVICES", ""), ("ACCELERATE_USE_CPU", "true")):
        with monkeypatch.context() as hidden:
            hidden.setenv(name, value)
            assert seen() == ""


@pytest.mark.parametrize(
    ("option", "launched", "card", "chosen"),
    [
        (None, None, "new", "no"),  # as diffusers' scripts
        (None, "fp16", "new", "fp16"),
        ("bf16", "fp16", "old", "bf16"),
        ("auto", None, "new", "bf16"),
        ("auto", None, "old", "fp16"),
        ("auto", None, None, "no"),
        ("auto", "fp16", "new", "fp16"),
        ("auto", "fp8", "new", "asks for mixed_precision fp8"),
    ],
)
def test_the_precision_is_the_options_the_launchers_or_the_cards(
    option: str | None, launched: str | None, card: str | None, chosen: str,
    checked: Checked, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """An option wins over the launcher's environment, and auto asks the card: bf16 where it is
    computed, fp16 on older ones, float32 without one. The presets say auto."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: card is not None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: card == "new")
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launched:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    config = checked.plan.config.replace(mixed_precision=option)
    if " " in chosen:
        with pytest.raises(UsageError, match=chosen):
            chosen_precision(config)
    else:
        assert chosen_precision(config) == chosen
    assert all(preset(name).options["mixed_precision"] == "auto" for name in PRESETS)
