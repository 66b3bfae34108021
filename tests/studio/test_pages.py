"""Pages of images, tries and the shelf, by plain HTTP."""

import json
import shutil
from pathlib import Path
from urllib.parse import quote, urlencode

from tests.studio.conftest import Served

FORM = {"Content_Type": "application/x-www-form-urlencoded"}


def post(studio: Served, path: str, **fields: str) -> tuple[int, str, dict[str, str]]:
    return studio.ask(path, "POST", urlencode(fields).encode(), **FORM)


def work(studio: Served) -> Path:
    """The opened folder."""
    _, text, _ = studio.ask("/choose")
    return Path(text.partition("at=")[2].partition('"')[0])


def test_captions_are_edited_on_the_page(studio: Served, root: Path) -> None:
    """A block of images with thumbnails; markup in names and captions is text; one edit of many,
    and its undo; an image outside of the folder is not there."""
    folder = work(studio) / "set"
    shutil.copytree(root / "sample_data/dreambooth/instance", folder)
    odd = folder / "<img src=x onerror=alert(1)>.png"
    shutil.copy(min(folder.glob("*.png")), odd)
    odd.with_suffix(".txt").write_text("<script>alert(1)</script>")
    where = f"folder={quote(str(folder))}"
    for address in (f"/images?{where}", f"/images/block?{where}&first=0"):
        status, text, _ = studio.ask(address)
        assert status == 200
        assert "<script>alert" not in text
        assert "<img src=x" not in text
    assert text.count("<article") == 9
    status, _, headers = studio.ask(f"/images/thumbnail?{where}&name={quote(odd.name)}")
    assert (status, headers["content-type"]) == (200, "image/webp")
    for name in ("../secret.txt", "/etc/hostname"):
        assert studio.ask(f"/images/thumbnail?{where}&name={quote(name)}")[0] == 404
    assert post(studio, "/images/caption", folder=str(folder), name=odd.name, caption="x")[0] == 200
    assert odd.with_suffix(".txt").read_text() == "x"
    filtered = f"?{where}&words=onerror"
    assert (
        post(studio, f"/images/many{filtered}", folder=str(folder), edit="prefix", text="sks ")[0]
        == 303
    )
    assert odd.with_suffix(".txt").read_text() == "sks x"
    assert len([*folder.glob("*.txt")]) == 1
    post(studio, f"/images/undo?{where}", folder=str(folder))
    assert odd.with_suffix(".txt").read_text() == "x"


def test_crops_are_kept_beside_the_images(studio: Served, root: Path) -> None:
    """The centre of a crop is written for its image alone, and taken back; a point outside of the
    image, words and an image that is not there are refused, with nothing written."""
    folder = work(studio) / "crops"
    shutil.copytree(root / "sample_data/dreambooth/instance", folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    name = min(before).name
    fields = {"folder": str(folder), "name": name}
    wrong = ({"x": "1.01", "y": "0"}, {"x": "nan", "y": "0"}, {"x": "1"}, {"name": "../a.png"})
    for more in wrong:
        assert post(studio, "/images/crop", **fields | more)[0] == 400
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert post(studio, "/images/crop", **fields, x="0.25", y="1")[1] == "crop saved"
    assert json.loads((folder / "crops.json").read_text()) == {name: [0.25, 1.0]}
    assert post(studio, "/images/crop", **fields)[1] == "cropped as before"
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_tries_and_tools_are_commands(studio: Served, tmp_path: Path) -> None:
    """A grid and a tool become jobs with the words of a command line; files elsewhere, wrong
    numbers and unknown tools do not."""
    lora = work(studio) / "mine.safetensors"
    lora.write_bytes(b"\0" * 64)
    outside = tmp_path / "theirs.safetensors"
    outside.write_bytes(b"\0" * 64)
    form = {"model": "none/such", "prompts": "a\nb", "lora": str(lora), "strengths": "0 1"}
    assert post(studio, "/try", **form, size="big")[0] == 400
    assert post(studio, "/try", **form | {"lora": str(outside)})[0] == 404
    assert post(studio, "/try", **form)[0] == 303
    text = studio.ask("/try")[1]
    assert "a, b" in text
    assert "mine.safetensors" in studio.ask("/shelf")[1]
    assert studio.ask(f"/shelf/load?file={quote(str(outside))}")[0] == 404
    assert studio.ask(f"/shelf/load?file={quote(str(lora))}")[0] == 200
    assert post(studio, "/shelf/bake", files=str(lora))[0] == 400
    flags = f"kohya --out {outside}"  # a field holds values, and no flag beside them
    assert post(studio, "/shelf/convert", files=str(lora), to=flags)[0] == 400
    assert post(studio, "/try", **form | {"strengths": f"1 --out {outside}"})[0] == 400
    assert post(studio, "/shelf/convert", files=str(outside), to="kohya")[0] == 404
    status, _, headers = post(studio, "/shelf/inspect", files=str(lora))
    assert status == 303
    assert "inspect mine.safetensors" in studio.ask(headers["location"])[1]
