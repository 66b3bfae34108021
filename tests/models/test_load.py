"""Loading models, and captions → conditioning against diffusers' own pipeline."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sd_lora
from sd_lora.models.caption_encoder import encode_in_batches
from sd_lora.models.families import detect_family, detect_task, refuse_other_pipelines
from sd_lora.models.load import load_parts
from tests.tiny import pipeline_of


@pytest.mark.parametrize(("family", "name"), [("sd1", "sd1"), ("sd2", "sd2")])
def test_family_is_detected(family: str, name: str, request: pytest.FixtureRequest) -> None:
    """SD1 and SD2 are told apart by their UNets; prediction types come from the scheduler."""
    parts = load_parts(str(request.getfixturevalue(f"tiny_{family}")))
    assert parts.family.name == name
    assert parts.pixels_per_latent == 8
    kind = "v_prediction" if family == "sd2" else "epsilon"
    assert parts.scheduler.config.prediction_type == kind
    assert not any(p.requires_grad for p in parts.unet.parameters())


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_embeddings_equal_the_pipelines(family: str, request: pytest.FixtureRequest) -> None:
    """Our conditioning equals that of diffusers' pipeline for the same captions, bit for bit."""
    parts = load_parts(str(request.getfixturevalue(f"tiny_{family}")))
    captions = ["a photo of sks monster", "", "word " * 100, "a photo of sks monster"]
    table = dict(encode_in_batches(parts.caption_encoder(), parts.text_encoders, captions))
    assert len(table) == 3
    for caption, embedding in table.items():
        want, _ = pipeline_of(parts).encode_prompt(caption, "cpu", 1, False)
        assert torch.equal(embedding.hidden, want[0])
        assert embedding.pooled is None


def test_long_captions_are_counted(tiny_sd1: Path) -> None:
    """Captions beyond 75 tokens, and no others, are named with their length."""
    caption_encoder = load_parts(str(tiny_sd1)).caption_encoder()
    captions = ["short", "x" * 75, "x" * 76, "x" * 100]
    assert caption_encoder.too_long(captions) == {"x" * 76: 76, "x" * 100: 100}


def test_bare_pipeline_has_the_modules(tiny_sd1: Path) -> None:
    """The pipeline for verification has the real one's module names and shapes."""
    parts = load_parts(str(tiny_sd1))
    bare = parts.meta_pipeline.pipeline()
    for part in ("unet", "text_encoder"):
        want = {n: p.shape for n, p in parts.models[part].named_parameters()}
        assert {n: p.shape for n, p in getattr(bare, part).named_parameters()} == want


def test_missing_and_broken_folders(tiny_sd1: Path, tmp_path: Path) -> None:
    """Every way a model path can be wrong gives an error that names the thing and the remedy."""
    with pytest.raises(sd_lora.UsageError, match="does not exist"):
        load_parts(str(tmp_path / "nowhere"))
    with pytest.raises(sd_lora.UsageError, match=r"neither in the cache .* nor reachable"):
        load_parts("nobody/no-such-model")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "model.safetensors").write_bytes(b"")
    with pytest.raises(sd_lora.UsageError, match=r"no model_index.json.*give its own path"):
        load_parts(str(tmp_path / "folder"))
    with pytest.raises(sd_lora.UsageError, match="model.safetensors"):
        load_parts(str(tmp_path / "folder" / "model.safetensors"))
    copy = tmp_path / "copy"
    shutil.copytree(tiny_sd1, copy)
    (copy / "vae" / "config.json").unlink()
    with pytest.raises(sd_lora.UsageError, match="lacks vae/config.json"):
        load_parts(str(copy))


def test_a_truncated_weight_file_is_named(tiny_sd1: Path, tmp_path: Path) -> None:
    """A cut safetensors file is an error that names the part."""
    copy = tmp_path / "copy"
    shutil.copytree(tiny_sd1, copy)
    for part in ("unet", "text_encoder"):
        (weights,) = (copy / part).glob("*.safetensors")
        whole = weights.read_bytes()
        weights.write_bytes(whole[:1000])
        with pytest.raises(sd_lora.UsageError, match=f"the {part} of .* could not be loaded"):
            load_parts(str(copy))
        weights.write_bytes(whole)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_missing_weight_is_named(part: str, tiny_sd1: Path, tmp_path: Path) -> None:
    """Loaders use a random or empty weight where a file lacks one; ours names the part."""
    copy = tmp_path / "copy"
    shutil.copytree(tiny_sd1, copy)
    (weights,) = (copy / part).glob("*.safetensors")
    tensors = load_file(weights)
    del tensors[min(tensors)]
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(sd_lora.UsageError, match=f"the {part} of .* lacks 1 of its weights"):
        load_parts(str(copy))


