"""Inject adapters into a model and eject them; the trainable parameters."""

import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

from torch import nn

from sd_lora.adapters.deltas import Delta
from sd_lora.adapters.layer_classes import adapted_class_of, wrap
from sd_lora.adapters.layers import AdaptedAttention, AdaptedLayer
from sd_lora.adapters.linear_conv import AdaptedLinear
from sd_lora.adapters.quantized import AdaptedQuantized
from sd_lora.adapters.targets import Target, match_names, outer_modules, plan
from sd_lora.adapters.variants import Variant, check_options, new_delta
from sd_lora.errors import UsageError
from sd_lora.seeds import generator_for

TrainBias = Literal["none", "lora_only", "all"]


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    """Module name → adapted layer, each layer once, in the model's order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, AdaptedLayer)}


def deltas_of(model: nn.Module) -> dict[str, Delta]:
    """Delta name → delta, in the model's order.

    A delta has its parameter's name without a final ".weight": `conv1`, `conv1.bias`,
    `attn.out_proj`.
    """
    found = {}
    for name, layer in adapted_layers(model).items():
        for path, delta in layer.deltas_by_path().items():
            found[delta_name(name, path)] = delta
    return found


def delta_name(module: str, path: str) -> str:
    """Name of the delta of a module's parameter."""
    return f"{module}.{path}".removesuffix(".weight").removeprefix(".")


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
    rule_pattern: Mapping[str, str] | None = None,
    rslora: bool = False,
    neuron_dropout: float = 0.0,
    rank_dropout: float = 0.0,
    module_dropout: float = 0.0,
    train_bias: TrainBias = "none",
    modules_to_save: Iterable[str] = (),
    reference: nn.Module | None = None,
    **options: Any,
) -> list[str]:
    """Freeze a model and adapt its target modules; a second call adapts other modules of it.

    The model's next output is the same, bit for bit (with the inits pissa and loftq, up to rounding
    and the quantisation error). Each module's initial tensors are drawn from (seed, module name),
    so they depend neither on the other targets nor on the device.

    Args:
        model: any torch module. All of its parameters are frozen.
        targets: presets and patterns, see `sd_lora.adapters.targets`.
        rank, alpha, conv_rank, conv_alpha, rank_pattern, alpha_pattern: see `plan` there.
        dropout: probability in [0, 1) of zeroing an input element of the delta in training.
        init: of LoRA: "kaiming" (the default), "gaussian", "orthogonal", "pissa", "loftq".
        seed: of the initial tensors.
        method: "lora", "lora_fa", "loha", "lokr", "oft", "full", or a name given to
            `register_method`.
        rule: "add", or "decompose" (DoRA, with any method).
        rule_pattern: pattern → rule of these modules alone, matched as `rank_pattern`.
        rslora: scale by α/√r instead of α/r.
        neuron_dropout, rank_dropout, module_dropout: probabilities in [0, 1) of leaving out an
            element of A x, a rank of the delta (a small LoKr has none), all deltas of a module.
            They are drawn from torch's generators: seed these to repeat them.
        train_bias: biases to train too: "none", of adapted layers ("lora_only"), or all of the
            model ("all"), as in loralib and peft.
        modules_to_save: patterns of modules to train in full (a head, norms, embeddings), matched
            at the end of a name as `rank_pattern`.
        reference: the model before quantisation, for the init loftq.
        options: of the method: tucker (lora, loha, lokr), factor, full_matrix, decompose_both
            (lokr), block_size, rescaled (oft).

    Returns:
        The names of the adapted modules.

    Raises:
        UsageError: a target or pattern without a match, an unknown name, a rank below 1, a module
            with an adapter, or a layer that cannot be exact, with the reason. No change is made
            then.
    """
    if init is not None:
        options["init"] = init
    check_options(method, options, inspect.signature(inject).parameters)
    variant = Variant(
        method, rule, rslora, dropout, neuron_dropout, rank_dropout, module_dropout, options
    )
    planned = plan(
        *(model, targets, rank, alpha, conv_rank, conv_alpha, rank_pattern, alpha_pattern),
        *(method, rule_pattern),
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
    """Freeze a model and adapt the planned modules; see `inject`.

    Returns:
        The names of the adapted modules.
    """
    variant = variant or Variant()
    deltas: dict[str, dict[str, Delta]] = {}  # module name → parameter path → delta
    seen: set[int] = set()
    for target in planned:
        base = model.get_submodule(target.name)
        deltas[target.name] = {}
        if id(base) not in seen:  # a module with two names is adapted once
            seen.add(id(base))
            try:
                original = None if reference is None else reference.get_submodule(target.name)
            except AttributeError:
                raise UsageError(f"{target.name} is no module of the reference") from None
            own = replace(variant, rule=target.rule or variant.rule)
            deltas[target.name] = _new_deltas(target, base, own, seed, original)
    adapted = list(deltas)
    fresh = [delta for by_path in deltas.values() for delta in by_path.values()]
    if variant.rank_dropout and not any(delta.rank for delta in fresh):
        raise UsageError(
            f"rank_dropout drops ranks, and the method {variant.method} has none on these targets: "
            "leave it out"
        )
    if variant.options.get("tucker") and not any({*d.cores} & d.tensors().keys() for d in fresh):
        raise UsageError(
            "tucker gives kernels above 1×1 a core, and no target takes one here: leave it out, or "
            "add convolutions to the targets"
        )
    _add_full_deltas(model, deltas, train_bias, modules_to_save)
    dropouts = {n: getattr(variant, n) for n in ("dropout", "neuron_dropout", "module_dropout")}
    wrap_modules(model, deltas, dict.fromkeys(adapted, dropouts))
    return adapted


def _new_deltas(
    target: Target, base: nn.Module, variant: Variant, seed: int, reference: nn.Module | None
) -> dict[str, Delta]:
    """Parameter path → fresh delta of one module."""
    cls = adapted_class_of(base, variant.method)
    assert cls is not None, target.name  # `select` refuses all others
    fresh = {}
    try:
        cls.check(base)
        if cls is not AdaptedQuantized:
            reference = None  # the init loftq then asks for a quantised base
        elif reference is not None and adapted_class_of(reference) is AdaptedQuantized:
            raise ValueError("its reference is quantised, too: give the model before quantisation")
        if not cls.paths_in(base):  # weight_norm and others compute the weight in a hook
            raise ValueError(
                f"the weight of this {type(base).__name__} is no parameter but computed in a hook: "
                "remove its parametrisation, or leave out this target"
            )
        for path in cls.paths_in(base):
            name = delta_name(target.name, path)
            fresh[path] = delta = new_delta(
                variant,
                cls.weight_of(base, path),
                target.rank,
                target.alpha,
                generator_for(seed, "lora_A", name),
                None if reference is None else AdaptedLinear.weight_of(reference, path),
            )
            cls.prepare_delta(base, delta)
    except ValueError as error:
        raise UsageError(f"{target.name or 'the model'}: {error}") from None
    return fresh


def _add_full_deltas(
    model: nn.Module,
    deltas: dict[str, dict[str, Delta]],
    train_bias: TrainBias,
    modules_to_save: Iterable[str],
) -> None:
    """Add deltas of full rank for biases and for modules trained in full.

    deltas: module name → parameter path → delta; extended in place.
    """
    if train_bias not in ("none", "lora_only", "all"):
        raise UsageError(f"train_bias must be none, lora_only or all, not {train_bias!r}")
    names = [name for name in outer_modules(model) if name]
    saved = match_names(dict.fromkeys(modules_to_save, True), names, "modules_to_save")
    for name, module, paths in _modules_with_parameters(model):
        in_full: list[str] = []
        if any(f"{name}.".startswith(f"{root}.") for root in saved):
            if deltas.get(name) or isinstance(module, AdaptedLayer):
                raise UsageError(
                    f"{name} is both a target and in modules_to_save: leave it out of one of them"
                )
            in_full = paths
        elif train_bias == "all" or (train_bias == "lora_only" and deltas.get(name)):
            in_full = [path for path in paths if "bias" in path.rpartition(".")[2]]
        if in_full and isinstance(module, AdaptedLayer):
            raise UsageError(
                f"train_bias={train_bias!r} reaches {name}, which has an adapter already: give "
                "train_bias to the first inject"
            )
        cls = adapted_class_of(module, "full") or AdaptedLayer
        for path in in_full:
            if path not in deltas.setdefault(name, {}):
                deltas[name][path] = new_delta(Variant("full"), cls.weight_of(module, path))


def _modules_with_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, list[str]]]:
    """Yield (name, module, paths of its parameters without a delta) of every module with any.

    A MultiheadAttention reads the parameters of its inner modules itself: they count as its own.
    """
    attention: str | None = None
    seen: set[int] = set()
    for name, module in outer_modules(model).items():
        if id(module) in seen or (attention is not None and name.startswith(f"{attention}.")):
            continue
        seen.add(id(module))
        adapted = module if isinstance(module, AdaptedLayer) else None
        base = adapted.base if adapted else module
        is_attention = adapted_class_of(base) is AdaptedAttention
        attention = name if is_attention else None
        own = adapted.deltas_by_path() if adapted else {}
        paths = [path for path, _ in base.named_parameters(recurse=is_attention)]
        if untouched := [path for path in paths if path not in own]:
            yield name, module, untouched


