"""Command line and TOML file → TrainConfig."""

import argparse
import dataclasses
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from sd_lora.config.contradictions import type_name
from sd_lora.config.kohya import read_dataset_config
from sd_lora.config.schema import FIELDS, Mode, TrainConfig
from sd_lora.errors import UsageError, did_you_mean

_NOT_YET = "is not supported yet"
_IF = "belongs to DeepFloyd IF, which is not trained here"
_PRODIGY = f"belongs to Prodigy, which {_NOT_YET}"
_STEPS = "is a part of the epochs in the advanced scripts; here it is a number of steps: give"

REFUSED: dict[str, str] = {
    "class_labels_conditioning": _IF,
    "debug_loss": f"{_NOT_YET}; training_log.jsonl holds each step's loss",
    "enable_npu_flash_attention": f"{_NOT_YET}: no such device was at hand to prove it on",
    "enable_xformers_memory_efficient_attention": (
        "is not needed: PyTorch's own memory-efficient attention is always used; leave it out"
    ),
    "hub_model_id": f"{_NOT_YET}; upload the files by hand",
    "hub_token": f"{_NOT_YET}; log in with `hf auth login`",
    "optimizer": f"{_NOT_YET}: AdamW is used; leave it out",
    "output_kohya_format": (
        "is not needed: kohya's file is always written where it can be exact; leave it out"
    ),
    "prodigy_beta3": _PRODIGY,
    "prodigy_decouple": _PRODIGY,
    "prodigy_safeguard_warmup": _PRODIGY,
    "prodigy_use_bias_correction": _PRODIGY,
    "push_to_hub": f"{_NOT_YET}; upload the files by hand",
    "text_encoder_use_attention_mask": _IF,
    "tokenizer_max_length": "has another meaning here: --max_token_length, a multiple of 75",
    "validation_images": "belongs to DeepFloyd IF's upscaler, which is not trained here",
    # of the advanced scripts
    "lora_unet_blocks": "is --targets here: regular expressions over the UNet's modules",
    "train_text_encoder_frac": f"{_STEPS} --text_encoder_stop_step",
    "train_text_encoder_ti": "is not needed: give the new words with --token_abstraction",
    "train_text_encoder_ti_frac": f"{_STEPS} --embedding_stop_step",
    "use_blora": "is --targets here: the two blocks of B-LoRA are up_blocks.0.attentions.0 and .1",
}
"""Flags of diffusers' scripts that are refused by name, with the reason."""

_ALL_SCRIPTS = (
    "pretrained_model_name_or_path revision variant seed max_train_steps checkpoints_total_limit "
    "resume_from_checkpoint hub_token hub_model_id validation_prompt mixed_precision center_crop "
    "gradient_checkpointing scale_lr use_8bit_adam allow_tf32 push_to_hub "
    "enable_xformers_memory_efficient_attention num_validation_images validation_epochs output_dir "
    "resolution train_batch_size num_train_epochs checkpointing_steps gradient_accumulation_steps "
    "learning_rate lr_scheduler lr_warmup_steps dataloader_num_workers adam_beta1 adam_beta2 "
    "adam_epsilon max_grad_norm adam_weight_decay logging_dir report_to local_rank rank "
    "image_interpolation_mode"
)
_CAPTIONED = (
    "dataset_name dataset_config_name cache_dir train_data_dir max_train_samples image_column "
    "caption_column random_flip snr_gamma noise_offset prediction_type"
)
_SUBJECT = (
    "train_text_encoder instance_data_dir instance_prompt class_data_dir class_prompt "
    "with_prior_preservation prior_loss_weight num_class_images sample_batch_size "
    "prior_generation_precision lr_num_cycles lr_power lora_dropout"
)


