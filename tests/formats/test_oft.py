"""OFT's files against LyCORIS' own modules and the formulas of the other readers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sd_lora
from sd_lora.adapters.oft import OFT
from sd_lora.formats import adapter_files as files
from sd_lora.formats import inspect, merge, tools
from sd_lora.formats.approximate import Cut
from sd_lora.formats.checkpoints import Checkpoint
from sd_lora.formats.lora_file import open_lora
from sd_lora.formats.output import Output
from sd_lora.models.meta_pipeline import MetaPipeline
from tests.formats.trained import models_of, saved, trained

pytest.importorskip("lycoris")
from lycoris.modules.diag_oft import DiagOFTModule

LAYERS: dict[str, nn.Module] = {
    "linear": nn.Linear(20, 24),
    "conv2d": nn.Conv2d(6, 24, 3, padding=1),
    "conv2d 1x1": nn.Conv2d(6, 24, 1),
    "four outputs": nn.Linear(20, 4),  # LyCORIS has four blocks of one there
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rescaled": {"rescaled": True},
    "bounded": {"constraint": 0.01},
    "bound that is not reached": {"constraint": 1.0},
}


def file_of(tensors: dict[str, Tensor], path: Path, stem: str = "lycoris_layer") -> Path:
    save_file({f"{stem}.{k}": t.detach().clone().contiguous() for k, t in tensors.items()}, path)
    return path


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_lycoris_changes_are_ours(kind: str, case: str, tmp_path: Path) -> None:
    """ΔW of a file of LyCORIS' Diag-OFT is `get_diff_weight` of its module to 1e-6, with factors
    of outputs, and with alpha as the bound that it is there: of ‖Q‖, times the outputs."""
    torch.manual_seed(0)
    layer = LAYERS[kind]
    theirs = DiagOFTModule("x", layer, 1.0, lora_dim=4, **OPTIONS[case])
    for parameter in theirs.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    want, _ = theirs.get_diff_weight()
    model = nn.ModuleDict({"layer": layer})
    sd_lora.load_adapter(model, file_of(theirs.state_dict(), tmp_path / "a.safetensors"))
    have = model.layer.delta_weight()
    sd_lora.eject(model)
    torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-6)
    assert kind == "four outputs" or want.norm() > 0.05


def _of_kohya(W: Tensor, blocks: Tensor, alpha: float) -> Tensor:
    """W' of sd-scripts' OFTModule, and of A1111's: ‖Q‖ is clamped in all cases."""
    Q = blocks - blocks.transpose(1, 2)
    norm = torch.norm(Q.flatten())
    Q = Q * ((torch.clamp(norm, max=alpha * len(W)) + 1e-8) / (norm + 1e-8))
    return _turned(W, Q)


def _of_comfyui(W: Tensor, blocks: Tensor, alpha: float) -> Tensor:
    """W' of ComfyUI's OFTAdapter at strength 1: alpha itself is the bound."""
    Q = blocks - blocks.transpose(1, 2)
    norm = torch.norm(Q) + 1e-8
    return _turned(W, Q * alpha / norm if 0 < alpha < norm else Q)


def _turned(W: Tensor, Q: Tensor) -> Tensor:
    eye = torch.eye(Q.shape[-1])
    R = (eye + Q) @ torch.linalg.inv(eye - Q)
    rows = W.unflatten(0, Q.shape[:2])
    return torch.einsum("knm,kn...->km...", R, rows).flatten(0, 1)


@pytest.mark.parametrize("std", [0.0, 1e-3, 3.0, 300.0])
@torch.no_grad()
def test_our_file_is_the_same_in_every_reader(std: float) -> None:
    """The blocks and alpha that we write give our W' by the formulas of sd-scripts, A1111 and
    ComfyUI, whose bounds differ: none of them comes to bind, for small rotations and for large."""
    torch.manual_seed(0)
    layer = nn.ModuleDict({"layer": nn.Linear(20, 24)})
    sd_lora.inject(layer, ["layer"], method="oft", block_size=6)
    (delta,) = sd_lora.deltas_of(layer).values()
    delta.oft_skew.normal_(std=std) if std else None
    tensors = dict(files.lycoris.write({"": {"layer": delta}}, files.naming_of(None)))
    blocks, alpha = tensors["lycoris_layer.oft_blocks"], tensors["lycoris_layer.alpha"]
    assert blocks.shape == (4, 6, 6)
    assert torch.equal(alpha, alpha.half().float())
    W = layer.layer.base.weight
    want = layer.layer.effective_weight()
    for reader in (_of_kohya, _of_comfyui):
        torch.testing.assert_close(reader(W, blocks, float(alpha)), want, rtol=2e-5, atol=2e-6)


@torch.no_grad()
def test_files_of_sd_scripts_are_read(tmp_path: Path) -> None:
    """Under `oft_unet_` names, with as many blocks as its network_dim says, and a bound that binds:
    W' of sd-scripts' formula."""
    unet = nn.ModuleDict({"conv_in": nn.Conv2d(4, 24, 3)})
    blocks, W = 0.5 * torch.randn(3, 8, 8), unet.conv_in.weight.clone()
    tensors = {"oft_blocks": blocks, "alpha": torch.tensor(0.02)}
    path = file_of(tensors, tmp_path / "a.safetensors", "oft_unet_conv_in")
    sd_lora.load_adapter({"unet": unet}, path)
    have = unet.conv_in.effective_weight()
    torch.testing.assert_close(have, _of_kohya(W, blocks, 0.02), rtol=1e-5, atol=1e-6)
    assert (have - W).norm() > 0.1 * W.norm()


