"""How a delta starts: the distributions of A, A from W, PiSSA's and LoftQ's principal factors.

LoftQ on quantised layers is in test_quantized.py, LoHa's and LoKr's tensors in test_lycoris.py.
"""

import copy
import math

import peft
import pytest
import torch
from torch import Tensor, nn

import sd_lora
from sd_lora.adapters.quantized import dequantize
from sd_lora.adapters.variants import Variant, new_delta
from tests.adapters.layers import build, out, randomise


def fresh(shape: tuple[int, ...], rank: int, init: str) -> sd_lora.Delta:
    g = torch.Generator().manual_seed(0)
    return new_delta(Variant(options={"init": init}), torch.zeros(shape), rank, generator=g)


@pytest.mark.parametrize("shape", [(8, 900), (8, 100, 3, 3)], ids=["linear", "conv"])
def test_random_inits_have_their_distribution(shape: tuple[int, ...]) -> None:
    """kaiming: A uniform in ±1/√fan_in, fan_in = 900 for both (loralib's and peft's, a = √5);
    gaussian: normal with standard deviation 1/r. B is zero. Four standard errors are allowed."""
    A = fresh(shape, 32, "kaiming").lora_A.detach()
    bound = 1 / math.sqrt(900)
    assert 0.999 * bound < A.abs().max() <= bound
    assert float(A.std()) == pytest.approx(bound / math.sqrt(3), rel=4 / math.sqrt(A.numel()))
    delta = fresh(shape, 32, "gaussian").requires_grad_(False)
    assert float(delta.lora_A.std()) == pytest.approx(1 / 32, rel=4 / math.sqrt(2 * A.numel()))
    kurtosis = float((32 * delta.lora_A).pow(4).mean())  # 3 for a normal, 1.8 for a uniform one
    assert kurtosis == pytest.approx(3, abs=4 * math.sqrt(96 / A.numel()))
    assert not delta.lora_B.any()


@pytest.mark.parametrize("shape", [(8, 900), (8, 100, 3, 3)], ids=["linear", "conv"])
def test_orthogonal_rows_are_orthonormal(shape: tuple[int, ...]) -> None:
    """orthogonal: A·Aᵀ = 1, a convolution's kernels as rows; B is zero."""
    delta = fresh(shape, 16, "orthogonal")
    A = delta.lora_A.flatten(1)
    torch.testing.assert_close(A @ A.T, torch.eye(16), rtol=0, atol=1e-5)
    assert not delta.lora_B.any()


@pytest.mark.parametrize("layer", ["linear", "conv2d 3x3", "embedding"])
def test_svd_reads_what_the_weight_amplifies_most(layer: str) -> None:
    """svd: A has orthonormal rows, and W·Aᵀ the largest singular values of W, of no other r
    directions; B is zero, so that the output is the base's to the bit."""
    adapted, args = build(layer, dtype=torch.float64, trained=False, options={"init": "svd"})
    A = adapted.delta.lora_A.detach().flatten(1)
    W = adapted.weight_of(adapted.base, "weight").flatten(1)
    torch.testing.assert_close(A @ A.T, torch.eye(3).double(), rtol=0, atol=1e-6)
    found, wanted = torch.linalg.svdvals(W @ A.T), torch.linalg.svdvals(W)[:3]
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert torch.equal(out(adapted, args), out(copy.deepcopy(adapted.base), args))


PISSA = ["linear", "gpt2 conv1d", "conv2d 3x3", "conv2d groups", "conv1d", "conv3d", "embedding"]
pissa = {"init": "pissa"}


