"""One adapted layer at a time: its input's gradient, hooks, autocast, its attributes, other kinds.

The matrix of kinds × methods × rules is in test_matrix.py, other libraries in test_oracles.py.
"""

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor, nn

import sd_lora
from sd_lora.adapters.deltas import METHODS
from sd_lora.adapters.layer_classes import adapted_class_of
from sd_lora.adapters.state import make_delta
from sd_lora.adapters.variants import Variant, new_delta
from tests.adapters.layers import LAYERS, RULES, VARIANTS, build, out, randomise

DENSE = [name for name in LAYERS if not name.startswith(("embedding", "attention"))]


def delta_of(*shape: int, seed: int = 0, **variant: object) -> sd_lora.Delta:
    """Returns a trained delta of a weight of this shape, rank 2, alpha 3."""
    g = torch.Generator().manual_seed(seed)
    delta = new_delta(Variant(**variant), torch.randn(shape, generator=g), 2, 3.0, g)
    for p in delta.parameters():
        p.data.add_(0.4 * torch.randn(p.shape, generator=g))
    return delta


TRANSPOSED: dict[str, tuple[type[nn.Module], dict[str, object], tuple[int, ...]]] = {
    "1d": (nn.ConvTranspose1d, {"stride": 3, "padding": 1, "output_padding": 2}, (2, 6, 4)),
    "2d grouped": (nn.ConvTranspose2d, {"stride": (2, 1), "groups": 2}, (1, 6, 3, 4)),
    "2d depthwise, dilated": (nn.ConvTranspose2d, {"dilation": 2, "groups": 6}, (1, 6, 3, 3)),
    "3d": (nn.ConvTranspose3d, {"stride": (1, 2, 2), "padding": (0, 1, 0)}, (1, 6, 2, 2, 3)),
}


