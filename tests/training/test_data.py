"""The data of whole runs: caches change nothing, nothing is lost, what is said is what is done."""

import dataclasses
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import sd_lora
from sd_lora.config.schema import TrainConfig
from sd_lora.data.cache import text_embeddings as embeddings
from sd_lora.data.cache.encode import Latents
from sd_lora.data.cache.store import Store
from sd_lora.errors import RunError, UsageError
from sd_lora.report.measured import shortest
from sd_lora.training import caches, loop
from sd_lora.training.setup import Run, prepare
from tests.data.check.torture import make_torture
from tests.training.launches import Apart
from tests.training.runs import FEW, dreambooth, images, text_to_image
from tests.training.survival import watched

SHAPES = [(64, 64), (96, 64), (64, 96), (64, 64), (128, 40), (64, 64), (96, 64)]


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Seven images of four shapes, one of them partly transparent, with tags as captions."""
    folder = tmp_path / "mixed"
    for i, size in enumerate(SHAPES):
        images(tmp_path / "one", 1, size)
        image = Image.open(tmp_path / "one" / "0.png")
        if i == 3:
            image.putalpha(Image.linear_gradient("L").resize(size))
        folder.mkdir(exist_ok=True)
        # every image is another one
        image.rotate(90 * (i % 2) * 2).save(folder / f"{i}.png", compress_level=i)
        (folder / f"{i}.txt").write_text(f"thing {i}, red, large, {i} times")
    return folder


def run_of(model: Path, data: Path, output: Path, **changes: object) -> TrainConfig:
    options: dict[str, object] = {"train_batch_size": 2, "data_cache_dir": str(output.parent / "c")}
    return text_to_image(model, data, output, **(options | changes))


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "pytorch_lora_weights.safetensors")


def test_images_left_out_by_name(tiny_sd1: Path, mixed: Path, tmp_path: Path) -> None:
    """A name, or a pattern with its folder, takes images out of those that are trained and held
    out, and a note says which; the rest is trained as if these files were not there, to the bit; a
    pattern without an image and one that leaves none are told."""
    config = run_of(tiny_sd1, mixed, tmp_path / "out", max_train_steps=2)
    config = config.replace(num_validation_images=0)
    run = prepare(config.replace(leave_out="0.png, mixed/[45].png", holdout=1))
    left = [*run.images.instances.samples, *run.images.held_out.set.samples]
    assert sorted(Path(sample.name).name for sample in left) == [f"{i}.png" for i in (1, 2, 3, 6)]
    named = [Path(f.name).name for f in run.images.findings if f.code == "named-out"]
    assert sorted(named) == ["0.png", "4.png", "5.png"]
    with pytest.raises(UsageError, match=r"names no usable image: 00.png. Did you mean 0.png\?"):
        prepare(config.replace(leave_out="00.png", output_dir=str(tmp_path / "a")))
    with pytest.raises(UsageError, match="leaves no image to train"):
        prepare(config.replace(leave_out="*.png", output_dir=str(tmp_path / "b")))
    fewer = shutil.copytree(mixed, tmp_path / "fewer" / "mixed")
    for name in ("0", "4", "5"):
        (fewer / f"{name}.png").unlink()
        (fewer / f"{name}.txt").unlink()
    same = [
        sd_lora.train(config.replace(output_dir=str(tmp_path / name), **changes)).digest
        for name, changes in (
            ("without", {"leave_out": "0.png, mixed/[45].png"}),
            ("gone", {"train_data_dir": str(fewer)}),
        )
    ]
    assert same[0].tensors == same[1].tensors


def assert_same_bits(a: Path, b: Path) -> None:
    assert log(a) == log(b)
    x, y = weights(a), weights(b)
    assert x.keys() == y.keys()
    assert all(torch.equal(x[k], y[k]) for k in x)


Outcome = tuple[list[dict], list[torch.Tensor]]


def optimised(config: TrainConfig) -> Outcome:
    """The log and the factors of a run, without what `train` does around its steps."""
    run = prepare(config)
    run.output_dir.mkdir(parents=True, exist_ok=True)
    loop.train_steps(run, loop.LossLog(run))
    return log(run.output_dir), [p.detach().clone() for p in run.parameters]


def assert_same_outcome(a: Outcome, b: Outcome) -> None:
    assert a[0] == b[0]
    assert len(a[0]) >= 4
    assert all(torch.equal(x, y) for x, y in zip(a[1], b[1], strict=True))


def entries(cache: Path, kind: str) -> dict[str, tuple[int, bytes]]:
    """Name → (time of change, bytes) of a cache's entries."""
    return {
        p.name: (p.stat().st_mtime_ns, p.read_bytes())
        for p in (cache / kind).rglob("*")
        if p.is_file()
    }


