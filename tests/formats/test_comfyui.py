"""Files of DoRA for ComfyUI: its own formula, in numpy, gives the trained weights."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from numpy import ndarray
from safetensors import safe_open
from safetensors.torch import load_file

import sd_lora
from sd_lora.formats import adapter_files as files
from sd_lora.formats.checkpoints import Checkpoint
from sd_lora.formats.lora_file import open_lora
from sd_lora.formats.output import Output
from sd_lora.formats.tools import convert
from sd_lora.models.meta_pipeline import MetaPipeline
from tests.formats.trained import models_of, saved, shaken, trained


def change_by_comfyui(tensors: dict[str, ndarray], stem: str, W: ndarray) -> ndarray:
    """W' − W as ComfyUI computes it (comfy/weight_adapter, `weight_decompose` of base.py)."""
    part = {key.removeprefix(f"{stem}."): t for key, t in tensors.items() if key.startswith(stem)}
    part = {key: t for key, t in part.items() if key in KINDS}
    if "diff" in part:
        return part["diff"]
    scale, flat = 1.0, {key: t.reshape(len(t), -1) for key, t in part.items() if t.ndim}
    if "lora_up.weight" in part:
        scale = part["alpha"] / len(flat["lora_down.weight"])
        delta = flat["lora_up.weight"] @ flat["lora_down.weight"]
    elif "hada_w1_a" in part:
        scale = part["alpha"] / len(flat["hada_w1_b"])
        first, second = (flat[f"hada_w{i}_a"] @ flat[f"hada_w{i}_b"] for i in "12")
        delta = first * second
    else:
        inner = flat.get("lokr_w2_b", flat.get("lokr_w1_b"))
        scale = part["alpha"] / len(inner) if inner is not None else 1.0
        products = {i: [flat.get(f"lokr_w{i}{x}") for x in ("", "_a", "_b")] for i in "12"}
        delta = np.kron(*(a @ b if w is None else w for w, a, b in products.values()))
    V = W + scale * delta.reshape(W.shape)
    if "dora_scale" not in part:
        return V - W
    norm = np.sqrt((W.reshape(len(W), -1) ** 2).sum(1)) + np.finfo(np.float32).eps
    assert part["dora_scale"].shape == (len(W), *(1,) * (W.ndim - 1))
    return V * part["dora_scale"] / norm.reshape(part["dora_scale"].shape) - W


KINDS = {
    "alpha", "diff", "dora_scale", "lora_up.weight", "lora_down.weight",
    *(f"hada_w{i}_{x}" for i, x in itertools.product("12", "ab")),
    *(f"lokr_w{i}{x}" for i, x in itertools.product("12", ("", "_a", "_b"))),
}  # fmt: skip


@pytest.mark.parametrize("method", ["lora", "loha", "lokr", "full"])
def test_dora_is_exact_in_comfyui(method: str, tiny_sd1: Path, tmp_path: Path) -> None:
    """Decomposed deltas of each method, on every kind of layer of a UNet and its text encoder:
    ComfyUI's formula, on the file and the base's weights, gives the trained W' − W to 1e-5 of its
    norm, with magnitudes in the weights' dimensions. The file is told apart by its name and its
    header, and no other reader here takes it."""
    models = models_of(tiny_sd1)
    sd_lora.inject(models["unet"], "all", rank=3, alpha=2.0, method=method, rule="decompose")
    sd_lora.inject(models["text_encoder"], "text", rank=2, method=method, rule="decompose")
    shaken(models)
    paths = sd_lora.save_adapter(models, tmp_path, "sd1", "mine")
    (path,) = (p for p in paths if p.name == "mine_comfyui.safetensors")
    assert len(paths) == 2
    tensors = {key: t.double().numpy() for key, t in load_file(path).items()}
    stems, base = {key.partition(".")[0] for key in tensors}, models_of(tiny_sd1)
    for component, prefix in (("unet", "lora_unet"), ("text_encoder", "lora_te_text_model")):
        with sd_lora.merged(models[component]):
            for name in {n.partition(".bias")[0] for n in sd_lora.deltas_of(models[component])}:
                W = base[component].get_submodule(name).weight.detach().double().numpy()
                after = models[component].get_submodule(name).base.weight.detach().double().numpy()
                stem = f"{prefix}_{name.replace('.', '_')}"
                got, want = change_by_comfyui(tensors, stem, W), after - W
                assert np.linalg.norm(got - want) < 1e-5 * np.linalg.norm(want), name
                stems.discard(stem)
    assert not stems
    with safe_open(path, "pt") as file:
        assert file.metadata()["sd_lora_dora"] == "ComfyUI"
    with pytest.raises(sd_lora.UsageError, match="is for ComfyUI alone"):
        sd_lora.load_adapter(base, path)


