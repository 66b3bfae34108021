"""Checks of the device that trains: torch's build, the accelerator, precisions and attention, each
proved by a small computation."""

import platform
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import AutocastKwargs
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sd_lora.config.schema import OPTIONS, TrainConfig
from sd_lora.doctor.install import BY_VENDOR, INSTALL, MAKERS, NEWER
from sd_lora.doctor.part import Part
from sd_lora.errors import Problem
from sd_lora.training.processes import DTYPES, Device

GIB = 2**30


def planned() -> Device:
    """The device and precision of a run that leaves the precision open."""
    config: Any = TrainConfig.model_construct(mixed_precision="auto")
    return Device.planned(config)


def build() -> Part:
    """torch's version, and the devices that its build is for."""
    built = {
        "CUDA": torch.version.cuda,
        "ROCm": torch.version.hip,
        "XPU": getattr(torch.version, "xpu", None),
        "MPS": "Metal" if torch.backends.mps.is_built() else None,
    }
    found = [f"{name} {version}" for name, version in built.items() if version]
    part = Part({"torch": torch.__version__, "built for": ", ".join([*found, "CPU"])})
    if torch.version.cuda or torch.version.hip:
        part.facts["architectures"] = " ".join(torch.cuda.get_arch_list()) or "none seen"
    return part


def accelerator() -> Part:
    """The device that a run would take, its driver and memory; cards that torch does not see."""
    device = planned()
    part = Part({"device": device.text.rpartition(",")[0]})
    part.facts |= _FACTS.get(device.type, dict)()
    if device.type != "cpu":
        return part
    kinds = _unseen()
    if device.unseen_card:
        part.warnings.append(Problem("device", device.unseen_card))
        kinds.discard("cuda")
    for kind in sorted(kinds):
        text = f"the machine seems to have {MAKERS[kind]}, and torch finds none"
        part.warnings.append(Problem("device", text, f"{INSTALL[kind]} ({NEWER})"))
    if not part.warnings:
        part.facts["for a card"] = f"torch's build must be that of its maker ({NEWER})"
        part.facts |= {f"  {MAKERS[kind]}": line for kind, line in INSTALL.items()}
    return part


def _cuda() -> dict[str, str]:
    """Facts about the first card of CUDA or ROCm, which torch calls cuda, too."""
    card: Any = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info(0)
    facts = {"cards": str(torch.cuda.device_count()), "memory": _memory(free, total)}
    if torch.version.hip:
        facts["architecture"] = card.gcnArchName
        facts["driver"] = _text_of(Path("/sys/module/amdgpu/version"))
    else:
        facts["architecture"] = f"sm_{card.major}{card.minor}"
        facts["driver"] = _nvidia_driver()
    return facts


def _xpu() -> dict[str, str]:
    card: Any = torch.xpu.get_device_properties(0)
    facts = {"name": card.name, "cards": str(torch.xpu.device_count())}
    facts["memory"] = f"{card.total_memory / GIB:.1f} GiB"
    with suppress(RuntimeError):  # not every driver tells the free bytes
        facts["memory"] = _memory(*torch.xpu.mem_get_info(0))
    return facts | {"driver": card.driver_version}


def _mps() -> dict[str, str]:
    size = torch.mps.recommended_max_memory() / GIB
    return {"macOS": platform.mac_ver()[0], "memory": f"{size:.1f} GiB, shared with the system"}


_FACTS: dict[str, Callable[[], dict[str, str]]] = {"cuda": _cuda, "xpu": _xpu, "mps": _mps}
"""Type of a device → its facts."""


def _memory(free: int, total: int) -> str:
    return f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"


def _text_of(path: Path) -> str:
    with suppress(OSError):
        return path.read_text("utf-8", "replace").strip()
    return "unknown"


def _nvidia_driver() -> str:
    """The driver's version, by nvidia-smi, which is where the driver is."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown"
    words = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(words, capture_output=True, text=True, timeout=10)  # noqa: S603
        return (done.stdout.split() or ["unknown"])[0]
    return "unknown"


GRAPHICS = Path("/sys/class/drm")
"""Linux' folder of graphics devices."""


def _unseen() -> set[str]:
    """Builds of torch for the graphics devices that are in this machine, by its system."""
    found = {BY_VENDOR.get(_text_of(path), "") for path in GRAPHICS.glob("renderD*/device/vendor")}
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        found.add("mps")
    return found & INSTALL.keys()


def precisions() -> Part:
    """The precisions that work here, each with a loss scaler if a run would have one."""
    part, auto = Part(), planned()
    for precision in ("no", "bf16", "fp16"):
        fault, scaled = _proof(precision)
        name = str(DTYPES[precision]).removeprefix("torch.")
        chosen = ", taken by a run with auto" * (precision == auto.precision)
        part.facts[name] = (
            f"fails: {fault}" if fault else f"works{', with loss scaling' * scaled}{chosen}"
        )
        if fault and chosen:
            part.faults.append(Problem(name, f"{name} on {auto.type} fails: {fault}"))
        elif fault:
            text, remedy = f"{name} fails: {fault}", "Take another precision"
            part.warnings.append(Problem(name, text, remedy))
    bf16 = torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)
    part.facts["bfloat16"] += ", but emulated, so slow" * bf16
    return part


