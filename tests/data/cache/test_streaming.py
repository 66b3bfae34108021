"""A stream of 20,000 images: looked at, encoded and kept, a few at a time."""

import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from sd_lora.config.sources import SourceSpec
from sd_lora.data.batches.stream import ImageSet
from sd_lora.data.cache.encode import Latents
from sd_lora.data.cache.latents import LatentTable, PixelSettings
from sd_lora.data.cache.store import Store
from sd_lora.data.check.scan import scan
from sd_lora.data.images.buckets import CropSettings
from sd_lora.data.sources.open import open_source

ROWS = 20_000
FEATURES = (
    b'{"info": {"features": {"image": {"_type": "Image"}, '
    b'"text": {"dtype": "string", "_type": "Value"}}}}'
)


def parquet(path: Path, rows: int) -> None:
    """Writes rows of an image of noise, 32×32 pixels, and a caption, no two of the same bytes."""
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image), ("text", pa.string())], {b"huggingface": FEATURES})
    rng = np.random.default_rng(0)
    buffers = [io.BytesIO() for _ in range(1000)]
    for buffer in buffers:
        pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(buffer, "BMP")  # the quickest to decode
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, 1000):
            # what follows the end is no part of the image, and makes its bytes others
            images = [
                {"bytes": buffer.getvalue() + str(start).encode(), "path": None}
                for buffer in buffers
            ]
            texts = [f"image {start + i}" for i in range(1000)]
            writer.write_table(pa.table({"image": images, "text": texts}, schema=schema))


class Watched:
    """A progress that takes down the memory of the process, every 1,000 items."""

    def __init__(self) -> None:
        self.mib: list[float] = []

    def __call__(self, items: Iterable, total: int | None = None) -> Iterator:
        process = psutil.Process(os.getpid())
        for i, item in enumerate(items):
            if i % 1000 == 0:
                self.mib.append(process.memory_info().rss / 2**20)
            yield item


@pytest.mark.slow
def test_memory_stays_flat(tmp_path: Path) -> None:
    """20,000 rows of a streaming set, 62 MB of images: checked, encoded by a small VAE in
    batches of 64, as a GPU has them, and kept on disk. What stays in memory of a row is its name,
    caption, digest and size: 1.5 KiB at most. Every row is a sample and has its latent."""
    (tmp_path / "set").mkdir()
    parquet(tmp_path / "set" / "train.parquet", ROWS)
    spec = SourceSpec(dataset=str(tmp_path / "set"), streaming=True, cache_dir=str(tmp_path / "hf"))
    (source,) = open_source(spec)
    assert source.count is None
    checking, encoding = Watched(), Watched()
    found = scan([source], None, progress=checking)
    assert len(found.samples) == ROWS
    assert found.samples[-1].captions == (f"image {ROWS - 1}",)
    images = ImageSet(found.samples, [(32, 32)] * ROWS, CropSettings(32, 32), "instance", 0)
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(4, 4, 4), norm_num_groups=2, sample_size=32,
                        down_block_types=["DownEncoderBlock2D"] * 3,
                        up_block_types=["UpDecoderBlock2D"] * 3).eval()  # fmt: skip
    table = LatentTable(
        PixelSettings(pixels_per_latent=4), "vae", "disk", Store(tmp_path / "c", 10**10)
    )
    latents = Latents(vae, torch.device("cpu"), table)
    latents.at_once = lambda size: 64
    jobs = latents.jobs(images)
    assert len(jobs) == ROWS
    latents.fill(jobs, [source], encoding)
    assert all(job.key in table for job in jobs)
    assert latents.table.get(jobs[-1].key).mean.shape == (4, 8, 8)
    for watched in (checking, encoding):
        assert len(watched.mib) == ROWS / 1000
        grown = max(watched.mib[5:]) - watched.mib[5]
        assert grown * 2**10 < 1.5 * 15_000, watched.mib
