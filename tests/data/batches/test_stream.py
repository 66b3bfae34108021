"""Slots and batches: what is drawn for a sample, and that any split shows the same samples."""

import operator
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from sd_lora.config.rows import LEFTOVERS
from sd_lora.config.sources import CaptionRules, SourceSpec
from sd_lora.data.batches.epochs import Epochs
from sd_lora.data.batches.preservation import Preservation
from sd_lora.data.batches.stream import Batch, ClassOrder, ImageSet, Stream
from sd_lora.data.cache.latents import LatentTable, LoadedImage, Moments, PixelSettings
from sd_lora.data.cache.store import Store, digest_of
from sd_lora.data.images.buckets import Crop, CropSettings
from sd_lora.data.images.facts import content_digest
from sd_lora.data.sources.samples import Sample
from sd_lora.errors import RunError

FRAMING = CropSettings(64, 16)


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


def made(
    images: list[Sample], kind: str = "instance", crop_settings: CropSettings = FRAMING
) -> ImageSet:
    buckets = crop_settings.assign([s.size for s in images], [s.source.repeats for s in images])
    return ImageSet(images, buckets, crop_settings, kind, 0)


class Nothing(LatentTable):
    """Where nothing of images is read: what is counted here is slots."""

    def __init__(self) -> None:
        super().__init__(PixelSettings(), "", "no")

    def loaded(self, sample: Sample, crop: Crop, flip: bool, random: bool) -> LoadedImage:
        return LoadedImage(sample.name)


def streams(
    instance: ImageSet, batch: int, processes: int, epochs: int = 1, leftovers: str = "smaller",
    accumulation: int = 1, prior: ImageSet | None = None, table: LatentTable | None = None,
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
def test_every_image_is_seen_as_often_as_was_said(
    workers: int, sizes: list, batch: int, processes: int, repeats: int, leftovers: str
) -> None:
    """Through real loaders with 0 or 2 workers, by 1, 2 or 3 processes: over two epochs every
    image counts as often as its repeats say, and with `repeat` as often more as the plan says;
    batches have one shape; noise addresses are all different."""
    images = made(samples(sizes, repeats=repeats))
    counts: Counter[int] = Counter()
    addresses = []
    for stream in streams(images, batch, processes, 2, leftovers):
        loader = DataLoader(stream, batch_size=None, num_workers=workers, collate_fn=as_is)
        for number, one in enumerate(loader):
            assert len({item.crop.size for item in one.items}) == 1
            assert one.items == stream.batch(number).items
            counted = [item for item in one.items if item.weight]
            counts.update(item.index for item in counted)
            addresses += [item.address for item in counted]
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
    images = samples(sizes)
    images = [replace(s, source=SourceSpec(weight=1 + 2 * (i % 2))) for i, s in enumerate(images)]
    every = streams(made(images), batch, processes, 1, leftovers, accumulation)
    epochs, number = every[0].epochs, 0
    for _ in range(epochs.num_steps):
        total, accumulation_steps, losses = 0.0, [], []
        while not accumulation_steps or not accumulation_steps[-1].last:
            parts = [stream.batch(number) for stream in every]
            number += 1
            accumulation_steps.append(parts[0])
            for part in parts:
                mine = [item.index + 1.0 for item in part.items]
                weights = [item.weight for item in part.items]
                loss = sum(map(operator.mul, weights, mine)) * part.loss_scale
                total += loss / processes / part.accumulation_steps
                losses += [pair for pair in zip(weights, mine, strict=True) if pair[0]]
        assert total == pytest.approx(sum(w * loss for w, loss in losses) / len(losses))


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 1), (2, 1), (1, 2), (4, 1), (2, 2)])
def test_any_split_of_a_batch_is_the_same_samples(processes: int, accumulation: int) -> None:
    """Processes × accumulation × batch = 8 see the same slots in every step, instances and class
    alike, where all images have one shape; instances pair with class samples one to one."""
    batch = 8 // processes // accumulation
    instance, prior = made(samples([(64, 64)] * 13)), made(samples([(64, 64)] * 11), "class")

    def steps(every: list[Stream]) -> list[set]:
        found: list[set] = [set()]
        for number in range(len(every[0])):
            parts = [stream.batch(number) for stream in every]
            items = [item for part in parts for item in part.items if item.weight]
            kinds = Counter(item.kind for item in items)
            assert kinds["instance"] == kinds["class"]
            found[-1] |= {(s.address, s.index, s.caption, s.flip, s.crop) for s in items}
            if parts[0].last:
                found.append(set())
        return found

    one = streams(instance, 8, 1, 3, prior=prior)
    many = streams(instance, batch, processes, 3, accumulation=accumulation, prior=prior)
    assert steps(one) == steps(many)


