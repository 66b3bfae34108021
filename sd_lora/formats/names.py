"""kohya's module names: a prefix for the component, and underscores for dots.

An underscore may stand for a dot or for itself (`to_q`, `mid_block`); but few words of a Stable
Diffusion have one of their own, so a name can be read without a model. Names of any other model can
be read with the model only.
"""

import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from sd_lora.errors import UsageError
from sd_lora.formats.canonical import canonical_name
from sd_lora.models.families import FAMILIES, Family
from sd_lora.models.original_names import Layout, unet_from_original, unet_to_original
from sd_lora.models.published_configs import CONFIGS

ALONE = "lycoris"
"""LyCORIS' own prefix, for a model by itself; in Stable Diffusion's files it means the UNet."""

PREFIXES = {
    "lora_unet": "unet",
    "lora_te": "text_encoder",
    "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2",
    ALONE: "unet",
}
"""Start of a component's keys → the component."""

# longest first: `out_proj` must not be read as `out`, `proj`
_WORDS = sorted(
    "down_blocks mid_block up_blocks transformer_blocks input_blocks middle_block output_blocks "
    "to_q to_k to_v to_out to_q_proj add_k_proj add_v_proj proj_in proj_out conv_in conv_out "
    "conv_norm_out conv_shortcut time_emb_proj time_embedding time_embed time_proj linear_1 "
    "linear_2 cond_proj add_embedding add_time_proj class_embedding encoder_hid_proj label_emb "
    "group_norm norm_cross norm_q norm_k in_layers out_layers emb_layers skip_connection "
    "text_model self_attn q_proj k_proj v_proj out_proj in_proj layer_norm1 layer_norm2 "
    "final_layer_norm token_embedding position_embedding text_projection text_proj".split(),
    key=len,
    reverse=True,
)
_WORD = re.compile(rf"(?:{'|'.join(_WORDS)})(?=_|$)|[^_]+(?=_|$)")


@lru_cache(maxsize=8192)
def dotted(name: str) -> str | None:
    """A name with dots in place of the underscores that stand for them; None for `a__b`."""
    words, at = [], 0
    while at <= len(name):
        match = _WORD.match(name, at)
        if match is None:
            return None
        words.append(match[0])
        at = match.end() + 1
    return ".".join(words)


@dataclass(frozen=True)
class Naming:
    """kohya's names of one family, or, without one, LyCORIS' of a model by itself."""

    family: Family | None
    layout: Layout

    def kohya(self, component: str, name: str) -> str:
        """`lora_unet_down_blocks_0_…` for a canonical module name.

        Raises:
            UsageError: a module without a name in the family's files.
        """
        if component == "" or self.family is None:
            return f"{ALONE}_{name.replace('.', '_')}"
        prefixes = self.family.kohya_prefixes
        if component not in prefixes:
            raise UsageError(f"{self.family.label} has no {component}: {', '.join(prefixes)}")
        if component == "unet" and self.family.original_names:
            original = unet_to_original(name, self.layout)
            if original is None:
                raise UsageError(f"unet {name} has no name in {self.family.label}'s kohya files")
            name = original
        return f"{prefixes[component]}_{name.replace('.', '_')}"


def naming_of(family: str | Family | None, layout: Layout | None = None) -> Naming:
    """The naming of a family, by default in its published layout."""
    row = FAMILIES[family] if isinstance(family, str) else family
    if layout is None:
        layout = Layout.of(CONFIGS[row.name]["unet"]) if row else Layout()
    return Naming(row, layout)


def from_kohya(stem: str, layout: Layout) -> tuple[str, str] | None:
    """Component and canonical name of a Stable Diffusion module's kohya name; None for others.

    Both names of the UNet's modules are read, in one file too: diffusers' and the original ones.
    """
    prefix = next((p for p in sorted(PREFIXES, reverse=True) if stem.startswith(f"{p}_")), None)
    if prefix is None:
        return None
    name = dotted(stem[len(prefix) + 1 :].removeprefix("_orig_mod_"))  # torch.compile's level
    return canonical(PREFIXES[prefix], name, layout) if name else None


def canonical(component: str, name: str, layout: Layout) -> tuple[str, str] | None:
    """Component and canonical name for a dotted name, also an original one."""
    if component == "unet":
        try:
            found = unet_from_original(name, layout)
        except ValueError:  # Python reads no number of more than 4300 digits
            return None
        if found is None and name.startswith(("input_blocks", "middle_block", "output_blocks")):
            return None
        return component, found or name
    return component, canonical_name(component, name)


def of_live(
    component_names: Mapping[str, Iterable[str]], used: Container[str]
) -> dict[str, tuple[str, str]]:
    """LyCORIS' name → (component, canonical name), by a live model's own names.

    Raises:
        UsageError: one of the `used` names of a file that stands for two modules of the model.
    """
    naming = Naming(None, Layout())
    names: dict[str, tuple[str, str]] = {}
    for component, live in component_names.items():
        for name in live:
            key = naming.kohya("", name)
            if key in names and key in used:
                raise UsageError(f"{key} in the file is both {names[key][1]} and {name}")
            names[key] = (component, name)
    return names
