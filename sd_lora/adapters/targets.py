"""Target modules with their ranks and alphas: presets and patterns.

A target is a preset's name or a regular expression over a whole module name; several are joined
with "+". Patterns of ranks and alphas are peft's: they match the end of a name at a dot.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from sd_lora.adapters.layer_classes import adapted_class_of, adapted_classes
from sd_lora.adapters.layers import AdaptedLayer
from sd_lora.adapters.variants import check_rule, method_class
from sd_lora.errors import UsageError, did_you_mean

_ATTENTION = r"(.*\.)?to_(q|k|v|out\.0)"
_TRANSFORMER = (
    r"(.*\.)?attentions\.\d+\.(proj_in|proj_out"
    r"|transformer_blocks\.\d+\.(attn[12]\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2)))"
)
_CONV = (
    r"(.*\.)?resnets\.\d+\.(conv1|conv2|conv_shortcut|time_emb_proj)"
    r"|(.*\.)?(downsamplers|upsamplers)\.\d+\.conv"
)
_ENDS = r"conv_in|conv_out|(time|add|class)_embedding\.linear_[12]"
_BLORA = r"up_blocks\.0\.attentions\.{}\..*to_(q|k|v|out\.0)"
_TEXT = r"(.*\.)?(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])"

PRESETS: dict[str, str] = {
    "attention": _ATTENTION,
    "transformer": _TRANSFORMER,
    "conv": _CONV,
    "all": "|".join((_TRANSFORMER, _CONV, _ENDS)),
    "text": _TEXT,
    "blora_content": _BLORA.format(0),
    "blora_style": _BLORA.format(1),
}
"""Name → regular expression over a module's whole name.

