"""Whole configurations of other trainers: what is written trains, and every setting is answered."""

import json
import random
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dev.write_translate_page import PAGE, translations
from sd_lora.adapters.targets import match_names, plan, select
from sd_lora.cli import main
from sd_lora.config.command_line import parse
from sd_lora.config.schema import OPTIONS, TrainConfig
from sd_lora.config.translate.peers import PEERS
from sd_lora.config.translate.text import to_table, to_toml, toml_value
from sd_lora.config.translate.translation import Translation, translate
from sd_lora.errors import UsageError
from sd_lora.formats.names import naming_of
from sd_lora.models.families import family_named
from sd_lora.models.meta_pipeline import MetaPipeline
from tests.config.test_flags_page import _place

KOHYA = {"pretrained_model_name_or_path": "m.safetensors", "train_data_dir": "img"}
NAMES = ("girl.sh", "gui.json", "onetrainer.json", "job.yaml", "simpletuner.json", "dog.sh")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Translation]:
    """Name of a configuration of docs/translate.md → its translation."""
    return translations(PAGE.read_text(encoding="utf-8"), tmp_path_factory.mktemp("page"))


def kohya(**more: Any) -> Translation:
    return translate(PEERS["sd-scripts"], KOHYA | more)


def answer(translation: Translation, name: str) -> tuple[str, str]:
    """Kind and reason of a setting's answer."""
    (line,) = (line for line in translation.lines if line.name == name)
    return line.taken.kind, line.taken.reason


@pytest.mark.parametrize("name", NAMES)
def test_a_configuration_of_each_trainer_is_one_of_ours(
    name: str, page: dict[str, Translation], tmp_path: Path
) -> None:
    """The TOML of each configuration of the page is read by `--config` without a problem, with the
    options of the translation, and each setting of the file has an answer."""
    translation = page[name]
    assert translation.problems == []
    file = tmp_path / "my.toml"
    file.write_text(to_toml(translation, name), encoding="utf-8")
    config = parse(["--config", str(file)])
    for option, value in translation.values.items():
        assert getattr(config, option) == value, option
    table = to_table(translation)
    assert all(f"{line.name}" in table for line in translation.lines)


def test_a_usual_command_is_answered_in_one_attempt(tmp_path: Path) -> None:
    """The page's command of sd-scripts, 36 flags, given to `sd-lora train` itself: every flag
    that is not ours is told in the first error. A file of the same is known for another
    trainer's, in one line."""
    text = PAGE.read_text(encoding="utf-8").partition("# girl.sh\n")[2].partition("```")[0]
    words = shlex.split(text.replace("\\\n", " ").partition("sdxl_train_network.py")[2])
    names = [word[2:].partition("=")[0] for word in words if word.startswith("--")]
    foreign = {name for name in names if name not in OPTIONS}
    assert len(names) >= 34
    with pytest.raises(UsageError) as error:
        parse(words)
    told = {problem.field for problem in error.value.problems}
    assert foreign <= told
    assert "sd-lora translate, with the whole command after it" in str(error.value)
    file = tmp_path / "a.toml"
    lines = [f"{name} = 1" for name in foreign]
    file.write_text("\n".join(["[network_arguments]", *lines]))
    with pytest.raises(UsageError) as error:
        parse(["--config", str(file)])
    theirs = f"{len(foreign) + 1} of its settings are not of sd-lora. `sd-lora translate {file} "
    assert theirs in str(error.value).splitlines()[0]


def test_the_page_shows_the_translations(root: Path) -> None:
    """The answers in docs/translate.md are those of the configurations above them."""
    done = subprocess.run(
        [sys.executable, "dev/write_translate_page.py", "--check"], cwd=root, text=True,
        capture_output=True, env={"PYTHONPATH": str(root), "PATH": ""},
    )  # fmt: skip
    assert (done.stdout.strip(), done.returncode) == ("the same", 0)


def test_what_is_not_said_is_their_default() -> None:
    """A command of sd-scripts that names model and data alone: its defaults, by its parser, where
    ours are others."""
    assert kohya().values == {
        "pretrained_model_name_or_path": "m.safetensors", "train_data_dir": "img",
        "method": "lora", "targets": "transformer", "lora_alpha": 1.0, "train_text_encoder": True,
        "train_batch_size": 1, "mixed_precision": "no", "aspect_ratio_buckets": False,
        "center_crop": True, "max_train_steps": 1600, "learning_rate": 2e-6,
    }  # fmt: skip
    assert all(line.default for line in kohya().lines if line.name not in KOHYA)