FOREIGN: dict[str, str] = {
    "bucket_reso_steps": "--bucket_step",
    "cache_latents_to_disk": "--cache_latents disk",
    "cache_text_encoder_outputs": "--cache_text_embeddings memory",
    "cache_text_encoder_outputs_to_disk": "--cache_text_embeddings disk",
    "caption_dropout_rate": "--caption_dropout",
    "caption_tag_dropout_rate": "--caption_tag_dropout",
    "enable_bucket": "what is done without --no-aspect_ratio_buckets",
    "enable_wildcard": "--wildcards",
    "flip_aug": "--random_flip",
    "max_bucket_reso": "--bucket_max_side",
    "min_bucket_reso": "--bucket_min_side",
    "random_crop": "--no-center_crop",
    "reg_data_dir": "--class_data_dir with --with_prior_preservation, or class sources",
    "max_train_epochs": "--num_train_epochs",
    "min_snr_gamma": "--snr_gamma",
    "network_alpha": "--lora_alpha",
    "network_args": "--conv_rank, --conv_alpha and --method",
    "network_dim": "--rank",
    "network_module": "--targets and --method",
    "network_train_unet_only": "what is done without --train_text_encoder",
    "optimizer_type": "AdamW, or --use_8bit_adam",
    "output_name": "the last part of --output_dir",
    "sample_prompts": "--validation_prompt",
    "save_every_n_steps": "--checkpointing_steps",
    "unet_lr": "--learning_rate",
    "v2": "not needed: the model tells its family",
    "v_parameterization": "--prediction_type v_prediction",
    "vae": "--pretrained_vae_model_name_or_path",
    "xformers": "not needed: PyTorch's own memory-efficient attention is always used",
    "zero_terminal_snr": "--rescale_betas_zero_snr",
}
"""Flags of kohya's scripts → what they are here, for an error that says so."""


@dataclasses.dataclass(frozen=True)
class Script:
    """A command line: its mode, the family that it insists on, and the flags of diffusers' script
    of that name, whose unique prefixes carry over."""

    mode: Mode
    family: str | None
    flags: frozenset[str]


def _script(mode: Mode, family: str | None, *flags: str) -> Script:
    return Script(mode, family, frozenset(" ".join((_ALL_SCRIPTS, *flags)).split()))


SCRIPTS: dict[str, Script] = {
    "train_text_to_image_lora.py": _script("text_to_image", None, _CAPTIONED),
    "train_text_to_image_lora_sdxl.py": _script(
        "text_to_image",
        "sdxl",
        _CAPTIONED,
        "pretrained_vae_model_name_or_path train_text_encoder enable_npu_flash_attention "
        "debug_loss",
    ),
    "train_dreambooth_lora.py": _script(
        "dreambooth",
        None,
        _SUBJECT,
        "tokenizer_name tokenizer_max_length class_labels_conditioning validation_images "
        "pre_compute_text_embeddings text_encoder_use_attention_mask",
    ),
    "train_dreambooth_lora_sdxl.py": _script(
        "dreambooth",
        "sdxl",
        _SUBJECT,
        "dataset_name dataset_config_name cache_dir image_column caption_column random_flip "
        "snr_gamma pretrained_vae_model_name_or_path text_encoder_lr "
        "adam_weight_decay_text_encoder repeats optimizer prodigy_beta3 prodigy_decouple "
        "prodigy_use_bias_correction prodigy_safeguard_warmup use_dora output_kohya_format "
        "do_edm_style_training",
    ),
}
"""Script → what it is. diffusers 0.42.1, examples/text_to_image and examples/dreambooth."""

ACCEPTED_WITHOUT_EFFECT = {
    "pre_compute_text_embeddings": "text embeddings are always computed once unless trained",
}


