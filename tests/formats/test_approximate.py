"""Cutting ranks, sums, and what the tools write: closed forms, and what stays of the source."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

import sd_lora
from sd_lora.adapters.deltas import Delta
from sd_lora.adapters.methods import LoRA
from sd_lora.adapters.state import make_delta
from sd_lora.files import TensorFile
from sd_lora.formats import adapter_files as files
from sd_lora.formats import lora_file as reading
from sd_lora.formats import output, tools, verify
from sd_lora.formats.adapter_files import Format
from sd_lora.formats.approximate import Cut, nearest, nearest_to
from sd_lora.formats.bake import bake
from sd_lora.formats.canonical import Adapter
from sd_lora.formats.checkpoints import Checkpoint
from sd_lora.formats.lora_file import open_lora
from sd_lora.formats.merge import BlockWeight, merge
from sd_lora.formats.names import Naming
from sd_lora.formats.output import Origin, Output, Spool
from sd_lora.models.families import FAMILIES
from sd_lora.models.meta_pipeline import MetaPipeline
from tests.formats.trained import saved, trained, weights


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_spectrum(sigma: list[float], size: int) -> Tensor:
    """A square matrix with these singular values, in float64."""
    U, V = (torch.linalg.qr(values(size, len(sigma), seed=s).double()).Q for s in (1, 2))
    return U * torch.tensor(sigma, dtype=torch.float64) @ V.T


def by_factors(sigma: list[float], size: int) -> LoRA:
    """The same as B·A, with all of σ in B."""
    U, V = (torch.linalg.qr(values(size, len(sigma), seed=s)).Q for s in (1, 2))
    tensors = {"lora_A": V.T.contiguous(), "lora_B": U * torch.tensor(sigma)}
    return LoRA((size, size), tensors)


# --- how many ranks ---


def test_kernels_have_a_rank_of_their_own() -> None:
    """`conv_rank` is the limit of kernels above 1×1 alone; without it the rank is."""
    shapes = [(20, 20, 3, 3), (20, 20, 1, 3), (20, 20, 1, 1), (20, 20)]
    for cut, want in ((Cut(rank=5, conv_rank=2), [2, 2, 5, 5]), (Cut(rank=5), [5, 5, 5, 5])):
        assert [nearest_to(values(*shape), cut)[0].rank for shape in shapes] == want
    cut = Cut(conv_rank=2, energy=1)
    assert [nearest_to(values(*shape), cut)[0].rank for shape in shapes] == [2, 2, 20, 20]
    with pytest.raises(sd_lora.UsageError, match="conv_rank must be"):
        Cut(rank=1, conv_rank=0)


@pytest.mark.parametrize("sigma", [[1.0] * 5, [3.0, 2.0, 1.0], [1.0, 1e-2, 1e-7]])
def test_all_of_the_energy_is_every_rank(sigma: list[float]) -> None:
    """Energy 1 keeps every singular value that is not zero, also one whose square is far below
    the rounding of the sum, of factors and of a whole ΔW."""
    delta = by_factors(sigma, 24)
    near, loss = nearest(delta, Cut(energy=1))
    assert near.rank == len(sigma)
    assert torch.equal(near.weight(), delta.weight())
    assert loss.error == 0
    matrix = with_spectrum(sigma, 24)
    near, loss = nearest_to(matrix, Cut(energy=1))
    assert near.rank is not None
    assert near.rank >= len(sigma)
    torch.testing.assert_close(near.weight().double(), matrix, rtol=0, atol=1e-6)
    assert loss.error < 1e-6


@pytest.mark.parametrize(
    ("cut", "rank"),
    [
        (Cut(energy=0.799), 80),
        (Cut(ratio=2), 100),
        (Cut(rank=90, ratio=2), 90),
        (Cut(rank=90, energy=0.495), 50),
        (Cut(energy=0.295), 30),
    ],
)
def test_more_ranks_than_were_looked_for_first(cut: Cut, rank: int) -> None:
    """100 equal singular values and 100 a hundredth of them, of a matrix for the randomised search:
    energy and ratio find as many as they ask for, beyond the 64 that it starts with; the error is
    the closed one."""
    matrix = with_spectrum([1.0] * 100 + [0.01] * 100, 400)
    near, loss = nearest_to(matrix, cut)
    assert near.rank == rank
    want = (1 - rank / 100.01) ** 0.5
    assert loss.error == pytest.approx(want, rel=1e-3)
    measured = float((near.weight().detach().double() - matrix).norm() / matrix.norm())
    assert measured == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize("kind", ["whole", "randomised", "factors", "kernel"])
def test_the_factors_share_each_singular_value(kind: str) -> None:
    """Row i of A and column i of B have the norm √σᵢ each, so that both stay within half
    precision's range however large ΔW is."""
    sigma = [1e4, 3.0, 1.0, 1e-3]
    cut = Cut(rank=3)
    if kind == "factors":
        near, _ = nearest(by_factors(sigma, 40), cut)
    elif kind == "kernel":
        near, _ = nearest_to(with_spectrum(sigma, 36).reshape(36, 4, 3, 3), cut)
    else:
        near, _ = nearest_to(with_spectrum(sigma, 400 if kind == "randomised" else 40), cut)
    factors = near.low_rank()
    assert factors is not None
    A, B = (f.detach().flatten(1).double() for f in factors)
    roots = torch.tensor(sigma[:3], dtype=torch.float64).sqrt()
    torch.testing.assert_close(A.norm(dim=1), roots, rtol=1e-4, atol=0)
    torch.testing.assert_close(B.norm(dim=0), roots, rtol=1e-4, atol=0)
    assert near.scale == 1


