"""Configurations of the published models, where they differ from their classes' defaults.

With them a LoRA file can be checked against its family without a model at hand. They are copied
from the models' own config.json: Stable Diffusion 1.5, 2.1 (768 v), XL base 1.0 and its refiner.
"""

from typing import Any

_CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
_OPEN_CLIP_BIG_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}

CONFIGS: dict[str, dict[str, dict[str, Any]]] = {
    "sd1": {
        "unet": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        "text_encoder": _CLIP_L,
    },
    "sd2": {
        "unet": {
            "sample_size": 96,
            "cross_attention_dim": 1024,
            "attention_head_dim": (5, 10, 20, 20),
            "use_linear_projection": True,
        },
        "text_encoder": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 23,
            "num_attention_heads": 16,
            "projection_dim": 512,
            "hidden_act": "gelu",
        },
    },
    "sdxl": {
        "unet": {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        "text_encoder": _CLIP_L,
        "text_encoder_2": _OPEN_CLIP_BIG_G,
    },
    "sdxl_refiner": {
        "unet": {
            "sample_size": 128,
            "block_out_channels": (384, 768, 1536, 1536),
            "down_block_types": (
                "DownBlock2D",
                "CrossAttnDownBlock2D",
                "CrossAttnDownBlock2D",
                "DownBlock2D",
            ),
            "up_block_types": (
                "UpBlock2D",
                "CrossAttnUpBlock2D",
                "CrossAttnUpBlock2D",
                "UpBlock2D",
            ),
            "transformer_layers_per_block": 4,
            "attention_head_dim": (6, 12, 24, 24),
            "cross_attention_dim": 1280,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2560,
        },
        "text_encoder_2": _OPEN_CLIP_BIG_G,
    },
}
"""Family → component → arguments of its configuration."""
