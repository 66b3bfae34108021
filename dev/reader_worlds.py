"""Stable Diffusion at tiny width in three forms: as diffusers, ComfyUI and A1111 hold it.

The structure is the published one, block for block. The UNet is built by ComfyUI's own class and
converted by diffusers' own converter, which hands on the very tensors: so which parameter is which
follows from their memory, and owes nothing to this project's tables of names.
"""

import copy
import importlib.abc
import importlib.machinery
import logging
import sys
import types
from pathlib import Path
from typing import Any

import torch
import transformers  # noqa: F401  before the stubs
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sd_lora.models.published_configs import CONFIGS

WIDTH = 32
_L = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4, "projection_dim": 48}
_G = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "projection_dim": 64}
_FOUR = {"num_res_blocks": [2] * 4, "channel_mult": [1, 2, 4, 4]}
_XL = {"use_linear_in_transformer": True, "num_classes": "sequential"}
_HEADS = {"num_heads": -1, "num_head_channels": 16}
ORIGINAL: dict[str, dict[str, Any]] = {
    "sd1": _FOUR
    | {"transformer_depth": [1] * 6 + [0] * 2, "transformer_depth_output": [1] * 9 + [0] * 3}
    | {"transformer_depth_middle": 1, "num_heads": 8, "num_head_channels": -1, "context_dim": 48}
    | {"use_linear_in_transformer": False},
    "sd2": _FOUR
    | _HEADS
    | {"transformer_depth": [1] * 6 + [0] * 2, "transformer_depth_output": [1] * 9 + [0] * 3}
    | {"transformer_depth_middle": 1, "context_dim": 64, "use_linear_in_transformer": True},
    "sdxl": _XL
    | _HEADS
    | {"num_res_blocks": [2] * 3, "channel_mult": [1, 2, 4], "transformer_depth_middle": 10}
    | {"transformer_depth": [0, 0, 2, 2, 10, 10], "context_dim": 112}
    | {"transformer_depth_output": [0] * 3 + [2] * 3 + [10] * 3, "adm_in_channels": 64 + 6 * 8},
    "sdxl_refiner": _FOUR
    | _XL
    | _HEADS
    | {"transformer_depth": [0, 0, 4, 4, 4, 4, 0, 0], "transformer_depth_middle": 4}
    | {"transformer_depth_output": [0] * 3 + [4] * 6 + [0] * 3, "context_dim": 64}
    | {"adm_in_channels": 64 + 5 * 8},
}
"""Family → the original UNet's settings, at tiny width."""

ENCODERS = {
    "sd1": {"text_encoder": ("clip_l", _L, 12)},
    "sd2": {"text_encoder": ("clip_h", _G, 24)},
    "sdxl": {"text_encoder": ("clip_l", _L, 12), "text_encoder_2": ("clip_g", _G, 32)},
    "sdxl_refiner": {"text_encoder_2": ("clip_g", _G, 32)},
}
"""Family → component → ComfyUI's name, settings, layers."""


class _Stub(types.ModuleType):
    """A package that a program imports and its LoRA code does not use."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    names = (
        *("torchvision", "torchaudio", "av", "torchsde", "spandrel", "kornia", "sentencepiece"),
        *("comfy_kitchen", "comfy_aimdo", "gradio"),
    )

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.split(".")[0] in self.names:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        return _Stub(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def import_comfyui(folder: Path) -> None:
    """Import ComfyUI's LoRA code from a folder, on the CPU."""
    sys.meta_path.insert(0, _Finder())
    sys.path.insert(0, str(folder))
    given, sys.argv = sys.argv, ["compare", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.lora
    import comfy.lora_convert
    import comfy.utils

    sys.argv = given
    logging.disable(logging.CRITICAL)


def stub(name: str, **attributes: object) -> types.ModuleType:
    """Put a module of these attributes among the imported ones."""
    module = types.ModuleType(name)
    module.__dict__.update(attributes)
    module.__path__ = []
    sys.modules[name] = module
    parent, _, last = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], last, module)
    return module


class _Operations:
    """torch's own classes, as A1111 has them."""

    Linear, Conv2d, GroupNorm, LayerNorm = nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm
    Conv3d, Embedding = nn.Conv3d, nn.Embedding

    @classmethod
    def conv_nd(cls, dims: int, *args: Any, **options: Any) -> nn.Module:
        return {2: nn.Conv2d, 3: nn.Conv3d}[dims](*args, **options)


class _OpenCLIPBlock(nn.Module):
    """open_clip's residual block, as far as its names go."""

    def __init__(self, layer: Any, width: int, inner: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, 4)
        parts = {"c_fc": nn.Linear(width, inner), "c_proj": nn.Linear(inner, width)}
        self.mlp = nn.ModuleDict(parts)
        attention = layer.self_attn
        packed = [getattr(attention, f"{x}_proj").weight for x in "qkv"]
        self.attn.in_proj_weight.data = torch.cat(packed).detach().clone()
        self.attn.out_proj.weight.data = attention.out_proj.weight.detach().clone()
        for name, own in (("c_fc", layer.mlp.fc1), ("c_proj", layer.mlp.fc2)):
            self.mlp[name].weight.data = own.weight.detach().clone()


def _box(**parts: Any) -> Any:
    module = nn.Module()
    for name, part in parts.items():
        setattr(module, name, part)
    return module


