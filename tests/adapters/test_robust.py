"""What people do to a model, done to one with adapters: compile, copy, pickle, cast, checkpoint.

torch.compile runs with inductor once, where a C++ compiler is, and with aot_eager (the same graphs
of forward and backward, without code generation: 15 seconds less each) for every method.
"""

import copy
import io
import pickle
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sd_lora
from sd_lora.adapters.inject import adapted_layers
from sd_lora.adapters.variants import Variant, new_delta
from tests.adapters.layers import randomise_model
from tests.tiny import build_text_encoder, build_tokenizer, build_unet


class Net(nn.Module):
    """An embedding, a convolution, attention and linear layers, one of them with a norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(10, 8)
        self.mix = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.last = nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.mix(self.embed(ids).mT).mT)
        x = self.norm(x + self.attn(x, x, x, need_weights=False)[0])
        return self.last(x)


IDS = torch.arange(15).view(3, 5) % 10
TARGETS = ["embed", "mix", "attn", "last"]
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "DoRA": {"rule": "decompose"},
    "lora_fa": {"method": "lora_fa"},
    "pissa": {"init": "pissa"},
    "loha": {"method": "loha"},
    "lokr DoRA": {"method": "lokr", "rule": "decompose", "factor": 2},
    "full": {"method": "full", "train_bias": "all", "modules_to_save": ["norm"]},
}
methods = pytest.mark.parametrize("method", METHODS)


def net(method: str = "lora", **more: object) -> Net:
    """Returns a Net with trained adapters."""
    model = Net()
    options = {"targets": TARGETS, "rank": 2, "alpha": 3.0} | METHODS[method] | more
    sd_lora.inject(model, **options)
    randomise_model(model)
    return model


def gradients(model: nn.Module, y: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(y.float().pow(2).sum(), sd_lora.lora_layers(model)))


def assert_same(model: nn.Module, twin: nn.Module) -> None:
    """Output and gradients of both are the same bits, and neither shares a tensor of the other."""
    y, again = model(IDS), twin(IDS)
    assert torch.equal(y, again)
    for a, b in zip(gradients(model, y), gradients(twin, again), strict=True):
        assert torch.equal(a, b)
    places = [{p.data_ptr() for p in m.parameters()} for m in (model, twin)]
    assert not places[0] & places[1]


@methods
def test_compiles_without_a_graph_break(method: str) -> None:
    """One graph of the whole model (fullgraph), forward and backward: the outputs and gradients of
    eager execution; after a step of the optimiser it computes with the new values."""
    torch._dynamo.reset()
    model = net(method)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        y, fast = model(IDS), compiled(IDS)
        torch.testing.assert_close(fast, y, rtol=1e-5, atol=1e-6)
        pairs = zip(gradients(model, fast), gradients(model, y), strict=True)
        for got, want in pairs:
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        randomise_model(model)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compiles_by_inductor() -> None:
    """The default backend: a linear layer and a convolution, forward and backward."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv1d(4, 4, 3), nn.Linear(6, 5)), torch.randn(2, 4, 8)
    sd_lora.inject(model, ["0", "1"], rank=2)
    randomise_model(model)
    y, fast = model(x), torch.compile(model, fullgraph=True)(x)
    torch.testing.assert_close(fast, y, rtol=1e-5, atol=1e-5)
    for got, want in zip(gradients(model, fast), gradients(model, y), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_compiled_model_follows_merging_and_strength() -> None:
    """Merging, unmerging, another strength and ejecting are seen by a model compiled before."""
    torch._dynamo.reset()
    model, base = net(), Net()
    compiled = torch.compile(model, backend="aot_eager")
    close = {"rtol": 1e-5, "atol": 1e-6}
    with torch.no_grad():
        trained = compiled(IDS)
        sd_lora.merge(model)
        torch.testing.assert_close(compiled(IDS), trained, **close)
        sd_lora.unmerge(model)
        torch.testing.assert_close(compiled(IDS), trained, **close)
        sd_lora.set_strength(model, 0)
        torch.testing.assert_close(compiled(IDS), base(IDS), **close)
        sd_lora.set_strength(model, 1)
        sd_lora.eject(model)
        torch.testing.assert_close(compiled(IDS), base(IDS), **close)


def by_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": by_torch_save,
}


@pytest.mark.parametrize("merged", [False, True], ids=["", "merged"])
@pytest.mark.parametrize("way", COPIES)
@methods
def test_copies_are_independent_models(method: str, way: str, merged: bool) -> None:
    """A copy computes the same bits, has the same gradients, merges, unmerges to the base's bits
    and trains on its own; copied while merged, too."""
    model = net(method)
    if merged:
        sd_lora.merge(model)
    twin = COPIES[way](model)
    assert [layer.is_merged for layer in adapted_layers(twin).values()] == [merged] * len(
        adapted_layers(model)
    )
    assert torch.equal(model(IDS), twin(IDS))
    sd_lora.unmerge(model)
    sd_lora.unmerge(twin)
    assert_same(model, twin)
    y = model(IDS)
    randomise_model(twin)
    assert not torch.equal(twin(IDS), y)
    assert torch.equal(model(IDS), y)
    sd_lora.eject(twin)
    assert all(
        torch.equal(p, q) for p, q in zip(twin.parameters(), Net().parameters(), strict=True)
    )


class Copied(nn.Linear):
    """A layer that copies itself, as torch's graph modules do."""

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Linear:
        return nn.Linear(1, 1)


def test_a_copy_is_no_copy_of_the_base() -> None:
    """Special methods of the base are not the wrapper's: copying a wrapped layer that has its own
    way of being copied copies the wrapper; and one half-built, as copies are, has no attribute."""
    base = Copied(4, 4)
    delta = new_delta(Variant(), base.weight)
    assert type(copy.deepcopy(sd_lora.wrap(base, {"weight": delta}))) is sd_lora.AdaptedLayer
    half_built = sd_lora.AdaptedLayer.__new__(sd_lora.AdaptedLayer)
    assert not hasattr(half_built, "weight")


