"""Every format there and back, alone and in chains, and to and from diffusers, peft and LyCORIS."""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from hypothesis import assume, given
from hypothesis import strategies as st
from lycoris.modules import get_module, make_module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sd_lora
from sd_lora.adapters.deltas import METHODS as METHODS_BY_NAME
from sd_lora.adapters.deltas import Delta
from sd_lora.formats import adapter_files as files
from sd_lora.formats import diffusers, kohya, verify
from sd_lora.formats import lora_file as reading
from sd_lora.formats.canonical import Adapter, canonical_name, each, read_models
from sd_lora.formats.checkpoints import Checkpoint
from sd_lora.formats.names import Naming, naming_of
from sd_lora.formats.verify import shapes_of
from sd_lora.models.families import FAMILIES as FAMILIES_BY_NAME
from sd_lora.models.meta_pipeline import MetaPipeline
from sd_lora.models.original_names import Layout, unet_to_original
from tests.formats.test_hostile import examples
from tests.formats.test_traps import (
    adapt,
    changes,
    changes_of,
    metadata_of,
    models,
    read,
    saved,
    trained,
    written,
    wrong,
)
from tests.formats.trained import MIXED as UNET
from tests.tiny import build_pipeline

FAMILIES = ["sd1", "sd2", "sdxl"]
PLAIN = [files.DIFFUSERS, files.KOHYA, files.LYCORIS]

MIXED = {
    "unet": UNET | {"alpha_pattern": {"to_k": 0.3}},
    "text_encoder": {
        "targets": "text",
        "rank": 3,
        "alpha": 1.7,
        "rank_pattern": {"fc1": 2},
        "alpha_pattern": {"q_proj": 0.3},
    },
    "text_encoder_2": {"targets": "text+text_projection", "rank": 5, "alpha": 0.7},
}
"""Component → ranks and alphas that no two loaders would guess the same."""


KINDS = re.compile(
    r"conv_in|conv_out|(time|add)_embedding\.linear_1|down_blocks\.1\.(downsamplers.*conv"
    r"|attentions\.0\.(proj_in|transformer_blocks\.0\.(attn[12]\.to_(k|out\.0)|ff\.net\.(0\.proj|2)))"
    r"|resnets\.0\.(conv1|conv_shortcut|time_emb_proj))|up_blocks\.0\.upsamplers\.0\.conv"
    r"|mid_block\.(attentions\.0\.proj_out|resnets\.1\.conv2)"
    r"|(text_model\.)?encoder\.layers\.1\.(self_attn\.(q|out)_proj|mlp\.fc[12])|text_projection"
)
"""One module of each kind."""


@cache
def layout(family: str) -> Layout:
    return Layout.of(build_pipeline(family).unet.config)


def naming(family: str) -> Naming:
    return naming_of(family, layout(family))


@cache
def adapter(family: str, **options: Any) -> Adapter:
    """A random adapter of every component, as after training: of every module with mixed ranks and
    alphas, or, with options, of one of each kind."""
    generator, injected = torch.Generator().manual_seed(0), models(build_pipeline(family))
    for component, model in injected.items():
        own = MIXED[component]
        if options:
            own = {"targets": [KINDS.pattern]} | options
        if component != "unet":
            own = {k: v for k, v in own.items() if k != "tucker"}  # no layer of it has a kernel
        sd_lora.inject(model, **own)
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data.add_(0.1 * noise)
    return read_models(injected)


def through(path: Path, kind: files.Format, given: Adapter, family: str) -> reading.LoRAFile:
    """Writes a file and opens it again, by its keys alone."""
    files.write_file(path, kind, given, naming(family), {"format": "pt"})
    lora = reading.open_lora(path, layout(family))
    lora.check()
    return lora


