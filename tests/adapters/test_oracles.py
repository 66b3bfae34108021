"""The same tensors in peft's and loralib's layers and in ours: the same function.

Where a library errs, the closed form decides, and the size of its error is asserted, so that a
release that mends it is noticed. Versions: peft 0.21.2, loralib 0.1.2; LyCORIS: test_lycoris.py.
"""

import copy

import loralib
import peft
import pytest
import torch
from torch import Tensor, nn

import sd_lora
from sd_lora.adapters.state import make_delta
from tests.adapters.layers import LAYERS, RULES

PEFT = ["linear", "linear without bias", "gpt2 conv1d", "conv1d", "conv2d 3x3", "conv2d 1x1"]
PEFT += ["conv2d stride", "conv2d 3x1", "conv3d", "embedding", "embedding padding_idx"]


def peft_layer(base: nn.Module, rule: str = "add", **config: object) -> nn.Module:
    """Returns peft's layer around a copy of `base`, in float64, with random factors (and random
    magnitudes under DoRA)."""
    options = {"r": 6, "lora_alpha": 3, "init_lora_weights": False, "target_modules": ["0"]}
    lora = peft.LoraConfig(**(options | config), use_dora=rule == "decompose")
    model = peft.get_peft_model(nn.Sequential(copy.deepcopy(base)).double(), lora).double()
    for name, p in model.named_parameters():
        if "magnitude" in name:
            p.data.mul_(1 + 0.3 * torch.rand_like(p))
    return model.base_model.model[0]


def ours_from_peft(base: nn.Module, layer: nn.Module) -> sd_lora.AdaptedLayer:
    """Returns our layer around a copy of `base` with the tensors of peft's."""
    if isinstance(base, nn.Embedding):
        A, B = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    else:
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    tensors = {"lora_A": A, "lora_B": B}
    alpha = layer.scaling["default"] * layer.r["default"]
    tensors["alpha"] = torch.tensor(alpha, dtype=torch.float64)
    if "default" in layer.lora_magnitude_vector:
        tensors["magnitude"] = layer.lora_magnitude_vector["default"].weight.flatten()
    delta = make_delta("0", {k: t.detach() for k, t in tensors.items()})
    base = copy.deepcopy(base).double().requires_grad_(False)
    return sd_lora.wrap(base, {"weight": delta})


