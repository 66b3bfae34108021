"""Adapters in models of other families: language, music, video; and torch's own transformer."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    UNet1DModel,
    UNet3DConditionModel,
    UNetMotionModel,
    UNetSpatioTemporalConditionModel,
)
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)
from transformers.pytorch_utils import Conv1D

import sd_lora
from sd_lora.adapters.inject import adapted_layers
from tests.adapters.layers import RULES, randomise_model

Made = tuple[nn.Module, tuple[Tensor, ...]]


def mlp() -> Made:
    return nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 3)), (torch.randn(5, 6),)


def roberta() -> Made:
    config = RobertaConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=50,
        max_position_embeddings=20,
    )
    return RobertaForSequenceClassification(config), (torch.randint(3, 50, (2, 6)),)


def gpt2() -> Made:
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=16, **ends)
    return GPT2LMHeadModel(config), (torch.randint(0, 40, (2, 6)),)


def music() -> Made:
    model = UNet1DModel(
        sample_size=32, extra_in_channels=64, block_out_channels=(32, 32, 64), layers_per_block=1
    )
    return model, (torch.randn(1, 2, 32), torch.tensor([3]))


VIDEO: dict[str, Any] = {
    "sample_size": 8,
    "layers_per_block": 1,
    "cross_attention_dim": 8,
}


def video() -> Made:
    model = UNet3DConditionModel(
        **VIDEO,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        attention_head_dim=4,
        norm_num_groups=4,
    )
    return model, (torch.randn(1, 4, 3, 8, 8), torch.tensor([3]), torch.randn(1, 5, 8))


def animation() -> Made:
    model = UNetMotionModel(
        **VIDEO,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        num_attention_heads=2,
        motion_num_attention_heads=2,
        norm_num_groups=4,
    )
    return model, (torch.randn(1, 4, 3, 8, 8), torch.tensor([3]), torch.randn(3, 5, 8))


def stable_video() -> Made:
    model = UNetSpatioTemporalConditionModel(
        **VIDEO,
        block_out_channels=(32, 32),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        num_attention_heads=(2, 2),
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=12,
        num_frames=2,
    )
    sample, context = torch.randn(1, 2, 8, 8, 8), torch.randn(1, 3, 8)
    return model, (sample, torch.tensor([3]), context, torch.randn(1, 3))


MODELS: dict[str, Callable[[], Made]] = {
    "mlp": mlp,
    "roberta": roberta,
    "gpt2": gpt2,
    "UNet1DModel": music,
    "UNet3DConditionModel": video,
    "UNetMotionModel": animation,
    "UNetSpatioTemporalConditionModel": stable_video,
}
ADAPTABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, Conv1D)
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "DoRA": {"rule": "decompose"},
    "loha": {"method": "loha"},
    "lokr": {"method": "lokr", "factor": 2},
    "oft": {"method": "oft"},
    "full": {"method": "full", "train_bias": "all"},
}
OTHER = {  # besides lora, each model has one more
    "mlp": "full",
    "roberta": "DoRA",
    "gpt2": "loha",
    "UNet1DModel": "lokr",
    "UNet3DConditionModel": "DoRA",
    "UNetMotionModel": "loha",
    "UNetSpatioTemporalConditionModel": "oft",
}
CELLS = [(name, variant) for name in MODELS for variant in ("lora", OTHER[name])]


def made(name: str) -> Made:
    """Returns the model, frozen, in float64 and eval, with its inputs."""
    torch.manual_seed(0)
    model, args = MODELS[name]()
    args = tuple(x.double() if x.is_floating_point() else x for x in args)
    return model.double().eval().requires_grad_(False), args


def out(model: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
    y = model(*args)
    return y if isinstance(y, Tensor) else y[0]


@pytest.mark.parametrize(("name", "variant"), CELLS)
def test_every_adaptable_layer_of_any_model(name: str, variant: str) -> None:
    """With a delta on every adaptable layer: the first output is the base's bit for bit; every
    trained tensor gets a gradient and nothing else does; merged is the same function to 1e-10;
    the state makes it of a fresh model; ejecting gives the base back bit for bit."""
    model, args = made(name)
    before = out(model, args)
    layers = [n for n, module in model.named_modules() if type(module) in ADAPTABLE]
    names = sd_lora.inject(model, ".*", rank=2, alpha=3.0, **VARIANTS[variant])
    if variant != "full":
        assert names == layers
    with torch.no_grad():
        assert torch.equal(out(model, args), before)
    randomise_model(model, 0.05)
    y = out(model, args)
    assert (y - before).norm() > 1e-3 * before.norm()
    y.pow(2).sum().backward()
    trained = sd_lora.lora_layers(model)
    ids = {id(p) for p in trained}
    dead = {n for n, p in model.named_parameters() if id(p) in ids and not p.grad.abs().sum() > 0}
    assert not dead
    assert all(p.grad is None for p in model.parameters() if id(p) not in ids)
    with torch.no_grad():
        with sd_lora.merged(model):
            torch.testing.assert_close(out(model, args), y, rtol=1e-10, atol=1e-10)
        fresh, _ = made(name)
        sd_lora.load_lora_state_dict(fresh, sd_lora.lora_state_dict(model))
        torch.testing.assert_close(out(fresh, args), y, rtol=1e-12, atol=1e-12)
        assert set(sd_lora.eject(model)) >= set(names)
        assert torch.equal(out(model, args), before)


def test_robertas_published_count() -> None:
    """LoRA of rank 8 on query and value of roberta-base trains the 294,912 parameters that peft's
    and the paper's experiments count (0.3 M): 12 layers × 2 × 8 × (768 + 768)."""
    with torch.device("meta"):
        model = RobertaForSequenceClassification(
            RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
        )
    names = sd_lora.inject(model, [r".*\.(query|value)"], rank=8)
    assert len(names) == 24
    trained = sd_lora.lora_layers(model)
    assert sum(p.numel() for p in trained) == 294_912 == 12 * 2 * 8 * (768 + 768)
    assert {p.device.type for p in trained} == {"meta"}


