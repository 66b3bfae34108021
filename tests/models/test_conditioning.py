"""The UNet's conditions: embeddings, pooled text and time ids, against diffusers' own pipelines
and compel, for every family."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from compel.convenience_wrappers import CompelForSD, CompelForSDXL
from diffusers import DiffusionPipeline
from PIL import Image, ImageOps
from torch import Tensor, nn
from transformers import CLIPTextConfig

from sd_lora.data.images.buckets import CropSettings, pixels_of
from sd_lora.models.caption_encoder import Geometry, collate, encode_in_batches, time_ids
from sd_lora.models.load import Parts, load_parts
from sd_lora.seeds import seed_for, uniform
from tests.tiny import KINDS, build_pipeline, pipeline_of

XL = ["sdxl", "sdxl-v", "refiner", "sdxl-inpainting"]
CAPTIONS = (
    "a photo of sks monster",
    "",
    "word " * 30,  # 120 tokens, for the tiny tokenizer knows bytes alone: cut
    "Ünïcodé 日本 🦊 e\u0301 \u200b\n\tﬁ ½ \x00",
    "a <|endoftext|> within, and <|startoftext|>!",
    "x" * 75,
)
SAME = {"rtol": 0.0, "atol": 1e-6}
WORDS = [f"w{i:03}z" for i in range(60)]  # 5 tokens each, so that 15 of them fill a piece


@pytest.fixture(scope="module")
def loaded(tiny: Callable[[str], Path]) -> Callable[[str], Parts]:
    return cache(lambda kind: load_parts(str(tiny(kind))))


class Theirs(NamedTuple):
    """A pipeline's embeddings of a prompt and of its absence; the pooled ones are SDXL's."""

    hidden: Tensor
    absent: Tensor
    pooled: Tensor | None = None
    absent_pooled: Tensor | None = None


def theirs(pipeline: DiffusionPipeline, prompt: str, **options: object) -> Theirs:
    """The pipeline's own encode_prompt with guidance and negative_prompt=None."""
    many = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    with torch.no_grad():
        return Theirs(*pipeline.encode_prompt(prompt, **many, **options))


def deep(parts: Parts, layers: int = 5) -> Parts:
    """The same model with text encoders that have layers to skip."""
    torch.manual_seed(7)
    encoders = {}
    for component, encoder in parts.text_encoders.items():
        config = encoder.config.to_dict() | {"num_hidden_layers": layers}
        encoders[component] = type(encoder)(CLIPTextConfig(**config)).eval()
    return replace(parts, text_encoders=encoders)


@torch.no_grad()
def layer_outputs(encoder: nn.Module, ids: Tensor) -> list[Tensor]:
    """Output of each layer of a text encoder, by hooks."""
    inner, outputs = getattr(encoder, "text_model", encoder), []
    hooks = [
        layer.register_forward_hook(
            lambda module, args, out: outputs.append(out[0] if isinstance(out, tuple) else out)
        )
        for layer in inner.encoder.layers
    ]
    encoder(ids)
    for hook in hooks:
        hook.remove()
    return outputs


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_equal_the_pipelines(kind: str, loaded: Callable[[str], Parts]) -> None:
    """For each family, hidden states and pooled text equal those of diffusers' own pipeline, for
    plain, empty, too long and odd captions, encoded at once; so does the absence of a caption:
    zeros for SDXL, the empty caption for SD1 and SD2."""
    parts = loaded(kind)
    pipeline = pipeline_of(parts)
    captions = [*CAPTIONS, CAPTIONS[0], None]
    with torch.no_grad():
        ours = parts.caption_encoder().encode(parts.text_encoders, captions)
    batch = collate(ours, [Geometry((64, 64), (0, 0), (64, 64))] * len(ours), parts.family)
    assert batch.mask is None
    assert (batch.pooled is not None) == (kind in XL)
    for i, caption in enumerate(captions):
        want = theirs(pipeline, "some other" if caption is None else caption)
        hidden, pooled = (want.absent, want.absent_pooled) if caption is None else want[::2]
        torch.testing.assert_close(batch.hidden[i], hidden[0], **SAME)
        if kind in XL:
            torch.testing.assert_close(batch.pooled[i], pooled[0], **SAME)
    assert bool(batch.hidden[-1].any()) == (kind not in XL)


