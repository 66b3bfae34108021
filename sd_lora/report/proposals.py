"""Commands that a run's page proposes, ready for a shell in the folder where training was started.

A page is passed on: of absolute paths it has the last name alone.
"""

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from sd_lora.config.schema import OPTIONS, SHORT_NAMES
from sd_lora.errors import UsageError
from sd_lora.report.measured import BY_HEART, FIGHTS, shortest
from sd_lora.report.record import read_json

SKIP = next(name for name, row in OPTIONS.items() if row.header == "ss_clip_skip")
"""Layers of the text encoders that are left out, which A1111 counts from 1."""

_DRAWN = {
    "steps": r"\bSteps: (\d+)", "guidance": r"\bCFG scale: ([\d.]+)", "seed": r"\bSeed: (\d+)",
    "size": r"\bSize: (\d+x\d+)", "guidance_rescale": r"\bCFG Rescale: ([\d.]+)",
    SKIP: r"\bClip skip: (\d+)",
}  # fmt: skip
"""Flag of `sd-lora sample` → its value in the parameters of an image."""


def config_of(folder: Path) -> dict[str, Any]:
    """The options of a run, as they were given; none where its config.json cannot be read."""
    with suppress(UsageError):
        return read_json(folder / "config.json")
    return {}


def place_of(folder: Path) -> str:
    """The output folder as it was given, if it was by a relative path; else its name."""
    given, name = str(config_of(folder).get("output_dir", "")), folder.resolve().name
    return given if not os.path.isabs(given) and Path(given).name == name else name


def line_of(command: str, *words: str, **flags: Sequence[str]) -> str:
    """A command of `sd-lora` for a shell. A value that begins with "-" is bound to its flag."""
    line = ["sd-lora", command, *words]
    for name, values in flags.items():
        bound = len(values) == 1 and values[0].startswith("-")
        line += [f"--{name}={values[0]}"] if bound else [f"--{name}", *values]
    return shlex.join(line)


MOST_NAMED = 5
"""Images of a kind that a proposal names and tries; the table shows all."""

TRY = (
    "To test the effect on the other images, run this in the folder where you started the training:"
)

TEXTS = {
    "slow": "Learned more slowly than the rest: {}. Such an image may show something else, or its "
    f"caption may be wrong. Mend its caption, or leave it out. {TRY}",
    "copied": "Learned faster than the rest, and the data check found that the set has them twice: "
    f"{{}}. Leave one of the two out. {TRY}",
    "fast": "Learned faster than the rest: {}. There is no need to leave such an image out. It may "
    "be simple, or the set may have it twice; the data check found no second one.",
}
"""Kind of an image that the ledger names → the words of its proposal."""


def proposals_of(
    folder: Path, images: Sequence[Mapping[str, Any]], alike: Sequence[Any]
) -> list[dict[str, Any]]:
    """Words on the images that a run's ledger names, by kind, and the commands that try a run
    without one: for those that are learned more slowly, and for copies. None for one that is
    learned faster alone: it does no harm.

    images: of `images_of`. alike: names of an image that is there twice and of the earlier one.
    """
    kinds: dict[str, list[tuple[str, str]]] = {kind: [] for kind in TEXTS}
    pairs = [[*map(str, pair)] for pair in alike if isinstance(pair, list) and len(pair) == 2]
    names = [*(str(image["path"]) for image in images), *(name for pair in pairs for name in pair)]
    for image in images:
        copies = [pair for pair in pairs if image["path"] in pair and pair[0] != pair[1]]
        if image["finding"] == FIGHTS:
            kinds["slow"].append((image["name"], shortest(image["path"], names)))
        elif image["finding"] == BY_HEART and copies:
            later, first = copies[0]
            told = f"{image['name']} (also {first if image['path'] == later else later})"
            kinds["copied"].append((told, shortest(later, names)))
        elif image["finding"] == BY_HEART:
            kinds["fast"].append((image["name"], ""))
    place = place_of(folder)
    found = []
    for kind, rows in kinds.items():
        named = ", ".join(name for name, _ in rows[:MOST_NAMED])
        named += f" and {len(rows) - MOST_NAMED} more" if len(rows) > MOST_NAMED else ""
        files = dict.fromkeys(file for _, file in rows[:MOST_NAMED] if file)
        lines = [line_of("compare", place, leave_out=[file]) for file in files]
        found += [{"text": TEXTS[kind].format(named), "lines": lines}] if rows else []
    return found


def strengths_line(folder: Path, record: Mapping[str, Any], drawn: str) -> str:
    """The command that draws a sample of a finished run at several strengths; "" where it has none.

    record: of `read_record`. drawn: the parameters of the sample.
    """
    prompt, _, rest = drawn.partition("\nNegative prompt:")
    negative, _, settings = rest.partition("\n")
    model = config_of(folder).get(SHORT_NAMES["model"])
    files = [name for name in record["files"] if isinstance(name, str)]
    prompt = _TAGS.sub("", prompt)
    if not (record["ended"] and files and isinstance(model, str) and prompt):
        return ""
    found = {flag: re.search(pattern, settings) for flag, pattern in _DRAWN.items()}
    flags = {
        "model": [Path(model).name if os.path.isabs(model) else model],
        "lora": [f"{place_of(folder)}/{files[0]}"],
        "prompt": [prompt],
        **({"negative": [negative.strip()]} if negative.strip() else {}),
        **{
            flag: [str(int(match[1]) - 1) if flag == SKIP else match[1]]
            for flag, match in found.items()
            if match
        },
        "strengths": ["0.5", "0.75", "1"],
        "out": ["strengths.png"],
    }
    return line_of("sample", **flags)


_TAGS = re.compile(r"( <lora:[^<>]*>)+$")
