"""convert, merge, resize, extract and bake against closed forms, on files on disk."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

import sd_lora
from sd_lora.files import TensorFile
from sd_lora.formats import adapter_files as files
from sd_lora.formats import approximate, bake, extract, merge, tools
from sd_lora.formats.approximate import Cut
from sd_lora.formats.checkpoints import Checkpoint
from sd_lora.formats.inspect import body_hash
from sd_lora.formats.lora_file import open_lora
from sd_lora.formats.output import Output
from sd_lora.models.meta_pipeline import MetaPipeline
from sd_lora.models.original_names import Layout, open_clip_parameter, unet_to_original
from tests.formats.trained import models_of, saved, trained, weights
from tests.tiny import build_pipeline, build_unet


def output(path: Path, folder: Path, **options: object) -> Output:
    return Output(path, meta_pipeline=MetaPipeline.of_folder(str(folder)), **options)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def read_weights(path: Path, folder: Path) -> dict[tuple[str, str], Tensor]:
    return weights(open_lora(path, MetaPipeline.of_folder(str(folder)).layout).adapter)


# --- convert ---


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("to", ["diffusers", "kohya", "lycoris"])
def test_convert_keeps_every_change(
    to: str, family: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """From kohya's file with its mixed ranks, each format has the same ΔW to 1e-6, verified by
    diffusers' own loader where it has one."""
    folder = request.getfixturevalue(f"tiny_{family}")
    adapter = trained(folder)
    source = saved(tmp_path / "source.safetensors", files.KOHYA, adapter, folder)
    result = tools.convert(source, output(tmp_path / "out.safetensors", folder, to=to))
    assert result.written.verified is not None
    assert result.written.verified.modules == sum(len(m) for m in adapter.values())
    want, have = weights(adapter), read_weights(tmp_path / "out.safetensors", folder)
    assert want.keys() == have.keys()
    assert max(relative(have[k], want[k]) for k in want) < 1e-6
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.safetensors", "source.safetensors"]


def test_convert_to_lycoris_keeps_every_bit(tiny_sd1: Path, tmp_path: Path) -> None:
    """LyCORIS' form has an alpha a module: factors and alphas come through to the last bit, in
    float16 too, where other forms would have to round a folded scale."""
    adapter = trained(tiny_sd1)
    source = saved(tmp_path / "a.safetensors", files.LYCORIS, adapter, tiny_sd1)
    halves = {k: t.half() for k, t in load_file(source).items()}
    save_file(halves, source)
    out = output(tmp_path / "b.safetensors", tiny_sd1, to="lycoris")
    result = tools.convert(source, out)
    again = load_file(tmp_path / "b.safetensors")
    assert result.written.dtype is torch.float16
    assert again.keys() == halves.keys()
    assert all(torch.equal(again[k], halves[k]) for k in halves)
    result = tools.convert(source, output(tmp_path / "c.safetensors", tiny_sd1, to="diffusers"))
    assert result.written.dtype is torch.float32
    assert any("float16 would round" in note for note in result.written.notes)
    want = weights(open_lora(source).adapter)
    have = read_weights(tmp_path / "c.safetensors", tiny_sd1)
    assert max(relative(have[k], want[k]) for k in want) < 1e-6


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_convert_to_half_precision(dtype: str, tiny_sd1: Path, tmp_path: Path) -> None:
    """A dtype that was asked for is written, half the size, and verified within its rounding."""
    source = saved(tmp_path / "a.safetensors", files.KOHYA, trained(tiny_sd1), tiny_sd1)
    out = output(tmp_path / "b.safetensors", tiny_sd1, to="diffusers", dtype=dtype)
    result = tools.convert(source, out)
    kinds = {t.dtype for t in load_file(tmp_path / "b.safetensors").values()}
    assert kinds == {getattr(torch, dtype)}
    assert result.written.verified is not None
    assert 1e-5 < result.written.verified.worst_error < 2e-2


def test_convert_refuses_what_half_precision_cannot_hold(tiny_sd1: Path, tmp_path: Path) -> None:
    """An entry above float16's 65504 in both factors, however balanced, is an error that names the
    key; nothing is left."""
    adapter = trained(tiny_sd1)
    adapter["unet"]["conv_in"].lora_B.data[0, 0] = 1e12
    source = saved(tmp_path / "a.safetensors", files.LYCORIS, adapter, tiny_sd1)
    out = output(tmp_path / "b.safetensors", tiny_sd1, to="diffusers", dtype="float16")
    with pytest.raises(sd_lora.RunError, match=r"unet\.conv_in\.lora_[AB].* ends at 6\.55e\+04"):
        tools.convert(source, out)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_convert_says_what_has_no_form(tiny_sd1: Path, tmp_path: Path) -> None:
    """LoHa has no diffusers or kohya form: the error offers the approximation, baking, LyCORIS."""
    adapter = trained(tiny_sd1, method="loha", text=False)
    source = saved(tmp_path / "a.safetensors", files.LYCORIS, adapter, tiny_sd1)
    for to in ("diffusers", "kohya"):
        with pytest.raises(sd_lora.UsageError, match=r"× loha\. --rank N .*sd-lora bake.*lycoris"):
            tools.convert(source, output(tmp_path / "b.safetensors", tiny_sd1, to=to))