@pytest.mark.parametrize("kind", XL)
def test_time_ids_equal_the_pipelines(kind: str, loaded: Callable[[str], Parts]) -> None:
    """For random sizes and crops the time ids are those of the pipeline's _get_add_time_ids, with
    the aesthetic score 6 for the refiner, the default of its own call."""
    parts = loaded(kind)
    pipeline, geometries, rows = pipeline_of(parts), [], []
    known = {"dtype": torch.float32, "text_encoder_projection_dim": 48}
    for i in range(20):
        n = [seed_for("time ids", i, j) % 4097 for j in range(6)]
        original, crop, target = (n[0], n[1]), (n[2], n[3]), (n[4], n[5])
        geometries.append(Geometry(original, crop, target))
        if kind in ("sdxl", "sdxl-v"):
            rows.append(pipeline._get_add_time_ids(original, crop, target, **known))
        else:
            sizes = (original, crop, target, 6.0, 2.5, original, crop, target)
            rows.append(pipeline._get_add_time_ids(*sizes, **known)[0])
    assert torch.equal(time_ids(parts.family, geometries), torch.cat(rows))
    assert time_ids(parts.family, geometries).shape == (20, 5 if kind == "refiner" else 6)
    assert time_ids(loaded("sd1").family, geometries) is None


@pytest.mark.parametrize("kind", ["sdxl", "refiner", "sd1", "sd2"])
def test_clip_skip(kind: str, loaded: Callable[[str], Parts]) -> None:
    """Skipping n layers equals SDXL's pipelines with clip_skip = n; for SD1 and SD2 it is the n-th
    last layer's output (by hooks) through the final norm, as their pipeline intends: diffusers
    0.42.1 fails at it, for it looks for a level of modules that transformers 5 removed. Pooled text
    stays the same."""
    parts = deep(loaded(kind))
    pipeline, caption = pipeline_of(parts), "a photo of a skipped layer"
    seen = []
    for skip in range(5 - (kind in XL)):
        caption_encoder = parts.caption_encoder(clip_skip=skip)
        caption_encoder.check_clip_skip(parts.text_encoders)
        with torch.no_grad():
            (ours,) = caption_encoder.encode(parts.text_encoders, [caption])
        if kind in XL:
            want = theirs(pipeline, caption, clip_skip=skip)
            torch.testing.assert_close(ours.pooled, want.pooled[0], **SAME)
            hidden = want.hidden
        else:
            encoder = parts.text_encoders["text_encoder"]
            outputs = layer_outputs(encoder, caption_encoder.pieces(caption)["text_encoder"])
            inner = getattr(encoder, "text_model", encoder)  # transformers 5.0 has the level
            hidden = inner.final_layer_norm(outputs[-1 - skip])
            if inner is encoder:
                with pytest.raises(AttributeError, match="text_model"):  # mended: compare with it
                    theirs(pipeline, caption, clip_skip=skip)
            else:
                want = theirs(pipeline, caption, clip_skip=skip)
                torch.testing.assert_close(ours.hidden, want.hidden[0], **SAME)
        torch.testing.assert_close(ours.hidden, hidden[0], **SAME)
        seen.append(ours.hidden)
    assert all((a - b).abs().max() > 0.01 for a, b in zip(seen, seen[1:], strict=False))


@pytest.mark.parametrize("kind", ["sdxl", "refiner"])
def test_the_absence_of_a_caption_is_the_models(kind: str, tmp_path: Path) -> None:
    """With force_zeros_for_empty_prompt = false in a model's index, as the published refiner has,
    no caption equals the empty one, as in the pipeline of that folder: alone, after other captions,
    and beside the empty one."""
    pipeline = build_pipeline(kind)
    pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    pipeline.save_pretrained(tmp_path)
    parts = load_parts(str(tmp_path))
    want = theirs(DiffusionPipeline.from_pretrained(tmp_path), "some other")
    for captions in ([None], ["a", None], ["", None]):
        with torch.no_grad():
            *_, ours = parts.caption_encoder().encode(parts.text_encoders, captions)
        torch.testing.assert_close(ours.hidden, want.absent[0], **SAME)
        torch.testing.assert_close(ours.pooled, want.absent_pooled[0], **SAME)
    assert want.absent.abs().max() > 0.1


