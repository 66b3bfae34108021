"""The command lines of `sd-lora judge` and `sd-lora compare`."""

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from sd_lora.errors import UsageError


def judge(argv: Sequence[str]) -> None:
    """Run `sd-lora judge`, with its own flags and those of `train`."""
    from sd_lora.tool_flags import check_sheet, judge_parser, measuring

    args, rest = judge_parser().parse_known_args(argv)
    if absent := [str(path) for path in args.files if not path.exists()]:
        raise UsageError(f"there is no LoRA file {', '.join(absent)}")
    if args.class_prompt and not args.features:
        raise UsageError("--class_prompt is of images that are drawn: give --features as well")
    if args.features:
        check_sheet(args.out, args.overwrite)
    from sd_lora.config.command_line import parse
    from sd_lora.data.check.places import check_places
    from sd_lora.data.sources.open import has_captions
    from sd_lora.formats.lora_file import open_lora
    from sd_lora.imports import quick_imports

    adapted = {component for path in args.files for component in open_lora(path).adapter}
    options = measuring(bool(adapted - {"unet"})).items()
    words = [args.images, "--model", args.model, *rest]
    words += [word for name, value in options for word in _flag(name, value)]
    words += ["--prompt", args.prompt] * bool(args.prompt)
    words += ["--num_validation_images", "1" if args.features else "0"]  # keeps text encoders
    with tempfile.TemporaryDirectory(prefix="sd-lora-judge-") as folder:
        words += ["--output_dir", str(Path(folder) / "run")]
        config = parse(words, prog="sd-lora judge", has_captions=has_captions)
        with config.spelling.in_errors():
            check_places(config)
        for note in config.downloads:
            print(note, file=sys.stderr, flush=True)
        with quick_imports():
            from sd_lora import judge as of_files
            from sd_lora.report.strengths import lines
            from sd_lora.sampling.features import load_features
            from sd_lora.terminal import Terminal

        features = load_features(args.features) if args.features else None
        with Terminal() as terminal:
            found, sheet = of_files.judge(
                args.files,
                config,
                args.strengths,
                features,
                args.class_prompt,
                args.kind,
                [terminal],
            )
    if args.json:
        print(json.dumps([one.numbers() for one in found], indent=2))
    else:
        print("\n".join(lines(found)))
    if sheet:
        sheet.write(args.out)
        if not args.json:
            print(f"look at {args.out}")


def _flag(name: str, value: object) -> list[str]:
    """The words of a flag; none for a switch that is off."""
    if isinstance(value, bool):
        return [f"--{name}"] if value else []
    return [f"--{name}", str(value)]


def compare(argv: Sequence[str]) -> None:
    """Run `sd-lora compare`, with its own flags and those of `train`."""
    from sd_lora.tool_flags import compare_parser

    args, rest = compare_parser().parse_known_args(argv)
    from sd_lora.config.command_line import parse
    from sd_lora.data.check.places import check_places
    from sd_lora.data.sources.open import has_captions
    from sd_lora.imports import quick_imports
    from sd_lora.report.record import read_record

    record = read_record(args.run)
    given = ["--config", str(args.run / "config.json")]
    with tempfile.TemporaryDirectory(prefix="sd-lora-compare-") as folder:
        given += ["--output_dir", str(Path(folder) / "run")]
        before, after = (
            parse(words, prog="sd-lora compare", has_captions=has_captions)
            for words in (given, [*given, *rest])
        )
        with after.spelling.in_errors():
            check_places(after)
    with quick_imports():
        from sd_lora import compare as of_runs
        from sd_lora.terminal import Terminal

    steps = of_runs.steps_of(args.run, args.steps, record)
    with Terminal() as terminal:
        found = of_runs.compare(before, after, steps, args.seeds, [terminal])
    print(json.dumps(found.numbers(), indent=2) if args.json else "\n".join(found.lines()))
