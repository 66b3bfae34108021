"""Injecting deltas into the models of a run, by its configuration."""

import re
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from sd_lora.adapters.fast.layers import lay_out
from sd_lora.adapters.inject import deltas_of, inject
from sd_lora.adapters.layer_classes import adapted_class_of
from sd_lora.adapters.targets import match_names, select
from sd_lora.config.rows import PLAIN_LORA
from sd_lora.config.schema import RunConfig
from sd_lora.models.families import Family
from sd_lora.training.conditioning import TextConditioning
from sd_lora.training.init_lora import DEFAULT_TARGETS, Structure
from sd_lora.training.offload import let_blocks_wait
from sd_lora.training.out_of_memory import memory_for
from sd_lora.training.processes import weight_dtype
from sd_lora.training.recompute import enable_checkpointing
from sd_lora.training.sharding import shard
from sd_lora.transfer import brought


def inject_all(
    config: RunConfig,
    family: Family,
    models: Mapping[str, nn.Module],
    seed: int,
    saved: Path | None = None,
) -> dict[str, nn.Module]:
    """Adapt the UNet, and the text encoders if they are trained.

    Args:
        models: component → model, of the family's UNet and text encoders.
        seed: the run's.
        saved: the checkpoint to resume, which has the modules and ranks of a run from a LoRA file.

    Returns:
        component → adapted model.
    """
    unet = models["unet"]
    shared: dict[str, Any] = {
        "dropout": config.lora_dropout,
        "init": config.init_lora_weights,
        "seed": seed,
        "method": config.method,
        "rule": "decompose" if config.use_dora else "add",
        "rslora": config.use_rslora,
        "neuron_dropout": config.neuron_dropout,
        "rank_dropout": config.rank_dropout,
        "module_dropout": config.module_dropout,
        "train_bias": config.train_bias,
    }
    options = {
        "tucker": config.use_tucker,
        "factor": config.lokr_factor,
        "full_matrix": config.lokr_full_matrix,
        "decompose_both": config.lokr_decompose_both,
        "block_size": config.oft_block_size,
        "rescaled": config.oft_rescaled,
    }
    shared |= {name: value for name, value in options.items() if value}
    file = saved or config.init_path if config.init_lora else None
    structure = Structure.of(file, models, config.use_rslora) if file else Structure({})
    targets = config.targets or _targets_of(structure, unet, config.method)
    arguments = _arguments(
        unet, targets, "unet", structure, config.method, config.rank, config.lora_alpha,
        config.conv_rank, config.conv_alpha, config.rank_pattern, config.alpha_pattern,
    )  # fmt: skip
    in_full = config.modules_to_save.split("+") if config.modules_to_save else ()
    inject(unet, **arguments, modules_to_save=in_full, **shared)
    adapted: dict[str, nn.Module] = {"unet": unet}
    shared.pop("tucker", None)  # a text encoder has no kernel to give a core to
    for component in components_of(config, family)[1:]:
        rank, alpha = config.rank_and_alpha_of(component)
        encoder = models[component]
        names = read_modules(family, component, encoder, config.clip_skip)
        arguments = _arguments(encoder, names, component, structure, config.method, rank, alpha)
        inject(encoder, **arguments, **shared)
        adapted[component] = encoder
    return adapted


def _targets_of(structure: Structure, unet: nn.Module, method: str) -> str | list[str]:
    """The UNet's modules in a LoRA file that a method can adapt; the default where it has none."""
    modules = dict(unet.named_modules())
    names = [
        name
        for name, form in structure.forms.get("unet", {}).items()
        if name in modules and (form or method not in PLAIN_LORA)  # others are trained whole
    ]
    names = [name for name in names if adapted_class_of(modules[name], method)]
    return [one_of(names)] if names else DEFAULT_TARGETS