@pytest.mark.parametrize("rslora", [False, True], ids=["α/r", "α/√r"])
@pytest.mark.parametrize("layer", PISSA)
def test_pissa_starts_from_the_principal_part(layer: str, rslora: bool) -> None:
    """s·B·A is the best rank-r approximation of W, U_r·S_r·V_rᵀ of an SVD in float64, each factor
    with half of S; the delta that it starts from is zero, so the output is the base's."""
    adapted, args = build(
        layer, dtype=torch.float64, trained=False, alpha=5.0, rslora=rslora, options=pissa
    )
    delta, W = adapted.delta, adapted.weight_of(adapted.base, "weight")
    U, S, Vh = torch.linalg.svd(W.flatten(1), full_matrices=False)
    A, B, s = delta.lora_A.flatten(1), delta.lora_B.flatten(1), delta.scale
    assert s == pytest.approx(5 / math.sqrt(3) if rslora else 5 / 3)
    close = {"rtol": 1e-5, "atol": 1e-5}  # the SVD of the factors is taken in float32
    torch.testing.assert_close(s * B @ A, U[:, :3] @ torch.diag(S[:3]) @ Vh[:3], **close)
    torch.testing.assert_close(s * B.T @ B, torch.diag(S[:3]), **close)
    torch.testing.assert_close(s * A @ A.T, torch.diag(S[:3]), **close)
    best = S[3:].pow(2).sum().sqrt()  # Eckart-Young
    torch.testing.assert_close((W.flatten(1) - s * B @ A).norm(), best, rtol=1e-6, atol=1e-6)
    before = out(copy.deepcopy(adapted.base), args)
    torch.testing.assert_close(out(adapted, args), before, rtol=1e-12, atol=1e-12)
    assert delta.norm() < 1e-6 * W.norm()


@pytest.mark.parametrize("layer", PISSA)
def test_pissa_is_the_papers_function(layer: str) -> None:
    """The paper freezes W_res = W − s·B₀·A₀ and trains s·B·A; here W stays whole and −s·B₀·A₀ is
    part of the delta. Both are one function: the same output and the same gradients of A and B,
    at the start and after training."""
    adapted, args = build(layer, dtype=torch.float64, trained=False, options=pissa)
    delta, W = adapted.delta, adapted.weight_of(adapted.base, "weight")
    with torch.no_grad():
        W_res = W - (delta.scale * delta.lora_B.flatten(1) @ delta.lora_A.flatten(1)).view(W.shape)
    for trained in (False, True):
        if trained:
            randomise(adapted)
        y = out(adapted, args)
        ours = torch.autograd.grad(y.pow(3).sum(), (delta.lora_A, delta.lora_B))
        A, B = (p.detach().clone().requires_grad_() for p in (delta.lora_A, delta.lora_B))
        weight = W_res + (delta.scale * B.flatten(1) @ A.flatten(1)).view(W.shape)
        weight = adapted.swap_layout(adapted.base, weight)
        paper = torch.func.functional_call(adapted.base, {"weight": weight}, args)
        torch.testing.assert_close(y, paper, rtol=1e-10, atol=1e-10)
        papers = torch.autograd.grad(paper.pow(3).sum(), (A, B))
        for got, want in zip(ours, papers, strict=True):
            assert want.abs().sum() > 0
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_pissa_equals_peft() -> None:
    """The same layer given to peft's pissa: the same B·A, outputs and gradients (of the product:
    each singular vector's sign is free)."""
    torch.manual_seed(0)
    base, x = nn.Linear(12, 10), torch.randn(7, 12)
    config = peft.LoraConfig(r=3, lora_alpha=6, init_lora_weights="pissa", target_modules=["0"])
    theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(base)), config)
    ours = nn.Sequential(base)
    sd_lora.inject(ours, ["0"], rank=3, alpha=6.0, init="pissa")
    (theirs(x).pow(2).sum() + ours(x).pow(2).sum()).backward()
    peer, delta = theirs.base_model.model[0], ours[0].delta
    A, B = peer.lora_A["default"].weight, peer.lora_B["default"].weight
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(delta.lora_B @ delta.lora_A, B @ A, **close)
    torch.testing.assert_close(ours(x), theirs(x), **close)
    torch.testing.assert_close(delta.lora_B.grad @ delta.lora_A, B.grad @ A, **close)
    torch.testing.assert_close(delta.lora_B @ delta.lora_A.grad, B @ A.grad, **close)


