"""New words for text encoders: their embeddings are trained, those of the base never touched.

Textual inversion (Gal et al. 2022) with several vectors a word; beside a LoRA, pivotal tuning. All
is read as after diffusers' `load_textual_inversion`: a prompt means what it meant in training.
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

    word: what stands in prompts, such as "<monster>". num_vectors: how many embeddings it has; each
    takes one of a prompt's 75 places. initializer: a text whose tokens' embeddings it starts from,
    the first num_vectors of them, and from the beginning again if they are fewer. None: random,
    normal, with the mean and the standard deviation that the table has in each dimension.
    """

    word: str
    num_vectors: int = 1
    initializer: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The word's tokens, as diffusers names them: "<monster>", "<monster>_1", …"""
        return (self.word, *(f"{self.word}_{i}" for i in range(1, self.num_vectors)))


class ExtendedEmbedding(nn.Module):
    """A frozen table of embeddings and new rows behind it, for its place in a text encoder.

    base: the table, the same object; no gradient reaches it, nor a LoRA on it. new: the new rows
    (N, D), float32. first: the id of the first, less than the table's length if that is padded.
    weight: the base's. Rows come in the base's dtype. A text encoder's `state_dict` has other keys
    meanwhile: save it after `NewTokens.remove`.
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
        return self.rows.weight

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, ids: Tensor) -> Tensor:
        is_new = ids >= self.first
        with torch.no_grad():
            rows = self.base(ids.masked_fill(is_new, 0))  # (…, D)
        new = self.rows((ids - self.first).clamp(min=0))
        return torch.where(is_new.unsqueeze(-1), new.to(rows.dtype), rows)


@dataclass(frozen=True, eq=False)
class NewTokens:
    """New words in one text encoder or two, from `add` to `remove`.

    text_encoders: component → the model, extended in place. embeddings: component → what stands in
    it. tokenizers: component → an extended *copy*, since a tokenizer has no way to forget a word;
    given_tokenizers: those that were given, untouched.
    Captions must pass through `expand` once, then through `tokenizers`.
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
        """Adds words to text encoders: component ("text_encoder", "text_encoder_2") → its parts.

        A random start is a function of (seed, component, word, number of the vector) and the table.

        Pooled text is the hidden state at the end token, which transformers takes to be the largest
        id of a prompt where the configuration says `eos_token_id` = 2, as published ones do. That
        would be a new word's: until `remove` the end token is found by its own id.

        Raises:
            UsageError: words that prompts cannot tell from others, an initializer without tokens,
                an encoder or tokenizer that cannot take them. Nothing was changed then.
        """
        if not concepts or not text_encoders or tokenizers.keys() != text_encoders.keys():
            raise UsageError("new words need a concept, and text encoders with a tokenizer each")
        extended, embeddings = {}, {}
        for component, encoder in text_encoders.items():
            given, table = tokenizers[component], encoder.get_input_embeddings()
            _check_table(component, table, given)
            _check_words(concepts, given, encoder.config.max_position_embeddings - 2)
            extended[component] = _extended(given, concepts)
            starts = [_start(c, component, table, given, seed) for c in concepts]
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
        """Returns the new rows, one parameter (all words' vectors, D) a text encoder."""
        return [embedding.new for embedding in self.embeddings.values()]

    def parameters_of(self, component: str) -> list[nn.Parameter]:
        return [self.embeddings[component].new]

    def expand(self, caption: str) -> str:
        """Returns a caption with every word's tokens: "<monster>" → "<monster> <monster>_1 …".

        To be called once; diffusers' pipelines do it to their prompts by themselves. As there, a
        word in capitals ("<MONSTER>") is left as it is, and means its first vector.
        """
        tokenizer = next(iter(self.tokenizers.values()))
        added = tokenizer.added_tokens_encoder
        for token in dict.fromkeys(tokenizer.tokenize(caption)):
            if token in added:
                more = takewhile(added.__contains__, (f"{token}_{i}" for i in count(1)))
                caption = caption.replace(token, " ".join((token, *more)))
        return caption

    def vectors(self, concept: Concept, component: str) -> Tensor:
        """Returns a copy of a word's embeddings, (num_vectors, D)."""
        return self.state_dict()[f"{component}.{concept.word}"]

    def state_dict(self) -> dict[str, Tensor]:
        """Returns "component.word" → a copy of its embeddings, (num_vectors, D)."""
        return {key: rows.clone() for key, rows in self._rows().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Sets all embeddings; raises UsageError, before any change, for other words or shapes."""
        want, have = ({k: tuple(t.shape) for k, t in s.items()} for s in (self._rows(), state))
        for key in sorted(want.keys() | have.keys()):
            if want.get(key) != have.get(key):
                there, here = have.get(key, "not there"), want.get(key, "not known")
                raise UsageError(
                    f"these are not the words trained: {key!r} is {there}, here {here}"
                )
        for key, rows in self._rows().items():
            rows.copy_(state[key])

    def remove(self) -> None:
        """Puts the encoders' own tables back, the same objects. The words live on in this one."""
        while self._undo:
            self._undo.pop()()

    def _rows(self) -> dict[str, Tensor]:
        """Returns what `state_dict` does, as views without history: writing to them sets them."""
        sizes = [concept.num_vectors for concept in self.concepts]
        return {
            f"{component}.{concept.word}": rows
            for component, embedding in self.embeddings.items()
            for concept, rows in zip(
                self.concepts, embedding.new.detach().split(sizes), strict=True
            )
        }


def _check_table(component: str, table: nn.Module, tokenizer: CLIPTokenizer) -> None:
    if not isinstance(table, nn.Embedding):
        raise UsageError(f"the {component} has new words already, or a LoRA on its embeddings")
    if len(tokenizer) > table.num_embeddings:
        sizes = f"{len(tokenizer)} tokens, and its table only {table.num_embeddings}"
        raise UsageError(f"the tokenizer of the {component} has {sizes}: it is of another model")


def _check_words(concepts: Sequence[Concept], tokenizer: CLIPTokenizer, places: int) -> None:
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
            wrong = f"{tokens[0]!r} is a token already; take one that no prompt has: <my-{word}>"
        elif word in (c.word for c in concepts[:i]):
            wrong = "it is there twice"
        elif mixed:
            wrong = f"prompts cannot tell it from {mixed[0]!r}, as one is part of the other"
        else:
            continue
        raise UsageError(f"{word!r} cannot be a new word: {wrong}")


def _extended(tokenizer: CLIPTokenizer, concepts: Sequence[Concept]) -> CLIPTokenizer:
    """Returns a copy of a tokenizer that knows the words."""
    extended = copy.deepcopy(tokenizer)
    getattr(extended, "_wrap_decode_method_backend_tokenizer", lambda: None)()  # copies lose it
    names = [name for concept in concepts for name in concept.names]
    for number, name in enumerate(names, len(tokenizer)):
        extended.add_tokens(name)  # one by one, as diffusers does
        read = extended.tokenize(name)
        if read != [name] or extended.convert_tokens_to_ids(name) != number:
            wrong = (
                f"the tokenizer reads the new word {name!r} as {' '.join(read)!r}, and diffusers"
            )
            raise UsageError(f"{wrong} would not find it; small letters do: {name.lower()}")
    return extended


def _start(
    concept: Concept, component: str, table: nn.Embedding, tokenizer: CLIPTokenizer, seed: int
) -> Tensor:
    """Returns what a word's embeddings start from, (num_vectors, D) in float32."""
    known, numbers = table.weight.detach()[: len(tokenizer)], range(concept.num_vectors)
    if concept.initializer is not None:
        ids = tokenizer(concept.initializer, add_special_tokens=False).input_ids
        if not ids:
            raise UsageError(f"the initializer {concept.initializer!r} has no tokens: leave it out")
        return known[[ids[i % len(ids)] for i in numbers]].float().cpu()
    known = known.float().cpu()  # there, so that the start does not depend on the device
    generators = [generator_for(seed, "new token", component, i, concept.word) for i in numbers]
    normal = torch.stack([torch.randn(known.shape[1], generator=g) for g in generators])
    return known.mean(0) + known.std(0) * normal