def same(want: Adapter, have: Adapter, tolerance: float = 1e-6) -> bool:
    """Whether both hold the same modules with the same ΔW."""
    count, _, bad = verify.compare(want, have, tolerance)
    assert bad == []
    return count == sum(1 for _ in each(want)) == sum(1 for _ in each(have)) > 0


def identical(want: Adapter, have: Adapter) -> bool:
    """Whether every tensor and alpha is the same, to the last bit."""
    for component, name, delta in each(want):
        other = have[component][name]
        other.fit(delta.shape)
        tensors, others = delta.tensors(), other.tensors()
        assert (other.method, other.alpha) == (delta.method, _in_float32(delta)), name
        assert tensors.keys() == others.keys(), name
        assert all(torch.equal(tensors[key], others[key]) for key in tensors), name
    return [*each(want)] != [] and {c: {*m} for c, m in want.items()} == {
        c: {*m} for c, m in have.items()
    }


def _in_float32(delta: Delta) -> float:
    return float(torch.tensor(delta.alpha))


@pytest.mark.parametrize("kind", PLAIN, ids=lambda kind: kind.title)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_format_is_read_as_it_was_written(
    family: str, kind: files.Format, tmp_path: Path
) -> None:
    """Mixed ranks and alphas, convolutions and every text encoder: a file gives back every ΔW to
    1e-6, its ranks, and, where it keeps the alphas, every factor and alpha to the last bit."""
    given = adapter(family)
    lora = through(tmp_path / "x.safetensors", kind, given, family)
    assert lora.format == ("kohya" if kind is files.LYCORIS else kind.title)
    assert same(given, lora.adapter)
    ranks = {(c, n): d.rank for c, n, d in each(given)}
    assert {(c, n): d.rank for c, n, d in each(lora.adapter)} == ranks
    assert len({*ranks.values()}) >= 4
    assert kind is not files.LYCORIS or identical(given, lora.adapter)


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_a_chain_of_formats_ends_where_it_began(family: str, tmp_path: Path) -> None:
    """diffusers → kohya → LyCORIS → kohya → diffusers, each written from what was read of the one
    before: after five files the same modules with the same ΔW to 1e-6, and the first and the last
    file hold the same keys and shapes."""
    start = current = adapter(family)
    chain = [files.DIFFUSERS, files.KOHYA, files.LYCORIS, files.KOHYA, files.DIFFUSERS]
    for number, kind in enumerate(chain):
        current = through(tmp_path / f"{number}.safetensors", kind, current, family).adapter
        assert same(start, current)
    first, last = (load_file(tmp_path / f"{number}.safetensors") for number in (0, len(chain) - 1))
    assert {k: t.shape for k, t in first.items()} == {k: t.shape for k, t in last.items()}


METHODS: dict[str, dict[str, Any]] = {
    "dora": {"rule": "decompose", "rank": 3, "alpha": 2.0},
    "pissa": {"init": "pissa", "rank": 1, "alpha": 2.0},
    "rslora": {"rslora": True, "rank": 3, "alpha": 2.0},
    "tucker": {"tucker": True, "rank": 3, "alpha": 2.0},
    "tucker dora": {"tucker": True, "rank": 3, "alpha": 2.0, "rule": "decompose"},
    "lora and biases": {"train_bias": "lora_only", "rank": 3, "alpha": 2.0},
    "loha": {"method": "loha", "rank": 2, "alpha": 3.0},
    "loha tucker": {"method": "loha", "rank": 2, "alpha": 3.0, "tucker": True},
    "loha decomposed": {"method": "loha", "rank": 2, "alpha": 3.0, "rule": "decompose"},
    "lokr": {"method": "lokr", "rank": 1, "alpha": 3.0, "factor": 4},
    "lokr both": {"method": "lokr", "rank": 1, "alpha": 3.0, "factor": 4, "decompose_both": True},
    "lokr whole": {"method": "lokr", "rank": 1, "full_matrix": True},
    "lokr tucker": {"method": "lokr", "rank": 1, "alpha": 3.0, "factor": 2, "tucker": True},
    "oft": {"method": "oft", "rank": 1, "block_size": 4},
    "oft rescaled": {"method": "oft", "rank": 1, "rescaled": True},
    "full, biases and norms": {"method": "full", "train_bias": "all", "modules_to_save": ["norm."]},
}
CHANGED = ("pissa", "lokr tucker", "oft", "oft rescaled")
"""Methods whose tensors are others in LyCORIS' files."""


