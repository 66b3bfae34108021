"""The front door: `sd-lora <command>`. Imports are inside commands, so that help is quick."""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from errno import EINVAL
from typing import NoReturn

import sd_lora
from sd_lora.errors import RunError, UsageError, did_you_mean
from sd_lora.imports import quick_imports
from sd_lora.streams import encode_everything, quiet_imports

_HELP = f"""sd-lora {sd_lora.__version__}: Stable Diffusion LoRAs that load everywhere, exactly.

usage: sd-lora <command> [flags]

commands:
  train      train a LoRA on a folder of images
  check      look at every image and caption first: which are trained, which are not, and why
  caption    captions for images without one, by a model that you have on disk
  doctor     look at this machine: what trains here, what does not, why, and what to do
  presets    list options that suit a purpose: subject, character, style
  schema     print the options of train as a JSON schema, for editors and forms
  demo       teach the embedded base model a subject in a few minutes on a CPU
  translate  another trainer's file or command as a configuration: sd-scripts, OneTrainer, …

  studio     all of this on a web page of your own machine
  report     a page of a run, or of several side by side
  sample     images of a model with LoRA files: strength by prompt, file by file
  judge      how much a LoRA has learned of images, and at which strength it is best
  compare    does a change of a run's options help? short trainings with and without it
  export     the LoRA files of a run's checkpoint
  push       a finished run's files, with its model card, to the hub
  inspect    contents of a LoRA file, programs that load it, and its faults
  verify     load a LoRA file with diffusers and compare every module
  convert    from anybody's format to diffusers', kohya's or LyCORIS'
  merge      several LoRAs into one, exactly or at a lower rank
  resize     cut a LoRA to fewer ranks, with its error
  extract    the difference of two models as a LoRA
  bake       LoRAs into a model: a pipeline folder or a checkpoint

`sd-lora help <command>` explains each; `sd-lora demo` needs a clone of the project.
Begin with a folder of images of one subject:

  sd-lora train FOLDER --model MODEL --prompt "a photo of sks dog"
"""


LOADING = "loading torch and diffusers …"
"""Said before imports of several seconds, once flags and paths are known to be good."""


def _train(argv: Sequence[str], script: str | None = None) -> None:
    from sd_lora.config.command_line import parse_jobs
    from sd_lora.config.jobs import Job
    from sd_lora.data.check.places import check_jobs
    from sd_lora.data.sources.open import has_captions
    from sd_lora.training.checkpoint_folders import Found
    from sd_lora.training.output_folder import resumed_checkpoint

    jobs = parse_jobs(argv, script, script or "sd-lora train", has_captions)
    found: dict[str, Found] = {}

    def find(job: Job) -> None:
        found[job.name] = resumed_checkpoint(job.config)

    first = jobs[0].config
    with first.spelling.in_errors():
        check_jobs(jobs, find)
        for note in first.downloads:
            print(note, file=sys.stderr, flush=True)
        print(LOADING, file=sys.stderr, flush=True)
        with quick_imports():  # seconds, once flags and paths are known to be good
            from sd_lora.report.step_time import StepTimes
            from sd_lora.terminal import Terminal, Terminals
            from sd_lora.training.jobs.train import train_jobs
            from sd_lora.training.loop import train

        if jobs[0].name:
            with Terminals() as terminals:
                train_jobs(jobs, terminals.of, found, terminals).refuse()
            return
        with Terminal() as terminal:
            train(first, [terminal, StepTimes(first)], found[""])


def _check(argv: Sequence[str]) -> None:
    from sd_lora.commands import check

    check(argv)


def _doctor(argv: Sequence[str]) -> None:
    from sd_lora.commands import doctor

    doctor(argv)


def _schema(argv: Sequence[str]) -> None:
    import json

    from sd_lora.config.schema import json_schema

    if argv and argv[0] not in ("-h", "--help"):
        raise UsageError(f"sd-lora schema takes no arguments, and got {argv[0]!r}")
    print(json.dumps(json_schema(), indent=2) if not argv else _SCHEMA)


def _presets(argv: Sequence[str]) -> None:
    from sd_lora.config.presets import listing
    from sd_lora.config.rows import PRESETS

    if argv and (argv[0] in ("-h", "--help") or len(argv) > 1):
        print("usage: sd-lora presets [NAME]\n\nList the presets, or show one with its reasons.")
    elif argv and argv[0] not in PRESETS:
        raise UsageError(f"preset is one of {', '.join(PRESETS)}, not {argv[0]!r}")
    else:
        print(listing(*argv))


_SCHEMA = "usage: sd-lora schema\n\nPrint the JSON schema of a configuration: types, ranges, help."


def _demo(argv: Sequence[str]) -> None:
    from sd_lora.demo import main as demo

    demo(argv)


def _translate(argv: Sequence[str]) -> None:
    from sd_lora.config.translate.command import run

    toml, table = run(argv)
    print(toml, end="" if table else "\n")
    print(table, file=sys.stderr)


