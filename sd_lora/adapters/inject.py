"""Putting adapters into a model and taking them out again; merging; the trainable parameters."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from sd_lora.adapters.deltas import Delta
from sd_lora.adapters.kinds import kind_of, wrap
from sd_lora.adapters.layers import AdaptedAttention, AdaptedLayer
from sd_lora.adapters.products import AdaptedLinear
from sd_lora.adapters.quantized import AdaptedQuantized
from sd_lora.adapters.targets import Target, match_names, plan
from sd_lora.adapters.variants import Variant, new_delta
from sd_lora.errors import UsageError
from sd_lora.seeds import generator_for

TrainBias = Literal["none", "lora_only", "all"]


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    """Returns module name → adapted layer, each layer once, in the model's order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, AdaptedLayer)}


def deltas_of(model: nn.Module) -> dict[str, Delta]:
    """Returns update name → update, in the model's order.

    The name is the parameter's without a final ".weight": `conv1`, `conv1.bias`, `attn.out_proj`.
    """
    found = {}
    for name, layer in adapted_layers(model).items():
        for path, delta in layer.deltas_by_path().items():
            found[f"{name}.{path}".removesuffix(".weight").removeprefix(".")] = delta
    return found


def inject(
    model: nn.Module,
    targets: str | Iterable[str] = "attention",
    rank: int = 4,
    alpha: float | None = None,
    conv_rank: int | None = None,
    conv_alpha: float | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    dropout: float = 0.0,
    init: str | None = None,
    seed: int = 0,
    *,
    method: str = "lora",
    rule: str = "add",
    rslora: bool = False,
    neuron_dropout: float = 0.0,
    rank_dropout: float = 0.0,
    module_dropout: float = 0.0,
    train_bias: TrainBias = "none",
    modules_to_save: Iterable[str] = (),
    reference: nn.Module | None = None,
    **options: Any,
) -> list[str]:
    """Freezes `model` and adapts the modules that `targets` selects; returns their names.

    The model's next output is the same, bit for bit (with the inits pissa and loftq, to rounding
    and to the quantisation error). Each module's initial tensors are drawn from (seed, module
    name), so they do not depend on what else is adapted, nor on the device.

    Args:
        model: any torch module. All of its parameters are frozen.
        targets: presets and patterns, see `sd_lora.adapters.targets`.
        rank, alpha, conv_rank, conv_alpha, rank_pattern, alpha_pattern: see `plan` there.
        dropout: probability in [0, 1) of zeroing an input element of the update in training.
        init: how LoRA starts: "kaiming" (the default), "gaussian", "orthogonal", "pissa", "loftq".
        seed: of the initial tensors.
        method: "lora", "lora_fa", "loha", "lokr", "full", or one that `register_method` added.
        rule: "add", or "decompose" for DoRA and its like with the other methods.
        rslora: scale by α/√r instead of α/r.
        neuron_dropout, rank_dropout, module_dropout: probabilities in [0, 1) of leaving out an
            element of A x, a rank of the update (where it has any: a small LoKr has not), the
            whole update of a module. They are drawn from
            torch's generators, so seeding those repeats them.
        train_bias: whether biases are trained too: "none", those of adapted layers ("lora_only"),
            or all of the model ("all"), as in loralib and peft.
        modules_to_save: patterns of modules whose parameters are all trained in full (a head,
            norms, embeddings), matched at the end of a name as `rank_pattern`.
        reference: the model before quantisation, for the init loftq.
        options: the method's own: tucker (lora, loha, lokr), factor, full_matrix, decompose_both
            (lokr).

    Raises:
        UsageError: a target or pattern that matches nothing, an unknown name, a rank below 1, a
            layer that cannot be adapted exactly (named, with the reason), or a model that has
            adapters already. The model is then as it was.
    """
    if init is not None:
        options["init"] = init
    variant = Variant(
        method, rule, rslora, dropout, neuron_dropout, rank_dropout, module_dropout, options
    )
    planned = plan(
        model,
        targets,
        rank,
        alpha,
        conv_rank,
        conv_alpha,
        rank_pattern,
        alpha_pattern,
        method=method,
    )
    return adapt(model, planned, variant, seed, train_bias, modules_to_save, reference)