@pytest.mark.parametrize(
    ("more", "values"),
    [
        ({"max_train_epochs": "5", "max_train_steps": "9"}, {"num_train_epochs": 5}),
        ({"learning_rate": "1e-4", "unet_lr": "2e-4"},
         {"learning_rate": 2e-4, "text_encoder_lr": 1e-4}),
        ({"learning_rate": "1e-4", "text_encoder_lr": "0"}, {"learning_rate": 1e-4}),
        ({"lr_scheduler": "cosine", "lr_warmup_steps": "0.05", "max_train_steps": "2000"},
         {"lr_warmup_steps": 0.05, "max_train_steps": 2000}),
        ({"resolution": "768,512"}, {"resolution": 624}),
        ({"clip_skip": 2}, {"clip_skip": 1}),
        ({"fp8_base": True}, {"base_precision": "fp8"}),
        ({"masked_loss": True, "conditioning_data_dir": "masks"}, {"mask_folder": "masks"}),
        ({"conditioning_data_dir": "masks"}, {}),
        ({"loss_type": "huber", "huber_c": "0.2", "huber_scale": 1}, {
            "loss_type": "huber", "huber_c": 0.2}),
        ({"multires_noise_iterations": 6, "multires_noise_discount": 0.3, "ip_noise_gamma": 0.1},
         {"multires_noise_iterations": 6, "input_perturbation": 0.1}),
        ({"reg_data_dir": "reg", "prior_loss_weight": "0.5"}, {
            "sources": [{"path": "img", "layout": "kohya"},
                        {"path": "reg", "layout": "kohya", "kind": "class"}],
            "prior_loss_weight": 0.5}),
        ({"network_args": ["conv_dim=8"], "network_dim": "16"},
         {"rank": 16, "conv_rank": 8, "conv_alpha": 1.0, "targets": "transformer+conv"}),
        ({"network_module": "lycoris.kohya", "network_args": "algo=lokr preset=attn-mlp factor=8"},
         {"method": "lokr", "targets": "transformer", "lokr_factor": 8}),
        ({"network_module": "lycoris.kohya", "network_dim": "5",
          "network_args": "algo=diag-oft rescaled=True constraint=0.01"},
         {"method": "oft", "targets": "all", "oft_block_size": 5, "oft_rescaled": True}),
        ({"network_module": "networks.oft", "network_dim": 8, "network_args": "enable_conv=True"},
         {"method": "oft", "targets": "attention+conv"}),
        ({"network_module": "lycoris.kohya", "network_args": ["algo=full"], "network_dim": 8},
         {"method": "full", "targets": "all"}),
        ({"optimizer_args": ["betas=0.9,0.99", "weight_decay=0.1", "eps=1e-6"]},
         {"adam_beta1": 0.9, "adam_beta2": 0.99, "adam_weight_decay": 0.1, "adam_epsilon": 1e-6}),
        ({"save_every_n_steps": "100", "save_last_n_steps_state": "300"},
         {"checkpointing_steps": 100, "checkpoints_total_limit": 3}),
    ],
)  # fmt: skip
def test_settings_that_mean_several_options(more: dict[str, Any], values: dict[str, Any]) -> None:
    """Settings of sd-scripts that are more, less or otherwise than one option, as docs/flags.md
    has them: the options that they are, and none of those that they go before."""
    found = kohya(**more).values
    assert found | values == found
    others = {"num_train_epochs": "max_train_steps", "sources": "train_data_dir"}
    assert all(gone not in found for name, gone in others.items() if name in values)
    assert ("text_encoder_lr" in found) == ("text_encoder_lr" in values)
    if values.get("method") in ("full", "oft"):  # alpha and rank mean nothing there
        assert not {"rank", "lora_alpha"} & found.keys()


