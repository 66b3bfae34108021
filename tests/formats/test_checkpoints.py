"""Base models on disk, what is baked into them and what is extracted from two of them."""

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import CLIPTextModel

import sd_lora
from sd_lora.files import TensorFile
from sd_lora.formats import adapter_files as files
from sd_lora.formats.approximate import Cut
from sd_lora.formats.bake import bake
from sd_lora.formats.checkpoints import Checkpoint
from sd_lora.formats.extract import extract
from sd_lora.formats.lora_file import open_lora
from sd_lora.formats.output import Output
from sd_lora.models.checkpoint_file import CheckpointFile
from sd_lora.models.meta_pipeline import MetaPipeline
from tests.formats.trained import models_of, saved, trained
from tests.single import build_single_pipeline, write_single
from tests.tiny import build_pipeline, build_unet

UNET = "model.diffusion_model."
KEYS = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
QUERIES = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
VAE = "first_stage_model.decoder.conv_in.weight"
CLIP = "cond_stage_model.transformer.text_model."
OPEN_CLIP = "cond_stage_model.model."
FIRST = "down_blocks.0.attentions.0.transformer_blocks.0"


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def written(
    path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None
) -> Path:
    save_file(dict(tensors), path, None if header is None else dict(header))
    return path


def sd1_single(path: Path, **more: Tensor) -> Path:
    """A checkpoint of SD1 with one layer of each kind."""
    tensors = {
        KEYS: values(320, 768),
        QUERIES: values(320, 320, seed=1),
        f"{UNET}input_blocks.0.0.bias": values(320),
        VAE: values(4, 4),
        f"{CLIP}encoder.layers.3.mlp.fc1.weight": values(24, 8),
        f"{CLIP}embeddings.position_ids": torch.arange(77)[None],
    }
    return written(path, tensors | more, {"format": "pt"})


def lora(path: Path, **ranges: tuple[int, int]) -> Path:
    """A LoRA of rank 1 whose every entry of ΔW is 1/4: kohya stem → (rows, columns)."""
    tensors = {}
    for stem, (rows, columns) in ranges.items():
        tensors[f"{stem}.lora_down.weight"] = torch.full((1, columns), 0.5)
        tensors[f"{stem}.lora_up.weight"] = torch.full((rows, 1), 0.5)
    return written(path, tensors)


def on_keys(path: Path) -> Path:
    return lora(path, **{f"lora_unet_{FIRST.replace('.', '_')}_attn2_to_k": (320, 768)})


def edit(folder: Path, component: str, name: str, change: Callable[[Tensor], object]) -> None:
    """Changes one parameter in a pipeline folder's file, in place."""
    file, key, _ = Checkpoint(folder).places[component, name]
    tensors = load_file(folder / file)
    change(tensors[key])
    save_file(tensors, folder / file, {"format": "pt"})


def put(folder: Path, component: str, name: str, tensor: Tensor) -> None:
    """Replaces one parameter in a pipeline folder's file."""
    file, key, _ = Checkpoint(folder).places[component, name]
    save_file(load_file(folder / file) | {key: tensor}, folder / file, {"format": "pt"})


@pytest.fixture
def copy(tiny_sd1: Path, tmp_path: Path) -> Path:
    """A copy of the tiny SD1 folder, to change."""
    return Path(shutil.copytree(tiny_sd1, tmp_path / "copy"))


@pytest.fixture
def unet_lora(tiny_sd1: Path, tmp_path: Path) -> Path:
    adapter = trained(tiny_sd1, text=False)
    return saved(tmp_path / "lora.safetensors", files.KOHYA, adapter, tiny_sd1)