class World:
    """One family. unet, encoders: diffusers' models. where: component → parameter's name there →
    its name in ComfyUI's model of the component. comfy_unet, comfy_text, a1111: theirs.
    """

    def __init__(self, family: str, channels: int = 4) -> None:
        torch.manual_seed(0)
        self.family = family
        self.settings = dict(ORIGINAL[family])
        self.where: dict[str, dict[str, str]] = {}
        net = self._make_unet(channels)
        self.comfy_unet = _box(diffusion_model=net)
        self.comfy_unet.model_config = types.SimpleNamespace(unet_config=dict(self.settings))
        self.encoders: dict[str, nn.Module] = {}
        self.comfy_text, self.prefixes, embedders = _box(), {}, []
        for component, (prefix, settings, layers) in ENCODERS[family].items():
            self.prefixes[component] = prefix
            encoder = self._make_encoder(component, prefix, settings, layers)
            embedders.append(self._as_a1111(encoder, prefix, settings, layers))
        self.a1111 = _box(model=_box(diffusion_model=net))
        self.a1111.is_sdxl = family.startswith("sdxl")
        if self.a1111.is_sdxl:
            self.a1111.conditioner = _box(embedders=nn.ModuleList(embedders))
        else:
            self.a1111.cond_stage_model = embedders[0]

    @property
    def models(self) -> dict[str, nn.Module]:
        return {"unet": self.unet, **self.encoders}

    def _make_unet(self, channels: int) -> nn.Module:
        from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

        s = self.settings
        options = {k: list(v) if isinstance(v, list) else v for k, v in s.items()}
        options |= {"image_size": 32, "in_channels": channels, "out_channels": 4}
        options |= {"model_channels": WIDTH, "use_spatial_transformer": True, "legacy": False}
        net: nn.Module = UNetModel(**options, operations=_Operations)
        for p in net.parameters():
            nn.init.normal_(p, std=0.2 if p.ndim > 1 else 0.05)
        config = dict(CONFIGS[self.family]["unet"], in_channels=channels, sample_size=8)
        widths = tuple(WIDTH * m for m in s["channel_mult"])
        config |= {"block_out_channels": widths, "cross_attention_dim": s["context_dim"]}
        if s["num_heads"] == -1:
            config["attention_head_dim"] = tuple(width // 16 for width in widths)
        if "adm_in_channels" in s:
            config["addition_time_embed_dim"] = 8
            config["projection_class_embeddings_input_dim"] = s["adm_in_channels"]
        self.unet = UNet2DConditionModel(**config)
        stem = "model.diffusion_model."
        tensors = {stem + key: tensor for key, tensor in net.state_dict().items()}
        converted = convert_ldm_unet_checkpoint(dict(tensors), self.unet.config)
        places = {tensor.data_ptr(): key[len(stem) :] for key, tensor in tensors.items()}
        self.where["unet"] = {key: places[t.data_ptr()] for key, t in converted.items()}
        self.unet.load_state_dict(converted)
        return net

    def _make_encoder(
        self, component: str, prefix: str, settings: dict[str, int], layers: int
    ) -> nn.Module:
        import comfy.clip_model
        import comfy.ops

        second = component == "text_encoder_2"
        cls = CLIPTextModelWithProjection if second else CLIPTextModel
        used = 23 if self.family == "sd2" else layers
        act = "quick_gelu" if prefix == "clip_l" else "gelu"
        config = CLIPTextConfig(**settings, vocab_size=99, num_hidden_layers=used, hidden_act=act)
        encoder = cls(config)
        for p in encoder.parameters():
            nn.init.normal_(p, std=0.2)
        names = ("hidden_size", "num_attention_heads", "intermediate_size")
        theirs = {name: settings[name] for name in names} | {"num_hidden_layers": layers}
        theirs |= {"hidden_act": act, "max_position_embeddings": 77, "eos_token_id": 2}
        operations = comfy.ops.disable_weight_init
        comfy_model = comfy.clip_model.CLIPTextModel(theirs, torch.float32, "cpu", operations)
        setattr(self.comfy_text, prefix, _box(transformer=comfy_model))
        state, where = comfy_model.state_dict(), {}
        for key, value in encoder.state_dict().items():
            full = key if key.startswith("text_") else f"text_model.{key}"
            if full in state and ("encoder" in full or "projection" in full):
                where[key], state[full] = full, value
        comfy_model.load_state_dict(state)
        self.encoders[component], self.where[component] = encoder, where
        return encoder

    def _as_a1111(
        self, encoder: Any, prefix: str, settings: dict[str, int], layers: int
    ) -> nn.Module:
        body = getattr(encoder, "text_model", encoder)
        if prefix == "clip_l":
            return _box(wrapped=_box(transformer=_box(text_model=copy.deepcopy(body))))
        width, inner = settings["hidden_size"], settings["intermediate_size"]
        own = list(body.encoder.layers)
        own += [own[-1]] * (layers - len(own))  # SD2 leaves the last layer out
        blocks = nn.ModuleList(_OpenCLIPBlock(layer, width, inner) for layer in own)
        return _box(wrapped=_box(model=_box(transformer=_box(resblocks=blocks))))

    def comfy_key(self, component: str, parameter: str) -> str | None:
        """ComfyUI's key of a parameter by diffusers' name; None if it has none."""
        own = self.where[component].get(parameter)
        if own is None:
            return None
        if component == "unet":
            return f"diffusion_model.{own}"
        return f"{self.prefixes[component]}.transformer.{own}"

    def comfy_state(self) -> dict[str, Tensor]:
        return {**self.comfy_unet.state_dict(), **self.comfy_text.state_dict()}
