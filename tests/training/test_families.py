"""Every family trains: UNet and text encoders, attention and convolutions, files that load."""

import dataclasses
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import sd_lora
from sd_lora.adapters.inject import lora_layers
from sd_lora.formats import verify
from sd_lora.formats.lora_file import open_lora
from sd_lora.models.families import FAMILIES
from sd_lora.models.load import load_parts
from sd_lora.sampling.sampler import sample
from sd_lora.training import checkpoint, loop
from sd_lora.training.data import base_of
from sd_lora.training.interruption import Requests, listening
from sd_lora.training.samples import prompts_of, wanted_samples
from sd_lora.training.setup import Run, prepare
from tests.training.runs import dreambooth, images, text_to_image, trained_adapter

Folder = Callable[[str], Path]
PIPELINES = {
    "sd1": "StableDiffusionPipeline",
    "sd2": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sdxl-v": "StableDiffusionXLPipeline",
    "refiner": "StableDiffusionXLImg2ImgPipeline",
    "sd1-inpainting": "StableDiffusionInpaintPipeline",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images that are not square, so that crops are drawn."""
    return images(tmp_path_factory.mktemp("data"), size=(96, 64))


@pytest.mark.parametrize("kind", PIPELINES)
def test_a_family_trains_and_its_files_load(
    kind: str, tiny: Folder, data: Path, tmp_path: Path
) -> None:
    """A run on each kind of UNet, attention + convolutions and all its text encoders: the loss of
    the first steps' own batches falls, and both files give diffusers' own pipeline of that kind
    every ΔW of the checkpoint's raw factors."""
    config = text_to_image(
        tiny(kind), data, tmp_path / kind, train_text_encoder=True, learning_rate=3e-3,
        max_train_steps=8, checkpointing_steps=8, caption_dropout=0.2, targets="attention+conv",
    )  # fmt: skip
    result = sd_lora.train(config)
    assert result.replayed < result.first_losses
    adapter = trained_adapter(tmp_path / kind)
    encoders = [name for name in adapter if name != "unet"]
    assert encoders == {"refiner": ["text_encoder_2"], "sd": ["text_encoder"]}.get(
        kind if kind == "refiner" else kind[:2] if "xl" not in kind else "",
        ["text_encoder", "text_encoder_2"],
    )
    kohya = tmp_path / kind / f"{kind}_kohya.safetensors"
    if kind == "refiner":  # ComfyUI knows its only text encoder as the first, and diffusers not
        assert {key[:8] for key in load_file(kohya)} == {"lora_une", "lora_te_"}
        assert verify.compare(adapter, open_lora(kohya).adapter)[2] == []
    for path in (tmp_path / kind, *([kohya] if kind != "refiner" else [])):
        off = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        off = {} if "xl" in kind or kind == "refiner" else off
        pipeline = getattr(diffusers, PIPELINES[kind]).from_pretrained(tiny(kind), **off)
        pipeline.load_lora_weights(path)
        count, worst, wrong = verify.compare(adapter, verify.loaded_adapter(pipeline))
        assert wrong == []
        assert worst < 1e-5
        assert count == sum(map(len, adapter.values()))
    if "xl" in kind:  # kohya's own names for SDXL, whole: ComfyUI and A1111 know no others
        keys = load_file(tmp_path / kind / f"{kind}_kohya.safetensors").keys()
        unet = {key for key in keys if key.startswith("lora_unet_")}
        assert all(("_blocks_" in key or "_block_" in key) for key in unet)
        assert not any("down_blocks" in key or "mid_block" in key for key in unet)
        assert {key[:8] for key in keys} == {"lora_une", "lora_te1", "lora_te2"}


def test_zero_terminal_snr_is_read_and_asked_for(tiny: Folder, data: Path, tmp_path: Path) -> None:
    """The schedule ends in pure noise where the model's scheduler says so or the user does; for a
    model that predicts noise that is refused."""
    run = prepare(text_to_image(tiny("sdxl-v"), data, tmp_path))
    assert run.objective.schedule.alpha[-1] == 0
    assert "zero terminal SNR" in run.summary.rows["objective"]
    assert prepare(text_to_image(tiny("sd2"), data, tmp_path)).objective.schedule.alpha[-1] > 0
    asked = text_to_image(tiny("sd2"), data, tmp_path, rescale_betas_zero_snr=True)
    assert prepare(asked).objective.schedule.alpha[-1] == 0
    with pytest.raises(sd_lora.UsageError, match="Use zero terminal SNR with v_prediction"):
        prepare(text_to_image(tiny("sdxl"), data, tmp_path, rescale_betas_zero_snr=True))
    given = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    run = prepare(text_to_image(tiny("sdxl"), data, tmp_path, **given))
    schedule = run.objective.schedule
    assert (schedule.alpha[-1], schedule.prediction_type) == (0, "v_prediction")


def drawn_timesteps(run: Run, steps: int, size: tuple[int, int] = (64, 64)) -> list[float]:
    """The timesteps that the UNet is told while a sample image is drawn."""
    told: list[float] = []
    hook = run.parts.unet.register_forward_pre_hook(lambda m, args: told.append(float(args[1])))
    encoder, device, prompt = run.text.caption_encoder, torch.device("cpu"), prompts_of(run)[0]
    list(sample(run.parts, encoder, [prompt], [0], size=size, device=device, steps=steps))
    hook.remove()
    return told


def test_samples_start_in_pure_noise_with_zero_terminal_snr(
    tiny: Folder, data: Path, tmp_path: Path
) -> None:
    """After --rescale_betas_zero_snr sampling starts at the last timestep, by trailing spacing
    (Lin et al. 2023, section 3.3), and guidance is rescaled by 0.7, or as asked; without it the
    sampler does not start there, and guidance is plain."""
    config = text_to_image(tiny("sd2"), data, tmp_path, num_validation_images=1)
    zero = config.replace(rescale_betas_zero_snr=True)
    run = prepare(zero)
    assert drawn_timesteps(run, 4) == [999, 749, 499, 249]
    (wanted, *_) = wanted_samples(run)
    assert wanted.parameters(run, 0).guidance_rescale == 0.7
    assert "CFG Rescale: 0.7" in wanted.parameters(run, 0).text()
    run = prepare(zero.replace(validation_guidance_rescale=0.0))
    assert wanted.parameters(run, 0).guidance_rescale == 0
    run = prepare(config)
    assert drawn_timesteps(run, 4)[0] < 999
    assert wanted.parameters(run, 0).guidance_rescale == 0


def test_flow_matching_is_read_and_asked_for(tiny: Folder, data: Path, tmp_path: Path) -> None:
    """An SDXL base is trained by flow matching where its scheduler says so, with its shift, which
    may depend on an image's size, or the user does; other families are refused, and a shift without
    flow matching."""
    given = {"prediction_type": "flow_prediction", "flow_shift": 6.0}
    run = prepare(text_to_image(tiny("sdxl"), data, tmp_path, **given))
    half = 6 * 0.5 / (1 + 5 * 0.5)
    assert float(run.objective.schedule.sigma[499]) == pytest.approx(half)
    assert run.summary.rows["objective"] == "flow_prediction, flow shift 6"
    folder = shutil.copytree(tiny("sdxl"), tmp_path / "flow")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0)
    scheduler.save_pretrained(folder / "scheduler")
    told = prepare(text_to_image(folder, data, tmp_path))
    assert torch.equal(told.objective.schedule.sigma, run.objective.schedule.sigma)
    assert math.isfinite(loop.batch_loss(told, told.stream.batch(0), 0))
    diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=64
    ).save_pretrained(folder / "scheduler")
    told = prepare(text_to_image(folder, data, tmp_path, num_validation_images=1))
    own, size_shift = base_of(told.config).resolution, told.objective.timesteps.size_shift
    of_own = math.exp(0.5 + 0.65 * (own**2 / 256 - 4) / 60)
    assert told.given_noise_settings["flow_shift"] == pytest.approx(of_own)
    assert size_shift((2 * own) ** 2) == pytest.approx(math.exp(0.65 * 3 * own**2 / 256 / 60))
    assert "shifted by size" in told.summary.rows["objective"]
    odds = [
        [t / (1000 - t) for t in drawn_timesteps(told, 4, (side, side))[1:]] for side in (64, 128)
    ]  # of a shift s: s·u / (1 − u); timesteps are whole numbers
    for small, large in zip(*odds, strict=True):
        assert large / small == pytest.approx(math.exp(0.65 * 3 * 64**2 / 256 / 60), rel=0.02)
    for base, options, message in [
        (folder, {"resolution_shift": True}, "use_dynamic_shifting.*Leave it out"),
        ("sd1", given, "only those of Stable Diffusion XL"),
        ("sdxl", {"flow_shift": 2.0}, "is no flow-matching model by its scheduler"),
        ("sdxl", given | {"rescale_betas_zero_snr": True}, "leave out rescale_betas_zero_snr"),
        ("sdxl", given | {"snr_gamma": 5.0}, "leave out --snr_gamma"),
    ]:
        with pytest.raises(sd_lora.UsageError, match=message):
            prepare(
                text_to_image(base if base == folder else tiny(base), data, tmp_path, **options)
            )


