"""How fast images are checked, become pixels, and come out of the cache; one process.

run as: OMP_NUM_THREADS=1 PYTHONPATH=. python benchmarks/data.py

Everything is measured in turn, round after round, and given as the median of the rounds. Files are
in the system's memory: what a disk takes is not measured.
"""

import argparse
import io
import itertools
import json
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image, features
from torch.utils.data import DataLoader

from sd_lora.config.sources import CaptionRules, SourceSpec
from sd_lora.data.batches.epochs import Epochs
from sd_lora.data.batches.stream import Batch, ImageSet, Stream
from sd_lora.data.cache.encode import Latents
from sd_lora.data.cache.latents import LatentTable, Moments, PixelSettings
from sd_lora.data.cache.store import Store, digest_of
from sd_lora.data.images.buckets import CropSettings
from sd_lora.data.images.facts import content_digest, examine
from sd_lora.data.sources.samples import Sample
from sd_lora.diffusion.noise import Noise

IMAGES = {"2 Mpx": (1632, 1224), "12 Mpx": (4000, 3000)}
LATENTS = {"SD1.5 512²": (4, 64, 64), "SDXL 1024²": (4, 128, 128)}
ENTRIES = 100
"""Latents of each size in the cache."""

Task = tuple[str, int, Callable[[], object]]
"""What is measured, how many things one call does, the call."""


