"""Single files: configurations inferred from their tensors, and the weights loaded from them."""

import logging
import os
import pickle
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sd_lora.errors import UsageError
from sd_lora.formats.canonical import canonical_name
from sd_lora.models.parameter_shapes import shapes_by_config
from sd_lora.models.published_configs import CONFIGS
from sd_lora.models.single_file import SingleFile
from tests.single import (
    build_single_pipeline,
    build_single_unet,
    models_of_pipeline,
    original_tensors,
    write_single,
    write_tensors,
)

FAMILIES = ("sd1", "sd2", "sdxl", "refiner", "sd1-inpainting", "sd2-inpainting", "sdxl-inpainting")
CUT = ("sd1-small", "sdxl-small", "sdxl-ssd")
UNET = "model.diffusion_model."
CLASSES: dict[str, Any] = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}
PUBLISHED_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}


def on_meta(part: str, config: dict[str, Any]) -> nn.Module:
    with torch.device("meta"):
        if part.startswith("text"):
            return CLASSES[part](CLIPTextConfig(**config))
        return CLASSES[part](**config)


def config_of(model: Any) -> dict[str, Any]:
    """A model's configuration with its defaults, less the entries about its source."""
    text = hasattr(model.config, "to_dict")
    config = model.config.to_dict() if text else dict(model.config)
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in config.items() if k[0] != "_"}
    # one number stands for as many as there are levels
    if isinstance(plain.get("transformer_layers_per_block"), int):
        levels = len(plain["block_out_channels"])
        plain["transformer_layers_per_block"] = [plain["transformer_layers_per_block"]] * levels
    return plain


# --- what the tensors say ---


def by_canonical_name(part: str, shapes: dict[str, Any]) -> dict[str, Any]:
    """Shapes by names that are the same with every version of transformers."""
    return {canonical_name(part, name): shape for name, shape in shapes.items()}


@pytest.mark.parametrize("channels", [4, 9])
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "sdxl_refiner"])
def test_the_published_models(family: str, channels: int) -> None:
    """From nothing but the names and shapes of SD1.5, SD2.1, SDXL, the refiner and their inpainting
    models come models with the same parameters and configurations, the heads and the 23rd layer
    included; and SDXL's VAE has its own scale."""
    scale = 0.18215 if family in ("sd1", "sd2") else 0.13025
    sample_size = {"sd1": 64, "sd2": 96}.get(family, 128)
    configs = {part: dict(config) for part, config in CONFIGS[family].items()}
    configs["unet"]["in_channels"] = channels
    configs["vae"] = PUBLISHED_VAE | {"sample_size": 8 * sample_size, "scaling_factor": scale}
    models = {part: on_meta(part, config) for part, config in configs.items()}
    shapes = {key: tuple(t.shape) for key, t in original_tensors(models).items()}
    said = {"modelspec.prediction_type": "v"} if family == "sd2" else {}
    single = SingleFile(Path("meta.safetensors"), shapes, said)
    assert single.family == family
    assert single.configs.keys() == models.keys()
    for part, model in models.items():
        found = on_meta(part, single.configs[part])
        assert shapes_of(found) == shapes_of(model)
        if part != "vae":  # the tables that LoRA files are checked against
            tables, live = shapes_by_config(part, configs[part]), shapes_of(model)
            assert by_canonical_name(part, tables) == by_canonical_name(part, live)
        have, want = config_of(found), config_of(model)
        if part == "unet":  # a level without attention has no depth
            have["transformer_layers_per_block"] = depths(have)
            want["transformer_layers_per_block"] = depths(want)
        assert have == want
    assert [m.heads for m in models["unet"].modules() if hasattr(m, "heads")] == [
        m.heads for m in on_meta("unet", single.configs["unet"]).modules() if hasattr(m, "heads")
    ]


PUBLISHED_CUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "BK-SDM-Base": ("sd1", {"layers_per_block": 1}),
    "small-sd": ("sd1", {"layers_per_block": 1, "mid_block_type": None}),
    "KOALA-700M": (
        "sdxl",
        {
            "layers_per_block": 1,
            "mid_block_type": None,
            "transformer_layers_per_block": (1, 2, 5),
        },
    ),
    "SSD-1B": (
        "sdxl",
        {
            "mid_block_type": "UNetMidBlock2D",
            "transformer_layers_per_block": (1, 2, 4),
            "reverse_transformer_layers_per_block": ((4, 4, 10), (2, 1, 1), 1),
        },
    ),
    "Segmind-Vega": (
        "sdxl",
        {
            "mid_block_type": "UNetMidBlock2D",
            "transformer_layers_per_block": (1, 1, 2),
            "reverse_transformer_layers_per_block": ((2, 2, 2), (1, 1, 1), 1),
        },
    ),
}
"""Model → its family, and what its UNet's configuration has otherwise (depths to the kind)."""