def test_text_encoders_learn_each_in_its_way(tiny: Folder, data: Path, tmp_path: Path) -> None:
    """Ranks, alphas and learning rates of SDXL's two text encoders are their own."""
    options = {
        "train_text_encoder": True, "rank": 8, "text_encoder_rank": 4, "text_encoder_2_rank": 2,
        "text_encoder_2_alpha": 6.0, "learning_rate": 1e-3, "text_encoder_lr": 2e-4,
        "text_encoder_2_lr": 3e-5,
    }  # fmt: skip
    run = prepare(text_to_image(tiny("sdxl"), data, tmp_path, **options))
    for component, rank, alpha in (
        ("unet", 8, 8.0),
        ("text_encoder", 4, 4.0),
        ("text_encoder_2", 2, 6.0),
    ):
        layers = sd_lora.adapters.inject.deltas_of(run.models[component])
        assert {delta.rank for delta in layers.values()} == {rank}
        assert {delta.alpha for delta in layers.values()} == {alpha}
    rates = {id(p): g["lr"] for g in run.optimizer.param_groups for p in g["params"]}
    for component, rate in (("unet", 1e-3), ("text_encoder", 2e-4), ("text_encoder_2", 3e-5)):
        assert {rates[id(p)] for p in lora_layers(run.models[component])} == {rate}
    options |= {"text_encoder_rank": 0}
    run = prepare(text_to_image(tiny("sdxl"), data, tmp_path, **options))
    assert list(run.models) == ["unet", "text_encoder_2"]


