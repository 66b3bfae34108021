"""What a file's tensors and header say: its family, who reads it, and how it is shown."""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import sd_lora
from sd_lora.formats import adapter_files as files
from sd_lora.formats import inspect
from sd_lora.formats.family_of_file import (
    family_by_header,
    family_by_tensors,
    family_of,
    prediction_type,
)
from sd_lora.formats.lora_file import LoRAFile, open_lora
from sd_lora.formats.names import Naming
from sd_lora.formats.programs import EXACT, readers
from sd_lora.models.families import FAMILIES
from sd_lora.models.meta_pipeline import MetaPipeline
from sd_lora.models.original_names import Layout
from tests.formats import test_traps as traps
from tests.formats.trained import saved
from tests.formats.trained import trained as adapter_of
from tests.single import models_of_pipeline

KEYS = "down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
Q_PROJ = "text_model_encoder_layers_{}_self_attn_q_proj"


def lora(
    path: Path, header: Mapping[str, str] | None = None, **shapes: tuple[int, int]
) -> LoRAFile:
    """A file of rank 1 with these modules, kohya stem → (rows, columns), opened."""
    tensors: dict[str, Tensor] = {}
    for stem, (rows, columns) in shapes.items():
        tensors[f"{stem}.lora_down.weight"] = torch.ones(1, columns)
        tensors[f"{stem}.lora_up.weight"] = torch.ones(rows, 1)
        tensors[f"{stem}.alpha"] = torch.tensor(1.0)
    save_file(tensors, path, dict(header or {}))
    return open_lora(path)


# --- the family ---

TEXT_768 = {f"lora_te_{Q_PROJ.format(0)}": (768, 768)}
BY_TENSORS = {
    "a second text encoder": (
        {f"lora_te2_{Q_PROJ.format(0)}": (1280, 1280)}, "sdxl", "second text encoder"
    ),
    "before a width of another family": (
        {f"lora_te2_{Q_PROJ.format(0)}": (8, 8), f"lora_unet_{KEYS}": (640, 768)},
        *("sdxl", "second text encoder"),
    ),
    "keys 768 wide": ({f"lora_unet_{KEYS}": (640, 768)}, "sd1", "768 wide"),
    "keys 1024 wide": ({f"lora_unet_{KEYS}": (640, 1024)}, "sd2", "1024 wide"),
    "values 2048 wide": ({f"lora_unet_{KEYS[:-1]}v": (640, 2048)}, "sdxl", "2048 wide"),
    "the refiner's only text encoder": (
        {f"lora_te_{Q_PROJ.format(0)}": (1280, 1280), f"lora_unet_{KEYS}": (640, 1280)},
        *("sdxl_refiner", "1280 wide"),
    ),
    "queries say nothing": ({f"lora_unet_{KEYS[:-1]}q": (640, 768)}, None, ""),
    "self-attention says nothing": (
        {f"lora_unet_{KEYS.replace('attn2', 'attn1')}": (640, 768)}, None, ""
    ),
    "keys of an unknown width": ({f"lora_unet_{KEYS}": (640, 40)}, None, ""),
    "the added embedding": (
        {"lora_unet_add_embedding_linear_1": (8, 8)}, "sdxl", "add_embedding.linear_1"
    ),
    "by its original name": (
        {"lora_unet_label_emb_0_0": (8, 8)}, "sdxl", "add_embedding.linear_1"
    ),
    "a second transformer block": (
        {f"lora_unet_{KEYS.replace('blocks_0_attn2_to_k', 'blocks_1_ff_net_2')}": (8, 8)},
        *("sdxl", "transformer_blocks.1"),
    ),
    "of an unknown width, too": (
        {
            f"lora_unet_{KEYS}": (640, 40),
            f"lora_unet_{KEYS.replace('blocks_0_', 'blocks_1_')}": (640, 40),
        },
        *("sdxl", "transformer_blocks.1"),
    ),
    "a text encoder 1024 wide": (
        {f"lora_te_{Q_PROJ.format(0)}": (1024, 1024)}, "sd2", "text encoder is 1024 wide"
    ),
    "a text encoder 768 wide, by itself": (TEXT_768, None, ""),
    "and a UNet of three levels": (
        TEXT_768 | {"lora_unet_up_blocks_2_resnets_0_conv1": (8, 8)}, None, ""
    ),
    "and a fourth level": (
        TEXT_768 | {"lora_unet_up_blocks_3_resnets_0_conv1": (8, 8)}, "sd1", "four levels"
    ),
    "and a fourth level of the way down": (
        TEXT_768 | {"lora_unet_down_blocks_3_resnets_0_conv1": (8, 8)}, "sd1", "four levels"
    ),
    "and attention in the first block": (
        TEXT_768 | {"lora_unet_down_blocks_0_attentions_0_proj_in": (8, 8)}, "sd1", "four levels"
    ),
    "nothing": ({"lora_unet_conv_in": (320, 4)}, None, ""),
}  # fmt: skip


