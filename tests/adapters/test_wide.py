"""Wide layers on a CPU: products by oneDNN, and convolutions as products of their columns."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

import sd_lora
from sd_lora.adapters.fast.convolutions import WIDE, Convolution, FrozenConv, columns_of
from sd_lora.adapters.fast.copies import ConvFactors, Copies, Stack
from sd_lora.adapters.fast.gemm import LEAST, TORCH, Gemm, by_work, is_right, onednn
from sd_lora.adapters.fast.layers import adapted_conv as adapted_forward
from sd_lora.adapters.fast.layers import lay_out
from sd_lora.adapters.fast.products import frozen_linear
from sd_lora.adapters.inject import adapted_layers
from sd_lora.training.fast.step import FastModel

EMBEDDED = Path(__file__).parents[2] / "sample_data/tiny-sd/unet"
has_onednn = pytest.mark.skipif(onednn() is None, reason="torch has no such operators here")

LIMIT = {torch.float32: 5e-6, torch.bfloat16: 8e-3}
"""Largest relative error of an output or a gradient: a few roundings, of sums of up to 2,880."""


def error(found: Tensor, right: Tensor) -> float:
    found, right = found.detach().double(), right.detach().double()
    return float((found - right).norm() / right.norm())


@has_onednn
@pytest.mark.parametrize("turned", [False, True])
def test_onednn_multiplies(turned: bool) -> None:
    """Its products, with a bias and onto another tensor, are float64's to a few roundings, of a
    weight stored by rows and by columns."""
    gemm = onednn()
    assert gemm is not None
    x, y, bias = torch.randn(33, 400), torch.randn(33, 360), torch.randn(360)
    W = torch.randn(400, 360).t() if turned else torch.randn(360, 400)
    right = x.double() @ W.double().t()
    assert error(gemm.linear(x, W), right) < 1e-6
    assert error(gemm.linear(x, W, bias), right + bias) < 1e-6
    assert error(gemm.onto(y.clone(), x, W), right + y) < 1e-6


def test_wrong_products_are_refused() -> None:
    """Products that lack a bias, take a weight for its transpose's memory, or add nothing are not
    torch's; torch's own are."""
    assert is_right(TORCH)
    assert not is_right(Gemm(lambda x, W, bias=None: F.linear(x, W), TORCH.onto))
    assert not is_right(Gemm(TORCH.linear, lambda y, x, W: F.linear(x, W)))

    def by_memory(x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, W.as_strided(W.shape, (W.shape[1], 1)), bias)

    assert not is_right(Gemm(by_memory, TORCH.onto))


def adapted_conv(kernel: int, stride: int, dtype: torch.dtype) -> tuple[Any, ConvFactors]:
    """A wide convolution with a random delta, and working copies of its factors."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(WIDE, 320, kernel, stride, kernel // 2))
    sd_lora.inject(model, ["."], rank=4, alpha=3.0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape) / parameter[0].numel() ** 0.5
    (layer,) = adapted_layers(model).values()
    layer.base.to(dtype)
    factors = ConvFactors(layer)  # type: ignore[arg-type]
    Copies([factors]).refresh()
    return layer, factors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (1, 1)])
