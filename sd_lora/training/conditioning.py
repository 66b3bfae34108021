"""Captions of a run → embeddings: from a table, or anew each step while text encoders learn."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sd_lora.adapters.inject import adapted_layers, lora_layers
from sd_lora.config.schema import RunConfig, TrainConfig
from sd_lora.data.batches.caption_rules import longest_form
from sd_lora.data.batches.stream import BatchItem, ImageSet, Stream
from sd_lora.data.cache.text_embeddings import Embeddings
from sd_lora.errors import UsageError
from sd_lora.models.caption_encoder import (
    PIECE,
    Caption,
    CaptionEncoder,
    Embedding,
    Geometry,
    encode_in_batches,
)
from sd_lora.models.load import Base, Parts
from sd_lora.models.new_tokens import Concept, NewTokens
from sd_lora.transfer import brought, put_aside

MAX_CAPTIONS = 20_000
"""Most distinct captions that are encoded before a run. Where shuffling makes more, each step
encodes its own, for 2 % of its time (SD1.5 at 256², one core)."""


class FrozenEncoder(nn.Module):
    """A text encoder that has stopped learning: the same outputs, without gradients."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    @torch.no_grad()
    def forward(self, *args: Any, **options: Any) -> Any:
        """Output of the module."""
        return self.module(*args, **options)


@dataclass
class LearningStops:
    """The steps after which text encoders and new words stop learning.

    encoders: component → text encoder. tokens: the new words. lora: component → number of steps
    after which its LoRA is left alone, None: never; adapted components alone. new_words: the same
    for new words.
    """

    encoders: Mapping[str, nn.Module]
    tokens: NewTokens | None = None
    lora: dict[str, int | None] = field(default_factory=dict)
    new_words: int | None = None

    @classmethod
    def of(
        cls, config: RunConfig, encoders: Mapping[str, nn.Module], tokens: NewTokens | None
    ) -> "LearningStops":
        """Stops by the configuration, for adapted text encoders."""
        lora = {}
        for component, encoder in encoders.items():
            if adapted_layers(encoder):
                lora[component] = config.stop_step_of(component)
        return cls(encoders, tokens, lora, config.embedding_stop_step)

    def _of(self, component: str) -> list[int | None]:
        """The stops of everything in a text encoder that learns."""
        stops = [stop for learner, stop in self.lora.items() if learner == component]
        return [*stops, self.new_words] if self.tokens else stops

    def has_end(self, component: str) -> bool:
        """Whether a text encoder stops learning at some step."""
        return None not in self._of(component)

    def is_frozen(self, component: str, step: int) -> bool:
        """Whether nothing in a text encoder learns after `step` steps."""
        return all(stop is not None and step >= stop for stop in self._of(component))

    def lora_has_stopped(self, component: str, step: int) -> bool:
        """Whether a component's LoRA is left alone after `step` steps."""
        stop = self.lora.get(component)
        return stop is not None and step >= stop

    def stopped_parameters(self, step: int) -> list[nn.Parameter]:
        """Parameters that must not change in the step after `step` steps."""
        parameters = []
        for component in self.lora:
            if self.lora_has_stopped(component, step):
                parameters += lora_layers(self.encoders[component])
        if self.tokens and self.new_words is not None and step >= self.new_words:
            parameters += self.tokens.parameters()
        return parameters


