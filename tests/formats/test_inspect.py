"""What `inspect` says of a file: against the tensors themselves, and in what it finds wrong."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sd_lora
from sd_lora.formats import adapter_files as files
from sd_lora.formats import inspect, verify
from sd_lora.formats.canonical import each
from sd_lora.formats.lora_file import open_lora
from sd_lora.formats.names import naming_of
from sd_lora.models.families import FAMILIES
from sd_lora.models.meta_pipeline import MetaPipeline
from tests.formats.trained import models_of, saved, trained, weights

FORMS = {
    "plain, diffusers": (files.DIFFUSERS, {}),
    "plain, kohya": (files.KOHYA, {}),
    "plain, LyCORIS": (files.LYCORIS, {}),
    "dora": (files.DIFFUSERS, {"rule": "decompose"}),
    "loha": (files.LYCORIS, {"method": "loha"}),
    "lokr": (files.LYCORIS, {"method": "lokr"}),
    "full": (files.LYCORIS, {"method": "full", "train_bias": "all"}),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_the_table_is_what_is_in_the_file(
    form: str, family: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Counts, ranks, alphas and ‖ΔW‖ of components and blocks are those of the tensors; the blocks
    of a component add up to it; every line fits into 100 columns."""
    folder = request.getfixturevalue(f"tiny_{family}")
    kind, options = FORMS[form]
    adapter = trained(folder, **options)
    path = saved(tmp_path / "file.safetensors", kind, adapter, folder)
    meta_pipeline = MetaPipeline.of_folder(str(folder))
    found = inspect.inspect(path, meta_pipeline)
    assert found.problems == []
    assert found.family == family
    stored = open_lora(path, meta_pipeline.layout)
    adapter = verify.fitted(stored.adapter, meta_pipeline)  # kernels of LoHa are as matrices
    changes = weights(adapter)
    for component in found.components:
        part = component.component
        mine = [d for c, _, d in each(adapter) if c == part]
        assert (
            component.modules == len(mine) == component.linear + component.conv + component.vectors
        )
        assert component.vectors == sum(len(d.shape) == 1 for d in mine)
        assert component.conv == sum(any(k > 1 for k in d.shape[2:]) for d in mine)
        assert sorted(component.ranks) == sorted(d.rank for d in mine if d.rank)
        squares = sum(
            float(t.norm()) ** 2 for (c, _), t in changes.items() if c == component.component
        )
        assert component.norm == pytest.approx(squares**0.5, rel=1e-4)
        blocks = [b for b in found.blocks if b.component == part]
        assert sum(b.modules for b in blocks) == component.modules
        assert sum(b.norm**2 for b in blocks) == pytest.approx(component.norm**2, rel=1e-6)
    shown = inspect.text(found)
    assert max(map(len, shown.splitlines())) <= 100
    for block in found.blocks:
        assert re.search(rf"^ +{re.escape(block.name)} +{block.modules} ", shown, re.MULTILINE)
    record = json.loads(found.as_json())
    assert sum(record["components"][0]["ranks"].values()) == len(found.components[0].ranks)


def test_shown_as_it_is(tiny_sd1: Path, tmp_path: Path) -> None:
    """The table of one file to the letter, ‖ΔW‖ in closed form: every entry of ΔW is α/r·r/8 = 1/4,
    so the UNet's norm is √(Σ rows·columns)/4."""
    models = models_of(tiny_sd1)
    sd_lora.inject(models["unet"], targets="attention", rank=4, alpha=2)
    size = 0
    for layer in sd_lora.deltas_of(models["unet"]).values():
        layer.lora_A.data.fill_(0.5)
        layer.lora_B.data.fill_(0.25)
        size += layer.shape[0] * layer.shape[1]
    paths = sd_lora.save_adapter({"unet": models["unet"]}, tmp_path, name="mascot")
    shown = inspect.text(inspect.inspect(paths[1], MetaPipeline.of_folder(str(tiny_sd1))))
    lines = shown.splitlines()
    norm = f"{size**0.5 / 4:.3g}"
    row = f"  unet                      56     56     0         4           4  lora  {norm:>16}"
    assert row in lines
    head = " " * 23 + "modules linear  conv      rank       alpha  method            ‖ΔW‖"
    assert lines[lines.index(head) + 1] == row
    # A1111 takes diffusers' names for SD1's, which has two ResNets a block and not one
    assert lines[lines.index("loaded by") + 1 : lines.index("loaded by") + 5] == [
        "  diffusers  exact",
        "  ComfyUI    exact",
        "  A1111      passes over 40 of 56 modules, whose names it lacks",
        "  Forge      exact",
    ]
    assert "  title          mascot" in lines
    assert lines[-1] == "no problems found"


