"""Files of embeddings: what diffusers makes of them is what was trained."""

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sd_lora.errors import RunError
from sd_lora.formats.embeddings import how_to_load, verify_embeddings, write_embeddings
from sd_lora.models.new_tokens import Concept, NewTokens
from tests.tiny import build_pipeline

CONCEPTS = {
    "one": [Concept("<monster>")],
    "several vectors": [Concept("<monster>", 4, "toy")],
    "several concepts": [Concept("<my-style>", 12), Concept("<monster>", 2), Concept("sks-toy")],
}
PROMPTS = ["a photo of <monster>", "<monster>, sks-toy in <my-style>", "none of them"]
PARTS = {
    "sd1": ["text_encoder"],
    "sd2": ["text_encoder"],
    "sdxl": ["text_encoder", "text_encoder_2"],
    "refiner": ["text_encoder_2"],
}


def published(family: str) -> Any:
    """A pipeline whose text encoders find the end of a prompt as the published ones do."""
    pipeline = build_pipeline("sdxl" if family == "refiner" else family)
    if family == "refiner":
        pipeline.register_modules(text_encoder=None, tokenizer=None)
    for part in PARTS[family]:
        encoder = getattr(pipeline, part)
        encoder.config.eos_token_id = getattr(encoder, "text_model", encoder).eos_token_id = 2
    return pipeline


def train(family: str, *concepts: Concept) -> NewTokens:
    """Words whose embeddings are far from where they started."""
    pipeline = published(family)
    encoders = {part: getattr(pipeline, part) for part in PARTS[family]}
    tokenizers = {p: getattr(pipeline, p.replace("text_encoder", "tokenizer")) for p in encoders}
    tokens = NewTokens.add(concepts, tokenizers, encoders, seed=5)
    with torch.no_grad():
        for parameter in tokens.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return tokens


def conditioning(tokens: NewTokens, prompt: str) -> tuple[Tensor, Tensor | None]:
    """What training would feed the UNet: our tokenizers and encoders, and `expand`."""
    states, pooled = [], None
    for part, encoder in tokens.text_encoders.items():
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        ids = tokens.tokenizers[part](tokens.expand(prompt), **options).input_ids
        found = encoder(ids, output_hidden_states=True)
        two = "text_encoder_2" in tokens.text_encoders
        states.append(found.hidden_states[-2] if two else found.last_hidden_state)
        pooled = found.text_embeds if part == "text_encoder_2" else None
    return torch.cat(states, -1), pooled


@torch.no_grad()
@pytest.mark.parametrize("concepts", CONCEPTS.values(), ids=list(CONCEPTS))
@pytest.mark.parametrize("family", list(PARTS))
def test_prompts_mean_what_was_trained(
    family: str, concepts: list[Concept], tmp_path: Path
) -> None:
    """A user types the lines of `how_to_load` for each file, in another order than that of
    training, and diffusers' own conditioning of raw prompts is that of training, pooled text
    included, from models that pool as the published ones do."""
    tokens = train(family, *concepts)
    paths = write_embeddings(tokens, tmp_path, "run", {})
    pipe = published(family)
    for path, concept in reversed(list(zip(paths, concepts, strict=True))):
        exec(how_to_load(path, concept.word, PARTS[family]), {"pipe": pipe})
    for prompt in PROMPTS:
        want, pooled = conditioning(tokens, prompt)
        found = pipe.encode_prompt(prompt, device="cpu", num_images_per_prompt=1,
                                   do_classifier_free_guidance=False)  # fmt: skip
        torch.testing.assert_close(found[0], want, rtol=0, atol=1e-6)
        if pooled is not None:
            torch.testing.assert_close(found[2], pooled, rtol=0, atol=1e-6)
    total = sum(c.num_vectors for c in concepts) * len(PARTS[family])
    assert verify_embeddings(paths, tokens) == total


@torch.no_grad()
def test_the_remedy_is_needed(tmp_path: Path) -> None:
    """Without the last line of `how_to_load`, diffusers' pooled text is another; the day this
    fails, the line and what is said of it can go."""
    concept = Concept("<monster>")
    tokens = train("sdxl", concept)
    (path,) = write_embeddings(tokens, tmp_path, "run", {})
    pipe = published("sdxl")
    *lines, remedy = how_to_load(path, concept.word, PARTS["sdxl"]).splitlines()
    _, want = conditioning(tokens, "a <monster> toy")
    assert want is not None
    for line, close in (("\n".join(lines), False), (remedy, True)):
        exec(line, {"pipe": pipe})
        found = pipe.encode_prompt("a <monster> toy", device="cpu", num_images_per_prompt=1,
                                   do_classifier_free_guidance=False)  # fmt: skip
        assert torch.allclose(found[2], want, rtol=0, atol=1e-6) == close