@pytest.mark.parametrize("kind", ["sd1", "sdxl", "refiner"])
def test_long_captions_are_read_in_pieces(kind: str, loaded: Callable[[str], Parts]) -> None:
    """With three pieces, tokens 1-75, 76-150 and 151-225 each equal the pipeline's embedding of
    this part of the caption alone; the rest is cut, and the pooled text is the first piece's."""
    parts = loaded(kind)
    caption_encoder, pipeline = parts.caption_encoder(max_pieces=3), pipeline_of(parts)
    with torch.no_grad():
        for count, lengths in ((10, [10]), (16, [15, 1]), (45, [15] * 3), (60, [15] * 3)):
            (ours,) = caption_encoder.encode(parts.text_encoders, [" ".join(WORDS[:count])])
            assert ours.hidden.shape == (
                77 * len(lengths),
                pipeline.unet.config.cross_attention_dim,
            )
            for i, length in enumerate(lengths):
                part = theirs(pipeline, " ".join(WORDS[15 * i : 15 * i + length]))
                torch.testing.assert_close(ours.hidden[77 * i :][:77], part.hidden[0], **SAME)
                if i == 0 and kind in XL:
                    torch.testing.assert_close(ours.pooled, part.pooled[0], **SAME)


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl", "refiner"])
def test_captions_of_other_lengths_do_not_change_a_prediction(
    kind: str, loaded: Callable[[str], Parts]
) -> None:
    """In a batch with longer captions and none, a caption gives the same prediction of the UNet as
    alone: padding is masked, and without the mask the predictions differ."""
    parts = loaded(kind)
    captions = [" ".join(WORDS[:count]) for count in (3, 20, 40)] + [None]
    with torch.no_grad():
        embeddings = parts.caption_encoder(max_pieces=3).encode(parts.text_encoders, captions)
    geometries = [Geometry((64 + i, 90), (0, i), (64, 64)) for i in range(4)]
    batch = collate(embeddings, geometries, parts.family)
    assert batch.mask.sum(1).tolist() == [77, 154, 231, 77]
    x, t = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor(500)
    with torch.no_grad():
        together = parts.unet(x, t, **batch.arguments()).sample
        unmasked = parts.unet(x, t, **replace(batch, mask=None).arguments()).sample
        for i in range(4):
            alone = collate(embeddings[i : i + 1], geometries[i : i + 1], parts.family)
            assert alone.mask is None
            want = parts.unet(x[i : i + 1], t, **alone.arguments()).sample
            torch.testing.assert_close(together[i], want[0], rtol=0, atol=1e-5)
    assert (together - unmasked)[:2].abs().amax((1, 2, 3)).min() > 1e-3


@pytest.mark.parametrize("kind", ["sdxl", "refiner"])
def test_pooled_text_is_read_at_the_end_token(kind: str, loaded: Callable[[str], Parts]) -> None:
    """The pooled text is the projection of the normed last layer (by hooks) at the first end token,
    right behind the caption's last token, and not at the paddings'."""
    parts = loaded(kind)
    encoder, caption_encoder = parts.text_encoders["text_encoder_2"], parts.caption_encoder()
    for caption, place in (("", 1), ("a b", 3), ("x" * 75, 76), ("ab <|endoftext|> cd", 3)):
        ids = caption_encoder.pieces(caption)["text_encoder_2"]
        assert ids[0, place] == encoder.config.eos_token_id
        normed = encoder.text_model.final_layer_norm(layer_outputs(encoder, ids)[-1])
        with torch.no_grad():
            (ours,) = caption_encoder.encode(parts.text_encoders, [caption])
            want = encoder.text_projection(normed[0, place])
        torch.testing.assert_close(ours.pooled, want, **SAME)


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_weighted_captions_equal_compels(kind: str, loaded: Callable[[str], Parts]) -> None:
    """Captions with weights give the hidden states of compel's own wrapper for the pipeline, in one
    piece and in three; captions without weights the plain states. Pooled text is of the words."""
    parts = loaded(kind)
    wrapper = (CompelForSDXL if kind in XL else CompelForSD)(pipeline_of(parts))
    plain = parts.caption_encoder()
    weighted, pieces = (
        parts.caption_encoder(weighted=True),
        parts.caption_encoder(weighted=True, max_pieces=3),
    )
    words = "a photo of a cat by the sea"
    for caption in (
        "a photo of a (cat)1.5 by the sea",
        "a photo of a (cat)0.4 by the sea",
        "a photo of a cat++ by the (sea)0.7",
    ):
        (ours,), (as_written,) = (
            r.encode(parts.text_encoders, [text])
            for r, text in ((weighted, caption), (plain, words))
        )
        torch.testing.assert_close(ours.hidden, wrapper(caption).embeds[0], **SAME)
        assert (ours.hidden - as_written.hidden).abs().max() > 0.1
        if kind in XL:
            torch.testing.assert_close(ours.pooled, as_written.pooled, **SAME)
    long = "a (big)1.4 " + " ".join(WORDS[:40])
    (ours,) = pieces.encode(parts.text_encoders, [long])
    torch.testing.assert_close(ours.hidden, wrapper(long).embeds[0], **SAME)
    assert len(ours.hidden) == 231
    for caption in (*CAPTIONS[:2], CAPTIONS[3], words, None):
        (ours,), (want,) = (r.encode(parts.text_encoders, [caption]) for r in (weighted, plain))
        torch.testing.assert_close(ours.hidden, want.hidden, **SAME)
        if kind in XL:
            torch.testing.assert_close(ours.pooled, want.pooled, **SAME)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_long_captions_without_weights_read_as_without_compel(
    kind: str, loaded: Callable[[str], Parts]
) -> None:
    """A caption of several pieces without weights equals the plain encoding, wherever its sentences
    end; the brackets and numbers of weights are not counted as tokens."""
    parts = loaded(kind)
    caption = "a cat sat there. " * 4 + "a dog, by the sea; " * 4 + "the end"
    plain, weighted = (parts.caption_encoder(max_pieces=3, weighted=w) for w in (False, True))
    (want,), (found,) = (r.encode(parts.text_encoders, [caption]) for r in (plain, weighted))
    assert len(want.hidden) > 77
    torch.testing.assert_close(found.hidden, want.hidden, **SAME)
    if kind in XL:
        torch.testing.assert_close(found.pooled, want.pooled, **SAME)
    short = "(" + "x" * 75 + ")1.5"
    assert parts.caption_encoder(weighted=True).too_long([short]) == {}


