"""The tools from the command line: what people type, what they read, and the exit codes."""

import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from sd_lora.cli import main
from sd_lora.formats import adapter_files as files
from tests.formats.trained import saved, trained
from tests.training.launches import Apart
from tests.training.runs import images


@pytest.fixture
def lora(tiny_sd1: Path, tmp_path: Path) -> Path:
    return saved(tmp_path / "a.safetensors", files.KOHYA, trained(tiny_sd1), tiny_sd1)


def test_the_tools_in_a_row(
    lora: Path, tiny_sd1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """convert, merge, resize, bake, extract, verify and inspect, each on the output of another;
    each says where the file is, that it was verified, and what was lost."""

    def run(*words: object) -> str:
        assert main([str(word) for word in words]) == 0
        return capsys.readouterr().out

    def out(name: str) -> list[object]:
        return ["--model", tiny_sd1, "--out", tmp_path / name]

    said = run("convert", lora, "--to", "diffusers", *out("b.safetensors"))
    assert "b.safetensors: diffusers" in said
    assert "verified: 144 modules load as they should" in said
    assert "load_lora_weights(" in said
    said = run("merge", lora, tmp_path / "b.safetensors", "--weights", 2, -1, *out("c.safetensors"))
    assert "c.safetensors: kohya" in said
    said = run("resize", tmp_path / "c.safetensors", "--rank", 2, *out("d.safetensors"))
    assert "144 modules approximated, ranks 2 to 2: error ‖ΔW − BA‖ / ‖ΔW‖ = " in said
    words = ["bake", tiny_sd1, lora, "--weights", "0.5", "--out", tmp_path / "baked"]
    assert "144 parameters of Stable Diffusion 1.x changed" in run(*words)
    words = ["extract", tiny_sd1, tmp_path / "baked", "--energy", "0.999"]
    said = run(*words, "--out", tmp_path / "e.safetensors", "--model", tiny_sd1)
    assert "parameters are unchanged and not in the file" in said
    said = run("verify", tmp_path / "e.safetensors", "--model", tiny_sd1)
    assert "diffusers loads all 144 modules as they are" in said
    said = run("inspect", tmp_path / "e.safetensors", "--model", tiny_sd1)
    assert "no problems found" in said
    record = json.loads(run("inspect", lora, "--model", tiny_sd1, "--json"))
    assert [part["modules"] for part in record["components"]] == [132, 12]


def test_verify_finds_what_diffusers_does(
    lora: Path, tiny_sd1: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An alpha of its own on one attention layer (T3) is exit code 1, with the module and what to
    do; and a LyCORIS file is said to have no loader there."""
    tensors = load_file(lora)
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors[f"{stem}.alpha"] *= 2
    save_file(tensors, lora)
    assert main(["verify", str(lora), "--model", str(tiny_sd1)]) == 1
    said = capsys.readouterr().err
    assert "attn1.to_q is off by 50.0%" in said
    assert "sd-lora convert" in said
    loha = trained(tiny_sd1, method="loha")
    path = saved(lora.with_name("loha.safetensors"), files.LYCORIS, loha, tiny_sd1)
    assert main(["verify", str(path), "--model", str(tiny_sd1)]) == 0
    assert "diffusers has no loader for this kind of file" in capsys.readouterr().out


def test_a_broken_model_is_explained(
    lora: Path, tiny_sd1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A configuration of which no model can be made is exit code 2 and no traceback."""
    shutil.copytree(tiny_sd1, tmp_path / "model")
    path = tmp_path / "model" / "unet" / "config.json"
    config = json.loads(path.read_text()) | {"norm_num_groups": 7}
    path.write_text(json.dumps(config))
    assert main(["inspect", str(lora), "--model", str(tmp_path / "model")]) == 2
    assert "has a configuration that fails" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["convert", "FILE", "--to", "kohya"], "required: --out"),
        (["convert", "FILE", "--out", "x.safetensors"], "required: --to"),
        (["convert", "none.safetensors", "--to", "kohya", "--out", "x.safetensors"], "not a file"),
        (["inspect", "FILE", "--jsn"], "unknown argument '--jsn'. Did you mean --json?"),
        (["inspect", "FILE", "--family", "sdxl", "--model", "MODEL"], "and --family says sdxl"),
        (["inspect", "FILE", "--model", "nowhere"], "no such folder"),
        (["merge", "FILE", "--weights", "1", "2", "--out", "x.safetensors"], "2 weights"),
        (["merge", "FILE", "--weights", "nan", "--out", "x.safetensors"], "finite number"),
        (["bake", "MODEL", "FILE", "--weights", "-1e-1", "2", "--out", "x"], "2 weights"),
        (["resize", "FILE", "--out", "x.safetensors"], "give a rank, an energy or a ratio"),
        (["resize", "FILE", "--rank", "x", "--out", "x.safetensors"], "invalid int value"),
        (
            [
                "extract",
                "MODEL",
                "MODEL",
                "--components",
                "vae",
                "--rank",
                "4",
                "--out",
                "x.safetensors",
            ],
            "has no 'vae'",
        ),
        (["bake", "FILE", "FILE", "--out", "x.safetensors"], "no checkpoint of Stable Diffusion"),
        (["verify", "MODEL"], "is a folder with"),
        (["bak"], "Did you mean bake?"),
    ],
)
def test_mistakes_are_explained(
    words: list[str],
    message: str,
    lora: Path,
    tiny_sd1: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each is exit code 2 and one line that says what to do; nothing is written."""
    monkeypatch.chdir(tmp_path)
    places = {"FILE": str(lora), "MODEL": str(tiny_sd1)}
    assert main([places.get(word, word) for word in words]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_an_interrupted_tool_leaves_nothing(lora: Path, tiny_sd1: Path, tmp_path: Path) -> None:
    """SIGTERM in the middle of the work ends it with 143 and no file beside the output."""
    words = ["resize", str(lora), "--rank", "2", "--model", str(tiny_sd1)]
    words += ["--out", str(tmp_path / "out" / "b.safetensors")]
    apart = Apart([words], tmp_path / "said")
    (process,) = apart.processes
    while process.is_alive() and not list((tmp_path).glob("out/.sd-lora-*/*")):
        time.sleep(0.001)
    process.terminate()
    assert apart.wait() == [143], apart.text
    assert list((tmp_path / "out").iterdir()) == []


def limited(limit: int, words: list[str]) -> tuple[int, str]:
    """The exit code and standard error of a command whose writes fail from a file's `limit` bytes
    on, by the system's own limit, in whatever library they are made."""
    reading, writing = os.pipe()
    process = os.fork()
    if not process:
        code = 99
        try:
            os.dup2(writing, 1)
            sys.stdout = sys.stderr = os.fdopen(os.dup(writing), "w")
            os.close(writing)
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            code = main(words)
        except BaseException as error:
            sys.stderr.write(f"Traceback: {error!r}")
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as file:
        said = file.read()
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), said


