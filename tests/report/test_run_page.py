"""The page of a run: made of the output folder alone, complete, and harmless."""

import base64
import io
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sd_lora.cli import main
from sd_lora.config.command_line import parse
from sd_lora.data.check.page import data_uri as thumbnail_uri
from sd_lora.errors import UsageError
from sd_lora.report.events import Event
from sd_lora.report.measured import BY_HEART, FIGHTS, images_of, shortest
from sd_lora.report.proposals import proposals_of
from sd_lora.report.run_page import (
    curves_of,
    page_of,
    unet_of,
)
from sd_lora.report.sheets import write_image
from sd_lora.sampling.parameters import Parameters
from sd_lora.tool_flags import compare_parser, sample_parser


@pytest.fixture
def run(told: tuple[list[Event], Path, str]) -> Path:
    """The output folder of a run of six steps with samples after the fourth."""
    return told[1]


def data_of(page: str) -> list[dict]:
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_the_page_of_a_run(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The curves are the log's numbers, the images the written ones to the last bit, of the steps
    0, 4 and 6; the table has each number of the curves; changes are of every part; nothing on the
    page asks for another place. `sd-lora report` compares two runs on a page of its own, and never
    writes it over a run's."""
    page = (run / "report.html").read_text("utf-8")
    (data,) = data_of(page)
    log = [json.loads(line) for line in (run / "training_log.jsonl").read_text().splitlines()]
    for name in ("step", "loss", "lr", "grad_norm"):
        assert data["curves"][name] == pytest.approx([row[name] for row in log], rel=1e-5)
        assert all(f"<td>{number}</td>" in page for number in data["curves"][name])
    assert all(isinstance(step, int) for step in data["curves"]["step"])
    drawn = data["drawn"]["Samples"]
    assert drawn["steps"] == [0, 4, 6]
    for step, uris in drawn["images"].items():
        assert len(uris) == 1
        for number, uri in enumerate(uris):
            shown = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
            file = run / "samples" / f"step-{int(step):06}" / f"{number:02}.png"
            assert np.array_equal(np.asarray(shown), np.asarray(Image.open(file)))
    changes = json.loads((run / "report.json").read_text())["changes"]["unet"]
    assert [*changes][0] == "down_blocks.0"
    assert all(0 < change < 1 for change in changes.values())
    assert "default-src 'none'" in page
    assert not re.search(r"""(?:src|href|url\()\s*=?\s*["']?(?:https?:)?//""", page)
    other = tmp_path / "other"
    shutil.copytree(run, other)
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(run), str(other)]) == 0
    assert [d["name"] for d in data_of((tmp_path / "runs.html").read_text())] == ["out", "other"]
    assert main(["report", str(run), str(other), "--out", str(other / "report.html")]) == 2
    assert "is the page of the run in that folder" in capsys.readouterr().err


def test_samples_at_other_strengths_are_on_the_page(run: Path, tmp_path: Path) -> None:
    """Those of the last step are, if there are as many as of the step; where there are none, the
    page has the command that draws the first one so, which the command's own parser reads."""
    (data,) = data_of(page_of([run]))
    line = data["drawn"]["Samples"]["line"]
    args = sample_parser().parse(shlex.split(line)[2:])
    config = json.loads((run / "config.json").read_text())
    assert (args.model, args.prompt) == (
        Path(config["pretrained_model_name_or_path"]).name, ["a photo"]
    )  # fmt: skip
    assert args.lora == [Path("out/pytorch_lora_weights.safetensors")]
    assert (args.strengths, args.steps, args.seeds) == ([0.5, 0.75, 1], 1, [0])
    assert (args.size, args.guidance) == ((64, 64), config["validation_guidance_scale"])
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    for place in ("step-000004/strength-0.5", "step-000006/strength-0.5", "step-000006/strength-x"):
        (folder / "samples" / place).mkdir()
        grey = Image.new("RGB", (8, 8), "#808080")
        grey.save(folder / "samples" / place / "00.png")
    page = page_of([folder])
    (data,) = data_of(page)
    assert [*data["drawn"]["Samples"]["strengths"]] == ["0.5"]
    assert data["drawn"]["Samples"]["line"] == ""
    assert page.count('<input id="strength-') == 1
    grey.save(folder / "samples" / "step-000006" / "strength-0.5" / "01.png")
    assert data_of(page_of([folder]))[0]["drawn"]["Samples"]["strengths"] == {}


