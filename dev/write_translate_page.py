"""Write the answers in docs/translate.md from the configurations above them.

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

PAGE = Path(__file__).parent.parent / "docs" / "translate.md"
INPUT = re.compile(r"```(?:sh|json|yaml)\n(?:#|//) (\w+\.\w+)\n(.*?)```", re.DOTALL)
OUTPUT = re.compile(r"```text\n(\w+\.\w+)\n(.*?)```", re.DOTALL)


def translations(page: str, folder: Path) -> dict[str, Translation]:
    """Name of a file of the page → its translation; the files are written into a folder."""
    files = dict(INPUT.findall(page))
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    found = {}
    for name, _ in OUTPUT.findall(page):
        settings = read([str(folder / name)])
        found[name] = translate(
            peer_of(settings), settings.values, settings.folder, settings.fixed, settings.assumed
        )
    return found


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
    if args.check:
        print("the same" if page == written else "docs/translate.md differs from the translations")
        return int(page != written)
    PAGE.write_text(written, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
