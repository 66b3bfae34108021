"""The traps between peft, diffusers and kohya, one test each: what the usual path loses, and that
ours does not.

What was trained is measured by peft alone: the weights that its own merge changes, and by how much.
"""

import copy
import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sd_lora
from sd_lora.adapters.targets import select
from sd_lora.formats import adapter_files as files
from sd_lora.formats import lora_file as reading
from sd_lora.formats import verify
from sd_lora.formats.canonical import Adapter, canonical_name, read_models
from sd_lora.formats.names import Naming, naming_of
from sd_lora.models.families import FAMILIES
from sd_lora.models.meta_pipeline import MetaPipeline
from sd_lora.models.original_names import Layout
from tests.tiny import build_pipeline

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
NAME = "pytorch_lora_weights.safetensors"

Changes = dict[str, Tensor]
"""Component and canonical name → what its weight changes by."""


def models(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    return {c: m for c in COMPONENTS if (m := getattr(pipeline, c, None)) is not None}


def trained(
    family: str = "sd1", only: tuple[str, ...] = COMPONENTS, **config: object
) -> DiffusionPipeline:
    """A pipeline with random peft adapters on every module of the presets "all" and "text"."""
    pipeline = build_pipeline(family)
    adapt(pipeline, only, **config)
    return pipeline


def adapt(pipeline: DiffusionPipeline, only: tuple[str, ...], **config: object) -> None:
    generator = torch.Generator().manual_seed(0)
    for component in only:
        model = models(pipeline).get(component)
        if model is None:
            continue
        names = select(model, "all" if component == "unet" else "text")
        own = {"r": 4, "lora_alpha": 4, "target_modules": names} | config
        for kind in own.keys() & {"rank_pattern", "alpha_pattern"}:  # peft warns of the others
            own[kind] = {
                pattern: value
                for pattern, value in own[kind].items()
                if any(re.match(rf"(.*\.)?({pattern})$", name) for name in names)
            }
        model.add_adapter(peft.LoraConfig(**own))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.1, generator=generator)
            if "magnitude" in name:
                noise = torch.rand(parameter.shape, generator=generator)
                parameter.data.mul_(1 + 0.3 * noise)


@torch.no_grad()
def changes(pipeline: DiffusionPipeline) -> Changes:
    """What peft's merge adds to every adapted weight; NaN where the loader left it no value."""
    found = {}
    for component, model in models(pipeline).items():
        for name, layer in model.named_modules():
            if not isinstance(layer, BaseTunerLayer):
                continue
            weight = layer.get_base_layer().weight
            before, change = weight.clone(), torch.full(weight.shape, torch.nan)
            if not any(p.is_meta for p in layer.parameters()):
                layer.merge()
                change = weight - before
                layer.unmerge()
                weight.copy_(before)
            found[f"{component} {canonical_name(component, name)}"] = change
    return found


def tensors_of(pipeline: DiffusionPipeline) -> dict[str, dict[str, Tensor]]:
    """Component → keys and tensors as peft gives them."""
    return {
        component: peft.get_peft_model_state_dict(model)
        for component, model in models(pipeline).items()
        if getattr(model, "peft_config", None)
    }


def saved(
    pipeline: DiffusionPipeline,
    folder: Path,
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
    **options: object,
) -> Path:
    """The usual path: `save_lora_weights` of `get_peft_model_state_dict`."""
    layers = {f"{c}_lora_layers": convert(t) for c, t in tensors_of(pipeline).items()}
    type(pipeline).save_lora_weights(folder, **layers, **options)
    return folder / NAME


def written(
    pipeline: DiffusionPipeline,
    path: Path,
    kind: files.Format = files.DIFFUSERS,
    naming: Naming | str = "sd1",
    header: dict[str, str] | None = None,
) -> Path:
    """Our file of the pipeline's peft adapter."""
    naming = naming_of(naming) if isinstance(naming, str) else naming
    adapter = verify.loaded_adapter(pipeline)
    files.write_file(path, kind, adapter, naming, header or {"format": "pt"})
    return path


