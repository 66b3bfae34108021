"""Presets: their files against the rows, their place under flags, and the lengths of runs."""

import tomllib
from pathlib import Path

import pytest

import sd_lora.config.presets as presets
from sd_lora.cli import main
from sd_lora.config.command_line import parse
from sd_lora.config.rows import PRESETS
from sd_lora.config.schema import OPTIONS, TrainConfig

GIVEN = {"pretrained_model_name_or_path": "base", "train_data_dir": "images"}


def test_the_files_are_the_presets() -> None:
    """Each file of the folder is a choice of --preset, and each line of its options has a value
    that the rows accept; the options that wait for the family have no other default before."""
    folder = Path(presets.__file__).parent
    assert {path.stem for path in folder.glob("*.toml")} == set(PRESETS)
    for name in PRESETS:
        table = tomllib.loads((folder / f"{name}.toml").read_text(encoding="utf-8"))
        assert set(table) == {"title", "options", "sd", "sdxl", "length"}
        for family in ("sd1", "sdxl"):
            of_family = presets.preset(name).of_family(family)
            assert all(OPTIONS[key].default is None for key in of_family)
            values = table["options"] | of_family
            run = (
                TrainConfig(preset=name, score_features="f", **GIVEN).resolve(family, 512).as_dict()
            )
            assert {key: run[key] for key in values} == values


def test_flags_go_before_a_file_and_a_file_before_the_preset(tmp_path: Path) -> None:
    """Defaults < preset < file < flags; a preset's option without effect beside them is left out,
    and not an error."""
    file = tmp_path / "my.toml"
    file.write_text('preset = "subject"\nrank = 3\nlearning_rate = 1e-3\n', encoding="utf-8")
    words = ["--config", str(file), "--pretrained_model_name_or_path", "b"]
    words += ["--train_data_dir", "i", "--learning_rate", "0.5"]
    run = parse(words).resolve("sd1", 512)
    assert (run.rank, run.lora_alpha, run.learning_rate) == (3, 16.0, 0.5)
    assert run.text_encoder_lr == 5e-5
    bare = parse([*words, "--no-train_text_encoder"]).resolve("sd1", 512)
    assert (bare.train_text_encoder, bare.text_encoder_lr) == (False, None)
    full = TrainConfig(preset="style", method="full", **GIVEN)
    assert full.lora_alpha is None


@pytest.mark.parametrize(
    ("images", "steps"), [(1, 400), (8, 400), (12, 600), (40, 1500), (5000, 2500)]
)
def test_lengths_are_uses_of_images_within_bounds(images: int, steps: int) -> None:
    """Steps of 2: 100 uses of each image, from 800 to 3000 images seen, and each image once."""
    assert presets.Length(100, 800, 3000).num_steps(images, 2) == steps


def test_presets_are_listed_with_their_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    """`sd-lora presets` names each; with a name, the file with a reason at each option."""
    assert main(["presets"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in PRESETS)
    for name in PRESETS:
        assert main(["presets", name]) == 0
        options = capsys.readouterr().out.partition("[options]")[2].partition("[sd]")[0]
        assert all("#" in line for line in options.strip().splitlines())
    assert main(["presets", "subjekt"]) == 2
    assert "preset is one of" in capsys.readouterr().err
