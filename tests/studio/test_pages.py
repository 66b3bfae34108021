"""Pages of images, tries and the shelf, by plain HTTP."""

import base64
import io
import json
import shutil
import zipfile
from pathlib import Path
from urllib.parse import quote, urlencode

import pytest
from PIL import Image

from sd_lora.config.options.sources import source_specs
from sd_lora.config.sources import SourceSpec
from sd_lora.data.sources.open import open_source
from sd_lora.errors import UsageError
from sd_lora.formats.output import FORMATS
from sd_lora.report.record import EMPTY, RECORD
from sd_lora.sample import rows_of
from sd_lora.studio.form import request_of
from sd_lora.studio.image_set import read_set
from sd_lora.studio.repeats import draft_with, parts_of
from sd_lora.studio.shelf import VALUES, preview_of
from sd_lora.studio.store import Store
from sd_lora.studio.try_it import grid_of
from sd_lora.training.interruption import SAMPLE_FILE
from tests.studio.conftest import Served, busy

MODEL = "pretrained_model_name_or_path"
FORM = {"Content_Type": "application/x-www-form-urlencoded"}


def post(studio: Served, path: str, **fields: str) -> tuple[int, str, dict[str, str]]:
    return studio.ask(path, "POST", urlencode(fields).encode(), **FORM)


def work(studio: Served) -> Path:
    """The opened folder."""
    _, text, _ = studio.ask("/choose")
    return Path(text.partition("at=")[2].partition('"')[0])


