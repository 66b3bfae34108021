"""Adapters on quantised layers: bitsandbytes int8, nf4 and fp4, torchao int8 and int4, on the CPU.

torchao's Int4WeightOnlyConfig needs a GPU's kernels (0.18); its int4 here is IntxWeightOnlyConfig.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sd_lora
from sd_lora.adapters.inject import adapted_layers
from sd_lora.adapters.layer_classes import adapted_class_of
from sd_lora.adapters.quantized import AdaptedQuantized, dequantize
from sd_lora.models.quantized_base import QuantizedLinear
from tests.adapters.layers import randomise_model

bnb = pytest.importorskip("bitsandbytes")
torchao = pytest.importorskip("torchao.quantization")

IN, OUT = 64, 96


def whole() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(IN, OUT).requires_grad_(False)


def int8() -> nn.Module:
    layer = bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=False, threshold=0.0)
    layer.load_state_dict(whole().state_dict())
    return layer.to("cpu")  # this is what quantises it


def four_bits(kind: str) -> nn.Module:
    layer = bnb.nn.Linear4bit(IN, OUT, quant_type=kind, compute_dtype=torch.float32)
    layer.load_state_dict(whole().state_dict())
    return layer.to("cpu")


def by_torchao(config: Any) -> nn.Module:
    model = nn.Sequential(whole())
    torchao.quantize_(model, config)
    return model[0]


def int4() -> nn.Module:
    config = torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=torchao.PerGroup(32))
    return by_torchao(config)


def stored(form: str) -> nn.Module:
    return QuantizedLinear(whole(), form)


# how far a value may be from its quantised one, in units of the largest of its block: half of the
# widest gap between codes (NF4's is 1 − 0.6962, FP4's 1 − 2/3; bitsandbytes rounds the row's scale
# for int8 in half precision), and the size of the block
BASES: dict[str, tuple[Callable[[], nn.Module], float, int]] = {
    "bitsandbytes int8": (int8, 0.53 / 127, IN),
    "bitsandbytes nf4": (lambda: four_bits("nf4"), 0.5 * (1 - 0.6962), 64),
    "bitsandbytes fp4": (lambda: four_bits("fp4"), 0.5 / 3, 64),
    "torchao int8": (lambda: by_torchao(torchao.Int8WeightOnlyConfig()), 0.5 / 127, IN),
    "torchao int4": (int4, 0.5 / 7, 32),
    "base_precision int8": (lambda: stored("int8"), 0.5 / 127, IN),
    "base_precision nf4": (lambda: stored("nf4"), 0.5 * (1 - 0.6962), 64),
    # float8_e4m3fn has 4 bits of mantissa: half a step of the largest's binade, 256 to 448 in 32
    "base_precision fp8": (lambda: stored("fp8"), 16 / 448, IN),
}
bases = pytest.mark.parametrize("base", BASES)
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "DoRA": {"rule": "decompose"},
    "rslora, orthogonal": {"rslora": True, "init": "orthogonal"},
    "lora_fa": {"method": "lora_fa"},
    "loha": {"method": "loha"},
    "loha DoRA": {"method": "loha", "rule": "decompose"},
    "lokr": {"method": "lokr", "factor": 4},
    "oft": {"method": "oft", "rescaled": True},
    "full, biases": {"method": "full", "train_bias": "all"},
}
methods = pytest.mark.parametrize("method", METHODS)


def net(base: str, method: str | None = None, seed: int = 1, **more: object) -> nn.Sequential:
    """Returns the quantised layer under a head of full precision, with trained adapters."""
    model = nn.Sequential(BASES[base][0](), nn.Tanh(), nn.Linear(OUT, 4).requires_grad_(False))
    if method is not None:
        sd_lora.inject(model, ["0", "2"], rank=4, alpha=6.0, **(METHODS[method] | more))
        if seed:
            randomise_model(model, 0.05, seed)
    return model


def inputs() -> Tensor:
    return torch.randn(5, IN, generator=torch.Generator().manual_seed(3))


def bits(layer: Any) -> list[Tensor]:
    """Returns copies of all that a quantised layer computes with."""
    weight = layer.weight
    if isinstance(layer, QuantizedLinear):
        return [weight.data.clone(), layer.scale.clone(), layer.bias.clone()]
    if hasattr(weight, "quant_state"):
        return [weight.data.clone(), weight.quant_state.absmax.clone(), layer.bias.clone()]
    if hasattr(weight, "SCB"):
        state = layer.state
        CB, SCB = (weight.CB, weight.SCB) if state.CB is None else (state.CB, state.SCB)
        return [CB.clone(), SCB.clone(), layer.bias.clone()]
    return [weight.dequantize().clone(), layer.bias.clone()]


@bases
def test_dequantised_values(base: str) -> None:
    """dequantize gives W to within half a step of the format, differs from W, and is what the
    layer's own kernel computes with, before its first call and after it."""
    make, step, block = BASES[base]
    layer, W, x = make(), whole().weight, inputs()
    Q = dequantize(layer)
    assert Q.shape == W.shape
    largest = W.view(-1, block).abs().amax(1, keepdim=True)
    off = (Q - W).view(-1, block).abs()
    assert (off <= 1.01 * step * largest).all()
    assert off.max() > 0.5 * step * largest.min()
    torch.testing.assert_close(layer(x), F.linear(x, Q, layer.bias), rtol=1e-4, atol=1e-5)
    assert torch.equal(dequantize(layer), Q)
    assert adapted_class_of(layer) is AdaptedQuantized


