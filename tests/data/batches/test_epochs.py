"""Every image is seen as often as was said: for any sizes, batch, processes and leftovers."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sd_lora.config.rows import LEFTOVERS
from sd_lora.data.batches.epochs import Epochs, MicroBatch

SHAPES = [(64, 64), (96, 32), (32, 96), (64, 48)]
entries = st.lists(st.sampled_from(SHAPES), min_size=1, max_size=40)


def counted(batches: list[MicroBatch]) -> Counter[int]:
    return Counter(place.entry for micro in batches for place in micro.entries if place.counted)


@settings(max_examples=60)
@given(
    entries=entries,
    batch=st.integers(1, 7),
    accumulation=st.integers(1, 4),
    leftovers=st.sampled_from(LEFTOVERS),
)
def test_an_epoch_shows_everything(
    entries: list, batch: int, accumulation: int, leftovers: str
) -> None:
    """In each of three epochs every entry counts exactly once, and with `repeat` as many more as
    were said; batches have one shape; only what was said to be smaller or not to count is."""
    epochs = Epochs(entries, batch, accumulation, leftovers)
    sizes = Counter(entries)
    for number in range(3):
        micros = epochs.epoch(number)
        loaded = counted(micros)
        assert set(loaded) == set(range(len(entries)))
        assert sum(loaded.values()) == epochs.num_samples == len(entries) + epochs.extra
        if leftovers != "repeat":
            assert set(loaded.values()) == {1}
        for bucket, count in sizes.items():
            own = [n for entry, n in loaded.items() if entries[entry] == bucket]
            extra = -count % batch if leftovers == "repeat" else 0
            assert sum(own) == count + extra
            assert max(own) - min(own) <= 1  # what is shown more often takes turns
        for micro in micros:
            assert len({entries[place.entry] for place in micro.entries}) == 1
            assert leftovers == "smaller" or len(micro.entries) == batch
        assert len(micros) == epochs.num_micro_batches
        empty = sum(not place.counted for micro in micros for place in micro.entries)
        assert empty == epochs.empty


@settings(max_examples=40)
@given(entries=entries, batch=st.integers(1, 5), epochs=st.integers(2, 8))
def test_repeats_take_turns(entries: list, batch: int, epochs: int) -> None:
    """Over the epochs, what fills batches takes turns: no entry of a bucket is shown more than
    twice as often again as another."""
    order = Epochs(entries, batch, leftovers="repeat")
    loaded = sum((counted(order.epoch(e)) for e in range(epochs)), Counter())
    for bucket in set(entries):
        own = [n for entry, n in loaded.items() if entries[entry] == bucket]
        assert max(own) - min(own) <= 1


@settings(max_examples=60)
@given(entries=entries, batch=st.integers(1, 7), accumulation=st.integers(1, 4))
def test_the_arithmetic_of_steps(entries: list, batch: int, accumulation: int) -> None:
    """Steps have at most `accumulation` micro-batches and never reach over an epoch's end; the
    number of a step's first micro-batch, its samples and positions are what they are said to be."""
    epochs = Epochs(entries, batch, accumulation)
    number, position = 0, 0
    for step in range(2 * epochs.num_steps):
        assert epochs.first_of_step(step) == number
        micros = []
        while not micros or not micros[-1].last:
            micros.append(epochs.micro_batch(number))
            number += 1
        assert {micro.accumulation_steps for micro in micros} == {len(micros)}
        assert len(micros) <= accumulation
        assert {micro.epoch for micro in micros} == {step // epochs.num_steps}
        samples = sum(len(micro.entries) for micro in micros)
        assert {micro.step_samples for micro in micros} == {samples}
        for micro in micros:
            assert micro.position == position
            position += len(micro.entries)
    assert position == 2 * len(entries)
    assert epochs.first_of_step(2 * epochs.num_steps) == number == 2 * epochs.num_micro_batches


@given(entries=st.integers(1, 20), processes=st.integers(1, 6))
def test_processes_share_a_micro_batch(entries: int, processes: int) -> None:
    """Each place belongs to exactly one process, in order, in parts as equal as can be."""
    micro = Epochs([(8, 8)] * entries, entries).epoch(0)[0]
    shares = [micro.part_of(p, processes) for p in range(processes)]
    assert [i for loss_scale in shares for i in loss_scale] == list(range(entries))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_epochs_differ_and_are_addressed() -> None:
    """Each epoch is another order, the same whenever it is asked for, in any order of asking."""
    epochs = Epochs([SHAPES[i % 4] for i in range(30)], 4, seed=3)
    orders = [[m.entries for m in epochs.epoch(e)] for e in range(3)]
    assert len({tuple(order) for order in orders}) == 3
    numbers = [40, 3, 25, 3, 0]
    again = Epochs([SHAPES[i % 4] for i in range(30)], 4, seed=3)
    assert [again.micro_batch(n) for n in numbers] == [epochs.micro_batch(n) for n in numbers]
    other = Epochs([SHAPES[i % 4] for i in range(30)], 4, seed=4)
    assert [m.entries for m in other.epoch(0)] != orders[0]


def test_buckets_are_mixed() -> None:
    """Batches of different buckets alternate in an epoch: 20 of each of two shapes, batch 2, are
    not first all of one and then all of the other."""
    entries = [SHAPES[0]] * 20 + [SHAPES[1]] * 20
    shapes = [entries[m.entries[0].entry] for m in Epochs(entries, 2).epoch(0)]
    changes = sum(a != b for a, b in zip(shapes, shapes[1:], strict=False))
    assert changes > 3


@pytest.mark.parametrize("leftovers", LEFTOVERS)
def test_a_bucket_smaller_than_a_batch(leftovers: str) -> None:
    """Two images in batches of seven: seen once, or filled up as was said, and no more."""
    epochs = Epochs([SHAPES[0]] * 2, 7, leftovers=leftovers)
    (micro,) = epochs.epoch(1)
    assert len(micro.entries) == (2 if leftovers == "smaller" else 7)
    assert micro.step_samples == (7 if leftovers == "repeat" else 2)
    # what is seen again is seen in another way: its address differs
    assert len({(p.entry, p.again) for p in micro.entries}) == len(micro.entries)
