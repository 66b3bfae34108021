"""`sd-lora judge`: its losses are those of the weights, its verdicts follow the numbers."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import sd_lora
from sd_lora.cli import main
from sd_lora.formats import adapter_files as files
from sd_lora.report.strengths import Judged, best_of
from sd_lora.report.verdict import GOOD, OVER, UNDER
from sd_lora.sampling.interval import Interval
from sd_lora.sampling.score import Score
from sd_lora.training.scoring import PLACES, prompts_for, subject_prompt_of
from sd_lora.training.setup import prepare
from tests.formats.trained import saved, trained
from tests.training.runs import dreambooth, images, text_to_image

ENCODER = Path(__file__).parent.parent / "sample_data" / "encoder"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images(tmp_path_factory.mktemp("data") / "images", 5)


def judged(capsys: pytest.CaptureFixture[str], *words: object) -> list[dict[str, object]]:
    """The JSON of a command."""
    capsys.readouterr()
    assert main([str(word) for word in ("judge", *words, "--json")]) == 0
    found: list[dict[str, object]] = json.loads(capsys.readouterr().out)
    return found


def losses(row: dict[str, object]) -> dict[float, float]:
    """Strength → loss."""
    assert isinstance(row["strengths"], list)
    return {one["strength"]: one["loss"] for one in row["strengths"]}


def test_losses_are_those_of_the_weights(
    tiny_sd1: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The loss at strength 0.5 is the base's loss of a model with half of the file's ΔW, text
    encoder included, baked in; two files are measured in one go as each alone, in any order."""
    paths = [
        saved(tmp_path / f"{name}.safetensors", kind, trained(tiny_sd1, seed), tiny_sd1)
        for seed, (name, kind) in enumerate([("a", files.KOHYA), ("b", files.DIFFUSERS)])
    ]
    half = tmp_path / "half"
    assert main(["bake", str(tiny_sd1), str(paths[0]), "--weights", "0.5", "--out", str(half)]) == 0
    words = ("--images", data, "--resolution", 64, "--seed", 7, "--strengths", 0.5, "--model")
    both = judged(capsys, *paths, *words, tiny_sd1)
    baked = judged(capsys, paths[1], *words, half)
    first, second = map(losses, both)
    assert baked[0]["base_loss"] == pytest.approx(first[0.5], rel=1e-5)
    assert both[0]["base_loss"] == both[1]["base_loss"]
    assert abs(first[0.5] / first[1.0] - 1) > 1e-4
    assert judged(capsys, paths[1], *words, tiny_sd1) == both[1:]
    assert set(second) == {0.5, 1.0}


