"""Every method through the whole run: configuration, training, resuming, verified files."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

import sd_lora
from sd_lora.adapters.deltas import METHODS
from sd_lora.adapters.inject import adapted_layers
from sd_lora.config import rows as config_module
from sd_lora.config.command_line import parse
from sd_lora.errors import UsageError
from sd_lora.formats import verify
from sd_lora.formats.canonical import read_models
from sd_lora.models.load import load_parts
from sd_lora.training.checkpoint_folders import write_manifest
from sd_lora.training.optimizers import build_optimizer, current_rates, grouped
from sd_lora.training.setup import prepare
from tests.training.runs import images, text_to_image

LYCORIS = ["mine_lycoris.safetensors"]
COMFYUI = "mine_comfyui.safetensors"
BOTH = ["mine_kohya.safetensors", "pytorch_lora_weights.safetensors"]
RUNS: dict[str, tuple[dict, list[str]]] = {
    "lora": ({}, BOTH),
    "lora_fa, svd": ({"method": "lora_fa", "init_lora_weights": "svd"}, BOTH),
    "pissa, t-lora": ({"init_lora_weights": "pissa", "tlora_min_rank": 2}, BOTH),
    "tucker, rslora": ({"use_tucker": True, "use_rslora": True}, BOTH),
    "dora": ({"use_dora": True}, [COMFYUI, "pytorch_lora_weights.safetensors"]),
    "loha": ({"method": "loha", "use_tucker": True}, LYCORIS),
    "lokr": ({"method": "lokr", "lokr_factor": 4, "lokr_decompose_both": True}, LYCORIS),
    "lokr, decomposed": (
        {"method": "lokr", "lokr_full_matrix": True, "use_dora": True},
        [COMFYUI, *LYCORIS],
    ),
    "oft": ({"method": "oft", "targets": "all", "learning_rate": 1e-3}, LYCORIS),
    "oft, rescaled": (
        {"method": "oft", "oft_block_size": 8, "oft_rescaled": True, "train_bias": "lora_only"},
        LYCORIS,
    ),
    "full": ({"method": "full", "targets": "attention+.*norm.*"}, LYCORIS),
    "biases and norms": ({"train_bias": "all", "modules_to_save": "conv_norm_out"}, LYCORIS),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images(tmp_path_factory.mktemp("data") / "images")


def test_the_configuration_knows_every_method() -> None:
    """The flag's choices, which are spelled out so that parsing imports no torch, are ours."""
    assert set(config_module.METHODS) <= METHODS.keys()


@pytest.mark.parametrize("name", RUNS)
def test_every_method_trains_and_its_files_are_the_trained_function(
    name: str, tiny_sd1: Path, data: Path, tmp_path: Path
) -> None:
    """A run of each method ends with verified files in the formats that can hold it; loaded into a
    bare model by our reader they are the checkpoint's function; the loss of the first steps'
    batches is lower at the end than it was then."""
    options, expected = RUNS[name]
    out = tmp_path / "mine"
    result = sd_lora.train(
        text_to_image(
            tiny_sd1, data, out, max_train_steps=12, checkpointing_steps=12,
            train_text_encoder=True, **options,
        )
    )  # fmt: skip
    assert sorted(path.name for path in out.glob("*.safetensors")) == expected
    assert all(file.worst_error < 1e-5 for file in result.files)
    assert result.replayed < result.first_losses
    state = load_file(out / "checkpoint-12" / "adapter.safetensors")
    trained = load_parts(str(tiny_sd1))
    models = trained.models
    for component, model in models.items():
        own = {k.partition("/")[2]: t for k, t in state.items() if k.startswith(f"{component}/")}
        sd_lora.load_lora_state_dict(model, own)
    for file in (f for f in result.files if f.path.name != COMFYUI):  # by tests/formats
        bare = load_parts(str(tiny_sd1))
        loaded = bare.models
        sd_lora.load_adapter(loaded, file.path)
        count, worst, wrong = verify.compare(read_models(models), read_models(loaded))
        assert (wrong, count) == ([], file.modules)
        assert worst < 1e-6


