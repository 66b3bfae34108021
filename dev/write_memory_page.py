"""Write the tables of docs/memory.md: bytes and operations of a run, counted without a GPU.

python dev/write_memory_page.py           # counts and writes them: some minutes
python dev/write_memory_page.py --only sd1   # prints the rows of one family

Models of the published sizes stand on PyTorch's meta device, and `sd_lora.training.memory` counts.
"""

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sd_lora.config.command_line import parse
from sd_lora.config.presets import preset
from sd_lora.config.rows import PRESETS
from sd_lora.data.cache.encode import at_once_on_card
from sd_lora.models.families import FAMILIES
from sd_lora.models.meta_pipeline import MetaPipeline, build_on_meta
from sd_lora.training import cards
from sd_lora.training.memory import GIB, RESERVE, Shape, StepBytes, count_step, count_vae

PAGE = Path(__file__).parent.parent / "docs" / "memory.md"
RESOLUTIONS = {"sd1": 512, "sd2": 768, "sdxl": 1024}
NAMES = {"sd1": "SD 1.5, 512²", "sd2": "SD 2.1, 768²", "sdxl": "SDXL, 1024²"}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
"""Configuration of the VAE of all three families."""

CARDS = {
    "RTX 3090": cards.CARDS["RTX 3090 24GB"].half,
    "RTX 4090": cards.CARDS["RTX 4090 24GB"].half,
    "A100": cards.CARDS["A100 80GB"].half,
    "H100 SXM": cards.CARDS["H100 80GB"].half,
}
"""Card → TFLOP/s of dense bf16 products with float32 sums."""


SIZES = (4, 6, 8, 10, 12, 16, 24, 32, 48, 80)
"""Memory of usual cards, GiB."""

NO_CHECKPOINTS = "--no-gradient_checkpointing"


@dataclass(frozen=True)
class Setting:
    """A row of the table of steps: flags, for a family, and images at once, class images too."""

    family: str
    title: str
    flags: str
    batch: int


def count_setting(setting: Setting) -> StepBytes:
    """Count one step of a setting."""
    words = ["data", "--model", "m", "--prompt", "p", *setting.flags.split()]
    family, side = FAMILIES[setting.family], RESOLUTIONS[setting.family]
    config = parse(words).resolve(setting.family, side)
    shape = Shape(setting.batch, (side, side))
    return count_step(config, MetaPipeline.of_family(family), shape)


def settings(family: str) -> list[Setting]:
    """The rows of a family: presets as they are, then less and more of one thing."""
    rows = [
        Setting(
            family, f"`--preset {name}`", f"--preset {name} --mixed_precision bf16",
            preset(name).options["train_batch_size"],
        )
        for name in PRESETS
    ]  # fmt: skip
    subject = "--preset subject --mixed_precision bf16"
    rows += [
        Setting(family, "subject, `--batch 1`", subject, 1),
        Setting(family, "subject, with class images", subject, 4),
        Setting(family, f"subject, `{NO_CHECKPOINTS}`", f"{subject} {NO_CHECKPOINTS}", 2),
        Setting(family, "subject, `--base_precision int8`", f"{subject} --base_precision int8", 2),
        Setting(family, "subject, `--base_precision nf4`", f"{subject} --base_precision nf4", 2),
        Setting(family, "subject, `--offload_weights`", f"{subject} --offload_weights", 2),
        Setting(
            family, f"subject, `{NO_CHECKPOINTS} --offload_activations`",
            f"{subject} {NO_CHECKPOINTS} --offload_activations", 2,
        ),
        Setting(
            family, "subject in float32 (`--mixed_precision no`)",
            "--preset subject --mixed_precision no", 2,
        ),
        Setting(
            family, "least: `--targets attention --rank 4 --no-train_text_encoder --batch 1`",
            f"{subject} --targets attention --rank 4 --no-train_text_encoder", 1,
        ),
        Setting(
            family, "least, `--offload_weights`",
            f"{subject} --targets attention --rank 4 --no-train_text_encoder --offload_weights", 1,
        ),
    ]  # fmt: skip
    return rows


