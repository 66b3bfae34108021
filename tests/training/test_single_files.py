"""Training from single checkpoints in the original layout, offline, as from the same folder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, EDMEulerScheduler
from safetensors.torch import load_file, save_file

import sd_lora
from sd_lora.diffusion.schedule import NoiseSchedule
from sd_lora.models.load import find_base, load_parts
from sd_lora.training.setup import prepare
from tests.single import build_single_pipeline, write_single
from tests.training.runs import dreambooth, images, text_to_image

Folder = Callable[[str], Path]
# kind of single file → what the command line must say of it
SAID = {
    "sd2": {"prediction_type": "v_prediction"},
    "refiner": {},
    "sd1-inpainting": {},
    "sd1-small": {},
    "sdxl-small": {},
    "sdxl-ssd": {},
    "sdxl-vega": {},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images(tmp_path_factory.mktemp("data"), size=(96, 64))


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Kind → the same random pipeline as a folder and as a single file."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(kind: str) -> tuple[Path, Path]:
        if kind not in made:
            place = tmp_path_factory.mktemp("single")
            pipeline = build_single_pipeline(kind)
            for name in ("tokenizer_2", "tokenizer" if kind == "sd2" else ""):
                if getattr(pipeline, name, None):
                    getattr(pipeline, name).pad_token = "!"  # as OpenCLIP's
            pipeline.save_pretrained(place / kind)
            made[kind] = (place / kind, write_single(pipeline, place / f"{kind}.safetensors"))
        return made[kind]

    return make


def tokenizer(folder: Path) -> str:
    names = [folder / name for name in ("tokenizer", "tokenizer_2")]
    return str(next(name for name in names if name.is_dir()))


@pytest.mark.parametrize("kind", SAID)
def test_a_single_file_trains_as_its_folder(
    kind: str, both: Callable[[str], tuple[Path, Path]], data: Path, tmp_path: Path
) -> None:
    """A run from the single file, UNet and text encoders, attention and convolutions, has the
    losses and the LoRA of the run from the folder of the same weights, to the last bit; nothing is
    looked for in the hub. So, too, of small-sd, KOALA, SSD-1B and Segmind-Vega, whose UNets lack
    parts."""
    folder, file = both(kind)
    options = SAID[kind] | {"train_text_encoder": True, "max_train_steps": 3, "resolution": 64}
    results = {}
    for name, model in (("folder", folder), ("file", file)):
        words = {"tokenizer_name": tokenizer(folder)} if name == "file" else {}
        config = text_to_image(model, data, tmp_path / name, **options | words)
        results[name] = sd_lora.train(config)
    assert results["file"].losses == results["folder"].losses
    first, second = (load_file(results[name].files[0].path) for name in results)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_header_has_the_hash_of_the_whole_file(
    both: Callable[[str], tuple[Path, Path]],
) -> None:
    """The SHA-256 that model sites show of a checkpoint is in the LoRA's header."""
    import hashlib

    from sd_lora.formats.checkpoints import base_hash

    _, file = both("sd1")
    assert base_hash(str(file)) == hashlib.sha256(file.read_bytes()).hexdigest()


def test_what_a_single_file_does_not_say_is_asked_for(
    both: Callable[[str], tuple[Path, Path]], data: Path, tmp_path: Path
) -> None:
    """SD2's prediction type and the tokenizer are not in a file: both are named, and the remedy."""
    folder, file = both("sd2")
    config = text_to_image(file, data, tmp_path, resolution=64, tokenizer_name=tokenizer(folder))
    with pytest.raises(sd_lora.UsageError, match="does not say its prediction type.*v_prediction"):
        prepare(config)
    sides = {
        find_base(str(file), prediction_type=p).resolution for p in ("epsilon", "v_prediction")
    }
    assert sides == {512, 768}
    with pytest.raises(sd_lora.UsageError, match="holds no tokenizer: .* --tokenizer_name"):
        load_parts(str(both("sd1")[1]))


def test_marks_of_v_prediction_and_zero_snr_are_heeded(tmp_path: Path) -> None:
    """The keys that v-prediction finetunes of SDXL carry set the schedule."""
    pipeline = build_single_pipeline("sdxl")
    file = write_single(pipeline, tmp_path / "v.safetensors", marks=("v_pred", "ztsnr"))
    pipeline.tokenizer.save_pretrained(tmp_path / "tokenizer")
    scheduler = load_parts(str(file), tokenizer_name=str(tmp_path / "tokenizer")).scheduler
    assert scheduler.config.prediction_type == "v_prediction"
    assert scheduler.alphas_cumprod[-1] == 0


