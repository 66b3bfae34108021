"""The store on disk: whole entries or none, whatever processes, kills and power cuts do."""

import hashlib
import multiprocessing
import os
import pickle
import random
import re
import resource
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from sd_lora.data.cache.store import Store, default_folder, digest_of, weights_digest
from sd_lora.errors import RunError

PROCESSES = multiprocessing.get_context("forkserver")  # torch is imported once, not in each
PROCESSES.set_forkserver_preload([__name__])

KEY = "facts/" + digest_of("one")
DAY = 86400


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache", 10**9)


def file_of(store: Store, key: str) -> Path:
    kind, name = key.split("/")
    return store.folder / kind / name[:2] / name


def files(store: Store) -> list[Path]:
    return sorted(p for p in store.folder.rglob("*") if p.is_file())


def content(key: str, version: int, size: int = 300_000) -> bytes:
    """Data that says of each of its pieces to which entry and version it belongs."""
    piece = hashlib.sha256(f"{key} {version}".encode()).digest()
    return piece * (size // len(piece))


def start(target: Callable[..., None], *args: Any) -> Any:
    process = PROCESSES.Process(target=target, args=args, daemon=True)
    process.start()
    return process


def finished(*processes: Any) -> None:
    for process in processes:
        process.join(60)
        assert process.exitcode == 0


def test_bytes_come_back(store: Store) -> None:
    """What was written is read, an overwritten entry is the new one, nothing else is left there."""
    assert KEY not in store
    assert store.read(KEY) is None
    for data in (b"", b"first", bytes(range(256)) * 5000):
        store.write(KEY, data)
        assert KEY in store
        assert store.read(KEY) == data
    assert files(store) == [file_of(store, KEY)]


DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.int64,
    torch.bool,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_come_back(store: Store, dtype: torch.dtype) -> None:
    """Every bit of every dtype, of parts of a batch, transposed, empty and of no dimension."""
    batch = torch.arange(-12, 12).view(2, 3, 4).to(dtype)
    given = {
        "mean": batch[0], "std": batch[1], "turned": batch[0].T, "none": batch[:0],
        "scalar": batch[1, 2, 3],
    }  # fmt: skip
    store.put_tensors(KEY, given)
    read = store.tensors(KEY)
    assert read is not None
    assert read.keys() == given.keys()
    for name, tensor in given.items():
        assert read[name].dtype == dtype
        assert read[name].shape == tensor.shape
        assert torch.equal(read[name].to(torch.float64), tensor.to(torch.float64))


def test_tensors_with_history_and_not_a_number(store: Store) -> None:
    """Gradients are left behind; NaN, infinities and -0.0 keep their bits."""
    values = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45], requires_grad=True)
    store.put_tensors(KEY, {"x": values * 1})
    read = store.tensors(KEY)
    assert read is not None
    assert torch.equal(read["x"].view(torch.int32), values.detach().view(torch.int32))


@pytest.mark.parametrize(
    "key",
    ["", "facts", "../" + "0" * 32, "facts/../" + "0" * 32, "facts/" + "0" * 31,
     "FACTS/" + "0" * 32, "facts/" + "A" * 32, "facts/" + "0" * 32 + "\n", "/facts/" + "0" * 32],
)  # fmt: skip
def test_keys_are_checked(store: Store, key: str) -> None:
    """No key leads out of the folder, and none differs from another by its case alone."""
    for use in (store.read, store.__contains__, lambda k: store.write(k, b"")):
        with pytest.raises(ValueError, match="no key"):
            use(key)
    assert not store.folder.exists()


def _flip(data: bytes) -> bytes:
    return data[:-9] + bytes([data[-9] ^ 4]) + data[-8:]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "half of the head": lambda data: data[:7],
    "the head alone": lambda data: data[:16],
    "half": lambda data: data[: len(data) // 2],
    "all but the last byte": lambda data: data[:-1],
    "zeros": lambda data: bytes(len(data)),
    "more": lambda data: data + b"\0",
    "a page of zeros": lambda data: data[:4096] + bytes(4096) + data[8192:],
    "one bit": _flip,
    "foreign": lambda data: b"\x89PNG" + data[4:],
    "of a later version": lambda data: b"sdl2" + data[4:],
}
SEEN_BY_DATA_ALONE = ("a page of zeros", "one bit")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_entry_is_a_miss(store: Store, damage: str) -> None:
    """What is left of an entry after a power cut or a bad disk is found, removed, and made anew."""
    tensors = {"mean": torch.randn(4, 64, 64)}
    file = file_of(store, KEY)
    for ask in (store.read, store.tensors, lambda key: key in store or None):
        store.put_tensors(KEY, tensors)
        whole = file.read_bytes()
        file.write_bytes(DAMAGES[damage](whole))
        if damage in SEEN_BY_DATA_ALONE and ask not in (store.read, store.tensors):
            continue
        assert ask(KEY) is None
        assert not file.exists()
    store.put_tensors(KEY, tensors)
    assert file.read_bytes()[:4] == b"sdl1"
    assert torch.equal(store.tensors(KEY)["mean"], tensors["mean"])  # type: ignore[index]


