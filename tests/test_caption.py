"""`sd-lora caption`: a real captioner, taught two words, names the images of a folder."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
)

from sd_lora.cli import main

COLOURS = ("red", "blue", "green")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "a", "thing", *COLOURS]


@pytest.fixture(scope="module")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BLIP of one layer that says the colour of an image: "a red thing"."""
    folder = tmp_path_factory.mktemp("models") / "blip"
    folder.mkdir()
    tokenizer = BertTokenizer({word: i for i, word in enumerate(WORDS)}, bos_token="[DEC]")
    small = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    small["num_hidden_layers"] = 1
    tokens = {"bos_token_id": 5, "pad_token_id": 0, "sep_token_id": 3, "eos_token_id": 3}
    torch.manual_seed(0)
    model = BlipForConditionalGeneration(
        BlipConfig(
            text_config={"vocab_size": len(WORDS), "encoder_hidden_size": 16,
                         "max_position_embeddings": 32, **tokens, **small},
            vision_config={"image_size": 32, "patch_size": 16, **small},
            projection_dim=16, image_text_hidden_size=16,
        )
    )  # fmt: skip
    images = BlipImageProcessor(size={"height": 32, "width": 32})
    pixels = images([Image.new("RGB", (8, 8), c) for c in COLOURS], return_tensors="pt")
    ids = torch.tensor([[5, *tokenizer.encode(f"a {c} thing")[1:]] for c in COLOURS])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        loss = model(**pixels, input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    BlipProcessor(images, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven images of the three colours, the first with a caption, and one that is none."""
    place = tmp_path / "images"
    place.mkdir()
    for number in range(7):
        Image.new("RGB", (40, 30), COLOURS[number % 3]).save(place / f"{number}.png")
    (place / "0.txt").write_text("mine")
    (place / "broken.png").write_text("no image")
    return place


def test_images_without_a_caption_get_their_own(
    folder: Path, captioner: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each image is named by its own colour, across batches; a caption that is there stays, unless
    it is asked for; an image that cannot be read is told, and images are as they were."""
    images = {path: path.read_bytes() for path in folder.glob("*.png")}
    words = ["caption", str(folder), "--captioner", str(captioner), "--device", "cpu"]
    assert main(words) == 0
    texts = {int(path.stem): path.read_text() for path in folder.glob("*.txt")}
    assert texts == {n: f"a {COLOURS[n % 3]} thing" for n in range(1, 7)} | {0: "mine"}
    said = capsys.readouterr().out
    assert "6 captions written" in said
    assert "broken.png" in said
    (folder / "broken.png").unlink()
    assert main(words) == 0
    assert "have captions already" in capsys.readouterr().out
    assert main([*words, "--overwrite", "--batch", "3", "--max_tokens", "2"]) == 0
    texts = {int(path.stem): path.read_text() for path in folder.glob("*.txt")}
    assert texts == {n: f"a {COLOURS[n % 3]}" for n in range(7)}
    assert all(path.read_bytes() == images[path] for path in folder.glob("*.png"))


def test_captions_go_where_they_are_kept(folder: Path, captioner: Path) -> None:
    """Where captions stand in metadata.jsonl, new ones come there, and others stay."""
    (folder / "0.txt").unlink()
    (folder / "broken.png").unlink()
    rows = [{"file_name": "0.png", "text": "mine"}, {"file_name": "1.png", "text": ""}]
    metadata = folder / "metadata.jsonl"
    metadata.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["caption", str(folder), "--captioner", str(captioner), "--device", "cpu"]) == 0
    found = {row["file_name"]: row["text"] for row in map(json.loads, metadata.open())}
    assert found == {f"{n}.png": f"a {COLOURS[n % 3]} thing" for n in range(1, 7)} | {
        "0.png": "mine"
    }
    assert not [*folder.glob("*.txt")]


def test_what_cannot_caption_is_told(
    folder: Path, captioner: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No folder, no model, a model of another kind, a chat model, and captions in a file that is
    read alone are errors for people, and nothing is written."""
    shutil.copytree(captioner, tmp_path / "chat")
    (tmp_path / "chat" / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "bert"}')
    told = {"none": "is no folder", "images": "no config.json", "other": "holds no image-to-text",
            "chat": "answers questions"}  # fmt: skip
    before = sorted(folder.iterdir())
    for name, text in told.items():
        assert main(["caption", str(folder), "--captioner", str(tmp_path / name)]) == 2
        assert text in capsys.readouterr().err
    (folder / "metadata.csv").write_text("file_name,text\n0.png,x\n")
    assert main(["caption", str(folder), "--captioner", str(captioner)]) == 2
    assert "read alone" in capsys.readouterr().err
    assert main(["caption", str(folder / "no"), "--captioner", str(captioner)]) == 2
    assert sorted(path for path in folder.iterdir() if path.suffix != ".csv") == before