def test_cores_of_lokr_are_multiplied(tiny_sd1: Path, tmp_path: Path) -> None:
    """ComfyUI fails on a LoKr's Tucker core, so that the file has a factor of two matrices in its
    place, of the same rank and alpha, whose Kronecker product is the trained ΔW."""
    options = {"method": "lokr", "tucker": True, "factor": 2, "rank": 2, "conv_rank": 2}
    adapter = trained(tiny_sd1, text=False, **options)
    path = saved(tmp_path / "lokr.safetensors", files.LYCORIS, adapter, tiny_sd1)
    tensors = {key: t.double().numpy() for key, t in load_file(path).items()}
    cores = [name for name, delta in adapter["unet"].items() if delta.lokr_t2 is not None]
    assert len(cores) > 10
    assert not [key for key in tensors if key.endswith("lokr_t2")]
    for name in cores:
        want = adapter["unet"][name].double().weight().detach().numpy()
        stem = f"lora_unet_{name.replace('.', '_')}"
        got = change_by_comfyui(tensors, stem, np.zeros_like(want))
        assert tensors[f"{stem}.lokr_w2_b"].shape[0] == 2
        assert np.linalg.norm(got - want) < 1e-6 * np.linalg.norm(want), name


def test_dora_is_converted_for_comfyui(tiny_sd1: Path, tmp_path: Path) -> None:
    """Of a diffusers file and the base's weights, `convert` makes the tensors that the run's own
    file for ComfyUI has, verified or not; without a base it asks for one, and for plain LoRA there
    is nothing to do."""
    models = models_of(tiny_sd1)
    sd_lora.inject(models["unet"], "attention+conv", rank=2, rule="decompose")
    shaken(models)
    source, own = sd_lora.save_adapter(models, tmp_path, "sd1", "mine")
    meta, want = MetaPipeline.of_folder(str(tiny_sd1)), load_file(own)
    for check in (True, False):
        out = Output(tmp_path / "out.safetensors", "comfyui", "float32", True, check, meta)
        convert(source, out, base=Checkpoint(tiny_sd1))
        have = load_file(out.path)
        assert have.keys() == want.keys()
        for key, tensor in want.items():
            assert have[key].shape == tensor.shape, key
            assert np.allclose(have[key], tensor, rtol=1e-5, atol=1e-8), key
        assert open_lora(out.path).header["sd_lora_dora"] == "ComfyUI"
    with pytest.raises(sd_lora.UsageError, match="as --model"):
        convert(source, out)
    plain = saved(tmp_path / "plain.safetensors", files.KOHYA, trained(tiny_sd1), tiny_sd1)
    with pytest.raises(sd_lora.UsageError, match="is for DoRA"):
        convert(plain, out, base=Checkpoint(tiny_sd1))


def test_dora_of_diffusers_is_converted_in_one_way(tiny_sd1: Path, tmp_path: Path) -> None:
    """Magnitudes of a diffusers file get the weights' dimensions in LyCORIS' form, verified or not:
    the two files are equal to the byte."""
    adapter = trained(tiny_sd1, rule="decompose")
    source = saved(tmp_path / "dora.safetensors", files.DIFFUSERS, adapter, tiny_sd1)
    meta, found = MetaPipeline.of_folder(str(tiny_sd1)), []
    for check in (True, False):
        out = Output(tmp_path / "out.safetensors", "lycoris", "auto", True, check, meta)
        convert(source, out)
        found.append(out.path.read_bytes())
    assert found[0] == found[1]
    shapes = {t.dim() for key, t in load_file(out.path).items() if key.endswith("dora_scale")}
    assert shapes == {2, 4}
