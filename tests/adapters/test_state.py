"""Adapters as tensors: out, in again, combined; and what acts on a whole model's deltas."""

import copy

import pytest
import torch
from torch import Tensor, nn

import sd_lora
from sd_lora.adapters.inject import adapted_layers
from tests.adapters.layers import RULES, VARIANTS, randomise_model
from tests.tiny import build_unet


class Net(nn.Module):
    """Every kind of layer in a row, in float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(12, 8)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.mix = nn.Conv1d(8, 12, 3, padding=1, groups=2)
        self.last = nn.Linear(12, 10)
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = self.norm(x + self.attn(x, x, x)[0])
        return self.last(torch.tanh(self.mix(x.mT)).mT)


IDS = torch.arange(24).view(3, 8) % 12
LAYERS = ["embed", "attn", "mix", "last"]
ALL = [*LAYERS, "norm"]
variants = pytest.mark.parametrize("variant", VARIANTS)
rules = pytest.mark.parametrize("rule", RULES)


def net(variant: str = "lora", rule: str = "add", seed: int = 1, **more: object) -> Net:
    """Returns a Net with trained adapters on all of its layers."""
    model, given = Net(), dict(VARIANTS[variant])
    options = given.pop("options", {}) | given | {"targets": LAYERS, "rank": 2, "alpha": 3.0} | more
    sd_lora.inject(model, rule=rule, **options)
    randomise_model(model, 0.3, seed)
    return model


def change(model: nn.Module) -> dict[str, Tensor]:
    """Returns W' − W of every adapted parameter."""
    found = {}
    for name, layer in adapted_layers(model).items():
        for path in layer.deltas_by_path():
            found[f"{name}.{path}"] = layer.delta_weight(path).detach()
    return found


@rules
@variants
def test_states_round_trip(variant: str, rule: str) -> None:
    """What lora_state_dict gives makes the same function of a bare model, and of one with the same
    adapters in other values; names are those of the parameters, without a final .weight."""
    model = net(variant, rule)
    y, state = model(IDS), sd_lora.lora_state_dict(model)
    names = {"embed", "attn.in_proj_weight", "attn.out_proj", "mix", "last"}
    assert {key.rpartition(".")[0] for key in state} == names == sd_lora.deltas_of(model).keys()
    bare, other = Net(), net(variant, rule, seed=2)
    assert not torch.allclose(other(IDS), y, atol=1e-3)
    for twin in (bare, other):
        sd_lora.load_lora_state_dict(twin, state)
        torch.testing.assert_close(twin(IDS), y, rtol=1e-12, atol=1e-12)
        again = sd_lora.lora_state_dict(twin)
        assert again.keys() == state.keys()
        assert all(torch.equal(again[key], state[key]) for key in state)


def test_a_state_is_a_copy() -> None:
    """Training a model changes neither the state it gave nor the one it was loaded from, and two
    models loaded from one state do not share tensors."""
    model = net()
    state = sd_lora.lora_state_dict(model)
    before = {key: tensor.clone() for key, tensor in state.items()}
    a, b = Net(), Net()
    for bare in (a, b):
        sd_lora.load_lora_state_dict(bare, state)
    randomise_model(model)
    randomise_model(a)
    assert all(torch.equal(state[key], before[key]) for key in state)
    assert not torch.allclose(a(IDS), b(IDS), atol=1e-3)
    after = sd_lora.lora_state_dict(b)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_alpha_keeps_its_precision() -> None:
    """rslora's α·√r is irrational: the state has it in float64, so the scale reloads exactly."""
    model, bare = net("rslora"), Net()
    sd_lora.load_lora_state_dict(bare, sd_lora.lora_state_dict(model))
    assert bare.last.delta.scale == model.last.delta.scale != float(torch.tensor(3.0 / 2**0.5))


