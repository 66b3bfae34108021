"""The tools' command lines: `sd-lora inspect`, `verify`, `convert`, `merge`, …"""

import argparse
import json
import math
import re
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from sd_lora.errors import RunError, UsageError, did_you_mean

T = TypeVar("T")

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


def _path(text: str) -> Path:
    return Path(text).expanduser()


def _weight(text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise argparse.ArgumentTypeError(f"a weight is a finite number, not {text!r}")
    return weight


class _Parser(argparse.ArgumentParser):
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


def check(argv: Sequence[str]) -> None:
    """Run `sd-lora check`, with the flags of `train` and its own."""
    parser = _Parser(prog="sd-lora check", description=_CHECK, add_help=False)
    parser.add_argument("--json", action="store_true", help="everything, for scripts")
    parser.add_argument("--page", type=_path, metavar="FILE", help="the page (default: check.html)")
    parser.add_argument("--no_page", action="store_true", help="no page")
    parser.add_argument("--num_processes", type=int, default=1, help="that will train")
    args, rest = parser.parse_known_args(argv)
    if {"-h", "--help"} & set(rest):
        from sd_lora.config.flags import build_parser

        print(f"{parser.format_help()}\nand the flags of sd-lora train, of which the main are:")
        print(build_parser(prog="sd-lora check", page="main").format_help().partition("\n\n")[2])
        return
    if args.page and args.no_page:
        raise UsageError("--page and --no_page contradict each other")
    if args.num_processes < 1:
        raise UsageError(f"num_processes must be at least 1, not {args.num_processes}")
    from sd_lora.config.command_line import parse
    from sd_lora.data.check.places import check_places
    from sd_lora.data.sources.open import has_captions

    config = parse(rest, prog="sd-lora check", has_captions=has_captions, for_check=True)
    check_places(config)
    from sd_lora import check as data_check
    from sd_lora.data.check.page import findings_as_json
    from sd_lora.data.check.usable import NoUsableImages, refuse_problems
    from sd_lora.terminal import Terminal

    page = args.page or (None if args.no_page or args.json else Path("check.html"))
    try:
        with Terminal() as terminal:
            checked = data_check.check(config, args.num_processes, page is not None, [terminal])
    except NoUsableImages as error:
        if args.json:
            verdict = {"verdict": "no image can be trained", "images": []}
            print(json.dumps(verdict | findings_as_json(error.findings), indent=2))
        raise
    if args.json:
        print(data_check.as_json(checked))
    else:
        print(f"sd_lora check:\n{data_check.lines(checked)}\n  {checked.verdict}")
    if page:
        data_check.write(checked, page)
        if not args.json:
            print(f"  look at {page}")
    if config.strict:
        refuse_problems(checked.images.findings)


_CHECK = (
    "Look at everything that a run would train on, before it starts: decode every image, count "
    "every caption's tokens, say which shape each is trained in and what is cut away, and how many "
    "steps that makes. Nothing is changed. Exit codes: 0: the run can start; 1: no usable image, "
    "or --strict and an image is left out or warned of; 2: wrong flags."
)


def _parser(command: str) -> _Parser:
    parser = _Parser(prog=f"sd-lora {command}", description=_ABOUT[command])
    if command in ("inspect", "verify", "convert", "resize"):
        parser.add_argument("file", type=_path, help="a LoRA file, or a folder with one")
    if command in ("extract", "bake"):
        parser.add_argument("base", type=_path, help="a diffusers folder or a single checkpoint")
    if command == "extract":
        parser.add_argument("tuned", type=_path, help="the finetuned model, in either form")
    if command in ("merge", "bake"):
        parser.add_argument("files", type=_path, nargs="+", help="LoRA files")
        parser.add_argument(
            "--weights", type=_weight, nargs="+", metavar="W", help="one a file (default: 1 each)"
        )
    if command not in ("inspect", "verify"):
        parser.add_argument("--out", type=_path, required=True, help="what to write")
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


def _add_writing(parser: _Parser, command: str) -> None:
    if command in ("convert", "merge", "resize", "extract"):
        parser.add_argument(
            "--to",
            required=command == "convert",
            help="diffusers, kohya (A1111, ComfyUI, …) or lycoris (every method)"
            + ("" if command == "convert" else "; default: the first of kohya, diffusers, lycoris")
            + " that is exact" * (command != "convert"),
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


def run(command: str, argv: Sequence[str]) -> None:
    """Run a tool with its arguments.

    Raises:
        UsageError, RunError: for people.
    """
    args = _parser(command).parse(argv)
    args.command = command
    before, stopped = signal.getsignal(signal.SIGTERM), []

    def stop(*_: object) -> NoReturn:
        stopped.append(True)
        sys.exit(143)  # so that nothing stays behind

    try:
        with suppress(ValueError):  # not in the main thread: nobody sends it a signal
            signal.signal(signal.SIGTERM, stop)
        _RUN[command](args)
    except (UsageError, RunError):
        if stopped:  # libraries turn what is raised within them into errors of their own
            sys.exit(143)
        raise
    finally:
        with suppress(ValueError):
            signal.signal(signal.SIGTERM, before)


def _bar(items: Iterable[T], total: int, label: str) -> Iterable[T]:
    from tqdm.auto import tqdm

    return tqdm(items, total=total, desc=label, leave=False, disable=None, dynamic_ncols=True)


def _skeleton(args: argparse.Namespace) -> Any:
    """The skeleton of --model; without one, of the --family that a file is held against."""
    from sd_lora.formats.checkpoints import Checkpoint
    from sd_lora.models.families import family_named
    from sd_lora.models.meta_pipeline import MetaPipeline

    family = family_named(args.family) if getattr(args, "family", None) else None
    if args.model is None:
        tool = args.command
        return MetaPipeline.of_family(family) if family and tool in ("inspect", "verify") else None
    path = Path(args.model).expanduser()
    name = str(path) if path.is_dir() else args.model
    meta_pipeline = (
        Checkpoint(path).meta_pipeline if path.is_file() else MetaPipeline.of_folder(name)
    )
    if family not in (None, meta_pipeline.family):
        raise UsageError(
            f"--model {args.model} is {meta_pipeline.family.label}, and --family says {args.family}"
        )
    return meta_pipeline


def _output(args: argparse.Namespace) -> Any:
    from sd_lora.formats.output import Output

    check, meta_pipeline = not args.no_verify, _skeleton(args)
    return Output(args.out, args.to, args.dtype, args.overwrite, check, meta_pipeline)


def _cut(args: argparse.Namespace, required: bool = False) -> Any:
    from sd_lora.formats.approximate import Cut

    given = (args.rank, args.conv_rank, args.energy, args.ratio)
    if not required and given == (None,) * 4:
        return None
    return Cut(*given)


def _base(args: argparse.Namespace, cut: object) -> Any:
    """The base model's weights, where a weight-decomposed delta may need them."""
    from sd_lora.formats.checkpoints import Checkpoint

    if cut is None or args.model is None or not Path(args.model).expanduser().exists():
        return None
    return Checkpoint(Path(args.model).expanduser(), args.variant)


def _weights(args: argparse.Namespace) -> list[float]:
    return [1.0] * len(args.files) if args.weights is None else args.weights


def _inspect(args: argparse.Namespace) -> None:
    from sd_lora.formats import inspect

    found = inspect.inspect(args.file, _skeleton(args), _bar)
    width = max(80, min(100, shutil.get_terminal_size((100, 24)).columns))
    print(found.as_json() if args.json else inspect.text(found, width))


def _verify(args: argparse.Namespace) -> None:
    from sd_lora.formats.family_of_file import family_of
    from sd_lora.formats.lora_file import open_lora
    from sd_lora.formats.verify import verify_file
    from sd_lora.models.meta_pipeline import MetaPipeline

    meta_pipeline = _skeleton(args)
    if meta_pipeline is None:
        meta_pipeline = MetaPipeline.of_family(family_of(open_lora(args.file), args.family))
    print(f"loading {args.file} into {meta_pipeline.source} …", file=sys.stderr)
    verified, wrong = verify_file(args.file, meta_pipeline)
    if verified is None:
        print(f"{args.file} can be read whole; diffusers has no loader for this kind of file")
        return
    if wrong:
        lines = [textwrap.shorten(line, 200, placeholder=" …") for line in wrong[:20]]
        shown = "\n  ".join(lines) + (f"\n  … and {len(wrong) - 20} more" * (len(wrong) > 20))
        raise RunError(
            f"diffusers does not load {args.file} as it is ({verified.modules} modules compared):"
            f'\n  {shown}\n`sd-lora convert "{args.file}" --to diffusers --out FILE` writes one '
            "that it does"
        )
    print(
        f"{args.file}: diffusers loads all {verified.modules} modules as they are (worst error "
        f"{verified.worst_error:.0e})"
    )


def _convert(args: argparse.Namespace) -> None:
    from sd_lora.formats import tools

    cut = _cut(args)
    result = tools.convert(
        args.file, _output(args), args.family, cut, _base(args, cut), args.drop_vectors, _bar
    )
    _say(result, args)


def _merge(args: argparse.Namespace) -> None:
    from sd_lora.formats.merge import BlockWeight, merge

    cut = _cut(args)
    blocks = [BlockWeight.parse(text) for text in args.blocks]
    output, base = _output(args), _base(args, cut)
    _say(merge(args.files, _weights(args), output, args.family, blocks, cut, base, _bar), args)


def _resize(args: argparse.Namespace) -> None:
    from sd_lora.formats import tools

    cut = _cut(args, required=True)
    _say(tools.resize(args.file, _output(args), cut, args.family, _base(args, cut), _bar), args)


def _extract(args: argparse.Namespace) -> None:
    from sd_lora.formats.checkpoints import Checkpoint
    from sd_lora.formats.extract import extract

    output, cut = _output(args), _cut(args, required=True)
    base, tuned = (Checkpoint(path, args.variant) for path in (args.base, args.tuned))
    components = tuple(args.components) if args.components else None
    if unknown := [c for c in components or () if c not in base.meta_pipeline.configs]:
        known = ", ".join(base.meta_pipeline.configs)
        hint = did_you_mean(unknown[0], base.meta_pipeline.configs)
        raise UsageError(f"{args.base} has no {unknown[0]!r}; components: {known}.{hint}")
    prediction = "v_prediction" if args.v_prediction else None
    _say(extract(base, tuned, output, cut, components, prediction, _bar), args)


def _bake(args: argparse.Namespace) -> None:
    from sd_lora.formats.bake import bake
    from sd_lora.formats.checkpoints import Checkpoint

    base = Checkpoint(args.base, args.variant)
    done = bake(base, args.files, _weights(args), args.out, args.dtype, args.overwrite, _bar)
    print(f"{done.path}: {done.changed} parameters of {base.family.label} changed")
    for note in done.notes:
        print(f"  note: {note}")


def _say(result: Any, args: argparse.Namespace) -> None:
    """Print a tool's file, its errors, and how to use the file."""
    from sd_lora.files import mib
    from sd_lora.formats.python_code import PipelineCode, loading_line

    written = result.written
    size = mib(written.path.stat().st_size)
    dtype = str(written.dtype)[6:]
    checked = "not verified"
    if written.verified is not None:
        checked = (
            f"verified: {written.verified.modules} modules load as they should (worst error "
            f"{written.verified.worst_error:.0e})"
        )
    print(f"{written.path}: {written.format.title}, {size}, {dtype}, {checked}")
    if result.losses:
        (component, name), worst = max(result.losses.items(), key=lambda item: item[1].error)
        ranks = list(result.ranks.values())
        print(
            f"  {len(ranks)} modules approximated, ranks {min(ranks)} to {max(ranks)}: error "
            f"‖ΔW − BA‖ / ‖ΔW‖ = {result.error:.3%}, at worst {worst.error:.3%} in {component} "
            f"{name}"
        )
    for note in [*written.notes, *result.notes]:
        print(f"  note: {note}")
    if use := written.format.use:
        print(f"  {use.format(file=written.path.name)}")
    else:
        base = args.model or "MODEL"
        code = PipelineCode(base, written.family.pipelines["text_to_image"])
        print("  in Python:", "", *code.lines([loading_line(written.path)], "a photo"), sep="\n")


_RUN: dict[str, Callable[[argparse.Namespace], None]] = {
    "inspect": _inspect,
    "verify": _verify,
    "convert": _convert,
    "merge": _merge,
    "resize": _resize,
    "extract": _extract,
    "bake": _bake,
}
