"""The batches of a run, addressed by number: slots, and what is read of their images.

Everything that is drawn for a sample is a function of the run's seed and of where the sample
stands: what it looks like and is called (crop, flip, caption) of its epoch and entry, its noise,
timestep and latent of its position in the run. So neither workers nor processes, caches or resuming
change it, and any split of the same batch among processes trains on the same samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch.utils.data import Dataset

from sd_lora.data.batches.caption_rules import caption_of
from sd_lora.data.batches.epochs import BatchEntry, Epochs, MicroBatch
from sd_lora.data.cache.latents import LatentTable, LoadedImage
from sd_lora.data.images.buckets import Crop, CropSettings, Size
from sd_lora.data.sources.samples import Sample
from sd_lora.errors import RunError
from sd_lora.seeds import shuffled, uniform

MOST_SAMPLES = 1_000_000
"""Samples of a run whose captions are looked through before it."""


@dataclass(frozen=True, slots=True)
class BatchItem:
    """One sample of a batch.

    address: from which its noise, timestep and latents are drawn. kind: "instance" or "class".
    index: which sample of its kind. caption: None where it is dropped. frame, flip: what is seen of
    its image. weight: of its loss; 0 for what only fills a batch.
    """

    address: tuple[int | str, ...]
    kind: str
    index: int
    caption: str | None
    flip: bool
    crop: Crop
    weight: float


@dataclass(frozen=True)
class Batch:
    """One process's part of a micro-batch.

    seen: what was read for each slot. share: what Σ wᵢ·lᵢ is multiplied by, so that its mean over
    the processes and over the window's micro-batches is the optimiser step's Σ wᵢ·lᵢ / number of
    instance samples. window, last: how many micro-batches the step has, and whether this one ends
    it.
    """

    items: list[BatchItem]
    loaded: list[LoadedImage]
    loss_scale: float
    accumulation_steps: int
    last: bool

    def by_size(self) -> "list[Batch]":
        """Returns batches of one size each: class samples may have other shapes than instances."""
        groups: dict[Size, list[int]] = {}
        for i, item in enumerate(self.items):
            groups.setdefault(item.crop.size, []).append(i)
        return [self.part(indices) for indices in groups.values()]

    def part(self, indices: Sequence[int]) -> "Batch":
        """Returns the batch of some of its samples."""
        items, loaded = [self.items[i] for i in indices], [self.loaded[i] for i in indices]
        return replace(self, items=items, loaded=loaded)


class ImageSet:
    """The samples of one kind, with their buckets; makes slots of them.

    entries: the sample of each entry: all images once, then those that repeat once more, …

    Args:
        samples: their sizes are known.
        buckets: one for each.
        framing: how images get their shapes.
        seed: the run's.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        buckets: Sequence[Size],
        crop_settings: CropSettings,
        kind: str,
        seed: int,
    ) -> None:
        self.samples, self.buckets, self.crop_settings = samples, buckets, crop_settings
        self.kind, self.seed = kind, seed
        most = max(sample.source.repeats for sample in samples)
        self.entries = [
            index
            for round_ in range(most)
            for index, sample in enumerate(samples)
            if sample.source.repeats > round_
        ]

    def is_random(self, index: int) -> bool:
        """Whether an image's cut is drawn each time."""
        sample = self.samples[index]
        chosen = sample.source.random_crop
        return self.crop_settings.is_random(sample.size, self.buckets[index], chosen)

    def crop(self, index: int, address: tuple[int | str, ...] | None = None) -> Crop:
        """Returns what is seen of an image; address: from which a random cut is drawn."""
        u = None
        if self.is_random(index):
            if address is None:
                raise ValueError("a random cut needs an address")
            u = (uniform(*address, "crop"), uniform(*address, "crop", "top"))
        return self.crop_settings.crop(self.samples[index].size, self.buckets[index], u)

    def _address(self, place: BatchEntry, epoch: int) -> tuple[int | str, ...]:
        """Returns from where all is drawn that does not depend on the position in the run."""
        address = (self.seed, self.kind, epoch, place.entry)
        return (*address, "again", place.again) if place.again else address

    def caption(self, place: BatchEntry, epoch: int) -> str | None:
        """Returns the caption that is shown at a place, None where it is dropped."""
        sample = self.samples[self.entries[place.entry]]
        return caption_of(sample.captions, sample.source.rules, self._address(place, epoch))

    def item(self, place: BatchEntry, epoch: int, position: int | str) -> BatchItem:
        """Returns what stands at a place; position: the place's in the run."""
        index, address = self.entries[place.entry], self._address(place, epoch)
        sample = self.samples[index]
        return BatchItem(
            address=(self.seed, self.kind, "position", position),
            kind=self.kind,
            index=index,
            caption=self.caption(place, epoch),
            flip=sample.source.random_flip and uniform(*address, "flip") < 0.5,
            crop=self.crop(index, address),
            weight=sample.source.weight if place.counted else 0.0,
        )