def test_pissa_is_an_ordinary_lora_afterwards() -> None:
    """Its state reloads into a bare model, and combined with another it becomes a plain LoRA of
    rank 2r and more, the same function."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(24, 5)).double()
    bare, x = copy.deepcopy(model), torch.randn(2, 4, 4, 4).double()
    sd_lora.inject(model, ["0", "2"], rank=2, init="pissa")
    for layer in (model[0], model[2]):
        randomise(layer)
    y, state = model(x), sd_lora.lora_state_dict(model)
    for given, rank in ((state, 2), (sd_lora.combine([state]), 4)):
        twin = copy.deepcopy(bare)
        sd_lora.load_lora_state_dict(twin, given)
        assert {layer.delta.rank for layer in (twin[0], twin[2])} == {rank}
        torch.testing.assert_close(twin(x), y, rtol=1e-12, atol=1e-12)


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(6, 6))


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6))


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (linear, {"init": "orthogonall"}, "0: init must be one of kaiming.*not 'orthogonall'"),
        (linear, {"init": "pissa", "rank": 7}, "0: rank 7 is too high for the init pissa"),
        (on_meta, {"init": "pissa"}, "0: the init pissa is computed from the weight"),
        (
            lambda: nn.Sequential(nn.Conv2d(6, 6, 3)),
            {"init": "pissa", "tucker": True},
            "0: the init pissa gives two factors",
        ),
        (linear, {"init": "loftq"}, "0: .*it needs a quantised base and reference="),
        (
            linear,
            {"init": "loftq", "reference": linear()},
            "0: .*it needs a quantised base and reference=",
        ),
        (
            linear,
            {"init": "loftq", "reference": nn.Sequential()},
            "0 is no module of the reference",
        ),
        (linear, {"init": "kaiming", "method": "loha"}, "loha has no option 'init'"),
    ],
)
def test_impossible_inits_are_refused(make, options: dict, message: str) -> None:  # type: ignore[no-untyped-def]
    """What an init cannot do is refused with the module's name and the reason, and the model is
    as it was: LoftQ on a base that is not quantised would be two zero factors, which never move."""
    model = make()
    with pytest.raises(sd_lora.UsageError, match=message):
        sd_lora.inject(model, ["0"], **options)
    assert type(model[0]) in (nn.Linear, nn.Conv2d)
    assert all(p.requires_grad for p in model.parameters())


def test_loftq_makes_up_for_what_quantisation_lost() -> None:
    """On an nf4 base the first output is that of Q + s·B₀A₀, the best rank-r approximation of what
    was lost (what remains is the rest of the singular values), and ΔW is zero: the state loads
    into the full-precision model as ΔW = s·(BA − B₀A₀) and changes nothing there at the start."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(64, 64, bias=False))
    model = nn.Sequential(bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4"))
    model[0].load_state_dict(whole[0].state_dict())
    model.to("cpu")  # quantises
    Q: Tensor = dequantize(model[0])
    eye = torch.eye(64)
    with pytest.raises(sd_lora.UsageError, match="0: the init loftq works with the rule add"):
        sd_lora.inject(model, ["0"], rule="decompose", init="loftq", reference=whole)
    sd_lora.inject(model, ["0"], rank=16, alpha=24.0, init="loftq", reference=whole)
    remains = torch.linalg.svdvals(whole[0].weight - Q)[16:].pow(2).sum().sqrt()
    got = (model(eye).T - whole[0].weight).norm()
    torch.testing.assert_close(got, remains, rtol=1e-4, atol=1e-4)
    assert got < 0.7 * (Q - whole[0].weight).norm()

    with torch.no_grad():
        model[0].delta.lora_B.add_(0.1 * torch.randn(64, 16))
    full = copy.deepcopy(whole)
    sd_lora.load_lora_state_dict(full, sd_lora.lora_state_dict(model))
    learned = model(eye) - full(eye)  # the same on both bases, up to what LoftQ could not mend
    torch.testing.assert_close(learned.norm(), remains, rtol=1e-4, atol=1e-4)
