"""Configuration of a UNet in the original layout, from the names and shapes of its tensors.

The published models, and those with fewer ResNets a level, other depths of attention, no attention
in the middle, or no middle (SSD-1B, Segmind-Vega, KOALA, BK-SDM, small-sd).
"""

from collections.abc import Iterable, Mapping
from typing import Any

from sd_lora.files import Shape

Depth = int | tuple[int, ...]
"""Transformer blocks of a level's attentions, one number if they are alike."""


def infer_unet(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Arguments of `UNet2DConditionModel` that its tensors tell; those at their defaults may lack.

    Args:
        shapes: key, without the checkpoint's prefix, → shape.

    Raises:
        LookupError: a tensor that tells the rest is missing.
        ValueError: blocks that no configuration has.
    """
    widths, down = _down_levels(shapes)
    num = max(len(depths) for depths in down)
    up = _up_levels(shapes, num)
    to_k = next((key for key in shapes if key.endswith(".attn2.to_k.weight")), _TEXT)
    proj_in = next((key for key in shapes if key.endswith(".proj_in.weight")), _PROJECTION)
    linear = len(shapes[proj_in]) == 2
    middle = _depth_of(shapes, "middle_block.1.")
    down_depths = [_common(depths) for depths in down]
    # diffusers takes the middle's depth from the last level, which may have no attention
    if down_depths[-1] is None:
        down_depths[-1] = middle
    elif middle not in (None, _first(down_depths[-1])):
        raise ValueError(
            f"the middle has {middle} blocks of attention, the level {down_depths[-1]}"
        )
    depths = tuple(depth or 1 for depth in down_depths)
    config: dict[str, Any] = {
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "block_out_channels": tuple(widths),
        "layers_per_block": num,
        "down_block_types": tuple(f"{_attends(d)}DownBlock2D" for d in down),
        "up_block_types": tuple(f"{_attends(d)}UpBlock2D" for d in up),
        "transformer_layers_per_block": depths,
        "cross_attention_dim": shapes[to_k][1],
        "use_linear_projection": linear,
        # the number of heads, in spite of diffusers' name: SD1 has 8 of any width, the others
        # have heads of width 64
        "attention_head_dim": tuple(max(w // 64, 1) for w in widths) if linear else 8,
    }
    if middle is None:
        has_middle = any(key.startswith("middle_block.") for key in shapes)
        config["mid_block_type"] = "UNetMidBlock2D" if has_middle else None
    found = [_common(d) or usual for d, usual in zip(up, reversed(depths), strict=True)]
    if found != [*reversed(depths)] or any(isinstance(depth, tuple) for depth in depths):
        config["reverse_transformer_layers_per_block"] = tuple(found)
    return config


_TEXT = "middle_block.1.transformer_blocks.0.attn2.to_k.weight"
_PROJECTION = "middle_block.1.proj_in.weight"


def _down_levels(shapes: Mapping[str, Shape]) -> tuple[list[int], list[list[int | None]]]:
    """Channels of each level, and the depth of attention behind each of its ResNets."""
    widths: list[int] = []
    levels: list[list[int | None]] = [[]]
    for place in range(1, count_children(shapes, "input_blocks.")):
        if f"input_blocks.{place}.0.op.weight" in shapes:
            levels.append([])
            continue
        width = shapes[f"input_blocks.{place}.0.in_layers.2.weight"][0]
        if not levels[-1]:
            widths.append(width)
        levels[-1].append(_depth_of(shapes, f"input_blocks.{place}.1."))
    if not widths:
        raise LookupError("'input_blocks.1.0.in_layers.2.weight' is missing")
    if {len(depths) for depths in levels} != {len(levels[0])}:
        raise ValueError(f"the levels have {', '.join(str(len(d)) for d in levels)} ResNets")
    return widths, levels


def _up_levels(shapes: Mapping[str, Shape], num: int) -> list[list[int | None]]:
    """The depth of attention behind each ResNet of each level; `num` of a level on the way down."""
    places = range(count_children(shapes, "output_blocks."))
    depths = [_depth_of(shapes, f"output_blocks.{place}.1.") for place in places]
    return [depths[i : i + num + 1] for i in range(0, len(depths), num + 1)]


def _depth_of(shapes: Mapping[str, Shape], stem: str) -> int | None:
    """Transformer blocks of an attention; None without it."""
    if f"{stem}norm.weight" not in shapes:
        return None
    return count_children(shapes, f"{stem}transformer_blocks.")


def _common(depths: list[int | None]) -> Depth | None:
    """The depth of a level; None without attention."""
    found = {*depths}
    if found == {None}:
        return None
    if None in found:
        raise ValueError("a level has attention behind some of its ResNets only")
    return depths[0] if len(found) == 1 else tuple(d for d in depths if d is not None)


def _first(depth: Depth | None) -> int | None:
    return depth[0] if isinstance(depth, tuple) else depth


def _attends(depths: list[int | None]) -> str:
    return "CrossAttn" * any(depth is not None for depth in depths)


def count_children(keys: Iterable[str], stem: str) -> int:
    """How many numbers follow a stem: 2 for "a.0.b" and "a.1.b" after "a."."""
    found = {key[len(stem) :].partition(".")[0] for key in keys if key.startswith(stem)}
    return sum(number.isdigit() for number in found)
