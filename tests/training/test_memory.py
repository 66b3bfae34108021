"""Bytes of a step: counted without a device as they are held on one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sd_lora.check import check
from sd_lora.config.command_line import parse
from sd_lora.errors import UsageError
from sd_lora.models.families import FAMILIES
from sd_lora.models.meta_pipeline import MetaPipeline
from sd_lora.training import loop, setup
from sd_lora.training.caches import Caches
from sd_lora.training.cards import CARDS, Card, card_named
from sd_lora.training.data import base_of
from sd_lora.training.memory import (
    GIB,
    RESERVE,
    HeldBytes,
    Shape,
    StepBytes,
    count_step,
    count_vae,
    peak_of,
)
from sd_lora.training.setup import prepare
from tests.training.runs import images, text_to_image


def test_bytes_are_counted_as_they_are_held() -> None:
    """Closed form of y = relu(x W₁) W₂ with x (8, 100), W (100, 100), float32, and y's sum: the
    peak is where dW₁ = xᵀ·dh is made. The weights, x, dW₂, dh and the sum with its gradient are
    held then; at the end, the weights, x and both gradients. 2·m·k·n operations a product: two
    forward, three backward."""
    x, first, second = (torch.empty(n, 100, device="meta") for n in (8, 100, 100))
    first.requires_grad_(), second.requires_grad_()
    with HeldBytes([x, first, second]) as counter:
        (torch.relu(x @ first) @ second).sum().backward()
    small, large, number = 8 * 100 * 4, 100 * 100 * 4, 4
    assert counter.peak == 2 * large + small + large + small + large + 2 * number
    assert counter.now == 2 * large + small + 2 * large
    assert sum(flop for flop, _ in counter.kernels) == 5 * 2 * 8 * 100 * 100
    with HeldBytes([x, first]) as counter, torch.no_grad():
        torch.empty_like(x).addmm_(x, first)  # added to what is there
    assert sum(flop for flop, _ in counter.kernels) == 2 * 8 * 100 * 100


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_checkpointing": True},
        {"gradient_accumulation_steps": 2, "rank": 64},
        {"mixed_precision": "bf16", "targets": "transformer+conv"},
        {"base_precision": "int8", "targets": "attention+conv"},
        {"base_precision": "nf4", "mixed_precision": "bf16", "gradient_checkpointing": True},
        {"use_dora": True, "targets": "all", "gradient_checkpointing": True},
    ],
)
def test_a_step_is_counted_as_it_goes(
    options: dict[str, object], tiny_sd1: Path, tmp_path: Path
) -> None:
    """The bytes that a real forward and backward pass holds at its peak, text encoder included,
    with and without checkpointing, are those counted on the meta device within 2 %: the rest, with
    working copies of the factors, and the gradients. Those of a step's earlier micro-batches are
    there from its beginning on."""
    data = images(tmp_path / "data", 8, (64, 128))
    changes: dict[str, object] = {"train_batch_size": 8, "resolution": 128} | options
    run = prepare(text_to_image(tiny_sd1, data, tmp_path / "o", train_text_encoder=True, **changes))
    last = run.config.gradient_accumulation_steps - 1
    for number in range(last):
        loop.accumulate(run, number, run.stream.batch(number), 0)
    batch = run.stream.batch(last)
    gradients = [p.grad for p in run.parameters if p.grad is not None]
    copies = [b for one in run.fast_models for f in one.copies.factors for b in f.buffers]
    weights = [p for m in run.parts.models.values() for p in (*m.parameters(), *m.buffers())]
    alone = HeldBytes(weights)  # an operator on a view of one would count it
    with HeldBytes([*weights, *gradients, *copies]) as held:
        loop.accumulate(run, last, batch, 0)
    count = count_step(run.config, run.meta_pipeline, Shape(8, batch.items[0].crop.size))
    layers = sum(p.nbytes for p in run.parameters)
    assert count.trained == 4 * layers
    assert count.rest + layers == pytest.approx(held.peak - alone.now, rel=0.02)


def test_latents_are_as_fine_as_the_bases_vae(tmp_path: Path) -> None:
    """A step of the embedded base, whose VAE halves an image's side twice, is counted with latents
    of 64×64 for 256×256 pixels, as a model's whose VAE halves it three times for 512×512."""
    model = Path(__file__).parents[2] / "sample_data/tiny-sd"
    data = images(tmp_path / "data", 2)
    run = prepare(text_to_image(model, data, tmp_path / "o"))
    configs = base_of(run.config).meta_pipeline
    assert configs.pixels_per_latent == run.meta_pipeline.pixels_per_latent == 4
    usual = replace(configs, pixels_per_latent=8)
    ours, theirs = (
        count_step(run.config, pipeline, Shape(2, (side, side)))
        for pipeline, side in ((configs, 256), (usual, 512))
    )
    assert (ours.peak, ours.flop) == (theirs.peak, theirs.flop)


