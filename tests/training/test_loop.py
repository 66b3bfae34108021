"""The training loop: what is trained and what is not, exactness of resuming, both modes."""

import json
import math
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from torch.nn.utils import get_total_norm

import sd_lora
from sd_lora.adapters.inject import deltas_of
from sd_lora.config.schema import TrainConfig
from sd_lora.diffusion.noise import Noise
from sd_lora.formats import verify
from sd_lora.formats.canonical import read_models
from sd_lora.hub import is_hub_id
from sd_lora.models.load import load_parts
from sd_lora.training import loop
from sd_lora.training.checkpoint_folders import checkpoints
from sd_lora.training.processes import DTYPES
from sd_lora.training.setup import Run, prepare
from tests.training.runs import dreambooth, images, text_to_image


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images(tmp_path_factory.mktemp("data") / "images")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "pytorch_lora_weights.safetensors")


def optimise(run: Run) -> int:
    """The steps of a prepared run, without what `train` does around them."""
    run.output_dir.mkdir(parents=True, exist_ok=True)
    return loop.train_steps(run, loop.LossLog(run))


def difference(a: Path, b: Path) -> float:
    x, y = weights(a), weights(b)
    assert x.keys() == y.keys()
    return max(float((x[k] - y[k]).abs().max()) for k in x)


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]