def transposed_convolution(
    x: np.ndarray, W: np.ndarray, base: Any, output_padding: Sequence[int]
) -> np.ndarray:
    """A transposed convolution by its definition: x[n, i, p] · W[i, o, k] is added to the output o
    of i's group at the place p·stride + k·dilation − padding."""
    num, inputs, *size = x.shape
    per_group = inputs // base.groups
    steps = (np.array(v) for v in (base.stride, base.dilation, base.padding, base.kernel_size))
    stride, dilation, padding, kernel = steps
    out = (np.array(size) - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1
    out += np.array(output_padding)
    y = np.zeros((num, base.groups * W.shape[1], *out))
    for i, p, k in itertools.product(range(inputs), np.ndindex(*size), np.ndindex(*kernel)):
        place = np.array(p) * stride + np.array(k) * dilation - padding
        if (place >= 0).all() and (place < out).all():
            first = i // per_group * W.shape[1]
            y[:, first : first + W.shape[1], *place] += x[:, i, *p, None] * W[i, :, *k]
    return y


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", TRANSPOSED)
def test_transposed_convolutions_are_the_closed_form(kind: str, rule: str) -> None:
    """A ConvTranspose computes with W[i, o, k] + s·Σ_r B[o, r]·A[r, i, k], i the place in the
    group: the sum of the definition, written out in numpy, with strides, paddings, groups and
    dilation; under DoRA with each output's kernel scaled to m; at the sizes that `output_size`
    asks for; before merging and after it."""
    torch.manual_seed(0)
    make, options, shape = TRANSPOSED[kind]
    outputs = 6 if options.get("groups") == 6 else 4
    model = nn.Sequential(make(6, outputs, 3, bias=False, **options)).double()
    base, x = model[0], torch.randn(shape).double()
    W = base.weight.detach().numpy().copy()  # (in, out/groups, k…)
    sd_lora.inject(model, ["0"], rank=2, alpha=3.0, rule=rule)
    randomise(layer := model[0])
    A, B = (getattr(layer.delta, f"lora_{f}").detach().numpy() for f in "AB")
    for i, o in itertools.product(range(6), range(W.shape[1])):
        group, place = divmod(i, 6 // base.groups)
        row = B[group * W.shape[1] + o].reshape(-1)
        W[i, o] += 1.5 * np.tensordot(row, A[:, place], 1)
    if rule == "decompose":
        m = layer.delta.magnitude.detach().numpy().reshape(base.groups, -1)
        for g, o in itertools.product(range(base.groups), range(W.shape[1])):
            group = slice(g * 6 // base.groups, (g + 1) * 6 // base.groups)
            W[group, o] *= m[g, o] / np.linalg.norm(W[group, o])
    for more in {0, int(np.max(base.stride)) - 1}:
        padding = [
            min(p + more, s - 1) for p, s in zip(base.output_padding, base.stride, strict=True)
        ]
        want = torch.from_numpy(transposed_convolution(x.numpy(), W, base, padding))
        asked = {"output_size": want.shape[2:]} if more else {}
        for _ in range(2):
            torch.testing.assert_close(layer(x, **asked), want, rtol=1e-12, atol=1e-12)
            layer.merge()
        layer.unmerge()
    with pytest.raises(ValueError, match="requested an output size"):
        layer(x, output_size=[99] * (x.dim() - 2))


@pytest.mark.parametrize("variant", ["lora", "loha"])
def test_dropout_of_a_transposed_convolution_knows_the_output_size(variant: str) -> None:
    """A size asked for drops the same inputs: the outputs of two sizes agree where both have them,
    and differ from the output without dropout."""
    adapted, (x,) = build("conv transpose 1d", variant, dropout=0.3)
    adapted.train()
    outputs = []
    for size in ([], [[9]], [[10]]):
        torch.manual_seed(0)
        outputs.append(adapted(x, *size))
    assert torch.equal(outputs[0], outputs[2])
    assert outputs[1].shape[2] == 9
    torch.testing.assert_close(outputs[1], outputs[2][..., :9])
    assert not torch.allclose(adapted.eval()(x), outputs[0], atol=1e-2)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("layer", DENSE)
def test_input_gets_the_gradient_of_the_effective_weight(layer: str, rule: str) -> None:
    """The gradient of the input is autograd's through base(x; W'), for the hand-written backward
    and for convolutions; the matrix test has those of the tensors."""
    adapted, (x,) = build(layer, "lora", rule, torch.float64)
    x.requires_grad_()
    (got,) = torch.autograd.grad(adapted(x).pow(3).sum(), x)
    state = {"weight": adapted.effective_weight().detach()}
    y = torch.func.functional_call(adapted.base, state, (x,))
    (want,) = torch.autograd.grad(y.pow(3).sum(), x)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_fused_linear_passes_finite_differences() -> None:
    """The hand-written backward agrees with finite differences, each entry of its Jacobian, also
    for the input; a second derivative, which it does not have, is an error and no zero."""
    adapted, (x,) = build("linear", dtype=torch.float64)
    x.requires_grad_()

    def f(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        state = {"deltas.weight.lora_A": A, "deltas.weight.lora_B": B}
        return torch.func.functional_call(adapted, state, (x,))

    assert torch.autograd.gradcheck(f, (x, adapted.delta.lora_A, adapted.delta.lora_B))
    (g,) = torch.autograd.grad(adapted(x).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


def test_an_unfrozen_base_gets_its_gradient() -> None:
    """The fused path is left when someone thaws the base: no gradient is lost in silence."""
    adapted, (x,) = build("linear")
    frozen = adapted(x)
    adapted.base.requires_grad_(True)
    y = adapted(x)
    torch.testing.assert_close(y, frozen)
    y.sum().backward()
    assert adapted.base.weight.grad.abs().sum() > 0
    assert adapted.delta.lora_A.grad.abs().sum() > 0


class Doubled(ModelHook):
    """What accelerate puts on a module: here one that doubles its output."""

    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        return 2 * output


def test_hooks_of_the_base_are_heard() -> None:
    """A forward hook of torch, and one of accelerate (offloading puts them on each layer), act on
    the base's product: the fused path, which never calls the base, is left for them."""
    adapted, (x,) = build("linear")
    base, delta = adapted.base(x), adapted(x) - adapted.base(x)
    handle = adapted.base.register_forward_hook(lambda module, args, y: 2 * y)
    torch.testing.assert_close(adapted(x), 2 * base + delta)
    handle.remove()
    add_hook_to_module(adapted.base, Doubled())
    torch.testing.assert_close(adapted(x), 2 * base + delta)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("layer", ["linear", "gpt2 conv1d", "conv2d 3x3", "attention"])
def test_autocast_computes_in_its_dtype(layer: str, rule: str) -> None:
    """Under autocast a float32 layer and its delta run in bfloat16, to its precision, and the
    gradients of the float32 tensors are float32."""
    adapted, args = build(layer, rule=rule)
    with torch.autocast("cpu", torch.bfloat16):
        y = out(adapted, args)
    assert y.dtype == torch.bfloat16
    full = out(adapted, args)
    assert torch.linalg.vector_norm(y - full) < 0.02 * torch.linalg.vector_norm(full)
    y.float().sum().backward()
    trained = [p for d in adapted.deltas_by_path().values() for p in d.parameters()]
    assert {p.grad.dtype for p in trained} == {torch.float32}


@pytest.mark.parametrize("layer", ["linear", "conv2d 3x3", "embedding"])
def test_inputs_are_taken_by_keyword(layer: str) -> None:
    """Some model code calls `layer(input=x)` (diffusers' motion modules): so does the wrapper."""
    adapted, (x,) = build(layer)
    assert torch.equal(adapted(input=x), adapted(x))
    adapted, (x,) = build("gpt2 conv1d")
    assert torch.equal(adapted(x=x), adapted(x))


@pytest.mark.parametrize("rule", RULES)
def test_wrapper_answers_for_its_base(rule: str) -> None:
    """Asked for its weight a layer gives W', in the base's dtype and with its gradient (so model
    code that computes with it trains the delta); asked for anything else, the base's own."""
    adapted, (x,) = build("conv2d 3x3", rule=rule, dtype=torch.bfloat16)
    weight = adapted.weight
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight, adapted.effective_weight().bfloat16())
    assert not torch.equal(weight, adapted.base.weight)
    weight.float().pow(2).sum().backward()
    assert adapted.delta.lora_B.grad.abs().sum() > 0
    assert (adapted.in_channels, adapted.out_channels) == (6, 8)
    assert adapted.bias is adapted.base.bias
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = adapted.no_such_thing
    adapted.merge()
    assert adapted.weight is adapted.base.weight
    assert torch.equal(adapted.weight, weight)


NORMS: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: nn.LayerNorm(8),
    "group": lambda: nn.GroupNorm(2, 8),
    "rms": lambda: nn.RMSNorm(8),
    "batch": lambda: nn.BatchNorm1d(8),
}


@pytest.mark.parametrize("norm", NORMS)
def test_norms_are_trained_in_full(norm: str) -> None:
    """A norm's gain and shift by the method full: the first output is the base's bit for bit, and
    the trained function is the base's with weight + ΔW and bias + Δb."""
    torch.manual_seed(0)
    base, x = NORMS[norm]().double().requires_grad_(False), torch.randn(4, 8).double()
    for p in base.parameters():
        p.uniform_(-1, 1)
    plain = copy.deepcopy(base)
    before = dict(plain.named_parameters())
    adapted = sd_lora.wrap(base, {n: new_delta(Variant("full"), p) for n, p in before.items()})
    assert torch.equal(adapted(x), plain(x))
    randomise(adapted)
    y = adapted(x)
    state = {n: p + adapted.deltas_by_path()[n].diff for n, p in before.items()}
    torch.testing.assert_close(y, torch.func.functional_call(plain, state, (x,)))
    y.pow(2).sum().backward()
    assert all(d.diff.grad.abs().sum() > 0 for d in adapted.deltas_by_path().values())
    adapted.merge()
    torch.testing.assert_close(adapted(x), y, rtol=1e-12, atol=1e-12)


def test_any_module_can_be_wrapped() -> None:
    """A module of a kind without a class of its own computes with W' in the parameter's place: a
    low-rank delta of a GRU's recurrent weight is the GRU with W + s·B·A, merged and unmerged."""
    torch.manual_seed(0)
    gru, x = nn.GRU(5, 4).double().requires_grad_(False), torch.randn(7, 2, 5).double()
    before, delta = gru(x)[0], delta_of(12, 4).double()
    adapted = sd_lora.wrap(gru, {"weight_hh_l0": delta})
    y = adapted(x)[0]
    assert not torch.allclose(y, before, atol=1e-3)
    twin = copy.deepcopy(gru)
    with torch.no_grad():
        twin.weight_hh_l0.add_(1.5 * delta.lora_B @ delta.lora_A)
    torch.testing.assert_close(y, twin(x)[0], rtol=1e-12, atol=1e-12)
    adapted.merge()
    torch.testing.assert_close(adapted(x)[0], y, rtol=1e-12, atol=1e-12)
    adapted.unmerge()
    assert torch.equal(gru(x)[0], before)


def test_only_known_classes_are_taken_for_their_kind() -> None:
    """A subclass may compute something else (attention reads its projection's weight), so it is
    not taken for the plain layer; norms are known to the method full alone."""

    class MyLinear(nn.Linear):
        pass

    assert adapted_class_of(nn.Linear(4, 4)) is not None
    assert adapted_class_of(MyLinear(4, 4)) is None
    assert adapted_class_of(nn.MultiheadAttention(8, 2).out_proj) is None
    assert adapted_class_of(nn.LayerNorm(4), "lora") is None
    assert adapted_class_of(nn.LayerNorm(4), "full") is not None


def test_rslora_scales_by_the_root_of_the_rank() -> None:
    """ΔW = (α/√r)·B·A with rslora and (α/r)·B·A without, the same A and B."""
    W = torch.zeros(6, 8)
    for rslora, scale in ((False, 5.0 / 4), (True, 5.0 / 2)):
        delta = new_delta(Variant(rslora=rslora), W, 4, 5.0, torch.Generator().manual_seed(0))
        nn.init.ones_(delta.lora_B)
        torch.testing.assert_close(delta.weight(), scale * delta.lora_B @ delta.lora_A)
        assert delta.weight().abs().sum() > 0


@pytest.mark.parametrize(
    ("layer", "shape", "inner"),
    [
        ("linear", (50, 12), (3, 50)),
        ("gpt2 conv1d", (50, 12), (3, 50)),
        ("conv2d 3x3", (50, 6, 7, 7), (50, 3, 7, 7)),
    ],
)
def test_lora_fa_keeps_no_input(layer: str, shape: tuple[int, ...], inner: tuple[int, ...]) -> None:
    """LoRA-FA trains B alone, and of the batch its layer saves nothing for the backward pass but
    h = A x, of the rank's width; LoRA saves the input too, once."""
    saved = {}
    for method in ("lora", "lora_fa"):
        adapted, _ = build(layer, method)
        names = {n for n, p in adapted.named_parameters() if p.requires_grad}
        factors = ("lora_B",) if method == "lora_fa" else ("lora_A", "lora_B")
        assert names == {f"deltas.weight.{n}" for n in factors}
        shapes: list[tuple[int, ...]] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, shapes=shapes: shapes.append(tuple(t.shape)) or t, lambda t: t
        ):
            y = adapted(torch.randn(shape))
        y.sum().backward()
        assert adapted.delta.lora_B.grad.abs().sum() > 0
        saved[method] = sorted(s for s in shapes if 50 in s)  # no weight has 50 of anything
    assert saved == {"lora": sorted([shape, inner]), "lora_fa": [inner]}


def test_magnitudes_are_read_along_either_side() -> None:
    """A magnitude of one value an output rescales rows; one of (1, in), as LyCORIS' older files
    have, columns: W' = m·V/‖V‖ with the norm over the rest, by the formula."""
    torch.manual_seed(0)
    W, m_out, m_in = torch.randn(6, 4, 3, 3), torch.rand(6), torch.rand(1, 4, 1, 1)
    tensors = {"lora_A": torch.randn(2, 4, 3, 3), "lora_B": torch.randn(6, 2, 1, 1)}
    for m, over, view in ((m_out, (1, 2, 3), (6, 1, 1, 1)), (m_in, (0, 2, 3), (1, 4, 1, 1))):
        delta = make_delta("x", tensors | {"magnitude": m, "alpha": torch.tensor(4.0)})
        delta.fit((6, 4, 3, 3))
        V = W + 2.0 * (tensors["lora_B"].flatten(1) @ tensors["lora_A"].flatten(1)).view(W.shape)
        want = m.view(view) * V / V.pow(2).sum(over, keepdim=True).sqrt()
        torch.testing.assert_close(delta.compose(W), want)
        torch.testing.assert_close(delta.compose(W, 0.25), W + 0.25 * (want - W))
    with pytest.raises(ValueError, match="a magnitude of"):
        make_delta("x", tensors | {"magnitude": torch.rand(5)}).fit((6, 4, 3, 3))


def test_a_row_of_zeros_stays_finite_when_decomposed() -> None:
    """A row W = 0 has no direction: it stays zero, with finite gradients for everything else."""
    base = nn.Linear(4, 3)
    base.weight.data[1] = 0
    adapted = sd_lora.wrap(base, {"weight": new_delta(Variant(rule="decompose"), base.weight, 2)})
    y = adapted(torch.randn(5, 4))
    assert torch.equal(y[:, 1], base.bias[1].expand(5))
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in adapted.delta.parameters())


def test_a_new_method_is_a_few_lines() -> None:
    """A method registered from outside has everything: a first output of the base, gradients,
    exact merges, a state that is recognised, its rule decompose, linear and convolution."""

    @sd_lora.register_method("ia3")
    class IA3(sd_lora.Delta):
        """ΔW = diag(l)·C with a fixed random C: a toy."""

        tensor_names = ("ia3_l", "ia3_c")
        frozen = ("ia3_c",)

        @classmethod
        def create(cls, shape, rank, generator, *, spread: float = 1.0):  # type: ignore[no-untyped-def]
            c = spread * torch.randn(shape, generator=generator)
            return {"ia3_l": torch.zeros(shape[0], *(1,) * (len(shape) - 1)), "ia3_c": c}

        def matrix(self) -> Tensor:
            return self.ia3_l * self.ia3_c

    try:
        for rule in RULES:
            torch.manual_seed(0)
            model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 4)).double()
            twin, x = copy.deepcopy(model), torch.randn(2, 2, 4, 4).double()
            sd_lora.inject(model, ["0", "2"], method="ia3", rule=rule, spread=0.5)
            assert torch.equal(model(x), twin(x))
            for layer in (model[0], model[2]):
                nn.init.normal_(layer.delta.ia3_l)
            y = model(x)
            y.pow(2).sum().backward()
            trained = sd_lora.lora_layers(model)
            assert len(trained) == (2 if rule == "add" else 4)
            assert "ia3" in repr(model)
            assert all(p.grad.abs().sum() > 0 for p in trained)
            state = sd_lora.lora_state_dict(model)
            assert {"0.ia3_l", "0.ia3_c"} <= state.keys()
            sd_lora.load_lora_state_dict(twin, state)
            torch.testing.assert_close(twin(x), y)
            sd_lora.merge(model)
            torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)
        with pytest.raises(sd_lora.UsageError, match=r"ia3 has no option 'spraed'.*Did you mean"):
            sd_lora.inject(nn.Sequential(nn.Linear(4, 4)), ["0"], method="ia3", spraed=1.0)
        with pytest.raises(ValueError, match="registered already: IA3"):
            sd_lora.register_method("ia3")(IA3)
    finally:
        METHODS.pop("ia3")
    with pytest.raises(sd_lora.UsageError, match="unknown method 'ia3'"):
        Variant("ia3")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rule", RULES)
