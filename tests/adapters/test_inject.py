"""inject, eject, merge, targets and patterns on real UNets."""

import copy

import peft
import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

import sd_lora
from sd_lora.adapters.inject import adapted_layers
from sd_lora.adapters.targets import PRESETS, plan, select
from tests.tiny import build_text_encoder, build_tokenizer, build_unet


def inputs(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(2, 4, 8, 8, generator=g),
        "timestep": torch.tensor([10, 700]),
        "encoder_hidden_states": torch.randn(2, 77, 32, generator=g),
    }


def randomise(model: nn.Module) -> None:
    g = torch.Generator().manual_seed(1)
    for layer in adapted_layers(model).values():
        layer.lora_B.data.normal_(std=0.05, generator=g)


@pytest.mark.parametrize("targets", sorted(PRESETS.keys() - {"text"}))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_injected_unet_is_bit_identical(targets: str, dtype: torch.dtype) -> None:
    """Adapting any preset leaves the UNet's output as it was, bit for bit."""
    unet = build_unet().to(dtype).eval()
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs().items()}
    with torch.no_grad():
        before = unet(**batch).sample
        sd_lora.inject(unet, targets=targets, rank=4)
        assert torch.equal(unet(**batch).sample, before)


def test_injected_text_encoder_is_bit_identical() -> None:
    """The same for the text encoder's preset."""
    tokenizer = build_tokenizer()
    encoder = build_text_encoder(tokenizer).eval()
    ids = tokenizer("a photo of sks monster", return_tensors="pt").input_ids
    with torch.no_grad():
        before = encoder(ids)[0]
        assert len(sd_lora.inject(encoder, targets="text")) == 12
        assert torch.equal(encoder(ids)[0], before)


def test_merge_and_unmerge_on_a_unet() -> None:
    """Merged equals unmerged within 1e-5, and unmerging restores every parameter's bits."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        unet = build_unet().to(dtype).eval()
        before = copy.deepcopy(unet.state_dict())
        sd_lora.inject(unet, targets="all", rank=4)
        randomise(unet)
        if dtype == torch.float32:
            with torch.no_grad():
                y = unet(**inputs()).sample
                with sd_lora.merged(unet):
                    torch.testing.assert_close(unet(**inputs()).sample, y, rtol=1e-5, atol=1e-5)
                assert torch.equal(unet(**inputs()).sample, y)
        sd_lora.merge(unet)
        changed = [n for n, m in adapted_layers(unet).items() if m.is_merged]
        assert len(changed) == len(adapted_layers(unet))
        sd_lora.unmerge(unet)
        sd_lora.eject(unet)
        after = unet.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[k], before[k]) for k in before)


def test_merged_keeps_what_was_merged_before() -> None:
    """The context manager undoes its own merges only, also after an exception."""
    unet = build_unet()
    sd_lora.inject(unet)
    first, *others = adapted_layers(unet).values()
    first.merge()

    def stop() -> None:
        with sd_lora.merged(unet):
            assert all(layer.is_merged for layer in others)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stop()
    assert first.is_merged
    assert not any(layer.is_merged for layer in others)


def test_eject_gives_back_the_identical_objects() -> None:
    """After eject every module is the very object that was there before inject."""
    unet = build_unet()
    before = dict(unet.named_modules())
    names = sd_lora.inject(unet, targets="all")
    assert sd_lora.eject(unet) == names
    after = dict(unet.named_modules())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)


def test_gradients_reach_every_factor_and_only_factors() -> None:
    """lora_layers is a list of exactly the parameters that get a gradient."""
    unet = build_unet()
    sd_lora.inject(unet, targets="all", rank=2)
    randomise(unet)
    unet(**inputs()).sample.pow(2).sum().backward()
    layers = sd_lora.lora_layers(unet)
    assert isinstance(layers, list)
    assert len(layers) == 2 * len(adapted_layers(unet))
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layers)
    trained = {id(p) for p in layers}
    assert all(
        p.grad is None and not p.requires_grad for p in unet.parameters() if id(p) not in trained
    )


def test_a_shared_module_is_adapted_once() -> None:
    """A layer that a model holds under two names gets one adapter, and comes back under both."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = self.first

    model = Tied()
    base = model.first
    sd_lora.inject(model, targets=["first", "second"])
    assert model.first is model.second
    assert len(sd_lora.lora_layers(model)) == 2
    sd_lora.eject(model)
    assert model.first is base
    assert model.second is base


@pytest.mark.parametrize(
    ("layers", "heads", "linear", "cross", "counts"),
    [
        (
            2,
            8,
            False,
            768,
            {"attention": 128, "transformer": 192, "conv": 86, "transformer+conv": 278, "all": 282},
        ),
        (
            2,
            (5, 10, 20, 20),
            True,
            1024,
            {"attention": 128, "transformer": 192, "conv": 86, "transformer+conv": 278},
        ),
    ],
    ids=["sd15", "sd21"],
)
def test_counts_on_the_real_unets(
    layers: int, heads: object, linear: bool, cross: int, counts: dict[str, int]
) -> None:
    """Presets select the published number of modules on SD1.5's and SD2.1's real configurations."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            layers_per_block=layers,
            cross_attention_dim=cross,
            attention_head_dim=heads,
            use_linear_projection=linear,
        )
    assert {t: len(select(unet, t)) for t in counts} == counts


def test_counts_on_the_real_sdxl_unet() -> None:
    """The same for SDXL, and the parameters of attention at rank 4 are as many as peft's."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
    counts = {"attention": 560, "transformer": 722, "transformer+conv": 788, "all": 794}
    assert {t: len(select(unet, t)) for t in counts} == counts
    config = peft.LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    theirs = copy.deepcopy(unet)
    theirs.add_adapter(config)
    expected = sum(p.numel() for n, p in theirs.named_parameters() if "lora_" in n)
    sd_lora.inject(unet, targets="attention", rank=4)
    assert sum(p.numel() for p in sd_lora.lora_layers(unet)) == expected