@pytest.mark.parametrize("name", PUBLISHED_CUTS)
def test_cut_down_models(name: str) -> None:
    """From nothing but names and shapes at the published widths come UNets with the same
    parameters, and every tensor has the place that it came from."""
    family, changes = PUBLISHED_CUTS[name]
    unet = on_meta("unet", CONFIGS[family]["unet"] | changes)
    shapes = {key: tuple(t.shape) for key, t in original_tensors({"unet": unet}).items()}
    single = SingleFile(Path("meta.safetensors"), shapes)
    assert single.family == family
    assert shapes_of(on_meta("unet", single.configs["unet"])) == shapes_of(unet)
    assert shapes_by_config("unet", CONFIGS[family]["unet"] | changes) == shapes_of(unet)
    assert len(single.check_keys("unet")) == len(shapes)


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def depths(config: dict[str, Any]) -> list[int]:
    pairs = zip(config["transformer_layers_per_block"], config["down_block_types"], strict=True)
    last = config["transformer_layers_per_block"][-1]  # the middle's
    return [depth * ("CrossAttn" in kind) for depth, kind in pairs] + [last]


def test_open_clip_h_with_and_without_its_last_layer() -> None:
    """SD2 files come with all 24 layers of OpenCLIP-H and with the 23 that are used: 23, of both.
    A text encoder of published width without its last layer is refused."""
    models = {part: on_meta(part, dict(config)) for part, config in CONFIGS["sd2"].items()}
    shapes = {key: tuple(t.shape) for key, t in original_tensors(models).items()}
    short = {key: shape for key, shape in shapes.items() if "resblocks.23." not in key}
    assert len(shapes) - len(short) == 12
    for some in (shapes, short):
        assert SingleFile(Path("x"), some).configs["text_encoder"]["num_hidden_layers"] == 23
    shorter = {key: shape for key, shape in short.items() if "resblocks.22." not in key}
    with pytest.raises(UsageError, match=r"lacks 12 tensors .*resblocks\.22"):
        SingleFile(Path("x"), shorter).load("text_encoder", torch.float32)


@pytest.mark.parametrize("vocabulary", [49408, 49410])
def test_the_end_token_is_where_the_text_is_pooled(vocabulary: int) -> None:
    """The ids of start and end are CLIP's, also in a vocabulary to which words were added."""
    models = {"unet": on_meta("unet", CONFIGS["sd1"]["unet"])}
    config = CONFIGS["sd1"]["text_encoder"] | {"vocab_size": vocabulary}
    models["text_encoder"] = on_meta("text_encoder", config)
    shapes = {key: tuple(t.shape) for key, t in original_tensors(models).items()}
    found = SingleFile(Path("x"), shapes).configs["text_encoder"]
    assert (found["bos_token_id"], found["eos_token_id"]) == (49406, 49407)
    assert found["vocab_size"] == vocabulary


def test_marks_of_prediction(tmp_path: Path) -> None:
    """v-prediction is known by a tensor or by the header, for every family; without either, SD1
    and SDXL predict epsilon, and SD2's prediction type is unknown."""
    sd1, sd2 = build_single_pipeline("sd1"), build_single_pipeline("sd2")
    plain = SingleFile.open(write_single(sd1, tmp_path / "a.safetensors"))
    assert (plain.prediction_type, plain.zero_terminal_snr, plain.edm) == ("epsilon", False, False)
    marked = write_single(sd1, tmp_path / "b.safetensors", marks=("v_pred", "ztsnr"))
    single = SingleFile.open(marked)
    assert (single.prediction_type, single.zero_terminal_snr) == ("v_prediction", True)
    path = write_single(sd2, tmp_path / "c.safetensors")
    assert SingleFile.open(path).prediction_type is None
    assert SingleFile.open(path).configs["unet"]["sample_size"] == 64
    for said, kind, size in (("v", "v_prediction", 96), ("epsilon", "epsilon", 64)):
        save_file(load_file(path), path, {"modelspec.prediction_type": said})
        single = SingleFile.open(path)
        assert single.header["modelspec.prediction_type"] == said
        assert single.prediction_type == kind
        assert single.configs["unet"]["sample_size"] == size