def test_other_states_are_refused_and_change_nothing() -> None:
    """Another target, rank or method is an error that names the first key; nothing is changed."""
    model = net()
    before = sd_lora.lora_state_dict(model)
    refused = {
        "the model has attn": sd_lora.lora_state_dict(net(targets=["last"])),
        r"the file has norm.*0 keys are missing and 2 too many": before
        | {
            k: t
            for k, t in sd_lora.lora_state_dict(net("full", targets=ALL)).items()
            if "norm" in k
        },
        r"embed.lora_A is \(3, 12\) in the file and \(2, 12\)": sd_lora.lora_state_dict(
            net(rank=3)
        ),
        "the adapters differ: the model has": sd_lora.lora_state_dict(net("loha")),
    }
    for message, state in refused.items():
        with pytest.raises(sd_lora.UsageError, match=message):
            sd_lora.load_lora_state_dict(model, state)
        after = sd_lora.lora_state_dict(model)
        assert all(torch.equal(after[key], before[key]) for key in before)


A, B = torch.zeros(2, 12), torch.zeros(10, 2)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"nowhere.lora_A": A, "nowhere.lora_B": B}, "Net has no module or parameter 'nowhere'"),
        ({"last.lora_A": A}, "last: lora_A and lora_B come in pairs"),
        ({"last.lora_A": A, "last.lora_B": B[:, :1]}, "last: .*different ranks"),
        (
            {"last.lora_A": A[:, :3], "last.lora_B": B},
            r"last: ΔW is 10×3 and the weight \(10, 12\)",
        ),
        ({"last.lora_A": A[0, 0], "last.lora_B": B}, "last: "),
        ({"last.lora_A": A, "last.lora_B": B, "last.wings": A}, "last: no method has the tensors"),
        ({"last.alpha": torch.tensor(1.0)}, "last: no method has the tensors alpha"),
        ({"last.hada_w1_a": B, "last.hada_w1_b": A}, "last: loha needs hada_w1_a"),
        ({"last.lokr_w1": B}, "last: lokr needs lokr_w2"),
        (
            {"last.lora_A": A, "last.lora_B": B, "last.magnitude": torch.ones(9)},
            r"last: a magnitude of \(9,\)",
        ),
        ({"norm.lora_A": A, "norm.lora_B": B}, "norm: ΔW is 10×12 and the weight"),
        ({"last.bias.diff": torch.zeros(9)}, "last: ΔW is 9×1 and the weight"),
        ({"embed.diff": torch.zeros(12, 8)}, r"embed: ΔW is 12×8 and the weight \(8, 12\)"),
    ],
)
def test_broken_states_are_refused(state: dict[str, Tensor], message: str) -> None:
    """Tensors that make up no delta of a bare model's layers are an error that names the delta
    with both shapes or the reason; the model stays bare."""
    model = Net()
    before = dict(model.named_modules())
    with pytest.raises(sd_lora.UsageError, match=message):
        sd_lora.load_lora_state_dict(model, state)
    assert dict(model.named_modules()) == before
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_loaded_update_goes_to_its_layers_device() -> None:
    """A state, always on the CPU, loaded into a bare model on the GPU: every delta is where its
    layer is, and the output is the CPU's."""
    model, bare = net(rule="decompose"), Net().cuda()
    sd_lora.load_lora_state_dict(bare, sd_lora.lora_state_dict(model))
    y = bare(IDS.cuda())
    torch.testing.assert_close(y.cpu(), model(IDS), rtol=1e-9, atol=1e-9)


@rules
@variants
def test_adapters_are_planned_on_the_meta_device(variant: str, rule: str) -> None:
    """inject works on a model without values, and gives the tensors that it would have: the same
    names and shapes, on the meta device."""
    want, options = sd_lora.lora_state_dict(net(variant, rule)), dict(VARIANTS[variant])
    options |= options.pop("options", {})
    with torch.device("meta"):
        model = Net()
    sd_lora.inject(model, LAYERS, rank=2, rule=rule, **options)
    shapes = {
        f"{name}.{key}": (tensor.shape, tensor.device.type)
        for name, delta in sd_lora.deltas_of(model).items()
        for key, tensor in delta.tensors().items()
    }
    kept = {key: t for key, t in want.items() if not key.endswith(".alpha")}
    assert shapes == {key: (t.shape, "meta") for key, t in kept.items()}


def test_an_update_loaded_over_a_meta_layer_keeps_its_values() -> None:
    """A model whose weights are not loaded yet (the meta device) can be given its adapters first:
    their values are kept on the CPU."""
    state = sd_lora.lora_state_dict(net())
    with torch.device("meta"):
        bare = Net()
    sd_lora.load_lora_state_dict(bare, state)
    again = sd_lora.lora_state_dict(bare)
    assert all(torch.equal(again[key], state[key]) for key in state)


