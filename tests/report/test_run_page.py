"""The page of a run: made of the output folder alone, complete, and harmless."""

import base64
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sd_lora.cli import main
from sd_lora.errors import UsageError
from sd_lora.report.events import Event
from sd_lora.report.run_page import MOST_BYTES, SIDES, Drawn, _fitting, curves_of, page_of
from sd_lora.report.sheets import write_image
from sd_lora.sampling.parameters import Parameters


@pytest.fixture
def run(told: tuple[list[Event], Path, str]) -> Path:
    """The output folder of a run of six steps with samples after the fourth."""
    return told[1]


def data_of(page: str) -> list[dict]:
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_the_page_of_a_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The curves are the log's numbers, the images the written ones to the last bit, of the steps
    0, 4 and 6; the table has each number of the curves; changes are of every part; nothing on the
    page asks for another place. `sd-lora report` writes the same, and compares two runs."""
    page = (run / "report.html").read_text("utf-8")
    (data,) = data_of(page)
    log = [json.loads(line) for line in (run / "training_log.jsonl").read_text().splitlines()]
    for name in ("step", "loss", "lr", "grad_norm"):
        assert data["curves"][name] == pytest.approx([row[name] for row in log], rel=1e-5)
        assert all(f"<td>{number}</td>" in page for number in data["curves"][name])
    assert data["steps"] == [0, 4, 6]
    for step, uris in data["images"].items():
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
    assert main(["report", str(run), str(other), "--out", str(tmp_path / "both.html")]) == 0
    assert [d["name"] for d in data_of((tmp_path / "both.html").read_text())] == ["out", "other"]


def test_a_long_log_is_thinned_and_smoothed() -> None:
    """5,001 rows become 1,667 means of three neighbours; the smoothed loss of a constant is it."""
    rows = [{"step": i, "loss": 0.5} | ({"grad_norm": float(i)} if i % 2 else {})
            for i in range(1, 5002)]  # fmt: skip
    curves = curves_of(rows)
    assert len(curves["step"]) == 1667
    assert curves["step"][0] == 2
    assert curves["grad_norm"][:2] == [2, 5]
    assert set(curves["loss, smoothed"]) == {0.5}


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
             "ledger": [{"name": HOSTILE, "seen": 1, "loss": 1, "change": 1, "finding": HOSTILE}],
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
    assert data["steps"] == [0, 4, 6]
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


def test_many_samples_are_thinned() -> None:
    """250 steps of 4 images are small, and of four such runs every second step is shown, the first
    and the last among them."""
    many = Drawn([""] * 4, {step: [Path()] * 4 for step in range(0, 2500, 10)})
    (shown,), side = _fitting([many])
    assert (side, shown.steps) == (160, many.steps)
    more, side = _fitting([many] * 4)
    assert side == 96
    assert [more[0].steps[0], more[0].steps[-1]] == [0, 2490]
    assert sum(len(f) for d in more for f in d.images.values()) * SIDES[96] < 1.1 * MOST_BYTES


@pytest.mark.skipif(not shutil.which("chromium"), reason="no Chromium here")
def test_a_browser_draws_the_page(run: Path) -> None:
    """Headless Chromium draws the three curves, and has nothing to complain of."""
    words = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    words += ["--virtual-time-budget=3000", "--dump-dom", (run / "report.html").as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.stdout.count("<canvas") == 3
    assert "CONSOLE" not in done.stderr
