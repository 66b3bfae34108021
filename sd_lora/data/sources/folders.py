"""List a folder tree: every file once, in the same order on every file system."""

import os
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from sd_lora.data.images.decode import EXTENSIONS
from sd_lora.data.sources.samples import printable_path
from sd_lora.errors import UsageError, near_path
from sd_lora.findings import Finding
from sd_lora.folders import RUN_LOG

SYSTEM_FILES = ("thumbs.db", "desktop.ini", "__macosx")
"""Hidden like names that start with a dot: files that systems leave in folders, in lower case."""


@dataclass
class FolderTree:
    """Files and folders below a root.

    files: all visible files, sorted by path.
    folders: folders directly below the root, if not read recursively.
    hidden: names of hidden files and folders.
    aside: images among the files that are no subjects to learn, such as masks.
    findings: on links and folders.
    """

    files: list[Path] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    aside: set[Path] = field(default_factory=set)

    @property
    def images(self) -> list[Path]:
        """Files with an image's extension, but for those aside."""
        return [p for p in self.files if has_image_extension(p) and p not in self.aside]


def has_image_extension(path: Path) -> bool:
    """Whether a file name ends as an image's, in small or capital letters."""
    return path.suffix.lower() in EXTENSIONS


def list_names(items: list[str]) -> str:
    """The first five names, and the number of the others."""
    return ", ".join(items[:5]) + (f" and {len(items) - 5} more" if len(items) > 5 else "")


def existing_folder(path: str, setting: str) -> Path:
    """Check that a folder exists and can be read.

    Args:
        path: `~` is expanded.
        setting: name of the option, for messages.

    Raises:
        UsageError: a missing or unreadable folder, or a file.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        if folder.exists():
            raise UsageError(f"{setting} {path} is a file, not a folder")
        raise UsageError(f"{setting} {path} does not exist{near_path(folder, Path.is_dir)}")
    try:
        os.scandir(folder).close()
    except OSError as error:
        raise UsageError(f"{setting} {path} cannot be read: {error.strerror}") from None
    return folder


def walk(root: Path, recursive: bool = True) -> FolderTree:
    """List a folder, and with `recursive` all folders below it.

    Links to folders are followed after all real folders have been read, and each folder is read
    once, under its own path if that lies in the tree. So a link that leads back ends there.
    """
    tree = FolderTree()
    start = root.resolve()
    read: dict[Path, Path] = {}  # real path → path under which it was read
    folders, links = deque([root]), deque[Path]()
    while folders or links:
        folder = folders.popleft() if folders else links.popleft()
        real = folder.resolve()
        if real in read or real in start.parents:
            tree.findings.append(_repeated_folder(folder, real, read))
            continue
        read[real] = folder
        if folder != root and (folder / RUN_LOG).is_file():
            tree.findings.append(Finding("run-folder", printable_path(folder)))
            continue
        for path in _list_folder(folder, tree):
            if not os.path.isdir(path):
                _add_file(path, tree)
            elif not recursive and path.resolve() in (start, *start.parents):
                tree.findings.append(_repeated_folder(path, path.resolve(), read))
            elif not recursive:
                tree.folders.append(path)
            elif path.is_symlink():
                links.append(path)
            else:
                folders.append(path)
    tree.files.sort()
    return tree


def _list_folder(folder: Path, tree: FolderTree) -> list[Path]:
    """Visible paths in a folder, by name; adds hidden names to the tree."""
    try:
        found = sorted(os.listdir(folder))
    except OSError as error:
        details = f"the folder cannot be read: {error.strerror}"
        tree.findings.append(Finding("unreadable-folder", printable_path(folder), details))
        return []
    hidden = {name for name in found if name.startswith(".") or name.lower() in SYSTEM_FILES}
    tree.hidden += (printable_path(Path(name)) for name in found if name in hidden)
    return [folder / name for name in found if name not in hidden]


def _add_file(path: Path, tree: FolderTree) -> None:
    """Add a regular file to the tree, or a finding on a broken link, pipe or device."""
    if os.path.isfile(path):
        tree.files.append(path)
        return
    code, details = "not-a-file", ""
    if path.is_symlink():
        code, details = (
            "broken-link",
            f"a link to {printable_path(path.readlink())}, which does not exist",
        )
    if not has_image_extension(path):
        code, details = "other-file", details or "neither a file nor a folder"
    tree.findings.append(Finding(code, printable_path(path), details))


def _repeated_folder(link: Path, real: Path, read: dict[Path, Path]) -> Finding:
    name, target = printable_path(link), printable_path(real)
    if real not in read or read[real] in link.parents:
        return Finding("link-loop", name, f"a link in a loop, back to {target}")
    return Finding(
        "linked-twice", name, f"leads to {target}, which is read as {printable_path(read[real])}"
    )