def adapt(
    model: nn.Module,
    planned: Iterable[Target],
    variant: Variant | None = None,
    seed: int = 0,
    train_bias: TrainBias = "none",
    modules_to_save: Iterable[str] = (),
    reference: nn.Module | None = None,
) -> list[str]:
    """Freezes `model` and adapts the planned modules; returns their names. See `inject`."""
    variant = variant or Variant()
    changes: dict[str, dict[str, Delta]] = {}
    seen: set[int] = set()
    for target in planned:
        base = model.get_submodule(target.name)
        changes[target.name] = {}
        if id(base) not in seen:  # a module that a model holds twice is adapted once
            seen.add(id(base))
            try:
                whole = None if reference is None else reference.get_submodule(target.name)
            except AttributeError:
                raise UsageError(f"{target.name} is no module of the reference") from None
            changes[target.name] = _new_deltas(target, base, variant, seed, whole)
    adapted = list(changes)
    fresh = [delta for deltas in changes.values() for delta in deltas.values()]
    if variant.rank_dropout and not any(delta.rank for delta in fresh):
        raise UsageError(f"rank_dropout drops ranks, and {variant.method} has none here")
    if variant.options.get("tucker") and not any({*d.cores} & d.tensors().keys() for d in fresh):
        raise UsageError("tucker gives kernels above 1×1 a core, and no target takes one here")
    _train_in_full(model, changes, train_bias, modules_to_save)
    dropouts = {n: getattr(variant, n) for n in ("dropout", "neuron_dropout", "module_dropout")}
    attach(model, changes, dict.fromkeys(adapted, dropouts))
    return adapted


def _new_deltas(
    target: Target, base: nn.Module, variant: Variant, seed: int, reference: nn.Module | None
) -> dict[str, Delta]:
    """Returns the fresh updates of one module, by parameter path."""
    kind = kind_of(base, variant.method)
    assert kind is not None, target.name  # `select` lets no other pass
    fresh = {}
    try:
        kind.check(base)
        if kind is not AdaptedQuantized:
            reference = None  # for the init loftq, which then says that it needs a quantised base
        elif reference is not None and kind_of(reference) is AdaptedQuantized:
            raise ValueError("its reference is quantised, too")
        if not kind.adaptable(base):  # weight_norm and its like compute the weight in a hook
            raise ValueError(f"the weight of this {type(base).__name__} is no parameter")
        for path in kind.adaptable(base):
            name = f"{target.name}.{path}".removesuffix(".weight")
            fresh[path] = delta = new_delta(
                variant,
                kind.weight_of(base, path),
                target.rank,
                target.alpha,
                generator_for(seed, "lora_A", name),
                None if reference is None else AdaptedLinear.weight_of(reference, path),
            )
            kind.start(base, delta)
    except ValueError as error:
        raise UsageError(f"{target.name or 'the model'}: {error}") from None
    return fresh


def _train_in_full(
    model: nn.Module,
    changes: dict[str, dict[str, Delta]],
    train_bias: TrainBias,
    modules_to_save: Iterable[str],
) -> None:
    """Adds updates of full rank for the biases and the modules that are trained as they are."""
    if train_bias not in ("none", "lora_only", "all"):
        raise UsageError(f"train_bias must be none, lora_only or all, not {train_bias!r}")
    names = [name for name, _ in model.named_modules() if name]
    saved = match_names(dict.fromkeys(modules_to_save, True), names, "modules_to_save")
    for name, module, paths in _owners(model):
        wanted = []
        if any(f"{name}.".startswith(f"{root}.") for root in saved):
            if changes.get(name):
                raise UsageError(f"{name} is both a target and in modules_to_save")
            wanted = paths
        elif train_bias == "all" or (train_bias == "lora_only" and changes.get(name)):
            wanted = [path for path in paths if "bias" in path.rpartition(".")[2]]
        kind = kind_of(module, "full") or AdaptedLayer
        for path in wanted:
            if path not in changes.setdefault(name, {}):
                changes[name][path] = new_delta(Variant("full"), kind.weight_of(module, path))


def _owners(model: nn.Module) -> Iterator[tuple[str, nn.Module, list[str]]]:
    """Yields (name, module, paths of its parameters) of every module that holds parameters; those
    inside a MultiheadAttention, which reads them itself, are its own."""
    inside: str | None = None
    for name, module in model.named_modules():
        if inside is not None and name.startswith(f"{inside}."):
            continue
        whole = kind_of(module) is AdaptedAttention
        inside = name if whole else None
        paths = [path for path, _ in module.named_parameters(recurse=whole)]
        if paths:
            yield name, module, paths