@pytest.mark.parametrize("center_crop", [False, True])
def test_crop_coordinates_are_the_corner_of_the_pixels(center_crop: bool) -> None:
    """For random sizes, corners and flips, an image's pixels are exactly the resized image's from
    `Crop.corner_of` on, mirrored first if it is flipped: the time ids tell the true corner."""
    crop_settings, rng = CropSettings(32, random_crop=not center_crop), np.random.default_rng(0)
    moved = 0
    for i in range(200):
        size = tuple(20 + seed_for("size", i, axis) % 70 for axis in range(2))
        u, flip = (uniform("u", i), uniform("v", i)), i % 2 == 1
        crop = crop_settings.crop(size, (32, 32), None if center_crop else u)
        image = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
        left, top = crop.corner_of(flip)
        whole = image.resize(crop.resized, Image.Resampling.LANCZOS)
        whole = ImageOps.mirror(whole) if flip else whole
        assert 0 <= left <= whole.width - 32
        assert 0 <= top <= whole.height - 32
        cut = torch.from_numpy(np.array(whole.crop((left, top, left + 32, top + 32))))
        seen = pixels_of(crop.cut(image, "lanczos"), flip)
        assert torch.equal(seen, cut.permute(2, 0, 1) / 127.5 - 1)
        moved += crop.corner != (left, top)
    assert moved > 20


def test_gradients_reach_the_text_encoders(loaded: Callable[[str], Parts]) -> None:
    """Every layer behind the conditions gets gradients through `encode`: SDXL's first encoder all
    but its last layer, its second one all, the last by the pooled text alone. The zeros of an
    absent caption have gradients of zero, and `encode_in_batches` gives none."""
    parts = deep(loaded("sdxl"))
    embeddings = parts.caption_encoder(max_pieces=2).encode(parts.text_encoders, CAPTIONS[:3])
    batch = collate(embeddings, [Geometry((64, 64), (0, 0), (64, 64))] * 3, parts.family)
    (batch.hidden.square().sum() + batch.pooled.square().sum()).backward()
    reached = {
        component: [
            layer.self_attn.q_proj.weight.grad is not None
            and bool(layer.self_attn.q_proj.weight.grad.any())
            for layer in getattr(encoder, "text_model", encoder).encoder.layers
        ]
        for component, encoder in parts.text_encoders.items()
    }
    assert reached == {"text_encoder": [True] * 4 + [False], "text_encoder_2": [True] * 5}
    (nothing,) = parts.caption_encoder().encode(parts.text_encoders, [None])
    assert nothing.hidden.requires_grad
    assert nothing.pooled.requires_grad
    once = dict(encode_in_batches(parts.caption_encoder(), parts.text_encoders, CAPTIONS))
    assert not any(e.hidden.requires_grad or e.pooled.requires_grad for e in once.values())
