"""LyCORIS' tensors for LoCon, LoHa and LoKr in its modules and in ours: the same ΔW, in float64.

Where LyCORIS (4.1.3) contradicts itself, our ΔW is what its forward pass trains, and the size of
its error is asserted, so that a release that mends it is noticed.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sd_lora
from sd_lora.adapters.methods import factorization
from sd_lora.adapters.state import make_delta

pytest.importorskip("lycoris")
from lycoris.functional import general, loha, lokr
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule

BASES = {
    "linear": lambda: nn.Linear(20, 30),
    "conv1d": lambda: nn.Conv1d(20, 30, 3, padding=1),
    "conv2d": lambda: nn.Conv2d(20, 30, 3, padding=1),
    "conv2d 1x1": lambda: nn.Conv2d(20, 30, 1),
    "conv3d": lambda: nn.Conv3d(20, 30, (1, 3, 3), padding=1),
}
MODULES = {
    "locon": (LoConModule, {}),
    "locon tucker": (LoConModule, {"use_tucker": True}),
    "loha": (LohaModule, {}),
    "loha tucker": (LohaModule, {"use_tucker": True}),
    "lokr": (LokrModule, {"factor": 4}),
    "lokr tucker": (LokrModule, {"factor": 4, "use_tucker": True}),
    "lokr both": (LokrModule, {"factor": 8, "decompose_both": True}),
    "lokr full": (LokrModule, {"full_matrix": True}),
}
RENAMED = {"lora_up.weight": "lora_B", "lora_down.weight": "lora_A", "lora_mid.weight": "lora_mid"}


def lycoris_pair(kind: str, module: str, **options: object) -> tuple[nn.Module, sd_lora.Delta]:
    """Returns LyCORIS' module with random tensors, and our delta made of its state."""
    torch.manual_seed(0)
    base = BASES[kind]().requires_grad_(False)
    cls, more = MODULES[module]
    theirs = cls("x", base, lora_dim=2, alpha=3.0, **more, **options).double()
    base.double()
    for p in theirs.parameters():
        p.data.add_(torch.randn_like(p))
    state = {RENAMED.get(k, k): t.detach() for k, t in theirs.custom_state_dict().items()}
    if "dora_scale" in state:
        state["magnitude"] = state.pop("dora_scale")
    delta = make_delta("x", state)
    delta.fit(tuple(base.weight.shape))
    return theirs, delta


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("kind", BASES)
def test_equals_lycoris(kind: str, module: str) -> None:
    """LoCon, LoHa and LoKr, with and without tucker: LyCORIS' state makes its ΔW, and the layer
    its forward pass, at its scale α/r, also for a Conv1d and a Conv3d."""
    theirs, delta = lycoris_pair(kind, module)
    base = theirs.org_module[0]
    x = torch.randn(2, 20, *(5,) * len(base.weight.shape[2:])).double()
    want = theirs.make_weight() * theirs.scale if "locon" in module else theirs.get_weight(None)
    want = want.view(base.weight.shape)
    torch.testing.assert_close(delta.weight(), want, rtol=1e-6, atol=1e-6)
    ours = sd_lora.wrap(base, {"weight": delta})
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("on_output", [True, False], ids=["per output", "per input"])
@pytest.mark.parametrize("module", ["locon", "loha", "lokr"])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_decompose_equals_lycoris(kind: str, module: str, on_output: bool) -> None:
    """The rule decompose on every method is LyCORIS' weight decomposition, with its magnitude per
    output (wd_on_out) and per input (its older files); its norm has an ε more."""
    theirs, delta = lycoris_pair(kind, module, weight_decompose=True, wd_on_out=on_output)
    assert delta.magnitude is not None
    base = theirs.org_module[0]
    V = base.weight + delta.weight()
    want = theirs.apply_weight_decompose(V)
    torch.testing.assert_close(delta.compose(base.weight), want, rtol=1e-6, atol=1e-6)
    assert (want - V).norm() > 0.1 * V.norm()