def test_cosxl_is_known_by_its_sigmas(tmp_path: Path) -> None:
    """A file in EDM's formulation with velocities, as CosXL, says its largest and smallest σ."""
    pipeline = build_single_pipeline("sdxl")
    file = write_single(pipeline, tmp_path / "plain.safetensors")
    ends = {"edm_vpred.sigma_max": torch.tensor(120.0), "edm_vpred.sigma_min": torch.tensor(0.002)}
    save_file(load_file(file) | ends, tmp_path / "cos.safetensors")
    pipeline.tokenizer.save_pretrained(tmp_path / "tokenizer")
    words = {"tokenizer_name": str(tmp_path / "tokenizer")}
    scheduler = load_parts(str(tmp_path / "cos.safetensors"), **words).scheduler
    assert isinstance(scheduler, EDMEulerScheduler)
    schedule = NoiseSchedule.of(scheduler)
    assert (schedule.prediction_type, schedule.data_std) == ("v_prediction", 1.0)
    sigmas = schedule.sigma / schedule.alpha
    torch.testing.assert_close(sigmas[[0, -1]], torch.tensor([0.002, 120.0]), rtol=2e-2, atol=0)


def test_the_refiners_absence_of_a_caption_is_the_empty_prompt(
    both: Callable[[str], tuple[Path, Path]],
) -> None:
    """A file has no pipeline index; the published refiner's says no zeros, and SDXL's zeros."""
    for kind, zeros in (("refiner", False), ("sdxl", True)):
        folder, file = both(kind)
        parts = load_parts(str(file), tokenizer_name=tokenizer(folder))
        assert parts.zero_unconditional == zeros


def test_weights_of_something_else_are_told(tiny: Folder, tmp_path: Path) -> None:
    """A UNet's file with a LoRA left in it is refused, where diffusers passes over it."""
    model = copied(tiny("sd1"), tmp_path / "model")
    (weights,) = (model / "unet").glob("*.safetensors")
    left = {"down_blocks.0.attn.to_q.lora_A.default.weight": torch.zeros(2, 2)}
    tensors = {key: tensor.clone() for key, tensor in load_file(weights).items()}
    save_file(tensors | left, weights, {"format": "pt"})
    with pytest.raises(sd_lora.UsageError, match=r"has 1 weights that a unet does not have"):
        load_parts(str(model))


def test_the_second_tokenizer_pads_as_openclip(both: Callable[[str], tuple[Path, Path]]) -> None:
    """From one vocabulary both tokenizers of SDXL are made: the second pads with the token of id 0
    and the first with the end token, as the published ones."""
    folder, file = both("sdxl")
    parts = load_parts(str(file), tokenizer_name=str(folder))  # its tokenizer/ is found
    first, second = parts.tokenizers.values()
    assert first.pad_token_id == first.eos_token_id
    assert second.pad_token_id == 0
    assert first.get_vocab() == second.get_vocab()


@pytest.mark.parametrize("form", ["folder", "pipeline", "file"])
def test_another_vae_is_used(form: str, tiny: Folder, data: Path, tmp_path: Path) -> None:
    """--pretrained_vae_model_name_or_path takes a VAE's folder, a pipeline's, and a single file;
    its weights and its scaling are those that encode."""
    torch.manual_seed(7)
    base = find_base(str(tiny("sd1")))
    vae = AutoencoderKL.from_config(dict(base.vae_config), scaling_factor=0.5)
    where = tmp_path / form
    if form == "folder":
        vae.save_pretrained(where)
    elif form == "pipeline":
        vae.save_pretrained(where / "vae")
        (where / "model_index.json").write_text("{}")
    else:
        where = tmp_path / "vae.safetensors"
        save_file(vae.state_dict(), where)
    parts = load_parts(str(tiny("sd1")), vae=str(where))
    want = vae.state_dict()
    assert all(torch.equal(t, want[k]) for k, t in parts.vae.state_dict().items())
    run = prepare(
        text_to_image(
            tiny("sd1"), data, tmp_path / "o", pretrained_vae_model_name_or_path=str(where)
        )
    )
    factor = 0.18215 if form == "file" else 0.5  # a VAE's file does not say it: the base's
    assert run.latents.scaling.factor.unique().item() == pytest.approx(factor)