@dataclass(frozen=True)
class Apart:
    """Bytes outside of the steps: of the VAE while it encodes images and while it decodes one, of
    the text encoders in float32, and of a UNet in bf16."""

    encoding: int
    decoding: int
    text: int
    unet: int


def count_apart(family: str) -> Apart:
    """Count what is on the device outside of a family's steps."""
    side = RESOLUTIONS[family]
    at_once = at_once_on_card((side, side))

    def empty(*shape: int) -> Tensor:
        return torch.empty(*shape, device="meta")

    models, vae = MetaPipeline.of_family(FAMILIES[family]).models, build_on_meta("vae", VAE)
    return Apart(
        count_vae(vae, lambda vae: vae.encode(empty(at_once, 3, side, side))),
        count_vae(vae, lambda vae: vae.decode(empty(1, 4, side // 8, side // 8))),
        sum(p.nbytes for n, m in models.items() if n != "unet" for p in m.parameters()),
        sum(p.numel() for p in models["unet"].parameters()) * 2,
    )


def step_rows(family: str, apart: Apart) -> list[str]:
    """Lines of the table of steps of a family."""
    lines = []
    for setting in settings(family):
        count = count_setting(setting)
        cells = [count.frozen, count.trained, count.rest, count.peak]
        numbers = " | ".join(f"{c / GIB:.2f}" for c in cells)
        # samples: trained text encoders are among the weights already
        beside = apart.decoding if count.text_learns else max(apart.decoding, apart.text)
        drawing = count.frozen + count.trained + beside
        needed = max(count.peak, drawing, apart.encoding, apart.text) + RESERVE
        card = next(size for size in SIZES if size * GIB >= needed)
        # a product of m·k·n numbers counts 2·m·k·n operations
        words = f"{NAMES[family]} | {setting.title} | {numbers} | {card} | {count.flop / 1e12:.1f}"
        lines.append(f"| {words} |")
        print(lines[-1], flush=True)
    return lines


def card_rows(steps: list[str]) -> list[str]:
    """Lines of the table of least seconds of 100 steps, by card, from the rows of steps."""
    lines = []
    for line in steps:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[1].startswith("`--preset"):
            times = [f"{100 * float(cells[-1]) / rate:.1f}" for rate in CARDS.values()]
            lines.append(f"| {cells[0]} | {cells[1]} | " + " | ".join(times) + " |")
    return lines


def replaced(page: str, name: str, head: str, rows: list[str]) -> str:
    """The page with a table in the place of the one between its marks."""
    rule = "|" + "---|" * (head.count("|") - 1)
    table = "\n".join([head, rule, *rows])
    marks = f"<!-- {name}: start -->\n", f"\n<!-- {name}: end -->"
    pattern = re.escape(marks[0]) + ".*?" + re.escape(marks[1])
    return re.sub(pattern, lambda _: marks[0] + table + marks[1], page, flags=re.DOTALL)


def main() -> int:
    """Count, and write the page or print the rows of a family; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=RESOLUTIONS, help="print the rows of one family")
    args = parser.parse_args()
    apart = {family: count_apart(family) for family in RESOLUTIONS}
    if args.only:
        step_rows(args.only, apart[args.only])
        return 0
    rows = [
        f"| {NAMES[family]} | {a.encoding / GIB:.2f} | {a.text / GIB:.2f} "
        f"| {(a.unet + a.decoding) / GIB:.2f} |"
        for family, a in apart.items()
    ]
    page = PAGE.read_text(encoding="utf-8")
    head = "| model | encoding images | encoding captions | drawing samples |"
    page = replaced(page, "others", head, rows)
    steps = [row for family in RESOLUTIONS for row in step_rows(family, apart[family])]
    head = "| model | options | frozen | trained | rest | **peak** | card | TFLOP |"
    page = replaced(page, "steps", head, steps)
    head = "| model | options | " + " | ".join(CARDS) + " |"
    PAGE.write_text(replaced(page, "cards", head, card_rows(steps)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
