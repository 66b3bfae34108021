"""Routed layers: each item of a batch by the layers of its own model, W x for all at once."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sd_lora
from sd_lora.adapters.fast.copies import Copies
from sd_lora.adapters.fast.layers import takes
from sd_lora.adapters.fast.routed import RoutedConvolution, RoutedStack
from sd_lora.adapters.inject import adapted_layers
from sd_lora.adapters.routed import RoutedLayer, Routes, route

RANKS, SAME = (2, 5, 3), (3, 3, 3)
"""Ranks of three models."""

COUNTS = [(2, 1, 3), (0, 2, 1), (3, 0, 0), (2, 2, 2)]
"""Items of each model in a batch, of which one or two may have none."""


def models(
    base: nn.Module,
    dtype: torch.dtype = torch.float32,
    left_out: Sequence[str] = (),
    ranks: Sequence[int] = RANKS,
) -> list[nn.Module]:
    """Models of one base, of these ranks, with random deltas. left_out: modules that the last one
    leaves as they are."""
    found = []
    for place, rank in enumerate(ranks):
        model = copy.deepcopy(base)
        names = [n for n, m in base.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        last = place == len(ranks) - 1
        targets = [name for name in names if not (last and name in left_out)]
        sd_lora.inject(model, targets, rank=rank, alpha=2.0, seed=place)
        torch.manual_seed(place)
        for parameter in sd_lora.lora_layers(model):
            nn.init.normal_(parameter, std=0.3)
        for layer in adapted_layers(model).values():
            layer.base.to(dtype)
        found.append(model)
    return found


def gradients(out: Tensor, inputs: Sequence[Tensor]) -> list[Tensor | None]:
    torch.manual_seed(1)
    loss = (out * torch.randn(out.shape)).sum()
    return [*torch.autograd.grad(loss, inputs, allow_unused=True)]


def factors(adapted: Sequence[nn.Module]) -> list[Tensor]:
    return [p for model in adapted for p in sd_lora.lora_layers(model)]


def assert_near(mine: Sequence[Any], theirs: Sequence[Any], tolerance: float = 1e-6) -> None:
    """Tensors are as near as their norms times the tolerance; absent ones are zeros."""
    for ours, other in zip(mine, theirs, strict=True):
        if ours is None or other is None:
            there = other if ours is None else ours
            assert there is None or not there.any()
        else:
            assert (ours - other).norm() <= tolerance * other.norm() + 1e-12


@pytest.mark.parametrize("counts", COUNTS)
def test_each_item_is_of_its_own_model(counts: tuple[int, ...]) -> None:
    """Outputs and all gradients of linears, of tokens, and convolutions are those of each model on
    its own items, also of a model that leaves a layer as it is."""
    torch.manual_seed(0)
    base = nn.Sequential(
        nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.Flatten(2), nn.Linear(16, 8), nn.Linear(8, 4)
    )
    adapted, routes = models(base, left_out=("2",)), Routes(counts)
    names = [*route(base, adapted, routes)]
    assert names == ["0", "2", "3"]
    assert all(isinstance(base.get_submodule(name), RoutedLayer) for name in names)
    x = torch.randn(sum(counts), 4, 8, 8, requires_grad=True)
    pairs = zip(adapted, x.split(counts), strict=True)
    apart = torch.cat([model(part) for model, part in pairs if len(part)])
    wanted = [x, *factors(adapted)]
    out = base(x)
    assert_near([out, *gradients(out, wanted)], [apart, *gradients(apart, wanted)])


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(("bias", "ranks"), [(True, RANKS), (False, SAME)])
def test_a_routed_stack_is_its_layers(
    counts: tuple[int, ...], bias: bool, ranks: tuple[int, ...]
) -> None:
    """Three routed linears of one input, computed as one, give the outputs and every gradient of
    the layers apart, also where ranks and items of all are the same in number, and their products
    one; base weights are views of one tensor, the same in all models."""
    torch.manual_seed(0)
    base = nn.Sequential(*(nn.Linear(12, 16, bias=bias) for _ in range(3)))
    adapted, routes = models(base, ranks=ranks), Routes(counts)
    routed = [*route(base, adapted, routes).values()]
    x = torch.randn(sum(counts), 5, 12, requires_grad=True)
    wanted = [x, *factors(adapted)]
    apart = torch.cat([layer(x) for layer in routed], -1)
    theirs = [apart, *gradients(apart, wanted)]
    stack = RoutedStack(routed)
    Copies([f for f in stack.factors if f]).refresh()
    out = torch.cat(stack(x), -1)
    assert_near([out, *gradients(out, wanted)], theirs)
    places = {layer.base.weight.untyped_storage().data_ptr() for layer in routed}
    assert places == {stack.W.untyped_storage().data_ptr()}


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("stride", [1, 2])
def test_a_routed_convolution_is_its_layer(counts: tuple[int, ...], stride: int) -> None:
    """A convolution of several models as one function: output and gradients of the layer."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(4, 6, 3, stride=stride, padding=1))
    adapted, routes = models(base), Routes(counts)
    (routed,) = route(base, adapted, routes).values()
    x = torch.randn(sum(counts), 4, 8, 8, requires_grad=True)
    wanted = [x, *factors(adapted)]
    apart = routed(x)
    conv = RoutedConvolution.of(routed)
    Copies([f for f in conv.of_models if f]).refresh()
    out = conv.forward(x)
    assert_near([out, *gradients(out, wanted)], [apart, *gradients(apart, wanted)])