def wrap_modules(
    model: nn.Module,
    deltas: Mapping[str, Mapping[str, Delta]],
    dropouts: Mapping[str, Mapping[str, float]] | None = None,
) -> None:
    """Freeze a model, but for the adapters it has, and wrap the modules that have deltas.

    Args:
        model: any torch module.
        deltas: module name → parameter path → delta. A name without deltas is a second name of a
            module with deltas.
        dropouts: module name → arguments of `AdaptedLayer`.

    Raises:
        UsageError: a delta that its layer cannot have, with both shapes or the reason. The model is
            then unchanged.
    """
    present = adapted_layers(model)
    _check_names(model, {*deltas, *present})
    by_module: dict[nn.Module, dict[str, Delta]] = {}
    for name, by_path in deltas.items():
        by_module.setdefault(model.get_submodule(name), {}).update(by_path)
    names = {model.get_submodule(name): name for name in reversed(list(deltas))}
    wrapped: dict[nn.Module, AdaptedLayer] = {}
    for base, by_path in by_module.items():
        name = names[base]
        try:
            wrapped[base] = wrap(base, by_path, **(dropouts or {}).get(name, {}))
        except (ValueError, RuntimeError, IndexError) as error:
            raise UsageError(f"{name}: {error}") from None
        wrapped[base].train(base.training)
    adapters = {id(p) for p in lora_layers(model)}
    for parameter in model.parameters():
        if id(parameter) not in adapters:
            parameter.requires_grad_(False)
    for layer in wrapped.values():
        layer.deltas.requires_grad_(True)
    for name in deltas:
        replace_module(model, name, wrapped[model.get_submodule(name)])


