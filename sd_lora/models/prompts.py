"""Captions → conditioning: what the UNet attends to, as the pipeline would compute it."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer


def token_ids(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    """Returns the ids of captions, (B, 77): padded, and cut at the model's length."""
    return tokenizer(
        list(captions),
        padding="max_length",
        truncation=True,
        max_length=tokenizer.model_max_length,
        return_tensors="pt",
    ).input_ids


def too_long(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> dict[str, int]:
    """Returns caption → number of tokens, for those that the model's length cuts."""
    unique = list(dict.fromkeys(captions))
    # verbose=False: transformers would log the first long one and no other
    counts = [len(ids) for ids in tokenizer(unique, truncation=False, verbose=False).input_ids]
    limit = tokenizer.model_max_length
    return {c: n for c, n in zip(unique, counts, strict=True) if n > limit}


def encode(text_encoder: CLIPTextModel, ids: Tensor) -> Tensor:
    """Returns the embeddings (B, 77, D) of token ids (B, 77): the last hidden state, normed."""
    return text_encoder(ids.to(text_encoder.device))[0]


@torch.no_grad()
def encode_captions(
    tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, captions: Sequence[str], batch: int = 32
) -> dict[str, Tensor]:
    """Returns caption → embedding (77, D) on the CPU, each distinct caption encoded once."""
    unique = list(dict.fromkeys(captions))
    table: dict[str, Tensor] = {}
    for start in range(0, len(unique), batch):
        chunk = unique[start : start + batch]
        embeddings = encode(text_encoder, token_ids(tokenizer, chunk)).cpu()
        table.update(zip(chunk, embeddings, strict=True))
    return table
