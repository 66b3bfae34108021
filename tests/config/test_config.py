"""Command lines and TOML files → configuration: diffusers' flags carry over, mistakes are named."""

from pathlib import Path

import pytest

from sd_lora.config.command_line import (
    SCRIPTS,
    _expanded,
    build_parser,
    parse,
    parse_jobs,
)
from sd_lora.config.config_file import read_config_file
from sd_lora.config.schema import OPTIONS, TrainConfig
from sd_lora.config.translate.diffusers import DIFFUSERS, SWITCHES
from sd_lora.errors import UsageError

# script → name → default of diffusers 0.42.1, in the order of SCRIPTS; "-" where the script lacks
# the flag. None here and a value there are the same thing where our help says what None means.
THEIRS: dict[str, tuple[object, ...]] = {
    "pretrained_model_name_or_path": (None,) * 4, "revision": (None,) * 4, "variant": (None,) * 4,
    "seed": (None,) * 4, "max_train_steps": (None,) * 4, "checkpoints_total_limit": (None,) * 4,
    "resume_from_checkpoint": (None,) * 4, "validation_prompt": (None,) * 4,
    "mixed_precision": (None,) * 4, "center_crop": (None,) * 4,
    "gradient_checkpointing": (False,) * 4, "scale_lr": (False,) * 4,
    "allow_tf32": (False,) * 4, "num_validation_images": (4,) * 4,
    "validation_epochs": (1, 1, 50, 50), "push_to_hub": (False,) * 4, "hub_token": (None,) * 4,
    "hub_model_id": (None,) * 4,
    "output_dir": ("sd-model-finetuned-lora",) * 2 + ("lora-dreambooth-model",) * 2,
    "resolution": (512, 1024, 512, 1024), "train_batch_size": (16, 16, 4, 4),
    "num_train_epochs": (100, 100, 1, 1), "checkpointing_steps": (500,) * 4,
    "gradient_accumulation_steps": (1,) * 4, "learning_rate": (1e-4, 1e-4, 5e-4, 1e-4),
    "lr_scheduler": ("constant",) * 4, "lr_warmup_steps": (500,) * 4,
    "dataloader_num_workers": (0,) * 4, "adam_beta1": (0.9,) * 4, "adam_beta2": (0.999,) * 4,
    "adam_epsilon": (1e-8,) * 4, "max_grad_norm": (1.0,) * 4,
    "adam_weight_decay": (1e-2, 1e-2, 1e-2, 1e-4), "logging_dir": ("logs",) * 4,
    "local_rank": (-1,) * 4, "rank": (4,) * 4, "image_interpolation_mode": ("lanczos",) * 4,
    "dataset_name": (None, None, "-", None), "dataset_config_name": (None, None, "-", None),
    "cache_dir": (None, None, "-", None), "train_data_dir": (None, None, "-", "-"),
    "max_train_samples": (None, None, "-", "-"), "image_column": ("image", "image", "-", "image"),
    "caption_column": ("text", "text", "-", None), "random_flip": (False, False, "-", False),
    "snr_gamma": (None, None, "-", None), "noise_offset": (0, 0, "-", "-"),
    "prediction_type": (None, None, "-", "-"),
    "pretrained_vae_model_name_or_path": ("-", None, "-", None),
    "train_text_encoder": ("-", False, False, False), "instance_data_dir": ("-", "-", None, None),
    "instance_prompt": ("-", "-", None, None), "class_data_dir": ("-", "-", None, None),
    "class_prompt": ("-", "-", None, None), "with_prior_preservation": ("-", "-", False, False),
    "prior_loss_weight": ("-", "-", 1.0, 1.0), "num_class_images": ("-", "-", 100, 100),
    "sample_batch_size": ("-", "-", 4, 4), "prior_generation_precision": ("-", "-", None, None),
    "lr_num_cycles": ("-", "-", 1, 1), "optimizer": ("-", "-", "-", "adamw"),
    "lr_power": ("-", "-", 1.0, 1.0),
    "lora_dropout": ("-", "-", 0.0, 0.0), "tokenizer_name": ("-", "-", None, "-"),
    "text_encoder_lr": ("-", "-", "-", 5e-6),
    "adam_weight_decay_text_encoder": ("-", "-", "-", 1e-3), "repeats": ("-", "-", "-", 1),
    "use_dora": ("-", "-", "-", False), "do_edm_style_training": ("-", "-", "-", False),
}  # fmt: skip
# those that are refused, or accepted without effect; report_to is the tracker that is installed
ALSO_THEIRS = (
    "enable_xformers_memory_efficient_attention report_to "
    "tokenizer_max_length class_labels_conditioning validation_images pre_compute_text_embeddings "
    "text_encoder_use_attention_mask use_8bit_adam prodigy_beta3 prodigy_decouple "
    "prodigy_use_bias_correction prodigy_safeguard_warmup output_kohya_format "
    "enable_npu_flash_attention debug_loss"
).split()
ADVANCED = (
    "cache_latents lora_unet_blocks train_text_encoder_frac train_text_encoder_ti "
    "train_text_encoder_ti_frac use_blora"
).split()
A, B, C, D = SCRIPTS
MODELS = {A: ("sd1", 512), B: ("sdxl", 1024), C: ("sd1", 512), D: ("sdxl", 1024)}

