"""Text embeddings by content: a caption is read by the same text encoders once, by any run."""

import dataclasses
import json
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer

from sd_lora.data.cache.store import Store, digest_of, weights_digest
from sd_lora.errors import RunError
from sd_lora.models.caption_encoder import Caption, CaptionEncoder, Embedding

VERSION = "1"
"""Version of the way from captions to entries: another one makes all kept entries unknown."""

HELD = 64 << 20
"""Bytes of the last used embeddings held in memory although the store has them: 100 of SDXL in
float32. Prompts of every step are not read from the disk each time."""

_SAYS_NOTHING = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")
"""Keys of an encoder's configuration about its origin, or implied by its weights."""


class Embeddings:
    """Embeddings of captions, in the dtype of `put`: the same bits come back.

    In memory without a store. With one, an entry may be gone at any time, since another run made
    room: `get` answers None, and the caller encodes the caption anew.

    Args:
        identity: of `identity_of`; "" without a store.
        store: the caches on disk.
        held: bytes held in memory beside the store; `HELD` when None.
    """

    def __init__(self, identity: str, store: Store | None, held: int | None = None) -> None:
        self.identity, self.store = identity, store
        self.may_lose = store is not None
        self._kept: dict[Caption, Embedding] = {}
        self._recent: OrderedDict[Caption, Embedding] = OrderedDict()
        self._room = HELD if held is None else held

    def key(self, caption: Caption) -> str:
        """A caption's address; no caption has one of its own, different from that of ""."""
        said = ("absent",) if caption is None else ("caption", caption)
        return "texts/" + digest_of(self.identity, *said)

    def missing(self, captions: Iterable[Caption]) -> list[Caption]:
        """The captions whose embeddings are not known, each once, in the order given."""
        return [caption for caption in dict.fromkeys(captions) if not self._has(caption)]

    def _has(self, caption: Caption) -> bool:
        if self.store is None or caption in self._kept:
            return caption in self._kept
        return self.key(caption) in self.store

    def put(self, caption: Caption, embedding: Embedding) -> None:
        """Keep an embedding, on the CPU.

        Raises:
            RunError: values that are not finite, by caption; or the store cannot be written.
        """
        hidden, pooled = embedding.hidden, embedding.pooled
        if not all(bool(t.isfinite().all()) for t in (hidden, pooled) if t is not None):
            raise RunError(
                f"the text encoders gave NaN or infinite values for "
                f"{'the absent caption' if caption is None else f'the caption {caption!r}'} in "
                f"{str(hidden.dtype).removeprefix('torch.')}: their weights are broken, or the "
                "values too large for it (bf16 and fp32 hold larger ones than fp16)"
            )
        tensors = {"hidden": _own(hidden)} | ({} if pooled is None else {"pooled": _own(pooled)})
        embedding = Embedding(tensors["hidden"], tensors.get("pooled"))
        if self.store is None:
            self._kept[caption] = embedding
            return
        self.store.put_tensors(self.key(caption), tensors)
        self._remember(caption, embedding)

    def get(self, caption: Caption) -> Embedding | None:
        """A caption's embedding, not to be changed in place; None if it is not known, or gone."""
        known = self._kept.get(caption) or self._recent.get(caption)
        if known is not None or self.store is None:
            if caption in self._recent:
                self._recent.move_to_end(caption)
            return known
        tensors = self.store.tensors(self.key(caption))
        if tensors is None or "hidden" not in tensors:
            return None
        embedding = Embedding(tensors["hidden"], tensors.get("pooled"))
        self._remember(caption, embedding)
        return embedding

    def hold(self, captions: Iterable[Caption]) -> None:
        """Take captions into memory, however many: if all are known, `may_lose` is False from
        then on, and no text encoder is needed for them any more."""
        found = {caption: self.get(caption) for caption in dict.fromkeys(captions)}
        self._kept |= {caption: e for caption, e in found.items() if e is not None}
        self.may_lose = None in found.values()

    def _remember(self, caption: Caption, embedding: Embedding) -> None:
        self._room += _bytes_of(self._recent.pop(caption, None)) - _bytes_of(embedding)
        self._recent[caption] = embedding
        while self._room < 0:
            _, oldest = self._recent.popitem(last=False)
            self._room += _bytes_of(oldest)


def _own(tensor: Tensor) -> Tensor:
    """A copy on the CPU that holds no more memory than its own values."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _bytes_of(embedding: Embedding | None) -> int:
    tensors = (embedding.hidden, embedding.pooled) if embedding else ()
    return sum(t.nbytes for t in tensors if t is not None)


def identity_of(
    caption_encoder: CaptionEncoder,
    encoders: Mapping[str, nn.Module],
    dtype: torch.dtype,
    device: torch.device,
) -> str:
    """The digest of everything that an embedding depends on besides its caption.

    Weights and configurations of the encoders, tokenizers with their special tokens and lengths,
    the caption encoder's options, the dtype and the kind of device, and the versions of the
    libraries. Not the folders of their origin. Hashing takes a second a GiB.

    Args:
        encoders: component → text encoder, without anything that learns.
        dtype: of the kept embeddings.
    """
    libraries = ["torch", "transformers", *(["compel"] if caption_encoder.weighted else [])]
    about: dict[str, Any] = {
        "version": VERSION,
        "libraries": {name: version(name) for name in libraries},
        "dtype": str(dtype),
        "device": device.type,
        "penultimate": caption_encoder.family.penultimate,
        "is_xl": caption_encoder.family.is_xl,
        "expand": caption_encoder.expand
        is not str,  # by the tokenizers' own new words, which are below
    }
    for field in dataclasses.fields(caption_encoder):  # those of tomorrow, too
        if field.name not in ("family", "tokenizers", "expand"):
            about[field.name] = getattr(caption_encoder, field.name)
    # in this order their outputs are joined
    parts = [
        part
        for c, t in caption_encoder.tokenizers.items()
        for part in (c, _read_by(t, encoders[c]))
    ]
    return digest_of(json.dumps(about, sort_keys=True), *parts)


def _read_by(tokenizer: CLIPTokenizer, encoder: nn.Module) -> str:
    """The digest of a tokenizer and its text encoder."""
    words = json.loads(tokenizer.backend_tokenizer.to_str())
    for state in ("truncation", "padding"):  # of its last call
        words.pop(state, None)
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "model_max_length")
    config: Any = encoder.config
    about = {k: v for k, v in config.to_dict().items() if k not in _SAYS_NOTHING}
    about["attention"] = getattr(config, "_attn_implementation", None)  # the last bits differ
    # new words change by which id the encoder finds a caption's end
    end = getattr(getattr(encoder, "text_model", encoder), "eos_token_id", None)
    return digest_of(
        json.dumps(words, sort_keys=True),
        json.dumps({name: getattr(tokenizer, name) for name in names}),
        type(encoder).__name__,
        json.dumps(about, sort_keys=True, default=str),
        str(end),
        weights_digest(encoder),
    )
