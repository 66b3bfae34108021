"""The four dropouts: unbiased, repeatable, off where nothing is trained, and safe to recompute."""

import copy

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import sd_lora
from tests.adapters.layers import build, out

CELLS = [
    ("linear", "lora", "add", {"dropout": 0.4}),
    ("linear", "loha", "add", {"dropout": 0.4}),
    ("linear", "lora", "decompose", {"dropout": 0.4}),
    ("gpt2 conv1d", "lora", "add", {"dropout": 0.4}),
    ("gpt2 conv1d", "lokr", "add", {"dropout": 0.4}),
    ("conv2d 3x3", "lora", "add", {"dropout": 0.4}),
    ("conv2d groups", "lora", "add", {"dropout": 0.4}),
    ("conv2d circular", "loha", "decompose", {"dropout": 0.4}),
    ("linear", "lora", "add", {"neuron_dropout": 0.4}),
    ("conv2d groups", "lora", "add", {"neuron_dropout": 0.4}),
    ("embedding", "lora", "add", {"neuron_dropout": 0.4}),
    ("linear", "lora", "add", {"rank_dropout": 0.4}),
    ("linear", "lora_fa", "add", {"rank_dropout": 0.4}),
    ("linear", "loha", "add", {"rank_dropout": 0.4}),
    ("linear", "lokr", "add", {"rank_dropout": 0.4}),
    ("conv2d 3x3", "lora tucker", "add", {"rank_dropout": 0.4}),
    ("conv2d 3x3", "loha tucker", "add", {"rank_dropout": 0.4}),
    ("conv2d 3x3", "lokr tucker", "add", {"rank_dropout": 0.4}),
    ("embedding", "lora", "add", {"rank_dropout": 0.4}),
    ("attention", "lora", "add", {"rank_dropout": 0.4}),
    ("linear", "lora", "add", {"module_dropout": 0.4}),
    ("conv2d 3x3", "lokr", "decompose", {"module_dropout": 0.4}),
    ("attention", "loha", "add", {"module_dropout": 0.4}),
    ("embedding", "lora", "decompose", {"module_dropout": 0.4}),
    ("linear", "lora", "add", {"dropout": 0.3, "neuron_dropout": 0.3, "module_dropout": 0.3}),
]
cells = pytest.mark.parametrize(
    ("layer", "variant", "rule", "dropouts"),
    CELLS,
    ids=["-".join((*c[:3], *c[3])) for c in CELLS],
)


def ranks(variant: str) -> dict[str, int]:
    """LoKr's second half is so small here that a rank above 1 would be none."""
    return {"rank": 1} if variant.startswith("lokr") else {"rank": 4}


@cells
def test_the_mean_over_draws_is_the_update(
    layer: str, variant: str, rule: str, dropouts: dict[str, float]
) -> None:
    """The mean of many training outputs is the eval output: no entry is further away than chance
    allows (4.5 standard errors), and the draws do differ."""
    adapted, args = build(layer, variant, rule, **ranks(variant), **dropouts)
    if layer == "attention":  # softmax is not linear: of its deltas, the output's alone is left
        del adapted.deltas["in_proj_weight"]
    adapted.eval()
    with torch.no_grad():
        want = out(adapted, args)
        adapted.train()
        torch.manual_seed(0)
        draws = torch.stack([out(adapted, args) for _ in range(600)])
    mean, spread = draws.mean(0), draws.std(0)
    moved = spread > 1e-6
    assert moved.float().mean() > 0.5
    torch.testing.assert_close(mean[~moved], want[~moved])
    z = (mean - want)[moved] / (spread[moved] / 600**0.5)
    assert z.abs().max() < 4.5
    assert z.pow(2).mean() < 1.6


@cells
def test_draws_repeat_with_the_seed_and_are_off_in_eval(
    layer: str, variant: str, rule: str, dropouts: dict[str, float]
) -> None:
    """The same seed draws the same masks, another one others; in eval the output is, bit for bit,
    that of the layer without dropout."""
    adapted, args = build(layer, variant, rule, **ranks(variant), **dropouts)
    plain, _ = build(layer, variant, rule, **ranks(variant))

    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return torch.stack([out(adapted, args) for _ in range(5)])

    with torch.no_grad():
        assert torch.equal(draw(1), draw(1))
        assert not torch.equal(draw(1), draw(2))
        assert torch.equal(out(adapted.eval(), args), out(plain.eval(), args))


