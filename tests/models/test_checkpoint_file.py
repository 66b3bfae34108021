"""8-bit weights with scales: the numbers they stand for, read, trained on, baked and compared."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import sd_lora
from sd_lora.formats.approximate import Cut
from sd_lora.formats.bake import bake
from sd_lora.formats.checkpoints import Checkpoint
from sd_lora.formats.extract import extract
from sd_lora.formats.output import Output
from sd_lora.formats.rounding import rounded
from sd_lora.models.checkpoint_file import CheckpointFile
from sd_lora.models.single_file import SingleFile
from tests.single import (
    build_single_pipeline,
    models_of_pipeline,
    original_tensors,
    write_tensors,
)

UNET = "model.diffusion_model."
TO_K = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def described(kind: str, **more: object) -> Tensor:
    return torch.tensor([*json.dumps({"format": kind} | more).encode()], dtype=torch.uint8)


SHAPES: dict[str, tuple[int, ...]] = {
    "one number": (),
    "one in a list": (1,),
    "an output": (6,),
    "an output, as a column": (6, 1),
    "blocks of a row": (6, 4),
    "blocks of a row, of three dimensions": (6, 4, 1),
    "square blocks": (3, 2),
}
"""Scale's shape for a weight (6, 8)."""


@pytest.mark.parametrize("dtype", [E4M3, E5M2, torch.int8])
@pytest.mark.parametrize("name", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("kind", SHAPES)
def test_weights_are_stored_times_scale(
    kind: str, name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """W[i, j] = stored[i, j] · scale of its block, written out in numpy; scales, marks and
    descriptions are no tensors of the model; others are as they are stored."""
    torch.manual_seed(0)
    stored, scale = (100 * torch.randn(6, 8)).to(dtype), torch.rand(SHAPES[kind]) + 0.1
    plain, quant = torch.randn(3).half(), described("float8_e4m3fn")
    beside = {f"a.{name}": scale, "a.input_scale": torch.ones(()), "scaled_fp8": torch.zeros(0)}
    beside["a.comfy_quant"] = quant
    path = tmp_path / "x.safetensors"
    save_file(
        {"a.weight": stored, "b.weight": plain, "c.scale_weight": plain.clone()} | beside, path
    )
    file = CheckpointFile(path)
    assert sorted(file) == ["a.weight", "b.weight", "c.scale_weight"]  # c has no weight to scale
    assert len(file) == 3
    assert file.keys() == file.shapes.keys()
    assert file.spec("a.weight") == (dtype, (6, 8))
    assert torch.equal(file["b.weight"], plain)
    q, s = stored.float().numpy(), scale.numpy().reshape(-1)
    rows, columns = (*SHAPES[kind], 1, 1)[:2]
    want = np.empty((6, 8), np.float32)
    for i, j in np.ndindex(6, 8):
        want[i, j] = q[i, j] * s[i * rows // 6 * columns + j * columns // 8]
    assert torch.equal(file["a.weight"], torch.from_numpy(want))


@pytest.mark.parametrize("dtype", [E4M3, E5M2, torch.int8])
@pytest.mark.parametrize("kind", SHAPES)
def test_other_weights_are_stored_with_the_same_or_larger_scales(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Numbers of the file are stored again with every bit. Of others a block's scale grows to its
    largest number where that is beyond the dtype, and is as it was elsewhere; what is read again is
    within half a unit of the number wanted."""
    torch.manual_seed(0)
    limit = torch.iinfo(dtype).max if dtype is torch.int8 else torch.finfo(dtype).max
    stored, scale = (limit / 4 * torch.rand(6, 8)).to(dtype), torch.rand(SHAPES[kind]) + 0.1
    path = tmp_path / "x.safetensors"
    save_file({"a.weight": stored, "a.scale_weight": scale}, path)
    file = CheckpointFile(path)
    again, held = file.rescaled("a.weight", file["a.weight"], rounded)
    assert torch.equal(again["a.weight"].float(), stored.float())
    assert torch.equal(again["a.scale_weight"], scale)
    assert torch.equal(held, file["a.weight"])
    W = file["a.weight"].clone()
    W[0, 0] = 3 * limit * scale.max()
    written, held = file.rescaled("a.weight", W, rounded)
    written = {k: t.contiguous() for k, t in written.items()}
    assert written["a.scale_weight"].shape == scale.shape
    grown = (written["a.scale_weight"] != scale).flatten()
    assert grown[0]
    assert not grown[1:].any()
    assert written["a.scale_weight"].flatten()[0] == pytest.approx(float(W[0, 0]) / limit)
    save_file(written, path)
    file = CheckpointFile(path)
    assert torch.allclose(held, file["a.weight"], rtol=1e-6)
    assert ((file["a.weight"] - W).abs() <= 1.001 * file.rounding("a.weight")).all()


def test_what_scales_do_not_say(tmp_path: Path) -> None:
    """Numbers that are packed or rotated are refused by the layer's and the format's name, whether
    a tensor or the header describes them; so is a scale that fits no weight."""
    weight = {"a.weight": torch.zeros(6, 8).to(E4M3)}
    path = tmp_path / "x.safetensors"
    for kind in ("nvfp4", "mxfp8"):
        for tensors, header in (
            ({"a.comfy_quant": described(kind)}, {}),
            ({}, {"_quantization_metadata": json.dumps({"layers": {"a": {"format": kind}}})}),
        ):
            save_file(weight | {"a.weight_scale": torch.ones(())} | tensors, path, header)
            with pytest.raises(sd_lora.UsageError, match=f"holds a in the format {kind}, which"):
                CheckpointFile(path)
    rotated = {"a.comfy_quant": described("int8_tensorwise", convrot=True)}
    save_file(weight | rotated, path)
    with pytest.raises(sd_lora.UsageError, match="int8_tensorwise, rotated"):
        CheckpointFile(path)
    for scale in (torch.ones(4), torch.ones(6, 3), torch.ones(6, 8, 2), torch.ones(6).int()):
        save_file(weight | {"a.weight_scale": scale}, path)
        with pytest.raises(sd_lora.UsageError, match=r"a.weight_scale is .* no scale of a weight"):
            CheckpointFile(path)["a.weight"]


def scaled(tensors: dict[str, Tensor], name: str = "scale_weight") -> dict[str, Tensor]:
    """Matrices of the UNet in float8 with scales, as ComfyUI's converters write them."""
    found = dict(tensors)
    for key, W in tensors.items():
        if key.startswith(UNET) and W.dim() == 2 and key.endswith(".weight"):
            s = W.abs().max() / 448
            found[key] = (W / s).to(E4M3)
            found[key.replace(".weight", f".{name}")] = s.reshape(())
    return found | {"scaled_fp8": torch.zeros(2, dtype=E4M3)}


@pytest.fixture(scope="module")
def plain() -> dict[str, Tensor]:
    return original_tensors(models_of_pipeline(build_single_pipeline("sd1")))


@pytest.mark.parametrize("name", ["scale_weight", "weight_scale"])
def test_models_are_loaded_with_their_scales(
    name: str, plain: dict[str, Tensor], tmp_path: Path
) -> None:
    """A scaled file is recognised, and its UNet has stored · scale in every matrix: the original
    but for the rounding."""
    tensors = scaled(plain, name)
    single = SingleFile.open(write_tensors(tensors, tmp_path / "x.safetensors"))
    assert single.family == "sd1"
    unet = single.load("unet", torch.float32)
    W = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k.weight
    want = tensors[TO_K].float() * tensors[TO_K.replace("weight", name, 1)]
    assert torch.equal(W, want)
    torch.testing.assert_close(W, plain[TO_K], rtol=0.07, atol=1e-3)


@pytest.mark.parametrize("dtype", ["keep", "float16"])
def test_bake_into_a_scaled_model(dtype: str, plain: dict[str, Tensor], tmp_path: Path) -> None:
    """The model written holds W + ΔW, with scales where the dtype is kept and as plain numbers
    otherwise; every other weight keeps its bits, or its value."""
    torch.manual_seed(0)
    tensors = scaled(plain)
    base = write_tensors(tensors, tmp_path / "base.safetensors")
    down, up = 0.3 * torch.randn(4, 64), 0.3 * torch.randn(32, 4)
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    lora = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
    save_file(lora, tmp_path / "lora.safetensors")
    out = tmp_path / "out.safetensors"
    bake(Checkpoint(base), [tmp_path / "lora.safetensors"], [1.0], out, dtype=dtype)
    before, after, stored = CheckpointFile(base), CheckpointFile(out), load_file(out)
    got, wanted = after[TO_K].float() - before[TO_K], up @ down
    assert (got - wanted).norm() < (0.05 if dtype == "keep" else 1e-3) * wanted.norm()
    assert stored.keys() == (tensors.keys() if dtype == "keep" else {*before})
    touched = {TO_K, TO_K.replace(".weight", ".scale_weight")}
    for key in stored.keys() - touched:
        if dtype == "keep":
            assert torch.equal(stored[key].float(), tensors[key].float())
        elif stored[key].is_floating_point():
            assert stored[key].dtype is torch.float16
            torch.testing.assert_close(stored[key], before[key].half())


def test_rounding_is_no_difference(plain: dict[str, Tensor], tmp_path: Path) -> None:
    """A model and its scaled float8 form differ in no module; with one matrix trained, in one."""
    base = Checkpoint(write_tensors(plain, tmp_path / "base.safetensors"))
    output = Output(tmp_path / "out.safetensors", check=False)
    same = Checkpoint(write_tensors(scaled(plain), tmp_path / "same.safetensors"))
    with pytest.raises(sd_lora.UsageError, match="differs from .* in no module"):
        extract(base, same, output, Cut(rank=4))
    changed = plain | {TO_K: plain[TO_K] + 0.1 * torch.randn(plain[TO_K].shape)}
    tuned = Checkpoint(write_tensors(scaled(changed), tmp_path / "tuned.safetensors"))
    result = extract(base, tuned, output, Cut(rank=64))
    assert [*result.losses] == [
        ("unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k")
    ]
