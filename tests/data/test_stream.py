"""Slots and batches: what is drawn for a sample, and that any split shows the same samples."""

import operator
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from sd_lora.data.buckets import Frame, Framing
from sd_lora.data.epochs import Epochs
from sd_lora.data.facts import content_digest
from sd_lora.data.latents import LatentTable, Look, Moments, Seen
from sd_lora.data.samples import Sample
from sd_lora.data.spec import LEFTOVERS, CaptionRules, SourceSpec
from sd_lora.data.store import Store
from sd_lora.data.stream import Batch, Rotation, Set, Stream
from sd_lora.errors import RunError

FRAMING = Framing(64, 16)


def written(path: Path, size: tuple[int, int], seed: int) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def missing() -> bytes:
    raise AssertionError("nothing is read here")


def samples(sizes: list[tuple[int, int]], **spec: object) -> list[Sample]:
    source = SourceSpec(**spec)
    return [
        Sample(f"{i}.png", missing, (f"caption {i}",), source, f"{i:032x}", size)
        for i, size in enumerate(sizes)
    ]


def made(pictures: list[Sample], kind: str = "instance", framing: Framing = FRAMING) -> Set:
    buckets = framing.assign([s.size for s in pictures], [s.source.repeats for s in pictures])
    return Set(pictures, buckets, framing, kind, 0)


class Nothing(LatentTable):
    """Where nothing of pictures is read: what is counted here is slots."""

    def __init__(self) -> None:
        super().__init__(Look(), "", "no")

    def seen(self, sample: Sample, frame: Frame, flip: bool, random: bool) -> Seen:
        return Seen(sample.name)


def streams(
    instance: Set, batch: int, processes: int, epochs: int = 1, leftovers: str = "smaller",
    accumulation: int = 1, prior: Set | None = None, table: LatentTable | None = None,
) -> list[Stream]:  # fmt: skip
    order = Epochs(
        [instance.buckets[i] for i in instance.entries], batch * processes, accumulation, leftovers
    )
    length = epochs * order.num_micro_batches
    make = partial(Stream, instance, order, prior)
    return [make(p, processes, table or Nothing(), length) for p in range(processes)]


def as_is(batch: Batch) -> Batch:
    return batch


SIZES = st.lists(
    st.tuples(st.integers(16, 400), st.integers(16, 400)), min_size=1, max_size=24
)  # fmt: skip


@pytest.mark.parametrize("workers", [0, 2])
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    sizes=SIZES,
    batch=st.integers(1, 5),
    processes=st.integers(1, 3),
    repeats=st.integers(1, 3),
    leftovers=st.sampled_from(LEFTOVERS),
)
def test_every_picture_is_seen_as_often_as_was_said(
    workers: int, sizes: list, batch: int, processes: int, repeats: int, leftovers: str
) -> None:
    """Through real loaders with 0 or 2 workers, by 1, 2 or 3 processes: over two epochs every
    picture counts as often as its repeats say, and with `repeat` as often more as the plan says;
    batches have one shape; noise addresses are all different."""
    pictures = made(samples(sizes, repeats=repeats))
    counts: Counter[int] = Counter()
    addresses = []
    for stream in streams(pictures, batch, processes, 2, leftovers):
        loader = DataLoader(stream, batch_size=None, num_workers=workers, collate_fn=as_is)
        for number, one in enumerate(loader):
            assert len({slot.frame.size for slot in one.slots}) == 1
            assert one.slots == stream.batch(number).slots
            counted = [slot for slot in one.slots if slot.weight]
            counts.update(slot.index for slot in counted)
            addresses += [slot.address for slot in counted]
    extra = stream.epochs.extra
    assert sum(counts.values()) == 2 * (len(sizes) * repeats + extra)
    assert min(counts.values()) >= 2 * repeats
    if not extra:
        assert counts == dict.fromkeys(range(len(sizes)), 2 * repeats)
    assert len(set(addresses)) == len(addresses)