def test_schedulers_of_a_file(tmp_path: Path) -> None:
    """The file's configuration gives Stable Diffusion's scheduler: the published noise levels, and
    a last step without signal if the file says so."""
    pipeline = build_single_pipeline("sd1")
    single = SingleFile.open(write_single(pipeline, tmp_path / "a.safetensors"))
    config = single.scheduler_config("epsilon")
    scheduler = DDPMScheduler.from_config(config)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    assert torch.allclose(scheduler.alphas_cumprod, (1 - betas).cumprod(0))
    assert (scheduler.config.prediction_type, scheduler.config.steps_offset) == ("epsilon", 1)
    assert scheduler.config.timestep_spacing == "leading"
    assert not scheduler.config.clip_sample
    assert not DDIMScheduler.from_config(scheduler.config).config.set_alpha_to_one
    marked = write_single(pipeline, tmp_path / "b.safetensors", marks=("ztsnr",))
    scheduler = DDPMScheduler.from_config(SingleFile.open(marked).scheduler_config("v_prediction"))
    assert float(scheduler.alphas_cumprod[-1]) == 0
    assert scheduler.config.timestep_spacing == "trailing"
    assert scheduler.config.prediction_type == "v_prediction"


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_playground(suffix: str, tmp_path: Path) -> None:
    """SDXL of EDM's kind: its scheduler, and the latents' own mean and deviation."""
    pipeline = build_single_pipeline("sdxl")
    path = write_single(pipeline, tmp_path / f"a{suffix}", marks=("edm_mean", "edm_std"))
    single = SingleFile.open(path)
    assert single.edm
    config = single.scheduler_config("v_prediction")
    scheduler = EDMEulerScheduler.from_config(config)
    assert config["_class_name"] == "EDMEulerScheduler"
    assert scheduler.config.prediction_type == "epsilon"
    sigmas = (scheduler.config.sigma_min, scheduler.config.sigma_max, scheduler.config.sigma_data)
    assert sigmas == (0.002, 80, 0.5)
    vae: Any = single.load("vae", torch.float32)
    assert vae.config.latents_mean == [0.5, 1.5, 2.5, 3.5]
    assert vae.config.latents_std == [1.5, 2.5, 3.5, 4.5]
    assert vae.config.scaling_factor == 0.5


# --- the weights ---


def same(model: nn.Module, other: nn.Module, dtype: torch.dtype, through: torch.dtype) -> None:
    """Every parameter of `model` is `other`'s, bit for bit, as stored in `through`."""
    have, want = model.state_dict(), other.state_dict()
    assert have.keys() == want.keys()
    for name, tensor in have.items():
        assert tensor.dtype == dtype, name
        assert torch.equal(tensor, want[name].to(through).to(dtype)), name
    assert not any(p.is_meta for p in model.parameters())


@pytest.mark.parametrize(
    ("family", "suffix"),
    [
        *((family, ".safetensors") for family in (*FAMILIES, *CUT)),
        *((family, ".ckpt") for family in ("sd1", "sd2", "sdxl")),
    ],
)
def test_all_parts_come_back(family: str, suffix: str, tmp_path: Path) -> None:
    """Every part of every family has the weights that were written, bit for bit, and the
    configuration: parts of the file's dtype and of others."""
    pipeline = build_single_pipeline(family)
    half = write_single(pipeline, tmp_path / f"half{suffix}", torch.float16)
    full = write_single(pipeline, tmp_path / f"full{suffix}")
    for path, through in ((half, torch.float16), (full, torch.float32)):
        single = SingleFile.open(path)
        models = models_of_pipeline(pipeline)
        assert single.configs.keys() == models.keys()
        for part, model in models.items():
            for dtype in (torch.float32, torch.bfloat16):
                loaded = single.load(part, dtype)
                assert type(loaded) is type(model)
                assert not loaded.training
                assert not hasattr(loaded, "hf_device_map")
                same(loaded, model, dtype, through)
        unet: Any = single.load("unet", torch.float32)
        want = config_of(pipeline.unet)
        have = config_of(unet)
        assert have == want


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "refiner", *CUT])
def test_models_compute_the_same(family: str, tmp_path: Path) -> None:
    """Settings that shapes do not show (heads, activations, the token of the pooled text) are right
    as well: UNet, text encoders and VAE give the same numbers as the models that were written."""
    pipeline = build_single_pipeline(family)
    single = SingleFile.open(write_single(pipeline, tmp_path / "a.safetensors"))
    draw = torch.Generator().manual_seed(3)
    ids = torch.tensor([[512, 3, 40, 513, 513, 513], [512, 513, 7, 513, 0, 0]])
    for part in ("text_encoder", "text_encoder_2"):
        model = getattr(pipeline, part, None)
        if model is not None:
            have, want = single.load(part, torch.float32)(ids), model(ids)
            assert torch.equal(have[0], want[0])
            assert torch.equal(have.last_hidden_state, want.last_hidden_state)
            if part == "text_encoder":
                assert torch.equal(have.pooler_output, want.pooler_output)
    config = pipeline.unet.config
    text = torch.randn(2, 6, config.cross_attention_dim, generator=draw)
    x = torch.randn(2, 4, 8, 8, generator=draw)
    added = None
    if config.addition_embed_type:
        numbers = 5 if family == "refiner" else 6
        times = torch.arange(2.0 * numbers).reshape(2, numbers)
        added = {"text_embeds": torch.randn(2, 64, generator=draw), "time_ids": times}
    inputs: dict[str, Any] = {"encoder_hidden_states": text, "added_cond_kwargs": added}
    have = single.load("unet", torch.float32)(x, 500, **inputs).sample
    assert torch.equal(have, pipeline.unet(x, 500, **inputs).sample)
    vae: Any = single.load("vae", torch.float32)
    images = torch.randn(1, 3, 16, 16, generator=draw)
    latents = vae.encode(images).latent_dist.mean
    assert torch.equal(latents, pipeline.vae.encode(images).latent_dist.mean)
    assert torch.equal(vae.decode(latents).sample, pipeline.vae.decode(latents).sample)


