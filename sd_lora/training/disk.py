"""The disk space that a run's checkpoints and LoRA files take, known before its first step."""

from collections.abc import Mapping

from torch import nn

from sd_lora.adapters.inject import lora_layers
from sd_lora.config.schema import RunConfig
from sd_lora.errors import UsageError
from sd_lora.files import mib
from sd_lora.findings import Finding
from sd_lora.folders import free_bytes
from sd_lora.report.events import Listener, Warned
from sd_lora.training.average import profiles_of
from sd_lora.training.optimizers import optimizer_of
from sd_lora.training.plan import Plan
from sd_lora.training.processes import DTYPES


def checkpoint_bytes(config: RunConfig, parameters: int) -> int:
    """Bytes of a checkpoint: float32 factors, those of moving averages, and the optimiser's
    state."""
    averages = len(profiles_of(config))
    # the trained ones beside those that are exported
    copies = 1 + averages + (averages > 0 or config.optimizer_facts.averages)
    return round(parameters * (4 * copies + optimizer_of(config).state_bytes))


def files_bytes(config: RunConfig, parameters: int) -> int:
    """Bytes of the LoRA files, of which there are two at most."""
    return 2 * parameters * DTYPES[config.save_precision].itemsize


def num_kept(config: RunConfig, num_steps: int) -> int:
    """Number of checkpoints that are left at the end, the last step's and the best one's among
    them; those of `checkpoint_minutes`, of interruptions and of earlier best steps are not
    counted."""
    every, limit = config.checkpointing_steps, config.checkpoints_total_limit
    steps = sorted({*range(every, num_steps + 1, every), num_steps})
    if limit is None:
        return len(steps) + config.keeps_best
    rolling = [step for step in steps if not (config.keep_every and step % config.keep_every == 0)]
    return len(steps) - max(0, len(rolling) - limit) + config.keeps_best


def check_room(plan: Plan, models: Mapping[str, nn.Module], emit: Listener) -> None:
    """Compare the space that a run needs with the free space of its output folder.

    models: component → injected model. Less than all checkpoints need is a warning.

    Raises:
        UsageError: less than one checkpoint and the LoRA files need.
    """
    config = plan.config
    parameters = sum(p.numel() for model in models.values() for p in lora_layers(model))
    one, files = checkpoint_bytes(config, parameters), files_bytes(config, parameters)
    count, free = num_kept(config, plan.num_steps), free_bytes(config.output_path)
    if free < one + files:
        raise UsageError(
            f"{config.output_path}: a checkpoint takes {mib(one)} and the LoRA files "
            f"{mib(files)}, and {mib(free)} are free: make room, or choose another folder"
        )
    # while one is written, the one that it replaces is still there
    need = (count + (config.checkpoints_total_limit is not None)) * one + files
    if free < need:
        details = f"{count} checkpoints and the LoRA files take {mib(need)}; {mib(free)} are free"
        emit(Warned([Finding("little-room", "disk", details)]))