@settings(max_examples=25, deadline=None)
@given(
    sizes=SIZES,
    batch=st.integers(1, 4),
    processes=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    leftovers=st.sampled_from(LEFTOVERS),
)
def test_a_steps_loss_is_the_mean_over_its_samples(
    sizes: list, batch: int, processes: int, accumulation: int, leftovers: str
) -> None:
    """With a loss for each sample, the mean over processes and over the window of Σ w·l · share is
    the plain mean of the losses that count: whatever is left over, and on however many processes;
    a weight of 3 for a source counts threefold."""
    pictures = samples(sizes)
    pictures = [
        replace(s, source=SourceSpec(weight=1 + 2 * (i % 2))) for i, s in enumerate(pictures)
    ]
    every = streams(made(pictures), batch, processes, 1, leftovers, accumulation)
    epochs, number = every[0].epochs, 0
    for _ in range(epochs.num_steps):
        total, window, losses = 0.0, [], []
        while not window or not window[-1].last:
            parts = [stream.batch(number) for stream in every]
            number += 1
            window.append(parts[0])
            for part in parts:
                mine = [slot.index + 1.0 for slot in part.slots]
                weights = [slot.weight for slot in part.slots]
                loss = sum(map(operator.mul, weights, mine)) * part.share
                total += loss / processes / part.window
                losses += [pair for pair in zip(weights, mine, strict=True) if pair[0]]
        assert total == pytest.approx(sum(w * loss for w, loss in losses) / len(losses))


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 1), (2, 1), (1, 2), (4, 1), (2, 2)])
def test_any_split_of_a_batch_is_the_same_samples(processes: int, accumulation: int) -> None:
    """Processes × accumulation × batch = 8 see the same slots in every step, instances and class
    alike, where all pictures have one shape; instances pair with class samples one to one."""
    batch = 8 // processes // accumulation
    instance, prior = made(samples([(64, 64)] * 13)), made(samples([(64, 64)] * 11), "class")

    def steps(every: list[Stream]) -> list[set]:
        found: list[set] = [set()]
        for number in range(len(every[0])):
            parts = [stream.batch(number) for stream in every]
            slots = [slot for part in parts for slot in part.slots if slot.weight]
            kinds = Counter(slot.kind for slot in slots)
            assert kinds["instance"] == kinds["class"]
            found[-1] |= {(s.address, s.index, s.caption, s.flip, s.frame) for s in slots}
            if parts[0].last:
                found.append(set())
        return found

    one = streams(instance, 8, 1, 3, prior=prior)
    many = streams(instance, batch, processes, 3, accumulation=accumulation, prior=prior)
    assert steps(one) == steps(many)


def test_class_pictures_are_all_used() -> None:
    """11 class pictures beside 5 instances: each is shown once before any is shown again, in
    another order each time around."""
    rotation = Rotation(made(samples([(64, 64)] * 11), "class"))
    turns = [[rotation.slot(t * 11 + i).index for i in range(11)] for t in range(3)]
    assert all(sorted(turn) == list(range(11)) for turn in turns)
    assert len({tuple(turn) for turn in turns}) == 3
    instance = made(samples([(64, 64)] * 5))
    (stream,) = streams(instance, 4, 1, 11, prior=rotation.set)
    shown = Counter(
        slot.index for n in range(len(stream)) for slot in stream.batch(n).slots
        if slot.kind == "class"
    )  # fmt: skip
    assert shown == dict.fromkeys(range(11), 5)


def test_class_pictures_of_another_shape() -> None:
    """Where class pictures have other shapes than instances, a batch is split by shape, and every
    sample is in one part."""
    prior = made(samples([(128, 32)] * 3), "class")
    (stream,) = streams(made(samples([(64, 64)] * 4)), 4, 1, prior=prior)
    batch = stream.batch(0)
    parts = batch.by_size()
    assert [len(part.slots) for part in parts] == [4, 4]
    assert {part.share for part in parts} == {batch.share}
    assert [s for part in parts for s in part.slots] == batch.slots


