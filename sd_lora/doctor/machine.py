"""Checks of the machine that need no device: libraries, extras, CPU, memory, disks, step times."""

import os
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

from sd_lora.doctor.part import Part
from sd_lora.errors import Problem, install_line

GIB = 2**30

LITTLE_MEMORY = 4 * GIB
"""Free bytes below which a warning is due: SD 1.5 in float32 is 3.7 GiB while it is loaded."""

LITTLE_DISK = GIB
"""Free bytes of a disk below which a warning is due: `data/cache` leaves as much."""


def system() -> Part:
    """The project's version, Python and the operating system."""
    import sd_lora

    part = Part({"sd_lora": sd_lora.__version__, "Python": platform.python_version()})
    part.facts["system"] = platform.platform()
    with suppress(PackageNotFoundError):
        from packaging.specifiers import SpecifierSet

        wanted = metadata("sd_lora")["Requires-Python"]
        if platform.python_version() not in SpecifierSet(wanted):
            text = f"Python {platform.python_version()} is not {wanted}"
            part.faults.append(Problem("Python", text, "Make the environment with another Python"))
    return part


def libraries() -> Part:
    """Versions of the libraries that each run needs, against the ranges of pyproject.toml."""
    part = Part()
    for name, wanted, extra in _requirements():
        if extra:
            continue
        text, problem = _version(name, wanted, f'pip install "{name}{wanted}"')
        part.facts[name] = text
        part.faults += problem
    if not part.facts:
        text = "sd_lora is not installed as a package, so its libraries' ranges are not known"
        part.warnings.append(Problem("libraries", text, "pip install -e . in its folder"))
    return part


EXTRAS = {
    "tensorboard": "curves in TensorBoard, the default tracker",
    "wandb": "curves on Weights & Biases (--report_to wandb)",
    "8bit": "8-bit optimisers, such as adamw8bit",
    "optimizers": "optimisers: Prodigy, D-Adaptation, CAME, …",
    "compel": "weighted prompts (--weighted_prompts)",
    "heif": "images of Apple's phones (.heic)",
    "jxl": "JPEG XL images",
    "quantized": "base models stored in 4 or 8 bits",
    "studio": "the web page (sd-lora studio)",
}
"""Extra of pyproject.toml → its use."""


def extras() -> Part:
    """Optional packages: those that are here, and the use of those that are not."""
    part, by_extra = Part(), dict[str, list[tuple[str, str]]]()
    for name, wanted, extra in _requirements():
        if extra in EXTRAS and name != "sd_lora":
            by_extra.setdefault(extra, []).append((name, wanted))
    for extra, packages in by_extra.items():
        found = [_version(name, wanted, install_line(extra)) for name, wanted in packages]
        texts = [f"{name} {text}" for (name, _), (text, _) in zip(packages, found, strict=True)]
        part.facts[extra] = f"{EXTRAS[extra]}: {', '.join(texts)}"
        if any(problem for _, problem in found):
            part.facts[extra] += f"; {install_line(extra)}"
        part.warnings += [
            p for _, problem in found for p in problem if "not installed" not in p.text
        ]
    return part


def _requirements() -> Iterator[tuple[str, str, str]]:
    """Yield name, range and extra ("" for none) of each package that the project names."""
    with suppress(PackageNotFoundError):
        for row in requires("sd_lora") or ():
            package, _, marker = row.partition(";")
            parts = re.match(r"([\w.-]+)(?:\[[^]]*\])?\s*(.*)", package.strip())
            extra = re.search(r"extra == ['\"]([\w-]+)", marker)
            if parts:
                yield parts[1], parts[2].strip(), extra[1] if extra else ""


def _version(name: str, wanted: str, remedy: str) -> tuple[str, list[Problem]]:
    """The version of a package in words, and the problem with it, if there is one."""
    from packaging.specifiers import SpecifierSet

    try:
        found = version(name)
    except PackageNotFoundError:
        return "not installed", [Problem(name, f"{name} is not installed", remedy)]
    if SpecifierSet(wanted).contains(found, prereleases=True):
        return found, []
    text = f"{name} {found} is not {wanted}"
    return f"{found}, not {wanted}", [Problem(name, text, remedy)]