@cells
def test_checkpointed_gradients_are_identical(
    layer: str, variant: str, rule: str, dropouts: dict[str, float]
) -> None:
    """torch.utils.checkpoint runs the forward pass again in the backward pass and restores the
    random state for it: the gradients are those without it, bit for bit."""
    adapted, args = build(layer, variant, rule, **ranks(variant), **dropouts)
    trained = [p for d in adapted.deltas_by_path().values() for p in d.parameters()]
    args = tuple(x.requires_grad_() if x.is_floating_point() else x for x in args)
    grads = []
    for again in (False, True):
        torch.manual_seed(5)  # of this seed, module_dropout keeps the module
        if again:
            y = checkpoint(lambda *a: out(adapted, a), *args, use_reentrant=False)
        else:
            y = out(adapted, args)
        torch.manual_seed(99)
        grads.append(torch.autograd.grad(y.pow(2).sum(), trained))
    assert any(g.abs().sum() > 0 for g in grads[0])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("rule", ["add", "decompose"])
@pytest.mark.parametrize("variant", ["lora", "loha", "lokr", "lora tucker"])
def test_ranks_are_dropped_in_the_forward_pass_alone(variant: str, rule: str) -> None:
    """In training too, what is merged, asked for (`weight`), measured (`norm`) or started from
    (DoRA's magnitude) is the whole delta, and none of it takes from the random state."""
    more = {"rank_dropout": 0.5, **ranks(variant)}
    adapted, _ = build("conv2d 3x3", variant, rule, **more)
    plain, _ = build("conv2d 3x3", variant, rule, **ranks(variant))
    adapted.train()
    before = torch.get_rng_state()
    assert torch.equal(adapted.weight, plain.weight)
    assert torch.equal(adapted.delta.norm(), plain.delta.norm())
    assert torch.equal(adapted.delta_weight(), plain.delta_weight())
    adapted.merge()
    assert torch.equal(adapted.base.weight, plain.effective_weight())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("layer", ["linear", "conv2d groups", "embedding"])
def test_a_decomposed_draw_is_one_draw(layer: str) -> None:
    """Under rank_dropout and DoRA an output in training is that of one W' = m·V/‖V‖, with the same
    ranks dropped in V and in its norm: of the eight possible masks of three ranks, one fits."""
    adapted, args = build(layer, rule="decompose", dtype=torch.float64, rank_dropout=0.5)
    B, possible = adapted.delta.lora_B.detach().clone(), []
    with torch.no_grad():
        adapted.eval()
        for mask in range(8):
            kept = [2.0 * (mask >> i & 1) for i in range(3)]
            adapted.delta.lora_B.copy_(B * torch.tensor(kept).view(1, 3, *(1,) * (B.dim() - 2)))
            possible.append(out(adapted, args))
        adapted.delta.lora_B.copy_(B)
        adapted.train()
        torch.manual_seed(0)
        draws = torch.stack([out(adapted, args) for _ in range(40)])
    off = torch.stack([(draws - y).flatten(1).norm(dim=1) for y in possible])
    assert off.min(0).values.max() < 1e-9
    assert off.argmin(0).unique().numel() > 4


@pytest.mark.parametrize("rule", ["add", "decompose"])
def test_pissa_drops_a_rank_with_its_start(rule: str) -> None:
    """PiSSA's delta begins at zero under rank_dropout, too: a rank is dropped from B·A and from
    B₀·A₀ at once, so the first output in training is the base's; DoRA starts from ‖W‖."""
    adapted, args = build(
        "linear", rule=rule, trained=False, rank_dropout=0.5, options={"init": "pissa"}
    )
    adapted.train()
    for _ in range(5):
        torch.testing.assert_close(adapted(*args), adapted.base(*args), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        adapted.delta.lora_B.add_(1)
    assert len({adapted(*args).sum().item() for _ in range(20)}) > 1
    if rule == "decompose":
        norms = adapted.base.weight.norm(dim=1, keepdim=True)
        torch.testing.assert_close(adapted.delta.magnitude, norms)


def test_a_copy_keeps_its_dropouts() -> None:
    """A deep copy drops as the original: its probabilities are its own attributes."""
    adapted, args = build("linear", rank_dropout=0.5, dropout=0.2)
    twin = copy.deepcopy(adapted)
    for seed in range(3):
        ys = []
        for layer in (adapted, twin):
            torch.manual_seed(seed)
            ys.append(layer(*args))
        assert torch.equal(*ys)
    assert isinstance(twin, sd_lora.AdaptedLayer)
