"""The adapted layers against closed forms, peft and loralib."""

import copy

import loralib
import peft
import pytest
import torch
from torch import nn

import sd_lora
from sd_lora.adapters.layers import LAYERS, AdaptedLayer

LAYER_KINDS = {
    "linear": (lambda: nn.Linear(12, 10), (3, 5, 12)),
    "linear without bias": (lambda: nn.Linear(12, 10, bias=False), (3, 12)),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, stride=2, padding=1), (2, 6, 11)),
    "conv1d dilated": (lambda: nn.Conv1d(6, 8, 3, dilation=2, padding=2), (2, 6, 11)),
    "conv2d 3x3": (lambda: nn.Conv2d(6, 8, 3, padding=1), (2, 6, 9, 9)),
    "conv2d 1x1": (lambda: nn.Conv2d(6, 8, 1), (2, 6, 9, 9)),
    "conv2d stride": (lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1), (2, 6, 9, 9)),
    "conv2d 3x1": (lambda: nn.Conv2d(6, 8, (3, 1), padding=(1, 0)), (2, 6, 9, 9)),
    "conv2d dilated": (lambda: nn.Conv2d(6, 8, 3, dilation=2, padding=1), (2, 6, 9, 9)),
    "conv2d same": (lambda: nn.Conv2d(6, 8, 3, dilation=2, padding="same"), (2, 6, 9, 9)),
    "conv2d circular": (
        lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="circular"),
        (2, 6, 9, 9),
    ),
    "conv2d reflect": (lambda: nn.Conv2d(6, 8, 3, padding=2, padding_mode="reflect"), (2, 6, 9, 9)),
    "conv2d groups": (lambda: nn.Conv2d(6, 8, 3, padding=1, groups=2), (2, 6, 9, 9)),
    "conv2d depthwise": (lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6), (2, 6, 9, 9)),
    "conv3d": (lambda: nn.Conv3d(4, 8, 3, padding=1, stride=(1, 2, 2)), (2, 4, 5, 6, 7)),
    "conv3d grouped, dilated": (
        lambda: nn.Conv3d(4, 8, (1, 3, 3), padding=(0, 2, 2), dilation=(1, 2, 2), groups=4),
        (2, 4, 5, 6, 7),
    ),
}
kinds = pytest.mark.parametrize("kind", LAYER_KINDS)


def adapted(
    kind: str, *, trained: bool = True, **options: object
) -> tuple[AdaptedLayer, torch.Tensor]:
    """Returns a layer of that kind with an adapter (random A and B if trained), and an input."""
    torch.manual_seed(0)
    make, shape = LAYER_KINDS[kind]
    base = make()
    options = {"rank": 3, "alpha": 2.0} | options
    layer = LAYERS[type(base)](base, **options)
    if trained:
        nn.init.normal_(layer.lora_B, std=0.3)
    return layer, torch.randn(shape)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_first_output_is_the_base_output_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    """B = 0, so the wrapped layer computes exactly what the base does, in every dtype."""
    layer, x = adapted(kind, trained=False)
    layer.base.to(dtype)
    x = x.to(dtype)
    assert torch.equal(layer(x), layer.base(x))
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32


@kinds
def test_merged_equals_unmerged_in_double(kind: str) -> None:
    """The forward pass is the function of W + ΔW to 1e-12: stride, padding, dilation, groups."""
    layer, x = adapted(kind)
    layer, x = layer.double(), x.double()
    y, before = layer(x), layer.base(x)
    layer.merge()
    assert not torch.allclose(layer.base(x), before)
    torch.testing.assert_close(layer(x), y, rtol=1e-12, atol=1e-12)


@kinds
def test_merged_equals_unmerged_in_float32(kind: str) -> None:
    """The same in float32 within 1e-5."""
    layer, x = adapted(kind)
    y = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-5)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unmerge_restores_every_bit(kind: str, dtype: torch.dtype) -> None:
    """merge changes the weight; unmerge gives back the tensor that was there, bit for bit."""
    layer, _ = adapted(kind)
    layer.base.to(dtype)
    before = layer.base.weight.clone()
    layer.merge()
    assert not torch.equal(layer.base.weight, before)
    layer.merge()  # once more is the same merge
    layer.unmerge()
    assert torch.equal(layer.base.weight, before)


