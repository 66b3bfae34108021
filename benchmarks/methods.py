"""Forward + backward of one layer under every method, as a factor of the frozen layer: ours
against LyCORIS' and peft's.

    OMP_NUM_THREADS=1 python benchmarks/methods.py

Interleaved rounds, medians of the ratios within a round, float32, as benchmarks/layers.py.
"""

import copy
import statistics
from typing import Any

import lycoris
import peft
import torch
from layers import seconds
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from torch import nn

import sd_lora

RANK, ROUNDS = 8, 21
LAYERS = {
    "Linear 640→640, 1024 tokens": (nn.Linear(640, 640), (1, 1024, 640)),
    "Conv 3×3 320, 32²": (nn.Conv2d(320, 320, 3, padding=1), (1, 320, 32, 32)),
}
METHODS: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "lora": ({}, peft.LoraConfig(r=RANK, target_modules=["0"]), (LoConModule, {})),
    "lora_fa": ({"method": "lora_fa"}, None, None),
    "lora, tucker": ({"tucker": True}, None, (LoConModule, {"use_tucker": True})),
    "lora, pissa": (
        {"init": "pissa"},
        peft.LoraConfig(r=RANK, target_modules=["0"], init_lora_weights="pissa"),
        None,
    ),
    "dora": (
        {"rule": "decompose"},
        peft.LoraConfig(r=RANK, target_modules=["0"], use_dora=True),
        (LoConModule, {"weight_decompose": True}),
    ),
    "loha": (
        {"method": "loha"},
        peft.LoHaConfig(r=RANK, target_modules=["0"]),
        (LohaModule, {}),
    ),
    "lokr": (
        {"method": "lokr"},
        peft.LoKrConfig(r=RANK, target_modules=["0"]),
        (LokrModule, {}),
    ),
    "full": ({"method": "full"}, None, None),
}


def candidates(base: nn.Module, method: str) -> dict[str, nn.Module]:
    """Returns the frozen layer, ours, peft's and LyCORIS', those that have the method."""
    options, config, module = METHODS[method]
    frozen = nn.Sequential(copy.deepcopy(base)).requires_grad_(False)
    found: dict[str, nn.Module] = {"frozen": frozen, "ours": copy.deepcopy(frozen)}
    is_linear = isinstance(base, nn.Linear)
    if is_linear and options.get("tucker"):
        return {}
    sd_lora.inject(found["ours"], targets=["0"], rank=RANK, **options)
    if config is not None and not (options.get("init") == "pissa" and not is_linear):
        found["peft"] = peft.get_peft_model(copy.deepcopy(frozen), copy.deepcopy(config))
    if module is not None:
        wrapped = copy.deepcopy(base).requires_grad_(False)
        theirs = module[0]("x", wrapped, 1.0, lora_dim=RANK, alpha=RANK, **module[1])
        theirs.train()
        theirs.kept = [wrapped]  # the module holds its layer weakly
        found["lycoris"] = theirs
    return found


def main() -> None:
    versions = f"peft {peft.__version__}, lycoris-lora {getattr(lycoris, '__version__', '4.1.3')}"
    print(f"torch {torch.__version__}, {versions}, rank {RANK}, {ROUNDS} rounds, float32")
    print("| layer | method | ours ÷ frozen | peft ÷ frozen | LyCORIS ÷ frozen |")
    print("|---|---|---|---|---|")
    for layer, (base, shape) in LAYERS.items():
        for method in METHODS:
            models = candidates(base, method)
            if not models:
                continue
            x = torch.randn(shape, requires_grad=True)
            rounds = [{k: seconds(m, x) for k, m in models.items()} for _ in range(ROUNDS)]
            cells = []
            for name in ("ours", "peft", "lycoris"):
                if name in models:
                    ratio = statistics.median(r[name] / r["frozen"] for r in rounds[3:])
                    cells.append(f"{ratio:.2f}")
                else:
                    cells.append("–")
            print(f"| {layer} | {method} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