@methods
@bases
def test_quantised_layers_are_adapted(base: str, method: str) -> None:
    """The first output is the quantised layer's bit for bit, its own kernel's; trained, it is that
    plus ΔW x (and W' x under DoRA, of the dequantised W); the very layer comes back by eject."""
    model, x = net(base, method, seed=0), inputs()
    plain = net(base)
    plain[2].load_state_dict({k: v.clone() for k, v in model[2].base.state_dict().items()})
    layer, inner = model[0], model[0].base
    assert isinstance(layer, AdaptedQuantized)
    assert layer.weight is inner.weight  # in its own format, for code that knows it
    assert torch.equal(model(x), plain(x))
    randomise_model(model, 0.05)
    W = dequantize(inner)
    change = layer.delta.compose(W) - W
    assert change.norm() > 0.05 * W.norm()
    shift = layer.deltas["bias"].diff if "bias" in layer.deltas else torch.zeros(OUT)
    want = inner(x) + F.linear(x, change) + shift
    torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-4)
    sd_lora.set_strength(model, 0.5)
    half = inner(x) + 0.5 * F.linear(x, change) + 0.5 * shift
    torch.testing.assert_close(layer(x), half, rtol=1e-4, atol=1e-4)
    sd_lora.eject(model)
    assert model[0] is inner


@pytest.mark.parametrize("optimizer", ["AdamW", "AdamW8bit"])
@methods
@bases
def test_training_leaves_the_base_its_bits(base: str, method: str, optimizer: str) -> None:
    """Thirty steps halve a loss: gradients come into the deltas alone, through the quantised
    layer to one before it, too, and no bit of the quantised weight, its scales or bias changes;
    with torch's AdamW and with states of 8 bits."""
    torch.manual_seed(1)
    front = nn.Linear(IN, IN).requires_grad_(False)
    model = nn.Sequential(front, *net(base))
    x, target = inputs(), torch.randn(5, 4)
    sd_lora.inject(model, ["0", "1", "3"], rank=4, **METHODS[method])
    before = bits(model[1].base)
    trained = sd_lora.lora_layers(model)
    if optimizer == "AdamW":
        steps: Any = torch.optim.AdamW(trained, lr=1e-2)
    else:
        steps = bnb.optim.AdamW8bit(trained, lr=1e-2, min_8bit_size=16)
    losses = []
    for _ in range(30):
        loss = (model(x) - target).pow(2).mean()
        steps.zero_grad()
        loss.backward()
        steps.step()
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
    ids = {id(p) for p in trained}
    assert all((p.grad is not None) == (id(p) in ids) for p in model.parameters())
    first = adapted_layers(model)["0"].delta
    assert all(p.grad.abs().sum() > 0 for p in first.parameters())
    after = bits(model[1].base)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    if optimizer == "AdamW8bit":
        kinds = {s["state1"].dtype for s in steps.state.values()}
        assert torch.uint8 in kinds


