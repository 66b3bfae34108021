"""Operators of the fast path against torch's own, and the layers that it takes."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sd_lora
from sd_lora.adapters.fast.convolutions import Convolution, FrozenConv
from sd_lora.adapters.fast.copies import ConvFactors, Copies, Stack
from sd_lora.adapters.fast.layers import is_plain_linear, takes
from sd_lora.adapters.fast.products import Geglu
from sd_lora.adapters.fast.residual import Block, Norm
from sd_lora.adapters.inject import adapted_layers


def adapted(model: nn.Module, dtype: torch.dtype = torch.float32, **options: Any) -> list[Any]:
    """All layers of a sequence, with random deltas on a base of this dtype."""
    torch.manual_seed(0)
    sd_lora.inject(model, ["."], **({"rank": 4, "alpha": 3.0} | options))
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape) / parameter[0].numel() ** 0.5
    for layer in adapted_layers(model).values():
        layer.base.to(dtype)
    return [*adapted_layers(model).values()]


def gradients(outs: Any, wanted: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(1)
    return [*torch.autograd.grad(sum((out * torch.randn(out.shape)).sum() for out in outs), wanted)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_stack_is_its_layers(dtype: torch.dtype, bias: bool) -> None:
    """Three linears of one input, computed as one, give the outputs and every gradient of the
    layers apart: to rounding in float32, and in bfloat16 nearer to the exact ones than they are."""
    layers = adapted(nn.Sequential(*(nn.Linear(12, 16, bias=bias) for _ in range(3))), dtype)
    x = torch.randn(2, 5, 12).to(dtype).requires_grad_()
    masters = [p for layer in layers for p in (layer.delta.lora_A, layer.delta.lora_B)]
    apart = [layer(x) for layer in layers]
    exact = [
        F.linear(
            x.double(),
            layer.base.weight.double() + layer.delta.weight().double(),
            layer.base.bias.double() if bias else None,
        )
        for layer in layers
    ]
    wanted = [x, *masters]
    general, right_ones = ([*outs, *gradients(outs, wanted)] for outs in (apart, exact))
    stack = Stack(layers)
    copies = Copies([stack])
    copies.refresh()
    outs = stack(x)
    ours = [*outs, *gradients(outs, wanted)]
    for mine, theirs, right in zip(ours, general, right_ones, strict=True):
        assert mine.dtype == theirs.dtype
        for found in (mine, theirs):
            error = (found.double() - right).norm() / right.norm()
            assert error < (1e-6 if dtype == torch.float32 else 8e-3)


def test_base_weights_keep_their_numbers_and_names() -> None:
    """A stack makes base weights views of one tensor: the same parameters with the same bits."""
    model = nn.Sequential(nn.Linear(12, 16), nn.Linear(12, 16)).bfloat16()
    layers = adapted(model, torch.bfloat16)
    before = {n: (p, p.detach().clone()) for n, p in model.named_parameters()}
    stack = Stack(layers)
    for name, parameter in model.named_parameters():
        same, numbers = before[name]
        assert parameter is same
        assert torch.equal(parameter, numbers)
    shared = {layer.base.weight.untyped_storage().data_ptr() for layer in layers}
    assert shared == {stack.W.untyped_storage().data_ptr()}


@pytest.mark.parametrize("size", [1e-4, 3e-4, 1e-3, 3e-3, 1e-2])
def test_bfloat16_keeps_small_updates(size: float) -> None:
    """The realised change of a bfloat16 layer, projected on the true one: at least 0.97 at every
    |ΔW|/|W| from 1e-4 to 1e-2, where rounding two outputs apart, as peft does, leaves 0.7 or less
    from 1e-3 down."""
    (layer,) = adapted(nn.Sequential(nn.Linear(320, 320)), torch.bfloat16, rank=8, alpha=8.0)
    ratio = layer.delta.weight().norm() / layer.base.weight.float().norm()
    layer.delta.lora_B.data *= size / ratio
    x = torch.randn(2048, 320).bfloat16()
    true = x.double() @ layer.delta.weight().detach().double().T
    stack = Stack([layer])
    Copies([stack]).refresh()

    def gain(y: Tensor) -> float:
        change = y.detach().double() - layer.base(x).double()
        return float((change * true).sum() / (true * true).sum())

    assert gain(stack(x)[0]) == pytest.approx(1, abs=0.03 if size > 2e-4 else 0.1)
    assert size > 1e-3 or gain(layer(x)) < 0.7


@pytest.mark.parametrize("stride", [1, 2])
def test_a_frozen_convolution_saves_its_weight_alone(stride: int) -> None:
    """Output and gradient are torch's, bit for bit, with a stride too, and nothing is saved but
    the weight."""
    conv = nn.Conv2d(8, 6, 3, stride=stride, padding=1).requires_grad_(False)
    x = torch.randn(2, 8, 10, 10, requires_grad=True)
    theirs = conv(x)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ours = FrozenConv.apply(x, conv.weight, conv.bias, conv.stride, conv.padding)
    assert torch.equal(ours, theirs)
    assert torch.equal(gradients([ours], [x])[0], gradients([theirs], [x])[0])
    assert [t.shape for t in saved] == [conv.weight.shape]


def test_geglu_has_the_gradient_of_its_definition() -> None:
    """a·gelu(b) and its gradient against finite differences, in float64."""
    h = torch.randn(3, 4, 10, dtype=torch.float64, requires_grad=True)
    a, b = h.chunk(2, -1)
    assert torch.equal(Geglu.apply(h), a * F.gelu(b))
    assert torch.autograd.gradcheck(Geglu.apply, h)


@pytest.mark.parametrize("trained", [(), (0,), (1,), (2,), (0, 1, 2)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_residual_block_is_its_parts(trained: tuple[int, ...], layout: Any) -> None:
    """Outputs and all gradients (input, time, factors) of a block with any of its convolutions
    trained equal those of its parts, and so does a block whose input needs no gradient."""
    sizes = ((8, 12, 3), (12, 12, 3), (8, 12, 1))
    convs = nn.Sequential(*(nn.Conv2d(i, o, k, padding=k // 2) for i, o, k in sizes))
    names = [str(i) for i in trained]
    convs.requires_grad_(False)
    if names:
        sd_lora.inject(convs, [f"^{n}$" for n in names], rank=2, alpha=3.0)
        for parameter in sd_lora.lora_layers(convs):
            nn.init.normal_(parameter, std=0.3)
    norms = [nn.GroupNorm(4, 8), nn.GroupNorm(4, 12)]
    for norm in norms:
        nn.init.normal_(norm.weight)
        norm.requires_grad_(False)
    factors = {i: ConvFactors(convs[i]) for i in trained}  # type: ignore[arg-type]
    first, second, shortcut = (
        Convolution(getattr(conv, "base", conv), factors.get(i)) for i, conv in enumerate(convs)
    )
    block = Block(Norm(norms[0]), first, Norm(norms[1]), second, shortcut)
    x, time = torch.randn(2, 8, 6, 6).to(memory_format=layout), torch.randn(2, 12, 1, 1)
    for learns_x in (True, False):
        x.requires_grad_(learns_x)
        time.requires_grad_(learns_x)
        wanted = [*([x, time] if learns_x else []), *sd_lora.lora_layers(convs)]
        middle = convs[0](F.silu(norms[0](x))) + time
        parts = convs[1](F.silu(norms[1](middle))) + convs[2](x)
        if factors:
            Copies([*factors.values()]).refresh()
        ours = block(x, time)
        torch.testing.assert_close(ours, parts, rtol=1e-5, atol=1e-5)
        if wanted:
            pairs = zip(gradients([ours], wanted), gradients([parts], wanted), strict=True)
            for mine, theirs in pairs:
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


OTHERS: dict[str, Callable[[nn.Module], object]] = {
    "LoRA-FA": lambda m: sd_lora.inject(m, ["."], method="lora_fa"),
    "LoHa": lambda m: sd_lora.inject(m, ["."], method="loha"),
    "LoKr": lambda m: sd_lora.inject(m, ["."], method="lokr"),
    "full": lambda m: sd_lora.inject(m, ["."], method="full"),
    "DoRA": lambda m: sd_lora.inject(m, ["."], rule="decompose"),
    "PiSSA": lambda m: sd_lora.inject(m, ["."], init="pissa"),
    "dropout": lambda m: sd_lora.inject(m, ["."], dropout=0.1),
    "neuron dropout": lambda m: sd_lora.inject(m, ["."], neuron_dropout=0.1),
    "rank dropout": lambda m: sd_lora.inject(m, ["."], rank_dropout=0.1),
    "module dropout": lambda m: sd_lora.inject(m, ["."], module_dropout=0.1),
    "trained biases": lambda m: sd_lora.inject(m, ["."], train_bias="lora_only"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_methods_are_left_to_the_general_path(name: str) -> None:
    """No layer with another method, init, dropout or trained bias is taken."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Conv2d(8, 8, 3))
    OTHERS[name](model)
    assert not any(takes(layer) for layer in adapted_layers(model).values())


