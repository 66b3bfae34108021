"""Files and commands of other trainers → their settings, from every shell."""

import json
from pathlib import Path

import pytest

from sd_lora.config.translate.command import run
from sd_lora.config.translate.read import Settings, read
from sd_lora.errors import UsageError

SCRIPTS = {
    "train.sh": """#!/bin/bash
MODEL="/models/my model.safetensors"   # the base
export DATA=/data
# --seed 9 is not read here
accelerate launch --num_cpu_threads_per_process=2 train_network.py \\
  --pretrained_model_name_or_path="$MODEL" \\
  --train_data_dir ${DATA}/img --network_args "conv_dim=4" 'conv_alpha=1' --xformers
""",
    "train.bat": """@echo off
set DATA=/data
accelerate launch train_network.py ^
  --pretrained_model_name_or_path="/models/my model.safetensors" ^
  --train_data_dir %DATA%/img --network_args conv_dim=4 conv_alpha=1 --xformers
""",
    "train.ps1": """$MODEL = "/models/my model.safetensors"
accelerate launch train_network.py `
  --pretrained_model_name_or_path=$MODEL `
  --train_data_dir "/data/img" --network_args conv_dim=4 conv_alpha=1 --xformers
""",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_of_each_shell(name: str, tmp_path: Path) -> None:
    """The command in a script of bash, of cmd and of PowerShell, with continued lines, quotes and
    variables, is the same command."""
    file = tmp_path / name
    file.write_bytes(SCRIPTS[name].replace("\n", "\r\n" if name != "train.sh" else "\n").encode())
    settings = read([str(file)])
    assert settings.peer == "sd-scripts"
    assert settings.values == {
        "pretrained_model_name_or_path": "/models/my model.safetensors",
        "train_data_dir": "/data/img",
        "network_args": ["conv_dim=4", "conv_alpha=1"],
        "xformers": True,
    }


def test_a_windows_path_keeps_its_backslashes() -> None:
    r"""C:\new\train in a pasted command is a path, and neither a line break nor a tab."""
    settings = read([r'python train_network.py --train_data_dir "C:\new\train" --seed=3'])
    assert settings.values == {"train_data_dir": r"C:\new\train", "seed": "3"}


def test_the_words_of_a_command() -> None:
    """Words as a shell hands them over; a negative number is a value, a shortened flag of
    diffusers' scripts the whole one, and the program says mode, family and model."""
    words = "accelerate launch sdxl_train_network.py --noise_offset -0.1 --seed 3".split()
    assert read(words) == Settings(
        "sd-scripts", {"noise_offset": "-0.1", "seed": "3"}, Path(), {}, {"sdxl": True}
    )
    words = "python train_dreambooth_lora_sdxl.py --gradient_acc 4 --with_prior".split()
    settings = read(words)
    assert settings.values == {"gradient_accumulation_steps": "4", "with_prior_preservation": True}
    assert settings.fixed == {
        "mode": "dreambooth",
        "family": "sdxl",
        "num_train_epochs": 1,
        "num_validation_images": 4,
        "validation_epochs": 50,
    }
    settings = read("python train_text_to_image_lora.py --max_train_steps 5".split())
    samples = {"num_validation_images": 4, "validation_epochs": 1}
    assert settings.fixed == {"mode": "text_to_image", **samples}
    assert read(["simpletuner", "train", "--model_family=sdxl"]).peer == "simpletuner"


def test_a_file_that_a_command_names(tmp_path: Path) -> None:
    """sd-scripts' --config_file: sections are flattened, flags go before it, and .toml may be left
    out; OneTrainer's and ai-toolkit's programs name a file of settings."""
    (tmp_path / "a.toml").write_text("[net]\nnetwork_dim = 8\nseed = 1\n[x]\nunet_lr = 1e-4\n")
    config = str(tmp_path / "a")
    settings = read(["python", "train_network.py", "--config_file", config, "--seed=2"])
    assert settings.values == {"network_dim": 8, "seed": "2", "unet_lr": 1e-4}
    (tmp_path / "b.json").write_text(json.dumps({"training_method": "LORA", "lora_rank": 4}))
    settings = read(["python", "scripts/train.py", "--config-path", str(tmp_path / "b.json")])
    assert (settings.peer, settings.values["lora_rank"]) == ("onetrainer", 4)
    (tmp_path / "c.yaml").write_text(
        "job: extension\nconfig: {name: x, process: [{type: sd_trainer}]}"
    )
    assert read(["python", "run.py", str(tmp_path / "c.yaml")]).peer == "ai-toolkit"


@pytest.mark.parametrize(
    ("table", "peer"),
    [
        ({"LoRA_type": "Standard", "max_resolution": "512,512"}, "kohya_ss"),
        (
            {"max_resolution": "512,512", "optimizer": "AdamW", "epoch": 1, "lr_warmup": 0},
            "kohya_ss",
        ),
        ({"model_type": "STABLE_DIFFUSION_15", "base_model_name": "m", "epochs": 3}, "onetrainer"),
        ({"--model_family": "sdxl", "--data_backend_config": "b.json"}, "simpletuner"),
        ({"config": {"process": []}}, "ai-toolkit"),
        ({"network_dim": 8, "network_module": "networks.lora"}, "sd-scripts"),
    ],
)
def test_the_trainer_is_told_by_the_names(table: dict, peer: str, tmp_path: Path) -> None:
    """The trainer that knows the settings' names is the one, or that of --from."""
    file = tmp_path / "x.json"
    file.write_text(json.dumps(table))
    assert read([str(file)]).peer == peer
    assert read([str(file)], "simpletuner").peer == "simpletuner"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give a file or a command"),
        (["nowhere.json"], "nowhere.json is no file"),
        (["accelerate launch flux_train_network.py --seed 3"], "trains no LoRA of Stable"),
        (["python", "train_network.py"], "there are no flags to translate"),
        (['python train_network.py --seed "3'], "open quote"),
        (["--colour", "red", "--shape", "round"], "settings of no known trainer"),
    ],
)
def test_mistakes_in_commands(words: list[str], message: str) -> None:
    """Each is an error that says what was found."""
    with pytest.raises(UsageError, match=message):
        read(words)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{", "is not JSON"),
        ("a.yaml", "a: [", "is not YAML"),
        ("a.toml", "a = ", "is not TOML"),
        ("a.json", "[]", "holds no settings"),
        ("a.json", '{"a": 1, "b": 2}', "settings of no known trainer"),
        ("a.toml", "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'x'", "--dataset_config"),
        ("a.sh", "echo hello", "no command with flags"),
    ],
)
def test_mistakes_in_files(name: str, text: str, message: str, tmp_path: Path) -> None:
    """Each is an error that names the file or the remedy."""
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=message):
        read([str(tmp_path / name)])


@pytest.mark.parametrize("config", [[1], {"process": 3}, {"process": [3]}])
def test_a_job_without_a_process(config: object, tmp_path: Path) -> None:
    """ai-toolkit's file with something else in place of its tables is an error, no traceback."""
    (tmp_path / "a.json").write_text(json.dumps({"config": config}))
    with pytest.raises(UsageError, match="config is no table with a list of tables"):
        run(["--from", "ai-toolkit", str(tmp_path / "a.json")])
