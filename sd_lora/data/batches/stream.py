"""The batches of a run, addressed by number: batch items, and their loaded images.

Every draw for a sample is a function of the run's seed and the sample's place: crop, flip and
caption of its epoch and entry, noise, timestep and latent of its position in the run. So neither
workers nor processes, caches or resuming change a draw, and any split of a batch among processes
trains on the same samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch.utils.data import Dataset

from sd_lora.data.batches.caption_rules import caption_of
from sd_lora.data.batches.epochs import BatchEntry, Epochs, MicroBatch
from sd_lora.data.batches.preservation import Preservation
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

    address: seeds its noise, timestep and latents. kind: "instance" or "class". index: of the
    sample in its kind. caption: None where it is dropped. crop, flip: of its image. weight: of its
    loss, final; 0 for a filling. stratum: its index among the samples of its optimiser step, and
    their number; None for a filling. preserves: whether its target is the base model's answer.
    """

    address: tuple[int | str, ...]
    kind: str
    index: int
    caption: str | None
    flip: bool
    crop: Crop
    weight: float
    stratum: tuple[int, int] | None = None
    preserves: bool = False


@dataclass(frozen=True)
class Batch:
    """One process's part of a micro-batch.

    loaded: the loaded image of each item. loss_scale: factor of Σ wᵢ·lᵢ: with it the mean over the
    processes and the step's micro-batches is Σ wᵢ·lᵢ / number of instance samples of the optimiser
    step. accumulation_steps: micro-batches of the step. last: whether this one ends it.
    """

    items: list[BatchItem]
    loaded: list[LoadedImage]
    loss_scale: float
    accumulation_steps: int
    last: bool

    def by_size(self, most: int | None = None) -> "list[Batch]":
        """Batches of one size each: class samples may have other shapes than instances.

        most: samples of each; None: all of its size.
        """
        groups: dict[Size, list[int]] = {}
        for i, item in enumerate(self.items):
            groups.setdefault(item.crop.size, []).append(i)
        return [
            self.part(indices[start : start + (most or len(indices))])
            for indices in groups.values()
            for start in range(0, len(indices), most or len(indices))
        ]

    def part(self, indices: Sequence[int]) -> "Batch":
        """The batch of some of its samples."""
        items, loaded = [self.items[i] for i in indices], [self.loaded[i] for i in indices]
        return replace(self, items=items, loaded=loaded)


class ImageSet:
    """The samples of one kind, with their buckets; makes batch items of them.

    entries: the sample of each entry: all images once, then the repeated ones once more, …

    Args:
        samples: with known sizes.
        buckets: one for each.
        crop_settings: shapes of images.
        seed: of the run.
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
        """Whether an image's crop is random; not one by hand."""
        sample = self.samples[index]
        if sample.hand_crop is not None:
            return False
        chosen = sample.source.random_crop
        return self.crop_settings.is_random(sample.size, self.buckets[index], chosen)

    def crop(self, index: int, address: tuple[int | str, ...] | None = None) -> Crop:
        """The crop of an image; address: seeds a random crop."""
        u = None
        if self.is_random(index):
            if address is None:
                raise ValueError("a random crop needs an address")
            u = (uniform(*address, "crop"), uniform(*address, "crop", "top"))
        return self._crop(index, u)

    def shown_crop(self, index: int) -> Crop:
        """The crop of an image; the middle one for random crops."""
        return self._crop(index, None)

    def _crop(self, index: int, u: tuple[float, float] | None) -> Crop:
        sample = self.samples[index]
        return self.crop_settings.crop(sample.size, self.buckets[index], u, sample.hand_crop)

    def _address(self, entry: BatchEntry, epoch: int) -> tuple[int | str, ...]:
        """The address of all draws that do not depend on the position in the run."""
        address = (self.seed, self.kind, epoch, entry.entry)
        return (*address, "again", entry.again) if entry.again else address

    def caption(self, entry: BatchEntry, epoch: int) -> str | None:
        """The caption of an entry, None where it is dropped."""
        sample = self.samples[self.entries[entry.entry]]
        return caption_of(sample.captions, sample.source.rules, self._address(entry, epoch))

    def item(
        self,
        entry: BatchEntry,
        epoch: int,
        position: int | str,
        stratum: tuple[int, int] | None = None,
    ) -> BatchItem:
        """The batch item of an entry. position: of the entry in the run. stratum: see
        `BatchItem`."""
        index, address = self.entries[entry.entry], self._address(entry, epoch)
        sample = self.samples[index]
        return BatchItem(
            address=(self.seed, self.kind, "position", position),
            kind=self.kind,
            index=index,
            caption=self.caption(entry, epoch),
            flip=sample.source.random_flip and uniform(*address, "flip") < 0.5,
            crop=self.crop(index, address),
            weight=sample.source.weight if entry.counted else 0.0,
            stratum=stratum,
        )


class ClassOrder:
    """The endless order of the class samples: all of them in turn, shuffled each time around."""

    def __init__(self, samples: ImageSet) -> None:
        self.set = samples
        self._turn, self._order = -1, list[int]()

    def place(self, position: int) -> tuple[BatchEntry, int]:
        """The entry at a position of the endless order, and its turn."""
        turn, entry = divmod(position, len(self.set.entries))
        if turn != self._turn:
            address = (self.set.seed, self.set.kind, "order", turn)
            self._order, self._turn = shuffled(len(self.set.entries), *address), turn
        return BatchEntry(self._order[entry]), turn

    def item(self, position: int, stratum: tuple[int, int] | None = None) -> BatchItem:
        """The batch item at a position of the endless order. stratum: see `BatchItem`."""
        return self.set.item(*self.place(position), position, stratum)