def test_a_vae_of_other_latents_is_refused(tiny: Folder, tmp_path: Path) -> None:
    """A VAE with other latent channels than the UNet reads is named before anything is loaded."""
    config = dict(find_base(str(tiny("sd1"))).vae_config) | {"latent_channels": 16}
    AutoencoderKL.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(sd_lora.UsageError, match="has 16 latent channels, and the UNet .* reads 4"):
        find_base(str(tiny("sd1")), vae=str(tmp_path))


@pytest.mark.parametrize(
    ("part", "found", "message"),
    [
        ("text_encoder", ["transformers", "T5EncoderModel"], "names a T5EncoderModel as its text"),
        ("vae", ["diffusers", "AutoencoderTiny"], "names a AutoencoderTiny as its vae"),
        ("unet", [None, None], "names nothing as its unet"),
    ],
)
def test_a_part_of_another_class_is_named(
    part: str, found: list, message: str, tiny: Folder, tmp_path: Path
) -> None:
    """A pipeline whose parts are of other classes than Stable Diffusion's is refused by name."""
    copy = tmp_path / "copy"
    shutil.copytree(tiny("sd1"), copy)
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {part: found}))
    with pytest.raises(sd_lora.UsageError, match=message):
        find_base(str(copy))


def test_an_id_that_is_not_cached_names_the_cache(data: Path, tmp_path: Path) -> None:
    """Offline, a hub id that is not in the cache is an error that says which cache was asked."""
    cache = tmp_path / "cache"
    config = dreambooth(Path("somebody/some-model"), data, tmp_path / "out", cache_dir=str(cache))
    with pytest.raises(sd_lora.UsageError, match=f"somebody/some-model .* in the cache {cache}"):
        prepare(config)