def test_class_images_are_all_used() -> None:
    """11 class images beside 5 instances: each is shown once before any is shown again, in
    another order each time around."""
    class_order = ClassOrder(made(samples([(64, 64)] * 11), "class"))
    turns = [[class_order.item(t * 11 + i).index for i in range(11)] for t in range(3)]
    assert all(sorted(turn) == list(range(11)) for turn in turns)
    assert len({tuple(turn) for turn in turns}) == 3
    instance = made(samples([(64, 64)] * 5))
    (stream,) = streams(instance, 4, 1, 11, prior=class_order.set)
    shown = Counter(
        item.index for n in range(len(stream)) for item in stream.batch(n).items
        if item.kind == "class"
    )  # fmt: skip
    assert shown == dict.fromkeys(range(11), 5)


def test_class_images_of_another_shape() -> None:
    """Where class images have other shapes than instances, a batch is split by shape, and every
    sample is in one part."""
    prior = made(samples([(128, 32)] * 3), "class")
    (stream,) = streams(made(samples([(64, 64)] * 4)), 4, 1, prior=prior)
    batch = stream.batch(0)
    parts = batch.by_size()
    assert [len(part.items) for part in parts] == [4, 4]
    assert {part.loss_scale for part in parts} == {batch.loss_scale}
    assert [s for part in parts for s in part.items] == batch.items


def test_what_is_drawn_is_a_function_of_the_address() -> None:
    """Captions, flips and random cuts are the same for the same seed, epoch and entry, and differ
    between epochs; each caption of an image takes its turn, a tenth are dropped if asked for."""
    rules = CaptionRules(shuffle_caption=True, caption_dropout=0.1)
    source = SourceSpec(random_flip=True, random_crop=True, rules=rules)
    images = [
        Sample(f"{i}.png", missing, ("a, b, c, d", "e"), source, f"{i:032x}", (100, 64))
        for i in range(30)
    ]
    (stream,) = streams(made(images), 5, 1, 40)
    items = [item for n in range(len(stream)) for item in stream.batch(n).items]
    (again,) = streams(made(images), 5, 1, 40)
    assert [item for n in range(len(again)) for item in again.batch(n).items] == items
    first = [item for item in items if item.index == 0]
    assert len({item.caption for item in first}) > 10
    assert {item.caption for item in items} >= {"e", None}
    assert len({item.crop.corner for item in first}) == 4  # 51 pixels high, 48 seen
    flipped = sum(item.flip for item in items) / len(items)
    dropped = sum(item.caption is None for item in items) / len(items)
    assert abs(flipped - 0.5) < 0.05
    assert abs(dropped - 0.1) < 0.03


def test_the_captions_of_a_run() -> None:
    """All captions that a run will show, on all processes together, or None if there are too
    many."""
    rules = CaptionRules(shuffle_caption=True)
    images = [replace(s, captions=("a, b, c",)) for s in samples([(64, 64)] * 6, rules=rules)]
    every = streams(made(images), 2, 3, 20)
    shown = {item.caption for s in every for n in range(len(s)) for item in s.batch(n).items}
    assert set(every[1].captions(100)) == shown
    assert len(shown) == 6
    assert every[0].captions(5) is None