def everything(folder: Path) -> dict[str, bytes]:
    """Relative path → bytes of every file."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# --- single checkpoints ---


def test_a_single_checkpoint_of_sd1(tmp_path: Path) -> None:
    """The family by its keys, the parameters in diffusers' and transformers' names, each with the
    values that the file has; the VAE and the buffer `position_ids` are no slots."""
    base = Checkpoint(sd1_single(tmp_path / "sd1.safetensors"))
    assert base.family.name == "sd1"
    fc1 = "text_model.encoder.layers.3.mlp.fc1"
    assert set(base.places) == {
        ("unet", f"{FIRST}.attn2.to_k"),
        ("unet", f"{FIRST}.attn1.to_q"),
        ("unet", "conv_in.bias"),
        ("text_encoder", fc1),
    }
    file = load_file(tmp_path / "sd1.safetensors")
    assert torch.equal(base.weight("unet", f"{FIRST}.attn2.to_k"), file[KEYS])
    assert base.shape("text_encoder", fc1) == (24, 8)
    with pytest.raises(sd_lora.UsageError, match=r"has no text_encoder nothing"):
        base.weight("text_encoder", "nothing")


def test_a_single_checkpoint_of_sd2(tmp_path: Path) -> None:
    """OpenCLIP's fused matrix and bias are queries, keys and values in this order, its tables and
    norms have transformers' names, and `logit_scale` and `attn_mask` are no slots."""
    block = f"{OPEN_CLIP}transformer.resblocks.5."
    fused, bias = values(3 * 8, 8), values(3 * 8, seed=1)
    tensors = {
        KEYS: torch.zeros(320, 1024),
        f"{block}attn.in_proj_weight": fused,
        f"{block}attn.in_proj_bias": bias,
        f"{block}attn.out_proj.weight": torch.zeros(8, 8),
        f"{block}ln_2.bias": torch.zeros(8),
        f"{block}mlp.c_proj.weight": torch.zeros(8, 32),
        f"{OPEN_CLIP}ln_final.weight": torch.zeros(8),
        f"{OPEN_CLIP}positional_embedding": torch.zeros(77, 8),
        f"{OPEN_CLIP}token_embedding.weight": torch.zeros(16, 8),
        f"{OPEN_CLIP}logit_scale": torch.zeros(()),
        f"{OPEN_CLIP}attn_mask": torch.zeros(77, 77),
    }
    base = Checkpoint(written(tmp_path / "sd2.safetensors", tensors))
    assert base.family.name == "sd2"
    layer = "text_model.encoder.layers.5"
    thirds = [f"self_attn.{x}_proj{kind}" for x in "qkv" for kind in ("", ".bias")]
    inside = ("self_attn.out_proj", "layer_norm2.bias", "mlp.fc2", *thirds)
    outside = ("final_layer_norm", "embeddings.position_embedding", "embeddings.token_embedding")
    assert set(base.places) == {
        ("unet", f"{FIRST}.attn2.to_k"),
        *(("text_encoder", f"{layer}.{name}") for name in inside),
        *(("text_encoder", f"text_model.{name}") for name in outside),
    }
    for number, x in enumerate("qkv"):
        rows = slice(8 * number, 8 * number + 8)
        name = f"{layer}.self_attn.{x}_proj"
        assert torch.equal(base.weight("text_encoder", name), fused[rows])
        assert torch.equal(base.weight("text_encoder", f"{name}.bias"), bias[rows])


def test_a_single_checkpoint_of_sdxl(tmp_path: Path) -> None:
    """Two text encoders by their places, the second's projection transposed."""
    second, projection = "conditioner.embedders.1.model.", values(6, 4)
    tensors = {
        f"{UNET}label_emb.0.2.weight": torch.zeros(8, 8),
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias": torch.zeros(8),
        f"{second}text_projection": projection,
        f"{second}logit_scale": torch.zeros(()),
    }
    base = Checkpoint(written(tmp_path / "sdxl.safetensors", tensors))
    assert base.family.name == "sdxl"
    assert set(base.places) == {
        ("unet", "add_embedding.linear_2"),
        ("text_encoder", "text_model.final_layer_norm.bias"),
        ("text_encoder_2", "text_projection"),
    }
    assert torch.equal(base.weight("text_encoder_2", "text_projection"), projection.T)
    assert base.shape("text_encoder_2", "text_projection") == (4, 6)


@pytest.mark.parametrize(("family", "width"), [("sd1", 768), ("sd2", 1024), ("sdxl", 2048)])
def test_a_unet_by_itself(family: str, width: int, tmp_path: Path) -> None:
    """Of a file with nothing but a UNet, the width of the text it attends to tells the family."""
    key = f"{UNET}input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
    base = Checkpoint(written(tmp_path / "unet.safetensors", {key: torch.zeros(640, width)}))
    assert base.family.name == family
    assert set(base.places) == {
        ("unet", "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k")
    }


TEXT = {
    "sd1": f"{CLIP}encoder.layers.3.mlp.fc1.weight",
    "sd2": f"{OPEN_CLIP}ln_final.weight",
    "sdxl": "conditioner.embedders.1.model.ln_final.weight",
    "sdxl_refiner": "conditioner.embedders.0.model.ln_final.weight",
}


@pytest.mark.parametrize("family", TEXT)
def test_the_text_encoder_tells_the_family(family: str, tmp_path: Path) -> None:
    """Where no layer of the UNet says how wide its text is, the place of the text encoder does."""
    tensors = {TEXT[family]: torch.zeros(8), f"{UNET}out.2.weight": torch.zeros(4, 8, 3, 3)}
    base = Checkpoint(written(tmp_path / "base.safetensors", tensors))
    assert base.family.name == family
    assert ("unet", "conv_out") in base.places
    assert len(base.places) == 2