def test_a_run_is_judged_as_it_validates_itself(
    tiny_sd1: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last validation of a run is the loss of its file, and the first one the base's; its last
    score is that of the images which the file draws; also by a checkpoint in the file's place."""
    changes = {
        "rank": 2, "validate_every": 6, "train_text_encoder": True, "validation_steps": 1,
        "score_features": str(ENCODER), "score_sets": 3, "score_every": 6,
        "score_class_prompt": "a photo of a thing",
    }  # fmt: skip
    sd_lora.train(text_to_image(tiny_sd1, data, tmp_path / "run", **changes))
    record = json.loads((tmp_path / "run" / "report.json").read_text())
    rows, scores = record["validation"]["rows"], record["scores"]["rows"]
    assert [row["step"] for row in scores] == [0, 6]
    words = ["--images", data, "--resolution", 64, "--seed", 0, "--strengths", 1, "--model"]
    looks = ["--features", ENCODER, "--class_prompt", "a photo of a thing", "--validation_steps", 1]
    looks += ["--out", tmp_path / "judge.png"]
    file, checkpoint = tmp_path / "run", tmp_path / "run" / "checkpoint-6"
    for found in judged(capsys, file, checkpoint, *words, tiny_sd1, *looks):
        assert found["base_loss"] == pytest.approx(rows[0]["trained"]["loss"], rel=1e-6)
        assert losses(found)[1.0] == pytest.approx(rows[-1]["trained"]["loss"], rel=1e-5)
        seen = found["strengths"][-1]["score"]
        for name in ("fidelity", "class_leak", "unrelated_leak", "harm", "followed"):
            values = scores[-1]["score"][name]["values"]
            assert seen[name]["values"] == pytest.approx(values, abs=0.02)
    assert any(abs(v) > 0.001 for v in scores[-1]["score"]["harm"]["values"])


def test_images_are_drawn_and_scored(
    tiny_sd1: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With features each strength has a score and a row of the sheet, and the verdict is by it; a
    sheet that is there is not replaced."""
    file = saved(tmp_path / "a.safetensors", files.KOHYA, trained(tiny_sd1, text=False), tiny_sd1)
    words = [file, "--model", tiny_sd1, "--images", data, "--resolution", "64", "--strengths", "1"]
    words += ["--features", ENCODER, "--class_prompt", "a photo of a thing", "--validation_steps"]
    words += ["2", "--prompt", "a photo of sks thing", "--out", tmp_path / "judge.png"]
    (found,) = judged(capsys, *words)
    assert isinstance(found["strengths"], list)
    assert found["strengths"][0]["score"]["class_leak"]["mean"] is not None
    assert str(found["verdict"]).startswith("By its images, ")
    with Image.open(tmp_path / "judge.png") as sheet:
        assert sheet.width > len(PLACES) * 2 * 128
    assert main([str(word) for word in ("judge", *words)]) == 2
    assert "judge.png is there already" in capsys.readouterr().err


def test_mistakes_are_told_at_once(
    tiny_sd1: Path, tiny_sdxl: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files of another model are all named; so are a missing file, a folder without captions or
    prompt, a class prompt that nothing draws, drawn images that cannot be written, and images
    whose captions are empty, before anything is measured."""
    paths = [
        saved(tmp_path / f"{i}.safetensors", files.KOHYA, trained(tiny_sd1), tiny_sd1)
        for i in range(2)
    ]
    of_xl = ["--model", str(tiny_sdxl), "--images", str(data), "--resolution", "64"]
    assert main(["judge", *map(str, paths), *of_xl]) == 2
    assert capsys.readouterr().err.count("does not fit") == 2
    (tmp_path / "bare").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "bare" / "0.png")
    (tmp_path / "blank").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "blank" / "0.png")
    row = {"file_name": "0.png", "text": ""}
    (tmp_path / "blank" / "metadata.jsonl").write_text(json.dumps(row))
    of_sd1 = ["--model", str(tiny_sd1), "--images"]
    blank = [str(paths[0]), *of_sd1, str(tmp_path / "blank"), "--features", str(ENCODER)]
    drawn = [str(paths[0]), *of_sd1, str(tmp_path / "bare"), "--features", str(ENCODER)]
    for words, said in (
        (["nowhere.safetensors", *of_sd1, str(data)], "no LoRA file nowhere.safetensors"),
        ([str(paths[0]), *of_sd1, str(data), "--class_prompt", "a dog"], "give --features"),
        ([str(paths[0]), *of_sd1, str(tmp_path / "bare")], "its images need a prompt"),
        ([*drawn, "--out", str(tmp_path / "a.jpg")], "ends in .png"),
        ([*blank, "--out", str(tmp_path / "a.png")], "no image has one: give --prompt"),
    ):
        assert main(["judge", *words]) == 2
        assert said in capsys.readouterr().err


BASE = [1.0, 2.0, 1.5, 0.5] * 8


def by_loss(**shares: float) -> Judged:
    """A file whose losses at the strengths 0.5, 1 and 1.5 are these shares of the base's, with a
    spread of a thousandth."""
    found = Judged(Path("a.safetensors"), {0.0: BASE})
    for name, share in shares.items():
        noise = torch.randn(len(BASE), generator=torch.Generator().manual_seed(len(name))).tolist()
        strength = {"half": 0.5, "whole": 1.0, "more": 1.5}[name]
        found.losses[strength] = [b * share + 1e-3 * n for b, n in zip(BASE, noise, strict=True)]
    return found