def test_where_lycoris_errs() -> None:
    """What LyCORIS merges is not what it trains: get_diff_weight applies α/r twice for LoHa and
    LoKr, functional.lokr reads tucker's rank from the wrong side, and a full-matrix LoKr with
    rs_lora trains at √r and is reloaded at 1. Our ΔW is what its forward pass computes with."""
    for module in ("loha", "lokr"):
        theirs, delta = lycoris_pair("conv2d", module)
        merged = theirs.get_diff_weight(1, delta.shape)[0]
        torch.testing.assert_close(merged, 1.5 * delta.weight(), rtol=1e-6, atol=1e-6)
    theirs, delta = lycoris_pair("conv2d", "lokr tucker")
    w1, (a, b, t) = theirs.lokr_w1, (theirs.lokr_w2_a, theirs.lokr_w2_b, theirs.lokr_t2)
    assert tuple(a.shape) == (2, 10)  # (rank, out): its functional form takes 10 for the rank
    functional = lokr.diff_weight(w1, None, None, None, a, b, t, gamma=3.0)
    torch.testing.assert_close(functional, delta.weight() * 2 / 10, rtol=1e-6, atol=1e-6)
    theirs, delta = lycoris_pair("linear", "lokr full", rs_lora=True)
    assert theirs.scale == pytest.approx(2**0.5)
    w1, w2, alpha = theirs.lokr_w1.detach(), theirs.lokr_w2.detach(), theirs.alpha
    none = (None, None)
    tensors = (w1, *none, w2, *none, *none, alpha, None)
    with torch.no_grad():
        again = LokrModule.make_module_from_state_dict("x", BASES["linear"](), *tensors)
    assert again.scale == delta.scale == 1.0  # the file has no rank that could tell


def test_functional_loha_and_lokr() -> None:
    """LyCORIS' pure functions for the same tensors, where they are right."""
    theirs, delta = lycoris_pair("linear", "loha")
    tensors = (theirs.hada_w1_b, theirs.hada_w1_a, theirs.hada_w2_b, theirs.hada_w2_a, None, None)
    gamma = torch.tensor(1.5)
    torch.testing.assert_close(delta.weight(), loha.diff_weight(*tensors, gamma=gamma))
    theirs, delta = lycoris_pair("linear", "lokr")
    tensors = (theirs.lokr_w1, None, None, None, theirs.lokr_w2_a, theirs.lokr_w2_b, None)
    torch.testing.assert_close(delta.weight(), lokr.diff_weight(*tensors, gamma=3.0))


def test_lokr_splits_as_lycoris_does() -> None:
    """The sides of w1 and w2 are LyCORIS' for every dimension up to 1,500 and ten factors."""
    for factor in (-1, 1, 2, 3, 4, 6, 8, 12, 16, 32):
        for dimension in range(1, 1501):
            want = general.factorization(dimension, factor)
            assert factorization(dimension, factor) == want, (dimension, factor)


@pytest.mark.parametrize("module", ["loha", "loha tucker", "lokr", "lokr tucker", "lokr both"])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_fresh_tensors_have_lycoris_shapes_and_spread(kind: str, module: str) -> None:
    """What inject creates for LoHa and LoKr are LyCORIS' tensors: the same names, shapes, and the
    same ones zero at the start; the standard deviations agree within what chance allows."""
    cls, more = MODULES[module]
    torch.manual_seed(0)
    base = nn.Linear(200, 300) if kind == "linear" else nn.Conv2d(200, 300, 3)
    theirs = cls("x", base, lora_dim=3, alpha=3.0, **more).custom_state_dict()
    options = {"tucker" if k == "use_tucker" else k: v for k, v in more.items()}
    if kind == "linear":
        options.pop("tucker", None)  # refused where there is no kernel; LyCORIS ignores it
    model = nn.Sequential(base)
    sd_lora.inject(model, ["0"], 3, 3.0, method=module.split()[0], **options)
    ours = model[0].delta.tensors()
    assert ours.keys() == theirs.keys() - {"alpha"}
    for name, t in ours.items():
        assert t.shape == theirs[name].shape, name
        spread = 4 * t.numel() ** -0.5  # more than three standard errors of both
        want = float(theirs[name].detach().std())
        assert float(t.std()) == pytest.approx(want, rel=spread), name


def test_conv_of_one_pixel_is_a_linear_layer() -> None:
    """A convolution over a 1×1 image is a linear layer: LoCon's tensors give its output."""
    theirs, delta = lycoris_pair("conv2d 1x1", "locon")
    x = torch.randn(4, 20).double()
    y = F.linear(x, delta.weight().flatten(1))
    torch.testing.assert_close(theirs.bypass_forward_diff(x[:, :, None, None]).flatten(1), y)
