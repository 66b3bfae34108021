"""Adapters of mixed rules, injected in one call or in several."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import sd_lora
from sd_lora.adapters.inject import adapted_layers
from tests.adapters.layers import randomise_model


class Mixed(nn.Module):
    """A linear layer, a convolution, a transposed one and attention, in float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.to_in = nn.Linear(6, 8)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.conv1 = nn.Conv1d(8, 6, 3, padding=1)
        self.up = nn.ConvTranspose1d(6, 4, 2, stride=2)
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.to_in(x)
        h = h + self.attn(h, h, h)[0]
        return self.up(torch.tanh(self.conv1(h.mT)))


X = torch.linspace(-1, 1, 2 * 5 * 6, dtype=torch.float64).view(2, 5, 6)
DORA = {r"conv\d|up": "decompose"}


def closed_form(delta: sd_lora.Delta, W: torch.Tensor) -> torch.Tensor:
    """W + s·B·A, and for a delta with a magnitude m·V/‖V‖, in the delta's layout."""
    V = W + delta.scale * (delta.lora_B.flatten(1) @ delta.lora_A.flatten(1)).view(W.shape)
    if delta.magnitude is None:
        return V
    norm = V.flatten(1).norm(dim=1).view(-1, *(1,) * (V.dim() - 1))
    return delta.magnitude * V / norm


def test_rules_by_module() -> None:
    """In one inject the pattern's modules are decomposed and the others are not, whatever the rule
    of all is; the function is the closed form of each; merging, its undoing and ejecting are
    exact."""
    twin = Mixed()
    for rule, pattern in (("add", DORA), ("decompose", {"to_in|attn": "add"})):
        model = Mixed()
        names = sd_lora.inject(model, ".*", rank=2, alpha=3.0, rule=rule, rule_pattern=pattern)
        assert names == ["to_in", "attn", "conv1", "up"]
        randomise_model(model, 0.3)
        decomposed = {n for n, d in sd_lora.deltas_of(model).items() if d.magnitude is not None}
        assert decomposed == {"conv1", "up"}
        with torch.no_grad():
            for name, layer in adapted_layers(model).items():
                for path, delta in layer.deltas_by_path().items():
                    W = closed_form(delta, layer.weight_of(layer.base, path))
                    own = twin.get_submodule(name).get_parameter(path)
                    own.copy_(layer.swap_layout(layer.base, W))
        want = twin(X)
        for _ in range(2):
            torch.testing.assert_close(model(X), want, rtol=1e-12, atol=1e-12)
            sd_lora.merge(model)
        sd_lora.unmerge(model)
        sd_lora.eject(model)
        assert torch.equal(model(X), Mixed().requires_grad_(False)(X))


