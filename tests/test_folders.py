"""Folders: one process owns one, and gives it up when it dies."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sd_lora import folders
from sd_lora.errors import RunError, UsageError
from sd_lora.folders import disown, own

OWNER = """
import os, sys, time
from pathlib import Path
from sd_lora.folders import own
own(Path(sys.argv[1]))
os.fork()  # as helpers that load images are
os.write(1, f"{os.getpid()}\\n".encode())
time.sleep(60)
"""


def test_one_process_owns_a_folder(tmp_path: Path) -> None:
    """A second process is refused at once while the first lives. Killed, it has given the folder up
    although a process that it forked lives on."""
    place = tmp_path / "a" / "out"
    owner = subprocess.Popen([sys.executable, "-c", OWNER, place], stdout=subprocess.PIPE)
    pids = {int(owner.stdout.readline()) for _ in range(2)}
    try:
        with pytest.raises(UsageError, match=r"another run works in .*out now: wait"):
            own(place)
        owner.kill()
        owner.wait()
        own(place)
        own(place)  # again: nothing changes
        assert [path.name for path in place.iterdir()] == [folders.LOCK]
        disown(place)
        assert not list(place.iterdir())
        disown(place)
    finally:
        owner.stdout.close()
        for pid in pids - {owner.pid}:
            os.kill(pid, signal.SIGKILL)


def test_folders_that_were_made_in_vain_go(tmp_path: Path) -> None:
    """A folder that was made for an owner goes with it if nothing was written, its parents too;
    with a file in it, it stays. A file in its place is an error without a traceback."""
    place = tmp_path / "a" / "b"
    own(place)
    disown(place)
    assert not (tmp_path / "a").exists()
    own(place)
    (place / "file").touch()
    disown(place)
    assert [path.name for path in place.iterdir()] == ["file"]
    with pytest.raises(RunError, match="file cannot be locked against other runs: "):
        own(place / "file")


def test_the_state_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """SD_LORA_STATE, else the XDG folder if that is absolute, else ~/.local/share."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SD_LORA_STATE", raising=False)
    usual = tmp_path / ".local" / "share"
    for shared, folder in (("/x", Path("/x")), ("", usual), ("x", usual)):
        monkeypatch.setenv("XDG_DATA_HOME", shared)
        assert folders.state_folder() == folder / "sd_lora"
    monkeypatch.setenv("SD_LORA_STATE", "~/mine")
    assert folders.state_folder() == tmp_path / "mine"