def test_an_entry_of_another_name_is_broken(store: Store) -> None:
    """A file renamed or copied by hand is not taken for what its new name says."""
    other = "facts/" + digest_of("two")
    store.write(KEY, b"data")
    file_of(store, other).parent.mkdir(parents=True)
    os.rename(file_of(store, KEY), file_of(store, other))
    assert store.read(other) is None
    assert not file_of(store, other).exists()


def test_what_is_no_tensors_is_a_miss(store: Store) -> None:
    """Bytes under a key of tensors are removed, not raised about."""
    for data in (b"", b"{}", b"\xff" * 100):
        store.write(KEY, data)
        assert store.tensors(KEY) is None
        assert KEY not in store


def _write_many(store: Store, keys: list[str], version: int, rounds: int) -> None:
    for _ in range(rounds):
        for key in keys:
            store.write(key, content(key, version))


def test_two_writers_at_once(store: Store) -> None:
    """Of the same entries and of others: a reader meanwhile sees whole ones only, and in the end
    all are there and nothing else is."""
    shared = ["facts/" + digest_of(str(i)) for i in range(6)]
    own = [["facts/" + digest_of(f"{who} {i}") for i in range(6)] for who in range(2)]
    writers = [start(_write_many, store, shared + own[who], who, 25) for who in range(2)]
    reads = 0
    while any(writer.is_alive() for writer in writers):
        for key in shared:
            data = store.read(key)
            assert data in (None, content(key, 0), content(key, 1))
            reads += data is not None
    finished(*writers)
    assert reads > 0
    for who in range(2):
        assert all(store.read(key) == content(key, who) for key in own[who])
    assert files(store) == sorted(file_of(store, key) for key in shared + own[0] + own[1])


def _write_for_ever(store: Store, keys: list[str], ready: Any) -> None:
    ready.set()
    while True:
        _write_many(store, keys, 0, 1)


def test_a_killed_writer_leaves_whole_entries(store: Store) -> None:
    """After SIGKILL in the middle of a write every entry is whole or absent; what was unfinished
    is removed once it is a day old."""
    keys = ["facts/" + digest_of(str(i)) for i in range(5)]
    draw = random.Random(0)
    kills, left = 0, list[Path]()
    while kills < 20 or (not left and kills < 200):  # on a busy core few are in mid-write
        kills += 1
        ready = PROCESSES.Event()
        writer = start(_write_for_ever, store, keys, ready)
        assert ready.wait(60)
        time.sleep(draw.uniform(0.0005, 0.01))
        os.kill(writer.pid, signal.SIGKILL)
        writer.join(60)
        for key in keys:
            assert store.read(key) == content(key, 0) or not file_of(store, key).exists()
        left = [path for path in files(store) if path.suffix == ".part"]
    assert left, "no kill was in the middle of a write: this proves nothing"
    assert store.evict() == (0, 0)
    assert all(path.exists() for path in left)  # they might be another run's
    for path in left:
        os.utime(path, (time.time() - DAY - 60,) * 2)
    assert store.evict() == (0, 0)
    assert all(path in map(store_path(store), keys) for path in files(store))


def store_path(store: Store) -> Callable[[str], Path]:
    return lambda key: file_of(store, key)


def _evict_for_ever(store: Store) -> None:
    while True:
        store.evict()


def test_eviction_while_others_read_and_evict(store: Store) -> None:
    """An entry read while it is removed is read to its end, or is a miss; never an error."""
    keys = ["facts/" + digest_of(str(i)) for i in range(8)]
    greedy = [start(_evict_for_ever, Store(store.folder, 0)) for _ in range(2)]
    hits = misses = 0
    end = time.monotonic() + 60
    while min(hits, misses) < 30 and time.monotonic() < end:
        for key in keys:
            store.write(key, content(key, 0))
            for _ in range(3):
                data = store.read(key)
                assert data in (None, content(key, 0))
                hits, misses = hits + (data is not None), misses + (data is None)
    assert min(hits, misses) >= 30
    for process in greedy:
        assert process.is_alive()
        process.kill()
        process.join(60)