def loaded(path: Path, family: str = "sd1") -> tuple[Changes, list[str]]:
    """What diffusers makes of a file in a fresh pipeline, and what it complained about."""
    pipeline = build_pipeline(family)
    with verify.captured_complaints() as complaints:
        pipeline.load_lora_weights(path)
    return changes(pipeline), complaints


@torch.no_grad()
def read(path: Path, family: str = "sd1") -> Changes:
    """What our reader makes of a file, on the same weights."""
    pipeline = build_pipeline(family)
    return changes_of(reading.open_lora(path, Layout.of(pipeline.unet.config)).adapter, pipeline)


@torch.no_grad()
def changes_of(adapter: Adapter, pipeline: DiffusionPipeline) -> Changes:
    """What an adapter of ours changes the pipeline's weights by."""
    found = {}
    for component, modules in adapter.items():
        model = models(pipeline)[component]
        live = {canonical_name(component, n): m for n, m in model.named_modules()}
        for name, delta in modules.items():
            weight = live[name].weight
            delta.fit(tuple(weight.shape))
            found[f"{component} {name}"] = delta.compose(weight) - weight
    return found


def wrong(want: Changes, have: Changes) -> set[str]:
    """The modules that are lost, added, or off by more than 1e-5 of their largest change."""
    assert want
    bad = set(want.keys() ^ have.keys())
    for name in want.keys() & have.keys():
        error = (have[name] - want[name]).abs().max() / want[name].abs().max()
        if not error < 1e-5:
            bad.add(name)
    return bad


def ratio(want: Changes, have: Changes, name: str) -> float:
    """How many times too strong a module is."""
    return float((have[name] * want[name]).sum() / (want[name] ** 2).sum())


def is_attention(name: str) -> bool:
    return bool(re.search(r"\.to_(q|k|v|out\.0)$", name))


def test_t01_alpha_is_not_in_peft_keys(tmp_path: Path) -> None:
    """T1. Saved as peft gives it, an adapter of rank 4 and alpha 1 loads four times too strong in
    every module, without a word. Ours has the scale folded in, and our verification refuses the
    other file."""
    pipeline = trained(lora_alpha=1)
    want = changes(pipeline)
    naive = saved(pipeline, tmp_path)
    have, complaints = loaded(naive)
    assert complaints == []
    assert wrong(want, have) == want.keys()
    assert {round(ratio(want, have, name), 3) for name in want} == {4.0}
    ours = written(pipeline, tmp_path / "ours.safetensors")
    assert wrong(want, loaded(ours)[0]) == set()
    meta_pipeline = MetaPipeline.of_models(models(pipeline), FAMILIES["sd1"])
    adapter = verify.loaded_adapter(pipeline)
    with pytest.raises(sd_lora.RunError, match=r"mlp.fc1 is off by 300.0%"):
        verify.verify(naive, adapter, meta_pipeline)
    assert verify.verify(ours, adapter, meta_pipeline).modules == len(want)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_t02_the_recipe_mixes_two_kinds_of_keys(family: str, tmp_path: Path) -> None:
    """T2. After `convert_state_dict_to_diffusers`, diffusers loses exactly the UNet's attention
    (or, were its first key another, everything else). Our reader takes both kinds, and our file
    loads whole."""
    pipeline = trained(family)
    want = changes(pipeline)
    naive = saved(pipeline, tmp_path, convert_state_dict_to_diffusers)
    have, _ = loaded(naive, family)
    lost = {name for name in want if name.startswith("unet") and is_attention(name)}
    assert want.keys() - have.keys() == wrong(want, have) == lost
    assert len(lost) > 50
    assert wrong(want, read(naive, family)) == set()
    ours = written(pipeline, tmp_path / "ours.safetensors", naming=family)
    assert wrong(want, loaded(ours, family)[0]) == set()