def test_models_own_their_memory(tmp_path: Path) -> None:
    """A file written over in place during a run does not change the run's model."""
    pipeline = build_single_pipeline("sd1")
    for suffix in (".safetensors", ".ckpt"):
        path = write_single(pipeline, tmp_path / f"a{suffix}")
        single = SingleFile.open(path)
        models = {part: single.load(part, torch.float32) for part in single.configs}
        with open(path, "r+b") as file:
            file.write(b"\0" * path.stat().st_size)
        for part, model in models.items():
            same(model, models_of_pipeline(pipeline)[part], torch.float32, torch.float32)


class Records(logging.Handler):
    """A library's log messages."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.mark.parametrize("family", ["sd2", "refiner"])
def test_loading_is_quiet(family: str, tmp_path: Path) -> None:
    """Neither library warns while parts load, and both log as before afterwards."""
    single = SingleFile.open(
        write_single(build_single_pipeline(family), tmp_path / "a.safetensors")
    )
    records = Records()
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers", "accelerate")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(records)
    try:
        for part in single.configs:
            single.load(part, torch.bfloat16)
        assert records.messages == []
        assert [logger.level for logger in loggers] == levels
    finally:
        for logger in loggers:
            logger.removeHandler(records)


def test_pickles_of_old_torch(tmp_path: Path) -> None:
    """Checkpoints of torch before 1.6 are no zip files, and tensors may lie at the top."""
    pipeline = build_single_pipeline("sd1")
    tensors = original_tensors(models_of_pipeline(pipeline))
    path = tmp_path / "old.ckpt"
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    loaded = SingleFile.open(path).load("unet", torch.float32)
    same(loaded, pipeline.unet, torch.float32, torch.float32)


def rewritten(
    path: Path, change: Callable[[dict[str, Tensor]], object], family: str = "sd1"
) -> SingleFile:
    """A single file whose dictionary was changed in place before it was written."""
    tensors = original_tensors(models_of_pipeline(build_single_pipeline(family)))
    change(tensors)
    return SingleFile.open(write_tensors(tensors, path))


def test_what_is_harmless(tmp_path: Path) -> None:
    """Files of 2022 without `text_model.` in CLIP's names, averaged weights, noise schedules, the
    buffers of CLIP and the VAE's discriminator change nothing."""

    def change(tensors: dict[str, Tensor]) -> None:
        for key in list(tensors):
            if ".text_model." in key:
                tensors[key.replace(".text_model.", ".")] = tensors.pop(key)
        tensors["model_ema.diffusion_modelinput_blocks00weight"] = torch.zeros(3)
        tensors["model_ema.decay"] = torch.zeros(())
        tensors["alphas_cumprod"] = torch.zeros(1000)
        tensors["first_stage_model.loss.logvar"] = torch.zeros(())
        tensors["cond_stage_model.transformer.logit_scale"] = torch.zeros(())

    single = rewritten(tmp_path / "a.safetensors", change)
    assert "cond_stage_model.transformer.embeddings.position_ids" in single.shapes
    for part, model in models_of_pipeline(build_single_pipeline("sd1")).items():
        same(single.load(part, torch.float32), model, torch.float32, torch.float32)


