"""The model card: README.md beside the LoRA files, with the header that the hub's page reads."""

import os
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from sd_lora.config.schema import TrainConfig
from sd_lora.errors import UsageError
from sd_lora.files import utf8_text, write_whole
from sd_lora.formats.file_names import DIFFUSERS
from sd_lora.hub import is_hub_id
from sd_lora.report.page_images import SAMPLES
from sd_lora.report.record import places_of
from sd_lora.training.output_folder import CARD
from sd_lora.training.run import Run
from sd_lora.training.samples import wanted_samples

LICENSES = {"sd1": "creativeml-openrail-m"}
"""Family → licence of its published base, as diffusers' scripts say it; of others `OPENRAIL`."""

OPENRAIL = "openrail++"

TAG = "sd_lora"
"""In the header of each card, by which those that runs wrote are known."""


def write_card(run: Run, files: Sequence[Path], usage: Sequence[str]) -> list[Path]:
    """Write the model card; returns the files of a repository: the card, the LoRA files, and the
    last sample images, which it shows. A README.md that no run wrote stays as it is.

    files: of the LoRA, and of new words. usage: lines on how to load them.
    """
    folder = run.output_dir / SAMPLES / f"step-{run.plan.num_steps:06}"
    shown = sorted(folder.glob("*.png")) if wanted_samples(run) else []
    path = run.output_dir / CARD
    if not is_foreign(path):
        in_diffusers = any(file.name == DIFFUSERS for file in files)
        write_whole(path, card_of(run, shown, usage, in_diffusers).encode())
    return [*([path] if path.is_file() else []), *files, *shown]


def is_foreign(path: Path) -> bool:
    """Whether something is there that is no card of a run."""
    try:
        header = utf8_text(path).split("\n---\n")[0]
    except UsageError:  # a folder, a pipe, no text
        return os.path.lexists(path)
    return f"\n- {TAG}\n" not in header + "\n"


def card_of(run: Run, shown: Sequence[Path], usage: Sequence[str], in_diffusers: bool) -> str:
    """The text of the card: no path of this machine stands in it.

    shown: sample images, in the order of their prompts. in_diffusers: whether diffusers loads the
    LoRA; the hub offers its code for each repository that names it.
    """
    config, family, name = run.config, run.parts.family, run.output_dir.resolve().name
    here = Path(config.base_model).expanduser().exists()  # a folder's name may look like an id
    base = config.base_model if is_hub_id(config.base_model) and not here else None
    words = _trigger_words(run)
    xl = "stable-diffusion-xl" if family.name.startswith("sdxl") else "stable-diffusion"
    prompts = [wanted.asked.prompt for wanted in wanted_samples(run)] if shown else []
    places = [path.relative_to(run.output_dir).as_posix() for path in shown]
    images = [*zip(prompts, places, strict=True)]
    tags = [xl, f"{xl}-diffusers", "text-to-image", "diffusers", "lora", TAG]
    header = ModelCardData(
        base_model=base,
        library_name="diffusers" if in_diffusers else None,
        license=config.hub_license or LICENSES.get(family.name, OPENRAIL),
        tags=[tag for tag in tags if in_diffusers or "diffusers" not in tag],
        instance_prompt=config.subject_prompt or ", ".join(words) or None,
        widget=[{"text": text, "output": {"url": place}} for text, place in images] or None,
    )
    model = f"[{base}](https://huggingface.co/{base})" if base else Path(config.base_model).name
    lines = ["---", header.to_yaml().strip(), "---", "", f"# {name}", ""]
    lines += [f"A LoRA for {model} ({family.label}), trained {run.plan.num_steps} steps.", ""]
    lines += ["<Gallery />", ""] if images else []
    if words:
        lines += ["## Trigger words", "", *(f"- `{word}`" for word in words), ""]
    plain = partial(without_place, config=config, repo=run.repo)
    lines += ["## How to use it", "", "```", *(plain(line) for line in usage), "```", ""]
    lines += ["## Training", "", *(f"- {k}: {v}" for k, v in _facts(run).items()), ""]
    return "\n".join(lines)


def _trigger_words(run: Run) -> list[str]:
    """Words that ask for the subject: of the sources, the instance prompt, and new words."""
    instances = run.images.instances.samples
    rules = (sample.source.rules.trigger_word for sample in instances)
    tokens = run.text.tokens
    new = [concept.word for concept in tokens.concepts] if tokens else []
    found = [run.config.subject_prompt, *rules, *new]
    return list(dict.fromkeys(word for word in found if word))


def _facts(run: Run) -> dict[str, Any]:
    """Rows of the card on the training."""
    config, rows = run.config, run.summary.rows
    names = ("images", "batch", "method", "objective", "seed")
    return {name: without_place(rows[name], config, run.repo) for name in names if name in rows} | {
        "learning rate": f"{config.learning_rate_of('unet'):g}",
    }


def without_place(line: str, config: TrainConfig, repo: str) -> str:
    """A line without the folders of this machine. repo: of a run that is pushed, which is the
    output folder there; or ""."""
    out, whole = str(config.output_path), str(config.output_path.resolve())
    for name, value in config.hub_places.items():
        line = line.replace(f", {name}={value!r}", "")
    line = line.replace(repr(whole), repr(repo or "."))  # quoted: a part of a name stays
    line = line.replace(f"{whole}{os.sep}", "")
    line = re.sub(rf"^(\s*){re.escape(out + os.sep)}", r"\1", line)  # of a file, as it was given
    for place, name in places_of(config).items():
        line = line.replace(place, name)
    base = Path(config.base_model).expanduser()
    return line.replace(config.base_model, base.name) if base.exists() else line
