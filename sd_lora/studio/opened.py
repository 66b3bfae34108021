"""Paths of requests: none outside of the folders that the user opened."""

from pathlib import Path

from sd_lora.errors import UsageError, near_path
from sd_lora.studio.store import Store

OWN = ("images", "tries")
"""Folders of the studio's own that pages may read: images that were taken in, and grids."""


class NotOpened(UsageError):
    """A path outside of the folders that the user opened."""


def inside(store: Store, path: str | Path) -> Path:
    """A path with its links followed, if it lies in an opened folder or in the studio's own.

    Raises:
        NotOpened: it does not, whether it is there or not.
    """
    try:
        real = Path(path).expanduser().resolve()
    except (OSError, RuntimeError, ValueError):  # links in a circle, a NUL character
        raise NotOpened("no such path is opened") from None
    own = [store.folder.resolve() / name for name in OWN]
    if any(real.is_relative_to(folder) for folder in (*store.opened(), *own)):
        return real
    raise NotOpened(f"{path} is in no folder that is opened here")


def open_folder(store: Store, path: str) -> Path:
    """Open a folder that the user named, or that of a file; returns it.

    Raises:
        UsageError: no such folder, or no permission.
    """
    if not path.strip():
        raise UsageError("name a folder")
    place = Path(path.strip()).expanduser().absolute()
    folder = place.parent if place.is_file() else place
    if not folder.is_dir():
        raise UsageError(f"{path} does not exist: there is no such folder{near_path(folder)}")
    try:
        next(folder.iterdir(), None)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    store.open(folder)
    return folder.resolve()


def open_result(store: Store, folder: Path) -> None:
    """Open a folder that a run of the user's will write, if it lies in no opened one."""
    try:
        inside(store, folder)
    except NotOpened:
        store.open(folder)


def relative(store: Store, path: Path) -> str:
    """A path as pages show it: from the folder above the opened one on."""
    for folder in store.opened():
        if path.is_relative_to(folder):
            return str(Path(folder.name) / path.relative_to(folder))
    return str(path)