T2I = ["--pretrained_model_name_or_path", "m", "--train_data_dir", "d"]
DB = ["--pretrained_model_name_or_path", "m", "--instance_data_dir", "d", "--instance_prompt", "p"]


def words_of(script: str) -> list[str]:
    return T2I if SCRIPTS[script].mode == "text_to_image" else DB


def test_every_flag_of_the_scripts_is_taken_or_refused_by_name() -> None:
    """All 84 flags of the four diffusers scripts are a field of ours, accepted, or refused with a
    reason; none is unknown."""
    names = [*THEIRS, *ALSO_THEIRS]
    assert len(set(names)) == len(names) == 84
    assert set(names) == set().union(*(script.flags for script in SCRIPTS.values()))
    assert set(names) <= OPTIONS.keys() | DIFFUSERS.keys()
    assert parse([*T2I, "--optimizer", "AdamW", "--use_8bit_adam"], A).optimizer == "adamw8bit"
    assert DIFFUSERS.keys() <= {*ALSO_THEIRS, *ADVANCED}
    taken, told = set(), {}
    for name, row in DIFFUSERS.items() - {("use_8bit_adam", DIFFUSERS["use_8bit_adam"])}:
        words = [*T2I, f"--{name}", *([] if name in SWITCHES else ["x"])]
        try:
            assert parse(words, A).notes == (f"--{name} {row.reason}",)
            taken.add(name)
        except UsageError as error:
            told[name] = str(error)
    assert all(text.startswith(f"--{name} ") for name, text in told.items())
    assert taken == {
        "enable_xformers_memory_efficient_attention", "output_kohya_format",
        "pre_compute_text_embeddings",
    }  # fmt: skip


def test_a_class_without_prior_preservation_is_left_out_in_the_scripts() -> None:
    """As in diffusers' DreamBooth scripts, the class's folder and prompt without prior preservation
    are a warning, not an error; in `sd-lora train`, where nobody carried them over, an error."""
    words = [*DB, "--class_data_dir", "x", "--class_prompt", "y"]
    config = parse(words, C)
    assert (config.class_data_dir, config.class_prompt) == (None, None)
    assert [note.split()[0] for note in config.notes] == ["class_data_dir", "class_prompt"]
    with pytest.raises(UsageError, match="class_data_dir has no effect without"):
        parse(["--mode", "dreambooth", *words])


@pytest.mark.parametrize("script", SCRIPTS)
def test_defaults_are_those_of_each_script(script: str) -> None:
    """Each script's defaults equal those of diffusers' script of that name, once the model that it
    is for is known."""
    words = words_of(script)
    config = parse([*words, *(["--train_text_encoder"] if script == D else [])], script)
    config = config.resolve(*MODELS[script])
    column = list(SCRIPTS).index(script)
    given = {w.removeprefix("--") for w in words} | {"train_text_encoder"}
    flags = {name for name, defaults in THEIRS.items() if defaults[column] != "-"}
    assert flags | set(ALSO_THEIRS) >= SCRIPTS[script].flags >= flags
    for name in flags - given:
        assert getattr(config, name) == THEIRS[name][column], name