def stored(studio: Served) -> Store:
    """The jobs of a studio that is running."""
    return Store(work(studio).parent / "state")


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
    """A crop by hand is written for its image alone, and taken back; a point outside of the image,
    a size of nothing, words and an image that is not there are refused, with nothing written."""
    folder = work(studio) / "crops"
    shutil.copytree(root / "sample_data/dreambooth/instance", folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    name = min(before).name
    fields = {"folder": str(folder), "name": name}
    wrong = (
        {"x": "1.01", "y": "0"}, {"x": "nan", "y": "0"}, {"x": "1"}, {"x": "1", "part": "1"},
        {"x": "1", "y": "1", "part": "0.01"}, {"name": "../a.png"},
    )  # fmt: skip
    for more in wrong:
        assert post(studio, "/images/crop", **fields | more)[0] == 400
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert post(studio, "/images/crop", **fields, x="0.25", y="1")[1] == "crop saved"
    assert json.loads((folder / "crops.json").read_text()) == {name: [0.25, 1.0]}
    assert post(studio, "/images/crop", **fields, x="0.25", y="1", part="0.5")[0] == 200
    assert json.loads((folder / "crops.json").read_text()) == {name: [0.25, 1.0, 0.5]}
    assert post(studio, "/images/crop", **fields)[1] == "cropped as before"
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def png(*rows: list[int]) -> str:
    """Grey pixels as a browser sends a canvas."""
    image = Image.new("L", (len(rows[0]), len(rows)))
    image.putdata([value for row in rows for value in row])
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def test_captions_are_proposed_by_a_command(studio: Served) -> None:
    """The page starts `sd-lora caption` for a folder that is opened, over no caption unless asked,
    and shows its output; a folder elsewhere and a model that is no folder are refused."""
    folder = work(studio) / "to caption"
    folder.mkdir()
    form = {"folder": str(folder), "captioner": str(work(studio))}
    assert post(studio, "/images/propose", **form | {"folder": "/etc"})[0] == 404
    for model in ("", str(folder / "none")):
        assert post(studio, "/images/propose", **form | {"captioner": model})[0] == 400
    asks = {"overwrite": "1", "prompt": "What is it?"}
    for more, words in (({}, []), (asks, ["--prompt=What is it?", "--overwrite"])):
        status, _, headers = post(studio, "/images/propose", **form | more)
        assert status == 303
        job = stored(studio).job(int(headers["location"].rpartition("/")[2]))
        assert (job.kind, job.words) == (
            "caption", [str(folder), f"--captioner={work(studio)}", *words]
        )  # fmt: skip
        assert "caption to caption" in studio.ask(headers["location"])[1]


def test_masks_are_drawn_where_a_run_reads_them(studio: Served, root: Path) -> None:
    """A drawn mask is the mask of its image for `mask_files`, in the image's size, and no image on
    the page; one that is there is drawn on; white all over removes a drawn one; nothing to train
    and bytes that are no PNG are refused. Images stay as they are."""
    folder = work(studio) / "masks of"
    shutil.copytree(root / "sample_data/dreambooth/instance", folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    first, second = sorted(before)[:2]
    (folder / "masks").mkdir()
    theirs = folder / "masks" / second.name
    Image.new("L", Image.open(second).size, 128).save(theirs)

    def drawn(path: Path, mask: str) -> tuple[int, str]:
        return post(studio, "/images/mask", folder=str(folder), name=path.name, mask=mask)[:2]

    assert drawn(first, png([255, 0], [255, 0]))[0] == 200
    assert drawn(second, png([0, 255]))[0] == 200
    (source,) = open_source(SourceSpec(path=str(folder), mask_files=True, prompt="x"))
    masks = {Path(s.name): s.mask for s in source.rows()}
    assert len(masks) == len(before)
    for path, left, right in ((first, 255, 0), (second, 0, 255)):
        image = Image.open(io.BytesIO(masks[path].read()))
        assert image.size == Image.open(path).size
        assert (image.getpixel((0, 9)), image.getpixel((image.width - 1, 9))) == (left, right)
    assert Path(masks[second].name) == theirs
    where = f"folder={quote(str(folder))}"
    assert studio.ask(f"/images/block?{where}&first=0")[1].count("<article") == len(before)
    assert studio.ask(f"/images/mask?{where}&name={first.name}")[2]["content-type"] == "image/png"
    assert "2 with a mask that is not used" in studio.ask(f"/images?{where}")[1]
    post(studio, "/images/masks", folder=str(folder), use="1")
    assert "2 with a mask: its white part is trained" in studio.ask(f"/images?{where}")[1]
    for wrong in (png([0]), "data:image/png;base64,", "data:image/png;base64,R0lGOD", "x"):
        assert drawn(first, wrong)[0] == 400
    assert drawn(first, png([255]))[1] == "all of it is trained"
    assert [*folder.glob("*masklabel*")] == []
    assert {path: path.read_bytes() for path in before} == before
    assert studio.ask(f"/images/mask?{where}&name={first.name}")[0] == 404
    post(studio, "/images/masks", folder=str(folder))


def test_repeats_of_folders_are_those_of_the_run(root: Path, tmp_path: Path) -> None:
    """Numbers before names are shown as the trainer reads them; changed ones, and those of folders
    without a number, come to the same sources, captions and all, in the run that the draft asks
    for; unchanged, the folder stands alone."""
    folder = tmp_path / "set"
    images = root / "sample_data/dreambooth/instance"
    for name in ("3_sks dog", "other", "one/deep"):
        shutil.copytree(images, folder / name)

    def asked(repeats: list[int]) -> dict[str, tuple[int, int, tuple[str, ...]]]:
        draft = draft_with({"rank": "4"}, folder, parts_of(read_set(folder)), repeats)
        given = draft | {"pretrained_model_name_or_path": "x"}
        config = request_of(given, tmp_path).config
        assert (config.rank, Path(config.output_dir).name) == (4, "set-lora")
        sources = [source for spec in source_specs(config) for source in open_source(spec)]
        return {
            Path(s.spec.path).relative_to(folder).as_posix(): (
                s.spec.repeats, s.count, next(s.rows()).captions
            )
            for s in sources
        }  # fmt: skip

    parts = parts_of(read_set(folder))
    assert [(part.name, part.images, part.repeats) for part in parts] == [
        ("3_sks dog", 8, 3), ("one", 8, 0), ("other", 8, 0)
    ]  # fmt: skip
    assert draft_with({}, folder, parts, [3, 0, 0]) == {"folder": str(folder)}
    assert asked([5, 0, 0]) == {"3_sks dog": (5, 8, ("sks dog",))}
    for image in folder.rglob("o*/**/*.png"):
        image.with_suffix(".txt").write_text("a cat")
    assert asked([5, 2, 1]) == {
        "3_sks dog": (5, 8, ("sks dog",)), "one": (2, 8, ("a cat",)), "other": (1, 8, ("a cat",))
    }  # fmt: skip
    (folder / "3_sks dog").rename(folder / "dog")
    for image in folder.rglob("*.png"):
        image.with_suffix(".txt").write_text("a cat")
    parts = parts_of(read_set(folder))
    assert [(part.name, part.repeats) for part in parts] == [
        ("dog", 1), ("one/deep", 1), ("other", 1)
    ]  # fmt: skip
    assert {name: row[0] for name, row in asked([2, 1, 0]).items()} == {"dog": 2, "one/deep": 1}
    with pytest.raises(UsageError, match="no folder is left"):
        draft_with({}, folder, parts, [0, 0, 0])
    alone = parts_of(read_set(images))
    assert draft_with({}, images, alone, [7]) == {"folder": str(images), "repeats": "7"}


def test_buttons_of_a_run_are_its_command(studio: Served, tmp_path: Path) -> None:
    """A run in the queue is paused, resumed, put first and stopped; one that has ended goes on from
    its checkpoint, also to a later step, and no earlier one; a sample is asked for by a file in its
    folder, a save where its steps have begun; its settings come back into the form."""
    given = {"pretrained_model_name_or_path": "a model", "folder": str(work(studio)), "rank": "7",
             "instance_prompt": "a dog", "max_train_steps": "30"}  # fmt: skip
    folder = tmp_path / "out"
    (folder / "checkpoint-20").mkdir(parents=True)
    (folder / "checkpoint-20" / "state.safetensors").touch()
    with busy(work(studio).parent / "state") as store:
        number = store.add("train", "mine", [], given=given, folder=str(folder))
        run = f"/runs/{number}"
        for act, state in (("pause", "paused"), ("resume", "queued"), ("stop", "stopped")):
            assert post(studio, f"{run}/{act}")[0] == 303
            assert store.job(number).state == state
        words = store.job(number).words
        assert words[words.index("--resume_from_checkpoint") + 1] == "latest-if-any"
        assert post(studio, f"{run}/extend", steps="20")[0] == 400
        assert "above 20" in post(studio, f"{run}/extend", steps="many")[1]
        post(studio, f"{run}/extend", steps="60")
        job = store.job(number)
        assert (job.state, job.given["max_train_steps"]) == ("queued", "60")
        assert job.words[job.words.index("--steps") + 1] == "60"
        assert post(studio, f"{run}/resume")[0] == 400
        post(studio, f"{run}/draw")
        assert (folder / SAMPLE_FILE).exists()
        assert post(studio, f"{run}/save")[0] == 400
        post(studio, f"{run}/copy")
        assert 'value="7"' in studio.ask("/new")[1]
        post(studio, "/new/forecast", **given)
        (check,) = store.jobs("kind = 'check' AND title = 'check'")
        assert check.words[-1] == "--no_page"
        assert "a model" in check.words
        post(studio, "/new/clear")


def test_files_are_taken_in(studio: Served, root: Path) -> None:
    """Files and a zip with folders come into the studio's own folder, as a set with its captions;
    what belongs to no set of images stays away, and a zip that leads out of it is refused."""
    image = min((root / "sample_data/dreambooth/instance").iterdir()).read_bytes()
    packed = {"a.zip": {"deep/1.png": image, "deep/1.txt": b"one", "evil.sh": b"x", ".x.png": b"x"},
              "b.zip": {"../2.png": image}}  # fmt: skip
    sent = {"0.png": image, "0.txt": b"zero", "page.html": b"<html>"}
    for name, files in packed.items():
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for inner, data in files.items():
                archive.writestr(inner, data)
        sent[name] = buffer.getvalue()
    answers = {}
    for name, data in sent.items():
        fields = {"set": "taken", "path": name}
        body = b"".join(
            f'--x\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n'.encode()
            for key, value in fields.items()
        )
        body += b'--x\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
        kind = {"Content_Type": "multipart/form-data; boundary=x"}
        answers[name] = studio.ask("/new/upload", "POST", body + data + b"\r\n--x--\r\n", **kind)
    assert {name: answer[0] for name, answer in answers.items()} == {
        "0.png": 200, "0.txt": 200, "page.html": 400, "a.zip": 200, "b.zip": 400
    }  # fmt: skip
    folder = Path(answers["0.png"][1])
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == {
        "0.png", "0.txt", "deep/1.png", "deep/1.txt"
    }  # fmt: skip
    assert (folder / "deep/1.png").read_bytes() == image
    assert not (folder.parent / "2.png").exists()


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
    assert VALUES == {"to": tuple(FORMATS)}
    assert studio.ask(f"/shelf/load?file={quote(str(outside))}")[0] == 404
    assert studio.ask(f"/shelf/load?file={quote(str(lora))}")[0] == 200
    beside = {"beside": str(lora), "beside_strength": "0.5 1"}
    assert post(studio, "/try", **form | beside)[0] == 400
    beside["beside"] += f"\n{lora}"
    assert post(studio, "/try", **form | beside | {"prompts": "two beside"})[0] == 303
    (job,) = stored(studio).jobs("kind = 'sample' AND title = 'two beside'")
    assert job.words[job.words.index("--beside") :][:4] == [
        "--beside", str(lora), str(lora), "--beside_together"
    ]  # fmt: skip
    assert post(studio, "/try", **form | {"beside": str(outside)})[0] == 404
    assert post(studio, "/shelf/bake", files=str(lora))[0] == 400
    flags = f"kohya --out {outside}"  # a field holds values, and no flag beside them
    assert post(studio, "/shelf/convert", files=str(lora), to=flags)[0] == 400
    assert post(studio, "/try", **form | {"strengths": f"1 --out {outside}"})[0] == 400
    assert post(studio, "/shelf/convert", files=str(outside), to="kohya")[0] == 404
    status, _, headers = post(studio, "/shelf/inspect", files=str(lora))
    assert status == 303
    assert "inspect mine.safetensors" in studio.ask(headers["location"])[1]


def test_mistakes_of_prompts_to_try_are_told(studio: Served) -> None:
    """A grid whose prompts cannot be read is not begun, and each mistake is told with its line."""
    before = len(stored(studio).jobs("kind = 'sample'"))
    status, page, _ = post(studio, "/try", model="m", prompts="a cat --w 60\na dog\na hen --x 1")
    assert status == 400
    assert "line 1: --w is a multiple of 8 from 8 to 8192, not 60" in page
    assert "line 3: --x is no setting of a prompt" in page
    assert len(stored(studio).jobs("kind = 'sample'")) == before


def test_single_images_of_a_grid_are_compared(studio: Served) -> None:
    """The page gets the row of each file at each strength, from low to high, as `sample` draws
    them, and the columns of prompts that have seeds of their own; a grid of one image is
    no comparison, nor is one that is not whole."""
    store = stored(studio)
    files = ["lora-000020/pytorch_lora_weights.safetensors", "mine.safetensors"]
    folder = work(studio) / "a grid"
    folder.mkdir()
    words = ["--model", "m", "--out", "x.png", "--prompts", "p.txt", "--seeds", "3", "4"]
    words += ["--lora", *files]
    given = {"prompts": "a cat\n# a comment\na dog --d 9\n"}
    number = store.add("sample", "a grid", [*words, "--strengths", "1", "0", "0.5"], given=given,
                       state="done", folder=str(folder))  # fmt: skip
    assert grid_of(store.job(number)) is None
    for image in range(15):
        (folder / f"{image:05}.png").write_bytes(b"an image")
    rows = rows_of([*map(Path, files)], [1, 0, 0.5])
    found = grid_of(store.job(number))
    assert found.base == 0
    assert found.files == ("lora-000020", "mine")
    assert found.columns == ("a cat, seed 3", "a cat, seed 4", "a dog, seed 9")
    assert [[rows[n].files for n in of_file] for of_file in found.rows] == [
        [(), *[((Path(file), strength),) for strength in (0.5, 1)]] for file in files
    ]  # fmt: skip
    page = studio.ask(f"/try/{number}")[1]
    assert f"/try/{number}/image/{found.rows[0][-1] * 3 + 1}" in page
    assert studio.ask(f"/try/{number}/image/14")[0] == 200
    assert studio.ask(f"/try/{number}/image/15")[0] == 404
    alone = store.add("sample", "one", [*words[:-1], "--strengths", "1"], given=given,
                      state="done", folder=str(folder))  # fmt: skip
    assert grid_of(store.job(alone)) is None
    for one in (number, alone):
        store.forget(one)


def test_the_shelf_shows_what_a_file_draws(studio: Served, root: Path) -> None:
    """A LoRA file is shown by the image that has its name, else by its run's newest sample."""
    folder = work(studio) / "shelf-lora"
    samples = [folder / "samples" / f"step-{step:06}" / "00.png" for step in (0, 20)]
    images = sorted((root / "sample_data/dreambooth/instance").iterdir())
    for image, sample in zip(images, samples, strict=False):
        sample.parent.mkdir(parents=True)
        shutil.copy(image, sample)
    lora = folder / "mine.safetensors"
    lora.write_bytes(b"\0" * 64)
    assert preview_of(lora) == samples[1]
    shutil.copy(images[2], folder / "mine.preview.png")
    assert preview_of(lora) == folder / "mine.preview.png"
    address = f"/shelf/preview?file={quote(str(lora))}"
    assert address in studio.ask("/shelf")[1].replace("%2F", "/")
    assert studio.ask(address)[2]["content-type"] == "image/webp"
    assert studio.ask("/shelf/preview?file=/etc/passwd")[0] == 404


def test_the_projects_own_base_and_images_are_offered(studio: Served, root: Path) -> None:
    """On a fresh start, with nothing opened but an empty folder, there is something to choose."""
    for kind, path in (("model", "tiny-sd"), ("folder", "dreambooth/instance")):
        page = studio.ask(f"/choose?kind={kind}&field=f-folder")[1]
        assert f'data-choose="{root / "sample_data" / path}"' in page
    base = str(root / "sample_data/tiny-sd")
    assert base in studio.ask("/new")[1]
    looked = {name: post(studio, "/new/look", **{MODEL: model})[1] for name, model in
              (("ours", base), ("hub", "someone/sdxl"), ("closed", "/etc"))}  # fmt: skip
    assert {name: "your model is one" in text for name, text in looked.items()} == {
        "ours": True, "hub": False, "closed": False,
    }  # fmt: skip
    assert "<b>Stable Diffusion 1.x</b>" in looked["ours"].partition('class="chosen"')[2][:2000]
    assert "sample_data" not in studio.ask("/choose?kind=file&field=f-lora")[1]


def test_a_runs_files_go_elsewhere(studio: Served) -> None:
    """The files of a finished run are on its page, to keep, and other files of its folder are not;
    conversion and upload become jobs with the words of a command line, shown like a tool's."""
    folder = work(studio) / "done-lora"
    folder.mkdir()
    (folder / "mine.safetensors").write_bytes(b"\0" * 64)
    (folder / "other.safetensors").write_bytes(b"\0" * 64)
    (folder / "README.md").write_text("# <script>mine</script>")
    (folder / RECORD).write_text(
        json.dumps({**EMPTY, "ended": True, "files": ["mine.safetensors"]})
    )
    store = stored(studio)
    given = {"pretrained_model_name_or_path": "a model"}
    number = store.add(
        "train", "done", [], state="done", folder=str(folder), given=given, started=1.0
    )
    run = f"/runs/{number}"
    text = studio.ask(run)[1]
    assert f"{run}/file/mine.safetensors" in text
    assert "other.safetensors" not in text
    assert studio.ask(f"{run}/file/mine.safetensors")[0] == 200
    for name in ("other.safetensors", "README.md", "..%2Fsecret.txt"):
        assert studio.ask(f"{run}/file/{name}")[0] in (400, 404)
    assert studio.ask(f"{run}/card")[2]["content-type"].startswith("text/plain")
    assert post(studio, f"{run}/convert/bake")[0] == 400
    assert post(studio, f"{run}/push", repo="no place")[0] == 400
    words = {
        f"{run}/convert/kohya": [
            str(folder / "mine.safetensors"), "--to", "kohya", "--out",
            str(folder / "done-lora-kohya.safetensors"), "--model=a model",
        ],
        f"{run}/push": [str(folder), "--repo=me/mine", "--private"],
    }  # fmt: skip
    for address, expected in words.items():
        status, _, headers = post(studio, address, repo="me/mine", private="1")
        assert status == 303
        job = store.job(int(headers["location"].rpartition("/")[2]))
        assert job.words == expected
        assert job.title in studio.ask(headers["location"])[1]
