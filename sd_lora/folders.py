"""Folders: their checks, their owner, the space of their disk. Neither torch nor safetensors."""

import os
import shutil
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from sd_lora.errors import RunError, UsageError

LOCK = ".sd_lora.lock"
"""File in an owned folder; its lock, and not the file, shows that the owner lives."""

RUN_LOG = "training_log.jsonl"
"""The log of a run, by which its output folder is known: its images are samples."""

STATE = "SD_LORA_STATE"
"""Environment variable with the folder of all that this project remembers for a user."""

_OWNED: dict[Path, tuple[FileLock, list[Path]]] = {}
"""Folder that this process owns → its lock, and the folders that were made for it."""


def user_folder(variable: str, shared: str, usual: str) -> Path:
    """A folder of the project in the user's home, by the XDG directories.

    Args:
        variable: environment variable that names the folder itself.
        shared: that of the XDG directory around it, which counts if it is absolute.
        usual: the directory without it, in the user's home.
    """
    if own := os.environ.get(variable):
        return Path(own).expanduser()
    around = os.environ.get(shared, "")
    return (Path(around) if os.path.isabs(around) else Path.home() / usual) / "sd_lora"


def state_folder() -> Path:
    """The folder of all that this project remembers for a user: the studio's files, step times."""
    return user_folder(STATE, "XDG_DATA_HOME", ".local/share")


def own(folder: Path) -> None:
    """Make this process the owner of a folder until `disown`, or until it dies, even by SIGKILL.

    A missing folder is made. Owning a folder again changes nothing.

    Raises:
        UsageError: another process owns it.
        RunError: a folder that cannot be made or locked.
    """
    place = folder.resolve()
    if place in _OWNED:
        return
    made = [path for path in (place, *place.parents) if not path.exists()]
    # a killed owner's forked helpers do not keep its lock: filelock closes it in them
    lock = FileLock(place / LOCK, timeout=0, thread_local=False)
    try:
        place.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise UsageError(
            f"another run works in {folder} now: wait for its end, or choose another folder"
        ) from None
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RunError(f"{folder} cannot be locked against other runs: {reason}") from None
    _OWNED[place] = lock, made


def disown(folder: Path) -> None:
    """Give up a folder; the folders that `own` made go if nothing was written into them."""
    owned = _OWNED.pop(folder.resolve(), None)
    if owned is None:
        return
    lock, made = owned
    with suppress(OSError):  # Windows removes no open file, and filelock removes it there
        os.unlink(lock.lock_file)
    lock.release()
    with suppress(OSError):  # not empty
        for path in made:
            path.rmdir()


def free_bytes(path: Path) -> int:
    """Return the bytes that a user can still write to the disk of a path, which may not exist."""
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    return shutil.disk_usage(there).free


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, where the system can (Windows cannot)."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def check_writable(folder: Path, setting: str) -> None:
    """Check that a folder can be made or written.

    setting: its option, for messages.

    Raises:
        UsageError: a file in its place, no permission, or a name that is not UTF-8.
    """
    written = os.fsencode(folder.absolute()).decode("utf-8", "backslashreplace")
    if written != str(folder.absolute()):
        raise UsageError(
            f"{setting} {written}: its name is not valid UTF-8, and safetensors opens no file in "
            "it; choose another"
        )
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not there.is_dir():
        raise UsageError(f"{setting} {folder}: {there} is a file, not a folder")
    if not os.access(there, os.W_OK):
        raise UsageError(f"{setting} {folder} cannot be written: no permission for {there}")


def check_readable(folder: Path, setting: str) -> None:
    """Check that a folder, if it exists, is one and can be listed.

    setting: its option, for messages.

    Raises:
        UsageError: a file in its place, no permission, or a name that is not UTF-8.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{setting} {folder} is a file, not a folder")
    try:
        next(folder.iterdir(), None) if folder.is_dir() else None
    except OSError as error:
        raise UsageError(f"{setting} {folder} cannot be read: {error.strerror}") from None