def test_dora_loads_in_diffusers(tiny_sd1: Path, data: Path, tmp_path: Path) -> None:
    """The image of a DoRA run, UNet and text encoder, is that of diffusers with its file."""
    sd_lora.train(
        text_to_image(
            tiny_sd1, data, tmp_path / "mine", use_dora=True, train_text_encoder=True,
            learning_rate=1e-2,
        )
    )  # fmt: skip

    def image(*lora: Path) -> torch.Tensor:
        pipeline = StableDiffusionPipeline.from_pretrained(
            tiny_sd1, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
        pipeline.set_progress_bar_config(disable=True)
        for path in lora:
            pipeline.load_lora_weights(path)
        generator = torch.Generator().manual_seed(0)
        return pipeline(
            "a photo", num_inference_steps=2, generator=generator, output_type="latent"
        ).images

    parts = load_parts(str(tiny_sd1))
    models = {"unet": parts.unet, "text_encoder": parts.text_encoders["text_encoder"]}
    sd_lora.load_adapter(models, tmp_path / "mine")
    from tests.tiny import pipeline_of

    generator = torch.Generator().manual_seed(0)
    ours = pipeline_of(parts)
    ours.set_progress_bar_config(disable=True)
    want = ours("a photo", num_inference_steps=2, generator=generator, output_type="latent").images
    have = image(tmp_path / "mine")
    torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4)
    assert (image() - have).abs().max() > 1e-3


@pytest.mark.parametrize(
    "options",
    [
        {
            "neuron_dropout": 0.1,
            "rank_dropout": 0.2,
            "module_dropout": 0.2,
            "scale_weight_norms": 0.02,
            "loraplus_lr_ratio": 4.0,
            "lr_pattern": {"down_blocks.*": 0.5},
            "train_bias": "lora_only",
        },
        {"method": "lokr", "rank_dropout": 0.2, "module_dropout": 0.2, "use_dora": True, "rank": 2},
        {"init_lora_weights": "pissa", "lora_dropout": 0.1},
        {"method": "oft", "oft_rescaled": True, "lora_dropout": 0.1, "module_dropout": 0.2},
    ],
    ids=["lora", "lokr", "pissa", "oft"],
)
def test_resuming_is_exact_with_every_option(
    options: dict, tiny_sd1: Path, data: Path, tmp_path: Path
) -> None:
    """Four steps equal two, a stop and two more, to the last bit, with all dropouts, max-norm,
    LoRA+ and learning rates by block: each draw is a function of seed and step."""
    options |= {"max_train_steps": 4, "checkpointing_steps": 2, "train_text_encoder": True}
    sd_lora.train(text_to_image(tiny_sd1, data, tmp_path, **options))
    final = tmp_path / "checkpoint-4" / "adapter.safetensors"
    whole = load_file(final)
    more = {"resume_from_checkpoint": "checkpoint-2"}
    sd_lora.train(text_to_image(tiny_sd1, data, tmp_path, **options, **more))
    resumed = load_file(final)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_parameter_groups(tiny_sd1: Path, data: Path, tmp_path: Path) -> None:
    """Rates and decays by component, block and factor: each parameter is in exactly one group, at
    learning rate × block factor × LoRA+ ratio, and its decay × factor; patterns count over both
    components; the groups' rates are logged by names that tell them apart."""
    config = text_to_image(
        tiny_sd1, data, tmp_path, learning_rate=1e-4, text_encoder_lr=1e-5, loraplus_lr_ratio=16.0,
        lr_pattern={"down_blocks.0.*": 0.5, r"layers\.1\..*": 2.0}, train_text_encoder=True,
        train_bias="lora_only", weight_decay_pattern={"to_q": 0.0, "to_k": 3.0},
        adam_weight_decay=0.1,
    )  # fmt: skip
    run = prepare(config)
    optimizer = build_optimizer(run.models, run.config, 4)
    rates: dict[int, float] = {}
    decays: dict[int, float] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert id(parameter) not in rates
            rates[id(parameter)], decays[id(parameter)] = group["lr"], group["weight_decay"]
    logged = current_rates(optimizer)
    assert list(logged.values()) == [group["lr"] for group in optimizer.param_groups]
    assert logged["unet ×8, decay ×0"] == pytest.approx(8e-4)
    assert rates.keys() == {id(p) for m in run.models.values() for p in sd_lora.lora_layers(m)}
    for component, base in (("unet", 1e-4), ("text_encoder", 1e-5)):
        for name, delta in sd_lora.deltas_of(run.models[component]).items():
            factor = 0.5 if name.startswith("down_blocks.0.") else 2.0 if "layers.1." in name else 1
            for kind, parameter in delta.named_parameters():
                ratio = 16 if kind == "lora_B" else 1
                decay = 0.0 if name.endswith("to_q") else 0.3 if name.endswith("to_k") else 0.1
                assert decays[id(parameter)] == pytest.approx(decay)
                assert rates[id(parameter)] == pytest.approx(base * factor * ratio)
    for name in ("lr_pattern", "weight_decay_pattern"):
        wrong = run.config.replace(**{name: {"nothing_here": 2.0}})
        with pytest.raises(UsageError, match=f"{name} 'nothing_here' matches none"):
            grouped(run.models, wrong)


