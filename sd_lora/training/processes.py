"""Devices, processes and precision of a run, by Accelerate."""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    parse_flag_from_env,
)
from accelerate.utils.memory import clear_device_cache

from sd_lora.config.schema import RunConfig, TrainConfig
from sd_lora.errors import RunError, UsageError
from sd_lora.report.summary import Summary
from sd_lora.training import checkpoint
from sd_lora.training.sharding import without_fsdp
from sd_lora.training.trackers import trackers

DTYPES = {
    "no": torch.float32,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
"""Name of a precision → dtype."""


def weight_dtype(accelerator: Accelerator) -> torch.dtype:
    """The dtype of the frozen base model."""
    return DTYPES[accelerator.mixed_precision]


def vae_dtype(config: RunConfig) -> torch.dtype:
    """The dtype of the VAE."""
    return DTYPES[config.vae_precision]


@dataclass(frozen=True)
class Device:
    """Facts about a run's device.

    type: "cpu", "cuda", "mps", …. name: of the card; empty for others. precision: key of `DTYPES`,
    of the frozen base. unseen_card: see `unseen_card`.
    """

    type: str
    precision: str
    name: str = ""
    unseen_card: str = ""

    @classmethod
    def of(cls, device: torch.device, precision: str) -> "Device":
        """Facts about a device of this machine."""
        card = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        return cls(device.type, precision, card, unseen_card())

    @classmethod
    def planned(cls, config: TrainConfig) -> "Device":
        """The device and precision that Accelerate will choose for a run of one process."""
        device = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).device
        return cls.of(device, chosen_precision(config))

    @property
    def text(self) -> str:
        """The device in words: "cuda (NVIDIA L4), base in bfloat16"."""
        dtype = str(DTYPES[self.precision]).removeprefix("torch.")
        return f"{self.type}{f' ({self.name})' * bool(self.name)}, base in {dtype}"


def of_card(config: RunConfig, precision: str) -> RunConfig:
    """A run's configuration on a card that is not here: its precision where none is asked for."""
    asked = config.mixed_precision
    return config.replace(mixed_precision=precision) if asked == "auto" else config


def chosen_precision(config: TrainConfig) -> str:
    """The precision of the base, a key of `DTYPES`: the option's, the launcher's or the card's.

    Raises:
        UsageError: a precision of the launcher that the base cannot have.
    """
    if config.mixed_precision not in (None, "auto"):
        return config.mixed_precision
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION")
    if launched and launched not in DTYPES:
        raise UsageError(
            f"the configuration of accelerate asks for mixed_precision {launched}, and the base is "
            "in float32, fp16 or bf16 here: give --mixed_precision bf16"
        )
    if launched or config.mixed_precision is None:
        return launched or "no"
    if parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available():
        return "no"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def with_half_or_full(config: RunConfig) -> RunConfig:
    """The configuration with the precision that the base has by its bytes: bf16 or none."""
    half = DTYPES[chosen_precision(config)].itemsize == 2
    return config.replace(mixed_precision="bf16" if half else "no")


DRIVER_PLACES = (Path("/proc/driver/nvidia"), Path("/dev/nvidia0"))
"""Places of NVIDIA's driver and of its first card on Linux."""


def unseen_card() -> str:
    """The trace of an NVIDIA card that torch does not see, with the reason and a remedy.

    Empty if torch sees one, if there is no trace, or if the card is hidden on purpose.
    """
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if torch.cuda.is_available() or hidden or parse_flag_from_env("ACCELERATE_USE_CPU"):
        return ""
    traces = [str(place) for place in DRIVER_PLACES if place.exists()]
    traces += ["nvidia-smi"] if shutil.which("nvidia-smi") else []
    if not traces:
        return ""
    seen = f"{traces[0]} is there, as where a machine has an NVIDIA card, and torch"
    if torch.version.cuda is None:
        return (
            f"{seen} {torch.__version__} is a build without CUDA, so the CPU trains; to use the "
            "card: pip install --force-reinstall torch "
            "--index-url https://download.pytorch.org/whl/cu130"
        )
    return (
        f"{seen} finds none, so the CPU trains; nvidia-smi must name the card, with CUDA "
        f"{torch.version.cuda} at least: update the driver, or install torch for an older CUDA"
    )


