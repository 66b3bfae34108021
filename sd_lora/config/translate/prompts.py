"""Prompts of samples in other trainers' files → one prompt, steps and guidance."""

import re
from pathlib import Path
from typing import Any

from sd_lora.config.translate.files import find
from sd_lora.config.translate.rows import Given, Taken, is_off

MARKS = {"s": "validation_steps", "l": "validation_guidance_scale"}
"""Letter of sd-scripts in a prompt's line → option."""

KEYS = {
    "prompt": "validation_prompt",
    "sample_steps": "validation_steps",
    "diffusion_steps": "validation_steps",
    "scale": "validation_guidance_scale",
    "guidance_scale": "validation_guidance_scale",
    "cfg_scale": "validation_guidance_scale",
}
"""Key of a prompt in a table of sd-scripts, OneTrainer or ai-toolkit → option."""


def of_line(line: str) -> dict[str, Any]:
    """Options of a line of sd-scripts: `a dog --s 28 --l 7.5`."""
    text, *marks = line.split(" --")
    found: dict[str, Any] = {"validation_prompt": text.strip()}
    for mark in marks:
        letter, _, value = mark.strip().partition(" ")
        if letter in MARKS and re.fullmatch(r"[\d.]+", value.strip()):
            found[MARKS[letter]] = value.strip()
    return found


def of_table(table: dict[str, Any]) -> dict[str, Any]:
    """Options of a prompt with its settings."""
    return {KEYS[key]: value for key, value in table.items() if key in KEYS and not is_off(value)}


def of_list(prompts: list[Any]) -> Taken:
    """The first of several prompts, lines or tables."""
    rows = [of_table(p) if isinstance(p, dict) else of_line(str(p)) for p in prompts]
    rows = [row for row in rows if row.get("validation_prompt")]
    if not rows:
        return Taken("needless", reason="has no prompt")
    count = "" if len(rows) == 1 else f", the first of {len(rows)}"
    return Taken("otherwise", rows[0], f"is one prompt{count}, with seeds 0, 1, 2, …")


def first_prompt(value: Any, given: Given) -> Taken:
    """The first prompt of a file of sd-scripts, or of text itself, as kohya_ss holds it."""
    if is_off(value):
        return Taken("needless", reason="is not given")
    text = str(value)
    suffix = Path(text).suffix.lower()
    if "\n" in text or suffix not in (".txt", ".toml", ".json"):
        return of_list(_lines(text))
    prompts = _text_of(text, given) if suffix == ".txt" else given.load(text)
    if isinstance(prompts, dict):
        prompts = prompts.get("prompt", {})
        prompts = prompts.get("subset") if isinstance(prompts, dict) else prompts
    if not isinstance(prompts, list):
        reason = "is a file that cannot be read here; give --validation_prompt"
        return Taken("absent", reason=reason)
    return of_list(prompts)


def _text_of(name: str, given: Given) -> list[str] | None:
    path = find(name, given.folder)
    try:
        return _lines(path.read_text(encoding="utf-8-sig")) if path else None
    except (OSError, UnicodeDecodeError):
        return None


def _lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