class ClassOrder:
    """The endless order of the class samples: all of them in turn, shuffled each time around."""

    def __init__(self, samples: ImageSet) -> None:
        self.set = samples
        self._turn, self._order = -1, list[int]()

    def place(self, position: int) -> tuple[BatchEntry, int]:
        """Returns the place at a position of the endless order, and the turn that it is in."""
        turn, place = divmod(position, len(self.set.entries))
        if turn != self._turn:
            address = (self.set.seed, self.set.kind, "order", turn)
            self._order, self._turn = shuffled(len(self.set.entries), *address), turn
        return BatchEntry(self._order[place]), turn

    def item(self, position: int) -> BatchItem:
        """Returns what stands at a position of the endless order."""
        return self.set.item(*self.place(position), position)


class Stream(Dataset):
    """Micro-batches by number, of one process.

    Args:
        instance: the samples that are trained.
        epochs: their order.
        prior: the class samples, one beside each instance; None without.
        process, num_processes: which of P this is.
        table: what is read of images.
        length: number of micro-batches.
    """

    def __init__(
        self,
        instance: ImageSet,
        epochs: Epochs,
        prior: ImageSet | None,
        process: int,
        num_processes: int,
        table: LatentTable,
        length: int,
    ) -> None:
        self.instance, self.epochs, self.prior = instance, epochs, prior
        self.rotation = ClassOrder(prior) if prior else None
        self.process, self.num_processes = process, num_processes
        self.table, self.length = table, length

    def __len__(self) -> int:
        return self.length

    @property
    def sets(self) -> dict[str, ImageSet]:
        """Kind → samples."""
        return {s.kind: s for s in (self.instance, self.prior) if s}

    def items(self, micro: MicroBatch, indices: Sequence[int]) -> list[BatchItem]:
        """Returns the slots of some places: instances first, then a class sample for each."""
        instances, classes = [], []
        for i in indices:
            place = micro.places[i]
            # what does not count stands nowhere in the run
            where = micro.position + i if place.counted else f"{micro.position} + {i}"
            instances.append(self.instance.item(place, micro.epoch, where))
            if self.rotation:
                partner = self.rotation.item(micro.position + i)
                classes.append(partner if place.counted else replace(partner, weight=0.0))
        return [*instances, *classes]

    def captions(self, most: int) -> list[str | None] | None:
        """Returns the distinct captions of the run on all processes; None if there are more than
        `most`, or if the run is so long that looking for them takes a quarter of a minute."""
        if self.length * self.epochs.batch > MOST_SAMPLES:
            return None
        found: dict[str | None, None] = {}
        for number in range(self.length):
            micro = self.epochs.micro_batch(number)
            for i, place in enumerate(micro.places):
                found[self.instance.caption(place, micro.epoch)] = None
                if self.rotation:
                    partner = self.rotation.place(micro.position + i)
                    found[self.rotation.set.caption(*partner)] = None
            if len(found) > most:
                return None
        return list(found)

    def __getitem__(self, number: int) -> Batch | RunError:
        """Returns a micro-batch; an error as a value: a worker would raise it as a traceback."""
        try:
            return self.batch(number)
        except RunError as error:
            return error

    def batch(self, number: int) -> Batch:
        """Returns a micro-batch; raises RunError for an image that cannot be read."""
        micro = self.epochs.micro_batch(number)
        mine = micro.part_of(self.process, self.num_processes)
        items = self.items(micro, mine)
        if not mine:  # the others wait for this process's gradients: zeros
            items = [replace(item, weight=0.0) for item in self.items(micro, [0])]
        loss_scale = self.num_processes * micro.accumulation_steps / micro.step_samples
        return Batch(
            items, [self._load(s) for s in items], loss_scale, micro.accumulation_steps, micro.last
        )

    def _load(self, item: BatchItem) -> LoadedImage:
        sample = self.sets[item.kind].samples[item.index]
        random = self.sets[item.kind].is_random(item.index)
        return self.table.loaded(sample, item.crop, item.flip, random)