@pytest.mark.parametrize(
    ("found", "state", "words"),
    [
        (by_loss(half=0.9, whole=0.8, more=0.85), GOOD, "20 % ± 3.3 % below the base's, and no"),
        (by_loss(half=0.9, whole=0.8, more=0.7), UNDER, "and at 1.5 by a further 10 % ±"),
        (by_loss(half=0.7, whole=0.8, more=0.9), OVER, "and at 0.5 by a further 10 % ±"),
        (by_loss(half=1.0, whole=1.0, more=1.0), UNDER, "which may be chance"),
        (by_loss(half=1.5, whole=3.0, more=9.0), OVER, "200 % ± 33 % above the base's"),
        (by_loss(half=0.9, whole=math.nan, more=math.nan), OVER, "it is not finite: the file's ΔW"),
    ],
)
def test_the_verdict_by_the_loss(found: Judged, state: str, words: str) -> None:
    """The state is that of the strength with the least loss, beyond chance."""
    assert found.verdict.state == state
    assert words in found.verdict.text
    json.dumps(found.numbers(), allow_nan=False)


def score(fidelity: float, leak: float = 0.0, copies: float = 0.0) -> Score:
    """A score with intervals of ± 2 % or so."""

    def around(mean: float) -> Interval:
        return Interval((mean - 0.008, mean, mean + 0.008))

    zero, all_of_it = around(0.0), around(1.0)
    return Score(
        around(fidelity),
        around(copies),
        all_of_it,
        around(leak),
        zero,
        zero,
        zero,
        all_of_it,
        zero,
        all_of_it,
        zero,
        "",
    )


def add(found: Judged, strength: float, one: Score) -> None:
    """Give a file its score at a strength, each image of a set having the set's fidelity, less the
    share of copies, which count 0."""
    found.features = "encoder of drawings"
    found.scores[strength] = one
    pairs = zip(one.fidelity.values, one.copies.values, strict=True)
    found.values[strength] = {"fidelity": [f * (1 - max(0.0, c)) for f, c in pairs]}


@pytest.mark.parametrize(
    ("scores", "state", "words"),
    [
        ((score(0.6), score(0.9), score(0.9)), GOOD, "fidelity is 90 % ± 2. Take it at strength 1"),
        ((score(0.3), score(0.6), score(0.9)), UNDER, "60 % ± 2 at strength 1 and 90 % ± 2 at 1.5"),
        ((score(0.9), score(0.9, 0.2), score(0.9, 0.4)), OVER, "has class leak 20 % ± 2 and not 0"),
        ((score(0.9), score(0.9, 0.0, 0.3), score(0.8)), OVER, "has copies 30 % ± 2 and not 0 %"),
        ((score(0.9), score(0.9), score(0.9)), GOOD, "Take it at strength 0.5."),
        ((score(0.1), score(0.2), score(0.2)), UNDER, "less than half of the way to real images."),
    ],
)
def test_the_verdict_by_images(scores: tuple[Score, ...], state: str, words: str) -> None:
    """The least strength that is as near to the subject as any decides, with its leak, harm and
    copies."""
    found = by_loss(half=0.9, whole=0.8, more=0.85)
    for strength, one in zip((0.5, 1.0, 1.5), scores, strict=True):
        add(found, strength, one)
    assert found.verdict.state == state
    assert words in found.verdict.text


def test_too_much_is_too_much_at_any_strength() -> None:
    """What a run's verdict calls too much is too much here, in the same words, at strength 1; a
    strength beyond it that has too much is not taken; an interval that reaches below the number is
    no proof; a style may reach other prompts; thresholds that were not measured are told so."""
    found = by_loss(half=0.9, whole=0.8, more=0.85)
    add(found, 0.5, score(0.3))
    add(found, 1.0, score(0.9, copies=1.0))
    assert found.verdict.state == OVER
    assert "100 % ± 2.0 % of the images repeat a training" in found.verdict.text
    assert found.verdict.text.endswith("at a lower rate: no strength here is good.")
    found.scores[1.0] = replace(score(0.9), copies=Interval((0.2, 1.0, 0.6)))
    found.values[1.0] = {"fidelity": [0.9] * 3}
    assert found.verdict.state == GOOD
    leaks = [replace(score(f), unrelated_leak=score(leak).fidelity) for f, leak in
             ((0.3, 0.0), (0.8, 0.05), (0.95, 0.3))]  # fmt: skip
    for strength, one in zip((0.5, 1.0, 1.5), leaks, strict=True):
        add(found, strength, one)
    assert (found.verdict.state, found.nearest) == (GOOD, 1.0)
    found.kind = "style"
    assert (found.verdict.state, found.nearest) == (UNDER, 1.5)
    found.kind = "subject"
    add(found, 1.0, replace(score(0.8), redrawn=score(0.7).fidelity))
    assert "images of other things are 70 % ± 2.0 % unlike the base's" in found.verdict.text
    found.kind = "style"
    found.features = "dinov2"
    assert found.verdict.text.startswith(
        "By its images (limits measured on drawings: a rough guess here), under"
    )


