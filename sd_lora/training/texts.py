"""The captions of a run: read once, or anew each step where text encoders or new words learn."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sd_lora.adapters.inject import adapted_layers, lora_layers
from sd_lora.data.sources import Source
from sd_lora.errors import UsageError
from sd_lora.models.load import Parts
from sd_lora.models.prompts import Caption, Embedding, Reader, in_batches
from sd_lora.models.tokens import Concept, NewTokens
from sd_lora.training.config import TrainConfig


class Still(nn.Module):
    """A text encoder that is trained no more: the same outputs, without the cost of gradients."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    @torch.no_grad()
    def forward(self, *args: Any, **options: Any) -> Any:
        return self.module(*args, **options)


@dataclass
class Texts:
    """What captions become.

    encoders: component → text encoder, with its updates and new words. trained: those of them that
    learn, as Accelerate wrapped them. captions: those of the run. table: caption → embedding on the
    CPU, None while something learns. stops: component → steps after which its LoRA is left as it
    is; tokens_stop: the same for new words; None: never.
    """

    reader: Reader
    encoders: dict[str, nn.Module]
    tokens: NewTokens | None = None
    stops: dict[str, int | None] = field(default_factory=dict)
    tokens_stop: int | None = None
    trained: dict[str, nn.Module] = field(default_factory=dict)
    captions: list[Caption] = field(default_factory=list)
    table: dict[Caption, Embedding] | None = None

    def settle(
        self, config: TrainConfig, prepared: Mapping[str, nn.Module], captions: list[Caption]
    ) -> None:
        """Takes what Accelerate made of the encoders that learn, when they stop, and the captions
        that they read."""
        self.captions = captions
        self.trained = {c: m for c, m in prepared.items() if c in self.encoders}
        for component, encoder in self.encoders.items():
            if component in prepared and adapted_layers(encoder):
                own = getattr(config, f"{component}_stop_step")
                stop = config.text_encoder_stop_step if own is None else own
                self.stops[component] = stop
        self.tokens_stop = config.embedding_stop_step

    def fill(self, device: torch.device, dtype: torch.dtype) -> None:
        """Reads each distinct caption once, and keeps it in the dtype that the UNet is told it in;
        the text encoders leave the device afterwards."""
        for encoder in self.encoders.values():
            encoder.to(device).eval()
        self.table = dict(in_batches(self.reader, self.encoders, self.captions, dtype))
        for encoder in self.encoders.values():
            encoder.to("cpu")

    def embeddings(self, captions: list[Caption], step: int) -> list[Embedding]:
        """Returns the captions' embeddings in the step after `step` of them are done."""
        if self.table is not None:
            return [self.table[caption] for caption in captions]
        encoders = {c: self._at(c, step) for c in self.encoders}
        return self.reader.encode(encoders, captions)

    def _at(self, component: str, step: int) -> nn.Module:
        if component in self.trained and not self.is_still(component, step):
            return self.trained[component]
        return Still(self.encoders[component].eval())

    def are_still(self, step: int) -> bool:
        """Whether all that learned has stopped after so many steps."""
        return bool(self.trained) and all(self.is_still(c, step) for c in self.trained)

    def is_still(self, component: str, step: int) -> bool:
        """Whether nothing of a text encoder learns any more after so many steps."""
        stops = [stop for learner, stop in self._learners() if learner == component]
        return all(stop is not None and step >= stop for stop in stops)

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


def reader_of(config: TrainConfig, parts: Parts, tokens: NewTokens | None) -> Reader:
    """Returns how a run reads captions, with its new words.

    Raises:
        UsageError: a validation prompt whose weights cannot be read.
    """
    reader = parts.reader(
        clip_skip=config.clip_skip,
        max_pieces=config.max_token_length // 75,
        weighted=config.weighted_prompts,
        expand=tokens.expand if tokens else str,
    )
    if config.validation_prompt:  # its syntax, if it has one, on every process
        reader.too_long([config.validation_prompt])
    return reader


def concepts_of(config: TrainConfig) -> list[Concept]:
    """Returns the new words of a configuration."""
    words = config.token_abstraction.split(",") if config.token_abstraction else []
    return [
        Concept(word.strip(), config.num_new_tokens_per_abstraction, config.initializer_token)
        for word in words
    ]


def add_new_words(
    config: TrainConfig, parts: Parts, sources: Mapping[str, Source], seed: int
) -> NewTokens | None:
    """Adds the new words to a model's tokenizers and text encoders; None if there are none.

    Raises:
        UsageError: a word that is none, or that no caption uses.
    """
    concepts = concepts_of(config)
    if not concepts:
        return None
    captions = [c for sample in sources["instance"].samples for c in sample.captions]
    for concept in concepts:
        if not any(concept.word in caption for caption in captions):
            raise UsageError(
                f"token_abstraction {concept.word!r} is in none of the captions: nothing would "
                f"teach it. The first caption is {captions[0]!r}"
            )
    tokens = NewTokens.add(concepts, parts.tokenizers, parts.text_encoders, seed)
    parts.tokenizers = dict(tokens.tokenizers)
    return tokens


def used_captions(config: TrainConfig, sources: Mapping[str, Source]) -> list[Caption]:
    """Returns the captions of a run, with the absent one if some are dropped."""
    captions: list[Caption] = [
        caption for source in sources.values() for s in source.samples for caption in s.captions
    ]
    return [*captions, None] if config.caption_dropout else captions