@pytest.mark.parametrize("family", list(PARTS))
def test_what_is_in_a_file(family: str, tmp_path: Path) -> None:
    """Keys and shapes are those by which A1111 and ComfyUI know embeddings; values are those
    trained; the header says what it is; the same words give the same bytes."""
    concept = Concept("<monster>", 3)
    tokens = train(family, concept, Concept("<toy>"))
    facts = {"modelspec.architecture": "stable-diffusion-v1/textual-inversion"}
    paths = write_embeddings(tokens, tmp_path / "new", "run", {"seed": 5}, facts)
    assert [path.name for path in paths] == ["run_monster.safetensors", "run_toy.safetensors"]
    keys = {"sdxl": ["clip_l", "clip_g"], "refiner": ["clip_g"]}.get(family, ["<monster>"])
    state = load_file(paths[0])
    assert set(state) == set(keys)
    for part, key in zip(PARTS[family], keys, strict=True):
        assert torch.equal(state[key], tokens.vectors(concept, part))
        assert state[key].dtype == torch.float32
    with safe_open(paths[0], "pt") as file:
        header = file.metadata()
    assert json.loads(header["sd_lora"]) == {"seed": 5, "word": "<monster>", "num_vectors": 3}
    assert header.items() >= facts.items()
    assert header["modelspec.title"] == "run_monster"
    again = write_embeddings(tokens, tmp_path, "run", {"seed": 5}, facts)
    assert [p.read_bytes() for p in again] == [p.read_bytes() for p in paths]


def test_names_of_files_are_safe(tmp_path: Path) -> None:
    """Whatever a word is made of, its file lies in the folder, and no two words share one."""
    words = ["<a/../../b>", "<a:b>", "<$$>", "##%", "<ü-1>"]
    paths = write_embeddings(train("sd1", *map(Concept, words)), tmp_path, "run", {})
    names = ["run_a_b", "run_a_b-2", "run_word", "run_word-2", "run_ü-1"]
    assert [path.stem for path in paths] == names
    assert sorted(tmp_path.iterdir()) == sorted(paths)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_embeddings_are_not_written(value: float, tmp_path: Path) -> None:
    """One value that is not finite, in the second word: no file at all, and the word is named."""
    tokens = train("sdxl", Concept("<monster>"), Concept("<toy>", 2))
    tokens.embeddings["text_encoder_2"].new.data[2, 7] = value
    with pytest.raises(RunError, match="text_encoder_2.<toy> are not finite"):
        write_embeddings(tokens, tmp_path / "out", "run", {})
    assert not (tmp_path / "out").exists()


def test_verifying_in_half_precision(tmp_path: Path) -> None:
    """Words for a model in float16 are compared in float32, in which they are written; the live
    model and the tokenizers that were given do not notice."""
    pipeline = build_pipeline("sdxl")
    encoders = {p: getattr(pipeline, p).half() for p in PARTS["sdxl"]}
    for encoder in encoders.values():
        encoder.config.dtype = torch.float16
    tokenizers = {"text_encoder": pipeline.tokenizer, "text_encoder_2": pipeline.tokenizer_2}
    tokens = NewTokens.add([Concept("<monster>", 2)], tokenizers, encoders, 0)
    configs = {p: copy.deepcopy(e.config.to_dict()) for p, e in encoders.items()}
    paths = write_embeddings(tokens, tmp_path, "run", {})
    assert verify_embeddings(paths, tokens) == 4
    assert {p: e.config.to_dict() for p, e in encoders.items()} == configs
    assert [len(t) for t in tokenizers.values()] == [514, 514]


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize(
    "fault", ["bit", "swapped", "rows", "width", "key", "gone", "more", "text"]
)
def test_verifying_finds_faults(family: str, fault: str, tmp_path: Path) -> None:
    """A single flipped bit, other words' files, lost rows, other widths or keys, missing or
    unreadable files: all are told."""
    concepts = [Concept("<monster>", 3), Concept("<toy>", 3)]
    tokens = train(family, *concepts)
    paths = write_embeddings(tokens, tmp_path, "run", {})
    state = load_file(paths[1])
    key = max(state)
    if fault == "bit":
        state[key].view(torch.int32)[2, 5] ^= 1
    elif fault == "swapped":
        paths = paths[::-1]
    elif fault == "rows":
        state[key] = state[key][:2].clone()
    elif fault == "width":
        state[key] = state[key][:, :-1].clone()
    elif fault == "key":
        state["other"] = state.pop(key)
    elif fault == "more":
        state[key] = torch.cat((state[key], torch.zeros(1, state[key].shape[1])))
    if fault == "gone":
        paths[1].unlink()
    elif fault == "text":
        paths[1].write_text("no tensors")
    elif fault != "swapped":
        save_file(state, paths[1])
    if fault == "swapped" and family == "sd1":
        assert verify_embeddings(paths, tokens) == 6  # each names its word: any order will do
        return
    said = {"width": "incorrect shape", "gone": "run_toy", "text": "run_toy"}.get(fault, "")
    with pytest.raises(RunError, match=f"do not load as trained(.|\n)*{said}"):
        verify_embeddings(paths, tokens)


def test_verifying_first_thing(tmp_path: Path) -> None:
    """transformers' notice at the first resize of a process is no failure."""
    tokens = train("sd1", Concept("<monster>"))
    paths = write_embeddings(tokens, tmp_path, "run", {})
    logging.Logger.warning_once.cache_clear()  # type: ignore[attr-defined]
    assert verify_embeddings(paths, tokens) == 1
