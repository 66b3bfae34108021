"""inject, eject, merge, targets and patterns, biases and whole modules, refusals."""

import copy
import inspect
from collections.abc import Callable

import loralib
import peft
import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import sd_lora
from sd_lora.adapters.inject import adapted_layers
from sd_lora.adapters.targets import PRESETS, plan, select
from tests.adapters.layers import randomise_model
from tests.tiny import build_text_encoder, build_tokenizer, build_unet


def inputs(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(2, 4, 8, 8, generator=g),
        "timestep": torch.tensor([10, 700]),
        "encoder_hidden_states": torch.randn(2, 77, 32, generator=g),
    }


@pytest.mark.parametrize(
    "targets", sorted(PRESETS.keys() - {"text", "blora_content", "blora_style"})
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_injected_unet_is_bit_identical(targets: str, dtype: torch.dtype) -> None:
    """Adapting any preset leaves the UNet's output as it was, bit for bit; B-LoRA's blocks are of
    SDXL, and test_real_sizes.py has them."""
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
        randomise_model(unet)
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
    randomise_model(unet)
    unet(**inputs()).sample.pow(2).sum().backward()
    layers = sd_lora.lora_layers(unet)
    assert isinstance(layers, list)
    assert len(layers) == 2 * len(adapted_layers(unet))
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layers)
    trained = {id(p) for p in layers}
    assert all(
        p.grad is None and not p.requires_grad for p in unet.parameters() if id(p) not in trained
    )


@pytest.mark.parametrize(
    ("method", "options"),
    [(method, {}) for method in ("lora", "lora_fa", "loha", "lokr", "full")]
    + [("oft", {"block_size": 4}), ("lora", {"rule": "decompose"}), ("lora", {"init": "pissa"})],
)
def test_adapters_are_where_their_layers_are(method: str, options: dict[str, object]) -> None:
    """Adapters made where tensors are made on another device by themselves, as in
    `with torch.device("cuda")`, are on their layers' device, with the numbers of others."""
    found = []
    for device in ("cpu", "meta"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 16), nn.Conv2d(16, 16, 3))
        with torch.device(device):
            sd_lora.inject(model, ["0", "1"], rank=4, seed=1, method=method, **options)
        found.append([*model.state_dict().values()])
    for mine, theirs in zip(*found, strict=True):
        assert mine.device == torch.device("cpu")
        assert torch.equal(mine, theirs)


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
    for given, alphas in (
        ({}, (16, 16)),  # linear layers, convolutions
        ({"conv_alpha": 3}, (16, 3)),
        ({"conv_rank": 2}, (16, 2)),
        ({"conv_rank": 2, "conv_alpha": 3}, (16, 3)),
    ):
        planned = {t.name: t.alpha for t in plan(unet, "conv", 4, 16, **given)}
        names = (f"{resnet}.time_emb_proj", f"{resnet}.conv1")
        assert tuple(planned[name] for name in names) == alphas