def test_an_empty_tokenizer_is_refused(tiny_sd1: Path, tmp_path: Path) -> None:
    """transformers 5 builds a tokenizer of two tokens where its vocabulary is missing."""
    copy = tmp_path / "copy"
    shutil.copytree(tiny_sd1, copy)
    (copy / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(sd_lora.UsageError, match="lacks tokenizer/tokenizer.json"):
        load_parts(str(copy))
    (copy / "tokenizer" / "vocab.json").write_text("{}")
    (copy / "tokenizer" / "merges.txt").write_text("")
    with pytest.raises(sd_lora.UsageError, match="the tokenizer of"):
        load_parts(str(copy))


def test_a_tokenizer_without_a_length_takes_the_encoders(tiny_sd1: Path, tmp_path: Path) -> None:
    """A missing model_max_length (transformers then says 1e30) becomes the encoder's 77."""
    copy = tmp_path / "copy"
    shutil.copytree(tiny_sd1, copy)
    config = copy / "tokenizer" / "tokenizer_config.json"
    values = json.loads(config.read_text())
    del values["model_max_length"]
    config.write_text(json.dumps(values))
    assert load_parts(str(copy)).tokenizers["text_encoder"].model_max_length == 77


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("StableDiffusionInstructPix2PixPipeline", "InstructPix2Pix"),
        ("StableDiffusion3Pipeline", "Stable Diffusion 3"),
        ("FluxPipeline", "Flux"),
        ("SomethingElse", "SomethingElse"),
    ],
)
def test_other_pipelines_are_named(name: str, message: str, tiny_sd1: Path, tmp_path: Path) -> None:
    """Pipelines without training here are refused with the model's name."""
    with pytest.raises(sd_lora.UsageError, match=message):
        refuse_other_pipelines(name)
    copy = tmp_path / "copy"
    shutil.copytree(tiny_sd1, copy)
    (copy / "model_index.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(sd_lora.UsageError, match=message):
        load_parts(str(copy))


def test_other_unets_are_named() -> None:
    """Inputs of a UNet beside text and latents are recognised in its configuration."""
    with pytest.raises(sd_lora.UsageError, match="conditions of another kind.*text_image"):
        detect_family({"addition_embed_type": "text_image"})
    with pytest.raises(sd_lora.UsageError, match="conditions of another kind.*text_proj"):
        detect_family({"addition_embed_type": "text_time", "encoder_hid_dim_type": "text_proj"})
    assert detect_task({"in_channels": 9, "out_channels": 4}).name == "inpainting"
    with pytest.raises(sd_lora.UsageError, match="12 input and 4 output channels"):
        detect_task({"in_channels": 12, "out_channels": 4})


def test_a_cached_hub_id_loads_offline(tiny_sd1: Path, tmp_path: Path) -> None:
    """A hub id whose files are in the cache, in the hub's own layout, loads without a network, also
    by revision, and gives the folder's weights; another revision is an error."""
    home, commit = tmp_path / "cache" / "models--someone--small-sd", "a" * 40
    shutil.copytree(tiny_sd1, home / "snapshots" / commit)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    options = {"cache_dir": str(tmp_path / "cache")}
    want = load_parts(str(tiny_sd1)).unet.state_dict()
    for revision in (None, commit):
        found = load_parts("someone/small-sd", revision=revision, **options)
        assert all(torch.equal(t, want[k]) for k, t in found.unet.state_dict().items())
        assert list(found.tokenizers) == ["text_encoder"]
    with pytest.raises(
        sd_lora.UsageError, match=r"someone/small-sd .* in the cache .*cache nor reach"
    ):
        load_parts("someone/small-sd", revision="other", **options)


def test_a_variant_is_read(tiny_sd1: Path, tmp_path: Path) -> None:
    """--variant fp16 takes the files of that variant, in float32."""
    copy = tmp_path / "copy"
    shutil.copytree(tiny_sd1, copy)
    for part in ("unet", "vae", "text_encoder"):
        (weights,) = (copy / part).glob("*.safetensors")
        tensors = {key: tensor.half() for key, tensor in load_file(weights).items()}
        weights.unlink()
        name = weights.name.replace(".safetensors", ".fp16.safetensors")
        save_file(tensors, weights.with_name(name), {"format": "pt"})
    parts = load_parts(str(copy), variant="fp16")
    assert parts.unet.conv_in.weight.dtype == torch.float32
    want = load_parts(str(tiny_sd1)).unet.conv_in.weight
    assert torch.equal(parts.unet.conv_in.weight, want.half().float())


def test_a_home_folder_is_found(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """~ in a path, for example from a TOML file, is the user's own folder: for the base, its VAE
    and its tokenizer."""
    shutil.copytree(tiny_sd1, tmp_path / "model")
    monkeypatch.setenv("HOME", str(tmp_path))
    found = load_parts("~/model", vae="~/model/vae", tokenizer_name="~/model/tokenizer")
    want = load_parts(str(tiny_sd1)).unet.state_dict()
    assert all(torch.equal(t, want[k]) for k, t in found.unet.state_dict().items())
