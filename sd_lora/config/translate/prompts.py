"""Prompts of samples in other trainers' files → lines of `sample_prompts`."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sd_lora.config.sample_prompts import OF_NAME, SUFFIXES, SamplePrompt, value_of
from sd_lora.config.translate.files import find
from sd_lora.config.translate.rows import Given, Taken, is_off
from sd_lora.errors import counted


def of_row(row: Any, shared: Mapping[str, Any]) -> SamplePrompt:
    """The prompt of a line of sd-scripts, `a dog --s 28 --l 7.5`, or of a table with settings,
    without those that are not there."""
    if isinstance(row, dict):
        text, settings = str(row.get("prompt") or ""), row
    else:
        text, *marks = str(row).split(" --")
        pairs = [mark.strip().partition(" ")[::2] for mark in marks]
        settings = {name.lower(): value.strip() for name, value in pairs}
    values = {}
    for name, value in {**shared, **settings}.items():
        if name in OF_NAME and value is not None and value != "":
            try:
                values[OF_NAME[name]] = value_of(OF_NAME[name], value)
            except ValueError:  # a size or a number of steps that cannot be drawn
                continue
    return replace(SamplePrompt(" ".join(text.split())), **values)


def of_list(prompts: list[Any], shared: Mapping[str, Any] | None = None) -> Taken:
    """Several prompts, lines or tables. shared: settings of those that have no own."""
    rows = [of_row(row, shared or {}) for row in prompts]
    lines = [row.line for row in rows if row.prompt]
    if not lines:
        return Taken("needless", reason="has no prompt")
    reason = f"is {counted(len(lines), 'prompt')}, one image each, by DPM-Solver++"
    return Taken("otherwise", {"sample_prompts": "\n".join(lines)}, reason)


def of_file(value: Any, given: Given) -> Taken:
    """The prompts of a file of sd-scripts, or of text itself, as kohya_ss holds it."""
    if is_off(value):
        return Taken("needless", reason="is not given")
    text = str(value)
    suffix = Path(text).suffix.lower()
    if "\n" in text or suffix not in SUFFIXES:
        return of_list(_lines(text))
    prompts = _text_of(text, given) if suffix == ".txt" else given.load(text)
    shared: dict[str, Any] = {}
    if isinstance(prompts, dict):
        table = prompts.get("prompt", {})
        shared = table if isinstance(table, dict) else {}
        prompts = shared.get("subset")
    if not isinstance(prompts, list):
        reason = "is a file that cannot be read here; give --sample_prompts"
        return Taken("absent", reason=reason)
    return of_list(prompts, shared)


def _text_of(name: str, given: Given) -> list[str] | None:
    path = find(name, given.folder)
    try:
        return _lines(path.read_text(encoding="utf-8-sig")) if path else None
    except (OSError, UnicodeDecodeError):
        return None


def _lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip() and not re.match(r"\s*#", line)]
