"""A run on a base whose linear layers are stored in few bits; the layers themselves are proved in
tests/adapters/test_quantized.py, the count of their memory in test_memory.py."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sd_lora
from sd_lora.adapters.inject import adapted_layers
from sd_lora.errors import UsageError
from sd_lora.models.quantized_base import QuantizedLinear, quantize_base
from sd_lora.training.loop import LossLog, accumulate, train_steps
from sd_lora.training.setup import prepare
from sd_lora.training.sharding import check_even
from tests.training.runs import images, text_to_image

pytest.importorskip("bitsandbytes")

BITS = {"int8": (8, 32), "fp8": (8, 32), "nf4": (4, 0.5)}
"""Format → bits a weight, and bits of scales: a row, or of nf4 a weight, 32 for 64 of them."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images(tmp_path_factory.mktemp("images"), 4)


@pytest.mark.parametrize("form", BITS)
def test_a_run_on_a_smaller_base(form: str, tiny_sd1: Path, data: Path, tmp_path: Path) -> None:
    """The linear layers of the UNet's transformers take the bits of the format, and no other layer
    is stored so; the loss and its gradients are nearly those of the whole base; training leaves
    each stored byte as it was, and a run that is resumed ends in the digest of one that was not."""
    options = {"base_precision": form, "targets": "attention+conv", "rank": 2}
    config = text_to_image(tiny_sd1, data, tmp_path / "a", **options, max_train_steps=4)
    run, whole = prepare(config), prepare(config.replace(base_precision=None))
    unet = run.parts.unet
    stored = {n: m for n, m in unet.named_modules() if isinstance(m, QuantizedLinear)}
    plain = {
        n.replace(".base", "") for n, m in whole.parts.unet.named_modules()
        if type(m) is nn.Linear and "attentions" in n
    }  # fmt: skip
    assert {name.replace(".base", "") for name in stored} == plain
    assert any(".base" in name for name in stored)
    assert any(".base" not in name for name in stored)  # the feed-forward, which is not adapted
    bits, of_scale = BITS[form]
    for layer in stored.values():
        numel = layer.in_features * layer.out_features
        assert 8 * layer.weight.nbytes == bits * numel
        rows = numel if form == "nf4" else layer.out_features
        assert 8 * layer.scale.nbytes == of_scale * rows
    before = {name: layer.weight.clone() for name, layer in stored.items()}
    losses, gradients = [], []
    for one in (run, whole):
        losses.append(float(accumulate(one, 0, one.stream.batch(0), 0)))
        layers = adapted_layers(one.parts.unet)
        gradients.append(
            torch.cat([layer.delta.lora_B.grad.flatten() for layer in layers.values()])
        )
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert torch.cosine_similarity(*gradients, dim=0) > 0.98
    log = LossLog(run)
    train_steps(run, log)
    assert len(log.losses) == 4
    assert all(torch.equal(layer.weight, before[name]) for name, layer in stored.items())
    result = sd_lora.train(config.replace(output_dir=str(tmp_path / "c" / "a")))
    again = text_to_image(tiny_sd1, data, tmp_path / "b" / "a", **options, max_train_steps=2)
    sd_lora.train(again)
    more = again.replace(max_train_steps=4, resume_from_checkpoint="latest")
    resumed = sd_lora.train(more)
    assert resumed.digest == result.digest
    with pytest.raises(UsageError, match="base_precision"):
        sd_lora.train(more.replace(base_precision=None, max_train_steps=5))


def test_casts_leave_the_scales_alone() -> None:
    """A layer that is cast to bfloat16 computes with the values of the one that is not, rounded
    once: its scales are no float tensors, which a cast would round."""
    linear = nn.Linear(64, 32)
    model = nn.ModuleDict({"attentions": nn.ModuleList([linear]), "time": nn.Linear(4, 4)})
    quantize_base(model, "int8")
    (layer,) = model["attentions"]
    assert isinstance(layer, QuantizedLinear)
    assert type(model["time"]) is nn.Linear
    before = layer.whole()
    model.to(torch.bfloat16)
    assert torch.equal(layer.whole(), before)
    x = torch.randn(3, 64).bfloat16()
    want = F.linear(x, before.bfloat16()) + layer.bias
    assert torch.equal(layer(x), want)  # each weight is rounded once


def test_a_trained_bias_has_its_gradient() -> None:
    """Biases are trained in layers that are no target as well, whose bias alone is replaced: their
    gradient is that of the whole layer with the same weights."""
    torch.manual_seed(0)
    linears = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64)])
    model = nn.ModuleDict({"attentions": nn.Sequential(*linears)}).requires_grad_(False)
    quantize_base(model, "int8")
    whole = nn.Sequential(*(nn.Linear(64, 64).requires_grad_(False) for _ in linears))
    for own, stored in zip(whole, model["attentions"], strict=True):
        own.weight.copy_(stored.whole())
        own.bias.copy_(stored.bias)
    gradients = []
    for one in (model["attentions"], whole):
        sd_lora.inject(one, ["0"], rank=2, train_bias="all", seed=0)
        one(torch.ones(2, 64)).square().sum().backward()
        biases = [layer.deltas["bias"].diff for layer in adapted_layers(one).values()]
        assert len(biases) == 2
        gradients.append(torch.stack([bias.grad for bias in biases]))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_a_sharded_base_is_not_stored_so(tiny_sd1: Path, data: Path, tmp_path: Path) -> None:
    """FSDP2, which splits float weights among processes, refuses it with the way out."""
    config = text_to_image(tiny_sd1, data, tmp_path, base_precision="int8").resolve("sd1", 64)
    with pytest.raises(UsageError, match="base_precision stores weights as bytes.*launch with"):
        check_even(config, has_buckets=False, has_classes=False)