def test_what_is_drawn_is_a_function_of_the_address() -> None:
    """Captions, flips and random cuts are the same for the same seed, epoch and entry, and differ
    between epochs; each caption of a picture takes its turn, a tenth are dropped if asked for."""
    rules = CaptionRules(shuffle_caption=True, caption_dropout=0.1)
    source = SourceSpec(random_flip=True, random_crop=True, rules=rules)
    pictures = [
        Sample(f"{i}.png", missing, ("a, b, c, d", "e"), source, f"{i:032x}", (100, 64))
        for i in range(30)
    ]
    (stream,) = streams(made(pictures), 5, 1, 40)
    slots = [slot for n in range(len(stream)) for slot in stream.batch(n).slots]
    (again,) = streams(made(pictures), 5, 1, 40)
    assert [slot for n in range(len(again)) for slot in again.batch(n).slots] == slots
    first = [slot for slot in slots if slot.index == 0]
    assert len({slot.caption for slot in first}) > 10
    assert {slot.caption for slot in slots} >= {"e", None}
    assert len({slot.frame.corner for slot in first}) == 4  # 51 pixels high, 48 seen
    flipped = sum(slot.flip for slot in slots) / len(slots)
    dropped = sum(slot.caption is None for slot in slots) / len(slots)
    assert abs(flipped - 0.5) < 0.05
    assert abs(dropped - 0.1) < 0.03


def test_the_captions_of_a_run() -> None:
    """All captions that a run will show, on all processes together, or None if there are too
    many."""
    rules = CaptionRules(shuffle_caption=True)
    pictures = [replace(s, captions=("a, b, c",)) for s in samples([(64, 64)] * 6, rules=rules)]
    every = streams(made(pictures), 2, 3, 20)
    shown = {slot.caption for s in every for n in range(len(s)) for slot in s.batch(n).slots}
    assert set(every[1].captions(100)) == shown
    assert len(shown) == 6
    assert every[0].captions(5) is None


def test_what_is_read_of_a_picture(tmp_path: Path) -> None:
    """Pixels where nothing is known, moments where they are, both where both are needed; nothing
    known of what is cut at random, nor where caches are off; a picture that vanishes or changes
    is an error by name, as a value where a worker would raise it."""
    path = written(tmp_path / "a.png", (96, 64), 0)
    sample = Sample(
        str(path),
        path.read_bytes,
        ("x",),
        SourceSpec(),
        content_digest(path.read_bytes()),
        (96, 64),
    )
    pictures = made([sample])
    frame = pictures.frame(0)
    moments = Moments(torch.ones(4, 8, 8), torch.ones(4, 8, 8))
    for store in (None, Store(tmp_path / "cache", 10**9)):
        mode = "disk" if store else "memory"
        table = LatentTable(Look(), "vae", mode, store)
        assert table.seen(sample, frame, False, random=False).pixels.shape == (3, 48, 80)
        table.put(table.key(sample, frame, False), moments)
        known = table.seen(sample, frame, False, random=False)
        # in memory it stays where it is, and what goes through a loader is its address
        found = known.moments if store else table.memory[known.key]
        assert torch.equal(found.mean, moments.mean)
        assert (known.pixels, known.moments is None) == (None, store is None)
        for other in ({"flip": True, "random": False}, {"flip": False, "random": True}):
            seen = table.seen(sample, frame, **other)
            assert seen.moments is None
            assert seen.pixels is not None
        both = LatentTable(Look(), "vae", mode, store, fresh=True)
        both.memory = table.memory
        seen = both.seen(sample, frame, False, random=False)
        assert seen.key == known.key
        assert (seen.moments is None) == (store is None)
        assert seen.pixels is not None
        assert LatentTable(Look(), "vae", "no").seen(sample, frame, False, False).moments is None
    (stream,) = streams(pictures, 1, 1, table=LatentTable(Look(), "vae", "no"))
    assert stream[0].seen[0].pixels is not None
    written(path, (64, 96), 1)
    assert "was changed after it was checked" in str(stream[0])
    path.unlink()
    with pytest.raises(RunError, match=r"a\.png could not be read: No such file"):
        stream.batch(0)
    assert isinstance(stream[0], RunError)