BLOCK = 4096


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    entries=st.lists(
        st.tuples(st.integers(0, 3 * BLOCK), st.integers(2, 400), st.booleans()), max_size=12
    ),
    limit=st.integers(0, 20 * BLOCK),
)
def test_the_least_recently_used_go(entries: list[tuple[int, int, bool]], limit: int) -> None:
    """For any sizes, ages (in hours) and limit: those that go are older than those that stay but
    for what is kept, no more go than must, and what stays is within the limit if it can be."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder), limit)
        sizes, ages, keep = {}, {}, set()
        for i, (size, hours, kept) in enumerate(entries):
            key = f"{('facts', 'latents')[i % 2]}/{digest_of(str(i))}"
            store.write(key, bytes(size))
            os.utime(file_of(store, key), (time.time() - hours * 3600 - i,) * 2)
            sizes[key], ages[key] = -(-(size + 16) // BLOCK) * BLOCK, hours * 3600 + i
            keep |= {key} if kept else set()
        assert store.size() == sum(sizes.values())
        gone, freed = store.evict(keep)
        left = {key for key in sizes if file_of(store, key).exists()}
        went = sizes.keys() - left
        assert (gone, freed) == (len(went), sum(sizes[key] for key in went))
        assert store.size() == sum(sizes[key] for key in left)
        assert keep <= left
        assert store.size() <= limit or left == keep
        if went:
            last = min(went, key=lambda key: ages[key])
            assert all(ages[key] < ages[last] for key in left - keep)
            assert store.size() + sizes[last] > limit
        assert store.evict(keep) == (0, 0)


def test_use_is_marked_once_an_hour(store: Store) -> None:
    """Reading and asking make an old entry new, at most once an hour, and mend a time to come."""
    file = file_of(store, KEY)
    for ask in (store.read, store.__contains__):
        store.write(KEY, b"data")
        now = time.time()
        for age, touched in ((2 * 3600, True), (600, False), (-DAY, True)):
            os.utime(file, (now - age,) * 2)
            before = file.stat().st_mtime
            ask(KEY)
            after = file.stat().st_mtime
            assert (after != before) == touched
            assert not touched or abs(after - now) < 60


def test_what_is_read_stays(store: Store) -> None:
    """Of two old entries the one that was used last outlives the other."""
    keys = [KEY, "facts/" + digest_of("two")]
    for key in keys:
        store.write(key, bytes(100))
        os.utime(file_of(store, key), (time.time() - 5 * 3600,) * 2)
    store.read(keys[0])
    assert Store(store.folder, BLOCK).evict() == (1, BLOCK)
    assert keys[0] in store
    assert keys[1] not in store


def test_foreign_files_are_left_alone(store: Store) -> None:
    """What else lies in the folder, images of the user's for one, is not counted or removed."""
    store.write(KEY, b"data")
    shelf = file_of(store, KEY).parent
    foreign = [
        store.folder / "photo.jpg", store.folder / "facts" / ("0" * 32), shelf / "notes.txt",
        shelf / (shelf.name + "0" * 31), store.folder / "facts" / "ab" / ("f" * 32),
        store.folder / "My photos" / "ab" / ("ab" + "0" * 30), shelf / ".hidden.part",
    ]  # fmt: skip
    for path in foreign:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"mine")
        os.utime(path, (0, 0))
    (store.folder / "loop").symlink_to(store.folder)
    assert store.size() == BLOCK
    assert Store(store.folder, 0).evict() == (1, BLOCK)
    assert all(path.read_bytes() == b"mine" for path in foreign)


def test_a_folder_that_is_gone(store: Store) -> None:
    """An empty or missing cache has size 0, and one removed under a run's feet is made again."""
    assert store.size() == 0
    assert store.evict() == (0, 0)
    store.write(KEY, b"data")
    for path in [*files(store), *sorted(store.folder.rglob("*"), reverse=True), store.folder]:
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
    assert KEY not in store
    store.write(KEY, b"data")
    assert store.read(KEY) == b"data"


@contextmanager
def unprivileged() -> Iterator[None]:
    """For a while, a user who may not do everything: root is asked for no permission."""
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(65534)
        yield
    finally:
        if root:
            os.seteuid(0)


