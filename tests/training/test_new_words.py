"""Pivotal tuning: new words trained beside the LoRA, through whole runs."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file

import sd_lora
from sd_lora.cli import main
from sd_lora.models.load import load_parts
from sd_lora.training import loop
from sd_lora.training.setup import Run, prepare
from sd_lora.training.state_files import read_state
from tests.training.runs import dreambooth, images

Folder = Callable[[str], Path]
WORDS = {
    "instance_prompt": "a photo of a <dog> on <grass>",
    "token_abstraction": "<dog>, <grass>",
    "num_new_tokens_per_abstraction": 2,
    "embedding_lr": 1e-2,
}
OFF = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images(tmp_path_factory.mktemp("data"), count=4)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
@pytest.mark.parametrize("with_lora", [False, True], ids=["words alone", "and LoRA"])
def test_words_and_lora_give_the_trained_model(
    kind: str, with_lora: bool, tiny: Folder, data: Path, tmp_path: Path
) -> None:
    """A run with two new words of two vectors each, with and without a LoRA in the text encoders:
    diffusers' pipeline with the LoRA file and the words' files reads the prompt to the hidden
    states and pooled text that the trained model had; the base's embeddings are untouched; the
    words moved."""
    seen: dict[str, object] = {}
    export = loop.export

    def spy(run: Run, *where: object) -> list:
        with torch.no_grad():
            seen["text"] = run.text.caption_encoder.encode(
                run.text.encoders, [WORDS["instance_prompt"]]
            )
        fresh = prepare(config.replace(output_dir=str(tmp_path / "fresh")))
        seen["start"] = fresh.text.tokens.state_dict()
        seen["end"] = run.text.tokens.state_dict()
        seen["tables"] = [e.base.weight.clone() for e in run.text.tokens.embeddings.values()]
        return export(run, *where)

    changes = WORDS | {"train_text_encoder": with_lora, "max_train_steps": 8}
    config = dreambooth(tiny(kind), data, tmp_path / "out", **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "export", spy)
        result = sd_lora.train(config)
    assert result.replayed < result.first_losses
    assert [path.name for path in result.words] == [
        "out_dog.safetensors", "out_grass.safetensors",
    ]  # fmt: skip
    assert all((seen["start"][k] - seen["end"][k]).abs().max() > 1e-3 for k in seen["end"])
    bare = load_parts(str(tiny(kind)))
    for table, encoder in zip(seen["tables"], bare.text_encoders.values(), strict=True):
        assert torch.equal(table, encoder.get_input_embeddings().weight)

    cls, off = (StableDiffusionXLPipeline, {}) if kind == "sdxl" else (StableDiffusionPipeline, OFF)
    pipe = cls.from_pretrained(tiny(kind), **off)
    for path, word in zip(result.words, ("<dog>", "<grass>"), strict=True):
        if kind == "sd1":
            pipe.load_textual_inversion(path)
            continue
        state = load_file(path)
        for key, end in (("clip_l", ""), ("clip_g", "_2")):
            options = {
                name: getattr(pipe, f"{name}{end}") for name in ("text_encoder", "tokenizer")
            }
            pipe.load_textual_inversion(state[key], token=word, **options)
    pipe.load_lora_weights(result.files[0].path)
    prompt = WORDS["instance_prompt"]
    (embedding,) = seen["text"]
    if kind == "sd1":
        hidden, _ = pipe.encode_prompt(prompt, "cpu", 1, False)
    else:
        hidden, _, pooled, _ = pipe.encode_prompt(
            prompt, do_classifier_free_guidance=False, device="cpu"
        )
        torch.testing.assert_close(pooled[0], embedding.pooled, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden[0], embedding.hidden, rtol=1e-5, atol=1e-5)


def test_words_alone_leave_the_encoders_alone(tiny: Folder, data: Path, tmp_path: Path) -> None:
    """Without train_text_encoder the text encoders get no LoRA, and the optimiser has the UNet's
    LoRA and the new rows alone, which do not decay."""
    run = prepare(dreambooth(tiny("sdxl"), data, tmp_path, **WORDS, adam_weight_decay=0.3))
    assert list(run.models) == ["unet"]
    rows = {id(p) for p in run.text.tokens.parameters()}
    groups = {id(p): g for g in run.optimizer.param_groups for p in g["params"]}
    assert groups.keys() == {id(p) for p in run.parameters}
    assert {(groups[i]["lr"], groups[i]["weight_decay"]) for i in rows} == {(1e-2, 0.0)}
    trained = {id(p) for m in run.parts.models.values() for p in m.parameters() if p.requires_grad}
    assert trained == groups.keys()


@pytest.mark.parametrize("stop", [None, 3])
def test_words_resume_exactly_and_stop(
    stop: int | None, tiny: Folder, data: Path, tmp_path: Path
) -> None:
    """Six steps are, to the last bit, those of a finished run of two that is given four more, and
    of a resumption after four; after the stop step the words do not change and the rest does.
    `sd-lora export` writes the words of a checkpoint."""
    options = WORDS | {
        "train_text_encoder": True, "checkpointing_steps": 2, "embedding_stop_step": stop,
        "max_train_steps": 6,
    }  # fmt: skip
    whole = tmp_path / "whole"
    sd_lora.train(dreambooth(tiny("sd1"), data, whole, **options))
    ends = {}
    shutil.copytree(whole, tmp_path / "cut4")
    shutil.rmtree(tmp_path / "cut4" / "checkpoint-6")
    (tmp_path / "cut4" / "whole_dog.safetensors").unlink()
    planned = options | {"max_train_steps": 2}
    sd_lora.train(dreambooth(tiny("sd1"), data, tmp_path / "cut2", **planned))
    for name in ("whole", "cut2", "cut4"):
        folder = tmp_path / name
        if name != "whole":
            more = {"resume_from_checkpoint": "latest"}
            sd_lora.train(dreambooth(tiny("sd1"), data, folder, **options, **more))
        words = load_file(folder / f"{name}_dog.safetensors")["<dog>"]
        ends[name] = (words, trained_of(folder, 6))
    for words, factors in ends.values():
        assert torch.equal(words, ends["whole"][0])
        assert all(torch.equal(factors[k], ends["whole"][1][k]) for k in factors)
    saved, word = tmp_path / "whole" / "checkpoint-6", "whole_dog.safetensors"
    assert main(["export", str(saved), "--out", str(tmp_path / "out")]) == 0
    exported = load_file(tmp_path / "out" / word)["<dog>"]
    assert torch.equal(exported, ends["whole"][0])
    at4, at6 = (words_of(tmp_path / "whole", step) for step in (4, 6))
    assert torch.equal(at4, at6) == (stop is not None)


def trained_of(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / f"checkpoint-{step}" / "adapter.safetensors")


def words_of(folder: Path, step: int) -> torch.Tensor:
    return read_state(folder / f"checkpoint-{step}")["tokens"]["text_encoder.<dog>"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_abstraction": "<cat>"}, "'<cat>' is in none of the captions"),
        ({"token_abstraction": "<dog>, <dog>"}, "'<dog>' cannot be a new word: it is given twice"),
        ({"token_abstraction": "photo", "initializer_token": " "}, "has no tokens"),
    ],
)
def test_words_that_cannot_be(
    changes: dict, message: str, tiny: Folder, data: Path, tmp_path: Path
) -> None:
    """Words that no caption has, that are not new or have no start are refused before training."""
    with pytest.raises(sd_lora.UsageError, match=message):
        prepare(dreambooth(tiny("sd1"), data, tmp_path, **WORDS | changes))


def test_a_word_starts_from_an_initializer(tiny: Folder, data: Path, tmp_path: Path) -> None:
    """With initializer_token the new word's vectors are those of its letters in the base."""
    config = dreambooth(tiny("sd1"), data, tmp_path, **WORDS, initializer_token="ab")
    tokens = prepare(config).text.tokens
    ids = tokens.given_tokenizers["text_encoder"]("ab", add_special_tokens=False).input_ids
    table = tokens.embeddings["text_encoder"].base.weight
    assert torch.equal(tokens.vectors(tokens.concepts[0], "text_encoder"), table[ids])
