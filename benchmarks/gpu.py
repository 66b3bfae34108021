"""What a GPU does with us: runs, steps against peft's, memory against what `check` counts.

    python benchmarks/gpu.py --out FOLDER [--seconds 300]

`make gpu` runs the tests that need a GPU before it. Parts come in the order of what one wants to
know first; one that fails is a line, and the rest goes on; when the seconds are spent, what is left
out is said. FOLDER/gpu.json has all numbers, FOLDER/gpu.md the tables for README.md. UNets are of
the published sizes with random weights. Without a GPU everything is done at tiny sizes, to try it.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from steps import RANK, Candidate, conditions, config_of
from torch.nn.utils import clip_grad_norm_

from sd_lora.config.command_line import parse
from sd_lora.models.families import FAMILIES
from sd_lora.models.meta_pipeline import MetaPipeline
from sd_lora.models.published_configs import CONFIGS
from sd_lora.training.compiled import inductor
from sd_lora.training.fast.blocks import block_pass
from sd_lora.training.fast.step import fast
from sd_lora.training.graphs import WARM, Gradients
from sd_lora.training.memory import GIB, Shape, StepBytes, count_step
from sd_lora.training.out_of_memory import let_go
from sd_lora.training.recompute import enable_checkpointing
from sd_lora.training.recorders import CudaRecorder, Recorder, told

ROOT = Path(__file__).parent.parent
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16
SIDES = {"sd1": 512, "sdxl": 1024}
"""Pixels of an image's side, of a family."""
TINY = {
    "block_out_channels": (32, 64), "cross_attention_dim": 64, "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
"""SD 1.5's UNet where there is no GPU."""


@dataclass(frozen=True)
class Cell:
    """A step to be measured."""

    family: str
    targets: str
    batch: int
    checkpointed: bool = False


CELLS = (
    Cell("sd1", "attention", 1),
    Cell("sdxl", "all", 1),
    Cell("sd1", "all", 8),
    Cell("sdxl", "all", 1, checkpointed=True),
    Cell("sd1", "all", 1),
    Cell("sdxl", "attention", 1),
    Cell("sd1", "attention", 8),
    Cell("sdxl", "all", 4),
    Cell("sd1", "all", 4),
    Cell("sd1", "all", 16),
)
"""In the order of what is wanted first; the goals are about these."""
NAMES = ("ours", "general", "peft")
WAYS = {"graphed": ("graphs",), "compiled": ("compile",), "both": ("graphs", "compile")}
"""Ways of ours in which the host has less to do."""
COMPILED = tuple(name for name, ways in WAYS.items() if "compile" in ways)
"""Ways that take a minute to make: in one turn alone."""
HOST_BOUND = 4
"""Most samples of a batch whose ways are measured: larger ones keep the card busy as they are."""


@dataclass
class Found:
    """Numbers by name, written after each, so that a killed run keeps them."""

    folder: Path
    numbers: dict[str, Any] = field(default_factory=dict)

    def say(self, name: str, value: object) -> None:
        self.numbers[name] = value
        print(f"{name}: {value}", flush=True)
        text = json.dumps(self.numbers, indent=1)
        (self.folder / "gpu.json").write_text(text + "\n", encoding="utf-8")

    def attempt(self, name: str, work: Callable[[], object]) -> None:
        """Do a part; an error is its line."""
        try:
            work()
        except Exception as error:
            self.say(name, f"FAILED: {type(error).__name__}: {str(error)[:300]}")
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()


def synchronise() -> None:
    if CUDA:
        torch.cuda.synchronize()


def median_seconds(work: Callable[[], object], count: int) -> float:
    """Median wall-clock seconds of a work, the device's part included."""
    times = []
    for _ in range(count):
        synchronise()
        started = time.perf_counter()
        work()
        synchronise()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def machine() -> str:
    name = torch.cuda.get_device_name() if CUDA else "no GPU"
    python = sys.version.split()[0]
    return f"{name}, torch {torch.__version__}, peft {peft.__version__}, Python {python}"


def product_rate() -> float:
    """TFLOP/s of a bfloat16 product of 8192² matrices: what the card reaches."""
    n = 8192 if CUDA else 256
    a, b = (torch.randn(n, n, device=DEVICE, dtype=DTYPE) for _ in range(2))
    for _ in range(3):
        a @ b
    return 2 * n**3 / median_seconds(lambda: a @ b, 10) / 1e12


def run(found: Found, precision: str, *flags: str) -> None:
    """A whole run on the embedded base, as users start it: the mean loss of both halves, the most
    memory, and what it says of graphs."""
    with tempfile.TemporaryDirectory() as folder:
        ran(found, Path(folder) / "run", precision, *flags)


def ran(found: Found, out: Path, precision: str, *flags: str) -> None:
    """Do the run of `run` in a folder, and say its numbers."""
    command = [
        sys.executable, "-m", "sd_lora", "train", "--config",
        "sample_data/configs/dreambooth.toml", "--mixed_precision", precision,
        "--output_dir", str(out), "--max_train_steps", "100" if CUDA else "4",
        "--lr_warmup_steps", "0", "--num_validation_images", "0", "--report_to", "none",
        *flags,
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    if done.returncode:
        last = (done.stdout + done.stderr).strip().splitlines()[-3:]
        raise RuntimeError(f"exit status {done.returncode}: {' | '.join(last)}")
    lines = (out / "training_log.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [row["loss"] for row in map(json.loads, lines) if "loss" in row]
    half = len(losses) // 2
    first, last_half = statistics.fmean(losses[:half]), statistics.fmean(losses[half:])
    said = [line.strip() for line in (done.stdout + done.stderr).splitlines() if "graphs" in line]
    halves = [round(first, 4), round(last_half, 4)]
    peak = json.loads((out / "report.json").read_text(encoding="utf-8")).get("peak_bytes")
    found.say(
        f"run, {' '.join([precision, *flags])}",
        {"loss, halves": halves, "peak bytes": peak, "said": said},
    )


def counted(cell: Cell) -> StepBytes:
    """The step as `sd-lora check` counts it, beside its optimiser."""
    side = SIDES[cell.family]
    words = (
        f"data --model m --prompt p --rank {RANK} --targets {cell.targets} --no-train_text_encoder"
    )
    words += " --mixed_precision bf16"
    words += "" if cell.checkpointed else " --no-gradient_checkpointing"
    config = parse(words.split()).resolve(cell.family, side)
    return count_step(
        config, MetaPipeline.of_family(FAMILIES[cell.family]), Shape(cell.batch, (side, side))
    )


class Step:
    """A whole step of a candidate: forward, backward, clipping and AdamW."""

    def __init__(self, name: str, config: Any, cell: Cell, given: dict[str, Any]) -> None:
        with torch.device(DEVICE):
            self.candidate = Candidate(name, config, cell.targets, DTYPE)
        if cell.checkpointed and name == "peft":
            self.candidate.unet.enable_gradient_checkpointing()
        elif cell.checkpointed:  # as the trainer does, which can be recorded
            enable_checkpointing({"unet": self.candidate.unet})
        self.given, trained = given, self.candidate.trained
        self.optimizer = torch.optim.AdamW(trained, 1e-4, fused=True)

    def backward(self) -> None:
        with fast(self.candidate.fast):
            self.candidate.forward(self.given).backward()

    def __call__(self) -> None:
        self.backward()
        clip_grad_norm_(self.candidate.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class FreedStep(Step):
    """A step of ours with less work for the host, by a row of `WAYS`."""

    def __init__(
        self, name: str, config: Any, cell: Cell, given: dict[str, Any],
        recorder: Callable[[], Recorder] = CudaRecorder,
    ) -> None:  # fmt: skip
        super().__init__("ours", config, cell, given)
        self.gradients = Gradients(self.candidate.unet)
        if "compile" in WAYS[name]:
            for model in self.candidate.fast:
                model.way.compute = inductor(block_pass)
        self.replay: Callable[[], object] = self.summed
        if "graphs" in WAYS[name]:
            for _ in range(WARM):
                self.summed()
            self.replay = recorder()(self.summed)

    def summed(self) -> list[torch.Tensor]:
        with fast(self.candidate.fast):
            loss = self.candidate.forward(self.given)
            self.gradients.add(torch.autograd.grad(loss, self.gradients.parameters))
        return []

    def backward(self) -> None:
        self.gradients.link([True] * len(self.gradients.parameters))
        self.replay()


def steps(found: Found, cell: Cell) -> dict[str, Any]:
    """A step by each candidate, in turns: milliseconds, the peak on the card, and of ours the rate
    and the peak that was counted."""
    config = config_of(CONFIGS[cell.family]["unet"] if CUDA else CONFIGS["sd1"]["unet"] | TINY)
    side = SIDES[cell.family] // 8 if CUDA else 8
    with torch.device(DEVICE):
        given = conditions(config, DTYPE, side, cell.batch)
    ways = tuple(WAYS) if CUDA and cell.batch <= HOST_BOUND else ()
    names = (*NAMES, *ways)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    peaks, failed = {}, {}
    quick = tuple(name for name in names if name not in COMPILED)
    for turn in (names, quick[::-1]) if CUDA else (names,):
        for name in turn:
            if name in failed:
                continue
            if name in COMPILED:
                torch._dynamo.reset()  # one function has all blocks' programs, and eight at most
            try:
                step = (FreedStep if name in WAYS else Step)(name, config, cell, given)
                step()
            except Exception as error:
                if name not in WAYS:
                    raise
                failed[name] = f"FAILED: {told(error)}"
                let_go(error)
                continue
            for _ in range(3 if CUDA else 1):
                step()
            if CUDA:  # what it takes to make a UNet is no part of a step
                gc.collect()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            seconds[name].append(median_seconds(step, 8 if CUDA else 1))
            if CUDA:  # a recorded pass has asked for its memory before, and holds it
                graphed = "graphs" in WAYS.get(name, ())
                held = torch.cuda.max_memory_reserved() if graphed else 0
                peaks[name] = max(held, torch.cuda.max_memory_allocated()) / GIB
            del step
            gc.collect()
            if CUDA:
                torch.cuda.empty_cache()
    best = {name: min(values) for name, values in seconds.items() if values}
    row: dict[str, Any] = (
        asdict(cell)
        | {
            "family": cell.family if CUDA else "tiny",
            "ms": {name: round(1e3 * value, 1) for name, value in best.items()},
            "ours over peft": round(best["ours"] / best["peft"], 3),
            "peak GiB": {name: round(value, 2) for name, value in peaks.items()},
        }
        | failed
    )
    if CUDA:
        count = counted(cell)
        rate = count.flop / best["ours"] / 1e12
        row |= {"TFLOP/s": round(rate, 1), "counted peak GiB": round(count.peak / GIB, 2)}
        reached = found.numbers["product, TFLOP/s"]
        if isinstance(reached, float):  # else that part has failed
            row |= {"of the card's rate": round(rate / reached, 3)}
    return row


HEAD = (
    "| UNet | targets | batch | checkpointed | ours ms | general ms | peft ms | graphed ms | "
    "compiled ms | both ms | ours ÷ peft | ours GiB | graphed GiB | peft GiB | counted GiB | "
    "TFLOP/s | of the card's rate |\n|" + "---|" * 17
)


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Lines of Markdown."""
    yield HEAD
    for row in rows:
        ms, peak = row["ms"], row["peak GiB"]
        cells = (
            row["family"], row["targets"], row["batch"], "yes" if row["checkpointed"] else "no",
            *(ms.get(name, "") for name in (*NAMES, *WAYS)), row["ours over peft"],
            *(peak.get(name, "") for name in ("ours", "graphed", "peft")),
            row.get("counted peak GiB", ""), row.get("TFLOP/s", ""),
            row.get("of the card's rate", ""),
        )  # fmt: skip
        yield "| " + " | ".join(str(cell) for cell in cells) + " |"


def named(cell: Cell) -> str:
    """A cell in words."""
    return " ".join(str(value) for value in asdict(cell).values())


USUAL = "bf16" if CUDA else "no"
RUNS = (
    (USUAL,), (USUAL, "--cuda_graphs", "auto"), (USUAL, "--offload_weights"),
    *((("fp16",), ("no",)) if CUDA else ()),
)  # fmt: skip
"""Precision and flags of whole runs, in the order of what is wanted first."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=300.0, help="after which no part begins")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    started, found, rows = time.monotonic(), Found(args.out), []
    found.say("machine", machine())
    found.attempt(
        "product, TFLOP/s", lambda: found.say("product, TFLOP/s", round(product_rate(), 1))
    )

    def measure(cell: Cell) -> None:
        rows.append(steps(found, cell))
        found.say(f"step {named(cell)}", rows[-1])

    cells = [(f"step {named(c)}", partial(measure, c)) for c in (CELLS if CUDA else CELLS[:4:3])]
    runs = [(f"run, {' '.join(one)}", partial(run, found, *one)) for one in RUNS]
    # a run is half a minute, most of it imports: one first, the others after the first two cells
    for name, work in (*runs[:1], *cells[:2], *runs[1:], *cells[2:]):
        if time.monotonic() - started > args.seconds:
            found.say(name, "left out: no seconds left")
        else:
            found.attempt(name, work)
    text = "\n".join([found.numbers["machine"], "", *table(rows)])
    (args.out / "gpu.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
