"""Adapters that are off cost nothing: images of a base that no step has changed yet."""

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import sd_lora
from sd_lora.adapters.merging import idle_off, switched_off
from tests.adapters.layers import VARIANTS
from tests.adapters.test_state import IDS, LAYERS, Net, net, rules, variants
from tests.tiny import build_unet


class Products(TorchDispatchMode):
    """Counts linear products and convolutions."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        self.count += name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "convolution")
        return func(*args, **(kwargs or {}))


def answer(unet: nn.Module) -> tuple[Tensor, int]:
    """A UNet's output for one input, and the products that it took."""
    generator = torch.Generator().manual_seed(0)
    x, text = (torch.randn(size, generator=generator) for size in ((1, 4, 8, 8), (1, 5, 32)))
    with torch.no_grad(), Products() as products:
        return unet(x, 7, text).sample, products.count


def test_idle_adapters_cost_nothing() -> None:
    """Where a fresh LoRA is off because it is idle, a UNet computes the bits that it computes with
    it, by the base's number of products; a layer that has learned still computes, and bias deltas,
    too; afterwards all is as before. Switched off whole, it costs nothing either."""
    unet = build_unet().eval()
    base, of_base = answer(unet)
    names = sd_lora.inject(unet, "all", rank=2)
    fresh, of_fresh = answer(unet)
    assert of_fresh == of_base + 2 * len(names)
    with idle_off([unet]):
        spared, of_spared = answer(unet)
    assert of_spared == of_base
    assert torch.equal(spared, fresh)
    assert torch.equal(spared, base)
    assert answer(unet)[1] == of_fresh

    learned = sd_lora.deltas_of(unet)[names[0]]
    with torch.no_grad():
        learned.lora_B.fill_(0.1)
    changed = answer(unet)[0]
    with idle_off([unet]):
        spared, of_spared = answer(unet)
    assert of_spared == of_base + 2
    assert torch.equal(spared, changed)
    assert not torch.equal(spared, base)
    with switched_off(unet):
        assert answer(unet)[1] == of_base


@rules
@variants
def test_idle_layers_compute_as_their_base(variant: str, rule: str) -> None:
    """Of every method and rule, fresh or trained: a model with its idle layers off computes the
    bits that it computes with them."""
    fresh, given = Net(), dict(VARIANTS[variant])
    options = given.pop("options", {}) | given | {"targets": LAYERS, "rank": 2, "rule": rule}
    sd_lora.inject(fresh, **options)
    with torch.no_grad():
        for model in (fresh, net(variant, rule)):
            want = model(IDS)
            with idle_off([model]):
                assert torch.equal(model(IDS), want)


def test_strength_zero_keeps_the_factors_gradients() -> None:
    """At strength 0 a loss has a gradient of zeros in every factor, as a factor of 0 gives it."""
    model = net()
    sd_lora.set_strength(model, 0)
    model(IDS).sum().backward()
    gradients = [p.grad for p in sd_lora.lora_layers(model)]
    assert gradients
    assert all(g is not None and not g.any() for g in gradients)
