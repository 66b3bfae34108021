"""A studio as a person starts it: a process of its own, asked by plain HTTP."""

import http.client
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from sd_lora.studio.store import Store


@dataclass
class Served:
    """A studio that is running. cookie: of a browser that came by its address."""

    process: subprocess.Popen[str]
    address: str
    cookie: str = ""

    @property
    def port(self) -> int:
        return int(re.search(r":(\d+)/", self.address)[1])

    def ask(
        self, path: str, method: str = "GET", body: bytes = b"", **headers: str
    ) -> tuple[int, str, dict[str, str]]:
        """Status, text and headers of an answer. headers: with _ for -; "" leaves one out."""
        named = {"Cookie": self.cookie, "Host": f"127.0.0.1:{self.port}"}
        if method != "GET":
            named |= {"Content-Length": str(len(body)), "Origin": f"http://127.0.0.1:{self.port}"}
        named |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in named.items():
            if value:
                connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        text = answer.read().decode("utf-8", "replace")
        connection.close()
        return answer.status, text, {k.lower(): v for k, v in answer.getheaders()}


def start(folder: Path, state: Path, *words: str) -> Served:
    """Start a studio. folder: opened, and the one in which it runs. state: of its own files."""
    process = subprocess.Popen(
        [sys.executable, "-m", "sd_lora", "studio", "--no_open", "--port", "0", *words],
        cwd=folder, env=os.environ | {"SD_LORA_STUDIO": str(state)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    line = process.stdout.readline()
    assert "the studio is at" in line, line
    return Served(process, line.split()[-1])


@contextmanager
def busy(state: Path) -> Iterator[Store]:
    """A studio's jobs, while one that is running keeps all others in the queue: this process."""
    store = Store(state)
    me = psutil.Process()
    store.add(
        "train", "at work", [], state="running", pid=me.pid, born=me.create_time(),
        started=time.time(),
    )  # fmt: skip
    yield store
    for job in store.jobs("state IN ('queued', 'running')"):
        store.forget(job.id)


def enter(served: Served) -> Served:
    """Take the cookie by the one-time address."""
    path = served.address.partition(f":{served.port}")[2]
    status, _, headers = served.ask(path)
    assert status == 303
    served.cookie = headers["set-cookie"].partition(";")[0]
    return served


@pytest.fixture
def starts() -> Iterator[Callable[..., Served]]:
    """`start`, whose studios end with the test."""
    started: list[Served] = []

    def starting(folder: Path, state: Path) -> Served:
        started.append(start(folder, state))
        return started[-1]

    yield starting
    for served in started:
        served.process.kill()
        served.process.wait()


@pytest.fixture(scope="session")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A studio with one opened folder, `work`, and a secret beside it."""
    place = tmp_path_factory.mktemp("studio")
    (place / "work").mkdir()
    (place / "secret.txt").write_text("do not tell")
    served = enter(start(place / "work", place / "state"))
    yield served
    served.process.terminate()
    served.process.wait(timeout=30)
