"""Several processes of one run: they train as one, read the data once, and end together."""

import json
import math
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import sd_lora
import sd_lora.training.loop  # before the processes are forked, not in each of them
from sd_lora.config.command_line import parse
from sd_lora.formats import file_names
from sd_lora.formats.lora_file import open_lora
from sd_lora.training import sample_schedule
from sd_lora.training.processes import chosen_precision
from sd_lora.training.sharding import check_even, shards
from tests.training.launches import Launch, Processes, TwoHosts, accelerate_launch, free_port
from tests.training.runs import FEW, dreambooth, images, text_to_image

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
IMAGES, STEPS = 18, 4  # 12 images and 6 in turn: with 4 processes parts of 3, then of 1 and 2


class Runs(NamedTuple):
    """Runs of one global batch of 12: the folders' names are processes × batch × accumulation."""

    model: Path
    data: Path
    folder: Path

    def command(self, name: str, batch: int, *more: str) -> list[str]:
        return [
            "train", "--pretrained_model_name_or_path", str(self.model), "--train_data_dir",
            str(self.data), "--caption_column", "text", "--resolution", "64", "--rank", "2",
            "--learning_rate", "1e-3", "--targets", FEW, "--seed", "0",
            "--num_validation_images", "0", "--report_to", "none", "--max_train_steps", str(STEPS),
            "--checkpointing_steps", "2", "--train_batch_size", str(batch), "--output_dir",
            str(self.folder / name), "--data_cache_dir", str(self.folder / "cache"), *more,
        ]  # fmt: skip

    def start(self, name: str, number: int, batch: int, *more: str, **environment: str) -> Launch:
        return Launch(
            number,
            self.command(name, batch, *more),
            self.folder / f"{name} said",
            first=self.count_reads,
            **environment,
        )

    def count_reads(self, rank: int) -> None:
        """Have a process note each image that it opens."""
        notes = (self.folder / f"reads-{rank}.txt").open("a", buffering=1)

        def hook(event: str, arguments: tuple) -> None:
            if event == "open" and arguments[1] and str(arguments[0]).endswith(".png"):
                notes.write(f"{arguments[0]}\n")

        sys.addaudithook(hook)

    def reads(self) -> list[int]:
        """Images that processes 0 and 1 have opened since the last call."""
        notes = [self.folder / f"reads-{rank}.txt" for rank in (0, 1)]
        counts = [len(path.read_text().splitlines()) for path in notes]
        for path in notes:
            path.unlink()
        return counts

    def done(self, name: str, number: int, batch: int, *more: str, **environment: str) -> Path:
        launch = self.start(name, number, batch, *more, **environment)
        assert launch.wait() == [0] * number, launch.text
        return self.folder / name

    def killed(self, name: str) -> Path:
        """A run of two processes whose main one is killed after step 2, and its checkpoint of this
        step; the other one says so and ends."""
        launch = self.start(name, 2, 6, "--max_train_steps", "1000")
        checkpoint = self.folder / name / "checkpoint-2"
        launch.wait_for(checkpoint)
        launch.processes[0].kill()
        assert launch.wait() == [-signal.SIGKILL, 1]
        assert_said_once(launch, "another process of this run has ended without a message")
        return checkpoint


