"""The flags of the options and their help, as argparse has them."""

import argparse
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from sd_lora.config.options.run import named_after
from sd_lora.config.presets import OF_MODE, preset
from sd_lora.config.rows import Mode, Option
from sd_lora.config.schema import OPTIONS, SECTIONS
from sd_lora.errors import UsageError

DESCRIPTION = (
    "Train a Stable Diffusion LoRA: attention and convolutions, UNet and text encoder.\n"
    "Flags may be shortened to a unique prefix."
)


def is_flag(word: str) -> bool:
    """Whether a word of a command line is a flag, and not a value such as -0.5."""
    return word.startswith("-") and not re.match(r"-\.?\d", word)


class _Help(argparse.HelpFormatter):
    """Help whose usage and last lines are as they are written, and whose metavars are short."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text

    def _format_action_invocation(self, action: argparse.Action) -> str:
        flags = ", ".join(f for f in action.option_strings if not f.startswith("--no-"))
        metavar = action.metavar if action.nargs != 0 else None
        return f"{flags} {metavar}" if metavar else flags


class _BriefHelp(_Help):
    """Help of one screen: a line a flag, by its first name."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        metavar = "" if action.nargs == 0 else str(action.metavar).partition("{")[0] or "NAME"
        return f"{action.option_strings[0]} {metavar}".rstrip()


class Parser(argparse.ArgumentParser):
    """A parser that raises UsageError, and keeps by which of its flags an option was given.

    given: option → its flags, in order.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.given: dict[str, list[str]] = {}

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


class _Keep(argparse.Action):
    """Store a value, and keep its flag."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, flag: str | None = None
    ) -> None:
        parser.given.setdefault(self.dest, []).append(flag)
        setattr(namespace, self.dest, values)


class _KeepSwitch(argparse.BooleanOptionalAction):
    """Store whether a switch is on, and keep its flag."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, flag: str | None = None
    ) -> None:
        parser.given.setdefault(self.dest, []).append(flag)
        super().__call__(parser, namespace, values, flag)


USAGE = """%(prog)s FOLDER --model MODEL [--prompt PROMPT] [flags]
       %(prog)s --config FILE [flags]"""

EPILOG = """FOLDER is enough: with --prompt it is one subject, learned by DreamBooth; without, its
images have captions (.txt beside them, metadata.jsonl or .csv, folders named 10_sks dog).
--preset is subject then, or style, unless another is given (sd-lora presets).