@kinds
def test_gradients_are_those_of_the_merged_weight(kind: str) -> None:
    """The backward pass equals autograd's through base(x; W + s·BA), for A, B and the input."""
    layer, x = adapted(kind)
    layer, x = layer.double(), x.double().requires_grad_()
    layer(x).pow(3).sum().backward()
    got = [layer.lora_A.grad, layer.lora_B.grad, x.grad]

    A, B = (p.detach().clone().requires_grad_() for p in (layer.lora_A, layer.lora_B))
    x2 = x.detach().clone().requires_grad_()
    base = layer.base
    delta = (layer.alpha / layer.rank) * (B.flatten(1) @ A.flatten(1)).view(base.weight.shape)
    state = {"weight": base.weight + delta}
    torch.func.functional_call(base, state, (x2,)).pow(3).sum().backward()
    for ours, theirs in zip(got, (A.grad, B.grad, x2.grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_fused_linear_passes_finite_differences() -> None:
    """The hand-written backward agrees with finite differences in double precision."""
    layer, x = adapted("linear")
    layer, x = layer.double(), x.double().requires_grad_()

    def f(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, {"lora_A": A, "lora_B": B}, (x,))

    assert torch.autograd.gradcheck(f, (x, layer.lora_A, layer.lora_B))


def test_an_unfrozen_base_gets_its_gradient() -> None:
    """The fused path is left when someone thaws the base: no gradient is lost in silence."""
    layer, x = adapted("linear")
    frozen = layer(x)
    layer.base.requires_grad_(True)
    y = layer(x)
    torch.testing.assert_close(y, frozen)
    y.sum().backward()
    assert layer.base.weight.grad.abs().sum() > 0
    assert layer.lora_A.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "kind", ["linear", "linear without bias", "conv1d", "conv2d 3x3", "conv2d stride", "conv3d"]
)
def test_equals_peft_where_peft_is_right(kind: str) -> None:
    """Given peft's factors, our layer computes peft's output (peft errs elsewhere: groups,
    dilation, padding_mode; there the closed form above is the proof)."""
    layer, x = adapted(kind)
    model = nn.Sequential(copy.deepcopy(layer.base))
    config = peft.LoraConfig(r=3, lora_alpha=2, target_modules=["0"], init_lora_weights=False)
    theirs = peft.get_peft_model(model, config)
    peer = theirs.base_model.model[0]
    with torch.no_grad():
        layer.lora_A.copy_(peer.lora_A["default"].weight)
        layer.lora_B.copy_(peer.lora_B["default"].weight)
    torch.testing.assert_close(layer(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_equals_loralib() -> None:
    """Given loralib's factors, our linear layer computes loralib's output."""
    layer, x = adapted("linear")
    peer = loralib.Linear(12, 10, r=3, lora_alpha=2)
    with torch.no_grad():
        peer.weight.copy_(layer.base.weight)
        peer.bias.copy_(layer.base.bias)
        peer.lora_A.copy_(layer.lora_A)
        peer.lora_B.copy_(layer.lora_B)
    torch.testing.assert_close(layer(x), peer(x), rtol=1e-6, atol=1e-6)


def test_autocast_computes_in_its_dtype() -> None:
    """Under autocast a float32 base and its update run in bfloat16, for linears and convs."""
    for kind in ("linear", "conv2d 3x3"):
        layer, x = adapted(kind)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.1)
        y.float().sum().backward()
        assert layer.lora_A.grad.dtype == torch.float32


def test_dropout_drops_in_training_only() -> None:
    """Dropout changes the update in training, keeps its mean, and is off in eval."""
    layer, x = adapted("linear", dropout=0.5)
    y = layer.eval()(x)
    torch.testing.assert_close(y, layer.base(x) + x @ layer.delta_weight().T)
    layer.train()
    many = torch.stack([layer(x) for _ in range(4000)]).mean(0)
    assert not torch.equal(layer(x), y)
    torch.testing.assert_close(many, y, rtol=0.1, atol=0.1)


def test_wrapper_answers_for_its_base() -> None:
    """Model code that asks a layer for its weight or sizes gets the base's answer."""
    layer, _ = adapted("conv2d 3x3")
    assert layer.weight is layer.base.weight
    assert (layer.in_channels, layer.out_channels) == (6, 8)
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = layer.no_such_thing
    assert torch.equal(copy.deepcopy(layer).lora_A, layer.lora_A)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rank": 0}, "rank must be at least 1"), ({"init": "orthogonall"}, "init must be one of")],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    """A rank below 1 and an unknown init are errors that name themselves."""
    with pytest.raises(ValueError, match=message):
        LAYERS[nn.Linear](nn.Linear(4, 4), **options)


def test_subclasses_of_linear_are_refused() -> None:
    """A subclass may compute something else (attention reads its projection's weight), so it is
    not taken for the plain layer: the error names the class."""
    attention = nn.MultiheadAttention(8, 2)
    with pytest.raises(ValueError, match="does not adapt NonDynamicallyQuantizableLinear"):
        LAYERS[nn.Linear](attention.out_proj)
    with pytest.raises(sd_lora.UsageError, match="NonDynamicallyQuantizableLinear"):
        sd_lora.inject(attention, targets="out_proj")
