"""Runs on a CUDA device, or on one whose kernels are the CPU's (`tests.card`)."""

import gc
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import sd_lora
from sd_lora.check import check
from sd_lora.config.schema import OPTIONS
from sd_lora.report.events import StepDone
from sd_lora.training import loop
from sd_lora.training.cards import Card
from sd_lora.training.data import base_of
from sd_lora.training.losses import LossLog
from sd_lora.training.memory import RESERVE, Shape, count_step
from sd_lora.training.setup import prepared_run
from tests.card.device import NAME
from tests.tiny import KINDS
from tests.training.runs import images, text_to_image

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

only_here = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_name() != NAME,
    reason="a card's libraries take more than a tiny step; benchmarks/gpu.py compares large ones",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images(tmp_path_factory.mktemp("images"), 8)  # batches of 4 have one form


STEPS: dict[str, dict[str, Any]] = {
    "plain": {"targets": "all", "use_ema": True},
    "float16": {"mixed_precision": "fp16", "cuda_graphs": "auto"},
    "recorded": {"cuda_graphs": "auto", "gradient_checkpointing": True},
    "general": {"use_dora": True, "rank_dropout": 0.1},
    "lokr": {"method": "lokr", "gradient_checkpointing": True, "gradient_accumulation_steps": 2},
    "oft": {"method": "oft", "oft_block_size": 4},
    "moved": {"offload_weights": True, "offload_activations": True},
    "text": {"train_text_encoder": True, "token_abstraction": "thing", "embedding_lr": 1e-3},
    "sdxl": {"train_text_encoder": True, "text_encoder_stop_step": 3},
    "noise": {
        "immiscible_noise": 3, "noise_offset": 0.1, "adaptive_noise_scale": -0.5,
        "multires_noise_iterations": 3, "input_perturbation": 0.1,
    },
    "learned weights": {"edm2_loss_weighting": True, "loss_type": "huber"},
    "norms": {"scale_weight_norms": 1.0, "snr_gamma": 5.0},
    "encoded": {"cache_latents": "no", "cache_text_embeddings": "no"},
    "sd1-inpainting": {},
    "preserved": {"output_preservation": "blank", "preservation_sampler_steps": 2},
    "masks": {"alpha_mask": True},
    "ranks": {"tlora_min_rank": 1},
    "int8": {"base_precision": "int8", "mixed_precision": "bf16"},
    "muon": {"optimizer": "muon"},
    "schedule-free": {"optimizer": "adamwschedulefree"},
}  # fmt: skip