@dataclass
class TextConditioning:
    """Embeddings of captions: `embeddings(captions, step)`, cached or live.

    caption_encoder: captions → embeddings. encoders: component → text encoder, with its deltas and
    new words. stops: who learns, and until when. device, dtype: of embeddings in use. learning:
    component → text encoder as Accelerate wrapped it, for those that learn. captions: all captions
    of the run; None if they are too many to encode before it. table: their embeddings on the CPU;
    None while something learns, or without a cache.
    """

    caption_encoder: CaptionEncoder
    encoders: dict[str, nn.Module]
    stops: LearningStops
    device: torch.device
    dtype: torch.dtype
    learning: dict[str, nn.Module] = field(default_factory=dict)
    captions: list[Caption] | None = field(default_factory=list)
    table: Embeddings | None = None

    @property
    def tokens(self) -> NewTokens | None:
        """The new words."""
        return self.stops.tokens

    def let_learn(self, models: Mapping[str, nn.Module]) -> None:
        """Let text encoders learn: those among these models, and with new words all. models:
        component → model, as Accelerate wrapped it."""
        learning = (self.encoders if self.tokens else {}) | {**models}
        self.learning = {c: model for c, model in learning.items() if c in self.encoders}

    @property
    def will_freeze(self) -> bool:
        """Whether captions can be encoded once: from the start, or from some step on."""
        return all(self.stops.has_end(component) for component in self.learning)

    def learns(self, step: int) -> bool:
        """Whether a text encoder or new word learns in the step after `step` steps."""
        return not all(self.stops.is_frozen(component, step) for component in self.learning)

    @property
    def in_steps(self) -> dict[str, nn.Module]:
        """The text encoders, where steps need them."""
        return self.encoders if self.table is None else {}

    def without_learning(self) -> "TextConditioning":
        """The same embeddings, by the bare text encoders."""
        return dataclasses.replace(self, learning={})

    def embeddings(self, captions: list[Caption], step: int) -> list[Embedding]:
        """Embeddings of captions in the step after `step` steps, in their order."""
        if self.learns(step):
            return self.caption_encoder.encode(
                {component: self._encoder(component, step) for component in self.encoders}, captions
            )
        if self.learning and self.table is None:
            self.fill()  # nothing learns from here on: encoded once for the rest of the run
        known = {c: self.table.get(c) if self.table else None for c in dict.fromkeys(captions)}
        missing = [caption for caption, embedding in known.items() if embedding is None]
        if missing:  # never kept, or removed from the cache by another run
            known |= dict(self._encode(missing, self.device))
        return [e for caption in captions if (e := known[caption]) is not None]

    def _encoder(self, component: str, step: int) -> nn.Module:
        """A text encoder for a step: with gradients while it learns."""
        if component in self.learning and not self.stops.is_frozen(component, step):
            encoder = self.encoders[component]
            if next(encoder.parameters()).device.type != self.device.type:
                brought(encoder, self.device)  # the run went back to before it had stopped
            return self.learning[component]
        return FrozenEncoder(self.encoders[component].eval())

    def _encode(
        self, captions: Sequence[Caption], to: torch.device | str = "cpu"
    ) -> Iterable[tuple[Caption, Embedding]]:
        """Encode captions on the device. to: of the embeddings."""
        for encoder in self.encoders.values():
            brought(encoder, self.device).eval()
        batch_size = caption_batch_size(self.device)
        return encode_in_batches(
            self.caption_encoder, self.encoders, captions, self.dtype, batch_size, to
        )

    def fill(
        self,
        table: Embeddings | None = None,
        missing: Sequence[Caption] | None = None,
        progress: Callable[[Sequence[Caption]], Iterable[Caption]] = iter,
    ) -> None:
        """Encode the run's captions into a table; text encoders leave the device afterwards.

        Without effect where the captions are too many.

        table: in memory if None. missing: captions to encode, all if None. progress: shows them.
        """
        if self.captions is None:
            return
        table = table or Embeddings("", None)
        missing = self.captions if missing is None else missing
        encoded = iter(self._encode(missing) if missing else ())
        for _ in progress(missing):
            table.put(*next(encoded))
        for encoder in self.encoders.values():
            put_aside(encoder)
        self.table = table

    def num_bytes(self) -> int:
        """Most bytes that the embeddings of all captions take."""
        configs: list[Any] = [encoder.config for encoder in self.encoders.values()]
        pieces = self.caption_encoder.max_pieces
        one = embedding_bytes([c.to_dict() for c in configs], pieces, self.dtype)
        return one * len(self.captions or ())

    def free_encoders(self) -> None:
        """Drop the text encoders where the table holds everything: of SDXL's, 3 GiB."""
        if self.table is not None and not self.table.may_lose:
            self.encoders.clear()


