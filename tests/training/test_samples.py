"""Sample images are drawn when they are due or asked for, and change nothing."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import sd_lora
from sd_lora.adapters.merging import set_strength
from sd_lora.adapters.state import load_lora_state_dict
from sd_lora.config.optimizers import OPTIMIZERS
from sd_lora.models.load import Parts, load_parts
from sd_lora.report.events import Event, StepDone, Warned
from sd_lora.sampling.sampler import sample
from sd_lora.training import interruption
from sd_lora.training.budget import largest_shape
from sd_lora.training.looks import Look, looks_of
from sd_lora.training.sample_schedule import (
    DECODE_FORWARDS,
    SHARE,
    STEP_FORWARDS,
    STRENGTHS,
    SampleSchedule,
    training_forwards,
    usual_number,
)
from sd_lora.training.samples import wanted_samples
from sd_lora.training.setup import prepare
from sd_lora.training.state_files import read_state
from tests.training.runs import images, text_to_image


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images(tmp_path_factory.mktemp("images"))


def trained_alike(base: Path, one: Path, other: Path) -> Parts:
    """A fresh base with the LoRA file of a run, whose losses and tensors are those of another, bit
    for bit."""
    log, file = "training_log.jsonl", "pytorch_lora_weights.safetensors"
    assert (one / log).read_bytes() == (other / log).read_bytes()
    tensors, others = load_file(one / file), load_file(other / file)
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[name], others[name]) for name in others)
    parts = load_parts(str(base))
    sd_lora.load_adapter(parts.models, one / file)
    return parts


def test_samples_change_nothing(
    tiny_sd1: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples every second step, each prompt in its own size, steps, seed and strength, of a moving
    average and with dropout, and others that a file asks for at step 3, leave losses and LoRA files
    as they are without, bit for bit. At strength 0 each sample is the base's. A mistake in the
    second such file is a warning, and the run goes on."""
    monkeypatch.setattr(interruption, "LOOK_EVERY", 0.0)
    options = {"max_train_steps": 6, "train_batch_size": 3, "use_ema": True, "lora_dropout": 0.2}
    sd_lora.train(text_to_image(tiny_sd1, data, tmp_path / "1" / "out", **options))
    (tmp_path / "prompts.txt").write_text("a photo --w 32 --h 64 --s 2 --d 5\na photo --s 1\n"
                                          "a cat --s 1 --m 0 --n bad --l 2")  # fmt: skip
    out = tmp_path / "2" / "out"
    warned: list[Warned] = []

    def ask(event: Event) -> None:
        if event == StepDone(3):
            (out / "sample").write_text("a dog --w 32 --h 32 --s 1")
        if event == StepDone(5):
            (out / "sample").write_text("a dog --w 32 --h 32 --s 0")
        warned.extend([event] if isinstance(event, Warned) else [])

    sd_lora.train(
        text_to_image(
            tiny_sd1, data, out, **options, num_validation_images=1, sample_every=2,
            sample_prompts=str(tmp_path / "prompts.txt"), report_to="tensorboard",
        ),
        [ask],
    )  # fmt: skip
    steps = [f"step-00000{step}" for step in (0, 2, 4, 6)]
    sheets = ["step-000002.png", "step-000004.png", "now-000003.png"]
    assert {p.name for p in (out / "samples").iterdir()} == {*steps, *sheets, "now-000003"}
    plain = tmp_path / "1" / "out"
    log = "training_log.jsonl"
    assert (out / log).read_bytes() == (plain / log).read_bytes()
    lora = "pytorch_lora_weights.safetensors"  # its header has the options, which differ
    tensors, others = load_file(out / lora), load_file(plain / lora)
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)
    drawn = {
        step: [Image.open(path) for path in sorted((out / "samples" / step).iterdir())]
        for step in steps
    }
    assert [image.size for image in drawn[steps[1]]] == [(32, 64), (64, 64), (64, 64)]
    pixels = {step: [image.tobytes() for image in images] for step, images in drawn.items()}
    for step in steps[1:]:
        same = [a == b for a, b in zip(pixels[steps[0]], pixels[step], strict=True)]
        assert same == [False, False, True]
    text = drawn[steps[3]][2].info["parameters"]
    assert text.startswith("a cat <lora:out:0>\nNegative prompt: bad\nSteps: 1,")
    assert "Seed: 5, Size: 32x64" in drawn[steps[3]][0].info["parameters"]
    (finding,) = warned[-1].findings
    assert finding.line().startswith("the file sample: line 1: --s is a whole number from 1 to 200")
    assert not (out / "sample").exists()
    assert list((out / "logs").rglob("events*"))