def test_keys_are_content(tmp_path: Path) -> None:
    """An entry's address changes with the picture's bytes, its cut, flip, the filter, the
    background, the mask and the VAE; not with its name, caption or repeats."""
    (sample,) = samples([(96, 64)])
    frame = made([sample]).frame(0)
    key = LatentTable(Look(), "vae", "memory").key
    want = key(sample, frame, False)
    renamed = replace(sample, name="b", captions=("other",), source=SourceSpec(repeats=3))
    assert key(renamed, frame, False) == want
    others = {
        key(replace(sample, digest="1" * 32), frame, False),
        key(sample, replace(frame, corner=(1, 0)), False),
        key(sample, replace(frame, size=(64, 64)), False),
        key(sample, frame, True),
        LatentTable(Look("bilinear"), "vae", "memory").key(sample, frame, False),
        LatentTable(Look(background=(0, 0, 0)), "vae", "memory").key(sample, frame, False),
        LatentTable(Look(alpha_mask=True), "vae", "memory").key(sample, frame, False),
        LatentTable(Look(), "vae 2", "memory").key(sample, frame, False),
    }
    assert len(others - {want}) == 8


def test_a_mask_is_cut_and_mirrored_as_its_picture(tmp_path: Path) -> None:
    """Opacity is the mask of the loss, seen through the same cut as the picture and mirrored with
    it: of a picture that is opaque on its left alone, the left of what is seen counts, mirrored the
    right."""
    image = Image.new("RGBA", (96, 64), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 48, 64))
    image.save(tmp_path / "a.png")
    frame = Framing(64).frame((96, 64), (64, 64), None)  # columns 16 to 80
    look = Look(alpha_mask=True)
    data = (tmp_path / "a.png").read_bytes()
    plain, mirrored = (look.pixels(data, "a", frame, flip) for flip in (False, True))
    assert plain.mask.shape == (1, 8, 8)
    assert plain.mask[0, 0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    assert torch.equal(mirrored.mask, plain.mask.flip(-1))
    assert torch.equal(mirrored.pixels, plain.pixels.flip(-1))
    blue = (plain.pixels[2] == 1) & (plain.pixels[0] == -1)
    assert torch.equal(blue[::8, ::8].float()[None], plain.mask)


def test_a_picture_that_repeats_in_a_batch_is_seen_otherwise() -> None:
    """What fills a batch with `repeat` has draws of its own: another cut, flip or caption than the
    first time, over some pictures."""
    source = SourceSpec(
        random_flip=True, random_crop=True, rules=CaptionRules(shuffle_caption=True)
    )
    pictures = [
        Sample(f"{i}.png", missing, ("a, b, c, d",), source, f"{i:032x}", (100, 64))
        for i in range(2)
    ]
    (stream,) = streams(made(pictures), 8, 1, 1, "repeat")
    slots = stream.batch(0).slots
    assert len(slots) == 8
    for index in (0, 1):
        looks = {(s.flip, s.frame, s.caption) for s in slots if s.index == index}
        assert len(looks) > 2


@pytest.mark.parametrize("leftovers", ["pad-batch", "smaller"])
def test_partners_of_what_does_not_count_do_not_count(leftovers: str) -> None:
    """Class samples beside places that only fill a batch have no weight, nor has what a process
    computes that has no place at all."""
    instance, prior = made(samples([(64, 64)] * 5)), made(samples([(64, 64)] * 3), "class")
    found = []
    for stream in streams(instance, 2, 2, 1, leftovers, prior=prior):
        for number in range(len(stream)):
            weights = [slot.weight for slot in stream.batch(number).slots]
            assert weights[: len(weights) // 2] == weights[len(weights) // 2 :]
            found += weights
    assert found.count(1.0) == 10
    assert 0.0 in found