@pytest.mark.parametrize("kind", ["loha", "lokr", "oft", "dora"])
def test_approximation_is_the_best_of_its_rank(kind: str, tiny_sd1: Path, tmp_path: Path) -> None:
    """The plain LoRA of LoHa, LoKr, OFT and DoRA is as near as singular values allow (Eckart and
    Young), and the stated error is the measured one; of OFT and DoRA, the change is that on the
    base's own weights."""
    options = {"method": "lora", "rule": "decompose"} if kind == "dora" else {"method": kind}
    adapter = trained(tiny_sd1, text=False, **options)
    form = files.DIFFUSERS if kind == "dora" else files.LYCORIS
    source = saved(tmp_path / "a.safetensors", form, adapter, tiny_sd1)
    base = Checkpoint(tiny_sd1)
    out = output(tmp_path / "b.safetensors", tiny_sd1, to="kohya")
    if kind in ("dora", "oft"):
        with pytest.raises(sd_lora.UsageError, match="depends on the base model.*--model"):
            tools.convert(source, out, cut=Cut(rank=5))
    result = tools.convert(source, out, cut=Cut(rank=5), base=base)
    have = read_weights(tmp_path / "b.safetensors", tiny_sd1)
    unet = models_of(tiny_sd1)["unet"]
    lost = total = 0.0
    for name, delta in adapter["unet"].items():
        W = unet.get_submodule(name).weight.detach().double()
        change = (delta.double().compose(W) - W).detach()
        sigma = torch.linalg.svdvals(change.flatten(1))
        best = float((sigma[5:] ** 2).sum())
        error = float((have["unet", name].reshape(change.shape) - change).square().sum())
        assert error == pytest.approx(best, rel=1e-3, abs=1e-9 * float((sigma**2).sum()))
        stated = result.losses["unet", name]
        assert stated.lost == pytest.approx(best, rel=1e-3, abs=1e-9 * stated.total)
        lost, total = lost + error, total + float((sigma**2).sum())
    assert result.error == pytest.approx((lost / total) ** 0.5, rel=1e-3)
    assert 0.01 < result.error < 0.9


def test_vectors_are_dropped_only_when_asked(tiny_sd1: Path, tmp_path: Path) -> None:
    """Biases have no plain form: an error before any work, or left out with a note that counts."""
    models = models_of(tiny_sd1)
    sd_lora.inject(models["unet"], targets="attention", method="loha", train_bias="lora_only")
    for delta in sd_lora.deltas_of(models["unet"]).values():
        for p in delta.parameters():
            p.data.add_(0.1)
    (source,) = sd_lora.save_adapter({"unet": models["unet"]}, tmp_path / "s", name="x")
    out = output(tmp_path / "b.safetensors", tiny_sd1, to="kohya")
    with pytest.raises(sd_lora.UsageError, match=r"bias or a norm.*--drop_vectors"):
        tools.convert(source, out, cut=Cut(rank=64))
    result = tools.convert(source, out, cut=Cut(rank=64), drop_vectors=True)
    biases = [n for n in sd_lora.deltas_of(models["unet"]) if n.endswith(".bias")]
    assert any(f"{len(biases)} biases and norms were left out" in note for note in result.notes)
    assert result.error < 1e-6


def test_what_does_not_fit_is_refused_before_writing(
    tiny_sd1: Path, tiny_sdxl: Path, tmp_path: Path
) -> None:
    """Another family's model, and the published shapes, are refused by the first module."""
    source = saved(tmp_path / "a.safetensors", files.KOHYA, trained(tiny_sd1), tiny_sd1)
    with pytest.raises(sd_lora.UsageError, match="does not fit .*tiny-sdxl"):
        tools.convert(source, output(tmp_path / "b.safetensors", tiny_sdxl, to="diffusers"))
    with pytest.raises(sd_lora.UsageError, match="published Stable Diffusion 1.x: for a LoRA of"):
        tools.convert(source, Output(tmp_path / "b.safetensors", to="diffusers"))
    tools.convert(source, Output(tmp_path / "b.safetensors", to="diffusers", check=False))
    want, have = weights(trained(tiny_sd1)), read_weights(tmp_path / "b.safetensors", tiny_sd1)
    assert max(relative(have[k], want[k]) for k in want) < 1e-6


def test_outputs_are_kept_safe(tiny_sd1: Path, tmp_path: Path) -> None:
    """An output that exists, a folder, a wrong ending, an unknown format: errors; --overwrite
    replaces, and the file of before stays when the new one fails."""
    source = saved(tmp_path / "a.safetensors", files.KOHYA, trained(tiny_sd1), tiny_sd1)
    before = source.read_bytes()
    with pytest.raises(sd_lora.UsageError, match=r"exists: take another name, or --overwrite"):
        output(source, tiny_sd1)
    with pytest.raises(sd_lora.UsageError, match="ends with .safetensors"):
        output(tmp_path / "b.pt", tiny_sd1)
    with pytest.raises(sd_lora.UsageError, match="Did you mean kohya"):
        output(tmp_path / "b.safetensors", tiny_sd1, to="kohia")
    adapter = trained(tiny_sd1)
    adapter["unet"]["conv_in"].lora_B.data[0, 0] = 1e12
    large = saved(tmp_path / "large.safetensors", files.LYCORIS, adapter, tiny_sd1)
    again = output(source, tiny_sd1, to="kohya", dtype="float16", overwrite=True)
    with pytest.raises(sd_lora.RunError):
        tools.convert(large, again)
    assert source.read_bytes() == before


