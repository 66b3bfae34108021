"""Configurations in each trainer's form, after its documents: each translation is fit to train."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

import sd_lora
from sd_lora import check
from sd_lora.config.command_line import parse
from sd_lora.config.schema import TrainConfig
from sd_lora.config.translate.read import peer_of, read
from sd_lora.config.translate.text import to_toml
from sd_lora.config.translate.translation import Translation, translate
from sd_lora.data.check.places import check_places
from sd_lora.report.events import Event, StepDone
from tests.training.runs import images

CONFIGS = Path(__file__).parent / "configs"
FILES = sorted(path for path in CONFIGS.glob("*/sd*") if path.name.count("."))
"""Trainer / family-subject.end; the others there are files that they name."""

TRAINED = ("sd1-readme.sh", "sd1-documents.sh", "sd1-locon.toml", "sd1-locon.json",
           "sd1-preset.json", "sd1-lora.yaml", "sd1-dreamshaper.json")  # fmt: skip
"""One of each form, for a step."""

SMALL = {
    "resolution": ["64"], "bucket_min_side": ["32"], "bucket_max_side": ["128"],
    "bucket_step": ["32"], "train_batch_size": ["1"],
    "gradient_accumulation_steps": ["1"], "mixed_precision": ["no"], "resolutions": ["32", "64"],
}  # fmt: skip
"""Option → its value for tiny models and images, where a configuration gives one."""


def translated(path: Path) -> Translation:
    settings = read([str(path)])
    return translate(
        peer_of(settings), settings.values, settings.folder, settings.fixed, settings.assumed
    )


class Trained(Exception):
    """The end of a run after its first step: files of such runs are verified elsewhere."""


def stop_after_a_step(event: Event) -> None:
    if isinstance(event, StepDone):
        raise Trained


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images with captions of each kind: in metadata, beside them, in the names of folders."""
    folder = tmp_path_factory.mktemp("data")
    images(folder / "table", 2)
    for place in (folder / "plain", folder / "numbered" / "2_sks thing"):
        for image in images(place, 2).glob("*.png"):
            image.with_suffix(".txt").write_text("a photo of a thing, red, round")
        (place / "metadata.jsonl").unlink()
    (folder / "dataset.toml").write_text(
        "[general]\nshuffle_caption = true\ncaption_extension = '.txt'\nkeep_tokens = 1\n"
        "[[datasets]]\nresolution = 64\nbatch_size = 1\n[[datasets.subsets]]\n"
        f"image_dir = '{folder / 'plain'}'\nclass_tokens = 'sks thing'\nnum_repeats = 2\n"
    )
    return folder


def placed(found: Translation, name: str, model: Path, data: Path, out: Path) -> TrainConfig:
    """The TOML of a translation, read by `--config`, with paths of this machine and small sizes."""
    toml, values = to_toml(found, name), found.values
    for table in values.get("sources") or ():
        place = data / ("numbered" if table.get("layout") == "kohya" else "plain")
        toml = toml.replace(f'path = "{table["path"]}"', f'path = "{place}"')
    places = {"train_data_dir": data / "numbered", "instance_data_dir": data / "plain",
              "dataset_name": data / "table", "dataset_config": data / "dataset.toml"}  # fmt: skip
    flags = {"pretrained_model_name_or_path": [model], "output_dir": [out / "out"]}
    flags |= {option: [place] for option, place in places.items() if option in values}
    flags |= {option: value for option, value in SMALL.items() if option in values}
    words = [word for option, value in flags.items() for word in (f"--{option}", *map(str, value))]
    # trackers and 8-bit optimisers are packages of extras
    words += ["--report_to", "none", "--no-use_8bit_adam", "--num_validation_images", "0"]
    words += ["--max_train_steps", "1", "--data_cache_dir", str(out / "cache")]
    for option in (
        "pretrained_vae_model_name_or_path",
        "validation_prompt",
        "sample_prompts",
        "push_to_hub",
        "hub_model_id",
    ):
        toml = re.sub(rf"^{option} = .*\n", "", toml, flags=re.MULTILINE)
    file = out / "my.toml"
    file.write_text(toml, encoding="utf-8")
    return parse(["--config", str(file), *words])


def test_there_are_five_of_each_trainer() -> None:
    """With the one of docs/translate.md: four files of each trainer, those of sd-scripts commands
    and TOML, of every family that it trains."""
    folders = [path.parent.name for path in FILES]
    assert {name: folders.count(name) for name in folders} == dict.fromkeys(folders, 4)
    assert len({*folders}) == 6
    assert {path.name for path in FILES} >= {*TRAINED}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_configuration_is_checked_and_trained(
    path: Path, data: Path, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    """Each is translated without a problem or an unknown name, its TOML is read by `--config`, and
    with paths to a tiny model of the family and to images of this machine it passes the checks of
    `sd-lora check`; one of each form trains a step."""
    found = translated(path)
    assert found.problems == []
    unknown = [line.name for line in found.lines if "is not known" in line.taken.reason]
    assert unknown == []
    kind = path.name.partition("-")[0]
    config = placed(found, path.name, tiny(kind), data, tmp_path)
    check_places(config)
    checked = check.check(config, page=False)
    assert checked.plan.num_steps == 1
    assert not [f for f in checked.findings if f.level == "left out"]
    if path.name in TRAINED:
        if config.optimizer == "adamw8bit":  # an extra
            pytest.importorskip("bitsandbytes")
        with pytest.raises(Trained):
            sd_lora.train(config, [stop_after_a_step])
