"""OFT: rotations in closed form, and a learning rate that means the same at any block size."""

import math

import pytest
import torch
from torch import Tensor, nn

import sd_lora
from sd_lora.adapters.oft import OFT
from sd_lora.adapters.variants import Variant, new_delta


def fresh(outputs: int, size: int, inputs: int = 8, **options: object) -> OFT:
    """A fresh float64 delta of a weight (outputs, inputs)."""
    W = torch.zeros(outputs, inputs, dtype=torch.float64)
    delta = new_delta(Variant("oft", options={"block_size": size, **options}), W)
    assert isinstance(delta, OFT)
    return delta


@torch.no_grad()
def test_a_block_of_two_is_a_rotation_by_its_angle() -> None:
    """With b = 2 and the number v, Q's entry is v/2, and Cayley's R turns the two outputs by
    2 arctan(v/2): W' = Rᵀ W."""
    delta = fresh(4, 2)
    values = torch.tensor([[0.3], [-2.0]], dtype=torch.float64)
    delta.oft_skew.copy_(values)
    W = torch.randn(4, 8, dtype=torch.float64)
    want = W.clone()
    for block, v in enumerate(values.flatten().tolist()):
        c, s = math.cos(2 * math.atan(v / 2)), math.sin(2 * math.atan(v / 2))
        first, second = W[2 * block], W[2 * block + 1]
        want[2 * block], want[2 * block + 1] = c * first - s * second, s * first + c * second
    torch.testing.assert_close(delta.compose(W), want, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("size", [2, 3, 8, 24])
@torch.no_grad()
def test_lengths_and_angles_are_kept(size: int) -> None:
    """W'ᵀW' = WᵀW to 1e-12 however far it is turned, and with factors d, W' = diag(d) Rᵀ W."""
    delta = fresh(24, size, rescaled=True)
    delta.oft_skew.normal_(std=5.0)
    W = torch.randn(24, 8, dtype=torch.float64)
    turned = delta.compose(W)
    torch.testing.assert_close(turned.T @ turned, W.T @ W, rtol=1e-12, atol=1e-12)
    assert (turned - W).norm() > 0.5 * W.norm()
    factors = torch.rand(24, dtype=torch.float64) + 0.5
    delta.rescale.copy_(factors)
    torch.testing.assert_close(delta.compose(W), factors[:, None] * turned, rtol=1e-12, atol=1e-12)


SIZES = (2, 3, 4, 8, 16, 32, 96)


def _steps(size: int, optimizer: type[torch.optim.Optimizer], rate: float) -> Tensor:
    """The distance by which one step of training moves each output, as a share of its length."""
    torch.manual_seed(0)
    W = torch.linalg.qr(torch.randn(96, 96, dtype=torch.float64)).Q  # outputs of length 1
    G = torch.randn(96, 96, dtype=torch.float64)
    delta = fresh(96, size)
    (delta.compose(W) * G).sum().backward()
    optimizer(delta.parameters(), lr=rate, weight_decay=0.0).step()
    with torch.no_grad():
        return (delta.compose(W) - W).norm(dim=1)


@pytest.mark.parametrize("rate", [1e-3, 1e-4])
def test_a_rate_turns_outputs_as_far_at_any_block_size(rate: float) -> None:
    """The first step of Adam moves every number by the rate η, whatever the gradient is; each of
    the outputs, orthonormal here, then moves by η to first order, from blocks of 2 to a block of
    all 96. Of LyCORIS' parametrisation, Q = B − Bᵀ, it is 4η√(b − 1): 9.7 times as far in a block
    of 96 as in one of 2."""
    for size in SIZES:
        moved = _steps(size, torch.optim.AdamW, rate)
        # the rest is of second order: ‖R − I + 2Q‖ ≤ 2‖Q‖², and ‖Q‖ of signs is up to η√(b − 1)
        torch.testing.assert_close(
            moved, torch.full_like(moved, rate), rtol=2 * rate * math.sqrt(size), atol=0.0
        )
    plain = []
    for size in (2, 96):
        B = rate * torch.triu(torch.ones(size, size, dtype=torch.float64), 1)
        Q = 2 * (B - B.T)  # B's two triangles have opposite gradients, and each moves by η
        eye = torch.eye(size, dtype=torch.float64)
        plain.append(float(((eye + Q) @ torch.linalg.inv(eye - Q) - eye)[0].norm()))
    assert plain[0] == pytest.approx(4 * rate, rel=1e-2)
    assert plain[1] / plain[0] == pytest.approx(math.sqrt(95), rel=0.3)


def test_blocks_are_the_largest_divisor() -> None:
    """Of the outputs, up to the size that is given; without one up to 16, and no larger than the
    number of blocks, where there is such a divisor. Outputs without one are refused by name."""
    sizes = {(320, None): 16, (1280, None): 16, (24, None): 4, (5, None): 5, (4, None): 2}
    sizes |= {(320, 32): 32, (320, 30): 20, (24, 24): 24, (6, 100): 6}
    for (outputs, limit), size in sizes.items():
        assert fresh(outputs, limit).block_size == size
        assert fresh(outputs, limit).blocks().shape == (outputs // size, size, size)
    for outputs, limit in ((17, 16), (7, 4), (1, 8)):
        model = nn.ModuleDict({"layer": nn.Linear(4, outputs)})
        with pytest.raises(sd_lora.UsageError, match=f"layer: .*{outputs} outputs have no divisor"):
            sd_lora.inject(model, ["layer"], method="oft", block_size=limit)


def test_numbers_to_train_are_half_of_lycoris() -> None:
    """b(b − 1)/2 a block, where LyCORIS trains all b²: 2,400 of 320 outputs in blocks of 16."""
    delta = fresh(320, 16)
    assert sum(p.numel() for p in delta.parameters()) == 20 * 120
    assert fresh(320, 16, rescaled=True).rescale.numel() == 320


def test_what_a_rotation_has_not() -> None:
    """ΔW without the base, a bound of its norm, ranks to drop, and elements between factors: each
    is refused with its reason."""
    model = nn.ModuleDict({"layer": nn.Linear(8, 8)})
    sd_lora.inject(model, ["layer"], method="oft")
    (delta,) = sd_lora.deltas_of(model).values()
    with pytest.raises(sd_lora.UsageError, match="depends on the base"):
        delta.weight()
    with pytest.raises(sd_lora.UsageError, match="layer: oft turns W"):
        sd_lora.limit_norms(model, 1.0)
    for option, reason in (("rank_dropout", "has none"), ("neuron_dropout", "elements of A x")):
        bare = nn.ModuleDict({"layer": nn.Linear(8, 8)})
        with pytest.raises(sd_lora.UsageError, match=reason):
            sd_lora.inject(bare, ["layer"], method="oft", **{option: 0.5})


@torch.no_grad()
def test_strength_is_between_the_weights() -> None:
    """At the strength s the layer has W + s·(W' − W), merged and not, as LyCORIS has it."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": nn.Linear(8, 12)})
    W = model.layer.weight.clone()
    sd_lora.inject(model, ["layer"], method="oft")
    sd_lora.deltas_of(model)["layer"].oft_skew.normal_()
    whole = model.layer.effective_weight()
    sd_lora.set_strength(model, 0.3)
    x = torch.randn(5, 8)
    want = x @ (W + 0.3 * (whole - W)).T + model.layer.base.bias
    torch.testing.assert_close(model.layer(x), want, rtol=1e-5, atol=1e-6)
    with sd_lora.merged(model):
        torch.testing.assert_close(model.layer(x), want, rtol=1e-5, atol=1e-6)