def test_defaults_follow_the_model() -> None:
    """One command line serves all families: SDXL's resolution, rates and decay come with the model,
    what the user gives stays, and a model of another family than the script's is refused."""
    config = parse(DB, C)
    small, large = config.resolve("sd1", 512), config.resolve("sdxl", 1024)
    assert (small.resolution, small.learning_rate, small.adam_weight_decay) == (512, 5e-4, 1e-2)
    assert (large.resolution, large.learning_rate, large.adam_weight_decay) == (1024, 1e-4, 1e-4)
    given = parse([*DB, "--resolution", "768", "--learning_rate", "3e-4"], C).resolve("sdxl", 1024)
    assert (given.resolution, given.learning_rate) == (768, 3e-4)
    with pytest.raises(UsageError, match="is a model of family sd1, and family says sdxl"):
        parse(DB, D).resolve("sd1", 512)
    one = parse([*DB, "--train_text_encoder", "--text_encoder_2_lr", "1e-5"], C)
    with pytest.raises(UsageError, match="text_encoder_2_lr needs two text encoders"):
        one.resolve("sd2", 512)


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
        A,
    )  # fmt: skip
    assert (config.train_batch_size, config.gradient_accumulation_steps) == (1, 4)
    assert config.random_flip
    assert config.rank_pattern == {"mid_block.*": 8, "to_q": 2}
    assert config.alpha_pattern == {"to_q": 0.5}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_unique_prefix_of_the_scripts_carries_over(script: str) -> None:
    """Every unique prefix of each flag of a script still means that flag, whatever flags this
    project has added."""
    flags, checked = SCRIPTS[script].flags, 0
    for name in flags:
        for prefix in (name[:n] for n in range(1, len(name))):
            if prefix not in OPTIONS and sum(f.startswith(prefix) for f in flags) == 1:
                assert _expanded(f"--{prefix}", SCRIPTS[script]) == f"--{name}"
                assert _expanded(f"--{prefix}=3", SCRIPTS[script]) == f"--{name}=3"
                checked += 1
    assert checked > 200
    line = ["--pretrained_model", "m", "--max_train_st", "2"]
    if SCRIPTS[script].mode == "dreambooth":
        config = parse([*line, "--instance_d", "d", "--instance_p", "p", "--lora", "0.5"], script)
        assert (config.max_train_steps, config.lora_dropout) == (2, 0.5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rnak", "3"], "unknown flag --rnak. Did you mean --rank?"),
        (["surplus"], "'surplus' is not expected here"),
        (["--rank", "0"], "rank must be at least 1, not 0"),
        (["--rank", "four"], "rank must be a whole number, not 'four'"),
        (["--max_train_steps", "0"], "max_train_steps must be at least 1"),
        (["--learning_rate", "0"], "learning_rate must be above 0"),
        (["--mixed_precision", "fp8"], "mixed_precision is one of no, fp16, bf16, auto, not 'fp8'"),
        (["--lr_scheduler", "cosin"], "not 'cosin'. Did you mean cosine?"),
        (
            ["--dataset_name", "x"],
            "dataset_config, not both --train_data_dir and --dataset_name",
        ),
        (["--class_pr", "x"], "class_prompt has an effect in dreambooth runs only"),
        (
            ["--text_encoder_lr", "1e-5"],
            "--text_encoder_lr has no effect without --train_text_encoder",
        ),
        (["--lora_dropout", "1.0"], "lora_dropout must be at least 0 and below 1"),
        (["--rank_pattern", "to_q"], "'to_q' is not pattern=number"),
        (["--config", "nowhere.toml"], "config file nowhere.toml does not exist"),
        (["--lora_alpha", "0"], "lora_alpha must be above 0"),
        (["--adam_beta1", "1.5"], "adam_beta1 must be at least 0 and below 1"),
        (["--learning_rate", "nan"], "learning_rate must be a finite number"),
        (["--instance_d", "x"], "instance_data_dir has an effect in dreambooth runs only"),
        (["--pre_compute_text_embeddings", "--train_text_encoder"], "contradicts"),
        (["--max_token_length", "80"], "a multiple of 75, not 80"),
        (["--clip_skip", "-1"], "clip_skip must be at least 0, not -1"),
        (["--caption_dropout", "1"], "caption_dropout must be at least 0 and below 1"),
        (["--min_timestep", "500", "--max_timestep", "500"], "--max_timestep must be above --min"),
        (["--weighted_prompts", "--train_text_encoder"], "weighted_prompts needs text encoders"),
        (["--weighted_prompts", "--clip_skip", "1"], "weighted_prompts excludes --clip_skip"),
        (["--token_abstraction", " , "], "token_abstraction names no word"),
        (["--embedding_lr", "1"], "embedding_lr has no effect without --token_abstraction"),
        (["--text_encoder_2_rank", "8"], "text_encoder_2_rank has no effect"),
        (["--train_text_encoder", "--text_encoder_rank", "0"], "trains no text encoder"),
        (["--do_edm_style_training", "--snr_gamma", "5"], "training excludes --snr_gamma"),
        (
            ["--p2_gamma", "1", "--debiased_estimation_loss"],
            "--p2_gamma excludes --debiased_estimation_loss: each weights the losses",
        ),
        (["--logit_mean", "1"], "has no effect without --timestep_sampling logit_normal"),
        (["--huber_c", "1"], "has no effect without --loss_type huber or smooth_l1"),
        (["--adaptive_noise_scale", "1"], "has no effect without --noise_offset"),
        (["--unmasked_weight", "0.1"], "unmasked_weight has no effect without masks"),
        (["--output_preservation", "class"], "needs --preservation_class, a word for the class"),
        (["--preservation_class", "dog"], "has no effect without --output_preservation class"),
        (
            ["--output_preservation", "blank", "--train_text_encoder"],
            "output_preservation needs text encoders that do not learn",
        ),
        (["--loss_weights_file", "nowhere.csv"], "nowhere.csv cannot be read: No such file"),
        (
            ["--resolutions", "64", "64"],
            "resolutions must be whole numbers of at least 1, each once",
        ),
        (
            ["--resolutions", "64", "x"],
            "resolutions must be whole numbers, such as [512, 768], not",
        ),
        (["--family", "sd3"], "not 'sd3'. Did you mean sd2?"),
        (["--vae", "x"], "unknown flag --vae: here it is --pretrained_vae_model_name_or_path"),
        (["--network_dim", "8"], "unknown flag --network_dim: here it is --rank"),
        (
            ["--dataset_config_name", "x"],
            "dataset_config_name has no effect without --dataset_name",
        ),
        (
            ["--validation_prompt", "x", "--num_validation_images", "0"],
            "has no effect with --num_v",
        ),
        (["--lr_power", "2"], "--lr_power has no effect without --lr_scheduler polynomial"),
        (
            ["--method", "full", "--train_text_encoder", "--text_encoder_rank", "4"],
            "no effect with method full",
        ),
    ],
)
def test_mistakes_on_the_command_line(words: list[str], message: str) -> None:
    """Each mistake is an error that names the flag and what would be right."""
    with pytest.raises(UsageError) as error:
        parse([*T2I, *words], A)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("timestep,weight\n500, 0.5\n\n0,1\n", [(0, 1), (500, 0.5)]),
        ("0,1", [(0, 1)]),
        ("0;1", "line 1 is no timestep,weight: '0;1'"),
        ("0,1\n5,x", "line 2 is no timestep,weight: '5,x'"),
        ("0,1\n5,-1", "line 2 has a number below 0"),
        ("0,1\n5,nan", "line 2 has a number below 0, or none"),
        ("0,1\n0,2", "line 2 has timestep 0 a second time"),
        ("0,0", "has no weight above 0"),
        ("", "has no weight above 0"),
    ],
)
def test_a_file_of_loss_weights(text: str, wanted: object, tmp_path: Path) -> None:
    """Lines of timestep,weight, with or without a first line of names, are points by timestep;
    other lines are told by their number."""
    file = tmp_path / "w.csv"
    file.write_text(text)
    words = [*T2I, "--loss_weights_file", str(file)]
    if isinstance(wanted, str):
        with pytest.raises(UsageError) as error:
            parse(words)
        assert f"{file} {wanted}" in str(error.value)
    else:
        name, parameters = parse(words).weighting
        assert (name, parameters) == ("table", {"points": wanted, "file": "w.csv"})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--with_prior_preservation"], "--with_prior_preservation needs --class_data_dir"),
        (
            [
                "--with_prior_preservation",
                "--class_data_dir",
                "x",
                "--class_prompt",
                "a {b|c}",
                "--captions_from",
                "prompt",
            ],
            "class_prompt has wildcards, and --captions_from prompt reads none",
        ),
        (["--num_class_images", "9"], "num_class_images has no effect without --with_prior"),
        (["--train_data_dir", "x"], "train_data_dir has an effect in text_to_image runs only"),
    ],
)
def test_contradictions_of_dreambooth(words: list[str], message: str) -> None:
    """DreamBooth's flags that need or exclude each other are told at once."""
    with pytest.raises(UsageError) as error:
        parse([*DB, *words], C)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trigger_word", "sks"], "trigger_word has no effect with --dataset_config"),
        (["--repeats", "2"], "repeats has no effect with --dataset_config"),
        (["--random_flip"], "random_flip has no effect with --dataset_config"),
        (["--train_data_dir", "d"], "not both --train_data_dir and --dataset_config"),
        (["--streaming"], "streaming has no effect without --dataset_name"),
        (["--no-aspect_ratio_buckets", "--bucket_step", "8"], "bucket_step has no effect without"),
        (["--caption_separator", ""], "caption_separator must not be empty"),
        (
            ["--bucket_min_side", "9", "--bucket_max_side", "8"],
            "must not be above --bucket_max_side",
        ),
        (["--prior_loss_weight", "-1"], "prior_loss_weight must be at least 0"),
    ],
)
def test_mistakes_about_the_data(words: list[str], message: str, root: Path) -> None:
    """Settings of the data that would mean nothing, or cannot be meant, are refused by name."""
    path = root / "sample_data" / "configs" / "dataset_kohya.toml"
    with pytest.raises(UsageError) as error:
        parse([*T2I[:2], "--dataset_config", str(path), *words])
    assert message in str(error.value)