UNUSED = "lomo_optim"
"""A package for which Accelerate looks along the whole path twice in each step. Where it is
missing, that is known at once for the rest of the process."""


def build_accelerator(config: TrainConfig, summary: Summary) -> Accelerator:
    """The Accelerator of a run: device, processes, precision, trackers; not accumulation, and not
    FSDP2, which shards the base alone (`sharding`)."""
    log_with = trackers(config, summary) or None
    project = ProjectConfiguration(
        project_dir=str(config.output_path),
        logging_dir=str(config.output_path / config.logging_dir),
    )
    if torch.cuda.is_initialized():  # by an earlier run of this process
        clear_device_cache(garbage_collection=True)
        torch.cuda.reset_peak_memory_stats()
    if find_spec(UNUSED) is None:
        sys.modules[UNUSED] = None  # type: ignore[assignment]  # not there, and known at once
    try:
        with without_fsdp():
            return Accelerator(
                mixed_precision=chosen_precision(config),
                log_with=log_with,
                project_config=project,
                kwargs_handlers=[
                    # base and inputs have one dtype already, and a layer casts its factors itself;
                    # autocast would look at every operand of every operator once more
                    AutocastKwargs(enabled=False),
                    # all buffers are constants
                    DistributedDataParallelKwargs(
                        broadcast_buffers=False,
                        find_unused_parameters=config.has_idle_parameters,
                    ),
                    # processes wait while the main one draws samples: on a slow device, for hours
                    InitProcessGroupKwargs(timeout=timedelta(hours=6)),
                ],
            )
    except ValueError as error:
        raise UsageError(f"mixed_precision {config.mixed_precision}: {error}") from None


@contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """torch's deterministic kernels alone for a while, if they are wanted.

    https://docs.pytorch.org/docs/stable/notes/randomness.html
    """
    if not wanted:
        yield
        return
    if os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in CUBLAS_WORKSPACES:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = CUBLAS_WORKSPACES[0]
    cudnn = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark
    try:
        torch.use_deterministic_algorithms(True)
        cudnn.deterministic, cudnn.benchmark = True, False
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        _, cudnn.deterministic, cudnn.benchmark = before


CUBLAS_WORKSPACES = (":4096:8", ":16:8")
"""Values of CUBLAS_WORKSPACE_CONFIG with which cuBLAS repeats its sums."""


T = TypeVar("T")


def on_main(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Run `work` on the main process; returns its result, or raises its error, on all processes.

    The result must be picklable.
    """
    if accelerator.num_processes == 1:
        return work()
    done: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            done[0] = work()
        except (UsageError, RunError) as error:  # the others would wait for ever
            done[1] = error
    broadcast_object_list(done)
    if done[1] is not None:
        raise done[1]
    return done[0]


def check_processes(accelerator: Accelerator) -> None:
    """Raise UsageError if a launcher started several processes and Accelerate joined none.

    Accelerate does this silently for torchrun on a CPU: each process would train alone, and all
    into one folder.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        raise UsageError(
            f"the launcher started {started} processes, and accelerate joined "
            f"{accelerator.num_processes}: on a CPU, set ACCELERATE_USE_CPU=true"
        )


def check_one_process() -> None:
    """Raise UsageError if a launcher started several processes, for [[jobs]]."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1:
        raise UsageError(
            f"[[jobs]] train in one process, and the launcher started {started}: start it without "
            "a launcher, or the jobs one by one"
        )


def agreed_seed(config: TrainConfig, resumed: Path | None) -> int:
    """The run's seed, the same on all processes: given, resumed, or drawn."""
    if config.seed is not None:
        return config.seed
    if resumed:
        return checkpoint.read_progress(resumed).seed
    drawn = [int.from_bytes(os.urandom(4), "little")]
    return int(broadcast_object_list(drawn)[0])
