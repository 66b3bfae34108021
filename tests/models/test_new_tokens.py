"""New words: the base is never touched, and the result equals that of a resized table."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer

from sd_lora.errors import UsageError
from sd_lora.models.new_tokens import Concept, ExtendedEmbedding, NewTokens
from tests.tiny import build_pipeline

MONSTER = Concept("<monster>", 3)
TOY = Concept("<toy>", 1, "toy")
STYLE = Concept("<my-style>", 12)


def extend(pipeline: Any, *concepts: Concept, seed: int = 0) -> NewTokens:
    """New words in all text encoders of a pipeline."""
    tokenizers = {"text_encoder": pipeline.tokenizer}
    encoders = {"text_encoder": pipeline.text_encoder}
    if hasattr(pipeline, "text_encoder_2"):
        tokenizers["text_encoder_2"] = pipeline.tokenizer_2
        encoders["text_encoder_2"] = pipeline.text_encoder_2
    return NewTokens.add(concepts, tokenizers, encoders, seed)


def ids_of(tokenizer: Any, *captions: str) -> Tensor:
    """Token ids, padded to 77."""
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    return tokenizer(list(captions), **options).input_ids


def outputs(encoder: nn.Module, ids: Tensor) -> list[Tensor]:
    """Everything that a text encoder computes: the result, all hidden states, pooled text."""
    found = encoder(ids, output_hidden_states=True)
    return [found[0], found.last_hidden_state, found[1], *found.hidden_states]


def test_training_leaves_the_base_alone() -> None:
    """Steps of AdamW with weight decay over new rows and other parameters: the table is the same
    object with the same bits, without a gradient, and back in its place after `remove`."""
    pipeline = build_pipeline("sdxl")
    encoders = {"text_encoder": pipeline.text_encoder, "text_encoder_2": pipeline.text_encoder_2}
    tables = {c: e.get_input_embeddings() for c, e in encoders.items()}
    bits = {c: table.weight.detach().clone() for c, table in tables.items()}
    tokens = extend(pipeline, MONSTER, TOY)
    start = tokens.state_dict()
    others: list[nn.Parameter] = []
    for encoder in encoders.values():
        others += [p for n, p in encoder.named_parameters() if "q_proj" in n or "layer_norm" in n]
    optimizer = torch.optim.AdamW([*tokens.parameters(), *others], lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        loss = torch.zeros(())
        for component, encoder in encoders.items():
            caption = tokens.expand("a <monster> and a <toy>")
            result = outputs(encoder, ids_of(tokens.tokenizers[component], caption))
            loss = loss + sum(r.square().mean() for r in result)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for component, table in tables.items():
            assert encoders[component].get_input_embeddings().base is table
            assert table.weight.grad is None
            assert torch.equal(table.weight, bits[component])
    assert all(not (rows == start[key]).any() for key, rows in tokens.state_dict().items())
    trained = tokens.state_dict()
    for _ in range(2):  # the second time does nothing
        tokens.remove()
    for component, table in tables.items():
        assert encoders[component].get_input_embeddings() is table
        assert torch.equal(table.weight, bits[component])
        assert torch.equal(tokens.vectors(TOY, component), trained[f"{component}.<toy>"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("component", ["text_encoder", "text_encoder_2"])
def test_equals_a_resized_table(component: str, dtype: torch.dtype) -> None:
    """Outputs and gradients equal transformers' own resized table under plain autograd,
    bit for bit; new rows stay float32, all else in the base's dtype."""
    pipeline = build_pipeline("sdxl")
    pipeline.text_encoder.to(dtype)
    pipeline.text_encoder_2.to(dtype)
    encoder, first = getattr(pipeline, component), len(pipeline.tokenizer)
    resized = copy.deepcopy(encoder)
    tokens = extend(pipeline, MONSTER, STYLE, TOY)
    new = tokens.embeddings[component].new
    assert new.dtype == torch.float32
    assert encoder.dtype == dtype
    resized.resize_token_embeddings(first + len(new), mean_resizing=False)
    table = resized.get_input_embeddings().weight
    table.data[first:] = new.detach()
    captions = ("<toy>,<my-style><toy>", "a <monster>", "none")
    ids = ids_of(tokens.tokenizers[component], *map(tokens.expand, captions))
    assert ids.max() == first + 3 + 12
    for model in (encoder, resized):
        result = outputs(model, ids)
        assert {r.dtype for r in result} == {dtype}
        sum((r.float() * torch.linspace(-1, 2, r.shape[-1])).sum() for r in result).backward()
    for ours, theirs in zip(outputs(encoder, ids), outputs(resized, ids), strict=True):
        assert torch.equal(ours, theirs)
    assert table.grad is not None
    assert table.grad[:first].any()
    assert new.grad is not None
    assert new.grad.any(1).all()
    if dtype == torch.float32:
        assert torch.equal(new.grad, table.grad[first:])
    else:  # sums over tokens that come up more than once are ours in float32, theirs in bfloat16
        torch.testing.assert_close(new.grad, table.grad[first:].float(), rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("eos_token_id", [None, 2])
@pytest.mark.parametrize("component", ["text_encoder", "text_encoder_2"])
def test_other_prompts_do_not_change(component: str, eos_token_id: int | None) -> None:
    """Without new words all outputs, pooled ones included, are the base's bit for bit: before,
    while the words are there, and after; whichever way the base finds the end of a prompt."""
    pipeline = build_pipeline("sdxl")
    encoder = getattr(pipeline, component)
    pooling = getattr(encoder, "text_model", encoder)
    pooling.eos_token_id = eos_token_id or pooling.eos_token_id
    before, captions = pooling.eos_token_id, ("a monster", "", "x" * 100)
    # SDXL's second tokenizer may fill up with another token than its first
    ids = ids_of(getattr(pipeline, component.replace("text_encoder", "tokenizer")), *captions)
    want = outputs(encoder, ids)
    tokens = extend(pipeline, MONSTER)
    assert torch.equal(ids, ids_of(tokens.tokenizers[component], *captions))
    assert all(map(torch.equal, outputs(encoder, ids), want))
    tokens.remove()
    assert pooling.eos_token_id == before
    assert all(map(torch.equal, outputs(encoder, ids), want))


@pytest.mark.parametrize("eos_token_id", [None, 2])
def test_text_is_pooled_at_its_end(eos_token_id: int | None) -> None:
    """Pooled text with a new word is the projected state at the end token; the rule of the
    published configurations would take another token."""
    pipeline = build_pipeline("sdxl")
    encoder = pipeline.text_encoder_2
    encoder.text_model.eos_token_id = eos_token_id or encoder.text_model.eos_token_id
    tokens = extend(pipeline, MONSTER)
    ids = ids_of(tokens.tokenizers["text_encoder_2"], tokens.expand("a <monster>"))
    end = ids[0].tolist().index(pipeline.tokenizer_2.eos_token_id)
    assert end == 1 + 1 + 3
    found = encoder(ids)
    assert torch.equal(found.text_embeds, encoder.text_projection(found.last_hidden_state[:, end]))


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "nothing new",
        "a <monster>",
        "<monster>,<toy> and <monster>.",
        "two<monster><monster>words",
        "a <my-style> of <monster>",
        "a <MONSTER> and <Toy>",
        "only <monster>_2",
        "<monster>_1 and <monster>",
        "<monster>_7, <my-style>_11",
        "<|endoftext|> <monster>  \n <toy>",
        "<monster> " * 50,
    ],
)
def test_expand_is_diffusers_own(caption: str) -> None:
    """`expand` equals diffusers' pipelines on the same prompt."""
    pipeline = build_pipeline("sd1")
    tokens = extend(pipeline, MONSTER, STYLE, TOY)
    want = pipeline.maybe_convert_prompt(caption, tokens.tokenizers["text_encoder"])
    assert tokens.expand(caption) == want