def _arguments(
    model: nn.Module,
    targets: str | list[str],
    component: str,
    structure: Structure,
    method: str,
    rank: int | None,
    alpha: float | None,
    conv_rank: int | None = None,
    conv_alpha: float | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Arguments of `inject`: these, and where ranks and alphas are None, those of a LoRA file.

    Modules that the file lacks have the form that is most frequent in it.
    """
    names = select(model, targets, method)
    ruled = match_names(rank_pattern, names, "rank_pattern")
    ranks: dict[int, list[str]] = {}
    alphas: dict[float, list[str]] = {}
    for name in names:
        module: Any = model.get_submodule(name)
        large = any(k > 1 for k in getattr(module, "kernel_size", ()))
        form = structure.forms.get(component, {}).get(name)
        if form is None or rank or (large and conv_rank) or name in ruled:
            continue
        ranks.setdefault(form.rank, []).append(name)
        if form.alpha and not (alpha or (large and conv_alpha)):
            alphas.setdefault(form.alpha, []).append(name)
    usual = structure.usual(component)
    return {
        "targets": targets,
        "rank": rank or usual.rank,
        "alpha": alpha or (None if rank else usual.alpha),
        "conv_rank": conv_rank,
        "conv_alpha": conv_alpha,
        "rank_pattern": {**(rank_pattern or {}), **{one_of(n): r for r, n in ranks.items()}},
        "alpha_pattern": {**(alpha_pattern or {}), **{one_of(n): a for a, n in alphas.items()}},
    }


def one_of(names: Iterable[str]) -> str:
    """A pattern of these whole module names."""
    return f"^(?:{'|'.join(map(re.escape, names))})"


def components_of(config: RunConfig, family: Family) -> list[str]:
    """The components that get deltas: the UNet, and text encoders with a rank."""
    return ["unet", *(c for c in family.text_encoders if config.rank_and_alpha_of(c)[0] != 0)]


def read_modules(family: Family, component: str, encoder: Any, clip_skip: int) -> list[str]:
    """Patterns of a text encoder's linears whose outputs reach the UNet.

    SDXL's first encoder is read before its last layer, and clip skip leaves out more layers; only
    the pooled output, of the second encoder, goes through all. A linear that nothing reads cannot
    learn, and several processes would wait for its gradients.
    """
    num = encoder.config.num_hidden_layers
    if component != "text_encoder_2":
        num -= family.penultimate + clip_skip
    names = select(encoder, "text")
    layers = {name: int(name.partition("layers.")[2].partition(".")[0]) for name in names}
    return [re.escape(name) for name in names if layers[name] < num]


def prepare_models(
    config: RunConfig,
    accelerator: Accelerator,
    models: dict[str, nn.Module],
    text: TextConditioning,
    sharded: bool = False,
    blocks: Container[str] | None = None,
) -> dict[str, nn.Module]:
    """Cast the frozen base to the run's precision, and wrap the models that learn by Accelerate, or
    shard the UNet.

    blocks: those whose activations are computed again, by a budget of memory; None without one.
    """
    dtype = weight_dtype(accelerator)
    learning = models | (text.encoders if text.tokens else {})
    on_device = learning | (text.encoders if len(learning) > 1 else {})  # used in each step
    words = {id(p) for p in text.tokens.parameters()} if text.tokens else set()
    for model in on_device.values():
        # all tensors of deltas stay float32, frozen ones too: LoRA-FA's A, PiSSA's start
        kept = {id(t) for d in deltas_of(model).values() for t in (*d.parameters(), *d.buffers())}
        for tensor in (*model.parameters(), *model.buffers()):
            if id(tensor) not in kept | words and tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)
    for model in learning.values():
        model.train()
    if config.gradient_checkpointing or blocks is not None:
        enable_checkpointing(learning, blocks)
    with memory_for("bringing the models to the device", config):
        for name, model in on_device.items():
            if config.offload_weights:
                let_blocks_wait(model)
            if config.offload_weights or name not in learning:
                brought(model, accelerator.device)
        if sharded and accelerator.num_processes > 1:  # which takes kernels as they are in files
            shard(models["unet"], accelerator)
            return {name: model.to(accelerator.device) for name, model in learning.items()}
        lay_out(models["unet"], accelerator.device)
        return {
            name: accelerator.prepare_model(model, device_placement=not config.offload_weights)
            for name, model in learning.items()
        }
