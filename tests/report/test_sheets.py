"""Sheets of images: everything that they must show is there, and the PNG tells how it was drawn."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont

import sd_lora
from sd_lora.report.sheets import GAP, Sheet, font_for, missing, wrapped, write_image
from sd_lora.sampling.parameters import Parameters
from tests.training.runs import dreambooth

DRAWN = Parameters("a photo of a sks dog", 3, 25, 7.5, (512, 768), "/home/me/base.v1.safetensors")
LONG = "masterpiece, " + "a_word_that_is_longer_than_a_column_is_wide " * 3 + "x" * 200 + " end"


def read_back(text: str) -> dict[str, str]:
    """The parameters in a text, as A1111's format has them: the settings are the last line, and a
    line that begins with "Negative prompt:" ends the prompt."""
    *lines, settings = text.split("\n")
    prompt, _, negative = "\n".join(lines).partition("\nNegative prompt:")
    found = re.findall(r'(\w[\w ]*): ("[^"]*"|[^,]*)(?:, |$)', settings)
    return {"prompt": prompt, "negative": negative, **dict(found)}


def test_a_text_reads_back() -> None:
    """Each parameter comes back from the text; a value with commas is quoted, names have no folder,
    and the LoRA is named where there is one."""
    assert read_back(DRAWN.text()) == {
        "prompt": "a photo of a sks dog", "negative": "", "Steps": "25", "Sampler": "DPM++ 2M",
        "CFG scale": "7.5", "Seed": "3", "Size": "512x768", "Model": "base.v1", "RNG": "CPU",
    }  # fmt: skip
    tuned = replace(DRAWN, model="someone/a base-1.5", lora="dog, v2", lora_steps=800, clip_skip=1)
    found = read_back(tuned.text())
    assert (found["Model"], found["LoRA"]) == ("a base-1.5", '"dog, v2"')
    assert (found["LoRA steps"], found["Clip skip"]) == ("800", "2")


@pytest.mark.parametrize("text", ["a photo", LONG, "猫の写真" * 30, "", " \n a\tb "])
def test_text_is_wrapped_and_never_cut(text: str) -> None:
    """Lines fit the width, and together are the text; words that fit a line are not broken."""
    font = ImageFont.load_default(14)
    lines = wrapped(text, 250, font)
    assert max(map(font.getlength, lines)) <= 250
    assert "".join(lines).replace(" ", "") == "".join(text.split())
    short = {word for word in text.split() if font.getlength(word) <= 250}
    assert short <= set(" ".join(lines).split())


def test_a_font_has_the_text() -> None:
    """Pillow's own font for ASCII; for other text one that lacks no more of it than Pillow's, and
    nothing of it where the system has DejaVu."""
    own = ImageFont.load_default(14)
    ascii = "".join(map(chr, range(32, 127)))
    assert missing(own, ascii) == set()
    assert font_for(ascii).getname() == own.getname()
    assert missing(own, "2×2 Ω") == {"×", "Ω"}
    other = font_for("2×2 Ω")
    assert missing(other, "2×2 Ω") <= {"×", "Ω"}
    if other.getname()[0] == "DejaVu Sans":
        assert missing(other, "2×2 Ωб") == set()


def test_a_sheet_has_room_for_everything() -> None:
    """Every image is there in its own shape, enlarged without smoothing or reduced; an empty cell
    stays empty; a longer prompt makes a higher sheet, and neighbours of one prompt share it."""
    red, wide = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (400, 100), "blue")
    rows = [[wide, None], [red, red]]
    one = [DRAWN, replace(DRAWN, seed=4)]
    sheet = Sheet(rows, ["trained on", "after"], one, side=64).draw()
    assert sheet.width == GAP + 2 * (64 + GAP)
    counts = {colour: n for n, colour in sheet.getcolors(100_000)}
    assert counts[255, 0, 0] == 2 * 64 * 64
    assert counts[0, 0, 255] == 64 * 16
    apart = Sheet(rows, ["trained on", "after"], [DRAWN, replace(DRAWN, prompt="a dog")], 64).draw()
    assert apart.height > sheet.height  # in half the width
    two = [replace(p, prompt=p.prompt + " " + LONG) for p in one]
    longer = Sheet(rows, ["trained on", "after"], two, side=64).draw()
    assert longer.height > apart.height
    ink = np.asarray(longer.convert("L")).min(axis=1)
    assert (ink[: -2 * GAP] < 128).any()
    assert (ink[-GAP:] == 255).all()  # the last line is whole


def test_a_file_carries_its_parameters(tmp_path: Path) -> None:
    """The texts of a PNG read back by pillow are those of the columns, in any script."""
    columns = [DRAWN, replace(DRAWN, prompt="猫 in Zürich", seed=4), replace(DRAWN, lora="a\udcff")]
    write_image(tmp_path / "one.png", Image.new("RGB", (4, 4)), columns[:1])
    Sheet([[None] * 3], ["none"], columns).write(tmp_path / "sheet.png")
    with Image.open(tmp_path / "one.png") as one:
        assert one.text == {"parameters": DRAWN.text()}
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert list(sheet.text) == ["parameters", "parameters 2", "parameters 3"]
        assert sheet.text["parameters 2"] == columns[1].text()
        assert "LoRA: a?" in sheet.text["parameters 3"]


def test_the_sheet_of_a_run(tiny_sd1: Path, tmp_path: Path) -> None:
    """A run with prior preservation shows its training images above the samples and one sample by
    the class prompt; sheets and generated class images say how they were drawn, and no file tells
    the folder that it was made in."""
    for i in range(3):
        colour = ("red", "lime", "blue")[i]
        (tmp_path / "dogs").mkdir(exist_ok=True)
        Image.new("RGB", (64, 32), colour).save(tmp_path / "dogs" / f"{i}.png")
    result = sd_lora.train(
        dreambooth(
            tiny_sd1, tmp_path / "dogs", tmp_path / "out", max_train_steps=2, validation_epochs=1,
            num_validation_images=2, validation_steps=2, validation_prompt="sks dog in the snow",
            train_batch_size=3, with_prior_preservation=True, class_prompt="a dog",
            class_data_dir=str(tmp_path / "class"), num_class_images=2,
        )
    )  # fmt: skip
    assert result.before_after
    with Image.open(result.before_after) as sheet:
        counts = {colour: n for n, colour in sheet.convert("RGB").getcolors(1 << 20)}
        texts = [read_back(text) for text in sheet.text.values()]
    for colour, shown in (((255, 0, 0), True), ((0, 255, 0), True), ((0, 0, 255), False)):
        # a sample may hold some pixels of it by chance, and does with the oldest versions
        assert (counts.get(colour, 0) >= 256 * 128) is shown
    prompts = [(t["prompt"], t["Seed"], t["LoRA steps"], t["LoRA"]) for t in texts]
    assert prompts == [
        ("sks dog in the snow", "0", "2", "out"), ("sks dog in the snow", "1", "2", "out"),
        ("a dog", "2", "2", "out"),
    ]  # fmt: skip
    out = tmp_path / "out"
    drawn = [*(tmp_path / "class").glob("*.png"), *out.glob("*.png"), *out.glob("samples/*.png")]
    assert len(drawn) == 2 + 2
    for path in drawn:
        assert str(tmp_path).encode() not in path.read_bytes()
        with Image.open(path) as image:
            said = read_back(image.text["parameters"])
        assert said["Model"] == tiny_sd1.name
        if path.parent.name == "class":
            assert (said["prompt"], said["Steps"], "LoRA" in said) == ("a dog", "25", False)
