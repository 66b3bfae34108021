"""Samples of each batch: every epoch uses every image exactly as often as it should.

Entry k of a set is one of the repeats of one of its images. Epoch e is one seeded permutation of
all entries; buckets only group it: the entries of a bucket, in this order, are cut into
micro-batches of P·B (processes × batch), and the rest at a bucket's end is not dropped. All is a
function of (seed, epoch), so any process or worker finds any micro-batch by its number.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sd_lora.data.images.buckets import Size
from sd_lora.seeds import shuffled


@dataclass(frozen=True, slots=True)
class BatchEntry:
    """One place in a micro-batch.

    entry: of the set. again: 0, or its count among repetitions that fill an empty place. counted:
    whether it counts in the loss.
    """

    entry: int
    again: int = 0
    counted: bool = True


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The entries of a micro-batch of all processes, those with weight in the loss first.

    epoch, position: of the first entry; position counts from the start of the run.
    accumulation_steps: micro-batches of its optimiser step. last: whether it ends the step.
    step_samples: samples that count in the step. step_position: position of the first of them.
    """

    entries: tuple[BatchEntry, ...]
    epoch: int
    position: int
    accumulation_steps: int
    last: bool
    step_samples: int
    step_position: int

    def part_of(self, process: int, num_processes: int) -> range:
        """The indices of one process's places: as equal parts as can be, none if there
        are fewer places than processes."""
        n = len(self.entries)
        return range(process * n // num_processes, (process + 1) * n // num_processes)


class Epochs:
    """The micro-batches of a run, by number.

    num_micro_batches, num_steps: of an epoch, which always ends with a whole step: the last one has
    fewer micro-batches if the accumulation does not divide them. num_samples: samples of an epoch
    that count. extra: repetitions among them, to fill a batch. empty: places filled without weight.

    Args:
        entries: the bucket of each entry.
        batch: P·B, samples of a micro-batch over all processes.
        accumulation: micro-batches of a step.
        leftovers: the last, unfilled batch of a bucket: "smaller" keeps it smaller, "pad-batch"
            fills it with samples without weight, so that all shapes are the same, "repeat" fills it
            with repetitions, which count.
        seed, kind: the address of the order.
    """

    def __init__(
        self,
        entries: Sequence[Size],
        batch: int,
        accumulation: int = 1,
        leftovers: str = "smaller",
        seed: int = 0,
        kind: str = "instance",
    ) -> None:
        self.batch, self.accumulation, self.leftovers = batch, accumulation, leftovers
        self.seed, self.kind = seed, kind
        self._entries = list(entries)
        self._members: dict[Size, list[int]] = {}
        for entry, bucket in enumerate(entries):
            self._members.setdefault(bucket, []).append(entry)
        missing = sum(-len(members) % batch for members in self._members.values())
        self.extra = missing if leftovers == "repeat" else 0
        self.empty = missing if leftovers == "pad-batch" else 0
        self.num_samples = len(entries) + self.extra
        self.num_micro_batches = sum(-(-len(m) // batch) for m in self._members.values())
        self.num_steps = -(-self.num_micro_batches // accumulation)
        self._epoch, self._batches = -1, list[MicroBatch]()

    @property
    def buckets(self) -> dict[Size, int]:
        """Bucket → how many entries it has."""
        return {bucket: len(members) for bucket, members in self._members.items()}

    def first_of_step(self, step: int) -> int:
        """The number of the first micro-batch after `step` steps are done."""
        epoch, within = divmod(step, self.num_steps)
        return epoch * self.num_micro_batches + within * self.accumulation

    def micro_batch(self, number: int) -> MicroBatch:
        """A micro-batch by its number from the start of the run."""
        epoch, place = divmod(number, self.num_micro_batches)
        if epoch != self._epoch:
            self._batches, self._epoch = self.epoch(epoch), epoch
        return self._batches[place]

    def epoch(self, epoch: int) -> list[MicroBatch]:
        """An epoch's micro-batches, in their order."""
        groups: dict[Size, list[BatchEntry]] = {bucket: [] for bucket in self._members}
        for entry in shuffled(len(self._entries), self.seed, self.kind, "order", epoch):
            groups[self._entries[entry]].append(BatchEntry(entry))
        chunks: list[tuple[BatchEntry, ...]] = []
        for bucket, entries in groups.items():
            entries += self._filling(bucket, epoch)
            starts = range(0, len(entries), self.batch)
            chunks += [tuple(entries[i : i + self.batch]) for i in starts]
        if len(groups) > 1:  # else one bucket would be learned after the other
            order = shuffled(len(chunks), self.seed, self.kind, "batches", epoch)
            chunks = [chunks[i] for i in order]
        return self._numbered(chunks, epoch)

    def _filling(self, bucket: Size, epoch: int) -> list[BatchEntry]:
        """The filling of a bucket's last batch: its members in turn, starting where the epoch
        before ended, so that none is used more often than another for long.
        """
        members = self._members[bucket]
        missing = -len(members) % self.batch if self.leftovers != "smaller" else 0
        turns = range(epoch * missing, (epoch + 1) * missing)
        counted = self.leftovers == "repeat"
        return [
            BatchEntry(
                members[turn % len(members)], 1 + (turn - turns.start) // len(members), counted
            )
            for turn in turns
        ]

    def _numbered(self, chunks: list[tuple[BatchEntry, ...]], epoch: int) -> list[MicroBatch]:
        batches, position = [], epoch * self.num_samples
        for start in range(0, len(chunks), self.accumulation):
            accumulation_steps = chunks[start : start + self.accumulation]
            counts = [sum(place.counted for place in chunk) for chunk in accumulation_steps]
            first, step_samples = position, sum(counts)
            for i, (chunk, count) in enumerate(zip(accumulation_steps, counts, strict=True)):
                last = i == len(accumulation_steps) - 1
                number = len(accumulation_steps)
                batches.append(
                    MicroBatch(chunk, epoch, position, number, last, step_samples, first)
                )
                position += count
        return batches