def test_the_randomised_search_is_a_function_of_the_matrix() -> None:
    """The global generator has no part in it, and is left where it was."""
    matrix, found = values(300, 310), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        found.append(nearest_to(matrix, Cut(rank=4))[0].tensors())
        assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(found[0][kind], found[1][kind]) for kind in ("lora_A", "lora_B"))


# --- merge ---


def out(path: Path, folder: Path, **options: object) -> Output:
    return Output(path, meta_pipeline=MetaPipeline.of_folder(str(folder)), **options)


def read_weights(path: Path, folder: Path) -> dict[tuple[str, str], Tensor]:
    return weights(open_lora(path, MetaPipeline.of_folder(str(folder)).layout).adapter)


def in_dtype(path: Path, dtype: torch.dtype) -> Path:
    """Casts a file's tensors, in place."""
    header = TensorFile(path).header
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(path).items()}
    save_file(tensors, path, header)
    return path


def with_facts(path: Path, **facts: str) -> Path:
    """Adds keys to a file's header, in place; "__" for the dot in them."""
    added = {key.replace("__", "."): value for key, value in facts.items()}
    save_file(load_file(path), path, TensorFile(path).header | added)
    return path


def record_of(path: Path) -> dict:
    return json.loads(TensorFile(path).header["sd_lora"])


@pytest.fixture
def two(tiny_sd1: Path, tmp_path: Path) -> list[Path]:
    """Two random LoRAs of the UNet."""
    return [
        saved(tmp_path / f"{n}.safetensors", files.KOHYA, trained(tiny_sd1, n, False), tiny_sd1)
        for n in (1, 2)
    ]


def test_a_pattern_ends_at_a_dot() -> None:
    """`up_blocks.1` is not the beginning of `up_blocks.10`, nor `text_encoder` of the second one;
    a pattern may name the component or not, and one file or all."""
    covers = BlockWeight("up_blocks.1", 1).covers
    assert covers(1, "unet", "up_blocks.1.resnets.0.conv1")
    assert covers(7, "unet", "up_blocks.1")
    assert not covers(1, "unet", "up_blocks.10.resnets.0.conv1")
    assert not covers(1, "unet", "mid_block.up_blocks.1")
    text = BlockWeight.parse("text_encoder=0").covers
    assert text(1, "text_encoder", "text_model.final")
    assert not text(1, "text_encoder_2", "text_model.final")
    assert BlockWeight.parse(r"unet\.(up|down)_blocks=2").covers(1, "unet", "down_blocks.0.x")
    second = BlockWeight.parse("2:.*=0.5")
    assert (second.file, second.pattern, second.factor) == (2, ".*", 0.5)
    assert second.covers(2, "unet", "conv_in")
    assert not second.covers(1, "unet", "conv_in")