def states(run: Run) -> dict[str, list[torch.Tensor]]:
    return {c: [p.detach().clone() for p in lora_layers(m)] for c, m in run.models.items()}


def test_text_encoders_stop_at_their_steps(tiny: Folder, data: Path, tmp_path: Path) -> None:
    """From its stop step on a text encoder's LoRA does not change by a bit, weight decay, momentum
    and a bound on its norm included, and until then and elsewhere it does."""
    options = {
        "train_text_encoder": True, "text_encoder_stop_step": 2, "text_encoder_2_stop_step": 4,
        "max_train_steps": 6, "adam_weight_decay": 0.1, "scale_weight_norms": 1e-3,
    }  # fmt: skip
    run = prepare(text_to_image(tiny("sdxl"), data, tmp_path, **options))
    loaded, original = [states(run)], loop.batch_loss

    def watched(run: Run, *batch: object) -> torch.Tensor:
        loaded.append(states(run))
        return original(run, *batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "batch_loss", watched)
        loop.open_output(run)
        requests = Requests(run.output_dir)
        with listening(requests):
            loop.train_steps(run, loop.LossLog(run), requests)
    loaded = [*loaded[1:], states(run)]  # before each step, and after the last
    for component, stop in (("unet", 6), ("text_encoder", 2), ("text_encoder_2", 4)):
        for step, (before, after) in enumerate(zip(loaded, loaded[1:], strict=False)):
            pairs = zip(before[component], after[component], strict=True)
            same = [torch.equal(a, b) for a, b in pairs]
            assert all(same) if step >= stop else not all(same), (component, step)
    assert "text_encoder after step 2" in run.summary.rows["stop early"]


