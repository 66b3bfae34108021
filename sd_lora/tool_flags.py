"""The flags of the tools, `sd-lora inspect`, `verify`, `convert`, …, as argparse has them."""

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from sd_lora.errors import UsageError, did_you_mean

_ABOUT = {
    "inspect": "Say what is in a LoRA file: format, family, ranks, norms by block, who reads it, "
    "and what is wrong with it.",
    "verify": "Load a LoRA file with diffusers into a fresh pipeline of its family and compare "
    "every module's ΔW with what is in the file.",
    "convert": "Write a LoRA file in another format or dtype, exactly.",
    "merge": "Write one LoRA whose every ΔW is the weighted sum of several LoRAs' ΔW.",
    "resize": "Cut a LoRA to fewer ranks by its singular values, and state the error.",
    "extract": "Write the difference of two models as a LoRA, by singular values.",
    "bake": "Write a model with LoRAs merged into its weights.",
}


def as_path(text: str) -> Path:
    return Path(text).expanduser()


def _weight(text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise argparse.ArgumentTypeError(f"a weight is a finite number, not {text!r}")
    return weight


class ToolParser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        # -1e-3 is a number and no flag; Python 3.11 knows -0.001 alone
        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.I)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}. See {self.prog} --help")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        args, unknown = self.parse_known_args(argv)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            raise UsageError(
                f"unknown argument {unknown[0]!r}.{did_you_mean(unknown[0], flags)} "
                f"See {self.prog} --help"
            )
        return args


def tool_parser(command: str) -> ToolParser:
    parser = ToolParser(prog=f"sd-lora {command}", description=_ABOUT[command])
    if command in ("inspect", "verify", "convert", "resize"):
        parser.add_argument("file", type=as_path, help="a LoRA file, or a folder with one")
    if command in ("extract", "bake"):
        parser.add_argument("base", type=as_path, help="a diffusers folder or a single checkpoint")
    if command == "extract":
        parser.add_argument("tuned", type=as_path, help="the finetuned model, in either form")
    if command in ("merge", "bake"):
        parser.add_argument("files", type=as_path, nargs="+", help="LoRA files")
        parser.add_argument(
            "--weights", type=_weight, nargs="+", metavar="W", help="one a file (default: 1 each)"
        )
    if command not in ("inspect", "verify"):
        parser.add_argument("--out", type=as_path, required=True, help="what to write")
        parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    _add_writing(parser, command)
    if command != "bake":
        parser.add_argument(
            "--model",
            help="diffusers folder, checkpoint or cached hub id that the LoRA is for (default: the "
            "published model of its family)",
        )
    if command in ("convert", "merge", "resize", "verify", "inspect"):
        parser.add_argument(
            "--family", help="sd1, sd2, sdxl or sdxl_refiner, where the file does not say it"
        )
    if command not in ("inspect", "verify"):
        parser.add_argument("--variant", help="of a model folder's weights, such as fp16")
    if command == "inspect":
        parser.add_argument("--json", action="store_true", help="everything, for scripts")
    return parser


def _add_writing(parser: ToolParser, command: str) -> None:
    if command in ("convert", "merge", "resize", "extract"):
        parser.add_argument(
            "--to",
            required=command == "convert",
            help="diffusers, kohya (A1111, ComfyUI, …), lycoris (every method) or comfyui (DoRA)"
            + "; default: the first exact one of the others" * (command != "convert"),
        )
        parser.add_argument(
            "--dtype",
            default="auto",
            help="float32, float16, bfloat16, or auto: the source's where that is exact",
        )
        parser.add_argument("--no_verify", action="store_true", help="do not load what was written")
        what = {
            "convert": "approximate what the format cannot hold by LoRAs of this rank",
            "merge": "cut the sums to this rank (default: exact, all ranks)",
        }.get(command, "ranks to keep at most")
        parser.add_argument("--rank", type=int, help=what)
        parser.add_argument("--conv_rank", type=int, help="the same for kernels above 1×1")
        parser.add_argument("--energy", type=float, help="keep this share of Σσ², such as 0.95")
        parser.add_argument("--ratio", type=float, help="keep σ of at least the largest / ratio")
    if command == "bake":
        parser.add_argument("--dtype", default="keep", help="keep, float32, float16 or bfloat16")
        parser.add_argument(
            "--rounding",
            default="nearest",
            help="nearest, or stochastic: at random, which keeps the mean of a change that is too "
            "small for the dtype",
        )
    if command == "convert":
        parser.add_argument(
            "--drop_vectors", action="store_true", help="leave out biases and norms"
        )
    if command == "merge":
        parser.add_argument(
            "--blocks",
            nargs="+",
            default=[],
            metavar="[FILE:]PATTERN=W",
            help="factors on the weights of some modules: up_blocks=0.5 2:text_encoder=0",
        )
    if command == "extract":
        parser.add_argument("--components", nargs="+", help="unet text_encoder … (default: all)")
        parser.add_argument(
            "--v_prediction",
            action="store_true",
            help="what the header says (default: the scheduler's)",
        )