def test_a_folder_that_is_only_read() -> None:
    """Of a folder that is read-only, another user's for one: whole entries are read, nothing is
    changed, and writing says what to do."""
    with tempfile.TemporaryDirectory() as name:  # pytest's own is closed to other users
        store = Store(Path(name) / "cache", 0)
        broken = "facts/" + digest_of("two")
        store.write(KEY, b"data")
        store.write(broken, b"data")
        file_of(store, broken).write_bytes(b"")
        os.utime(file_of(store, KEY), (0, 0))
        Path(name).chmod(0o755)
        for path in [store.folder, *store.folder.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        with unprivileged():
            assert KEY in store
            assert store.read(KEY) == b"data"
            assert store.read(broken) is None
            assert store.evict() == (0, 0)
            message = r"cache .*could not take .*: Permission denied\. Make it writable .*CACHE"
            for key in (KEY, broken, "latents/" + digest_of("new")):
                with pytest.raises(RunError, match=message):
                    store.write(key, b"data")
            assert len(files(store)) == 2


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    """Reading is a miss; writing says what is in the way, wherever on the path it is."""
    (tmp_path / "file").write_bytes(b"mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        store = Store(folder, 0)
        assert store.read(KEY) is None
        assert KEY not in store
        assert store.evict() == (0, 0)
        with pytest.raises(RunError, match="A file is where a folder has to be: move it away"):
            store.write(KEY, b"data")
    assert (tmp_path / "file").read_bytes() == b"mine"


def _write_with_little_space(store: Store, said: Any) -> None:
    """Writes with a limit on the size of files, which the system enforces as a full disk does."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        store.write(KEY, content(KEY, 1))
    except RunError as error:
        said.send(str(error))


def test_no_space_left(store: Store) -> None:
    """A write that ends half way is an error that says so; the entry of before is whole, and what
    was written of the new one is gone."""
    store.write(KEY, content(KEY, 0))
    said, saying = PROCESSES.Pipe(duplex=False)
    finished(start(_write_with_little_space, store, saying))
    assert said.poll(), "what did not fit was written without an error"
    assert "could not take 293 KiB: File too large. Another folder can be named" in said.recv()
    assert store.read(KEY) == content(KEY, 0)
    assert files(store) == [file_of(store, KEY)]
    full = store._why(OSError(28, "No space left on device"), 2**20)
    assert re.search(r"1\.0 MiB: No space left on device \(.* free\)\. Free some space there", full)


def test_a_store_goes_to_workers(store: Store) -> None:
    """It is pickled by its folder and limit."""
    assert pickle.loads(pickle.dumps(store)) == store


def test_the_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """SD_LORA_CACHE, else the XDG folder if that is absolute, else ~/.cache."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SD_LORA_CACHE", raising=False)
    for shared, folder in (
        ("/x", Path("/x")),
        ("", tmp_path / ".cache"),
        ("x", tmp_path / ".cache"),
    ):
        monkeypatch.setenv("XDG_CACHE_HOME", shared)
        assert default_folder() == folder / "sd_lora"
    monkeypatch.setenv("SD_LORA_CACHE", "~/mine")
    assert default_folder() == tmp_path / "mine"


PARTS = st.lists(st.text() | st.binary() | st.text(st.characters(categories=["Cs"])), max_size=4)


@settings(max_examples=200, deadline=None)
@given(a=PARTS, b=PARTS)
def test_digests_are_of_the_parts(a: list[str | bytes], b: list[str | bytes]) -> None:
    """Two lists of parts have the same digest only if they are the same: no joint is lost, and a
    lone surrogate of a file's name is no error."""
    assert (digest_of(*a) == digest_of(*b)) == (a == b)
    joined = "".join(p for p in a if isinstance(p, str))
    assert digest_of(joined, "") != digest_of(joined)


def test_weights_have_digests() -> None:
    """A copy has the same one; a bit, a name, a dtype or a shape more or less another; parts that
    are left out do not count."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    digest = weights_digest(module)
    copy = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    assert weights_digest(copy) != digest
    copy.load_state_dict(module.state_dict())
    assert weights_digest(copy) == digest
    with torch.no_grad():
        copy[2].bias.view(torch.int32)[1] ^= 1  # the last bit of one number
    assert weights_digest(copy) != digest
    assert weights_digest(copy, ("2.",)) == weights_digest(module, ("2.",)) != digest
    bits = torch.arange(12, dtype=torch.int16)
    twins = [bits.view(torch.float16), bits.view(torch.bfloat16), bits.view(3, 4), bits.view(4, 3)]
    digests = set()
    for name in ("a", "b"):
        for twin in twins:
            holder = nn.Module()
            holder.register_buffer(name, twin)
            digests.add(weights_digest(holder))
    assert len(digests) == 8
