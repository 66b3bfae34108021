"""Many runs and many images: pages stay quick."""

import io
import re
import time
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from tests.studio.conftest import Served, busy
from tests.studio.test_pages import post, work

QUICK = 6.0
"""Seconds for a page on a busy machine; each test has what it takes on one core."""


def timed(studio: Served, address: str) -> str:
    """The page at an address, which answers in time."""
    began = time.monotonic()
    status, text, _ = studio.ask(address)
    assert status == 200
    assert time.monotonic() - began < QUICK, address
    return text


def test_fifty_queued_runs(studio: Served) -> None:
    """With one run at work and fifty in the queue each page answers in time (0.1 s), all are
    listed in their order, and the last one that is put first is the first."""
    with busy(work(studio).parent / "state") as store:
        numbers = [store.add("train", f"run {n}", [], folder="x") for n in range(50)]
        for address in ("/runs", "/new", "/images", "/try", "/shelf", f"/runs/{numbers[-1]}"):
            timed(studio, address)

        def listed() -> list[int]:
            text = timed(studio, "/runs/list")
            found = map(int, re.findall(r'href="/runs/(\d+)"', text))
            return [number for number in found if number in numbers]

        assert listed() == numbers
        post(studio, f"/runs/{numbers[-1]}/first")
        assert listed() == [numbers[-1], *numbers[:-1]]
        assert len(store.jobs("state = 'queued'")) == 50


def many_images(folder: Path, count: int) -> None:
    """Small images, each with a caption of its own, unless another test has made them."""
    if folder.exists():
        return
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, "PNG")
    folder.mkdir()
    for number in range(count):
        (folder / f"{number:04}.png").write_bytes(buffer.getvalue())
        (folder / f"{number:04}.txt").write_text(f"a thing, number {number}")


def test_five_thousand_images(studio: Served) -> None:
    """The page of 5,000 images (1.6 s), its last block (0.05 s), a caption (0.01 s) and an edit of
    all captions (1.2 s) answer in time, and all captions are written."""
    folder = work(studio) / "many"
    many_images(folder, 5000)
    where = f"folder={quote(str(folder))}"
    assert "5,000 images" in timed(studio, f"/images?{where}")
    assert timed(studio, f"/images/block?{where}&first=4980").count("<article") == 20
    began = time.monotonic()
    name = {"folder": str(folder), "name": "4999.png"}
    assert post(studio, "/images/caption", **name, caption="mine")[0] == 200
    assert time.monotonic() - began < QUICK / 10
    edit = {"edit": "prefix", "text": "sks, "}
    assert post(studio, f"/images/many?{where}", folder=str(folder), **edit)[0] == 303
    assert time.monotonic() - began < QUICK
    assert (folder / "4999.txt").read_text() == "sks, mine"
    assert all(path.read_text().startswith("sks, ") for path in folder.glob("*.txt"))