def test_a_truncated_file_is_told_before_any_work(
    both: Callable[[str], tuple[Path, Path]], data: Path, tmp_path: Path
) -> None:
    """A checkpoint that is cut off says so, and no output folder is left."""
    whole = both("sd1")[1].read_bytes()
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(sd_lora.UsageError, match=r"cut\.safetensors cannot be read: .*cut off"):
        sd_lora.train(text_to_image(cut, data, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def copied(model: Path, place: Path) -> Path:
    shutil.copytree(model, place)
    return place


def changed(path: Path, **changes: object) -> None:
    """Changes a configuration; None takes a key out."""
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def test_weights_that_are_no_weights_are_told_without_a_traceback(
    tiny: Folder, tmp_path: Path
) -> None:
    """A pickle that is cut off or a pointer of git-lfs is named, without torch's advice to open it
    anyway."""
    model = copied(tiny("sd1"), tmp_path / "model")
    (model / "text_encoder" / "model.safetensors").unlink()
    broken = model / "text_encoder" / "pytorch_model.bin"
    for content in (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", b"\x80\x02}q"):
        broken.write_bytes(content)
        with pytest.raises(
            sd_lora.UsageError, match="the text_encoder of .* could not be loaded"
        ) as e:
            load_parts(str(model))
        assert "weights_only" not in str(e.value)


def test_what_a_configuration_leaves_out_is_the_classs_default(
    tiny: Folder, tmp_path: Path
) -> None:
    """A config.json without a key that diffusers fills in is read as diffusers reads it."""
    model = copied(tiny("sd1"), tmp_path / "model")
    changed(model / "unet" / "config.json", out_channels=None)
    assert find_base(str(model)).unet_config["out_channels"] == 4
    changed(model / "vae" / "config.json", latent_channels=None)
    assert find_base(str(model)).resolution == 64


@pytest.mark.parametrize(
    ("path", "changes", "message"),
    [
        ("vae/config.json", {"in_channels": 6, "out_channels": 6}, "is for images of 6 channels"),
        (
            "scheduler/scheduler_config.json",
            {"_class_name": "CMStochasticIterativeScheduler", "beta_start": None},
            "is a CMStochasticIterativeScheduler, which has no betas",
        ),
        ("model_index.json", {"_class_name": "StableDiffusionLDM3DPipeline"}, "this is LDM3D"),
        ("model_index.json", {"_class_name": "StableDiffusionGLIGENPipeline"}, "this is GLIGEN"),
        (
            "model_index.json",
            {"_class_name": "StableDiffusionNewPipeline"},
            "says 'StableDiffusionN",
        ),
    ],
)
def test_bases_of_other_kinds_are_told(
    path: str, changes: dict, message: str, tiny: Folder, tmp_path: Path
) -> None:
    """What looks like Stable Diffusion and is not is refused before anything is trained."""
    model = copied(tiny("sdxl"), tmp_path / "model")
    changed(model / path, **changes)
    with pytest.raises(sd_lora.UsageError, match=message):
        load_parts(str(model))


def as_variant(folder: Path) -> None:
    for weights in folder.glob("*/*.safetensors"):
        weights.rename(weights.with_name(weights.stem + ".fp16.safetensors"))


def test_variants_and_revisions_are_the_bases_alone(tiny: Folder, tmp_path: Path) -> None:
    """A folder of fp16 files alone says so; with --variant fp16 another VAE need not have it; for a
    single file both mean nothing."""
    model = copied(tiny("sd1"), tmp_path / "model")
    as_variant(model)
    with pytest.raises(sd_lora.UsageError, match="as variant fp16 alone: give --variant"):
        load_parts(str(model))
    parts = load_parts(str(model), variant="fp16", vae=str(tiny("sd1") / "vae"))
    assert parts.vae.config.latent_channels == 4
    with pytest.raises(sd_lora.UsageError, match="leave out --revision and --variant"):
        find_base(
            str(write_single(build_single_pipeline("sd1"), tmp_path / "a.safetensors")),
            variant="fp16",
        )


def test_a_checkpoint_without_a_vae_takes_one(
    both: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    """A file with the VAE pruned asks for another one before it reads anything, and takes a single
    file; one of 16 channels is refused in words."""
    folder, file = both("sd1")
    tensors = load_file(file)
    bare = tmp_path / "bare.safetensors"
    save_file({k: t for k, t in tensors.items() if not k.startswith("first_stage")}, bare)
    with pytest.raises(
        sd_lora.UsageError, match="has no VAE in it: give one with --pretrained_vae"
    ):
        find_base(str(bare))
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    vae.save_pretrained(tmp_path / "vae")
    parts = load_parts(
        str(bare), vae=str(tmp_path / "vae"), tokenizer_name=str(folder / "tokenizer")
    )
    want = vae.state_dict()
    assert all(torch.equal(t, want[k]) for k, t in parts.vae.state_dict().items())
    other = AutoencoderKL.from_config(dict(vae.config) | {"latent_channels": 16})
    save_file(other.state_dict(), tmp_path / "sixteen.safetensors")
    with pytest.raises(sd_lora.UsageError, match="has 16 latent channels"):
        find_base(str(bare), vae=str(tmp_path / "sixteen.safetensors"))
    with pytest.raises(sd_lora.UsageError, match="is not a VAE"):
        find_base(str(bare), vae=str(folder / "text_encoder" / "model.safetensors"))


def test_a_vae_of_another_scaling_is_noted(tiny: Folder, data: Path, tmp_path: Path) -> None:
    """SDXL's VAE on SD1 fits in every shape: the summary says that its scaling is another."""
    model = copied(tiny("sd1"), tmp_path / "model")
    changed(model / "vae" / "config.json", scaling_factor=0.13025)
    vae = {"pretrained_vae_model_name_or_path": str(model)}
    run = prepare(text_to_image(tiny("sd1"), data, tmp_path / "out", **vae))
    assert "scales its latents by 0.13025, the base's own by 0.18215" in run.summary.text()


def test_another_tokenizer_pads_for_each_encoder(tiny: Folder, tmp_path: Path) -> None:
    """--tokenizer_name with SDXL's own folder changes nothing, and with the first tokenizer's alone
    the second still pads with the token of id 0."""
    want = load_parts(str(tiny("sdxl")))
    for name in (tiny("sdxl"), tiny("sdxl") / "tokenizer"):
        found = load_parts(str(tiny("sdxl")), tokenizer_name=str(name))
        for component, tokenizer in want.tokenizers.items():
            ids = [
                t("a cat", padding="max_length").input_ids
                for t in (tokenizer, found.tokenizers[component])
            ]
            assert ids[0] == ids[1]
    openclip = build_single_pipeline("sd2").tokenizer
    openclip.pad_token = "!"
    openclip.save_pretrained(tmp_path / "sd2")
    clip = load_parts(str(tiny("sd1")), tokenizer_name=str(tmp_path / "sd2")).tokenizers
    assert clip["text_encoder"].pad_token_id == clip["text_encoder"].eos_token_id
    with pytest.raises(sd_lora.UsageError, match="it has no vocabulary"):
        load_parts(str(tiny("sdxl")), tokenizer_name=str(tiny("sdxl") / "vae"))