@pytest.mark.parametrize("batch", [1, 4])
def test_columns_are_the_convolution(
    kernel: int, stride: int, batch: int, dtype: torch.dtype
) -> None:
    """Output, and gradients of the input and of both factors, of a convolution that is computed
    from columns are float64's to a few roundings of its dtype; so are those of a frozen one, and of
    the frozen and the adapted layer alone."""
    layer, factors = adapted_conv(kernel, stride, dtype)
    side, base = 4 * stride, layer.base
    x = torch.randn(batch, WIDE, side, side).to(dtype)
    g = torch.randn(batch, 320, 4, 4).to(dtype)
    form = base.stride, base.padding
    assert columns_of(x.shape, base.weight, *form) is not None

    leaves = [t.detach().double().requires_grad_() for t in (x, factors.A, factors.B)]
    W, bias = base.weight.double(), base.bias.double()
    exact = F.conv2d(leaves[0], W, bias, *form)
    frozen_gradient = torch.autograd.grad(exact, leaves[0], g.double())[0]
    frozen_output = exact.detach()
    exact = F.conv2d(leaves[0], W, bias, *form)
    exact = exact + F.conv2d(F.conv2d(leaves[0], leaves[1], None, *form), leaves[2])
    right = [exact.detach(), *torch.autograd.grad(exact, leaves, g.double())]

    A, B = factors.buffers
    conv = Convolution(base, factors)
    y, low = conv.product(x, A, B)
    dx, pair = conv.gradients(g, x, low, A, B, True)
    for found, wanted in zip((y, dx, *pair), right, strict=True):
        assert found is not None
        assert found.dtype == dtype
        assert found.shape == wanted.shape
        assert error(found, wanted) < LIMIT[dtype]
    assert conv.gradients(g, x, low, A, B, False)[0] is None

    x.requires_grad_()
    frozen = FrozenConv.apply(x, base.weight, base.bias, *form)
    found = [frozen.detach(), torch.autograd.grad(frozen, x, g)[0]]
    y, low = Convolution(base, None).product(x.detach(), None, None)
    dx, pair = Convolution(base, None).gradients(g, x.detach(), low, None, None, True)
    assert pair == (None, None)
    assert torch.equal(y, found[0])
    assert torch.equal(dx, found[1])
    for mine, wanted in zip(found, (frozen_output, frozen_gradient), strict=True):
        assert error(mine, wanted) < LIMIT[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "size"),
    [
        ((3, 3), (2, 2), (1, 1), (7, 5)),
        ((3, 1), (2, 1), (1, 0), (6, 5)),
        ((1, 3), (1, 3), (0, 2), (4, 9)),
        ((3, 3), (1, 2), (0, 1), (6, 8)),
    ],
)
def test_columns_of_other_forms(
    kernel: tuple[int, int], stride: Any, padding: Any, size: Any, dtype: torch.dtype
) -> None:
    """Columns times the kernel, which is stored pixel by pixel, and the gradient of the input are
    float64's convolution to a few roundings: sides that differ, are odd, or that a stride does not
    divide."""
    W = (torch.randn(320, WIDE, *kernel) / 30).to(dtype)
    W = W.contiguous(memory_format=torch.channels_last)
    x = torch.randn(1, WIDE, *size).to(dtype)
    assert columns_of(x.shape, W, stride, padding) is not None
    x64 = x.double().requires_grad_()
    exact = F.conv2d(x64, W.double(), None, stride, padding)
    g = torch.randn(exact.shape).to(dtype)
    y = FrozenConv.apply(x.requires_grad_(), W, None, stride, padding)
    assert error(y, exact) < LIMIT[dtype]
    dx, dx64 = (
        torch.autograd.grad(out, leaf, g.to(out.dtype))[0] for out, leaf in ((y, x), (exact, x64))
    )
    assert error(dx, dx64) < LIMIT[dtype]