class _Patterns(argparse.Action):
    """Reads `pattern=number` words into a table."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        whole = self.dest == "rank_pattern"
        table: dict[str, float] = {}
        for word in values:
            pattern, _, number = word.rpartition("=")
            try:
                table[pattern] = int(number) if whole else float(number)
            except ValueError:
                raise UsageError(f"--{self.dest} {word!r} is not pattern=number") from None
        setattr(namespace, self.dest, table)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def build_parser(
    mode: Mode | None = None, prog: str | None = None, xl: bool = False
) -> argparse.ArgumentParser:
    """Returns the parser of all flags; with a mode, the help shows that mode's flags alone, with
    the defaults for SDXL if `xl` says so."""
    parser = _Parser(prog=prog, argument_default=argparse.SUPPRESS, description=_DESCRIPTION)
    parser.add_argument("--config", metavar="FILE", help="TOML file with any of the fields below")
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(TrainConfig):
        meta = field.metadata
        if field.name == "mode" and mode:
            continue
        section = meta["section"]
        if section not in groups:
            groups[section] = parser.add_argument_group(section)
        if mode is not None and meta["only"] not in (None, mode):
            continue  # so that prefixes are as unique as in the script of this mode
        if type_name(field) == "list":
            continue  # tables, in a file alone
        groups[section].add_argument(f"--{field.name}", **_argument(field, _help(field, mode, xl)))
    for name in ACCEPTED_WITHOUT_EFFECT:
        parser.add_argument(f"--{name}", action="store_true", help=argparse.SUPPRESS)
    return parser


_DESCRIPTION = (
    "Train a Stable Diffusion LoRA: attention and convolutions, UNet and text encoder. "
    "Flags may be shortened to a unique prefix."
)


def _help(field: dataclasses.Field, mode: Mode | None, xl: bool) -> str:
    modes, default = field.metadata["modes"], field.default
    if modes and mode:
        default = field.metadata["xl"].get(mode, modes[mode]) if xl else modes[mode]
    elif modes:
        of_mode = [f"{value} ({name})" for name, value in modes.items() if value is not None]
        default = " / ".join(of_mode) or None
    if not xl and field.metadata["xl"]:
        others = {m: v for m, v in field.metadata["xl"].items() if mode in (None, m)}
        words = [f"{value} ({name}, SDXL)" for name, value in others.items()]
        default = " / ".join([str(default)] * (default is not None) + words) or None
    text = field.metadata["help"].replace("%", "%%")
    return text if default is None or default is False else f"{text} (default: {default})"


def _argument(field: dataclasses.Field, help_text: str) -> dict[str, Any]:
    kind = type_name(field)
    if kind == "bool":
        return {"action": argparse.BooleanOptionalAction, "help": help_text}
    if kind == "dict":
        return {"nargs": "+", "action": _Patterns, "metavar": "PATTERN=N", "help": help_text}
    kinds = {"int": int, "float": float, "str": str}
    choices = field.metadata["choices"] or None
    if field.name == "cache_latents":  # the advanced scripts and kohya have it without a value
        more = {"nargs": "?", "const": "auto"}
        return {"type": str, "choices": choices, "metavar": None, "help": help_text} | more
    metavar = None if choices else {"int": "N", "float": "X", "str": "TEXT"}[kind]
    return {"type": kinds[kind], "choices": choices, "metavar": metavar, "help": help_text}


def read_toml(path: str) -> dict[str, Any]:
    """Returns field → value of a TOML file: fields at the top, or in tables of any of the sections.

    Raises:
        UsageError: no such file, not TOML, or a key that is no field, with the nearest one.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UsageError(f"config file {path} does not exist")
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not TOML: {error}") from None
    sections = {f.metadata["section"] for f in FIELDS.values()}
    values: dict[str, Any] = {}
    for key, value in data.items():
        entries = value if isinstance(value, dict) and key in sections else {key: value}
        for name, entry in entries.items():
            if name in REFUSED:
                raise UsageError(f"{path}: {name} {REFUSED[name]}")
            if name not in FIELDS:
                hint = did_you_mean(name, FIELDS)
                if isinstance(entry, dict):
                    hint = f" Tables are {', '.join(sorted(sections))}"
                raise UsageError(f"{path}: {name!r} is not an option.{hint}")
            if name in values:
                raise UsageError(f"{path}: {name} is given twice")
            # TOML writes 1 for 1.0
            number = type_name(FIELDS[name]) == "float" and type(entry) is int
            values[name] = float(entry) if number else entry
    return values