def embedding_bytes(
    configs: Iterable[Mapping[str, Any]], max_pieces: int, dtype: torch.dtype
) -> int:
    """Most bytes of one caption's embedding.

    configs: of the text encoders. max_pieces: pieces of 75 tokens, each with a start and an end.
    """
    width = sum(config["hidden_size"] for config in configs)
    return (PIECE + 2) * max_pieces * width * dtype.itemsize


def caption_batch_size(device: torch.device) -> int:
    """Captions encoded at once: one on a CPU, where an embedding is then the same bits in any
    company, so that caching cannot change a run."""
    return 1 if device.type == "cpu" else 32


def run_caption_encoder(
    config: RunConfig, parts: Parts, tokens: NewTokens | None
) -> CaptionEncoder:
    """The caption encoder of a run, with its new words.

    Raises:
        UsageError: a validation prompt with weights that cannot be parsed.
    """
    caption_encoder = parts.caption_encoder(
        clip_skip=config.clip_skip,
        max_pieces=config.max_token_length // PIECE,
        weighted=config.weighted_prompts,
        expand=tokens.expand if tokens else str,
    )
    if config.validation_prompt:  # its syntax, if it has one, on every process
        caption_encoder.too_long([config.validation_prompt])
    return caption_encoder


def planned_caption_encoder(config: RunConfig, base: Base) -> CaptionEncoder:
    """The caption encoder of a run before any weights are loaded, for counting tokens: each vector
    of a new word is one token."""

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
    """New words of a configuration."""
    number, initializer = config.num_new_tokens_per_abstraction, config.initializer_token
    return [Concept(word, number, initializer) for word in config.new_words]


def add_new_words(
    config: RunConfig, parts: Parts, instances: ImageSet, seed: int
) -> NewTokens | None:
    """Add the new words to a model's tokenizers and text encoders; None if there are none.

    Raises:
        UsageError: a word in no caption, or a word that tokenizers refuse.
    """
    concepts = concepts_of(config)
    if not concepts:
        return None
    rules = [(s.captions, s.source.rules) for s in instances.samples]
    captions = [form for written, rule in rules for form in longest_form(written, rule)]
    for concept in concepts:
        if not any(concept.word in caption for caption in captions):
            raise UsageError(
                f"token_abstraction {concept.word!r} is in none of the captions, so nothing would "
                f"teach it. The first caption is {captions[0]!r}"
            )
    tokens = NewTokens.add(concepts, parts.tokenizers, parts.text_encoders, seed)
    parts.tokenizers = dict(tokens.tokenizers)
    return tokens


def restored_words(config: TrainConfig, base: Base, state: Mapping[str, torch.Tensor]) -> NewTokens:
    """The new words of a run's checkpoint, in freshly loaded text encoders. state: theirs.

    Raises:
        UsageError: the errors of `Base.load`, or words of another run.
    """
    parts = base.load(tokenizer_name=config.tokenizer_name)
    tokens = NewTokens.add(concepts_of(config), parts.tokenizers, parts.text_encoders, seed=0)
    tokens.load_state_dict(state)
    return tokens


def used_captions(stream: Stream) -> list[Caption] | None:
    """All captions of a run, None (no caption) among them if some are dropped.

    Returns None where shuffling and the like make more than `MAX_CAPTIONS`.
    """
    samples = [sample for images in stream.sets.values() for sample in images.samples]
    preserved = stream.preservation
    if (preserved and preserved.varies) or any(s.source.rules.varies for s in samples):
        return stream.captions(MAX_CAPTIONS)
    used: dict[Caption, None] = {}
    for sample in samples:
        captions = longest_form(sample.captions, sample.source.rules)
        used |= dict.fromkeys(captions)
        if preserved:
            rules = sample.source.rules
            used |= {p: None for c in captions for p in preserved.captions(c, rules, 0)}
        if sample.source.rules.caption_dropout:
            used[None] = None
    return list(used)


def geometry_of(item: BatchItem) -> Geometry:
    """Size, corner and target of an item's crop, for SDXL's conditions."""
    left, top = item.crop.corner_of(item.flip)
    original, target = item.crop.original[::-1], item.crop.size[::-1]
    return Geometry(original, (top, left), target)