def test_initial_factors_depend_on_seed_and_name_only() -> None:
    """A module's A is the same whatever else is adapted, and another for another seed or module."""
    a, b, c = build_unet(), build_unet(), build_unet()
    sd_lora.inject(a, targets="attention", seed=3)
    sd_lora.inject(b, targets="all", seed=3)
    sd_lora.inject(c, targets="attention", seed=4)
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    assert torch.equal(a.get_submodule(name).delta.lora_A, b.get_submodule(name).delta.lora_A)
    assert not torch.equal(a.get_submodule(name).delta.lora_A, c.get_submodule(name).delta.lora_A)
    other = name.replace("to_q", "to_k")
    assert not torch.equal(a.get_submodule(name).delta.lora_A, a.get_submodule(other).delta.lora_A)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": "attentoin"}, "'attentoin' matches no module.*Did you mean attention"),
        ({"targets": "attention+down_blocks.9.*"}, "matches no module"),
        ({"targets": "conv_norm_out"}, "GroupNorm"),
        ({"targets": "(["}, "not a regular expression"),
        ({"rank": 0}, "rank"),
        ({"alpha": 0}, "the alpha of .* is 0; it must be above 0"),
        ({"alpha_pattern": {"to_q": -1.0}}, "the alpha of .*to_q is -1; it must be above 0"),
        ({"rank_pattern": {"nothing_here": 4}}, "rank_pattern 'nothing_here' matches none"),
        ({"alpha_pattern": {"nor_here": 4.0}}, "alpha_pattern 'nor_here' matches none"),
        ({"dropout": 1.5}, "dropout must be a probability"),
        ({"module_dropout": -0.1}, "module_dropout must be a probability"),
        ({"method": "lroa"}, "unknown method 'lroa'.*Did you mean lora"),
        ({"method": "dora"}, "unknown method 'dora'.*For DoRA, use"),
        ({"rule": "decomposed"}, "rule must be add or decompose"),
        ({"rule_pattern": {"to_q": "dora"}}, r"rule must be add or decompose \(DoRA\), not 'dora'"),
        ({"rule_pattern": {"to_u": "add"}}, "rule_pattern 'to_u' matches none"),
        ({"rnak": 8}, "lora has no option 'rnak'. Did you mean rank"),
        ({"targets": ["to_q"]}, r"matches no module.* 14 names end so: r'\.\*\\\.to_q'"),
        ({"targets": peft.LoraConfig()}, "targets are presets and patterns, and LoraConfig is"),
        ({"tuckr": True}, "lora has no option 'tuckr'.*Did you mean tucker"),
        ({"method": "lokr", "factr": 4}, "lokr has no option 'factr'.*Did you mean factor"),
        ({"weight": torch.zeros(1)}, "lora has no option 'weight'"),
        (
            {"method": "full", "rank_dropout": 0.1},
            "rank_dropout drops ranks, and the method full has none",
        ),
        ({"train_bias": "some"}, "train_bias must be none, lora_only or all"),
        ({"modules_to_save": ["conv_norm_uot"]}, "modules_to_save 'conv_norm_uot' matches none"),
        (
            {"modules_to_save": ["mid_block"]},
            "mid_block.*to_q is both a target and in modules_to_save",
        ),
        ({"conv_rank": 4}, "none is among the .* target modules: add the preset conv"),
    ],
)
def test_bad_requests_name_themselves(options: dict, message: str) -> None:
    """What cannot be meant is refused with its name, and the model is left as it was."""
    unet = build_unet()
    with pytest.raises(sd_lora.UsageError, match=message):
        sd_lora.inject(unet, **options)
    assert not adapted_layers(unet)
    assert all(p.requires_grad for p in unet.parameters())


TOLD = {
    "r": 2,
    "lora_alpha": 3,
    "target_modules": ["first", "bias.0"],
    "lora_dropout": 0.1,
    "init_lora_weights": "gaussian",
    "bias": "all",
    "use_dora": True,
    "use_rslora": True,
    "use_effective_conv2d": True,
    "network_dropout": 0.1,
    "algo": "locon",
    "rs_lora": False,
    "decompose_factor": 2,
    "lokr_full_matrix": True,
    "lokr_decompose_both": True,
    "conv_dim": 2,
    "preset": "conv",
    "fan_in_fan_out": False,
}
"""Another library's option → a value of it."""