@pytest.mark.parametrize("scaled", [None, False, True])
def test_onetrainers_oft(scaled: bool | None) -> None:
    """OneTrainer's OFT is method oft with its block size, 32 if not given, and without rank and
    alpha; its rate means the same where it is scaled by the block, and else the answer says how
    many times as far it turns there: 2√31."""
    settings: dict[str, Any] = {"peft_type": "OFT_2", "oft_block_share": True}
    settings |= {} if scaled is None else {"oft_scaled": scaled, "oft_block_size": 8}
    found = translate(PEERS["onetrainer"], settings)
    size = 32 if scaled is None else 8
    assert found.values["method"] == "oft"
    assert found.values["oft_block_size"] == size
    assert not {"rank", "lora_alpha"} & {*found.values}
    answers = {line.name: line.taken for line in found.lines}
    assert answers["oft_block_share"].kind == "absent"
    assert answers["peft_type"].reason == "turns the outputs of a layer here, its inputs there"
    said = answers.get("oft_scaled")
    if scaled:
        assert said is not None
        assert said.kind == "needless"
    elif scaled is False:
        assert said is not None
        assert "turns 5.29 times as far" in said.reason


@pytest.mark.parametrize(
    ("peer", "settings", "values"),
    [
        ("onetrainer", {"timestep_distribution": "LOGIT_NORMAL", "noising_bias": 0.5,
                        "noising_weight": -0.2, "timestep_shift": 3.0},
         {"timestep_sampling": "logit_normal", "logit_mean": 0.5, "logit_std": 0.8,
          "timestep_shift": 3.0}),
        ("onetrainer", {"timestep_distribution": "HEAVY_TAIL", "noising_weight": 1.0},
         {"timestep_sampling": "mode", "mode_scale": 1.0}),
        ("onetrainer", {"loss_weight_fn": "P2", "loss_weight_strength": 1}, {"p2_gamma": 1.0}),
        ("sd-scripts", {"debiased_estimation_loss": True}, {"debiased_estimation_loss": True}),
        ("onetrainer", {"loss_weight_fn": "DEBIASED_ESTIMATION"},
         {"debiased_estimation_loss": True}),
        ("onetrainer", {"mse_strength": 0, "mae_strength": 1}, {"loss_type": "l1"}),
        ("onetrainer", {"masked_training": True, "unmasked_weight": 0.2},
         {"mask_files": True, "unmasked_weight": 0.2}),
        ("onetrainer", {"k_noise_sampling": 4}, {"immiscible_noise": 4}),
        ("ai-toolkit", {"train.content_or_style": "style", "train.loss_type": "mae"},
         {"timestep_sampling": "cubic_reversed", "loss_type": "l1"}),
        ("ai-toolkit", {"trigger_word": "sks dog", "train.diff_output_preservation": True,
                        "train.diff_output_preservation_class": "dog",
                        "train.diff_output_preservation_multiplier": 0.5},
         {"output_preservation": "class", "preservation_class": "dog",
          "preservation_weight": 0.5, "preservation_sampler_steps": 0}),
        ("onetrainer", {"unet": {"weight_dtype": "NFLOAT_4"}}, {"base_precision": "nf4"}),
        ("ai-toolkit", {"model.quantize": True}, {"base_precision": "fp8"}),
        ("ai-toolkit", {"model.quantize": True, "model.qtype": "qint8"},
         {"base_precision": "int8"}),
        ("simpletuner", {"base_model_precision": "int8-quanto"}, {"base_precision": "int8"}),
        ("simpletuner", {"loss_type": "smooth_l1", "input_perturbation": 0.1},
         {"loss_type": "smooth_l1", "input_perturbation": 0.1}),
    ],
)  # fmt: skip
def test_objectives_of_each_trainer(
    peer: str, settings: dict[str, Any], values: dict[str, Any]
) -> None:
    """Timesteps, weights, losses, noise, preservation and the base's storage are the options that
    mean the same."""
    found = translate(PEERS[peer], settings).values
    assert found | values == found


def test_debiased_estimation_of_v_prediction_is_said_to_differ() -> None:
    """sd-scripts weights v otherwise than epsilon; the answer says both weights, and that SNR is
    cut there. OneTrainer's says so too."""
    table = to_table(translate(PEERS["sd-scripts"], {"debiased_estimation_loss": True}))
    assert "by √SNR / (SNR + 1); there 1 / (SNR + 1), up to SNR 1000" in table