def test_flags_win_over_a_dataset_config(root: Path) -> None:
    """What kohya's file says of the run holds unless a flag says otherwise; without buckets what it
    says of them means nothing."""
    path = root / "sample_data" / "configs" / "dataset_kohya.toml"
    words = [*T2I[:2], "--dataset_config", str(path)]
    config = parse(words)
    assert config.aspect_ratio_buckets
    assert parse([*words, "--train_batch_size", "7"]).train_batch_size == 7
    squares = parse([*words, "--no-aspect_ratio_buckets"])
    assert (squares.aspect_ratio_buckets, squares.bucket_step) == (False, None)


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
    assert (config.seed, config.rank, config.lora_alpha, config.train_batch_size) == (
        3,
        32,
        8.0,
        16,
    )
    assert config.rank_pattern == {"to_q": 2}
    with pytest.raises(UsageError, match="is for text_to_image, and this script is for dreambooth"):
        parse(["--config", str(file)], C)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rnak = 3", "'rnak' is not an option. Did you mean rank?"),
        ("[adapter]\nrnak = 3", "'rnak' is not an option. Did you mean rank?"),
        ("rank = 3\n[adapter]\nrank = 4", "rank is given twice"),
        ("debug_loss = true", "debug_loss is not supported yet"),
        ("rank = ", "is not TOML"),
        ('rank = "4"', "rank must be a whole number, not '4'"),
        ("rank = 4.5", "rank must be a whole number, not 4.5"),
        ("center_crop = 1", "center_crop must be true or false, not 1"),
        ('rank_pattern = { to_q = "x" }', "'to_q' must be a whole number of at least 1, not 'x'"),
        ("rank_pattern = { to_q = 2.7 }", "'to_q' must be a whole number of at least 1, not 2.7"),
        ("alpha_pattern = { to_q = -1 }", "'to_q' must be above 0, not -1"),
        ("[lora]\nrank = 4", "'lora' is not an option. Tables are adapter, data, model"),
        ('lr_scheduler = "cosin"', "lr_scheduler is one of"),
        ('output_dir = "a\\u0000b"', "output_dir holds a NUL character: 'a\\x00b'"),
        ('mode = "dreamboth"', "Did you mean dreambooth"),
        ("network_dim = 8\nunet_lr = 1e-4\na = 1\nb = 2\nc = 3", "a.toml is another trainer's "
         "configuration: 5 of its settings are not of sd-lora. `sd-lora translate"),
        ("job: extension", "a.yaml is no configuration of sd-lora, which is TOML or JSON. `sd-lora "
         "translate"),
    ],
)  # fmt: skip
def test_mistakes_in_files(text: str, message: str, tmp_path: Path) -> None:
    """Unknown keys, wrong types, broken TOML and other trainers' files are errors, never
    ignored."""
    file = tmp_path / ("a.yaml" if ": " in text else "a.toml")
    file.write_text(text)
    with pytest.raises(UsageError) as error:
        parse(["--config", str(file), *T2I])
    assert message in str(error.value)


