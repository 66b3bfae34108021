"""Names of every module of the published models: kohya's, the original code's and OpenCLIP's."""

import hashlib
from functools import cache

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_open_clip_checkpoint,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import sd_lora
from sd_lora.adapters.targets import select
from sd_lora.formats.canonical import canonical_name
from sd_lora.formats.names import Naming, from_kohya, naming_of
from sd_lora.models.families import FAMILIES
from sd_lora.models.meta_pipeline import MetaPipeline
from sd_lora.models.original_names import (
    Layout,
    open_clip_parameter,
    unet_from_original,
    unet_to_original,
)
from tests.tiny import build_unet

COUNTS = {
    "sd1": {"unet": 282, "text_encoder": 72},
    "sd2": {"unet": 282, "text_encoder": 138},
    "sdxl": {"unet": 794, "text_encoder": 72, "text_encoder_2": 192},
    "sdxl_refiner": {"unet": 554, "text_encoder_2": 192},
}


@cache
def meta_pipeline(family: str) -> MetaPipeline:
    return MetaPipeline.of_family(FAMILIES[family])


def targets(family: str) -> dict[str, list[str]]:
    """Component → canonical names of what the presets "all" and "text" adapt."""
    return {
        component: [
            canonical_name(component, name)
            for name in select(model, "all" if component == "unet" else "text")
        ]
        for component, model in meta_pipeline(family).models.items()
    }


def kohya_names(family: str) -> dict[str, list[str]]:
    """Component → kohya names of the same."""
    naming = naming_of(family)
    return {c: [naming.kohya(c, n) for n in names] for c, names in targets(family).items()}


def owners(model: nn.Module) -> list[str]:
    """Names of the modules that hold parameters of their own."""
    return [n for n, m in model.named_modules() if n and any(True for _ in m.parameters(False))]


def names_of_parameters(component: str, model: nn.Module) -> set[str]:
    """Canonical names of the parameters, and of all modules that hold any."""
    names = {name for name, _ in model.named_parameters()}
    parents = {n[:i] for n in names for i, letter in enumerate(n) if letter == "."}
    return {canonical_name(component, name) for name in names | parents}


