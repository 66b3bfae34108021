"""Tiny pipelines whose sizes follow the rules of the published ones, as single checkpoints.

A single checkpoint has no configuration: norms have 32 groups, SD1 has 8 heads a level and the
others heads of width 64, as do the text encoders.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from sd_lora.models.original_names import Layout, open_clip_parameter, unet_to_original
from tests.tiny import build_tokenizer

POOLED = 64
"""Width of the second text encoder's projection, which the refiner's UNet attends to, too."""


CUT_DOWN: dict[str, dict[str, Any]] = {
    "small": {"mid_block_type": None},
    "ssd": {
        "layers_per_block": 2,
        "mid_block_type": "UNetMidBlock2D",
        "transformer_layers_per_block": (1, (1, 2)),
        "reverse_transformer_layers_per_block": ((2, 1, 1), 1),
    },
    "vega": {
        "layers_per_block": 2,
        "mid_block_type": "UNetMidBlock2D",
        "transformer_layers_per_block": (1, 2),
        "reverse_transformer_layers_per_block": ((2, 2, 2), 1),
    },
}
"""UNets without parts of the published ones: small-sd, BK-SDM and KOALA have no middle; SSD-1B and
Segmind-Vega have no attention in it, and depths of their own on either side."""


def build_single_unet(family: str, kind: str = "") -> UNet2DConditionModel:
    config: dict[str, Any] = {
        "sample_size": 64,
        "in_channels": 9 if kind == "inpainting" else 4,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 64,
        "attention_head_dim": 8,
    }
    linear = {
        "block_out_channels": (64, 128),
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "attention_head_dim": (1, 2),
        "use_linear_projection": True,
    }
    added = {
        "sample_size": 128,
        "block_out_channels": (32, 64),
        "attention_head_dim": (1, 1),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "cross_attention_dim": 128,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 16,
        "projection_class_embeddings_input_dim": POOLED + 6 * 16,
    }
    refiner = {
        "block_out_channels": (32, 64, 64),
        "attention_head_dim": (1, 1, 1),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 2),
        "cross_attention_dim": 64,
        "projection_class_embeddings_input_dim": POOLED + 5 * 16,
    }
    changes = {
        "sd1": {},
        "sd2": linear,
        "sdxl": linear | added,
        "refiner": linear | added | refiner,
    }
    return UNet2DConditionModel(**(config | changes[family] | CUT_DOWN.get(kind, {})))


def build_single_vae(family: str, **changes: object) -> AutoencoderKL:
    config: dict[str, Any] = {
        "block_out_channels": (32, 32, 64, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "sample_size": 512 if family in ("sd1", "sd2") else 1024,
        "scaling_factor": 0.18215 if family in ("sd1", "sd2") else 0.13025,
    }
    return AutoencoderKL(**(config | changes))


def text_config(tokenizer: CLIPTokenizer, **changes: object) -> CLIPTextConfig:
    config: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "projection_dim": 64,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    return CLIPTextConfig(**(config | changes))


def build_single_pipeline(family: str) -> DiffusionPipeline:
    """A random pipeline: "sd1", "sd2", "sdxl" or "refiner"; the first three also "-inpainting", and
    the kinds of `CUT_DOWN`."""
    family, _, kind = family.partition("-")
    tokenizer = build_tokenizer()
    torch.manual_seed(11)
    parts: dict[str, Any] = {
        "unet": build_single_unet(family, kind),
        "vae": build_single_vae(family),
        "tokenizer": tokenizer,
        "scheduler": DDPMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            steps_offset=1,
        ),
    }
    act = "gelu" if family == "sd2" else "quick_gelu"
    parts["text_encoder"] = CLIPTextModel(text_config(tokenizer, hidden_act=act))
    if family in ("sd1", "sd2"):
        cls = StableDiffusionInpaintPipeline if kind == "inpainting" else StableDiffusionPipeline
        none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        return _frozen(cls(**parts, **none))
    second = text_config(tokenizer, num_hidden_layers=3, projection_dim=POOLED, hidden_act="gelu")
    parts["text_encoder_2"] = CLIPTextModelWithProjection(second)
    parts["tokenizer_2"] = build_tokenizer()
    if family == "refiner":
        parts |= {"text_encoder": None, "tokenizer": None, "requires_aesthetics_score": True}
        return _frozen(StableDiffusionXLImg2ImgPipeline(**parts, add_watermarker=False))
    inpainting = kind == "inpainting"
    cls = StableDiffusionXLInpaintPipeline if inpainting else StableDiffusionXLPipeline
    return _frozen(cls(**parts, add_watermarker=False))


def _frozen(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """Evaluation mode; every parameter random: biases of zeros and norms of ones prove nothing."""
    for model in pipeline.components.values():
        if isinstance(model, nn.Module):
            model.requires_grad_(False).eval()
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter += 0.1 * torch.randn_like(parameter)
    return pipeline


def models_of_pipeline(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    """Part → model: "unet", "vae", "text_encoder", "text_encoder_2", those that there are."""
    names = ("unet", "vae", "text_encoder", "text_encoder_2")
    models = {name: getattr(pipeline, name, None) for name in names}
    return {name: model for name, model in models.items() if model is not None}


def original_tensors(models: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Part → model as one dictionary in original layout; works on the meta device, too."""
    sdxl = "text_encoder_2" in models
    stem = "conditioner.embedders" if sdxl else "cond_stage_model"
    tensors: dict[str, Tensor] = {}
    for part, model in models.items():
        if part == "unet":
            tensors |= dict(_of_unet(model))
        elif part == "vae":
            tensors |= dict(_of_vae(model))
        elif part == "text_encoder_2":
            place = 1 if "text_encoder" in models else 0
            tensors |= _of_open_clip(model, f"{stem}.{place}.model.")
        elif not sdxl and models["unet"].config.use_linear_projection:
            tensors |= _of_open_clip(model, f"{stem}.model.", more_layers=1)
        else:
            prefix = f"{stem}.{'0.' * sdxl}transformer."
            tensors |= {f"{prefix}{name}": tensor for name, tensor in _named(model)}
            positions = model.config.max_position_embeddings
            tensors[f"{prefix}text_model.embeddings.position_ids"] = torch.arange(positions)[None]
    return tensors