OPTIONS: dict[str, dict[str, object]] = {
    "plain": {},
    "flips, tags, accumulation": {
        "random_flip": True, "shuffle_caption": True, "keep_tokens": 1, "caption_tag_dropout": 0.3,
        "caption_dropout": 0.2, "gradient_accumulation_steps": 2, "max_train_steps": 8,
    },
    "masks": {"alpha_mask": True, "alpha_background": "black", "bucket_leftovers": "pad-batch"},
    "squares from the middle": {"aspect_ratio_buckets": False, "center_crop": True},
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_caches_change_nothing(name: str, tiny_sd1: Path, mixed: Path, tmp_path: Path) -> None:
    """Without caches, with them in memory, with them on disk, new and known, and with two workers:
    the same losses and the same LoRA to the last bit."""
    options = OPTIONS[name]
    off = {"cache_latents": "no", "cache_text_embeddings": "no"}
    want = optimised(run_of(tiny_sd1, mixed, tmp_path / "no", **options, **off))
    for mode in ("memory", "disk"):
        on = {"cache_latents": mode, "cache_text_embeddings": mode}
        assert_same_outcome(
            want, optimised(run_of(tiny_sd1, mixed, tmp_path / mode, **options, **on))
        )
    known = run_of(tiny_sd1, mixed, tmp_path / "known", **options, dataloader_num_workers=2)
    assert_same_outcome(want, optimised(known))


def test_sdxl_caches_change_nothing(tiny_sdxl: Path, mixed: Path, tmp_path: Path) -> None:
    """The same for SDXL with its pooled texts, in bfloat16, with a bfloat16 VAE: entries have the
    precision of what they keep."""
    options = {"mixed_precision": "bf16", "vae_precision": "bf16", "max_train_steps": 4}
    off = {"cache_latents": "no", "cache_text_embeddings": "no"}
    want = optimised(run_of(tiny_sdxl, mixed, tmp_path / "no", **options, **off))
    assert_same_outcome(want, optimised(run_of(tiny_sdxl, mixed, tmp_path / "disk", **options)))
    store = Store(tmp_path / "c", 10**9)
    for kind in ("latents", "texts"):
        for name in entries(tmp_path / "c", kind):
            tensors = store.tensors(f"{kind}/{name}")
            assert {t.dtype for t in tensors.values()} == {torch.bfloat16}


def test_one_edit_is_one_entry(tiny_sd1: Path, mixed: Path, tmp_path: Path) -> None:
    """An image that is replaced is encoded again, and no other; a caption that is edited is read
    again, and no other; another resolution is another entry for all; nothing else is touched."""
    cache = tmp_path / "c"

    def count(**changes: object) -> tuple[str, str]:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        run = prepare(run_of(tiny_sd1, mixed, tmp_path / "out", **changes))
        rows = run.summary.rows
        return tuple(
            re.search(r"(\d+ of \d+) from before", rows[name]).group(1)
            for name in ("latents", "text embeddings")
        )

    assert count() == ("0 of 7", "0 of 7")
    before = {kind: entries(cache, kind) for kind in ("latents", "texts", "facts")}
    assert [len(found) for found in before.values()] == [7, 7, 7]
    assert count() == ("7 of 7", "7 of 7")
    Image.new("RGB", (96, 64), "red").save(mixed / "1.png")
    assert count() == ("6 of 7", "7 of 7")
    (mixed / "2.txt").write_text("something else")
    assert count() == ("7 of 7", "6 of 7")
    (mixed / "4.png").rename(mixed / "renamed.png")
    (mixed / "4.txt").rename(mixed / "renamed.txt")
    assert count() == ("7 of 7", "7 of 7")
    after = {kind: entries(cache, kind) for kind in before}
    for kind, added in (("latents", 1), ("texts", 1), ("facts", 1)):
        assert len(after[kind]) == len(before[kind]) + added
        assert all(after[kind][name] == entry for name, entry in before[kind].items())
    assert count(resolution=96) == ("0 of 7", "7 of 7")
    assert count(clip_skip=1) == ("7 of 7", "0 of 7")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_a_kill_loses_one_batch_at_most(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed by SIGKILL in the middle of caching in batches of five, as a GPU has them, before a
    drawn entry is begun or gets its name, a run has kept all that it encoded but one batch at most;
    the next one computes only what is missing."""
    data = images(tmp_path / "images", 60)
    counter, output = tmp_path / "encoded", tmp_path / "out"
    encode = Latents.encode

    def counted(self: Latents, pixels: torch.Tensor, names: list[str]) -> torch.Tensor:
        moments = encode(self, pixels, names)
        with open(counter, "a", encoding="utf-8") as file:
            file.write("\n".join(names) + "\n")
        return moments

    monkeypatch.setattr(Latents, "encode", counted)
    monkeypatch.setattr(Latents, "at_once", lambda self, size: 5)
    config = text_to_image(tiny_sd1, data, output, data_cache_dir=str(output / "cache"))
    drawn = random.randint(41, 115)  # of two calls for each entry
    left = [drawn]

    def kill(path: str) -> None:
        if re.fullmatch(r"cache/latents/..(/[0-9a-f]{32})?", path):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

    process, ended = os.fork(), (0, 0)
    if not process:
        try:
            with watched(output, kill):
                prepare(config)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(1)
    try:
        deadline = time.monotonic() + 120
        while not ended[0]:
            assert time.monotonic() < deadline
            time.sleep(0.02)
            ended = os.waitpid(process, os.WNOHANG)
    finally:
        if not ended[0]:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(ended[1]) == -signal.SIGKILL
    found = entries(output / "cache", "latents")
    kept = {name: entry for name, entry in found.items() if not name.endswith(".part")}
    encoded = len(counter.read_text().splitlines())
    assert len(found) - len(kept) <= 1, drawn
    assert 15 <= len(kept) < 60, drawn
    assert encoded - len(kept) <= 5, drawn
    counter.unlink()
    prepare(config)
    assert len(counter.read_text().splitlines()) == 60 - len(kept)
    whole = entries(output / "cache", "latents")
    assert len(whole.keys() - (found.keys() - kept.keys())) == 60
    assert all(whole[name] == entry for name, entry in kept.items())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_runs_that_share_a_cache_do_not_harm_each_other(
    tiny_sd1: Path, mixed: Path, tmp_path: Path
) -> None:
    """Two runs that fill one cache at the same time, one of which empties it as they go, since its
    limit is a few bytes, both train what a run by itself does, to the last bit."""
    sd_lora.train(
        run_of(tiny_sd1, mixed, tmp_path / "alone", max_train_steps=6, cache_latents="no")
    )
    flags = (
        f"train --pretrained_model_name_or_path {tiny_sd1} --train_data_dir {mixed} --seed 0 "
        "--resolution 64 --train_batch_size 2 --max_train_steps 6 --learning_rate 1e-3 "
        f"--num_validation_images 0 --report_to none --data_cache_dir {tmp_path}/shared"
    ).split()
    flags += ["--targets", FEW]
    commands = [
        [*flags, "--output_dir", str(tmp_path / "a")],
        [*flags, "--output_dir", str(tmp_path / "tight"), "--data_cache_limit", "1e-9"],
    ]
    apart = Apart(commands, tmp_path / "said")
    assert apart.wait(300) == [0, 0], apart.text
    for name in ("a", "tight"):
        assert_same_bits(tmp_path / "alone", tmp_path / name)


def test_an_entry_that_vanishes_is_computed_again(
    tiny_sd1: Path, mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Entries that another run removes, or that a disk spoils, while a run goes on cost it time and
    change nothing: latents and texts too large to be held are computed anew."""
    want = optimised(run_of(tiny_sd1, mixed, tmp_path / "whole"))
    monkeypatch.setattr(caches, "HELD_BYTES", 0)  # as if all texts were too large to be held
    monkeypatch.setattr(embeddings, "HELD", 0)
    run = prepare(run_of(tiny_sd1, mixed, tmp_path / "robbed"))
    for path in (tmp_path / "c" / "latents").rglob("*"):
        if path.is_file():
            path.write_bytes(b"spoilt")
    shutil.rmtree(tmp_path / "c" / "texts")
    loop.train_steps(run, loop.LossLog(run))
    assert_same_outcome(want, (log(run.output_dir), [p.detach() for p in run.parameters]))


def snapshot(folder: Path) -> dict[str, tuple]:
    found = {}
    for path in sorted(folder.rglob("*")):
        about = path.lstat()
        data = path.read_bytes() if path.is_file() and about.st_size < 10**7 else b""
        found[str(path)] = (about.st_mode, about.st_mtime_ns, about.st_size, data)
    return found


def test_torture(tiny_sd1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder of every kind of bad and odd file: a run says what it leaves out and why, trains the
    good ones, each as often as its summary says, and changes nothing in the folder; a strict one
    stops before anything is loaded or written."""
    folder = tmp_path / "torture"
    expected = make_torture(folder) | {
        "captions/latin-1.png": "non-utf8-caption",
        "captions/missing.png": "missing-caption",
        "link.png": "missing-caption",
    }
    before = snapshot(folder)
    config = run_of(tiny_sd1, folder, tmp_path / "out", num_train_epochs=1, max_train_steps=None)
    run = prepare(config)
    said = run.summary.text()
    samples = run.images.instances.samples
    trained = {str(Path(s.name).relative_to(folder)) for s in samples}
    left_out = {f.name: f for f in run.images.by_kind["instance"].findings if f.level == "left out"}
    bad = {name for name, code in expected.items() if str(folder / name) in left_out}
    assert len(bad) >= 25
    assert not trained & bad
    codes = {name: left_out[str(folder / name)].code for name in bad}
    assert codes == {name: expected[name] for name in bad}
    for finding in left_out.values():
        assert finding.code in said
    loaded = Counter()
    for _, batch in run.batches():
        loaded.update(item.index for item in batch.items if item.weight)
    assert loaded == dict.fromkeys(range(len(samples)), 1)
    assert re.search(rf"images +{len(samples)}\n", said)
    assert snapshot(folder) == before
    with pytest.raises(sd_lora.RunError, match="and this run is strict"):
        sd_lora.train(run_of(tiny_sd1, folder, tmp_path / "strict", strict=True))
    assert not (tmp_path / "strict").exists()
    assert snapshot(folder) == before


def test_pad_batch_trains_as_smaller_does(tiny_sd1: Path, mixed: Path, tmp_path: Path) -> None:
    """What only fills a batch does not count: losses and gradients are those of smaller batches (to
    1e-4: batches of other sizes round otherwise); `repeat` is another run."""
    smaller, padded, repeated = (
        optimised(
            run_of(
                tiny_sd1, mixed, tmp_path / leftovers, bucket_leftovers=leftovers,
                train_batch_size=3,
            )
        )[0]
        for leftovers in ("smaller", "pad-batch", "repeat")
    )  # fmt: skip
    for key in ("loss", "grad_norm"):
        of = [[row[key] for row in rows] for rows in (smaller, padded, repeated)]
        assert of[0] == pytest.approx(of[1], rel=1e-4)
        assert of[0] != pytest.approx(of[2], rel=1e-2)


def test_resuming_with_buckets_is_exact(tiny_sd1: Path, mixed: Path, tmp_path: Path) -> None:
    """Buckets, an accumulation that does not divide the epoch, flips, shuffled tags and repeats:
    eight steps are three, a stop, and five more, to the last bit, over three epochs."""
    options: dict = {
        "gradient_accumulation_steps": 3, "random_flip": True, "shuffle_caption": True,
        "bucket_leftovers": "repeat", "checkpointing_steps": 3, "max_train_steps": 8,
    }  # fmt: skip
    result = sd_lora.train(run_of(tiny_sd1, mixed, tmp_path / "out", **options))
    whole, losses = weights(tmp_path / "out"), log(tmp_path / "out")
    assert len(result.losses) == 8
    again = run_of(
        tiny_sd1, mixed, tmp_path / "out", **options, resume_from_checkpoint="checkpoint-3"
    )
    sd_lora.train(again)
    resumed = weights(tmp_path / "out")
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    assert log(tmp_path / "out") == losses


def test_resuming_with_other_shapes_is_refused(tiny_sd1: Path, mixed: Path, tmp_path: Path) -> None:
    """A position in the data means an image: where one has another shape now, and so another
    place, the run is not the same."""
    sd_lora.train(run_of(tiny_sd1, mixed, tmp_path / "out", checkpointing_steps=3))
    Image.new("RGB", (128, 40), "red").save(mixed / "1.png")
    again = run_of(
        tiny_sd1, mixed, tmp_path / "out", checkpointing_steps=3,
        resume_from_checkpoint="checkpoint-3",
    )  # fmt: skip
    with pytest.raises(sd_lora.UsageError, match="images of other shapes, in another order"):
        sd_lora.train(again)


def test_going_on_with_an_older_checkpoint_is_refused(
    tiny_sd1: Path, mixed: Path, tmp_path: Path
) -> None:
    """A checkpoint of the earlier versions, with a pickle and without a manifest, is not gone on
    with, by name of the reason."""
    options = {"checkpointing_steps": 3, "max_train_steps": 4}
    sd_lora.train(run_of(tiny_sd1, mixed, tmp_path / "out", **options))
    (tmp_path / "out" / "checkpoint-3" / "manifest.json").unlink()
    (tmp_path / "out" / "checkpoint-3" / "optimizer.pt").touch()
    for name in ("checkpoint-3", "latest-if-any"):  # the second does not start anew over it
        (tmp_path / "out" / "checkpoint-4" / "manifest.json").unlink(missing_ok=True)
        again = run_of(tiny_sd1, mixed, tmp_path / "out", **options, resume_from_checkpoint=name)
        with pytest.raises(sd_lora.UsageError, match="written by an earlier version"):
            prepare(again)


def test_edits_since_a_checkpoint_are_told(tiny_sd1: Path, mixed: Path, tmp_path: Path) -> None:
    """A run that goes on with an edited caption or image of the same shape says so, and with the
    same ones does not."""
    options = {"checkpointing_steps": 3, "max_train_steps": 4}
    sd_lora.train(run_of(tiny_sd1, mixed, tmp_path / "out", **options))
    again = run_of(
        tiny_sd1, mixed, tmp_path / "out", **options, resume_from_checkpoint="checkpoint-3"
    )
    note = "images, captions or crops have changed since it was written"
    assert note not in prepare(again).summary.notes
    (mixed / "2.txt").write_text("edited")
    assert note in prepare(again).summary.notes


def test_an_image_that_is_lost_in_mid_run_costs_no_step(
    tiny_sd1: Path, mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image that is read anew and vanishes ends the run by name, with a checkpoint of the last
    whole step; when it is back, the run goes on to the weights that it would have had."""
    options = {"cache_latents": "no", "max_train_steps": 6, "gradient_accumulation_steps": 2}
    sd_lora.train(run_of(tiny_sd1, mixed, tmp_path / "whole", **options))
    original, calls = loop.batch_loss, []

    def thief(*args: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 4:
            (mixed / "5.png").rename(tmp_path / "away.png")
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "batch_loss", thief)
        with pytest.raises(
            sd_lora.RunError, match=r"5\.png could not be read.*is saved: restore the image"
        ):
            sd_lora.train(run_of(tiny_sd1, mixed, tmp_path / "cut", **options))
    assert list((tmp_path / "cut").glob("checkpoint-*"))
    (tmp_path / "away.png").rename(mixed / "5.png")
    latest = {"resume_from_checkpoint": "latest"}
    sd_lora.train(run_of(tiny_sd1, mixed, tmp_path / "cut", **options, **latest))
    assert_same_bits(tmp_path / "whole", tmp_path / "cut")


def test_an_image_that_is_lost_at_the_end_costs_one_number(
    tiny_sd1: Path, mixed: Path, tmp_path: Path
) -> None:
    """Where an image of any of the first steps but the first is gone, the loss on the same images
    is not told, and not that of the images that are left."""
    run = prepare(run_of(tiny_sd1, mixed, tmp_path / "out", cache_latents="no", max_train_steps=4))
    micros = range(run.plan.epochs.first_of_step(4))
    used = [{item.index for item in run.stream.batch(number).items} for number in micros]
    (lost, *_) = set().union(*used[1:]) - used[0]
    assert math.isfinite(loop.replay(run)[1])
    Path(run.images.instances.samples[lost].name).unlink()
    assert math.isnan(loop.replay(run)[1])


def test_an_image_that_changes_after_the_check_is_not_kept(
    tiny_sd1: Path, mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An entry is addressed by the bytes that were checked: other bytes are never kept under it."""
    from sd_lora.training import setup

    inject = setup.inject_all

    def edited(*args: object) -> dict:
        Image.new("RGB", SHAPES[2], "red").save(mixed / "2.png")
        return inject(*args)

    monkeypatch.setattr(setup, "inject_all", edited)
    with pytest.raises(sd_lora.RunError, match=r"2\.png was changed after it was checked"):
        prepare(run_of(tiny_sd1, mixed, tmp_path / "out"))


def test_a_run_keeps_its_own_entries(tiny_sd1: Path, mixed: Path, tmp_path: Path) -> None:
    """Beyond the limit, what is removed is what the run does not use: latents, texts and facts of
    its own stay, those of an image and a caption that are gone do not, and the summary says so."""
    prepare(run_of(tiny_sd1, mixed, tmp_path / "out"))
    before = {kind: set(entries(tmp_path / "c", kind)) for kind in ("latents", "texts", "facts")}
    (mixed / "6.png").unlink()
    (mixed / "6.txt").unlink()
    run = prepare(run_of(tiny_sd1, mixed, tmp_path / "out", data_cache_limit=1e-9,
                         cache_latents="disk", cache_text_embeddings="disk"))  # fmt: skip
    assert any("3 entries" in note and "data_cache_limit" in note for note in run.summary.notes)
    for kind, names in before.items():
        kept = set(entries(tmp_path / "c", kind))
        assert kept < names
        assert len(kept) == 6
    again = prepare(run_of(tiny_sd1, mixed, tmp_path / "out"))
    assert "6 of 6 from before" in again.summary.rows["latents"]


KOHYA = """
[general]
shuffle_caption = true
keep_tokens = 1

[[datasets]]
resolution = 64
batch_size = 2
enable_bucket = true

  [[datasets.subsets]]
  image_dir = "{folder}/mixed"
  caption_extension = ".txt"
  num_repeats = 3

  [[datasets.subsets]]
  image_dir = "{folder}/reg"
  class_tokens = "a thing"
  is_reg = true
"""


def test_a_dataset_config_of_kohyas(tiny_sd1: Path, mixed: Path, tmp_path: Path) -> None:
    """A run from kohya's dataset configuration: repeats, batch size and tags are the file's, class
    images of its own take part with their weight, and every image is seen three times an
    epoch."""
    images(tmp_path / "reg", 3, (96, 64))
    (tmp_path / "reg" / "metadata.jsonl").unlink()
    path = tmp_path / "data.toml"
    path.write_text(KOHYA.format(folder=tmp_path))
    from sd_lora.config.command_line import parse

    config = parse(
        ["--pretrained_model_name_or_path", str(tiny_sd1), "--dataset_config", str(path),
         "--output_dir", str(tmp_path / "out"), "--num_train_epochs", "1", "--seed", "0",
         "--num_validation_images", "0", "--report_to", "none", "--prior_loss_weight", "0.5"]
    )  # fmt: skip
    assert (config.resolution, config.train_batch_size) == (64, 2)
    run = prepare(config)
    loaded: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    for _, batch in run.batches():
        kinds.update(item.kind for item in batch.items)
        loaded.update(
            Path(run.images.instances.samples[item.index].name).name
            for item in batch.items
            if item.kind == "instance"
        )
        assert {item.caption for item in batch.items if item.kind == "class"} == {"a thing"}
        assert all(
            item.caption.startswith("thing ") for item in batch.items if item.kind == "instance"
        )
    assert loaded == dict.fromkeys((f"{i}.png" for i in range(7)), 3)
    assert kinds["class"] == kinds["instance"] == 21
    assert "7 × 3 repeats = 21 an epoch, and 3 of the class" in run.summary.rows["images"]
    sd_lora.train(config)


def test_several_resolutions(tiny_sd1: Path, mixed: Path, tmp_path: Path) -> None:
    """Two resolutions of a folder, and a source with one of its own: each image is seen once at
    each in an epoch, in a bucket of at most its area, and a batch has one shape. With caches and
    without, the losses are the same to the last bit, and each shape is an entry of its own."""
    Image.radial_gradient("L").convert("RGB").save(images(tmp_path / "own", 1) / "0.png")
    sources = [{"path": str(mixed)}, {"path": str(tmp_path / "own"), "resolutions": [128]}]
    options: dict[str, object] = {
        "train_data_dir": None, "sources": sources, "resolution": None, "resolutions": [64, 96],
        "max_train_steps": None, "num_train_epochs": 1,
    }  # fmt: skip
    config = run_of(tiny_sd1, mixed, tmp_path / "out", **options)
    run = prepare(config)
    assert run.config.resolution == 96
    assert run.summary.rows["resolutions"] == "64: 7, 96: 7, 128: 1"
    assert run.summary.rows["images"].startswith("15 (8 files, some at several resolutions")
    samples = run.images.instances.samples
    seen: Counter[tuple[str, int | None]] = Counter()
    for _, batch in run.batches():
        assert len({item.crop.size for item in batch.items}) == 1
        for item in batch.items:
            sample, (width, height) = samples[item.index], item.crop.size
            assert width * height <= (sample.resolution or 0) ** 2
            assert width * height > (sample.resolution or 0) ** 2 / 2
            seen[sample.name, sample.resolution] += 1
    want = {(str(mixed / f"{i}.png"), side): 1 for i in range(7) for side in (64, 96)}
    assert seen == want | {(str(tmp_path / "own" / "0.png"), 128): 1}
    assert len(entries(tmp_path / "c", "latents")) == 15
    known = optimised(run_of(tiny_sd1, mixed, tmp_path / "known", **options))
    off = {"cache_latents": "no", "cache_text_embeddings": "no"}
    assert_same_outcome(
        known, optimised(run_of(tiny_sd1, mixed, tmp_path / "no", **options, **off))
    )
    with pytest.raises(UsageError, match=r"resolution 70, 100 is not a multiple .* take 64, 96"):
        prepare(run_of(tiny_sd1, mixed, tmp_path / "x", **options | {"resolutions": [70, 96, 100]}))


def test_several_sources(tiny_sd1: Path, mixed: Path, tmp_path: Path) -> None:
    """Three sources in one run, each with its repeats, weight and captions: a folder with sidecars,
    kohya's numbered folders, and a folder whose file names are the captions."""
    numbered = tmp_path / "numbered" / "5_a dog"
    numbered.mkdir(parents=True)
    Image.new("RGB", (64, 64), "blue").save(numbered / "x.png")
    named = tmp_path / "named"
    named.mkdir()
    Image.new("RGB", (64, 64), "green").save(named / "a_green_square.png")
    sources = [
        {"path": str(mixed), "shuffle_caption": True},
        {"path": str(numbered.parent), "weight": 0.5},
        {"path": str(named), "captions": "filename", "repeats": 2, "trigger_word": "sks"},
    ]
    config = run_of(
        tiny_sd1, mixed, tmp_path / "out", train_data_dir=None, sources=sources,
        num_train_epochs=1, max_train_steps=None,
    )  # fmt: skip
    run = prepare(config)
    loaded: Counter[tuple[str, float]] = Counter()
    for _, batch in run.batches():
        for item in batch.items:
            name = Path(run.images.instances.samples[item.index].name).name
            loaded[name, item.weight] += 1
            if name == "x.png":
                assert item.caption == "a dog"
            if name == "a_green_square.png":
                assert item.caption == "sks, a green square"
    want = {(f"{i}.png", 1.0): 1 for i in range(7)}
    assert loaded == want | {("x.png", 0.5): 5, ("a_green_square.png", 1.0): 2}
    sd_lora.train(config)


def test_masks_weigh_the_loss(tiny_sd1: Path, tmp_path: Path) -> None:
    """With alpha_mask what is transparent does not count: the loss is the mean over opaque latents,
    whatever lies in the others, or counts a quarter with an unmasked weight of 1/4; with no opacity
    given nothing changes."""
    folder = tmp_path / "images"
    folder.mkdir()
    left = Image.new("L", (64, 64), 0)
    left.paste(255, (0, 0, 32, 64))
    image = Image.radial_gradient("L").resize((64, 64)).convert("RGB")
    image.putalpha(left)
    image.save(folder / "0.png")
    (folder / "0.txt").write_text("half a thing")
    options = {"train_batch_size": 1, "cache_latents": "memory"}
    run = prepare(run_of(tiny_sd1, folder, tmp_path / "out", alpha_mask=True, **options))
    batch = run.stream.batch(0)
    mask = run.latents.latents(batch.items, batch.loaded).mask
    assert mask.shape == (1, 1, 8, 8)
    assert mask[..., :4].eq(1).all()
    assert mask[..., 4:].eq(0).all()
    with torch.no_grad():
        masked = loop.batch_loss(run, batch, 0)
        assert errors(run).mean() != masked
        torch.testing.assert_close(masked, errors(run)[..., :4].mean())
        less = dataclasses.replace(run.objective.loss, unmasked_weight=0.25)
        run.objective = dataclasses.replace(run.objective, loss=less)
        inside, outside = errors(run)[..., :4].mean(), errors(run)[..., 4:].mean()
        torch.testing.assert_close(loop.batch_loss(run, batch, 0), (4 * inside + outside) / 5)
    plain = prepare(run_of(tiny_sd1, folder, tmp_path / "plain", **options))
    batch = plain.stream.batch(0)
    assert plain.latents.latents(batch.items, batch.loaded).mask is None


def test_mask_files_weigh_the_loss(tiny_sd1: Path, tmp_path: Path) -> None:
    """A mask beside its image, of half its size, is the weight of each latent, multiplied by its
    opacity under alpha_mask; flipped as the image is. It is a part of the latent's entry, and one
    that changes after the check ends the run by its name."""
    folder = tmp_path / "images"
    folder.mkdir()
    top, image = Image.new("L", (64, 64), 0), Image.radial_gradient("L").resize((64, 64))
    top.paste(255, (0, 0, 64, 32))
    image = image.convert("RGB")
    image.putalpha(top)
    image.save(folder / "0.png")
    (folder / "0.txt").write_text("half a thing")
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (0, 0, 16, 32))
    mask.save(folder / "0-masklabel.png")
    options = {"train_batch_size": 1, "max_train_steps": 8, "random_flip": True}

    def masks(name: str, **more: bool) -> list[torch.Tensor | None]:
        run = prepare(run_of(tiny_sd1, folder, tmp_path / name, **options, **more))
        batches = [run.stream.batch(i) for i in range(8)]
        assert {batch.items[0].flip for batch in batches} == {False, True}
        found = [run.latents.latents(b.items, b.loaded).mask for b in batches]
        if "mask_files" in more:
            assert run.summary.rows["masks"] == "on 1 of 1 image"
        flips = [batch.items[0].flip for batch in batches]
        return [
            m.flip(-1) if m is not None and flip else m
            for m, flip in zip(found, flips, strict=True)
        ]

    assert masks("none") == [None] * 8
    left = torch.tensor([1.0] * 4 + [0.0] * 4).expand(1, 1, 8, 8)
    assert all(torch.equal(m, left) for m in masks("file", mask_files=True))
    both = left * left.transpose(-1, -2)
    assert all(torch.equal(m, both) for m in masks("both", mask_files=True, alpha_mask=True))
    assert len(entries(tmp_path / "c", "latents")) == 6
    off = prepare(
        run_of(tiny_sd1, folder, tmp_path / "no", **options, mask_files=True, cache_latents="no")
    )
    Image.new("L", (32, 32)).save(folder / "0-masklabel.png")
    assert "0-masklabel.png was changed after it was checked" in str(off.stream[0])
    with pytest.raises(RunError, match=r"0.png: nothing of its crop counts: its mask is black"):
        prepare(run_of(tiny_sd1, folder, tmp_path / "black", **options, mask_files=True))


@torch.no_grad()
def errors(run: Run) -> torch.Tensor:
    """The squared errors of the first batch, one by one."""
    objective = run.objective
    batch = run.stream.batch(0)
    addresses = [item.address for item in batch.items]
    x0 = run.latents.latents(batch.items, batch.loaded).x0
    noise, t = objective.noise.draw(x0, addresses), objective.timesteps.draw(addresses)
    x_t = run.unet_input(objective.schedule.add_noise(x0, noise, t), batch)
    arguments = run.conditions(batch.items, 0).arguments()
    prediction = run.prepared["unet"](x_t, objective.schedule.timesteps[t], **arguments).sample
    return (prediction - noise).square()


def test_a_dreambooth_run_with_class_images_of_other_shapes(
    tiny_sd1: Path, mixed: Path, tmp_path: Path
) -> None:
    """Subject images in buckets, class images in others: every subject image is seen once an
    epoch with a class image beside it, and all class images are used."""
    classes = images(tmp_path / "class", 5, (40, 128))
    config = dreambooth(
        tiny_sd1, mixed, tmp_path / "out", with_prior_preservation=True, num_class_images=5,
        class_data_dir=str(classes), class_prompt="a thing", max_train_steps=None,
        num_train_epochs=5,
    )  # fmt: skip
    run = prepare(config)
    loaded: Counter[tuple[str, int]] = Counter()
    for _, batch in run.batches():
        loaded.update((item.kind, item.index) for item in batch.items)
        shapes = {item.kind: item.crop.size for item in batch.items}
        assert shapes["instance"] != shapes["class"] == (32, 96)
    assert loaded == {("instance", i): 5 for i in range(7)} | {("class", i): 7 for i in range(5)}
    assert loop.batch_loss(run, run.stream.batch(0), 0) > 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_ctrl_c_in_the_check_ends_it(tiny_sd1: Path, tmp_path: Path) -> None:
    """SIGINT while images are checked ends the command at once, with its usual exit code and no
    traceback."""
    folder = tmp_path / "many"
    folder.mkdir()
    Image.effect_noise((3000, 3000), 100).convert("RGB").save(folder / "0.jpg")
    for i in range(1, 60):
        shutil.copy(folder / "0.jpg", folder / f"{i}.jpg")
        with open(folder / f"{i}.jpg", "ab") as file:
            file.write(bytes([i]))  # another content
    words = ["check", "--pretrained_model_name_or_path", str(tiny_sd1), "--train_data_dir",
             str(folder), "--caption_default", "noise", "--no_page", "--data_cache_dir",
             str(tmp_path / "c")]  # fmt: skip
    apart = Apart([words], tmp_path / "said")
    (process,) = apart.processes
    deadline = time.monotonic() + 100
    while not entries(tmp_path / "c", "facts"):
        assert time.monotonic() < deadline
        assert process.is_alive()
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    assert apart.wait(20) == [130]
    assert "Traceback" not in apart.text


def test_a_proposed_pattern_is_of_its_image_alone(tiny_sd1: Path, tmp_path: Path) -> None:
    """The end of a path that the page proposes for --leave_out takes that image and no other one,
    also of names with signs that patterns, commas and spaces have a meaning for; where each end is
    of another image too, nothing is proposed."""
    odd = ["img [1].png", "a,[2].png", " b.png", "c*.png", "d?.png", "sub/e.png"]
    alike = ["img 1.png", "a,2.png", "c1.png", "d1.png", "e.png", "other/sub e.png"]
    for number, name in enumerate([*odd, *alike]):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (20 * number, 99, 0)).save(tmp_path / "data" / name)
        (tmp_path / "data" / name).with_suffix(".txt").write_text(f"thing {number}")
    patterns = [shortest(name, [*odd, *alike]) for name in odd]
    config = text_to_image(
        tiny_sd1, tmp_path / "data", tmp_path / "out", leave_out=",".join(patterns)
    )
    left = {
        Path(sample.name).relative_to(tmp_path / "data").as_posix()
        for sample in prepare(config).images.instances.samples
    }
    assert left == {*alike}
    assert shortest("x,y.png", ["x,y.png", "x1y.png"]) == ""
