"""Contradictions of a configuration: options that exclude each other, or have no effect together.

The simple ones are in the rows (`only`, `requires`, `ignored_by`), the others are functions beside
the rows, `contradictions` of each file of `options/`.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from sd_lora.config.options import (
    adapter,
    dreambooth,
    encoding,
    images,
    objective,
    per_source,
    run,
    saving,
    sources,
    training,
    validation,
)
from sd_lora.config.rows import Option
from sd_lora.errors import Problem

if TYPE_CHECKING:
    from sd_lora.config.schema import TrainConfig

LEAVE_OUT = "Leave it out"

TOPICS = (
    run,
    sources,
    per_source,
    images,
    dreambooth,
    encoding,
    adapter,
    training,
    saving,
    objective,
    validation,
)
"""Files of rows, each with its `contradictions`."""


def contradictions(
    config: "TrainConfig", options: Mapping[str, Option], wrong: Collection[str]
) -> list[Problem]:
    """All contradictions of a configuration.

    options: its rows. wrong: options with wrong values, which have their defaults in `config`.
    """
    found = [*_by_rows(config, options)]
    for topic in TOPICS:
        found += topic.contradictions(config)
    return [problem for problem in found if problem.field not in wrong]


def _by_rows(config: "TrainConfig", options: Mapping[str, Option]) -> Iterator[Problem]:
    """Options of another mode, and options without effect for want of another one."""
    for name, option in options.items():
        value = getattr(config, name)
        if not option.is_given(value):
            continue
        if option.only and option.only != config.mode:
            remedy = f"{LEAVE_OUT}, or set mode to {option.only}"
            yield Problem(name, f"{name} has an effect in {option.only} runs only", remedy)
            continue
        for why in [] if option.only_warns else why_idle(config, option, options):
            yield Problem(name, f"{name} has no effect {why}", LEAVE_OUT)
        if len(config.places) == 1 and config.places[0] in option.ignored_by:
            yield Problem(name, f"{name} has no effect with {config.places[0]}", LEAVE_OUT)


def why_idle(config: "TrainConfig", option: Option, options: Mapping[str, Option]) -> list[str]:
    """The reasons why an option has no effect: "with method full"; empty if it has one."""
    return [
        f"with {other} {getattr(config, other)}"
        if other in option.unless
        else _why(options[other], option.requires[other], getattr(config, other))
        for other in option.missing(config)
    ]


def _why(other: Option, values: tuple[Any, ...] | None, theirs: Any) -> str:
    """The reason that another option's value gives: "without train_text_encoder"."""
    if not values:
        return f"without {other.name}"
    if values == (None,):
        return f"with {other.name}"
    if other.kind == "bool":
        return f"with{'' if theirs else 'out'} {other.name}"
    if theirs is not None and 2 * len(values) > len(other.choices):  # the others are fewer
        return f"with {other.name} {theirs}"
    return f"without {other.name} {' or '.join(map(str, values))}"
