"""Where a cache is kept: on disk, in memory, or nowhere."""

import math
import os
import shutil

import psutil

from sd_lora.data.batches.stream import ImageSet
from sd_lora.data.cache.store import Store
from sd_lora.files import mib

SPARE = 1 << 30
"""Bytes of a disk that a cache leaves free."""


def choose(needed: int, missing: int, store: Store, num_processes: int) -> tuple[str, str]:
    """The best place of a cache, "disk", "memory" or "no", and the reason if not the disk.

    Args:
        needed: its bytes.
        missing: bytes of entries that are not on the disk yet.
        store: the caches on disk.
        num_processes: number of processes, each with all of it in memory.
    """
    why = _no_disk(needed, missing, store)
    if not why:
        return "disk", ""
    if needed * num_processes < psutil.virtual_memory().available // 2:
        return "memory", why
    return "no", f"{why}, and {mib(needed * num_processes)} are more than half of the free memory"


def _no_disk(needed: int, missing: int, store: Store) -> str:
    """The reason against a cache on disk; empty if there is none."""
    if needed > store.limit:
        return f"{mib(needed)} are more than data_cache_limit, {mib(store.limit)}"
    try:
        store.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(store.folder).free
    except OSError as error:
        return f"{store.folder} cannot be made ({error.strerror})"
    if missing and not os.access(store.folder, os.W_OK):
        return f"{store.folder} cannot be written"
    if missing and missing + SPARE > free:
        return (
            f"{mib(missing)} do not fit on the disk of {store.folder}, which has {mib(free)} free"
        )
    return ""


def latent_bytes(images: ImageSet, channels: int, factor: int, width: int) -> int:
    """Bytes of the latents of some images.

    Args:
        images: those with fixed crops are counted, with their flips.
        channels, factor: of the VAE's latents, and pixels a latent.
        width: bytes a number.
    """
    total = 0
    for index, sample in enumerate(images.samples):
        if not images.is_random(index):
            latents = math.prod(images.buckets[index]) // factor**2
            total += 2 * channels * latents * width * (2 if sample.source.random_flip else 1)
    return total
