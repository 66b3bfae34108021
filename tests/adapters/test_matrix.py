"""Every pair of layer kind, method, rule and dtype: one function, however it is computed."""

import copy
import itertools
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import nn

import sd_lora
from tests.adapters.layers import LAYERS, RULES, VARIANTS, build, cannot, out

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
EXACT = {name: DTYPES[name] for name in ("fp64", "fp32")}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
Cell = tuple[str, str, str, str]
"""Layer, variant, rule and dtype."""


def pairwise(dtypes: Sequence[str]) -> list[Cell]:
    """Cells in which every pair of values of two axes occurs: each layer meets each variant once,
    and rules and dtypes take turns along both."""
    return [
        (layer, variant, RULES[(i + j) % 2], dtypes[(i + j // 2) % len(dtypes)])
        for i, layer in enumerate(LAYERS)
        for j, variant in enumerate(VARIANTS)
        if not cannot(layer, variant)
    ]


def cells(dtypes: Mapping[str, torch.dtype]) -> pytest.MarkDecorator:
    """Parameters layer, variant, rule and dtype of pairwise cells."""
    parameters = [
        pytest.param(layer, variant, rule, dtypes[dtype], id=f"{layer}-{variant}-{rule}-{dtype}")
        for layer, variant, rule, dtype in pairwise([*dtypes])
    ]
    return pytest.mark.parametrize(("layer", "variant", "rule", "dtype"), parameters)


@pytest.mark.parametrize("dtypes", [["fp64", "fp32", "bf16"], ["fp64", "fp32"], ["fp64"]])
def test_every_pair_is_tested(dtypes: list[str]) -> None:
    """Each pair of values of two axes stands in some cell, but for the refused combinations."""
    axes: list[list[str]] = [[*LAYERS], [*VARIANTS], [*RULES], dtypes]
    found = {
        (a, cell[a], b, cell[b])
        for cell in pairwise(dtypes)
        for a, b in itertools.combinations(range(4), 2)
    }
    wanted = {
        (a, x, b, y)
        for a, b in itertools.combinations(range(4), 2)
        for x, y in itertools.product(axes[a], axes[b])
        if not (a == 0 and b == 1 and cannot(x, y))
    }
    assert wanted - found == set()
    assert len(pairwise(dtypes)) == sum(
        not cannot(layer, variant) for layer, variant in itertools.product(LAYERS, VARIANTS)
    )


@cells(DTYPES)
def test_first_output_is_the_bases(layer: str, variant: str, rule: str, dtype: torch.dtype) -> None:
    """A fresh delta changes no bit of the output; its tensors are never below float32."""
    adapted, args = build(layer, variant, rule, dtype, trained=False)
    before = out(copy.deepcopy(adapted.base), args)  # max_norm rewrites the base that is called
    with torch.no_grad():
        assert torch.equal(out(adapted, args), before)
    # torch.matmul folds a 3-d input or not by whether a weight needs a gradient, so the bits of
    # attention's projections depend on that for every trained model; no other layer's do
    if not layer.startswith("attention"):
        assert torch.equal(out(adapted, args), before)
    assert all(
        t.dtype.itemsize >= 4 for d in adapted.deltas_by_path().values() for t in d.parameters()
    )


@cells(EXACT)
def test_forward_is_merged_is_reloaded(
    layer: str, variant: str, rule: str, dtype: torch.dtype
) -> None:
    """The trained function, the merged layer and the function reloaded from the state are one."""
    tolerance = TOLERANCE[dtype]
    adapted, args = build(layer, variant, rule, dtype)
    y, before = out(adapted, args), out(copy.deepcopy(adapted.base), args)
    assert not torch.allclose(y, before, atol=1e-3)
    model, bare = nn.Sequential(adapted), nn.Sequential(copy.deepcopy(adapted.base))
    sd_lora.load_lora_state_dict(bare, sd_lora.lora_state_dict(model))
    torch.testing.assert_close(out(bare[0], args), y, rtol=tolerance, atol=tolerance)
    adapted.merge()
    torch.testing.assert_close(out(adapted.base, args), y, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(out(adapted, args), y, rtol=tolerance, atol=tolerance)


@cells(DTYPES)
def test_unmerging_restores_every_bit(
    layer: str, variant: str, rule: str, dtype: torch.dtype
) -> None:
    """Merging changes the weights, and unmerging gives back the very parameters, bit for bit."""
    adapted, _ = build(layer, variant, rule, dtype)
    before = dict(adapted.base.named_parameters())
    values = {name: p.clone() for name, p in before.items()}
    adapted.merge()
    merged = dict(adapted.base.named_parameters())
    assert all(not torch.equal(merged[path], values[path]) for path in adapted.deltas_by_path())
    adapted.merge()  # once more is the same merge
    adapted.unmerge()
    after = dict(adapted.base.named_parameters())
    assert all(after[name] is before[name] for name in before)
    assert all(torch.equal(after[name], values[name]) for name in before)


@cells({"fp64": torch.float64})
def test_gradients_pass_finite_differences(
    layer: str, variant: str, rule: str, dtype: torch.dtype
) -> None:
    """In fp64 every trained tensor gets the derivative that finite differences measure, and none
    of them is zero; the base gets none."""
    adapted, args = build(layer, variant, rule, dtype)
    if layer == "embedding padding_idx":  # that row gets no gradient, whatever the differences are
        args = (args[0].masked_fill(args[0] == adapted.padding_idx, 5),)
    parameters = dict(adapted.named_parameters())
    trained = {n: p for n, p in parameters.items() if p.requires_grad}
    assert {id(p) for p in trained.values()} == {
        id(p) for d in adapted.deltas_by_path().values() for p in d.parameters()
    }

    def f(*tensors: torch.Tensor) -> torch.Tensor:
        state = dict(zip(trained, tensors, strict=True))
        y = torch.func.functional_call(adapted, state, args)
        return y[0] if isinstance(y, tuple) else y

    assert torch.autograd.gradcheck(f, tuple(trained.values()), fast_mode=True)
    out(adapted, args).pow(2).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())
    assert all(p.grad is None for p in adapted.base.parameters())