HALVES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half": nn.Module.half,
    "bfloat16": nn.Module.bfloat16,
    "to": lambda model: model.to(torch.bfloat16),
    "to device and dtype": lambda model: model.to("cpu", torch.float16),
}


@pytest.mark.parametrize("way", HALVES)
@methods
def test_halving_a_model_leaves_the_masters_their_bits(method: str, way: str) -> None:
    """A cast to a half precision casts the base alone: the trained tensors, the very objects that
    an optimiser holds, keep float32, their bits and their gradients; the output is the half
    precision's, right to it, and a step of the optimiser moves them by less than it can hold."""
    model = net(method)
    want = model(IDS)
    want.pow(2).sum().backward()
    trained = sd_lora.lora_layers(model)
    before = [(p.clone(), p.grad.clone()) for p in trained]
    HALVES[way](model)
    assert all(p is q for p, q in zip(trained, sd_lora.lora_layers(model), strict=True))
    for p, (value, grad) in zip(trained, before, strict=True):
        assert p.dtype == p.grad.dtype == torch.float32
        assert torch.equal(p, value)
        assert torch.equal(p.grad, grad)
    y = model(IDS)
    assert y.dtype.itemsize == model.last.base.weight.dtype.itemsize == 2
    torch.testing.assert_close(y.float(), want, rtol=0.05, atol=0.05)
    torch.optim.SGD(trained, lr=1e-7).step()
    moved = [(p - value).abs().max() for p, (value, _) in zip(trained, before, strict=True)]
    assert 0 < max(moved) < 1e-4


@methods
def test_doubling_a_model_doubles_everything(method: str) -> None:
    """model.double() computes in float64 throughout, from the same values, merges to 1e-12 there,
    and back in float32 the first bits are there again."""
    model = net(method)
    before = [p.clone() for p in model.parameters()]
    y = model(IDS)
    model.double()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    exact = model(IDS)
    torch.testing.assert_close(exact.float(), y, rtol=1e-4, atol=1e-5)
    with sd_lora.merged(model):
        torch.testing.assert_close(model(IDS), exact, rtol=1e-12, atol=1e-12)
    model.float()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert torch.equal(model(IDS), y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_moved_while_merged(dtype: torch.dtype) -> None:
    """A model cast while it is merged is what it would be cast unmerged, once it is unmerged: the
    base that was kept is cast with it; a base shared with another layer stays shared."""
    model, plain = net(targets=["last", "mix"]), net(targets=["last", "mix"])
    tied = nn.Linear(8, 4)
    for m in (model, plain):
        m.tied = tied if m is model else copy.deepcopy(tied)
        m.tied.weight = m.last.base.weight
    own = model.mix.base.weight
    sd_lora.merge(model)
    y = model.to(dtype)(IDS)
    torch.testing.assert_close(y, plain.to(dtype)(IDS), rtol=0.05, atol=0.05)
    sd_lora.unmerge(model)
    pairs = list(zip(model.named_parameters(), plain.named_parameters(), strict=True))
    assert all(n == m and torch.equal(p, q) for (n, p), (m, q) in pairs)
    assert model.last.base.weight is model.tied.weight
    assert model.mix.base.weight is own
    assert torch.equal(model(IDS), plain(IDS))


@methods
def test_state_dict_of_the_injected_model(method: str) -> None:
    """torch's own state_dict carries base and deltas: loaded into an equally injected model it
    makes the same function; merged and unmerged in between leaves it as it was."""
    model, other = net(method), net(method)
    randomise_model(other)
    for p in other.parameters():
        p.data.add_(1)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert {key.split(".")[0] for key in state} == {"embed", "mix", "attn", "norm", "last"}
    with sd_lora.merged(model):
        pass
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[key], state[key]) for key in state)
    assert not other.load_state_dict(state).missing_keys
    assert_same(model, other)
    with sd_lora.merged(other), pytest.raises(RuntimeError, match="unmerge the model first"):
        other.load_state_dict(state)  # what is loaded while merged would be lost by unmerging
    assert_same(model, other)


@pytest.mark.parametrize("options", [{}, {"rule": "decompose"}, {"method": "lokr"}], ids=str)
def test_gradient_checkpointing_of_the_models(options: dict) -> None:
    """diffusers' and transformers' own gradient checkpointing: the gradients of a UNet's and a text
    encoder's adapters are those without it."""
    encoder = build_text_encoder(build_tokenizer())
    ids = torch.randint(0, 500, (2, 9))
    sample, context = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 32)
    cases: list[tuple[nn.Module, str, Callable[[nn.Module], Tensor]]] = [
        (build_unet(), "attention+conv", lambda m: m(sample, 7, context).sample),
        (encoder, "text", lambda m: m(ids)[0]),
    ]
    for model, targets, run in cases:
        sd_lora.inject(model, targets, rank=2, **options)
        randomise_model(model, 0.05)
        model.train()
        want = gradients(model, run(model))
        if model is encoder:
            model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing
        else:
            model.enable_gradient_checkpointing()
        got = gradients(model, run(model))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_functional_transforms_see_the_updates() -> None:
    """torch.func.functional_call with other factors computes with those, and leaves the model's."""
    model = net()
    y = model(IDS)
    zeros = {n: torch.zeros_like(p) for n, p in model.named_parameters() if n.endswith("lora_B")}
    assert len(zeros) == 5
    torch.testing.assert_close(torch.func.functional_call(model, zeros, (IDS,)), Net()(IDS))
    assert torch.equal(model(IDS), y)
