"""Captions to the UNet's conditions: text embeddings, pooled text and time ids."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer

from sd_lora.errors import UsageError
from sd_lora.models.families import Family
from sd_lora.transfer import sent

PIECE = 75
"""Tokens that a text encoder reads at once, between its start and end token."""

AESTHETIC_SCORE = 6.0
"""A training image's score for the refiner: diffusers' default for a good image."""

Caption = str | None
"""A caption, or None for its absence, whose prediction guidance subtracts."""


@dataclass(frozen=True)
class Embedding:
    """The embedding of one caption.

    hidden: states of the text encoders (L, D), joined along D; L = 77 a piece.
    pooled: pooled text (P,) of SDXL's second text encoder; None for SD1 and SD2.
    """

    hidden: Tensor
    pooled: Tensor | None


@dataclass(frozen=True)
class Geometry:
    """Sizes of a training image, for SDXL's UNet, in pixels; each pair is (vertical, horizontal).

    original: size of the image file.
    crop: top left corner of the crop in the resized image.
    target: size of the crop.
    """

    original: tuple[int, int]
    crop: tuple[int, int]
    target: tuple[int, int]


@dataclass(frozen=True)
class Conditioning:
    """Conditions of a batch.

    hidden: states of the text encoders (B, L, D).
    mask: (B, L), 1 for text and 0 for padding; None: all is text.
    pooled: pooled text (B, P) for SDXL; None for SD1 and SD2.
    time_ids: (B, 6) for SDXL, (B, 5) for its refiner; None for SD1 and SD2.
    """

    hidden: Tensor
    mask: Tensor | None = None
    pooled: Tensor | None = None
    time_ids: Tensor | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> "Conditioning":
        """Return a copy on a device; time ids stay float32, in which sizes are exact."""

        def moved(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
            return None if tensor is None else sent(tensor, device).to(dtype)

        return Conditioning(
            sent(self.hidden, device).to(dtype),
            moved(self.mask, dtype),
            moved(self.pooled, dtype),
            moved(self.time_ids, torch.float32),
        )

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of a UNet's forward."""
        arguments: dict[str, Any] = {"encoder_hidden_states": self.hidden}
        if self.mask is not None:
            arguments["encoder_attention_mask"] = self.mask
        if self.pooled is not None:
            arguments["added_cond_kwargs"] = {
                "text_embeds": self.pooled,
                "time_ids": self.time_ids,
            }
        return arguments


def time_ids(family: Family, geometries: Sequence[Geometry]) -> Tensor | None:
    """Return the time ids of images, float32 (B, 6), or (B, 5) for the refiner; None for SD1, SD2.

    Podell et al. 2023, "SDXL", section 2.2.
    """
    if not family.time_ids:
        return None
    rows = []
    for g in geometries:
        known = {"original_size": g.original, "crop": g.crop, "target_size": g.target}
        known["aesthetic_score"] = (AESTHETIC_SCORE,)  # type: ignore[assignment]
        rows.append([float(value) for name in family.time_ids for value in known[name]])
    return torch.tensor(rows)


