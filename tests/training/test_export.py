"""What a run's files say of it, and the precision they are written in."""

import hashlib
import json
import shutil
import socket
from datetime import datetime
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import sd_lora
from sd_lora.formats.inspect import body_hash
from sd_lora.formats.metadata import shared_name
from sd_lora.training.export import shared_config
from tests.training.runs import dreambooth, images, text_to_image

# of a dreambooth run on six instance images and three class images
EXPECTED_HEADER = {
    "format": "pt",
    "modelspec.architecture": "stable-diffusion-v1/lora",
    "modelspec.implementation": "diffusers",
    "modelspec.prediction_type": "epsilon",
    "modelspec.resolution": "64x64",
    "modelspec.sai_model_spec": "1.0.0",
    "modelspec.title": "mine",
    "modelspec.trigger_phrase": "sks thing, red",
    "ss_base_model_version": "sd_v1",
    "ss_batch_size_per_device": "2",
    "ss_bucket_info": '{"buckets": {"0": {"resolution": [64, 64], "count": 6}}}',
    "ss_adaptive_noise_scale": "0.1",
    "ss_bucket_no_upscale": "True",
    "ss_caption_dropout_rate": "0.25",
    "ss_caption_tag_dropout_rate": "0.2",
    "ss_clip_skip": "2",
    "ss_debiased_estimation": "False",
    "ss_enable_bucket": "True",
    "ss_flip_aug": "True",
    "ss_gradient_accumulation_steps": "2",
    "ss_gradient_checkpointing": "True",
    "ss_huber_c": "0.1",
    "ss_huber_schedule": "snr",
    "ss_ip_noise_gamma": "0.2",
    "ss_keep_tokens": "1",
    "ss_learning_rate": "0.002",
    "ss_loss_type": "huber",
    "ss_lr_scheduler": "cosine",
    "ss_lr_warmup_steps": "1",
    "ss_max_grad_norm": "0.7",
    "ss_max_timestep": "900",
    "ss_max_token_length": "150",
    "ss_max_train_steps": "4",
    "ss_min_snr_gamma": "4.0",
    "ss_min_timestep": "10",
    "ss_mixed_precision": "no",
    "ss_multires_noise_discount": "0.3",
    "ss_multires_noise_iterations": "2",
    "ss_network_alpha": "4",
    "ss_network_args": '{"conv_dim": "2", "conv_alpha": "4"}',
    "ss_network_dim": "4",
    "ss_network_dropout": "0.1",
    "ss_network_module": "networks.lora",
    "ss_noise_offset": "0.05",
    "ss_num_epochs": "2",
    "ss_num_reg_images": "3",
    "ss_num_train_images": "6",
    "ss_optimizer": "torch.optim.adamw.AdamW",
    "ss_output_name": "mine",
    "ss_prior_loss_weight": "0.5",
    "ss_random_crop": "False",
    "ss_resolution": "(64, 64)",
    "ss_scale_weight_norms": "3.0",
    "ss_sd_model_name": "tiny-sd1",
    "ss_seed": "7",
    "ss_shuffle_caption": "True",
    "ss_steps": "4",
    "ss_tag_frequency": '{"instance": {"sks thing": 6, "red": 6}, "class": {"a thing": 3}}',
    "ss_text_encoder_lr": "0.0003",
    "ss_total_batch_size": "4",
    "ss_unet_lr": "0.002",
    "ss_v2": "False",
    "ss_vae_name": "None",
    "ss_zero_terminal_snr": "False",
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Six images; the captions have tags in common."""
    folder = images(tmp_path / "data")
    rows = [json.loads(r) for r in (folder / "metadata.jsonl").read_text().splitlines()]
    tagged = [row | {"text": f"{row['text']}, red,  sky"} for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, tagged)))
    return folder


def header(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_the_header_says_how_it_was_trained(tiny_sd1: Path, data: Path, tmp_path: Path) -> None:
    """kohya's and Stability's keys, the base's hash, the captions' tags and the resolved
    configuration are in every file; the hash is that of the tensors."""
    result = sd_lora.train(text_to_image(tiny_sd1, data, tmp_path / "mine", snr_gamma=5.0))
    for file in result.files:
        said = header(file.path)
        captions = [json.loads(r) for r in (data / "metadata.jsonl").read_text().splitlines()]
        assert said["ss_num_train_images"] == str(len(captions))
        assert said["ss_steps"] == str(len(result.losses))
        assert said["ss_min_snr_gamma"] == "5.0"
        assert said["ss_sd_model_name"] == tiny_sd1.name
        assert said["ss_base_model_version"] == "sd_v1"
        assert said["modelspec.architecture"] == "stable-diffusion-v1/lora"
        assert said["sshs_model_hash"] == body_hash(file.path)
        tags = json.loads(said["ss_tag_frequency"])["instance"]
        parts = [part.strip() for row in captions for part in row["text"].split(",")]
        assert tags == {part: parts.count(part) for part in parts}
        own = json.loads(said["sd_lora"])
        weights = tiny_sd1 / "unet" / "diffusion_pytorch_model.safetensors"
        assert own["base_model_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
        assert own["config"]["snr_gamma"] == 5.0
        assert own["versions"]["torch"] == torch.__version__
        assert own["family"] == "sd1"


def test_every_key_of_the_header(tiny_sd1: Path, data: Path, tmp_path: Path) -> None:
    """The header of both files, written out in full for a run whose options differ from their
    defaults: a key that is lost, renamed or filled from another option fails. The writer
    rescales the factors to one alpha in the file; the date, the hash of the file's tensors and
    our own record are proved by themselves."""
    classes = images(tmp_path / "classes", 3, (64, 96))
    options = {
        "instance_prompt": "sks thing, red",
        "with_prior_preservation": True,
        "class_data_dir": str(classes),
        "class_prompt": "a thing",
        "num_class_images": 3,
        "prior_loss_weight": 0.5,
        "gradient_accumulation_steps": 2,
        "max_train_steps": 4,
        "learning_rate": 2e-3,
        "train_text_encoder": True,
        "text_encoder_lr": 3e-4,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 1,
        "max_grad_norm": 0.7,
        "gradient_checkpointing": True,
        "neuron_dropout": 0.1,
        "snr_gamma": 4.0,
        "noise_offset": 0.05,
        "adaptive_noise_scale": 0.1,
        "multires_noise_iterations": 2,
        "input_perturbation": 0.2,
        "loss_type": "huber",
        "scale_weight_norms": 3.0,
        "bucket_no_upscale": True,
        "bucket_step": 32,
        "random_flip": True,
        "caption_dropout": 0.25,
        "shuffle_caption": True,
        "keep_tokens": 1,
        "caption_tag_dropout": 0.2,
        "clip_skip": 1,
        "max_token_length": 150,
        "min_timestep": 10,
        "max_timestep": 900,
        "seed": 7,
        "rank": 4,
        "lora_alpha": 2.0,
        "conv_rank": 2,
        "conv_alpha": 1.0,
    }
    result = sd_lora.train(dreambooth(tiny_sd1, data, tmp_path / "mine", **options))
    assert len(result.files) == 2
    for file in result.files:
        said = header(file.path)
        own = json.loads(said.pop("sd_lora"))
        assert datetime.fromisoformat(said.pop("modelspec.date"))
        assert said.pop("sshs_model_hash") == body_hash(file.path)
        shown = options | {"class_data_dir": "classes"}
        assert {key: own["config"][key] for key in options} == shown
        assert (own["images"], own["steps"]) == ({"instance": 6, "class": 3}, 4)
        assert said == EXPECTED_HEADER | {"sd_lora_version": sd_lora.__version__}


def test_equal_runs_give_equal_bytes_and_tell_of_no_machine(
    tiny_sd1: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two runs of one configuration into folders of one name at two places, with copies of the base
    and the images there and the date of SOURCE_DATE_EPOCH: their files are the same to the byte,
    and no path is in them; and so are their digests, of which the last line tells. With
    metadata_paths "full" the configuration is whole. Deterministic kernels are in use during a run
    that asks for them, and not afterwards. No file of the output folder holds a token or the host's
    name, and none but the configuration and the record of a checkpoint, which a resumed run needs,
    holds a path: trackers are on the web, and the page is passed on."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    monkeypatch.setenv("HF_TOKEN", "hf_ofAnn")
    monkeypatch.setattr(socket, "gethostname", lambda: "host-of-ann")
    found = []
    for home in (tmp_path / "here", tmp_path / "there/deeper"):
        base = shutil.copytree(tiny_sd1, home / "tiny")
        sources = [{"path": str(shutil.copytree(data, home / "cats")), "caption_dropout": 0.5}]
        config = sd_lora.TrainConfig(
            pretrained_model_name_or_path=str(base), output_dir=str(home / "mine"), rank=1,
            sources=sources, max_train_steps=1, seed=3, data_cache_dir=str(home / "cache"),
            pretrained_vae_model_name_or_path=str(base / "vae"), num_validation_images=0,
            report_to="tensorboard", resolution=32, deterministic=True,
        )  # fmt: skip
        kernels: list[bool] = []
        listeners = [lambda _, k=kernels: k.append(torch.are_deterministic_algorithms_enabled())]
        result = sd_lora.train(config, [*listeners, sd_lora.Terminal()])
        assert {*kernels} == {True}
        assert not torch.are_deterministic_algorithms_enabled()
        found.append([*(file.path for file in result.files), home / "mine" / "digest.json"])
        assert capsys.readouterr().out.endswith(f"  {result.digest.text}\n")
        for path in (path for path in (home / "mine").rglob("*") if path.is_file()):
            assert not any(word in path.read_bytes() for word in (b"hf_ofAnn", b"host-of-ann"))
            if path.name not in ("config.json", "progress.json"):
                assert str(tmp_path).encode() not in path.read_bytes(), path
    for here, there in zip(*found, strict=True):
        assert here.read_bytes() == there.read_bytes()
        if here.suffix == ".json":
            continue
        said = header(here)
        assert not [p for p in (tmp_path, Path.home(), Path.cwd()) if str(p) in json.dumps(said)]
        assert said["modelspec.date"] == "2023-11-14T22:13:20"
        assert said["ss_vae_name"] == "vae"
        own = json.loads(said["sd_lora"])
        assert (own["base_model"], own["config"]["sources"][0]["path"]) == ("tiny", "cats")
    whole = config.replace(metadata_paths="full").resolve("sd1", 32)
    assert shared_config(whole) == whole.as_dict()


def test_a_wrong_date_is_told_before_the_work(
    tiny_sd1: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A SOURCE_DATE_EPOCH that is no number is refused by its name, with no file left."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    with pytest.raises(sd_lora.UsageError, match="SOURCE_DATE_EPOCH is 'yesterday'"):
        sd_lora.train(text_to_image(tiny_sd1, data, tmp_path / "mine"))
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("/home/ann/models/sd15", "sd15"),
        ("C:\\Users\\ann\\sd15.safetensors", "sd15.safetensors"),
        ("~/models/sd15/", "sd15"),
        ("../sd15", "sd15"),
        ("models/ann/sd15", "sd15"),
        ("https://host.example/ann/sd15.ckpt", "sd15.ckpt"),
        ("stabilityai/sdxl-turbo", "stabilityai/sdxl-turbo"),
        ("sd15", "sd15"),
    ],
)
def test_names_without_places(place: str, name: str) -> None:
    """Of a path on either system only the last part is left; a hub id is whole."""
    assert shared_name(place) == name


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)]
)
def test_files_of_half_precision(
    precision: str, dtype: torch.dtype, tiny_sd1: Path, data: Path, tmp_path: Path
) -> None:
    """`save_precision` halves both files, which load as trained within its rounding; checkpoints
    stay float32."""
    config = dreambooth(
        tiny_sd1, data, tmp_path / "mine", save_precision=precision, checkpointing_steps=2,
        max_train_steps=2,
    )  # fmt: skip
    result = sd_lora.train(config)
    for file in result.files:
        assert {t.dtype for t in load_file(file.path).values()} == {dtype}
        assert 0 < file.worst_error < 2e-2
        assert header(file.path)["modelspec.trigger_phrase"] == config.instance_prompt
    state = load_file(tmp_path / "mine" / "checkpoint-2" / "adapter.safetensors")
    assert torch.float32 in {t.dtype for t in state.values()}