@pytest.mark.parametrize("case", BY_TENSORS)
def test_the_family_by_the_tensors(case: str, tmp_path: Path) -> None:
    """Each thing that tells a family tells it alone and with its reason; what two families have in
    common tells none."""
    shapes, family, why = BY_TENSORS[case]
    found = family_by_tensors(lora(tmp_path / "a.safetensors", **shapes))
    assert (found[0].name if found else None) == family
    assert why in (found[1] if found else "")


@pytest.mark.parametrize("stem", [f"lora_unet_{KEYS}", f"lora_te_{Q_PROJ.format(0)}"])
def test_a_vector_in_a_matrix_place(stem: str, tmp_path: Path) -> None:
    """A whole-weight delta that is a vector where projections are matrices has no width: the file
    tells no family, is inspected with that problem, and is no traceback."""
    path = tmp_path / "a.safetensors"
    save_file({f"{stem}.diff": torch.ones(320)}, path, {"ss_base_model_version": "sd_v1"})
    assert family_by_tensors(open_lora(path)) is None
    assert family_of(open_lora(path)).name == "sd1"
    found = inspect.inspect(path)
    assert any("do not fit" in problem for problem in found.problems)
    assert inspect.text(found)


ARCHITECTURES = {
    "stable-diffusion-v1": "sd1",
    "stable-diffusion-v2-512": "sd2",
    "stable-diffusion-v2-768-v": "sd2",
    "stable-diffusion-xl-v1-base": "sdxl",
    "flux-1-dev": None,
    "": None,
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_family_by_the_header(architecture: str, tmp_path: Path) -> None:
    """Stability's word for the architecture tells the family, with `/lora` behind it or not; and
    kohya's base version comes before it."""
    family = ARCHITECTURES[architecture]
    for end in ("/lora", ""):
        found = family_by_header({"modelspec.architecture": architecture + end})
        assert (found.name if found else None) == family
    both = {"modelspec.architecture": architecture, "ss_base_model_version": "sd_v2_v"}
    known = family_by_header(both)
    assert known is not None
    assert known.name == "sd2"
    header = {"modelspec.architecture": f"{architecture}/lora"}
    file = lora(tmp_path / "a.safetensors", header, lora_unet_conv_in=(320, 4))
    if family is None:
        with pytest.raises(sd_lora.UsageError, match=r"neither the tensors nor the header .*--fam"):
            family_of(file)
    else:
        assert family_of(file).name == family


@pytest.mark.parametrize("family", FAMILIES)
def test_the_prediction_type_is_the_headers(family: str) -> None:
    """v-prediction by Stability's key or by kohya's base version. Where nothing is said, SD1 and
    SDXL predict epsilon; of SD2, which was published in both kinds, nothing is known."""
    row = FAMILIES[family]
    v = {"modelspec.prediction_type": "v"}, {"ss_base_model_version": "sd_v2_v"}
    for header in (*v, {"ss_base_model_version": "sd_v1_v"}):
        assert prediction_type(header, row) == "v_prediction"
    assert prediction_type({"modelspec.prediction_type": "epsilon"}, row) == "epsilon"
    silent = None if family == "sd2" else "epsilon"
    assert prediction_type({}, row) == silent
    assert prediction_type({"ss_base_model_version": "sdxl_base_v1-0"}, row) == silent


def test_a_family_that_was_given(tmp_path: Path) -> None:
    """It counts before the header and where nothing is said; but against the tensors it is an
    error that names both, and an unknown one lists those that there are."""
    header = {"ss_base_model_version": "sd_v1"}
    silent = lora(tmp_path / "a.safetensors", header, lora_unet_conv_in=(320, 4))
    assert family_of(silent).name == "sd1"
    assert family_of(silent, "sdxl").name == "sdxl"
    wide = lora(tmp_path / "b.safetensors", header, **{f"lora_unet_{KEYS}": (640, 2048)})
    assert family_of(wide).name == "sdxl"
    assert family_of(wide, "sdxl").name == "sdxl"
    match = r"is for Stable Diffusion XL \(its cross-attention is 2048 wide\), not .* 1\.x"
    with pytest.raises(sd_lora.UsageError, match=match):
        family_of(wide, "sd1")
    with pytest.raises(sd_lora.UsageError, match=r"unknown family 'sd9'; families: sd1, sd2, sdxl"):
        family_of(silent, "sd9")


def test_an_encoder_that_two_families_share(tmp_path: Path) -> None:
    """SDXL's second text encoder is the refiner's only one: a LoRA of it alone is of the family
    that its header says, without a word of contradiction; without one it is said to be shared."""
    stem = f"lora_te2_{Q_PROJ.format(0)}"
    for version, family in (("sdxl_refiner_v1-0", "sdxl_refiner"), ("sdxl_base_v1-0", "sdxl")):
        header = {"ss_base_model_version": version}
        path = lora(tmp_path / "a.safetensors", header, **{stem: (1280, 1280)}).path
        found = inspect.inspect(path)
        assert (found.family, found.problems) == (family, [])
    plain = lora(tmp_path / "b.safetensors", **{stem: (1280, 1280)}).path
    assert "the refiner's" in inspect.inspect(plain).family_by
    assert family_of(open_lora(plain), "sdxl_refiner").name == "sdxl_refiner"


# --- who reads it: verdicts, and what diffusers does ---


def verdict(path: Path, family: str) -> str:
    """What is said of diffusers, on the tiny pipeline."""
    models = models_of_pipeline(traps.build_pipeline(family))
    base = MetaPipeline.of_models(models, FAMILIES[family])
    return readers(open_lora(path, base.layout), base)["diffusers"]


def count_of(verdict: str) -> int:
    number = re.search(r"\d+", verdict)
    assert number is not None, verdict
    return int(number[0])


def test_t16_alphas_and_a_header_of_peft(tmp_path: Path) -> None:
    """T16. diffusers refuses a kohya file with its own header beside alphas, and so it is said; of
    the same file without the header it loads everything."""
    pipeline = traps.trained()
    fields = {"unet.r": 4, "unet.lora_alpha": 64, "unet.target_modules": ["to_q"]}
    header = {"lora_adapter_metadata": json.dumps(fields)}
    path = tmp_path / "both.safetensors"
    traps.written(pipeline, path, files.KOHYA, header=header)
    with pytest.raises(ValueError, match="Both `network_alphas` and `metadata`"):
        traps.loaded(path)
    assert verdict(path, "sd1").startswith("refuses the file")
    plain = traps.written(pipeline, tmp_path / "plain.safetensors", files.KOHYA)
    assert traps.wrong(traps.changes(pipeline), traps.loaded(plain)[0]) == set()
    assert verdict(plain, "sd1") == EXACT


@pytest.fixture(scope="module")
def sdxl_unet() -> tuple[traps.DiffusionPipeline, traps.Changes]:
    pipeline = traps.trained("sdxl", only=("unet",))
    return pipeline, traps.changes(pipeline)


def test_t08_two_kinds_of_names(
    sdxl_unet: tuple[traps.DiffusionPipeline, traps.Changes], tmp_path: Path
) -> None:
    """T8. As many modules as diffusers loses of an SDXL file with both kinds of names are said to
    be lost; with one kind, none."""
    pipeline, want = sdxl_unet
    whole = traps.written(pipeline, tmp_path / "a.safetensors", files.KOHYA, "sdxl")
    theirs = traps.written(pipeline, tmp_path / "b.safetensors", files.KOHYA, "sd1")
    middle, mid = "lora_unet_middle_block", "lora_unet_mid_block"
    mixed = {k: t for k, t in load_file(whole).items() if not k.startswith(middle)}
    mixed |= {k: t for k, t in load_file(theirs).items() if k.startswith(mid)}
    path = tmp_path / "mixed.safetensors"
    save_file(mixed, path)
    lost = traps.wrong(want, traps.loaded(path, "sdxl")[0])
    assert count_of(verdict(path, "sdxl")) == len(lost) > 50
    assert traps.wrong(want, traps.loaded(whole, "sdxl")[0]) == set()
    assert verdict(whole, "sdxl") == EXACT


def test_t07_the_added_embedding(
    sdxl_unet: tuple[traps.DiffusionPipeline, traps.Changes], tmp_path: Path
) -> None:
    """T7. The two modules that diffusers loses under diffusers' names are said to be lost."""
    pipeline, want = sdxl_unet
    path = traps.written(pipeline, tmp_path / "a.safetensors", files.KOHYA, "sd1")
    lost = traps.wrong(want, traps.loaded(path, "sdxl")[0])
    said = verdict(path, "sdxl")
    assert count_of(said) == len(lost) == 2
    assert "add_embedding" in said


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_t09_original_names_in_another_family(family: str, tmp_path: Path) -> None:
    """T9. Of an SD1 or SD2 file with original names, diffusers loses most, as it is said: at least
    half of those that are named, and none that is not."""
    pipeline = traps.trained(family, only=("unet",))
    row = dataclasses.replace(FAMILIES[family], original_names=True)
    naming = Naming(row, Layout.of(pipeline.unet.config))
    path = traps.written(pipeline, tmp_path / "a.safetensors", files.KOHYA, naming)
    want = traps.changes(pipeline)
    lost = traps.wrong(want, traps.loaded(path, family)[0])
    said = verdict(path, family)
    assert "most of" in said
    assert count_of(said) / 2 < len(lost) <= count_of(said) <= len(want)
    plain = traps.written(pipeline, tmp_path / "b.safetensors", files.KOHYA, family)
    assert verdict(plain, family) == EXACT


@pytest.mark.parametrize("prefix", ["unet.base_model.model.", "base_model.model.", ""])
def test_t10_prefixes_of_peft(prefix: str, tmp_path: Path) -> None:
    """T10. Of keys behind peft's own prefix, or without a component, diffusers loads nothing."""
    pipeline = traps.trained(only=("unet",))
    path = tmp_path / "a.safetensors"
    save_file({prefix + k: t for k, t in traps.tensors_of(pipeline)["unet"].items()}, path)
    if prefix.startswith("unet."):
        with pytest.raises(ValueError, match="not found in the base model"):
            traps.loaded(path)
    else:
        assert traps.loaded(path)[0] == {}
    assert re.match(r"loads nothing|refuses", verdict(path, "sd1"))
    whole = {f"unet.{k}": t for k, t in traps.tensors_of(pipeline)["unet"].items()}
    save_file(whole, path)
    assert traps.wrong(traps.changes(pipeline), traps.loaded(path)[0]) == set()
    assert verdict(path, "sd1") == EXACT


def test_t05_magnitudes_of_a_text_encoder(tmp_path: Path) -> None:
    """T5. As many magnitudes as diffusers resets, those of the text encoder without `.weight`, are
    said to be reset; with it, none."""
    pipeline = traps.trained(use_dora=True)
    want = traps.changes(pipeline)
    path = traps.saved(pipeline, tmp_path)
    lost = traps.wrong(want, traps.loaded(path)[0])
    said = verdict(path, "sd1")
    assert said.startswith("resets")
    assert count_of(said) == len(lost) == sum(name.startswith("text_enc") for name in want)
    ours = traps.written(pipeline, tmp_path / "ours.safetensors")
    assert traps.wrong(want, traps.loaded(ours)[0]) == set()
    assert verdict(ours, "sd1") == EXACT


# --- as it is shown ---


def test_one_broken_module_of_many(tiny_sd1: Path, tmp_path: Path) -> None:
    """A module that cannot be read is a problem by its name, and the table is that of the others:
    the same file without the broken one."""
    meta_pipeline = MetaPipeline.of_folder(str(tiny_sd1))
    path = tmp_path / "a.safetensors"
    saved(path, files.KOHYA, adapter_of(tiny_sd1), tiny_sd1)
    tensors = load_file(path)
    stem = "lora_unet_mid_block_resnets_0_conv1"
    broken = {k: t for k, t in tensors.items() if k != f"{stem}.lora_up.weight"}
    save_file(broken, path)
    found = inspect.inspect(path, meta_pipeline)
    assert [p for p in found.problems if "in pairs" in p] == [
        "unet mid_block.resnets.0.conv1: lora_A and lora_B come in pairs"
    ]
    save_file({k: t for k, t in tensors.items() if not k.startswith(f"{stem}.")}, path)
    others = inspect.inspect(path, meta_pipeline)
    assert found.components == others.components
    assert found.blocks == others.blocks
    assert sum(block.modules for block in found.components) == 143
    assert found.family == "sd1"
    assert "mid_block" in inspect.text(found)


def test_a_header_cannot_steer_a_terminal(tmp_path: Path) -> None:
    """Escape sequences, bells and line breaks of a header's values are not printed raw, in no line
    of the text; the JSON holds them escaped."""
    evil = "a\x1b[2J\x1b]0;title\x07b\x9b31mc\rd\x08\x00e\u202ef"
    header = {"modelspec.title": evil, "ss_output_name": evil, "ss_training_comment": evil}
    path = tmp_path / "a.safetensors"
    lora(path, header, **{f"lora_unet_{KEYS}": (640, 768)})
    found = inspect.inspect(path)
    shown = inspect.text(found)
    raw = [c for c in shown if c != "\n" and (ord(c) < 32 or 127 <= ord(c) < 160)]
    assert raw == []
    assert "[2J" in shown
    record = found.as_json()
    assert not any(ord(c) < 32 and c != "\n" for c in record)
    assert json.loads(record)["header"]["modelspec.title"] == evil


def test_layers_are_shown_in_four_chunks(tmp_path: Path) -> None:
    """The 12 layers of CLIP-L are four blocks of three, in order, with the modules of each; those
    outside of layers are the ends."""
    shapes = {f"lora_te_{Q_PROJ.format(layer)}": (768, 768) for layer in range(12)}
    shapes[f"lora_te_{Q_PROJ.format(4).replace('q_proj', 'k_proj')}"] = (768, 768)
    shapes["lora_te_text_model_final_layer_norm"] = (8, 8)
    path = tmp_path / "a.safetensors"
    lora(path, **shapes)
    found = inspect.inspect(path)
    assert [(b.name, b.modules) for b in found.blocks] == [
        ("layers 0–2", 3), ("layers 3–5", 4), ("layers 6–8", 3), ("layers 9–11", 3), ("ends", 1)
    ]  # fmt: skip
    assert all(block.component == "text_encoder" for block in found.blocks)


def test_bars_are_of_the_mean_and_not_the_sum(tmp_path: Path) -> None:
    """One module of ‖ΔW‖ = 2 and four of 1, whose norm together is 2 as well: the bar of the second
    block is half as long, for it is the root mean square of a module's change."""
    tensors = {}
    sizes = {("down_blocks_0", 0): 2.0} | {("up_blocks_1", n): 1.0 for n in range(4)}
    for (block, number), size in sizes.items():
        stem = f"lora_unet_{block}_attentions_{number}_proj_in"
        tensors[f"{stem}.lora_down.weight"] = torch.full((1, 4), 0.5)
        tensors[f"{stem}.lora_up.weight"] = torch.full((4, 1), 0.5 * size)
        tensors[f"{stem}.alpha"] = torch.tensor(1.0)
    save_file(tensors, tmp_path / "a.safetensors")
    found = inspect.inspect(tmp_path / "a.safetensors")
    assert [b.norm for b in found.blocks] == pytest.approx([2.0, 2.0])
    bars = [line.count("▇") for line in inspect.text(found).splitlines() if "▇" in line]
    assert len(bars) == 2
    assert bars[0] == 2 * bars[1] > 0


def test_files_without_alpha_are_doubted_unless_they_are_ours(tmp_path: Path) -> None:
    """Keys of peft without an alpha or a header may have had another strength, which is said; our
    own file has its scale folded in, and of a file with alphas or a header nothing is said."""
    stem = "unet.down_blocks.0.attentions.0.proj_in"
    tensors = {f"{stem}.lora_A.weight": torch.ones(2, 4), f"{stem}.lora_B.weight": torch.ones(4, 2)}
    path = tmp_path / "a.safetensors"

    def doubts(header: dict[str, str], more: dict[str, Tensor] | None = None) -> int:
        save_file(tensors | (more or {}), path, header)
        return sum("no alpha" in problem for problem in inspect.inspect(path).problems)

    assert doubts({"format": "pt"}) == 1
    assert doubts({"sd_lora_version": "0.1"}) == 0
    fields = {"unet.r": 2, "unet.lora_alpha": 1, "unet.target_modules": ["proj_in"]}
    assert doubts({"lora_adapter_metadata": json.dumps(fields)}) == 0
    assert doubts({"format": "pt"}, {f"{stem}.alpha": torch.tensor(1.0)}) == 0