@dataclass(frozen=True)
class CaptionEncoder:
    """Captions to embeddings, by a model's tokenizers and text encoders.

    family: of the model.
    tokenizers: component → tokenizer, in the order of the text encoders' joined outputs; empty:
        nothing is encoded, and no caption has a count of tokens.
    clip_skip: layers left out at the end, as in diffusers (kohya's and A1111's "clip skip 2" is 1
        here); SDXL's penultimate layer counts as 0.
    max_pieces: a longer caption is cut after so many pieces of 75 tokens. Each piece is encoded by
        itself and the states are joined, as A1111 and ComfyUI do.
    weighted: whether captions may weigh words in compel's syntax.
    zero_unconditional: whether the absence of a caption is zeros, and not an empty caption.
    expand: function of a caption, applied first; see `NewTokens.expand`.
    """

    family: Family
    tokenizers: Mapping[str, CLIPTokenizer]
    clip_skip: int = 0
    max_pieces: int = 1
    weighted: bool = False
    zero_unconditional: bool = False
    expand: Callable[[str], str] = str

    @property
    def max_tokens(self) -> int:
        """Tokens of a caption that are read, start and end tokens not counted."""
        return self.max_pieces * (self._length - 2)

    @property
    def _length(self) -> int:
        """Tokens of a piece with its start and end token: 77."""
        return min(tokenizer.model_max_length for tokenizer in self.tokenizers.values())

    def too_long(self, captions: Sequence[str]) -> dict[str, int]:
        """Return caption → number of tokens, for captions that are cut."""
        return {
            caption: n for caption, n in self.count_tokens(captions).items() if n > self.max_tokens
        }

    def count_tokens(self, captions: Sequence[str]) -> dict[str, int]:
        """Return caption → number of tokens, the largest of all tokenizers; {} without any."""
        if not self.tokenizers:
            return {}
        unique = list(dict.fromkeys(captions))
        counts = dict.fromkeys(unique, 0)
        for tokenizer in self.tokenizers.values():
            for caption, ids in zip(unique, self._token_ids(tokenizer, unique), strict=True):
                counts[caption] = max(counts[caption], len(ids))
        return counts

    def _token_ids(self, tokenizer: CLIPTokenizer, captions: Sequence[str]) -> list[list[int]]:
        """Return the ids of each caption's tokens, without start and end token, uncut."""
        texts = [self.expand(caption) for caption in captions]
        if self.weighted:
            texts = [_without_weights(text) for text in texts]
        # verbose=False: transformers would log only the first caption that is too long
        options = {"truncation": False, "add_special_tokens": False, "verbose": False}
        return tokenizer(texts, **options).input_ids if texts else []

    def pieces(self, caption: str) -> dict[str, Tensor]:
        """Return component → token ids (k, 77) of a caption's k pieces, k the same for all."""
        length, rows = self._length, {}
        for component, tokenizer in self.tokenizers.items():
            (ids,) = self._token_ids(tokenizer, [caption])
            ids = ids[: self.max_tokens]
            starts = range(0, max(1, len(ids)), length - 2)
            rows[component] = [ids[start : start + length - 2] for start in starts]
        num_pieces = max(map(len, rows.values()))
        pieces = {}
        for component, tokenizer in self.tokenizers.items():
            padded = rows[component] + [[]] * (num_pieces - len(rows[component]))
            ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
            whole = [[ends[0], *row, ends[1]] for row in padded]
            whole = [row + [tokenizer.pad_token_id] * (length - len(row)) for row in whole]
            pieces[component] = torch.tensor(whole)
        return pieces

    def encode(
        self, encoders: Mapping[str, nn.Module], captions: Sequence[Caption]
    ) -> list[Embedding]:
        """Return the captions' embeddings, each distinct caption encoded once.

        encoders: component → text encoder, perhaps wrapped for several processes.
        captions: any number; gradients flow to the encoders unless the caller forbids it.
        """
        texts = list(dict.fromkeys(c for c in captions if c is not None))
        absent = None in captions
        if absent and not (self.zero_unconditional and texts):
            # the empty caption is the value of absence, or gives the shape of its zeros
            texts = list(dict.fromkeys([*texts, ""]))
        if self.weighted:
            known = {caption: self._encode_weighted(encoders, caption) for caption in texts}
        else:
            known = dict(zip(texts, self._encode_plain(encoders, texts), strict=True))
        if not absent:
            return [known[caption] for caption in captions if caption is not None]
        zeros = self.zero_unconditional
        absence = self._zero_embedding(known[texts[-1]]) if zeros else known[""]
        return [absence if caption is None else known[caption] for caption in captions]

    def _zero_embedding(self, like: Embedding) -> Embedding:
        """Return zeros of one piece, computed as 0 · an embedding.

        So a process whose captions are all dropped has gradients too; other processes wait for
        them.
        """
        pooled = None if like.pooled is None else like.pooled * 0
        return Embedding(like.hidden[: self._length] * 0, pooled)

    def _encode_plain(
        self, encoders: Mapping[str, nn.Module], captions: list[str]
    ) -> list[Embedding]:
        """Return the embeddings of captions without weights."""
        if not captions:
            return []
        pieces = [self.pieces(caption) for caption in captions]
        hidden, pooled = [], None
        for component in self.tokenizers:
            ids = torch.cat([p[component] for p in pieces])
            states, text = self._forward(encoders[component], ids)
            hidden.append(states)
            pooled = text if component == "text_encoder_2" else pooled
        joined = torch.cat(hidden, dim=-1)
        counts = [len(p[next(iter(self.tokenizers))]) for p in pieces]
        embeddings, first = [], 0
        for count in counts:
            # pooled text of the first piece, as in A1111, ComfyUI and kohya's tools
            of_piece = pooled[first] if self.family.is_xl and pooled is not None else None
            embeddings.append(Embedding(joined[first : first + count].flatten(0, 1), of_piece))
            first += count
        return embeddings

    def _forward(self, encoder: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return hidden states (N, 77, D) of token ids (N, 77), and pooled text (N, P) if any."""
        ids = sent(ids, next(encoder.parameters()).device)
        skips = self.clip_skip > 0 or self.family.penultimate
        out = encoder(ids, output_hidden_states=skips)
        pooled = getattr(out, "text_embeds", None)
        if not skips:
            return out.last_hidden_state, pooled
        states = out.hidden_states[-(1 + self.family.penultimate + self.clip_skip)]
        if not self.family.penultimate:
            inner = getattr(encoder, "module", encoder)
            # diffusers 0.42.1 looks for text_model, which transformers 5 removed
            norm: Any = getattr(inner, "text_model", inner).final_layer_norm
            # Accelerate returns float32 from an encoder of any precision
            states = norm(states.to(norm.weight.dtype))
        return states, pooled

    def _encode_weighted(self, encoders: Mapping[str, nn.Module], caption: str) -> Embedding:
        """Return the embedding of one caption, its words weighed by compel.

        The pooled text is of the words without their weights: compel's own has the brackets and
        numbers in it.

        Raises:
            UsageError: compel's syntax beyond weights.
        """
        from compel import Compel, ReturnedEmbeddingsType, SplitLongTextMode

        kinds = ReturnedEmbeddingsType
        kind = kinds.LAST_HIDDEN_STATES_NORMALIZED
        kind = kinds.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED if self.family.penultimate else kind
        hidden = []
        plain = self._encode_plain(encoders, [caption])[0] if self.family.is_xl else None
        for component, tokenizer in self.tokenizers.items():
            compel = Compel(
                tokenizer=tokenizer,
                text_encoder=encoders[component],
                returned_embeddings_type=kind,
                truncate_long_prompts=self.max_pieces == 1,
                split_long_text_mode=SplitLongTextMode.BRUTAL,  # cuts where pieces end
            )
            hidden.append(compel(caption)[0])
        length = min(len(states) for states in hidden)
        length = min(length, self.max_pieces * self._length)
        joined = torch.cat([states[:length] for states in hidden], dim=-1)
        return Embedding(joined, plain.pooled if plain else None)

    def check_clip_skip(self, encoders: Mapping[str, nn.Module]) -> None:
        """Raise UsageError if clip_skip leaves out more layers than a text encoder can spare."""
        for component, encoder in encoders.items():
            config: Any = encoder.config
            layers = config.num_hidden_layers
            most = layers - 1 - self.family.penultimate
            if self.clip_skip > most:
                raise UsageError(
                    f"clip_skip {self.clip_skip} is more than the {component} of this model can "
                    f"skip: it has {layers} layers, so at most {most}"
                )


_A1111_WEIGHT = re.compile(r"\([^()]*:\s*[\d.]+\s*\)")


def _without_weights(text: str) -> str:
    """Return a caption without compel's weights; raise UsageError for compel's other syntax."""
    from compel import Compel
    from compel.prompt_parser import Fragment

    fragments = None
    if not _A1111_WEIGHT.search(text):
        with suppress(Exception):  # compel's parser raises errors of several kinds
            parsed = Compel.parse_prompt_string(text)
            if len(parsed.prompts) == 1 and not parsed.lora_weights:
                fragments = getattr(parsed.prompts[0], "children", None)
    if fragments is None or not all(type(part) is Fragment for part in fragments):
        raise UsageError(
            f"caption {text!r}: weighted_prompts understands weights alone, as in 'a (red)1.3 "
            "car++' (write A1111's '(red:1.3)' as '(red)1.3'), and not compel's .blend(), .and(), "
            ".swap() and withLora()"
        )
    return " ".join(part.text for part in fragments if part.text)


def encode_in_batches(
    caption_encoder: CaptionEncoder,
    encoders: Mapping[str, nn.Module],
    captions: Sequence[Caption],
    dtype: torch.dtype = torch.float32,
    size: int = 32,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[Caption, Embedding]]:
    """Yield each distinct caption with its embedding, without gradients.

    caption_encoder, encoders, captions: as in `CaptionEncoder.encode`.
    dtype, device: of the embeddings.
    size: captions encoded at once.
    """
    unique = list(dict.fromkeys(captions))
    for start in range(0, len(unique), size):
        batch = unique[start : start + size]
        with torch.no_grad():
            embeddings = caption_encoder.encode(encoders, batch)
        for caption, e in zip(batch, embeddings, strict=True):
            pooled = None if e.pooled is None else e.pooled.to(device, dtype)
            yield caption, Embedding(e.hidden.to(device, dtype), pooled)


def collate(
    embeddings: Sequence[Embedding], geometries: Sequence[Geometry], family: Family
) -> Conditioning:
    """Return the conditions of a batch; shorter captions are padded with zeros and masked."""
    lengths = [len(e.hidden) for e in embeddings]
    longest = max(lengths)
    mask = None
    hidden = [e.hidden for e in embeddings]
    if min(lengths) < longest:
        hidden = [nn.functional.pad(h, (0, 0, 0, longest - len(h))) for h in hidden]
        kept = sent(torch.tensor(lengths), hidden[0].device)[:, None]
        mask = (torch.arange(longest, device=kept.device) < kept).to(hidden[0].dtype)
    pooled = [e.pooled for e in embeddings if e.pooled is not None]
    return Conditioning(
        torch.stack(hidden), mask, torch.stack(pooled) if pooled else None,
        time_ids(family, geometries),
    )  # fmt: skip