def _export(argv: Sequence[str]) -> None:
    from sd_lora.tool_flags import ToolParser, as_path

    parser = ToolParser(prog="sd-lora export", description=_EXPORT)
    parser.add_argument("checkpoint", type=as_path, help="a folder checkpoint-STEP of a run")
    parser.add_argument(
        "--out", type=as_path, help="folder to write (default: lora-STEP beside the checkpoint)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    parser.add_argument("--model", help="the base model (default: the run's, if it is there)")
    parser.add_argument(
        "--ema_length", type=float, metavar="SHARE",
        help="of a run with use_ema: a moving average of this length, made from the checkpoints "
        "beside it, the more the better",
    )  # fmt: skip
    args = parser.parse(argv)
    from sd_lora.report.summary import verified_files
    from sd_lora.training.export_checkpoint import export_checkpoint

    files, words = export_checkpoint(
        args.checkpoint, args.out, args.overwrite, args.model, args.ema_length
    )
    print(
        "\n".join([verified_files(files), *(f"  {path}  a new word, verified" for path in words)])
    )


_EXPORT = (
    "Write the LoRA files of a checkpoint, verified, as the run would have written them after that "
    "step."
)


def _push(argv: Sequence[str]) -> None:
    from sd_lora.tool_flags import ToolParser, as_path

    parser = ToolParser(prog="sd-lora push", description=_PUSH)
    parser.add_argument("folder", type=as_path, help="output folder of a finished run")
    own = "owner/name (default: the token's owner and the folder's name)"
    parser.add_argument("--repo", default="", metavar="REPO", help=own)
    private = "make it, if it is new, a private one"
    parser.add_argument("--private", action="store_true", help=private)
    parser.add_argument("--token", help="(default: that of HF_TOKEN or of `hf auth login`)")
    args = parser.parse(argv)
    from sd_lora.training.hub_push import push_folder

    print(f"on the hub: {push_folder(args.folder, args.repo, args.private, args.token)}")


_PUSH = (
    "Upload the LoRA files of a finished run, its model card README.md, and the images that the "
    "card shows. `train --push_to_hub` does it at the end of a run."
)


def _report(argv: Sequence[str]) -> None:
    from pathlib import Path

    from sd_lora.tool_flags import ToolParser, as_path

    parser = ToolParser(prog="sd-lora report", description=_REPORT)
    parser.add_argument("runs", type=as_path, nargs="+", help="output folders of runs")
    parser.add_argument(
        "--out", type=as_path,
        help="the page (default: report.html in the run's folder; of several runs, runs.html here)",
    )  # fmt: skip
    args = parser.parse(argv)
    from sd_lora.report.record import RECORD
    from sd_lora.report.run_page import PAGE, SEVERAL, write_page

    out = args.out or (args.runs[0] / PAGE if len(args.runs) == 1 else Path(SEVERAL))
    if len(args.runs) > 1 and out.name == PAGE and (out.parent / RECORD).is_file():
        raise UsageError(f"{out} is the page of the run in that folder: give another --out")
    write_page(args.runs, out)
    print(f"look at {out}")


_REPORT = (
    "Write the page of a run anew: samples, curves, changes, the way to use it; or of several runs "
    "side by side."
)


def _studio(argv: Sequence[str]) -> None:
    from pathlib import Path

    from sd_lora.errors import install_line
    from sd_lora.tool_flags import ToolParser, as_path

    parser = ToolParser(prog="sd-lora studio", description=_STUDIO)
    parser.add_argument(
        "folders", type=as_path, nargs="*", help="folders to open (default: the one you are in)"
    )
    parser.add_argument("--port", type=int, help="(default: 8470, or a free one)")
    local = "address to listen on; another one opens the page to your network (default: 127.0.0.1)"
    parser.add_argument("--host", default="127.0.0.1", help=local)
    parser.add_argument("--no_open", action="store_true", help="open no browser")
    args = parser.parse(argv)
    try:
        from sd_lora.studio.app import serve
    except ImportError as error:
        raise UsageError(f"the studio needs {error.name}: {install_line('studio')}") from None
    if absent := [str(path) for path in args.folders if not path.is_dir()]:
        raise UsageError(f"there is no folder {', '.join(absent)}")
    if args.port is not None and not 0 <= args.port < 2**16:
        raise UsageError(f"a port is from 0 to 65535, not {args.port}")
    folders = args.folders or [Path.cwd()]
    serve(args.host, args.port, not args.no_open, lambda text: print(text, flush=True), folders)


_STUDIO = (
    "Serve a web page on this machine alone, which trains, looks after runs and shows them. Runs "
    "are processes of their own: they go on when the page or the studio ends."
)


def _sample(argv: Sequence[str]) -> None:
    from sd_lora.config.sample_prompts import SamplePrompt, read_file
    from sd_lora.tool_flags import check_sheet, sample_parser

    args = sample_parser().parse(argv)
    prompts = [SamplePrompt(text) for text in args.prompt]
    prompts += read_file(args.prompts) if args.prompts else []
    if not prompts:
        raise UsageError("give a prompt: --prompt 'a photo of a cat'")
    check_sheet(args.out, args.overwrite)
    from sd_lora.folders import check_writable
    from sd_lora.hub import check_model_path

    if args.images:
        check_writable(args.images, "--images")
    check_model_path(args.model)
    if absent := [str(path) for path in (*args.lora, *args.beside) if not path.exists()]:
        raise UsageError(f"there is no LoRA file {', '.join(absent)}")
    print(LOADING, file=sys.stderr, flush=True)
    with quick_imports():
        from sd_lora.sample import run

    print(run(args, prompts))


def _judge(argv: Sequence[str]) -> None:
    from sd_lora.judging import judge

    judge(argv)


def _compare(argv: Sequence[str]) -> None:
    from sd_lora.judging import compare

    compare(argv)


def _caption(argv: Sequence[str]) -> None:
    from sd_lora.tool_flags import caption_parser

    args = caption_parser().parse(argv)
    if not args.folder.is_dir():
        raise UsageError(f"there is no folder {args.folder}")
    print(LOADING, file=sys.stderr, flush=True)
    with quick_imports():
        from sd_lora.caption import run

    print(run(args))


def _tool(name: str) -> Callable[[Sequence[str]], None]:
    def run(argv: Sequence[str]) -> None:
        from sd_lora import commands

        commands.run(name, argv)

    return run


_TOOLS = ("inspect", "verify", "convert", "merge", "resize", "extract", "bake")
_COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": _train,
    "check": _check,
    "caption": _caption,
    "doctor": _doctor,
    "presets": _presets,
    "schema": _schema,
    "demo": _demo,
    "translate": _translate,
    "studio": _studio,
    "report": _report,
    "sample": _sample,
    "judge": _judge,
    "compare": _compare,
    "export": _export,
    "push": _push,
    **{name: _tool(name) for name in _TOOLS},
}


def guarded(work: Callable[[], None]) -> int:
    """Run a command; returns its exit code: 0, 1 for a failure, 2 for a usage error, 3 for a run
    that was ended with its steps saved, 130 and 143 where SIGINT and SIGTERM ended it at once.

    The project's own errors are printed without a traceback: their texts name the remedy.
    """
    ended: list[int] = []

    def end(number: int, frame: object) -> NoReturn:
        ended.append(number)
        raise SystemExit(128 + number)  # so that nothing stays behind

    try:
        with handling(signal.SIGTERM, end):
            work()
    except SystemExit:
        if not ended:
            raise
    except (UsageError, RunError) as error:
        if not ended:  # libraries turn what is raised within them into errors of their own
            told = error.told
            if told is None:  # before the processes met: once a machine
                told = os.environ.get("LOCAL_RANK", "0") != "0"
            if not told:
                print(f"error: {error}", file=sys.stderr)
            return error.exit_code
    except KeyboardInterrupt:
        print("interrupted: ended at once; what was saved before is there", file=sys.stderr)
        return 130
    except OSError as error:  # the reader of the output, such as `head`, has closed it
        if not isinstance(error, BrokenPipeError) and (os.name, error.errno) != ("nt", EINVAL):
            raise  # Windows says EINVAL of a closed pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if ended:
        print("ended by SIGTERM", file=sys.stderr)
        return 128 + ended[0]
    return 0


@contextmanager
def handling(number: int, handler: Callable[[int, object], None]) -> Iterator[None]:
    """Handle a signal while the block runs; in the main thread, for nobody sends others one."""
    before = signal.getsignal(number)
    try:
        with suppress(ValueError):
            signal.signal(number, handler)
        yield
    finally:
        with suppress(ValueError):
            signal.signal(number, before)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    encode_everything()
    quiet_imports()
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["help"] and len(words) > 1:
        words = [words[1], "--help", *words[2:]]
    if words[1:] == ["help"] and not os.path.lexists("help"):
        words[1] = "--help"
    if not words or words[0] in ("-h", "--help", "help"):
        print(_HELP, end="")
        return 0 if words else 2
    if words[0] == "--version":
        print(sd_lora.__version__)
        return 0
    command = words[0]
    if command not in _COMMANDS:
        hint = did_you_mean(command, _COMMANDS)
        print(f"error: unknown command {command!r}.{hint} See sd-lora --help", file=sys.stderr)
        return 2
    return guarded(lambda: _COMMANDS[command](words[1:]))


def train_script(name: str) -> int:
    """Run one of the training scripts with the process's flags; returns the exit code."""
    encode_everything()
    quiet_imports()
    return guarded(lambda: _train(sys.argv[1:], name))