def test_t03_one_alpha_a_component(tmp_path: Path) -> None:
    """T3. Of a kohya file whose layers have their own alphas, diffusers gives the UNet's attention
    and the text encoder the most common one. Our reader gives each its own, and our kohya file has
    one for all of them."""
    pipeline = trained(
        rank_pattern={"to_k": 2}, alpha_pattern={"to_q": 1, "to_k": 3, "conv1": 8, "fc1": 3}
    )
    want = changes(pipeline)
    naive = written(pipeline, tmp_path / "naive.safetensors", files.LYCORIS)
    alphas = {float(v) for k, v in load_file(naive).items() if k.endswith(".alpha")}
    assert alphas == {1.0, 3.0, 4.0, 8.0}
    have, complaints = loaded(naive)
    assert wrong(want, have) == {n for n in want if re.search(r"to_[qk]$|fc1$", n)}
    q = "unet mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    assert ratio(want, have, q) == pytest.approx(4)
    assert all("alpha_pattern keys did not match" in line for line in complaints)
    assert wrong(want, read(naive)) == set()
    ours = written(pipeline, tmp_path / "ours.safetensors", files.KOHYA)
    assert wrong(want, loaded(ours)[0]) == wrong(want, read(ours)) == set()


def test_t04_dora_scale_is_dropped(tmp_path: Path) -> None:
    """T4. diffusers takes `dora_scale` out of a kohya file and loads the rest as a LoRA: every
    module is wrong. Our reader obeys it; for diffusers we write another file, which loads."""
    pipeline = trained(use_dora=True)
    want = changes(pipeline)
    naive = written(pipeline, tmp_path / "naive.safetensors", files.LYCORIS)
    assert sum(key.endswith(".dora_scale") for key in load_file(naive)) == len(want)
    have, _ = loaded(naive)
    assert have.keys() == wrong(want, have) == want.keys()
    assert wrong(want, read(naive)) == set()
    ours = written(pipeline, tmp_path / "ours.safetensors")
    assert wrong(want, loaded(ours)[0]) == set()


def test_t05_a_text_encoders_magnitude_is_lost(tmp_path: Path) -> None:
    """T5. With the magnitude's key as peft gives it, diffusers takes the UNet's and resets every
    one of the text encoder's. Our reader takes both, and our keys end in ".weight", which both
    loaders take."""
    pipeline = trained(use_dora=True)
    want = changes(pipeline)
    naive = saved(pipeline, tmp_path)
    have, _ = loaded(naive)
    assert wrong(want, have) == {name for name in want if name.startswith("text_encoder")}
    assert wrong(want, read(naive)) == set()
    ours = written(pipeline, tmp_path / "ours.safetensors")
    assert wrong(want, loaded(ours)[0]) == wrong(want, read(ours)) == set()


@pytest.mark.parametrize(
    ("module", "part"),
    [
        ("unet.mid_block.resnets.0.conv1", "lora_B"),
        ("unet.conv_in", "lora_A"),
        ("text_encoder.encoder.layers.0.mlp.fc1", "lora_B"),
    ],
)
def test_t06_half_a_module(module: str, part: str, tmp_path: Path) -> None:
    """T6. Of a file without one factor, diffusers loads the rest and leaves the UNet's parameter
    on the meta device, where forward passes read uninitialised memory, and the text encoder's at
    its start. We refuse the file by the module's name, and verification finds it."""
    pipeline = trained()
    want = changes(pipeline)
    path = saved(pipeline, tmp_path)
    tensors = load_file(path)
    del tensors[f"{module}.{part}.weight"]
    save_file(tensors, path)
    component, _, name = module.partition(".")
    name = canonical_name(component, name)
    have, complaints = loaded(path)
    assert complaints
    assert wrong(want, have) == {f"{component} {name}"}
    assert bool(have[f"{component} {name}"].isnan().all()) == (component == "unet")
    with pytest.raises(sd_lora.UsageError, match=rf"{component} {name}: lora_A and lora_B come"):
        reading.open_lora(path).check()
    meta_pipeline = MetaPipeline.of_models(models(pipeline), FAMILIES["sd1"])
    with pytest.raises(sd_lora.RunError, match="LOAD REPORT|left without a value|come in pairs"):
        verify.verify(path, verify.loaded_adapter(pipeline), meta_pipeline)


