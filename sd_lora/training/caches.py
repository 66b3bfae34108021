"""Caches of a run: latents and text embeddings, on disk, in memory, or computed in each step."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import psutil
from accelerate import Accelerator
from accelerate.utils import gather_object

from sd_lora.config.schema import RunConfig, TrainConfig
from sd_lora.data.batches.stream import Stream
from sd_lora.data.cache.encode import Latents, vae_identity
from sd_lora.data.cache.latents import LatentTable, PixelSettings
from sd_lora.data.cache.placement import choose, latent_bytes
from sd_lora.data.cache.store import Store, default_folder
from sd_lora.data.cache.text_embeddings import Embeddings, identity_of
from sd_lora.data.check.usable import UsableImages
from sd_lora.errors import UsageError
from sd_lora.files import mib
from sd_lora.models.caption_encoder import Caption
from sd_lora.models.families import INPAINTING
from sd_lora.models.load import Parts
from sd_lora.report.events import Listener, tracked
from sd_lora.training.conditioning import TextConditioning, used_captions
from sd_lora.training.data import RunImages
from sd_lora.training.out_of_memory import memory_for
from sd_lora.training.processes import on_main
from sd_lora.transfer import brought

EXCHANGED_AT_ONCE = 64
"""Latents that processes exchange at once: 32 MiB of SDXL's."""

HELD_BYTES = 1 << 30
"""Most bytes of embeddings that stay in memory although the disk has them."""


def open_store(config: TrainConfig) -> Store:
    """The caches on disk."""
    folder = Path(config.data_cache_dir).expanduser() if config.data_cache_dir else default_folder()
    return Store(folder, int(config.data_cache_limit * (1 << 30)))


