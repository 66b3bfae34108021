"""The captions of a run: read once, or anew each step where text encoders or new words learn."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sd_lora.adapters.inject import adapted_layers, lora_layers
from sd_lora.config.schema import TrainConfig
from sd_lora.data.batches.caption_rules import longest_form
from sd_lora.data.batches.stream import ImageSet, Stream
from sd_lora.data.cache.text_embeddings import Embeddings
from sd_lora.errors import UsageError
from sd_lora.models.caption_encoder import (
    PIECE,
    Caption,
    CaptionEncoder,
    Embedding,
    encode_in_batches,
)
from sd_lora.models.load import Base, Parts
from sd_lora.models.new_tokens import Concept, NewTokens


class FrozenEncoder(nn.Module):
    """A text encoder that is trained no more: the same outputs, without the cost of gradients."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    @torch.no_grad()
    def forward(self, *args: Any, **options: Any) -> Any:
        return self.module(*args, **options)


@dataclass
class TextConditioning:
    """What captions become.

    encoders: component → text encoder, with its updates and new words. trained: those of them that
    learn, as Accelerate wrapped them. captions: those of the run, None if there are too many to
    read them all beforehand. table: their embeddings on the CPU, None while something learns, or
    where they are read each step. stops: component → steps after which its LoRA is left as it is;
    tokens_stop: the same for new words; None: never.
    """

    caption_encoder: CaptionEncoder
    encoders: dict[str, nn.Module]
    tokens: NewTokens | None = None
    stops: dict[str, int | None] = field(default_factory=dict)
    tokens_stop: int | None = None
    trained: dict[str, nn.Module] = field(default_factory=dict)
    captions: list[Caption] | None = field(default_factory=list)
    table: Embeddings | None = None

    def set_trained(self, config: TrainConfig, prepared: Mapping[str, nn.Module]) -> None:
        """Takes what Accelerate made of the encoders that learn, and when they stop."""
        self.trained = {c: m for c, m in prepared.items() if c in self.encoders}
        for component, encoder in self.encoders.items():
            if component in prepared and adapted_layers(encoder):
                own = getattr(config, f"{component}_stop_step")
                stop = config.text_encoder_stop_step if own is None else own
                self.stops[component] = stop
        self.tokens_stop = config.embedding_stop_step

    @property
    def will_freeze(self) -> bool:
        """Whether captions are read once, from the start or from some step on."""
        return all(stop is not None for c in self.trained for stop in self._stops_of(c))

    def fill(
        self,
        device: torch.device,
        dtype: torch.dtype,
        table: Embeddings | None = None,
        missing: Sequence[Caption] | None = None,
        progress: Callable[[Sequence[Caption]], Iterable[Caption]] = iter,
    ) -> None:
        """Reads captions once, and keeps them in the dtype that the UNet is told them in; the text
        encoders leave the device afterwards. Nothing is done where there are too many captions.

        Args:
            device, dtype: where they are read, and what they become.
            table: where they are kept; in memory when None.
            missing: those that are to be read; all when None.
            progress: shows how many are read.
        """
        if self.captions is None:
            return
        table = table or Embeddings("", None)
        missing = self.captions if missing is None else missing
        if missing:
            self._bring(device)
        read = encode_in_batches(
            self.caption_encoder, self.encoders, missing, dtype, at_once(device)
        )
        for _ in progress(missing):
            table.put(*next(read))
        for encoder in self.encoders.values():
            encoder.to("cpu")
        self.table = table

    def bytes_of(self, dtype: torch.dtype) -> int:
        """Returns what the embeddings of all captions take at most."""
        configs: list[Any] = [encoder.config for encoder in self.encoders.values()]
        one = text_bytes(
            [c.to_dict() for c in configs], self.caption_encoder.max_pieces * PIECE, dtype
        )
        return one * len(self.captions or ())

    def free_encoders(self) -> None:
        """Forgets the text encoders where nothing more is read: of SDXL's, 3 GiB."""
        if self.table is not None and not self.table.may_lose:
            self.encoders.clear()

    def _bring(self, device: torch.device) -> None:
        for encoder in self.encoders.values():
            encoder.to(device).eval()

    def embeddings(
        self, captions: list[Caption], step: int, device: torch.device, dtype: torch.dtype
    ) -> list[Embedding]:
        """Returns the captions' embeddings in the step after `step` of them are done.

        Those that cannot change are read in `dtype`, on the `device`, where they are not known.
        """
        if self.trained and not self.are_frozen(step):
            encoders = {c: self._at(c, step) for c in self.encoders}
            return self.caption_encoder.encode(encoders, captions)
        known = {c: self.table.get(c) if self.table else None for c in dict.fromkeys(captions)}
        missing = [caption for caption, embedding in known.items() if embedding is None]
        if missing:  # never kept, or removed from the cache by another run
            self._bring(device)
            read = encode_in_batches(
                self.caption_encoder, self.encoders, missing, dtype, at_once(device)
            )
            known |= dict(read)
        return [e for caption in captions if (e := known[caption]) is not None]

    def _at(self, component: str, step: int) -> nn.Module:
        if component in self.trained and not self.is_frozen(component, step):
            return self.trained[component]
        return FrozenEncoder(self.encoders[component].eval())

    def are_frozen(self, step: int) -> bool:
        """Whether all that learned has stopped after so many steps."""
        return bool(self.trained) and all(self.is_frozen(c, step) for c in self.trained)

    def is_frozen(self, component: str, step: int) -> bool:
        """Whether nothing of a text encoder learns any more after so many steps."""
        return all(stop is not None and step >= stop for stop in self._stops_of(component))

    def _stops_of(self, component: str) -> list[int | None]:
        return [stop for learner, stop in self._learners() if learner == component]

    def _learners(self) -> list[tuple[str, int | None]]:
        learners = list(self.stops.items())
        if self.tokens:
            learners += [(component, self.tokens_stop) for component in self.encoders]
        return learners

    def has_stopped(self, component: str, step: int) -> bool:
        """Whether a component's LoRA is left as it is after so many steps."""
        stop = self.stops.get(component)
        return stop is not None and step >= stop

    def stopped(self, step: int) -> list[nn.Parameter]:
        """Returns the parameters that are not to change in the step after `step` are done."""
        parameters = []
        for component in self.stops:
            if self.has_stopped(component, step):
                parameters += lora_layers(self.encoders[component])
        if self.tokens and self.tokens_stop is not None and step >= self.tokens_stop:
            parameters += self.tokens.parameters()
        return parameters