def test_several_resolutions_and_masks_of_each_trainer(tmp_path: Path) -> None:
    """OneTrainer's list is all at once, ai-toolkit's and SimpleTuner's are each source's own, and
    the largest is the run's; masks are used where they are there."""
    one = translate(PEERS["onetrainer"], {"resolution": "512, 768", "masked_training": True})
    assert {k: one.values[k] for k in ("resolutions", "mask_files")} == {
        "resolutions": [512, 768], "mask_files": True,
    }  # fmt: skip
    rows = [{"folder_path": "a", "resolution": [512, 768], "mask_path": "m"},
            {"folder_path": "b", "resolution": 768}]  # fmt: skip
    ai = translate(PEERS["ai-toolkit"], {"datasets": rows, "model.name_or_path": "m"})
    assert ai.values["sources"] == [
        {"path": "a", "mask_folder": "m", "resolutions": [512, 768]}, {"path": "b"},
    ]  # fmt: skip
    assert ai.values["resolution"] == 768
    rows = [{"id": i, "type": "local", "instance_data_dir": f"d{i}", "resolution": i}
            for i in (512, 1024)]  # fmt: skip
    (tmp_path / "backends.json").write_text(json.dumps(rows))
    settings = {"data_backend_config": str(tmp_path / "backends.json"), "model_family": "sdxl"}
    simple = translate(PEERS["simpletuner"], settings)
    assert [table["resolutions"] for table in simple.values["sources"]] == [[512], [1024]]
    assert simple.values["resolution"] == 1024


@pytest.mark.parametrize(
    ("peer", "more", "optimizer", "rate"),
    [
        ("sd-scripts", {"optimizer_type": "Prodigy", "learning_rate": "0.8"}, "prodigy", 0.8),
        ("sd-scripts", {"optimizer_type": "DAdaptAdam", "unet_lr": "0.05"}, "dadaptadam", None),
        ("sd-scripts", {"optimizer_type": "DAdaptLion", "unet_lr": "0.05"}, None, None),
        ("sd-scripts", {"optimizer_type": "my.Class", "unet_lr": "0.5"}, "my.Class", 0.5),
        ("onetrainer", {"optimizer": {"optimizer": "PRODIGY"}, "learning_rate": 1.0}, "prodigy", 1),
        ("simpletuner", {"optimizer": "prodigy", "learning_rate": 1}, "prodigy", 1),
    ],
)
def test_the_factor_of_an_adaptive_optimiser_is_no_rate_of_adamw(
    peer: str, more: dict[str, Any], optimizer: str | None, rate: float | None
) -> None:
    """A learning rate near 1 is a factor of Prodigy and its like: taken with an optimiser that is
    here, in the range of factors, and never written for AdamW."""
    found = translate(PEERS[peer], more)
    assert found.values.get("optimizer") == optimizer
    assert found.values.get("learning_rate") == rate
    if rate is None:
        assert answer(found, "unet_lr")[0] == "absent"


def test_arguments_of_an_optimiser_are_translated() -> None:
    """sd-scripts' optimizer_args, and OneTrainer's and SimpleTuner's keys, become options where
    there are some and `optimizer_args` else, over defaults that are others there."""
    scripts = translate(PEERS["sd-scripts"], {"optimizer_type": "Prodigy", "optimizer_args":
        ["d_coef=2", "betas=0.9,0.99", "weight_decay=0.1", "decouple=True", "eps=1e-6"]}
    ).values  # fmt: skip
    own = {"safeguard_warmup": False, "use_bias_correction": False, "d_coef": 2, "decouple": True}
    assert scripts["optimizer_args"] == own
    numbers = [
        scripts[n] for n in ("adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon")
    ]
    assert numbers == [0.9, 0.99, 0.1, 1e-6]
    relative = kohya(optimizer_type="AdaFactor", learning_rate="1e-4", lr_scheduler="cosine")
    assert relative.values["optimizer_args"] == {"relative_step": True, "scale_parameter": True}
    assert not {"learning_rate", "lr_scheduler"} & relative.values.keys()
    assert answer(relative, "learning_rate")[0] == "absent"
    keys = {"optimizer": "CAME", "beta1": 0.8, "beta2": 0.99, "beta3": 0.999, "d_coef": 2.0}
    one = translate(PEERS["onetrainer"], {"optimizer": keys})
    assert one.values["optimizer_args"] == {"betas": [0.8, 0.99, 0.999]}
    assert answer(one, "optimizer.d_coef")[0] == "absent"
    simple = {"optimizer": "prodigy", "optimizer_config": "d_coef=2,weight_decay=0.1"}
    values = translate(PEERS["simpletuner"], simple).values
    assert (values["optimizer_args"], values["adam_weight_decay"]) == ({"d_coef": 2}, 0.1)