def test_operations_are_those_of_torch() -> None:
    """A step of SD 1.5 in a wide bucket, everything adapted, with activations recomputed, has as
    many operations as torch's own counter finds in it, which is told of products that are added to
    a tensor: in bfloat16 and in float32, which have as many, up to how low-rank products stand
    together."""

    def added(_: list[int], a: list[int], b: list[int], **__: object) -> int:
        return 2 * a[0] * a[1] * b[1]

    flags = "--targets all --gradient_checkpointing --no-train_text_encoder".split()
    found = []
    for precision in ("bf16", "no"):
        words = ["data", "--model", "m", "--prompt", "p", "--mixed_precision", precision, *flags]
        config, pipeline = parse(words).resolve("sd1", 512), MetaPipeline.of_family(FAMILIES["sd1"])
        with FlopCounterMode(
            display=False, custom_mapping={torch.ops.aten.addmm_: added}
        ) as counter:
            count = count_step(config, pipeline, Shape(1, (640, 384)))
        assert count.flop == counter.get_total_flops() > 2e12
        found.append(count.flop)
    assert found[1] == pytest.approx(found[0], rel=0.01)


def test_captions_come_before_the_unet(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captions of text encoders that do not learn are encoded before any model is brought to the
    device for good: the encoders and the UNet are not there together."""
    order: list[str] = []

    def noted(module: object, name: str) -> None:
        own = getattr(module, name)

        def call(*args: object, **options: object) -> object:
            order.append(name)
            return own(*args, **options)

        monkeypatch.setattr(module, name, call)

    noted(setup, "prepare_models")
    noted(Caches, "fill_embeddings")
    data = images(tmp_path / "data", 4)
    prepare(text_to_image(tiny_sd1, data, tmp_path / "o"))
    assert order == ["fill_embeddings", "prepare_models"]
    order.clear()
    prepare(text_to_image(tiny_sd1, data, tmp_path / "p", train_text_encoder=True))
    assert order == ["prepare_models"]


def test_least_time_is_the_roofline() -> None:
    """Closed form: 2 TFLOP at 10 TFLOP/s, beside fewer bytes, take 0.2 s; 100 GB at 400 GB/s,
    beside few operations, 0.25 s; and the optimiser's 20 GB, read and written, 0.1 s. In float32
    the product takes 2 s."""
    card = Card("one", 8, half=10, full=1, bandwidth=400)
    step = StepBytes(0, 20 * 10**9, 0, [(2 * 10**12, 10**9), (10**9, 100 * 10**9)], False)
    assert card.least_seconds(step, "bf16") == pytest.approx(0.2 + 0.25 + 0.1)
    assert card.least_seconds(step, "no") == pytest.approx(2 + 0.25 + 0.1)


def test_names_of_cards() -> None:
    """Case, spaces and maker do not matter; a size alone is its slowest card; a name of several
    cards, and one that is near, are answered with names."""
    for name in ("rtx3060", "NVIDIA GeForce RTX 3060", "RTX 3060 12 GB"):
        assert card_named(name) is CARDS["RTX 3060 12GB"]
    assert (card_named("8 GB").memory, card_named("8gb").half) == (8, CARDS["RTX 3050 8GB"].half)
    with pytest.raises(UsageError, match="several .* A100 40GB, A100 80GB"):
        card_named("A100")
    with pytest.raises(UsageError, match="RTX 4090 24GB"):
        card_named("RTX 4099")


def test_a_run_is_predicted_on_a_card(tiny_sd1: Path, tmp_path: Path) -> None:
    """A card with room for the largest step fits it as it is; one with room for that step with
    checkpointing alone is told the flag; for one with less than the reserve no flag is enough. The
    counts are those of `count_step`, and each bucket's time counts by its share of samples."""
    data = images(tmp_path / "data", 6, (128, 64))
    config = text_to_image(tiny_sd1, data, tmp_path / "o", resolution=128)

    def predicted(memory: float) -> str:
        checked = check(config, page=False, card=Card("one", memory, 10, 10, 400))
        assert checked.prediction
        found.append(checked.prediction)
        return checked.rows["card"]

    found: list = []
    assert predicted(24).startswith("fits one: a step takes 1.")
    prediction = found[0]
    ((plain, spared),) = prediction.steps.values()
    assert prediction.seconds == plain.seconds < spared.seconds
    count = count_step(
        prediction.config, base_of(config).meta_pipeline, Shape(4, *prediction.steps)
    )
    assert plain.peak - GIB == count.peak
    assert "with --gradient_checkpointing (a third slower) it takes" in predicted(spared.peak / GIB)
    assert predicted(1).endswith("no flags here are enough")
    assert [p.numbers()["fits"] for p in found] == [True, False, False]


def test_samples_are_predicted_on_a_card(tiny_sd1: Path, tmp_path: Path) -> None:
    """Where a step fits a card and a sample beside its weights and states does not, the answer says
    so with the flag, and a script is told that the run does not fit; with it the run does. The
    bytes are those of the VAE's decoder, counted alone, or of the text encoder if that is larger,
    and of the step's weights."""
    data = images(tmp_path / "data", 1)  # whose encoding takes less than a step
    config = text_to_image(
        tiny_sd1, data, tmp_path / "o", num_validation_images=1, validation_prompt="a thing",
        train_batch_size=1, gradient_checkpointing=True,
    )  # fmt: skip
    (drawn, step), found = (0, 0), []
    for memory in (24.0, 0.0):
        room = memory or (step + drawn) / 2 / GIB
        for number in (1, 0):
            card = Card("one", room, 10, 10, 400)
            checked = check(
                config.replace(
                    num_validation_images=number,
                    validation_prompt="a thing" if number else None,
                ),
                page=False, card=card,
            )  # fmt: skip
            assert checked.prediction
            found.append((checked.prediction.numbers()["fits"], checked.rows["card"]))
            if number and memory:
                others = checked.prediction.others
                drawn, step = others["drawing sample images"], checked.prediction.peak
                count = count_step(
                    checked.prediction.config, base_of(config).meta_pipeline, Shape(1, (64, 64))
                )
                parts = base_of(config).load()
                x = torch.empty(1, 4, 8, 8, device="meta")
                decoding = count_vae(parts.vae.to("meta"), lambda vae, x=x: vae.decode(x))
                encoding = sum(p.nbytes for p in parts.text_encoders["text_encoder"].parameters())
                beside = max(decoding, encoding)
                assert drawn == count.frozen + count.trained + beside + RESERVE > step
    assert [fits for fits, _ in found] == [True, True, False, True]
    assert ". Drawing sample images takes " in found[2][1]
    assert found[2][1].endswith("add --num_validation_images 0")
    assert all("samples" not in text for _, text in (found[0], found[1], found[3]))


@pytest.mark.parametrize(
    ("kind", "options", "encodes"),
    [
        ("sd1", {}, False),
        ("sd1", {"cache_latents": "no"}, True),
        ("sd1", {"center_crop": False, "resolution": 32}, True),
        ("sd1-inpainting", {}, True),
    ],
)
def test_steps_that_encode_have_the_vae_beside_them(
    kind: str, options: dict[str, object], encodes: bool, tiny: Any, tmp_path: Path
) -> None:
    """Without a cache, with random crops and for an inpainting UNet, a step is told with the VAE's
    weights beside what is counted of it; with cached latents it is not."""
    config = text_to_image(
        tiny(kind), images(tmp_path / "data", 2, (64, 96)), tmp_path / "o", **options
    )
    prediction = check(config, page=False, card=Card("one", 24, 10, 10, 400)).prediction
    assert prediction
    base = base_of(config)
    vae = sum(p.nbytes for p in base.load().vae.parameters())
    count = count_step(prediction.config, base.meta_pipeline, Shape(4, *prediction.steps))
    assert prediction.peak == count.peak + RESERVE + vae * encodes


def test_the_peak_is_that_of_the_system() -> None:
    """On a CPU the peak is what the system tells of the process by another call, and stays when
    memory is given back; of a device without a count there is none."""
    resource = pytest.importorskip("resource")
    if not Path("/proc/self/status").exists():
        pytest.skip("Linux tells it")
    cpu = torch.device("cpu")
    before = peak_of(cpu)
    held = torch.ones((before + 2**28) // 4)  # more than the process has ever had
    del held
    most = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert peak_of(cpu) == pytest.approx(most, rel=0.01)
    assert peak_of(cpu) > before + 2**28
    assert peak_of(torch.device("meta")) == 0