def test_stopping_resumes_exactly(tiny: Folder, data: Path, tmp_path: Path) -> None:
    """A run whose text encoders stop is the same, to the last bit, when a finished run of two steps
    is given four more, which go across that, and when it is resumed after that."""
    options = {
        "train_text_encoder": True, "text_encoder_stop_step": 3, "checkpointing_steps": 2,
        "max_train_steps": 6,
    }  # fmt: skip
    whole = tmp_path / "whole"
    sd_lora.train(text_to_image(tiny("sd1"), data, whole, **options))
    planned = options | {"max_train_steps": 2}
    sd_lora.train(text_to_image(tiny("sd1"), data, tmp_path / "cut2", **planned))
    shutil.copytree(whole, tmp_path / "cut4")
    shutil.rmtree(tmp_path / "cut4" / "checkpoint-6")
    for part in (tmp_path / "cut2", tmp_path / "cut4"):
        again = options | {"resume_from_checkpoint": "latest"}
        sd_lora.train(text_to_image(tiny("sd1"), data, part, **again))
        files = [
            load_file(folder / "checkpoint-6" / "adapter.safetensors") for folder in (whole, part)
        ]
        assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])


def test_going_back_forgets_embeddings(tiny: Folder, data: Path, tmp_path: Path) -> None:
    """Embeddings of text encoders that have stopped are encoded anew where the run takes an earlier
    state of theirs: they are those of that state, and not the ones before."""
    run = prepare(
        text_to_image(
            tiny("sd1"),
            data,
            tmp_path,
            train_text_encoder=True,
            text_encoder_stop_step=3,
            checkpointing_steps=1,
            max_train_steps=4,
            text_encoder_lr=1e-2,
        )  # fmt: skip
    )
    loop.open_output(run)
    loop.train_steps(run, loop.LossLog(run))
    caption = run.stream.batch(0).items[0].caption
    (before,) = run.text.embeddings([caption], 4)
    run.load(checkpoint.read(tmp_path / "checkpoint-1", run.models))
    (found,) = run.text.embeddings([caption], 4)
    with torch.no_grad():
        (right,) = run.text.caption_encoder.encode(run.text.encoders, [caption])
    assert torch.equal(found.hidden, right.hidden.to(found.hidden))
    assert not torch.equal(found.hidden, before.hidden)


def test_inpainting_sees_masks_and_what_they_leave(
    tiny: Folder, data: Path, tmp_path: Path
) -> None:
    """The UNet's further channels are a mask of zeros and ones that changes from sample to sample,
    and latents that differ from the image's where it is masked; nothing is cached."""
    run = prepare(text_to_image(tiny("sd1-inpainting"), data, tmp_path))
    batch = run.stream.batch(0)
    x0 = run.latents.latents(batch.items, batch.loaded).x0
    whole = run.unet_input(x0, batch)
    assert whole.shape == (4, 9, 8, 8)
    assert torch.equal(whole[:, :4], x0)
    assert set(whole[:, 4].unique().tolist()) <= {0.0, 1.0}
    masks = {
        tuple(run.unet_input(x0, run.stream.batch(i))[0, 4].flatten().tolist())
        for i in range(0, 18, 2)
    }
    assert len(masks) > 3
    assert all(loaded.pixels is not None and loaded.moments is not None for loaded in batch.loaded)


def test_timesteps_are_those_that_the_user_and_the_family_have(
    tiny: Folder, data: Path, tmp_path: Path
) -> None:
    """The refiner learns its first 200 timesteps; min and max bound them; impossible ones are
    refused."""
    run = prepare(text_to_image(tiny("refiner"), data, tmp_path))
    timesteps = run.objective.timesteps
    assert (timesteps.first, timesteps.last) == (0, 200)
    bounds = {"min_timestep": 300, "max_timestep": 400}
    run = prepare(text_to_image(tiny("sd1"), data, tmp_path, **bounds))
    told = []
    run.prepared["unet"].register_forward_pre_hook(lambda m, args: told.extend(args[1].tolist()))
    for i in range(30):
        loop.batch_loss(run, run.stream.batch(i), 0)
    assert min(told) >= 300
    assert max(told) < 400
    preserved = {"output_preservation": "blank"}  # which the refiner cannot draw by itself
    with pytest.raises(sd_lora.UsageError, match="cannot draw images alone. Give 0"):
        prepare(text_to_image(tiny("refiner"), data, tmp_path, **preserved))
    preserved["preservation_sampler_steps"] = 0
    prepare(text_to_image(tiny("refiner"), data, tmp_path, **preserved))
    with pytest.raises(sd_lora.UsageError, match="the model has 1000"):
        prepare(text_to_image(tiny("sd1"), data, tmp_path, max_timestep=1001))


