"""The tools' command lines: `sd-lora inspect`, `verify`, `convert`, `merge`, …"""

import argparse
import json
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sd_lora.errors import RunError, UsageError, did_you_mean
from sd_lora.tool_flags import ToolParser, as_path, tool_parser

if TYPE_CHECKING:
    from sd_lora.check import Checked
    from sd_lora.config.jobs import Job

T = TypeVar("T")


def check(argv: Sequence[str]) -> None:
    """Run `sd-lora check`, with the flags of `train` and its own."""
    from sd_lora.config.flags import USAGE, show_help

    parser = ToolParser(prog="sd-lora check", add_help=False)
    _add_check_flags(parser)
    usage = USAGE.replace("--model MODEL", "[--model MODEL]")
    show_help(argv, None, parser.prog, False, _CHECK, usage, _add_check_flags)
    args, rest = parser.parse_known_args(argv)
    if args.page and args.no_page:
        raise UsageError("--page and --no_page contradict each other")
    if args.num_processes < 1:
        raise UsageError(f"num_processes must be at least 1, not {args.num_processes}")
    from sd_lora.config.command_line import parse_jobs
    from sd_lora.data.check.places import check_jobs
    from sd_lora.data.sources.open import has_captions

    jobs = parse_jobs(rest, None, "sd-lora check", has_captions, for_check=True)
    if args.card and jobs[0].name:
        raise UsageError("--card predicts one run, and the file has [[jobs]]: check one by itself")
    with jobs[0].config.spelling.in_errors():
        check_jobs(jobs)
        for note in jobs[0].config.downloads:
            print(note, file=sys.stderr, flush=True)
        found = {job.name: _check(job, args) for job in jobs}
        if args.json:
            _print_json(found)
        _refuse_strict(jobs, found)


def _print_json(found: "Mapping[str, Checked]") -> None:
    """Print everything of a check; of several jobs, by name."""
    from sd_lora.check import as_json

    one = found.get("")
    of_jobs = {name: json.loads(as_json(checked)) for name, checked in found.items()}
    print(as_json(one) if one else json.dumps({"jobs": of_jobs}, indent=2))


def _refuse_strict(jobs: "Sequence[Job]", found: "Mapping[str, Checked]") -> None:
    """Raise RunError for the findings of strict runs."""
    from sd_lora.data.check.usable import refuse_problems

    for job in jobs:
        if job.config.strict:
            refuse_problems(found[job.name].images.findings)


def _check(job: "Job", args: argparse.Namespace) -> "Checked":
    """Check the data of a configuration; print it, but for --json, and write its page."""
    from sd_lora.imports import quick_imports

    with quick_imports():
        from sd_lora import check as data_check
        from sd_lora.data.check.page import findings_as_json
        from sd_lora.data.check.usable import NoUsableImages
        from sd_lora.terminal import Terminal
        from sd_lora.training.cards import card_named

    card = card_named(args.card) if args.card else None
    page = args.page or (None if args.no_page or args.json else Path("check.html"))
    if page and job.name:
        page = page.with_stem(f"{page.stem}-{job.name}")
    try:
        with Terminal() as terminal:
            checked = data_check.check(
                job.config, args.num_processes, page is not None, [terminal], card
            )
    except NoUsableImages as error:
        if args.json:
            verdict = {"verdict": "no image can be trained", "images": []}
            print(json.dumps(verdict | findings_as_json(error.findings), indent=2))
        raise
    if not args.json:
        of_job = f" of job {job.name}" * bool(job.name)
        print(f"sd_lora check{of_job}:\n{data_check.lines(checked)}\n  {checked.verdict}")
    if page:
        data_check.write(checked, page)
        if not args.json:
            print(f"  look at {page}")
    return checked


_CHECK = """Look at everything that a run would train on, before it starts: decode every image,
count every caption's tokens, say which shape each is trained in and what is cut away, and
how many steps that makes. Nothing is changed.

Exit codes: 0: the run can start; 1: no usable image, or --strict and an image is left out or
warned of; 2: wrong flags."""


def _add_check_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `sd-lora check` alone."""
    group = parser.add_argument_group("of check alone")
    group.add_argument("--json", action="store_true", help="everything, for scripts")
    page = "the page (default: check.html)"
    group.add_argument("--page", type=as_path, metavar="FILE", help=page)
    group.add_argument("--no_page", action="store_true", help="no page")
    card = (
        'predict memory and time of a step on this card, such as "RTX 3060 12GB", 8GB for any of '
        "this size, or here for the one of this machine; and the flags with which it fits"
    )
    group.add_argument("--card", metavar="NAME", help=card)
    processes = "that will train (default: 1)"
    group.add_argument("--num_processes", type=int, default=1, metavar="N", help=processes)


_DOCTOR = """Look at this machine: the device that would train, its driver, the precisions and
kinds of attention that run on it, libraries, extras, CPU, memory and disks; what fails, why, and
what to do. It also compares the last run's time of a step with that of the run before.

