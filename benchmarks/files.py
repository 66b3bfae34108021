"""Time and memory of the file tools at the published sizes, with random weights.

run as: python benchmarks/files.py --family sd1 --folder SCRATCH   (sd1: 5 GB of disk, sdxl: 17 GB)

Each tool runs by itself in a process; its memory is sampled every 20 ms: "own" is anonymous memory
(RssAnon), which is what the tool holds, "files" the mapped pages of the inputs (RssFile), which the
system takes back whenever it likes.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from sd_lora.adapters.methods import LoRA
from sd_lora.adapters.targets import select
from sd_lora.formats import adapter_files as files
from sd_lora.formats import metadata
from sd_lora.formats.canonical import canonical_name
from sd_lora.formats.names import naming_of
from sd_lora.models.families import FAMILIES
from sd_lora.models.meta_pipeline import MetaPipeline


def make_lora(path: Path, family: str, rank: int, seed: int) -> None:
    """Writes a random LoRA on every module, in float16."""
    g, adapter = torch.Generator().manual_seed(seed), {}
    for component, model in MetaPipeline.of_family(FAMILIES[family]).models.items():
        for name in select(model, "all" if component == "unet" else "text"):
            shape = tuple(model.get_submodule(name).weight.shape)
            ones = (1,) * len(shape[2:])
            A = 0.02 * torch.randn(rank, *shape[1:], generator=g)
            B = 0.02 * torch.randn(shape[0], rank, *ones, generator=g)
            modules = adapter.setdefault(component, {})
            modules[canonical_name(component, name)] = LoRA(shape, {"lora_A": A, "lora_B": B})
    header = metadata.build(adapter, FAMILIES[family], path.stem)
    files.write_file(path, files.KOHYA, adapter, naming_of(family), header, torch.float16)


def make_base(folder: Path, family: str) -> None:
    """Writes a pipeline folder of the published sizes with random float16 weights."""
    meta_pipeline = MetaPipeline.of_family(FAMILIES[family])
    g = torch.Generator().manual_seed(0)
    for component, model in meta_pipeline.models.items():
        (folder / component).mkdir(parents=True)
        tensors = {
            name: (0.03 * torch.randn(p.shape, generator=g)).half()
            for name, p in model.named_parameters()
        }
        stem = "diffusion_pytorch_model" if component == "unet" else "model"
        save_file(tensors, folder / component / f"{stem}.safetensors", {"format": "pt"})
        if component == "unet":
            model.save_config(folder / component)
        else:
            model.config.save_pretrained(folder / component)
    (folder / "model_index.json").write_text("{}")


def measure(words: list[str]) -> tuple[float, float, float]:
    """Runs `sd-lora`; returns seconds, MiB of its own memory and of mapped files at the peak."""
    code = "import sys; from sd_lora.cli import main; sys.exit(main(sys.argv[1:]))"
    started, own, mapped = time.monotonic(), 0, 0
    process = subprocess.Popen([sys.executable, "-c", code, *words], stdout=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            text = Path(f"/proc/{process.pid}/status").read_text()
            kib = {row.split(":")[0]: row.split()[1] for row in text.splitlines() if "Rss" in row}
            own = max(own, int(kib.get("RssAnon", 0)))
            mapped = max(mapped, int(kib.get("RssFile", 0)))
        except OSError:
            break
        time.sleep(0.02)
    if process.wait():
        raise SystemExit(f"sd-lora {' '.join(words)} failed")
    return time.monotonic() - started, own / 1024, mapped / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", default="sd1")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--skip_models", action="store_true", help="the LoRA tools alone")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    here = args.folder / f"files-{args.family}"
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir(parents=True)
    a, b, base = (here / name for name in ("a.safetensors", "b.safetensors", "base"))
    make_lora(a, args.family, args.rank, 1)
    make_lora(b, args.family, args.rank, 2)

    def out(name: str) -> list[str]:
        return ["--out", str(here / name), "--overwrite"]

    half = str(args.rank // 2)
    runs = {
        "inspect": ["inspect", str(a)],
        "verify": ["verify", str(a)],
        "convert": ["convert", str(a), "--to", "diffusers", *out("c.safetensors")],
        "merge": ["merge", str(a), str(b), "--weights", "0.7", "0.3", *out("m.safetensors")],
        "merge to half the rank": ["merge", str(a), str(b), "--rank", half, *out("h.safetensors")],
        "resize to half the rank": ["resize", str(a), "--rank", half, *out("r.safetensors")],
    }
    if not args.skip_models:
        make_base(base, args.family)
        runs |= {
            "bake": ["bake", str(base), str(a), *out("tuned")],
            "extract": ["extract", str(base), str(here / "tuned"), "--rank", str(args.rank)]
            + out("e.safetensors"),
        }
    print(f"{args.family}, rank {args.rank}, {a.stat().st_size / 2**20:.0f} MiB a LoRA")
    print(f"{'':<26} {'seconds':>8} {'own MiB':>8} {'files MiB':>9}")
    for name, words in runs.items():
        seconds, own, mapped = measure(words)
        print(f"{name:<26} {seconds:>8.1f} {own:>8.0f} {mapped:>9.0f}", flush=True)
    shutil.rmtree(here)


if __name__ == "__main__":
    main()