def test_defaults_of_sdxl_come_with_the_model(tiny: Folder, data: Path, tmp_path: Path) -> None:
    """Without a word of it, SDXL is trained at its resolution and DreamBooth's rate for it."""
    run = prepare(dreambooth(tiny("sdxl"), data, tmp_path, resolution=None, learning_rate=None))
    assert (run.config.resolution, run.config.learning_rate) == (64, 1e-4)  # 8 latents of 8 pixels
    run = prepare(dreambooth(tiny("sd1"), data, tmp_path, resolution=None, learning_rate=None))
    assert (run.config.resolution, run.config.learning_rate) == (64, 5e-4)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("sd1", {"resolution": 72}, "resolution 72 is not a multiple of 32 .* take 64"),
        ("sd1", {"clip_skip": 2}, "clip_skip 2 is more than the text_encoder .* at most 1"),
        ("sd1", {"clip_skip": 9, "train_text_encoder": True}, "clip_skip 9 is more .* at most 1"),
        ("sdxl", {"clip_skip": 1}, "clip_skip 1 is more than the text_encoder .* at most 0"),
        ("sdxl", {"family": "sd1"}, "is a model of family sdxl, and family says sd1"),
    ],
)
def test_what_a_model_cannot_do_is_told_first(
    kind: str, changes: dict, message: str, tiny: Folder, data: Path, tmp_path: Path
) -> None:
    """Sizes, layers and families that do not fit the model are errors before any training."""
    with pytest.raises(sd_lora.UsageError, match=message):
        prepare(text_to_image(tiny(kind), data, tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"snr_gamma": 5.0}, "leave out --snr_gamma"),
        ({"rescale_betas_zero_snr": True}, "is an EDM model, and its noise levels have no betas"),
    ],
)
def test_what_an_edm_model_cannot_do(
    changes: dict, message: str, tiny: Folder, data: Path, tmp_path: Path
) -> None:
    """Playground v2.5's kind of model is trained so without a word, and refuses what it has no use
    for."""
    model = tmp_path / "edm"
    shutil.copytree(tiny("sdxl"), model)
    diffusers.EDMEulerScheduler().save_pretrained(model / "scheduler")
    run = prepare(text_to_image(model, data, tmp_path / "out"))
    assert run.summary.rows["objective"] == "edm, EDM weighting"
    with pytest.raises(sd_lora.UsageError, match=message):
        prepare(text_to_image(model, data, tmp_path / "out", **changes))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_an_edm_model_trains_to_verified_files(
    prediction: str, tiny: Folder, data: Path, tmp_path: Path
) -> None:
    """A whole run on an EDM model of either convention, new words included: files that load."""
    model = tmp_path / "edm"
    shutil.copytree(tiny("sdxl"), model)
    diffusers.EDMEulerScheduler(prediction_type=prediction).save_pretrained(model / "scheduler")
    words = {"instance_prompt": "a <dog>", "token_abstraction": "<dog>"}
    config = dreambooth(model, data, tmp_path / "out", **words, max_train_steps=4)
    result = sd_lora.train(config)
    assert [file.worst_error < 1e-5 for file in result.files] == [True, True]
    with safe_open(result.files[1].path, "pt") as file:
        kind = "v" if prediction == "v_prediction" else "epsilon"
        assert file.metadata()["modelspec.prediction_type"] == kind
    with safe_open(result.words[0], "pt") as file:
        assert file.metadata()["modelspec.architecture"].endswith("xl-v1-base/textual-inversion")


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_clip_skip_trains_in_every_precision(
    precision: str, tiny: Folder, data: Path, tmp_path: Path
) -> None:
    """SD1's final norm after a skipped layer is of the base's precision, and Accelerate gives out
    float32: the text encoder learns all the same, but for the layer that is left out."""
    config = text_to_image(
        tiny("sd1"), data, tmp_path, mixed_precision=precision, clip_skip=1,
        train_text_encoder=True, max_train_steps=2,
    )  # fmt: skip
    result = sd_lora.train(config)
    assert all(map(math.isfinite, result.losses))
    adapter = open_lora(result.files[0].path).adapter
    assert {name.split(".")[3] for name in adapter["text_encoder"]} == {"0"}


