"""A run that starts from a LoRA file: the file's ΔW at step 0, or the flags with which it fits."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import sd_lora
from sd_lora.adapters.inject import deltas_of
from sd_lora.adapters.state import lora_state_dict
from sd_lora.config.schema import TrainConfig
from sd_lora.data.check.places import check_places
from sd_lora.errors import UsageError
from sd_lora.folders import disown
from sd_lora.formats.canonical import Adapter, canonical_name
from sd_lora.formats.lora_file import open_lora
from sd_lora.formats.output import Output
from sd_lora.formats.tools import convert
from sd_lora.models.load import load_parts
from sd_lora.models.meta_pipeline import MetaPipeline
from sd_lora.training.loop import LossLog, train_steps
from sd_lora.training.setup import Run, prepare
from tests.training.runs import images, text_to_image

OPEN: dict[str, Any] = {"rank": None, "conv_rank": None, "targets": None}
"""A run without flags on its structure."""

INJECT: dict[str, Any] = {"targets": "attention+conv", "rank": 2, "alpha": 3.0, "conv_rank": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("init")


@pytest.fixture(scope="module")
def files(tiny_sd1: Path, folder: Path) -> dict[str, Path]:
    """Kind → LoRA file with random ΔW: diffusers', kohya's, LyCORIS' DoRA, LoKr and OFT, and
    kohya's with a text encoder."""
    images(folder / "data", 2)
    found = {}
    kinds: dict[str, dict[str, Any]] = {
        "plain": {"rank_pattern": {"conv1": 4}},
        "dora": {"rule": "decompose"},
        "lokr": {"method": "lokr", "conv_rank": None},
        "oft": {"method": "oft", "conv_rank": None, "block_size": 8},
        "text": {},
    }
    for name, options in kinds.items():
        models = load_parts(str(tiny_sd1)).models
        chosen = {c: models[c] for c in ("unet", "text_encoder") if c == "unet" or name == "text"}
        sd_lora.inject(models["unet"], **INJECT | options)
        if name == "text":
            sd_lora.inject(models["text_encoder"], "text", rank=3)
        generator = torch.Generator().manual_seed(0)
        for delta in (d for model in chosen.values() for d in deltas_of(model).values()):
            for key, tensor in delta.tensors().items():
                if key != "magnitude":
                    tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
        paths = sd_lora.save_adapter(chosen, folder / name, name=name)
        found |= {path.stem: path for path in paths if name == "plain"}
        found[name] = paths[0]
    meta_pipeline = MetaPipeline.of_folder(str(tiny_sd1))
    out = Output(folder / "lycoris.safetensors", "lycoris", "auto", meta_pipeline=meta_pipeline)
    found["lycoris"] = convert(found["plain"], out).written.path
    return found


