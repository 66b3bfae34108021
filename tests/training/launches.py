"""Several processes of one run, forked from this one: its imports are theirs, which saves each of
them 8 seconds."""

import argparse
import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, get_args_parser

from sd_lora.cli import main, train_script

FORK: Any = multiprocessing.get_context("fork" if hasattr(os, "fork") else None)


def _serve(port: int) -> None:
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    while store:
        time.sleep(60)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Processes:
    """Processes that write all that they say into files of the folder `said`."""

    said: Path
    processes: list[BaseProcess]

    def wait(self, seconds: float = 60) -> list[int | None]:
        """The exit codes, None of a process that does not end in time; it is killed."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        self.kill()
        return codes

    def wait_for(self, path: Path, seconds: float = 60) -> None:
        """Wait until the processes have made a file or folder."""
        end = time.monotonic() + seconds
        while not path.exists():
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(f"{path} is not there: {self.text}")
            time.sleep(0.02)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()

    @property
    def text(self) -> str:
        """All that the processes have said."""
        return "".join(path.read_text() for path in sorted(self.said.iterdir()))

    def _end_with(self, number: int, work: Callable[[], int]) -> None:
        """Do the work of this forked process, with all that it says in the file of its number, and
        end with the exit code that the work returns; with 70 where it raises an error."""
        forget()
        code = 70
        with (self.said / f"{number}.txt").open("w") as file:
            sys.stdout = sys.stderr = file
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            try:
                code = work()
            except SystemExit as end:
                code = int(end.code or 0)
            except BaseException:
                traceback.print_exc()
            file.flush()
        os._exit(code)


def accelerate_launch(config: Path) -> tuple[argparse.Namespace, dict[str, str]]:
    """How `accelerate launch` reads a configuration: its flags, and the variables that it sets."""
    words = ["--config_file", str(config), "-m", "sd_lora", "train"]
    flags = _validate_launch_command(launch_command_parser().parse_args(words))[0]
    before = {**os.environ}
    variables = prepare_multi_gpu_env(flags)
    return flags, {name: text for name, text in variables.items() if before.get(name) != text}


def forget() -> None:
    """Give a forked process the state of a new one: a test before, in the process that it was
    forked from, may have left Accelerate's, of one process."""
    AcceleratorState._reset_state(reset_partial_state=True)


class Launch(Processes):
    """`sd-lora` as `number` processes with one command, and the store that torchrun gives them.

    said: folder of all that each process prints. script: a launch script whose flags the command
    is. first: called in each process before the command, with its rank. environment: more
    variables.
    """

    def __init__(
        self,
        number: int,
        command: Sequence[str],
        said: Path,
        script: str | None = None,
        first: Callable[[int], None] = lambda rank: None,
        **environment: str,
    ) -> None:
        self.said, self.script, self.first = said, script, first
        said.mkdir(parents=True, exist_ok=True)
        port = free_port()
        shared = {
            "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number, "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "True",
            "ACCELERATE_USE_CPU": "true", **environment,
        }  # fmt: skip
        # a server's threads are not forked, and to collect it without them would wait for ever
        self._store = FORK.Process(target=_serve, args=(port,), daemon=True)
        self._store.start()
        self.processes = []
        for rank in range(number):
            own = {k: str(v) for k, v in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()}
            process = FORK.Process(target=self._run, args=(rank, command, own), daemon=True)
            process.start()
            self.processes.append(process)

    def _run(self, rank: int, command: Sequence[str], own: dict[str, str]) -> None:
        os.environ |= own

        def work() -> int:
            self.first(rank)
            sys.argv[1:] = command
            return train_script(self.script) if self.script else main(command)

        self._end_with(rank, work)

    def kill(self) -> None:
        super().kill()
        self._store.kill()


class Apart(Processes):
    """Commands of `sd-lora`, each in a process that knows of no other one.

    said, first: as of `Launch`; the rank is the command's number.
    """

    def __init__(
        self,
        commands: Sequence[Sequence[str]],
        said: Path,
        first: Callable[[int], None] = lambda rank: None,
    ) -> None:
        said.mkdir(parents=True, exist_ok=True)
        self.said, self.first = said, first
        self.processes = [
            FORK.Process(target=self._run, args=one, daemon=True) for one in enumerate(commands)
        ]
        for process in self.processes:
            process.start()

    def _run(self, number: int, command: Sequence[str]) -> None:
        def work() -> int:
            self.first(number)
            return main(command)

        self._end_with(number, work)


class TwoHosts(Processes):
    """Two launchers of torchrun on this machine, each with processes of its own, as on two hosts.

    line: torchrun's flags, of one launcher. command, said: as of `Launch`.
    """

    def __init__(self, line: Sequence[str], command: Sequence[str], said: Path) -> None:
        said.mkdir(parents=True, exist_ok=True)
        self.said = said
        self.processes = [
            FORK.Process(target=self._run, args=(host, line, command)) for host in range(2)
        ]
        for process in self.processes:
            process.start()

    def _run(self, host: int, line: Sequence[str], command: Sequence[str]) -> None:
        forget()
        os.environ |= {"ACCELERATE_USE_CPU": "true"}
        with (self.said / f"launcher-{host}.txt").open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            config, _, _ = config_from_args(get_args_parser().parse_args([*line, "script"]))
            config.start_method = "fork"
            try:
                elastic_launch(config, self._work)(command)
            except ChildFailedError:
                os._exit(1)
        os._exit(0)

    def _work(self, command: Sequence[str]) -> None:
        with (self.said / f"{os.environ['RANK']}.txt").open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            sys.stdout = sys.stderr = file
            code = main(command)
        if code:  # else torchrun's launcher waits for a returned value
            os._exit(code)