def half_transparent(data: Path, folder: Path) -> Path:
    """A copy of a folder whose images have nothing on their left."""
    shutil.copytree(data, folder)
    for path in folder.glob("*.png"):
        image = Image.open(path).convert("RGBA")
        alpha = Image.new("L", image.size, 255)
        alpha.paste(0, (0, 0, image.width // 2, image.height))
        image.putalpha(alpha)
        image.save(path)
    return folder


@pytest.mark.parametrize("way", STEPS)
def test_no_step_waits_for_the_card(way: str, tiny: Any, data: Path, tmp_path: Path) -> None:
    """In a step whose loss is not read the host asks the card for no number, and copies nothing to
    or fro for which it waits, so that it is ahead of the card all the time. (A warning of torch's
    would fail, too: float16's scaler has one where the schedule is made after it.)"""

    def listen(event: object) -> None:
        if isinstance(event, StepDone):  # before, things are made; losses are read at the end
            strict = 5 <= event.step < 7
            torch.cuda.set_sync_debug_mode("error" if strict else "default")

    for name, value in STEPS[way].items():
        if needed := OPTIONS[name].package_of(value):
            pytest.importorskip(needed[0])
    model = tiny(way if way in KINDS else "sd1")
    if way == "masks":
        data = half_transparent(data, tmp_path / "masked")
    config = text_to_image(model, data, tmp_path / "o", **({"max_train_steps": 8} | STEPS[way]))
    try:
        with prepared_run(config, [listen]) as run:
            log = LossLog(run)
            loop.train_steps(run, log)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(log.losses) == 8
    if config.cuda_graphs == "auto":
        assert run.graphs
        assert any(form.proved for form in run.graphs.forms.values())


@only_here
@pytest.mark.parametrize(
    "options",
    [
        {"targets": "all"},
        {"targets": "all", "gradient_checkpointing": True, "train_text_encoder": True},
        {"mixed_precision": "bf16", "gradient_accumulation_steps": 2},
        {"offload_weights": True, "gradient_checkpointing": True, "mixed_precision": "bf16"},
        {"base_precision": "int8", "mixed_precision": "bf16", "use_ema": True},
        {"use_dora": True, "targets": "all"},
    ],
)
def test_the_peak_is_the_counted_one(options: dict[str, Any], tiny: Any, tmp_path: Path) -> None:
    """What a run's steps ask of a card's memory at most is what `check` counts without one, to 5 %:
    weights, gradients, moments and activations, beside what the loop itself holds."""
    data = images(tmp_path / "data", 8, (128, 128))
    peaks = []

    def listen(event: object) -> None:
        if isinstance(event, StepDone):
            peaks.append(torch.cuda.max_memory_allocated())
            torch.cuda.reset_peak_memory_stats()

    changes = {"train_batch_size": 8, "resolution": 128, "max_train_steps": 4} | options
    with prepared_run(
        text_to_image(tiny("sd1-wide-heads"), data, tmp_path / "o", **changes), [listen]
    ) as run:
        loop.train_steps(run, LossLog(run))
        count = count_step(run.config, run.meta_pipeline, Shape(8, (128, 128)))
    assert count.peak == pytest.approx(peaks[2], rel=0.05)


@only_here
def test_encoding_takes_the_counted_bytes(tiny: Any, tmp_path: Path) -> None:
    """Encoding images asks for the counted bytes, before the steps, of as many at once as are
    counted, and in the steps, where latents have no cache; the answer for a card with less names
    the flag."""
    data = images(tmp_path / "data", 12, (512, 256))
    config = text_to_image(
        tiny("sd1-wide-heads"), data, tmp_path / "o", resolution=320, train_batch_size=2,
        data_cache_dir=str(tmp_path / "cache"), max_train_steps=2,
    )  # fmt: skip
    answers = []
    for cache, memory in (("auto", 24.0), ("auto", 1.02), ("no", 24.0)):
        config = config.replace(cache_latents=cache, output_dir=str(tmp_path / cache))
        checked = check(config, page=False, card=Card("one", memory, 10, 10, 400)).prediction
        assert checked
        answers.append(checked.answer)
        gc.collect()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with prepared_run(config) as run:
            if cache == "no":
                loop.train_steps(run, LossLog(run))
            peak = torch.cuda.max_memory_allocated() - before
        del run
        if memory > 2:
            wanted = checked.others["encoding images"]
            wanted = max(wanted, checked.peak) if cache == "no" else wanted
            assert wanted - RESERVE == pytest.approx(peak, rel=0.05)
    assert "ncoding" not in answers[0] + answers[2]
    assert "Encoding images takes 1.1 GiB, and does not fit: add --vae_precision bf16" in answers[1]


@only_here
def test_the_flags_that_are_named_fit(tiny: Any, tmp_path: Path) -> None:
    """A run whose step finds three quarters of the memory that it asks for ends with flags that are
    said to fit: with them it comes to its end in that memory. One that may try finds a way."""
    data, model = images(tmp_path / "data", 8, (128, 128)), tiny("sd1-wide-heads")
    config = text_to_image(
        model, data, tmp_path / "o", train_batch_size=8, resolution=128, max_train_steps=2,
        targets="attention", vae_precision="bf16",  # so that images take less than a step
    )  # fmt: skip
    base = base_of(config)
    count = count_step(config.resolve("sd1", 64), base.meta_pipeline, Shape(8, (128, 128))).peak
    whole = torch.cuda.get_device_properties(0).total_memory
    gc.collect()
    limit = (torch.cuda.memory_allocated() + 0.75 * count) / whole
    torch.cuda.set_per_process_memory_fraction(limit)
    try:
        with pytest.raises(sd_lora.RunError, match="out of memory in step 1") as told:
            sd_lora.train(config)
        flags: dict[str, Any] = {}
        for line in str(told.value).splitlines():
            for name, value in re.findall(r"^  --(\w+)(?: (\d+))?", line):
                flags[name] = int(value) if value else True
            if line.endswith("which fits"):
                break
        told = None
        gc.collect()
        sd_lora.train(config.replace(**flags, output_dir=str(tmp_path / "again")))
        sd_lora.train(config.replace(fit="auto", output_dir=str(tmp_path / "fitted")))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert flags
