"""Text embeddings by content: the same bits come back, and nothing out of date."""

import copy
import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from sd_lora.data.cache.store import Store
from sd_lora.data.cache.text_embeddings import Embeddings, identity_of
from sd_lora.errors import RunError
from sd_lora.models.caption_encoder import Caption, CaptionEncoder, Embedding, encode_in_batches
from sd_lora.models.load import Parts, load_parts
from sd_lora.models.new_tokens import Concept, NewTokens

CPU = torch.device("cpu")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache", 10**9)


@pytest.fixture(scope="module")
def sdxl(tiny_sdxl: Path) -> Parts:
    return load_parts(str(tiny_sdxl))


def embedding(seed: int, width: int = 32, pieces: int = 1, pooled: bool = False) -> Embedding:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(77 * pieces, width, generator=generator)
    return Embedding(hidden, torch.randn(48, generator=generator) if pooled else None)


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors are the same bits of the same dtype and shape."""
    if a is None or b is None:
        return a is b
    views = [t.contiguous().view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*views)


def holds(table: Embeddings, caption: Caption, expected: Embedding) -> bool:
    found = table.get(caption)
    assert found is not None
    return same(found.hidden, expected.hidden) and same(found.pooled, expected.pooled)


def files(store: Store) -> list[Path]:
    return sorted(p for p in store.folder.rglob("*") if p.is_file())


CAPTIONS: list[Caption] = [
    None, "", "absent", "a photo", "a photo ", "A photo", "line\nline", "naïve 日本語 🐱",
    "nai\u0308ve", "null \0", "a file's name \udcff", "long " * 500,
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("on_disk", [True, False], ids=["disk", "memory"])
def test_the_same_bits_come_back(store: Store, dtype: torch.dtype, on_disk: bool) -> None:
    """Of every dtype, with pooled text and without, of one piece and of several; at once, and from
    the disk in another run. Absence is not the empty caption, and no two captions are one."""
    table = Embeddings("an identity", store if on_disk else None)
    expected = {}
    for i, caption in enumerate(CAPTIONS):
        e = embedding(i, pieces=1 + i % 3, pooled=i % 2 == 0)
        pooled = None if e.pooled is None else e.pooled.to(dtype)
        expected[caption] = Embedding(e.hidden.to(dtype), pooled)
        assert table.get(caption) is None
        table.put(caption, expected[caption])
    tables = [table, Embeddings("an identity", store)] if on_disk else [table]
    for table in tables:
        assert table.missing(CAPTIONS) == []
        assert all(holds(table, caption, e) for caption, e in expected.items())
    other = Embeddings("another identity", store)
    assert other.missing(CAPTIONS) == CAPTIONS
    assert all(other.get(caption) is None for caption in CAPTIONS)


def test_what_is_missing_is_named_once_in_order(store: Store) -> None:
    """With a store and without: the captions that are not known, each once, in the order given."""
    for table in (Embeddings("", store), Embeddings("", None)):
        table.put("b", embedding(0))
        table.put(None, embedding(1))
        assert table.missing(iter(["c", "b", "a", None, "c", "", "a"])) == ["c", "a", ""]
        assert table.missing([]) == []


@pytest.mark.parametrize("on_disk", [True, False], ids=["disk", "memory"])
def test_values_that_are_not_finite_are_refused(store: Store, on_disk: bool) -> None:
    """By the caption and the dtype, whether in the hidden states or the pooled text; nothing of
    them is kept."""
    table = Embeddings("", store if on_disk else None)
    good = embedding(0, pooled=True)
    assert good.pooled is not None
    for value in (float("nan"), float("inf"), -float("inf")):
        hidden, pooled = good.hidden.half(), good.pooled.half()
        hidden[70, 3] = value
        with pytest.raises(RunError, match="values for the caption 'a cat' in float16"):
            table.put("a cat", Embedding(hidden, pooled))
        pooled[-1] = value
        with pytest.raises(RunError, match="values for the absent caption in float32"):
            table.put(None, Embedding(good.hidden, pooled))
    assert table.missing(["a cat", None]) == ["a cat", None]
    assert not store.folder.exists()


def test_another_run_makes_room(store: Store) -> None:
    """An entry that is gone is missing again, and None to a step, which then reads it anew."""
    first = Embeddings("", store)
    for i, caption in enumerate(("a", "b")):
        first.put(caption, embedding(i))
    table = Embeddings("", store)
    assert table.missing(["a", "b"]) == []
    assert Store(store.folder, 0).evict({first.key("b")})[0] == 1
    assert table.missing(["a", "b"]) == ["a"]
    assert table.get("a") is None
    assert holds(table, "b", embedding(1))
    table.put("a", embedding(0))
    assert holds(Embeddings("", store), "a", embedding(0))


def test_a_broken_entry_is_missing(store: Store) -> None:
    """Of a power cut, a bad disk, or of something else under its name: read anew, not raised."""
    Embeddings("", store).put("a", embedding(0))
    (file,) = files(store)
    whole = file.read_bytes()
    for damaged in (b"", whole[:5000], whole[:5000] + bytes(len(whole) - 5000)):
        file.write_bytes(damaged)
        assert Embeddings("", store).get("a") is None
        assert Embeddings("", store).missing(["a"]) == ["a"]
    table = Embeddings("", store)
    store.put_tensors(table.key("a"), {"something": torch.zeros(1)})
    assert table.get("a") is None


def test_memory_is_bounded(store: Store) -> None:
    """With a store the embeddings last used are held, no more than told; the others are read."""
    size = embedding(0).hidden.nbytes
    table = Embeddings("", store, held=3 * size + 1)
    for i in (0, 0, 0, 0, 1, 2, 3, 4):
        table.put(str(i), embedding(i))
    assert holds(table, "2", embedding(2))  # now 1 longer in use than 3 and 4
    table.put("5", embedding(5))
    assert holds(table, "0", embedding(0))  # from the disk
    for file in files(store):
        file.unlink()
    assert [str(i) for i in range(6) if table.get(str(i)) is not None] == ["0", "2", "5"]
    for i in (0, 2, 5):
        assert holds(table, str(i), embedding(i))


def test_an_embedding_larger_than_what_is_held(store: Store) -> None:
    """It is in the store alone, and what comes after it is held as before."""
    size = embedding(0).hidden.nbytes
    table = Embeddings("", store, held=size)
    table.put("large", embedding(1, pieces=4))
    table.put("small", embedding(0))
    assert holds(table, "large", embedding(1, pieces=4))
    table.put("small", embedding(0))
    for file in files(store):
        file.unlink()
    assert table.get("large") is None
    assert holds(table, "small", embedding(0))


def test_no_embedding_holds_a_whole_batch() -> None:
    """What is kept of a batch is a copy: neither its memory nor what is done to it later."""
    batch = torch.randn(32, 77, 16)
    table = Embeddings("", None)
    table.put("a", Embedding(batch[3], batch[3, 0]))
    expected = batch[3].clone()
    batch.zero_()
    found = table.get("a")
    assert found is not None
    assert torch.equal(found.hidden, expected)
    assert found.hidden.untyped_storage().nbytes() == 77 * 16 * 4


def test_what_is_held_cannot_be_lost(store: Store) -> None:
    """Captions taken into memory outlive their entries, and others in use; of one that was gone
    already it is said that it may."""
    size = embedding(0).hidden.nbytes
    assert not Embeddings("", None).may_lose
    table = Embeddings("", store, held=size)
    for i in range(4):
        table.put(str(i), embedding(i))
    assert table.may_lose
    table.hold(["0", "1", "2", "gone"])
    assert table.may_lose
    table.hold(["0", "1", "2"])
    assert not table.may_lose
    Store(store.folder, 0).evict()
    table.put("4", embedding(4))
    assert table.missing(["0", "1", "2", "3"]) == ["3"]
    assert all(holds(table, str(i), embedding(i)) for i in (0, 1, 2, 4))
    assert table.get("3") is None


def test_a_cached_run_is_told_the_same(store: Store, sdxl: Parts) -> None:
    """What is computed, kept by a run that was stopped half way, and completed by another, is what
    one that keeps nothing computes, to the last bit."""
    caption_encoder = sdxl.caption_encoder(max_pieces=3)
    captions: list[Caption] = ["a cat", None, "", "long words " * 9, "x", "a dog, a cat"]

    def read(wanted: list[Caption]) -> list[tuple[Caption, Embedding]]:
        return list(
            encode_in_batches(caption_encoder, sdxl.text_encoders, wanted, torch.bfloat16, 1)
        )

    expected = dict(read(captions))
    assert len(expected["long words " * 9].hidden) == 2 * 77
    identity = identity_of(caption_encoder, sdxl.text_encoders, torch.bfloat16, CPU)
    for stopped_at in (2, len(captions)):
        table = Embeddings(identity, store)
        for caption, e in read(table.missing(captions[:stopped_at])):
            table.put(caption, e)
    table = Embeddings(identity, store)
    assert table.missing(captions) == []
    assert all(holds(table, caption, e) for caption, e in expected.items())


def identity(parts: Parts, **options: Any) -> str:
    caption_encoder = parts.caption_encoder(**options)
    return identity_of(caption_encoder, parts.text_encoders, torch.float32, CPU)


def test_the_same_model_has_the_same_identity(tiny_sdxl: Path, tmp_path: Path, sdxl: Parts) -> None:
    """Loaded again, from a folder of another name, with a UNet of another precision, and after it
    was used; the number of the device is no difference either."""
    known = identity(sdxl)
    assert identity(load_parts(str(tiny_sdxl))) == known
    shutil.copytree(tiny_sdxl, tmp_path / "renamed")
    again = load_parts(str(tmp_path / "renamed"), dtype=torch.bfloat16)
    assert identity(again) == known
    list(
        encode_in_batches(again.caption_encoder(), again.text_encoders, ["a", None], torch.float32)
    )
    for tokenizer in again.tokenizers.values():  # which remembers how it was called
        tokenizer(["a", "b c"], padding="max_length", truncation=True, max_length=7)
    assert identity(again) == known
    one, two = (
        identity_of(
            again.caption_encoder(), again.text_encoders, torch.float32, torch.device("cuda", i)
        )
        for i in (0, 1)
    )
    assert one == two != known


def test_new_words_taken_back_leave_the_identity(tiny_sd1: Path) -> None:
    """New words are another model; once they are removed it is the old one."""
    parts = load_parts(str(tiny_sd1))
    known = identity(parts)
    concepts = [Concept("<cat>")]
    tokens = NewTokens.add(concepts, parts.tokenizers, parts.text_encoders, 0)
    caption_encoder = dataclasses.replace(
        parts.caption_encoder(), tokenizers=tokens.tokenizers, expand=tokens.expand
    )
    extended = identity_of(caption_encoder, parts.text_encoders, torch.float32, CPU)
    with torch.no_grad():
        tokens.parameters()[0][0, 0] += 1
    trained = identity_of(caption_encoder, parts.text_encoders, torch.float32, CPU)
    assert len({known, extended, trained}) == 3
    tokens.remove()
    assert identity(parts) == known


def of_weights(component: str, name: str) -> Callable[[Parts], None]:
    def edit(parts: Parts) -> None:
        parameter = dict(parts.text_encoders[component].named_parameters())[name]
        parameter.data.view(torch.int32).view(-1)[-1] ^= 1  # the last bit of its last number

    return edit


def of_config(component: str, name: str, value: Any) -> Callable[[Parts], None]:
    def edit(parts: Parts) -> None:
        config = parts.text_encoders[component].config
        assert getattr(config, name) != value
        setattr(config, name, value)

    return edit


def of_tokenizer(component: str, name: str, value: Any) -> Callable[[Parts], None]:
    def edit(parts: Parts) -> None:
        assert getattr(parts.tokenizers[component], name) != value
        setattr(parts.tokenizers[component], name, value)

    return edit


def _new_token(parts: Parts) -> None:
    parts.tokenizers["text_encoder_2"].add_tokens("<new>")


def _other_merges(parts: Parts) -> None:
    old = parts.tokenizers["text_encoder"]
    vocab = {**old.get_vocab(), "ab": len(old)}
    kind = type(old)
    parts.tokenizers["text_encoder"] = kind(vocab=vocab, merges=[("a", "b")], model_max_length=77)


def _other_order(parts: Parts) -> None:
    parts.tokenizers = dict(reversed(parts.tokenizers.items()))


def _other_end(parts: Parts) -> None:
    encoder: Any = parts.text_encoders["text_encoder_2"]
    encoder.text_model.eos_token_id = 2


def _other_precision(parts: Parts) -> None:
    parts.text_encoders["text_encoder"].bfloat16()


def _other_family(name: str, value: Any) -> Callable[[Parts], None]:
    def edit(parts: Parts) -> None:
        parts.family = dataclasses.replace(parts.family, **{name: value})

    return edit


def _pooled_alone(parts: Parts) -> None:
    """Another class around the same weights."""
    encoder = parts.text_encoders["text_encoder_2"]
    assert type(encoder) is CLIPTextModelWithProjection
    encoder.__class__ = CLIPTextModel


def _of_zeros(parts: Parts) -> None:
    parts.zero_unconditional = not parts.zero_unconditional


EDITS: dict[str, Callable[[Parts], None]] = {
    "first encoder": of_weights("text_encoder", "final_layer_norm.bias"),
    "projection": of_weights("text_encoder_2", "text_projection.weight"),
    "activation": of_config("text_encoder", "hidden_act", "gelu"),
    "heads": of_config("text_encoder_2", "num_attention_heads", 2),
    "epsilon": of_config("text_encoder_2", "layer_norm_eps", 1e-6),
    "precision": _other_precision,
    "class": _pooled_alone,
    "end": _other_end,
    "new token": _new_token,
    "merges": _other_merges,
    "padding": of_tokenizer("text_encoder", "pad_token", "!"),
    "start": of_tokenizer("text_encoder", "bos_token", "!"),
    "length": of_tokenizer("text_encoder_2", "model_max_length", 70),
    "order": _other_order,
    "penultimate": _other_family("penultimate", False),
    "no pooled text": _other_family("time_ids", ()),
    "absence": _of_zeros,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "clip skip": {"clip_skip": 1},
    "pieces": {"max_pieces": 3},
    "weights": {"weighted": True},
    "expanded": {"expand": str.lower},
}


def test_whatever_an_embedding_depends_on_changes_the_identity(sdxl: Parts) -> None:
    """Each edit alone, of weights, configurations, tokenizers and options, gives another identity
    than the model's own and than any other edit."""
    given = dataclasses.replace(sdxl, unet=None, vae=None)  # what is copied, and no more
    digests = {"untouched": identity(copy.deepcopy(given))}
    for name, edit in EDITS.items():
        edited = copy.deepcopy(given)
        edit(edited)
        digests[name] = identity(edited)
    for name, options in OPTIONS.items():
        digests[name] = identity(copy.deepcopy(given), **options)
    caption_encoder = given.caption_encoder()
    for dtype in (torch.bfloat16, torch.float16):
        digests[str(dtype)] = identity_of(caption_encoder, given.text_encoders, dtype, CPU)
    digests["device"] = identity_of(
        caption_encoder, given.text_encoders, torch.float32, torch.device("cuda")
    )
    assert identity(given) == digests["untouched"]
    found = {digest: name for name, digest in digests.items()}
    clashes = {name: found[digest] for name, digest in digests.items() if found[digest] != name}
    assert clashes == {}


def test_every_option_of_a_reader_counts(sdxl: Parts) -> None:
    """Options that a reader will have one day are in the identity, too: none is named there."""

    @dataclasses.dataclass(frozen=True)
    class Tomorrow(CaptionEncoder):
        emphasis: float = 1.0

    usual = Tomorrow(sdxl.family, sdxl.tokenizers)
    other = Tomorrow(sdxl.family, sdxl.tokenizers, emphasis=1.5)
    assert (
        len({identity_of(r, sdxl.text_encoders, torch.float32, CPU) for r in (usual, other)}) == 2
    )