def attach(
    model: nn.Module,
    changes: Mapping[str, Mapping[str, Delta]],
    dropouts: Mapping[str, Mapping[str, float]] | None = None,
) -> None:
    """Freezes a bare model and puts updates into it: module name → parameter path → update.

    A name with no updates is a second name of a module that has them.

    Raises:
        UsageError: an update that its layer cannot have, with both shapes or the reason; the model
            is then as it was.
    """
    if "" in changes:
        raise UsageError(
            f"{type(model).__name__} itself holds parameters to train, and what is wrapped must be "
            "inside a model: wrap the layer by sd_lora.wrap, or put it into a module"
        )
    for name in changes:
        parents = (name[:i] for i, letter in enumerate(name) if letter == ".")
        for parent in parents:
            if parent in changes:
                raise UsageError(
                    f"{parent} holds parameters of its own and {name}: one of them can be adapted"
                )
    by_module: dict[nn.Module, dict[str, Delta]] = {}
    for name, deltas in changes.items():
        by_module.setdefault(model.get_submodule(name), {}).update(deltas)
    names = {model.get_submodule(name): name for name in reversed(list(changes))}
    wrapped: dict[nn.Module, AdaptedLayer] = {}
    for base, deltas in by_module.items():
        name = names[base]
        try:
            wrapped[base] = wrap(base, deltas, **(dropouts or {}).get(name, {}))
        except (ValueError, RuntimeError, IndexError) as error:
            raise UsageError(f"{name}: {error}") from None
        wrapped[base].train(base.training)
    model.requires_grad_(False)
    for layer in wrapped.values():
        layer.deltas.requires_grad_(True)
    for name in changes:
        _replace(model, name, wrapped[model.get_submodule(name)])


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def eject(model: nn.Module) -> list[str]:
    """Takes every adapter out and gives back the original layers; returns their names.

    What is merged at that moment stays merged: `merge(model); eject(model)` bakes the update in.
    """
    names = []
    if isinstance(model, AdaptedLayer):
        raise UsageError("this is an adapted layer by itself: what it adapts is its `base`")
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, AdaptedLayer):
            _replace(model, name, module.base)
            names.append(name)
    return names


def merge(model: nn.Module) -> None:
    """Puts every W' in its base weight's place, keeping the original for `unmerge`.

    Raises:
        UsageError: a layer that cannot be merged, named with the reason; nothing is merged then.
    """
    fresh = {n: layer for n, layer in adapted_layers(model).items() if not layer.is_merged}
    done: list[AdaptedLayer] = []
    for name, layer in fresh.items():
        try:
            layer.merge()
        except ValueError as error:
            for earlier in done:
                earlier.unmerge()
            raise UsageError(f"{name}: {error}") from None
        done.append(layer)


def unmerge(model: nn.Module) -> None:
    """Restores every base weight, bit for bit."""
    for layer in adapted_layers(model).values():
        layer.unmerge()


@contextmanager
def merged(model: nn.Module) -> Iterator[nn.Module]:
    """Merges the model's adapters within a `with` block; what was merged before stays so."""
    fresh = [layer for layer in adapted_layers(model).values() if not layer.is_merged]
    merge(model)
    try:
        yield model
    finally:
        for layer in fresh:
            layer.unmerge()


@contextmanager
def unmerged(model: nn.Module) -> Iterator[nn.Module]:
    """Unmerges within a `with` block; what was merged before is merged anew after it."""
    before = [layer for layer in adapted_layers(model).values() if layer.is_merged]
    unmerge(model)
    try:
        yield model
    finally:
        for layer in before:
            layer.merge()


def set_strength(model: nn.Module, strength: float) -> None:
    """Makes every layer compute with W + strength·(W' − W); 1 is as trained, 0 is the base.

    Merged layers are merged anew.
    """
    with unmerged(model):
        for layer in adapted_layers(model).values():
            layer.strength = float(strength)


def limit_norms(model: nn.Module, max_norm: float) -> int:
    """Scales every ΔW down to a Frobenius norm of at most `max_norm`; returns how many were.

    Max-norm regularisation, to be called after an optimiser step (kohya's scale_weight_norms).
    Merged layers are merged anew.
    """
    if not max_norm > 0:
        raise UsageError(f"max_norm must be above 0, not {max_norm}")
    count, deltas = 0, deltas_of(model)
    with unmerged(model), torch.no_grad():
        # read at once: a GPU is waited for once and not once a module
        norms = torch.stack([delta.norm() for delta in deltas.values()]).tolist() if deltas else []
        for (name, delta), norm in zip(deltas.items(), norms, strict=True):
            if norm > max_norm:
                try:
                    delta.shrink(max_norm / norm)
                except ValueError as error:
                    raise UsageError(f"{name}: {error}") from None
                count += 1
    return count


def lora_layers(model: nn.Module) -> list[nn.Parameter]:
    """Returns the trainable parameters of every update: a list, for the optimiser.

    A list and not an iterator: one that the optimiser has exhausted clips no gradient afterwards.
    """
    return [p for layer in adapted_layers(model).values() for p in layer.deltas.parameters()]
