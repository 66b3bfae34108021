"""`sd-lora translate`: another trainer's file or command → our TOML and a table."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from sd_lora.config.translate.peers import PEERS
from sd_lora.config.translate.read import peer_of, read
from sd_lora.config.translate.text import to_table, to_toml
from sd_lora.config.translate.translation import translate
from sd_lora.errors import UsageError
from sd_lora.files import write_whole

_ABOUT = (
    "Write the settings of another trainer as a configuration of sd-lora train, and say of each "
    "whether it is taken as it is, taken with another meaning, not needed, or not there."
)
_EXAMPLES = """FILE-or-COMMAND: JSON, TOML, YAML, a script with a command in it, or a command

examples:
  sd-lora translate --out my.toml accelerate launch sdxl_train_network.py --network_dim 32 …
  sd-lora translate --out my.toml config.json
  sd-lora translate train.sh > my.toml
then sd-lora train --config my.toml
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}. See {self.prog} --help")


def _parser() -> _Parser:
    parser = _Parser(
        prog="sd-lora translate",
        usage="sd-lora translate [--from TRAINER] [--out FILE] FILE-or-COMMAND",
        description=_ABOUT,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--from", dest="peer", choices=[*PEERS], help="the trainer (default: told by its names)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="the TOML (default: printed)")
    return parser


def _num_own(words: Sequence[str]) -> int:
    """Number of words at the beginning that are flags of ours with their values."""
    own = 0
    while own < len(words) and words[own].partition("=")[0] in ("--from", "--out", "-h", "--help"):
        own += 1 if "=" in words[own] or words[own] in ("-h", "--help") else 2
    return own


def run(argv: Sequence[str]) -> tuple[str, str]:
    """The texts for stdout and stderr: TOML and table, or the table alone with `--out`.

    Raises:
        UsageError: no settings, an unreadable file, or a file that is there already.
        RunError: a file that cannot be written.
    """
    own = _num_own(argv)
    words = list(argv[own:])
    if _num_own(words[1:]) >= len(words[1:]):  # a file, and nothing but flags of ours behind it
        argv, words = [*argv[:own], *words[1:]], words[:1]
        own = len(argv)
    args = _parser().parse_args(argv[:own])
    settings = read(words, args.peer)
    translation = translate(
        peer_of(settings), settings.values, settings.folder, settings.fixed, settings.assumed
    )
    source = Path(words[0]).name if len(words) == 1 and Path(words[0]).is_file() else "a command"
    toml, table = to_toml(translation, source), to_table(translation)
    if args.out is None:
        return toml, table
    if args.out.exists():
        raise UsageError(f"{args.out} is there already; give --out another name")
    write_whole(args.out, toml.encode())
    return f"{table}\n\nsd-lora train --config {args.out}", ""