@pytest.fixture(scope="module")
def runs(tiny_sd1: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("several")
    return Runs(tiny_sd1, images(folder / "data", IMAGES), folder)


@pytest.fixture(scope="module")
def two(runs: Runs) -> Path:
    """The folder of an undisturbed run of two processes."""
    folder = runs.done("2", 2, 6)
    # the main process checks all, and draws all on the page; each encodes half
    assert runs.reads() == [2 * IMAGES + IMAGES // 2, IMAGES // 2]
    kinds = ("latents", "texts", "facts")
    found = [sum(p.is_file() for p in (runs.folder / "cache" / k).rglob("*")) for k in kinds]
    assert found == [IMAGES] * 3
    return folder


def assert_said_once(launch: Processes, text: str) -> None:
    """All processes together have told one error, and no traceback."""
    assert launch.text.count("error: ") == 1, launch.text
    assert f"error: {text}" in launch.text
    assert "Traceback" not in launch.text


def losses(folder: Path) -> list[float]:
    lines = (folder / "training_log.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def assert_close(one: Path, other: Path) -> None:
    """Two runs have the same losses within 1e-5, and the same ΔW but for rounding."""
    assert losses(one) == pytest.approx(losses(other), rel=1e-5)
    a, b = (open_lora(folder / file_names.DIFFUSERS).adapter["unet"] for folder in (one, other))
    assert a.keys() == b.keys()
    for name, delta in a.items():
        torch.testing.assert_close(delta.weight(), b[name].weight(), rtol=0, atol=1e-5)


def two_hosts_line(root: Path) -> list[str]:
    """torchrun's flags for two hosts, as docs/scale.md has them, for two processes each here."""
    page = (root / "docs/scale.md").read_text()
    line = re.search(r"^torchrun (--nnodes 2 .*) \\$", page, re.M)[1]
    line = line.replace("--nproc_per_node 4", "--nproc_per_node 2")
    return line.replace("HOST_A:29500", f"127.0.0.1:{free_port()}").split()


def test_any_split_trains_as_one(runs: Runs, two: Path, root: Path) -> None:
    """One process, two, three, two that accumulate, and two hosts of two processes: the same losses
    from the same images, where 12 images fill the batches, and where 6 are left for them."""
    one = runs.done("1", 1, 12)
    assert len(losses(one)) == STEPS
    assert_close(one, two)
    assert_close(one, runs.done("3", 3, 4))
    assert_close(one, runs.done("accumulated", 2, 3, "--gradient_accumulation_steps", "2"))
    hosts = TwoHosts(two_hosts_line(root), runs.command("hosts", 3), runs.folder / "hosts said")
    assert hosts.wait() == [0, 0], hosts.text
    assert_close(one, runs.folder / "hosts")


def test_a_killed_process_ends_all_and_nothing_is_lost(runs: Runs, two: Path) -> None:
    """SIGKILL to the main process ends the other one with a message. Resumed with as many
    processes, the run gives every byte of one that was not killed, and with three its losses; no
    process but the main one opens an image whose latents the cache has."""
    checkpoint = runs.killed("killed")
    shutil.copytree(checkpoint.parent, runs.folder / "killed-3")
    runs.reads()
    again = runs.done("killed", 2, 6, "--resume_from_checkpoint", str(checkpoint))
    assert runs.reads() == [2 * IMAGES, 0]
    ours, theirs = (load_file(f / file_names.DIFFUSERS) for f in (again, two))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert losses(again) == losses(two)
    of_three = checkpoint.parent.with_name("killed-3") / checkpoint.name
    third = runs.done("killed-3", 3, 4, "--resume_from_checkpoint", str(of_three))
    assert_close(third, two)


@pytest.mark.parametrize(
    ("flags", "code", "text"),
    [
        ("--learning_rate 1e30", 1, "the loss became nan at step 2"),
        ("--lr_scheduler upwards", 2, "--lr_scheduler is one of"),
        ("--max_timestep 3000", 2, "timesteps from --min_timestep 0 to --max_timestep 3000"),
    ],
)
def test_an_error_of_all_is_said_once(runs: Runs, flags: str, code: int, text: str) -> None:
    """Processes that meet the same error, in a step, in the flags, or before the first step, end
    with its code, and one of them tells it."""
    launch = runs.start("wrong", 2, 6, *flags.split())
    assert launch.wait() == [code, code]
    assert_said_once(launch, text)
    named = 6 if "step 2" in text else 0  # the images of both processes
    assert launch.text.count(", timestep ") == named


def test_an_image_lost_by_one_process_ends_all(runs: Runs, tmp_path: Path) -> None:
    """An image that one process can read no more ends both with its message, said once."""
    data = tmp_path / "data"
    shutil.copytree(runs.data, data)
    launch = runs._replace(data=data).start(
        "lost", 2, 6, "--cache_latents", "no", "--max_train_steps", "1000"
    )
    launch.wait_for(runs.folder / "lost" / "checkpoint-2")
    (data / "3.png").write_bytes(b"")
    assert launch.wait() == [1, 1], launch.text
    assert_said_once(launch, f"{data / '3.png'}")


def rows(measured: dict) -> list[list[float]]:
    """The validation losses by timestep of each measurement, the base's first."""
    found = [measured["base"], *measured["rows"]]
    return [row["trained"]["levels"] for row in found]


def assert_same(one: Path, two: Path) -> None:
    """The LoRAs and the losses of two runs agree within 1e-4. (A factor's entry whose gradient is
    rounding noise may differ more: AdamW's first steps are the sign of the gradient times the
    rate.)"""
    a, b = (open_lora(f / file_names.DIFFUSERS).adapter for f in (one, two))
    assert a.keys() == b.keys()
    for component, modules in a.items():
        assert modules.keys() == b[component].keys()
        for name, delta in modules.items():
            other = b[component][name]
            assert (delta.weight() - other.weight()).abs().max() < 1e-4, name
            if delta.magnitude is not None:
                torch.testing.assert_close(delta.magnitude, other.magnitude, rtol=0, atol=1e-4)
    assert losses(one) == pytest.approx(losses(two), rel=1e-4)


CONFIGS = Path("sample_data/configs")


@pytest.mark.parametrize(
    ("name", "machines", "processes"),
    [("several_gpus", 1, 4), ("two_hosts", 2, 8), ("fsdp2", 1, 2)],
)
def test_the_configurations_for_accelerate(
    name: str, machines: int, processes: int, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accelerate's own loader takes each that ships, and a run does not refuse its engine."""
    flags, variables = accelerate_launch(root / CONFIGS / f"{name}.yaml")
    assert (flags.num_machines, flags.num_processes) == (machines, processes)
    for variable, text in variables.items():
        monkeypatch.setenv(variable, text)
    assert shards() == (name == "fsdp2")
    assert chosen_precision(text_to_image(root, root, root / "out")) == "bf16"


def test_fsdp2_trains_as_ddp(runs: Runs, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes of which each holds half of the UNet train as two that hold all of it: with
    magnitudes, which are of whole weights, a text encoder, samples, also at other strengths, LoRA
    files in mid-run, and the same validation, of which two processes measure a half each, and with
    FSDP2 all."""
    monkeypatch.setattr(sample_schedule, "SHARE", 1.0)
    _, variables = accelerate_launch(root / CONFIGS / "fsdp2.yaml")
    more = (
        "--use_dora --train_text_encoder --gradient_checkpointing --save_lora_every 2 "
        "--mixed_precision no --num_validation_images 1 --validation_steps 2 --validate_every 2"
    ).split()
    ddp = runs.done("ddp", 2, 6, *more)
    fsdp = runs.done("fsdp", 2, 6, *more, **variables)
    assert_same(ddp, fsdp)
    measured = [json.loads((f / "report.json").read_text())["validation"] for f in (ddp, fsdp)]
    for a, b in zip(*(rows(m) for m in measured), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    assert (
        len({tuple(row) for row in rows(measured[0])}) == 3
    )  # the base, after 2 steps, and after 4
    assert (fsdp / "before_after.png").is_file()
    drawn = [path.relative_to(ddp) for path in sorted(ddp.glob("samples/step-*/**/*.png"))]
    assert [path.parent.name for path in drawn[-2:]] == ["strength-0.5", "strength-0.75"]
    for path in drawn:
        pixels = [np.asarray(Image.open(f / path), dtype=int) for f in (ddp, fsdp)]
        assert np.abs(pixels[0] - pixels[1]).max() <= 2, path
    kept = re.search(r"sharded +([\d.]+) MiB of the UNet's ([\d.]+) MiB", text_of(runs, "fsdp"))
    assert float(kept[1]) == pytest.approx(float(kept[2]) / 2, rel=0.1)


def text_of(runs: Runs, name: str) -> str:
    return (runs.folder / f"{name} said" / "0.txt").read_text()


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", "asks for DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "asks for Megatron-LM"),
        ("ACCELERATE_USE_FSDP", "true", "asks for FSDP 1"),
        ("FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params is not there"),
    ],
)
def test_other_engines_are_refused(
    variable: str, value: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that is not there ends a run before the model is read, with what to do."""
    monkeypatch.setenv(variable, value)
    with pytest.raises(sd_lora.UsageError, match=message):
        sd_lora.train(text_to_image(tmp_path, tmp_path, tmp_path / "out"))


def test_two_processes_with_prior_preservation(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes with half the batch each train as one, the text encoder of the embedded base
    and weights learned by timestep too. Together they draw each class image that is missing once,
    and exchange in memory the latents that each has encoded; the one encodes as it goes."""
    monkeypatch.chdir(root)
    script, class_dir = "train_dreambooth_lora.py", tmp_path / "class"
    common = [
        "--pretrained_model_name_or_path", "sample_data/tiny-sd", "--instance_data_dir",
        "sample_data/dreambooth/instance", "--instance_prompt", "a photo of a sks monster",
        "--with_prior_preservation", "--class_data_dir", str(class_dir), "--class_prompt",
        "a photo of a monster", "--num_class_images", "5", "--sample_batch_size", "2",
        "--resolution", "64", "--learning_rate", "1e-3", "--rank", "8", "--targets",
        FEW, "--train_text_encoder", "--seed", "0", "--max_train_steps", "4",
        "--num_validation_images", "0", "--edm2_loss_weighting",
    ]  # fmt: skip
    two = [*common, "--train_batch_size", "2", "--output_dir", str(tmp_path / "two")]
    two += ["--cache_latents", "memory", "--data_cache_dir", str(tmp_path / "cache")]
    launch = Launch(2, two, tmp_path / "said", script)
    assert launch.wait() == [0, 0], launch.text
    assert re.search(r"latents +in memory", launch.text)
    names = sorted(path.name for path in class_dir.iterdir())
    assert names == [f"class-0-{n:05}.png" for n in range(5)]
    one = [*common, "--train_batch_size", "4", "--output_dir", str(tmp_path / "one")]
    sd_lora.train(parse([*one, "--cache_latents", "no"], script))
    assert_same(tmp_path / "one", tmp_path / "two")


def test_two_processes_train_sdxl_as_one(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """So for SDXL with both text encoders, one of which stops, new words, captions of several
    pieces and half of them dropped, a frozen A and magnitudes, on a base stored in 8 bits, by
    diffusers' command for it: a
    process whose captions are all dropped does not leave the other waiting. The schedule counts
    optimiser steps: a warm-up of 2 and a cosine over the other 6 of 8, for one and for two."""
    data = images(tmp_path / "data", size=(96, 64))
    script = "train_dreambooth_lora_sdxl.py"
    common = [
        "--pretrained_model_name_or_path", str(tiny("sdxl")), "--instance_data_dir", str(data),
        "--instance_prompt", "a photo of <thing> " + "and so on " * 20, "--targets",
        FEW, "--train_text_encoder", "--text_encoder_stop_step", "3",
        "--text_encoder_2_stop_step", "100", "--token_abstraction", "<thing>",
        "--max_token_length", "225", "--caption_dropout", "0.5", "--random_flip", "--seed", "3",
        "--learning_rate", "1e-3", "--text_encoder_lr", "1e-3", "--max_train_steps", "8",
        "--num_validation_images", "0", "--resolution", "64", "--method", "lora_fa", "--use_dora",
        "--lr_scheduler", "cosine", "--lr_warmup_steps", "2", "--base_precision", "int8",
    ]  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    alone = ["--train_batch_size", "2", "--output_dir", str(one)]
    sd_lora.train(parse([*common, *alone], script))
    together = ["--train_batch_size", "1", "--output_dir", str(two)]
    launch = Launch(2, [*common, *together], tmp_path / "said", script)
    assert launch.wait() == [0, 0], launch.text
    assert_same(one, two)
    cosine = [(1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)]
    for folder in (one, two):
        lines = (folder / "training_log.jsonl").read_text().splitlines()
        rates = [json.loads(line)["lr"] for line in lines]
        assert rates == pytest.approx([1e-3 * factor for factor in (0, 0.5, *cosine)])
    words = [load_file(f / f"{f.name}_thing.safetensors") for f in (one, two)]
    for key in ("clip_l", "clip_g"):
        torch.testing.assert_close(words[0][key], words[1][key], rtol=0, atol=1e-4)


def test_unequal_work_is_refused_with_a_sharded_base(root: Path) -> None:
    """Preserved outputs, and class images beside buckets, would let processes make different
    numbers of forward passes, each an exchange: they are refused, and squares are not."""
    of_class = {"with_prior_preservation": True, "class_data_dir": "c", "class_prompt": "a thing"}
    plain = dreambooth(root, root, root / "out", **of_class)
    check_even(plain.resolve("sd1", 64), has_buckets=False, has_classes=True)
    check_even(plain.resolve("sd1", 64), has_buckets=True, has_classes=False)
    with pytest.raises(sd_lora.UsageError, match="class images of several shapes"):
        check_even(plain.resolve("sd1", 64), has_buckets=True, has_classes=True)
    kept = text_to_image(root, root, root / "out", output_preservation="blank")
    with pytest.raises(sd_lora.UsageError, match="output_preservation computes some images twice"):
        check_even(kept.resolve("sd1", 64), has_buckets=False, has_classes=True)