READERS = {
    "plain peft keys": ("diffusers", {}, ("diffusers", "exact")),
    "comfy": ("diffusers", {}, ("ComfyUI", r"passes over 56 of 144 modules: the attention")),
    "a1111": ("diffusers", {}, ("A1111", "reads none of these keys")),
    "kohya": ("kohya", {}, ("diffusers", "exact")),
    "kohya in A1111": ("kohya", {}, ("A1111", r"passes over \d+ of 144 modules, whose names")),
    "alphas": ("LyCORIS", {}, ("diffusers", r"takes \d+ modules at another strength")),
    "loha": ("LyCORIS", {"method": "loha"}, ("diffusers", r"refuses the file \(LoHa\)")),
    "lokr": ("LyCORIS", {"method": "lokr"}, ("diffusers", r"refuses the file \(LoKr\)")),
    "oft": ("LyCORIS", {"method": "oft"}, ("diffusers", r"refuses the file \(OFT\)")),
    "oft in ComfyUI": ("LyCORIS", {"method": "oft"}, ("ComfyUI", "exact")),
    "oft in Forge": ("LyCORIS", {"method": "oft"}, ("Forge", r"does not know \d+ keys")),
    "oft rescaled": (
        "LyCORIS",
        {"method": "oft", "rescaled": True},
        ("ComfyUI", r"passes over \d+ factors of outputs"),
    ),
    "dora": ("LyCORIS", {"rule": "decompose"}, ("diffusers", r"drops \d+ dora_scale")),
    "dora in A1111": ("LyCORIS", {"rule": "decompose"}, ("A1111", r"normalises \d+ weight-dec")),
}