@pytest.mark.parametrize("case", METHODS)
def test_every_method_is_read_as_it_was_written(case: str, tmp_path: Path) -> None:
    """One module of each kind of SDXL's three components, by every method: each file that there is
    for it gives back the same ΔW to 1e-6, and LyCORIS' every tensor to the last bit (a PiSSA
    becomes a LoRA of rank 2r, a LoKr's core a part of its factor, and a divisor of OFT's)."""
    if case == "full, biases and norms":
        given = whole("sdxl")
    else:
        given = adapter("sdxl", **METHODS[case])
    kinds = files.formats_of(given)[0]
    assert kinds
    for kind in {*kinds, files.LYCORIS}:
        lora = through(tmp_path / "x.safetensors", kind, given, "sdxl")
        assert same(given, lora.adapter)
        whole_tensors = kind is files.LYCORIS and case not in CHANGED
        assert not whole_tensors or identical(given, lora.adapter)


@cache
def whole(family: str) -> Adapter:
    """Random deltas of full rank: layers, all biases, and the weights of norms."""
    generator, injected = torch.Generator().manual_seed(0), models(build_pipeline(family))
    for component, model in injected.items():
        norm = ["norm1", "conv_norm_out"] if component == "unet" else ["layer_norm1"]
        target = ["mid_block.*conv1"] if component == "unet" else [".*fc1"]
        sd_lora.inject(model, target, method="full", train_bias="all", modules_to_save=norm)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(std=0.1, generator=generator)
    given = read_models(injected)
    names = {f"{c} {n}" for c, n, _ in each(given)}
    assert {
        "unet conv_norm_out",
        "unet conv_norm_out.bias",
        "unet mid_block.resnets.0.conv1",
    } < names
    assert "text_encoder text_model.encoder.layers.0.layer_norm1.bias" in names
    return given


