"""The model card: its header says what the files are; in its lines names of files and of the hub
stay, folders of the machine go."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import sd_lora
from sd_lora.config.schema import TrainConfig
from sd_lora.formats.embeddings import how_to_load
from sd_lora.formats.python_code import loading_line
from sd_lora.training.model_card import without_place
from tests.training.runs import images, text_to_image


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


@pytest.mark.parametrize("method", ["lora", "loha", "lokr", "oft"])
def test_the_library_is_one_that_loads_the_files(
    method: str, tiny_sd1: Path, tmp_path: Path
) -> None:
    """The header names diffusers, as the library and in the tags, where a file of its format is
    there, and nowhere for LyCORIS', which it cannot load; the licence is the given one, else
    that of the family's published base."""
    data, out = images(tmp_path / "images", 1), tmp_path / "out"
    given = {"lora": {}, "loha": {"hub_license": "cc-by-4.0"}}.get(method, {})
    sd_lora.train(text_to_image(tiny_sd1, data, out, method=method, max_train_steps=1, **given))
    header = ModelCard.load(out / "README.md").data.to_dict()
    files = {path.name for path in out.glob("*.safetensors")}
    if method == "lora":
        assert "pytorch_lora_weights.safetensors" in files
        assert header["library_name"] == "diffusers"
        assert {"diffusers", "stable-diffusion-diffusers"} < {*header["tags"]}
    else:
        assert files == {"out_lycoris.safetensors"}
        assert "library_name" not in header
        assert header["tags"] == ["stable-diffusion", "text-to-image", "lora", "sd_lora"]
    assert header["license"] == given.get("hub_license", "creativeml-openrail-m")
