"""Write the tables of docs/memory.md: bytes and operations of a run, counted without a GPU.

python dev/write_memory_page.py           # counts and writes them: some minutes
python dev/write_memory_page.py --only sd1   # prints the rows of one family

Models of the published sizes stand on PyTorch's meta device, which has shapes and no numbers. A
run's own functions adapt and cast them, one step goes forward and backward, and each tensor counts
from the operator that makes it until nothing holds it any more.
"""

import argparse
import re
import sys
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from sd_lora.adapters.inject import lora_layers
from sd_lora.config.command_line import parse
from sd_lora.config.presets import preset
from sd_lora.config.rows import PRESETS
from sd_lora.data.cache.encode import AREA_AT_ONCE
from sd_lora.models.families import FAMILIES
from sd_lora.models.meta_pipeline import MetaPipeline, build_on_meta
from sd_lora.training.adapt import inject_all
from sd_lora.training.optimizer_rows import OPTIMIZERS
from sd_lora.training.processes import DTYPES
from sd_lora.training.setup import _prepare_models

PAGE = Path(__file__).parent.parent / "docs" / "memory.md"
GIB = 2**30
RESOLUTIONS = {"sd1": 512, "sd2": 768, "sdxl": 1024}
NAMES = {"sd1": "SD 1.5, 512²", "sd2": "SD 2.1, 768²", "sdxl": "SDXL, 1024²"}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
"""Configuration of the VAE of all three families."""

CARDS = {"RTX 3090": 71, "RTX 4090": 165, "A100": 312, "H100 SXM": 989}
"""Card → TFLOP/s of dense bf16 products with float32 sums, by NVIDIA's papers."""


SIZES = (4, 6, 8, 10, 12, 16, 24, 32, 48, 80)
"""Memory of usual cards, GiB."""

NO_CHECKPOINTS = "--no-gradient_checkpointing"

RESERVE = GIB
"""Bytes assumed for what is not counted: CUDA itself, workspaces of its kernels, fragments."""


class Counter(TorchDispatchMode):
    """Bytes of all tensors that are held, their peak, and operations of products.

    held: tensors that exist already.
    """

    def __init__(self, held: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = self.flop = 0
        self._counted: set[int] = set()
        for tensor in held:
            self._add(tensor)

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._counted:
            return
        self._counted.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._counted.discard(key)
        self.now -= size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.flop += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return out


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, **_: object,
) -> Tensor:  # fmt: skip
    """Attention as a GPU computes it, without the matrix of weights; a mask takes nothing."""
    return torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, dropout_p, is_causal, False, scale=scale
    )[0]


@dataclass(frozen=True)
class Setting:
    """A row of the table of steps: flags, for a family, and images at once, class images too."""

    family: str
    title: str
    flags: str
    batch: int


@dataclass(frozen=True)
class Count:
    """A step, counted.

    weights, trained, peak: bytes of the frozen weights, of the trained state, and at the peak.
    flop: operations. text_learns: whether the text encoders are trained.
    """

    weights: int
    trained: int
    peak: int
    flop: float
    text_learns: bool