def test_t07_sdxls_added_embedding(tmp_path: Path) -> None:
    """T7. With diffusers' names, kohya's SDXL file loses its two added embeddings in diffusers.
    Our reader has them, and our file names them as the original code does."""
    pipeline = trained("sdxl", only=("unet",))
    want = changes(pipeline)
    naive = written(pipeline, tmp_path / "naive.safetensors", files.KOHYA, "sd1")
    assert "lora_unet_add_embedding_linear_1.lora_up.weight" in load_file(naive)
    have, _ = loaded(naive, "sdxl")
    assert wrong(want, have) == {f"unet add_embedding.linear_{i}" for i in (1, 2)}
    assert wrong(want, read(naive, "sdxl")) == set()
    ours = written(pipeline, tmp_path / "ours.safetensors", files.KOHYA, "sdxl")
    assert "lora_unet_label_emb_0_0.lora_up.weight" in load_file(ours)
    assert wrong(want, loaded(ours, "sdxl")[0]) == wrong(want, read(ours, "sdxl")) == set()


def test_t08_original_names_beside_diffusers_names(tmp_path: Path) -> None:
    """T8. In an SDXL file with both kinds of names, diffusers deletes every module of the original
    kind, without a word. Our reader takes both."""
    pipeline = trained("sdxl", only=("unet",))
    want = changes(pipeline)
    original = load_file(written(pipeline, tmp_path / "a.safetensors", files.KOHYA, "sdxl"))
    theirs = load_file(written(pipeline, tmp_path / "b.safetensors", files.KOHYA, "sd1"))
    mixed = {k: t for k, t in original.items() if not k.startswith("lora_unet_middle_block")}
    mixed |= {k: t for k, t in theirs.items() if k.startswith("lora_unet_mid_block")}
    path = tmp_path / "mixed.safetensors"
    save_file(mixed, path)
    have, complaints = loaded(path, "sdxl")
    blocks = ("unet down_blocks", "unet up_blocks", "unet conv_in")
    assert wrong(want, have) == {name for name in want if name.startswith(blocks)}
    assert [line for line in complaints if "No LoRA keys" not in line] == []
    assert wrong(want, read(path, "sdxl")) == set()


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_t09_original_names_of_sd1(family: str, tmp_path: Path) -> None:
    """T9. kohya's keys with original names lose most of an SD1 or SD2 UNet in diffusers; our
    reader knows them in every family."""
    pipeline = trained(family)
    want = changes(pipeline)
    row = dataclasses.replace(FAMILIES[family], original_names=True)
    naming = Naming(row, Layout.of(pipeline.unet.config))
    naive = written(pipeline, tmp_path / "naive.safetensors", files.KOHYA, naming)
    assert "lora_unet_middle_block_1_proj_in.lora_up.weight" in load_file(naive)
    have, _ = loaded(naive, family)
    assert len(wrong(want, have)) > len(want) / 2
    assert wrong(want, read(naive, family)) == set()
    ours = written(pipeline, tmp_path / "ours.safetensors", files.KOHYA, family)
    assert wrong(want, loaded(ours, family)[0]) == set()