def _check_names(model: nn.Module, names: Collection[str]) -> None:
    """Refuse the model itself, and a module inside another one, as modules to wrap."""
    if "" in names:
        raise UsageError(
            f"{type(model).__name__} itself has parameters to train, and only modules inside a "
            "model can be replaced: call sd_lora.wrap on the layer, or put it into a module"
        )
    for name in names:
        parents = (name[:i] for i, letter in enumerate(name) if letter == ".")
        for parent in parents:
            if parent in names:
                raise UsageError(
                    f"{parent} and {name}, a module inside it, both have parameters to train: only "
                    "one of them can be adapted"
                )


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module into a model by name, in the place of another."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def eject(model: nn.Module) -> list[str]:
    """Remove all adapters: the original layers are back in their places.

    Merged weights stay merged: `merge(model); eject(model)` makes the deltas permanent.

    Returns:
        The names of the layers.
    """
    names = []
    if isinstance(model, AdaptedLayer):
        raise UsageError(
            "the model itself is an adapted layer, without a parent to put the original layer "
            "into: take its `base`"
        )
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, AdaptedLayer):
            replace_module(model, name, module.base)
            names.append(name)
    return names


def lora_layers(model: nn.Module) -> list[nn.Parameter]:
    """Trainable parameters of all deltas, for the optimiser.

    A list, for an iterator exhausted by the optimiser leaves gradient clipping nothing to clip.
    """
    return [p for layer in adapted_layers(model).values() for p in layer.deltas.parameters()]