OTHERS = {
    "SD3": {
        f"{UNET}joint_blocks.0.context_block.attn.qkv.weight": (12, 4),
        "text_encoders.clip_l.transformer.text_model.final_layer_norm.bias": (4,),
    },
    "Flux": {f"{UNET}double_blocks.0.img_attn.qkv.weight": (12, 4)},
    "a VAE": {"decoder.conv_in.weight": (4, 4)},
    "nothing": {},
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_single_checkpoints_are_refused(other: str, tmp_path: Path) -> None:
    """A file that is none of the families is refused by its path, and never taken for one."""
    tensors = {key: torch.zeros(shape) for key, shape in OTHERS[other].items()}
    path = written(tmp_path / "other.safetensors", tensors)
    with pytest.raises(sd_lora.UsageError, match=r"other\.safetensors"):
        Checkpoint(path)


# --- files of a folder ---


def as_variant(folder: Path) -> None:
    """Gives the UNet's file the name of a variant."""
    unet = folder / "unet"
    os.rename(
        unet / "diffusion_pytorch_model.safetensors",
        unet / "diffusion_pytorch_model.fp16.safetensors",
    )


def test_a_variant_is_taken_where_there_is_one(copy: Path, tiny_sd1: Path) -> None:
    """With a variant, a part's file of that name, and the plain one of a part that has no such;
    beside a plain one, the variant counts. Without, its name is in the error's advice."""
    as_variant(copy)
    with pytest.raises(sd_lora.UsageError, match="--variant fp16 is there"):
        _ = Checkpoint(copy).files
    base, want = Checkpoint(copy, "fp16"), Checkpoint(tiny_sd1)
    assert set(base.files) == {
        "unet/diffusion_pytorch_model.fp16.safetensors", "text_encoder/model.safetensors"
    }  # fmt: skip
    assert all(torch.equal(base.weight(*place), want.weight(*place)) for place in want.places)
    other = {k: t + 1 for k, t in load_file(copy / "text_encoder/model.safetensors").items()}
    save_file(other, copy / "text_encoder/model.fp16.safetensors")
    place = "text_encoder", "text_model.final_layer_norm"
    assert torch.equal(Checkpoint(copy, "fp16").weight(*place), want.weight(*place) + 1)
    with pytest.raises(sd_lora.UsageError, match="unet has no weights"):
        _ = Checkpoint(copy, "bf16").files


def test_a_pickled_variant_is_baked_under_a_name_that_loads(copy: Path, tmp_path: Path) -> None:
    """`pytorch_model.fp16.bin` becomes `model.fp16.safetensors`: transformers finds it there, with
    the change in it."""
    as_variant(copy)
    place = copy / "text_encoder"
    tensors = load_file(place / "model.safetensors")
    torch.save(tensors, place / "pytorch_model.fp16.bin")
    os.remove(place / "model.safetensors")
    stem = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    source = lora(tmp_path / "lora.safetensors", **{stem: (64, 32)})
    bake(Checkpoint(copy, "fp16"), [source], [1.0], tmp_path / "baked")
    assert sorted(os.listdir(tmp_path / "baked/text_encoder")) == [
        "config.json", "model.fp16.safetensors"
    ]  # fmt: skip
    model = CLIPTextModel.from_pretrained(
        tmp_path / "baked", subfolder="text_encoder", variant="fp16"
    )
    (name,) = (n for n, _ in model.named_parameters() if n.endswith("layers.0.mlp.fc1.weight"))
    (key,) = (k for k in tensors if k.endswith("layers.0.mlp.fc1.weight"))
    torch.testing.assert_close(model.get_parameter(name).data, tensors[key] + 0.25)


# --- bake ---


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_bake_in_a_dtype(dtype: str, tiny_sd1: Path, unet_lora: Path, tmp_path: Path) -> None:
    """Every weight that a LoRA may change is the float32 one rounded, of text encoders that this
    one leaves alone too; the VAE's file is the same to the byte."""
    base = Checkpoint(tiny_sd1)
    bake(base, [unet_lora], [1.0], tmp_path / "wide")
    bake(base, [unet_lora], [1.0], tmp_path / "half", dtype=dtype)
    for name in base.files:
        wide, half = load_file(tmp_path / "wide" / name), load_file(tmp_path / "half" / name)
        assert {t.dtype for t in wide.values()} == {torch.float32}
        assert wide.keys() == half.keys()
        kind = getattr(torch, dtype)
        assert all(torch.equal(half[key], wide[key].to(kind)) for key in wide)
        assert all(half[key].dtype is kind for key in wide)
    vae = "vae/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "half" / vae).read_bytes() == (tiny_sd1 / vae).read_bytes()


def test_the_base_is_never_written_over(copy: Path, unet_lora: Path, tmp_path: Path) -> None:
    """Neither by its own name nor through a link, not even when told to overwrite."""
    single = sd1_single(tmp_path / "base.safetensors")
    source, before = on_keys(tmp_path / "keys.safetensors"), single.read_bytes()
    link = tmp_path / "link.safetensors"
    link.symlink_to(single)
    for out in (single, link):
        with pytest.raises(sd_lora.UsageError, match="is the base model itself"):
            bake(Checkpoint(single), [source], [1.0], out, overwrite=True)
    assert single.read_bytes() == before
    linked = tmp_path / "linked"
    linked.symlink_to(copy)
    folder = everything(copy)
    for out in (copy, linked, copy / "unet", tmp_path):
        with pytest.raises(sd_lora.UsageError, match=r"base model itself|lie in each other"):
            bake(Checkpoint(copy), [unet_lora], [1.0], out, overwrite=True)
    assert everything(copy) == folder


def test_unchanged_weights_are_left_out(copy: Path, unet_lora: Path, tmp_path: Path) -> None:
    """Files that would shadow the baked weights, or hold the base's, are not copied, and a note
    names each: other kinds and variants in the parts, whole checkpoints beside them."""
    stale = [
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "text_encoder/pytorch_model.bin",
        "v1-5-pruned.safetensors",
    ]
    for name in stale:
        (copy / name).write_bytes(b"the unchanged weights")
    (copy / "vae/diffusion_pytorch_model.fp16.safetensors").write_bytes(b"of the VAE")
    done = bake(Checkpoint(copy), [unet_lora], [1.0], tmp_path / "baked")
    there = everything(tmp_path / "baked")
    assert not there.keys() & set(stale)
    assert all(any(name in note for note in done.notes) for name in stale)
    assert there["vae/diffusion_pytorch_model.fp16.safetensors"] == b"of the VAE"
    assert there.keys() == everything(copy).keys() - set(stale)


def test_overwrite_replaces_a_pipeline_and_nothing_else(
    copy: Path, unet_lora: Path, tmp_path: Path
) -> None:
    """A former pipeline folder is replaced as a whole, and kept when the new one fails; a folder
    that is no pipeline is refused and left as it was."""
    base, out, home = Checkpoint(copy), tmp_path / "out", tmp_path / "home"
    shutil.copytree(copy, out)
    (out / "unet/leftover.txt").write_text("of before")
    before = everything(out)
    with pytest.raises(sd_lora.UsageError, match="exists"):
        bake(base, [unet_lora], [1.0], out)
    with pytest.raises(sd_lora.RunError, match="more than float16 holds"):
        bake(base, [unet_lora], [1e9], out, dtype="float16", overwrite=True)
    assert everything(out) == before
    bake(base, [unet_lora], [1.0], out, overwrite=True)
    bake(base, [unet_lora], [1.0], tmp_path / "fresh")
    assert everything(out) == everything(tmp_path / "fresh")
    home.mkdir()
    (home / "thesis.txt").write_text("years of work")
    with pytest.raises(sd_lora.UsageError, match=r"home"):
        bake(base, [unet_lora], [1.0], home, overwrite=True)
    assert everything(home) == {"thesis.txt": b"years of work"}
    assert not list(tmp_path.glob(".*"))


def test_links_are_followed_and_history_is_not(copy: Path, unet_lora: Path, tmp_path: Path) -> None:
    """A folder whose parts are links, as caches have them, is copied whole; `.git` is not."""
    want = everything(copy)
    (tmp_path / "elsewhere").mkdir()
    for part in ("vae", "scheduler", "text_encoder"):
        shutil.move(copy / part, tmp_path / "elsewhere" / part)
        (copy / part).symlink_to(tmp_path / "elsewhere" / part)
    (copy / ".git/objects").mkdir(parents=True)
    (copy / ".git/objects/pack").write_bytes(b"gigabytes of history")
    bake(Checkpoint(copy), [unet_lora], [1.0], tmp_path / "baked")
    there = everything(tmp_path / "baked")
    assert there.keys() == want.keys()
    unet = {"unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"}
    assert all(there[name] == want[name] for name in want.keys() - unet)
    shutil.rmtree(tmp_path / "elsewhere")
    assert everything(tmp_path / "baked") == there


def test_pickles_and_code_of_a_base_are_told(copy: Path, unet_lora: Path, tmp_path: Path) -> None:
    """What can run code is copied, since the pipeline may need it, and named; the folder that is
    written beside the output is new: a link laid there is not followed."""
    for name in ("safety_checker/pytorch_model.bin", "unet/my_unet.py", "notes.txt"):
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_bytes(b"x")
    (tmp_path / "precious").mkdir()
    (tmp_path / ".baked.part").symlink_to(tmp_path / "precious")
    (note,) = bake(Checkpoint(copy), [unet_lora], [1.0], tmp_path / "baked").notes
    assert note == (
        "copied from the base, and programs that load them may run code in them: "
        "safety_checker/pytorch_model.bin, unet/my_unet.py"
    )
    assert everything(copy).keys() == everything(tmp_path / "baked").keys()
    assert not [*(tmp_path / "precious").iterdir()]


def test_the_header_of_a_checkpoint_is_kept(tmp_path: Path) -> None:
    """Its licence and its own keys stay; the hash of the tensors that it had does not."""
    facts = {"format": "pt", "modelspec.license": "CreativeML", "mark": "kept"}
    tensors = {KEYS: torch.zeros(320, 768)}
    path = tmp_path / "base.safetensors"
    written(path, tensors, facts | {"modelspec.hash_sha256": "0x" + "0" * 64})
    out = tmp_path / "baked.safetensors"
    bake(Checkpoint(path), [on_keys(tmp_path / "lora.safetensors")], [2.0], out)
    header = TensorFile(out).header
    assert {k: header.get(k) for k in facts} == facts
    assert header.get("modelspec.hash_sha256") != "0x" + "0" * 64
    assert torch.equal(load_file(out)[KEYS], torch.full((320, 768), 0.5))


@torch.no_grad()
def test_each_decomposed_update_is_composed_with_the_base(tiny_sd1: Path, tmp_path: Path) -> None:
    """Of two DoRAs, W + .7 (W₁' − W) + .4 (W₂' − W) with the base's own W in both, which is not
    what composing one with the other's result gives."""
    adapters = [trained(tiny_sd1, seed, text=False, rule="decompose") for seed in (1, 2)]
    sources = [
        saved(tmp_path / f"{number}.safetensors", files.DIFFUSERS, adapter, tiny_sd1)
        for number, adapter in enumerate(adapters)
    ]
    bake(Checkpoint(tiny_sd1), sources, [0.7, 0.4], tmp_path / "baked")
    unet, baked = models_of(tiny_sd1)["unet"], models_of(tmp_path / "baked")["unet"]
    far = 0.0
    for name, first in adapters[0]["unet"].items():
        second = adapters[1]["unet"][name]
        W = unet.get_submodule(name).weight.data
        after = W + 0.7 * (first.compose(W) - W)
        want = after + 0.4 * (second.compose(W) - W)
        in_turn = after + 0.4 * (second.compose(after) - after)
        far = max(far, float((in_turn - want).norm() / (want - W).norm()))
        have = baked.get_submodule(name).weight.data
        assert float((have - want).norm() / (want - W).norm()) < 1e-5
    assert far > 1e-2


def test_a_base_that_is_broken_where_it_is_adapted(
    copy: Path, unet_lora: Path, tmp_path: Path
) -> None:
    """NaN in a weight that gets a delta is an error that names it; nothing is left."""
    edit(copy, "unet", "conv_in", lambda t: t.view(-1)[3:4].fill_(float("nan")))
    with pytest.raises(sd_lora.RunError, match=r"conv_in\.weight .*NaN"):
        bake(Checkpoint(copy), [unet_lora], [1.0], tmp_path / "baked")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy", "lora.safetensors"]


def test_averaged_weights_are_noted(tmp_path: Path) -> None:
    """A checkpoint's `model_ema.*` are the base's, copied as they are, and a note says so."""
    ema = "model_ema.diffusion_modelinput_blocks00weight"
    source = on_keys(tmp_path / "lora.safetensors")
    base = sd1_single(tmp_path / "base.safetensors", **{ema: values(4)})
    done = bake(Checkpoint(base), [source], [1.0], tmp_path / "baked.safetensors")
    assert any("model_ema" in note for note in done.notes)
    plain = sd1_single(tmp_path / "plain.safetensors")
    done = bake(Checkpoint(plain), [source], [1.0], tmp_path / "again.safetensors")
    assert not any("ema" in note for note in done.notes)


@pytest.mark.parametrize("dtype", ["keep", "float16"])
def test_bake_into_eight_bits(dtype: str, tmp_path: Path) -> None:
    """A base of float8: each adapted weight is the float32 sum rounded, and the others keep their
    bits."""
    path, eight = tmp_path / "base.safetensors", torch.float8_e4m3fn
    tensors = {KEYS: values(320, 768).to(eight), QUERIES: values(320, 320).to(eight)}
    written(path, tensors)
    out = tmp_path / "baked.safetensors"
    source = on_keys(tmp_path / "lora.safetensors")
    bake(Checkpoint(path), [source], [1.0], out, dtype=dtype)
    baked, kind = load_file(out), eight if dtype == "keep" else torch.float16
    assert {t.dtype for t in baked.values()} == {kind}
    assert torch.equal(baked[QUERIES].float(), tensors[QUERIES].float())
    want = (tensors[KEYS].float() + 0.25).to(kind)
    assert torch.equal(baked[KEYS].float(), want.float())


@pytest.mark.parametrize(
    ("dtype", "rounding", "remedy"),
    [
        (torch.float8_e4m3fn, "nearest", "--dtype float16"),
        (torch.float8_e4m3fn, "stochastic", "keeps its mean"),
        (torch.bfloat16, "nearest", "--rounding stochastic"),
        (torch.bfloat16, "stochastic", "--dtype float16"),
        (torch.float16, "nearest", ""),
        (torch.float32, "stochastic", ""),
    ],
)
def test_bake_states_what_rounding_loses(
    dtype: torch.dtype, rounding: str, remedy: str, tmp_path: Path
) -> None:
    """‖got − ΔW‖ / ‖ΔW‖ is stated as numpy measures it on the two files, for a ΔW of 1 % of ‖W‖,
    0.01 everywhere; past 5 % a note names the remedies. At random each number becomes a neighbour
    on the stored dtype's grid and the mean of 245,760 of them is ΔW within five standard errors; to
    the nearest one 8 bits keep nothing of it. The same call gives the same bytes."""
    path, out = tmp_path / "base.safetensors", tmp_path / "baked.safetensors"
    written(path, {KEYS: values(320, 768).to(dtype)})
    source = on_keys(tmp_path / "lora.safetensors")
    base = Checkpoint(path)
    done = bake(base, [source], [0.04], out, rounding=rounding)
    before, after = (load_file(p)[KEYS].double().numpy() for p in (path, out))
    got, want = after - before, np.full((320, 768), 0.01)
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert done.rounding.error == pytest.approx(error, rel=1e-3, abs=1e-6)
    assert any(remedy in note for note in done.notes) if remedy else not done.notes
    assert done.dtypes == [str(dtype)[6:]]
    bytes_ = out.read_bytes()
    bake(base, [source], [0.04], out, overwrite=True, rounding=rounding)
    assert out.read_bytes() == bytes_
    if rounding == "nearest":
        kept = {torch.float8_e4m3fn: 0.1, torch.bfloat16: 1.0, torch.float16: 1.0}[dtype]
        assert got.mean() == pytest.approx(0.01 * kept, abs=2e-3)
        return
    assert abs(got.mean() - 0.01) < 5 * got.std() / np.sqrt(got.size) + 1e-8
    spacing = [2 * CheckpointFile(p).rounding(KEYS).double().numpy() for p in (path, out)]
    assert (np.abs(got - want) <= np.maximum(*spacing) + 1e-6).all()


def test_bake_into_scaled_eight_bits(tmp_path: Path) -> None:
    """The change in a scaled checkpoint is stored · scale after, minus the same before, each by its
    own scale, which grew with the largest number; ‖got − ΔW‖ / ‖ΔW‖ of it is what is stated."""
    path, out = tmp_path / "base.safetensors", tmp_path / "baked.safetensors"
    W, name = values(320, 768), f"{KEYS[:-6]}scale_weight"
    scale = W.abs().max() / 448
    mark = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    written(path, {KEYS: (W / scale).to(torch.float8_e4m3fn), name: scale.reshape(())} | mark)
    done = bake(Checkpoint(path), [on_keys(tmp_path / "lora.safetensors")], [4.0], out)
    files = [load_file(p) for p in (path, out)]
    before, after = (f[KEYS].double().numpy() * float(f[name]) for f in files)
    assert files[1][name] == pytest.approx((before + 1).max() / 448, rel=1e-6)
    error = np.linalg.norm(after - before - 1) / np.sqrt(before.size)
    assert done.rounding.error == pytest.approx(error, rel=1e-4)
    assert 0.01 < error < 0.04


# --- UNets of other layouts ---


@pytest.mark.parametrize("kind", ["sd1", "sd1-small", "sdxl-small", "sdxl-ssd", "sdxl-vega"])
def test_single_files_are_read_by_their_own_layout(kind: str, tmp_path: Path) -> None:
    """A model without a middle, or with other depths of attention and another number of ResNets
    than the published one, as a single file: every parameter is found at its place; extracting the
    difference of two files gives the modules that were changed, verified in that model; and baking
    it into the first gives the second."""
    pipeline = build_single_pipeline(kind)
    base = write_single(pipeline, tmp_path / "base.safetensors")
    names = ["up_blocks.0.resnets.1.conv1", "down_blocks.1.resnets.0.conv2", "conv_in"]
    names += [n for n, m in pipeline.unet.named_modules() if n.endswith("attn2.to_k")][-2:]
    tuned_unet = pipeline.unet
    for name in names:
        W = tuned_unet.get_submodule(name).weight
        W += 0.1 * values(*W.shape, seed=len(name))
    tuned = write_single(pipeline, tmp_path / "tuned.safetensors")
    checkpoint = Checkpoint(tuned)
    parameters = dict(tuned_unet.named_parameters())
    found = {name for component, name in checkpoint.places if component == "unet"}
    assert found == {name.removesuffix(".weight") for name in parameters}
    for name, parameter in parameters.items():
        assert torch.equal(checkpoint.weight("unet", name.removesuffix(".weight")), parameter)
    lora = tmp_path / "lora.safetensors"
    result = extract(Checkpoint(base), checkpoint, Output(lora), Cut(rank=64))
    assert {name for _, name in result.losses} == {*names}
    verified = result.written.verified
    assert verified is not None
    assert verified.modules == len(names)
    bake(Checkpoint(base), [lora], [1.0], tmp_path / "baked.safetensors")
    got, want = load_file(tmp_path / "baked.safetensors"), load_file(tuned)
    assert got.keys() == want.keys()
    for key in want:
        torch.testing.assert_close(got[key], want[key], rtol=1e-5, atol=1e-5)


# --- extract ---


def out(path: Path, folder: Path) -> Output:
    return Output(path, meta_pipeline=MetaPipeline.of_folder(str(folder)))


def refused(base: Path, tuned: Path, match: str, **options: object) -> None:
    """Extracting is refused with such a line, and nothing is left."""
    folder = base.parent / "refused"
    with pytest.raises(sd_lora.UsageError, match=match):
        extract(
            Checkpoint(base),
            Checkpoint(tuned),
            Output(folder / "o.safetensors", check=False),
            Cut(rank=2),
            **options,
        )
    assert not folder.exists() or not list(folder.iterdir())


def test_extract_refuses_two_architectures(tiny_sd1: Path, tiny_sd2: Path, tmp_path: Path) -> None:
    """Two families, and shapes that differ."""
    refused(Path(shutil.copytree(tiny_sd1, tmp_path / "a")), tiny_sd2, "two models of one family")
    pipeline = build_pipeline("sd1")
    pipeline.unet = build_unet("sd1", cross_attention_dim=48)
    pipeline.save_pretrained(tmp_path / "wider")
    refused(tmp_path / "a", tmp_path / "wider", r"attn2\.to_[kv] is \(\d+, 32\).*\(\d+, 48\)")


def test_extract_refuses_a_shape_of_as_many_numbers(tmp_path: Path) -> None:
    """(24, 8) and (8, 24) are not one parameter: their difference would be no number's."""
    single = sd1_single(tmp_path / "single.safetensors")
    fc1 = f"{CLIP}encoder.layers.3.mlp.fc1.weight"
    turned = sd1_single(tmp_path / "turned.safetensors", **{fc1: values(8, 24, seed=9)})
    refused(single, turned, r"mlp\.fc1")


def test_extract_refuses_what_is_not_finite(tiny_sd1: Path, copy: Path, tmp_path: Path) -> None:
    """NaN in either of two models is an error that names the module; nothing is left."""
    edit(copy, "unet", "conv_out", lambda t: t.view(-1)[0:1].fill_(float("nan")))
    base = Path(shutil.copytree(tiny_sd1, tmp_path / "base"))
    refused(base, copy, r"unet conv_out is not finite")
    refused(copy, base, r"unet conv_out is not finite")


def test_extract_of_some_parts(tiny_sd1: Path, copy: Path, tmp_path: Path) -> None:
    """Of the parts that were asked for, and nothing is said of the others; a part that there is
    not is an error."""
    fc1 = "text_model.encoder.layers.0.mlp.fc1"
    places = {"unet": "conv_in", "text_encoder": fc1}
    for component, name in places.items():
        edit(copy, component, name, lambda t: t.add_(values(*t.shape)))
    for component, name in places.items():
        path = tmp_path / f"{component}.safetensors"
        models = Checkpoint(tiny_sd1), Checkpoint(copy)
        result = extract(*models, out(path, tiny_sd1), Cut(rank=4), (component,))
        adapter = open_lora(path).adapter
        assert {c: list(modules) for c, modules in adapter.items()} == {component: [name]}
        assert set(result.losses) == {(component, name)}
    refused(copy, copy, "has none of text_encoder_2", components=("text_encoder_2",))


def test_extract_counts_embeddings_and_keeps_none(
    tiny_sd1: Path, copy: Path, tmp_path: Path
) -> None:
    """Changed tables of tokens and positions are matrices that no LoRA file holds: they are counted
    and named; the stated share of the whole difference is the measured one."""
    changes = {
        ("unet", "conv_in"): 1.0,
        ("unet", "mid_block.attentions.0.proj_in.bias"): 0.5,
        ("text_encoder", "text_model.embeddings.token_embedding"): 0.02,
        ("text_encoder", "text_model.embeddings.position_embedding"): 0.1,
    }
    for (component, name), size in changes.items():
        edit(copy, component, name, lambda t, size=size: t.add_(size * values(*t.shape)))
    base, tuned = Checkpoint(tiny_sd1), Checkpoint(copy)
    path = tmp_path / "o.safetensors"
    result = extract(base, tuned, out(path, tiny_sd1), Cut(rank=64))
    adapter = open_lora(path).adapter
    assert {c: list(modules) for c, modules in adapter.items()} == {"unet": ["conv_in"]}
    (note,) = (note for note in result.notes if "no LoRA can hold" in note)
    assert note.startswith("3 parameters changed")
    squares = {
        p: float((tuned.weight(*p).double() - base.weight(*p).double()).square().sum())
        for p in base.places
    }
    share = (1 - squares["unet", "conv_in"] / sum(squares.values())) ** 0.5
    stated = re.search(r"([\d.]+)% of the whole difference", note)
    assert stated is not None
    assert float(stated[1]) == pytest.approx(100 * share, abs=0.06)
    assert 0.1 < share < 0.9
    unchanged = len(squares) - 4
    assert any(note.startswith(f"{unchanged} parameters are unchanged") for note in result.notes)


def test_what_counts_as_unchanged(tiny_sd1: Path, copy: Path, tmp_path: Path) -> None:
    """A change of 1e-8 of a weight's norm is rounding and is left out, one of 1e-4 is kept."""
    base = Path(shutil.copytree(tiny_sd1, tmp_path / "base"))
    sizes = {"conv_in": 1e-8, "conv_out": 1e-4}
    for name, size in sizes.items():
        edit(base, "unet", name, lambda t: t.view(-1)[0:1].fill_(0))
        norm = float(Checkpoint(base).weight("unet", name).norm())
        whole = Checkpoint(base).weight("unet", name).clone()
        whole.view(-1)[0] = size * norm
        put(copy, "unet", name, whole)
    result = extract(
        Checkpoint(base),
        Checkpoint(copy),
        out(tmp_path / "o.safetensors", base),
        Cut(rank=1),
    )
    assert set(result.losses) == {("unet", "conv_out")}
    unchanged = len(Checkpoint(base).places) - 1
    assert f"{unchanged} parameters are unchanged" in result.notes[0]
    put(copy, "unet", "conv_out", Checkpoint(base).weight("unet", "conv_out"))
    refused(base, copy, "in no module that a LoRA can hold")


def test_extract_takes_the_shapes_of_its_base(tiny_sd1: Path, copy: Path, tmp_path: Path) -> None:
    """Without a model given, the output is for the base: one of unpublished size is verified."""
    edit(copy, "unet", "conv_in", lambda t: t.add_(values(*t.shape)))
    output = Output(tmp_path / "o.safetensors")
    result = extract(Checkpoint(tiny_sd1), Checkpoint(copy), output, Cut(rank=4))
    assert result.written.verified is not None
    assert result.written.verified.modules == 1


def test_a_parameter_without_dimensions(tiny_sd1: Path, copy: Path, tmp_path: Path) -> None:
    """A single number where a model has a vector, in two checkpoints alike: counted among what no
    LoRA can hold, and no traceback."""
    base = Path(shutil.copytree(tiny_sd1, tmp_path / "base"))
    for folder, value in ((base, 1.0), (copy, 2.0)):
        put(folder, "unet", "conv_norm_out.bias", torch.tensor(value))
    edit(copy, "unet", "conv_in", lambda t: t.add_(values(*t.shape)))
    path = tmp_path / "o.safetensors"
    output = Output(path, check=False)
    result = extract(Checkpoint(base), Checkpoint(copy), output, Cut(rank=4))
    assert set(result.losses) == {("unet", "conv_in")}
    assert any("conv_norm_out.bias" in n for n in result.notes if n.startswith("1 parameters ch"))


def test_buffers_of_older_files_are_no_difference(
    tiny_sd1: Path, copy: Path, tmp_path: Path
) -> None:
    """A text encoder saved with `position_ids` and one without are of one architecture."""
    path = copy / "text_encoder/model.safetensors"
    ids = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    save_file(load_file(path) | ids, path, {"format": "pt"})
    base, tuned = Checkpoint(tiny_sd1), Checkpoint(copy)
    assert base.places.keys() == tuned.places.keys()
    edit(copy, "unet", "conv_in", lambda t: t.add_(values(*t.shape)))
    for number, pair in enumerate([(tiny_sd1, copy), (copy, tiny_sd1)]):
        output = out(tmp_path / f"{number}.safetensors", tiny_sd1)
        result = extract(*(Checkpoint(p) for p in pair), output, Cut(rank=4))
        assert set(result.losses) == {("unet", "conv_in")}


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ((), ("sd_v1", "epsilon", None)),
        (("v_pred",), ("sd_v1_v", "v", None)),
        (("v_pred", "ztsnr"), ("sd_v1_v", "v", "True")),
    ],
)
def test_keys_that_say_how_a_model_predicts(
    keys: tuple[str, ...], says: tuple[str | None, ...], tmp_path: Path
) -> None:
    """`v_pred` and `ztsnr`, keys without numbers by which ComfyUI knows a single file's objective:
    an extracted LoRA has them in its header's words, and baking keeps them."""
    marks = {key: torch.zeros(0) for key in keys}
    base = sd1_single(tmp_path / "base.safetensors")
    tuned = sd1_single(tmp_path / "tuned.safetensors", **{KEYS: values(320, 768, seed=8)}, **marks)
    output = Output(tmp_path / "o.safetensors", check=False)
    extract(Checkpoint(base), Checkpoint(tuned), output, Cut(rank=2))
    header = open_lora(output.path).header
    named = ("ss_base_model_version", "modelspec.prediction_type", "ss_zero_terminal_snr")
    assert tuple(header.get(key) for key in named) == says
    source, out = on_keys(tmp_path / "lora.safetensors"), tmp_path / "baked.safetensors"
    bake(Checkpoint(tuned), [source], [1.0], out, dtype="float16")
    assert {key for key in load_file(out) if "." not in key} == set(keys)