class Few(nn.Module):
    """Names that end alike: `first`, `pre_first`, `bias.0` and `biasx0`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 4)
        self.pre_first = nn.Linear(4, 4)
        self.bias = nn.Sequential(nn.Linear(4, 4))
        self.biasx0 = nn.Linear(4, 4)
        self.inner = nn.ModuleDict({"first": nn.Linear(4, 4)})


def test_options_of_other_libraries_are_told_by_our_names() -> None:
    """One error has them all, and what it says are arguments of inject. With those for peft's
    configuration the same modules are adapted, at the same scale and by the same rule."""
    with pytest.raises(sd_lora.UsageError) as refusal:
        sd_lora.inject(Few(), **TOLD)
    lines = str(refusal.value).splitlines()
    said = {
        line.partition("=")[0]: line.partition(" is ")[2].removesuffix(" here") for line in lines
    }
    assert said.keys() == TOLD.keys()
    kept = {name for name, text in said.items() if text.endswith("leave it out")}
    assert kept == {"rs_lora", "fan_in_fan_out"}
    ours = {name: eval(f"dict({text})") for name, text in said.items() if name not in kept}
    arguments = inspect.signature(sd_lora.inject).parameters.keys()
    options = {"tucker", "factor", "full_matrix", "decompose_both"}
    assert all(given.keys() <= arguments | options for given in ours.values())
    names = ("r", "lora_alpha", "target_modules", "use_dora", "use_rslora")
    theirs = peft.get_peft_model(Few(), peft.LoraConfig(**{name: TOLD[name] for name in names}))
    model, options = Few(), {}
    for name in names:
        options |= ours[name]
    adapted = sd_lora.inject(model, **options)
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in theirs.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }
    assert {*adapted} == layers.keys() == {"first", "inner.first", "bias.0"}
    for name, layer in adapted_layers(model).items():
        assert layer.delta.scale == pytest.approx(layers[name].scaling["default"])
        assert layer.delta.magnitude is not None


def linear(n: int, m: int, **more: object) -> nn.Module:
    return nn.Sequential(nn.Linear(n, m, **more))


class OwnBias(nn.Module):
    """A model that holds a bias by itself, and a layer with parameters inside another."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(4))
        self.inner = nn.Module()
        self.inner.token = nn.Parameter(torch.zeros(4))
        self.inner.proj = nn.Linear(4, 4)
        self.last = nn.Linear(4, 4)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: linear(4, 4), {"method": "loha", "neuron_dropout": 0.1}, "0: neuron_dropout"),
        (lambda: linear(4, 4), {"rule": "decompose", "neuron_dropout": 0.1}, "0: neuron_dropout"),
        (lambda: linear(4, 4), {"init": "pissa", "neuron_dropout": 0.1}, "0: .* keep those of A₀"),
        (
            lambda: nn.Sequential(nn.MultiheadAttention(8, 2)),
            {"neuron_dropout": 0.1},
            "0: neuron_dropout",
        ),
        (
            lambda: nn.Sequential(nn.MultiheadAttention(8, 2)),
            {"dropout": 0.1},
            "0: dropout: a MultiheadAttention has no input elements to drop",
        ),
        (
            lambda: nn.Sequential(nn.Embedding(5, 4)),
            {"dropout": 0.1},
            "0: dropout: a Embedding has no input elements to drop",
        ),
        (
            lambda: nn.Sequential(nn.Embedding(6, 4, padding_idx=1)),
            {"method": "lokr"},
            "0: lokr cannot leave out one row",
        ),
        (
            lambda: nn.Sequential(nn.Embedding(5, 4, sparse=True)),
            {},
            "0: an Embedding with sparse=True",
        ),
        (
            lambda: nn.Sequential(torch.nn.utils.spectral_norm(nn.Linear(4, 4))),
            {},
            "0: the weight of this Linear is no parameter",
        ),
        (
            lambda: nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))),
            {},
            "matches only ParametrizedLinear",
        ),
        (
            lambda: nn.Sequential(nn.modules.linear.NonDynamicallyQuantizableLinear(4, 4)),
            {},
            "matches only NonDynamicallyQuantizableLinear",
        ),
        (lambda: nn.Sequential(nn.GroupNorm(2, 4)), {}, "matches only GroupNorm"),
        (
            lambda: nn.Sequential(nn.GroupNorm(2, 4, affine=False)),
            {"method": "full"},
            "0: this GroupNorm has no weight",
        ),
        (
            lambda: nn.Sequential(nn.GroupNorm(2, 4)),
            {"method": "full", "rule": "decompose"},
            "0: the rule decompose scales the rows of a matrix",
        ),
        (
            OwnBias,
            {"targets": ["last"], "train_bias": "all"},
            "OwnBias itself has parameters to train",
        ),
        (
            OwnBias,
            {"targets": ["last"], "modules_to_save": ["inner"]},
            "inner and inner.proj, a module inside it",
        ),
    ],
)
def test_impossible_layers_name_themselves(
    make: Callable[[], nn.Module], options: dict, message: str
) -> None:
    """What a layer cannot do exactly is refused with its name and the reason, before anything in
    the model is changed: the same modules, the same gradients wanted, the same values."""
    model = make()
    before = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    with pytest.raises(sd_lora.UsageError, match=message):
        sd_lora.inject(model, **({"targets": ["0"]} | options))
    after = dict(model.named_modules()), model.state_dict()
    assert after[0].keys() == before[0].keys()
    assert all(after[0][name] is before[0][name] for name in before[0])
    assert all(torch.equal(after[1][key], before[1][key]) for key in before[1])
    assert all(p.requires_grad for p in model.parameters())