def test_weight_norms_are_held(tiny_sd1: Path, data: Path, tmp_path: Path) -> None:
    """With scale_weight_norms no ΔW ends above the bound, and some end on it."""
    bound = 0.01
    sd_lora.train(
        text_to_image(
            tiny_sd1, data, tmp_path, scale_weight_norms=bound, learning_rate=1e-2,
            checkpointing_steps=6,
        )
    )  # fmt: skip
    bare = load_parts(str(tiny_sd1))
    sd_lora.load_adapter({"unet": bare.unet}, tmp_path)
    norms = torch.stack([delta.norm() for delta in sd_lora.deltas_of(bare.unet).values()])
    assert norms.max() <= bound * (1 + 1e-5)
    assert (norms > bound * (1 - 1e-5)).sum() > 10


def test_8bit_adam_trains(tiny_sd1: Path, data: Path, tmp_path: Path) -> None:
    """bitsandbytes' AdamW8bit runs on a CPU too, and the files are verified."""
    pytest.importorskip("bitsandbytes")
    result = sd_lora.train(
        text_to_image(tiny_sd1, data, tmp_path, optimizer="adamw8bit", max_train_steps=12)
    )
    assert result.replayed < result.first_losses


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "lokar"], "not 'lokar'. Did you mean lokr"),
        (["--method", "full", "--rank", "8"], "rank has no effect with method full"),
        (["--method", "full", "--conv_rank", "8"], "conv_rank has no effect with method full"),
        (["--method", "lokr", "--lokr_factor", "0"], "lokr_factor must be at least 1"),
        (
            ["--method", "lokr", "--lokr_full_matrix", "--lokr_decompose_both"],
            "lokr_decompose_both has no effect",
        ),
        (["--method", "oft", "--rank", "8"], "rank has no effect with method oft"),
        (["--method", "oft", "--oft_block_size", "1"], "oft_block_size must be at least 2"),
        (["--method", "oft", "--use_dora"], "use_dora has no effect with method oft"),
        (["--method", "oft", "--scale_weight_norms", "1"], "scale_weight_norms has no effect with"),
        (
            ["--method", "oft", "--rank_dropout", "0.1"],
            "rank_dropout has no effect with method oft",
        ),
        (["--oft_rescaled"], "oft_rescaled has no effect without method oft"),
        (["--lr_pattern", "to_q=inf"], "lr_pattern 'to_q' must be above 0"),
        (["--method", "loha", "--init_lora_weights", "pissa"], "init_lora_weights has no effect"),
        (["--method", "full", "--use_tucker"], "use_tucker has no effect with method full"),
        (["--use_dora", "--neuron_dropout", "0.1"], "neuron_dropout has no effect with --use_dora"),
        (["--lokr_factor", "4"], "lokr_factor has no effect without method lokr"),
        (["--method", "lokr", "--loraplus_lr_ratio", "16"], "has no effect without method lora"),
        (["--module_dropout", "1"], "module_dropout must be at least 0 and below 1"),
        (["--scale_weight_norms", "0"], "scale_weight_norms must be above 0"),
        (["--lr_pattern", "to_q"], "is not pattern=number"),
        (["--train_bias", "some"], "not 'some'"),
        (["--init_lora_weights", "pissa", "--use_tucker"], "pissa excludes"),
    ],
)
def test_contradictions_are_told_before_anything_is_loaded(words: list[str], message: str) -> None:
    """What a method has no use for is an error that names it."""
    line = ["--pretrained_model_name_or_path", "m", "--train_data_dir", "d", *words]
    with pytest.raises(UsageError, match=message):
        parse(line, "train_text_to_image_lora.py")