def test_extract_gives_the_same_bytes_each_time(tmp_path: Path) -> None:
    """Matrices large enough for the randomised search, with the global generator elsewhere: the
    two files are the same to the byte, and the generator is where it was."""
    base = Checkpoint(sd1_single(tmp_path / "base.safetensors"))
    change = {QUERIES: values(320, 320, seed=7), KEYS: values(320, 768, seed=8)}
    tuned = Checkpoint(sd1_single(tmp_path / "tuned.safetensors", **change))
    for seed in (1, 2):
        path = tmp_path / str(seed) / "o.safetensors"
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        extract(base, tuned, Output(path, check=False), Cut(rank=3))
        assert torch.equal(torch.get_rng_state(), state)
    assert len({(tmp_path / f"{seed}/o.safetensors").read_bytes() for seed in (1, 2)}) == 1


class Counted(Mapping[str, Tensor]):
    """A file's tensors, with a count of those that are alive at a time."""

    def __init__(self, file: TensorFile, alive: list[StorageWeakRef]) -> None:
        self.file, self.alive, self.header, self.spec = file, alive, file.header, file.spec
        self.total = self.most = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self.file, name)

    def __getitem__(self, key: str) -> Tensor:
        tensor = self.file[key].clone()
        before = [ref for ref in self.alive if not ref.expired()]
        self.alive[:] = [*before, StorageWeakRef(tensor.untyped_storage())]
        self.total += 1
        self.most = max(self.most, len(self.alive))
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.file)

    def __len__(self) -> int:
        return len(self.file)


def watched(base: Checkpoint) -> list[Counted]:
    """Puts counts around a checkpoint's files, all of one list."""
    alive: list[StorageWeakRef] = []
    base.files.update({name: Counted(file, alive) for name, file in base.files.items()})  # type: ignore[arg-type]
    return list(base.files.values())  # type: ignore[arg-type]


def test_models_are_read_one_tensor_at_a_time(
    tiny_sd1: Path, copy: Path, unet_lora: Path, tmp_path: Path
) -> None:
    """Of the hundreds of tensors of a model, baking holds at most 2 at a time, and extracting 2 of
    each of the two."""
    edit(copy, "unet", "conv_in", lambda t: t.add_(values(*t.shape)))
    base, tuned = Checkpoint(tiny_sd1), Checkpoint(copy)
    seen = watched(base)
    bake(base, [unet_lora], [1.0], tmp_path / "baked")
    assert sum(file.total for file in seen) >= len(base.places)
    assert max(file.most for file in seen) <= 2
    both = [*watched(base), *watched(tuned)]
    extract(base, tuned, out(tmp_path / "o.safetensors", tiny_sd1), Cut(rank=4))
    assert max(file.most for file in both) <= 2