@pytest.mark.parametrize("swap", [False, True])
def test_of_several_patterns_the_first_counts(
    swap: bool, two: list[Path], tiny_sd1: Path, tmp_path: Path
) -> None:
    """A module that two patterns cover has the factor of the one that was given first, not the
    last, the product, or the more exact one."""
    blocks = [BlockWeight.parse("up_blocks.1=2"), BlockWeight.parse("up_blocks=-3")]
    path = tmp_path / "m.safetensors"
    to = out(path, tiny_sd1, check=False)
    merge(two, [1, 0.5], to, blocks=blocks[::-1] if swap else blocks)
    first, second, have = (read_weights(p, tiny_sd1) for p in (*two, path))
    for key, total in have.items():
        factor = 1.0
        if key[1].startswith("up_blocks."):
            factor = 2.0 if key[1].startswith("up_blocks.1.") and not swap else -3.0
        want = factor * (first[key] + 0.5 * second[key])
        assert float((total - want).norm() / want.norm()) < 1e-6


def test_weights_that_leave_nothing(two: list[Path], tiny_sd1: Path, tmp_path: Path) -> None:
    """Every weight 0, by themselves or by a block's factor, is an error; and so is a weight or a
    factor that is no finite number. Nothing is written."""
    there = sorted(tmp_path.iterdir())
    with pytest.raises(sd_lora.UsageError, match="weight 0"):
        merge(two, [0, 0], out(tmp_path / "m.safetensors", tiny_sd1))
    blocks = [BlockWeight.parse("unet=0")]
    with pytest.raises(sd_lora.UsageError, match="weight 0"):
        merge(two, [1, 1], out(tmp_path / "m.safetensors", tiny_sd1), blocks=blocks)
    for weight in (math.nan, math.inf, -math.inf):
        for cut in (None, Cut(rank=2)):
            with pytest.raises(sd_lora.UsageError, match="nan|inf|finite"):
                merge(two, [1, weight], out(tmp_path / "m.safetensors", tiny_sd1), cut=cut)
        with pytest.raises(sd_lora.UsageError, match="nan|inf|finite"):
            BlockWeight.parse(f"unet={weight}")
    assert sorted(tmp_path.iterdir()) == there


def test_bake_refuses_weights_that_are_no_numbers(
    two: list[Path], tiny_sd1: Path, tmp_path: Path
) -> None:
    """A weight that is not finite is an error, which does not blame the base; nothing is left."""
    there = sorted(tmp_path.iterdir())
    with pytest.raises((sd_lora.UsageError, sd_lora.RunError)):
        bake(Checkpoint(tiny_sd1), two, [1, math.inf], tmp_path / "baked")
    assert sorted(tmp_path.iterdir()) == there


# --- what the output says and in which numbers ---


def converted(sources: list[Path], to: Output) -> None:
    tools.convert(sources[0], to)


def resized(sources: list[Path], to: Output) -> None:
    tools.resize(sources[0], to, Cut(rank=2))


def merged(sources: list[Path], to: Output) -> None:
    merge(sources, [0.7, 0.3], to)


