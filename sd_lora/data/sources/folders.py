"""What lies in a folder tree: every file once, in an order that no file system decides."""

import os
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from sd_lora.data.images.decode import EXTENSIONS
from sd_lora.data.sources.samples import shown
from sd_lora.errors import UsageError
from sd_lora.findings import Finding, Level

JUNK = ("thumbs.db", "desktop.ini", "__macosx")
"""What systems leave in folders, beside the names that start with a dot; in lower case."""


@dataclass
class Tree:
    """files: all that are not hidden, by path. folders: those directly below that were not read.

    hidden: names of what is hidden. findings: of links and of folders.
    """

    files: list[Path] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def images(self) -> list[Path]:
        return [path for path in self.files if looks_like_image(path)]


def looks_like_image(path: Path) -> bool:
    return path.suffix.lower() in EXTENSIONS


def names(items: list[str]) -> str:
    """Returns the first five names, and how many more there are."""
    return ", ".join(items[:5]) + (f" and {len(items) - 5} more" if len(items) > 5 else "")


def existing_folder(path: str, what: str) -> Path:
    """Returns a folder that is there; `what` is the name of the setting that says it.

    Raises:
        UsageError: it is not there, is a file, or may not be read.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        kind = "is a file, not a folder" if folder.exists() else "does not exist"
        raise UsageError(f"{what} {path} {kind}")
    try:
        os.scandir(folder).close()
    except OSError as error:
        raise UsageError(f"{what} {path} cannot be read: {error.strerror}") from None
    return folder


def walk(root: Path, recursive: bool = True) -> Tree:
    """Returns what lies in a folder; with `recursive`, in those below it too.

    Links to folders are followed once all folders are read, and each folder is read once, under
    its own path where it has one in the tree. So a link that leads back ends there.
    """
    tree = Tree()
    start = root.resolve()
    read: dict[Path, Path] = {}  # real path → the path that it was read by
    folders, links = deque([root]), deque[Path]()
    while folders or links:
        folder = folders.popleft() if folders else links.popleft()
        real = folder.resolve()
        if real in read or real in start.parents:
            tree.findings.append(_seen_before(folder, real, read))
            continue
        read[real] = folder
        for path in _entries(folder, tree):
            if not os.path.isdir(path):
                _add_file(path, tree)
            elif not recursive and path.resolve() in (start, *start.parents):
                tree.findings.append(_seen_before(path, path.resolve(), read))
            elif not recursive:
                tree.folders.append(path)
            elif path.is_symlink():
                links.append(path)
            else:
                folders.append(path)
    tree.files.sort()
    return tree


def _entries(folder: Path, tree: Tree) -> list[Path]:
    """Returns the paths in a folder by name; what is hidden goes to the tree."""
    try:
        found = sorted(os.listdir(folder))
    except OSError as error:
        text = f"the folder cannot be read: {error.strerror}; nothing in it is trained"
        tree.findings.append(Finding("left out", "unreadable-folder", shown(folder), text))
        return []
    hidden = {name for name in found if name.startswith(".") or name.lower() in JUNK}
    tree.hidden += (shown(Path(name)) for name in found if name in hidden)
    return [folder / name for name in found if name not in hidden]


def _add_file(path: Path, tree: Tree) -> None:
    if os.path.isfile(path):
        tree.files.append(path)
        return
    level: Level = "left out" if looks_like_image(path) else "note"
    name = shown(path)
    if path.is_symlink():
        text = f"a link to {shown(path.readlink())}, which is not there"
        tree.findings.append(Finding(level, "broken-link", name, text))
    else:
        tree.findings.append(Finding(level, "not-a-file", name, "neither a file nor a folder"))


def _seen_before(link: Path, real: Path, read: dict[Path, Path]) -> Finding:
    if real not in read or read[real] in link.parents:
        text = f"a link in a loop: it leads back to {shown(real)}; not followed"
        return Finding("note", "link-loop", shown(link), text)
    text = f"leads to {shown(real)}, which is read as {shown(read[real])}; not read twice"
    return Finding("note", "linked-twice", shown(link), text)
