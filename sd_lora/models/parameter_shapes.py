"""Names and shapes of the parameters of UNets and text encoders, by configuration alone.

Building a published SDXL takes diffusers' import and seconds more; a LoRA file is checked against
these tables at once. They hold for configurations as in `published_configs`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

Shape = tuple[int, ...]
Named = Iterator[tuple[str, Shape]]

_UNET_KEYS = {
    *("sample_size", "in_channels", "block_out_channels", "down_block_types", "up_block_types"),
    *("mid_block_type", "layers_per_block", "transformer_layers_per_block"),
    *("reverse_transformer_layers_per_block", "attention_head_dim", "cross_attention_dim"),
    *("use_linear_projection", "addition_embed_type", "addition_time_embed_dim"),
    "projection_class_embeddings_input_dim",
}
_TEXT_KEYS = {
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("projection_dim", "hidden_act", "vocab_size"),
}


def shapes_by_config(component: str, config: Mapping[str, Any]) -> dict[str, Shape] | None:
    """Parameter name → shape, as `named_parameters` of the component's class has them.

    None for a configuration with other keys, whose meaning is not known here.
    """
    if component.startswith("text_encoder"):
        if set(config) <= _TEXT_KEYS:
            return dict(_text_encoder(config, projects=component == "text_encoder_2"))
    elif component == "unet" and set(config) <= _UNET_KEYS:
        return dict(_unet(config))
    return None


def _layer(name: str, *shape: int, bias: bool = True) -> Named:
    yield f"{name}.weight", shape
    if bias:
        yield f"{name}.bias", shape[:1]


def _norms(stem: str, names: str, width: int) -> Named:
    for name in names.split():
        yield from _layer(f"{stem}{name}", width)


def _text_encoder(config: Mapping[str, Any], projects: bool) -> Named:
    """CLIP's text encoder; the level `text_model.` is in the class with a projection alone."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    stem = "text_model." if projects else ""
    embeddings = f"{stem}embeddings."
    yield f"{embeddings}token_embedding.weight", (config.get("vocab_size", 49408), width)
    yield f"{embeddings}position_embedding.weight", (77, width)
    for number in range(config["num_hidden_layers"]):
        layer = f"{stem}encoder.layers.{number}."
        for part in "kvq":
            yield from _layer(f"{layer}self_attn.{part}_proj", width, width)
        yield from _layer(f"{layer}self_attn.out_proj", width, width)
        yield from _layer(f"{layer}mlp.fc1", inner, width)
        yield from _layer(f"{layer}mlp.fc2", width, inner)
        yield from _norms(layer, "layer_norm1 layer_norm2", width)
    yield from _norms(stem, "final_layer_norm", width)
    if projects:
        yield from _layer("text_projection", config["projection_dim"], width, bias=False)


def _unet(config: Mapping[str, Any]) -> Named:
    """UNet2DConditionModel: ends, down blocks, middle, up blocks."""
    widths = config.get("block_out_channels", (320, 640, 1280, 1280))
    levels, time = len(widths), 4 * widths[0]
    cross, linear = config["cross_attention_dim"], config.get("use_linear_projection", False)
    resnets = config.get("layers_per_block", 2)
    depths = config.get("transformer_layers_per_block", 1)
    depths = [depths] * levels if isinstance(depths, int) else depths
    downs = config.get("down_block_types", ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",))
    ups = config.get("up_block_types", ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3)
    up_depths = config.get("reverse_transformer_layers_per_block") or depths[::-1]

    def block(stem: str, into: list[int], width: int, attends: bool, depth: Any) -> Named:
        for index, channels in enumerate(into):
            yield from _resnet(f"{stem}resnets.{index}.", channels, width, time)
            if attends:
                own = depth if isinstance(depth, int) else depth[index]
                name = f"{stem}attentions.{index}."
                yield from _transformer(name, width, own, cross, linear)

    yield from _layer("conv_in", widths[0], config.get("in_channels", 4), 3, 3)
    yield from _layer("time_embedding.linear_1", time, widths[0])
    yield from _layer("time_embedding.linear_2", time, time)
    if config.get("addition_embed_type") == "text_time":
        added = config["projection_class_embeddings_input_dim"]
        yield from _layer("add_embedding.linear_1", time, added)
        yield from _layer("add_embedding.linear_2", time, time)
    for level, width in enumerate(widths):
        stem, first = f"down_blocks.{level}.", widths[max(level - 1, 0)]
        into = [first] + [width] * (resnets - 1)
        yield from block(stem, into, width, "CrossAttn" in downs[level], depths[level])
        if level < levels - 1:
            yield from _layer(f"{stem}downsamplers.0.conv", width, width, 3, 3)
    middle = config.get("mid_block_type", "UNetMidBlock2DCrossAttn")
    if middle:
        attends, last = "CrossAttn" in middle, widths[-1]
        for index in range(2 if attends else 1):
            yield from _resnet(f"mid_block.resnets.{index}.", last, last, time)
        if attends:
            yield from _transformer("mid_block.attentions.0.", last, depths[-1], cross, linear)
    skips = [widths[0]]  # of the outputs that the up blocks take in, in their order
    for level, width in enumerate(widths):
        skips += [width] * (resnets + (level < levels - 1))
    below = widths[-1]
    for level, width in enumerate(reversed(widths)):
        stem = f"up_blocks.{level}."
        into = [skips.pop() + (below if index == 0 else width) for index in range(resnets + 1)]
        yield from block(stem, into, width, "CrossAttn" in ups[level], up_depths[level])
        if level < levels - 1:
            yield from _layer(f"{stem}upsamplers.0.conv", width, width, 3, 3)
        below = width
    yield from _layer("conv_norm_out", widths[0])
    yield from _layer("conv_out", 4, widths[0], 3, 3)


def _resnet(stem: str, into: int, width: int, time: int) -> Named:
    yield from _layer(f"{stem}norm1", into)
    yield from _layer(f"{stem}conv1", width, into, 3, 3)
    yield from _layer(f"{stem}time_emb_proj", width, time)
    yield from _layer(f"{stem}norm2", width)
    yield from _layer(f"{stem}conv2", width, width, 3, 3)
    if into != width:
        yield from _layer(f"{stem}conv_shortcut", width, into, 1, 1)


def _transformer(stem: str, width: int, depth: int, cross: int, linear: bool) -> Named:
    point = () if linear else (1, 1)
    yield from _layer(f"{stem}norm", width)
    yield from _layer(f"{stem}proj_in", width, width, *point)
    for index in range(depth):
        block = f"{stem}transformer_blocks.{index}."
        yield from _norms(block, "norm1 norm2 norm3", width)
        for attention, context in (("attn1.", width), ("attn2.", cross)):
            for part, columns in (("to_q", width), ("to_k", context), ("to_v", context)):
                yield from _layer(f"{block}{attention}{part}", width, columns, bias=False)
            yield from _layer(f"{block}{attention}to_out.0", width, width)
        yield from _layer(f"{block}ff.net.0.proj", 8 * width, width)
        yield from _layer(f"{block}ff.net.2", width, 4 * width)
    yield from _layer(f"{stem}proj_out", width, width, *point)