def write_single(
    pipeline: DiffusionPipeline,
    path: Path,
    dtype: torch.dtype | None = None,
    marks: Iterable[str] = (),
) -> Path:
    """Writes a pipeline as a single checkpoint in original layout; returns its path.

    Args:
        path: `.safetensors`, or `.ckpt` for a pickle with its tensors under "state_dict".
        dtype: of the floating-point tensors; None keeps them.
        marks: keys to add, such as "v_pred" and "ztsnr" (empty) or "edm_mean" and "edm_std".
    """
    tensors = original_tensors(models_of_pipeline(pipeline))
    for number, mark in enumerate(marks):
        values = torch.arange(4.0).reshape(1, 4, 1, 1) + number + 0.5
        tensors[mark] = values if mark.startswith("edm") else torch.zeros(0)
    return write_tensors(tensors, path, dtype)


def write_tensors(tensors: dict[str, Tensor], path: Path, dtype: torch.dtype | None = None) -> Path:
    """Writes tensors by key, as `write_single` does."""
    if dtype is not None:
        tensors = {k: t.to(dtype) if t.is_floating_point() else t for k, t in tensors.items()}
    tensors = {key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()}
    if path.suffix == ".safetensors":
        save_file(tensors, path, {"format": "pt"})
    else:
        torch.save({"state_dict": tensors, "global_step": 470000, "epoch": 3}, path)
    return path


def _named(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in model.state_dict().items():
        yield name if name.startswith("text_") else f"text_model.{name}", tensor


def _of_unet(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    layout = Layout.of(model.config)
    for name, tensor in model.state_dict().items():
        module, _, kind = name.rpartition(".")
        yield f"model.diffusion_model.{unet_to_original(module, layout)}.{kind}", tensor


def _of_vae(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The reverse of diffusers' `convert_ldm_vae_checkpoint`, by the parts of a name."""
    last = len(model.config.block_out_channels) - 1
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}
    for name, tensor in model.state_dict().items():
        words = name.replace("conv_shortcut", "nin_shortcut").split(".")
        match words:
            case [side, "down_blocks", block, "resnets", index, *rest]:
                words = [side, "down", block, "block", index, *rest]
            case [side, "up_blocks", block, "resnets", index, *rest]:
                words = [side, "up", str(last - int(block)), "block", index, *rest]
            case [side, "down_blocks", block, "downsamplers", "0", *rest]:
                words = [side, "down", block, "downsample", *rest]
            case [side, "up_blocks", block, "upsamplers", "0", *rest]:
                words = [side, "up", str(last - int(block)), "upsample", *rest]
            case [side, "mid_block", "resnets", index, *rest]:
                words = [side, "mid", f"block_{int(index) + 1}", *rest]
            case [side, "mid_block", "attentions", "0", layer, *_, kind]:
                words = [side, "mid", "attn_1", attention[layer], kind]
                if tensor.ndim == 2:
                    tensor = tensor[:, :, None, None]  # 1×1 convolutions, there
            case [side, "conv_norm_out", kind]:
                words = [side, "norm_out", kind]
        yield f"first_stage_model.{'.'.join(words)}", tensor


def _of_open_clip(model: nn.Module, prefix: str, more_layers: int = 0) -> dict[str, Tensor]:
    """OpenCLIP's tensors: q, k and v in one, the projection transposed, and what no one reads.

    Args:
        more_layers: of zeros, at the end, whose output SD2 does not use.
    """
    tensors: dict[str, Tensor] = {}
    thirds: dict[str, dict[int, Tensor]] = {}
    for name, tensor in _named(model):
        place = open_clip_parameter(name)
        assert place is not None
        key, third, transposed = place
        if third is None:
            tensors[key] = tensor.T if transposed else tensor
        else:
            thirds.setdefault(key, {})[third] = tensor
    tensors |= {key: torch.cat([found[i] for i in range(3)]) for key, found in thirds.items()}
    layers = model.config.num_hidden_layers
    for number in range(layers, layers + more_layers):
        stem = f"transformer.resblocks.{layers - 1}."
        unused = {k: torch.zeros_like(t) for k, t in tensors.items() if k.startswith(stem)}
        tensors |= {
            k.replace(stem, f"transformer.resblocks.{number}."): t for k, t in unused.items()
        }
    if more_layers:
        tensors["text_projection"] = torch.zeros(model.config.hidden_size, 48)
    tensors["logit_scale"] = torch.ones(())
    return {f"{prefix}{key}": tensor for key, tensor in tensors.items()}