AVERAGING: dict[str, dict[str, object]] = {
    "moving average": {"use_ema": True, "learning_rate": 3e-2},
    "adamwschedulefree": {"optimizer": "adamwschedulefree", "learning_rate": 3e-2},
    "prodigyplusschedulefree": {
        "optimizer": "prodigyplusschedulefree", "optimizer_args": {"d0": 1e-2},
        "learning_rate": 1.0,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", AVERAGING)
def test_samples_are_of_the_average(kind: str, tiny_sd1: Path, data: Path, tmp_path: Path) -> None:
    """Where other weights are exported than are trained, a run with samples and validation every
    second step has the losses and the LoRA file of one without, to the bit; the sample of its last
    step is that of its file in a fresh base, pixel by pixel, and not that of the trained
    weights."""
    options = AVERAGING[kind] | {"max_train_steps": 4, "lr_warmup_steps": 0}
    if package := OPTIMIZERS[str(options.get("optimizer", "adamw"))].package:
        pytest.importorskip(package[0])
    looks: dict[str, object] = {
        "num_validation_images": 1,
        "validation_steps": 2,
        "sample_every": 2,
    }
    looks |= {"validation_prompt": "a photo", "validate_every": 2}
    looked, plain = tmp_path / "1" / "out", tmp_path / "2" / "out"
    sd_lora.train(text_to_image(tiny_sd1, data, looked, **options, **looks))
    sd_lora.train(text_to_image(tiny_sd1, data, plain, **options, validate_every=0))
    parts = trained_alike(tiny_sd1, looked, plain)

    def drawn() -> bytes:
        encoder, device = parts.caption_encoder(), torch.device("cpu")
        (image,) = sample(parts, encoder, ["a photo"], [0], size=(64, 64), device=device, steps=2)
        return image.tobytes()

    with Image.open(looked / "samples" / "step-000004" / "00.png") as image:
        shown = image.tobytes()
    assert shown == drawn()
    trained = read_state(looked / "checkpoint-4")["trained"]["factors"]
    factors = {key.removeprefix("unet/"): value for key, value in trained.items()}
    load_lora_state_dict(parts.unet, factors)
    assert shown != drawn()


def test_samples_at_other_strengths(tiny_sd1: Path, data: Path, tmp_path: Path) -> None:
    """After its last step a run whose work has room for four sets draws its samples at strengths
    0.5 and 0.75 as well: they are those that its file draws at these strengths in a fresh base,
    pixel by pixel, with the strength, times that of the prompt, in their parameters. Losses and
    file are those of a run without samples, to the bit. One with room for three draws none."""
    options: dict[str, object] = {"train_batch_size": 6, "max_train_steps": 40,
                                  "learning_rate": 1e-2, "use_ema": True}  # fmt: skip
    (tmp_path / "prompts.toml").write_text(
        'prompts = [{prompt = "a photo", strength = 0.8}]\n', encoding="utf-8"
    )
    looked, plain = tmp_path / "1" / "out", tmp_path / "2" / "out"
    config = text_to_image(
        tiny_sd1, data, looked, **options, validation_steps=1, sample_every=0,
        num_validation_images=1,
        sample_prompts=str(tmp_path / "prompts.toml"),
    )  # fmt: skip
    run = prepare(config.replace(output_dir=str(tmp_path / "3")))
    assert run.schedule.strengths == STRENGTHS == (0.5, 0.75)
    assert looks_of(run)["samples"].at_ends == 4
    text = "before and after, and after the last step at strengths 0.5 and 0.75; about 5 % of"
    assert run.schedule.text.startswith(text)
    assert 4 * run.schedule.forwards <= SHARE * training_forwards(run.plan)
    short = SampleSchedule(replace(run.plan, num_steps=30), run.schedule.forwards)
    assert 3 * short.forwards <= SHARE * training_forwards(short.plan) < 4 * short.forwards
    assert short.strengths == ()
    assert SampleSchedule(run.plan, 0).strengths == ()
    sd_lora.train(config)
    sd_lora.train(text_to_image(tiny_sd1, data, plain, **options))
    parts = trained_alike(tiny_sd1, looked, plain)
    encoder, device = parts.caption_encoder(), torch.device("cpu")
    shown = []
    for strength, folder in ((0.5, "strength-0.5"), (0.75, "strength-0.75"), (1.0, ".")):
        set_strength(parts.unet, 0.8 * strength)
        (want,) = sample(parts, encoder, ["a photo"], [0], size=(64, 64), device=device, steps=1)
        with Image.open(looked / "samples" / "step-000040" / folder / "00.png") as image:
            assert image.tobytes() == want.tobytes()
            assert image.info["parameters"].startswith(f"a photo <lora:out:{0.8 * strength:g}>")
            shown.append(image.tobytes())
    assert len({*shown}) == 3


def test_as_many_samples_as_the_work_allows(tiny_sd1: Path, data: Path, tmp_path: Path) -> None:
    """Where no option says how many, a set has 1 to MOST_IMAGES samples of what is learned, the
    most with which those before and after are at most SHARE of the forward passes of the steps, one
    of the class among them. Class images, of a source too, and preservation double these."""
    options = {"num_validation_images": None, "train_batch_size": 1}
    config = text_to_image(tiny_sd1, data, tmp_path, **options)
    run = prepare(config)
    an_image = 2 * config.validation_steps + DECODE_FORWARDS
    for steps, expected in ((10, 1), (1799, 1), (1800, 2), (2700, 3), (3600, 4), (99_999, 4)):
        run.plan = replace(run.plan, num_steps=steps)
        run.schedule = SampleSchedule(run.plan, 0)
        drawn = wanted_samples(run)
        assert len(drawn) == expected == usual_number(run.plan, an_image, 0)
        if 1 < expected < 4:
            room = SHARE * training_forwards(run.plan)
            assert 2 * len(drawn) * an_image <= room < 2 * (len(drawn) + 1) * an_image
    of_class = images(tmp_path / "class", 4, (128, 128))
    sources = [{"path": str(data)}, {"path": str(of_class), "kind": "class"}]
    beside = prepare(config.replace(train_data_dir=None, sources=sources))
    assert training_forwards(beside.plan) == 6 * 2 * STEP_FORWARDS
    assert largest_shape(beside.plan).number == 2
    plan = replace(beside.plan, num_steps=1800)
    assert usual_number(plan, an_image, 1) == 3  # room for four, one of the class
    beside.schedule = SampleSchedule(plan, 0)
    assert len(wanted_samples(beside)) == 4
    beside.plan = replace(plan, num_steps=6)  # as in a run that ends early
    assert len(wanted_samples(beside)) == 4
    plan = replace(run.plan, config=run.config.replace(output_preservation="blank"))
    assert training_forwards(plan) == 2 * training_forwards(run.plan)
    plan = replace(run.plan, config=run.config.replace(gradient_checkpointing=True))
    assert training_forwards(plan) == 1.5 * training_forwards(run.plan)
    assert prepare(config.replace(num_validation_images=0)).schedule.forwards == 0


def test_samples_are_drawn_where_the_work_allows_it(
    tiny_sd1: Path, data: Path, tmp_path: Path
) -> None:
    """By themselves, sets of samples, those before and after and at other strengths among them, are
    at most SHARE of the forward passes of the steps, evenly over the run, so that the summary has
    no note on their time, as it has on a validation each step; steps and epochs, if given, are
    kept. Sets at other strengths take the place of two in mid-run where two are left."""
    config = text_to_image(
        tiny_sd1, data, tmp_path, train_batch_size=5, max_train_steps=200, num_validation_images=2,
        validation_steps=3,
    )  # fmt: skip
    run = prepare(config)
    assert run.schedule.forwards == 2 * (2 * 3 + DECODE_FORWARDS)
    assert run.schedule.steps == [67, 133]
    assert run.schedule.strengths == STRENGTHS
    work = 200 * 5 * STEP_FORWARDS
    assert (len(run.schedule.steps) + 4) * run.schedule.forwards <= SHARE * work
    assert (len(run.schedule.steps) + 5) * run.schedule.forwards > SHARE * work
    fewer = SampleSchedule(replace(run.plan, num_steps=199), run.schedule.forwards)
    assert (fewer.steps, fewer.strengths) == ([50, 100, 149], ())
    assert run.summary.rows["samples"] == run.schedule.text
    assert run.validation.every == 100  # not 77, and one more at the end
    assert not [note for note in run.summary.notes if "looking at the run" in note]
    (note,) = (note for note in prepare(config.replace(validate_every=1)).summary.notes
               if "looking at the run" in note)  # fmt: skip
    assert re.search(r"\(samples . %, validation 7. %\): --validate_every \d+ would", note)
    for changes, steps in (
        ({"sample_every": 80}, [80, 160]),
        ({"sample_every": 0}, []),
        ({"validation_prompt": "a photo", "validation_epochs": 40}, [80, 160]),
    ):
        plan = replace(run.plan, config=run.config.replace(**changes))
        assert SampleSchedule(plan, run.schedule.forwards).steps == steps
    assert SampleSchedule(run.plan, 0).steps == []
    assert looks_of(run)["validation"] == Look("validation", "validate", 32, 2, 1)
    run.plan = replace(run.plan, config=run.config.replace(init_lora="started from"))
    assert {look.at_ends for look in looks_of(run).values()} == {3, 4}  # samples: none of the start
