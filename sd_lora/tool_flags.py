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


def _share(text: str) -> float:
    share = _weight(text)
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"a share is from 0 to 1, not {text!r}")
    return share


class ToolParser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})
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
    if command == "resize":
        parser.add_argument(
            "--mean_rank",
            type=int,
            help="instead: as many parameters as of this rank, more ranks where they count more",
        )
    if command == "bake":
        parser.add_argument("--dtype", default="keep", help="keep, float32, float16 or bfloat16")
        parser.add_argument(
            "--rounding",
            default="nearest",
            help="nearest, or stochastic: at random, so that a change too small for the dtype "
            "keeps its mean",
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


_SAMPLE = """Draw images of a model with LoRA files, anybody's, or checkpoints of a run: a row for
each file and strength, a column for each prompt and seed, all from the same noise."""

_SAMPLE_EXAMPLES = """examples:
  sd-lora sample --model sd15.safetensors --lora my-style --prompt "a cat" --strengths 0 0.5 1
  sd-lora sample --model sdxl --lora out/checkpoint-500 out/checkpoint-1000 --prompt "a cat"
  sd-lora sample --model sdxl --lora a.safetensors --beside lcm.safetensors --prompt "a cat"
"""


_PROMPTS = """more prompts, in the forms of `train --sample_prompts`: one a line, also with its own
settings (a cat --n blurred --w 768 --h 512 --d 7 --s 30 --l 6 --m 0.5), which go before the flags;
--m multiplies the strength of each row; or tables of a .toml or .json"""

MOST_STRENGTH = 100
"""Of a LoRA file in an image."""


def _with_examples(command: str, about: str, examples: str) -> ToolParser:
    return ToolParser(
        prog=f"sd-lora {command}", description=about, epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip


def check_sheet(out: Path, overwrite: bool) -> None:
    """Refuse a file for drawn images that is there, is no .png, or cannot be written.

    Raises:
        UsageError, RunError: for people.
    """
    from sd_lora.folders import check_writable

    if out.exists() and not overwrite:
        raise UsageError(f"{out} is there already: --overwrite replaces it, or another --out")
    if out.suffix.lower() != ".png" or out.is_dir():
        raise UsageError(f"--out {out}: drawn images are a file that ends in .png")
    check_writable(out.absolute().parent, "--out")


def sample_parser() -> ToolParser:
    """The flags of `sd-lora sample`."""
    parser = _with_examples("sample", _SAMPLE, _SAMPLE_EXAMPLES)
    add = parser.add_argument
    add("--model", required=True, help="a diffusers folder, a single checkpoint or a hub id")
    add(
        "--lora",
        type=as_path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="LoRA files, folders or checkpoints: a row each (default: the model alone)",
    )
    add("--prompt", nargs="+", default=[], metavar="TEXT", help="a column each, with each seed")
    add("--prompts", type=as_path, metavar="FILE", help=_PROMPTS)
    add(
        "--strengths",
        type=_strength,
        nargs="+",
        default=[0.0, 1.0],
        metavar="S",
        help="a row each; 0 is the model alone (default: 0 1)",
    )
    add("--seeds", "--seed", type=_seed, nargs="+", default=[0], metavar="N", help="(default: 0)")
    add(
        "--beside",
        type=as_path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="LoRA files that are added to those of each row: a group of columns each",
    )
    add(
        "--beside_strength",
        type=_strength,
        nargs="+",
        default=[1.0],
        metavar="S",
        help="of all files beside, or one each (default: 1)",
    )
    add(
        "--beside_together",
        action="store_true",
        help="all files beside in the same images, in place of a group of columns each",
    )
    add("--negative", default="", metavar="TEXT", help="negative prompt (default: none)")
    add(
        "--size",
        type=_size,
        metavar="WxH",
        help="pixels, 768x512, or 512 for a square (default: the model's own)",
    )
    add("--steps", type=_count, default=25, help="of DPM-Solver++ (default: 25)")
    add("--guidance", type=_weight, default=7.5, help="classifier-free guidance (default: 7.5)")
    rescale = "scale it back, from 0 to 1 (default: 0.7 with zero terminal SNR, else 0)"
    add("--guidance_rescale", type=_share, metavar="PHI", help=rescale)
    add("--clip_skip", type=_skip, default=0, help="layers to skip, counted from 0 (default: 0)")
    add("--out", type=as_path, default=Path("grid.png"), help="the grid (default: grid.png)")
    add("--images", type=as_path, metavar="FOLDER", help="write each image alone as well, numbered")
    add("--overwrite", action="store_true", help="replace the grid that is there")
    add(
        "--low_memory",
        action="store_true",
        help="one image at once, UNet and VAE in turns on the device, the VAE in tiles",
    )
    add("--device", help="cuda, cuda:1, mps, cpu … (default: the best that is there)")
    add(
        "--dtype",
        choices=("fp32", "fp16", "bf16"),
        help="(default: half precision on a GPU, else fp32)",
    )
    add("--vae", help="another VAE: a folder, a file or a hub id")
    add("--variant", help="of a model folder's weights, such as fp16")
    return parser


_JUDGE = """Say how much LoRA files, anybody's, or checkpoints of a run have learned of a folder's
images, and at which strength to use them: by the loss of these images at each strength and, with
--features, by images that are drawn and scored. Images that the LoRA was not trained on say more.
Flags of `sd-lora train` about images, precision and objective are understood as well."""

_JUDGE_EXAMPLES = """examples:
  sd-lora judge style.safetensors --model sd15.safetensors --images more-of-the-style
  sd-lora judge out/checkpoint-500 out/checkpoint-1000 --model sdxl --images dog \\
    --prompt "a photo of sks dog" --class_prompt "a photo of a dog" --features dinov2-small
"""


def judge_parser() -> ToolParser:
    """The flags of `sd-lora judge` alone."""
    parser = _with_examples("judge", _JUDGE, _JUDGE_EXAMPLES)
    add = parser.add_argument
    add("files", type=as_path, nargs="+", metavar="FILE", help="LoRA files or checkpoints")
    add("--model", required=True, help="a diffusers folder, a single checkpoint or a hub id")
    add("--images", required=True, metavar="FOLDER", help="images of what it was to learn")
    add("--prompt", metavar="TEXT", help="of all images (default: their captions)")
    add(
        "--strengths",
        type=_strength,
        nargs="+",
        default=[0.25, 0.5, 0.75, 1.0, 1.25],
        metavar="S",
        help="beside 0 and 1 (default: 0.25 0.5 0.75 1 1.25)",
    )
    add(
        "--features",
        type=as_path,
        metavar="FOLDER",
        help="a vision model of transformers on disk (DINO, CLIP, SigLIP): images are drawn, and "
        "fidelity, copies, prompts followed, leak and harm are scored by it",
    )
    add(
        "--class_prompt",
        metavar="TEXT",
        help='for the leak into its class, "a photo of a dog"; with --features',
    )
    kinds = "what the images share; a style may reach other prompts (default: subject)"
    add("--kind", choices=("subject", "style"), default="subject", help=kinds)
    add(
        "--out",
        type=as_path,
        default=Path("judge.png"),
        help="the drawn images (default: judge.png)",
    )
    add("--overwrite", action="store_true", help="replace the images that are there")
    add("--json", action="store_true", help="everything, for scripts")
    return parser


def measuring(text: bool) -> dict[str, Any]:
    """Options of a configuration that measures LoRA files and trains nothing: the models are on
    the device as a whole, for adapters come and go. text: whether they are of text encoders,
    too."""
    return {
        "rank": 1, "targets": "attention", "holdout": 0, "validate_every": 1,
        "report_to": "none", "train_text_encoder": text,
        "offload_weights": False, "offload_activations": False,
    }  # fmt: skip


_COMPARE = """Say whether a change of a run's options helps: it is trained shortly as it was and
with the change, for as many epochs and from several seeds, and the losses of the images that are in
both are compared at the same noise. The change is any flags of `sd-lora train`, such as --leave_out
of an image that the run's page names. Paths in the run's config.json are as they were given: start
it in the same folder."""

_COMPARE_EXAMPLES = """examples:
  sd-lora compare my-dog --leave_out 07.png
  sd-lora compare my-dog --instance_data_dir dog-with-other-captions --steps 200
"""


def compare_parser() -> ToolParser:
    """The flags of `sd-lora compare` alone."""
    parser = _with_examples("compare", _COMPARE, _COMPARE_EXAMPLES)
    add = parser.add_argument
    add("run", type=as_path, metavar="RUN", help="the output folder of a run")
    add(
        "--steps", type=_count, metavar="N", help="of each training (default: a quarter of the run)"
    )
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="(default: 0 1 2)")
    add("--json", action="store_true", help="everything, for scripts")
    return parser


_CAPTION = """Write captions of a folder's images by an image-to-text model that you have on disk,
such as BLIP or GIT: beside the images without one as text files, or into their metadata.jsonl."""

_CAPTION_EXAMPLES = """example:
  sd-lora caption photos --captioner models/blip-image-captioning-base
"""


def caption_parser() -> ToolParser:
    """The flags of `sd-lora caption`."""
    parser = _with_examples("caption", _CAPTION, _CAPTION_EXAMPLES)
    add = parser.add_argument
    add("folder", type=as_path, help="a folder of images, with those below it")
    layout = "folder of the model, in the layout of transformers; nothing is downloaded"
    add("--captioner", type=as_path, required=True, metavar="MODEL", help=layout)
    asks = "question to a model that chats (default: Describe this image in one sentence.)"
    add("--prompt", help=asks)
    add("--overwrite", action="store_true", help="replace the captions that are there")
    add("--max_tokens", type=_count, default=40, help="of a caption at most (default: 40)")
    add("--batch", type=_count, default=4, help="images at once (default: 4)")
    add("--device", help="cuda, cuda:1, mps, cpu … (default: the best that is there)")
    return parser


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"a size is 512 or 768x512, not {text!r}")
    return int(match[1]), int(match[2] or match[1])


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"a seed is from 0 to 2^63 - 1, not {text!r}")
    return int(text)


def _skip(text: str) -> int:
    if text not in ("0", "1", "2", "3"):
        raise argparse.ArgumentTypeError(f"clip_skip is from 0 to 3, not {text!r}")
    return int(text)


def _strength(text: str) -> float:
    strength = _weight(text)
    if abs(strength) > MOST_STRENGTH:
        most = MOST_STRENGTH
        raise argparse.ArgumentTypeError(f"a strength is from -{most} to {most}, not {text!r}")
    return strength


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"it is 1 or more, not {text!r}")
    return int(text)