MOST_APART = 0.1
"""Part of its norm by which a gradient may differ from float32's on the CPU: bfloat16 has 0.01."""


def _proof(precision: str) -> tuple[str, bool]:
    """The reason why a step in a precision fails, "" if it works, and whether its loss is scaled.

    The step is one of a small network: under autocast, and with the network itself in the
    precision, as the frozen base is.
    """
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(4, 32, 3), nn.GroupNorm(8, 32), nn.SiLU(), nn.Flatten(2), nn.Linear(36, 8)
    )
    x = torch.randn(2, 4, 8, 8)
    network(x).square().mean().backward()
    right = _gradient(network)
    scaled = False
    try:
        with _accelerator(precision) as accelerator:
            device, dtype = accelerator.device, DTYPES[precision]
            network, x = network.to(device), x.to(device)
            network.zero_grad()
            optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
            before = _gradient(network, "data")
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = network(x).float().square().mean()
            scaler = accelerator.scaler
            if scaler is None:
                loss.backward()
                optimizer.step()
            else:
                scaled = True
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
            apart = float((_gradient(network) - right).norm() / right.norm())
            if not apart < MOST_APART:  # also for NaN
                return f"its gradient is {apart:.0%} off", scaled
            if torch.equal(_gradient(network, "data"), before):
                return "the step changes nothing", scaled
            if not network.to(dtype)(x.to(dtype)).float().isfinite().all():
                return "a network of this precision gives numbers that are not finite", scaled
    except Exception as error:  # the drivers' errors have no class of their own
        return _first_line(error), scaled
    return "", scaled


def _gradient(network: nn.Module, of: str = "grad") -> Tensor:
    """All gradients of a network, or all its parameters, as one vector in float32 on the CPU."""
    return torch.cat([getattr(p, of).flatten().float().cpu() for p in network.parameters()])


@contextmanager
def _accelerator(precision: str) -> Iterator[Accelerator]:
    """Accelerate in a precision, as a run has it, for a while."""
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield Accelerator(
            mixed_precision=precision, kwargs_handlers=[AutocastKwargs(enabled=False)]
        )
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


ATTENTION = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
"""Name → backend of torch's attention. All but math leave out the matrix of weights."""

HEADS = {"SD 1.5": 40, "SDXL": 64}
"""Model → numbers a head of its attention with most tokens."""


def attention() -> Part:
    """The backends of torch's attention that run forward and backward, in a run's precision."""
    part, device = Part(), planned()
    runs: set[str] = set()
    for name, backend in ATTENTION.items():
        failed = {model: _attends(device, wide, backend) for model, wide in HEADS.items()}
        if not any(failed.values()):
            part.facts[name] = "runs"
            runs.add(name)
        else:
            reasons = {why: [m for m in failed if failed[m] == why] for why in failed.values()}
            words = [f"{' and '.join(m)}: {why or 'runs'}" for why, m in reasons.items()]
            part.facts[name] = "; ".join(words)
    if not runs:
        text = f"torch's attention does not run on {device.type} in {device.precision}"
        part.faults.append(Problem("attention", text))
    elif runs == {"math"} and device.type in ("cuda", "xpu"):
        text = "only the math backend runs, which keeps the matrix of weights: a step takes more "
        text += "memory than the counts of check --card say"
        part.warnings.append(Problem("attention", text, "Another build of torch may have more"))
    return part


def _attends(device: Device, wide: int, backend: SDPBackend) -> str:
    """The reason why a backend does not run with heads of a width; "" if it does."""
    dtype = DTYPES[device.precision]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            q, k, v = (
                torch.ones(1, 2, 64, wide, device=device.type, dtype=dtype, requires_grad=True)
                for _ in range(3)
            )
            with sdpa_kernel(backend):
                F.scaled_dot_product_attention(q, k, v).float().sum().backward()
            return "" if q.grad is not None and q.grad.isfinite().all() else "not finite"
        except Exception as error:  # as above
            reasons = [_first_line(w.message) for w in told if isinstance(w.message, Warning)]
            return (reasons or [_first_line(error)])[0].split(". ")[0].split(" (Triggered")[0]


def options() -> Part:
    """Options that do otherwise on a CPU, by their rows; none of them on a GPU."""
    part = Part()
    if planned().type != "cpu":
        return part
    for name, option in OPTIONS.items():
        effects = option.without_gpu
        rows = effects.items() if not isinstance(effects, str) else [("", effects)]
        for value, effect in rows:
            if effect:
                part.facts[f"--{name} {value}".strip()] = f"on a CPU it {effect}"
    return part
