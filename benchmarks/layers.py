"""Forward + backward of one adapted layer, as a factor of the frozen layer: ours against peft's.

    OMP_NUM_THREADS=1 python benchmarks/layers.py

Rounds are interleaved (every candidate once a round) and the median of the ratios within a round
is shown, so that a busy machine slows all alike.
"""

import copy
import statistics
import time
from collections.abc import Callable

import peft
import torch
from torch import nn

import sd_lora

CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear 320→320, 4096 tokens": (lambda: nn.Linear(320, 320), (1, 4096, 320)),
    "Linear 640→640, 1024 tokens": (lambda: nn.Linear(640, 640), (1, 1024, 640)),
    "Linear 320→2560, 1024 tokens": (lambda: nn.Linear(320, 2560), (1, 1024, 320)),
    "Linear 1280→1280, 256 tokens": (lambda: nn.Linear(1280, 1280), (1, 256, 1280)),
    "Conv 3×3 320, 32²": (lambda: nn.Conv2d(320, 320, 3, padding=1), (1, 320, 32, 32)),
    "Conv 1×1 960→320, 32²": (lambda: nn.Conv2d(960, 320, 1), (1, 960, 32, 32)),
}
RANK, ROUNDS = 8, 41


def candidates(make: Callable[[], nn.Module]) -> dict[str, nn.Module]:
    frozen = nn.Sequential(make()).requires_grad_(False)
    ours, theirs = copy.deepcopy(frozen), copy.deepcopy(frozen)
    sd_lora.inject(ours, targets=["0"], rank=RANK)
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"])
    return {"frozen": frozen, "ours": ours, "peft": peft.get_peft_model(theirs, config)}


def seconds(model: nn.Module, x: torch.Tensor) -> float:
    started = time.perf_counter()
    y = model(x)
    y.backward(torch.ones_like(y))
    return time.perf_counter() - started


def main() -> None:
    print(f"torch {torch.__version__}, peft {peft.__version__}, rank {RANK}, {ROUNDS} rounds")
    print("| layer | dtype | ours ÷ frozen | peft ÷ frozen | ours ÷ peft |\n|---|---|---|---|---|")
    for name, (make, shape) in CASES.items():
        for dtype in (torch.float32, torch.bfloat16):
            models = candidates(make)
            for model in models.values():
                for parameter in model.parameters():
                    if not parameter.requires_grad:
                        parameter.data = parameter.data.to(dtype)
            x = torch.randn(shape, dtype=dtype, requires_grad=True)
            context = torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32)
            rounds = []
            with context:
                for _ in range(ROUNDS):
                    rounds.append({key: seconds(model, x) for key, model in models.items()})
            pairs = (("ours", "frozen"), ("peft", "frozen"), ("ours", "peft"))
            ratios = [statistics.median(r[a] / r[b] for r in rounds[3:]) for a, b in pairs]
            cells = " | ".join(f"{ratio:.2f}" for ratio in ratios)
            print(f"| {name} | {str(dtype).removeprefix('torch.')} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
