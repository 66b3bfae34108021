"""A run that starts from a LoRA file: the file's ΔW at step 0, or the flags with which it fits."""

from pathlib import Path
from typing import Any

import pytest
import torch

import sd_lora
from sd_lora.adapters.inject import deltas_of
from sd_lora.config.schema import TrainConfig
from sd_lora.errors import UsageError
from sd_lora.formats.canonical import Adapter, canonical_name
from sd_lora.formats.lora_file import open_lora
from sd_lora.formats.output import Output
from sd_lora.formats.tools import convert
from sd_lora.models.load import load_parts
from sd_lora.models.meta_pipeline import MetaPipeline
from sd_lora.training.loop import LossLog, train_steps
from sd_lora.training.setup import Run, prepare
from tests.training.runs import images, text_to_image

INJECT: dict[str, Any] = {"targets": "attention+conv", "rank": 2, "alpha": 3.0, "conv_rank": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("init")


@pytest.fixture(scope="module")
def files(tiny_sd1: Path, folder: Path) -> dict[str, Path]:
    """Kind → LoRA file with random ΔW: diffusers', kohya's, LyCORIS' DoRA and LoKr."""
    images(folder / "data", 2)
    found = {}
    for name, options in (("plain", {}), ("dora", {"rule": "decompose"}), ("lokr", {})):
        models = load_parts(str(tiny_sd1)).models
        more = {"method": "lokr", "conv_rank": None} if name == "lokr" else options
        sd_lora.inject(models["unet"], **INJECT | more)
        generator = torch.Generator().manual_seed(0)
        for delta in deltas_of(models["unet"]).values():
            for key, tensor in delta.tensors().items():
                if key != "magnitude":
                    tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
        paths = sd_lora.save_adapter({"unet": models["unet"]}, folder / name, name=name)
        found |= {path.stem: path for path in paths if name == "plain"}
        found[name] = paths[0]
    meta_pipeline = MetaPipeline.of_folder(str(tiny_sd1))
    out = Output(folder / "lycoris.safetensors", "lycoris", "auto", meta_pipeline=meta_pipeline)
    found["lycoris"] = convert(found["plain"], out).written.path
    return found


def run_from(tiny_sd1: Path, folder: Path, file: Path, **changes: object) -> TrainConfig:
    values: dict[str, object] = {"rank": 2, "conv_rank": 3, "max_train_steps": 1}
    return text_to_image(
        tiny_sd1,
        folder / "data",
        folder / "out",
        init_lora=str(file),
        overwrite_output_dir=True,
        **values | changes,
    )


def deltas(run: Run) -> Adapter:
    return {
        c: {canonical_name(c, n): d for n, d in deltas_of(m).items()} for c, m in run.models.items()
    }


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("plain", {}),
        ("plain_kohya", {"rank": 5, "conv_rank": 4, "lora_alpha": 7.0, "targets": "all"}),
        ("lycoris", {"use_rslora": True, "train_text_encoder": True}),
        ("plain", {"use_dora": True}),
        ("dora", {"use_dora": True}),
        ("lokr", {"method": "lokr", "conv_rank": None, "lora_alpha": 1.0}),
    ],
)
def test_step_0_is_the_file(
    kind: str, changes: dict, files: dict[str, Path], folder: Path, tiny_sd1: Path
) -> None:
    """At step 0 each ΔW is the file's to 1e-6, whatever this run's ranks and alphas; modules that
    the file has not are at zero; W' with a new magnitude is W + ΔW; the optimiser holds the very
    parameters, which then learn."""
    run = prepare(run_from(tiny_sd1, folder, files[kind], **changes))
    assert all(float(d.weight().detach().norm()) == 0 for d in deltas(run)["unet"].values())
    run.restore()
    theirs, ours = open_lora(files[kind]).adapter["unet"], deltas(run)["unet"]
    assert theirs.keys() <= ours.keys()
    for name, delta in ours.items():
        if name not in theirs:
            assert float(delta.weight().detach().norm()) == 0
            continue
        want = theirs[name]
        want.fit(delta.shape)
        assert (delta.weight() - want.weight()).norm() < 1e-6 * want.weight().norm()
        if delta.magnitude is not None:
            W = run.parts.unet.get_submodule(name).base.weight
            composed = W + want.weight() if want.magnitude is None else want.compose(W)
            assert torch.allclose(delta.compose(W), composed, atol=1e-5)
    held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in run.parameters}
    assert "modules of it" in run.summary.text()
    before = [p.detach().clone() for p in run.parameters]
    assert train_steps(run, LossLog(run)) == 1
    assert any(not torch.equal(p, b) for p, b in zip(run.parameters, before, strict=True))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("plain", {"rank": 1}, r"has rank 2, and 1 here; .* --targets attention\+conv --rank 2"),
        ("plain", {"targets": "attention", "conv_rank": None}, r"conv1 is not adapted"),
        ("dora", {}, r"has a magnitude \(--use_dora\).*--use_dora"),
        ("lokr", {}, r"is of the method lokr, and lora here.*--method lokr"),
        ("plain", {"method": "loha"}, r"is of the method lora, and loha here"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    kind: str, changes: dict, message: str, files: dict[str, Path], folder: Path, tiny_sd1: Path
) -> None:
    """Each reason, by module, with the flags that give the file a place."""
    with pytest.raises(UsageError, match=message):
        prepare(run_from(tiny_sd1, folder, files[kind], **changes))


def test_no_such_file(files: dict[str, Path], folder: Path, tiny_sd1: Path, tmp_path: Path) -> None:
    """A file that is not there is told with the other places, before torch is imported; and a file
    that is no LoRA by its name."""
    config = run_from(tiny_sd1, folder, tmp_path / "none.safetensors")
    with pytest.raises(UsageError, match=r"none\.safetensors: there is no such file"):
        config.check_init()
    (tmp_path / "no.safetensors").write_bytes(b"no")
    with pytest.raises(UsageError, match=r"init_lora .*no\.safetensors cannot be read"):
        prepare(run_from(tiny_sd1, folder, tmp_path / "no.safetensors"))
