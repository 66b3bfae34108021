"""In how many files is each option named? The fewer, the easier to add, rename or remove one.

    python dev/count_options.py    # option, files; then medians, by file and with config/ as one

A file names an option where it reads it off a configuration (`config.rank`), declares its row, or
has its name in a text of the program (docstrings are none): as `--rank`, or, in the rooms that know
options, as a word with an underscore (rank, seed and mode mean other things too). The rooms below
config/ have names of their own, some of which are the same (`rank_dropout` of an adapted layer,
`cache_dir` of a model), and so have the tools (`sd-lora resize --rank`): these are no options. A
name built at run time, such as `f"{component}_rank"`, names none.
"""

import ast
import re
import statistics
from pathlib import Path

from sd_lora.config.schema import OPTIONS

ROOT = Path(__file__).parent.parent / "sd_lora"
CONFIGS = re.compile(r"(.*_)?(config|resolved|self)")
"""Names of variables and attributes that hold a configuration; self: in config/schema.py alone."""


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
    if path.name == "commands.py" or path.parent.name == "formats":  # the tools' own flags
        return named
    in_schema = path.name == "schema.py"
    knows = path.relative_to(ROOT).parts[0] in KNOW_OPTIONS
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documents = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)
    }  # docstrings
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in OPTIONS:
            holder = node.value
            last = getattr(holder, "attr", getattr(holder, "id", ""))
            if CONFIGS.fullmatch(last) and (last != "self" or in_schema):
                named.add(node.attr)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call):
            if getattr(node.value.func, "id", "") == "option":
                named.add(getattr(node.target, "id", ""))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in documents:
                named |= _in_text(node.value, knows)
    return named & OPTIONS.keys()


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
    places = [len({place_of(file) for file in files}) for files in found.values()]
    above = sum(count > 4 for count in places)
    print(
        f"with config/ as one place: median {statistics.median(places):g}, most {max(places)}, "
        f"{above} of {len(places)} above 4"
    )


def place_of(file: str) -> str:
    """A file, or config/ for all of its files: the row, its contradictions, the command line."""
    return "config/" if file.startswith("sd_lora/config/") else file


if __name__ == "__main__":
    main()
