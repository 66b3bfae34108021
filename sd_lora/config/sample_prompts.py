"""Prompts of sample images, each with a size, seed, steps, guidance, negative prompt and strength.

Lines, as sd-scripts and ai-toolkit write them (`a dog --n blurred --w 768 --d 7`), or a file: .txt
of such lines, .toml and .json of tables, sd-scripts' `[[prompt.subset]]` among them.
"""

import json
import math
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sd_lora.errors import UsageError, did_you_mean, near_path

MOST_SAMPLER_STEPS = 200
"""DPM-Solver++ needs 20 to 50; above, other trainers' steps between samples are meant."""

SUFFIXES = (".txt", ".toml", ".json")


@dataclass(frozen=True, slots=True)
class SamplePrompt:
    """A sample image as it is asked for; None: as the run has it.

    prompt, negative: texts. width, height: in pixels. seed: of the noise. steps: of the sampler.
    guidance: scale of classifier-free guidance. strength: of the adapter, 1 as trained. place: of
    the prompt in its file, "prompts.txt:3".
    """

    prompt: str
    negative: str = ""
    width: int | None = None
    height: int | None = None
    seed: int | None = None
    steps: int | None = None
    guidance: float | None = None
    strength: float = 1.0
    place: str = ""

    @property
    def line(self) -> str:
        """The prompt as a line that `of_line` reads."""
        usual, marks = SamplePrompt(""), ""
        for name, (mark, *_) in NAMES.items():
            value = getattr(self, name)
            if value != getattr(usual, name):
                marks += (
                    f" --{mark} {value:g}" if isinstance(value, float) else f" --{mark} {value}"
                )
        return " ".join(self.prompt.split()) + marks


NAMES: dict[str, tuple[str, ...]] = {
    "negative": ("n", "neg", "negative", "negative_prompt"),
    "width": ("w", "width"),
    "height": ("h", "height"),
    "seed": ("d", "seed"),
    "steps": ("s", "steps", "sample_steps", "diffusion_steps", "num_inference_steps"),
    "guidance": ("l", "cfg", "scale", "guidance", "guidance_scale", "cfg_scale"),
    "strength": ("m", "strength", "network_multiplier"),
}
"""Setting of a prompt → its mark in lines, then its other marks and its keys in tables."""

OF_NAME = {name: setting for setting, names in NAMES.items() for name in names}

RANGES: dict[str, tuple[int, float, int]] = {
    "width": (8, 8192, 8),
    "height": (8, 8192, 8),
    "seed": (0, 2**63 - 1, 1),
    "steps": (1, MOST_SAMPLER_STEPS, 1),
}
"""Whole setting → its least and greatest value, and the number that divides it."""


class Mistake(ValueError):
    """A prompt that cannot be read. The text names its place."""


def read_prompts(given: str) -> list[SamplePrompt]:
    """The prompts of a file, or of lines.

    given: the path of a .txt, .toml or .json file, or the lines themselves.

    Raises:
        UsageError: a file that cannot be read, and all mistakes in it, a line each.
    """
    if "\n" in given or not given.lower().endswith(SUFFIXES):
        return _all(_lines(given, "line "))
    return read_file(Path(given).expanduser())


def read_file(path: Path) -> list[SamplePrompt]:
    """The prompts of a file: of the tables of a .toml or .json file, of the lines of any other.

    Raises: see `read_prompts`.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text in UTF-8"
        raise UsageError(f"prompts {path}: {reason}{near_path(path)}") from None
    readers = {".toml": tomllib.loads, ".json": json.loads}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        return _all(_lines(text, f"{path.name}:"), f" in {path}")
    try:
        found = reader(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"prompts {path} cannot be read: {error}") from None
    return _all(_tables(found, path.name, _headers(text)), f" in {path}")


def with_seeds(prompts: Sequence[SamplePrompt], seeds: Sequence[int]) -> list[SamplePrompt]:
    """Each prompt with each seed, side by side; one that has its own seed with that alone."""
    return [
        replace(prompt, seed=seed)
        for prompt in prompts
        for seed in (seeds if prompt.seed is None else [prompt.seed])
    ]


def size_faults(prompts: Sequence[SamplePrompt], pixels_per_latent: int) -> list[str]:
    """A line, with its place, for each side of the prompts that a model cannot draw."""
    return [
        f"{prompt.place}: {side} pixels are no multiple of {pixels_per_latent}, the model's latents"
        for prompt in prompts
        for side in (prompt.width, prompt.height)
        if side and side % pixels_per_latent
    ]


def _all(found: Iterator[SamplePrompt | Mistake], where: str = "") -> list[SamplePrompt]:
    """The prompts; raises UsageError for all mistakes among them, and for none at all."""
    items = [*found]
    if mistakes := [str(item) for item in items if isinstance(item, Mistake)]:
        raise UsageError("\n".join(mistakes))
    if not items:
        raise UsageError(f"no prompt is given{where}: write one a line")
    return [item for item in items if isinstance(item, SamplePrompt)]


def _lines(text: str, place: str) -> Iterator[SamplePrompt | Mistake]:
    """Yield the prompt of each line; empty lines, and those that begin with #, hold none."""
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            try:
                yield of_line(line, f"{place}{number}")
            except Mistake as mistake:
                yield mistake