def test_an_option_without_effect_is_not_written() -> None:
    """A setting whose option would be refused without another one is left out, with the reason:
    keep_tokens without shuffling, clip_skip on SDXL, caption rules beside a dataset config."""
    found = kohya(keep_tokens="2", sdxl=True, clip_skip="2")
    assert not {"keep_tokens", "clip_skip"} & found.values.keys()
    kind, reason = answer(found, "keep_tokens")
    assert kind == "needless"
    assert reason == "has no effect without shuffle_caption or caption_tag_dropout"
    assert answer(found, "clip_skip")[0] == "needless"
    data = translate(PEERS["sd-scripts"], {
        "pretrained_model_name_or_path": "m", "dataset_config": "d.toml", "shuffle_caption": True,
    })  # fmt: skip
    belongs = ("absent", "belongs in [general] of the dataset's file")
    assert answer(data, "shuffle_caption") == belongs
    assert data.problems == []


def test_a_wrong_value_is_told_and_left_out() -> None:
    """Values that no option has are not there, with the reason; required ones are still to give."""
    found = translate(PEERS["sd-scripts"], {"train_data_dir": "img", "network_dim": "many",
                                            "noise_offset": "-1", "nettwork_alpha": 3})  # fmt: skip
    assert answer(found, "network_dim") == ("absent", "is a number there, not 'many'")
    assert answer(found, "noise_offset")[1] == "noise_offset must be at least 0, not -1.0"
    assert "Did you mean network_alpha?" in answer(found, "nettwork_alpha")[1]
    assert [problem.field for problem in found.problems] == ["pretrained_model_name_or_path"]
    assert "# still to give: pretrained_model_name_or_path" in to_toml(found, "x")


def test_secrets_are_not_shown() -> None:
    """Tokens and keys are named, and their values stay where they are."""
    secret = "hf_abcdefgh"
    found = kohya(huggingface_token=secret, wandb_api_key=secret)
    text = to_table(found) + to_toml(found, "x")
    assert "wandb_api_key" in text
    assert secret not in text


@pytest.mark.parametrize(
    ("peer", "values", "message"),
    [
        ("onetrainer", {"model_type": "FLUX_DEV_1"}, "model_type = FLUX_DEV_1 is not there"),
        ("onetrainer", {"training_method": "FINE_TUNE"}, "training_method = FINE_TUNE"),
        ("simpletuner", {"model_family": "flux"}, "model_family = flux"),
        ("simpletuner", {"model_type": "full"}, "model_type = full"),
        ("kohya_ss", {"LoRA_type": "Flux1"}, "LoRA_type = Flux1"),
        ("ai-toolkit", {"config": {"process": [
            {"type": "sd_trainer", "model": {"name_or_path": "F", "is_flux": True}}]}},
         "model.name_or_path = F"),
        ("ai-toolkit", {"config": {"process": [{"type": "extract"}]}}, "type = extract"),
    ],
)  # fmt: skip
def test_other_models_are_refused(peer: str, values: dict[str, Any], message: str) -> None:
    """A configuration for another model, or for another training than LoRA, is one error."""
    with pytest.raises(UsageError, match="LoRAs of Stable Diffusion 1, 2 and XL") as error:
        translate(PEERS[peer], values)
    assert str(error.value).startswith(message)