def test_given_tokenizers_stay() -> None:
    """The given tokenizers read prompts as before; their copies decode in the same way."""
    pipeline = build_pipeline("sd1")
    given, size = pipeline.tokenizer, len(pipeline.tokenizer)
    before = given("a <monster>").input_ids
    tokens = extend(pipeline, MONSTER)
    assert tokens.given_tokenizers["text_encoder"] is given
    assert len(given) == size
    assert given("a <monster>").input_ids == before
    copied = tokens.tokenizers["text_encoder"]
    assert copied.convert_tokens_to_ids(list(MONSTER.names)) == [size, size + 1, size + 2]
    assert copied.model_max_length == given.model_max_length
    ids = given("some words, and more").input_ids
    assert copied.decode(ids) == given.decode(ids)


def test_padded_table() -> None:
    """In a table with more rows than the tokenizer has tokens, the new words' ids (the tokenizer's
    next) still mean the new rows and not the padding."""
    pipeline = build_pipeline("sd1")
    first = len(pipeline.tokenizer)
    pipeline.text_encoder.resize_token_embeddings(first + 8, mean_resizing=False)
    tokens = extend(pipeline, MONSTER)
    ids = torch.tensor([[0, first - 1, first, first + 2]])
    rows = pipeline.text_encoder.get_input_embeddings()(ids)[0]
    table = tokens.embeddings["text_encoder"].base.weight
    want = torch.stack((table[0], table[first - 1], *tokens.vectors(MONSTER, "text_encoder")[::2]))
    assert torch.equal(rows, want)
    with pytest.raises(IndexError):
        pipeline.text_encoder.get_input_embeddings()(torch.tensor([first + 3]))


