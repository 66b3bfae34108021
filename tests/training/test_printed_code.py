"""The code that a run prints works when it is pasted, up to the image."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image

import sd_lora
from sd_lora.cli import main
from sd_lora.formats.canonical import read_models
from sd_lora.formats.family_of_file import prediction_type
from sd_lora.formats.lora_file import open_lora
from sd_lora.formats.python_code import PipelineCode
from sd_lora.formats.verify import compare, loaded_adapter
from sd_lora.models.caption_encoder import encode_in_batches
from sd_lora.models.families import FAMILIES
from sd_lora.models.load import load_parts
from tests.single import build_single_pipeline, write_single
from tests.training.runs import dreambooth, images

Folder = Callable[[str], Path]


def code_in(printed: str) -> str:
    """The Python code of printed lines: from its first import to the line that draws."""
    (code,) = re.findall(r"^import torch\n.*?^pipe\([^\n]*\n", printed + "\n", re.DOTALL | re.M)
    return code


def pasted(code: str, folder: Path, patch: pytest.MonkeyPatch, steps: int | None = 2) -> Any:
    """Run code in a folder of its own; returns its pipeline. It must have drawn an image, in two
    steps to save time, or as printed with None."""
    if steps:
        code = code.replace(").images[0]", f", num_inference_steps={steps}).images[0]")
    names: dict[str, Any] = {}
    folder.mkdir()
    patch.chdir(folder)
    exec(code, names)
    with Image.open("image.png") as image:
        assert image.size[0] >= 16
    return names["pipe"]


def test_the_code_computes_where_and_as_the_run_did() -> None:
    """With a GPU the pipeline is moved there, in the precision of the run."""
    code = PipelineCode("base", "StableDiffusionPipeline", gpu=True, dtype="bfloat16")
    line = "pipe = DiffusionPipeline.from_pretrained('base', dtype=torch.bfloat16).to(\"cuda\")"
    assert line in code.lines([], "a photo")


# kind of base → options of its run
RUNS: dict[str, dict[str, Any]] = {
    "tiny-sd": {"train_text_encoder": True, "token_abstraction": "<it>"},
    "sdxl": {
        "token_abstraction": "<it>",
        "prediction_type": "flow_prediction",
        "flow_shift": 3.0,
    },
    "sd2": {"rescale_betas_zero_snr": True, "clip_skip": 1},
}


@pytest.mark.parametrize("kind", RUNS)
def test_the_code_after_a_run(
    kind: str, root: Path, tiny: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Pasted in another folder, the code after a run draws an image with every ΔW of the file: on
    the project's own base, whose weights are float16, with text encoder and a new word; on SDXL
    with a new word in both encoders, by flow matching; and with the noise and clip skip that the
    options say. A
    quote and a backslash in the folder's name are kept."""
    base = root / "sample_data" / kind if kind == "tiny-sd" else tiny(kind)
    out = tmp_path / "it's \\new"
    config = dreambooth(
        base, images(tmp_path / "data", 2), out, max_train_steps=1, learning_rate=1e-2,
        instance_prompt="a photo of <it>" if "token_abstraction" in RUNS[kind] else "a photo",
        **RUNS[kind],
    )  # fmt: skip
    with sd_lora.Terminal() as terminal:
        result = sd_lora.train(config, [terminal])
    pipe = pasted(
        code_in(capsys.readouterr().out),
        tmp_path / "elsewhere",
        monkeypatch,
        None if kind == "tiny-sd" else 2,
    )
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.float32}
    parts = load_parts(str(base))
    sd_lora.load_adapter(parts.models, result.files[0].path)
    adapter = {c: deltas for c, deltas in read_models(parts.models).items() if deltas}
    count, _, wrong = compare(adapter, loaded_adapter(pipe))
    assert (count, wrong) == (result.files[0].modules, [])
    if "token_abstraction" in RUNS[kind]:
        assert "<it>" in pipe.tokenizer.get_vocab()
    if kind == "sdxl":
        assert isinstance(pipe.scheduler, DPMSolverMultistepScheduler)
        assert (pipe.scheduler.config.use_flow_sigmas, pipe.scheduler.config.flow_shift) == (1, 3)
        header = open_lora(result.files[0].path).header
        assert header["modelspec.prediction_type"] == "flow"
        assert prediction_type(header, FAMILIES["sdxl"]) == "flow_prediction"
    if kind == "sd2":
        assert pipe.scheduler.config.rescale_betas_zero_snr
        assert pipe.guidance_rescale == 0.7
        encoder = parts.caption_encoder(clip_skip=1)
        ((_, ours),) = encode_in_batches(encoder, parts.text_encoders, ["a photo"])
        theirs, _ = pipe.encode_prompt("a photo", "cpu", 1, False)
        torch.testing.assert_close(theirs[0], ours.hidden, rtol=1e-5, atol=1e-5)


def test_the_code_for_a_single_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After a run on a single checkpoint the code names the class that reads it. diffusers takes
    the configuration from the hub; offline, the test gives it."""
    pipeline, folder = build_single_pipeline("sd1"), tmp_path / "folder"
    pipeline.save_pretrained(folder)
    base = write_single(pipeline, tmp_path / "base.safetensors")
    config = dreambooth(
        base, images(tmp_path / "data", 2), tmp_path / "out", max_train_steps=1,
        targets="attention", tokenizer_name=str(folder / "tokenizer"),
    )  # fmt: skip
    with sd_lora.Terminal() as terminal:
        sd_lora.train(config, [terminal])
    code = code_in(capsys.readouterr().out)
    assert "StableDiffusionPipeline.from_single_file(" in code
    code = code.replace(", dtype", f", config={str(folder)!r}, dtype")
    pipe = pasted(code, tmp_path / "elsewhere", monkeypatch)
    assert loaded_adapter(pipe)["unet"]


def test_the_code_after_a_tool(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The code after `sd-lora convert` draws an image with the file that was written."""
    parts = load_parts(str(tiny_sd1))
    sd_lora.inject(parts.models["unet"], targets="attention", rank=1)
    file, _ = sd_lora.save_adapter(parts.models, tmp_path / "lora", family="sd1")
    out = ["--to", "diffusers", "--out", str(tmp_path / "b.safetensors"), "--model", str(tiny_sd1)]
    assert main(["convert", str(file), *out]) == 0
    pipe = pasted(code_in(capsys.readouterr().out), tmp_path / "elsewhere", monkeypatch)
    assert loaded_adapter(pipe)["unet"]