def jpeg(size: tuple[int, int]) -> bytes:
    """Returns a JPEG much as cameras write it: shapes of all sizes, and some grain."""
    draw = np.random.default_rng(0)
    layers = np.zeros((size[1], size[0], 3), np.float32)
    for cells in (4, 16, 64, 256):
        coarse = Image.fromarray(draw.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        layers += np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), np.float32) / 4
    layers += draw.normal(0, 4, layers.shape)
    out = io.BytesIO()
    Image.fromarray(layers.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


def of_images() -> list[Task]:
    """Decoding, resizing and cutting to a square; examining; naming by content."""
    tasks: list[Task] = []
    pixel_settings = PixelSettings()
    for name, size in IMAGES.items():
        data = jpeg(size)
        for resolution in (512, 1024):
            crop_settings = CropSettings(resolution)
            crop = crop_settings.crop(size, (resolution, resolution), None)
            what = f"pixels of {name} JPEG at {resolution}²"
            tasks.append(
                (what, 1, lambda d=data, f=crop: pixel_settings.pixels(d, "jpeg", f, False))
            )
        tasks.append((f"check of {name} JPEG", 1, lambda d=data: examine(d)))
        tasks.append((f"digest of {name} JPEG", 1, lambda d=data: content_digest(d)))
    return tasks


def of_the_cache(folder: Path) -> list[Task]:
    """Latents that are read, asked for and written, mean and deviation in float32."""
    tasks: list[Task] = []
    table = LatentTable(PixelSettings(), "benchmark", "disk", Store(folder, 1 << 40))
    for name, shape in LATENTS.items():
        moments = Moments(torch.randn(shape), torch.rand(shape))
        numbers = itertools.count()

        # new ones each time: ext4 flushes a file that replaces another, in five times the time
        def put(
            n: int, name: str = name, numbers: Any = numbers, m: Moments = moments
        ) -> list[str]:
            keys = ["latents/" + digest_of(name, str(next(numbers))) for _ in range(n)]
            for key in keys:
                table.put(key, m)
            return keys

        keys = put(ENTRIES)
        what = f"latent of {name} ({8 * moments.mean.numel() / 2**20:.3g} MiB)"
        tasks += [
            (f"{what} read", ENTRIES, lambda keys=keys: [table.get(key) for key in keys]),
            (f"{what} asked for", ENTRIES, lambda keys=keys: [key in table for key in keys]),
            (f"{what} written", ENTRIES, lambda put=put: put(ENTRIES)),
        ]
    return tasks


BATCH = {"SD1.5 512²": 8, "SDXL 1024²": 4}
EPOCH = 64
"""Batches that one call takes out of the loader."""


def of_the_loader(folder: Path) -> list[Task]:
    """Batches out of the loader where all latents are on the disk, by 0, 1 and 2 workers, and what
    the training step does with one before the device has work: latents and noise drawn."""
    tasks: list[Task] = []
    for name, shape in LATENTS.items():
        side, count = 8 * shape[1], BATCH[name]
        table = LatentTable(PixelSettings(), name, "disk", Store(folder, 1 << 40))
        samples = [
            Sample(f"{i}.png", bytes, (f"tag {i}, red, large, on grass",), RULES, f"{i:032x}", size)
            for i in range(count * EPOCH)
            for size in [(side * 2, side * 2)]
        ]
        images = ImageSet(
            samples, [(side, side)] * len(samples), CropSettings(side, 64), "instance", 0
        )
        moments = Moments(torch.randn(shape), torch.rand(shape))
        for index, sample in enumerate(samples):
            for flip in (False, True):
                table.put(table.key(sample, images.crop(index), flip), moments)
        epochs = Epochs([images.buckets[i] for i in images.entries], count)
        stream = Stream(images, epochs, None, 0, 1, table, epochs.num_micro_batches)
        for workers in (0, 1, 2):
            loader = DataLoader(stream, batch_size=None, num_workers=workers, collate_fn=as_is)
            what = f"batch of {count} of {name} loaded, {workers} workers"
            tasks.append((what, EPOCH, lambda loader=loader: deque(loader, maxlen=0)))
        vae = AutoencoderKL(latent_channels=4)
        latents, batch = Latents(vae, torch.device("cpu"), table), stream.batch(0)

        def draw(latents: Latents = latents, batch: Batch = batch) -> None:
            x0 = latents.latents(batch.items, batch.loaded).x0
            Noise().draw(x0, [item.address for item in batch.items])

        tasks.append((f"latents and noise of {count} of {name} drawn", 1, draw))
    return tasks


RULES = SourceSpec(random_flip=True, rules=CaptionRules(shuffle_caption=True))


def as_is(batch: Batch) -> Batch:
    return batch


def measure(tasks: list[Task], rounds: int) -> None:
    """Prints the medians of each task: milliseconds by the clock, and those that this process
    computed, which others on the machine change little; and how many a second of each."""
    found: dict[str, list[tuple[float, float]]] = {what: [] for what, _, _ in tasks}
    for _ in range(rounds + 1):
        for what, count, call in tasks:
            started = time.perf_counter(), time.process_time()
            call()
            ended = time.perf_counter(), time.process_time()
            clock, cpu = ((e - s) / count for s, e in zip(started, ended, strict=True))
            found[what].append((clock, cpu))
    for what, times in found.items():
        row: dict[str, object] = {"what": what}
        # the first round warms up
        for kind, values in zip(("clock", "cpu"), zip(*times[1:], strict=True), strict=True):
            middle = statistics.median(values)
            row |= {f"{kind} ms": round(1e3 * middle, 3), f"{kind}, a second": round(1 / middle, 1)}
        print(json.dumps(row, ensure_ascii=False), flush=True)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--rounds", type=int, default=9)
    p.add_argument("--only", choices=("images", "cache", "loader"))
    args = p.parse_args()
    torch.set_num_threads(1)
    libraries = {name: version(name) for name in ("torch", "pillow", "safetensors")}
    libraries["libjpeg-turbo"] = str(features.version_feature("libjpeg_turbo"))
    print(json.dumps(libraries), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        parts = {
            "images": of_images,
            "cache": lambda: of_the_cache(Path(folder)),
            "loader": lambda: of_the_loader(Path(folder)),
        }
        for name, part in parts.items():
            if args.only in (None, name):
                measure(part(), args.rounds)


if __name__ == "__main__":
    main()