def test_a_layer_by_itself_has_no_place_to_eject_from() -> None:
    """eject and a state's loading replace modules inside a model; at its root they say so instead
    of hanging the model into itself."""
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer)
    sd_lora.inject(model, ["0"])
    with pytest.raises(sd_lora.UsageError, match="take its `base`"):
        sd_lora.eject(model[0])
    state = {k.removeprefix("0"): t for k, t in sd_lora.lora_state_dict(model).items()}
    with pytest.raises(sd_lora.UsageError, match="Linear itself has parameters"):
        sd_lora.load_lora_state_dict(nn.Linear(4, 4), state)


def roberta() -> RobertaForSequenceClassification:
    torch.manual_seed(0)
    config = RobertaConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=50,
        max_position_embeddings=20,
    )
    return RobertaForSequenceClassification(config).eval()


def trained_names(model: nn.Module) -> set[str]:
    """Returns what is trained: `layer.lora_A` of low-rank deltas, the parameter's name of full
    ones; and asserts that this is what `lora_layers` gives and what wants a gradient."""
    names, trained = set(), set()
    for name, layer in adapted_layers(model).items():
        for path, delta in layer.deltas_by_path().items():
            trained |= {id(p) for p in delta.parameters()}
            if delta.method == "full":
                names.add(f"{name}.{path}")
            else:
                names |= {f"{name}.{n}" for n, _ in delta.named_parameters()}
    assert {id(p) for p in sd_lora.lora_layers(model)} == trained
    assert {id(p) for p in model.parameters() if p.requires_grad} == trained
    return names


SAVED = ["classifier", "embeddings.LayerNorm", "token_type_embeddings"]


@pytest.mark.parametrize("saved", [[], SAVED], ids=["", "modules_to_save"])
@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_biases_and_whole_modules_are_those_of_peft(bias: str, saved: list[str]) -> None:
    """train_bias and modules_to_save (a classifier head, a norm, an embedding) train exactly the
    parameters that peft trains."""
    ours = roberta()
    config = peft.LoraConfig(
        r=2, target_modules=["query", "value"], bias=bias, modules_to_save=saved or None
    )
    theirs = peft.get_peft_model(copy.deepcopy(ours), config)
    want = {name for name, p in theirs.named_parameters() if p.requires_grad}
    for part in ("base_model.model.", ".base_layer", ".default", ".modules_to_save"):
        want = {name.replace(part, "") for name in want}
    want = {name.removesuffix(".weight") if "lora_" in name else name for name in want}
    sd_lora.inject(ours, [r".*\.(query|value)"], rank=2, train_bias=bias, modules_to_save=saved)
    assert trained_names(ours) == want


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_biases_are_those_of_loralib(bias: str) -> None:
    """The same for loralib's mark_only_lora_as_trainable, with norms, a convolution and an LSTM,
    whose biases are called bias_ih_l0 and so on."""

    def model(first: nn.Module) -> nn.ModuleDict:
        parts = {"first": first, "norm": nn.LayerNorm(4), "conv": nn.Conv2d(4, 4, 1)}
        return nn.ModuleDict(parts | {"bare": nn.Linear(4, 4, bias=False), "rnn": nn.LSTM(4, 4)})

    theirs, ours = model(loralib.Linear(4, 4, r=2)), model(nn.Linear(4, 4))
    loralib.mark_only_lora_as_trainable(theirs, bias)
    sd_lora.inject(ours, ["first"], rank=2, train_bias=bias)
    want = {name for name, p in theirs.named_parameters() if p.requires_grad}
    assert trained_names(ours) == want