@pytest.mark.parametrize(
    "rename",
    [
        "{}",
        "base_model.model.{}",
        "unet.base_model.model.{}",
    ],
)
def test_t10_keys_without_a_component(rename: str, tmp_path: Path) -> None:
    """T10. Of keys without "unet." diffusers loads nothing and says so in a log line; with peft's
    own prefix behind it, it fails. Our reader knows the component by the module's name."""
    pipeline = trained(only=("unet",))
    want = changes(pipeline)
    path = tmp_path / "naive.safetensors"
    save_file({rename.format(k): t for k, t in tensors_of(pipeline)["unet"].items()}, path)
    if rename.startswith("unet."):
        with pytest.raises(ValueError, match="not found in the base model"):
            loaded(path)
    else:
        have, complaints = loaded(path)
        assert have == {}
        assert len(complaints) == 2
        assert all("No LoRA keys associated" in line for line in complaints)
    assert wrong(want, read(path)) == set()


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_t10_a_peft_folder(component: str, tmp_path: Path) -> None:
    """T10. `PeftModel.save_pretrained`: diffusers loads nothing of its folder, our reader all of
    it, with the ranks and alphas of the configuration beside it."""
    pipeline = build_pipeline()
    config = peft.LoraConfig(
        r=4,
        lora_alpha=1,
        target_modules=select(
            models(pipeline)[component], "all" if component == "unet" else "text"
        ),
        rank_pattern={"conv1": 2, "fc1": 3},
        alpha_pattern={"to_q": 7, "q_proj": 7},
        init_lora_weights=False,
    )
    torch.manual_seed(0)
    model = peft.get_peft_model(models(pipeline)[component], config)
    model.save_pretrained(tmp_path)
    want = changes(pipeline)
    assert loaded(tmp_path)[0] == {}
    assert reading.open_lora(tmp_path).format == "peft"
    assert wrong(want, read(tmp_path)) == set()


def test_t11_names_without_text_model(tmp_path: Path) -> None:
    """T11. transformers 5 left `text_model.` out of CLIPTextModel, and peft's keys with it; other
    tools know no such names. Our files have it, whether diffusers' or kohya's, and our reader
    takes names with and without."""
    pipeline = trained(only=("text_encoder",))
    want = changes(pipeline)
    naive = saved(pipeline, tmp_path)
    stem = "encoder.layers.0.self_attn.q_proj"
    assert f"text_encoder.{stem}.lora_A.weight" in load_file(naive)
    assert wrong(want, read(naive)) == set()
    ours = written(pipeline, tmp_path / "ours.safetensors")
    assert f"text_encoder.text_model.{stem}.lora_A.weight" in load_file(ours)
    kohya = written(pipeline, tmp_path / "kohya.safetensors", files.KOHYA)
    assert all(key.startswith("lora_te_text_model_encoder_layers_") for key in load_file(kohya))
    for path in (ours, kohya):
        assert wrong(want, loaded(path)[0]) == wrong(want, read(path)) == set()


def test_t12_convert_state_dict_to_kohya(tmp_path: Path) -> None:
    """T12. diffusers' converter writes alpha = rank as an integer, whatever alpha was, and text
    encoder names that A1111 and ComfyUI do not know; ours folds the scale in and is exact."""
    pipeline = trained(lora_alpha=1)
    want = changes(pipeline)
    keys = {f"{c}.{k}": t for c, ts in tensors_of(pipeline).items() for k, t in ts.items()}
    naive = {k: t.contiguous() for k, t in convert_state_dict_to_kohya(keys).items()}
    alphas = {(t.dtype, int(t)) for k, t in naive.items() if k.endswith(".alpha")}
    assert alphas == {(torch.int64, 4)}
    assert not any(key.startswith("lora_te_text_model_") for key in naive)
    save_file(naive, tmp_path / "naive.safetensors")
    have, complaints = loaded(tmp_path / "naive.safetensors")
    assert complaints == []
    assert {round(ratio(want, have, name), 3) for name in want} == {4.0}
    ours = written(pipeline, tmp_path / "ours.safetensors", files.KOHYA)
    assert wrong(want, loaded(ours)[0]) == wrong(want, read(ours)) == set()


def test_t12_its_dora_keys_are_refused(tmp_path: Path) -> None:
    """T12. Its DoRA keys (`lora_unet.conv_in.lora_magnitude_vector`) are of no format; we refuse
    the file by one of them rather than to read the rest as a LoRA."""
    pipeline = trained(only=("unet",), use_dora=True)
    keys = {f"unet.{k}": t for k, t in tensors_of(pipeline)["unet"].items()}
    naive = {k: t.contiguous() for k, t in convert_state_dict_to_kohya(keys).items()}
    save_file(naive, tmp_path / "naive.safetensors")
    assert "lora_unet.conv_in.lora_magnitude_vector" in naive
    with pytest.raises(sd_lora.UsageError, match=r"lora_unet\S+\.lora_magnitude_vector"):
        reading.open_lora(tmp_path / "naive.safetensors")


