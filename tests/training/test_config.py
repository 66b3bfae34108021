"""Command lines and TOML files → configuration: diffusers' flags carry over, mistakes are named."""

import dataclasses
from pathlib import Path

import pytest

from sd_lora.errors import UsageError
from sd_lora.training.arguments import (
    ACCEPTED_WITHOUT_EFFECT,
    REFUSED,
    _expanded,
    build_parser,
    parse,
    read_toml,
)
from sd_lora.training.config import FIELDS, Mode, TrainConfig

# name → (default in train_text_to_image_lora.py, default in train_dreambooth_lora.py) of diffusers
# 0.42.1; "-" where the script lacks the flag. None here and a value there are the same thing where
# our help says what None means.
THEIRS: dict[str, tuple[object, object]] = {
    "pretrained_model_name_or_path": (None, None), "revision": (None, None),
    "variant": (None, None), "seed": (None, None), "max_train_steps": (None, None),
    "checkpoints_total_limit": (None, None), "resume_from_checkpoint": (None, None),
    "validation_prompt": (None, None), "mixed_precision": (None, None),
    "center_crop": (False, False), "gradient_checkpointing": (False, False),
    "scale_lr": (False, False), "use_8bit_adam": (False, False), "allow_tf32": (False, False),
    "num_validation_images": (4, 4), "validation_epochs": (1, 50),
    "output_dir": ("sd-model-finetuned-lora", "lora-dreambooth-model"),
    "resolution": (512, 512), "train_batch_size": (16, 4), "num_train_epochs": (100, 1),
    "checkpointing_steps": (500, 500), "gradient_accumulation_steps": (1, 1),
    "learning_rate": (1e-4, 5e-4), "lr_scheduler": ("constant", "constant"),
    "lr_warmup_steps": (500, 500), "dataloader_num_workers": (0, 0), "adam_beta1": (0.9, 0.9),
    "adam_beta2": (0.999, 0.999), "adam_epsilon": (1e-8, 1e-8), "max_grad_norm": (1.0, 1.0),
    "adam_weight_decay": (1e-2, 1e-2), "logging_dir": ("logs", "logs"), "local_rank": (-1, -1),
    "rank": (4, 4), "image_interpolation_mode": ("lanczos", "lanczos"),
    "dataset_name": (None, "-"), "dataset_config_name": (None, "-"), "cache_dir": (None, "-"),
    "train_data_dir": (None, "-"), "max_train_samples": (None, "-"), "image_column": ("image", "-"),
    "caption_column": ("text", "-"), "random_flip": (False, "-"), "snr_gamma": (None, "-"),
    "noise_offset": (0, "-"), "prediction_type": (None, "-"), "train_text_encoder": ("-", False),
    "instance_data_dir": ("-", None), "instance_prompt": ("-", None), "class_data_dir": ("-", None),
    "class_prompt": ("-", None), "with_prior_preservation": ("-", False),
    "prior_loss_weight": ("-", 1.0), "num_class_images": ("-", 100), "sample_batch_size": ("-", 4),
    "prior_generation_precision": ("-", None), "lr_num_cycles": ("-", 1), "lr_power": ("-", 1.0),
    "lora_dropout": ("-", 0.0), "tokenizer_name": ("-", None),
}  # fmt: skip
ALSO_THEIRS = (
    "push_to_hub hub_token hub_model_id enable_xformers_memory_efficient_attention report_to "
    "tokenizer_max_length class_labels_conditioning validation_images pre_compute_text_embeddings "
    "text_encoder_use_attention_mask text_encoder_lr adam_weight_decay_text_encoder repeats "
    "optimizer prodigy_beta3 prodigy_decouple prodigy_use_bias_correction "
    "prodigy_safeguard_warmup use_dora output_kohya_format do_edm_style_training "
    "pretrained_vae_model_name_or_path enable_npu_flash_attention debug_loss"
).split()

T2I = ["--pretrained_model_name_or_path", "m", "--train_data_dir", "d"]
DB = ["--pretrained_model_name_or_path", "m", "--instance_data_dir", "d", "--instance_prompt", "p"]


def test_every_flag_of_the_scripts_is_taken_or_refused_by_name() -> None:
    """All 84 flags of the four diffusers scripts are a field of ours, accepted, or refused with a
    reason; none is unknown."""
    names = [*THEIRS, *ALSO_THEIRS]
    assert len(set(names)) == len(names) == 84
    known = FIELDS.keys() | REFUSED.keys() | ACCEPTED_WITHOUT_EFFECT.keys()
    assert set(names) <= known
    for name, reason in REFUSED.items():
        with pytest.raises(UsageError) as error:
            parse([*T2I, f"--{name}", "x"], "text_to_image")
        assert str(error.value) == f"--{name} {reason}"


