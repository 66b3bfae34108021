"""`sd-lora check`: what it prints, writes and returns, and that a run does what it says."""

import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from sd_lora.cli import main
from sd_lora.config.command_line import parse
from sd_lora.training.setup import prepare
from tests.training.runs import images


def words(model: Path, data: Path, *more: str) -> list[str]:
    return [
        "--pretrained_model_name_or_path", str(model), "--train_data_dir", str(data),
        "--resolution", "64", "--train_batch_size", "2", "--report_to", "none",
        "--data_cache_dir", str(data.parent / "cache"), *more,
    ]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six good images of three shapes, a broken one, and a caption that is too long."""
    data = tmp_path / "data"
    for i, size in enumerate([(64, 64), (128, 40), (64, 64), (30, 60), (64, 64), (200, 190)]):
        images(tmp_path / "one", 1, size)
        data.mkdir(exist_ok=True)
        Image.open(tmp_path / "one" / "0.png").rotate(180 * (i % 2)).save(
            data / f"{i}.png", compress_level=i
        )
        (data / f"{i}.txt").write_text(f"image {i}")
    (data / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    (data / "broken.txt").write_text("broken")
    (data / "4.txt").write_text("word " * 100)
    return data


def test_what_is_said_is_what_is_trained(
    tiny_sd1: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The JSON's images, buckets, steps and repeats are those of a run with the same flags: each
    image is seen as often as it says, in the shape that it says."""
    flags = words(tiny_sd1, folder, "--num_train_epochs", "2", "--repeats", "3", "--seed", "1")
    assert main(["check", *flags, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["counts"]["left out"] == 1
    found = {(f["code"], Path(f["name"]).name) for f in said["findings"]}
    assert {("long-caption", "4.png"), ("upscaled", "3.png")} <= found
    assert {f["level"] for f in said["findings"] if f["name"].endswith("broken.png")} == {
        "left out"
    }
    run = prepare(parse([*flags, "--output_dir", str(tmp_path / "out")]))
    assert said["steps"] == run.plan.num_steps
    assert said["samples_per_epoch"] == 18
    seen: Counter[tuple[str, tuple[int, int]]] = Counter()
    batches = Counter()
    for _, batch in run.batches():
        batches[batch.items[0].crop.size] += 1
        for item in batch.items:
            seen[run.images.instances.samples[item.index].name, item.crop.size] += 1
    assert seen == {(p["name"], tuple(p["bucket"])): 2 * p["repeats"] for p in said["images"]}
    assert batches == {(b["width"], b["height"]): 2 * b["batches"] for b in said["buckets"]}
    assert said["summary"]["steps"] == run.summary.rows["steps"]


def test_the_terminal_and_the_page(
    tiny_sd1: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The terminal has the arithmetic, the bucket table and what was found; the page shows every
    image that is trained in its frame, and those that repeat one another together. A page that
    cannot be written costs the page alone."""
    page = tmp_path / "look.html"
    assert main(["check", *words(tiny_sd1, folder), "--page", str(page)]) == 0
    said = capsys.readouterr().out
    for text in ("cut away", "broken: 1", "long-caption", "upscaled", "latents", "LoRA files"):
        assert text in said
    assert "images that will be trained: 6, files and folders that are left out: 1" in said
    html = page.read_text()
    assert html.count("<article") == 6
    assert html.count("data:image/jpeg;base64,") == 6 + html.count("<figure")
    assert html.count("<figure") == 3  # 0, 2 and 4 are one image, compressed in three ways
    assert "5.png" in html
    assert main(["check", *words(tiny_sd1, folder), "--page", str(tmp_path)]) == 1
    both = capsys.readouterr()
    assert "cut away" in both.out
    assert "could not be written" in both.err


def test_strict(tiny_sd1: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With --strict everything is shown all the same, and the exit code is 1 for what is left out
    or a warning; without such, 0."""
    assert main(["check", *words(tiny_sd1, folder), "--strict", "--json"]) == 1
    both = capsys.readouterr()
    assert json.loads(both.out)["counts"]["left out"] == 1
    assert "this run is strict" in both.err
    for name in ("broken", "3", "4"):
        (folder / f"{name}.png").unlink()
        (folder / f"{name}.txt").unlink()
    (folder / "1.png").unlink()  # 40 pixels high: tiny
    (folder / "1.txt").unlink()
    assert main(["check", *words(tiny_sd1, folder), "--strict", "--json"]) == 0


def test_nothing_can_be_trained(
    tiny_sd1: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where all images are broken, scripts get the findings, people the reasons, and both exit
    code 1."""
    for path in folder.glob("*.png"):
        path.write_bytes(b"nothing")
    assert main(["check", *words(tiny_sd1, folder), "--json"]) == 1
    both = capsys.readouterr()
    assert len(json.loads(both.out)["findings"]) >= 7
    assert "none of the instance images can be trained" in both.err
    assert main(["check", *words(tiny_sd1, folder), "--no_page"]) == 1
    assert "0.png" in capsys.readouterr().err


def test_class_images_are_counted_as_a_run_counts_them(
    tiny_sd1: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A broken class image does not count: check says how many will be generated, and a run
    generates these; a strict run stops before it does."""
    classes = images(tmp_path / "class", 3)
    (classes / "bad.png").write_bytes(b"")
    flags = [
        "--mode", "dreambooth", "--pretrained_model_name_or_path", str(tiny_sd1), "--resolution",
        "64", "--instance_data_dir", str(folder), "--instance_prompt", "a sks thing",
        "--with_prior_preservation", "--class_data_dir", str(classes), "--class_prompt", "a thing",
        "--num_class_images", "5", "--report_to", "none", "--output_dir", str(tmp_path / "out"),
        "--data_cache_dir", str(tmp_path / "cache"), "--seed", "0", "--sample_batch_size", "2",
    ]  # fmt: skip
    assert main(["check", *flags, "--no_page"]) == 0
    assert "3 there, 2 will be generated" in capsys.readouterr().out
    assert main(["train", *flags, "--strict"]) == 1
    assert not list(classes.glob("class-*"))
    run = prepare(parse(flags))
    assert len(list(classes.glob("class-*"))) == 2
    assert len(run.images.by_kind["class"].set.samples) == 5


def test_class_images_in_subfolders_are_told_before_others_are_drawn(
    tiny_sd1: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Class images one folder below class_data_dir, as kohya has them, are an error that names the
    folder while images are missing: a run would draw others beside them. With enough images there
    it is a finding."""
    images(tmp_path / "class" / "1_thing", 3)
    flags = [
        "--mode", "dreambooth", "--pretrained_model_name_or_path", str(tiny_sd1), "--resolution",
        "64", "--instance_data_dir", str(folder), "--instance_prompt", "a sks thing",
        "--class_data_dir", str(tmp_path / "class"), "--class_prompt", "a thing",
        "--with_prior_preservation", "--report_to", "none", "--output_dir", str(tmp_path / "out"),
        "--num_class_images",
    ]  # fmt: skip
    for command in ("check", "train"):
        assert main([command, *flags, "3"]) == 2
        assert (
            "has 0 of 3 class images, and others lie in its subfolders" in capsys.readouterr().err
        )
    assert [p.name for p in (tmp_path / "class").iterdir()] == ["1_thing"]
    images(tmp_path / "class", 3, (72, 64))
    assert main(["check", *flags, "3", "--json"]) == 0
    found = {f["code"]: f["text"] for f in json.loads(capsys.readouterr().out)["findings"]}
    assert found["subfolder"].startswith("a folder with 3 images")


def test_class_sources_have_captions_of_their_own(
    tiny_sd1: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is said of the subject is not for its class: no prompt, trigger word or repeats."""
    (tmp_path / "class").mkdir()
    Image.new("RGB", (64, 64), "red").save(tmp_path / "class" / "a.png")
    (tmp_path / "class" / "a.txt").write_text("a thing")
    Image.new("RGB", (64, 64), "green").save(tmp_path / "class" / "b.png")
    config = tmp_path / "run.toml"
    config.write_text(
        f"""
        caption_default = "sks"
        trigger_word = "sks"
        repeats = 4
        [[sources]]
        path = "{folder}"
        [[sources]]
        path = "{tmp_path}/class"
        kind = "class"
        """
    )
    flags = ["--config", str(config), "--pretrained_model_name_or_path", str(tiny_sd1)]
    flags += ["--resolution", "64", "--data_cache_dir", str(tmp_path / "cache")]
    assert main(["check", *flags, "--json", "--page", str(tmp_path / "look.html")]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (tmp_path / "look.html").read_text().count(">class image<") == 1
    of_class = [p for p in said["images"] if p["kind"] == "class"]
    assert [(p["captions"], p["repeats"]) for p in of_class] == [(["a thing"], 1)]
    assert {p["repeats"] for p in said["images"] if p["kind"] == "instance"} == {4}
    missing = [f["name"] for f in said["findings"] if f["code"] == "missing-caption"]
    assert missing == [str(tmp_path / "class" / "b.png")]
    run = prepare(parse([*flags, "--report_to", "none", "--output_dir", str(tmp_path / "out")]))
    captions = {s.caption for s in run.stream.batch(0).items if s.kind == "class"}
    assert captions == {"a thing"}


def test_a_folder_is_enough(root: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a model, images are checked against the published Stable Diffusion 1.x, or the model
    of --family: its resolution and shapes. Without captions and prompt a folder is a subject's.
    What is assumed or not counted is said; a run refuses both."""
    for more, side in ([], 512), (["--family", "sdxl"], 1024):
        assert main(["check", str(folder), *more, "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        assert {"width": side, "height": side}.items() <= said["buckets"][0].items()
        assert not any(found["code"] == "long-caption" for found in said["findings"])
        assert "not given" in said["summary"]["model"]
        assert "not counted" in said["summary"]["tokens"]
    tokenizer = ["--tokenizer_name", str(root / "sample_data/tiny-sd")]
    assert main(["check", str(folder), *tokenizer, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert "long-caption" in {found["code"] for found in said["findings"]}

    for caption in folder.glob("*.txt"):
        caption.unlink()
    assert main(["check", str(folder), "--json"]) == 0
    assert "a run needs --prompt" in json.loads(capsys.readouterr().out)["summary"]["prompt"]
    assert main(["train", str(folder)]) == 2
    told = capsys.readouterr().err
    assert "no captions" in told
    assert "--model is required" in told


def test_each_job_is_looked_at(
    tiny_sd1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Of several jobs the check prints a block and writes a page each; as JSON it is one document
    by name. A prediction is of one run, and refused."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "jobs.toml"
    file.write_text(
        f'pretrained_model_name_or_path = "{tiny_sd1.as_posix()}"\nresolution = 64\n'
        + "".join(
            f'[[jobs]]\nname = "{name}"\ntrain_data_dir = "{name}s"\nmax_train_steps = {steps}\n'
            for name, steps in {"cat": 3, "dog": 5}.items()
        )
    )
    for name in ("cats", "dogs"):
        images(tmp_path / name, 2)
    assert main(["check", "--config", str(file)]) == 0
    said = capsys.readouterr().out
    assert [line for line in said.splitlines() if line.startswith("sd_lora check")] == [
        "sd_lora check of job cat:", "sd_lora check of job dog:",
    ]  # fmt: skip
    assert {path.name for path in tmp_path.glob("*.html")} == {"check-cat.html", "check-dog.html"}
    assert main(["check", "--config", str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["jobs"]
    assert {name: checked["steps"] for name, checked in found.items()} == {"cat": 3, "dog": 5}
    assert main(["check", "--config", str(file), "--card", "8GB"]) == 2
    assert "--card predicts one run" in capsys.readouterr().err
