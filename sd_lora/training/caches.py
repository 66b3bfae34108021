"""The images of a run and where their latents and the captions' embeddings are kept."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from sd_lora.config.schema import TrainConfig
from sd_lora.config.sources import Kind
from sd_lora.data.batches.stream import ImageSet
from sd_lora.data.cache.encode import Latents, vae_identity
from sd_lora.data.cache.latents import LatentTable, PixelSettings
from sd_lora.data.cache.placement import choose, latent_bytes
from sd_lora.data.cache.store import Store, default_folder
from sd_lora.data.cache.text_embeddings import Embeddings, identity_of
from sd_lora.data.check.usable import UsableImages, usable_images
from sd_lora.data.images.buckets import CropSettings
from sd_lora.data.sources.open import open_source
from sd_lora.data.sources.samples import Source
from sd_lora.errors import UsageError
from sd_lora.files import mib
from sd_lora.models.caption_encoder import CaptionEncoder
from sd_lora.models.families import INPAINTING
from sd_lora.models.load import Parts
from sd_lora.report import summary as report
from sd_lora.training.class_images import has_class_images
from sd_lora.training.conditioning import TextConditioning
from sd_lora.training.data import class_spec, find_sources
from sd_lora.training.processes import on_main, weight_dtype

EXCHANGED = 64
"""Latents that processes exchange at once: 32 MiB of SDXL's."""

HELD = 1 << 30
"""Bytes of embeddings that are held in memory although they are on the disk, too."""


def open_store(config: TrainConfig) -> Store:
    """Returns the caches on disk."""
    folder = Path(config.data_cache_dir).expanduser() if config.data_cache_dir else default_folder()
    return Store(folder, int(config.data_cache_limit * (1 << 30)))