def cpu() -> Part:
    """Cores, torch's threads, and the machine's memory."""
    import psutil
    import torch

    process, memory = psutil.Process(), psutil.virtual_memory()
    cores = os.cpu_count() or 1
    if hasattr(process, "cpu_affinity"):  # macOS has none
        cores = len(process.cpu_affinity())
    threads = torch.get_num_threads()
    part = Part({
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": f"{cores} for this process of {os.cpu_count()}",
        "torch's threads": str(threads),
        "memory": f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free",
    })  # fmt: skip
    if threads > cores:
        text = f"torch has {threads} threads for {cores} cores, and they wait for one another"
        part.warnings.append(Problem("threads", text, f"Set OMP_NUM_THREADS={cores}"))
    if memory.available < LITTLE_MEMORY:
        text = f"{memory.available / GIB:.1f} GiB of memory are free: SD 1.5 takes 3.7 in float32"
        part.warnings.append(Problem("memory", text, "Close other programs"))
    return part


def _processor() -> str:
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text("utf-8", "replace")
        if found := re.search(r"model name\s*:\s*(.+)", text):
            return found[1]
    return platform.processor() or platform.machine()


def disks() -> Part:
    """Free space where caches, models and outputs go, and whether these folders can be written."""
    from huggingface_hub.constants import HF_HUB_CACHE

    from sd_lora.data.cache.store import default_folder
    from sd_lora.folders import state_folder

    places = {
        "caches": (default_folder(), "SD_LORA_CACHE names another folder"),
        "models": (Path(HF_HUB_CACHE), "HF_HOME names another folder"),
        "outputs": (Path.cwd(), "Start the run in another folder, or name one for its files"),
        "state": (state_folder(), "SD_LORA_STATE names another folder"),
    }
    part = Part()
    for label, (folder, remedy) in places.items():
        there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        free = shutil.disk_usage(there).free
        part.facts[label] = f"{folder}, {free / GIB:.1f} GiB free"
        wrong = [f"{there} is a file"] * there.is_file()
        wrong += [f"{there} cannot be written"] * (not os.access(there, os.W_OK))
        small = free < LITTLE_DISK and label != "state"
        wrong += [f"the disk of {folder} has {free / GIB:.1f} GiB free"] * small
        part.warnings += [Problem(label, text, remedy) for text in wrong]
    return part


SLOWER = 1.2
"""Ratio of two steps' times from which on a run is called slower."""


def last_run() -> Part:
    """The time of a step in the last run on this device, against the run before."""
    from sd_lora.doctor.device import planned
    from sd_lora.report.step_time import MODEL, read, versions

    device = planned().text.rpartition(",")[0]
    runs = read(device)
    if not runs:
        return Part({"time of a step": f"no run of 20 steps on {device} is known yet"})
    last = runs[-1]
    model = last.options.get(MODEL, "the base")
    part = Part({"time of a step": f"{last.seconds:.3g} s, {last.date}, {model} on {device}"})
    if since := last.changes(versions()):
        part.facts["changed since"] = ", ".join(since)
    if len(runs) > 1:
        before = runs[-2]
        ratio, changed = last.seconds / before.seconds, before.changes_to(last)
        part.facts["the run before"] = f"{before.seconds:.3g} s, {before.date}"
        part.facts["ratio"] = f"{ratio:.2f}, changed: {', '.join(changed) or 'nothing known'}"
        if ratio > SLOWER and last.options == before.options:
            text = (
                f"with the same options a step takes {ratio:.2f} times as long as in the run before"
            )
            remedy = f"Changed: {', '.join(changed)}" if changed else "Close other programs"
            part.warnings.append(Problem("time of a step", text, remedy))
    return part
