"""The model card's lines: names of files and of the hub stay, folders of the machine go."""

from pathlib import Path

import pytest

from sd_lora.config.schema import TrainConfig
from sd_lora.formats.embeddings import how_to_load
from sd_lora.formats.python_code import loading_line
from sd_lora.training.model_card import without_place


@pytest.mark.parametrize(("repo", "place"), [("me/mine", "me/mine"), ("", ".")])
@pytest.mark.parametrize("name", ["lora", "p", "runs/lora", "."])
def test_a_folder_in_a_line_takes_no_part_of_a_name(
    name: str, repo: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line of Python and those of new words, of a relative output folder whose name is a part
    of other words in them: the folder alone is replaced, or left out."""
    monkeypatch.chdir(tmp_path)
    config = TrainConfig(
        mode="text_to_image", pretrained_model_name_or_path="me/base", train_data_dir="images",
        output_dir=name,
    )  # fmt: skip
    out = config.output_path
    lines = {
        loading_line(out / "pytorch_lora_weights.safetensors"): (
            f"pipe.load_lora_weights({place!r}, weight_name='pytorch_lora_weights.safetensors')"
        ),
        how_to_load(out / "sks.safetensors", "<sks>"): (
            "pipe.load_textual_inversion('sks.safetensors')  # prompts: '<sks>'"
        ),
        f"  {out / 'sks.safetensors'}  the word <sks>": "  sks.safetensors  the word <sks>",
        "from_pretrained('me/base')": "from_pretrained('me/base')",
    }
    assert [without_place(line, config, repo) for line in lines] == [*lines.values()]


def test_of_the_hubs_options_the_cache_alone_is_a_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder named as the revision or the variant is another thing; the cache goes."""
    for name in ("main", "fp16", "cache"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    config = TrainConfig(
        mode="text_to_image", pretrained_model_name_or_path="me/base", train_data_dir="images",
        output_dir="out", revision="main", variant="fp16", cache_dir="cache",
    )  # fmt: skip
    line = "from_pretrained('me/base', revision='main', variant='fp16', cache_dir='cache')"
    assert without_place(line, config, "") == line.replace(", cache_dir='cache'", "")
