"""One row a name elsewhere that is more, less or otherwise than one option here.

A name that equals an option stands in the option's row (`kohya="network_dim"`), and nowhere else.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from sd_lora.config.rows import Option
from sd_lora.config.translate.files import find, load
from sd_lora.errors import UsageError

Kind = Literal["same", "otherwise", "needless", "absent"]
"""A setting is taken as it is, taken with another meaning, not needed here, or not there."""


class Given(dict[str, Any]):
    """Name elsewhere → value: all settings of a configuration, and their defaults.

    folder: that of the configuration, for files that it names.
    """

    folder = Path()

    def load(self, name: str) -> Any:
        """The contents of a JSON, TOML or YAML file that a setting names; None if there is none."""
        path = find(name, self.folder)
        try:
            return load(path) if path else None
        except UsageError:
            return None


@dataclass(frozen=True)
class Taken:
    """The answer to one setting.

    values: option here → value. reason: the predicate of a sentence: "is not needed: …".
    """

    kind: Kind
    values: dict[str, Any] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True)
class Row:
    """A name elsewhere.

    here: its place here in flags: "--targets and --method"; empty if there is none.
    reason: the predicate of a sentence about it, for messages without a value.
    take: value and all settings → the answer; ValueError with a predicate for a wrong value.
    """

    here: str
    reason: str
    take: Callable[[Any, Given], Taken]


UNUSED = "unused "
"""Beginning of the name of a setting that has no effect there, because of another one."""


def is_off(value: Any) -> bool:
    """Whether a value asks for nothing: not given, false, zero, empty, also as a text."""
    if isinstance(value, str):
        return value.strip().lower() in ("", "0", "0.0", "false", "none", "null", "no", "off")
    return not value or (isinstance(value, float) and math.isnan(value))


def needless(reason: str) -> Row:
    """A setting without need here: it is always so, or it is about the other program alone."""
    return Row("", reason, lambda value, given: Taken("needless", reason=reason))


def absent(reason: str, idle: Collection[Any] = (), here: str = "") -> Row:
    """A setting that is not there; idle: values with which it asks for nothing, beside off ones."""

    def take(value: Any, given: Given) -> Taken:
        if is_off(value) or value in idle:
            return Taken("needless", reason="is off or as it always is here")
        return Taken("absent", reason=reason)

    return Row(here, reason, take)


def switch(here: str, reason: str, **values: Any) -> Row:
    """A switch that sets options if it is on; `here`: their flags."""

    def take(value: Any, given: Given) -> Taken:
        if is_off(value):
            return Taken("needless", reason="is off")
        return Taken("otherwise", dict(values), reason)

    return Row(here, reason, take)


def otherwise(name: str, reason: str, convert: Callable[[Any], Any] = lambda value: value) -> Row:
    """One option with another meaning or another count; an off value asks for nothing.

    convert: value → the option's value; ValueError with a predicate for one that has none.
    """

    def take(value: Any, given: Given) -> Taken:
        if is_off(value):
            return Taken("needless", reason="is off")
        return Taken("otherwise", {name: convert(value)}, reason)

    return Row(f"--{name}", reason, take)


COMPILE = switch(
    "--compile",
    "compiles the UNet's transformer blocks alone, where that is measured to be faster",
    compile="auto",
)
STORED = "is the storage of the linear layers of the UNet's transformers alone"
"""Predicate of a base in few bits elsewhere, which `base_precision` is here."""


def stored_in(
    choices: Mapping[str, str], plain: Collection[str] = (), named: tuple[str, str] | None = None
) -> Row:
    """The precision in which a base is stored.

    choices: value there, in small letters → value of `base_precision`. plain: float precisions,
    which `mixed_precision` says here. named: of a switch, the setting that names the precision, and
    its default.
    """

    def take(value: Any, given: Given) -> Taken:
        name, usual = named or ("", value)
        word = str(given.get(name) or usual).lower()
        if is_off(value) or word in plain:
            return Taken("needless", reason="is not needed: mixed_precision says it")
        if word in choices:
            return Taken("otherwise", {"base_precision": choices[word]}, STORED)
        return Taken("absent", reason="is int8, fp8 or nf4 here")

    return Row("--base_precision", STORED, take)


def of_steps(reason: str, *names: str) -> Row:
    """A number of steps that is that of several options; an off value asks for nothing."""

    def take(value: Any, given: Given) -> Taken:
        if is_off(value):
            return Taken("needless", reason="is off")
        return Taken("otherwise", dict.fromkeys(names, whole(value)), reason)

    return Row(" and ".join(f"--{name}" for name in names), reason, take)


def among(name: str, choices: Mapping[str, Any], reason: str, absent_reason: str) -> Row:
    """One option whose values have other names there.

    choices: value there, in small letters → value here. reason: of a value with another meaning;
    empty for another spelling. absent_reason: for all others.
    """

    def take(value: Any, given: Given) -> Taken:
        if value in (None, ""):
            return Taken("needless", reason="is not given")
        word = str(value).lower()
        if word not in choices:
            return Taken("absent", reason=absent_reason)
        here = choices[word]
        kind: Kind = "otherwise" if reason and here != value else "same"
        return Taken(kind, {name: here}, reason)

    return Row(f"--{name}", reason or absent_reason, take)


def taking(here: str, reason: str, take: Callable[[Any, Given], Taken]) -> Row:
    """A setting with an answer of its own."""
    return Row(here, reason, take)


def of_push(option: str, push: str) -> Row:
    """A setting of the upload to the hub, which counts with another one, `push`, alone."""

    def take(value: Any, given: Given) -> Taken:
        if is_off(value) or is_off(given.get(push)):
            return Taken("needless", reason="counts for nothing: nothing is uploaded")
        return Taken("same", {option: value})

    return Row(f"--{option}", "", take)


def other_model(name: str, value: Any) -> UsageError:
    """The error of settings for a model, or a kind of training, that is not there."""
    text = "LoRAs of Stable Diffusion 1, 2 and XL are trained here"
    return UsageError(f"{name} = {value} is not there: {text}")


def read_with(other: str, here: str = "") -> Row:
    """A setting that another one's row reads."""
    reason = f"is read with {other}"
    return Row(here, reason, lambda value, given: Taken("needless", reason=reason))


