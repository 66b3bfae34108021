"""The device of card.cpp under torch.cuda's names. It must be there before torch is imported."""

import ctypes
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SOURCE = Path(__file__).parent / "card.cpp"
NAME = "CPU kernels"
"""The name of the card."""

TOTAL = 24 * 2**30
"""Bytes of memory that it has."""

FUNCTIONS = {
    "used": 0, "peak": 0, "reset_peak": 0, "limit": 1, "strict": 1, "record": 0, "recorded": 0,
    "recording": 0, "replay": 1, "forget": 1, "resize": 2,
}  # fmt: skip
"""The device's own functions → how many numbers each takes."""


def built(folder: Path) -> Path:
    """The compiled device, made in a folder where it is not there: in ten seconds, without
    optimising, for all but a hundredth of its time is the CPU's kernels'."""
    torch = _torch()
    identity = hashlib.sha256(SOURCE.read_bytes() + version("torch").encode()).hexdigest()[:16]
    made = folder / f"card-{identity}.so"
    if not made.exists():
        folder.mkdir(parents=True, exist_ok=True)
        fresh = made.with_suffix(f".{os.getpid()}")  # of this process, should two begin
        libraries = (f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu")
        command = ["g++", "-std=c++20", "-O0", "-fPIC", "-shared", f"-I{torch / 'include'}"]
        subprocess.run([*command, str(SOURCE), *libraries, "-o", str(fresh)], check=True)
        fresh.replace(made)
    return made


def loaded(library: Path) -> Any:
    """The device's functions, once it is registered with torch: its libraries come before its
    Python part, which asks once for the devices that there are."""
    assert "torch" not in sys.modules
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(_torch() / "lib" / name), ctypes.RTLD_GLOBAL)
    card = ctypes.CDLL(str(library))
    for name, numbers in FUNCTIONS.items():
        function = getattr(card, f"card_{name}")
        function.restype = ctypes.c_int64
        function.argtypes = [ctypes.c_int64] * numbers
    return card


def _torch() -> Path:
    """torch's folder, without importing it."""
    found = find_spec("torch")
    assert found
    assert found.origin
    return Path(found.origin).parent


def plugged_in(folder: Path) -> None:
    """Let this process have the card, compiled in a folder."""
    card = loaded(built(folder))
    import bitsandbytes  # noqa: F401  both look for a card's own libraries where there is one
    import torch
    import torchao  # noqa: F401

    torch._C._cuda_getCurrentRawStream = lambda _=0: 0  # type: ignore[attr-defined]
    torch.version.cuda = "13.0"
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    names = _of_device(card) | _of_memory(card) | _of_streams(card)
    for name, value in names.items():
        setattr(torch.cuda, name, value)
    _mend_storages(torch, card)


def _of_device(card: Any) -> dict[str, Any]:
    """torch.cuda's functions of a device."""
    facts = SimpleNamespace(
        name=NAME, major=9, minor=0, total_memory=TOTAL, multi_processor_count=1,
        gcnArchName="", is_integrated=False,
    )  # fmt: skip
    return {
        "_lazy_init": lambda: None,
        "_is_in_bad_fork": lambda: False,
        "init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda _: None,
        "device": lambda _: nullcontext(),
        "get_device_name": lambda _=None: NAME,
        "get_device_properties": lambda _=None: facts,
        "get_device_capability": lambda _=None: (facts.major, facts.minor),
        "get_arch_list": lambda: ["sm_90"],
        "set_sync_debug_mode": lambda mode: card.card_strict(mode == "error"),
    }


def _of_memory(card: Any) -> dict[str, Any]:
    """torch.cuda's functions of memory, and of random numbers, which are the CPU's."""
    import torch

    return {
        "mem_get_info": lambda _=None: (TOTAL - card.card_used(), TOTAL),
        "set_per_process_memory_fraction": lambda share, _=None: card.card_limit(
            int(share * TOTAL)
        ),
        "memory_allocated": lambda _=None: card.card_used(),
        "memory_reserved": lambda _=None: card.card_used(),
        "max_memory_allocated": lambda _=None: card.card_peak(),
        "max_memory_reserved": lambda _=None: card.card_peak(),
        "reset_peak_memory_stats": lambda _=None: card.card_reset_peak(),
        "empty_cache": lambda: None,
        "ipc_collect": lambda: None,
        "manual_seed": lambda _: None,
        "manual_seed_all": lambda _: None,
        "get_rng_state": lambda _=None: torch.get_rng_state(),
        "get_rng_state_all": lambda: [torch.get_rng_state()],
        "set_rng_state": lambda state, _=None: torch.set_rng_state(state),
        "set_rng_state_all": lambda states: torch.set_rng_state(states[0]),
    }


class Stream:
    """A stream, whose work is done at once."""

    device_index = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        self.cuda_stream = id(self)

    def wait_stream(self, _: "Stream") -> None:
        pass

    def wait_event(self, _: "Event") -> None:
        pass

    def record_event(self, event: Any = None) -> Any:
        return event or Event()


class Event:
    """A place in a stream, which has been reached."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, _: Any = None) -> None:
        pass

    def wait(self, _: Any = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


def _of_streams(card: Any) -> dict[str, Any]:
    """torch.cuda's streams and graphs."""

    class CUDAGraph:
        index: int | None = None

        def __del__(self) -> None:
            if self.index is not None:
                card.card_forget(self.index)

        def replay(self) -> None:
            if card.card_replay(self.index):
                raise RuntimeError("CUDA error: a graph could not be replayed")

        def pool(self) -> tuple[int, int]:
            if self.index is None:
                raise RuntimeError("the graph's recording has not ended")
            return 0, 1

    @contextmanager
    def graph(recorded: CUDAGraph, **_: Any) -> Iterator[None]:
        card.card_record()
        try:
            yield
        finally:
            index = card.card_recorded()
        recorded.index = index

    now = [Stream()]

    @contextmanager
    def stream(wanted: Stream | None) -> Iterator[None]:
        before, now[0] = now[0], wanted or now[0]
        try:
            yield
        finally:
            now[0] = before

    return {
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": CUDAGraph,
        "graph": graph,
        "graph_pool_handle": lambda: (0, 1),
        "is_current_stream_capturing": lambda: bool(card.card_recording()),
        "current_stream": lambda _=None: now[0],
        "default_stream": lambda _=None: now[0],
        "set_stream": lambda wanted: now.__setitem__(0, wanted),
        "stream": stream,
        "synchronize": lambda _=None: None,
    }


def _mend_storages(torch: Any, card: Any) -> None:
    """Let storages go to the card and change their size there: their methods in Python's part of a
    build without CUDA know no such device."""
    of_torch = torch.UntypedStorage
    resize, clone, to = of_torch.resize_, of_torch.clone, torch._utils._to

    def flat(storage: Any, device: str) -> Any:
        return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)

    def resized(storage: Any, size: int) -> Any:
        if storage.device.type != "cuda":
            return resize(storage, size)
        card.card_resize(storage._cdata, size)
        return storage

    def cloned(storage: Any) -> Any:
        if storage.device.type != "cuda":
            return clone(storage)
        return flat(storage, "cuda").clone().untyped_storage()

    def moved(storage: Any, device: Any, non_blocking: bool = False) -> Any:
        if storage.device.type == "cuda" or torch.device(device).type != "cuda":
            return to(storage, device, non_blocking)
        return flat(storage, "cpu").to("cuda").untyped_storage()

    of_torch.resize_, of_torch.clone, torch.storage._to = resized, cloned, moved
    of_torch.to = lambda self, *, device, non_blocking=False: moved(self, device, non_blocking)