def test_starts_are_functions() -> None:
    """A random start depends on seed, word and encoder, and on nothing else: not on the other
    words, their order or how many vectors follow."""

    def start(*concepts: Concept, seed: int = 0) -> dict[str, Tensor]:
        return extend(build_pipeline("sdxl"), *concepts, seed=seed).state_dict()

    one, key = start(MONSTER), "text_encoder.<monster>"
    torch.rand(3)
    assert torch.equal(one[key], start(STYLE, MONSTER)[key])
    assert torch.equal(one[key][:2], start(Concept("<monster>", 2))[key])
    assert not torch.equal(one[key], start(MONSTER, seed=1)[key])
    other = start(Concept("<thing>", 3))["text_encoder.<thing>"]
    assert not torch.equal(one[key], other)
    assert not torch.equal(one[key][0], one[key][1])
    pipeline = build_pipeline("sd1")
    twins = {"text_encoder": pipeline.text_encoder, "text_encoder_2": build_pipeline().text_encoder}
    tokens = NewTokens.add([MONSTER], dict.fromkeys(twins, pipeline.tokenizer), twins, 0)
    assert not torch.equal(*tokens.state_dict().values())


def test_random_start_is_like_the_table() -> None:
    """Mean and standard deviation of a random start are the table's, by dimension: over 75 draws
    their errors are below 5 standard errors."""
    pipeline = build_pipeline("sd1")
    table = pipeline.text_encoder.get_input_embeddings().weight
    with torch.no_grad():
        table.mul_(torch.linspace(0.1, 3, 32)).add_(torch.linspace(-1, 1, 32))
    rows = extend(pipeline, Concept("<m>", 75)).vectors(Concept("<m>", 75), "text_encoder")
    z = (rows - table.mean(0)) / table.std(0)
    assert (z.mean(0).abs() < 5 / 75**0.5).all()
    assert ((z.std(0) - 1).abs() < 5 / 150**0.5).all()
    assert not torch.allclose(z[:, :16], z[:, 16:])


def test_initializer_is_cycled() -> None:
    """An initializer's embeddings, bit for bit, over and over, or as many as there is place for."""
    pipeline = build_pipeline("sd1")
    table = pipeline.text_encoder.get_input_embeddings().weight
    ids = pipeline.tokenizer("toy", add_special_tokens=False).input_ids
    many, few = Concept("<many>", 5, "toy"), Concept("<few>", 2, "toy")
    tokens = extend(pipeline, many, few)
    assert len(ids) == 3
    assert torch.equal(tokens.vectors(many, "text_encoder"), table[[*ids, *ids[:2]]])
    assert torch.equal(tokens.vectors(few, "text_encoder"), table[ids[:2]])


@pytest.mark.parametrize(
    ("concepts", "reason"),
    [
        ([], "need a concept"),
        ([Concept("")], "empty"),
        ([Concept("a b")], "white space"),
        ([Concept("<a>\n")], "white space"),
        ([Concept("a")], "'a' is a token already"),
        ([Concept("<|endoftext|>")], "token already"),
        ([Concept("<<|endoftext|>>")], "cannot tell it from '<|endoftext|>'"),
        ([Concept("endof")], "cannot tell it from '<|endoftext|>'"),
        ([MONSTER, Concept("<monster>", 2)], "'<monster>' .* twice"),
        ([MONSTER, Concept("monster")], "cannot tell it from '<monster>'"),
        ([Concept("my<monster>"), MONSTER], "cannot tell it from 'my<monster>'"),
        ([Concept("<monster>_2"), MONSTER], "cannot tell it from '<monster>_2'"),
        ([MONSTER, Concept(">_1")], "cannot tell it from '<monster>_1'"),
        ([Concept("<Monster>")], "write it in small letters, <monster>"),
        ([Concept("<m>", 0)], "0 vectors, and a prompt holds 1 to 75"),
        ([Concept("<m>", 76)], "76 vectors, and a prompt holds 1 to 75"),
        ([TOY, Concept("<m>", 1, "")], "the initializer '' has no tokens"),
        ([Concept("<m>", 1, " \n")], "has no tokens"),
    ],
)
def test_words_that_cannot_be(concepts: list[Concept], reason: str) -> None:
    """Words that prompts cannot tell from others are refused by name, before any change."""
    pipeline = build_pipeline("sdxl")
    table = pipeline.text_encoder.get_input_embeddings()
    with pytest.raises(UsageError, match=reason.replace("|", r"\|")):
        extend(pipeline, *concepts)
    assert pipeline.text_encoder.get_input_embeddings() is table
    assert len(pipeline.tokenizer) == 514


