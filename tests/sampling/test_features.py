"""Features of images: the encoder of drawings, and vision models of transformers from disk."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    CLIPConfig,
    CLIPModel,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTModel,
)

from sd_lora.errors import UsageError
from sd_lora.sampling.drawing_encoder import cut_out
from sd_lora.sampling.features import (
    DrawingFeatures,
    ModelFeatures,
    Seen,
    SeenDrawings,
    load_features,
    placed,
)
from sd_lora.training.scoring import looked
from tests.sampling.vision_models import save_dino, save_processor, save_two_towers

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def drawings() -> DrawingFeatures:
    features = load_features(ROOT / "sample_data" / "encoder")
    assert isinstance(features, DrawingFeatures)
    return features


@pytest.fixture
def some() -> list[Image.Image]:
    """Three images of noise."""
    noise = np.random.default_rng(0).integers(0, 256, (3, 96, 64, 3), dtype=np.uint8)
    return [Image.fromarray(pixels) for pixels in noise]


def test_drawings_have_unit_vectors_each_for_itself(
    drawings: DrawingFeatures, some: list[Image.Image]
) -> None:
    """Embeddings have length 1; likeness does not depend on the other images of the call, and is
    the same for a mirrored image and the other way round."""
    for embed in (lambda i: drawings.look(i).subject.vectors, lambda i: drawings.look(i).style.of):
        together = embed(some)
        torch.testing.assert_close(together.norm(dim=1), torch.ones(3))
        alone = torch.cat([embed([image]) for image in some])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    seen, one = drawings.look(some).subject, drawings.look(some[1:2]).subject
    whole = seen.likeness(seen)
    torch.testing.assert_close(whole, whole.T)
    torch.testing.assert_close(whole[:, 1:2], seen.likeness(one), atol=1e-5, rtol=1e-4)


def test_a_subject_of_few_pixels_is_cut_out_in_numbers() -> None:
    """Wherever a mask of nine pixels is, and where there is none, the cut is finite, in bfloat16 as
    the encoder is trained: there the variance of so few places, a difference of two means, is below
    0 at some places."""
    chance = F.max_pool2d(torch.eye(64 * 64).view(-1, 1, 64, 64)[::61], 3, 1, 1)
    x = torch.ones(len(chance), 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(cut_out(x, chance)).all()
        assert torch.isfinite(cut_out(x, torch.zeros_like(chance))).all()


@pytest.mark.parametrize(
    ("prompt", "asked"),
    [
        ("a photo of a big sks monster on the grass", "monster, grass, a|an|one"),
        ("a photo of a red monster with white spots in the snow", "monster, red, snow, a|an|one"),
        ("a drawing of two small blue fish on a pink background", "fish, blue, pink, two"),
        ("three pink houses at night", "house, pink, night, three"),
        ("an orange cup on a white background, cartoon style", "cup, orange, white, a|an|one"),
        ("vexa", ""),
    ],
)
def test_a_prompt_asks_for_answers(drawings: DrawingFeatures, prompt: str, asked: str) -> None:
    """The words of a prompt are found: thing, colour, background, number, in this order."""
    encoder = drawings.encoder
    found = encoder.asked(prompt)
    words = [encoder.questions[name]["answers"][k] for name, k in found.items()]
    assert ", ".join(words) == asked
    assert bool(torch.isnan(drawings.look([Image.new("RGB", (64, 64))]).follows([prompt]))) == (
        not asked
    )


@pytest.mark.parametrize(
    ("model", "config"), [(CLIPModel, CLIPConfig), (SiglipModel, SiglipConfig)]
)
def test_clip_and_siglip_from_disk(
    model: type, config: type, tmp_path: Path, some: list[Image.Image]
) -> None:
    """Embeddings are the model's own; an image follows its prompt with the probability that the
    model's forward pass gives to this prompt among those of the call."""
    torch.manual_seed(0)
    save_two_towers(tmp_path, model, config)
    features = load_features(tmp_path)
    assert isinstance(features, ModelFeatures)
    prompts = ["a red car", "a cat", "a red car"]
    x = features.processor(images=some, return_tensors="pt").pixel_values
    words = features.tokenizer(prompts[:2], padding="max_length", return_tensors="pt")
    with torch.no_grad():
        out = features.model(pixel_values=x, **words)
    torch.testing.assert_close(features.look(some).subject.of, F.normalize(out.image_embeds))
    own = out.logits_per_image.softmax(1)[torch.arange(3), torch.tensor([0, 1, 0])]
    torch.testing.assert_close(features.look(some).follows(prompts), own)