@pytest.mark.parametrize("family", ["sd1", "sd2"])
@pytest.mark.parametrize("tool", [converted, resized, merged])
def test_what_was_true_of_the_source_stays(
    tool: Callable[[list[Path], Output], None],
    family: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """v-prediction, which no tensor can tell, and the source's `ss_…` facts are in the header of
    what was made of it; what described its tensors is not."""
    folder = request.getfixturevalue(f"tiny_{family}")
    sources = []
    for number in (1, 2):
        adapter = trained(folder, number, text=False)
        path = saved(tmp_path / f"{number}.safetensors", files.KOHYA, adapter, folder)
        facts = {"modelspec__prediction_type": "v", "ss_clip_skip": "2", "ss_network_dim": "99"}
        facts["ss_base_model_version"] = FAMILIES[family].base_versions["v_prediction"]
        sources.append(with_facts(path, **facts))
    path = tmp_path / "o.safetensors"
    tool(sources, out(path, folder, check=False))
    header = TensorFile(path).header
    assert header["modelspec.prediction_type"] == "v"
    assert header["ss_base_model_version"] == FAMILIES[family].base_versions["v_prediction"]
    architecture = FAMILIES[family].architectures["v_prediction"]
    assert header["modelspec.architecture"] == f"{architecture}/lora"
    assert header["ss_network_dim"] != "99"
    assert header["ss_clip_skip"] == "2"


def test_the_record_of_what_was_done(two: list[Path], tiny_sd1: Path, tmp_path: Path) -> None:
    """Our part of the header names the source with the hash that it has, and states the error that
    was made; an exact conversion states none."""
    digest = [TensorFile(path).header["sshs_model_hash"] for path in two]
    assert all(len(d) == 64 for d in digest)
    to = [out(tmp_path / f"o{n}.safetensors", tiny_sd1, check=False) for n in range(4)]
    paths = [output.path for output in to]
    tools.convert(two[0], to[0])
    record = record_of(paths[0])
    assert (record["source"], record["source_hash"]) == ("1.safetensors", digest[0])
    assert "approximation_error" not in record
    result = tools.resize(two[0], to[1], Cut(rank=2))
    record = record_of(paths[1])
    assert record["source_hash"] == digest[0]
    assert record["approximation_error"] == pytest.approx(result.error, rel=1e-12)
    assert 0.1 < result.error < 0.9
    merge(two, [0.7, 0.3], to[2])
    result = merge(two, [0.7, 0.3], to[3], cut=Cut(rank=2))
    for path in paths[2:]:
        entries = record_of(path)["merged"]
        assert [e["source_hash"] for e in entries] == digest
        assert [e["weight"] for e in entries] == [0.7, 0.3]
    assert "approximation_error" not in record_of(paths[2])
    assert record_of(paths[3])["approximation_error"] == pytest.approx(result.error, rel=1e-12)


def test_auto_is_the_dtype_of_the_source(two: list[Path], tiny_sd1: Path, tmp_path: Path) -> None:
    """What singular values cut is rounded as its source was; an exact sum of half files stays
    exact, in float32; files of two dtypes make a float32 one."""
    dtype = torch.bfloat16
    mixed = [in_dtype(two[0], dtype), two[1]]

    def to(name: str) -> Output:
        return out(tmp_path / name, tiny_sd1, check=False)

    def dtype_of(name: str) -> torch.dtype:
        (kind,) = {t.dtype for t in load_file(tmp_path / name).values()}
        return kind

    tools.resize(two[0], to("a.safetensors"), Cut(rank=2))
    assert dtype_of("a.safetensors") is dtype
    merge(mixed, [0.7, 0.3], to("b.safetensors"), cut=Cut(rank=2))
    assert dtype_of("b.safetensors") is torch.float32
    in_dtype(two[1], dtype)
    merge(two, [0.7, 0.3], to("c.safetensors"), cut=Cut(rank=2))
    assert dtype_of("c.safetensors") is dtype
    merge(two, [0.7, 0.3], to("d.safetensors"))
    assert dtype_of("d.safetensors") is torch.float32
    first, second = (read_weights(p, tiny_sd1) for p in two)
    for key, total in read_weights(tmp_path / "d.safetensors", tiny_sd1).items():
        want = 0.7 * first[key] + 0.3 * second[key]
        assert float((total - want).norm() / want.norm()) < 1e-6


@pytest.mark.parametrize(
    ("short", "long"), [("fp16", "float16"), ("bf16", "bfloat16"), ("fp32", "float32")]
)
def test_short_names_of_dtypes(
    short: str, long: str, two: list[Path], tiny_sd1: Path, tmp_path: Path
) -> None:
    """The short names give the very file that the long ones do."""
    for name in (short, long):
        path = tmp_path / name / "o.safetensors"
        tools.convert(two[0], out(path, tiny_sd1, dtype=name, check=False))
    first, second = (tmp_path / name / "o.safetensors" for name in (short, long))
    assert first.read_bytes() == second.read_bytes()
    assert {t.dtype for t in load_file(first).values()} == {getattr(torch, long)}


def test_resize_leaves_biases_as_they_are(tiny_sd1: Path, tmp_path: Path) -> None:
    """Of a file with trained biases, only what has ranks is cut; every bias keeps its bits and has
    no loss."""
    adapter = trained(tiny_sd1, text=False, train_bias="lora_only")
    source = saved(tmp_path / "a.safetensors", files.LYCORIS, adapter, tiny_sd1)
    path = tmp_path / "o.safetensors"
    result = tools.resize(source, out(path, tiny_sd1, to="lycoris"), Cut(rank=1))
    before, after = load_file(source), load_file(path)
    biases = [key for key in before if key.endswith(".diff_b")]
    assert len(biases) > 20
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in biases)
    assert {len(after[key]) for key in after if key.endswith("lora_down.weight")} == {1}
    assert not any(name.endswith(".bias") for _, name in result.losses)
    assert len(result.losses) == len(adapter["unet"]) - len(biases)


