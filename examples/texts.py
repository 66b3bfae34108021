"""Texts that every machine with this project has: the sources of installed Python libraries."""

import ast
import importlib.util
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

_SKIPPED = {
    "site-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
}  # not prose, or not installed everywhere


def sources(library: str, seed: int) -> Iterator[ast.Module]:
    """Yields a library's files in a shuffled order, read and not imported; "python" is the
    standard library."""
    if library == "python":
        folder = Path(sysconfig.get_paths()["stdlib"])
    else:
        spec = importlib.util.find_spec(library)
        if spec is None or spec.origin is None:
            raise SystemExit(f"{library} is not installed: pip install {library}")
        folder = Path(spec.origin).parent
    names = sorted(path.relative_to(folder) for path in folder.rglob("*.py"))
    names = [name for name in names if not _SKIPPED.intersection(name.parts)]
    random.Random(f"{seed} {library}").shuffle(names)
    for name in names:
        try:
            yield ast.parse((folder / name).read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):  # meant for another Python
            continue


def docstrings(node: ast.Module | ast.ClassDef | ast.FunctionDef) -> Iterator[str]:
    """Yields the docstrings of a module, its classes and functions, outermost first."""
    text = ast.get_docstring(node)
    if text:
        yield text
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef):
            yield from docstrings(child)