def test_a_word_of_the_vocabulary() -> None:
    """A word that the tokenizer knows as a whole, with its mark of a word's end, is refused too:
    the base's own would be lost."""
    pipeline = build_pipeline("sd1")
    vocab = pipeline.tokenizer.get_vocab() | {"ox</w>": 514}
    pipeline.tokenizer = CLIPTokenizer(vocab=vocab, merges=[("o", "x</w>")])
    pipeline.text_encoder.resize_token_embeddings(515, mean_resizing=False)
    assert pipeline.tokenizer.tokenize("ox") == ["ox</w>"]
    with pytest.raises(UsageError, match="'ox</w>' is a token already; .* <my-ox>"):
        extend(pipeline, Concept("ox"))


def test_a_table_by_itself() -> None:
    """Ids beyond the table are the new rows; the module holds a copy of them."""
    base, rows = nn.Embedding(5, 4), torch.randn(2, 4)
    table = ExtendedEmbedding(base, rows)
    want = torch.stack((base.weight[4], rows[0], rows[1], base.weight[0]))
    assert torch.equal(table(torch.tensor([4, 5, 6, 0])), want)
    table.new.data.zero_()
    assert rows.all()


def test_models_that_cannot_be() -> None:
    """Words on words, tokenizers of other models, or none: refused before anything is changed."""
    pipeline = build_pipeline("sdxl")
    tokens = extend(pipeline, MONSTER)
    extended = pipeline.text_encoder.get_input_embeddings()
    assert isinstance(extended, ExtendedEmbedding)
    with pytest.raises(UsageError, match="the text_encoder has new words already"):
        extend(pipeline, TOY)
    assert pipeline.text_encoder.get_input_embeddings() is extended
    encoders = {"text_encoder": pipeline.text_encoder}
    tokens.remove()
    with pytest.raises(UsageError, match="517 tokens, and its table only 514"):
        NewTokens.add([TOY], tokens.tokenizers, tokens.text_encoders, 0)
    with pytest.raises(UsageError, match="a tokenizer each"):
        NewTokens.add([TOY], tokens.given_tokenizers, encoders, 0)
    with pytest.raises(UsageError, match="a tokenizer each"):
        NewTokens.add([TOY], {}, {}, 0)
    # the second encoder's fault is found before the first one is changed
    tokenizers = {
        "text_encoder": pipeline.tokenizer,
        "text_encoder_2": tokens.tokenizers["text_encoder"],
    }
    with pytest.raises(UsageError, match="text_encoder_2"):
        NewTokens.add([TOY], tokenizers, tokens.text_encoders, 0)
    assert isinstance(pipeline.text_encoder.get_input_embeddings(), nn.Embedding)


def test_state_round_trip() -> None:
    """A state goes into words of another start, into the same parameters, bit for bit; a state is
    a copy; one of other words changes nothing."""
    tokens = extend(build_pipeline("sdxl"), MONSTER, TOY)
    state = tokens.state_dict()
    assert {k: tuple(t.shape) for k, t in state.items()} == {
        "text_encoder.<monster>": (3, 32),
        "text_encoder.<toy>": (1, 32),
        "text_encoder_2.<monster>": (3, 48),
        "text_encoder_2.<toy>": (1, 48),
    }
    other = extend(build_pipeline("sdxl"), MONSTER, TOY, seed=9)
    parameters = other.parameters()
    before = other.state_dict()
    wrong = [
        {k: t for k, t in state.items() if k != "text_encoder.<toy>"},
        state | {"text_encoder.<x>": torch.zeros(1, 32)},
        state | {"text_encoder_2.<toy>": torch.zeros(1, 32)},
        state | {"text_encoder.<monster>": torch.zeros(2, 32)},
        {},
    ]
    for misfit in wrong:
        with pytest.raises(UsageError, match="not the words of this run"):
            other.load_state_dict(misfit)
    assert all(torch.equal(before[k], t) for k, t in other.state_dict().items())
    other.load_state_dict(state)
    assert all(a is b for a, b in zip(parameters, other.parameters(), strict=True))
    assert all(map(torch.equal, parameters, tokens.parameters()))
    assert all(p.requires_grad and p.is_leaf for p in parameters)
    state["text_encoder.<toy>"].zero_()
    assert tokens.vectors(TOY, "text_encoder").any()