def test_what_is_read_of_an_image(tmp_path: Path) -> None:
    """Pixels where nothing is known, moments where they are, both where both are needed; nothing
    known of what is cut at random, nor where caches are off; an image that vanishes or changes
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
    images = made([sample])
    crop = images.crop(0)
    moments = Moments(torch.ones(4, 8, 8), torch.ones(4, 8, 8))
    for store in (None, Store(tmp_path / "cache", 10**9)):
        mode = "disk" if store else "memory"
        table = LatentTable(PixelSettings(), "vae", mode, store)
        assert table.loaded(sample, crop, False, random=False).pixels.shape == (3, 48, 80)
        table.put(table.key(sample, crop, False), moments)
        known = table.loaded(sample, crop, False, random=False)
        # in memory it stays where it is, and what goes through a loader is its address
        found = known.moments if store else table.memory[known.key]
        assert torch.equal(found.mean, moments.mean)
        assert (known.pixels, known.moments is None) == (None, store is None)
        for other in ({"flip": True, "random": False}, {"flip": False, "random": True}):
            loaded = table.loaded(sample, crop, **other)
            assert loaded.moments is None
            assert loaded.pixels is not None
        both = LatentTable(PixelSettings(), "vae", mode, store, fresh=True)
        both.memory = table.memory
        loaded = both.loaded(sample, crop, False, random=False)
        assert loaded.key == known.key
        assert (loaded.moments is None) == (store is None)
        assert loaded.pixels is not None
        assert (
            LatentTable(PixelSettings(), "vae", "no").loaded(sample, crop, False, False).moments
            is None
        )
    (stream,) = streams(images, 1, 1, table=LatentTable(PixelSettings(), "vae", "no"))
    assert stream[0].loaded[0].pixels is not None
    written(path, (64, 96), 1)
    assert "was changed after it was checked" in str(stream[0])
    path.unlink()
    with pytest.raises(RunError, match=r"a\.png could not be read: No such file"):
        stream.batch(0)
    assert isinstance(stream[0], RunError)


def test_keys_are_content(tmp_path: Path) -> None:
    """An entry's address changes with the image's bytes, its cut, flip, the filter, the
    background, the mask and the VAE; not with its name, caption or repeats."""
    (sample,) = samples([(96, 64)])
    crop = made([sample]).crop(0)
    key = LatentTable(PixelSettings(), "vae", "memory").key
    want = key(sample, crop, False)
    renamed = replace(sample, name="b", captions=("other",), source=SourceSpec(repeats=3))
    assert key(renamed, crop, False) == want
    others = {
        key(replace(sample, digest="1" * 32), crop, False),
        key(sample, replace(crop, corner=(1, 0)), False),
        key(sample, replace(crop, size=(64, 64)), False),
        key(sample, crop, True),
        LatentTable(PixelSettings("bilinear"), "vae", "memory").key(sample, crop, False),
        LatentTable(PixelSettings(background=(0, 0, 0)), "vae", "memory").key(sample, crop, False),
        LatentTable(PixelSettings(alpha_mask=True), "vae", "memory").key(sample, crop, False),
        LatentTable(PixelSettings(), "vae 2", "memory").key(sample, crop, False),
    }
    assert len(others - {want}) == 8


def test_a_mask_is_cut_and_mirrored_as_its_image(tmp_path: Path) -> None:
    """Opacity is the mask of the loss, seen through the same cut as the image and mirrored with
    it: of an image that is opaque on its left alone, the left of what is seen counts, mirrored the
    right."""
    image = Image.new("RGBA", (96, 64), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 48, 64))
    image.save(tmp_path / "a.png")
    crop = CropSettings(64).crop((96, 64), (64, 64), None)  # columns 16 to 80
    pixel_settings = PixelSettings(alpha_mask=True)
    data = (tmp_path / "a.png").read_bytes()
    plain, mirrored = (pixel_settings.pixels(data, "a", crop, flip) for flip in (False, True))
    assert plain.mask.shape == (1, 8, 8)
    assert plain.mask[0, 0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    assert torch.equal(mirrored.mask, plain.mask.flip(-1))
    assert torch.equal(mirrored.pixels, plain.pixels.flip(-1))
    blue = (plain.pixels[2] == 1) & (plain.pixels[0] == -1)
    assert torch.equal(blue[::8, ::8].float()[None], plain.mask)


def test_an_image_that_repeats_in_a_batch_is_seen_otherwise() -> None:
    """What fills a batch with `repeat` has draws of its own: another cut, flip or caption than the
    first time, over some images."""
    source = SourceSpec(
        random_flip=True, random_crop=True, rules=CaptionRules(shuffle_caption=True)
    )
    images = [
        Sample(f"{i}.png", missing, ("a, b, c, d",), source, f"{i:032x}", (100, 64))
        for i in range(2)
    ]
    (stream,) = streams(made(images), 8, 1, 1, "repeat")
    items = stream.batch(0).items
    assert len(items) == 8
    for index in (0, 1):
        pixel_settings = {(s.flip, s.crop, s.caption) for s in items if s.index == index}
        assert len(pixel_settings) > 2


@pytest.mark.parametrize("leftovers", ["pad-batch", "smaller"])
def test_partners_of_what_does_not_count_do_not_count(leftovers: str) -> None:
    """Class samples beside places that only fill a batch have no weight, nor has what a process
    computes that has no place at all."""
    instance, prior = made(samples([(64, 64)] * 5)), made(samples([(64, 64)] * 3), "class")
    found = []
    for stream in streams(instance, 2, 2, 1, leftovers, prior=prior):
        for number in range(len(stream)):
            weights = [item.weight for item in stream.batch(number).items]
            assert weights[: len(weights) // 2] == weights[len(weights) // 2 :]
            found += weights
    assert found.count(1.0) == 10
    assert 0.0 in found


def test_class_weights_are_the_streams() -> None:
    """A class item's weight is its source's times `class_weight`, an instance's its source's alone;
    a filling weighs nothing."""
    framing = CropSettings(64)
    spec = SourceSpec(path="a", weight=0.5)
    samples = [Sample(f"{i}", bytes, ("x",), spec, "d", (64, 64)) for i in range(3)]
    instances, classes = (
        ImageSet(samples, [(64, 64)] * 3, framing, kind, 0) for kind in ("instance", "class")
    )
    epochs = Epochs([(64, 64)] * 3, 2, leftovers="pad-batch")
    table = LatentTable(PixelSettings(), "", "no")
    stream = Stream(instances, epochs, classes, 0, 1, table, 2, class_weight=0.1)
    for number in range(2):
        micro = epochs.micro_batch(number)
        items = stream.items(micro, range(2))
        counted = [entry.counted for entry in micro.entries]
        assert [i.weight for i in items[:2]] == [0.5 if c else 0.0 for c in counted]
        assert [i.weight for i in items[2:]] == [0.5 * 0.1 if c else 0.0 for c in counted]


@pytest.mark.parametrize("leftovers", LEFTOVERS)
def test_a_step_has_each_stratum_once(leftovers: str) -> None:
    """The strata of an optimiser step's samples, over micro-batches and processes, are 0 … n - 1 of
    n, for instances and class images alike; fillings have none."""
    instance, prior = made(samples([(64, 64)] * 11)), made(samples([(64, 64)] * 3), "class")
    both = streams(instance, 2, 2, 2, leftovers, accumulation=2, prior=prior)
    found: dict[str, list[tuple[int, int]]] = {"instance": [], "class": []}
    for number in range(len(both[0])):
        for stream in both:
            batch = stream.batch(number)
            for item in batch.items:
                if item.weight:
                    assert item.stratum is not None
                    found[item.kind].append(item.stratum)
        if batch.last:
            for strata in found.values():
                count = len(strata)
                assert sorted(strata) == [(index, count) for index in range(count)]
                strata.clear()


def test_preserved_items_are_the_instances_with_other_captions() -> None:
    """Beside each instance stands the same image, crop, flip and address with the class in the
    place of the trigger word, in any case, or without a caption; none beside a dropped caption. A
    class with wildcards is another at each use, and the run's captions hold them all."""
    rules = CaptionRules(trigger_word="sks dog", caption_dropout=0.5)
    spec = SourceSpec(path="a", rules=rules, random_flip=True)
    texts = [("a photo of SKS dog",), ("at night",), ("sks dogs and a sks dog",)] * 8
    images = [Sample(f"{i}", bytes, text, spec, "d", (64, 64)) for i, text in enumerate(texts)]
    epochs, table = Epochs([(64, 64)] * 24, 24), LatentTable(PixelSettings(), "", "no")
    wanted = {"at night": "dog, at night", "a photo of SKS dog": "a photo of dog"}
    wanted["sks dogs and a sks dog"] = "sks dogs and a dog"
    for word in ("dog", None):
        stream = Stream(made(images), epochs, None, 0, 1, table, 1,
                        preservation=Preservation(word, 0.5))  # fmt: skip
        items = stream.items(epochs.micro_batch(0), range(24))
        instances, preserved = items[:24], items[24:]
        learned = [item for item in instances if item.caption is not None]
        assert 4 < len(learned) < 20
        for item, beside in zip(learned, preserved, strict=True):
            text = texts[item.index][0]
            caption = wanted[text] if word else None
            assert beside == replace(item, caption=caption, weight=0.5, preserves=True)
        assert stream.captions(1000) is not None
        assert {item.caption for item in preserved} <= set(stream.captions(1000))
    varied = Stream(made(images), epochs, None, 0, 1, table, 4,
                    preservation=Preservation("{big|small|old} dog", 0.5))  # fmt: skip
    assert varied.preservation.varies
    seen = {item.caption for n in range(4) for item in varied.items_of(n) if item.preserves}
    assert {f"a photo of {size} dog" for size in ("big", "small", "old")} <= seen
    assert seen <= set(varied.captions(1000))


def test_keys_of_cached_latents_stay() -> None:
    """The text of a crop in a latent's key is that of the first entries ever made, so that the
    renamed class loses no user's cache."""
    crop = Crop((10, 20), (64, 128), (0, 32), (64, 64))
    text = "Frame(original=(10, 20), resized=(64, 128), corner=(0, 32), size=(64, 64))"
    sample = Sample("a", bytes, ("x",), SourceSpec(path="a"), "digest", (10, 20))
    table = LatentTable(PixelSettings(), "vae", "memory")
    assert table.key(sample, crop, True) == "latents/" + digest_of(
        "1", PIL.__version__, "digest", text, "True", "lanczos", "(255, 255, 255)", "False", "vae"
    )