def run_from(tiny_sd1: Path, folder: Path, file: Path, **changes: object) -> TrainConfig:
    values: dict[str, object] = {"targets": "attention+conv", "rank": 2, "conv_rank": 3}
    values["max_train_steps"] = 1
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
        ("plain", OPEN),
        ("plain_kohya", OPEN | {"targets": "all", "use_rslora": True}),
        ("lycoris", OPEN),
        ("dora", OPEN | {"use_dora": True}),
        ("lokr", OPEN | {"method": "lokr"}),
        ("oft", OPEN | {"method": "oft", "oft_block_size": 8}),
        ("text", OPEN | {"train_text_encoder": True, "clip_skip": 1}),
        ("plain_kohya", {"rank": 5, "conv_rank": 4, "lora_alpha": 7.0, "targets": "all"}),
        ("lycoris", {"conv_rank": 4, "use_rslora": True, "train_text_encoder": True}),
        ("plain", {"conv_rank": 4, "use_dora": True}),
    ],
)
def test_step_0_is_the_file(
    kind: str, changes: dict, files: dict[str, Path], folder: Path, tiny_sd1: Path
) -> None:
    """At step 0 each ΔW is the file's to 1e-6, whatever this run's ranks and alphas; modules that
    the file has not are at zero; W' with a new magnitude is W + ΔW; the optimiser holds the very
    parameters, which then learn. Without flags the modules, ranks and scales are the file's."""
    run = prepare(run_from(tiny_sd1, folder, files[kind], **changes))
    injected = [delta for modules in deltas(run).values() for delta in modules.values()]
    assert all(float(delta.norm().detach()) == 0 for delta in injected)
    run.restore()
    file = open_lora(files[kind]).adapter
    for component, ours in deltas(run).items():
        theirs = file.get(component, {})
        if changes.get("targets", "") is None and component == "unet":
            assert theirs.keys() == ours.keys()
        for name, delta in ours.items():
            if name not in theirs:
                assert float(delta.norm().detach()) == 0
                continue
            want = theirs[name]
            want.fit(delta.shape)
            error = (delta.by_itself() - want.by_itself()).norm()
            assert error < 1e-6 * want.norm()
            if "rank" in changes and changes["rank"] is None:
                assert delta.rank == want.rank
                assert delta.scale == pytest.approx(want.scale)
            if delta.magnitude is not None:
                W = run.models[component].get_submodule(name).base.weight
                composed = W + want.weight() if want.magnitude is None else want.compose(W)
                assert torch.allclose(delta.compose(W), composed, atol=1e-5)
    left_out = sum(name not in deltas(run)[c] for c, modules in file.items() for name in modules)
    unread = f"; {left_out} of text encoders' last layers do nothing here"
    assert run.summary.text().endswith(unread) == (kind == "text")
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
        ("text", OPEN, r"text_encoder .* is not adapted.*--train_text_encoder"),
        ("plain", {"targets": "attention", "conv_rank": None}, r"conv1 is not adapted"),
        ("dora", {}, r"has a magnitude \(--use_dora\).*--use_dora"),
        ("lokr", {}, r"is of the method lokr, and lora here.*--method lokr"),
        ("oft", OPEN | {"method": "oft"}, r"of other shapes.*--method oft --oft_block_size 8"),
        ("plain", {"method": "loha"}, r"is of the method lora, and loha here"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    kind: str, changes: dict, message: str, files: dict[str, Path], folder: Path, tiny_sd1: Path
) -> None:
    """Each reason, by module, with the flags that give the file a place."""
    with pytest.raises(UsageError, match=message):
        prepare(run_from(tiny_sd1, folder, files[kind], **changes))


def test_a_checkpoint_keeps_the_structure(
    files: dict[str, Path], folder: Path, tiny_sd1: Path, tmp_path: Path
) -> None:
    """A run that took its modules and ranks from a file goes on without the file, from those of its
    checkpoint."""
    file = Path(shutil.copy(files["plain"], tmp_path))
    config = run_from(tiny_sd1, folder, file, **OPEN, use_rslora=True, output_dir=str(tmp_path))
    run = prepare(config)
    run.restore()
    train_steps(run, LossLog(run))
    want = lora_state_dict(run.models["unet"])
    file.unlink()
    config = config.replace(
        resume_from_checkpoint="latest", max_train_steps=2, overwrite_output_dir=False
    )
    check_places(config)
    disown(tmp_path)
    run = prepare(config)
    assert {d.rank for d in deltas(run)["unet"].values()} == {2, 3, 4}
    run.restore()
    got = lora_state_dict(run.models["unet"])
    assert got.keys() == want.keys()
    assert all(torch.equal(got[key], want[key]) for key in want)


def test_a_preset_gives_way_to_the_file() -> None:
    """A preset's targets and ranks do not count in a run from a file; those of flags do, and
    survive a look at the configuration as JSON."""
    config = TrainConfig(
        pretrained_model_name_or_path="m", train_data_dir="d", preset="style", init_lora="f", rank=8
    )
    again = TrainConfig(**json.loads(config.to_json())).resolve("sd1", 512)
    assert (again.targets, again.rank, again.lora_alpha) == (None, 8, None)
    assert again.lr_scheduler == "cosine"


def test_no_such_file(files: dict[str, Path], folder: Path, tiny_sd1: Path, tmp_path: Path) -> None:
    """A file that is not there is told with the other places, before torch is imported; and a file
    that is no LoRA by its name."""
    config = run_from(tiny_sd1, folder, tmp_path / "none.safetensors")
    with pytest.raises(UsageError, match=r"none\.safetensors: there is no such file"):
        config.check_init()
    (tmp_path / "no.safetensors").write_bytes(b"no")
    with pytest.raises(UsageError, match=r"init_lora .*no\.safetensors cannot be read"):
        prepare(run_from(tiny_sd1, folder, tmp_path / "no.safetensors"))