def test_unused_tensors_of_sdxl(tmp_path: Path) -> None:
    """Other programs' tensors beside SDXL's text encoders are not read."""

    def change(tensors: dict[str, Tensor]) -> None:
        first, second = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
        tensors[f"{first}text_projection.weight"] = torch.eye(64)
        tensors[f"{second}transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]

    single = rewritten(tmp_path / "a.safetensors", change, "sdxl")
    for part in ("text_encoder", "text_encoder_2"):
        model = getattr(build_single_pipeline("sdxl"), part)
        same(single.load(part, torch.float32), model, torch.float32, torch.float32)


MISSING = {
    "unet": [
        f"{UNET}out.0.bias",
        f"{UNET}time_embed.2.weight",
        f"{UNET}input_blocks.1.0.emb_layers.1.weight",
        f"{UNET}output_blocks.3.1.transformer_blocks.0.ff.net.2.bias",
    ],
    "vae": [
        "first_stage_model.post_quant_conv.weight",
        "first_stage_model.decoder.mid.attn_1.q.bias",
        "first_stage_model.decoder.up.2.upsample.conv.weight",
    ],
    "text_encoder": [
        "cond_stage_model.transformer.text_model.final_layer_norm.bias",
        "cond_stage_model.transformer.text_model.encoder.layers.1.self_attn.k_proj.weight",
    ],
}


@pytest.mark.parametrize(("part", "key"), [(p, key) for p in MISSING for key in MISSING[p]])
def test_missing_tensors(part: str, key: str, tmp_path: Path) -> None:
    """A tensor that a part needs and the file lacks is an error that names it, never a random
    weight; the other parts load."""
    single = rewritten(tmp_path / "a.safetensors", lambda tensors: tensors.pop(key))
    with pytest.raises(UsageError, match=rf"lacks 1 tensors of its {part} \({re.escape(key)}"):
        single.load(part, torch.float32)
    for other in MISSING.keys() - {part}:
        single.load(other, torch.float32)


def test_missing_tensors_of_open_clip(tmp_path: Path) -> None:
    """The same for encoders in OpenCLIP's names, with three projections in one tensor."""
    for family, part, stem in (
        ("sd2", "text_encoder", "cond_stage_model.model."),
        ("sdxl", "text_encoder_2", "conditioner.embedders.1.model."),
        ("refiner", "text_encoder_2", "conditioner.embedders.0.model."),
    ):
        key = f"{stem}transformer.resblocks.1.attn.in_proj_weight"
        path = tmp_path / f"{family}.safetensors"
        single = rewritten(path, lambda tensors, key=key: tensors.pop(key), family)  # type: ignore[misc]
        with pytest.raises(UsageError, match=rf"lacks 1 tensors of its {part} \({re.escape(key)}"):
            single.load(part, torch.float32)


@pytest.mark.parametrize(
    ("part", "key"),
    [
        ("unet", f"{UNET}time_embed.cond_proj.weight"),
        ("unet", f"{UNET}input_blocks.1.1.transformer_blocks.0.attn1.to_r.scale_weight"),
        ("vae", "first_stage_model.encoder.mid.attn_2.q.weight"),
        ("text_encoder", "cond_stage_model.transformer.text_model.encoder.layers.1.adapter.weight"),
    ],
)
def test_tensors_too_many(part: str, key: str, tmp_path: Path) -> None:
    """A foreign tensor among a part's is an error that names it: distilled guidance, a scale of no
    weight, adapters. To leave it out would make another model."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[key] = torch.zeros(4)

    single = rewritten(tmp_path / "a.safetensors", change)
    with pytest.raises(
        UsageError, match=rf"has 1 that no {part} .*\({re.escape(key)}.*another kind"
    ):
        single.load(part, torch.float32)


def test_a_unet_alone(tmp_path: Path) -> None:
    """A file with the UNet alone is opened and loaded; another part is an error when it is asked
    for, and a refiner's UNet is known by the width of its text."""
    unet = build_single_unet("sd1").eval()
    path = write_tensors(original_tensors({"unet": unet}), tmp_path / "a.safetensors")
    single = SingleFile.open(path)
    assert single.configs.keys() == {"unet"}
    same(single.load("unet", torch.float32), unet, torch.float32, torch.float32)
    for part in ("vae", "text_encoder", "text_encoder_2"):
        with pytest.raises(UsageError, match=f"has no {part}: no tensor's name begins with"):
            single.load(part, torch.float32)
    for family in ("sdxl", "sdxl_refiner"):
        model = on_meta("unet", CONFIGS[family]["unet"])
        shapes = {key: tuple(t.shape) for key, t in original_tensors({"unet": model}).items()}
        single = SingleFile(Path("x"), shapes)
        assert single.family == family
        assert single.configs["unet"]["addition_time_embed_dim"] == 256


def test_shapes_that_do_not_fit(tmp_path: Path) -> None:
    """A tensor whose shape contradicts the others is an error that names it."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{UNET}out.0.weight"] = torch.zeros(33)

    single = rewritten(tmp_path / "a.safetensors", change)
    with pytest.raises(UsageError, match=r"does not load: .*conv_norm_out"):
        single.load("unet", torch.float32)

    def numbers(tensors: dict[str, Tensor]) -> None:
        tensors["conditioner.embedders.1.model.text_projection"] = torch.zeros(64, 63)

    with pytest.raises(UsageError, match="not a text of 63 and 6 numbers"):
        rewritten(tmp_path / "b.safetensors", numbers, "sdxl")


# --- files that are none ---


OTHERS: dict[str, tuple[str, dict[str, tuple[int, ...]]]] = {
    "sd3": (
        r"is Stable Diffusion 3;",
        {
            f"{UNET}joint_blocks.0.context_block.adaLN_modulation.1.bias": (9216,),
            f"{UNET}pos_embed": (1, 36864, 3),
            "first_stage_model.encoder.conv_in.weight": (8, 3, 3, 3),
        },
    ),
    "sd3 of another size": (
        r"is Stable Diffusion 3;",
        {f"{UNET}joint_blocks.0.x_block.mlp.fc1.weight": (8, 2)},
    ),
    "sd35": (
        r"is Stable Diffusion 3\.5;",
        {f"{UNET}joint_blocks.37.x_block.mlp.fc1.weight": (8, 2)},
    ),
    "sd35 medium": (
        r"is Stable Diffusion 3\.5;",
        {
            "joint_blocks.0.context_block.adaLN_modulation.1.bias": (9216,),
            "pos_embed": (1, 147456, 3),
        },
    ),
    "flux": (r"is Flux;", {"double_blocks.0.img_attn.norm.key_norm.scale": (128,)}),
    "pixart": (
        r"is PixArt;",
        {
            "blocks.0.mlp.fc1.weight": (8, 2),
            "blocks.0.cross_attn.q_linear.weight": (2, 2),
            "blocks.0.cross_attn.kv_linear.weight": (4, 2),
        },
    ),
    "cascade": (r"is Stable Cascade;", {"clip_txt_mapper.weight": (2048, 2)}),
    "cascade of a user interface": (
        r"is Stable Cascade;",
        {f"{UNET}clip_txt_mapper.weight": (1536, 2)},
    ),
    "animatediff": (
        r"is an AnimateDiff motion module;",
        {
            "down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0"
            ".attention_blocks.0.pos_encoder.pe": (1, 24, 320),
            "mid_block.motion_modules.0.temporal_transformer.norm.bias": (1280,),
        },
    ),
    "controlnet": (r"is a ControlNet;", {"control_model.time_embed.0.weight": (8, 2)}),
    "controlnet with its model": (
        r"is a ControlNet;",
        {f"{UNET}input_blocks.0.0.weight": (8, 4, 3, 3), "control_model.out.weight": (2,)},
    ),
    "another": (
        r"another kind \(hunyuan-video\)",
        {"txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1.bias": (8,)},
    ),
    "upscaler": (
        r"is an upscaler;",
        {f"{UNET}input_blocks.0.0.weight": (8, 7, 3, 3), f"{UNET}label_emb.weight": (1000, 8)},
    ),
    "pix2pix": (r"InstructPix2Pix model with 8", {f"{UNET}input_blocks.0.0.weight": (8, 8, 3, 3)}),
    "depth": (r"depth model with 5", {f"{UNET}input_blocks.0.0.weight": (8, 5, 3, 3)}),
    "video": (
        r"is Stable Video Diffusion;",
        {
            f"{UNET}input_blocks.0.0.weight": (8, 8, 3, 3),
            f"{UNET}input_blocks.1.0.time_stack.in_layers.0.weight": (8,),
        },
    ),
    "vae": (r"is a VAE alone;", {"encoder.conv_in.weight": (8, 3, 3, 3)}),
    "vae with a prefix": (r"is a VAE alone;", {"first_stage_model.quant_conv.bias": (8,)}),
    "text encoder": (
        r"is a text encoder alone;",
        {"text_model.embeddings.token_embedding.weight": (514, 8)},
    ),
    "bare unet": (r"is a UNet alone, without", {"input_blocks.0.0.weight": (8, 4, 3, 3)}),
    "part of a unet": (r"is incomplete: its UNet has no", {f"{UNET}out.2.bias": (4,)}),
    "lora of kohya": (r"is a LoRA file, not a model", {"lora_unet_mid.lora_up.weight": (8, 2)}),
    "lora of diffusers": (
        r"is a LoRA file, not a model",
        {"unet.mid_block.attentions.0.proj_in.lora_A.weight": (8, 2)},
    ),
    "lokr": (r"is a LoRA file, not a model", {"unet.mid_block.lokr_w1": (8, 2)}),
    "nothing known": (r"no model known here \(its first tensor: 'a'\)", {"a": (2,)}),
    "nothing": (r"no model known here \(its first tensor: None\)", {}),
}


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("name", OTHERS)
def test_other_files_are_named(name: str, suffix: str, tmp_path: Path) -> None:
    """A file of another kind is an error with the name of its kind."""
    match, shapes = OTHERS[name]
    tensors = {key: torch.zeros(shape) for key, shape in shapes.items()}
    with pytest.raises(UsageError, match=match):
        SingleFile.open(write_tensors(tensors, tmp_path / f"a{suffix}"))


def test_unclip(tmp_path: Path) -> None:
    """SD2.1 unCLIP has SDXL's layer for labels and SD2's width of text."""
    unet = on_meta("unet", CONFIGS["sd2"]["unet"])
    shapes = {key: tuple(t.shape) for key, t in original_tensors({"unet": unet}).items()}
    shapes[f"{UNET}label_emb.0.0.weight"] = (1280, 2048)
    keys = ("input_blocks.0.0.weight", "label_emb.0.0.weight")
    keys += ("middle_block.1.transformer_blocks.0.attn2.to_k.weight",)
    tensors = {f"{UNET}{key}": torch.zeros(shapes[f"{UNET}{key}"]) for key in keys}
    with pytest.raises(UsageError, match=r"is Stable Diffusion 2\.1 unCLIP"):
        SingleFile.open(write_tensors(tensors, tmp_path / "a.safetensors"))


def test_a_unet_that_is_not_understood(tmp_path: Path) -> None:
    """A UNet's first layer alone: the error names a tensor that tells the rest."""
    tensors = {f"{UNET}input_blocks.0.0.weight": torch.zeros(8, 4, 3, 3)}
    with pytest.raises(UsageError, match=r"no configuration can be inferred.*input_blocks\.1\."):
        SingleFile.open(write_tensors(tensors, tmp_path / "a.safetensors"))


def test_files_that_are_cut_off(tmp_path: Path) -> None:
    """A download that stopped is named as one, with the number of missing bytes if it is known;
    no place of the cut gives a traceback."""
    pipeline = build_single_pipeline("sd1")
    whole = write_single(pipeline, tmp_path / "a.safetensors").read_bytes()
    path = tmp_path / "cut.safetensors"
    path.write_bytes(whole[:-1234])
    with pytest.raises(UsageError, match=rf"cut off: 1234 of {len(whole)} bytes are missing"):
        SingleFile.open(path)
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    for size in (0, 1, 7, 8, 9, 100, header - 1, header, header + 1, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UsageError, match=r"cut off"):
            SingleFile.open(path)
    zipped = write_single(pipeline, tmp_path / "a.ckpt").read_bytes()
    path = tmp_path / "cut.ckpt"
    for size in (0, 1, 100, len(zipped) // 2, len(zipped) - 1000, len(zipped) - 1):
        path.write_bytes(zipped[:size])
        with pytest.raises(UsageError, match=r"cut off"):
            SingleFile.open(path)


class Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


def test_hostile_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code in a pickle is not run. Pickles of other objects, a git-lfs pointer and files that claim
    more than they hold are errors without a traceback."""
    monkeypatch.chdir(tmp_path)
    path = Path("a.ckpt")

    def refused(match: str) -> None:
        with pytest.raises(UsageError, match=match):
            SingleFile.open(path)

    path.write_bytes(pickle.dumps({"state_dict": Runs()}, protocol=2))
    refused(r"was not opened.*may run code")
    torch.save({"state_dict": Runs()}, path)
    refused(r"was not opened.*may run code")
    assert not Path("ran").exists()
    key = f"{UNET}input_blocks.0.0.weight"
    torch.save([torch.zeros(2)], path)
    refused(r"holds a list and not tensors by name")
    torch.save({key: torch.zeros(2), "note": "text"}, path)
    refused(r"holds 'note', a str and no tensor")
    torch.save({key: torch.zeros(1).expand(10**6, 4, 3, 3)}, path)
    refused(r"without values of its own")
    around: dict[str, Any] = {}
    around["state_dict"] = around
    torch.save(around, path)
    refused(r"holds 'state_dict', a dict and no tensor")
    path = Path("a.safetensors")
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n")
    refused(r"git-lfs pointer")
    path.write_bytes(b"\xff" * 100)
    refused(r"cannot be read")
    path.write_bytes(struct.pack("<Q", 2**62) + b"{" * 100)
    refused(r"cut off: its header has")
    path.write_bytes(b"<html>no such file</html>")
    refused(r"cannot be read")
    path = Path("a.zip")
    path.write_bytes(b"PK")
    refused(r"is no checkpoint by its name")
    path = Path("nothing.safetensors")
    refused(r"is not a file")
    path = tmp_path
    refused(r"is not a file")


def test_a_file_that_changed_after_it_was_opened(tmp_path: Path) -> None:
    """A checkpoint that is gone, cut or another one by the time of its loading: an error."""
    path = write_single(build_single_pipeline("sd1"), tmp_path / "a.safetensors")
    single = SingleFile.open(path)
    write_single(build_single_pipeline("sd2"), path)
    with pytest.raises(UsageError, match=r"the unet of .* does not load"):
        single.load("unet", torch.float32)
    path.unlink()
    with pytest.raises(UsageError, match=r"is not a file"):
        single.load("unet", torch.float32)


# --- memory ---


MEASURE = """
import sys
from pathlib import Path
import torch
from sd_lora.models.single_file import SingleFile

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))