@methods
@bases
def test_its_adapter_merges_into_the_full_precision_model(base: str, method: str) -> None:
    """Merging a quantised layer would round again and is refused by its name, with what else was
    merged taken back; its state is loaded into the full-precision model, has the very same ΔW
    there (of OFT the same rotation), and merges."""
    model = net(base, method)
    head = model[2].base.weight
    values, x = head.clone(), inputs()
    with pytest.raises(sd_lora.UsageError, match=r"0: .* is not merged.*full-precision model"):
        sd_lora.merge(model)
    assert not any(layer.is_merged for layer in adapted_layers(model).values())
    assert model[2].base.weight is head
    assert torch.equal(head, values)
    full = nn.Sequential(whole(), nn.Tanh(), copy.deepcopy(model[2].base))
    sd_lora.load_lora_state_dict(full, sd_lora.lora_state_dict(model))
    assert torch.equal(full[0].delta.by_itself(), model[0].delta.by_itself())
    y, W = full(x), full[0].effective_weight()
    sd_lora.merge(full)
    assert torch.equal(full[0].base.weight, W)
    torch.testing.assert_close(full(x), y, rtol=1e-5, atol=1e-5)
    # and it is the quantised model's function, up to what quantisation lost
    lost = (dequantize(model[0].base) - whole().weight).norm() / whole().weight.norm()
    assert (full[0](x) - model[0](x)).norm() < 2 * lost * full[0](x).norm()


@bases
def test_a_merged_model_is_left_before_the_quantised_layer(base: str) -> None:
    """The refusal takes back what was merged before it in the same call, and nothing else."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, IN), BASES[base][0]())
    sd_lora.inject(model, ["0", "1", "2"], rank=2)
    model[0].merge()
    with pytest.raises(sd_lora.UsageError, match="2: "):
        sd_lora.merge(model)
    assert [layer.is_merged for layer in model] == [True, False, False]


@pytest.mark.parametrize("rslora", [False, True], ids=["r", "root of r"])
@bases
def test_loftq_is_the_best_correction_of_its_rank(base: str, rslora: bool) -> None:
    """LoftQ's s·B·A is the best rank-r approximation of W − Q: the error that remains is the rest
    of its singular values (Eckart-Young), the output is nearer to W's, Q keeps its bits. As the
    delta of W it starts at zero: in the full-precision model the state computes what W does."""
    W, model, x = whole().weight, nn.Sequential(BASES[base][0]()), inputs()
    before = bits(model[0])
    reference = nn.Sequential(whole())
    sd_lora.inject(
        model, ["0"], rank=8, alpha=12.0, rslora=rslora, init="loftq", reference=reference
    )
    layer, delta = model[0], model[0].delta
    Q, correction = dequantize(layer.base), delta.scale * delta.lora_B @ delta.lora_A
    got, lost = (W - Q - correction).norm(), (W - Q).norm()
    best = torch.linalg.svdvals(W - Q)[8:].pow(2).sum().sqrt()
    torch.testing.assert_close(got, best, rtol=1e-4, atol=1e-6)
    assert got < 0.9 * lost
    want = F.linear(x, Q + correction, layer.base.bias)
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
    assert (model(x) - reference(x)).norm() < (layer.base(x) - reference(x)).norm()
    full = nn.Sequential(whole())
    sd_lora.load_lora_state_dict(full, sd_lora.lora_state_dict(model))
    torch.testing.assert_close(full(x), reference(x), rtol=1e-5, atol=1e-6)
    model(x).pow(2).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in delta.parameters())
    randomise_model(model, 0.05)
    correction = delta.scale * delta.lora_B @ delta.lora_A
    want = F.linear(x, Q + correction, layer.base.bias)
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)
    sd_lora.load_lora_state_dict(full, sd_lora.lora_state_dict(model))
    assert (full(x) - model(x)).norm() < 1.01 * got * x.norm()  # off by what is still lost of W
    assert all(torch.equal(a, b) for a, b in zip(bits(layer.base), before, strict=True))


@bases
def test_no_dropout_touches_what_loftq_restores(base: str) -> None:
    """The correction of the quantised weight is part of the base: under every dropout that can be
    asked for the first output in training is that without dropout."""
    x, reference, models = inputs(), nn.Sequential(whole()), []
    for p in (0.0, 0.5):
        dropouts = {"dropout": p, "rank_dropout": p, "module_dropout": p}
        models.append(nn.Sequential(BASES[base][0]()))
        sd_lora.inject(models[-1], ["0"], rank=8, init="loftq", reference=reference, **dropouts)
    plain, model = models
    for _ in range(8):
        torch.testing.assert_close(model(x), plain(x), rtol=1e-5, atol=1e-5)
    randomise_model(model)
    assert len({model(x).sum().item() for _ in range(8)}) > 1


@bases
def test_loftq_on_a_layer_that_is_not_quantised_is_refused(base: str) -> None:
    """Beside a quantised layer one of full precision has nothing to make up for: it is named."""
    model = nn.Sequential(BASES[base][0](), nn.Linear(OUT, 4))
    reference = nn.Sequential(whole(), copy.deepcopy(model[1]))
    for targets, given in ((["0", "1"], reference), (["0"], None)):
        name = targets[-1]
        with pytest.raises(
            sd_lora.UsageError, match=f"{name}: .*it needs a quantised base and ref"
        ):
            sd_lora.inject(model, targets, init="loftq", reference=given)
        assert not adapted_layers(model)
    with pytest.raises(sd_lora.UsageError, match="0: its reference is quantised, too"):
        sd_lora.inject(model, ["0"], init="loftq", reference=copy.deepcopy(model))
    with pytest.raises(sd_lora.UsageError, match="0 is no module of the reference"):
        sd_lora.inject(model, ["0"], init="loftq", reference=nn.Sequential())
    with pytest.raises(sd_lora.UsageError, match=r"0: W is \(96, 64\), its reference \(96, 1\)"):
        sd_lora.inject(model, ["0"], init="loftq", reference=nn.Sequential(nn.Linear(1, OUT)))


@bases
def test_pissa_on_a_quantised_layer(base: str) -> None:
    """PiSSA starts from the principal part of the dequantised weight; the output is the layer's."""
    model, x = net(base), inputs()
    before = model(x)
    sd_lora.inject(model, ["0"], rank=4, init="pissa")
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)
    delta, Q = model[0].delta, dequantize(model[0].base)
    rest = torch.linalg.svdvals(Q)[4:].pow(2).sum().sqrt()
    torch.testing.assert_close((Q - delta.lora_B @ delta.lora_A).norm(), rest, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["lora", "DoRA", "lokr"])