def test_a_second_inject_is_a_larger_first_one() -> None:
    """Injecting some modules and then others, with other ranks and rules, is one inject of all with
    patterns, bit for bit: the same first output, initial tensors, state, trained parameters, and
    output after two steps; ejecting gives back every layer. A delta that was frozen by hand stays
    so, and merged layers stay merged."""
    at_once, y = Mixed(), Mixed().requires_grad_(False)(X)
    options = {"alpha": 3.0, "rule_pattern": DORA, "rank_pattern": {"conv1|up": 3}}
    sd_lora.inject(at_once, ".*", rank=2, **options)
    model = Mixed()
    layers = dict(model.named_modules())
    assert sd_lora.inject(model, ["to_in", "attn"], rank=2, alpha=3.0) == ["to_in", "attn"]
    model.to_in.delta.requires_grad_(False)
    model.attn.merge()
    second = sd_lora.inject(model, [r"conv\d", "up"], rank=3, alpha=3.0, rule="decompose")
    assert second == ["conv1", "up"]
    with torch.no_grad():  # else torch.matmul folds attention's inputs
        assert torch.equal(model(X), y)
    assert model.attn.is_merged
    assert not any(p.requires_grad for p in model.to_in.parameters())
    model.attn.unmerge()
    model.to_in.delta.requires_grad_(True)
    for m in (at_once, model):
        optimizer = torch.optim.SGD(sd_lora.lora_layers(m), lr=0.5)
        for _ in range(2):
            optimizer.zero_grad()
            m(X).pow(2).sum().backward()
            optimizer.step()
    assert torch.equal(model(X), at_once(X))
    assert not torch.allclose(model(X), y, atol=1e-3)
    state, want = sd_lora.lora_state_dict(model), sd_lora.lora_state_dict(at_once)
    assert state.keys() == want.keys()
    assert all(torch.equal(state[key], want[key]) for key in state)
    assert [p.shape for p in model.parameters() if p.requires_grad] == [
        p.shape for p in sd_lora.lora_layers(model)
    ]
    assert sd_lora.eject(model) == ["to_in", "attn", "conv1", "up"]
    assert all(dict(model.named_modules())[name] is layer for name, layer in layers.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ".*"}, "2 of its 4 modules have adapters already, to_in the first: name the"),
        ({"targets": ["to_in"]}, "1 of its 1 modules have adapters already"),
        ({"targets": ["up"], "modules_to_save": ["to_in"]}, "to_in is both a target and in"),
        ({"targets": ["up"], "train_bias": "all"}, "train_bias='all' reaches to_in, which has an"),
        ({"targets": [r"to_in\.base"]}, "matches no module"),
        ({"targets": [r"attn\.base\.out_proj"]}, "matches no module"),
    ],
)
def test_what_a_second_inject_cannot_reach(options: dict, message: str) -> None:
    """A module with an adapter, by a target, modules_to_save or train_bias, is refused with the
    way out; the first adapters are as they were."""
    model = Mixed()
    sd_lora.inject(model, ["to_in", "attn"], rank=2)
    layers, before = dict(model.named_modules()), sd_lora.lora_state_dict(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(sd_lora.UsageError, match=message):
        sd_lora.inject(model, **options)
    assert dict(model.named_modules()) == layers
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    after = sd_lora.lora_state_dict(model)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_a_second_inject_may_train_the_biases_that_the_first_trains() -> None:
    """train_bias="all" in both calls: the second adds its own layers' biases and leaves the
    first's."""
    model = Mixed()
    sd_lora.inject(model, ["to_in", "attn"], rank=2, train_bias="lora_only")
    sd_lora.inject(model, ["up"], rank=2, train_bias="all")
    biases = {name for name in sd_lora.deltas_of(model) if "bias" in name}
    assert biases == {
        "to_in.bias",
        "attn.in_proj_bias",
        "attn.out_proj.bias",
        "conv1.bias",
        "up.bias",
    }


def test_a_run_of_mixed_adapters_resumes_exactly(tmp_path: Path) -> None:
    """DoRA on (transposed) convolutions, plain LoRA elsewhere, injected in two calls: a state
    written to a file after two steps, loaded into a model adapted alike or into a bare one, goes on
    as if it had not been interrupted, bit for bit."""

    def adapted() -> Mixed:
        model = Mixed()
        sd_lora.inject(model, ["to_in", "attn"], rank=2, alpha=1.0)
        sd_lora.inject(model, [r"conv\d", "up"], rank=2, rule="decompose", rslora=True)
        return model

    def steps(model: nn.Module, num: int) -> torch.Tensor:
        optimizer = torch.optim.SGD(sd_lora.lora_layers(model), lr=0.5)
        for _ in range(num):
            optimizer.zero_grad()
            model(X).pow(2).sum().backward()
            optimizer.step()
        return model(X)

    model, again, bare = adapted(), adapted(), Mixed()
    steps(model, 2)
    path = tmp_path / "state.safetensors"
    save_file(sd_lora.lora_state_dict(model), path)
    want = steps(model, 2)
    sd_lora.load_lora_state_dict(again, load_file(path))
    sd_lora.load_adapter(bare, path)
    for twin in (again, bare):
        assert torch.equal(steps(twin, 2), want)