for word in sys.argv[1:]:
    small, large, dtype = word.split(":")
    dtype = getattr(torch, dtype)
    for part in ("text_encoder", "unet"):
        warm = SingleFile.open(Path(small)).load(part, dtype)  # what is imported at the first call
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
        before = status("VmRSS")
        model = SingleFile.open(Path(large)).load(part, dtype)
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        print(status("VmHWM") - before, size)
        del warm, model
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with checkpoints of 200 MB (float32), 136 of it the UNet, and tiny ones."""
    folder = tmp_path_factory.mktemp("large")
    models = models_of_pipeline(build_single_pipeline("sd1"))
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            **(config_of(models["unet"]) | {"block_out_channels": (256, 384)})
        )
        vae = AutoencoderKL(**(config_of(models["vae"]) | {"block_out_channels": (224,) * 4}))
    wide = {**models, "unet": unet.to_empty(device="cpu"), "vae": vae.to_empty(device="cpu")}
    for model in wide.values():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter.requires_grad_(False))
    for suffix in (".safetensors", ".ckpt"):
        write_tensors(original_tensors(models), folder / f"small{suffix}")
        write_tensors(original_tensors(wide), folder / f"large{suffix}")
    return folder


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory(large: Path) -> None:
    """Loading a part holds at most the part as it is returned, its pages of the file, and 16 MiB:
    no second copy of it, and nothing of the other parts."""
    kinds = [(".safetensors", "bfloat16"), (".ckpt", "float32")]
    assert all(os.path.getsize(large / f"large{suffix}") > 180e6 for suffix, _ in kinds)
    words = [f"{large}/small{suffix}:{large}/large{suffix}:{dtype}" for suffix, dtype in kinds]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *words], capture_output=True, text=True, check=True,
        # a tensor is the system's own block, and leaves the process when it is freed
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
    )  # fmt: skip
    numbers = [[int(number) for number in line.split()] for line in done.stdout.splitlines()]
    assert len(numbers) == 2 * len(kinds)
    of_texts, of_unets = numbers[::2], numbers[1::2]
    for (_, dtype), (text_peak, text_size), (peak, size) in zip(
        kinds, of_texts, of_unets, strict=True
    ):
        assert text_size < 1e6
        assert text_peak < 16 * 2**20
        stored = size * (1 if dtype == "float32" else 2)
        assert stored > 80e6
        assert size + 1e6 < peak < size + stored + 16 * 2**20
