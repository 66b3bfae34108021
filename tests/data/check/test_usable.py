"""Usable images: buckets are found, and a strict or an empty result is an error or is not."""

import io
import pickle
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from sd_lora.config.sources import CaptionRules, SourceSpec
from sd_lora.data.check.usable import MAX_NAMED, ImageCheck, NoUsableImages, check_images
from sd_lora.data.images.buckets import CropSettings
from sd_lora.data.sources.samples import Sample, Source
from sd_lora.errors import RunError


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


OPAQUE = Image.linear_gradient("L").resize((128, 128)).convert("RGB")
CLEAR = Image.new("RGBA", (128, 128), (255, 0, 0, 0))


def checked(
    *images: Image.Image,
    caption: str = "a",
    counts: dict[str, int] | None = None,
    upscale: bool = True,
    resolutions: list[int] | None = None,
    **options: Any,
) -> ImageCheck:
    """Check images with one caption, of `counts` tokens where too long."""
    spec = SourceSpec(path="x", rules=CaptionRules(wildcards=True), resolutions=resolutions)
    samples = [
        Sample(f"{i}.png", partial(bytes, png(image)), (caption,), spec)
        for i, image in enumerate(images)
    ]
    encoder: Any = SimpleNamespace(too_long=lambda texts: counts or {}, max_tokens=75)
    options = {"alpha_mask": False, "strict": False} | options
    return check_images(
        [Source(spec, partial(iter, samples), [], len(samples))],
        "instance",
        CropSettings(64, step=64, upscale=upscale),
        None,
        encoder,
        lambda items, total: items,
        **options,
    )


def codes(found: ImageCheck) -> list[tuple[str, str, str]]:
    return [(f.name, f.level, f.code) for f in found.findings]


def test_transparent_images_are_left_out_with_a_mask_only() -> None:
    """Without alpha_mask it is a warning; with it, the left-out finding replaces all others of the
    image. The result can be sent to other processes."""
    plain = checked(OPAQUE, CLEAR)
    assert [bucket for _, bucket in plain.usable] == [(64, 64)] * 2
    assert ("1.png", "warning", "transparent") in codes(plain)
    masked = checked(OPAQUE, CLEAR, alpha_mask=True)
    assert [sample.name for sample, _ in masked.usable] == ["0.png"]
    assert codes(masked) == [("1.png", "left out", "nothing-opaque")]
    assert [s.name for s, _ in pickle.loads(pickle.dumps(masked)).usable] == ["0.png"]


def test_an_endless_caption_is_left_out() -> None:
    """Wherever a caption is from, one of more characters than are counted in a blink leaves its
    image out; at the bound the image is trained."""
    found = checked(OPAQUE, caption="a" * 100_001, required=False)
    assert codes(found) == [("0.png", "left out", "unreadable-caption")]
    assert "has 100001 characters, and 100000 are the most" in found.findings[0].text
    assert len(checked(OPAQUE, caption="a" * 100_000).usable) == 1


def test_no_usable_image_is_an_error_if_one_is_required() -> None:
    """The error has the findings; without `required` the result is empty."""
    with pytest.raises(NoUsableImages, match="none of the instance images") as error:
        checked(CLEAR, alpha_mask=True)
    assert [f.code for f in error.value.findings] == ["nothing-opaque"]
    assert checked(CLEAR, alpha_mask=True, required=False).usable == []


def test_a_strict_check_names_the_first_problems() -> None:
    """Warnings and images left out are one error, by name, up to a number; notes are none."""
    checked(OPAQUE, strict=True)
    images = [Image.new("RGBA", (128, 128), (i, 0, 0, 0)) for i in range(MAX_NAMED + 3)]
    with pytest.raises(RunError, match=r"(?s)23 problems .* strict:\n  0\.png: .* … and 3 more$"):
        checked(*images, alpha_mask=True, strict=True, required=False)


def test_long_captions_and_odd_wildcards() -> None:
    """The finding names the length that reads the caption whole; beyond 300 tokens, to shorten
    it; an unknown wildcard syntax is quoted."""
    (odd,) = checked(OPAQUE, caption="a __name__").findings
    assert (odd.code, odd.text[:21]) == ("wildcard", "caption 'a __name__';")
    (long,) = checked(OPAQUE, counts={"a": 100}).findings
    assert (
        long.text == "its caption of 100 tokens is cut at 75; --max_token_length 150 reads it whole"
    )
    (text,) = checked(OPAQUE, counts={"a": 301}).findings
    assert text.text.endswith("; shorten it")


def test_small_images_are_enlarged_or_left_out() -> None:
    """An enlarged image is a warning with its factor; without enlarging, it is left out."""
    (found,) = checked(OPAQUE.resize((64, 32))).findings[-1:]
    assert (found.code, found.level) == ("upscaled", "warning")
    assert "64×32 pixels, enlarged 2.00 times for 64×64" in found.text
    kept = checked(OPAQUE, OPAQUE.resize((64, 32)), upscale=False)
    assert [sample.name for sample, _ in kept.usable] == ["0.png"]
    assert codes(kept)[-1] == ("1.png", "left out", "too-small")
    assert "a side is shorter than 64, the bucket step" in kept.findings[-1].text


@pytest.mark.parametrize(
    ("caption", "quoted"),
    [
        ("[trigger], a dog", "'[trigger]': ai-toolkit puts"),
        ("photo of [filewords]", "'[filewords]': A1111 puts"),
        ("1girl, <lora:add_detail:0.8>", "'<lora:add_detail:0.8>': a LoRA"),
        ("a dog\nNegative prompt: blurry\nSteps: 20, Sampler: Euler", "'Negative prompt:': param"),
        ("a dog\nSteps: 20, Sampler: Euler a, CFG scale: 7", "'Steps: 20, S': parameters"),
        ("a dog on steps: stone, [wet] <3", ""),
        ("steps: 20 of them, a dog (smiling:1.2), score_9", ""),
    ],
)
def test_text_that_other_programs_read_is_a_warning(caption: str, quoted: str) -> None:
    """Placeholders and pasted parameters are quoted with their meaning elsewhere; brackets and
    words of ordinary captions are none."""
    found = [f.text for f in checked(OPAQUE, caption=caption).findings if f.level == "warning"]
    assert [quoted in text for text in found] == [True] * bool(quoted)


def test_an_image_at_several_resolutions() -> None:
    """Each image is usable once at each resolution, in a bucket of it. Where it is smaller than two
    of them and not enlarged, the equal shapes are a note; one that fits none but the smallest is
    left out at the others by one finding."""
    photo = Image.radial_gradient("L").resize((384, 256)).convert("RGB")
    found = checked(photo, OPAQUE, resolutions=[64, 128, 256])
    assert [(s.name, s.resolution, bucket) for s, bucket in found.usable] == [
        ("0.png", 64, (64, 64)), ("0.png", 128, (128, 128)), ("0.png", 256, (320, 192)),
        ("1.png", 64, (64, 64)), ("1.png", 128, (128, 128)), ("1.png", 256, (256, 256)),
    ]  # fmt: skip
    assert [f.text[:44] for f in found.findings if f.code == "upscaled"] == [
        "128×128 pixels, enlarged 2.00 times for 256×"
    ]
    assert not [f for f in found.findings if f.code in ("duplicate", "near-duplicate")]
    kept = checked(OPAQUE, resolutions=[64, 128, 256], upscale=False)
    assert [bucket for _, bucket in kept.usable] == [(64, 64), (128, 128), (128, 128)]
    (same,) = [f for f in kept.findings if f.code == "same-shape"]
    assert same.text.startswith("trained at 128×128 both for 128 and 256")