@pytest.mark.parametrize(("hidden", "layers", "count"), [(768, 12, 72), (1024, 23, 138)])
def test_counts_on_the_real_text_encoders(hidden: int, layers: int, count: int) -> None:
    """The text preset selects six linears a layer of SD1's and SD2's encoders."""
    with torch.device("meta"):
        encoder = CLIPTextModel(CLIPTextConfig(hidden_size=hidden, num_hidden_layers=layers))
    assert len(select(encoder, "text")) == count


def test_rank_and_alpha_patterns_follow_peft() -> None:
    """Patterns match the end of a name at a dot, the first one wins, as in peft; conv_rank means
    kernels above 1×1; alpha follows the rank unless it is given."""
    unet = build_unet()
    ranks = {"mid_block.*to_q": 7, "to_q": 5}
    planned = {
        t.name: t
        for t in plan(unet, "all", 4, conv_rank=2, rank_pattern=ranks, alpha_pattern={"conv1": 9})
    }
    config = peft.LoraConfig(r=4, rank_pattern=ranks, target_modules=["to_q", "to_k"])
    theirs = copy.deepcopy(unet)
    theirs.add_adapter(config)
    seen = 0
    for name, module in theirs.named_modules():
        if hasattr(module, "lora_A"):
            assert planned[name].rank == module.r["default"], name
            seen += 1
    assert seen > 10
    resnet = "down_blocks.0.resnets.0"
    assert (planned[f"{resnet}.conv2"].rank, planned[f"{resnet}.conv2"].alpha) == (2, 2)
    assert (planned[f"{resnet}.conv1"].rank, planned[f"{resnet}.conv1"].alpha) == (2, 9)
    assert planned[f"{resnet}.time_emb_proj"].rank == 4


def test_initial_factors_depend_on_seed_and_name_only() -> None:
    """A module's A is the same whatever else is adapted, and another for another seed."""
    a, b, c = build_unet(), build_unet(), build_unet()
    sd_lora.inject(a, targets="attention", seed=3)
    sd_lora.inject(b, targets="all", seed=3)
    sd_lora.inject(c, targets="attention", seed=4)
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    assert torch.equal(a.get_submodule(name).lora_A, b.get_submodule(name).lora_A)
    assert not torch.equal(a.get_submodule(name).lora_A, c.get_submodule(name).lora_A)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": "attentoin"}, "Did you mean attention"),
        ({"targets": "attention+down_blocks.9.*"}, "matches no module"),
        ({"targets": "conv_norm_out"}, "GroupNorm"),
        ({"targets": "(["}, "not a regular expression"),
        ({"rank": 0}, "rank"),
        ({"rank_pattern": {"nothing_here": 4}}, "rank_pattern 'nothing_here' matches none"),
        ({"alpha_pattern": {"nor_here": 4.0}}, "alpha_pattern 'nor_here' matches none"),
        ({"dropout": 1.5}, "probability"),
        ({"conv_rank": 4}, "none of the .* target modules is one: add the preset conv"),
    ],
)
def test_bad_requests_name_themselves(options: dict, message: str) -> None:
    """What cannot be meant is refused with its name, and the model is left as it was."""
    unet = build_unet()
    with pytest.raises(sd_lora.UsageError, match=message):
        sd_lora.inject(unet, **options)
    assert not adapted_layers(unet)
    assert all(p.requires_grad for p in unet.parameters())


def test_injecting_twice_is_refused() -> None:
    """A second inject would stack adapters; it says what to do instead."""
    unet = build_unet()
    sd_lora.inject(unet)
    with pytest.raises(sd_lora.UsageError, match="has adapters already"):
        sd_lora.inject(unet)


def test_state_dict_round_trip_and_its_refusals() -> None:
    """Saving and loading is the identity; another shape or key changes nothing."""
    a, b, c = build_unet(), build_unet(), build_unet()
    sd_lora.inject(a, targets="attention+conv", rank=3, alpha=5.0)
    randomise(a)
    state = sd_lora.lora_state_dict(a)
    sd_lora.inject(b, targets="attention+conv", rank=3)
    sd_lora.load_lora_state_dict(b, state)
    loaded = sd_lora.lora_state_dict(b)
    assert all(torch.equal(loaded[k], state[k]) for k in state)
    sd_lora.inject(c, targets="attention", rank=3)
    before = sd_lora.lora_state_dict(c)
    with pytest.raises(sd_lora.UsageError, match="the file has"):
        sd_lora.load_lora_state_dict(c, state)
    short = {k: v[:1] if k.endswith("lora_A") else v for k, v in before.items()}
    with pytest.raises(sd_lora.UsageError, match="was the rank changed"):
        sd_lora.load_lora_state_dict(c, short)
    after = sd_lora.lora_state_dict(c)
    assert all(torch.equal(after[k], before[k]) for k in before)