def with_dataset_settings(path: str, values: dict[str, Any]) -> dict[str, Any]:
    """Returns values with what kohya's dataset configuration says of a run where they say nothing;
    of buckets only where there are any."""
    _, settings, _ = read_dataset_config(path)
    if (settings | values).get("aspect_ratio_buckets") is False:
        settings = {k: v for k, v in settings.items() if not k.startswith("bucket_")}
    return settings | values


def _expanded(word: str, script: Script | None) -> str:
    """Returns a shortened flag in full if it is unique among those of diffusers' script."""
    flag, equals, value = word.partition("=")
    name = flag.removeprefix("--")
    if not flag.startswith("--") or not name or name in FIELDS or script is None:
        return word
    matches = [n for n in script.flags if n.startswith(name)]
    return f"--{matches[0]}{equals}{value}" if len(matches) == 1 else word


def _unknown(word: str) -> UsageError:
    """Returns the error for a word that is no flag: refused by name, or with the nearest one."""
    flag = word.partition("=")[0]
    if not word.startswith("-"):
        return UsageError(f"{word!r} is not expected here; a value with spaces needs quotes")
    name = flag.lstrip("-")

    def means(known: str) -> bool:
        return name == known or (len(name) > 3 and known.startswith(name))

    for refused, reason in REFUSED.items():
        if means(refused):
            return UsageError(f"--{refused} {reason}")
    for field in FIELDS.values():
        if field.metadata["only"] and means(field.name):
            only = field.metadata["only"]
            return UsageError(f"{field.name} means something in {only} runs only")
    if name in FOREIGN:
        return UsageError(f"unknown flag {flag}: here it is {FOREIGN[name]} (docs/flags.md)")
    return UsageError(f"unknown flag {flag}.{did_you_mean(flag, [f'--{n}' for n in FIELDS])}")


def parse(argv: Sequence[str], script: str | None = None, prog: str | None = None) -> TrainConfig:
    """Returns the configuration of a command line.

    Args:
        argv: the words after the program's name.
        script: the script of `SCRIPTS` that they are for; None lets `--mode` or the file say the
            mode, and the model its family.
        prog: the program's name in help texts.

    Raises:
        UsageError: an unknown or refused flag, a bad value, a contradiction.
    """
    known = SCRIPTS[script] if script else None
    mode = known.mode if known else None
    for word in argv:  # before argparse takes a foreign name for the start of one of ours
        name = word.partition("=")[0].removeprefix("--")
        if word.startswith("--") and name in FOREIGN and name not in FIELDS:
            raise _unknown(word)
    parser = build_parser(mode, prog, known is not None and known.family == "sdxl")
    namespace, rest = parser.parse_known_args([_expanded(word, known) for word in argv])
    if rest:
        raise _unknown(rest[0])
    flags = vars(namespace)
    file = flags.pop("config", None)
    values = (read_toml(file) if file else {}) | {k: v for k, v in flags.items() if k in FIELDS}
    if values.get("dataset_config"):
        values = with_dataset_settings(str(values["dataset_config"]), values)
    if flags.get("pre_compute_text_embeddings") and values.get("train_text_encoder"):
        raise UsageError("pre_compute_text_embeddings contradicts train_text_encoder")
    if mode and values.get("mode", mode) != mode:
        raise UsageError(f"{file} is for {values['mode']}, and this script is for {mode}")
    if known:
        values["mode"] = known.mode
        if known.family and values.setdefault("family", known.family) != known.family:
            raise UsageError(f"family is {values['family']}, and this script is for {known.family}")
    return TrainConfig(**values)