class Stream(Dataset):
    """Micro-batches by number, of one process.

    Args:
        instance: the instances.
        epochs: their order.
        prior: the class samples, one beside each instance; None without.
        process, num_processes: index of this process, of P.
        table: loads images.
        length: number of micro-batches.
        class_weight: factor of the class samples' weights (prior_loss_weight).
        preservation: captions preserved beside each instance; None without.

    redrawn: first position, and that after the last one, of each part of the run whose noise and
    timesteps are drawn anew.
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
        class_weight: float = 1.0,
        preservation: Preservation | None = None,
    ) -> None:
        self.instance, self.epochs, self.prior = instance, epochs, prior
        self.class_order = ClassOrder(prior) if prior else None
        self.process, self.num_processes = process, num_processes
        self.table, self.length, self.class_weight = table, length, class_weight
        self.preservation = preservation
        self.redrawn: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return self.length

    @property
    def sets(self) -> dict[str, ImageSet]:
        """Kind → samples."""
        return {s.kind: s for s in (self.instance, self.prior) if s}

    def items(self, micro: MicroBatch, indices: Sequence[int]) -> list[BatchItem]:
        """Items of some entries: instances first, then a class sample for each, then the instances
        once more with their preserved captions."""
        instances, classes = [], []
        for i in indices:
            entry = micro.entries[i]
            where = self._position(micro, i)
            index = micro.position + i - micro.step_position
            stratum = (index, micro.step_samples) if entry.counted else None
            instances.append(self.instance.item(entry, micro.epoch, where, stratum))
            if self.class_order:
                partner = self.class_order.item(micro.position + i, stratum)
                weight = partner.weight * self.class_weight if entry.counted else 0.0
                classes.append(replace(partner, weight=weight))
        preserved = [p for item in instances for p in self._preserved(item)]
        return [
            self._drawn(item, self.draw_of(micro)) for item in (*instances, *classes, *preserved)
        ]

    @staticmethod
    def _position(micro: MicroBatch, i: int) -> int | str:
        """The position of a micro-batch's entry in the run; fillings have none."""
        return micro.position + i if micro.entries[i].counted else f"{micro.position} + {i}"

    def draw_of(self, micro: MicroBatch) -> int:
        """How often the noise of a micro-batch was drawn anew."""
        return sum(first <= micro.step_position < last for first, last in self.redrawn)

    @staticmethod
    def _drawn(item: BatchItem, draw: int) -> BatchItem:
        """An item with the address of its draw; captions and crops stay, which may be cached."""
        if not draw:
            return item
        seed, kind, word, position = item.address
        return replace(item, address=(seed, kind, f"{word} {draw}", position))

    def _preserved(self, item: BatchItem) -> list[BatchItem]:
        """The items that preserve the base beside an instance: same image, noise and timestep."""
        weight = item.weight * self.preservation.weight if self.preservation else 0.0
        return [
            replace(item, caption=caption, weight=weight, preserves=True)
            for caption in self._preserved_captions(item.caption, item.index, item.address[-1])
        ]

    def _preserved_captions(
        self, caption: str | None, index: int, use: int | str
    ) -> list[str | None]:
        """The captions preserved beside an instance's. index: of its sample. use: its position."""
        if self.preservation is None:
            return []
        rules = self.instance.samples[index].source.rules
        return self.preservation.captions(caption, rules, use)

    def items_of(self, number: int) -> list[BatchItem]:
        """The items of a micro-batch on all processes, without their images."""
        micro = self.epochs.micro_batch(number)
        return self.items(micro, range(len(micro.entries)))

    def sizes_of(self, number: int) -> list[list[Size]]:
        """The sizes of each process's items of a micro-batch; of items that are preserved where
        no caption is dropped."""
        micro = self.epochs.micro_batch(number)
        found = []
        for process in range(self.num_processes):
            mine = micro.part_of(process, self.num_processes) or range(1)
            entries = [self.instance.entries[micro.entries[i].entry] for i in mine]
            sizes = [self.instance.buckets[i] for i in entries] * (2 if self.preservation else 1)
            if self.class_order and self.prior:
                partners = [self.class_order.place(micro.position + i)[0].entry for i in mine]
                sizes += [self.prior.buckets[self.prior.entries[entry]] for entry in partners]
            found.append(sizes)
        return found

    def captions(self, most: int) -> list[str | None] | None:
        """The distinct captions of the run on all processes; None if there are more than `most`, or
        if finding them would take more than a quarter of a minute.
        """
        if self.length * self.epochs.batch > MOST_SAMPLES:
            return None
        found: dict[str | None, None] = {}
        for number in range(self.length):
            micro = self.epochs.micro_batch(number)
            for i, entry in enumerate(micro.entries):
                caption = self.instance.caption(entry, micro.epoch)
                index = self.instance.entries[entry.entry]
                use = self._position(micro, i)
                found |= dict.fromkeys([caption, *self._preserved_captions(caption, index, use)])
                if self.class_order:
                    partner = self.class_order.place(micro.position + i)
                    found[self.class_order.set.caption(*partner)] = None
            if len(found) > most:
                return None
        return list(found)

    def __getitem__(self, number: int) -> Batch | RunError:
        """A micro-batch, or an error as a value: a worker would raise it as a traceback."""
        try:
            return self.batch(number)
        except RunError as error:
            return error

    def batch(self, number: int) -> Batch:
        """A micro-batch; raises RunError for an image that cannot be read."""
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
