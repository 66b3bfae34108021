"""Files of new words' embeddings, one a concept, for diffusers, A1111 and ComfyUI.

One text encoder: a single key, the word. SDXL: "clip_l" and "clip_g"; its refiner, with the second
encoder alone: "clip_g". In prompts, A1111 knows them by the file's name without its ending, ComfyUI
by `embedding:` and this name, diffusers by the word (see `how_to_load`).
"""

import copy
import json
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import nn

from sd_lora.errors import RunError
from sd_lora.files import HASH_KEY, TensorFile, write_tensors
from sd_lora.formats.file_names import embedding_paths
from sd_lora.formats.metadata import OWN_KEY
from sd_lora.formats.verify import captured_complaints
from sd_lora.models.new_tokens import NewTokens

_ONE = ["text_encoder"]
_XL_KEYS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
_PAIRS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


def write_embeddings(
    tokens: NewTokens,
    folder: Path,
    name: str,
    record: Mapping[str, object],
    facts: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write `<folder>/<name>_<word>.safetensors` for each concept, in float32; returns the paths.

    record: our own, kept as JSON, with the word and its number of vectors. facts: further keys of
    the header (`modelspec.architecture`, …), as they are.

    Raises:
        RunError: embeddings that are not finite (nothing was written then), or a full disk.
    """
    for key, rows in tokens.state_dict().items():
        if not rows.isfinite().all():
            raise RunError(f"the embeddings {key} are not finite: the training diverged")
    paths = embedding_paths((concept.word for concept in tokens.concepts), folder, name)
    for path, concept in zip(paths, tokens.concepts, strict=True):
        tensors = {_XL_KEYS[c]: tokens.vectors(concept, c) for c in tokens.embeddings}
        if list(tokens.embeddings) == _ONE:
            tensors = {concept.word: tokens.vectors(concept, "text_encoder")}
        own = {**record, "word": concept.word, "num_vectors": concept.num_vectors}
        header = {"format": "pt", "modelspec.sai_model_spec": "1.0.0", "modelspec.title": path.stem}
        header |= {**(facts or {}), "sd_lora_version": version("sd_lora"), HASH_KEY: ""}
        header[OWN_KEY] = json.dumps(own, sort_keys=True)
        specs = {key: (rows.dtype, tuple(rows.shape)) for key, rows in tensors.items()}
        write_tensors(path, specs, tensors.items(), header)
    return paths


def _fresh_pipeline(tokens: NewTokens) -> DiffusionPipeline:
    """A pipeline of the given tokenizers, and of text encoders with nothing but tables."""
    parts: dict[str, Any] = dict.fromkeys(("vae", "unet", "scheduler", *_PAIRS, *_PAIRS.values()))
    for component, encoder in tokens.text_encoders.items():
        with torch.device("meta"):
            fresh = type(encoder)(copy.deepcopy(encoder.config))
        parts[component] = fresh.to_empty(device="cpu")
        table = tokens.embeddings[component].base.weight.detach().to("cpu", torch.float32)
        fresh.set_input_embeddings(nn.Embedding.from_pretrained(table.clone()))
        parts[_PAIRS[component]] = copy.deepcopy(tokens.given_tokenizers[component])
    if "text_encoder_2" in tokens.text_encoders:
        return StableDiffusionXLPipeline(**parts, add_watermarker=False)
    one = {name: part for name, part in parts.items() if not name.endswith("_2")}
    one |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(**one)


def verify_embeddings(paths: Sequence[Path], tokens: NewTokens) -> int:
    """Load files by diffusers' `load_textual_inversion` into fresh tokenizers and text encoders.

    paths: as returned by `write_embeddings` for these tokens.

    Returns the number of embeddings compared, bit for bit; the base's own are compared as well.

    Raises:
        RunError: a loader's complaint, a wrong row, or a word read otherwise than trained.
    """
    pipeline, wrong, count = _fresh_pipeline(tokens), [], 0
    for component, embedding in tokens.embeddings.items():
        encoder, tokenizer = (getattr(pipeline, p) for p in (component, _PAIRS[component]))
        first, before = embedding.first, encoder.get_input_embeddings().weight
        words: list[str] | None = None
        with captured_complaints() as complaints:
            try:
                files: list[Any] = [str(path) for path in paths]
                if list(tokens.embeddings) != _ONE:
                    words = [concept.word for concept in tokens.concepts]
                    files = [TensorFile(path)[_XL_KEYS[component]] for path in paths]
                # all at once, for the table is resized each time, which takes seconds
                parts = {"tokenizer": tokenizer, "text_encoder": encoder}
                pipeline.load_textual_inversion(files, token=words, **parts)
            except (RuntimeError, ValueError, LookupError, TypeError, OSError) as error:
                complaints.append(" ".join(str(error).split()))
        # that line is about what the new rows hold before they are set
        wrong += [line for line in complaints if "mean_resizing" not in line]
        table = encoder.get_input_embeddings().weight
        if not torch.equal(table[:first], before[:first]):
            wrong.append(f"the embeddings that the {component} had were changed")
        for concept in tokens.concepts:
            ids = tokenizer.convert_tokens_to_ids(list(concept.names))
            if not torch.equal(table[ids], tokens.vectors(concept, component).cpu()):
                wrong.append(f"{component} {concept.word}: the vectors are not those trained")
            prompt = f"a {concept.word}, b"
            trained = tokens.tokenizers[component].tokenize(tokens.expand(prompt))
            if tokenizer.tokenize(pipeline.maybe_convert_prompt(prompt, tokenizer)) != trained:
                wrong.append(f"{component} {concept.word}: prompts are not read as in training")
            count += concept.num_vectors
    if wrong:
        found = "\n  ".join(wrong[:10])
        raise RunError(f"{paths[0]} … do not load as trained; do not use them:\n  {found}")
    return count


def how_to_load(path: Path, word: str, components: Collection[str] = ("text_encoder",)) -> str:
    """Python code that loads a file into a diffusers pipeline `pipe`.

    For SDXL the last line mends the pooling of its second text encoder: where the configuration has
    `eos_token_id` = 2, as published ones do, transformers takes a prompt's largest id for its end.
    The largest id is now the new word's, and without the line images differ from training,
    silently.
    """
    if list(components) == _ONE:
        return f"pipe.load_textual_inversion({str(path.resolve())!r})  # prompts: {word!r}"
    lines = [
        "from safetensors.torch import load_file",
        f"state = load_file({str(path.resolve())!r})",
    ]
    for part in components:
        options = f"token={word!r}, text_encoder=pipe.{part}, tokenizer=pipe.{_PAIRS[part]}"
        lines.append(f"pipe.load_textual_inversion(state[{_XL_KEYS[part]!r}], {options})")
    lines.append("pipe.text_encoder_2.text_model.eos_token_id = pipe.tokenizer_2.eos_token_id")
    return "\n".join(lines)