def count_step(setting: Setting) -> Count:
    """Count one step of a setting, with AdamW's moments there already."""
    words = ["data", "--model", "m", "--prompt", "p", *setting.flags.split()]
    family, side = FAMILIES[setting.family], RESOLUTIONS[setting.family]
    config = parse(words).resolve(setting.family, side)
    models: dict[str, Any] = MetaPipeline(
        family, MetaPipeline.of_family(family).configs, family.name
    ).models
    encoders = {name: model for name, model in models.items() if name != family.denoiser}
    for model in models.values():
        model.requires_grad_(False)
    adapted = inject_all(config, family, models, 0)
    precision = config.mixed_precision or "no"
    accelerator: Any = SimpleNamespace(
        mixed_precision=precision, device=torch.device("meta"), prepare_model=lambda model: model
    )
    text: Any = SimpleNamespace(encoders=encoders, tokens=None)
    _prepare_models(config, accelerator, adapted, text)
    used = models if len(adapted) > 1 else {family.denoiser: models[family.denoiser]}
    layers = [p for model in adapted.values() for p in lora_layers(model)]
    frozen = [p for m in used.values() for p in (*m.parameters(), *m.buffers())]
    frozen = [p for p in frozen if not p.requires_grad]
    moments = [
        torch.empty(OPTIMIZERS["adamw"].state_bytes // 4, *p.shape, device="meta") for p in layers
    ]
    x, conditions = inputs(setting, models[family.denoiser], DTYPES[precision])
    with Counter([*frozen, *layers, *moments, x, *tree_leaves(conditions)]) as counter:
        if len(adapted) > 1:
            conditions["encoder_hidden_states"] = encode(encoders, setting)
        out = models[family.denoiser](x, torch.zeros(setting.batch, device="meta"), **conditions)
        loss = (out.sample.float() - x[:, :4].float()).square().mean()
        loss.backward()
    trained = sum(p.nbytes for p in layers) * 2 + sum(m.nbytes for m in moments)
    weights = sum(p.nbytes for p in frozen)
    return Count(weights, trained, counter.peak, counter.flop, len(adapted) > 1)


def inputs(setting: Setting, unet: Any, dtype: torch.dtype) -> tuple[Tensor, dict[str, Any]]:
    """Latents and conditions of the UNet, on the meta device."""
    batch, side = setting.batch, RESOLUTIONS[setting.family] // 8

    def empty(*shape: int) -> Tensor:
        return torch.empty(*shape, device="meta", dtype=dtype)

    conditions: dict[str, Any] = {
        "encoder_hidden_states": empty(batch, 77, unet.config.cross_attention_dim)
    }
    if setting.family == "sdxl":
        more = {"text_embeds": empty(batch, 1280), "time_ids": empty(batch, 6)}
        conditions["added_cond_kwargs"] = more
    return empty(batch, 4, side, side), conditions


def encode(encoders: dict[str, Any], setting: Setting) -> Tensor:
    """Embeddings by the text encoders, with gradients."""
    ids = torch.zeros(setting.batch, 77, dtype=torch.long, device="meta")
    hidden = [
        encoder(ids, output_hidden_states=True).hidden_states for encoder in encoders.values()
    ]
    return torch.cat([states[-2 if setting.family == "sdxl" else -1] for states in hidden], dim=-1)


def count_vae(work: Callable[[nn.Module], object]) -> int:
    """Peak bytes of the VAE in float32 while it encodes or decodes."""
    vae = build_on_meta("vae", VAE)
    with torch.no_grad(), Counter([*vae.parameters()]) as counter:
        work(vae)
    return counter.peak


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
        Setting(
            family, "subject in float32 (`--mixed_precision no`)",
            "--preset subject --mixed_precision no", 2,
        ),
        Setting(
            family, "least: `--targets attention --rank 4 --no-train_text_encoder --batch 1`",
            f"{subject} --targets attention --rank 4 --no-train_text_encoder", 1,
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
    at_once = max(1, AREA_AT_ONCE // side**2)

    def empty(*shape: int) -> Tensor:
        return torch.empty(*shape, device="meta")

    models = MetaPipeline.of_family(FAMILIES[family]).models
    return Apart(
        count_vae(lambda vae: vae.encode(empty(at_once, 3, side, side))),
        count_vae(lambda vae: vae.decode(empty(1, 4, side // 8, side // 8))),
        sum(p.nbytes for n, m in models.items() if n != "unet" for p in m.parameters()),
        sum(p.numel() for p in models["unet"].parameters()) * 2,
    )


def step_rows(family: str, apart: Apart) -> list[str]:
    """Lines of the table of steps of a family."""
    lines = []
    for setting in settings(family):
        count = count_step(setting)
        rest = count.peak - count.weights - count.trained
        cells = [count.weights, count.trained, rest, count.peak]
        numbers = " | ".join(f"{c / GIB:.2f}" for c in cells)
        # samples: trained text encoders are among the weights already
        beside = apart.decoding if count.text_learns else max(apart.decoding, apart.text)
        needed = max(count.peak, count.weights + count.trained + beside) + RESERVE
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
    F.scaled_dot_product_attention = flash_attention
    apart = {family: count_apart(family) for family in RESOLUTIONS}
    if args.only:
        step_rows(args.only, apart[args.only])
        return 0
    rows = [
        f"| {NAMES[family]} | {a.encoding / GIB:.2f} | {(a.unet + a.text) / GIB:.2f} "
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