@bases
def test_copies_and_half_inputs(base: str, method: str) -> None:
    """A deep copy of the adapted quantised model computes the same bits; under autocast it computes
    in bfloat16, right to it, with float32 gradients."""
    model, x = net(base, method), inputs()
    y = model(x)
    assert torch.equal(copy.deepcopy(model)(x), y)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(x)
    assert (half.float() - y).norm() < 0.05 * y.norm()
    half.float().sum().backward()
    assert {p.grad.dtype for p in sd_lora.lora_layers(model)} == {torch.float32}


@pytest.mark.parametrize("kind", ["Linear8bitLt", "Linear4bit"])
def test_a_layer_that_is_not_quantised_yet_is_refused(kind: str) -> None:
    """bitsandbytes quantises when the model is moved to its device: before that there is nothing
    to adapt, and it says so by name."""
    options = {"has_fp16_weights": False} if kind == "Linear8bitLt" else {}
    model = nn.Sequential(getattr(bnb.nn, kind)(IN, OUT, **options))
    with pytest.raises(sd_lora.UsageError, match="0: .*is not quantised yet: move the model"):
        sd_lora.inject(model, ["0"])
    assert isinstance(model[0], getattr(bnb.nn, kind))


@bases
def test_evaluating_between_steps_changes_nothing(base: str) -> None:
    """A validation in eval without gradients, between two steps, leaves the dequantised weight and
    the gradients of layers before the quantised one their bits: bitsandbytes' CPU kernel for
    inference would repack a 4-bit weight there for good, and lose those gradients."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, IN), BASES[base][0]())
    sd_lora.inject(model, ["0", "1"], rank=2, rule="decompose")
    randomise_model(model, 0.05)
    x, trained = inputs(), sd_lora.lora_layers(model)
    Q = dequantize(model[1].base)
    before = torch.autograd.grad(model(x).pow(2).sum(), trained)
    model.eval()
    with torch.no_grad():
        y = model(x)
    model.train()
    assert torch.equal(dequantize(model[1].base), Q)
    after = torch.autograd.grad(model(x).pow(2).sum(), trained)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert all(g.abs().sum() > 0 for g in after)
    torch.testing.assert_close(y, model(x), rtol=0.05, atol=0.05)  # int8 rounds its input in eval


def test_a_weight_packed_for_inference_is_refused() -> None:
    """Called in eval before it is adapted, a 4-bit layer may have been repacked already: it cannot
    be dequantised or trained through, and is refused by name with what to do."""
    model = nn.Sequential(four_bits("nf4")).eval()
    if not model[0].support_avx512bf16_for_cpu:
        pytest.skip("this CPU has no kernel that packs")
    with torch.no_grad():
        model(inputs())
    with pytest.raises(sd_lora.UsageError, match="0: a call in eval mode on the CPU has repacked"):
        sd_lora.inject(model, ["0"])
