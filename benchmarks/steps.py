"""A training step of a whole UNet: operators, saved activations and time, ours against peft's.

    OMP_NUM_THREADS=1 python benchmarks/steps.py count      operators and bytes, on the meta device
    OMP_NUM_THREADS=1 python benchmarks/steps.py time       SD1.5 at its real size, random weights
    OMP_NUM_THREADS=1 python benchmarks/steps.py embedded   the UNet of the embedded base

An operator is one that torch dispatches and that computes: views and allocations are left out.
Rounds are interleaved (every candidate once a round), and medians are shown.
"""

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import peft
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sd_lora
from sd_lora.adapters.fast.layers import lay_out
from sd_lora.adapters.targets import select
from sd_lora.models.published_configs import CONFIGS
from sd_lora.training.fast.step import FastModel, fast
from sd_lora.training.memory import flash_attention

EMBEDDED = Path(__file__).parent.parent / "sample_data/tiny-sd/unet"
RANK = 8


class Operators(TorchDispatchMode):
    """Counts the operators that compute, and keeps their names."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        places = {leaf.untyped_storage()._cdata for leaf in leaves}
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        new = any(leaf.untyped_storage()._cdata not in places for leaf in made)
        if (new or func._schema.is_mutable) and "empty" not in str(func):
            self.names[str(func)] += 1
        return out


def seconds_of(work: Callable[[], object]) -> float:
    """Processor seconds: one thread, and other processes on the same core do not count."""
    started = time.process_time()
    work()
    return time.process_time() - started


class Saved:
    """Bytes that a forward pass keeps for its backward pass, beside weights and working copies."""

    def __init__(self, weights: list[Tensor]) -> None:
        self.weights = {t.untyped_storage()._cdata for t in weights}
        self.found: dict[int, Any] = {}

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.weights:
            self.found[storage._cdata] = storage  # held, so that no other takes its place
        return tensor

    def hooks(self) -> AbstractContextManager[Any]:
        return torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.found.values())


def conditions(config: Any, dtype: torch.dtype, side: int, batch: int = 1) -> dict[str, Any]:
    """Arguments of a UNet, on the default device."""
    given: dict[str, Any] = {
        "sample": torch.randn(batch, config.in_channels, side, side, dtype=dtype),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": torch.randn(batch, 77, config.cross_attention_dim, dtype=dtype),
    }
    if config.addition_embed_type:
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        given["added_cond_kwargs"] = {
            "text_embeds": torch.randn(batch, width, dtype=dtype),
            "time_ids": torch.zeros(batch, 6),
        }
    return given


class Candidate:
    """A UNet with one project's LoRA: float32 factors on a base of a dtype.

    autocast: as peft's users run a base below float32 on a device that has it.
    """

    def __init__(self, name: str, config: Any, targets: str, dtype: torch.dtype) -> None:
        self.name = name
        torch.manual_seed(0)
        unet = UNet2DConditionModel.from_config(config).requires_grad_(False)
        for parameter in unet.parameters():  # `to` has a word to say on it
            parameter.data = parameter.data.to(dtype)
        self.fast: list[FastModel] = []
        if name.startswith("peft"):
            names = select(unet, targets)
            peft_config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names)
            unet.add_adapter(peft_config)
            for parameter in unet.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype if "," in name else torch.float32)
        elif name != "frozen":
            sd_lora.inject(unet, targets, rank=RANK)
            lay_out(unet, next(unet.parameters()).device)
            if name == "ours":
                self.fast = [FastModel(unet)]
        self.unet = unet.train()
        self.trained = [p for p in unet.parameters() if p.requires_grad]
        self.frozen, self.autocast = name == "frozen", name[:4] == "peft" and dtype != torch.float32

    def forward(self, given: dict[str, Any]) -> Tensor:
        device = given["sample"].device.type
        context: AbstractContextManager[Any] = nullcontext()
        if self.autocast and device != "meta":
            context = torch.autocast(device, given["sample"].dtype)
        with context:
            return self.unet(**given).sample.float().square().mean()

    def step(self, given: dict[str, Any]) -> None:
        given = {**given, "sample": given["sample"].detach().requires_grad_(self.frozen)}
        with fast(self.fast):
            self.forward(given).backward()
        for parameter in self.trained:
            parameter.grad = None

    def saved(self, given: dict[str, Any]) -> int:
        """Bytes of activations between the forward and the backward pass."""
        given = {**given, "sample": given["sample"].detach().requires_grad_(self.frozen)}
        copies = [b for f in self.fast for x in f.copies.factors for b in (*x.buffers, *x.into)]
        with fast(self.fast):
            saved = Saved([*self.unet.parameters(), *copies])
            with saved.hooks():
                loss = self.forward(given)
            loss.backward()
        return saved.bytes


def config_of(arguments: dict[str, Any]) -> Any:
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(arguments).config


def count() -> None:
    """Operators and saved activations of one sample, float32 factors on a bfloat16 base."""
    print("| UNet | targets | project | operators | saved MiB | of peft's |")
    print("|---|---|---|---|---|---|")
    for family, label, side in (("sd1", "SD1.5 512²", 64), ("sdxl", "SDXL 1024²", 128)):
        config = config_of(CONFIGS[family]["unet"])
        for targets in ("attention", "all"):
            rows = {}
            for name in ("frozen", "peft", "peft, its factors bfloat16", "general", "ours"):
                with torch.device("meta"), flash_attention():
                    candidate = Candidate(name, config, targets, torch.bfloat16)
                    given = conditions(config, torch.bfloat16, side)
                    candidate.step(given)  # what only a first step does is left out
                    with Operators() as operators:
                        candidate.step(given)
                    rows[name] = operators.names, candidate.saved(given)
            for name, (names, saved) in rows.items():
                ratio = saved / rows["peft"][1]
                cells = f"{names.total():,} | {saved / 2**20:,.0f} | {ratio:.2f}"
                print(f"| {label} | {targets} | {name} | {cells} |", flush=True)


def timed(candidates: list[Candidate], given: dict[str, Any], rounds: int) -> dict[str, float]:
    """Name → median seconds of a forward and a backward pass."""
    found: dict[str, list[float]] = {c.name: [] for c in candidates}
    for number in range(rounds + 1):
        for candidate in candidates:
            seconds = seconds_of(lambda c=candidate: c.step(given))
            if number:  # the first one allocates
                found[candidate.name].append(seconds)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def show_times(
    label: str, config: Any, targets: str, dtype: torch.dtype, side: int, batch: int, rounds: int
) -> None:
    candidates = [Candidate(name, config, targets, dtype) for name in NAMES]
    seconds = timed(candidates, conditions(config, dtype, side, batch), rounds)
    cells = " | ".join(f"{seconds[name]:.3f}" for name in NAMES)
    more = " | ".join(f"{seconds['ours'] / seconds[name]:.3f}" for name in NAMES[:-1])
    print(f"| {label} | {targets} | {str(dtype).removeprefix('torch.')} | {cells} | {more} |")


NAMES = ("frozen", "peft", "general", "ours")
HEAD = (
    "| UNet | targets | dtype | frozen s | peft s | general s | ours s | ours ÷ frozen | ÷ peft | "
    "÷ general |\n|---|---|---|---|---|---|---|---|---|---|"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", choices=("count", "time", "embedded"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--targets", nargs="+", default=["attention", "all"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    given = parser.parse_args()
    print(f"torch {torch.__version__}, peft {peft.__version__}, rank {RANK}")
    if given.work == "count":
        return count()
    torch.set_num_threads(1)
    print(HEAD)
    real = given.work == "time"
    config = config_of(
        CONFIGS["sd1"]["unet"] if real else UNet2DConditionModel.load_config(EMBEDDED)
    )
    label, side, batch = ("SD1.5 256²", 32, 1) if real else ("embedded, 64²", 16, 4)
    for targets in given.targets:
        for dtype in given.dtypes:
            show_times(label, config, targets, getattr(torch, dtype), side, batch, given.rounds)


if __name__ == "__main__":
    main()
