"""Files of peft and of LyCORIS, every method: into ours with the same ΔW, and ours into theirs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lycoris.modules import make_module
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.full import FullModule
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import sd_lora
from sd_lora.adapters.inject import adapted_layers
from sd_lora.formats import adapter_files as files
from sd_lora.formats.canonical import read_models
from sd_lora.formats.names import naming_of
from tests.training.runs import FEW


class Net(nn.Module):
    """One layer of every kind that peft and LyCORIS adapt."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 12)
        self.lin = nn.Linear(12, 10)
        self.bare = nn.Linear(10, 8, bias=False)
        self.conv1 = nn.Conv1d(8, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 8, 3, padding=1)
        self.point = nn.Conv2d(8, 8, 1)
        self.conv3 = nn.Conv3d(8, 6, 3, padding=1)
        self.norm = nn.GroupNorm(2, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.bare(self.lin(self.embed(ids)))  # (N, L, 8)
        x = self.conv1(x.transpose(1, 2))  # (N, 6, L)
        x = self.point(self.conv2(x.unsqueeze(2)))  # (N, 8, 1, L)
        x = self.norm(self.conv3(x.unsqueeze(2)))
        return self.head(x.mean((2, 3, 4)))


CONVS = ["conv1", "conv2", "point", "conv3"]
LINEARS = ["lin", "bare"]


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def shaken(model: nn.Module, seed: int = 1) -> nn.Module:
    """Gives every trained tensor values as after training."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.add_(0.2 * noise)
    return model.eval()


PEFT: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(
        r=4,
        lora_alpha=7,
        target_modules=["embed", *LINEARS, *CONVS],
        rank_pattern={"conv2": 3},
        alpha_pattern={"lin": 2},
    ),
    "rslora": lambda: peft.LoraConfig(
        r=4, lora_alpha=7, target_modules=[*LINEARS, *CONVS], use_rslora=True
    ),
    "dora": lambda: peft.LoraConfig(
        r=4, lora_alpha=7, target_modules=["embed", *LINEARS, *CONVS], use_dora=True
    ),
    "bias lora_only": lambda: peft.LoraConfig(
        r=4, target_modules=["lin", "conv2"], bias="lora_only"
    ),
    "bias all, modules_to_save": lambda: peft.LoraConfig(
        r=4, target_modules=["lin"], bias="all", modules_to_save=["head", "norm"]
    ),
    "loha": lambda: peft.LoHaConfig(r=3, alpha=5, target_modules=[*LINEARS, *CONVS[1:3]]),
    "loha tucker": lambda: peft.LoHaConfig(
        r=3, alpha=5, target_modules=["conv1", "conv2", "lin"], use_effective_conv2d=True
    ),
    "lokr": lambda: peft.LoKrConfig(
        r=2, alpha=5, target_modules=[*LINEARS, "conv2", "point"], decompose_factor=2
    ),
    "lokr both": lambda: peft.LoKrConfig(
        r=1, alpha=5, target_modules=[*LINEARS], decompose_both=True, decompose_factor=4
    ),
    "lokr whole": lambda: peft.LoKrConfig(r=16, alpha=5, target_modules=[*LINEARS, "conv2"]),
    "lokr tucker": lambda: peft.LoKrConfig(
        r=1, alpha=5, target_modules=["conv2"], use_effective_conv2d=True, decompose_factor=2
    ),
}


@pytest.mark.parametrize("case", PEFT)
@torch.no_grad()
def test_peft_folders_load_as_the_same_function(case: str, tmp_path: Path) -> None:
    """What `PeftModel.save_pretrained` wrote gives, in a bare model, peft's merged weights to 1e-6
    and its outputs: every method, ranks and alphas by pattern, biases and whole modules."""
    theirs = shaken(peft.get_peft_model(net(), PEFT[case]()))
    ids = torch.randint(0, 11, (4, 5))
    want = theirs(ids)
    theirs.save_pretrained(tmp_path)
    ours = net()
    sd_lora.load_adapter(ours, tmp_path)
    torch.testing.assert_close(ours(ids), want, rtol=1e-5, atol=1e-5)
    merged = dict(theirs.merge_and_unload().named_parameters())
    names = {name for name, _ in adapted_layers(ours).items()}
    sd_lora.merge(ours)
    sd_lora.eject(ours)
    changed = 0
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, merged[name], rtol=1e-6, atol=1e-6)
        changed += name.rpartition(".")[0] in names
    assert changed >= len(names) > 0


@torch.no_grad()
def test_peft_folder_of_gpt2(tmp_path: Path) -> None:
    """transformers' Conv1D, whose weight is transposed: the same function from peft's file, of a
    delta and of whole modules, square ones too."""
    config = GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=30, n_positions=8)

    def model() -> GPT2LMHeadModel:
        torch.manual_seed(0)
        return GPT2LMHeadModel(config).eval()

    lora = peft.LoraConfig(
        r=3,
        lora_alpha=2,
        target_modules=["c_attn"],
        fan_in_fan_out=True,
        modules_to_save=["c_proj"],
    )
    theirs = shaken(peft.get_peft_model(model(), lora))
    ids = torch.randint(0, 30, (2, 6))
    want = theirs(ids).logits
    theirs.save_pretrained(tmp_path)
    ours = model()
    sd_lora.load_adapter(ours, tmp_path)
    torch.testing.assert_close(ours(ids).logits, want, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_peft_folder_of_multihead_attention(tmp_path: Path) -> None:
    """peft's attention adapter: its input projection's ΔW exactly, its output projection's as the
    file's α/r·B·A. peft 0.21.2 computes with twice the latter: its merge adds it once itself and
    once through the inner layer."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attn(x, x, x)[0]

    def model() -> Attention:
        torch.manual_seed(0)
        return Attention().eval()

    config = peft.LoraConfig(r=3, lora_alpha=2, target_modules=["attn"])
    theirs = shaken(peft.get_peft_model(model(), config))
    theirs.save_pretrained(tmp_path)
    before, merged = model().attn, theirs.merge_and_unload().attn
    ours = model()
    names = sd_lora.load_adapter(ours, tmp_path)
    assert names == {"": ["attn.out_proj", "attn.in_proj_weight"]}
    delta = ours.attn.delta_weight("in_proj_weight")
    torch.testing.assert_close(delta, merged.in_proj_weight - before.in_proj_weight)
    delta = ours.attn.delta_weight("out_proj.weight")
    torch.testing.assert_close(2 * delta, merged.out_proj.weight - before.out_proj.weight)


def modules(cls: type, **options: Any) -> Callable[[str, nn.Module], nn.Module]:
    return lambda name, layer: cls(name, layer, 1.0, lora_dim=2, alpha=3, **options)


LYCORIS: dict[str, Callable[[str, nn.Module], nn.Module]] = {
    "locon": modules(LoConModule),
    "locon rs": modules(LoConModule, rs_lora=True),
    "locon scalar": modules(LoConModule, use_scalar=True),
    "locon tucker": modules(LoConModule, use_tucker=True),
    "dora": modules(LoConModule, weight_decompose=True),
    "dora, by input": modules(LoConModule, weight_decompose=True, wd_on_out=False),
    "loha": modules(LohaModule),
    "loha tucker": modules(LohaModule, use_tucker=True),
    "loha decomposed": modules(LohaModule, weight_decompose=True),
    "lokr": modules(LokrModule, factor=2),
    "lokr whole": modules(LokrModule, full_matrix=True),
    "lokr both": modules(LokrModule, decompose_both=True, factor=4),
    "lokr tucker": modules(LokrModule, use_tucker=True, factor=2),
    "lokr decomposed": modules(LokrModule, weight_decompose=True, factor=2),
    "oft": modules(DiagOFTModule),
    "oft, rescaled and bounded": modules(DiagOFTModule, rescaled=True, constraint=0.02),
}


@pytest.mark.parametrize("case", LYCORIS)
@torch.no_grad()
def test_lycoris_files_load_as_the_same_function(case: str, tmp_path: Path) -> None:
    """The tensors that LyCORIS saves give, in a bare layer, the outputs of LyCORIS' own training
    forward to 1e-6: LoCon with and without core, LoHa, LoKr, OFT, dora_scale on either axis."""
    layers = [*LINEARS, *CONVS]
    model, file, trained = net(), {}, {}
    for name in layers:
        module = LYCORIS[case](f"lycoris_{name}", model.get_submodule(name))
        shaken(module)
        # of OFT it is None, and everything is saved
        for key, tensor in (module.custom_state_dict() or module.state_dict()).items():
            file[f"lycoris_{name}.{key}"] = tensor.detach().clone().contiguous()
        trained[name] = module
    save_file(file, tmp_path / "file.safetensors")
    ours = net()
    sd_lora.load_adapter(ours, tmp_path / "file.safetensors")
    assert list(adapted_layers(ours)) == layers
    for name in layers:
        base = model.get_submodule(name)
        torch.manual_seed(2)
        x = torch.randn(2, base.weight.shape[1], *(5,) * (base.weight.dim() - 2))
        torch.testing.assert_close(
            ours.get_submodule(name)(x), trained[name](x), rtol=1e-5, atol=2e-6, msg=name
        )


@torch.no_grad()
def test_lycoris_full_and_norms(tmp_path: Path) -> None:
    """`diff` and `diff_b` of whole layers, `w_norm` and `b_norm` of norms."""
    model = net()
    g = torch.Generator().manual_seed(1)
    file = {
        "lycoris_lin.diff": torch.randn(10, 12, generator=g),
        "lycoris_lin.diff_b": torch.randn(10, generator=g),
        "lycoris_norm.w_norm": torch.randn(6, generator=g),
        "lycoris_norm.b_norm": torch.randn(6, generator=g),
    }
    save_file(file, tmp_path / "file.safetensors")
    ours = net()
    sd_lora.load_adapter(ours, tmp_path / "file.safetensors")
    sd_lora.merge(ours)
    assert torch.equal(ours.lin.weight, model.lin.weight + file["lycoris_lin.diff"])
    assert torch.equal(ours.lin.bias, model.lin.bias + file["lycoris_lin.diff_b"])
    assert torch.equal(ours.norm.weight, model.norm.weight + file["lycoris_norm.w_norm"])
    assert torch.equal(ours.norm.bias, model.norm.bias + file["lycoris_norm.b_norm"])


OURS = {
    "lora tucker": {"method": "lora", "tucker": True},
    "loha": {"method": "loha"},
    "loha tucker": {"method": "loha", "tucker": True},
    "lokr": {"method": "lokr", "factor": 2},
    "lokr whole": {"method": "lokr", "full_matrix": True},
    "lokr both": {"method": "lokr", "decompose_both": True, "factor": 4},
    "oft": {"method": "oft", "block_size": 2},  # LyCORIS takes no block larger than their number
    "oft rescaled": {"method": "oft", "block_size": 2, "rescaled": True},
    "full": {"method": "full"},
    "dora": {"method": "lora", "rule": "decompose"},
    "loha decomposed": {"method": "loha", "rule": "decompose"},
    "pissa": {"method": "lora", "init": "pissa"},
}


@pytest.mark.parametrize("case", OURS)
@torch.no_grad()
def test_our_lycoris_files_load_in_lycoris(case: str, tmp_path: Path) -> None:
    """LyCORIS builds its modules from our file's tensors, and they compute what ours do."""
    ours = net()
    names = [*LINEARS, *CONVS]
    sd_lora.inject(ours, targets=names, rank=2, alpha=3, **OURS[case])
    shaken(ours)
    tensors = dict(files.lycoris.write(read_models({"": ours}), naming_of(None)))
    for name in names:
        base = ours.get_submodule(name).base
        stem = f"lycoris_{name}"
        theirs, own = make_module_of(tensors, stem, base)
        x = torch.randn(2, base.weight.shape[1], *(5,) * (base.weight.dim() - 2))
        if isinstance(theirs, FullModule):  # its forward reads a weight that it has deleted
            y = torch.func.functional_call(base, {"weight": base.weight + own["diff"]}, (x,))
        else:
            y = theirs.eval()(x)
        torch.testing.assert_close(ours.get_submodule(name)(x), y, rtol=1e-5, atol=2e-6, msg=name)


def make_module_of(
    tensors: dict[str, Tensor], stem: str, base: nn.Module
) -> tuple[nn.Module, dict[str, Tensor]]:
    own = {k.partition(".")[2]: t for k, t in tensors.items() if k.partition(".")[0] == stem}
    from lycoris.modules import get_module

    kind, params = get_module({f"{stem}.{k}": t for k, t in own.items()}, stem)
    module = make_module(kind, params, stem, base)
    assert module is not None, own.keys()
    return module, own


def test_our_lycoris_file_reads_back(tiny_sd1: Path, tmp_path: Path) -> None:
    """Written and read again, every tensor of every method is the same, to the last bit; OFT's
    numbers, which take up a factor there, to rounding."""
    from sd_lora.models.load import load_parts

    for number, (case, options) in enumerate(OURS.items()):
        if case in ("dora", "pissa", "lora tucker"):  # written in other formats
            continue
        parts = load_parts(str(tiny_sd1))
        sd_lora.inject(parts.unet, targets=FEW, rank=2, alpha=3, train_bias="all", **options)
        shaken(parts.unet)
        path = sd_lora.save_adapter({"unet": parts.unet}, tmp_path / str(number), name="x")[0]
        assert path.name == "x_lycoris.safetensors"
        bare = load_parts(str(tiny_sd1))
        sd_lora.load_adapter({"unet": bare.unet}, path)
        want, have = sd_lora.lora_state_dict(parts.unet), sd_lora.lora_state_dict(bare.unet)
        assert want.keys() == have.keys()
        for key in want:
            tolerance = 2e-7 if key.endswith("oft_skew") else 0.0
            torch.testing.assert_close(have[key], want[key], rtol=tolerance, atol=0.0)
    assert any("norm" in key for key in load_file(path))


def folder_of(path: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    path.mkdir(exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | config))
    save_file(tensors, path / "adapter_model.safetensors")
    return path


LIN = {
    "base_model.model.lin.lora_A.weight": torch.ones(2, 12),
    "base_model.model.lin.lora_B.weight": torch.ones(10, 2),
}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 0, "lora_alpha": 1}, "make no scale"),
        ({"r": -3, "lora_alpha": 1}, "make no scale"),
        ({"r": -3, "lora_alpha": 1, "use_rslora": True}, "make no scale"),
        ({"r": 2}, "KeyError"),
        ({"r": 2, "lora_alpha": -4}, "make no scale"),
        ({"r": 2, "lora_alpha": float("nan")}, "make no scale"),
        ({"r": 2, "lora_alpha": 2, "rank_pattern": ["lin"]}, "cannot be read"),
        ({"r": 10**400, "lora_alpha": 2}, "cannot be read"),
        ({"r": 2, "lora_alpha": 2, "init_lora_weights": "pissa"}, "changes the base too"),
        ({"r": 2, "lora_alpha": 2, "init_lora_weights": "olora"}, "changes the base too"),
        ({"r": 2, "lora_alpha": 2, "alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"peft_type": "IA3"}, "LORA, LOHA"),
    ],
)
def test_peft_folders_that_cannot_be_read_say_why(
    config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """Broken numbers, and starts that change the base as well, are errors; nothing is changed."""
    model = net()
    with pytest.raises(sd_lora.UsageError, match=message):
        sd_lora.load_adapter(model, folder_of(tmp_path / "peft", config, LIN))
    assert not adapted_layers(model)


def test_a_peft_pissa_that_was_converted_loads(tmp_path: Path) -> None:
    """The very folder that is refused above is a LoRA once peft has converted it, and loads as the
    function that peft trained."""
    config = peft.LoraConfig(r=2, target_modules=["lin"], init_lora_weights="pissa")
    theirs = peft.get_peft_model(net(), config)
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = "pissa"
    shaken(theirs)
    want = theirs(torch.arange(10).view(2, 5))
    theirs.save_pretrained(
        tmp_path / "done", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    ours = net()
    sd_lora.load_adapter(ours, tmp_path / "done")
    with torch.no_grad():
        got = ours(torch.arange(10).view(2, 5))
    torch.testing.assert_close(got, want.detach(), rtol=1e-4, atol=1e-4)


def test_peft_attention_patterns(tmp_path: Path) -> None:
    """peft's rank and alpha patterns name the attention, whose projections both obey them."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2)

    config = peft.LoraConfig(
        r=2, lora_alpha=2, target_modules=["attn"], rank_pattern={"attn": 3},
        alpha_pattern={"attn": 9},
    )  # fmt: skip
    theirs = shaken(peft.get_peft_model(Attention(), config))
    theirs.save_pretrained(tmp_path)
    ours = Attention()
    sd_lora.load_adapter(ours, tmp_path)
    assert {d.scale for d in sd_lora.deltas_of(ours).values()} == {3.0}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"lora_down.weight": (2, 6, 2, 3)}, "ΔW is"),
        ({"lora_down.weight": (2, 6, 9, 1)}, "ΔW is"),
        ({"dora_scale": ()}, "one number"),
        ({"dora_scale": (5, 1, 1, 1)}, "a magnitude of"),
        ({"lora_up.weight": (8, 3, 1, 1)}, "different ranks"),
        ({"oft_blocks": (2, 2)}, "no square blocks"),
        ({"oft_blocks": (2, 4, 4)}, "no method has the tensors"),
        ({"on_input": (1,), "weight": (8,)}, r"of the method \(IA\)³"),
    ],
)
def test_foreign_tensors_that_do_not_fit(
    tensors: dict[str, tuple[int, ...]], message: str, tmp_path: Path
) -> None:
    """Another kernel of as many numbers, a magnitude of another size, an unknown method."""
    parts = {"lora_down.weight": (2, 6, 3, 3), "lora_up.weight": (8, 2, 1, 1)} | tensors
    path = tmp_path / "file.safetensors"
    save_file({f"lycoris_conv2.{k}": torch.ones(s) for k, s in parts.items()}, path)
    model = net()
    with pytest.raises(sd_lora.UsageError, match=message):
        sd_lora.load_adapter(model, path)
    assert not adapted_layers(model)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1 + 2j, True])
def test_foreign_tensors_that_are_no_numbers(bad: complex, tmp_path: Path) -> None:
    """NaN, infinity, complex numbers and truth values are refused by the tensor's name."""
    path = tmp_path / "file.safetensors"
    up = torch.full((8, 2, 1, 1), bad)
    save_file(
        {
            "lycoris_conv2.lora_down.weight": torch.ones(2, 6, 3, 3),
            "lycoris_conv2.lora_up.weight": up,
        },
        path,
    )
    with pytest.raises(sd_lora.UsageError, match=r"conv2\.lora_B holds"):
        sd_lora.load_adapter(net(), path)


def test_names_that_collide_are_refused(tmp_path: Path) -> None:
    """kohya's names cannot tell a_b from a.b: neither written nor read as one of them."""

    class Colliding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a_b = nn.Linear(4, 4)
            self.a = nn.ModuleDict({"b": nn.Linear(4, 4)})

    model = Colliding()
    sd_lora.inject(model, targets=["a_b", r"a\.b"], method="loha")
    with pytest.raises(sd_lora.UsageError, match="two modules are both"):
        sd_lora.save_adapter({"": model}, tmp_path)
    assert not list(tmp_path.iterdir())
    sd_lora.eject(model)
    sd_lora.inject(model, targets=["a_b"], method="loha")
    (path,) = sd_lora.save_adapter({"": model}, tmp_path)
    with pytest.raises(sd_lora.UsageError, match="is both"):
        sd_lora.load_adapter(Colliding(), path)


def test_a_model_by_itself_saves_and_loads(tmp_path: Path) -> None:
    """Its state dict in a safetensors file, and `save_adapter`'s file, load into a bare one; also
    where a child's name is that of a pipeline's component."""
    model = nn.ModuleDict({"unet": net()})
    sd_lora.inject(model, targets=[".*conv2"], rank=2)
    shaken(model)
    save_file(sd_lora.lora_state_dict(model), tmp_path / "state.safetensors")
    (path,) = sd_lora.save_adapter({"": model}, tmp_path, name="x")
    for file in (tmp_path / "state.safetensors", path):
        bare = nn.ModuleDict({"unet": net()})
        assert sd_lora.load_adapter(bare, file) == {"": ["unet.conv2"]}
        want, got = (m["unet"].conv2.delta_weight() for m in (model, bare))
        torch.testing.assert_close(got, want)