@pytest.mark.parametrize("counts", COUNTS)
def test_bfloat16_is_no_worse_than_the_layers(counts: tuple[int, ...]) -> None:
    """On a bfloat16 base outputs and gradients of a routed stack are the exact ones but for its
    rounding, 2⁻⁸ each time, and the outputs nearer to them than those of the layers apart."""
    torch.manual_seed(0)
    base = nn.Sequential(*(nn.Linear(48, 16) for _ in range(2)))
    adapted, routes = models(base, torch.bfloat16, ("1",)), Routes(counts)
    routed = [*route(base.bfloat16(), adapted, routes).values()]
    x = torch.randn(sum(counts), 9, 48).bfloat16().requires_grad_()
    for layer in routed:
        own = [part.deltas for part in layer.layers if part is not None]
        wanted = [x, *(p for deltas in own for p in deltas.parameters())]
        stack = RoutedStack([layer])
        Copies([f for f in stack.factors if f]).refresh()
        exact, ours = _exact(layer, x), stack(x)[0]
        assert (ours - exact).norm() <= (layer(x) - exact).norm()
        pairs = [exact, *gradients(exact, wanted)], [ours, *gradients(ours, wanted)]
        assert_near(pairs[1], pairs[0], tolerance=8e-3)


def _exact(layer: RoutedLayer, x: Tensor) -> Tensor:
    """The output in float64, item by item with its own W + ΔW."""
    linear: Any = layer.base
    W = linear.weight.double()
    parts = []
    for rows, own in zip(layer.routes.rows(len(x)), layer.layers, strict=True):
        effective = W if own is None else W + own.delta.weight().double()
        parts.append(x[rows].double() @ effective.mT + linear.bias.double())
    return torch.cat(parts)


@pytest.mark.parametrize("size", [1e-4, 1e-3, 1e-2])
def test_bfloat16_keeps_small_updates(size: float) -> None:
    """The realised change of each of two models' outputs, projected on the true one, is 0.97 to
    1.03 for |ΔW|/|W| down to 1e-3, and within 0.1 of 1 at 1e-4, as of one model alone."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(320, 320))
    adapted, routes = models(base, torch.bfloat16, ranks=(8, 4)), Routes((1, 1))
    (routed,) = route(base.bfloat16(), adapted, routes).values()
    for own in routed.layers:
        assert own is not None
        delta: Any = own.delta
        delta.lora_B.data *= size * own.base.weight.float().norm() / delta.weight().norm()
    stack = RoutedStack([routed])
    Copies([f for f in stack.factors if f]).refresh()
    x = torch.randn(2, 2048, 320).bfloat16()
    change = stack(x)[0].detach().double() - routed.base(x).double()
    for rows, own in zip(routes.rows(2), routed.layers, strict=True):
        assert own is not None
        true = x[rows].double() @ own.delta.weight().detach().double().mT
        gain = float((change[rows] * true).sum() / (true * true).sum())
        assert gain == pytest.approx(1, abs=0.03 if size > 2e-4 else 0.1)


@pytest.mark.parametrize(
    ("ranks", "dtype"), [(RANKS, torch.float32), (SAME, torch.float32), (RANKS, torch.bfloat16)]
)
def test_values_that_are_not_finite_stay_with_their_model(
    ranks: tuple[int, ...], dtype: torch.dtype
) -> None:
    """NaN in the factors of one model leave the outputs and gradients of the others bit for bit as
    they are, and are seen in its own: a job that diverges ruins no other."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 16))
    adapted, routes = models(base, dtype, ranks=ranks), Routes((2, 2, 2))
    (routed,) = route(base.to(dtype), adapted, routes).values()
    x = torch.randn(6, 5, 12).to(dtype).requires_grad_()
    others = [x, *factors([adapted[0], adapted[2]])]
    found = []
    for ruined in (False, True):
        if ruined:
            for parameter in factors([adapted[1]]):
                parameter.data.fill_(torch.nan)
        stack = RoutedStack([routed])
        Copies([f for f in stack.factors if f]).refresh()
        out = stack(x)[0]
        grad_x, *of_factors = gradients(out, others)
        assert grad_x is not None
        kept = [torch.cat([t[:2], t[4:]]) for t in (out, grad_x)]
        found.append([*kept, *of_factors])
        assert bool(out[2:4].isnan().any()) is ruined
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_the_fast_path_takes_of_routed_layers() -> None:
    """A routed layer is taken if that of each model is: not with a dropout in one of them."""
    base = nn.Sequential(nn.Linear(12, 16))
    adapted, routes = models(base), Routes((1, 1, 1))
    (routed,) = route(base, adapted, routes).values()
    assert takes(routed)
    (layer,) = adapted_layers(adapted[1]).values()
    layer.dropout = 0.5
    assert not takes(routed)