def same(option: Option) -> Row:
    """The row of a name that equals an option."""

    def take(value: Any, given: Given) -> Taken:
        if value is None or value in ("", [], {}):
            return Taken("needless", reason="is not given")
        if is_off(value) and _excludes_zero(option) and value not in option.choices:
            return Taken("needless", reason="is off")
        return Taken("same", {option.name: value})

    return Row(f"--{option.name}", "", take)


def _excludes_zero(option: Option) -> bool:
    """Whether 0 lies below the range of an option, so that it means "off" elsewhere."""
    low = option.range.get("ge", 0) > 0 or option.range.get("gt", -1) >= 0
    return (
        option.kind in ("int", "float") and low or option.default is None and bool(option.choices)
    )


def number(value: Any) -> float:
    """A number from JSON, TOML or a text; ValueError if it is none."""
    if isinstance(value, bool):
        raise ValueError(f"is a number there, not {value!r}")
    try:
        found = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"is a number there, not {value!r}") from None
    if not math.isfinite(found):
        raise ValueError(f"is a finite number there, not {value!r}")
    return found


def whole(value: Any) -> int:
    """A whole number from JSON, TOML or a text; ValueError if it is none."""
    found = number(value)
    if not found.is_integer():
        raise ValueError(f"is a whole number here, not {value!r}")
    return int(found)


def truth(value: Any) -> bool:
    """True or false from JSON, TOML or a text; ValueError if it is neither."""
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    found = words.get(str(value).strip().lower())
    if found is None:
        raise ValueError(f"is true or false there, not {value!r}")
    return found


def _steps(value: Any) -> int | float:
    """A number of steps: whole, or a share of the run."""
    found = number(value)
    return int(found) if found.is_integer() else found


def _text(value: Any) -> str:
    if isinstance(value, list | dict | bool):
        raise ValueError(f"is a text here, not {value!r:.40}")
    return str(value)


CONVERT: dict[str, Callable[[Any], Any]] = {
    "bool": truth,
    "int": whole,
    "float": number,
    "steps": _steps,
    "str": _text,
    "ints": lambda value: [whole(side) for side in value],
    "dict": lambda value: value,
    "list": lambda value: value,
}
"""Kind of an option → the conversion of a value that JSON, YAML, TOML or a command line holds."""


def typed(taken: Taken, options: Mapping[str, Option]) -> Taken:
    """An answer whose values have their options' types; absent, with the reason, if one cannot."""
    try:
        values = {n: CONVERT[options[n].kind](value) for n, value in taken.values.items()}
    except ValueError as error:
        return Taken("absent", reason=str(error))
    return replace(taken, values=values)