def test_encoders_that_have_stopped_are_read_no_more(
    tiny: Folder, data: Path, tmp_path: Path
) -> None:
    """Once nothing of the text encoders learns, captions are read once more and then never."""
    options = {"train_text_encoder": True, "text_encoder_stop_step": 2, "caption_dropout": 0.3}
    run = prepare(text_to_image(tiny("sdxl"), data, tmp_path, **options, max_train_steps=6))
    calls = []
    for encoder in run.text.encoders.values():
        encoder.register_forward_hook(lambda *_: calls.append(1))
    for step in range(6):
        before = len(calls)
        loop.batch_loss(run, run.stream.batch(step), step)
        assert (len(calls) > before) == (step <= 2), step
    want = run.text.caption_encoder.encode(run.text.encoders, ["a photo of thing 3", None])
    for caption, embedding in zip(["a photo of thing 3", None], want, strict=True):
        assert torch.equal(run.text.table.get(caption).hidden, embedding.hidden)


def test_square_images_are_encoded_once_for_inpainting(tiny: Folder, tmp_path: Path) -> None:
    """Only what a mask leaves is encoded at each step where the crop does not change, and the
    whole image's latents are those of a fresh encoding."""
    square = images(tmp_path / "square", size=(64, 64))
    run = prepare(text_to_image(tiny("sd1-inpainting"), square, tmp_path / "out"))
    batch = run.stream.batch(0)
    assert all(loaded.pixels is not None for loaded in batch.loaded)
    calls, encode = [], run.latents.encode
    run.latents.encode = lambda *args: calls.append(1) or encode(*args)
    x0 = run.latents.latents(batch.items, batch.loaded).x0
    run.unet_input(x0, batch)
    assert len(calls) == 1
    again = [dataclasses.replace(loaded, moments=None) for loaded in batch.loaded]
    assert torch.equal(run.latents.latents(batch.items, again).x0, x0)


def test_the_vae_is_not_run_under_autocast(tiny: Folder) -> None:
    """Class images are drawn under float16 autocast on a GPU: the decoder stays in its own dtype,
    in which SDXL's does not overflow."""
    parts = load_parts(str(tiny("sdxl")))
    loaded = []
    parts.vae.decoder.conv_in.register_forward_hook(lambda m, i, o: loaded.append(o.dtype))
    options = {"size": (64, 64), "device": torch.device("cpu"), "steps": 1}
    with torch.autocast("cpu", torch.bfloat16):
        list(sample(parts, parts.caption_encoder(), ["a"], [0], **options))
    assert loaded == [torch.float32]


def test_the_schedule_of_a_zero_snr_base_can_be_undone(
    tiny: Folder, data: Path, tmp_path: Path
) -> None:
    """--no-rescale_betas_zero_snr overrules the base's scheduler."""
    config = text_to_image(tiny("sdxl-v"), data, tmp_path, rescale_betas_zero_snr=False)
    assert prepare(config).objective.schedule.alpha[-1] > 0


@pytest.mark.parametrize(
    "caption",
    [
        "a cat.swap(dog) here", '("a cat", "a dog").blend(1, 1)', '("a", "b").and()',
        '("a", "b").and(1)', "a withLora(x,0.5)", "a (red:1.3) car",
    ],
)  # fmt: skip
def test_syntax_beyond_weights_is_refused(
    caption: str, tiny: Folder, data: Path, tmp_path: Path
) -> None:
    """What compel would drop from the pooled text, or cut, is an error by the caption."""
    config = dreambooth(
        tiny("sdxl"), data, tmp_path, instance_prompt=caption, weighted_prompts=True
    )
    with pytest.raises(sd_lora.UsageError, match=r"not compel's \.blend\(\)"):
        prepare(config)
    words = {"weighted_prompts": True, "validation_prompt": caption, "num_validation_images": 1}
    with pytest.raises(sd_lora.UsageError, match=r"not compel's \.blend\(\)"):
        prepare(dreambooth(tiny("sdxl"), data, tmp_path, **words))


def test_every_family_has_a_loadable_row() -> None:
    """The table's pipelines are classes of diffusers, and each has the parts that the row names."""
    for family in FAMILIES.values():
        for name in family.pipelines.values():
            pipeline = getattr(diffusers, name)
            assert set(family.components) <= set(pipeline.__init__.__annotations__)