def test_a_long_log_is_thinned_and_smoothed() -> None:
    """5,001 rows become 1,667 means of three neighbours; the smoothed loss of a constant is it."""
    rows = [{"step": i, "loss": 0.5} | ({"grad_norm": float(i)} if i % 2 else {})
            for i in range(1, 5002)]  # fmt: skip
    curves = curves_of(rows)
    assert len(curves["step"]) == 1667
    assert curves["step"][:2] == [2, 5]
    assert all(isinstance(step, int) for step in curves["step"])
    assert curves["grad_norm"][:2] == [2, 5]
    assert set(curves["loss, smoothed"]) == {0.5}


def test_sheets_of_scored_images_stand_by_their_prompts(run: Path, tmp_path: Path) -> None:
    """A sheet of each kind of prompts, as large as it is; a kind that a step lacks leaves its place
    empty, and sheets of later steps and of other names are not taken."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    for name in ("000000-subject", "000000-unrelated", "000006-unrelated", "000006-class",
                 "000007-subject", "000006-x", "000006"):  # fmt: skip
        Image.new("RGB", (824, 8), "#808080").save(folder / "samples" / f"score-{name}.png")
    page = page_of([folder])
    drawn = data_of(page)[0]["drawn"]["Scored images"]
    assert drawn["steps"] == [0, 6]
    assert [prompt.split(",")[0] for prompt in drawn["prompts"]] == [
        "prompts of what is learned", "prompts of its class", "prompts of other things"
    ]  # fmt: skip
    there = {step: [bool(uri) for uri in uris] for step, uris in drawn["images"].items()}
    assert there == {"0": [True, False, True], "6": [False, True, True]}
    shown = Image.open(io.BytesIO(base64.b64decode(drawn["images"]["6"][2].partition(",")[2])))
    assert shown.size == (824, 8)


def test_images_are_on_the_page(run: Path, tmp_path: Path) -> None:
    """Those of a ledger that is silent, with times seen, and those held out; the losses of windows
    in a table, and as a line: of equal loss in the middle, from half of it to twice as much, with a
    gap for a window without a loss; how many of a large set are left out is told."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    row = {"index": 0, "loss": None, "change": None, "finding": ""}
    ledger = [row | {"name": "a/1.png", "seen": 7, "windows": [1.0, None, 2.0, 9.0, 0.5]},
              row | {"name": "b/1.png", "seen": 3, "windows": [1.25, None]},
              row | {"name": "held.png", "seen": 0, "windows": [], "held_out": True}]  # fmt: skip
    record = json.loads((folder / "report.json").read_text())
    record |= {"ledger": ledger, "image_set": {"trained": 300, "window": 12}}
    (folder / "report.json").write_text(json.dumps(record))
    rows = images_of(ledger)
    assert [row["seen"] for row in rows] == [7, 3, "held out"]
    paths = [row["path"] for row in rows]
    assert [shortest(path, paths) for path in paths] == ["a/1.png", "b/1.png", "held.png"]
    assert rows[0]["windows"] == ["1.00", "–", "2.00", "9.00", "0.50"]
    assert rows[0]["line"] == "0.0,14.0 45.0,0.0 67.5,0.0 90.0,28.0"
    assert (rows[1]["line"], rows[2]["line"]) == ("", "")
    page = page_of([folder])
    assert page.count("<polyline") == 1
    for text in ("from step 49<", "<td>held out</td>", "2 of 300 trained images are in the table"):
        assert text in page
    table = images_of(json.loads((run / "report.json").read_text())["ledger"])
    assert [(row["seen"], bool(row["picture"])) for row in table] == [(3, True)] * 6