def test_full_updates_of_norms_have_their_own_keys(tmp_path: Path) -> None:
    """What A1111 and LyCORIS read of whole deltas: `w_norm` and `b_norm` of the norms, `diff` and
    `diff_b` of every other layer."""
    lora = through(tmp_path / "x.safetensors", files.LYCORIS, whole("sd1"), "sd1")
    kinds: dict[str, set[str]] = {}
    for key in lora.file:
        stem, _, kind = key.partition(".")
        kinds.setdefault(stem, set()).add(kind)
    of_norms = {stem: kind for stem, kind in kinds.items() if kind & {"w_norm", "b_norm"}}
    norms = {stem for stem in kinds if re.search(r"(_norm1|_conv_norm_out)$", stem)}
    assert of_norms == dict.fromkeys(norms, {"w_norm", "b_norm"})
    assert kinds["lora_unet_mid_block_resnets_0_conv1"] == {"diff", "diff_b"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", [files.DIFFUSERS, files.KOHYA], ids=lambda kind: kind.title)
def test_half_precision_files(kind: files.Format, dtype: torch.dtype, tmp_path: Path) -> None:
    """A file of half precision holds each factor of the float32 file rounded once, and reads as
    the same adapter within that dtype's tolerance."""
    given, path = adapter("sd1"), tmp_path / "half.safetensors"
    lora = through(tmp_path / "full.safetensors", kind, given, "sd1")
    full = load_file(lora.path)
    files.write_file(path, kind, given, naming("sd1"), {}, dtype)
    half = load_file(path)
    assert half.keys() == full.keys()
    assert all(torch.equal(half[key], full[key].to(dtype)) for key in full)
    lora = reading.open_lora(path, layout("sd1"))
    assert lora.dtype is dtype
    assert same(given, lora.adapter, verify.TOLERANCE[dtype])


def fresh(folder: Path) -> DiffusionPipeline:
    """A pipeline from disk, of any family."""
    only_sd = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    xl = "xl" in folder.name
    return DiffusionPipeline.from_pretrained(folder, **({} if xl else only_sd))


@pytest.mark.parametrize("case", ["mixed", "dora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_ours_load_exactly_in_diffusers(
    family: str, case: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """`load_lora_weights` on a pipeline from disk: every file that is written for diffusers, of all
    text encoders, changes every weight as ours does (measured by peft's merge), and without a
    warning."""
    folder = request.getfixturevalue(f"tiny_{family}")
    pipeline, weight = fresh(folder), Checkpoint(folder).weight
    given = adapter(family) if case == "mixed" else adapter(family, **METHODS["dora"])
    want = changes_of(given, pipeline)
    paths = files.write_adapter(given, tmp_path, family, "x", layout=layout(family), weight=weight)
    assert len(paths) == 2
    for path in paths if case == "mixed" else paths[:1]:
        pipeline.unload_lora_weights()
        with verify.captured_complaints() as complaints:
            pipeline.load_lora_weights(path)
        assert complaints == []
        assert wrong(want, changes(pipeline)) == set()


UNEVEN: dict[str, dict[str, Any]] = {
    "plain": {"rank_pattern": {"to_k": 2, "fc1": 3}},
    "metadata": {
        "lora_alpha": 3,
        "rank_pattern": {"to_k": 2, "fc1": 3},
        "alpha_pattern": {"conv1": 7, "fc2": 0.5},
    },
    "rslora metadata": {"lora_alpha": 3, "rank_pattern": {"conv2": 2}, "use_rslora": True},
    "dora": {"use_dora": True, "rank_pattern": {"to_k": 2}},
}


@pytest.mark.parametrize("case", UNEVEN)
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_files_of_peft_and_diffusers_are_read(family: str, case: str, tmp_path: Path) -> None:
    """What `save_lora_weights` wrote of peft's layers, with and without the configuration in the
    header, DoRA too, is what peft's own merge adds. (Without it alpha = rank is all that anybody
    can know, so the adapter is made so.)"""
    options = dict(UNEVEN[case])
    if "metadata" not in case:  # peft has no pattern "alpha = rank"
        options["alpha_pattern"] = options["rank_pattern"]
    pipeline = trained(family, **options)
    components = (*models(pipeline),)
    header = metadata_of(pipeline, *components) if "metadata" in case else {}
    path = saved(pipeline, tmp_path, **header)
    assert wrong(changes(pipeline), read(path, family)) == set()


def test_two_configurations_in_one_header(tmp_path: Path) -> None:
    """Each component obeys its own configuration, and their patterns do not mix."""
    pipeline = build_pipeline("sdxl")
    for number, component in enumerate(models(pipeline)):
        adapt(pipeline, (component,), lora_alpha=2 ** (number + 3), r=number + 1)
    path = saved(pipeline, tmp_path, **metadata_of(pipeline, *models(pipeline)))
    assert wrong(changes(pipeline), read(path, "sdxl")) == set()
    scales = {c: {d.scale for d in m.values()} for c, m in reading.open_lora(path).adapter.items()}
    assert scales == {"unet": {8.0}, "text_encoder": {8.0}, "text_encoder_2": {32 / 3}}


def processors(key: str) -> str:
    """diffusers' keys of 2023: attention processors, and `.lora_linear_layer` beside them."""
    key = re.sub(r"(attn[12])\.to_out\.0\.lora_", r"\1.processor.to_out_lora.", key)
    key = re.sub(r"(attn[12])\.(to_[qkv])\.lora_", r"\1.processor.\2_lora.", key)
    key = re.sub(r"self_attn\.(q|k|v|out)_proj\.lora_", r"self_attn.to_\1_lora.", key)
    key = re.sub(r"(mlp\.fc[12])\.lora_", r"\1.lora_linear_layer.", key)
    return (
        re.sub(r"\.lora_(?=[AB]\.)", ".lora.", key).replace(".A.", ".down.").replace(".B.", ".up.")
    )


def linear_layers(key: str) -> str:
    """diffusers' keys as `convert_state_dict_to_diffusers` makes them of all."""
    middle = ".lora." if key.startswith("unet.") else ".lora_linear_layer."
    return key.replace(".lora_A.", f"{middle}down.").replace(".lora_B.", f"{middle}up.")


def comfy(key: str) -> str:
    """ComfyUI's: the UNet by the original code's names."""
    match = re.fullmatch(r"unet\.(.+)(\.lora_[AB]\.weight)", key)
    if match is None:
        return key
    original = unet_to_original(match[1], layout("sdxl"))
    return f"diffusion_model.{original}{match[2]}"


OLD_KEYS: dict[str, Callable[[str], str]] = {
    "processors": processors,
    "linear layers": linear_layers,
    "adapter's name": lambda key: re.sub(r"(lora_[AB])", r"\1.default", key),
    "peft's prefix": lambda key: re.sub(r"^(\w+)\.", r"\1.base_model.model.", key),
    "ComfyUI": comfy,
    "ComfyUI in a checkpoint": lambda key: re.sub("^diff", "model.diff", comfy(key)),
    "flat text encoder": lambda key: key.replace("encoder.text_model.", "encoder."),
}


@pytest.mark.parametrize("case", OLD_KEYS)
def test_older_and_other_keys_are_read(case: str, tmp_path: Path) -> None:
    """The tensors of a diffusers file under the keys of other times and tools: the same adapter,
    to the last bit, of every module of SDXL."""
    given = adapter("sdxl")
    lora = through(tmp_path / "x.safetensors", files.DIFFUSERS, given, "sdxl")
    tensors = load_file(lora.path)
    renamed = {OLD_KEYS[case](key): tensor for key, tensor in tensors.items()}
    assert len(renamed) == len(tensors)
    assert len(renamed.keys() - tensors.keys()) >= 20
    save_file(renamed, tmp_path / "renamed.safetensors")
    other = reading.open_lora(tmp_path / "renamed.safetensors", layout("sdxl"))
    assert other.format == "diffusers"
    assert identical(lora.adapter, other.adapter)


Maker = Callable[[str, nn.Module], nn.Module]


def maker(cls: type, **options: Any) -> Maker:
    def make(name: str, layer: nn.Module) -> nn.Module:
        rank = 2 + len(name) % 3  # each module its own rank and alpha
        return cls(name, layer, 1.0, lora_dim=rank, alpha=1 + len(name) % 4, **options)

    return make


THEIRS: dict[str, Maker] = {
    "locon": maker(LoConModule),
    "tucker": maker(LoConModule, use_tucker=True),
    "dora by output": maker(LoConModule, weight_decompose=True),
    "dora by input": maker(LoConModule, weight_decompose=True, wd_on_out=False),
    "loha": maker(LohaModule),
    "loha tucker": maker(LohaModule, use_tucker=True),
    "loha decomposed": maker(LohaModule, weight_decompose=True),
    "lokr": maker(LokrModule, factor=2),
    "lokr whole": maker(LokrModule, full_matrix=True),
    "lokr both": maker(LokrModule, decompose_both=True, factor=4),
    "lokr tucker": maker(LokrModule, use_tucker=True, factor=4),
}


def layers(pipeline: DiffusionPipeline) -> dict[tuple[str, str], nn.Module]:
    """(component, canonical name) → layer, one of each kind."""
    return {
        (component, canonical_name(component, name)): module
        for component, model in models(pipeline).items()
        for name, module in model.named_modules()
        if KINDS.fullmatch(name)
    }


@torch.no_grad()
def differing(
    theirs: dict[str, nn.Module],
    ours: dict[str, Tensor],
    found: dict[tuple[str, str], nn.Module],
) -> set[str]:
    """The layers whose output LyCORIS' module changes in another way than our ΔW, in float64. Not
    by its merge: that of LoHa and LoKr (lycoris-lora 4.1.3) scales by α/r once more."""
    want, have = {}, {}
    generator = torch.Generator().manual_seed(1)
    assert theirs.keys() == ours.keys()
    for (component, name), layer in found.items():
        key, inputs = f"{component} {name}", layer.weight.shape[1]
        size = (2, inputs, *(5,) * (layer.weight.dim() - 2))
        x = torch.randn(size, generator=generator, dtype=torch.float64)
        y = layer.double()(x)
        want[key] = theirs[key].double()(x) - y
        weight = {"weight": layer.weight + ours[key]}
        have[key] = torch.func.functional_call(layer, weight, (x,)) - y
    return wrong(want, have)


@pytest.mark.parametrize("case", THEIRS)
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@torch.no_grad()
def test_files_of_lycoris_are_read(family: str, case: str, tmp_path: Path) -> None:
    """The tensors that LyCORIS saves of every kind of layer, under kohya's names, give the
    outputs of its own training forward, each with its rank and alpha. SDXL's are read under the
    original names and under diffusers', which LyCORIS gives."""
    pipeline = build_pipeline(family)
    found, file, want = layers(pipeline), {}, {}
    assert len(found) >= 16
    generator = torch.Generator().manual_seed(0)
    for (component, name), layer in found.items():
        stem = naming(family).kohya(component, name)
        module = THEIRS[case](stem, layer)
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        for key, tensor in module.custom_state_dict().items():
            file[f"{stem}.{key}"] = tensor.detach().clone().contiguous()
        want[f"{component} {name}"] = module
    save_file(file, tmp_path / "theirs.safetensors")
    assert differing(want, read(tmp_path / "theirs.safetensors", family), found) == set()
    if family == "sdxl":
        plain = Naming(naming_of("sd1").family, layout(family))
        renamed = {}
        for key, tensor in file.items():
            stem, _, kind = key.partition(".")
            (place,) = (p for p in found if naming(family).kohya(*p) == stem)
            unet = place[0] == "unet"
            renamed[f"{plain.kohya(*place) if unet else stem}.{kind}"] = tensor
        assert renamed.keys() != file.keys()
        save_file(renamed, tmp_path / "renamed.safetensors")
        assert differing(want, read(tmp_path / "renamed.safetensors", family), found) == set()


@pytest.mark.parametrize(
    "case",
    ["mixed", "dora", "pissa", "tucker", "loha", "loha tucker", "loha decomposed", "lokr",
     "lokr both", "lokr whole"],
)  # fmt: skip
@torch.no_grad()
def test_ours_load_exactly_in_lycoris(case: str, tmp_path: Path) -> None:
    """LyCORIS builds its modules from our SDXL file, and they change the output of a layer of
    every kind as our ΔW does. (Not of a LoKr with a core: LyCORIS 4.1.3 cannot build its own.)"""
    given = adapter("sdxl") if case == "mixed" else adapter("sdxl", **METHODS[case])
    file = load_file(through(tmp_path / "x.safetensors", files.LYCORIS, given, "sdxl").path)
    pipeline = build_pipeline("sdxl")
    ours, found, theirs = changes_of(given, pipeline), layers(pipeline), {}
    assert len(found) >= 20
    for (component, name), layer in found.items():
        stem = naming("sdxl").kohya(component, name)
        theirs[f"{component} {name}"] = make_module(*get_module(file, stem), stem, layer).eval()
    assert differing(theirs, {name: ours[name] for name in theirs}, found) == set()


@pytest.mark.parametrize("end", [".bin", ".pt"])
def test_pickled_files_are_read(end: str, tmp_path: Path) -> None:
    """The same tensors from a pickle, as `save_lora_weights(safe_serialization=False)` writes."""
    pipeline = trained(only=("unet",))
    safe = written(pipeline, tmp_path / "x.safetensors")
    path = tmp_path / f"x{end}"
    torch.save(load_file(safe), path)
    assert wrong(changes(pipeline), read(path)) == set()


# --- any adapter ---

NAMES = {
    family: {
        component: shapes_of(component, MetaPipeline.of_family(row)) for component in row.components
    }
    for family, row in FAMILIES_BY_NAME.items()
}
"""Family → component → delta name → the published shape, whose number of dimensions counts."""


@st.composite
def any_adapters(draw: st.DrawFn) -> tuple[str, Adapter]:
    """A family and one to eight deltas of its modules: any methods, ranks, alphas, sizes, kernels,
    with cores and magnitudes, biases and norms among them."""
    family = draw(st.sampled_from([*NAMES]))
    decomposed, mixed = draw(st.booleans()), draw(st.booleans())
    methods = ["lora", "loha", "lokr", "full"] if mixed else ["lora"]
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    adapter: dict[str, dict[str, Delta]] = {}
    for _ in range(draw(st.integers(1, 8))):
        component = draw(st.sampled_from([*NAMES[family]]))
        name = draw(st.sampled_from([*NAMES[family][component]]))
        dims = len(NAMES[family][component][name])
        kernel = (draw(st.sampled_from([1, 3])),) * 2 if dims == 4 else ()
        shape = (draw(st.integers(2, 12)), draw(st.integers(2, 12)), *kernel)
        method = "full" if dims == 1 and mixed else draw(st.sampled_from(methods))
        if dims == 1 and not mixed:
            continue
        options: dict[str, Any] = {}
        if method != "full" and max(kernel, default=1) > 1:
            options["tucker"] = mixed and draw(st.booleans())
        cls, rank = METHODS_BY_NAME[method], draw(st.integers(1, 5))
        tensors = cls.create(shape[: max(dims, 1)], rank, generator, **options)
        tensors = {k: t + torch.randn(t.shape, generator=generator) for k, t in tensors.items()}
        magnitude = None
        if decomposed and method == "lora" and dims > 1:
            magnitude = torch.rand(shape[0], *(1,) * (dims - 1), generator=generator) + 0.5
        alpha = draw(st.floats(0.1, 64)) if cls is not METHODS_BY_NAME["full"] else None
        delta = cls(shape[: max(dims, 1)], tensors, alpha, magnitude)
        adapter.setdefault(component, {})[name] = delta
    assume(adapter)
    return family, adapter


@given(case=any_adapters())
@examples(200)
def test_any_adapter_comes_back_from_every_format_that_holds_it(
    case: tuple[str, Adapter], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Of 200 random adapters, families and methods mixed, each file of each format that has a form
    for them is read as the same modules, ΔW and magnitudes to 1e-5."""
    family, adapter = case
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    kinds = [files.LYCORIS]
    kinds += [files.DIFFUSERS] if diffusers.can_write(adapter) else []
    kinds += [files.KOHYA] if kohya.can_write(adapter) else []
    for kind in kinds:
        tensors = dict(kind.write(adapter, naming_of(family)))
        copies = {key: tensor.detach().clone() for key, tensor in tensors.items()}
        # the refiner's text encoder has the kohya name of SD1's, and a header as ours tells it
        version = FAMILIES_BY_NAME[family].base_versions["epsilon"]
        save_file(copies, path, {"ss_base_model_version": version})
        lora = reading.open_lora(path, naming_of(family).layout)
        lora.check()
        assert same(adapter, lora.adapter, 1e-5), kind.title
