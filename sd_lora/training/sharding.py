"""Engines that a launcher asks for: FSDP2 shards the frozen UNet, others are refused.

Each process holds a part of every block of the UNet and gathers a block when it computes (Zhao et
al. 2023, arXiv 2304.11277, by torch's `fully_shard`). The adapter is no part of it: its tensors are
whole on each process, so that optimiser, checkpoints and exports are those of one process.
"""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env, patch_environment
from torch import nn

from sd_lora.adapters.inject import deltas_of
from sd_lora.config.schema import RunConfig
from sd_lora.errors import Problem, UsageError, refuse

LEAST_TORCH = (2, 7)
"""torch whose `fully_shard` leaves parameters out (`ignored_params`)."""

INSTEAD = "accelerate launch --multi_gpu --num_processes N"


def shards() -> bool:
    """Whether the launcher asks for FSDP2.

    Raises:
        UsageError: an engine, or a setting of FSDP, that is not there, with the way to the same
            end.
    """
    for name, text in _REFUSED.items():
        if parse_flag_from_env(name):
            raise UsageError(text)
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return False
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UsageError(
            "the configuration of accelerate asks for FSDP 1: give it fsdp_version: 2, or launch "
            f"with {INSTEAD}"
        )
    found = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if found < LEAST_TORCH:
        raise UsageError(
            f"FSDP2 needs torch 2.7 or newer, to leave the adapter whole, and {torch.__version__} "
            f"is installed: update it, or launch with {INSTEAD}"
        )
    return True


_REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": (
        "the configuration of accelerate asks for DeepSpeed, which is not there: ZeRO shards the "
        "optimiser's state, and a LoRA's is small. Launch with "
        f"{INSTEAD}; --optimizer adamw8bit makes the state a quarter, and FSDP2 shards the base "
        "(sample_data/configs/fsdp2.yaml)"
    ),
    "ACCELERATE_USE_MEGATRON_LM": (
        "the configuration of accelerate asks for Megatron-LM, which trains language models: "
        f"launch with {INSTEAD}"
    ),
    "FSDP_OFFLOAD_PARAMS": (
        "fsdp_offload_params is not there: leave it out; --gradient_checkpointing and a smaller "
        "batch make room"
    ),
    "FSDP_ACTIVATION_CHECKPOINTING": (
        "fsdp_activation_checkpointing is --gradient_checkpointing here: leave it out of the "
        "configuration of accelerate, and give the flag"
    ),
}
"""Flag of the launcher's environment → the reason why it is refused, with the way to its end."""


def check_even(config: RunConfig, has_buckets: bool, has_classes: bool) -> None:
    """Refuse options with which processes make different numbers of forward passes, each an
    exchange of the sharded UNet, which all processes must make; and a count of a whole UNet.

    has_buckets: whether images are of several shapes. has_classes: whether class images are
    trained.

    Raises:
        UsageError: all of these options at once, with the way out.
    """
    way = f"which FSDP2 cannot: leave it out, or launch with {INSTEAD}"
    problems = []
    if config.output_preservation:
        text = "output_preservation computes some images twice, others not"
        problems.append(Problem("output_preservation", f"{text}, {way}"))
    if has_classes and has_buckets:
        text = "class images of several shapes take a pass each beside the others"
        problems.append(Problem("with_prior_preservation", f"{text}, {way} (or without buckets)"))
    if config.base_precision:
        text = "base_precision stores weights as bytes, which are not split"
        problems.append(Problem("base_precision", f"{text}, {way}"))
    if config.memory_budget:
        text = "memory_budget counts the whole UNet on each process"
        problems.append(Problem("memory_budget", f"{text}, {way}"))
    refuse(problems)


def without_fsdp() -> AbstractContextManager[None]:
    """A context in which libraries do not know of FSDP: Accelerate would wrap models by itself, and
    transformers leaves weights out (4) or buffers at zero (5) on all processes but one, for
    Accelerate to send them (`fsdp_cpu_ram_efficient_loading`)."""
    return patch_environment(accelerate_use_fsdp="false")


def shard(unet: nn.Module, accelerator: Accelerator) -> None:
    """Shard an injected UNet over the processes, in place, on their devices."""
    from torch.distributed.fsdp import fully_shard

    for delta in deltas_of(unet).values():
        delta.to(accelerator.device)
    whole = {p for delta in deltas_of(unet).values() for p in delta.parameters()}
    whole |= {p for p in unet.parameters() if not p.is_floating_point()}  # of a quantised base
    mesh = torch.distributed.init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    blocks = [m for m in unet.modules() if type(m).__name__ in unet._no_split_modules]  # type: ignore[operator]
    for block in (*reversed(blocks), unet):  # inner ones first
        fully_shard(block, mesh=mesh, ignored_params=whole)


def is_sharded(model: nn.Module) -> bool:
    """Whether a model computes on all processes at once, or not at all."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False  # also in a build of torch that has no processes
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


def gather(model: nn.Module) -> None:
    """Give each process all of a sharded model, until `release`; all processes must call it."""
    for module in model.modules():
        if is_sharded(module):
            module.unshard()  # type: ignore[operator]


def release(model: nn.Module) -> None:
    """Leave each process its own part of a model again."""
    for module in model.modules():
        if is_sharded(module):
            module.reshard()  # type: ignore[operator]


def shard_bytes(model: nn.Module) -> tuple[int, int]:
    """Bytes of a model's sharded parameters on this process, and of all of them."""
    sharded = [p for p in model.parameters() if hasattr(p, "to_local")]
    own = sum(p.to_local().numel() * p.element_size() for p in sharded)
    return own, sum(p.numel() * p.element_size() for p in sharded)


def average_gradients(accelerator: Accelerator, parameters: Sequence[nn.Parameter]) -> None:
    """Replace gradients by their means over processes, in one message.

    One that is missing on some processes counts as 0 there; one missing on all stays so.
    """
    grads = [p.grad for p in parameters]
    flags = torch.tensor([float(g is not None) for g in grads], device=accelerator.device)
    flat = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    sizes = [p.numel() for p in parameters]
    means = accelerator.reduce(torch.cat([*(g.flatten() for g in flat), flags]), "mean")
    *parts, there = means.split([*sizes, len(sizes)])
    for parameter, part, flag in zip(parameters, parts, there.tolist(), strict=True):
        parameter.grad = part.view_as(parameter) if flag else None