@pytest.mark.parametrize("case", READERS)
def test_who_reads_it(case: str, tiny_sd1: Path, tmp_path: Path) -> None:
    """What each program makes of a form, as interop's measurements and key maps have it."""
    form, options, (program, verdict) = READERS[case]
    kinds = {k.title: k for k in (files.DIFFUSERS, files.KOHYA, files.LYCORIS)}
    adapter = trained(tiny_sd1, **options)
    path = saved(tmp_path / "file.safetensors", kinds[form], adapter, tiny_sd1)
    found = inspect.inspect(path, MetaPipeline.of_folder(str(tiny_sd1)))
    assert re.search(verdict, found.readers[program]), found.readers


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("form", ["kohya", "diffusers", "LyCORIS"])
def test_the_verdict_on_diffusers_is_what_diffusers_does(
    form: str, family: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The number of modules that inspect says diffusers takes at another strength is that which
    diffusers itself does, mixed alphas and missing ones included."""
    folder = request.getfixturevalue(f"tiny_{family}")
    kinds = {k.title: k for k in (files.DIFFUSERS, files.KOHYA, files.LYCORIS)}
    path = saved(tmp_path / "file.safetensors", kinds[form], trained(folder), folder)
    meta_pipeline = MetaPipeline.of_folder(str(folder))
    found = inspect.inspect(path, meta_pipeline)
    _, wrong = verify.verify_file(path, meta_pipeline)
    off = [line for line in wrong if "is off by" in line]
    said = re.search(r"takes (\d+) modules", found.readers["diffusers"])
    assert (int(said[1]) if said else 0) == len(off)
    assert (found.readers["diffusers"] == "exact") == (wrong == [])
    assert (form == "LyCORIS") == bool(off)


@pytest.mark.parametrize("names", ["kohya", "peft"])
@pytest.mark.parametrize(
    "part",
    ["q_proj", "fc1", "q_proj fc1", "q_proj out_proj", "text_projection", "fc1 text_projection"],
)
def test_the_verdict_on_parts_of_a_text_encoder(
    part: str, names: str, tiny_sdxl: Path, tmp_path: Path
) -> None:
    """Which parts of a text encoder diffusers loads, by kohya's names and by peft's, alone and with
    a text_projection of another rank: inspect says "exact" exactly where verify finds it so."""
    model = models_of(tiny_sdxl)["text_encoder_2"]
    sd_lora.inject(
        model,
        targets="|".join(rf".*{module}" for module in part.split()),
        rank=2,
        rank_pattern={"text_projection": 3} if "projection" in part else None,
    )
    file = {}
    for name, delta in sd_lora.deltas_of(model).items():
        stem = f"text_encoder_2.{name}.lora_" if names == "peft" else ""
        down, up = (f"{stem}A.weight", f"{stem}B.weight")
        if names == "kohya":
            stem = f"lora_te2_{name.replace('.', '_')}"
            down, up = (f"{stem}.lora_down.weight", f"{stem}.lora_up.weight")
        file |= {down: delta.lora_A.detach(), up: torch.ones_like(delta.lora_B)}
    save_file(file, tmp_path / "file.safetensors")
    meta_pipeline = MetaPipeline.of_folder(str(tiny_sdxl))
    found = inspect.inspect(tmp_path / "file.safetensors", meta_pipeline)
    _, wrong = verify.verify_file(tmp_path / "file.safetensors", meta_pipeline)
    assert (found.readers["diffusers"] == "exact") == (wrong == []), (found.readers, wrong)


def test_problems_are_listed(tiny_sd1: Path, tmp_path: Path) -> None:
    """A key without its partner, NaN, zero deltas, a changed body, an untrue header, and another
    model's shapes: each is a line, and none of them a traceback."""
    meta_pipeline = MetaPipeline.of_folder(str(tiny_sd1))
    path = saved(tmp_path / "file.safetensors", files.KOHYA, trained(tiny_sd1), tiny_sd1)
    tensors, header = load_file(path), {"ss_base_model_version": "sdxl_base_v1-0"}
    down, up = "lora_unet_conv_in.lora_down.weight", "lora_unet_conv_in.lora_up.weight"

    def problems(changed: dict, header: dict = header) -> list[str]:
        save_file(changed, path, header)
        return inspect.inspect(path, meta_pipeline).problems

    lost = {k: t for k, t in tensors.items() if k != up}
    assert problems(lost)[0] == "unet conv_in: lora_A and lora_B come in pairs"
    nan = tensors | {up: tensors[up] * float("nan")}
    assert problems(nan)[0] == "unet conv_in.lora_B holds NaN or infinite values"
    zero = tensors | {up: tensors[up] * 0}
    found = problems(zero)
    assert found[0].startswith("1 deltas are zero (unet conv_in")
    assert "the header says Stable Diffusion XL, the tensors" in found[1]
    hashed = {"sshs_model_hash": "0" * 64}
    assert "its tensors were changed" in problems(tensors, hashed)[0]
    wide = {k: torch.zeros(2, 5, 3, 3) if k == down else t for k, t in tensors.items()}
    assert any("1 of 144 deltas do not fit" in p for p in problems(wide, {}))
    no_alpha = {k: t for k, t in tensors.items() if k != "lora_unet_conv_in.alpha"}
    assert "1 of 144 modules have no alpha" in problems(no_alpha, {})[0]
    shown = inspect.text(inspect.inspect(path, meta_pipeline))
    assert "problems\n  - 1 of 144 modules have no alpha" in shown


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_family_is_known_by_the_tensors(family: str, tmp_path: Path) -> None:
    """The published widths tell the family with no header and no model, whatever the format; and a
    header that says otherwise is a problem, not the truth."""
    row = FAMILIES[family]
    width = row.cross_attention_dim
    stem = naming_of(row).kohya(
        "unet", "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    )
    tensors = {
        f"{stem}.lora_down.weight": torch.ones(2, width),
        f"{stem}.lora_up.weight": torch.ones(640, 2),
    }
    save_file(tensors, tmp_path / "a.safetensors", {"ss_base_model_version": "sd_v1"})
    found = inspect.inspect(tmp_path / "a.safetensors")
    assert (found.family, found.family_by) == (family, f"its cross-attention is {width} wide")
    untrue = [p for p in found.problems if p.startswith("the header says Stable Diffusion 1.x")]
    assert len(untrue) == (family != "sd1")
    assert not any("do not fit" in p for p in found.problems)