@pytest.mark.parametrize(("mode", "words"), [("text_to_image", T2I), ("dreambooth", DB)])
def test_defaults_are_those_of_each_script(mode: str, words: list[str]) -> None:
    """Each mode's defaults equal its script's."""
    config = parse(words, mode)
    column = 0 if mode == "text_to_image" else 1
    given = {w.removeprefix("--") for w in words}
    for name, defaults in THEIRS.items():
        if defaults[column] != "-" and name not in given:
            assert getattr(config, name) == defaults[column], name


def test_a_command_line_of_the_scripts_carries_over() -> None:
    """A documented diffusers command, unique prefixes included, parses to what it says."""
    config = parse(
        [
            "--pretrained_model_name_or_path=m", "--train_data_dir", "d", "--caption_column=text",
            "--resolution=512", "--random_flip", "--train_batch=1", "--gradient_accumulation", "4",
            "--max_train_steps=15000", "--learning_rate=1e-04", "--max_grad_norm=1",
            "--lr_scheduler=cosine", "--lr_warmup_steps=0", "--seed=1337", "--rank=16",
            "--rank_pattern", "mid_block.*=8", "to_q=2", "--alpha_pattern", "to_q=0.5",
        ],
        "text_to_image",
    )  # fmt: skip
    assert (config.train_batch_size, config.gradient_accumulation_steps) == (1, 4)
    assert config.random_flip
    assert config.rank_pattern == {"mid_block.*": 8, "to_q": 2}
    assert config.alpha_pattern == {"to_q": 0.5}


ALSO_IN_BOTH = "push_to_hub hub_token hub_model_id report_to".split() + [
    "enable_xformers_memory_efficient_attention"
]
ALSO_IN_DREAMBOOTH = (
    "tokenizer_max_length class_labels_conditioning validation_images pre_compute_text_embeddings "
    "text_encoder_use_attention_mask"
).split()


@pytest.mark.parametrize("mode", ["text_to_image", "dreambooth"])
def test_every_unique_prefix_of_the_scripts_carries_over(mode: Mode) -> None:
    """Every unique prefix of each flag of a script still means that flag, whatever flags this
    project has added."""
    column = 0 if mode == "text_to_image" else 1
    taken = [name for name, defaults in THEIRS.items() if defaults[column] != "-"]
    refused = ALSO_IN_BOTH + (ALSO_IN_DREAMBOOTH if mode == "dreambooth" else [])
    checked = 0
    for name in taken:
        others = [n for n in (*taken, *refused) if n != name]
        for prefix in (name[:n] for n in range(1, len(name))):
            if not any(other.startswith(prefix) for other in others):
                assert _expanded(f"--{prefix}", mode) == f"--{name}"
                assert _expanded(f"--{prefix}=3", mode) == f"--{name}=3"
                checked += 1
    assert checked > 200
    line = ["--pretrained_model", "m", "--max_train", "2"]
    if mode == "dreambooth":
        config = parse([*line, "--instance_d", "d", "--instance_p", "p", "--lora", "0.5"], mode)
        assert (config.max_train_steps, config.lora_dropout) == (2, 0.5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rnak", "3"], "unknown flag --rnak. Did you mean --rank?"),
        (["surplus"], "'surplus' is not expected here"),
        (["--rank", "0"], "rank must be at least 1, not 0"),
        (["--rank", "four"], "invalid int value: 'four'"),
        (["--max_train_steps", "0"], "max_train_steps must be at least 1"),
        (["--learning_rate", "0"], "learning_rate must be above 0"),
        (["--mixed_precision", "fp8"], "invalid choice: 'fp8'"),
        (["--lr_scheduler", "cosin"], "invalid choice: 'cosin'"),
        (["--dataset_name", "x"], "give one of train_data_dir and dataset_name, not both"),
        (["--class_pr", "x"], "class_prompt means something in dreambooth runs only"),
        (["--text_encoder_lr", "1e-5"], "text_encoder_lr needs train_text_encoder"),
        (["--lora_dropout", "1.0"], "lora_dropout must be at least 0 and below 1"),
        (["--rank_pattern", "to_q"], "'to_q' is not pattern=number"),
        (["--config", "nowhere.toml"], "config file nowhere.toml does not exist"),
        (["--lora_alpha", "0"], "lora_alpha must be above 0"),
        (["--adam_beta1", "1.5"], "adam_beta1 must be at least 0 and below 1"),
        (["--learning_rate", "nan"], "learning_rate must be a finite number"),
        (["--instance_d", "x"], "instance_data_dir means something in dreambooth runs only"),
        (["--pre_compute_text_embeddings", "--train_text_encoder"], "contradicts"),
    ],
)
def test_mistakes_on_the_command_line(words: list[str], message: str) -> None:
    """Each mistake is an error that names the flag and what would be right."""
    with pytest.raises(UsageError) as error:
        parse([*T2I, *words], "text_to_image")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--with_prior_preservation"], "with_prior_preservation needs class_data_dir"),
        (["--class_data_dir", "x"], "class_data_dir has no effect without with_prior_preservation"),
        (["--train_data_dir", "x"], "train_data_dir means something in text_to_image runs only"),
    ],
)
def test_contradictions_of_dreambooth(words: list[str], message: str) -> None:
    """DreamBooth's flags that need or exclude each other are told at once."""
    with pytest.raises(UsageError) as error:
        parse([*DB, *words], "dreambooth")
    assert message in str(error.value)