def of_line(line: str, place: str) -> SamplePrompt:
    """The prompt of a line `a dog --n blurred --w 768`; raises Mistake."""
    text, *marks = re.split(r"(?:^|\s)--(?=\S)", line)
    pairs = [mark.strip().partition(" ")[::2] for mark in marks]
    settings = {name.lower(): value.strip() for name, value in pairs}
    if len(settings) < len(pairs):
        raise Mistake(f"{place}: a setting stands there twice: {' '.join(f'--{m}' for m in marks)}")
    return _prompt(text.strip(), settings, place, "--")


def _tables(found: Any, name: str, lines: Sequence[int]) -> Iterator[SamplePrompt | Mistake]:
    """Yield the prompts of a list, or of a table that has settings of all beside its list.

    lines: numbers of the prompts' headers in a TOML file.
    """
    shared, rows = {}, found
    if isinstance(found, dict):
        table = found["prompt"] if isinstance(found.get("prompt"), dict) else found
        rows = table.get("subset", table.get("prompts"))
        shared = {k: v for k, v in table.items() if k not in ("subset", "prompts")}
    if not isinstance(rows, list):
        yield Mistake(f'{name} has no [[prompts]]: a table for each prompt, with prompt = "…"')
        return
    for number, row in enumerate(rows):
        place = f"{name}:{lines[number]}" if number < len(lines) else f"{name}, entry {number + 1}"
        try:
            own = {"prompt": row} if isinstance(row, str) else row
            if not isinstance(own, dict):
                raise Mistake(f"{place}: {row!r:.40} is no prompt, and no table of one")
            both = shared | own
            text = both.pop("prompt", "")
            if not isinstance(text, str):
                raise Mistake(f"{place}: prompt is a text, not {text!r:.40}")
            yield _prompt(text.strip(), both, place, "")
        except Mistake as mistake:
            yield mistake


def _headers(text: str) -> list[int]:
    """Numbers of the lines [[prompts]] and [[prompt.subset]]."""
    header = re.compile(r"\s*\[\[\s*(prompts|prompt\s*\.\s*subset)\s*\]\]")
    return [n for n, line in enumerate(text.splitlines(), 1) if header.match(line)]


def _prompt(text: str, settings: Mapping[str, Any], place: str, dash: str) -> SamplePrompt:
    """A prompt with its settings; raises Mistake with all that is wrong in them.

    dash: before the names of settings, in messages.
    """
    faults = [] if text else ["the prompt is missing"]
    values: dict[str, Any] = {}
    for name, value in settings.items():
        setting = OF_NAME.get(name)
        if setting is None:
            known = ", ".join(dash + names[0 if dash else -1] for names in NAMES.values())
            near = did_you_mean(name, OF_NAME) if len(name) > 2 else ""
            faults.append(
                f"{dash}{name} is no setting of a prompt: they are {known}{near and '.'}{near}"
            )
            continue
        try:
            values[setting] = value_of(setting, value)
        except ValueError as error:
            faults.append(f"{dash}{name} {error}")
    if faults:
        raise Mistake(f"{place}: {'; '.join(faults)}")
    return replace(SamplePrompt(text, place=place), **values)


def value_of(setting: str, value: Any) -> Any:
    """A setting's value; raises ValueError with the end of a sentence on it."""
    if setting == "negative":
        if not isinstance(value, str):
            raise ValueError(f"is a text, not {value!r:.40}")
        return value
    shown = f"{value!r:.40}" if not isinstance(value, str) else value[:40] or "nothing"
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise ValueError(f"is a number, not {shown}")
    if setting not in RANGES:
        return found
    low, high, factor = RANGES[setting]
    whole = int(value) if isinstance(value, int | str) and str(value).isdecimal() else found
    if whole != int(whole) or not low <= whole <= high or int(whole) % factor:
        of = f"a multiple of {factor}" if factor > 1 else "a whole number"
        raise ValueError(f"is {of} from {low} to {high}, not {shown}")
    return int(whole)
