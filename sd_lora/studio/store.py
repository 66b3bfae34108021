"""The studio's memory: jobs, folders that the user opened, and drafts, in one SQLite file.

It survives the studio, which may be killed at any time; each change is written at once.
"""

import json
import os
import sqlite3
import threading
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from sd_lora.folders import state_folder

TABLES = """
CREATE TABLE IF NOT EXISTS jobs (
  id INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL, title TEXT NOT NULL,
  words TEXT NOT NULL, given TEXT NOT NULL, folder TEXT NOT NULL, cwd TEXT NOT NULL,
  state TEXT NOT NULL, wish TEXT NOT NULL, place REAL NOT NULL, made REAL NOT NULL,
  started REAL, ended REAL, pid INTEGER, born REAL, code INTEGER
);
CREATE TABLE IF NOT EXISTS folders (path TEXT PRIMARY KEY, opened REAL NOT NULL);
CREATE TABLE IF NOT EXISTS kept (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""

WAITING, RUNNING, PAUSED = "queued", "running", "paused"
ENDED = ("done", "stopped", "failed")


def default_folder() -> Path:
    """The folder of the studio's own files: $SD_LORA_STUDIO, else in the state folder."""
    own = os.environ.get("SD_LORA_STUDIO")
    return Path(own).expanduser() if own else state_folder() / "studio"


@dataclass(frozen=True)
class Job:
    """A command of `sd-lora`, as a process of its own.

    kind: the command: "train", "check", "sample", … words: after the command. given: what the user
    gave, for forms: option → text. folder: output folder, or "" without one. cwd: where relative
    paths begin. state: queued, running, paused, or one of `ENDED`. wish: "pause", "stop" or "",
    taken when the process ends. place: in the queue. made, started, ended: seconds since 1970.
    pid, born: of the process, and its start. code: its exit code, None while that is not known.
    """

    id: int
    kind: str
    title: str
    words: list[str]
    given: dict[str, Any] = field(default_factory=dict)
    folder: str = ""
    cwd: str = ""
    state: str = WAITING
    wish: str = ""
    place: float = 0.0
    made: float = 0.0
    started: float | None = None
    ended: float | None = None
    pid: int | None = None
    born: float | None = None
    code: int | None = None

    @property
    def is_over(self) -> bool:
        return self.state in ENDED


_COLUMNS = [f.name for f in fields(Job)]
_AS_JSON = ("words", "given")


class Store:
    """The file, for all threads of the studio.

    folder: of the studio's own files; made if it is not there, for its user alone.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = threading.RLock()
        self._file = sqlite3.connect(
            folder / "studio.sqlite", check_same_thread=False, isolation_level=None
        )
        self._file.execute("PRAGMA journal_mode=WAL")
        self._file.executescript(TABLES)

    def close(self) -> None:
        with self._lock:
            self._file.close()

    def _do(self, text: str, *values: Any) -> sqlite3.Cursor:
        with self._lock:
            return self._file.execute(text, values)

    def add(self, kind: str, title: str, words: list[str], **more: Any) -> int:
        """Add a job at the end of the queue; returns its number. more: fields of `Job`."""
        now = time.time()
        row = {"place": now, "made": now, "given": {}, "folder": "", "cwd": os.getcwd()}
        row |= {"state": WAITING, "wish": ""} | more
        row |= {"kind": kind, "title": title, "words": words}
        row = {n: json.dumps(v) if n in _AS_JSON else v for n, v in row.items()}
        names = ", ".join(row)
        marks = ", ".join("?" * len(row))
        # the names are our own
        cursor = self._do(f"INSERT INTO jobs ({names}) VALUES ({marks})", *row.values())  # noqa: S608
        return int(cursor.lastrowid or 0)

    def change(self, number: int, **values: Any) -> None:
        """Change fields of a job."""
        row = {n: json.dumps(v) if n in _AS_JSON else v for n, v in values.items()}
        names = ", ".join(f"{name} = ?" for name in row)
        self._do(f"UPDATE jobs SET {names} WHERE id = ?", *row.values(), number)  # noqa: S608

    def job(self, number: int) -> Job | None:
        """A job by its number."""
        return next(iter(self.jobs("id = ?", number)), None)

    def jobs(self, where: str = "1", *values: Any) -> list[Job]:
        """Jobs, in their order of the queue. where: a condition of SQL, of our own words."""
        text = f"SELECT {', '.join(_COLUMNS)} FROM jobs WHERE {where} ORDER BY place, id"  # noqa: S608
        with self._lock:
            rows = self._do(text, *values).fetchall()
        found = []
        for row in rows:
            named = dict(zip(_COLUMNS, row, strict=True))
            found.append(Job(**named | {n: json.loads(named[n]) for n in _AS_JSON}))
        return found

    def forget(self, number: int) -> None:
        """Remove a job from the list; its files stay."""
        self._do("DELETE FROM jobs WHERE id = ?", number)

    def opened(self) -> list[Path]:
        """Folders that the user opened, the latest first."""
        rows = self._do("SELECT path FROM folders ORDER BY opened DESC").fetchall()
        return [Path(path) for (path,) in rows]

    def open(self, folder: Path) -> None:
        """Add a folder to those that the user opened."""
        text = "INSERT OR REPLACE INTO folders (path, opened) VALUES (?, ?)"
        self._do(text, str(folder.expanduser().resolve()), time.time())

    def kept(self, name: str, usual: Any = None) -> Any:
        """A value that was kept under a name."""
        row = self._do("SELECT value FROM kept WHERE name = ?", name).fetchone()
        return json.loads(row[0]) if row else usual

    def keep(self, name: str, value: Any) -> None:
        """Keep a value, which JSON can hold, under a name."""
        self._do("INSERT OR REPLACE INTO kept (name, value) VALUES (?, ?)", name, json.dumps(value))
