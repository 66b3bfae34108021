"""Tiny Stable Diffusion pipelines with random weights, built from the real classes."""

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    UNet2DConditionModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from sd_lora.models.diffusers_folder import tokenizer_of
from sd_lora.models.families import detect_family
from sd_lora.models.load import Parts
from sd_lora.models.meta_pipeline import build_pipeline as make_pipeline


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer over bytes alone: 256 symbols, the same at a word's end, start and end."""
    symbols = sorted(ByteLevel.alphabet())
    words = [*symbols, *(s + "</w>" for s in symbols), "<|startoftext|>", "<|endoftext|>"]
    vocab = {word: i for i, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def build_unet(family: str = "sd1", seed: int = 0, **changes: object) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    config: dict[str, object] = {
        "sample_size": 8,
        "block_out_channels": (16, 32, 32),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    }
    if family == "sdxl":
        config |= {
            "layers_per_block": 2,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 1, 2),
            "attention_head_dim": (2, 4, 4),
            "cross_attention_dim": 32 + 48,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 48 + 6 * 8,
        }
    if family == "sd2":
        config |= {"use_linear_projection": True, "attention_head_dim": (2, 4, 4)}
    return UNet2DConditionModel(**(config | changes))


def build_text_encoder(tokenizer: CLIPTokenizer, family: str = "sd1") -> CLIPTextModel:
    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_act="gelu" if family == "sd2" else "quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def build_second_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    torch.manual_seed(3)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=48,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config)


KINDS = {
    "sd1": ("sd1", {}, {}),
    "sd1-wide-heads": ("sd1", {"attention_head_dim": 2}, {}),  # of 8 channels and more
    "sd2": ("sd2", {}, {"prediction_type": "v_prediction"}),
    "sdxl": ("sdxl", {}, {}),
    "sdxl-v": (
        "sdxl",
        {},
        {
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
        },
    ),
    "refiner": (
        "sdxl",
        {"cross_attention_dim": 48, "projection_class_embeddings_input_dim": 48 + 5 * 8},
        {},
    ),
    "sd1-inpainting": ("sd1", {"in_channels": 9}, {}),
    "sdxl-inpainting": ("sdxl", {"in_channels": 9}, {}),
}
"""Kind of pipeline → family, changes to its UNet's configuration, and to its scheduler's."""


def build_pipeline(kind: str = "sd1") -> DiffusionPipeline:
    """A random pipeline of `KINDS`: v-prediction, zero terminal SNR, inpainting, the refiner."""
    family, of_unet, of_scheduler = KINDS[kind]
    tokenizer = build_tokenizer()
    torch.manual_seed(2)
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=8,
        sample_size=64,
    )
    scheduler = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
        **of_scheduler,
    )
    parts = {
        "vae": vae,
        "text_encoder": build_text_encoder(tokenizer, family),
        "tokenizer": tokenizer,
        "unet": build_unet(family, **of_unet),
        "scheduler": scheduler,
    }
    if family == "sdxl":
        parts["text_encoder_2"] = build_second_text_encoder(tokenizer)
        parts["tokenizer_2"] = build_tokenizer()
        parts["tokenizer_2"].pad_token = "!"  # as OpenCLIP's
    if kind == "refiner":
        parts = {name: parts[name] for name in parts if name not in ("text_encoder", "tokenizer")}
    return make_pipeline(detect_family(parts["unet"].config), parts["unet"].config, parts)


def pipeline_of(parts: Parts) -> DiffusionPipeline:
    """A diffusers pipeline over these very parts."""
    models = {"vae": parts.vae, "scheduler": parts.scheduler, **parts.models}
    tokenizers = {tokenizer_of(c): t for c, t in parts.tokenizers.items()}
    return make_pipeline(parts.family, parts.unet.config, models | tokenizers)