def text_bytes(
    configs: Iterable[Mapping[str, Any]], max_token_length: int, dtype: torch.dtype
) -> int:
    """Returns what a caption's embedding takes at most, of text encoders' configurations."""
    width = sum(config["hidden_size"] for config in configs)
    return (PIECE + 2) * max_token_length // PIECE * width * torch.finfo(dtype).bits // 8


def at_once(device: torch.device) -> int:
    """Returns how many captions are read at once: one on a CPU, so that an embedding is
    the same bits in any company and caching cannot change a run."""
    return 1 if device.type == "cpu" else 32


MOST = 20_000
"""Distinct captions that are read before a run; where shuffling makes more, they are read in each
step, which costs 2 % of it (SD1.5 at 256², one core)."""


def run_caption_encoder(
    config: TrainConfig, parts: Parts, tokens: NewTokens | None
) -> CaptionEncoder:
    """Returns how a run reads captions, with its new words.

    Raises:
        UsageError: a validation prompt whose weights cannot be read.
    """
    caption_encoder = parts.caption_encoder(
        clip_skip=config.clip_skip,
        max_pieces=config.max_token_length // 75,
        weighted=config.weighted_prompts,
        expand=tokens.expand if tokens else str,
    )
    if config.validation_prompt:  # its syntax, if it has one, on every process
        caption_encoder.too_long([config.validation_prompt])
    return caption_encoder


def planned_caption_encoder(config: TrainConfig, base: Base) -> CaptionEncoder:
    """Returns how a run will read captions, before any weights are read: for counting tokens, where
    each vector of a new word is one."""

    def expand(text: str) -> str:
        for concept in concepts_of(config):
            text = text.replace(concept.word, " x" * concept.num_vectors + " ")
        return text

    return base.caption_encoder(
        config.tokenizer_name,
        clip_skip=config.clip_skip,
        max_pieces=config.max_token_length // PIECE,
        weighted=config.weighted_prompts,
        expand=expand,
    )


def concepts_of(config: TrainConfig) -> list[Concept]:
    """Returns the new words of a configuration."""
    words = config.token_abstraction.split(",") if config.token_abstraction else []
    return [
        Concept(word.strip(), config.num_new_tokens_per_abstraction, config.initializer_token)
        for word in words
    ]


def add_new_words(
    config: TrainConfig, parts: Parts, instances: ImageSet, seed: int
) -> NewTokens | None:
    """Adds the new words to a model's tokenizers and text encoders; None if there are none.

    Raises:
        UsageError: a word that is none, or that no caption uses.
    """
    concepts = concepts_of(config)
    if not concepts:
        return None
    rules = [(s.captions, s.source.rules) for s in instances.samples]
    captions = [form for written, rule in rules for form in longest_form(written, rule)]
    for concept in concepts:
        if not any(concept.word in caption for caption in captions):
            raise UsageError(
                f"token_abstraction {concept.word!r} is in none of the captions: nothing would "
                f"teach it. The first caption is {captions[0]!r}"
            )
    tokens = NewTokens.add(concepts, parts.tokenizers, parts.text_encoders, seed)
    parts.tokenizers = dict(tokens.tokenizers)
    return tokens


def used_captions(stream: Stream) -> list[Caption] | None:
    """Returns the captions of a run, with the absent one if some are dropped; None if shuffling
    and the like make more than are worth to be read before it."""
    samples = [sample for images in stream.sets.values() for sample in images.samples]
    if any(sample.source.rules.varies for sample in samples):
        return stream.captions(MOST)
    used: dict[Caption, None] = {}
    for sample in samples:
        used |= dict.fromkeys(longest_form(sample.captions, sample.source.rules))
        if sample.source.rules.caption_dropout:
            used[None] = None
    return list(used)
