"""`sd-lora caption`: a real captioner, taught two words, names the images of a folder."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from sd_lora.cli import main
from sd_lora.models.captioner import PROMPT

COLOURS = ("red", "blue", "green")
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else ' ' + part['text'] }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} says{% endif %}"
)
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


@pytest.fixture(scope="module")
def chatting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA of one layer that answers "Colour" by the colour of an image, and the usual question
    by "a red thing"."""
    folder = tmp_path_factory.mktemp("models") / "llava"
    usual = [word.strip(".") for word in PROMPT.split()]
    words = ["<pad>", "<unk>", "</s>", "<image>", ".", "says", "Colour", "a", "thing"]
    words += [*COLOURS, *usual]
    table = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    table.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=table, pad_token="<pad>", unk_token="<unk>", eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer, patch_size=16, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=TEMPLATE,
    )  # fmt: skip
    small = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    small["num_hidden_layers"] = 1
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            text_config={"model_type": "llama", "vocab_size": len(words), "pad_token_id": 0,
                         "eos_token_id": 2, "bos_token_id": None, **small},
            vision_config={"model_type": "clip_vision_model", "image_size": 32, "patch_size": 16,
                           **small},
            image_token_index=3, vision_feature_layer=-1,
        )
    )  # fmt: skip
    answers = [(q, c, a) for c in COLOURS for q, a in (("Colour", c), (PROMPT, f"a {c} thing"))]
    given = processor(
        images=[Image.new("RGB", (8, 8), colour) for _, colour, _ in answers],
        text=[f"<image> {question} says {answer} </s>" for question, _, answer in answers],
        padding=True, return_tensors="pt",
    )  # fmt: skip
    ids = given["input_ids"]
    asked = (ids == words.index("says")).int().cumsum(1) == 0
    labels = ids.masked_fill(asked | (ids == words.index("says")) | (ids == 0), -100)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(80):
        loss = model(**given, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
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


def test_a_model_that_chats_is_asked(
    folder: Path, chatting: Path, captioner: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model with a chat template answers the usual question or one's own, of images in batches,
    and its answers alone are written; a model without one is asked nothing."""
    (folder / "broken.png").unlink()
    words = ["caption", str(folder), "--device", "cpu", "--overwrite", "--captioner"]
    for more, said in (([], "a {} thing"), (["--prompt", "Colour"], "{}")):
        assert main([*words, str(chatting), *more]) == 0
        texts = {int(path.stem): path.read_text() for path in folder.glob("*.txt")}
        assert texts == {n: said.format(COLOURS[n % 3]) for n in range(7)}
    assert main([*words, str(captioner), "--prompt", "Colour"]) == 2
    assert "writes captions without a prompt" in capsys.readouterr().err


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
    """No folder, no model, a model of another kind, and captions in a file that is read alone are
    errors for people, and nothing is written."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "bert"}')
    told = {"none": "is no folder", "images": "no config.json", "other": "holds no image-to-text"}
    before = sorted(folder.iterdir())
    for name, text in told.items():
        assert main(["caption", str(folder), "--captioner", str(tmp_path / name)]) == 2
        assert text in capsys.readouterr().err
    (folder / "metadata.csv").write_text("file_name,text\n0.png,x\n")
    assert main(["caption", str(folder), "--captioner", str(captioner)]) == 2
    assert "read alone" in capsys.readouterr().err
    assert main(["caption", str(folder / "no"), "--captioner", str(captioner)]) == 2
    assert sorted(path for path in folder.iterdir() if path.suffix != ".csv") == before