def test_biases_and_whole_modules_train_and_come_back() -> None:
    """The first output is the base's bit for bit; a step of training moves every delta and no
    bit of the base; the state reloads into a bare model, merges, and ejecting gives the base."""
    model, twin, fresh = roberta(), roberta().requires_grad_(False), roberta()
    before = copy.deepcopy(model.state_dict())
    ids = torch.randint(3, 50, (4, 7))
    sd_lora.inject(model, [".*query"], rank=2, train_bias="all", modules_to_save=SAVED)
    assert torch.equal(model(ids).logits, twin(ids).logits)
    optimizer = torch.optim.SGD(sd_lora.lora_layers(model), lr=0.5)
    for _ in range(2):  # B moves in the first step, A in the second
        optimizer.zero_grad()
        model(ids).logits.sub(1).pow(2).mean().backward()
        optimizer.step()
    zero = [n for n, d in sd_lora.deltas_of(model).items() if not d.norm() > 0]
    assert all(name.endswith("key.bias") for name in zero)  # softmax does not see a key's bias
    y = model(ids).logits
    assert not torch.allclose(y, twin(ids).logits, atol=1e-2)
    sd_lora.load_lora_state_dict(fresh, sd_lora.lora_state_dict(model))
    torch.testing.assert_close(fresh(ids).logits, y)
    sd_lora.merge(model)
    torch.testing.assert_close(model(ids).logits, y, rtol=1e-5, atol=1e-5)
    sd_lora.unmerge(model)
    sd_lora.eject(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(
        GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=30, n_positions=8, **ends)
    ).eval()


@pytest.mark.parametrize("adapted", ["lm_head", "transformer.wte"])
def test_merging_leaves_a_tied_weight_alone(adapted: str) -> None:
    """GPT-2's head is its token embedding: merging a delta of one of them leaves the other's
    weight its bits, the output is that of the delta on one of them, and unmerging ties again."""
    model = gpt2()
    tied = model.lm_head.weight
    assert tied is model.transformer.wte.weight
    before, ids = tied.clone(), torch.randint(0, 30, (2, 5))
    other = "transformer.wte" if adapted == "lm_head" else "lm_head"
    sd_lora.inject(model, [adapted], rank=2)
    randomise_model(model)
    y = model(ids).logits
    sd_lora.merge(model)
    torch.testing.assert_close(model(ids).logits, y, rtol=1e-5, atol=1e-5)
    assert model.get_submodule(other).weight is tied
    assert torch.equal(tied, before)
    assert not torch.equal(model.get_submodule(adapted).base.weight, before)
    sd_lora.unmerge(model)
    sd_lora.eject(model)
    assert model.lm_head.weight is model.transformer.wte.weight is tied


def test_ejecting_while_merged_bakes_the_update_in() -> None:
    """merge and eject leave plain layers with W': the model computes what was trained."""
    unet = build_unet().eval()
    kinds = {name: type(module) for name, module in unet.named_modules()}
    sd_lora.inject(unet, targets="all", rank=2)
    randomise_model(unet, 0.05)
    with torch.no_grad():
        y = unet(**inputs()).sample
        sd_lora.merge(unet)
        sd_lora.eject(unet)
        torch.testing.assert_close(unet(**inputs()).sample, y, rtol=1e-5, atol=1e-5)
    assert {name: type(module) for name, module in unet.named_modules()} == kinds
