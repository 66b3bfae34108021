"""Time and memory of loading a base model at the published sizes, with random float16 weights.

run as: PYTHONPATH=. python benchmarks/loading.py --family sd1 --folder SCRATCH   (4 GB; sdxl: 14)

Each way runs in a process of its own: ours from a folder and from a single file, and diffusers'
`from_pretrained` and `from_single_file` of the whole pipeline in float32. "own" is the peak of
anonymous memory (RssAnon, sampled every 20 ms), "with files" of resident memory (VmHWM), mapped
pages included.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler

from sd_lora.models.families import FAMILIES
from sd_lora.models.meta_pipeline import MetaPipeline, build_pipeline
from tests.single import write_single
from tests.tiny import build_tokenizer

LOAD = """
import sys, torch
form, path, tokenizer, dtype = sys.argv[1:]
if form.startswith("ours"):
    from sd_lora.models.load import load_parts
    parts = load_parts(path, tokenizer_name=tokenizer, dtype=getattr(torch, dtype))
    models = [*parts.models.values(), parts.vae]
else:
    import diffusers
    from transformers import CLIPTokenizer
    cls = getattr(diffusers, form)
    options = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    options = {} if "XL" in form else options
    pipe = cls.from_pretrained(path, torch_dtype=torch.float32, **options)
    models = [m for m in pipe.components.values() if isinstance(m, torch.nn.Module)]
print(sum(p.numel() * p.element_size() for m in models for p in m.parameters()))
"""


def make(folder: Path, family: str) -> None:
    """Writes a pipeline of the published size with random float16 weights, as folder and file."""
    row = FAMILIES[family]
    models = dict(MetaPipeline.of_family(row).models)
    with torch.device("meta"):
        models["vae"] = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
    generator = torch.Generator().manual_seed(0)
    for model in models.values():
        model.to(torch.float16).to_empty(device="cpu").requires_grad_(False)
        for parameter in model.parameters():
            parameter.normal_(0, 0.03, generator=generator)
    tokenizer = build_tokenizer()
    tokenizers = {c.replace("text_encoder", "tokenizer"): tokenizer for c in row.text_encoders}
    parts = models | tokenizers | {"scheduler": DDPMScheduler(beta_schedule="scaled_linear")}
    pipeline = build_pipeline(row, models["unet"].config, parts)
    pipeline.save_pretrained(folder / "folder")
    write_single(pipeline, folder / "single.safetensors", torch.float16)


def measure(form: str, path: Path, tokenizer: Path, dtype: str) -> tuple[float, float, float, int]:
    """Returns seconds, own peak and peak with files in GiB, and the parts' bytes."""
    started, own, total = time.monotonic(), 0, 0
    words = [sys.executable, "-c", LOAD, form, str(path), str(tokenizer), dtype]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        own = max(own, int(fields.get("RssAnon", "0 kB").split()[0]))
        total = max(total, int(fields.get("VmHWM", "0 kB").split()[0]))
        time.sleep(0.02)
    size = int(process.communicate()[0].split()[-1])
    return time.monotonic() - started, own / 2**20, total / 2**20, size


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--family", choices=("sd1", "sdxl"), default="sd1")
    p.add_argument("--folder", type=Path, required=True)
    args = p.parse_args()
    if not (args.folder / "single.safetensors").is_file():
        make(args.folder, args.family)
    pipeline = FAMILIES[args.family].pipelines["text_to_image"]
    folder, single = args.folder / "folder", args.folder / "single.safetensors"
    ways = [
        ("ours, folder", folder, "float32"),
        ("ours, folder", folder, "bfloat16"),
        ("ours, single file", single, "float32"),
        ("ours, single file", single, "bfloat16"),
        (pipeline, folder, "float32"),
    ]
    rows = []
    for form, path, dtype in ways:
        seconds, own, total, size = measure(form, path, folder / "tokenizer", dtype)
        rows.append({"way": form, "unet": dtype, "parts GiB": round(size / 2**30, 2)})
        rows[-1] |= {"s": round(seconds, 1), "own GiB": round(own, 2)}
        rows[-1]["with files GiB"] = round(total, 2)
        print(json.dumps(rows[-1]), flush=True)


if __name__ == "__main__":
    main()