def test_all_problems_are_told_at_once() -> None:
    """Several mistakes give one error with a line each."""
    with pytest.raises(UsageError) as error:
        TrainConfig(mode="dreambooth", rank=0, lr_scheduler="x", prior_loss_weight=-1.0)
    assert len(str(error.value).splitlines()) == 6


def test_toml_sections_defaults_and_flags(tmp_path: Path) -> None:
    """Defaults < file < flags; sections group; 1 is a float where a float is meant."""
    file = tmp_path / "a.toml"
    file.write_text(
        'mode = "text_to_image"\nseed = 3\n[model]\npretrained_model_name_or_path = "m"\n'
        '[data]\ntrain_data_dir = "d"\n[adapter]\nrank = 16\nlora_alpha = 8\n'
        'rank_pattern = { "to_q" = 2 }\n'
    )
    config = parse(["--config", str(file), "--rank", "32"])
    assert (config.seed, config.rank, config.lora_alpha, config.resolution) == (3, 32, 8.0, 512)
    assert config.rank_pattern == {"to_q": 2}
    with pytest.raises(UsageError, match="is for text_to_image, and this script is for dreambooth"):
        parse(["--config", str(file)], "dreambooth")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rnak = 3", "'rnak' is not an option. Did you mean rank?"),
        ("[adapter]\nrnak = 3", "'rnak' is not an option. Did you mean rank?"),
        ("rank = 3\n[adapter]\nrank = 4", "rank is given twice"),
        ("push_to_hub = true", "push_to_hub is not supported yet"),
        ("rank = ", "is not TOML"),
        ('rank = "4"', "rank must be a whole number, not '4'"),
        ("rank = 4.5", "rank must be a whole number, not 4.5"),
        ("center_crop = 1", "center_crop must be true or false, not 1"),
        ('rank_pattern = { to_q = "x" }', "'to_q' must be a whole number of at least 1, not 'x'"),
        ("rank_pattern = { to_q = 2.7 }", "'to_q' must be a whole number of at least 1, not 2.7"),
        ("alpha_pattern = { to_q = -1 }", "'to_q' must be above 0, not -1"),
        ("[lora]\nrank = 4", "'lora' is not an option. Tables are adapter, data, model"),
        ('lr_scheduler = "cosin"', "lr_scheduler is one of"),
        ('mode = "dreamboth"', "Did you mean dreambooth"),
    ],
)
def test_mistakes_in_files(text: str, message: str, tmp_path: Path) -> None:
    """Unknown keys, wrong types and broken TOML are errors, never ignored."""
    file = tmp_path / "a.toml"
    file.write_text(text)
    with pytest.raises(UsageError) as error:
        parse(["--config", str(file), *T2I])
    assert message in str(error.value)


def test_every_field_has_help_and_a_section() -> None:
    """The help lists every field with a text."""
    for field in dataclasses.fields(TrainConfig):
        assert field.metadata["help"]
    text = build_parser().format_help()
    assert all(f"--{name}" in text for name in FIELDS)
    assert "--instance_prompt" not in build_parser("text_to_image").format_help()


@pytest.mark.parametrize("name", ["dreambooth", "text_to_image"])
def test_shipped_configurations_parse(name: str, root: Path) -> None:
    """Every TOML in sample_data is a valid configuration of its mode."""
    path = root / "sample_data" / "configs" / f"{name}.toml"
    assert TrainConfig(**read_toml(str(path))).mode == name
    assert {p.stem for p in path.parent.iterdir()} == {"dreambooth", "text_to_image"}
