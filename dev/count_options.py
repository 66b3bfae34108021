"""In how many files is each option named? The fewer, the easier to add, rename or remove one.

    python dev/count_options.py    # options with their files; then the median number of files

A file names an option where it reads it off a configuration (`config.rank`), declares its row, or
has its name in a text of the program: as `--rank`, or, in the rooms that know
options, as a word with an underscore (rank, seed and mode mean other things too). The rooms below
config/ have names of their own, some of which are the same (`rank_dropout` of an adapted layer,
`cache_dir` of a model), and so have the tools (`sd-lora resize --rank`): these are no options, and
neither are docstrings, diffusers' `scheduler.config.prediction_type`, and a row's names at peers
(`onetrainer="cache_dir"`) or in config/translate/. A name built at run time, `f"{component}_rank"`,
names none.
"""

import ast
import re
import statistics
from pathlib import Path

from sd_lora.config.rows import PEERS
from sd_lora.config.schema import OPTIONS

ROOT = Path(__file__).parent.parent / "sd_lora"
CONFIGS = re.compile(r"(.*_)?(config|resolved|self)")
"""Names of variables and attributes that hold a configuration; self: in its own classes alone."""

FOREIGN = ("scheduler", "unet", "vae")
"""Models of diffusers, which have a `config` of their own."""


def files_of_options() -> dict[str, list[str]]:
    """Option → files under sd_lora/ that name it."""
    found: dict[str, list[str]] = {name: [] for name in OPTIONS}
    for path in sorted(ROOT.rglob("*.py")):
        for name in options_of(path):
            found[name].append(str(path.relative_to(ROOT.parent)))
    return found


KNOW_OPTIONS = (
    "config",
    "data",
    "training",
    "report",
    "check.py",
    "cli.py",
    "commands.py",
    "demo.py",
)
"""Rooms and files that know options."""


def options_of(path: Path) -> set[str]:
    """Options that a file names."""
    named: set[str] = set()
    # the tools' own flags; other trainers' names
    tools, others = ("commands.py", "judging.py", "tool_flags.py"), ("formats", "translate")
    if path.name in tools or path.parent.name in others:
        return named
    own_class = path.name == "schema.py" or path.parent.name == "options"
    knows = path.relative_to(ROOT).parts[0] in KNOW_OPTIONS
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = [*ast.walk(tree)]
    left_out = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}  # docstrings
    left_out |= {id(n.value) for n in nodes if isinstance(n, ast.keyword) and n.arg in PEERS}
    for node in nodes:
        if isinstance(node, ast.Attribute) and node.attr in OPTIONS:
            last, before = _name(node.value), _name(getattr(node.value, "value", None))
            of_run = CONFIGS.fullmatch(last) and before not in FOREIGN
            if of_run and (last != "self" or own_class):
                named.add(node.attr)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call):
            if getattr(node.value.func, "id", "") == "option":
                named.add(getattr(node.target, "id", ""))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in left_out:
                named |= _in_text(node.value, knows)
    return named & OPTIONS.keys()


def _name(node: object) -> str:
    """Last part of a variable or attribute: "config" of `run.config`."""
    return getattr(node, "attr", getattr(node, "id", ""))


def _in_text(text: str, knows: bool) -> set[str]:
    words = set(re.findall(r"[a-z0-9_]+", text))
    flags = set(re.findall(r"--(?:no-)?([a-z0-9_]+)", text))
    if not knows:
        return flags & OPTIONS.keys()
    return {n for n in OPTIONS if n in flags or ("_" in n and n in words)}


def main() -> None:
    """Print each option with its files, and the median."""
    found = files_of_options()
    for name, files in sorted(found.items(), key=lambda item: -len(item[1])):
        print(f"{len(files)}  {name}: {', '.join(files)}")
    counts = [len(files) for files in found.values()]
    print(f"by file: median {statistics.median(counts):g}, most {max(counts)}")


if __name__ == "__main__":
    main()
