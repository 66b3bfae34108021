"""The keeper of jobs: starts the next one, and knows when one has ended.

A job is `python -m sd_lora COMMAND …` in a session of its own, whose output goes to a file. It
neither knows the studio nor ends with it: a keeper that starts anew finds it by its process number
and the time at which that process began.
"""

import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

import psutil

from sd_lora.errors import Interrupted
from sd_lora.report.record import RECORD, read_record
from sd_lora.studio.store import PAUSED, RUNNING, WAITING, Job, Store
from sd_lora.training.interruption import STOP_FILE

LOOK_EVERY = 0.4
"""Seconds between two looks at the processes."""

ON_DEVICE = ("train", "sample", "caption")
"""Commands that fill the accelerator's memory: one at once, in the order of the queue."""

AT_ONCE = 2
"""Other commands at once."""

SAME_START = 2.0
"""Seconds by which two clocks may differ on the start of one process."""


class Keeper:
    """A thread beside the pages. Use as a context, which ends the thread and no job."""

    def __init__(self, store: Store) -> None:
        self.store = store
        (store.folder / "log").mkdir(exist_ok=True)
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        self._wake, self._over = threading.Event(), False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)

    def __enter__(self) -> "Keeper":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over = True
        self._wake.set()
        self._thread.join()

    def log_of(self, job: Job) -> Path:
        """The file with a job's output."""
        return self.store.folder / "log" / f"{job.id}.txt"

    def look(self) -> None:
        """Look at once, instead of a moment later."""
        self._wake.set()

    def _run(self) -> None:
        while not self._over:
            with suppress(OSError, sqlite3.Error):  # a full disk, a busy file: the next time
                self.tick()
            self._wake.wait(LOOK_EVERY)
            self._wake.clear()

    def tick(self) -> None:
        """Take note of ended jobs, pass on wishes, and start the next jobs."""
        with self._lock:
            for job in self.store.jobs("state = ?", RUNNING):
                process = self.process(job)
                if process is None:
                    self._take_end(job)
                elif job.wish:
                    ask_to_stop(job)
            self._start_next()

    def process(self, job: Job) -> psutil.Process | None:
        """The process of a running job; None if it has ended."""
        child = self._children.get(job.id)
        if child is not None and child.poll() is not None:
            return None
        try:
            process = psutil.Process(job.pid)
            same = abs(process.create_time() - (job.born or 0.0)) < SAME_START
            return process if same and process.status() != psutil.STATUS_ZOMBIE else None
        except (psutil.Error, ValueError, TypeError):
            return None

    def _start_next(self) -> None:
        running = self.store.jobs("state = ?", RUNNING)
        busy = sum(job.kind in ON_DEVICE for job in running)
        others = len(running) - busy
        for job in self.store.jobs("state = ?", WAITING):
            if job.kind in ON_DEVICE and not busy:
                busy += self._start(job)
            elif job.kind not in ON_DEVICE and others < AT_ONCE:
                others += self._start(job)

    def _start(self, job: Job) -> bool:
        """Start a job; False for a system that starts no process, which is in the job's output."""
        words = [sys.executable, "-m", "sd_lora", job.kind, *job.words]
        with open(self.log_of(job), "ab") as log:
            try:
                child = _started(words, job.cwd, log)
                born = psutil.Process(child.pid).create_time()
            except (OSError, ValueError, psutil.Error) as error:
                log.write(f"error: {job.kind} could not be started: {error}\n".encode())
                self.store.change(job.id, state="failed", ended=time.time(), code=1)
                return False
        self._children[job.id] = child
        started = {"started": time.time(), "ended": None, "code": None}
        self.store.change(job.id, state=RUNNING, pid=child.pid, born=born, **started)
        return True

    def _take_end(self, job: Job) -> None:
        child = self._children.pop(job.id, None)
        code = child.poll() if child is not None else None
        state = state_after(job, code, self.log_of(job))
        if state in (PAUSED, "stopped") and job.kind == "train":
            (Path(job.folder) / STOP_FILE).unlink(missing_ok=True)  # asked for once more
        self.store.change(job.id, state=state, ended=time.time(), code=code, wish="", pid=None)

    def end_at_once(self, job: Job) -> None:
        """Kill a job and its helpers; steps since its last checkpoint are lost."""
        process = self.process(job)
        if process is not None:
            self.store.change(job.id, wish="stop")
            with suppress(psutil.Error):
                for one in [*process.children(recursive=True), process]:
                    with suppress(psutil.NoSuchProcess):
                        one.kill()
        self.look()


def _started(words: Sequence[str], cwd: str, log: IO[bytes]) -> subprocess.Popen[bytes]:
    """A process that outlives this one."""
    apart = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)
    apart |= getattr(subprocess, "CREATE_NO_WINDOW", 0)
    return subprocess.Popen(  # noqa: S603  our own command, without a shell
        words,
        cwd=cwd if os.path.isdir(cwd) else None,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        creationflags=apart,
    )


def ask_to_stop(job: Job) -> None:
    """Put the file that ends a run after its step; again and again, for a run that begins forgets
    the one that is there."""
    if job.kind == "train" and Path(job.folder).is_dir():
        with suppress(OSError):
            (Path(job.folder) / STOP_FILE).touch()


def state_after(job: Job, code: int | None, log: Path) -> str:
    """The state of a job that has ended.

    code: its exit code; None for a process that another keeper started, whose files tell it.
    """
    if code is None:
        code = 0 if _is_finished(job) else _code_in(log)
    if code == 0:
        return "done"
    if job.wish == "pause" and code == Interrupted.exit_code:
        return PAUSED
    return "stopped" if job.wish or code == Interrupted.exit_code else "failed"


def _is_finished(job: Job) -> bool:
    """Whether a job's files say that it did all of its work."""
    if job.kind != "train":
        return False
    with suppress(ValueError, OSError):
        written = (Path(job.folder) / RECORD).stat().st_mtime
        return bool(read_record(Path(job.folder))["ended"]) and written >= (job.started or 0.0)
    return False


def _code_in(log: Path) -> int:
    """The exit code that the last line of a job's output stands for."""
    lines = last_lines(log, 4000)
    asked = any("continue with the same command" in line for line in lines[-3:])
    if asked:
        return Interrupted.exit_code
    return 1 if any(line.startswith(("error:", "Traceback")) for line in lines) else -1


def last_lines(path: Path, size: int | None = None) -> list[str]:
    """The lines of a job's output that are not empty: of a bar that was drawn over itself, its last
    state. size: bytes of its end that are read; None: all."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - size) if size else 0)
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    lines = (line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n"))
    return [line for line in lines if line]
