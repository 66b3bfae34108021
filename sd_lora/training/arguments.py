"""Command line and TOML file → TrainConfig."""

import argparse
import dataclasses
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from sd_lora.errors import UsageError, did_you_mean
from sd_lora.training.config import FIELDS, Mode, TrainConfig, type_name

_NOT_YET = "is not supported yet"
_XL = "belongs to Stable Diffusion XL, which cannot be trained yet"

REFUSED: dict[str, str] = {
    "class_labels_conditioning": "belongs to DeepFloyd IF, which is not trained here",
    "debug_loss": f"{_NOT_YET}; training_log.jsonl holds each step's loss",
    "do_edm_style_training": _XL,
    "enable_npu_flash_attention": _NOT_YET,
    "enable_xformers_memory_efficient_attention": (
        "is not needed: PyTorch's own memory-efficient attention is always used; leave it out"
    ),
    "hub_model_id": f"{_NOT_YET}; upload the files by hand",
    "hub_token": f"{_NOT_YET}; log in with `hf auth login`",
    "optimizer": f"{_NOT_YET}: AdamW is used; leave it out",
    "output_kohya_format": (
        "is not needed: kohya's file is always written where it can be exact; leave it out"
    ),
    "pretrained_vae_model_name_or_path": _NOT_YET,
    "prodigy_beta3": "belongs to Prodigy, which is not supported yet",
    "prodigy_decouple": "belongs to Prodigy, which is not supported yet",
    "prodigy_safeguard_warmup": "belongs to Prodigy, which is not supported yet",
    "prodigy_use_bias_correction": "belongs to Prodigy, which is not supported yet",
    "push_to_hub": f"{_NOT_YET}; upload the files by hand",
    "text_encoder_use_attention_mask": f"{_NOT_YET}: it belongs to DeepFloyd IF",
    "tokenizer_max_length": f"{_NOT_YET}: captions are cut at the model's own length",
    "validation_images": f"{_NOT_YET}: it belongs to DeepFloyd IF's upscaler",
}
"""Flags of diffusers' scripts that are refused by name, with the reason."""

_BEYOND_BOTH = frozenset(
    "adam_weight_decay_text_encoder alpha_pattern conv_alpha conv_rank init_lora_weights "
    "lokr_decompose_both lokr_factor lokr_full_matrix lora_alpha loraplus_lr_ratio lr_pattern "
    "method mode module_dropout modules_to_save neuron_dropout rank_dropout rank_pattern repeats "
    "save_precision scale_weight_norms targets text_encoder_lr train_bias use_dora use_rslora "
    "use_tucker validation_guidance_scale validation_steps".split()
)
_BEYOND: dict[str | None, frozenset[str]] = {
    None: _BEYOND_BOTH,
    "text_to_image": _BEYOND_BOTH
    | {"lora_dropout", "lr_num_cycles", "lr_power", "tokenizer_name", "train_text_encoder"},
    "dreambooth": _BEYOND_BOTH
    | {"cache_dir", "noise_offset", "prediction_type", "random_flip", "snr_gamma"},
}
"""Mode → flags that diffusers' script of that mode lacks: they must not make its prefixes
ambiguous."""

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


def build_parser(mode: Mode | None = None, prog: str | None = None) -> argparse.ArgumentParser:
    """Returns the parser of all flags; with a mode, the help shows that mode's flags alone."""
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
        groups[section].add_argument(f"--{field.name}", **_argument(field, _help(field, mode)))
    for name in ACCEPTED_WITHOUT_EFFECT:
        parser.add_argument(f"--{name}", action="store_true", help=argparse.SUPPRESS)
    return parser


_DESCRIPTION = (
    "Train a Stable Diffusion LoRA: attention and convolutions, UNet and text encoder. "
    "Flags may be shortened to a unique prefix."
)


def _help(field: dataclasses.Field, mode: Mode | None) -> str:
    modes = field.metadata["modes"]
    if modes and mode:
        default = modes[mode]
    elif modes:
        default = " / ".join(f"{value} ({name})" for name, value in modes.items())
    else:
        default = field.default
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


def _of(mode: Mode | None) -> list[str]:
    """Returns the names of the fields that mean something in a mode."""
    fields = FIELDS.values()
    return [f.name for f in fields if mode is None or f.metadata["only"] in (None, mode)]


def _expanded(word: str, mode: Mode | None) -> str:
    """Returns a shortened flag in full if it is unique among those of diffusers' script."""
    flag, equals, value = word.partition("=")
    name = flag.removeprefix("--")
    if not flag.startswith("--") or not name or name in FIELDS:
        return word
    matches = [n for n in _of(mode) if n not in _BEYOND[mode] and n.startswith(name)]
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
    return UsageError(f"unknown flag {flag}.{did_you_mean(flag, [f'--{n}' for n in FIELDS])}")


def parse(argv: Sequence[str], mode: Mode | None = None, prog: str | None = None) -> TrainConfig:
    """Returns the configuration of a command line.

    Args:
        argv: the words after the program's name.
        mode: of a script that has one; None lets `--mode` or the file say.
        prog: the program's name in help texts.

    Raises:
        UsageError: an unknown or refused flag, a bad value, a contradiction.
    """
    parser = build_parser(mode, prog)
    namespace, rest = parser.parse_known_args([_expanded(word, mode) for word in argv])
    if rest:
        raise _unknown(rest[0])
    flags = vars(namespace)
    file = flags.pop("config", None)
    values = (read_toml(file) if file else {}) | {k: v for k, v in flags.items() if k in FIELDS}
    if flags.get("pre_compute_text_embeddings") and values.get("train_text_encoder"):
        raise UsageError("pre_compute_text_embeddings contradicts train_text_encoder")
    if mode and values.get("mode", mode) != mode:
        raise UsageError(f"{file} is for {values['mode']}, and this script is for {mode}")
    return TrainConfig(**({"mode": mode} if mode else {}) | values)