def test_only_plain_layers_are_taken() -> None:
    """A linear layer and a convolution are; one with a hook, groups, another padding, a subclass,
    a trained base or a float64 one is not."""

    class Own(nn.Linear):
        pass

    hooked = nn.Linear(8, 8)
    hooked.register_forward_hook(lambda *_: None)
    kinds = SimpleNamespace(
        taken=[nn.Linear(8, 8), nn.Conv2d(8, 8, 3, stride=2, padding=1)],
        left=[
            hooked, nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 8, 3, padding_mode="circular"),
            nn.Conv2d(8, 8, 3, dilation=2), nn.Linear(8, 8).double(), nn.Conv1d(8, 8, 3),
        ],
    )  # fmt: skip
    for answer, modules in ((True, kinds.taken), (False, kinds.left)):
        for module in modules:
            model = nn.Sequential(module)
            sd_lora.inject(model, ["."], rank=2)
            assert takes(model[0]) is answer, module
    model = nn.Sequential(nn.Linear(8, 8))
    sd_lora.inject(model, ["."], rank=2)
    model[0].base.weight.requires_grad_(True)  # type: ignore[union-attr, operator]
    assert not takes(model[0])
    assert not is_plain_linear(Own(8, 8).requires_grad_(False))
    assert is_plain_linear(nn.Linear(8, 8).requires_grad_(False))