more: --help SECTION ({sections}), --help all
in a file: any flag by its long name, --config my.toml"""


def build_parser(
    mode: Mode | None = None,
    prog: str | None = None,
    xl: bool = False,
    page: str = "all",
    about: str = DESCRIPTION,
    usage: str = USAGE,
) -> Parser:
    """The parser of all flags, which leaves their values as texts.

    Args:
        mode: the one whose flags the help shows; None for both.
        prog: the program's name.
        xl: whether the help shows SDXL's defaults.
        page: of the help: "main", a section, or "all".
        about, usage: the program's description, and its forms, for both modes.
    """
    parser = Parser(
        prog=prog, argument_default=argparse.SUPPRESS, description=about, add_help=False,
        usage="%(prog)s [flags]" if mode else usage,
        epilog=EPILOG.format(sections=", ".join(SECTIONS)) if page == "main" else None,
        formatter_class=_BriefHelp if page == "main" else _Help,
    )  # fmt: skip
    if mode is None:
        parser.add_argument(
            "--data", dest="folder", metavar="FOLDER", action=_Keep, help="the same as FOLDER"
        )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="TOML or JSON file with any of the options below, or [[jobs]]",
    )
    main = page == "main"
    groups = {name: parser if main else parser.add_argument_group(name) for name in SECTIONS}
    for name, option in OPTIONS.items():
        if option.kind == "list" or (name == "mode" and mode):
            continue  # tables are in files alone; a script has its mode
        if mode and option.only not in (None, mode):
            continue  # so that prefixes are as unique as in the script of this mode
        shown = page in ("all", option.section) or (main and option.main)
        argument = _argument(option, mode, xl)
        hidden = argument | {"help": argparse.SUPPRESS}
        flags = [f"--{option.short}"] * bool(option.short) + [f"--{name}"]
        row = (argument | {"help": _brief_help(option)} if main else argument) if shown else hidden
        groups[option.section].add_argument(*flags, dest=name, **row)
        if option.formerly:
            switch = {"action": _KeepSwitch, "help": argparse.SUPPRESS}
            former: dict[str, Any] = switch if option.former_values else hidden
            groups[option.section].add_argument(f"--{option.formerly}", **former)
    return parser


def _argument(option: Option, mode: Mode | None, xl: bool) -> dict[str, Any]:
    """The arguments of `add_argument` for an option."""
    text = _help(option, mode, xl)
    if option.kind == "bool":
        return {"action": _KeepSwitch, "help": text}
    keep: dict[str, Any] = {"action": _Keep, "help": text}
    if option.kind == "dict":
        metavar = "KEY=VALUE" if option.item == "value" else "PATTERN=N"
        return keep | {"nargs": "+", "metavar": metavar}
    if option.kind == "ints":
        return keep | {"nargs": "+", "metavar": "N"}
    metavar = {"int": "N", "steps": "N", "float": "X", "str": "TEXT"}[option.kind]
    if option.choices:
        metavar = "{" + ",".join(option.choices) + "}"
    if option.without_value:
        return keep | {"nargs": "?", "const": option.without_value, "metavar": metavar}
    return keep | {"metavar": metavar}


def _help(option: Option, mode: Mode | None, xl: bool) -> str:
    """Help of an option, with its default."""
    if mode in option.of_scripts:
        return f"{option.help.replace('%', '%%')} (default: {option.of_scripts[mode]})"
    modes = [mode] if mode else [*option.modes]
    words = [
        f"{value}" + f" ({name})" * (not mode)
        for name in modes
        if (value := option.default_for(name, xl)) is not None
    ]
    if not xl:
        words += [f"{v} ({name}, SDXL)" for name, v in option.sdxl.items() if name in modes]
    default = " / ".join(words) if option.modes else option.default
    text = option.help.replace("%", "%%")
    return text if default in (None, False, "") else f"{text} (default: {default})"


def _brief_help(option: Option) -> str:
    """Help of an option on the first page, with its default for a folder given alone."""
    values = []
    for mode in ("dreambooth", "text_to_image"):
        of_purpose = preset(OF_MODE[mode])
        values.append(
            (of_purpose.options | of_purpose.sd | named_after("FOLDER")).get(
                option.name, option.default_for(mode)
            )
        )
    names = {True: "on", False: "off"}
    subject, captioned = (names[v] if isinstance(v, bool) else v for v in values)
    text = option.main.replace("%", "%%")
    if subject == captioned:
        return text if subject in (None, "") else f"{text} (default: {subject})"
    return f"{text} (default: {subject} with --prompt, else {captioned})"


def show_help(
    argv: Sequence[str],
    mode: Mode | None,
    prog: str | None,
    xl: bool,
    about: str = DESCRIPTION,
    usage: str = USAGE,
    own: Callable[[argparse.ArgumentParser], object] = lambda parser: None,
) -> None:
    """Print a page of the help and exit, if a command line asks for one: "--help data".

    about, usage, own: description and forms of a program, and a function that adds its own flags,
        for the first page.
    """
    words = [word for word in argv if word in ("-h", "--help")]
    if not words:
        return
    page = next(iter(argv[argv.index(words[0]) + 1 :]), "all" if mode else "main")
    if page not in ("main", "all", *SECTIONS):
        raise UsageError(f"--help {page}: sections are {', '.join(SECTIONS)}, and all")
    parser = build_parser(mode, prog, xl, page, about, usage)
    if page == "main":
        own(parser)
    parser.print_help()
    raise SystemExit(0)