def metadata_of(pipeline: DiffusionPipeline, *components: str) -> dict[str, dict]:
    """The configurations that diffusers' training scripts put into the header."""
    chosen = {c: m for c, m in models(pipeline).items() if c in components}
    return copy.deepcopy(_collate_lora_metadata(chosen))


UNEVEN = {
    "lora_alpha": 1,
    "alpha_pattern": {"conv1": 8.0, r"^encoder\.layers\.1\.mlp\.fc2": 7.0},
    "rank_pattern": {"fc1": 2},
}
"""Patterns as scripts write them, one of them anchored to transformers 5's name."""


def test_t13_the_whole_configuration_in_the_header(tmp_path: Path) -> None:
    """T13. diffusers puts all of peft's configuration into the header, some 40 fields, and a peft
    that lacks one of them refuses the file. Our reader takes what it needs, and our files have no
    such header and need none."""
    pipeline = trained(**UNEVEN)
    want = changes(pipeline)
    metadata = metadata_of(pipeline, "unet", "text_encoder")
    fields = metadata["unet_lora_adapter_metadata"]
    assert len(fields) > 30
    path = saved(pipeline, tmp_path / "same", **metadata)
    assert wrong(want, loaded(path)[0]) == wrong(want, read(path)) == set()
    fields["a_field_of_another_version"] = None
    path = saved(pipeline, tmp_path / "other", **metadata)
    with pytest.raises(TypeError, match="could not be instantiated"):
        loaded(path)
    assert wrong(want, read(path)) == set()
    ours = written(pipeline, tmp_path / "ours.safetensors")
    with safe_open(ours, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert wrong(want, loaded(ours)[0]) == set()


def test_t14_a_header_of_transformers_4(tmp_path: Path) -> None:
    """T14. With `text_model.` in the header's names and patterns, as transformers 4 had it,
    diffusers fails; our reader obeys the patterns of either."""
    pipeline = trained(
        r=4,
        lora_alpha=1,
        rank_pattern={"encoder.layers.0.mlp.fc1": 2},
        alpha_pattern={"encoder.layers.1.mlp.fc2": 7.0},
    )
    want = changes(pipeline)
    metadata = metadata_of(pipeline, "unet", "text_encoder")
    old = metadata["text_encoder_lora_adapter_metadata"]
    old["target_modules"] = [f"text_model.{name}" for name in old["target_modules"]]
    for kind in ("rank_pattern", "alpha_pattern"):
        old[kind] = {f"text_model.{name}": value for name, value in old[kind].items()}
    path = saved(pipeline, tmp_path, **metadata)
    with pytest.raises(ValueError, match="not found in the base model"):
        loaded(path)
    assert wrong(want, read(path)) == set()


def test_t15_a_header_for_one_component(tmp_path: Path) -> None:
    """T15. A header that speaks of the UNet alone makes diffusers fail at the text encoder's
    tensors; our reader gives these alpha = rank, as everywhere where nothing is said."""
    pipeline = trained(only=("unet",), lora_alpha=1)
    adapt(pipeline, ("text_encoder",))
    want = changes(pipeline)
    path = saved(pipeline, tmp_path, **metadata_of(pipeline, "unet"))
    with pytest.raises(ValueError, match="specify `target_modules`"):
        loaded(path)
    assert wrong(want, read(path)) == set()


def test_t16_a_header_beside_alphas(tmp_path: Path) -> None:
    """T16. A kohya file with diffusers' header is refused by diffusers; for our reader its alphas
    count and the header does not, though it says otherwise."""
    pipeline = trained(**UNEVEN)
    want = changes(pipeline)
    fields = {"unet.r": 4, "unet.lora_alpha": 64, "unet.target_modules": ["to_q"]}
    header = {"lora_adapter_metadata": json.dumps(fields)}
    path = written(pipeline, tmp_path / "both.safetensors", files.KOHYA, header=header)
    with pytest.raises(ValueError, match="Both `network_alphas` and `metadata`"):
        loaded(path)
    assert wrong(want, read(path)) == set()


TEXT_MODULES = {
    "fc1 fc2": r".*mlp\.fc[12]",
    "fc1": r".*mlp\.fc1",
    "q": r".*q_proj",
    "q v": r".*[qv]_proj",
    "out": r".*out_proj",
    "q out": r".*q_proj|.*out_proj",
    "q fc1": r".*q_proj|.*fc1",
    "one layer's q k v out": r".*layers\.0\.self_attn.*",
}
"""Parts of a text encoder that people train → pattern."""


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_t17_a_text_encoders_mlp_alone_is_read(family: str, tmp_path: Path) -> None:
    """T17. With nothing but fc1 and fc2 of a text encoder in it, diffusers cannot tell what kind
    of file peft's keys are; our reader can."""
    modules = r".*mlp\.fc[12]"
    pipeline = trained(family, only=COMPONENTS[1:], target_modules=modules)
    want = changes(pipeline)
    naive = saved(pipeline, tmp_path)
    with pytest.raises(ValueError, match="Could not automatically infer"):
        loaded(naive, family)
    assert wrong(want, read(naive, family)) == set()


@pytest.mark.parametrize("case", TEXT_MODULES)
def test_t17_any_part_of_the_text_encoders_is_exported(case: str, tmp_path: Path) -> None:
    """T17. Whichever of the text encoders' modules are trained, every file that `save_adapter`
    writes passes verification: diffusers' loader takes it and finds what was trained."""
    pipeline = build_pipeline("sdxl")
    chosen = {c: m for c, m in models(pipeline).items() if c != "unet"}
    check_export(chosen, TEXT_MODULES[case], tmp_path)


def check_export(chosen: dict[str, nn.Module], modules: str, folder: Path, **options: dict) -> None:
    """Adapts these models at random and verifies every file of the adapter."""
    for model in chosen.values():
        sd_lora.inject(model, [modules], rank=3, alpha=1.5, **options)
        for delta in sd_lora.deltas_of(model).values():
            delta.lora_B.data.normal_(std=0.1)
    adapter = read_models(chosen)
    count = sum(len(m) for m in adapter.values())
    bare = build_pipeline("sdxl")
    meta_pipeline = MetaPipeline.of_models(models(bare), FAMILIES["sdxl"])
    paths = sd_lora.save_adapter(chosen, folder, family="sdxl")
    for path, kind in zip(paths, files.formats_of(adapter)[0], strict=True):
        assert verify.verify(path, adapter, meta_pipeline, kind).modules == count


@pytest.mark.parametrize("rank", [2, 3, 5])
def test_t17_a_text_projection_of_its_own_rank(rank: int, tmp_path: Path) -> None:
    """T17. diffusers takes the rank of SDXL's text projection from the other modules; whatever it
    is, every file that `save_adapter` writes passes verification."""
    chosen = {"text_encoder_2": build_pipeline("sdxl").text_encoder_2}
    modules = r".*(q|k|v|out)_proj|.*fc[12]|text_projection"
    check_export(chosen, modules, tmp_path, rank_pattern={"text_projection": rank})


def test_t21_save_lora_weights_and_paths(tmp_path: Path) -> None:
    """T21. Given a file's path, diffusers writes nothing into it and says so in a log line; not
    being the main process, it writes all the same. Ours writes the very file, whole."""
    pipeline = trained(only=("unet",))
    want = changes(pipeline)
    path = tmp_path / "lora.safetensors"
    path.touch()
    with verify.captured_complaints() as complaints:
        saved(pipeline, path)
    assert "should be a directory, not a file" in complaints[0]
    assert path.stat().st_size == 0
    assert saved(pipeline, tmp_path / "second process", is_main_process=False).is_file()
    written(pipeline, path)
    assert wrong(want, loaded(path)[0]) == wrong(want, read(path)) == set()
