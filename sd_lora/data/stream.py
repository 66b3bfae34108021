"""Which sample stands where: the endless, seeded order of a run, addressed by position.

Position p of the stream is epoch p // n, and within it the (p % n)-th of that epoch's own
permutation: every epoch shows every picture exactly `repeats` times, and nothing is dropped at an
epoch's end, because batches run on into the next. Micro-batch m of P processes with B samples
each holds the positions m·P·B … (m+1)·P·B - 1, so that any split of the same global batch among
processes and accumulation steps trains on the same samples with the same noise.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.utils.data import Dataset

from sd_lora.data.images import Framing
from sd_lora.data.sources import Sample
from sd_lora.errors import RunError
from sd_lora.seeds import seed_for, shuffled, uniform


@dataclass(frozen=True)
class Slot:
    """One sample of a batch.

    address: from which its noise, timestep and latents are drawn. kind: "instance" or "class".
    index: which sample of its kind. caption: None where it is dropped. crop: in [0, 1), where a
    random crop lies.
    """

    address: tuple[int | str, ...]
    kind: str
    index: int
    caption: str | None
    flip: bool
    crop: float


Batch = tuple[list[Slot], list[Tensor | None]]
"""Slots, and the pixels of those that are read each time."""


class Order:
    """The order of the samples of one kind; remembers the permutation of the current epoch.

    caption_dropout: the part of the samples that are shown without their caption.
    """

    def __init__(
        self,
        samples: list[Sample],
        kind: str,
        repeats: int,
        flip: bool,
        seed: int,
        caption_dropout: float = 0.0,
    ) -> None:
        self.samples, self.kind, self.seed, self.flip = samples, kind, seed, flip
        self.caption_dropout = caption_dropout
        self.length = len(samples) * repeats
        self._epoch, self._permutation = -1, list[int]()

    def slot(self, position: int) -> Slot:
        """Returns what stands at a position of the endless order."""
        epoch, place = divmod(position, self.length)
        if epoch != self._epoch:
            self._permutation = shuffled(self.length, self.seed, self.kind, "order", epoch)
            self._epoch = epoch
        entry = self._permutation[place]  # one of the repeats of a picture
        index = entry % len(self.samples)
        address = (self.seed, self.kind, epoch, entry)
        captions = self.samples[index].captions
        dropped = uniform(*address, "caption dropout") < self.caption_dropout
        return Slot(
            address=(self.seed, self.kind, "position", position),
            kind=self.kind,
            index=index,
            caption=None if dropped else captions[seed_for(*address, "caption") % len(captions)],
            flip=self.flip and uniform(*address, "flip") < 0.5,
            crop=uniform(*address, "crop"),
        )


class Stream(Dataset):
    """Micro-batches by number: the slots of this process, with pixels for what is read each time.

    Args:
        instance: the order of the samples that are trained.
        prior: the order of the class samples, as many a batch as instances; None without.
        batch_size: B, instances per process and micro-batch.
        process, num_processes: which of P this is.
        framing: how pictures become pixels.
        read_each_time: kind → indices of the pictures whose pixels must be read each time.
        length: number of micro-batches.
    """

    def __init__(
        self,
        instance: Order,
        prior: Order | None,
        batch_size: int,
        process: int,
        num_processes: int,
        framing: Framing,
        read_each_time: dict[str, set[int]],
        length: int,
    ) -> None:
        self.orders = [instance, prior] if prior else [instance]
        self.batch_size, self.process, self.num_processes = batch_size, process, num_processes
        self.framing, self.read_each_time, self.length = framing, read_each_time, length

    def __len__(self) -> int:
        return self.length

    def slots(self, micro_batch: int) -> list[Slot]:
        """Returns this process's slots of a micro-batch: instances first, then class samples."""
        start = (micro_batch * self.num_processes + self.process) * self.batch_size
        positions = range(start, start + self.batch_size)
        return [order.slot(position) for order in self.orders for position in positions]

    def __getitem__(self, micro_batch: int) -> Batch | RunError:
        """Returns a micro-batch; an error as a value: a worker would raise it as a traceback."""
        try:
            return self.batch(micro_batch)
        except RunError as error:
            return error

    def batch(self, micro_batch: int) -> Batch:
        """Returns a micro-batch; raises RunError for a picture that cannot be read."""
        slots = self.slots(micro_batch)
        return slots, [self._pixels(slot) for slot in slots]

    def _pixels(self, slot: Slot) -> Tensor | None:
        if slot.index not in self.read_each_time[slot.kind]:
            return None
        (order,) = (order for order in self.orders if order.kind == slot.kind)
        sample = order.samples[slot.index]
        return self.framing.pixels(sample.picture(), slot.crop, slot.flip)
