"""Name of the original code for modules of UNets and text encoders.

Single-file checkpoints name a UNet's modules by position (`input_blocks.4.1`), and so do kohya's
SDXL LoRAs. OpenCLIP's text encoders (SD2's, and SDXL's second) have their three input projections
in one matrix. Tables of latent-diffusion, generative-models and open_clip; all names are dotted.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Layout:
    """Numbers of a UNet that determine the positions of its blocks.

    num_resnets: ResNets in a down block (`layers_per_block`); an up block has one more.
    up_attention: of each up block, whether attention is in the block.
    """

    num_resnets: int = 2
    up_attention: tuple[bool, ...] = (False, True, True, True)

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Layout":
        """Return the layout of a UNet's configuration."""
        per_block = config.get("layers_per_block", 2)
        num = per_block if isinstance(per_block, int) else per_block[0]
        default = ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3)
        kinds = config.get("up_block_types") or default
        return cls(num, tuple("CrossAttn" in kind for kind in kinds))


_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET_FROM_ORIGINAL = {original: name for name, original in _RESNET.items()}
_ENDS_FROM_ORIGINAL = {original: name for name, original in _ENDS.items()}

_DIFFUSERS_NAME = re.compile(
    r"(?:(?P<side>down|up)_blocks\.(?P<block>\d+)|mid_block)\."
    r"(?P<kind>resnets|attentions|downsamplers|upsamplers)\.(?P<index>\d+)(?:\.(?P<rest>.+))?"
)
_ORIGINAL_NAME = re.compile(
    r"(?:(?P<side>input|output)_blocks\.(?P<place>\d+)|middle_block)\.(?P<slot>\d+)"
    r"(?:\.(?P<rest>.+))?"
)


def unet_to_original(name: str, layout: Layout) -> str | None:
    """Return the original name of a UNet's diffusers module; None if it has none."""
    if name in _ENDS:
        return _ENDS[name]
    match = _DIFFUSERS_NAME.fullmatch(name)
    if match is None:
        return None
    kind, index, rest = match["kind"], int(match["index"]), match["rest"] or ""
    side, block, num = match["side"], int(match["block"] or 0), layout.num_resnets
    if kind == "resnets":
        rest = _RESNET.get(rest, "")
        if not rest:
            return None
    if side is None:
        if kind not in ("resnets", "attentions"):
            return None
        stem = f"middle_block.{2 * index + (kind == 'attentions')}"
    elif kind in ("downsamplers", "upsamplers"):
        if (kind == "downsamplers") != (side == "down") or index or rest != "conv":
            return None
        if side == "down":
            return f"input_blocks.{(block + 1) * (num + 1)}.0.op"
        attends = block < len(layout.up_attention) and layout.up_attention[block]
        return f"output_blocks.{block * (num + 1) + num}.{2 if attends else 1}.conv"
    else:
        slot = int(kind == "attentions")
        place = block * (num + 1) + index + (side == "down")
        stem = f"{'input' if side == 'down' else 'output'}_blocks.{place}.{slot}"
    return f"{stem}.{rest}" if rest else stem


def unet_from_original(name: str, layout: Layout) -> str | None:
    """Return diffusers' name of a UNet's original module; None if it has none."""
    if name in _ENDS_FROM_ORIGINAL:
        return _ENDS_FROM_ORIGINAL[name]
    match = _ORIGINAL_NAME.fullmatch(name)
    if match is None:
        return None
    side, slot, rest = match["side"], int(match["slot"]), match["rest"] or ""
    num = layout.num_resnets
    resnet = _RESNET_FROM_ORIGINAL.get(rest)
    if side is None:
        stem = "mid_block"
        kind, index = ("attentions", slot // 2) if slot % 2 else ("resnets", slot // 2)
    else:
        place = int(match["place"]) - (side == "input")
        if place < 0:
            return None
        block, index = divmod(place, num + 1)
        stem = f"{'down' if side == 'input' else 'up'}_blocks.{block}"
        if side == "input" and rest == "op" and slot == 0 and index == num:
            return f"{stem}.downsamplers.0.conv"
        if side == "output" and rest == "conv" and slot in (1, 2) and index == num:
            return f"{stem}.upsamplers.0.conv"
        if slot > 1 or (side == "input" and index == num):
            return None
        kind = "attentions" if slot else "resnets"
    if kind == "resnets":
        return f"{stem}.resnets.{index}.{resnet}" if resnet else None
    other = resnet or rest in ("", "op", "conv")
    return None if other else f"{stem}.attentions.{index}.{rest}"


_OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_OPEN_CLIP_ENDS = {
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
}
_LAYER = re.compile(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")


def open_clip_parameter(name: str) -> tuple[str, int | None, bool] | None:
    """Return the place of a transformers CLIP parameter (`text_model.….weight`) in OpenCLIP.

    Returns: key; third of the key's rows (0, 1, 2: q, k, v; None: all rows); whether transposed
    there. None if OpenCLIP has no counterpart.
    """
    if name == "text_projection.weight":
        return "text_projection", None, True
    if name in _OPEN_CLIP_ENDS:
        return _OPEN_CLIP_ENDS[name], None, False
    match = _LAYER.fullmatch(name)
    if match is None:
        return None
    stem, module, kind = f"transformer.resblocks.{match[1]}", match[2], match[3]
    if module in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
        return f"{stem}.attn.in_proj_{kind}", "qkv".index(module[10]), False
    if module not in _OPEN_CLIP:
        return None
    return f"{stem}.{_OPEN_CLIP[module]}.{kind}", None, False