def test_only_the_lora_is_trained(tiny_sd1: Path, data: Path, tmp_path: Path) -> None:
    """The optimiser holds exactly lora_layers; every base weight is bit-identical after training;
    every factor has moved; the clipped gradient's norm is at most max_grad_norm."""
    config = text_to_image(
        tiny_sd1,
        data,
        tmp_path,
        train_text_encoder=True,
        max_grad_norm=1e-3,
        rank=2,
        targets="attention+conv",
    )
    run = prepare(config)
    held = [p for group in run.optimizer.param_groups for p in group["params"]]
    ours = [p for model in run.models.values() for p in sd_lora.lora_layers(model)]
    assert {id(p) for p in held} == {id(p) for p in ours}
    assert len(held) == len(ours) > 100
    norms = []
    clip = run.accelerator.clip_grad_norm_

    def spy(parameters: list, max_norm: float) -> torch.Tensor:
        norm = clip(parameters, max_norm)
        norms.append((float(norm), float(get_total_norm([p.grad for p in parameters]))))
        return norm

    run.accelerator.clip_grad_norm_ = spy
    assert optimise(run) == 6
    assert len(norms) == 6
    assert all(before > 1e-3 for before, _ in norms)
    assert all(after <= 1e-3 * 1.001 for _, after in norms)
    assert all(p.abs().sum() > 0 for p in ours)
    base = load_parts(str(tiny_sd1))
    for component, model in run.models.items():
        sd_lora.eject(model)
        trained, untouched = model.state_dict(), base.models[component].state_dict()
        assert trained.keys() == untouched.keys()
        assert all(torch.equal(trained[k], untouched[k]) for k in untouched)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_the_files_are_what_was_trained(
    precision: str, tiny_sd1: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a whole run, both files load into a pipeline from disk as the ΔW that were in memory,
    convolutions and text encoder included; factors stay float32 always; loss is logged. The model
    card takes a base's folder for no model of the hub, though its path has the form of an id."""
    trained = {}
    export = loop.export

    def spy(run: Run, *where: object) -> list:
        trained.update(read_models(run.models))
        assert all(p.dtype == torch.float32 for p in run.parameters)
        assert run.parts.unet.conv_in.weight.dtype == DTYPES[precision]
        return export(run, *where)

    monkeypatch.setattr(loop, "export", spy)
    monkeypatch.chdir(tiny_sd1.parents[1])
    base = tiny_sd1.relative_to(tiny_sd1.parents[1])
    assert is_hub_id(str(base))
    result = sd_lora.train(
        text_to_image(
            base, data, tmp_path / "mine", mixed_precision=precision, train_text_encoder=True,
            targets="attention+conv", conv_rank=2, conv_alpha=1.0, num_validation_images=2,
            validation_steps=2,
        )
    )  # fmt: skip
    names = {p.name for p in (tmp_path / "mine").iterdir() if p.is_file()}
    assert names == {
        "README.md", "before_after.png", "config.json", "mine_kohya.safetensors",
        "digest.json", "pytorch_lora_weights.safetensors", "training_log.jsonl", "report.html",
        "report.json",
    }  # fmt: skip
    card = ModelCard.load(tmp_path / "mine" / "README.md")
    assert card.data.base_model is None
    assert f"A LoRA for {base.name} (" in card.text
    assert str(base) not in card.text
    assert [f.modules for f in result.files] == [112, 112]
    for path in (tmp_path / "mine", tmp_path / "mine" / "mine_kohya.safetensors"):
        pipeline = StableDiffusionPipeline.from_pretrained(
            tiny_sd1, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
        pipeline.load_lora_weights(path)
        count, worst, wrong = verify.compare(trained, verify.loaded_adapter(pipeline))
        assert (count, wrong) == (112, [])
        assert worst < 1e-5
    assert [row["step"] for row in log(tmp_path / "mine")] == [1, 2, 3, 4, 5, 6]
    assert json.loads((tmp_path / "mine" / "config.json").read_text())["conv_alpha"] == 1.0


@pytest.mark.parametrize("mode", ["text_to_image", "dreambooth"])
def test_resuming_is_exact(mode: str, tiny_sd1: Path, data: Path, tmp_path: Path) -> None:
    """Six steps equal three, a stop, and three more, to the last bit: weights and losses, with
    random crops and flips, dropout, accumulation, a schedule, prior preservation, learned weights,
    and every change of noise, timesteps and loss."""
    wide = images(tmp_path / "wide", 5, (96, 64))
    options: dict = {
        "checkpointing_steps": 3,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 2,
        "lora_dropout": 0.2,
        "gradient_accumulation_steps": 2,
        "train_batch_size": 2,
        "train_text_encoder": True,
    }
    if mode == "text_to_image":
        make = text_to_image
        options |= {
            "random_flip": True, "timestep_sampling": "logit_normal", "timestep_shift": 1.5,
            "stratified_timesteps": True, "loss_type": "huber", "soft_min_snr_gamma": 4.0,
            "noise_offset": 0.1, "noise_offset_random_strength": True,
            "adaptive_noise_scale": 0.1, "multires_noise_iterations": 4,
            "input_perturbation": 0.1, "immiscible_noise": 3,
        }  # fmt: skip
    else:
        make = dreambooth
        options |= {
            "with_prior_preservation": True,
            "class_data_dir": str(data),
            "class_prompt": "a photo of a thing",
            "num_class_images": 6,
            "edm2_loss_weighting": True,
        }
    sd_lora.train(make(tiny_sd1, wide, tmp_path / "whole", **options))
    again = make(
        tiny_sd1, wide, tmp_path / "whole", **options, resume_from_checkpoint="checkpoint-3"
    )
    whole, losses = weights(tmp_path / "whole"), log(tmp_path / "whole")
    sd_lora.train(again)
    resumed = weights(tmp_path / "whole")
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    assert log(tmp_path / "whole") == losses  # rows after the checkpoint are written anew


def optimised(config: TrainConfig) -> list[torch.Tensor]:
    """The parameters after the steps of a run."""
    run = prepare(config)
    optimise(run)
    return run.parameters


def assert_close(a: list[torch.Tensor], b: list[torch.Tensor], atol: float) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=atol)


def test_accumulation_is_a_larger_batch(tiny_sd1: Path, data: Path, tmp_path: Path) -> None:
    """Batch 4 equals batch 2 × 2 accumulation: the same samples, noise, timesteps, also stratified
    ones, schedule and mean."""
    options = {"lr_scheduler": "linear", "lr_warmup_steps": 2, "stratified_timesteps": True}
    parts = {"train_batch_size": 2, "gradient_accumulation_steps": 2}
    whole = optimised(text_to_image(tiny_sd1, data, tmp_path / "a", **options))
    in_parts = optimised(text_to_image(tiny_sd1, data, tmp_path / "b", **parts, **options))
    assert_close(whole, in_parts, 1e-4)
    a, b = log(tmp_path / "a"), log(tmp_path / "b")
    assert [row["lr"] for row in a] == [row["lr"] for row in b]
    assert a[0]["lr"] == 0
    assert a[2]["lr"] == 1e-3
    for x, y in zip(a, b, strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-4)


def test_gradient_checkpointing_changes_nothing(tiny_sd1: Path, data: Path, tmp_path: Path) -> None:
    """Recomputing activations gives the same weights, with T-LoRA's masks too, and really is
    switched on."""
    options = {"train_text_encoder": True, "tlora_min_rank": 1}
    plain = optimised(text_to_image(tiny_sd1, data, tmp_path / "a", **options))
    config = text_to_image(tiny_sd1, data, tmp_path / "b", gradient_checkpointing=True, **options)
    run = prepare(config)
    assert run.parts.unet.is_gradient_checkpointing
    encoder = run.parts.text_encoders["text_encoder"]
    layers = getattr(
        encoder, "text_model", encoder
    ).encoder.layers  # transformers 5.0 has the level
    assert all(layer.gradient_checkpointing for layer in layers)
    optimise(run)
    assert_close(plain, run.parameters, 1e-6)


@pytest.mark.parametrize(("timestep", "learning"), [(0, 4), (500, 2), (999, 1)])
def test_few_ranks_learn_from_noisy_items(
    tiny_sd1: Path, data: Path, tmp_path: Path, timestep: int, learning: int
) -> None:
    """T-LoRA's mask of a run (Soboleva et al. 2025, section 3.2): of rank 4 with a least of 1 all
    ranks learn from a clean item, 1 + ⌊(1 − 500/1000) · 3⌋ from one in the middle, and the least
    from one in pure noise: B's gradients of the others are zero."""
    config = text_to_image(
        tiny_sd1, data, tmp_path, rank=4, tlora_min_rank=1, min_timestep=timestep,
        max_timestep=timestep + 1,
    )  # fmt: skip
    run = prepare(config)
    batch = run.stream.batch(0)
    assert batch is not None
    loop.batch_loss(run, batch, 0).backward()
    for name, delta in deltas_of(run.models["unet"]).items():
        ranks = [bool(column.any()) for column in delta.lora_B.grad.movedim(1, 0)]
        assert ranks == [True] * learning + [False] * (4 - learning), name


def test_loss_falls_on_a_small_set(tiny_sd1: Path, data: Path, tmp_path: Path) -> None:
    """Sixty steps on two images lower the loss of the same noise and timesteps by a tenth."""
    config = text_to_image(
        tiny_sd1, data, tmp_path, max_train_samples=2, max_train_steps=60, learning_rate=3e-3,
        targets="all", rank=8,
    )  # fmt: skip
    run = prepare(config)
    batches = [run.stream.batch(i) for i in range(8)]

    @torch.no_grad()
    def fixed() -> float:
        return sum(float(loop.batch_loss(run, batch, 0)) for batch in batches)

    before = fixed()
    optimise(run)
    assert fixed() < 0.9 * before


def test_the_first_batches_are_replayed(tiny_sd1: Path, data: Path, tmp_path: Path) -> None:
    """The loss that is reported compares like with like: the first steps' own batches and noise,
    then and now; with a rate of nothing it is the same number."""
    still = text_to_image(
        tiny_sd1, data, tmp_path, learning_rate=1e-12, max_train_steps=25, train_batch_size=1,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    result = sd_lora.train(still)
    assert result.replayed == pytest.approx(result.first_losses, rel=1e-6)
    assert result.first_losses == pytest.approx(sum(result.losses[:20]) / 20)


def test_class_images_are_generated_once(tiny_sd1: Path, data: Path, tmp_path: Path) -> None:
    """Missing class images are drawn by the base, kept, and only filled up the next time; as
    many of them as instances are in each batch, with their own prompt and weight."""
    classes = tmp_path / "class"
    config = dreambooth(
        tiny_sd1, data, tmp_path / "out", with_prior_preservation=True, class_data_dir=str(classes),
        class_prompt="a photo of a thing", num_class_images=3, validation_steps=2,
        prior_loss_weight=0.5,
    )  # fmt: skip
    run = prepare(config)
    first = {p.name: p.read_bytes() for p in classes.iterdir()}
    assert len(first) == 3
    batch = run.stream.batch(0)
    items = batch.items
    assert [s.kind for s in items] == ["instance"] * 2 + ["class"] * 2
    assert [s.caption for s in items] == ["a photo of sks thing"] * 2 + ["a photo of a thing"] * 2
    with torch.no_grad():
        both = float(loop.batch_loss(run, batch, 0))
        instance = float(loop.batch_loss(run, batch.part([0, 1]), 0))
        as_instances = [torch.tensor(0.0)]
        for i in (2, 3):
            alone = loop.batch_loss(run, batch.part([0, i]), 0)
            only = loop.batch_loss(run, batch.part([0]), 0)
            as_instances.append((alone - only) / 0.5 * 2)  # the share of two instances
    prior = float(sum(as_instances)) / 2
    assert both == pytest.approx(instance + 0.5 * prior, rel=1e-5)
    (classes / min(first)).unlink()
    prepare(config)
    again = {p.name: p.read_bytes() for p in classes.iterdir()}
    assert again.keys() == first.keys()
    assert all(again[name] == first[name] for name in first if name != min(first))


def test_each_class_image_has_words_of_its_own(tiny_sd1: Path, data: Path, tmp_path: Path) -> None:
    """A class prompt with wildcards: each image that is drawn has its own choice, the one in its
    parameters, beside it as its caption and in training; a deleted one is drawn again with the
    same. An image of unknown words is left out, and drawn ones make up for it. Captions of the
    subject come from their metadata once --captions_from says so; class images keep theirs."""
    classes = tmp_path / "class"
    classes.mkdir()
    Image.new("RGB", (64, 64), "red").save(classes / "own.png")
    (classes / "own.txt").write_text("a red thing")
    Image.new("RGB", (64, 64), "blue").save(classes / "unknown.png")
    config = dreambooth(
        tiny_sd1, data, tmp_path / "out", with_prior_preservation=True, class_data_dir=str(classes),
        class_prompt="a {red|green|blue} thing {indoors|at night}", num_class_images=9,
        captions_from="metadata",
    )  # fmt: skip
    run = prepare(config)
    drawn = {}
    for path in classes.glob("class-*.png"):
        with Image.open(path) as image:
            drawn[path.name] = image.text["parameters"].split("\n")[0]
        assert path.with_suffix(".txt").read_text() == drawn[path.name]
        _, colour, thing, *place = drawn[path.name].split()
        assert colour in ("red", "green", "blue")
        assert thing == "thing"
        assert " ".join(place) in ("indoors", "at night")
    assert len(drawn) == 8
    assert len(set(drawn.values())) > 3
    in_turn = [drawn[name].split()[1] for name in sorted(drawn)]
    assert set(in_turn[:3]) == set(in_turn[3:6]) == {"red", "green", "blue"}
    seen = [s for i in range(12) for s in run.stream.batch(i).items]
    assert {s.caption for s in seen if s.kind == "class"} == {*drawn.values(), "a red thing"}
    own = json.loads((data / "metadata.jsonl").read_text().splitlines()[0])["text"]
    assert own in {s.caption for s in seen if s.kind == "instance"}
    assert [f.code for f in run.images.findings if "unknown" in f.name] == ["missing-caption"]
    (classes / min(drawn)).unlink()
    prepare(config)
    with Image.open(classes / min(drawn)) as image:
        assert image.text["parameters"].split("\n")[0] == drawn[min(drawn)]


@pytest.mark.parametrize(
    ("kind", "steps", "changes"),
    [
        ("class", 0, {}),
        ("blank", 0, {}),
        ("class", 4, {"noise_offset": 0.3}),
        ("blank", 4, {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
    ],
)
def test_preserved_answers_are_the_bases(
    kind: str, steps: int, changes: dict, tiny_sd1: Path, data: Path, tmp_path: Path
) -> None:
    """Beside each instance the same image, noise and timestep are trained on the bare pipeline's
    answer to the preserved caption; with sampler steps the latents that diffusers' DDIM has drawn
    with the bare pipeline by then, from plain noise at the same address, also of a v model that
    begins at zero SNR. While the adapter is zero that costs
    nothing; later the loss is that of the instances plus the weighted mean of the difference,
    computed by two models, also for adapters that start from the base's weights."""
    more: dict = {"preservation_class": "dog"} if kind == "class" else {}
    more["preservation_sampler_steps"] = steps
    if steps:  # at timestep 199, four steps of diffusers' five
        more |= {"min_timestep": 199, "max_timestep": 200}
    options = {"trigger_word": "sks", "train_batch_size": 2, **changes}
    options |= {name: more.pop(name) for name in ("min_timestep", "max_timestep") if name in more}
    run = prepare(
        text_to_image(
            tiny_sd1, data, tmp_path / "a", output_preservation=kind, preservation_weight=0.5,
            init_lora_weights="pissa", **more, **options,
        )
    )  # fmt: skip
    plain = prepare(text_to_image(tiny_sd1, data, tmp_path / "b", **options))
    batch = run.stream.batch(0)
    instances, preserved = batch.items[:2], batch.items[2:]
    assert [item.address for item in instances] == [item.address for item in preserved]
    assert [item.weight for item in preserved] == [0.5, 0.5]
    wanted = {"class": [i.caption.replace("sks", "dog") for i in instances], "blank": [None] * 2}
    assert [item.caption for item in preserved] == wanted[kind]
    first = loop.batch_loss(run, batch, 0)
    torch.testing.assert_close(first, loop.batch_loss(plain, plain.stream.batch(0), 0))
    with torch.no_grad():
        for parameter in run.parameters:
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator())
    part = batch.part([2, 3])
    addresses = [item.address for item in preserved]
    x0 = run.latents.latents(part.items, part.loaded).x0
    objective = run.objective
    t = objective.timesteps.draw(addresses)
    noise = objective.noise.draw(x0, addresses)
    x_t = objective.schedule.add_noise(x0, noise, t)
    arguments = run.conditions(part.items, 0).arguments()
    if steps:
        ddim = DDIMScheduler.from_config(run.parts.scheduler.config, clip_sample=False)
        ddim.set_timesteps(5)
        x_t = Noise().draw(x0, addresses)
        for now in (999, 799, 599, 399):
            with torch.no_grad():
                answer = plain.models["unet"](x_t, now, **arguments).sample
            x_t = ddim.step(answer, now, x_t).prev_sample
    with torch.no_grad():
        base = plain.models["unet"](x_t, t, **arguments).sample
        now = run.models["unet"](x_t, t, **arguments).sample
    both, alone = loop.batch_loss(run, batch, 0), loop.batch_loss(run, batch.part([0, 1]), 0)
    drift = (now - base).square().mean()
    assert drift > 1e-4
    torch.testing.assert_close(both - alone, 0.5 * drift, rtol=1e-3, atol=1e-6)


def test_a_request_to_stop_loses_nothing(tiny_sd1: Path, data: Path, tmp_path: Path) -> None:
    """SIGTERM in mid-run ends it after a whole step with a checkpoint, and resuming from it gives
    the weights of a run that was never interrupted."""
    options = {"max_train_steps": 10, "checkpointing_steps": 1000}
    sd_lora.train(text_to_image(tiny_sd1, data, tmp_path / "whole", **options))
    original = loop.batch_loss
    calls = []

    def interrupted(*args: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    assert threading.current_thread() is threading.main_thread()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "batch_loss", interrupted)
        with pytest.raises(sd_lora.RunError, match="interrupted by SIGTERM at step 5 of 10"):
            sd_lora.train(text_to_image(tiny_sd1, data, tmp_path / "cut", **options))
    assert [p.name for p in checkpoints(tmp_path / "cut")] == ["checkpoint-5"]
    assert not (tmp_path / "cut" / "pytorch_lora_weights.safetensors").exists()
    sd_lora.train(
        text_to_image(tiny_sd1, data, tmp_path / "cut", **options, resume_from_checkpoint="latest")
    )
    assert difference(tmp_path / "whole", tmp_path / "cut") == 0


def test_checkpoints_are_pruned_after_the_next_stands(
    tiny_sd1: Path, data: Path, tmp_path: Path
) -> None:
    """checkpoints_total_limit keeps the newest ones; no partial folder is left."""
    sd_lora.train(
        text_to_image(tiny_sd1, data, tmp_path, checkpointing_steps=1, checkpoints_total_limit=2)
    )
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-5", "checkpoint-6"]
    assert not list(tmp_path.glob(".*"))


@pytest.fixture(scope="module")
def finished(tiny_sd1: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of six steps with two checkpoints; tests copy it."""
    folder = tmp_path_factory.mktemp("finished") / "mine"
    sd_lora.train(text_to_image(tiny_sd1, data, folder, checkpointing_steps=3))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resume_from_checkpoint": "latest"}, "give it more --steps"),
        ({"resume_from_checkpoint": "checkpoint-4"}, "has checkpoint-3, checkpoint-6"),
        ({"resume_from_checkpoint": "checkpoint-3", "seed": 1}, "seed = 0, and this run has 1"),
        ({"resume_from_checkpoint": "checkpoint-3", "train_batch_size": 2}, "batch size"),
        ({"resume_from_checkpoint": "checkpoint-3", "rank": 8}, "rank was 4 and is 8"),
        ({"resume_from_checkpoint": "checkpoint-3", "lora_alpha": 1.0}, "lora_alpha was None and"),
        ({"resume_from_checkpoint": "checkpoint-3", "train_text_encoder": True}, "train_text"),
        ({"resume_from_checkpoint": "checkpoint-3", "targets": "all"}, "and is 'all'"),
    ],
)  # fmt: skip
def test_resuming_something_else_is_refused(
    changes: dict, message: str, tiny_sd1: Path, data: Path, finished: Path, tmp_path: Path
) -> None:
    """A checkpoint that is not there, finished, or of another run is refused with the reason."""
    folder = shutil.copytree(finished, tmp_path / "mine")
    with pytest.raises(sd_lora.UsageError, match=message):
        sd_lora.train(text_to_image(tiny_sd1, data, folder, **changes))


def test_a_new_run_does_not_mix_with_an_old_one(
    tiny_sd1: Path, data: Path, finished: Path, tmp_path: Path
) -> None:
    """A run into a folder with checkpoints of another is refused: pruning and `latest` would take
    one for the other."""
    folder = shutil.copytree(finished, tmp_path / "mine")
    for path in folder.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(
        sd_lora.UsageError, match="has checkpoint-3, checkpoint-6 of an earlier run: resume it"
    ):
        sd_lora.train(text_to_image(tiny_sd1, data, folder))


def test_resuming_takes_the_new_learning_rate(tiny_sd1: Path, data: Path, tmp_path: Path) -> None:
    """A run that diverged is resumed with a lower rate, and that is used, also in a schedule."""
    options = {"checkpointing_steps": 3, "lr_scheduler": "cosine", "lr_warmup_steps": 0}
    sd_lora.train(text_to_image(tiny_sd1, data, tmp_path, **options))
    before = log(tmp_path)
    again = {"resume_from_checkpoint": "checkpoint-3", "learning_rate": 1e-4}
    sd_lora.train(text_to_image(tiny_sd1, data, tmp_path, **(options | again)))
    for row, new in zip(before, log(tmp_path), strict=True):
        factor = 1 if row["step"] <= 3 else 0.1
        assert new["lr"] == pytest.approx(row["lr"] * factor)


def test_a_longer_schedule_is_followed_at_once(tiny_sd1: Path, data: Path, tmp_path: Path) -> None:
    """A finished run that goes on with more steps has the cosine of the longer run from its first
    new step: its rate at step t + 1 is (1 + cos(π t / T)) / 2 of the full one."""
    options = {"lr_scheduler": "cosine", "lr_warmup_steps": 0, "checkpointing_steps": 2}
    rate = text_to_image(tiny_sd1, data, tmp_path).learning_rate
    sd_lora.train(text_to_image(tiny_sd1, data, tmp_path, max_train_steps=2, **options))
    more = {"max_train_steps": 5, "resume_from_checkpoint": "latest"}
    sd_lora.train(text_to_image(tiny_sd1, data, tmp_path, **(options | more)))
    for row in log(tmp_path)[2:]:
        factor = (1 + math.cos(math.pi * (row["step"] - 1) / 5)) / 2
        assert row["lr"] == pytest.approx(rate * factor)


def test_before_is_the_base_also_on_resume(tiny_sd1: Path, data: Path, tmp_path: Path) -> None:
    """The row "before" of before_after.png is drawn by the base, not by the checkpoint."""
    options = {"num_validation_images": 1, "validation_steps": 2, "checkpointing_steps": 3}
    options |= {"learning_rate": 0.05}
    sd_lora.train(text_to_image(tiny_sd1, data, tmp_path, **options))

    def rows() -> list[bytes]:
        sheet = Image.open(tmp_path / "before_after.png")
        return [sheet.crop((8, y, 264, y + 256)).tobytes() for y in (316, 602)]  # the first: 30

    first = rows()
    more = {"resume_from_checkpoint": "checkpoint-3"}
    sd_lora.train(text_to_image(tiny_sd1, data, tmp_path, **options, **more))
    assert rows() == first
    assert first[0] != first[1]


def test_precision_may_change_between_runs(tiny_sd1: Path, data: Path, tmp_path: Path) -> None:
    """`train` leaves nothing behind in the process: the next one may have another precision."""
    for precision in ("no", "bf16", "no"):
        out = tmp_path / f"{precision}-{len(list(tmp_path.iterdir()))}"
        sd_lora.train(
            text_to_image(tiny_sd1, data, out, mixed_precision=precision, max_train_steps=1)
        )


def test_an_image_that_breaks_in_a_worker_is_named(tiny_sd1: Path, tmp_path: Path) -> None:
    """UsableImages that are read anew each time may vanish: one line says so, from a worker too."""
    folder = images(tmp_path / "images", 3, (96, 64))
    run = prepare(
        text_to_image(
            tiny_sd1, folder, tmp_path / "out", dataloader_num_workers=1, center_crop=False
        )
    )
    (folder / "1.png").unlink()
    with pytest.raises(sd_lora.RunError, match=r"^[^\n]*1\.png could not be read[^\n]*$"):
        list(run.batches())


def test_a_gradient_that_is_not_finite_stops_the_run(
    tiny_sd1: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A NaN in a gradient, with a finite loss, ends the run without checkpoint or file."""
    original = loop.batch_loss

    def poison(run: Run, *batch: object) -> torch.Tensor:
        run.parameters[0].register_hook(lambda grad: grad * float("nan"))
        return original(run, *batch)

    monkeypatch.setattr(loop, "batch_loss", poison)
    with pytest.raises(sd_lora.RunError, match="gradient's norm became nan at step 1"):
        sd_lora.train(text_to_image(tiny_sd1, data, tmp_path, checkpointing_steps=2))
    assert not checkpoints(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_diverged_loss_stops_the_run(
    tiny_sd1: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss that is not finite ends the run by step number, with the images, captions and
    timesteps of the step, and no file is written; the log has the steps before."""
    original, calls = loop.batch_loss, []

    def diverging(*args: object) -> torch.Tensor:
        calls.append(1)
        return original(*args) * float("inf" if len(calls) > 3 else "1")

    monkeypatch.setattr(loop, "batch_loss", diverging)
    message = r"the loss became \w+ at step 4: .*Images of the step: (.*\.png \('a photo of thing "
    with pytest.raises(sd_lora.RunError, match=message + r"\d', timestep \d+\)){2}") as caught:
        sd_lora.train(text_to_image(tiny_sd1, data, tmp_path))
    run = prepare(text_to_image(tiny_sd1, data, tmp_path, overwrite_output_dir=True))
    for item in run.stream.items_of(3):
        t = run.objective.timesteps.draw([item.address])
        name = run.stream.sets["instance"].samples[item.index].name
        assert f"{name} ('{item.caption}', timestep {int(t)})" in str(caught.value)
    assert [row["step"] for row in log(tmp_path)] == [1, 2, 3]
    assert not list(tmp_path.glob("*.safetensors"))
    assert not checkpoints(tmp_path)


def test_broken_images_stop_the_run_before_it_starts(
    tiny_sd1: Path, data: Path, tmp_path: Path
) -> None:
    """In a strict run all broken images are named at once, and the output folder is not even
    made."""
    folder = images(tmp_path / "images", 4)
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:60])
    (folder / "3.png").write_bytes(b"")
    with pytest.raises(sd_lora.RunError, match=r"(?s)2 problems.*1\.png.*3\.png.*empty"):
        sd_lora.train(text_to_image(tiny_sd1, folder, tmp_path / "out", strict=True))
    assert not (tmp_path / "out").exists()


def test_min_snr_v_prediction_and_noise_offset_train(
    tiny_sd2: Path, data: Path, tmp_path: Path
) -> None:
    """An SD2-like v-prediction model trains with min-SNR and noise offset, and exports exactly."""
    result = sd_lora.train(
        text_to_image(tiny_sd2, data, tmp_path, snr_gamma=5.0, noise_offset=0.05)
    )
    assert len(result.files) == 2
    assert result.losses[-1] > 0


def test_epochs_become_steps(tiny_sd1: Path, data: Path, tmp_path: Path) -> None:
    """Steps are epochs × images × repeats over the global batch, rounded up."""
    options = {"max_train_steps": None, "num_train_epochs": 3, "gradient_accumulation_steps": 2}
    assert prepare(text_to_image(tiny_sd1, data, tmp_path, **options)).plan.num_steps == 3  # 18 / 8
    options |= {"repeats": 4, "train_batch_size": 1}
    assert prepare(dreambooth(tiny_sd1, data, tmp_path, **options)).plan.num_steps == 36  # 72 / 2