def test_dino_from_disk(tmp_path: Path, some: list[Image.Image]) -> None:
    """Embeddings are DINO's pooled ones; it reads no text, and says so."""
    torch.manual_seed(0)
    save_dino(tmp_path)
    features = load_features(tmp_path)
    x = features.processor(images=some, return_tensors="pt").pixel_values
    with torch.no_grad():
        out = features.model(pixel_values=x).pooler_output
    torch.testing.assert_close(features.look(some).subject.of, F.normalize(out))
    assert features.look(some).follows(["a"] * 3).isnan().all()
    assert "reads no text" in features.blind


def test_a_model_without_its_pooler(tmp_path: Path, some: list[Image.Image]) -> None:
    """DINO's first models were published without a pooler: the class token stands for it, and not
    random weights, which would be others at each start; loading draws no number of the run's. A
    folder that lacks other weights is refused."""
    config = ViTConfig(
        image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64,
    )  # fmt: skip
    model = ViTModel(config, add_pooling_layer=False)
    model.save_pretrained(tmp_path)
    save_processor(tmp_path, "ViTImageProcessor", 32)
    state = torch.get_rng_state()
    squares = [image.resize((32, 32)) for image in some]
    one, other = (load_features(tmp_path).look(squares).subject.of for _ in range(2))
    assert torch.equal(one, other)
    assert torch.equal(state, torch.get_rng_state())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["layernorm.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match="lacks weights of layernorm"):
        load_features(tmp_path)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    """The message names the folder and what it should hold."""
    with pytest.raises(UsageError, match="holds no config.json"):
        load_features(tmp_path)


def without_numbers(model: torch.nn.Module) -> FakeTensorMode:
    """Take a model's numbers away: its tensors are fake ones, buffers all, of the mode returned."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    for module in model.modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            module._parameters.pop(name, None)
            module._buffers[name] = None if tensor is None else fake.from_tensor(tensor.detach())
    return fake


def devices_of(seen: Seen, prompts: list[str]) -> set[str]:
    """Where everything is that is told of images."""
    likeness = (look.likeness(look) for look in (seen.subject, seen.style))
    return {found.device.type for found in (*likeness, seen.follows(prompts))}


@pytest.mark.parametrize("kind", ["drawings", "dino", "clip"])
def test_features_compute_where_they_are_placed(
    kind: str, tmp_path: Path, some: list[Image.Image]
) -> None:
    """In a block all of a model's weights are on the device, no operator meets tensors of two
    devices, and results are on the CPU; behind it the model is back. A fake device
    stands for a card: its tensors have no numbers, and refuse those of others."""
    torch.manual_seed(0)
    if kind == "dino":
        save_dino(tmp_path)
    if kind == "clip":
        save_two_towers(tmp_path, CLIPModel, CLIPConfig)
    features = load_features(ROOT / "sample_data" / "encoder" if kind == "drawings" else tmp_path)
    model = features.encoder if isinstance(features, DrawingFeatures) else features.model
    prompts = ["a red car", "a cat in the snow", "a red car"]
    with without_numbers(model), placed(features, "lazy"):
        assert {tensor.device.type for tensor in model.state_dict().values()} == {"lazy"}
        assert devices_of(features.look(some), prompts) == {"cpu"}
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"cpu"}


class Full(DrawingFeatures):
    """Features on a card that has no room for their work."""

    at = "cpu"

    def to(self, device: torch.device | str) -> None:
        self.at = str(device)

    def look(self, images: Sequence[Image.Image]) -> SeenDrawings:
        if self.at != "cpu":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().look(images)


def test_a_full_card_leaves_features_on_the_cpu(
    drawings: DrawingFeatures, some: list[Image.Image]
) -> None:
    """A run looks at its images on its device; where that has no room it does so on the CPU, with
    the result that features have there, warns once, and stays there. Another error stays one."""
    features, told, places = Full(drawings.encoder), [], []
    run: Any = SimpleNamespace(
        accelerator=SimpleNamespace(device=torch.device("cuda")),
        scores=SimpleNamespace(on_cpu=False),
        emit=told.append,
    )

    def work() -> Seen:
        places.append(features.at)
        return features.look(some)

    found = looked(run, features, work)
    assert places == ["cuda", "cpu"]
    want = drawings.look(some).subject
    assert torch.equal(found.subject.likeness(want), want.likeness(want))
    looked(run, features, work)
    assert places == ["cuda", "cpu", "cpu"]
    assert [finding.code for event in told for finding in event.findings] == ["scored-on-cpu"]
    run.scores.on_cpu = False
    with pytest.raises(ZeroDivisionError):
        looked(run, features, lambda: 1 / 0)
    assert features.at == "cpu"