ENCODER: dict[str, dict[str, Any]] = {
    "attention": {"targets": [".*self_attn"]},
    "attention, DoRA": {"targets": [".*self_attn"], "rule": "decompose"},
    "linear": {"targets": [".*linear[12]"]},
    "all": {"targets": [".*"], "method": "full", "train_bias": "all"},
}


@pytest.mark.parametrize("case", ENCODER)
@pytest.mark.parametrize("whole", [False, True], ids=["layer", "encoder"])
@pytest.mark.parametrize("bias", [True, False], ids=["", "no bias"])
def test_torchs_transformer_does_not_bypass_adapters(case: str, whole: bool, bias: bool) -> None:
    """In eval without gradients nn.TransformerEncoderLayer calls its own kernel with the weights it
    reads off its layers, and nn.TransformerEncoder packs a padded batch into a nested tensor for
    it: both compute what training computes, with the deltas, and as merged."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, bias=bias)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=bias) if whole else layer
    model = nn.Sequential(encoder).eval()
    x, padding = torch.randn(2, 5, 8), torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]).bool()
    kept = ~padding
    with torch.no_grad():
        before = model[0](x, src_key_padding_mask=padding)
    sd_lora.inject(model, rank=2, **ENCODER[case])
    with torch.no_grad():
        first = model[0](x, src_key_padding_mask=padding)
    torch.testing.assert_close(first[kept], before[kept], rtol=1e-5, atol=1e-5)
    randomise_model(model, 0.2)
    y = model[0](x, src_key_padding_mask=padding)
    assert y.requires_grad
    assert not torch.allclose(y[kept], before[kept], atol=1e-2)
    with torch.no_grad():
        fast = model[0](x, src_key_padding_mask=padding)
        torch.testing.assert_close(fast[kept], y[kept], rtol=1e-5, atol=1e-5)
        with sd_lora.merged(model):
            merged = model[0](x, src_key_padding_mask=padding)
        torch.testing.assert_close(merged[kept], y[kept], rtol=1e-5, atol=1e-5)


def test_training_a_tiny_model_learns() -> None:
    """Each method, alone, learns what a frozen random model cannot: its loss falls by more than
    half in sixty steps of AdamW, for both rules."""
    for variant in ({}, {"method": "lora_fa"}, {"method": "loha"}, {"method": "lokr", "factor": 2}):
        for rule in RULES:
            torch.manual_seed(0)
            model, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), torch.randn(6, 8)
            target = torch.randn(6, 8)
            sd_lora.inject(model, ["0", "2"], rank=2, rule=rule, **variant)
            optimizer = torch.optim.AdamW(sd_lora.lora_layers(model), lr=0.05)
            losses = []
            for _ in range(60):
                loss = (model(x) - target).pow(2).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(float(loss))
            assert losses[-1] < 0.5 * losses[0], (variant, rule)
            assert len(adapted_layers(model)) == 2