# ------------------------------------------------------------------------------- several adapters


def test_combined_adapters_are_their_weighted_sum() -> None:
    """combine gives one LoRA whose every ΔW is Σ wᵢ·ΔWᵢ to 1e-12, of ranks 2, 3 and 5, other
    alphas, rslora, PiSSA and LoRA-FA alike; what only some of the adapters have is kept."""
    models = [
        net(seed=1),
        net("rslora", seed=2, rank=3, alpha=7.0),
        net("lora_fa", seed=3, rank=5, alpha=1.0),
        net(seed=4, init="pissa", targets=["mix", "last"]),
    ]
    weights = [1.0, -0.5, 0.25, 2.0]
    state = sd_lora.combine([sd_lora.lora_state_dict(m) for m in models], weights)
    total = Net()
    sd_lora.load_lora_state_dict(total, state)
    assert total.last.delta.rank == 2 + 3 + 5 + 2 * 2
    assert total.attn.deltas["in_proj_weight"].rank == 2 + 3 + 5
    for path, got in change(total).items():
        parts = [change(m).get(path) for m in models]
        want = sum(w * p for w, p in zip(weights, parts, strict=True) if p is not None)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        assert got.norm() > 0.1


@pytest.mark.parametrize("weights", [None, [1.5, -0.5]], ids=["", "weighted"])
def test_full_updates_combine_with_full_ones(weights: list[float] | None) -> None:
    """Deltas of full rank, norms and biases too, are added; weights are 1 by default."""
    models = [net("full", seed=s, targets=ALL, train_bias="all") for s in (1, 2)]
    total, (w0, w1) = Net(), weights or (1.0, 1.0)
    state = sd_lora.combine([sd_lora.lora_state_dict(m) for m in models], weights)
    sd_lora.load_lora_state_dict(total, state)
    assert {"norm.weight", "norm.bias", "last.bias", "attn.in_proj_bias"} <= change(total).keys()
    for path, got in change(total).items():
        want = w0 * change(models[0])[path] + w1 * change(models[1])[path]
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_sums_that_are_not_exact_are_refused() -> None:
    """A DoRA, a Hadamard or Kronecker product, a mixture and another shape have no exact sum of
    the form B·A: each is refused by the delta's name."""
    lora = sd_lora.lora_state_dict(net())
    wide = nn.ModuleDict({"last": nn.Linear(13, 10)})
    sd_lora.inject(wide, ["last"], rank=2)
    for state, message in (
        (sd_lora.lora_state_dict(net(rule="decompose")), "embed is weight-decomposed"),
        (sd_lora.lora_state_dict(net("loha")), r"embed \(loha, lora\) has no exact sum"),
        (sd_lora.lora_state_dict(net("lokr")), r"embed \(lokr, lora\) has no exact sum"),
        (sd_lora.lora_state_dict(net("full")), r"embed \(full, lora\) has no exact sum"),
        (sd_lora.lora_state_dict(wide), "last .*shape"),
    ):
        with pytest.raises(sd_lora.UsageError, match=message):
            sd_lora.combine([lora, state])
    with pytest.raises(sd_lora.UsageError, match="2 adapters and 1 weights"):
        sd_lora.combine([lora, lora], [1.0])


# ------------------------------------------------------------------------ strength, norms, merging


@rules
@variants
def test_strength_is_a_line_from_the_base(variant: str, rule: str) -> None:
    """A strength k computes with W + k·(W' − W): 0 is the base bit for bit, 1 as trained, 0.5 half
    the change, merged or not; and set while merged, it merges anew."""
    model, base = net(variant, rule), Net().requires_grad_(False)
    y, whole = model(IDS), change(model)
    for k in (0.0, 0.5, -1.5, 1.0):
        twin = Net()
        with torch.no_grad():
            for path, delta in whole.items():
                twin.get_parameter(path).add_(k * delta)
        want = twin(IDS)
        sd_lora.set_strength(model, k)
        torch.testing.assert_close(model(IDS), want, rtol=1e-10, atol=1e-10)
        with sd_lora.merged(model):
            torch.testing.assert_close(model(IDS), want, rtol=1e-10, atol=1e-10)
        sd_lora.set_strength(model, 2.0)
        sd_lora.merge(model)
        sd_lora.set_strength(model, k)
        torch.testing.assert_close(model(IDS), want, rtol=1e-10, atol=1e-10)
        if k == 0:
            torch.testing.assert_close(model(IDS), base(IDS), rtol=1e-12, atol=1e-12)
        sd_lora.unmerge(model)
    assert torch.equal(model(IDS), y)