def test_what_the_ledger_names_is_proposed_by_its_kind(tmp_path: Path) -> None:
    """One that is learned more slowly is proposed to be left out, by a command that the parsers of
    `compare` and of `train` read as its place, as it was given, and its name. One that is learned
    faster has no command, unless the data check found it twice: then of the later one of the two.
    A name that looks like a flag, and one of two folders, are still that name."""
    parser, folder = compare_parser(), tmp_path / "my dog"
    folder.mkdir()

    def image(name: str, finding: str) -> dict:
        return {"name": f"{name} at 64", "path": name, "finding": finding}

    def left_out(line: str) -> tuple[Path, str]:
        words = shlex.split(line)
        assert words[:2] == ["sd-lora", "compare"]
        args, rest = parser.parse_known_args(words[2:])
        return args.run, parse(["--model", "m", "--train_data_dir", "x", *rest]).leave_out

    images = [image("in/a.png", FIGHTS), image("in/-b 1.png", FIGHTS), image("in/c.png", BY_HEART),
              image("in/d.png", BY_HEART), image("in/e.png", ""),
              image("other/a.png", "")]  # fmt: skip
    slow, copied, fast = proposals_of(folder, images, [["in/d2.png", "in/d.png"], "x", []])
    assert [left_out(line) for line in slow["lines"]] == [
        (Path("my dog"), "in/a.png"), (Path("my dog"), "-b 1.png")
    ]  # fmt: skip
    assert "in/a.png at 64, in/-b 1.png at 64" in slow["text"]
    assert [left_out(line) for line in copied["lines"]] == [(Path("my dog"), "d2.png")]
    assert "in/d.png at 64 (also in/d2.png)" in copied["text"]
    assert fast["lines"] == []
    assert "in/c.png at 64. There is no need to leave such an image out" in fast["text"]
    (folder / "config.json").write_text('{"output_dir": "runs/my dog"}')
    many = [image(f"{i}.png", FIGHTS) for i in range(7)]
    (slow,) = proposals_of(folder, many, [])
    assert left_out(slow["lines"][4]) == (Path("runs/my dog"), "4.png")
    assert (len(slow["lines"]), "and 2 more" in slow["text"]) == (5, True)
    assert proposals_of(folder, [image("e.png", ""), image("f.png", HOSTILE)], []) == []


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def test_hostile_words_stay_words(tmp_path: Path) -> None:
    """Scripts in prompts, warnings, rows and names of runs are text on the page."""
    folder = tmp_path / "run<script>alert(0)<"
    place = folder / "samples" / "step-000001"
    place.mkdir(parents=True)
    drawn = Parameters(HOSTILE, 0, 1, 1.0, (8, 8), "m")
    write_image(place / "00.png", Image.new("RGB", (8, 8)), [drawn])
    facts = {"warnings": [HOSTILE], "rows": {"model": HOSTILE}, "notes": [HOSTILE], "seconds": 1,
             "findings": [HOSTILE], "usage": [HOSTILE], "files": [HOSTILE], "ended": False,
             "changes": {"unet": {HOSTILE: 0.1}}, "step": 1, "validation": {"rows": [HOSTILE]},
             "ledger": [{"name": HOSTILE, "seen": 1, "loss": 1, "change": 1, "finding": finding,
                         "windows": [1, 2]} for finding in (HOSTILE, FIGHTS, BY_HEART)],
             "alike": [[HOSTILE, "x"], HOSTILE, [{}, 1]], "image_set": {"window": HOSTILE},
             "num_steps": 2}  # fmt: skip
    (folder / "report.json").write_text(json.dumps(facts))
    page = page_of([folder])
    assert "alert(1)" in page
    scripts = re.findall(r"<script[^>]*>", page)
    assert scripts == ['<script type="application/json" id="data">', "<script>", "<script>"]
    assert "<img src=x" not in page
    assert "<script>alert" not in page


