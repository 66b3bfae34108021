"""Write the answers in docs/translate.md from the configurations above them, and
docs/translations.md from the configurations of the tests.

python dev/write_translate_page.py           # writes them
python dev/write_translate_page.py --check   # compares; exit code 1 if they differ

A block of the page whose first line is a comment with a file's name is that file; a block of text
that begins with the same name is its translation's table.
"""

import argparse
import re
import sys
import tempfile
from pathlib import Path

from sd_lora.config.translate.read import peer_of, read
from sd_lora.config.translate.text import to_table
from sd_lora.config.translate.translation import Translation, translate

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "translate.md"
MORE = ROOT / "docs" / "translations.md"
CONFIGS = ROOT / "tests" / "config" / "translate" / "configs"
INPUT = re.compile(r"```(?:sh|json|yaml)\n(?:#|//) (\w+\.\w+)\n(.*?)```", re.DOTALL)
OUTPUT = re.compile(r"```text\n(\w+\.\w+)\n(.*?)```", re.DOTALL)


def translations(page: str, folder: Path) -> dict[str, Translation]:
    """Name of a file of the page → its translation; the files are written into a folder."""
    files = dict(INPUT.findall(page))
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    found = {}
    for name, _ in OUTPUT.findall(page):
        found[name] = translated(folder / name)
    return found


def translated(path: Path) -> Translation:
    """The translation of a file of another trainer."""
    settings = read([str(path)])
    return translate(
        peer_of(settings), settings.values, settings.folder, settings.fixed, settings.assumed
    )


def more() -> str:
    """The page of the tests' configurations: each with its table."""
    lines = [
        "# More translations",
        "",
        "Configurations written by hand after each trainer's documents, and the tables that",
        "`sd-lora translate` gives of them. Tests translate each, check it against images and a",
        "model, and train a step of one of each form. [translate.md](translate.md) explains the",
        "words. Written by `python dev/write_translate_page.py`.",
    ]
    for folder in sorted(path for path in CONFIGS.iterdir() if path.is_dir()):
        lines += ["", f"## {folder.name}"]
        for path in sorted(path for path in folder.glob("sd*") if path.suffix):
            place = path.relative_to(ROOT).as_posix()
            table = to_table(translated(path)).replace(f"{CONFIGS}/", "")
            lines += ["", f"[{path.name}](../{place})", "", "```text", table, "```"]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write or compare the page; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the page")
    args = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        found = translations(page, Path(folder))
    written = OUTPUT.sub(
        lambda match: f"```text\n{match[1]}\n{to_table(found[match[1]])}\n```", page
    )
    pages = {PAGE: written, MORE: more()}
    if args.check:
        old = [p for p, text in pages.items() if not p.exists() or p.read_text("utf-8") != text]
        print(f"differs: {', '.join(p.name for p in old)}" if old else "the same")
        return int(bool(old))
    for path, text in pages.items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