# --- written safely ---


def doubling(adapter: Adapter, naming: Naming) -> Iterator[tuple[str, Tensor]]:
    """diffusers' writer with a defect: one factor comes out twice as large."""
    for number, (key, tensor) in enumerate(files.DIFFUSERS.write(adapter, naming)):
        yield key, 2 * tensor if number == 7 else tensor


def test_what_is_written_is_read_again(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer that doubles one tensor of a hundred is found out by the check: an error that names
    the module, and no file; without the check, the file would be there."""
    broken = Format("diffusers", files.DIFFUSERS.end, doubling, "")
    monkeypatch.setitem(output.FORMATS, "diffusers", broken)
    adapter = trained(tiny_sd1, text=False)
    to = out(tmp_path / "o.safetensors", tiny_sd1, to="diffusers")
    with pytest.raises(sd_lora.RunError, match=r"is off by (50|100)\.0%") as caught:
        output.write(adapter, to, FAMILIES["sd1"], Origin())
    assert "unverified" not in str(caught.value)
    assert not list(tmp_path.iterdir())
    unchecked = out(tmp_path / "o.safetensors", tiny_sd1, to="diffusers", check=False)
    output.write(adapter, unchecked, FAMILIES["sd1"], Origin())
    assert [p.name for p in tmp_path.iterdir()] == ["o.safetensors"]


def test_the_spool_is_gone_afterwards(two: list[Path], tiny_sd1: Path, tmp_path: Path) -> None:
    """What a tool keeps beside its output goes with its end, whether in success or in failure."""
    there = {"1.safetensors", "2.safetensors"}
    path = tmp_path / "o.safetensors"
    loud = trained(tiny_sd1, text=False)
    loud["unet"]["conv_in"].lora_B.data[0, 0] = 1e12
    source = saved(tmp_path / "2.safetensors", files.LYCORIS, loud, tiny_sd1)
    with pytest.raises(sd_lora.RunError):
        tools.resize(source, out(path, tiny_sd1, dtype="float16"), Cut(rank=2))
    assert {p.name for p in tmp_path.iterdir()} == there
    tools.resize(two[0], out(path, tiny_sd1), Cut(rank=2))
    assert {p.name for p in tmp_path.iterdir()} == there | {"o.safetensors"}

    kept = Spool(tmp_path / "new")

    def failing() -> None:
        with kept as spool:
            spool.add("unet", "x", by_factors([1.0], 4))
            assert len(list((tmp_path / "new").iterdir())) == 1
            spool.adapter["unet"]["y"]

    with pytest.raises(KeyError):
        failing()
    assert not list((tmp_path / "new").iterdir())


def test_the_spool_keeps_every_number(tmp_path: Path) -> None:
    """rslora's α·√r, which no float32 holds, to 1e-12; factors and magnitudes to the bit."""
    alpha = 3.0 * math.sqrt(7)
    tensors = {"lora_A": values(7, 5), "lora_B": values(6, 7, seed=1)}
    kept: list[Delta] = [
        LoRA((6, 5), tensors, alpha), LoRA((6, 5), tensors, alpha, values(6, 1, seed=2))
    ]  # fmt: skip
    with Spool(tmp_path) as spool:
        for number, delta in enumerate(kept):
            spool.add("unet", str(number), delta)
        for number, delta in enumerate(kept):
            again = spool.adapter["unet"][str(number)]
            assert again.alpha == pytest.approx(alpha, rel=1e-12)
            assert again.tensors().keys() == delta.tensors().keys()
            pairs = ((again.tensors()[k], t) for k, t in delta.tensors().items())
            assert all(torch.equal(a.flatten(), b.flatten()) for a, b in pairs)
            assert (again.magnitude is None) == (delta.magnitude is None)


# --- one at a time ---


class Alive:
    """Makes deltas, and counts how many of those that were made are alive, by their memory."""

    def __init__(self) -> None:
        self.refs: list[StorageWeakRef] = []
        self.total = self.most = 0

    def __call__(
        self, name: str, tensors: Mapping[str, Tensor], are_checked: bool = False
    ) -> Delta:
        delta = make_delta(name, tensors, are_checked)
        first = next(iter(delta.tensors().values()))
        before = [ref for ref in self.refs if not ref.expired()]
        self.refs = [*before, StorageWeakRef(first.untyped_storage())]
        self.total += 1
        self.most = max(self.most, len(self.refs))
        return delta


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> Alive:
    """Counts what is made of files, of what the spool keeps, and of what diffusers loaded."""
    alive = Alive()
    for module in (reading, output, verify):
        monkeypatch.setattr(module, "make_delta", alive)
    return alive


@pytest.mark.parametrize("to", ["diffusers", "kohya", "lycoris"])
def test_conversion_holds_a_module_or_two(
    to: str, two: list[Path], tiny_sd1: Path, tmp_path: Path, alive: Alive
) -> None:
    """Of the hundreds of deltas of a file, converting and verifying hold two or three."""
    tools.convert(two[0], out(tmp_path / "o.safetensors", tiny_sd1, to=to))
    assert alive.total > 1000
    assert alive.most <= 4


def test_resizing_and_merging_hold_a_few_modules(
    two: list[Path], tiny_sd1: Path, tmp_path: Path, alive: Alive
) -> None:
    """Merging two files holds what a module has in each, not what it has in the file before."""

    def to(name: str) -> Output:
        return out(tmp_path / name, tiny_sd1, to="lycoris")

    tools.resize(two[0], to("a.safetensors"), Cut(rank=2))
    assert alive.most <= 4
    merge(two, [0.7, 0.3], to("b.safetensors"))
    merge(two, [0.7, 0.3], to("c.safetensors"), cut=Cut(rank=2))
    assert alive.total > 1000
    assert alive.most <= 4


def test_a_merge_says_what_all_of_its_files_say(tiny_sd1: Path, tmp_path: Path) -> None:
    """A fact that differs, or that one file lacks, is not the sum's; different predictions are
    noted, and none is claimed."""
    paths = []
    headers = ({"ss_clip_skip": "2", "ss_steps": "10"}, {"ss_clip_skip": "2", "ss_steps": "20"})
    for number, (header, kind) in enumerate(zip(headers, ("v", "epsilon"), strict=True)):
        adapter = trained(tiny_sd1, number, text=False)
        path = saved(tmp_path / f"{number}.safetensors", files.KOHYA, adapter, tiny_sd1)
        save_file(load_file(path), path, header | {"modelspec.prediction_type": kind})
        paths.append(path)
    out = Output(tmp_path / "m.safetensors", meta_pipeline=MetaPipeline.of_folder(str(tiny_sd1)))
    result = merge(paths, [1, 1], out)
    said = TensorFile(out.path).header
    assert said["ss_clip_skip"] == "2"
    assert "ss_steps" not in said
    assert "modelspec.prediction_type" not in said
    assert any("different predictions" in note for note in result.notes)