def layer_and_input(layer: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    base, (x,) = LAYERS[layer][0](), LAYERS[layer][1]()
    return base, x.double() if x.is_floating_point() else x


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("layer", PEFT)
def test_equals_peft_where_peft_is_right(layer: str, rule: str) -> None:
    """Given peft's factors, and under DoRA its magnitudes, our layer computes peft's output (the
    row padding_idx left out, which peft's DoRA rescales and ours leaves as it is)."""
    base, x = layer_and_input(layer)
    theirs = peft_layer(base, rule)
    if layer == "embedding padding_idx" and rule == "decompose":
        x = x.masked_fill(x == base.padding_idx, 5)
    y = ours_from_peft(base, theirs)(x)
    assert not torch.allclose(y, base.double()(x), atol=1e-2)
    torch.testing.assert_close(y, theirs(x), rtol=1e-12, atol=1e-12)


def test_equals_peft_with_rslora_and_from_the_start() -> None:
    """The scale of rslora is peft's, and so is a fresh DoRA's magnitude."""
    base, x = layer_and_input("linear")
    theirs = peft_layer(base, use_rslora=True)
    torch.testing.assert_close(ours_from_peft(base, theirs)(x), theirs(x), rtol=1e-12, atol=1e-12)
    model = nn.Sequential(copy.deepcopy(base)).double()
    sd_lora.inject(model, ["0"], rank=6, alpha=3.0, rslora=True, rule="decompose")
    assert model[0].delta.scale == pytest.approx(theirs.scaling["default"], rel=1e-15)
    fresh = peft.LoraConfig(r=6, use_dora=True, target_modules=["0"])
    peer = peft.get_peft_model(nn.Sequential(copy.deepcopy(base)).double(), fresh)
    magnitude = peer.base_model.model[0].lora_magnitude_vector["default"].weight
    torch.testing.assert_close(model[0].delta.magnitude.flatten(), magnitude.double())


@pytest.mark.parametrize("layer", ["linear", "conv2d 3x3"])
def test_dora_follows_its_own_derivative(layer: str) -> None:
    """peft's DoRA detaches the norm (the paper's section 4.3): its outputs are ours, and so are
    the magnitudes' gradients, but those of A and B are not the derivative of what it computes, by
    more than 20 %. Ours are: the matrix test has the finite differences."""
    base, x = layer_and_input(layer)
    theirs = peft_layer(base, "decompose")
    ours = ours_from_peft(base, theirs)
    for m in (ours, theirs):
        m(x).pow(3).sum().backward()
    m = theirs.lora_magnitude_vector["default"].weight
    torch.testing.assert_close(ours.delta.magnitude.grad.flatten(), m.grad.flatten())
    for name in ("lora_A", "lora_B"):
        true, detached = (
            getattr(ours.delta, name).grad,
            getattr(theirs, name)["default"].weight.grad,
        )
        assert (true - detached).norm() > 0.2 * true.norm()


def test_attention_of_peft_adds_its_output_update_twice() -> None:
    """nn.MultiheadAttention: one pair for the packed q, k and v, one for the output, as in peft;
    but peft's merge, which its forward uses, adds the output's ΔW twice. So its output is ours
    with that ΔW doubled, and ours as it is, the closed form."""
    torch.manual_seed(0)
    base = nn.MultiheadAttention(8, 2, batch_first=True)
    q, kv = torch.randn(2, 5, 8).double(), torch.randn(2, 6, 8).double()
    theirs = peft_layer(base)
    pair = {"in_proj_weight": theirs, "out_proj.weight": theirs.base_layer.out_proj}
    factors = {}
    for path, m in pair.items():
        A, B = m.lora_A["default"].weight.detach(), m.lora_B["default"].weight.detach()
        factors[path] = {"lora_A": A, "lora_B": B}
    for alpha, peer in ((6.0, theirs), (3.0, base.double())):
        alphas = {"in_proj_weight": 3.0, "out_proj.weight": alpha}
        ours = sd_lora.wrap(
            copy.deepcopy(base).double().requires_grad_(False),
            {
                p: make_delta("0", f | {"alpha": torch.tensor(alphas[p])})
                for p, f in factors.items()
            },
        )
        if peer is base:  # W + s·B·A put in by hand
            with torch.no_grad():
                for path, f in factors.items():
                    base.get_parameter(path).add_(0.5 * f["lora_B"] @ f["lora_A"])
        for got, want in zip(ours(q, kv, kv), peer(q, kv, kv), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def conv(**options: object) -> nn.Conv2d:
    return nn.Conv2d(6, 12, 3, **options)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"padding": 1, "padding_mode": "circular"}, 0.3),
        ({"padding": 1, "padding_mode": "reflect"}, 0.3),
        ({"padding": 1, "padding_mode": "replicate"}, 0.3),
        ({"padding": "same", "dilation": 2}, 0.8),
        ({"padding": 1, "dilation": 2}, None),
    ],
    ids=lambda v: "-".join(f"{k} {o}" for k, o in v.items()) if isinstance(v, dict) else "",
)
def test_convolutions_where_peft_errs(options: dict, error: float | None, rule: str) -> None:
    """peft's A is a convolution without the base's dilation and padding_mode: what its merge puts
    in differs from what was trained by more than the fraction `error` of the whole change, or its
    forward raises (None). Ours equals, to 1e-12, the closed form: the base with W + s·B·A, before
    merging and after it."""
    torch.manual_seed(0)
    base, x = conv(**options).double(), torch.randn(2, 6, 9, 9).double()
    before, theirs = base(x), peft_layer(base, rule)
    if error is None:
        with pytest.raises(RuntimeError):
            theirs(x)
    else:
        trained = theirs(x)
        theirs.merge()
        assert (theirs(x) - trained).norm() > error * (trained - before).norm()
        theirs.unmerge()
    ours = ours_from_peft(base, theirs)
    A, B = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    V = base.weight + 0.5 * (B.flatten(1) @ A.flatten(1)).view(base.weight.shape)
    if rule == "decompose":
        m = theirs.lora_magnitude_vector["default"].weight.view(-1, 1, 1, 1)
        V = m * V / V.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    closed = base._conv_forward(x, V, base.bias)
    torch.testing.assert_close(ours(x), closed, rtol=1e-12, atol=1e-12)
    ours.merge()
    torch.testing.assert_close(ours(x), closed, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd")
def test_groups_which_peft_does_not_merge() -> None:
    """With groups peft trains a dense A, so that a group's output depends on other groups' inputs:
    no ΔW of the weight's shape does that, and its merge raises. Ours, of any rank, sees its own
    group alone, and is the base with W + s·B·A (the matrix test has merged and unmerged)."""
    torch.manual_seed(0)
    base, x = conv(padding=1, groups=2).double(), torch.randn(2, 6, 5, 5).double()
    model = nn.Sequential(copy.deepcopy(base))
    sd_lora.inject(model, ["0"], rank=3, alpha=6.0)
    nn.init.normal_(model[0].delta.lora_B)
    theirs, ours = peft_layer(base), model[0]
    other = x.clone()
    other[:, 3:] += 1  # the second group's inputs; the first group's outputs are the first six
    assert not torch.allclose(theirs(x)[:, :6], theirs(other)[:, :6])
    assert torch.equal(ours(x)[:, :6], ours(other)[:, :6])
    with pytest.raises(NotImplementedError):
        theirs.merge()
    with pytest.raises(ValueError, match="rank is divisible by groups"):
        peft_layer(base, r=3)
    A, B = ours.delta.lora_A, ours.delta.lora_B
    V = base.weight + 2.0 * (B.flatten(1) @ A.flatten(1)).view(base.weight.shape)
    torch.testing.assert_close(ours(x), base._conv_forward(x, V, base.bias))


def test_conv3d_with_a_flat_kernel() -> None:
    """The same for the kernel (1, 1, 3) of Conv3d, where peft's merge raises."""
    torch.manual_seed(0)
    base, x = nn.Conv3d(6, 8, (1, 1, 3)).double(), torch.randn(2, 6, 3, 4, 5).double()
    theirs = peft_layer(base)
    ours = ours_from_peft(base, theirs)
    y = ours(x)
    torch.testing.assert_close(y, theirs(x), rtol=1e-12, atol=1e-12)
    with pytest.raises(RuntimeError):
        theirs.merge()
    ours.merge()
    torch.testing.assert_close(ours(x), y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["Linear", "Embedding"])
def test_equals_loralib(kind: str) -> None:
    """Given loralib's factors, our linear layer and embedding compute loralib's output."""
    torch.manual_seed(0)
    peer = getattr(loralib, kind)(12, 10, r=3, lora_alpha=2).double()
    nn.init.normal_(peer.lora_A)
    nn.init.normal_(peer.lora_B)
    base = getattr(nn, kind)(12, 10).double().requires_grad_(False)
    base.load_state_dict(peer.state_dict(), strict=False)
    tensors = {"lora_A": peer.lora_A, "lora_B": peer.lora_B, "alpha": torch.tensor(2.0)}
    ours = sd_lora.wrap(base, {"weight": make_delta("x", tensors)})
    x = torch.randn(5, 12).double() if kind == "Linear" else torch.randint(0, 12, (3, 7))
    torch.testing.assert_close(ours(x), peer(x), rtol=1e-12, atol=1e-12)
