"""Factors in float16, and numbers rounded at random."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

import sd_lora
from sd_lora.formats import adapter_files as files
from sd_lora.formats.canonical import each
from sd_lora.formats.metadata import build
from sd_lora.formats.names import naming_of
from sd_lora.formats.rounding import balanced, rounded
from sd_lora.formats.verify import TOLERANCE, compare, verify
from sd_lora.models.families import FAMILIES
from sd_lora.models.meta_pipeline import MetaPipeline
from tests.formats.trained import trained

HALF = torch.float16


@pytest.mark.parametrize("size", [1.0, 1e-6])
def test_float16_holds_the_factors_of_a_short_run(
    size: float, tiny_sd1: Path, tmp_path: Path
) -> None:
    """B a million times smaller than A, as after one step, is below float16's normal numbers, and a
    file of it was off by more than the tolerance. Balanced, the product of the factors is the same
    to the last bit (in float64, which holds it whole), and both files load as trained; factors that
    float16 holds keep every bit."""
    adapter = trained(tiny_sd1, text=False, targets="attention+conv")
    for _, _, delta in each(adapter):
        delta.lora_B.data *= size
    even, moved = balanced(adapter, HALF), 0
    for component, name, delta in each(adapter):
        A, B, C, D = (
            f.detach().double().flatten(1)
            for d in (delta, even[component][name])
            for f in (d.lora_A, d.lora_B)
        )
        assert torch.equal(B[:, :, None] * A[None], D[:, :, None] * C[None])
        moved += not torch.equal(A, C)
    assert moved == (0 if size == 1 else sum(map(len, adapter.values())))
    meta = MetaPipeline.of_folder(str(tiny_sd1))
    header, naming = build(adapter, FAMILIES["sd1"], "x"), naming_of("sd1", meta.layout)
    for kind in (files.DIFFUSERS, files.KOHYA):
        path = tmp_path / f"{kind.title}.safetensors"
        files.write_file(path, kind, adapter, naming, header, HALF)
        assert verify(path, adapter, meta, kind).worst_error < TOLERANCE[HALF]
    if size < 1:
        cast = copy.deepcopy(adapter)
        for _, _, delta in each(cast):
            delta.lora_B.data = delta.lora_B.data.to(HALF).float()
        assert compare(adapter, cast, TOLERANCE[HALF])[2]


def test_numbers_too_small_for_float16_are_told(tiny_sd1: Path, tmp_path: Path) -> None:
    """Where both factors together are too small, the file is refused, with the remedy."""
    adapter = trained(tiny_sd1, text=False, targets="attention+conv")
    for _, _, delta in each(adapter):
        delta.lora_B.data *= 1e-13
    meta, path = MetaPipeline.of_folder(str(tiny_sd1)), tmp_path / "x.safetensors"
    header = build(adapter, FAMILIES["sd1"], "x")
    files.write_file(path, files.KOHYA, adapter, naming_of("sd1", meta.layout), header, HALF)
    with pytest.raises(sd_lora.RunError, match="take bfloat16 or float32"):
        verify(path, adapter, meta, files.KOHYA)


def all_numbers(dtype: torch.dtype) -> Tensor:
    """Every finite number of a dtype of one or two bytes, ascending, in float32."""
    kind = torch.int8 if dtype.itemsize == 1 else torch.int16
    limits = torch.iinfo(kind)
    bits = torch.arange(limits.min, limits.max + 1, dtype=torch.int32).to(kind)
    values = bits.view(dtype).float()
    return values[values.isfinite()].unique()


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16]
)
def test_rounding_at_random(dtype: torch.dtype) -> None:
    """Between each two neighbours of a dtype, through subnormals, zero and the largest: a number a
    quarter of the way becomes one of them, the upper one in a quarter of the draws; numbers of the
    dtype stay, and beyond the largest nothing becomes infinite."""
    grid = all_numbers(dtype)
    assert torch.equal(rounded(grid, dtype, torch.Generator().manual_seed(0)).float(), grid)
    every = grid.double()
    low, high = every[:-1], every[1:]
    x = low + (high - low) / 4
    generator = torch.Generator().manual_seed(1)
    draws = [rounded(x, dtype, generator).double() for _ in range(64)]
    uppers = sum((draw == high).double() for draw in draws) / 64
    assert all(((draw == low) | (draw == high)).all() for draw in draws)
    assert float(uppers.mean()) == pytest.approx(0.25, abs=0.02)
    assert float((uppers - 0.25).abs().max()) < 0.4
    beyond = rounded(every[-1:].float() * (1 + 2**-12), dtype, generator)
    assert beyond.float() == every[-1]
