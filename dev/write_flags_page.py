"""Write the tables of options and optimisers in docs/flags.md from their rows.

python dev/write_flags_page.py           # writes them
python dev/write_flags_page.py --check   # compares; exit code 1 if they differ
"""

import argparse
import sys
from pathlib import Path

from sd_lora.config.optimizers import OPTIMIZERS
from sd_lora.config.rows import PEERS, Option
from sd_lora.config.schema import OPTIONS, SECTIONS
from sd_lora.training.optimizer_rows import OPTIMIZERS as BUILT

PAGE = Path(__file__).parent.parent / "docs" / "flags.md"
START, END = "<!-- options: start -->\n", "<!-- options: end -->\n"
TITLES = ("diffusers", "sd-scripts", "OneTrainer", "ai-toolkit", "SimpleTuner")


def default_of(option: Option) -> str:
    """The default in words: captioned / DreamBooth where it differs, SDXL's in brackets."""
    values = [*option.modes.values()] if option.modes else [option.default]
    words = " / ".join("–" if value is None else _shown(value) for value in values)
    sdxl = [f"{mode}: {_shown(value)}" for mode, value in option.sdxl.items()]
    return words + f" (SDXL {', '.join(sdxl)})" * bool(sdxl)


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"`{value}`" if isinstance(value, str) else f"{value}"


def range_of(option: Option) -> str:
    """Choices or range; empty if there are none."""
    path = ", `package.module.Class`" * option.or_import_path
    return ", ".join(f"`{c}`" for c in option.choices) + path or option.range_text()


def tables() -> str:
    """All tables, a section each."""
    lines: list[str] = []
    for section in SECTIONS:
        lines += [f"### {section}", ""]
        lines += [f"| option | meaning | range | default | {' | '.join(TITLES)} |"]
        lines += ["|---|---|---|---|" + "---|" * len(TITLES)]
        for name, option in OPTIONS.items():
            if option.section == section:
                peers = [f"`{n}`" if (n := option.names.get(p)) else "" for p in PEERS]
                help = option.help.replace("|", "\\|")
                cells = [f"`--{name}`", help, range_of(option), default_of(option), *peers]
                lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join([*lines, *optimizer_table(), ""]) + "\n"


def optimizer_table() -> list[str]:
    """Lines of the table of optimisers, with their names elsewhere."""
    head = ["optimiser", "bytes of state a parameter", "arguments", "extra", *TITLES]
    lines = ["### optimisers", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, facts in OPTIMIZERS.items():
        extra = f"`{facts.package[1]}`" if facts.package else ""
        args = ", ".join(f"`{arg}`" for arg in facts.args)
        peers = [", ".join(f"`{n}`" for n in facts.names.get(p, ())) for p in PEERS]
        cells = [f"`{name}`", f"{BUILT[name].state_bytes:g}", args, extra, *peers]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> int:
    """Write or compare the page; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the page")
    args = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    written = before + START + tables() + END + after
    if args.check:
        print("the same" if page == written else "docs/flags.md differs from the rows")
        return int(page != written)
    PAGE.write_text(written, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