class Caches:
    """Latents and text embeddings of a run, computed where no cache has them.

    config, accelerator: of the run. store: the caches on disk. emit: takes progress events.
    rows, notes: their lines in the summary, filled by the methods.
    """

    def __init__(
        self, config: RunConfig, store: Store, accelerator: Accelerator, emit: Listener
    ) -> None:
        self.config, self.store, self.accelerator, self.emit = config, store, accelerator, emit
        self.rows: dict[str, str] = {}
        self.notes: list[str] = []

    def latents(self, images: RunImages, parts: Parts, pixel_settings: PixelSettings) -> Latents:
        """Latents of a run; those of fixed crops are computed now and cached.

        Raises:
            UsageError: a stream whose images a later step would need again.
            RunError: an image that cannot be read any more, or a latent that is not finite.
        """
        vae, device = parts.vae, self.accelerator.device
        sets = images.all
        size = (vae.config.latent_channels, pixel_settings.pixels_per_latent, vae.dtype.itemsize)
        needed = sum(latent_bytes(found.set, *size) for found in sets)
        asked = self.config.cache_latents
        identity = vae_identity(vae, device) if asked != "no" else ""
        on_disk = Latents(vae, device, LatentTable(pixel_settings, identity, "disk", self.store))

        def missing_bytes() -> int:
            jobs = [job for found in sets for job in on_disk.jobs(found.set)]
            return needed * sum(j.key not in on_disk.table for j in jobs) // max(1, len(jobs))

        mode, reason = self._placement(asked, needed, missing_bytes)
        inpaints = parts.task is INPAINTING
        _refuse_streams(images, mode, reason, inpaints)
        table = LatentTable(pixel_settings, identity, mode, self.store, fresh=inpaints)
        latents = Latents(vae, device, table)
        counts = [self._fill_latents(latents, found) for found in sets]
        kept, computed = (sum(count) for count in zip(*counts, strict=True))
        self._describe("latents", mode, reason, kept, computed)
        if mode != "no":
            brought(vae, "cpu")
        return latents

    def _placement(
        self, asked: str, needed: int, missing_bytes: Callable[[], int]
    ) -> tuple[str, str]:
        """Where a cache is kept, and the reason if not on disk: as asked, or chosen for "auto"."""

        def chosen() -> tuple[str, str]:
            if asked != "auto":
                return asked, ""
            return choose(needed, missing_bytes(), self.store, self.accelerator.num_processes)

        return on_main(self.accelerator, chosen)

    def _describe(self, name: str, mode: str, reason: str, kept: int, computed: int) -> None:
        """Add a cache's row, such as "on disk (…), 120 of 128 from before", and its note."""
        self.rows[name] = f"on disk ({self.store.folder}), {kept - computed} of {kept} from before"
        if mode == "memory":
            self.rows[name] = "in memory"
        if mode == "no" or not kept:
            self.rows[name] = "computed in each step"
        if reason:
            self.notes.append(f"{name} are not cached on disk: {reason}")

    def _fill_latents(self, latents: Latents, found: UsableImages) -> tuple[int, int]:
        """Compute the missing latents of some images, each process a part; returns how many are
        kept, and how many were computed."""
        accelerator = self.accelerator
        jobs = latents.jobs(found.set)
        # the main process decides: meanwhile others write, of this run or of another
        missing = on_main(accelerator, lambda: [j for j in jobs if j.key not in latents.table])
        part, parts = accelerator.process_index, accelerator.num_processes
        mine = missing[part * len(missing) // parts : (part + 1) * len(missing) // parts]

        def progress(done: Iterator[None]) -> Iterable[None]:
            return tracked(done, self.emit, f"{found.set.kind} latents", len(mine))

        latents.fill(mine, found.sources, progress)
        if latents.table.mode == "memory" and parts > 1:
            self._exchange(latents.table, [job.key for job in mine], -(-len(missing) // parts))
        accelerator.wait_for_everyone()
        return len(jobs), len(missing)

    def _exchange(self, table: LatentTable, mine: list[str], most: int) -> None:
        """Give all processes the latents that each has encoded, `most` of them at most; a few at a
        time, since each message is copied several times."""
        for start in range(0, most, EXCHANGED_AT_ONCE):
            keys = mine[start : start + EXCHANGED_AT_ONCE]
            table.memory |= dict(gather_object([(key, table.memory[key]) for key in keys]))

    def can_hold(self, text: TextConditioning) -> bool:
        """Whether each process may keep all embeddings in memory."""
        needed = text.num_bytes() * self.accelerator.num_processes
        wanted = self.config.cache_text_embeddings != "no"
        return wanted and needed < psutil.virtual_memory().available // 2

    def embeddings(
        self, text: TextConditioning, stream: Stream, validated: Sequence[Caption], draws: bool
    ) -> None:
        """Encode the captions where nothing learns, and free the text encoders that nothing uses.

        validated: captions of the validation's images. draws: whether this process draws samples.
        """
        if text.will_freeze:
            used = used_captions(stream)
            text.captions = None if used is None else [*dict.fromkeys([*used, *validated])]
            if text.learning and not self.can_hold(text):
                text.captions = None  # encoded in each step, also after the encoders stopped
        if text.learning:
            return
        with memory_for("encoding captions", self.config):
            self.fill_embeddings(text)
        if not ((self.config.draws_samples or self.config.score_features) and draws):
            text.free_encoders()

    def fill_embeddings(self, text: TextConditioning) -> None:
        """Encode the captions that no cache has; the text encoders then leave the device."""
        captions = text.captions
        if captions is None:
            self.rows["text embeddings"] = "computed in each step: captions vary too much to keep"
            return
        needed = text.num_bytes()
        asked = self.config.cache_text_embeddings
        identity = ""
        if asked in ("auto", "disk"):
            identity = identity_of(text.caption_encoder, text.encoders, text.dtype, text.device)
        on_disk = Embeddings(identity, self.store)

        def missing_bytes() -> int:
            return needed * len(on_disk.missing(captions)) // len(captions)

        mode, reason = self._placement(asked, needed, missing_bytes)
        computed = 0
        if mode != "no":
            table = on_disk if mode == "disk" else Embeddings(identity, None)
            computed = self._fill_table(text, table, captions)
            if mode == "disk" and needed < HELD_BYTES:
                table.hold(captions)
        self._describe("text embeddings", mode, reason, len(captions), computed)

    def _fill_table(
        self, text: TextConditioning, table: Embeddings, captions: list[str | None]
    ) -> int:
        """Encode the captions that a table lacks; returns how many these are."""
        missing = mine = on_main(self.accelerator, lambda: table.missing(captions))
        if table.may_lose:  # on disk each process encodes a part; in memory each needs all
            mine = missing[self.accelerator.process_index :: self.accelerator.num_processes]
        text.fill(
            table, mine, lambda items: tracked(items, self.emit, "captions", len(items), "caption")
        )
        self.accelerator.wait_for_everyone()
        return len(missing)

    def make_room(self, images: RunImages, latents: Latents, text: TextConditioning) -> None:
        """Remove the longest unused entries of the caches on disk, beyond their limit."""
        store = self.store

        def evict() -> str:
            jobs = [job for found in images.all for job in latents.jobs(found.set)]
            keep = {job.key for job in jobs} | {f"facts/{job.sample.digest}" for job in jobs}
            if text.table:
                keep |= {text.table.key(caption) for caption in text.captions or ()}
            count, size = store.evict(keep)
            if count:
                return (
                    f"{count} entries ({mib(size)}), the longest unused ones, were removed from "
                    f"the cache {store.folder}: data_cache_limit is {mib(store.limit)}"
                )
            used = store.size()
            if used <= store.limit:
                return ""
            return (
                f"the cache {store.folder} takes {mib(used)} for this run, more than "
                f"data_cache_limit, {mib(store.limit)}"
            )

        note = on_main(self.accelerator, evict)
        self.notes += [note] if note else []


def _refuse_streams(images: RunImages, mode: str, reason: str, inpaints: bool) -> None:
    """Raise UsageError for a stream whose images a later step would need again."""
    streamed = [
        (found.set, index)
        for found in images.all
        for index, sample in enumerate(found.set.samples)
        if sample.source.streaming
    ]
    reasons = [f"cache_latents is no{': ' * bool(reason)}{reason}"] if mode == "no" else []
    reasons += ["they are cropped at random"] if any(s.is_random(i) for s, i in streamed) else []
    reasons += ["inpainting needs them in each step"] if inpaints else []
    if streamed and reasons:
        raise UsageError(
            f"the images of a stream can be read once only, and {' and '.join(reasons)}. Take "
            "the set without streaming, or cache its latents, cropped from the middle"
        )
