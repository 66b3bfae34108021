"""The batches of a run, addressed by number: slots, and what is read of their pictures.

Everything that is drawn for a sample is a function of the run's seed and of where the sample
stands: what it looks like and is called (crop, flip, caption) of its epoch and entry, its noise,
timestep and latent of its position in the run. So neither workers nor processes, caches or resuming
change it, and any split of the same batch among processes trains on the same samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch.utils.data import Dataset

from sd_lora.data.buckets import Frame, Framing, Size
from sd_lora.data.captions import caption_of
from sd_lora.data.epochs import Epochs, MicroBatch, Place
from sd_lora.data.latents import LatentTable, Seen
from sd_lora.data.samples import Sample
from sd_lora.errors import RunError
from sd_lora.seeds import shuffled, uniform

MOST_SAMPLES = 1_000_000
"""Samples of a run whose captions are looked through before it."""


@dataclass(frozen=True, slots=True)
class Slot:
    """One sample of a batch.

    address: from which its noise, timestep and latents are drawn. kind: "instance" or "class".
    index: which sample of its kind. caption: None where it is dropped. frame, flip: what is seen of
    its picture. weight: of its loss; 0 for what only fills a batch.
    """

    address: tuple[int | str, ...]
    kind: str
    index: int
    caption: str | None
    flip: bool
    frame: Frame
    weight: float


@dataclass(frozen=True)
class Batch:
    """One process's part of a micro-batch.

    seen: what was read for each slot. share: what Σ wᵢ·lᵢ is multiplied by, so that its mean over
    the processes and over the window's micro-batches is the optimiser step's Σ wᵢ·lᵢ / number of
    instance samples. window, last: how many micro-batches the step has, and whether this one ends
    it.
    """

    slots: list[Slot]
    seen: list[Seen]
    share: float
    window: int
    last: bool

    def by_size(self) -> "list[Batch]":
        """Returns batches of one size each: class samples may have other shapes than instances."""
        groups: dict[Size, list[int]] = {}
        for i, slot in enumerate(self.slots):
            groups.setdefault(slot.frame.size, []).append(i)
        return [self.part(indices) for indices in groups.values()]

    def part(self, indices: Sequence[int]) -> "Batch":
        """Returns the batch of some of its samples."""
        slots, seen = [self.slots[i] for i in indices], [self.seen[i] for i in indices]
        return replace(self, slots=slots, seen=seen)


class Set:
    """The samples of one kind, with their buckets; makes slots of them.

    entries: the sample of each entry: all pictures once, then those that repeat once more, …

    Args:
        samples: their sizes are known.
        buckets: one for each.
        framing: how pictures get their shapes.
        seed: the run's.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        buckets: Sequence[Size],
        framing: Framing,
        kind: str,
        seed: int,
    ) -> None:
        self.samples, self.buckets, self.framing = samples, buckets, framing
        self.kind, self.seed = kind, seed
        most = max(sample.source.repeats for sample in samples)
        self.entries = [
            index
            for round_ in range(most)
            for index, sample in enumerate(samples)
            if sample.source.repeats > round_
        ]

    def is_random(self, index: int) -> bool:
        """Whether a picture's cut is drawn each time."""
        sample = self.samples[index]
        chosen = sample.source.random_crop
        return self.framing.is_random(sample.size, self.buckets[index], chosen)

    def frame(self, index: int, address: tuple[int | str, ...] | None = None) -> Frame:
        """Returns what is seen of a picture; address: from which a random cut is drawn."""
        u = None
        if self.is_random(index):
            if address is None:
                raise ValueError("a random cut needs an address")
            u = (uniform(*address, "crop"), uniform(*address, "crop", "top"))
        return self.framing.frame(self.samples[index].size, self.buckets[index], u)

    def _address(self, place: Place, epoch: int) -> tuple[int | str, ...]:
        """Returns from where all is drawn that does not depend on the position in the run."""
        address = (self.seed, self.kind, epoch, place.entry)
        return (*address, "again", place.again) if place.again else address

    def caption(self, place: Place, epoch: int) -> str | None:
        """Returns the caption that is shown at a place, None where it is dropped."""
        sample = self.samples[self.entries[place.entry]]
        return caption_of(sample.captions, sample.source.rules, self._address(place, epoch))

    def slot(self, place: Place, epoch: int, position: int | str) -> Slot:
        """Returns what stands at a place; position: the place's in the run."""
        index, address = self.entries[place.entry], self._address(place, epoch)
        sample = self.samples[index]
        return Slot(
            address=(self.seed, self.kind, "position", position),
            kind=self.kind,
            index=index,
            caption=self.caption(place, epoch),
            flip=sample.source.random_flip and uniform(*address, "flip") < 0.5,
            frame=self.frame(index, address),
            weight=sample.source.weight if place.counted else 0.0,
        )


class Rotation:
    """The endless order of the class samples: all of them in turn, shuffled each time around."""

    def __init__(self, samples: Set) -> None:
        self.set = samples
        self._turn, self._order = -1, list[int]()

    def place(self, position: int) -> tuple[Place, int]:
        """Returns the place at a position of the endless order, and the turn that it is in."""
        turn, place = divmod(position, len(self.set.entries))
        if turn != self._turn:
            address = (self.set.seed, self.set.kind, "order", turn)
            self._order, self._turn = shuffled(len(self.set.entries), *address), turn
        return Place(self._order[place]), turn

    def slot(self, position: int) -> Slot:
        """Returns what stands at a position of the endless order."""
        return self.set.slot(*self.place(position), position)


class Stream(Dataset):
    """Micro-batches by number, of one process.

    Args:
        instance: the samples that are trained.
        epochs: their order.
        prior: the class samples, one beside each instance; None without.
        process, num_processes: which of P this is.
        table: what is read of pictures.
        length: number of micro-batches.
    """

    def __init__(
        self,
        instance: Set,
        epochs: Epochs,
        prior: Set | None,
        process: int,
        num_processes: int,
        table: LatentTable,
        length: int,
    ) -> None:
        self.instance, self.epochs, self.prior = instance, epochs, prior
        self.rotation = Rotation(prior) if prior else None
        self.process, self.num_processes = process, num_processes
        self.table, self.length = table, length

    def __len__(self) -> int:
        return self.length

    @property
    def sets(self) -> dict[str, Set]:
        """Kind → samples."""
        return {s.kind: s for s in (self.instance, self.prior) if s}

    def slots(self, micro: MicroBatch, indices: Sequence[int]) -> list[Slot]:
        """Returns the slots of some places: instances first, then a class sample for each."""
        instances, classes = [], []
        for i in indices:
            place = micro.places[i]
            # what does not count stands nowhere in the run
            where = micro.position + i if place.counted else f"{micro.position} + {i}"
            instances.append(self.instance.slot(place, micro.epoch, where))
            if self.rotation:
                partner = self.rotation.slot(micro.position + i)
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
        """Returns a micro-batch; raises RunError for a picture that cannot be read."""
        micro = self.epochs.micro_batch(number)
        mine = micro.share(self.process, self.num_processes)
        slots = self.slots(micro, mine)
        if not mine:  # the others wait for this process's gradients: zeros
            slots = [replace(slot, weight=0.0) for slot in self.slots(micro, [0])]
        share = self.num_processes * micro.window / micro.step_samples
        return Batch(slots, [self._seen(s) for s in slots], share, micro.window, micro.last)

    def _seen(self, slot: Slot) -> Seen:
        sample = self.sets[slot.kind].samples[slot.index]
        random = self.sets[slot.kind].is_random(slot.index)
        return self.table.seen(sample, slot.frame, slot.flip, random)