def test_strength_zero_is_the_base_bit_for_bit() -> None:
    """At strength 0 a UNet computes its base's very bits, adapters or not."""
    unet, args = build_unet().eval(), (torch.randn(1, 4, 8, 8), 7, torch.randn(1, 5, 32))
    with torch.no_grad():
        before = unet(*args).sample
        sd_lora.inject(unet, "all")
        randomise_model(unet)
        assert not torch.equal(unet(*args).sample, before)
        sd_lora.set_strength(unet, 0)
        assert torch.equal(unet(*args).sample, before)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if not v.startswith("oft")])
def test_norms_are_limited_exactly(variant: str) -> None:
    """Every ΔW above the limit gets exactly that Frobenius norm, in its own direction; a smaller
    one keeps its bits; the number of scaled ones is returned, and a second call does nothing. Of
    OFT ΔW is a part of the base's weight, and no norm of its own."""
    model = net(variant)
    before = {name: d.weight().detach() for name, d in sd_lora.deltas_of(model).items()}
    norms = sorted(float(w.norm()) for w in before.values())
    limit = (norms[1] + norms[2]) / 2
    assert sd_lora.limit_norms(model, limit) == len(norms) - 2
    for name, delta in sd_lora.deltas_of(model).items():
        W, was = delta.weight().detach(), before[name]
        torch.testing.assert_close(delta.norm(), W.norm())
        if was.norm() <= limit:
            assert torch.equal(W, was)
        else:
            torch.testing.assert_close(W, was * (limit / was.norm()), rtol=1e-9, atol=1e-9)
    assert sd_lora.limit_norms(model, limit * (1 + 1e-9)) == 0
    assert sd_lora.limit_norms(Net(), limit) == 0


def test_norms_that_cannot_be_limited_are_named() -> None:
    """A limit that is none, and a PiSSA delta, a difference of two products, are refused."""
    for limit in (0, -1.0, float("nan")):
        with pytest.raises(sd_lora.UsageError, match="max_norm must be above 0"):
            sd_lora.limit_norms(net(), limit)
    with pytest.raises(sd_lora.UsageError, match="last: after the inits pissa"):
        sd_lora.limit_norms(net(init="pissa", targets=["last"]), 1e-3)


@pytest.mark.parametrize("act", ["load", "limit"])
def test_what_changes_while_merged_is_merged_anew(act: str) -> None:
    """Loading a state or limiting norms while merged acts on the merged weights, too, and leaves
    the base's bits: the output is the same merged and unmerged."""
    model, other = net(), net(seed=2)
    values = {n: p.clone() for n, p in Net().named_parameters()}
    sd_lora.merge(model)
    if act == "load":
        sd_lora.load_lora_state_dict(model, sd_lora.lora_state_dict(other))
    else:
        assert sd_lora.limit_norms(model, 0.1) == 5
        sd_lora.limit_norms(other := net(), 0.1)
    want = other(IDS)
    torch.testing.assert_close(model(IDS), want, rtol=1e-12, atol=1e-12)
    sd_lora.unmerge(model)
    torch.testing.assert_close(model(IDS), want, rtol=1e-12, atol=1e-12)
    sd_lora.eject(model)
    assert all(torch.equal(p, values[n]) for n, p in model.named_parameters())


def test_combined_factors_stay_on_the_update() -> None:
    """combine of one state with itself at weights that cancel is a zero delta, not a missing one:
    the model computes its base."""
    state = sd_lora.lora_state_dict(net())
    model = Net()
    sd_lora.load_lora_state_dict(model, sd_lora.combine([state, copy.deepcopy(state)], [1, -1]))
    torch.testing.assert_close(model(IDS), Net()(IDS), rtol=1e-12, atol=1e-12)