def test_the_header_says_what_is_in_the_file(tiny_sd1: Path, tmp_path: Path) -> None:
    """A source's facts stay, what described its tensors is replaced, and the hash is that of the
    body, so that the same work gives the same bytes."""
    source = saved(tmp_path / "a.safetensors", files.KOHYA, trained(tiny_sd1), tiny_sd1)
    facts = {"ss_num_train_images": "17", "ss_network_dim": "99", "lora_adapter_metadata": "{}"}
    save_file(load_file(source), source, facts | {"ss_base_model_version": "sd_v1"})
    for name in ("b", "c"):
        out = tmp_path / name / "out.safetensors"
        tools.convert(source, output(out, tiny_sd1, to="lycoris"))
    assert (tmp_path / "b/out.safetensors").read_bytes() == (
        tmp_path / "c/out.safetensors"
    ).read_bytes()
    header = TensorFile(tmp_path / "b/out.safetensors").header
    assert header["ss_num_train_images"] == "17"
    assert header["ss_network_dim"] == "4"
    assert "lora_adapter_metadata" not in header
    assert header["sshs_model_hash"] == body_hash(tmp_path / "b/out.safetensors")
    assert json.loads(header["sd_lora"])["source"] == "a.safetensors"


# --- merge ---


def two(folder: Path, tmp_path: Path) -> list[Path]:
    """Two random LoRAs in different formats, the second without some of the modules."""
    a = saved(tmp_path / "a.safetensors", files.KOHYA, trained(folder, 1), folder)
    second = trained(folder, 2, targets="attention+conv", rank=3)
    return [a, saved(tmp_path / "b.safetensors", files.DIFFUSERS, second, folder)]


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_merge_is_the_weighted_sum(
    family: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """.7·ΔW₁ + .3·ΔW₂ to 1e-6 in every module, also in those that one file alone has; averaging the
    factors, as is often done, is far from it."""
    folder = request.getfixturevalue(f"tiny_{family}")
    paths = two(folder, tmp_path)
    merge.merge(paths, [0.7, 0.3], output(tmp_path / "m.safetensors", folder))
    first, second = (read_weights(p, folder) for p in paths)
    have = read_weights(tmp_path / "m.safetensors", folder)
    assert have.keys() == first.keys() | second.keys()
    assert first.keys() != second.keys()
    for key, total in have.items():
        zero = torch.zeros_like(total)
        want = 0.7 * first.get(key, zero) + 0.3 * second.get(key, zero)
        assert relative(total, want) < 1e-6


def test_merge_by_blocks(tiny_sd1: Path, tmp_path: Path) -> None:
    """A factor on a block of all files, or of one; what has no weight is left out with a note; a
    pattern that covers nothing is an error."""
    paths = two(tiny_sd1, tmp_path)
    parse = merge.BlockWeight.parse
    blocks = [parse("2:up_blocks=0.5"), parse("text_encoder=0"), parse(r"unet\.conv_.*=2")]
    out = output(tmp_path / "m.safetensors", tiny_sd1)
    result = merge.merge(paths, [1, -1], out, blocks=blocks)
    first, second = (read_weights(p, tiny_sd1) for p in paths)
    have = read_weights(tmp_path / "m.safetensors", tiny_sd1)
    for (component, name), total in have.items():
        assert component == "unet"
        zero = torch.zeros_like(total)
        a = 2.0 if name.startswith("conv_") else 1.0
        b = 0.5 if name.startswith("up_blocks") else a
        key = component, name
        want = a * first.get(key, zero) - b * second.get(key, zero)
        assert relative(total, want) < 1e-6
    assert any(f"{12} modules have weight 0" in note for note in result.notes)
    with pytest.raises(sd_lora.UsageError, match="covers no module"):
        merge.merge(
            paths, [1, 1], output(tmp_path / "x.safetensors", tiny_sd1), blocks=[parse("nope=1")]
        )
    for bad in ("up_blocks", "up_blocks=x", "(=1"):
        with pytest.raises(sd_lora.UsageError, match="is not .*PATTERN=NUMBER"):
            parse(bad)


def test_merge_at_a_rank_states_its_error(tiny_sd1: Path, tmp_path: Path) -> None:
    """Cut to rank 3, the stated error of each sum is that of its best approximation."""
    paths = two(tiny_sd1, tmp_path)
    out = output(tmp_path / "m.safetensors", tiny_sd1)
    result = merge.merge(paths, [0.7, 0.3], out, cut=Cut(rank=3))
    first, second = (read_weights(p, tiny_sd1) for p in paths)
    have = read_weights(tmp_path / "m.safetensors", tiny_sd1)
    for key, loss in result.losses.items():
        zero = torch.zeros_like(have[key])
        want = 0.7 * first.get(key, zero) + 0.3 * second.get(key, zero)
        sigma = torch.linalg.svdvals(want.flatten(1))
        best = float((sigma[3:] ** 2).sum() / (sigma**2).sum()) ** 0.5
        assert loss.error == pytest.approx(best, rel=1e-3, abs=1e-6)
        assert relative(have[key], want) == pytest.approx(best, rel=1e-3, abs=1e-6)


def test_merge_of_other_methods_needs_a_rank(tiny_sd1: Path, tmp_path: Path) -> None:
    """LoRA with LoHa has no exact sum: the error offers a rank, at which it works."""
    a = saved(tmp_path / "a.safetensors", files.KOHYA, trained(tiny_sd1, 1), tiny_sd1)
    other = trained(tiny_sd1, 2, method="loha")
    b = saved(tmp_path / "b.safetensors", files.LYCORIS, other, tiny_sd1)
    with pytest.raises(sd_lora.UsageError, match=r"no exact sum.*--rank N"):
        merge.merge([a, b], [1, 1], output(tmp_path / "m.safetensors", tiny_sd1))
    result = merge.merge(
        [a, b], [1, 1], output(tmp_path / "m.safetensors", tiny_sd1), cut=Cut(rank=64)
    )
    assert result.error < 1e-6
    first, second = (read_weights(p, tiny_sd1) for p in (a, b))
    have = read_weights(tmp_path / "m.safetensors", tiny_sd1)
    for key, total in have.items():
        assert (
            relative(total, first[key].reshape(total.shape) + second[key].reshape(total.shape))
            < 1e-5
        )


def test_merge_refuses_two_families(tiny_sd1: Path, tiny_sdxl: Path, tmp_path: Path) -> None:
    """LoRAs of different families have no sum, and one weight a file is wanted."""
    a = saved(tmp_path / "a.safetensors", files.KOHYA, trained(tiny_sd1), tiny_sd1)
    b = saved(tmp_path / "b.safetensors", files.KOHYA, trained(tiny_sdxl), tiny_sdxl)
    with pytest.raises(sd_lora.UsageError, match=r"Diffusion 1\.x and .* Diffusion XL: LoRAs of"):
        merge.merge([a, b], [1, 1], Output(tmp_path / "m.safetensors", check=False))
    with pytest.raises(sd_lora.UsageError, match="1 files and 2 weights"):
        merge.merge([a], [1, 1], Output(tmp_path / "m.safetensors", check=False))


# --- resize ---


@pytest.mark.parametrize(
    ("cut", "keep"),
    [
        (Cut(rank=2), lambda s: 2),
        (Cut(energy=0.9), lambda s: int((torch.cumsum(s**2, 0) < 0.9 * (s**2).sum()).sum()) + 1),
        (Cut(ratio=1.5), lambda s: int((s >= s[0] / 1.5).sum())),
        (Cut(rank=3, energy=0.99), None),
    ],
)
def test_resize_states_the_error_it_makes(
    cut: Cut, keep: Callable[[Tensor], int] | None, tiny_sd1: Path, tmp_path: Path
) -> None:
    """Ranks are those that rank, kept energy and ratio of singular values ask for; the stated error
    of each module and of all equals the measured one."""
    adapter = trained(tiny_sd1)
    source = saved(tmp_path / "a.safetensors", files.KOHYA, adapter, tiny_sd1)
    result = tools.resize(source, output(tmp_path / "b.safetensors", tiny_sd1), cut)
    lora = open_lora(tmp_path / "b.safetensors")
    want, have = weights(adapter), weights(lora.adapter)
    lost = total = 0.0
    for (component, name), change in want.items():
        sigma = torch.linalg.svdvals(change.flatten(1))
        rank = lora.adapter[component][name].rank
        own = adapter[component][name].rank
        if keep is not None:
            assert rank == min(keep(sigma[:own]), own)
        error = float((have[component, name] - change).square().sum())
        assert error == pytest.approx(
            float((sigma[rank:] ** 2).sum()), rel=1e-3, abs=1e-12 * float((sigma**2).sum())
        )
        assert result.losses[component, name].lost == pytest.approx(
            error, rel=1e-3, abs=1e-12 * float((sigma**2).sum())
        )
        lost, total = lost + error, total + float((sigma**2).sum())
    assert result.error == pytest.approx((lost / total) ** 0.5, rel=1e-3, abs=1e-6)


def test_a_mean_rank_goes_where_it_counts(tiny_sd1: Path, tmp_path: Path) -> None:
    """With the parameters of rank 2, shared, the error is no larger than with rank 2 for each, and
    not by more than one rank fewer parameters are used; the ranks are the cut of all singular
    values at one bound of σ² / cost, which is best for that many: no exchange of ranks between
    two modules lowers the error without more parameters."""
    adapter = trained(tiny_sd1)
    source = saved(tmp_path / "a.safetensors", files.KOHYA, adapter, tiny_sd1)
    out = output(tmp_path / "b.safetensors", tiny_sd1)
    shared = tools.resize(source, out, None, mean_rank=2)
    plain = tools.resize(source, output(tmp_path / "c.safetensors", tiny_sd1), Cut(rank=2))
    assert shared.error < plain.error
    changes = {key: change.flatten(1) for key, change in weights(adapter).items()}
    cost = {key: sum(change.shape) for key, change in changes.items()}
    budget = sum(2 * each for each in cost.values())
    used = sum(rank * cost[key] for key, rank in shared.ranks.items())
    assert budget - max(cost.values()) < used <= budget
    gains = {key: torch.linalg.svdvals(c).double() ** 2 / cost[key] for key, c in changes.items()}
    kept = [float(g[rank - 1]) for key, g in gains.items() if (rank := shared.ranks[key]) > 1]
    left = [float(g[shared.ranks[key]]) for key, g in gains.items()]
    assert max(left) <= min(kept) * (1 + 1e-4)
    with pytest.raises(sd_lora.UsageError, match="give mean_rank, at least 1, or"):
        tools.resize(source, out, Cut(rank=2), mean_rank=2)


def test_resize_of_enough_ranks_changes_no_bit(tiny_sd1: Path, tmp_path: Path) -> None:
    """A LoRA that has no more ranks than asked for keeps its factors."""
    source = saved(tmp_path / "a.safetensors", files.LYCORIS, trained(tiny_sd1), tiny_sd1)
    out = output(tmp_path / "b.safetensors", tiny_sd1, to="lycoris")
    tools.resize(source, out, Cut(rank=64))
    before, after = load_file(source), load_file(tmp_path / "b.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give a rank, an energy or a ratio"),
        ({"rank": 0}, "at least 1"),
        ({"energy": 1.5}, r"share in \(0, 1\]"),
        ({"ratio": 0.5}, "at least 1"),
    ],
)
def test_cuts_that_mean_nothing(options: dict, message: str) -> None:
    """A rank below 1, an energy that is no share, a ratio below 1, nothing at all."""
    with pytest.raises(sd_lora.UsageError, match=message):
        Cut(**options)