attention: to_q to_k to_v to_out.0. transformer: every Linear and 1×1 convolution of the
Transformer2DModels (kohya's LoRA). conv: ResNet convolutions, shortcuts, time projections and
samplers (with transformer: kohya's LoCon). all: these, conv_in, conv_out and the time and label
embeddings. text: a CLIP text encoder's attention and MLP. blora_content, blora_style: the attention
of the two of SDXL's blocks that hold the content and the style of an image (Frenkel et al. 2024,
"Implicit Style-Content Separation using B-LoRA", section 4.1).
"""


@dataclass(frozen=True)
class Target:
    """One module to adapt: name, rank r, alpha α, and its rule, if it has one of its own."""

    name: str
    rank: int
    alpha: float
    rule: str | None = None


def outer_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Name → module, all names of a module too, without the insides of adapted layers."""
    found: dict[str, nn.Module] = {}
    inside: str | None = None  # start of the names inside the last adapted layer; they come next
    for name, module in model.named_modules(remove_duplicate=False):
        if inside is None or not name.startswith(inside):
            found[name] = module
            adapted = isinstance(module, AdaptedLayer)
            inside = (f"{name}." if name else "") if adapted else None
    return found


def _compile(pattern: str, option: str) -> re.Pattern[str]:
    """Compiled pattern; raises UsageError, with the option's name, for a wrong one."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UsageError(f"{option} {pattern!r} is not a regular expression: {error}") from None


def select(model: nn.Module, targets: str | Iterable[str], method: str = "lora") -> list[str]:
    """Names of the target modules, in the model's order.

    Args:
        model: any torch module, on any device (the meta device too).
        targets: names of `PRESETS` and regular expressions over whole module names.
        method: a method's name; norms are targets for the method full alone.

    Raises:
        UsageError: a target without a match, with layers that the method cannot adapt, or with
            layers that have an adapter.
    """
    items = targets.split("+") if isinstance(targets, str) else _listed(targets)
    method_class(method)
    modules = outer_modules(model)
    adaptable = {n for n, module in modules.items() if adapted_class_of(module, method) is not None}
    chosen: set[str] = set()
    for item in items:
        pattern = _compile(PRESETS.get(item, item), "target")
        found = [name for name in modules if name and pattern.fullmatch(name)]
        if not found:
            hint = "" if item in PRESETS else did_you_mean(item, PRESETS)
            ends = sum(name.endswith(f".{item}") for name in modules)
            if ends:
                hint = f" {ends} names end so: r'.*\\.{re.escape(item)}'."
            raise UsageError(
                f"target {item!r} matches no module of {type(model).__name__}.{hint} "
                f"Presets: {', '.join(PRESETS)}; anything else is a "
                "regular expression over whole module names, such as 'mid_block.*conv1'"
            )
        taken = [name for name in found if isinstance(modules[name], AdaptedLayer)]
        if taken:
            raise UsageError(
                f"target {item!r}: {len(taken)} of its {len(found)} modules have adapters already, "
                f"{taken[0]} the first: name the others alone, or eject first (and merge before "
                "that, to keep the deltas in the weights)"
            )
        if adaptable.isdisjoint(found):
            classes = sorted({type(modules[name]).__name__ for name in found})
            can = (name.rpartition(".")[2] for name in adapted_classes(method))
            raise UsageError(
                f"target {item!r} matches only {', '.join(classes)} ({found[0]}, …), and none of "
                f"these can be adapted; {', '.join(can)} can"
            )
        # a preset names layers by their place, so each must be adapted; a free pattern may also
        # match containers and norms
        left_out = [name for name in found if name not in adaptable]
        if item in PRESETS and left_out:
            cls = type(modules[left_out[0]]).__name__
            raise UsageError(
                f"target {item!r}: {left_out[0]} is a {cls}, which cannot be adapted; name the "
                "other modules by a regular expression"
            )
        chosen.update(adaptable.intersection(found))
    return [name for name in modules if name in chosen]


def _listed(targets: Iterable[str]) -> list[str]:
    """Several targets as a list; raises UsageError for other objects than names."""
    items = list(targets) if isinstance(targets, Iterable) else [targets]
    for item in items:
        if not isinstance(item, str):
            raise UsageError(
                f"targets are presets and patterns, and {type(item).__name__} is neither: its "
                "options are arguments here (rank, alpha, …)"
            )
    return items


_T = TypeVar("_T")


def match_names(patterns: Mapping[str, _T] | None, names: list[str], option: str) -> dict[str, _T]:
    """Name → value of the first pattern that matches the name's end at a dot (peft's rule).

    Args:
        patterns: regular expression → value.
        names: all module names.
        option: the option's name, for messages.

    Raises:
        UsageError: a pattern without a match.
    """
    values: dict[str, _T] = {}
    for pattern, value in (patterns or {}).items():
        regex = _compile(rf"(?:.*\.)?(?:{pattern})", option)
        found = [name for name in names if regex.fullmatch(name)]
        if not found:
            raise UsageError(f"{option} {pattern!r} matches none of the {len(names)} modules")
        for name in found:
            values.setdefault(name, value)
    return values


def plan(
    model: nn.Module,
    targets: str | Iterable[str],
    rank: int,
    alpha: float | None = None,
    conv_rank: int | None = None,
    conv_alpha: float | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    method: str = "lora",
    rule_pattern: Mapping[str, str] | None = None,
) -> list[Target]:
    """The targets that `inject` would adapt, without any change of the model.

    Args:
        model: any torch module, on any device (the meta device too).
        targets: see `select`.
        rank, alpha: of every module; an alpha of None means α = r, a scale of 1.
        conv_rank, conv_alpha: of convolutions with a kernel larger than 1 (kohya's conv_dim); by
            default `rank` and `alpha`. A conv_rank alone means α = conv_rank.
        rank_pattern, alpha_pattern: pattern → value, stronger than all of the above.
        method: a method's name; it decides which layers can be adapted.
        rule_pattern: pattern → rule; other modules have none of their own.

    Raises:
        UsageError: a pattern without a match, a rank below 1, an alpha of 0 or below, an unknown
            rule, or a module with an adapter.
    """
    names = select(model, targets, method)
    ranks = match_names(rank_pattern, names, "rank_pattern")
    alphas = match_names(alpha_pattern, names, "alpha_pattern")
    rules = match_names(rule_pattern, names, "rule_pattern")
    for rule in rules.values():
        check_rule(rule)
    default_conv_alpha = alpha if conv_alpha is None and conv_rank is None else conv_alpha
    planned, any_conv = [], False
    for name in names:
        module: Any = model.get_submodule(name)
        is_conv = any(k > 1 for k in getattr(module, "kernel_size", ()))
        any_conv |= is_conv
        r = int(ranks.get(name, conv_rank if is_conv and conv_rank is not None else rank))
        if r < 1:
            raise UsageError(f"the rank of {name} is {r}; it must be a whole number of at least 1")
        default = default_conv_alpha if is_conv else alpha
        a = float(alphas.get(name, r if default is None else default))
        if not a > 0:
            raise UsageError(f"the alpha of {name} is {a:g}; it must be above 0")
        planned.append(Target(name, r, a, rules.get(name)))
    if not any_conv and (conv_rank is not None or conv_alpha is not None):
        raise UsageError(
            "conv_rank and conv_alpha are for convolutions larger than 1×1, and none is among the "
            f"{len(names)} target modules: add the preset conv, as in attention+conv"
        )
    return planned