def test_the_summary_says_what_the_files_are_for(
    tiny_sd1: Path, data: Path, tmp_path: Path
) -> None:
    """Before the first step the user knows the method, the size and who will read the file."""
    for options, words in (
        ({}, ("lora, rank 4, alpha 4", "for diffusers and for kohya", "")),
        (
            {"use_dora": True},
            ("with magnitudes (DoRA)", "for diffusers and for ComfyUI\n", "29 times"),
        ),
        ({"method": "loha"}, ("loha, rank 4", "for LyCORIS\n", "no form for this kind")),
        ({"method": "loha", "use_dora": True}, ("for LyCORIS and for ComfyUI\n",)),
        ({"train_bias": "all"}, ("A1111 passes over trained biases",)),
    ):
        run = prepare(text_to_image(tiny_sd1, data, tmp_path, **options))
        text = run.summary.text()
        assert all(word in text for word in words), text
        assert json.dumps(run.config.as_dict())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "lora_fa", "use_dora": True},
        {"method": "lora_fa", "use_tucker": True},
        {"init_lora_weights": "pissa"},
        {"method": "loha"},
        {"method": "lokr", "use_dora": True},
        {"train_bias": "all"},
    ],
)
def test_the_update_stays_float32_on_a_bf16_base(
    options: dict, tiny_sd1: Path, data: Path, tmp_path: Path
) -> None:
    """With mixed_precision bf16 the base is bfloat16, and every tensor of every update float32,
    trained or frozen: in the run, in the checkpoint; ΔW of a PiSSA start is zero to rounding."""
    config = text_to_image(
        tiny_sd1,
        data,
        tmp_path,
        mixed_precision="bf16",
        max_train_steps=2,
        checkpointing_steps=2,
        **options,
    )
    run = prepare(config)
    for layer in adapted_layers(run.models["unet"]).values():
        assert all(p.dtype == torch.bfloat16 for p in layer.base.parameters())
        for delta in layer.deltas_by_path().values():
            assert all(t.dtype == torch.float32 for t in delta.tensors().values())
            assert delta.weight().norm() < 1e-5
    result = sd_lora.train(config)
    assert all(file.worst_error < 1e-5 for file in result.files)
    state = load_file(tmp_path / "checkpoint-2" / "adapter.safetensors")
    assert {t.dtype for k, t in state.items() if not k.endswith(".alpha")} == {torch.float32}


def test_the_logged_rate_is_the_one_given(tiny_sd1: Path, data: Path, tmp_path: Path) -> None:
    """With factors by block and LoRA+ the log shows the rate of a module without a factor."""
    sd_lora.train(
        text_to_image(
            tiny_sd1, data, tmp_path, lr_pattern={".*": 0.5}, loraplus_lr_ratio=3.0,
            learning_rate=1e-3, max_train_steps=2,
        )
    )  # fmt: skip
    rows = (tmp_path / "training_log.jsonl").read_text().splitlines()
    assert {json.loads(row)["lr"] for row in rows} == {1e-3}


def test_an_older_runs_checkpoint_had_the_defaults(
    tiny_sd1: Path, data: Path, tmp_path: Path
) -> None:
    """A checkpoint of a version that lacked a setting is not resumed with it."""
    newer = {"scale_weight_norms": 0.1, "lr_pattern": {".*": 0.5}, "rank_dropout": 0.5}
    sd_lora.train(text_to_image(tiny_sd1, data, tmp_path, max_train_steps=2, checkpointing_steps=1))
    path = tmp_path / "checkpoint-1" / "progress.json"
    progress = json.loads(path.read_text())
    for name in newer:
        del progress["settings"][name]
    path.write_text(json.dumps(progress))
    write_manifest(path.parent)
    for name, value in newer.items():
        again = text_to_image(
            tiny_sd1, data, tmp_path, max_train_steps=2, resume_from_checkpoint="checkpoint-1",
            **{name: value},
        )  # fmt: skip
        with pytest.raises(UsageError, match=name):
            sd_lora.train(again)


def test_tucker_without_a_kernel_is_refused(tiny_sd1: Path, data: Path, tmp_path: Path) -> None:
    """use_tucker on linears alone would do nothing, and says so; with convolutions it is welcome,
    also beside a text encoder."""
    with pytest.raises(UsageError, match="no target takes one here"):
        prepare(text_to_image(tiny_sd1, data, tmp_path, targets="attention", use_tucker=True))
    prepare(text_to_image(tiny_sd1, data, tmp_path, use_tucker=True, train_text_encoder=True))