@pytest.mark.parametrize("cut", [Cut(rank=12), Cut(energy=0.95), Cut(ratio=4.0), Cut(rank=700)])
def test_randomised_triplets_are_those_of_the_whole(cut: Cut) -> None:
    """On a matrix too large for the whole decomposition to be taken, ranks, factors and error agree
    with it: for a spectrum that falls as a finetune's does."""
    g = torch.Generator().manual_seed(0)
    U, V = (
        torch.linalg.qr(torch.randn(600, 600, generator=g, dtype=torch.float64)).Q for _ in "ab"
    )
    sigma = torch.arange(1, 601, dtype=torch.float64) ** -1.0
    matrix = U * sigma @ V.T
    near, loss = approximate.nearest_to(matrix, cut)
    keep = cut.count(sigma, float((sigma**2).sum()), (600, 600))
    assert abs(near.rank - keep) <= (0 if cut.rank else 1)
    best = float((sigma[near.rank :] ** 2).sum())
    measured = float((matrix - near.weight().double()).square().sum())
    assert measured == pytest.approx(best, rel=1e-2, abs=1e-10)
    assert loss.lost == pytest.approx(measured, rel=1e-4, abs=1e-10)


# --- extract and bake ---


def with_change(folder: Path, out: Path, rank: int = 8) -> dict[tuple[str, str], Tensor]:
    """Saves a pipeline folder whose every layer has a change of this rank; returns the changes."""
    pipeline = (
        DiffusionPipeline.from_pretrained(
            folder, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
        if "xl" not in folder.name
        else DiffusionPipeline.from_pretrained(folder)
    )
    g = torch.Generator().manual_seed(5)
    changes = {}
    for component, model in models_of(folder).items():
        live = getattr(pipeline, component)
        for name, module in model.named_modules():
            weight = getattr(module, "weight", None)
            if weight is None or weight.dim() < 2 or "embedding" in name.rpartition(".")[2]:
                continue
            rows, columns = len(weight), weight[0].numel()
            B, A = (torch.randn(s, generator=g) for s in ((rows, rank), (rank, columns)))
            change = (B @ A).reshape(weight.shape)
            change *= 0.3 * weight.norm() / change.norm()
            live.get_submodule(name).weight.data += change
            canonical = (
                name if component == "unet" or name.startswith("text_") else f"text_model.{name}"
            )
            changes[component, canonical] = change.double()
    pipeline.save_pretrained(out)
    return changes


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_extract_recovers_a_change_of_rank_8(
    family: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Base plus a rank-8 change of every layer, UNet and text encoders: extracted at rank 8, and by
    kept energy, each ΔW is the change to 1e-4."""
    folder = request.getfixturevalue(f"tiny_{family}")
    changes = with_change(folder, tmp_path / "tuned")
    base, tuned = Checkpoint(folder), Checkpoint(tmp_path / "tuned")
    for number, cut in enumerate((Cut(rank=8), Cut(energy=1 - 1e-9))):
        path = tmp_path / f"{number}.safetensors"
        result = extract.extract(base, tuned, output(path, folder), cut)
        have = read_weights(path, folder)
        assert have.keys() == changes.keys()
        assert max(relative(have[k].reshape(changes[k].shape), changes[k]) for k in changes) < 1e-4
        assert max(result.ranks.values()) <= 8
        assert any("parameters are unchanged" in note for note in result.notes)


def test_extract_says_what_no_lora_can_hold(tiny_sd1: Path, tmp_path: Path) -> None:
    """Changed norms and embeddings are counted with their share of the difference; nothing changed,
    another architecture, another family are errors."""
    with_change(tiny_sd1, tmp_path / "tuned")
    weights_file = next((tmp_path / "tuned" / "unet").glob("*.safetensors"))
    changed = load_file(weights_file)
    changed["conv_norm_out.weight"] += 1
    save_file(changed, weights_file, {"format": "pt"})
    base, tuned = Checkpoint(tiny_sd1), Checkpoint(tmp_path / "tuned")
    out = output(tmp_path / "o.safetensors", tiny_sd1)
    result = extract.extract(base, tuned, out, Cut(rank=8))
    (note,) = [note for note in result.notes if "no LoRA can hold" in note]
    assert note.startswith("1 parameters changed")
    assert "conv_norm_out" in note
    other = output(tmp_path / "p.safetensors", tiny_sd1)
    with pytest.raises(sd_lora.UsageError, match="differs from .* in no module"):
        extract.extract(base, base, other, Cut(rank=8))
    pipeline = build_pipeline("sd1")
    pipeline.unet = build_unet("sd1", layers_per_block=2)
    pipeline.save_pretrained(tmp_path / "deeper")
    with pytest.raises(sd_lora.UsageError, match="not two models of one architecture"):
        extract.extract(base, Checkpoint(tmp_path / "deeper"), other, Cut(rank=8))


@pytest.mark.parametrize("method", ["lora", "loha", "dora", "lokr", "oft"])
def test_bake_into_a_folder_is_the_merged_model(
    method: str, tiny_sd1: Path, tmp_path: Path
) -> None:
    """The folder's weights are the base's with the adapter merged, of every method, at any weight;
    it loads as a pipeline, and everything else is the same to the byte."""
    options = {"rule": "decompose"} if method == "dora" else {"method": method}
    adapter = trained(tiny_sd1, **options)
    form = {"lora": files.KOHYA, "dora": files.DIFFUSERS}.get(method, files.LYCORIS)
    source = saved(tmp_path / "a.safetensors", form, adapter, tiny_sd1)
    done = bake.bake(Checkpoint(tiny_sd1), [source], [0.6], tmp_path / "baked")
    assert done.changed == sum(len(m) for m in adapter.values())
    models = models_of(tiny_sd1)
    for component, model in models_of(tmp_path / "baked").items():
        sd_lora.load_adapter({component: models[component]}, _only(source, component, tmp_path))
        sd_lora.set_strength(models[component], 0.6)
        sd_lora.merge(models[component])
        sd_lora.eject(models[component])
        for name, parameter in models[component].named_parameters():
            torch.testing.assert_close(model.get_parameter(name), parameter, rtol=1e-5, atol=1e-6)
    for path in tiny_sd1.rglob("*"):
        if path.is_file() and path.parent.name not in ("unet", "text_encoder"):
            again = tmp_path / "baked" / path.relative_to(tiny_sd1)
            assert again.read_bytes() == path.read_bytes()


def _only(source: Path, component: str, folder: Path) -> Path:
    """A file with one component of a file."""
    prefixes = {"unet": ("unet.", "lora_unet_"), "text_encoder": ("text_encoder.", "lora_te_")}
    path = folder / f"{component}.safetensors"
    kept = {k: t for k, t in load_file(source).items() if k.startswith(prefixes[component])}
    save_file(kept, path)
    return path


def single_file(folder: Path, path: Path) -> dict[str, Tensor]:
    """A folder's weights in one checkpoint of the original layout, fused projections included."""
    xl = "xl" in folder.name
    layout = Layout.of(models_of(folder)["unet"].config)
    file: dict[str, Tensor] = {"first_stage_model.decoder.conv_in.weight": torch.ones(2, 2)}
    for component, model in models_of(folder).items():
        for name, parameter in model.named_parameters():
            tensor = parameter.detach().clone()
            if component == "unet":
                module, _, kind = name.rpartition(".")
                file[f"model.diffusion_model.{unet_to_original(module, layout)}.{kind}"] = tensor
                continue
            canonical = name if name.startswith("text_") else f"text_model.{name}"
            if component == "text_encoder":
                clip = "conditioner.embedders.0" if xl else "cond_stage_model"
                file[f"{clip}.transformer.{canonical}"] = tensor
                continue
            place = open_clip_parameter(canonical)
            assert place is not None
            key = f"conditioner.embedders.1.model.{place[0]}"
            if place[1] is None:
                file[key] = tensor.T.contiguous() if place[2] else tensor
            else:
                fused = file.setdefault(key, torch.zeros(3, *tensor.shape).flatten(0, 1))
                fused.unflatten(0, (3, -1))[place[1]] = tensor
    save_file(file, path, {"format": "pt", "mark": "kept"})
    return file


def test_bake_and_extract_on_single_checkpoints(tiny_sdxl: Path, tmp_path: Path) -> None:
    """An SDXL checkpoint in the original layout, with OpenCLIP's fused and transposed matrices:
    what diffusers' own converters make of the baked file is the merged model; and extracting the
    difference of the two files gives the LoRA back."""
    adapter = trained(tiny_sdxl)
    source = saved(tmp_path / "a.safetensors", files.KOHYA, adapter, tiny_sdxl)
    before = single_file(tiny_sdxl, tmp_path / "base.safetensors")
    bake.bake(
        Checkpoint(tmp_path / "base.safetensors"), [source], [1.0], tmp_path / "baked.safetensors"
    )
    baked = load_file(tmp_path / "baked.safetensors")
    assert baked.keys() == before.keys()
    assert torch.equal(
        baked["first_stage_model.decoder.conv_in.weight"],
        before["first_stage_model.decoder.conv_in.weight"],
    )
    models = models_of(tiny_sdxl)
    sd_lora.load_adapter(models, source)
    for model in models.values():
        sd_lora.merge(model)
        sd_lora.eject(model)
    unet = convert_ldm_unet_checkpoint(baked, models["unet"].config)
    clip = convert_open_clip_checkpoint(
        models["text_encoder_2"], baked, prefix="conditioner.embedders.1.model."
    )
    for found, component in ((unet, "unet"), (clip, "text_encoder_2")):
        want = dict(models[component].named_parameters())
        assert want.keys() <= found.keys()
        for name, parameter in want.items():
            torch.testing.assert_close(found[name], parameter.detach(), rtol=1e-5, atol=1e-6)
    result = extract.extract(
        Checkpoint(tmp_path / "base.safetensors"),
        Checkpoint(tmp_path / "baked.safetensors"),
        output(tmp_path / "again.safetensors", tiny_sdxl),
        Cut(rank=16),
    )
    want, have = weights(adapter), read_weights(tmp_path / "again.safetensors", tiny_sdxl)
    assert want.keys() == have.keys()
    assert max(relative(have[k], want[k]) for k in want) < 1e-4
    assert result.error < 1e-4


def test_bake_in_half_precision(tiny_sd1: Path, tmp_path: Path) -> None:
    """A half base stays half, each weight the rounded sum; an overflow is an error, and nothing is
    left of the output."""
    half = StableDiffusionPipeline.from_pretrained(
        tiny_sd1, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    ).to(torch.float16)
    half.save_pretrained(tmp_path / "half")
    adapter = trained(tiny_sd1, text=False)
    source = saved(tmp_path / "a.safetensors", files.KOHYA, adapter, tiny_sd1)
    bake.bake(Checkpoint(tmp_path / "half"), [source], [1.0], tmp_path / "baked")
    baked = load_file(tmp_path / "baked" / "unet" / "diffusion_pytorch_model.safetensors")
    W = half.unet.state_dict()
    for name, delta in adapter["unet"].items():
        want = (W[f"{name}.weight"].float() + delta.weight()).half()
        torch.testing.assert_close(baked[f"{name}.weight"], want, rtol=1e-3, atol=0)
    with pytest.raises(sd_lora.RunError, match="more than float16 holds"):
        bake.bake(Checkpoint(tmp_path / "half"), [source], [1e6], tmp_path / "loud")
    assert not (tmp_path / "loud").exists()
    assert not list(tmp_path.glob(".*"))


def test_bake_refuses_what_does_not_fit(tiny_sd1: Path, tiny_sdxl: Path, tmp_path: Path) -> None:
    """A LoRA of another family, an output inside the base, one that exists."""
    source = saved(tmp_path / "a.safetensors", files.DIFFUSERS, trained(tiny_sdxl), tiny_sdxl)
    base = Checkpoint(tiny_sd1)
    with pytest.raises(sd_lora.UsageError, match="does not fit .*Stable Diffusion XL"):
        bake.bake(base, [source], [1.0], tmp_path / "out")
    with pytest.raises(sd_lora.UsageError, match="lie in each other"):
        bake.bake(base, [source], [1.0], tiny_sd1 / "inside")
    with pytest.raises(sd_lora.UsageError, match="exists"):
        bake.bake(base, [source], [1.0], tmp_path)


def test_weights_of_a_folder_are_found(tiny_sd1: Path, tmp_path: Path) -> None:
    """Shards of an index, a variant, and pickles are read; a folder without any names its files."""
    copy = tmp_path / "copy"
    shutil.copytree(tiny_sd1, copy)
    whole = load_file(copy / "unet" / "diffusion_pytorch_model.safetensors")
    names = sorted(whole)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, keys in shards.items():
        save_file({k: whole[k] for k in keys}, copy / "unet" / file)
    index = {
        "metadata": {"total_size": 0},
        "weight_map": {k: file for file, keys in shards.items() for k in keys},
    }
    os.remove(copy / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(sd_lora.UsageError, match=r"unet has no weights \(found a.safetensors"):
        _ = Checkpoint(copy).files
    text = json.dumps(index)
    (copy / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(text)
    text_weights = load_file(copy / "text_encoder" / "model.safetensors")
    os.remove(copy / "text_encoder" / "model.safetensors")
    torch.save(text_weights, copy / "text_encoder" / "pytorch_model.bin")
    base, want = Checkpoint(copy), Checkpoint(tiny_sd1)
    assert base.places.keys() == want.places.keys()
    assert all(torch.equal(base.weight(*place), want.weight(*place)) for place in want.places)
    source = saved(tmp_path / "a.safetensors", files.KOHYA, trained(tiny_sd1), tiny_sd1)
    bake.bake(base, [source], [1.0], tmp_path / "baked")
    bake.bake(want, [source], [1.0], tmp_path / "whole")
    for component, model in models_of(tmp_path / "whole").items():
        again = models_of(tmp_path / "baked")[component]
        pairs = zip(model.parameters(), again.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert sorted(os.listdir(tmp_path / "baked" / "text_encoder")) == [
        "config.json", "model.safetensors"
    ]  # fmt: skip


def test_an_sd2_checkpoint_has_more_than_sd2_uses(tmp_path: Path) -> None:
    """OpenCLIP's tower in SD2's single file has a 24th layer, a projection and buffers: they are
    copied, and are no part of what a LoRA adapts or what two models are compared by."""
    prefix = "cond_stage_model.model."
    key = prefix + "transformer.resblocks.{}.attn.in_proj_weight"
    file = {
        key.format(22): torch.zeros(3 * 1024, 1024),
        key.format(23): torch.ones(3 * 1024, 1024),
        f"{prefix}text_projection": torch.ones(1024, 1024),
        f"{prefix}logit_scale": torch.ones(()),
        "model.diffusion_model.input_blocks.1.1.proj_in.weight": torch.zeros(320, 320),
        "model_ema.decay": torch.ones(()),
    }
    save_file(file, tmp_path / "base.safetensors")
    base = Checkpoint(tmp_path / "base.safetensors")
    assert base.family.name == "sd2"
    layer = "text_model.encoder.layers.22.self_attn"
    assert set(base.places) == {
        ("text_encoder", f"{layer}.q_proj"),
        ("text_encoder", f"{layer}.k_proj"),
        ("text_encoder", f"{layer}.v_proj"),
        ("unet", "down_blocks.0.attentions.0.proj_in"),
    }
    assert base.shape("text_encoder", f"{layer}.k_proj") == (1024, 1024)
    lora = {
        f"lora_te_{layer.replace('.', '_')}_k_proj.lora_down.weight": torch.ones(1, 1024),
        f"lora_te_{layer.replace('.', '_')}_k_proj.lora_up.weight": torch.ones(1024, 1),
    }
    save_file(lora, tmp_path / "lora.safetensors")
    bake.bake(base, [tmp_path / "lora.safetensors"], [1.0], tmp_path / "baked.safetensors")
    baked = load_file(tmp_path / "baked.safetensors")
    assert torch.equal(baked[key.format(23)], file[key.format(23)])
    thirds = baked[key.format(22)].unflatten(0, (3, -1))
    assert [float(third.mean()) for third in thirds] == [0, 1, 0]


def test_a_folder_that_cannot_be_written(tiny_sd1: Path, tmp_path: Path) -> None:
    """A place where nothing can be written is an error before the work, and no traceback."""
    source = saved(tmp_path / "a.safetensors", files.KOHYA, trained(tiny_sd1), tiny_sd1)
    (tmp_path / "file").write_text("in the way")
    out = output(tmp_path / "file" / "b.safetensors", tiny_sd1)
    with pytest.raises(sd_lora.RunError, match="nothing can be written into"):
        tools.resize(source, out, Cut(rank=2))
    with pytest.raises(sd_lora.RunError, match="could not be written"):
        tools.convert(source, output(tmp_path / "file" / "c.safetensors", tiny_sd1, to="kohya"))


def test_convert_approximates_only_what_it_must(tiny_sd1: Path, tmp_path: Path) -> None:
    """With a rank, DoRA stays as it is for diffusers, which has a form for it, and plain LoRA for
    everybody, with a note; for LyCORIS, which holds everything, a rank is an error."""
    dora = trained(tiny_sd1, rule="decompose")
    source = saved(tmp_path / "a.safetensors", files.DIFFUSERS, dora, tiny_sd1)
    plain = saved(tmp_path / "b.safetensors", files.KOHYA, trained(tiny_sd1), tiny_sd1)
    for number, (path, to) in enumerate([(source, "diffusers"), (plain, "kohya")]):
        out = output(tmp_path / f"{number}.safetensors", tiny_sd1, to=to)
        result = tools.convert(path, out, cut=Cut(rank=1))
        assert result.losses == {}
        assert any("nothing needed approximating" in note for note in result.notes)
        before, after = load_file(path), load_file(out.path)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[k], after[k]) for k in before)
    with pytest.raises(sd_lora.UsageError, match="keeps every delta as it is"):
        tools.convert(
            plain, output(tmp_path / "c.safetensors", tiny_sd1, to="lycoris"), cut=Cut(rank=1)
        )