def test_every_field_has_help_and_a_section() -> None:
    """The help lists every field with a text."""
    assert all(option.help and option.section for option in OPTIONS.values())
    text = build_parser().format_help()
    in_files_alone = {"sources"}
    assert all(f"--{name}" in text for name in OPTIONS.keys() - in_files_alone)
    assert "--sources" not in text
    assert "--instance_prompt" not in build_parser("text_to_image").format_help()


def test_shipped_configurations_parse(root: Path) -> None:
    """Every TOML in sample_data is a valid configuration, or kohya's of the data."""
    folder = root / "sample_data" / "configs"
    of_others = ("dataset_kohya", "jobs")
    own = {p.stem: p for p in folder.glob("*.toml") if p.stem not in of_others}
    modes = {name: TrainConfig(**read_config_file(str(path))).mode for name, path in own.items()}
    assert modes == {
        "dreambooth": "dreambooth", "text_to_image": "text_to_image", "sources": "text_to_image",
        "requeued": "text_to_image",
    }  # fmt: skip
    config = parse([*T2I[:2], "--dataset_config", str(folder / "dataset_kohya.toml")])
    assert config.dataset_config
    jobs = parse_jobs(["--config", str(folder / "jobs.toml")])
    assert [job.name for job in jobs] == ["monster", "monster-small", "things"]