def test_a_text_encoder_alone() -> None:
    """OneTrainer's switches of SDXL's two encoders are one switch here, and a rank of 0 for the
    encoder that does not learn, as `rank_and_alpha_of` reads it."""
    base = {
        "model_type": "STABLE_DIFFUSION_XL_10_BASE",
        "lora_rank": 8,
        "concepts": [{"path": "d"}],
    }
    for first, second in ((True, True), (True, False), (False, True), (False, False)):
        switches = {"text_encoder": {"train": first}, "text_encoder_2": {"train": second}}
        found = translate(PEERS["onetrainer"], base | switches)
        assert found.values.get("train_text_encoder", False) == (first or second)
        if first or second:
            run = TrainConfig(**found.values).resolve("sdxl", 1024)
            ranks = [run.rank_and_alpha_of(c)[0] for c in ("text_encoder", "text_encoder_2")]
            assert ranks == [8 * first, 8 * second]


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("conv", [False, True])
def test_lists_by_block_give_each_module_the_same(family: str, conv: bool) -> None:
    """Random block_dims, block_alphas and lists of rates of sd-scripts: on the published UNet each
    module has the rank, alpha and factor of its place, and those of rank or rate 0 are left out."""
    unet, naming = MetaPipeline.of_family(family_named(family)).models["unet"], naming_of(family)
    draw = random.Random(f"{family}{conv}")
    count, sizes = (23, (9, 3, 9)) if family == "sdxl" else (25, (12, 1, 12))
    dims = [draw.choice([0, 4, 8, 16]) for _ in range(count)]
    alphas = [draw.choice([1, 4, 8]) for _ in range(count)]
    rates = [draw.choice([0, 0.5, 1, 1]) for _ in range(sum(sizes))]
    cuts = (0, sizes[0], sizes[0] + sizes[1], sum(sizes))
    words = {
        f"{part}_lr_weight": ",".join(map(str, rates[cuts[i] : cuts[i + 1]]))
        for i, part in enumerate(("down", "mid", "up"))
    }
    args = [f"{name}={value}" for name, value in words.items()]
    args += ["block_dims=" + ",".join(map(str, dims)), "block_alphas=" + ",".join(map(str, alphas))]
    found = kohya(network_args=args + ["conv_dim=4", "conv_alpha=1"] * conv, sdxl=family == "sdxl")
    assert all(answer(found, name)[0] == "otherwise" for name in words)
    config = TrainConfig(**found.values)
    theirs = {}
    for name in select(unet, "transformer+conv" if conv else "transformer"):
        place = _place(naming.kohya("unet", name))
        rate = rates[place - 1] if family == "sdxl" else rates[place]
        if dims[place] and rate:
            theirs[name] = (dims[place], alphas[place], rate)
    planned = plan(
        unet, config.targets, config.rank, config.lora_alpha, config.conv_rank, config.conv_alpha,
        rank_pattern=config.rank_pattern, alpha_pattern=config.alpha_pattern,
    )  # fmt: skip
    factors = match_names(config.lr_pattern, [t.name for t in planned], "lr_pattern")
    ours = {t.name: (t.rank, t.alpha, factors.get(t.name, 1)) for t in planned}
    if conv:  # kernels above 1×1 have ranks of their own there
        modules = dict(unet.named_modules())
        small = {n for n in theirs if getattr(modules[n], "kernel_size", (1, 1)) == (1, 1)}
        assert ours.keys() == theirs.keys()
        assert {n: ours[n] for n in small} == {n: theirs[n] for n in small}
    else:
        assert ours == theirs


@given(
    st.one_of(
        st.text(),
        st.floats(allow_nan=False, allow_infinity=False),
        st.booleans(),
        st.integers(-(2**60), 2**60),
        st.dictionaries(st.text(), st.floats(0, 1)),
    )
)
@settings(max_examples=60, deadline=None, database=None)
def test_a_value_survives_toml(value: Any) -> None:
    """Every value is read back from its TOML as it was."""
    assert tomllib.loads(f"x = {toml_value(value)}")["x"] == value


def test_the_command(
    page: dict[str, Translation], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`sd-lora translate FILE` prints TOML alone on the standard output and the answers beside it;
    with --out, before or behind the file, it writes the TOML, and never over a file."""
    script = tmp_path / "train.sh"
    script.write_text(
        "python train_network.py --pretrained_model_name_or_path m --train_data_dir d"
    )
    assert main(["translate", str(script)]) == 0
    printed = capsys.readouterr()
    assert tomllib.loads(printed.out)["model"]["pretrained_model_name_or_path"] == "m"
    assert printed.err.startswith("sd-scripts: 2 settings: 2 taken as is")
    out = tmp_path / "my.toml"
    assert main(["translate", "--out", str(out), "python", "train_network.py", "--seed=3"]) == 0
    assert "sd-lora train --config" in capsys.readouterr().out
    assert tomllib.loads(out.read_text())["run"]["seed"] == 3
    for words in ([f"--out={out}", str(script)], [str(script), "--out", str(out)]):
        assert main(["translate", *words]) == 2
        assert "is there already" in capsys.readouterr().err
    behind = [str(script), "--from", "sd-scripts", "--out", str(tmp_path / "behind.toml")]
    assert main(["translate", *behind]) == 0
    written = tomllib.loads((tmp_path / "behind.toml").read_text())
    assert written["data"]["train_data_dir"] == "d"


def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    """A translation loads neither torch nor diffusers nor transformers."""
    code = (
        "import sys; from sd_lora.cli import main; "
        "main(['translate', 'python', 'train_network.py', '--seed', '1']); "
        "print([m for m in ('torch', 'diffusers', 'transformers', 'yaml') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