@pytest.mark.parametrize("side", [2, 8])
def test_an_adapted_convolution_is_the_general_one(side: int) -> None:
    """A wide adapted convolution with a stride, to one pixel and to more, has the general path's
    output and gradients."""
    layer, factors = adapted_conv(3, 2, torch.float32)
    masters, copies = [layer.delta.lora_A, layer.delta.lora_B], Copies([factors])
    copies.refresh()
    x, g = torch.randn(1, WIDE, side, side, requires_grad=True), torch.randn(side // 2, side // 2)
    found = []
    for y in (adapted_forward(layer, factors)(x), layer(x)):
        found.append([y, *torch.autograd.grad(y, [x, *masters], g.expand_as(y))])
    for mine, theirs in zip(*found, strict=True):
        assert error(mine, theirs) < LIMIT[torch.float32]


def test_the_gradient_of_columns_is_summed_in_float32() -> None:
    """In bfloat16 the gradient of an input, a sum of nine rounded parts, has at most 1.5 times the
    error of torch's convolution; summed in bfloat16 it has 2.4 times."""
    layer, _ = adapted_conv(3, 1, torch.bfloat16)
    x = torch.randn(1, WIDE, 8, 8).bfloat16().requires_grad_()
    base, found = layer.base, []
    g = torch.randn(1, 320, 8, 8).bfloat16()
    for way in (FrozenConv.apply, F.conv2d):
        y = way(x, base.weight, base.bias, base.stride, base.padding)
        found.append(torch.autograd.grad(y, x, g)[0])
    x64 = x.detach().double().requires_grad_()
    exact = F.conv2d(x64, base.weight.double(), None, base.stride, base.padding)
    right = torch.autograd.grad(exact, x64, g.double())[0]
    assert error(found[0], right) < 1.5 * error(found[1], right)


@pytest.mark.parametrize("count", [1, 3])
def test_wide_linears_are_their_products(count: int) -> None:
    """Wide linears of one input, and frozen ones, give float64's outputs and gradients to a few
    roundings."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(352, 320) for _ in range(count)))
    sd_lora.inject(model, ["."], rank=4, alpha=4.0)
    layers: list[Any] = [*adapted_layers(model).values()]
    for layer in layers:
        nn.init.normal_(layer.delta.lora_B, std=0.1)
    stack, x = Stack(layers), torch.randn(2, 5, 352, requires_grad=True)
    Copies([stack]).refresh()
    gs = [torch.randn(2, 5, 320) for _ in layers]
    outs = [stack.forward_of_one()(x)] if count == 1 else stack(x)
    x64 = x.detach().double().requires_grad_()
    exact = [
        F.linear(x64, layer.base.weight.double() + layer.delta.weight(), layer.base.bias.double())
        for layer in layers
    ]
    masters = [p for layer in layers for p in (layer.delta.lora_A, layer.delta.lora_B)]
    mine = torch.autograd.grad([*outs], [x, *masters], gs)
    theirs = torch.autograd.grad(exact, [x64, *masters], [g.double() for g in gs])
    for found, right in zip((*outs, *mine), (*exact, *theirs), strict=True):
        assert error(found, right) < 2e-6
    base = layers[0].base
    frozen = frozen_linear(x, base.weight, base.bias)
    right = F.linear(x64, base.weight.double(), base.bias.double())
    assert error(frozen, right) < 1e-6
    (dx,) = torch.autograd.grad(frozen, x, gs[0])
    (dx64,) = torch.autograd.grad(right, x64, gs[0].double())
    assert error(dx, dx64) < 1e-6


def test_the_rule_is_width_and_pixels() -> None:
    """Columns are taken of wide kernels with five outputs a pixel of the batch, and of one pixel's
    kernels of any width, on a CPU, in float32 and bfloat16."""
    kernel, point = torch.empty(320, WIDE, 3, 3), torch.empty(8, 4, 1, 1)
    form = (1, 1), (1, 1)
    assert columns_of((1, WIDE, 8, 8), kernel, *form) is not None
    assert columns_of((4, WIDE, 4, 4), kernel, *form) is not None
    assert columns_of((1, WIDE, 8, 9), kernel, *form) is None
    assert columns_of((WIDE, 8, 8), kernel, *form) is None  # without a batch
    for other in (kernel[:, 1:], kernel.half(), kernel.to("meta")):
        assert columns_of((1, WIDE, 4, 4), other, *form) is None
    assert columns_of((2, 4, 64, 64), point, (1, 1), (0, 0)) is not None
    for padding, stride in (((1, 1), (1, 1)), ((0, 0), (2, 2))):
        assert columns_of((2, 4, 64, 64), point, stride, padding) is None


@has_onednn
def test_products_go_to_the_faster_library() -> None:
    """Below the limit of multiplications, and of a weight that is a part of a wider one (as the
    gradient of an image that skips is), a product is torch's to the bit; else oneDNN's."""
    one, both = onednn(), by_work()
    assert one is not None
    assert both is not None
    wide, bias = torch.randn(200, 300), torch.randn(200)
    own, part = wide[:, :100].contiguous(), wide[:, :100]
    least = LEAST // own.numel()
    for W, count, way in (
        (own, least - 1, TORCH), (own, least, one), (part, least, TORCH),
        (part.t().contiguous().t(), least, one),
    ):  # fmt: skip
        x, y = torch.randn(count, 100), torch.randn(count, 200)
        assert torch.equal(both.linear(x, W, bias), way.linear(x, W, bias))
        assert torch.equal(both.onto(y.clone(), x, W), way.onto(y.clone(), x, W))


def test_trained_norms_keep_the_layout() -> None:
    """Where group norms learn, by an adapter or themselves, kernels stay as they are."""
    for trains in ("adapter", "itself"):
        model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.GroupNorm(2, 8)).requires_grad_(False)
        if trains == "adapter":
            sd_lora.inject(model, ["1"], method="full")
        else:
            model[1].requires_grad_(True)
        lay_out(model, torch.device("cpu"))
        assert not model[0].weight.is_contiguous(memory_format=torch.channels_last)
    lay_out(model.requires_grad_(False), torch.device("cpu"))
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_cpu_reads_images_pixel_by_pixel() -> None:
    """On a CPU the fast path stores a UNet's frozen kernels as it reads images, pixel by pixel,
    with their numbers, and the whole model's images stay so: nothing is copied to and fro."""
    unet: Any = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(EMBEDDED))
    unet.requires_grad_(False)
    sd_lora.inject(unet, "attention", rank=8)
    before = {name: p.clone() for name, p in unet.named_parameters()}
    lay_out(unet, torch.device("cpu"))
    fast_model = FastModel(unet)
    assert all(torch.equal(p, before[name]) for name, p in unet.named_parameters())
    seen = []
    for module in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
        module.register_forward_hook(lambda _, args, out: seen.append((*args, out)))
    with fast_model:
        unet(torch.randn(2, 4, 16, 16), torch.tensor(3), torch.randn(2, 7, 128))
    images = [x for x in torch.utils._pytree.tree_leaves(seen) if getattr(x, "ndim", 0) == 4]
    assert len(images) > 12
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in images)
