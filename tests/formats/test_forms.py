"""Every spelling of a LoRA that programs write: the same ΔW, or refused by its name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.dylora import DyLoraModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.ia3 import IA3Module
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sd_lora
from sd_lora.formats import inspect, tools
from sd_lora.formats.checkpoints import Checkpoint
from sd_lora.formats.lora_file import open_lora
from sd_lora.formats.output import Output
from sd_lora.models.original_names import unet_to_original
from sd_lora.models.parameter_shapes import shapes_by_config
from sd_lora.models.published_configs import CONFIGS

Tensors = dict[str, Tensor]
TO_K = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
CONV = "up_blocks.2.resnets.1.conv1"
Q = "text_model.encoder.layers.3.self_attn.q_proj"
SHAPES = {TO_K: (640, 768), CONV: (640, 960, 3, 3), "conv_out": (4, 320, 3, 3), Q: (768, 768)}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def pair(name: str) -> tuple[Tensor, Tensor]:
    """Down and up of rank 2 of a module."""
    out, *into = SHAPES[name]
    return noise(2, *into), noise(out, 2, *(1 for _ in into[1:]), seed=1)


def delta(name: str, scale: float = 1.0) -> Tensor:
    """ΔW = s·BA in closed form."""
    down, up = pair(name)
    return scale * (up.flatten(1) @ down.flatten(1)).reshape(SHAPES[name])


def original(name: str) -> str:
    from sd_lora.models.original_names import Layout

    found = unet_to_original(name, Layout())
    assert found is not None
    return found


def ab(stem: str, name: str, ends: str = "lora_A.weight lora_B.weight", **more: Tensor) -> Tensors:
    down, up = ends.split()
    A, B = pair(name)
    found = {f"{stem}.{down}": A, f"{stem}.{up}": B}
    return found | {f"{stem}.{kind}": tensor.clone() for kind, tensor in more.items()}


KOHYA = "lora_down.weight lora_up.weight"
ALPHA = {"alpha": torch.tensor(1.0)}  # s = 1/2
UNET = (TO_K, CONV, "conv_out")


def forms() -> dict[str, tuple[Tensors, float]]:
    """Spelling → tensors of all four modules, and the scale s."""
    comfy = "text_encoders.clip_l.transformer."
    found: dict[str, tuple[Tensors, float]] = {}

    def add(title: str, unet: Callable[[str], str], text: str, scale: float = 1.0, **how: Any):
        tensors: Tensors = {}
        for name in UNET:
            tensors |= ab(unet(name), name, **how)
        found[title] = (tensors | ab(text, Q, **how), scale)

    def flat(name: str) -> str:
        return name.replace(".", "_")

    add("OneTrainer COMFY", lambda n: f"diffusion_model.{original(n)}", comfy + Q, 0.5, **ALPHA)
    add("omi", lambda n: f"unet.{original(n)}", f"clip_l.{Q}", 0.5, ends=KOHYA, **ALPHA)
    add("OneTrainer INTERNAL", lambda n: f"lora_unet.{n}", f"lora_te.{Q}", 0.5, ends=KOHYA, **ALPHA)
    add("ComfyUI LoraSave", lambda n: f"diffusion_model.{original(n)}", comfy + Q, ends=KOHYA)
    add("compiled", lambda n: f"unet._orig_mod.{n}", f"text_encoder._orig_mod.{Q}")
    add(
        "compiled, kohya",
        lambda n: f"lora_unet__orig_mod_{flat(n)}",
        f"lora_te__orig_mod_{flat(Q)}",
        0.5,
        ends=KOHYA,
        **ALPHA,
    )
    add("unet. twice", lambda n: f"unet.unet.{n}", f"text_encoder.text_encoder.{Q}")
    name = "lora_A.my-style.v1.5.weight lora_B.my-style.v1.5.weight"
    add("an adapter's name with dots", lambda n: f"unet.{n}", f"text_encoder.{Q}", ends=name)
    return found


@pytest.mark.parametrize("form", forms())
def test_spellings_of_one_adapter(form: str, tmp_path: Path) -> None:
    """Two linear layers, two convolutions and a text encoder in each program's spelling: the four
    deltas by their canonical names, ΔW in closed form, with the alpha where there is one."""
    tensors, scale = forms()[form]
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    lora = open_lora(path)
    lora.check()
    assert {*lora.adapter["unet"]} == {*UNET}
    assert {*lora.adapter["text_encoder"]} == {Q}
    for component, modules in lora.adapter.items():
        for name, found in modules.items():
            with torch.no_grad():
                torch.testing.assert_close(found.weight(), delta(name, scale)), component
    assert inspect.inspect(path).family == "sd1"


def test_original_names_without_a_prefix(tmp_path: Path) -> None:
    """OneTrainer's ORIGINAL: the UNet's names alone, `out.2` among them."""
    tensors: Tensors = {}
    for name in UNET:
        tensors |= ab(original(name), name, **ALPHA)
    save_file(tensors, tmp_path / "a.safetensors")
    lora = open_lora(tmp_path / "a.safetensors")
    assert {*lora.adapter["unet"]} == {*UNET}
    assert set(lora.adapter) == {"unet"}


def test_biases_norms_and_whole_differences(tmp_path: Path) -> None:
    """ComfyUI's LoraSave at its defaults writes `diff_b` beside each factor pair and `diff` for
    norms; as "full_diff" everything. Each is the delta of its parameter."""
    stem = f"diffusion_model.{original(CONV)}"
    tensors = ab(stem, CONV, KOHYA) | {f"{stem}.diff_b": noise(640, seed=2)}
    tensors |= {
        "diffusion_model.out.0.diff": noise(320),
        "diffusion_model.out.0.diff_b": noise(320),
    }
    tensors |= {f"diffusion_model.{original(TO_K)}.diff": noise(640, 768, seed=3)}
    save_file(tensors, tmp_path / "a.safetensors")
    unet = open_lora(tmp_path / "a.safetensors").adapter["unet"]
    assert {*unet} == {CONV, f"{CONV}.bias", "conv_norm_out", "conv_norm_out.bias", TO_K}
    with torch.no_grad():
        torch.testing.assert_close(unet[CONV].weight(), delta(CONV))
        torch.testing.assert_close(unet[f"{CONV}.bias"].weight(), noise(640, seed=2))
        torch.testing.assert_close(unet[TO_K].weight(), noise(640, 768, seed=3))


def test_embeddings_in_a_bundle_are_left_out_and_told(tmp_path: Path) -> None:
    """OneTrainer's bundled embeddings: the LoRA is read, their words are named in every tool."""
    tensors = ab(f"lora_unet_{TO_K.replace('.', '_')}", TO_K, KOHYA)
    tensors |= {
        "bundle_emb.<cat>.clip_l": noise(2, 768),
        "bundle_emb.<cat>.clip_l_out": noise(2, 8),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    assert "<cat>" in inspect.inspect(tmp_path / "a.safetensors").notes[0]
    done = tools.convert(
        tmp_path / "a.safetensors", Output(tmp_path / "b.safetensors", "kohya", check=False)
    )
    assert "<cat>" in done.notes[0]
    assert not any(key.startswith("bundle") for key in load_file(tmp_path / "b.safetensors"))
    save_file({"bundle_emb.<cat>.clip_l": noise(2, 768)}, tmp_path / "c.safetensors")
    with pytest.raises(sd_lora.UsageError, match="bundled embeddings and no LoRA"):
        open_lora(tmp_path / "c.safetensors")


def test_numbers_beside_tensors(tmp_path: Path) -> None:
    """A .pt with alpha as a number, and the step of its training, is read as with tensors."""
    stem = f"lora_unet_{TO_K.replace('.', '_')}"
    torch.save(ab(stem, TO_K, KOHYA) | {f"{stem}.alpha": 1.0, "step": 3}, tmp_path / "a.pt")
    lora = open_lora(tmp_path / "a.pt")
    with torch.no_grad():
        torch.testing.assert_close(lora.adapter["unet"][TO_K].weight(), delta(TO_K, 0.5))
    assert lora.header == {"step": "3"}


def test_sparse_remainders(tmp_path: Path) -> None:
    """LyCORIS' LoCon with sparse biases: ΔW = BA + S, S of the given places; places outside ΔW are
    an error."""
    stem = f"lora_unet_{CONV.replace('.', '_')}"
    places = torch.tensor([[0, 639], [5, 8639]], dtype=torch.int16)
    tensors = ab(stem, CONV, KOHYA, alpha=torch.tensor(2.0)) | {
        f"{stem}.bias_indices": places,
        f"{stem}.bias_values": torch.tensor([2.0, -3.0]),
        f"{stem}.bias_size": torch.tensor([640, 8640], dtype=torch.int16),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    want = delta(CONV).flatten(1)
    want[0, 5] += 2
    want[639, 8639] -= 3
    lora = open_lora(tmp_path / "a.safetensors")
    with torch.no_grad():
        found = lora.adapter["unet"][CONV].weight()
    torch.testing.assert_close(found, want.reshape(SHAPES[CONV]))
    for wrong in (places + 1, -places, places[:1], places.float() * torch.nan):
        save_file(tensors | {f"{stem}.bias_indices": wrong}, tmp_path / "b.safetensors")
        with pytest.raises(sd_lora.UsageError, match="sparse remainder"):
            open_lora(tmp_path / "b.safetensors").check()


# --- by position ---


def positions(order: str) -> list[tuple[str, tuple[int, ...]]]:
    """The modules of SD1's attention in lora_diffusion's order, with shapes."""
    shapes = shapes_by_config("unet", CONFIGS["sd1"]["unet"])
    assert shapes is not None
    blocks = [(level, index) for level in range(3) for index in range(2)]
    stems = [f"down_blocks.{level}.attentions.{index}" for level, index in blocks]
    stems += [f"up_blocks.{level}.attentions.{i}" for level in (1, 2, 3) for i in range(3)]
    parts = {"attn1": "to_q to_k to_v to_out.0", "attn2": "to_q to_k to_v to_out.0"}
    names = [
        f"{stem}.transformer_blocks.0.{part}.{last}"
        for stem in [*stems, "mid_block.attentions.0"]
        for part in order.split()
        for last in parts.get(part, "net.0.proj").split()
    ]
    return [(name, shapes[f"{name}.weight"]) for name in names]


@pytest.mark.parametrize("order", ["attn1 ff attn2", "attn1 attn2"])
def test_lists_of_lora_diffusion(order: str, tmp_path: Path) -> None:
    """cloneofsimo's `lora.pt`: up and down of each module by position, down blocks before up blocks
    before the middle. Every module has the factors of its own position."""
    modules = positions(order)
    tensors = []
    for place, (_, (out, into)) in enumerate(modules):
        tensors += [torch.full((out, 1), float(place)), torch.ones(1, into)]
    torch.save(tensors, tmp_path / "lora.pt")
    lora = open_lora(tmp_path / "lora.pt")
    lora.check()
    assert {*lora.adapter["unet"]} == {name for name, _ in modules}
    for place, (name, _) in enumerate(modules):
        assert float(lora.adapter["unet"][name].lora_B[0, 0]) == place
    keys = {f"unet:{n // 2}:{'down' if n % 2 else 'up'}": t for n, t in enumerate(tensors)}
    save_file({k: t.contiguous() for k, t in keys.items()}, tmp_path / "a.safetensors")
    assert {*open_lora(tmp_path / "a.safetensors").adapter["unet"]} == {name for name, _ in modules}
    torch.save(tensors[:-2], tmp_path / "lora.pt")
    with pytest.raises(sd_lora.UsageError, match="do not fit the attention"):
        open_lora(tmp_path / "lora.pt")
    text = [noise(768, 1) if n % 2 == 0 else noise(1, 768) for n in range(2 * 48)]
    torch.save(text, tmp_path / "lora.text_encoder.pt")
    names = [*open_lora(tmp_path / "lora.text_encoder.pt").adapter["text_encoder"]]
    assert [name.rpartition(".")[2] for name in names[:4]] == [
        f"{part}_proj" for part in ("k", "v", "q", "out")
    ]


# --- methods that are functions of the base ---

OF_BASE: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "ia3": (IA3Module, {}),
    "ia3 on inputs": (IA3Module, {"train_on_input": True}),
    "glora": (GLoRAModule, {"lora_dim": 2, "alpha": 3}),
    "boft": (ButterflyOFTModule, {"lora_dim": 16, "rescaled": True}),
    "boft, bounded": (ButterflyOFTModule, {"lora_dim": 16, "constraint": 1e-4}),
}


@pytest.mark.parametrize("name", [TO_K, CONV])
@pytest.mark.parametrize("case", OF_BASE)
def test_methods_of_the_base_become_the_delta_that_they_are(
    case: str, name: str, tmp_path: Path
) -> None:
    """LyCORIS' own (IA)³, GLoRA and BOFT on a frozen layer: with the base as --model, convert
    writes LyCORIS' ΔW of it; without, the refusal names the method and this way out."""
    out, into, *kernel = SHAPES[name]
    layer: Any = nn.Conv2d(into, out, 3, padding=1) if kernel else nn.Linear(into, out)
    module, options = OF_BASE[case]
    theirs = module("m", layer, **options)
    for seed, parameter in enumerate(theirs.parameters()):
        parameter.data += noise(*parameter.shape, seed=seed)
    with torch.no_grad():
        want, _ = theirs.get_diff_weight()
    stem = f"lora_unet_{name.replace('.', '_')}"
    file, base = tmp_path / "a.safetensors", tmp_path / "base.safetensors"
    state = {f"{stem}.{k}": t.detach().contiguous() for k, t in theirs.state_dict().items()}
    save_file({k: t for k, t in state.items() if "org_" not in k}, file)
    key = f"model.diffusion_model.{original(name)}.weight"
    tell = {"model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"}
    weights = {key: layer.weight.detach(), **dict.fromkeys(tell, noise(320, 768))}
    save_file(weights, base)
    with pytest.raises(sd_lora.UsageError, match="depends on the base: `sd-lora convert"):
        open_lora(file)
    target = Output(tmp_path / "b.safetensors", "lycoris", dtype="float32", check=False)
    tools.convert(file, target, "sd1", base=Checkpoint(base))
    found = load_file(tmp_path / "b.safetensors")[f"{stem}.diff"]
    torch.testing.assert_close(found, want.reshape(found.shape).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "parts",
    [
        {"weight": (3,), "on_input": ()},
        {"a1.weight": (2, 3), "a2.weight": (3, 2), "b1.weight": (4, 4), "b2.weight": (1, 1)},
        {"oft_blocks": (2, 3, 5, 5)},
    ],
)
def test_methods_of_the_base_that_do_not_fit_it(
    parts: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    """Tensors whose sizes make no ΔW of the weight: an error with the module and shapes."""
    stem = f"lora_unet_{TO_K.replace('.', '_')}"
    file = {f"{stem}.{kind}": torch.ones(shape) for kind, shape in parts.items()}
    save_file(file, tmp_path / "a.safetensors")
    lora = open_lora(tmp_path / "a.safetensors", base=lambda *_: noise(640, 768))
    with pytest.raises(sd_lora.UsageError, match=r"to_k.*do not fit the base's weight"):
        lora.check()


def test_dylora_is_a_lora(tmp_path: Path) -> None:
    """LyCORIS' DyLoRA writes its blocks of ranks as one LoRA."""
    theirs: Any = DyLoraModule("m", nn.Linear(768, 640), lora_dim=4, alpha=4, block_size=2)
    stem = f"lora_unet_{TO_K.replace('.', '_')}"
    state = theirs.custom_state_dict()
    save_file({f"{stem}.{k}": t.detach() + noise(*t.shape) for k, t in state.items()},
              tmp_path / "a.safetensors")  # fmt: skip
    lora = open_lora(tmp_path / "a.safetensors")
    lora.check()
    assert lora.adapter["unet"][TO_K].rank == 4


# --- other models' ---

OTHERS = {
    "motion LoRA of AnimateDiff": "down_blocks.0.motion_modules.0.temporal_transformer.proj_in",
    "HunyuanDiT": "lora_unet_blocks_0_attn1_Wqkv",
    r"Wan": "diffusion_model.blocks.0.self_attn.k",
    "Flux": "lora_unet_double_blocks_0_img_attn_qkv",
    "Stable Diffusion 3": "lora_unet_joint_blocks_0_x_block_attn_qkv",
    "diffusion transformer": "transformer.transformer_blocks.0.attn.to_q",
}


@pytest.mark.parametrize("kind", OTHERS)
def test_loras_of_other_models_are_named(kind: str, tmp_path: Path) -> None:
    """A LoRA of another kind of model is refused by that kind."""
    stem = OTHERS[kind]
    down = f"{stem}.lora_down.weight" if "lora_unet" in stem else f"{stem}.lora_A.weight"
    up = down.replace("down", "up").replace("lora_A", "lora_B")
    if "motion" in stem:
        down, up = f"{stem}.lora.down.weight", f"{stem}.lora.up.weight"
    save_file({down: noise(2, 64), up: noise(64, 2)}, tmp_path / "a.safetensors")
    with pytest.raises(sd_lora.UsageError, match=kind):
        open_lora(tmp_path / "a.safetensors")


# --- peft folders, one a component ---


def test_a_folder_with_an_adapter_for_each_component(tmp_path: Path) -> None:
    """`PeftModel.save_pretrained` of UNet and text encoder, side by side: one LoRA, each part with
    its own alpha."""
    for part, name, alpha in (("unet", TO_K, 4), ("text_encoder", Q, 1)):
        folder = tmp_path / "lora" / part
        folder.mkdir(parents=True)
        A, B = pair(name)
        stem = f"base_model.model.{name}"
        tensors = {f"{stem}.lora_A.weight": A, f"{stem}.lora_B.weight": B}
        save_file(tensors, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": alpha}
        (folder / "adapter_config.json").write_text(json.dumps(config))
    lora = open_lora(tmp_path / "lora")
    lora.check()
    with torch.no_grad():
        torch.testing.assert_close(lora.adapter["unet"][TO_K].weight(), delta(TO_K, 2.0))
        torch.testing.assert_close(lora.adapter["text_encoder"][Q].weight(), delta(Q, 0.5))


# --- Lightning ---


def test_checkpoints_of_lightning(tmp_path: Path) -> None:
    """Objects of a training library beside the tensors are left out and named, whatever they would
    do; the tensors are read."""
    import sys
    import types

    module = types.ModuleType("pytorch_lightning")
    state: dict[str, Any] = {"__module__": "pytorch_lightning", "__qualname__": "Callback"}
    module.Callback = type("Callback", (dict,), state)  # type: ignore[attr-defined]
    sys.modules["pytorch_lightning"] = module
    stem = f"lora_unet_{TO_K.replace('.', '_')}"
    callback = module.Callback(best=1.0)
    try:
        found = {"state_dict": ab(stem, TO_K, KOHYA), "epoch": 3, "callbacks": [callback]}
        torch.save(found, tmp_path / "a.ckpt")
    finally:
        del sys.modules["pytorch_lightning"]
    lora = open_lora(tmp_path / "a.ckpt")
    with torch.no_grad():
        torch.testing.assert_close(lora.adapter["unet"][TO_K].weight(), delta(TO_K))
    assert [*lora.notes()] == ["objects of other classes were left out: pytorch_lightning.Callback"]
