"""LoRAs of lora_diffusion (cloneofsimo, 2022): tensors by position, without a module's name.

`lora.pt` is a list up, down, up, down, …; the safetensors file has keys `unet:0:up`. The modules
are those of the published base, in the order of the libraries of that time: the UNet's attention
in down blocks, up blocks, middle, with the first layer of each MLP between the two attentions; the
text encoder's k, v, q, out. ΔW = up·down.
"""

import re
from collections.abc import Iterator, Mapping

from sd_lora.errors import UsageError
from sd_lora.formats.canonical import canonical_name
from sd_lora.models.families import FAMILIES
from sd_lora.models.meta_pipeline import MetaPipeline

TITLE = "lora_diffusion"
"""The format's name."""

Shape = tuple[int, ...]
_KEY = re.compile(r"(?:(?P<component>unet|text_encoder):(?P<number>\d+):(?P<kind>up|down))\Z")
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_ORDERS = (("attn1", "ff", "attn2"), ("attn1", "attn2"), ("attn1", "attn2", "ff"))
"""Parts of a transformer block in a file's order: with the MLP, without, of newer diffusers."""


def places(title: str, shapes: Mapping[str, Shape]) -> dict[str, dict[str, dict[str, str]]] | None:
    """Component → module → kind of tensor → key; None for keys of another form.

    title: of the file, for messages.

    Raises:
        UsageError: tensors that do not fit any published base, one by one.
    """
    if shapes and all(key.isdecimal() for key in shapes):
        pairs = {"": [(str(n), str(n + 1)) for n in range(0, len(shapes) - 1, 2)]}
    elif shapes and all(map(_KEY.match, shapes)):
        pairs = {}
        for component in ("unet", "text_encoder"):
            count = sum(key.startswith(f"{component}:") for key in shapes) // 2
            if count:
                stems = [f"{component}:{number}:" for number in range(count)]
                pairs[component] = [(f"{stem}up", f"{stem}down") for stem in stems]
    else:
        return None
    if 2 * sum(map(len, pairs.values())) != len(shapes) or any(
        key not in shapes for found in pairs.values() for pair in found for key in pair
    ):
        raise UsageError(f"{title} is a LoRA by positions, and a position is missing")
    for family in FAMILIES.values():
        found = _in_base(MetaPipeline.of_family(family), pairs, shapes)
        if found is not None:
            return found
    raise UsageError(
        f"{title} is a LoRA by positions (of lora_diffusion), whose tensors do not fit the "
        "attention of a published base one by one"
    )


def _in_base(
    base: MetaPipeline, pairs: Mapping[str, list[tuple[str, str]]], shapes: Mapping[str, Shape]
) -> dict[str, dict[str, dict[str, str]]] | None:
    found = {}
    for given, keys in pairs.items():
        for component in [given] if given else ["unet", "text_encoder"]:
            names = _names(base, component, keys, shapes)
            if names is not None:
                kinds = ({"lora_B": up, "lora_A": down} for up, down in keys)
                found[component] = dict(zip(names, kinds, strict=True))
                break
        else:
            return None
    return found


def _names(
    base: MetaPipeline, component: str, keys: list[tuple[str, str]], shapes: Mapping[str, Shape]
) -> list[str] | None:
    """The modules of these pairs, if every pair has the shape of its module."""
    if component not in base.configs:
        return None
    known = base.shapes(component)
    orders: list[list[str]]
    if component == "unet":
        orders = [list(_of_unet(known, order)) for order in _ORDERS]
    else:
        layer = re.compile(r"(.*self_attn)\.k_proj\.weight")
        found = [m[1] for name in known if (m := layer.fullmatch(name))]
        orders = [[f"{stem}.{part}_proj" for stem in found for part in ("k", "v", "q", "out")]]
    for names in orders:
        if len(names) == len(keys) and all(
            (shapes[up][0], shapes[down][-1]) == known[f"{name}.weight"][:2]
            for name, (up, down) in zip(names, keys, strict=True)
        ):
            return [canonical_name(component, name) for name in names]
    return None


def _of_unet(known: Mapping[str, Shape], order: tuple[str, ...]) -> Iterator[str]:
    block = re.compile(r"((down|up|mid).*transformer_blocks\.\d+)\.attn1\.to_q\.weight")
    stems = [(m[2], m[1]) for name in known if (m := block.fullmatch(name))]
    for _, stem in sorted(stems, key=lambda pair: ("down", "up", "mid").index(pair[0])):
        for part in order:
            if part == "ff":
                yield f"{stem}.ff.net.0.proj"
            else:
                yield from (f"{stem}.{part}.{x}" for x in _ATTENTION)