def test_odd_folders_are_told_or_shown(run: Path, tmp_path: Path) -> None:
    """A record with facts missing or of other types, an image that is cut short, samples of later
    steps, and numbers that are none are shown as far as they go; a folder, a record or a
    configuration that cannot be read is told."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / "samples" / "step-000099").mkdir()
    image = folder / "samples" / "step-000004" / "00.png"
    image.write_bytes(image.read_bytes()[:60])
    with (folder / "training_log.jsonl").open("a") as file:
        file.write('{"step": 7, "loss": NaN}\n')
    (data,) = data_of(page_of([folder]))
    assert data["drawn"]["Samples"]["steps"] == [0, 4, 6]
    assert data["curves"]["loss"][-1] is None
    (folder / "report.json").write_text('{"seconds": "x", "warnings": 3, "step": 6}')
    page_of([folder])
    (folder / "config.json").write_text("[1]")
    for broken, message in (
        ([folder, run], "config.json holds no table"), ([tmp_path / "none"], "no output folder"),
        ([tmp_path], "has no report.json"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=message):
            page_of(broken)


def test_a_page_stays_below_ten_megabytes(run: Path, tmp_path: Path) -> None:
    """A page of noise, the worst there is for a coder: 20 steps of 24 samples, 40 sheets of scored
    images, 200 images of the ledger, 5,000 logged steps; and two such runs side by side. The first
    and the last step are among those shown."""
    rng = np.random.default_rng(0)

    def noise(width: int, height: int) -> Image.Image:
        return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))

    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    shutil.rmtree(folder / "samples")
    samples, sheet, sheet_bytes = [noise(256, 256) for _ in range(3)], noise(2304, 400), b""
    for step in range(20):
        place = folder / "samples" / f"step-{step:06}"
        place.mkdir(parents=True)
        for i in range(24):
            samples[i % 3].save(place / f"{i:02}.png")
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", compress_level=1)
    sheet_bytes = buffer.getvalue()
    for step in range(40):
        (folder / "samples" / f"score-{step:06}-subject.png").write_bytes(sheet_bytes)
    picture = thumbnail_uri(noise(96, 64))
    record = json.loads((folder / "report.json").read_text())
    record["ledger"] = [
        {"name": f"{i}.png", "seen": 1, "loss": 1, "change": 1, "finding": "", "picture": picture}
        for i in range(200)
    ]
    record["step"] = 5000
    (folder / "report.json").write_text(json.dumps(record))
    with (folder / "training_log.jsonl").open("a") as file:
        for step in range(7, 5001):
            row = {"step": step, "loss": 0.123456 + step, "lr": 1.23456e-4, "grad_norm": 0.654321}
            file.write(json.dumps(row) + "\n")
    one, two = page_of([folder]), page_of([folder, folder])
    assert 4_000_000 < len(one.encode()) < 10_000_000
    assert len(two.encode()) < 10_000_000
    for data in data_of(one) + data_of(two):
        for drawn, last in ((data["drawn"]["Samples"], 19), (data["drawn"]["Scored images"], 39)):
            assert [drawn["steps"][0], drawn["steps"][-1]] == [0, last]
    assert one.count(picture) == 200


def test_the_unet_is_drawn_by_its_parts() -> None:
    """Down, across and up again, as the parts lie; the part that has changed most is the darkest,
    and what is no part of the drawing is left to the table."""
    changes = {"down_blocks.0": 0.1, "down_blocks.1": 0.2, "mid_block": 0.4, "up_blocks.0": 0.1,
               "up_blocks.1": 0.0, "conv_in": 9.0}  # fmt: skip
    boxes = {box["name"]: (box["x"], box["y"], box["share"]) for box in unet_of({"unet": changes})}
    assert boxes == {
        "down_blocks.0": (0, 0, 0.25), "down_blocks.1": (1, 1, 0.5), "mid_block": (2, 2, 1),
        "up_blocks.0": (3, 1, 0.25), "up_blocks.1": (4, 0, 0),
    }  # fmt: skip
    assert unet_of({}) == unet_of({"unet": 3}) == []
