"""Runs that are out of memory: known, told with flags, or fitted without another result."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor

import sd_lora
from sd_lora.config.schema import TrainConfig
from sd_lora.errors import RunError, UsageError
from sd_lora.formats.lora_file import open_lora
from sd_lora.training import loop
from sd_lora.training.fit import Fit
from sd_lora.training.losses import LossLog
from sd_lora.training.memory import HeldBytes
from sd_lora.training.out_of_memory import is_out_of_memory, wanted
from sd_lora.training.run import Run
from sd_lora.training.setup import prepare
from tests.training.launches import Launch
from tests.training.runs import images, text_to_image

OnCard = Callable[[Callable[[int], float]], list[int]]


class Card(HeldBytes):
    """Stand-in for a device with little memory: an operator whose tensors, beside those that are
    held, go beyond the limit raises the error of PyTorch's allocator.

    limit: bytes of activations and gradients.
    """

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def add(self, tensor: Tensor) -> None:
        super().add(tensor)
        if self.now > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB. GPU 0 …")


@pytest.fixture
def on_card(monkeypatch: pytest.MonkeyPatch) -> OnCard:
    """A function that puts each micro-batch on a card. Its argument: steps done → limit. Its
    result: the peak of each micro-batch that has gone through, to come."""
    original = loop.accumulate

    def put(limit: Callable[[int], float]) -> list[int]:
        peaks: list[int] = []

        def limited(run: Any, number: int, batch: Any, done: int) -> Tensor:
            with Card(limit(done)) as card:
                loss = original(run, number, batch, done)
            peaks.append(card.peak)
            return loss

        monkeypatch.setattr(loop, "accumulate", limited)
        return peaks

    return put


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five square images, and four wide ones: the largest batch is not in the first step."""
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for name, count, size in (("a", 5, (64, 64)), ("b", 4, (192, 64))):
        images(folder / name, count, size)
        for line in (folder / name / "metadata.jsonl").read_text().splitlines():
            row = json.loads(line)
            rows.append(json.dumps(row | {"file_name": f"{name}/{row['file_name']}"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def config(model: Path, data: Path, output: Path, **changes: object) -> TrainConfig:
    """A run whose activations the limits of these tests were measured by."""
    options: dict[str, object] = {"targets": "attention+conv", "train_text_encoder": True}
    return text_to_image(model, data, output, **(options | changes))


def ready(config: TrainConfig) -> Run:
    """A run that stands before its first step, after the trial."""
    AcceleratorState._reset_state(reset_partial_state=True)
    run = prepare(config)
    loop.try_largest(run, loop.accumulate)
    run.restore()
    return run


def steps(run: Run) -> list[float]:
    """Do a run's steps; returns their losses."""
    loop.open_output(run)
    log = LossLog(run)
    loop.train_steps(run, log)
    return log.losses


def weights(run: Run) -> Tensor:
    return torch.cat([p.detach().flatten() for p in run.parameters])


def test_the_trial_changes_no_bit(
    tiny_sd1: Path, data: Path, tmp_path: Path, on_card: OnCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest batch comes second and is tried first; random state, factors and gradients are
    then as before, and the steps give the bits of a run without a trial, dropout included. A run
    whose first step has the largest batch tries nothing."""
    peaks = on_card(lambda done: float("inf"))
    tried = config(tiny_sd1, data, tmp_path / "a", lora_dropout=0.2, max_train_steps=3)
    state = torch.get_rng_state()
    run = ready(tried)
    assert len(peaks) == 1
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in run.parameters)
    steps(run)
    assert peaks[0] == pytest.approx(peaks[2], rel=0.01)
    assert peaks[0] > peaks[1]
    monkeypatch.setattr(loop, "try_largest", lambda run, accumulate: None)
    plain = ready(tried.replace(output_dir=str(tmp_path / "b")))
    steps(plain)
    assert torch.equal(weights(run), weights(plain))
    monkeypatch.undo()
    peaks = on_card(lambda done: float("inf"))
    ready(tried.replace(output_dir=str(tmp_path / "c"), seed=1))
    assert peaks == []


def test_a_fitted_run_is_the_same_run(
    tiny_sd1: Path, data: Path, tmp_path: Path, on_card: OnCard
) -> None:
    """On a card for less than half of the largest batch, --fit auto takes checkpointing and two
    images at once: losses and factors are those of the large card within float order. Summary, log
    and checkpoint say so, and a run resumed on the large card without --fit gives the same bits."""
    on_card(lambda done: float("inf"))
    changes: dict[str, Any] = {"max_train_steps": 4, "checkpointing_steps": 2}
    large = ready(config(tiny_sd1, data, tmp_path / "large", **changes))
    losses = steps(large)
    small = config(tiny_sd1, data, tmp_path / "small", fit="auto", **changes)
    peaks = on_card(lambda done: 2.3e6)
    fitted = ready(small)
    assert len(peaks) == 1  # three ways were tried, and the third one went through
    assert fitted.fit == Fit(checkpointing=True, at_once=2)
    assert fitted.summary.rows["memory"] == "gradient checkpointing, at most 2 images at once"
    assert steps(fitted) == pytest.approx(losses, rel=1e-5)
    torch.testing.assert_close(weights(fitted), weights(large), rtol=1e-3, atol=1e-5)
    lines = (tmp_path / "small" / "training_log.jsonl").read_text().splitlines()
    assert [json.loads(line)["fit/at_once"] for line in lines] == [2] * 4
    on_card(lambda done: float("inf"))
    again = ready(small.replace(resume_from_checkpoint="checkpoint-2", fit="off"))
    assert again.fit == fitted.fit
    steps(again)
    assert torch.equal(weights(again), weights(fitted))


def test_what_does_not_fit_is_told_before_the_first_step(
    tiny_sd1: Path, data: Path, tmp_path: Path, on_card: OnCard
) -> None:
    """A card for less than one image: the message names the batch, all ways that were tried, the
    counted bytes and the next flag that takes less; no file is written."""
    on_card(lambda done: 1e6)
    with pytest.raises(UsageError) as error:
        ready(config(tiny_sd1, data, tmp_path / "out", fit="auto"))
    first, counted, _, *flags = str(error.value).splitlines()
    before, first = first.split(": ", 1)
    assert before == "out of memory in the run's largest batch, tried before step 1"
    refused, how = ", 2.00 MiB could not be allocated", " with gradient checkpointing"
    ways = [("4 images", ""), ("4 images", how), ("2 images", how), ("1 image", how)]
    assert first.split("; ") == [f"{n} of 64×64 at once{with_}{refused}" for n, with_ in ways]
    now, smaller = (float(re.search(r"([\d.]+) MiB", line)[1]) for line in (counted, flags[0]))
    assert flags[0].startswith("  --mixed_precision bf16: ")
    assert 0.4 * now < smaller < 0.8 * now
    assert not list((tmp_path / "out").glob("[!.]*"))


def test_memory_that_ends_in_mid_run(
    tiny_sd1: Path, data: Path, tmp_path: Path, on_card: OnCard
) -> None:
    """Another program takes memory after two steps: they are saved, and the same command with --fit
    auto goes on in the room that is left. The LoRA file's record has the way."""
    out = tmp_path / "out"
    on_card(lambda done: float("inf") if done < 2 else 1e6)
    wanted = config(tiny_sd1, data, out, max_train_steps=3)
    with pytest.raises(
        RunError, match=r"(?s)^out of memory in step 3 of 3: .*Step 2 is saved"
    ) as e:
        sd_lora.train(wanted)
    assert "--batch " not in str(e.value)  # it would change the order of the data
    on_card(lambda done: 1.5e6)
    result = sd_lora.train(wanted.replace(resume_from_checkpoint="latest", fit="auto"))
    assert len(result.losses) == 1
    header = open_lora(result.files[0].path).header
    assert json.loads(header["sd_lora"])["fit"] == {"checkpointing": True}


def test_errors_of_allocators_are_known() -> None:
    """Real refusals of torch's CPU allocator and of Python's, and the words of MPS and safetensors;
    a message of ours that speaks of memory is none."""
    with pytest.raises(RuntimeError) as of_torch:
        torch.empty(2**55)
    with pytest.raises(MemoryError) as of_python:
        bytearray(2**62)
    errors = [of_torch.value, of_python.value]
    errors.append(RuntimeError("MPS backend out of memory (MPS allocated: 8.87 GiB)"))
    errors.append(OSError(12, "Cannot allocate memory"))
    assert all(map(is_out_of_memory, errors))
    assert wanted(errors[0]) == f"{2**57} bytes could not be allocated"
    assert not any(map(is_out_of_memory, [RunError("out of memory"), RuntimeError("a shape")]))


LIMITED = """
import resource, sys
import psutil, torch
from sd_lora import cli
from sd_lora.training import loop

torch.backends.mkldnn.enabled = False  # it keeps kernels and buffers of its own
original = loop.accumulate

def limited(*args):
    if not limits:
        limits.append(psutil.Process().memory_info().vms + (32 << 20))
        resource.setrlimit(resource.RLIMIT_AS, (limits[0], -1))
    return original(*args)

loop.accumulate = limited
for more in ([], ["--fit", "auto", "--overwrite_output_dir"]):
    limits = []
    print("code", cli.main([*sys.argv[1:], *more]))
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
"""
"""A program that trains twice, in 32 MiB beside those that the process has before its first
micro-batch: by count it takes 47 MiB, and 19 MiB with checkpointing."""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of an address space are Linux's")
def test_a_real_limit(tiny_sd1: Path, tmp_path: Path) -> None:
    """In a process whose address space ends, a run of 256² says which flag makes it fit, without a
    traceback, and --fit auto takes that one and finishes."""
    data, out = images(tmp_path / "data", 4), tmp_path / "out"
    words = (
        f"train --mode text_to_image --model {tiny_sd1} --train_data_dir {data} --resolution 256 "
        f"--targets attention --train_batch_size 4 --max_train_steps 1 --num_validation_images 0 "
        f"--report_to none --output_dir {out} --seed 0"
    )
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *words.split()], capture_output=True, text=True,
        # each tensor is the system's own block, and leaves the process when it is freed
        env=os.environ | {"OMP_NUM_THREADS": "1"}
        | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"},
    )  # fmt: skip
    assert re.findall("code (.)", done.stdout) == ["1", "0"], done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert "error: out of memory in step 1 of 1: 4 images of 256×256 at once, " in done.stderr
    assert re.search(r"--gradient_checkpointing \(.*\): [\d.]+ MiB, which fits\n", done.stderr)
    assert re.search(r"memory +gradient checkpointing\n", done.stdout)


def second_on_a_card(rank: int) -> None:
    """Put what the second of two processes tries on a small card; steps go through the engine's
    wrapper, tries do not."""
    original = loop.accumulate

    def limited(run: Any, *args: Any) -> Tensor:
        tried = run.prepared["unet"] is run.models["unet"]
        with Card(1.8e6 if tried and rank else float("inf")):
            return original(run, *args)

    loop.accumulate = limited


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_processes_fit_together(tiny_sd1: Path, data: Path, tmp_path: Path) -> None:
    """Of two processes the second has a small card: both end before the first step with its
    message; with --fit auto both take the way that it needs, and the losses are those of one
    process with both batches."""
    out = tmp_path / "out"
    words = (
        f"train --mode text_to_image --model {tiny_sd1} --train_data_dir {data} --resolution 64 "
        f"--targets attention+conv --train_text_encoder --batch 2 --steps 3 --lr 1e-3 "
        f"--num_validation_images 0 --report_to none --output_dir {out} --seed 0"
    ).split()
    launch = Launch(2, words, tmp_path / "refused", first=second_on_a_card)
    assert launch.wait(300) == [2, 2], launch.text
    refused = (
        "error: out of memory in the run's largest batch, tried before step 1: on process 1, 2 im"
    )
    assert launch.text.count(refused) == 1  # told by the first to know it
    launch = Launch(2, [*words, "--fit", "auto"], tmp_path / "fitted", first=second_on_a_card)
    assert launch.wait(300) == [0, 0], launch.text
    assert re.search(r"memory +gradient checkpointing, 1 image at once\n", launch.text)
    lines = (out / "training_log.jsonl").read_text().splitlines()
    alone = steps(ready(config(tiny_sd1, data, tmp_path / "one", max_train_steps=3)))
    assert [json.loads(line)["loss"] for line in lines] == pytest.approx(alone, rel=1e-4)