@pytest.mark.parametrize("family", FAMILIES)
def test_presets_cover_the_published_models(family: str) -> None:
    """The golden numbers of modules that kohya's tools know: 282 and 794 of the UNets."""
    assert {c: len(names) for c, names in targets(family).items()} == COUNTS[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_kohya_names_are_read_back_exactly(family: str) -> None:
    """For every parameter of the published models and every module around one, reading the name
    that diffusers' has for it is the identity, and for every module that holds parameters itself
    the name that the family's files use, too. No two modules share a name. (The refiner's text
    encoder is named as a first one: a file's reader tells it by the rest of the file.)"""
    naming, seen = naming_of(family), set()
    by_diffusers = Naming(FAMILIES["sd1"], naming.layout)
    for component, model in meta_pipeline(family).models.items():
        alone = family == "sdxl_refiner" and component == "text_encoder_2"
        read_as = "text_encoder" if alone else component
        for name in names_of_parameters(component, model):
            stem = f"{FAMILIES[family].kohya_prefixes[component]}_{name.replace('.', '_')}"
            assert from_kohya(stem, naming.layout) == (read_as, name)
            if component == "unet":
                assert by_diffusers.kohya(component, name) == stem
        stems = {canonical_name(component, n) for n in owners(model)}
        for name in stems:
            stem = naming.kohya(component, name)
            assert from_kohya(stem, naming.layout) == (read_as, name)
            assert stem not in seen
            seen.add(stem)
    assert len(seen) > sum(COUNTS[family].values())


@pytest.mark.parametrize("family", FAMILIES)
def test_original_names_are_read_back_exactly(family: str) -> None:
    """Every module of the UNets that holds parameters has one original name, which leads back to
    it, with dots and in kohya's underscores, by the family's layout and by the default one; what
    is no module of the UNet has none."""
    layout, names = meta_pipeline(family).layout, owners(meta_pipeline(family).models["unet"])
    originals = {name: unet_to_original(name, layout) for name in names}
    assert len({*originals.values()}) == len(names) > 282
    for name, original in originals.items():
        assert original is not None
        assert unet_from_original(original, layout) == name
        stem = f"lora_unet_{original.replace('.', '_')}"
        assert from_kohya(stem, layout) == from_kohya(stem, Layout()) == ("unet", name)


@pytest.mark.parametrize(
    "name",
    ["down_blocks.0", "mid_block.resnets.0.nonlinearity", "mid_block.downsamplers.0.conv",
     "down_blocks.0.upsamplers.0.conv", "time_proj", "down_blocks.0.resnets.0.attn"],
)  # fmt: skip
def test_modules_without_an_original_name(name: str) -> None:
    """A module that the original code has not is refused by name and not written as something."""
    assert unet_to_original(name, Layout()) is None
    with pytest.raises(sd_lora.UsageError, match=f"unet {name} has no name"):
        naming_of("sdxl").kohya("unet", name)


@pytest.mark.parametrize(
    "name",
    ["input_blocks.1", "input_blocks.0.1.proj_in", "input_blocks.3.0.in_layers.2",
     "input_blocks.3.1.proj_in", "input_blocks.1.0.op", "output_blocks.2.3.conv",
     "middle_block.1.in_layers.2", "middle_block.0.proj_in",
     "input_blocks.1.1.in_layers.2"],
)  # fmt: skip
def test_original_names_of_no_module(name: str) -> None:
    """A name of the original form at a place where no UNet of two layers a block has it is not
    read as another module's."""
    assert unet_from_original(name, Layout()) is None
    assert from_kohya(f"lora_unet_{name.replace('.', '_')}", Layout()) is None


def test_diffusers_converter_agrees_on_original_names() -> None:
    """The independent oracle: diffusers' converter of single-file checkpoints turns a checkpoint
    that is spelled in our original names into diffusers' own, for every parameter of the three
    published UNets and of tiny ones with one, two and three layers a block."""
    models = {family: meta_pipeline(family).models["unet"] for family in FAMILIES}
    with torch.device("meta"):
        for num in (1, 2, 3):
            for family in FAMILIES:
                models[f"{family}, {num}"] = build_unet(family, layers_per_block=num)
    for model in models.values():
        layout, checkpoint = Layout.of(model.config), {}
        for name, _ in model.named_parameters():
            module, _, kind = name.rpartition(".")
            original = unet_to_original(module, layout)
            checkpoint[f"model.diffusion_model.{original}.{kind}"] = name
        converted = convert_ldm_unet_checkpoint(checkpoint, model.config)
        assert converted == {name: name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("cls", [CLIPTextModel, CLIPTextModelWithProjection])
def test_diffusers_converter_agrees_on_open_clip(cls: type) -> None:
    """The independent oracle for OpenCLIP: a checkpoint laid out by our table, with thirds and
    the transposition, is what diffusers' converter turns into transformers' parameters, equal to
    the last bit (SD2's encoder, and SDXL's second with its projection)."""
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=12,
        num_attention_heads=2, max_position_embeddings=5, projection_dim=6,
    )  # fmt: skip
    model = cls(config)
    want = {canonical_name("text_encoder", n): torch.randn(p.shape)
            for n, p in model.named_parameters()}  # fmt: skip
    checkpoint: dict[str, torch.Tensor] = {}
    for name, tensor in want.items():
        found = open_clip_parameter(name)
        assert found is not None, name
        key, third, transposed = found
        tensor = tensor.T if transposed else tensor
        if third is None:
            assert key not in checkpoint
            checkpoint[key] = tensor
            continue
        whole = checkpoint.setdefault(key, torch.full((3, *tensor.shape), torch.nan))
        whole[third] = tensor
    prefix = "cond.model."
    checkpoint = {
        prefix + key: tensor.flatten(0, 1) if "in_proj" in key else tensor
        for key, tensor in checkpoint.items()
    }
    converted = convert_open_clip_checkpoint(model, checkpoint, prefix=prefix)
    assert converted.keys() == want.keys()
    assert all(torch.equal(converted[name], tensor) for name, tensor in want.items())


@pytest.mark.parametrize(
    "name",
    ["text_model.encoder.layers.0.mlp", "text_model.encoder.layers.0.mlp.fc3.weight",
     "visual.proj", "text_model.encoder.layers.0.self_attn.q_proj"],
)  # fmt: skip
def test_parameters_that_open_clip_has_not(name: str) -> None:
    """Modules and unknown parameters have no place in OpenCLIP."""
    assert open_clip_parameter(name) is None


@pytest.mark.parametrize(
    ("family", "component", "name", "stem"),
    [
        ("sd1", "unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0",
         "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"),
        ("sd1", "unet", "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
         "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj"),
        ("sd1", "text_encoder", "text_model.encoder.layers.0.self_attn.q_proj",
         "lora_te_text_model_encoder_layers_0_self_attn_q_proj"),
        ("sd2", "text_encoder", "text_model.encoder.layers.22.mlp.fc1",
         "lora_te_text_model_encoder_layers_22_mlp_fc1"),
        ("sdxl", "unet", "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
         "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"),
        ("sdxl", "unet", "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.2",
         "lora_unet_input_blocks_8_1_transformer_blocks_9_ff_net_2"),
        ("sdxl", "unet", "mid_block.attentions.0.proj_in", "lora_unet_middle_block_1_proj_in"),
        ("sdxl", "unet", "mid_block.resnets.1.time_emb_proj",
         "lora_unet_middle_block_2_emb_layers_1"),
        ("sdxl", "unet", "up_blocks.0.upsamplers.0.conv", "lora_unet_output_blocks_2_2_conv"),
        ("sdxl", "unet", "up_blocks.2.resnets.2.conv_shortcut",
         "lora_unet_output_blocks_8_0_skip_connection"),
        ("sdxl", "unet", "add_embedding.linear_1", "lora_unet_label_emb_0_0"),
        ("sdxl", "unet", "down_blocks.0.downsamplers.0.conv", "lora_unet_input_blocks_3_0_op"),
        ("sdxl", "unet", "down_blocks.0.resnets.0.conv1",
         "lora_unet_input_blocks_1_0_in_layers_2"),
        ("sdxl", "unet", "time_embedding.linear_2", "lora_unet_time_embed_2"),
        ("sdxl", "unet", "conv_in", "lora_unet_input_blocks_0_0"),
        ("sdxl", "unet", "conv_out", "lora_unet_out_2"),
        ("sdxl", "text_encoder", "text_model.encoder.layers.11.self_attn.out_proj",
         "lora_te1_text_model_encoder_layers_11_self_attn_out_proj"),
        ("sdxl", "text_encoder_2", "text_model.encoder.layers.31.mlp.fc2",
         "lora_te2_text_model_encoder_layers_31_mlp_fc2"),
        ("sdxl", "text_encoder_2", "text_projection", "lora_te2_text_projection"),
    ],
)  # fmt: skip
def test_names_as_files_in_the_wild_have_them(
    family: str, component: str, name: str, stem: str
) -> None:
    """kohya's names spelled out, written and read."""
    naming = naming_of(family)
    assert naming.kohya(component, name) == stem
    assert from_kohya(stem, naming.layout) == (component, name)


@pytest.mark.parametrize("prefix", ["lora_te", "lora_te1"])
def test_either_prefix_of_the_first_text_encoder_is_read(prefix: str) -> None:
    """lora_te_ and lora_te1_ are the same encoder, with `text_model.` and without, and LyCORIS'
    own prefix is the UNet."""
    name = "text_model.encoder.layers.0.self_attn.k_proj"
    for stem in ("text_model_encoder_layers_0", "encoder_layers_0"):
        found = from_kohya(f"{prefix}_{stem}_self_attn_k_proj", Layout())
        assert found == ("text_encoder", name)
    assert from_kohya("lycoris_mid_block_resnets_0_conv1", Layout()) == (
        "unet",
        "mid_block.resnets.0.conv1",
    )
    assert from_kohya("lora_te3_text_model_encoder_layers_0_mlp_fc1", Layout()) is None


@pytest.mark.parametrize(
    ("family", "digest"),
    [
        ("sd1", "e42284eed01d957df3a005c4920c787c8fe20cd52807a4b4b065281c3df99634"),
        ("sdxl", "22623a7118884df9e226cc46a06f02f3fc874d6e592edb7c8da31aa62261972a"),
    ],
)
def test_the_names_of_published_unets_never_change(family: str, digest: str) -> None:
    """Golden: SHA-256 of the sorted kohya names of all 282 and 794 modules, one a line, which
    ComfyUI's and A1111's key maps were counted to know in full."""
    names = sorted(kohya_names(family)["unet"])
    assert hashlib.sha256("\n".join(names).encode()).hexdigest() == digest