def test_a_full_disk_leaves_nothing(tiny_sd1: Path, tmp_path: Path) -> None:
    """Each tool, and the page of `check`, where a write fails at once or in the middle: exit code
    1, one line with the path and the reason, no traceback, and no file but those of before."""
    adapter = {"unet": {"conv_in": trained(tiny_sd1)["unet"]["conv_in"]}}
    source = str(saved(tmp_path / "a.safetensors", files.KOHYA, adapter, tiny_sd1))
    model, out = str(tiny_sd1), str(tmp_path / "new.safetensors")
    tuned, data = str(shutil.copytree(tiny_sd1, tmp_path / "tuned")), images(tmp_path / "data", 2)
    path = next(Path(tuned, "unet").glob("*.safetensors"))
    tensors = load_file(path)
    save_file(tensors | {"conv_in.weight": tensors["conv_in.weight"] + 1}, path)
    commands = [
        ["convert", source, "--to", "diffusers", "--out", out, "--model", model],
        ["merge", source, source, "--rank", "2", "--out", out, "--model", model],
        ["resize", source, "--rank", "2", "--out", out, "--model", model],
        ["extract", model, tuned, "--rank", "2", "--out", out],
        ["bake", model, source, "--out", str(tmp_path / "baked")],
        ["check", str(data), "--model", model, "--page", str(tmp_path / "new.html")],
        ["translate", "--out", str(tmp_path / "new.toml"), "python train_network.py --seed 3"],
    ]
    before = sorted(tmp_path.rglob("*"))
    for words in commands:
        for limit in (10, 1000) if words[0] != "translate" else (10,):
            code, said = limited(limit, words)
            assert code == 1, said
            (error,) = (line for line in said.splitlines() if line.startswith("error: "))
            assert re.search(f"{tmp_path}/.*File too large", error), error
            assert "Traceback" not in said
            assert sorted(tmp_path.rglob("*")) == before, words


def test_output_goes_anywhere(lora: Path, tiny_sd1: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into a pipe that closes early, and into a console that has no ‖ or ▇: no traceback."""
    words = ["inspect", str(lora), "--model", str(tiny_sd1)]
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", narrow)
    assert main(words) == 0
    narrow.flush()
    assert b"down_blocks.0" in narrow.buffer.getvalue()
    monkeypatch.undo()
    code = "import sys; from sd_lora.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *words, "--json"]
    pipe = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert pipe.stdout is not None
    pipe.stdout.close()
    assert b"Traceback" not in pipe.stderr.read()  # type: ignore[union-attr]
    assert pipe.wait(60) == 0


@pytest.mark.parametrize(
    "command", ["inspect", "verify", "convert", "merge", "resize", "extract", "bake"]
)
def test_every_tool_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """--help explains a tool, and the front door lists it."""
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    assert f"usage: sd-lora {command}" in capsys.readouterr().out
    assert main(["--help"]) == 0
    assert f"\n  {command}  " in capsys.readouterr().out


def test_a_file_of_the_published_size_needs_no_model(
    tiny_sd1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --model a file is held against its family's published model; a tiny one is refused
    with what to give."""
    lora = saved(tmp_path / "a.safetensors", files.KOHYA, trained(tiny_sd1), tiny_sd1)
    words = ["convert", str(lora), "--to", "diffusers", "--out", str(tmp_path / "b.safetensors")]
    assert main(words) == 2
    assert "for a LoRA of another model give its folder as --model" in capsys.readouterr().err
    assert main([*words, "--no_verify"]) == 0
    assert "not verified" in capsys.readouterr().out
    shutil.rmtree(tmp_path)
