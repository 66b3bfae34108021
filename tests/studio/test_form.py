"""The form of a new training is the schema, and its words are the command line's."""

import dataclasses
import shlex
from pathlib import Path

import pytest
from markupsafe import escape

from sd_lora.config.command_line import parse
from sd_lora.config.config_file import read_config_file
from sd_lora.config.schema import OPTIONS
from sd_lora.errors import UsageError
from sd_lora.studio.form import FIRST, FOLDER, Request, imported, request_of, sections
from sd_lora.studio.new import TITLES
from sd_lora.studio.page import TEMPLATES, template_at

GIVEN = {"instance_prompt": "a photo of sks dog", "pretrained_model_name_or_path": "owner/model"}


def page(given: dict[str, str]) -> str:
    """The page with these fields."""
    fields = sections(given, {})
    values = {
        "given": given, "asked": Request([], None, {}), "problems": {}, "others": [],
        "sections": fields, "purposes": {}, "titles": TITLES, "models": [], "trainers": [],
        "families": [], "chosen": "",
        "said": "", "swap": False, "pages": {"/new": "New"}, "here": "/new", "version": "",
        "at_work": 0,
    }  # fmt: skip
    return template_at(TEMPLATES / "new.html.j2").render(values)


def test_every_option_has_one_field() -> None:
    """Each row of the schema is one field of the page, with its help."""
    text = page({})
    for name, option in OPTIONS.items():
        assert text.count(f' name="{name}"') == 1, name
        assert name in ("preset", FIRST[0]) or str(escape(option.help)) in text


def test_a_new_option_is_in_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that is added to the schema is a field with its choices, help, range and names."""
    row = dataclasses.replace(
        OPTIONS["fit"], name="brand_new", help="an option of tomorrow", choices=("left", "right"),
        default="left", main="", names={"kohya": "their_name"},
    )  # fmt: skip
    monkeypatch.setitem(OPTIONS, "brand_new", row)
    text = page({"brand_new": "right"})
    assert "an option of tomorrow" in text
    assert 'name="brand_new"' in text
    assert '<option value="right" selected>' in text
    assert "changed, usually left" in text
    assert "their_name" in text


def test_the_command_gives_the_same_configuration(tmp_path: Path) -> None:
    """Fields of every kind; the command, and the file, read back, give the configuration."""
    given = GIVEN | {
        FOLDER: str(tmp_path), "preset": "subject", "rank": "8", "learning_rate": "3e-4",
        "train_text_encoder": "off", "gradient_checkpointing": "on", "resolutions": "512 768",
        "rank_pattern": "'mid_block.*=4' conv_in=2", "alpha_background": "#ff0000",
        "validation_prompt": "-- a \"dog\" & 'cat'",
    }  # fmt: skip
    asked = request_of(given, tmp_path)
    assert asked.problems == {}
    words = shlex.split(asked.command)
    assert words[:3] == ["sd-lora", "train", str(tmp_path)]
    assert parse(words[2:], has_captions=lambda folder: False) == asked.config
    assert asked.config.rank_pattern == {"mid_block.*": 4, "conv_in": 2}
    assert asked.config.train_text_encoder is False
    (tmp_path / "my.toml").write_text(asked.toml)
    assert parse(["--config", str(tmp_path / "my.toml")]) == asked.config
    fields, _ = imported(str(tmp_path / "my.toml"))
    assert request_of(fields, tmp_path).config == asked.config


def test_tables_of_sources_go_through_a_file(tmp_path: Path) -> None:
    """An option that no flag can hold is in a file that the command names."""
    (tmp_path / "a").mkdir()
    given = GIVEN | {"sources": f'[[sources]]\npath = "{tmp_path / "a"}"\nrepeats = 2'}
    asked = request_of(given, tmp_path)
    assert asked.problems == {}
    assert read_config_file(asked.words[1])["sources"][0]["repeats"] == 2
    assert "sources" in request_of(GIVEN | {"sources": "repeats"}, tmp_path).problems


def test_mistakes_stand_beside_their_fields(tmp_path: Path) -> None:
    """All mistakes at once, each under its option, as the command line says them."""
    given = {FOLDER: str(tmp_path / "none"), "rank": "0", "learning_rate": "fast", "seed": "--help"}
    problems = request_of(given | {"rank_pattern": "--all=3"}, tmp_path).problems
    assert {*problems} >= {FOLDER, "rank", "learning_rate", "seed", "rank_pattern"}
    assert problems["rank"] == "rank must be at least 1, not 0"
    assert "pretrained_model_name_or_path" in problems


def test_usual_values_follow_the_purpose() -> None:
    """A field shows the preset's value, by family where they differ, and marks another one."""
    fields = {f.name: f for part in sections({"preset": "style"}, {}).values() for f in part}
    assert fields["rank"].usual == "32"
    assert fields["caption_dropout"].usual == "0.1"
    given = {"preset": "subject", "rank": "16"}
    fields = {f.name: f for part in sections(given, {}).values() for f in part}
    assert fields["text_encoder_lr"].usual == "5e-05, SDXL: 5e-06"
    assert not fields["rank"].changed


def test_other_trainers_settings_fill_the_fields() -> None:
    """A command of sd-scripts becomes fields, and every setting is answered."""
    command = (
        "accelerate launch train_network.py --pretrained_model_name_or_path m.safetensors "
        "--train_data_dir in --network_dim 12 --network_alpha 6 --no_metadata"
    )
    fields, text = imported(command)
    assert fields["rank"] == "12"
    assert fields["train_data_dir"] == "in"
    assert "no_metadata" in text
    with pytest.raises(UsageError):
        imported("nothing of the kind")