class Data:
    """The images of a run, by kind, and its caches.

    images: "instance", and "class" where there is prior preservation. rows, notes: what the
    summary says of the caches.
    """

    def __init__(
        self,
        config: TrainConfig,
        crop_settings: CropSettings,
        seed: int,
        store: Store,
        accelerator: Accelerator,
        caption_encoder: CaptionEncoder,
    ) -> None:
        self.config, self.crop_settings, self.seed = config, crop_settings, seed
        self.store, self.accelerator, self.caption_encoder = store, accelerator, caption_encoder
        self.images: dict[str, UsableImages] = {}
        self.rows: dict[str, str] = {}
        self.notes: list[str] = []

    @property
    def instances(self) -> ImageSet:
        """What is trained."""
        return self.images["instance"].set

    def check_sources(self) -> None:
        """Checks all images that are there from the start.

        Raises:
            UsageError, RunError: sources that cannot be read, or nothing that can be trained.
        """
        sources = find_sources(self.config, self.seed)
        of_class = [source for source in sources if source.spec.kind == "class"]
        self._check([s for s in sources if s.spec.kind == "instance"], "instance")
        if of_class:
            self._check(of_class, "class")
        prior = self.config.with_prior_preservation
        if prior and on_main(self.accelerator, lambda: has_class_images(self.config)):
            self.check_class_folder(may_be_none=True)

    def check_class_folder(self, may_be_none: bool = False) -> None:
        """Checks the folder of class images: what is there from the start, and again when it was
        filled."""
        self._check(open_source(class_spec(self.config)), "class", may_be_none)

    @property
    def num_class_images(self) -> int:
        """How many class images can be trained."""
        return len(self.images["class"].set.samples) if "class" in self.images else 0

    def _check(self, sources: list[Source], kind: Kind, may_be_none: bool = False) -> None:
        beside = self.instances.samples if kind == "class" else ()
        found = usable_images(
            self.config, sources, kind, self.crop_settings, self.seed, self.store,
            self.caption_encoder, report.checking, beside,
            once=lambda work: on_main(self.accelerator, work), may_be_none=may_be_none,
        )  # fmt: skip
        if found:
            self.images[kind] = found

    def latents(self, parts: Parts, pixel_settings: PixelSettings) -> Latents:
        """Returns the run's latents, those computed and kept that can be.

        Raises:
            RunError: an image that cannot be read any more, or whose latent is not finite.
        """
        vae, accelerator = parts.vae, self.accelerator
        width = torch.finfo(vae.dtype).bits // 8
        size = (vae.config.latent_channels, pixel_settings.pixels_per_latent, width)
        needed = sum(latent_bytes(p.set, *size) for p in self.images.values())
        asked = self.config.cache_latents
        identity = vae_identity(vae, accelerator.device) if asked != "no" else ""
        on_disk = Latents(
            vae, accelerator.device, LatentTable(pixel_settings, identity, "disk", self.store)
        )

        def chosen() -> tuple[str, str]:
            if asked != "auto":
                return asked, ""
            jobs = [job for p in self.images.values() for job in on_disk.jobs(p.set)]
            missing = sum(job.key not in on_disk.table for job in jobs)
            return self._choose(needed, needed * missing // max(1, len(jobs)))

        mode, why = on_main(accelerator, chosen)
        inpaints = parts.task is INPAINTING
        self._refuse_streams(mode, why, inpaints)
        table = LatentTable(pixel_settings, identity, mode, self.store, fresh=inpaints)
        latents = Latents(vae, accelerator.device, table)
        there = {kind: self._fill(latents, p) for kind, p in self.images.items()}
        known, computed = (sum(count) for count in zip(*there.values(), strict=True))
        self.rows["latents"] = _described(mode, known, computed, self.store)
        if why:
            self.notes.append(f"latents are not cached on disk: {why}")
        if mode != "no":
            vae.to("cpu")
        return latents

    def _refuse_streams(self, mode: str, why: str, inpaints: bool) -> None:
        """Raises UsageError for a stream whose images would be needed again."""
        streams = [
            (p.set, i)
            for p in self.images.values()
            for i, sample in enumerate(p.set.samples)
            if sample.source.streaming
        ]
        reasons = [f"cache_latents is no{': ' * bool(why)}{why}"] if mode == "no" else []
        reasons += ["they are cropped at random"] if any(s.is_random(i) for s, i in streams) else []
        reasons += ["inpainting needs them each time"] if inpaints else []
        if streams and reasons:
            raise UsageError(
                f"the images of a stream cannot be read again, and {' and '.join(reasons)}. Take "
                "the set without streaming, or let its latents be cached, cut from the middle"
            )

    def _choose(self, needed: int, missing: int) -> tuple[str, str]:
        return choose(needed, missing, self.store, self.accelerator.num_processes)

    def _fill(self, latents: Latents, images: UsableImages) -> tuple[int, int]:
        """Returns how many latents are kept of some images, and how many were computed now."""
        accelerator = self.accelerator
        whole = latents.jobs(images.set)
        # the main process says what is missing: meanwhile others write, of this run or another
        jobs = on_main(accelerator, lambda: [j for j in whole if j.key not in latents.table])
        part, parts = accelerator.process_index, accelerator.num_processes
        mine = jobs[part * len(jobs) // parts : (part + 1) * len(jobs) // parts]

        def bar(done: Iterator[None]) -> Iterable[None]:
            shown = accelerator.is_main_process and bool(mine)
            return report.counting(done, f"{images.set.kind} latents", len(mine), shown)

        latents.fill(mine, images.sources, bar)
        if latents.table.mode == "memory" and parts > 1:
            self._exchange(latents.table, [job.key for job in mine], -(-len(jobs) // parts))
        accelerator.wait_for_everyone()
        return len(whole), len(jobs)

    def _exchange(self, table: LatentTable, mine: list[str], most: int) -> None:
        """Gives all processes what each of them has encoded, `most` of them at most, a few at a
        time: what is sent is copied several times."""
        for start in range(0, most, EXCHANGED):
            keys = mine[start : start + EXCHANGED]
            table.memory |= dict(gather_object([(key, table.memory[key]) for key in keys]))

    def can_hold(self, texts: TextConditioning) -> bool:
        """Whether embeddings may be kept in the memory of each process."""
        needed = texts.bytes_of(weight_dtype(self.accelerator)) * self.accelerator.num_processes
        wanted = self.config.cache_text_embeddings != "no"
        return wanted and needed < psutil.virtual_memory().available // 2

    def fill_texts(self, texts: TextConditioning) -> None:
        """Reads the captions that are not known, where they can be kept; the encoders then leave
        the device."""
        device, dtype = self.accelerator.device, weight_dtype(self.accelerator)
        captions = texts.captions
        if captions is None:
            self.rows["text embeddings"] = "computed in each step: captions vary too much to keep"
            return
        needed = texts.bytes_of(dtype)
        asked = self.config.cache_text_embeddings
        to_disk = asked in ("auto", "disk")
        identity = (
            identity_of(texts.caption_encoder, texts.encoders, dtype, device) if to_disk else ""
        )

        def chosen() -> tuple[str, str]:
            if asked != "auto":
                return asked, ""
            missing = len(Embeddings(identity, self.store).missing(captions))
            return self._choose(needed, needed * missing // len(captions))

        mode, why = on_main(self.accelerator, chosen)
        if why:
            self.notes.append(f"text embeddings are not cached on disk: {why}")
        known, computed = len(captions), 0
        if mode != "no":
            store = self.store if mode == "disk" else None
            table = Embeddings(identity, store)
            shown = self.accelerator.is_main_process
            missing = on_main(self.accelerator, lambda: table.missing(captions))
            computed = len(missing)
            if store:  # all read a part of them; in memory, each needs all
                part, parts = self.accelerator.process_index, self.accelerator.num_processes
                missing = missing[part::parts]
            texts.fill(
                device, dtype, table, missing,
                lambda items: report.counting(items, "captions", len(items), shown),
            )  # fmt: skip
            self.accelerator.wait_for_everyone()
            if store and needed < HELD:
                table.hold(captions)
        self.rows["text embeddings"] = _described(mode, known, computed, self.store)

    def make_room(self, latents: Latents, texts: TextConditioning) -> None:
        """Removes what no run used for longest from the caches on disk, beyond their limit."""
        store = self.store

        def evict() -> str:
            jobs = [job for p in self.images.values() for job in latents.jobs(p.set)]
            keep = {job.key for job in jobs} | {f"facts/{job.sample.digest}" for job in jobs}
            if texts.table:
                keep |= {texts.table.key(caption) for caption in texts.captions or ()}
            count, size = store.evict(keep)
            if not count:
                used = store.size()
                if used <= store.limit:
                    return ""
                return (
                    f"the cache {store.folder} takes {mib(used)} for this run, more than "
                    f"data_cache_limit, {mib(store.limit)}"
                )
            return (
                f"{count} entries ({mib(size)}) that no run used for longest were removed from the "
                f"cache {store.folder}: data_cache_limit is {mib(store.limit)}"
            )

        note = on_main(self.accelerator, evict)
        self.notes += [note] if note else []


def _described(mode: str, known: int, computed: int, store: Store) -> str:
    """Returns "on disk (…), 120 of 128 there already"."""
    if mode == "no" or not known:
        return "computed in each step"
    if mode == "memory":
        return "in memory"
    return f"on disk ({store.folder}), {known - computed} of {known} were there"
