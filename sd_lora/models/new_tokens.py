"""New words for text encoders: new embeddings are trained, the base's own are never touched.

Textual inversion (Gal et al. 2022) with several vectors a word; together with a LoRA it is pivotal
tuning. Prompts are read as after diffusers' `load_textual_inversion`: a caption means the same in
training and in use.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count, takewhile
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer

from sd_lora.errors import UsageError
from sd_lora.seeds import generator_for


@dataclass(frozen=True)
class Concept:
    """A new word.

    word: as prompts write it, for example "<monster>".
    num_vectors: number of its embeddings; each takes one of a prompt's 75 places.
    initializer: a text; the word starts from the embeddings of its first num_vectors tokens,
        repeated from the beginning if they are fewer. None: a random normal start, with the mean
        and the standard deviation of the table in each dimension.
    """

    word: str
    num_vectors: int = 1
    initializer: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The word's tokens, as diffusers names them: "<monster>", "<monster>_1", …"""
        return (self.word, *(f"{self.word}_{i}" for i in range(1, self.num_vectors)))


class ExtendedEmbedding(nn.Module):
    """A frozen table of embeddings with new rows behind it, to take the table's place.

    Meanwhile the text encoder's `state_dict` has other keys: save it after `NewTokens.remove`.

    base: the table, the same object; neither the table nor a LoRA on it gets a gradient.
    new: the new rows (N, D), float32; they are looked up in the base's dtype.
    first: id of the first new row, less than the table's length if the table is padded.
    """

    def __init__(self, base: nn.Embedding, new: Tensor, first: int | None = None) -> None:
        super().__init__()
        # modules, base first: transformers takes a model's dtype from its first parameter
        self.base = base
        rows = new.detach().to(base.weight.device, torch.float32, copy=True)
        self.rows = nn.Embedding.from_pretrained(rows, freeze=False)
        self.first = base.num_embeddings if first is None else first

    @property
    def new(self) -> nn.Parameter:
        """New rows (N, D), float32."""
        return self.rows.weight

    @property
    def weight(self) -> Tensor:
        """The base table's weight."""
        return self.base.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows (…, D) of token ids (…)."""
        is_new = ids >= self.first
        with torch.no_grad():
            rows = self.base(ids.masked_fill(is_new, 0))  # (…, D)
        new = self.rows((ids - self.first).clamp(min=0))
        return torch.where(is_new.unsqueeze(-1), new.to(rows.dtype), rows)


@dataclass(frozen=True, eq=False)
class NewTokens:
    """New words in one or two text encoders, from `add` to `remove`.

    Captions must pass through `expand` once, then through `tokenizers`.

    concepts: the words.
    text_encoders: component → model, extended in place.
    embeddings: component → extended table in the model.
    tokenizers: component → extended *copy* of the tokenizer: tokenizers cannot forget words.
    given_tokenizers: component → original tokenizer, unchanged.
    """

    concepts: tuple[Concept, ...]
    text_encoders: Mapping[str, Any]
    embeddings: Mapping[str, ExtendedEmbedding]
    tokenizers: Mapping[str, CLIPTokenizer]
    given_tokenizers: Mapping[str, CLIPTokenizer]
    _undo: list[Callable[[], None]] = field(default_factory=list)

    @classmethod
    def add(
        cls,
        concepts: Sequence[Concept],
        tokenizers: Mapping[str, CLIPTokenizer],
        text_encoders: Mapping[str, Any],
        seed: int,
    ) -> "NewTokens":
        """Add words to text encoders.

        A random start is a function of (seed, component, word, number of the vector) and the table.

        Pooled text is the hidden state at the end token. Where the configuration says
        `eos_token_id` = 2, as published ones do, transformers takes the largest id of a prompt
        instead. This would be a new word's: until `remove` the end token is found by its own id.

        concepts: the words.
        tokenizers, text_encoders: component ("text_encoder", "text_encoder_2") → its object.
        seed: of random starts.

        Raises:
            UsageError: prompts cannot tell a word from another, an initializer without tokens,
                an encoder or tokenizer to which nothing can be added. No change is made then.
        """
        if not concepts or not text_encoders or tokenizers.keys() != text_encoders.keys():
            raise UsageError("new words need a concept, and text encoders with a tokenizer each")
        extended, embeddings = {}, {}
        for component, encoder in text_encoders.items():
            given, table = tokenizers[component], encoder.get_input_embeddings()
            _check_table(component, table, given)
            _check_words(concepts, given, encoder.config.max_position_embeddings - 2)
            extended[component] = _extend_tokenizer(given, concepts)
            starts = [_initial_vectors(c, component, table, given, seed) for c in concepts]
            embeddings[component] = ExtendedEmbedding(table, torch.cat(starts), len(given))
        tokens = cls(tuple(concepts), text_encoders, embeddings, extended, tokenizers)
        for component, encoder in text_encoders.items():
            tokens._undo.append(partial(encoder.set_input_embeddings, embeddings[component].base))
            encoder.set_input_embeddings(embeddings[component])
            pooling = getattr(encoder, "text_model", encoder)
            if pooling.eos_token_id == 2:
                tokens._undo.append(partial(setattr, pooling, "eos_token_id", 2))
                pooling.eos_token_id = extended[component].eos_token_id
        return tokens

    def parameters(self) -> list[nn.Parameter]:
        """Return the new rows: one parameter a text encoder, (vectors of all words, D)."""
        return [embedding.new for embedding in self.embeddings.values()]

    def expand(self, caption: str) -> str:
        """Return a caption with all tokens of its words: "<monster>" → "<monster> <monster>_1 …".

        Call once; diffusers' pipelines do the same to their prompts. As there, a word in capitals
        ("<MONSTER>") stays and means its first vector.
        """
        tokenizer = next(iter(self.tokenizers.values()))
        added = tokenizer.added_tokens_encoder
        for token in dict.fromkeys(tokenizer.tokenize(caption)):
            if token in added:
                more = takewhile(added.__contains__, (f"{token}_{i}" for i in count(1)))
                caption = caption.replace(token, " ".join((token, *more)))
        return caption

    def vectors(self, concept: Concept, component: str) -> Tensor:
        """Return a copy of a word's embeddings, (num_vectors, D)."""
        return self.state_dict()[f"{component}.{concept.word}"]

    def state_dict(self) -> dict[str, Tensor]:
        """Return "component.word" → a copy of its embeddings, (num_vectors, D)."""
        return {key: rows.clone() for key, rows in self._views().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Set all embeddings; raise UsageError, before any change, for other words or shapes."""
        want, have = ({k: tuple(t.shape) for k, t in s.items()} for s in (self._views(), state))
        for key in sorted(want.keys() | have.keys()):
            if want.get(key) != have.get(key):
                saved, here = have.get(key, "missing"), want.get(key, "unknown")
                raise UsageError(
                    f"these are not the words of this run: {key!r} is {saved} in the saved state "
                    f"and {here} here"
                )
        for key, rows in self._views().items():
            rows.copy_(state[key])

    def remove(self) -> None:
        """Put the encoders' own tables back, the same objects. This object keeps the words."""
        while self._undo:
            self._undo.pop()()

    def _views(self) -> dict[str, Tensor]:
        """Return "component.word" → a view of its embeddings, without gradients."""
        sizes = [concept.num_vectors for concept in self.concepts]
        return {
            f"{component}.{concept.word}": rows
            for component, embedding in self.embeddings.items()
            for concept, rows in zip(
                self.concepts, embedding.new.detach().split(sizes), strict=True
            )
        }


def _check_table(component: str, table: nn.Module, tokenizer: CLIPTokenizer) -> None:
    """Raise UsageError for a table with new rows already, or of another tokenizer."""
    if not isinstance(table, nn.Embedding):
        raise UsageError(f"the {component} has new words already, or a LoRA on its embeddings")
    if len(tokenizer) > table.num_embeddings:
        sizes = f"{len(tokenizer)} tokens, and its table only {table.num_embeddings}"
        raise UsageError(f"the tokenizer of the {component} has {sizes}: it is of another model")


def _check_words(concepts: Sequence[Concept], tokenizer: CLIPTokenizer, places: int) -> None:
    """Raise UsageError for an impossible word; places: number of tokens in a prompt."""
    vocabulary, added = tokenizer.get_vocab(), set(tokenizer.added_tokens_encoder)
    for i, concept in enumerate(concepts):
        word, n = concept.word, concept.num_vectors
        tokens = [t for t in (*concept.names, f"{word}</w>") if t in vocabulary]
        others = {name for c in concepts if c.word != word for name in c.names} | added
        mixed = [o for o in sorted(others) if word in o or (o in added and o in word)]
        if word.split() != [word]:
            wrong = "it must not be empty or have white space"
        elif not 1 <= n <= places:
            wrong = f"it has {n} vectors, and a prompt holds 1 to {places}"
        elif tokens:
            wrong = f"{tokens[0]!r} is a token already; take an unused one: <my-{word}>"
        elif word in (c.word for c in concepts[:i]):
            wrong = "it is given twice"
        elif mixed:
            wrong = f"prompts cannot tell it from {mixed[0]!r}, as one is part of the other"
        else:
            continue
        raise UsageError(f"{word!r} cannot be a new word: {wrong}")


def _extend_tokenizer(tokenizer: CLIPTokenizer, concepts: Sequence[Concept]) -> CLIPTokenizer:
    """Return a copy of a tokenizer, extended by the words."""
    extended = copy.deepcopy(tokenizer)
    getattr(extended, "_wrap_decode_method_backend_tokenizer", lambda: None)()  # a copy lacks it
    names = [name for concept in concepts for name in concept.names]
    for number, name in enumerate(names, len(tokenizer)):
        extended.add_tokens(name)  # one by one, as diffusers does
        read = extended.tokenize(name)
        if read != [name] or extended.convert_tokens_to_ids(name) != number:
            raise UsageError(
                f"the tokenizer reads the new word {name!r} as {' '.join(read)!r}, so diffusers "
                f"would not find it: write it in small letters, {name.lower()}"
            )
    return extended


def _initial_vectors(
    concept: Concept, component: str, table: nn.Embedding, tokenizer: CLIPTokenizer, seed: int
) -> Tensor:
    """Return a word's first embeddings, (num_vectors, D) in float32."""
    known, numbers = table.weight.detach()[: len(tokenizer)], range(concept.num_vectors)
    if concept.initializer is not None:
        ids = tokenizer(concept.initializer, add_special_tokens=False).input_ids
        if not ids:
            raise UsageError(f"the initializer {concept.initializer!r} has no tokens: leave it out")
        return known[[ids[i % len(ids)] for i in numbers]].float().cpu()
    known = known.float().cpu()  # on the CPU: the start does not depend on the device
    generators = [generator_for(seed, "new token", component, i, concept.word) for i in numbers]
    normal = torch.stack([torch.randn(known.shape[1], generator=g) for g in generators])
    return known.mean(0) + known.std(0) * normal