def test_as_near_is_by_the_image() -> None:
    """Means of 40 and 66 % with a wide interval are not as near: image by image the difference is
    0.26 each; what differs by chance is."""
    found = by_loss(half=0.9, whole=0.8, more=0.85)
    wide = [0.1, 0.4, 0.7, 0.2, 0.6, 0.4]
    for strength, values in ((0.5, wide), (1.0, [v + 0.26 for v in wide])):
        found.scores[strength] = score(sum(values) / 6)
        found.values[strength] = {"fidelity": values}
    assert found.nearest == 1.0
    found.values[0.5] = {"fidelity": [v + 0.26 - 0.1 * (-1) ** i for i, v in enumerate(wide)]}
    assert found.nearest == 0.5


def test_the_best_of_several_files() -> None:
    """By images the file with the least leak of those that are as near as any; by the loss the
    least one, and none where chance may have made the difference."""
    files = [by_loss(half=0.9, whole=share, more=0.9) for share in (0.7, 0.5, 0.6)]
    for number, one in enumerate(files):
        one.path = Path(f"checkpoint-{number}")
    assert best_of(files) == "By the loss of these images, take checkpoint-1 at strength 1."
    assert "no file is better" in best_of([files[1], replace(files[1]), files[0]])
    for one, of_file in zip(files, (score(0.5), score(0.9, 0.4), score(0.89, 0.1)), strict=True):
        add(one, 1.0, of_file)
    assert best_of(files).startswith(
        "Of these files take checkpoint-2 at strength 1: fidelity 89 %"
    )
    add(files[2], 1.0, score(0.97, copies=1.0))  # learned by heart, and the nearest
    assert best_of(files).startswith("Of these files take checkpoint-1 at strength 1")
    for one in files:
        add(one, 1.0, score(0.97, copies=1.0))
    assert best_of(files).startswith("Of these files none is good at any strength")


def test_prompts_ask_for_other_places() -> None:
    """One caption or the instance prompt is drawn in several places, as is the class; several
    captions as they are."""
    own = ["a photo of sks dog", "a photo of sks dog", None]
    one = prompts_for(own, None, "a photo of a dog")
    assert one.subject[:2] == ["a photo of sks dog", "a photo of sks dog on a white background"]
    assert one.of_class[1] == "a photo of a dog on a white background"
    drawn = prompts_for(["a dog"], None, "a photo of a {big |}dog {indoors|at night}").of_class
    assert len({*drawn}) == 6
    assert {text.split(" dog")[0] for text in drawn} == {"a photo of a big", "a photo of a"}
    assert all(any(word in text for word in ("indoors", "at night")) for text in drawn)
    several = [f"caption {i}" for i in range(9)]
    assert prompts_for(several, None, None).subject == several[:6]
    told = prompts_for(several, "a photo of sks dog", None)
    assert told.subject == one.subject


def test_the_prompt_of_a_subject_is_as_its_captions_are(
    tiny_sd1: Path, data: Path, tmp_path: Path
) -> None:
    """With the trigger word in front, as it is trained: what training never saw is not drawn."""
    config = dreambooth(
        tiny_sd1, data, tmp_path, instance_prompt="a photo of a dog", trigger_word="sks",
        captions_from="prompt",
    )  # fmt: skip
    run = prepare(config)
    own = subject_prompt_of(run.config, run.images.instances.samples)
    assert own == "sks, a photo of a dog"
    assert own in {item.caption for item in run.stream.batch(0).items}


def test_prompts_of_other_things_name_no_thing_that_is_taught() -> None:
    """A thing that a caption, the instance prompt or the class names is drawn for no leak, and
    another one takes its place."""
    first = prompts_for(["a photo of sks dog"], None, None).unrelated
    assert len(first) == 6
    left = prompts_for(["sks boats"], "a photo of sks Car.", "a photo of a fish").unrelated
    assert len(left) == 6
    assert len({*first, *left}) == 9
    assert not [text for text in left if "car" in text or "boat" in text or "fish" in text]
