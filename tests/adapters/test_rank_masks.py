"""Ranks masked for each item of a batch (T-LoRA): the layer computes with the first ones alone."""

import pytest
import torch

from sd_lora.adapters.merging import mask_ranks, unmask_ranks, whole_ranks
from tests.adapters.layers import build, out

SHARES = torch.tensor([0.0, 0.6, 1.0])
KEPT = [1, 2, 4]  # of 4 ranks, at least 1: 1 + ⌊share · 3⌋


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
@pytest.mark.parametrize(
    "layer", ["linear", "linear without bias", "gpt2 conv1d", "conv2d 3x3", "conv2d groups",
              "conv transpose 2d, grouped, dilated", "embedding"]
)  # fmt: skip
def test_each_item_has_its_own_ranks(layer: str, init: str) -> None:
    """Item i's output is that of the layer whose factors are the first n_i ranks of A and B, and
    the rest learns nothing from it, for every type of layer, for groups, and for a delta that is
    the difference of two products (PiSSA); then all ranks are back."""
    options = {"init": init}
    adapted, (x,) = build(layer, rank=4, dtype=torch.float64, options=options, trained=False)
    delta = adapted.delta
    for factor in (delta.lora_A, delta.lora_B):
        factor.data += 0.1 * torch.randn(factor.shape, dtype=torch.float64)
    x = x.repeat(2, *(1,) * (x.dim() - 1))[:3]  # type: ignore[attr-defined]
    model = torch.nn.Sequential(adapted)
    whole = out(adapted, (x,))
    for number, kept in enumerate(KEPT):
        few, _ = build(layer, rank=4, dtype=torch.float64, options=options, trained=False)
        few.load_state_dict(adapted.state_dict())
        for name, value in few.delta.state_dict(keep_vars=True).items():
            ranks = value.data if name.endswith("_A") else value.data.movedim(1, 0)
            ranks[kept:] = 0
        mask_ranks(model, SHARES, 1)
        y = out(adapted, (x,))
        torch.testing.assert_close(y[number], out(few, (x,))[number], rtol=1e-9, atol=1e-9)
        adapted.zero_grad()
        y[number].square().sum().backward()
        unlearned = delta.lora_A.grad
        assert unlearned is not None
        assert not unlearned[kept:].any()
        assert unlearned[:kept].any()
        with whole_ranks(model):
            torch.testing.assert_close(out(adapted, (x,)), whole)
    torch.testing.assert_close(out(adapted, (x,))[2], whole[2])
    unmask_ranks(model)
    torch.testing.assert_close(out(adapted, (x,)), whole)