def test_tools_ask_for_the_base(tiny_sd1: Path, tmp_path: Path) -> None:
    """kohya's and diffusers' forms, a cut of ranks and a sum need ΔW, and so the base: refused by
    name without it; with it the sum of two rotations is Σ wᵢ·ΔWᵢ on the base, to its rank."""
    adapter = trained(tiny_sd1, text=False, method="oft")
    source = saved(tmp_path / "a.safetensors", files.LYCORIS, adapter, tiny_sd1)
    meta_pipeline = MetaPipeline.of_folder(str(tiny_sd1))

    def out(name: str, to: str | None = None) -> Output:
        return Output(tmp_path / name, to, meta_pipeline=meta_pipeline)

    for to in ("diffusers", "kohya"):
        with pytest.raises(sd_lora.UsageError, match=r"× oft\. --rank N and --model MODEL"):
            tools.convert(source, out("b.safetensors", to))
    needed = r"is of the method oft: its ΔW depends on the base model.*--model"
    with pytest.raises(sd_lora.UsageError, match=needed):
        tools.resize(source, out("b.safetensors"), Cut(rank=4))
    with pytest.raises(sd_lora.UsageError, match=needed):
        merge.merge([source, source], [0.5, 2], out("b.safetensors"), cut=Cut(rank=4))
    with pytest.raises(sd_lora.UsageError, match="no exact sum"):
        merge.merge([source, source], [0.5, 2], out("b.safetensors"))
    base = Checkpoint(tiny_sd1)
    result = merge.merge(
        [source, source], [0.5, 2], out("c.safetensors"), cut=Cut(rank=64), base=base
    )
    assert result.error < 1e-5
    have, unet = open_lora(tmp_path / "c.safetensors").adapter["unet"], models_of(tiny_sd1)["unet"]
    for name, delta in adapter["unet"].items():
        W = unet.get_submodule(name).weight.detach()
        want = 2.5 * delta.change(W).detach()
        torch.testing.assert_close(have[name].weight().detach(), want, rtol=1e-3, atol=1e-5)
    spectra = tools.resize(source, out("d.safetensors"), None, base=base, mean_rank=4)
    assert 0 < spectra.error < 1


def test_blocks_that_do_not_turn(tmp_path: Path) -> None:
    """LyCORIS has blocks of one output where the outputs are few or prime: they are the identity,
    as blocks of the smallest divisor; a prime too large for a block's square is refused."""
    for outputs, size in ((4, 2), (9, 3), (13, 13)):
        tensors = {"oft_blocks": torch.randn(outputs, 1, 1), "alpha": torch.tensor(0.0)}
        path = file_of(tensors, tmp_path / "a.safetensors", "lora_unet_conv_out")
        delta = open_lora(path).adapter["unet"]["conv_out"]
        assert isinstance(delta, OFT)
        assert delta.block_size == size
        assert delta.by_itself().norm() == 0
    for outputs in (1, 1031):
        tensors = {"oft_blocks": torch.randn(outputs, 1, 1)}
        path = file_of(tensors, tmp_path / "a.safetensors", "lora_unet_conv_out")
        with pytest.raises(sd_lora.UsageError, match="conv_out: .*blocks of one output"):
            open_lora(path).check()


def test_a_short_dtype_is_read_in_full(tmp_path: Path) -> None:
    """A file in bfloat16 has Q of its own numbers, to float32's rounding and not to bfloat16's."""
    blocks = torch.randn(3, 8, 8).bfloat16()
    path = file_of({"oft_blocks": blocks}, tmp_path / "a.safetensors", "lora_unet_conv_in")
    delta = open_lora(path).adapter["unet"]["conv_in"]
    assert isinstance(delta, OFT)
    want = torch.triu(blocks.double() - blocks.double().mT, 1)
    torch.testing.assert_close(delta.blocks().double(), want, rtol=2e-7, atol=0)


def test_convert_keeps_the_rotation(tiny_sd1: Path, tmp_path: Path) -> None:
    """LyCORIS' form, with and without the base: the same blocks to rounding, in bfloat16 too, and
    the table of `inspect` says what its norm is of."""
    adapter = trained(tiny_sd1, method="oft", rescaled=True)
    source = saved(tmp_path / "a.safetensors", files.LYCORIS, adapter, tiny_sd1)
    first = load_file(source)
    base = MetaPipeline.of_folder(str(tiny_sd1))
    for dtype, tolerance in (("float32", 2e-7), ("bfloat16", 4e-3)):
        path = tmp_path / f"{dtype}.safetensors"
        output = Output(path, "lycoris", dtype=dtype, meta_pipeline=base)
        given = Checkpoint(tiny_sd1) if dtype == "float32" else None
        result = tools.convert(source, output, base=given)
        assert result.written.verified.worst_error < max(tolerance, 1e-6)
        again = load_file(path)
        assert again.keys() == first.keys()
        for key in first:
            exact = key.endswith(".rescale")  # it stays float32
            rtol = 0.0 if exact else tolerance
            torch.testing.assert_close(again[key].float(), first[key], rtol=rtol, atol=0)
    found = inspect.inspect(source, base)
    assert found.problems == []
    assert "oft: ‖ΔW‖ is of the rotation" in inspect.text(found)
    unet = [block for block in found.components if block.component == "unet"]
    squares = sum(float(delta.norm()) ** 2 for delta in adapter["unet"].values())
    assert unet[0].norm == pytest.approx(squares**0.5, rel=1e-5)
    assert all(isinstance(delta, OFT) for delta in adapter["unet"].values())