def test_autocast_does_not_round_the_weight(variant: str, rule: str) -> None:
    """W', and the norm of DoRA in it, are computed in float32 under autocast too: to the last bit
    the weight that merging puts in; bfloat16 products would lose what a LoRA has just learned."""
    adapted, _ = build("conv2d 3x3", variant, rule)
    want = adapted.effective_weight()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(adapted.effective_weight(), want)
        factors = adapted.delta.low_rank()
        if rule == "decompose" and factors is not None:
            got = adapted.delta.output_scale(adapted.base.weight, *factors)
    if rule == "decompose" and factors is not None:
        norm = (adapted.base.weight + adapted.delta.weight()).flatten(1).norm(dim=1)
        torch.testing.assert_close(got, adapted.delta.magnitude.flatten() / norm)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("variant", [v for v in VARIANTS if not v.startswith(("lokr", "oft"))])
def test_the_padding_row_is_not_trained(variant: str, rule: str) -> None:
    """After steps of an optimiser on batches full of padding the row padding_idx, not zero here, is
    to the last bit what it was, in the forward pass and merged; the others have moved."""
    adapted, _ = build("embedding padding_idx", variant, rule, trained=False)
    row = adapted.padding_idx
    with torch.no_grad():
        adapted.base.weight[row] = 0.5
    ids = torch.arange(12).repeat(2)
    optimizer = torch.optim.SGD(
        [p for d in adapted.deltas_by_path().values() for p in d.parameters()], 1
    )
    for _ in range(3):
        optimizer.zero_grad()
        (adapted(ids) - 1).pow(2).sum().mul(0.01).backward()
        optimizer.step()
    before = adapted.base.weight.clone()
    assert torch.equal(adapted(torch.tensor([row]))[0], before[row])
    adapted.merge()
    moved = (adapted.base.weight - before).abs().sum(1)
    assert moved[row] == 0
    assert (moved > 0).sum() == 11


def test_a_merged_layer_has_no_state_to_save() -> None:
    """W' and the delta in one state would be the delta twice wherever it is loaded."""
    adapted, _ = build("linear")
    adapted.state_dict()
    adapted.merge()
    with pytest.raises(RuntimeError, match="call unmerge or eject first"):
        adapted.state_dict()
