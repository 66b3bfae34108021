"""`sd-lora sample`: each image is that of the model with the files' ΔW in its weights."""

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image

from sd_lora.cli import main
from sd_lora.formats import adapter_files as files
from sd_lora.models.load import find_base
from sd_lora.sample import Loras, Mix
from sd_lora.sampling.sampler import sample
from tests.formats.trained import saved, trained

HOW = ("--steps", "3", "--guidance", "3", "--seeds", "5", "7", "--size", "64x48")


@pytest.fixture(scope="module")
def loras(tiny_sd1: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two LoRA files, of kohya's and of diffusers' format."""
    folder = tmp_path_factory.mktemp("loras")
    kinds = [("a", files.KOHYA), ("b", files.DIFFUSERS)]
    return [
        saved(folder / f"{name}.safetensors", kind, trained(tiny_sd1, seed), tiny_sd1)
        for seed, (name, kind) in enumerate(kinds)
    ]


def drawn(folder: Path, *words: object) -> list[np.ndarray]:
    """The images that a command writes one by one."""
    words = ("sample", *HOW, "--images", folder, "--out", folder / "grid.png", *words)
    folder.mkdir()
    assert main([str(word) for word in words]) == 0
    return [np.asarray(Image.open(path), np.int16) for path in sorted(folder.glob("0*.png"))]


def test_cells_are_images_of_the_weights(tiny_sd1: Path, loras: list[Path], tmp_path: Path) -> None:
    """A grid of one file at 0 and 0.5, beside another one: its images are those of the model with
    the other file baked in, and with both, to two levels of 255, also where both are beside; their
    parameters name both files; with low memory they are the same."""
    a, b = loras
    words = ("--lora", a, "--beside", b, "--beside_strength", 0.8, "--strengths", 0, 0.5)
    prompt = ("--prompt", "a red thing", "--negative", "blurry")
    cells = drawn(tmp_path / "cells", "--model", tiny_sd1, *words, *prompt)
    assert [cell.shape for cell in cells] == [(48, 64, 3)] * 4
    for start, mix in ((0, ["--weights", "0.8"]), (2, ["--weights", "0.8", "0.5"])):
        model = tmp_path / f"baked-{start}"
        baked = [b, a][: len(mix) - 1]
        assert main(["bake", str(tiny_sd1), *map(str, baked), *mix, "--out", str(model)]) == 0
        alone = drawn(tmp_path / f"alone-{start}", "--model", model, *prompt)
        for cell, image in zip(cells[start : start + 2], alone, strict=True):
            assert np.abs(cell - image).max() <= 2
    assert np.abs(cells[0] - cells[2]).mean() > 1
    assert np.abs(cells[0] - cells[1]).mean() > 1
    text = Image.open(tmp_path / "cells" / "00003.png").info["parameters"]
    assert text.startswith("a red thing <lora:a:0.5> <lora:b:0.8>\nNegative prompt: blurry\n")
    assert "Seed: 7, Size: 64x48" in text
    both = ("--beside", b, a, "--beside_strength", 0.8, 0.5, "--beside_together")
    together = drawn(tmp_path / "both", "--model", tiny_sd1, *both, *prompt)
    assert all(np.abs(x - y).max() <= 2 for x, y in zip(cells[2:], together, strict=True))
    again = drawn(tmp_path / "low", "--model", tiny_sd1, *words, *prompt, "--low_memory")
    assert all(np.abs(x - y).max() <= 2 for x, y in zip(cells, again, strict=True))


MARKED = "a red thing --n blurry --w 48 --h 64 --d 9 --s 2 --l 5 --m 0.5"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("prompts", f"# seen\n\n{MARKED}\n  a red thing \n"),
        (
            "prompts.toml",
            '[[prompts]]\nprompt = "a red thing"\nnegative = "blurry"\nwidth = 48\nheight = 64\n'
            "seed = 9\nsteps = 2\nguidance = 5\nstrength = 0.5\n[[prompts]]\n"
            'prompt = "a red thing"',
        ),
    ],
    ids=["lines", "tables"],
)
def test_a_prompt_of_a_file_has_its_own_settings(
    name: str, text: str, tiny_sd1: Path, loras: list[Path], tmp_path: Path
) -> None:
    """A prompt of a file with its own size, seed, steps, guidance, negative prompt and strength is
    drawn, in the row of the base and of a file, as the flags alone draw it, to the bit and with the
    same parameters; its strength multiplies the row's, and its seed is its only one. A prompt
    without settings has those of the flags."""
    (tmp_path / name).write_text(text)
    rows = ("--model", tiny_sd1, "--lora", loras[0])
    cells = drawn(tmp_path / "cells", *rows, "--prompts", tmp_path / name)
    own = ("--size", "48x64", "--seeds", 9, "--steps", 2, "--guidance", 5, "--negative", "blurry")
    prompt = ("--prompt", "a red thing")
    marked = drawn(tmp_path / "marked", *rows, "--strengths", 0, 0.5, *prompt, *own)
    plain = drawn(tmp_path / "plain", *rows, *prompt)
    wanted = [marked[0], *plain[:2], marked[1], *plain[2:]]
    assert [cell.shape for cell in cells] == [(64, 48, 3), *[(48, 64, 3)] * 2] * 2
    assert all(np.array_equal(x, y) for x, y in zip(cells, wanted, strict=True))
    texts = [
        Image.open(path).info["parameters"]
        for path in (tmp_path / "cells" / "00003.png", tmp_path / "marked" / "00001.png")
    ]
    assert texts[0] == texts[1]
    with Image.open(tmp_path / "cells" / "grid.png") as grid:
        assert "Seed: 9, Size: 48x64" in grid.info["parameters"]


def test_mistakes_of_prompts_come_at_once(
    tiny_sd1: Path, loras: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All lines of a file that cannot be read are told with their places, before the model is
    looked at; then, together and with their places, sizes that are no multiple of the model's
    latents (16 pixels here), strengths that the row's make too large, and those of no file."""
    path = tmp_path / "prompts.txt"
    words = ["sample", "--out", str(tmp_path / "new.png"), "--prompts", str(path), "--model"]
    path.write_text("a cat\na dog --w 60\na hen --x 1 --s 0\n")
    assert main([*words, "none"]) == 2
    said = capsys.readouterr().err
    assert "prompts.txt:2: --w is a multiple of 8 from 8 to 8192, not 60" in said
    assert "prompts.txt:3: --x is no setting of a prompt" in said
    assert "--s is a whole number from 1 to 200, not 0" in said
    coarse = tmp_path / "coarse"
    shutil.copytree(tiny_sd1, coarse)
    AutoencoderKL(
        block_out_channels=(8,) * 5, down_block_types=("DownEncoderBlock2D",) * 5,
        up_block_types=("UpDecoderBlock2D",) * 5, norm_num_groups=8,
    ).save_pretrained(coarse / "vae")  # fmt: skip
    path.write_text("a cat\na dog --w 72 --d 1\na hen --m 60 --h 64\n")
    size = ["--size", "56x64", "--seeds", "0", "1"]
    rows = ["--lora", str(loras[0]), "--strengths", "0", "2"]
    assert main([*words, str(coarse), *size, *rows]) == 2
    said = capsys.readouterr().err
    assert said.count("--size: 56 is no multiple of 16") == 1
    assert "prompts.txt:2: 72 pixels are no multiple of 16, the model's latents" in said
    assert said.count("prompts.txt:3: its strength 60 times the row's is 120: 100 at most") == 1
    assert main([*words, str(tiny_sd1), "--beside", str(loras[0])]) == 2
    assert "prompts.txt:3: its strength 60 is of the files of --lora" in capsys.readouterr().err


def test_each_file_beside_has_its_group_of_columns(
    tiny_sd1: Path, loras: list[Path], tmp_path: Path
) -> None:
    """A grid of one file at two strengths beside two others: each image is that of the model with
    its two files, or of its one file, to the bit, and no two of them are alike."""
    a, b = loras
    c = saved(tmp_path / "c.safetensors", files.KOHYA, trained(tiny_sd1, 2), tiny_sd1)
    words = ("--model", tiny_sd1, "--prompt", "a red thing", "--seeds", 5)
    beside = ("--beside", b, c, "--beside_strength", 0.8, 0.6)
    cells = drawn(tmp_path / "cells", *words, "--lora", a, "--strengths", 0, 0.5, *beside)
    parts = find_base(str(tiny_sd1)).load()
    loras_of, encoder, alone = Loras(parts), parts.caption_encoder(clip_skip=0), []
    for files_of in ([(b, 0.8)], [(c, 0.6)], [(a, 0.5), (b, 0.8)], [(a, 0.5), (c, 0.6)]):
        loras_of.put_on(Mix(tuple(files_of)))
        alone += sample(
            parts, encoder, ["a red thing"], [5], size=(64, 48), device=torch.device("cpu"),
            steps=3, guidance_scale=3,
        )  # fmt: skip
    assert all(np.array_equal(x, np.asarray(y)) for x, y in zip(cells, alone, strict=True))
    pairs = itertools.combinations(cells, 2)
    assert all(np.abs(x - y).max() > 2 for x, y in pairs)


def test_guidance_is_rescaled_by_the_model_or_as_asked(
    tiny: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model with zero terminal SNR draws with guidance rescaled by 0.7, and its images say so;
    another share changes them, 0 is plain guidance, and one above 1 is refused."""
    words = ("--model", tiny("sdxl-v"), "--prompt", "a thing")
    (first, _), (same, _), (plain, _) = (
        drawn(tmp_path / f"{number}", *words, *more)
        for number, more in enumerate(((), ("--guidance_rescale", 0.7), ("--guidance_rescale", 0)))
    )
    assert np.array_equal(first, same)
    assert not np.array_equal(first, plain)
    texts = [Image.open(tmp_path / f"{n}" / "00000.png").info["parameters"] for n in range(3)]
    assert ["CFG Rescale: 0.7" in text for text in texts] == [True, True, False]
    refused = ["sample", "--model", "m", "--prompt", "a", "--guidance_rescale", "1.5"]
    assert main(refused) == 2
    assert "a share is from 0 to 1, not '1.5'" in capsys.readouterr().err


def test_faults_come_at_once_and_before_the_model(
    tiny_sd1: Path, tiny_sdxl: Path, loras: list[Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Files of another model and sizes that it cannot draw are told together; so is a grid that is
    there, and a missing prompt."""
    (tmp_path / "grid.png").touch()
    (tmp_path / "prompts.txt").write_text("a cat\n\na dog\n")
    words = ["sample", "--model", str(tiny_sdxl), "--lora", *map(str, loras), "--size", "63"]
    words += ["--prompts", str(tmp_path / "prompts.txt"), "--out"]
    assert main([*words, str(tmp_path / "new.png")]) == 2
    said = capsys.readouterr().err
    assert said.count("does not fit") == 2
    assert "--size: 63 is no multiple of 8" in said
    assert main([*words, str(tmp_path / "grid.png")]) == 2
    assert "grid.png is there already" in capsys.readouterr().err
    some = ["sample", "--model", str(tiny_sd1), "--out", str(tmp_path / "new.png")]
    assert main(some) == 2
    assert "give a prompt" in capsys.readouterr().err
    for wrong, message in (
        (["--device", "foo"], "--device foo cannot be used here"), (["--seeds", "x"], "a seed is"),
        (["--strengths", "1e39"], "a strength is from"), (["--clip_skip", "-3"], "clip_skip is"),
        (["--out", str(tmp_path / "new.jpg")], "ends in .png"),
        (["--images", str(tmp_path / "grid.png")], "is a file, not a folder"),
    ):  # fmt: skip
        assert main([*some, "--prompt", "a cat", *wrong]) == 2
        assert message in capsys.readouterr().err


def test_rows_that_are_drawn_are_kept(
    tiny_sd1: Path, loras: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Where the device has no memory left in the second row, the error names the row and a flag,
    and the grid has the first one. (The error is a stand-in for the device's own.)"""
    forward, calls = UNet2DConditionModel.forward, []

    def small_card(*args: object, **options: object) -> object:
        calls.append(1)
        if len(calls) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(*args, **options)

    monkeypatch.setattr(UNet2DConditionModel, "forward", small_card)
    words = ["sample", *HOW, "--model", tiny_sd1, "--lora", loras[0], "--prompt", "a cat"]
    assert main([str(word) for word in [*words, "--out", tmp_path / "grid.png"]]) == 1
    said = capsys.readouterr().err
    assert "has too little memory to draw with" in said
    assert "add --low_memory. It was drawing a 1; the rows before are in" in said
    assert Image.open(tmp_path / "grid.png").size[1] < 400