Exit codes: 0: a training can run here; 1: none can."""


def doctor(argv: Sequence[str]) -> None:
    """Run `sd-lora doctor`.

    Raises:
        RunError: no training can run on this machine.
    """
    parser = ToolParser(
        prog="sd-lora doctor", description=_DOCTOR,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="everything, for scripts")
    args = parser.parse(argv)
    from sd_lora.doctor import table
    from sd_lora.imports import quick_imports

    with quick_imports():
        parts = table.examine()
    print(table.as_json(parts) if args.json else table.lines(parts))
    if not table.can_train(parts):
        raise RunError(table.verdict(parts))


def run(command: str, argv: Sequence[str]) -> None:
    """Run a tool with its arguments.

    Raises:
        UsageError, RunError: for people.
    """
    args = tool_parser(command).parse(argv)
    args.command = command
    _RUN[command](args)


def _bar(items: Iterable[T], total: int, label: str) -> Iterable[T]:
    from tqdm.auto import tqdm

    return tqdm(items, total=total, desc=label, leave=False, disable=None, dynamic_ncols=True)


def _skeleton(args: argparse.Namespace) -> Any:
    """The skeleton of --model; without one, of the --family that a file is held against."""
    from sd_lora.models.families import family_named
    from sd_lora.models.meta_pipeline import MetaPipeline

    family = family_named(args.family) if getattr(args, "family", None) else None
    if args.model is None:
        tool = args.command
        return MetaPipeline.of_family(family) if family and tool in ("inspect", "verify") else None
    from sd_lora.formats.checkpoints import Checkpoint
    from sd_lora.hub import check_hub_id, check_model_path

    path = Path(args.model).expanduser()
    name = str(path) if path.is_dir() else args.model
    if not path.exists():
        check_model_path(name)
        if note := check_hub_id(name, ("unet/config.json",)):
            print(note, file=sys.stderr, flush=True)
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


def _base(args: argparse.Namespace) -> Any:
    """The base model's weights, which some deltas need; None without a model here."""
    if args.model is None or not Path(args.model).expanduser().exists():
        return None
    from sd_lora.formats.checkpoints import Checkpoint

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
    from sd_lora.formats.verify import published_for, verify_file

    meta_pipeline = _skeleton(args)
    if args.model is None:
        lora = open_lora(args.file)
        meta_pipeline = published_for(lora.adapter, family_of(lora, args.family))
    print(f"loading {args.file} into {meta_pipeline.source} …", file=sys.stderr)
    verified, wrong = verify_file(args.file, meta_pipeline, is_given=args.model is not None)
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
        f"{args.file}: diffusers loads all {verified.modules} modules as they are "
        f"({verified.error_text})"
    )


def _convert(args: argparse.Namespace) -> None:
    from sd_lora.formats import tools

    cut = _cut(args)
    result = tools.convert(
        args.file, _output(args), args.family, cut, _base(args), args.drop_vectors, _bar
    )
    _say(result, args)


def _merge(args: argparse.Namespace) -> None:
    from sd_lora.formats.merge import BlockWeight, merge

    cut = _cut(args)
    blocks = [BlockWeight.parse(text) for text in args.blocks]
    output, base = _output(args), _base(args)
    _say(merge(args.files, _weights(args), output, args.family, blocks, cut, base, _bar), args)


def _resize(args: argparse.Namespace) -> None:
    from sd_lora.formats import tools

    mean_rank, output, base = args.mean_rank, _output(args), _base(args)
    cut = _cut(args, required=mean_rank is None)
    _say(tools.resize(args.file, output, cut, args.family, base, _bar, mean_rank), args)


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
    how = (args.dtype, args.overwrite, _bar, args.rounding)
    done = bake(base, args.files, _weights(args), args.out, *how)
    print(f"{done.path}: {done.changed} parameters of {base.family.label} changed, {done.kept}")
    for note in done.notes:
        print(f"  note: {note}")


def _say(result: Any, args: argparse.Namespace) -> None:
    """Print a tool's file, its errors, and how to use the file."""
    import torch

    from sd_lora.files import mib
    from sd_lora.formats.python_code import PipelineCode, loading_line

    written = result.written
    size = mib(written.path.stat().st_size)
    dtype = str(written.dtype)[6:]
    checked = "not verified"
    if written.verified is not None:
        checked = (
            f"verified: {written.verified.modules} modules load as they should "
            f"({written.verified.error_text})"
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
    if use := written.format.how_to_use(written.path, "a photo"):
        print(f"  {use}")
    else:
        base = args.model or "MODEL"
        of_file = written.family.pipelines["text_to_image"]
        code = PipelineCode(base, of_file, gpu=torch.cuda.is_available())
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
