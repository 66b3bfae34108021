"""Other programs and a LoRA file, by its keys: modules that they lose, refuse or rescale.

Facts of diffusers 0.42.1 with peft 0.21.2, and of the key maps of ComfyUI and A1111. For diffusers
`sd-lora verify` measures it; the two applications are not run.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator

from sd_lora.errors import counted
from sd_lora.formats import checkpoint_keys, diffusers
from sd_lora.formats.canonical import method_tensors
from sd_lora.formats.kohya import diffusers_reads
from sd_lora.formats.lora_file import LoRAFile, kinds_and_keys
from sd_lora.models.families import Family
from sd_lora.models.meta_pipeline import MetaPipeline

EXACT = "exact"

_ATTENTION = re.compile(r"\.attn\d\.to_(q|k|v|out\.0)$")
_ORIGINAL = re.compile(r"lora_unet_(input_blocks|middle_block|output_blocks)")
_OF_DIFFUSERS = re.compile(r"lora_unet_(down_blocks|mid_block|up_blocks)")


def readers(lora: LoRAFile, family: Family | None) -> dict[str, str]:
    """Program → "exact", or its losses, or its reason to refuse the file."""
    if lora.format == checkpoint_keys.TITLE:
        none = "reads no checkpoint of a run: `sd-lora export` writes its LoRA files"
        return dict.fromkeys(("diffusers", "ComfyUI", "A1111"), none)
    checks: dict[str, Callable[[LoRAFile, Family | None], Iterator[str]]] = {
        "diffusers": _diffusers_dotted if _is_dotted(lora) else _diffusers_kohya,
        "ComfyUI": _comfyui_dotted if _is_dotted(lora) else _comfyui_kohya,
        "A1111": _a1111_dotted if _is_dotted(lora) else _a1111_kohya,
    }
    return {program: "; ".join(check(lora, family)) or EXACT for program, check in checks.items()}


def _is_dotted(lora: LoRAFile) -> bool:
    return lora.format in ("diffusers", "peft")


def _kinds(lora: LoRAFile) -> Counter[str]:
    """How many deltas have each kind of tensor."""
    return Counter(kind for kind, _ in kinds_and_keys(lora.places))


def _beyond_lora(lora: LoRAFile) -> list[str]:
    kinds = _kinds(lora)
    labels = {"loha": "LoHa", "lokr": "LoKr"}
    found = {tensor: labels.get(method, method) for tensor, method in method_tensors().items()}
    found |= {"lora_mid": "Tucker cores", "diff": "full weights"}
    return list(dict.fromkeys(label for kind, label in found.items() if kind in kinds))


def _only_here(lora: LoRAFile) -> Iterator[str]:
    """The methods that no other program knows."""
    own = {t: m for t, m in method_tensors().items() if m not in ("loha", "lokr")}
    kinds = _kinds(lora)
    for method in dict.fromkeys(method for tensor, method in own.items() if tensor in kinds):
        yield f"does not know the method {method}"


def _keys(lora: LoRAFile) -> list[str]:
    return [key for _, key in kinds_and_keys(lora.places)]


def _decomposed(lora: LoRAFile) -> int:
    kinds = _kinds(lora)
    return kinds["magnitude"] + kinds[diffusers.FLAT]


def _diffusers_dotted(lora: LoRAFile, family: Family | None) -> Iterator[str]:
    kinds, keys = _kinds(lora), _keys(lora)
    if beyond := _beyond_lora(lora):
        yield f"refuses the file ({', '.join(beyond)})"
        return
    if kinds["alpha"]:
        yield "refuses the file (alphas beside peft's keys)"
        return
    if kinds["magnitude"]:
        yield f"drops {kinds['magnitude']} dora_scale"
    bare = [key for key in keys if not key.startswith(("unet.", "text_encoder"))]
    if bare or lora.format == "peft":
        yield f"loads nothing of {len(bare)} keys without `unet.` or `text_encoder.`"
        return
    if any(key.startswith(("unet.base_model.", "text_encoder.base_model.")) for key in keys):
        yield "loads nothing of keys with `base_model.model.`"
    new = [key for key in keys if key.startswith("unet.") and ".lora_A." in key]
    old = [key for key in keys if key.startswith("unet.") and ".down.weight" in key]
    if new and old:
        lost = min(len(new), len(old))
        yield f"may lose {counted(lost, 'module')}: keys of peft and of old diffusers are mixed"
    lost_m = [k for k in keys if k.startswith("text_enc") and k.endswith("lora_magnitude_vector")]
    if lost_m:
        yield f"resets {len(lost_m)} magnitudes of the text encoder (keys without `.weight`)"
    for component, kinds_of in lora.places.items():
        plain = sum(diffusers.FLAT not in kinds for kinds in kinds_of.values())
        if 0 < plain < len(kinds_of):
            yield f"leaves {plain} magnitudes of the {component} without a value: others have one"
    for component, modules in lora.adapter.items():
        new_names = any(key.startswith(f"{component}.") and ".lora_A." in key for key in keys)
        if component != "unet" and new_names and not diffusers.has_attention(modules):
            yield f"does not read so small a part of the {component}"

    yield from _projection_of_other_rank(lora)


def _projection_of_other_rank(lora: LoRAFile) -> Iterator[str]:
    for component, modules in lora.adapter.items():
        if diffusers.padded_ranks(component, modules):
            yield f"refuses text_projection at another rank than the {component}'s"


def _comfyui_dotted(lora: LoRAFile, family: Family | None) -> Iterator[str]:
    plain = [
        name
        for name, kinds in lora.places.get("unet", {}).items()
        if _ATTENTION.search(name) and ".processor." not in kinds.get("lora_A", ".processor.")
    ]
    if plain:
        total = len(lora.places["unet"])
        yield f"passes over {len(plain)} of {total} UNet modules: all of the attention"
    if nameless := _nameless(lora):
        yield f"passes over {nameless} text-encoder modules (no `text_model.`)"
    if rescaled := _scaled_by_header(lora):
        yield f"takes {rescaled} modules at another strength: it does not read the header's alphas"
    if _decomposed(lora):
        yield "has no weight-decomposed form of these keys"


def _scaled_by_header(lora: LoRAFile) -> int:
    if lora.format != "peft" and diffusers.HEADER_KEY not in lora.header:
        return 0
    return sum(d.scale != 1 for modules in lora.adapter.values() for d in modules.values())


def _a1111_dotted(lora: LoRAFile, family: Family | None) -> Iterator[str]:
    plain = not (_beyond_lora(lora) or _decomposed(lora))
    yield "reads none of these keys" + ": convert it with --to kohya" * plain


def _diffusers_kohya(lora: LoRAFile, family: Family | None) -> Iterator[str]:
    if beyond := _beyond_lora(lora):
        yield f"refuses the file ({', '.join(beyond)})"
        return
    if any(key.startswith("lycoris_") for key in _keys(lora)):
        yield "refuses the file (keys of LyCORIS)"
        return
    if diffusers.HEADER_KEY in lora.header and _kinds(lora)["alpha"]:
        yield f"refuses the file (alphas, and {diffusers.HEADER_KEY} in the header)"
        return
    if decomposed := _decomposed(lora):
        yield f"drops {decomposed} dora_scale, and loads plain LoRA"
    keys = _keys(lora)
    original = {k.partition(".")[0] for k in keys if _ORIGINAL.match(k)}
    named = {k.partition(".")[0] for k in keys if _OF_DIFFUSERS.match(k)}
    if original and named:
        yield f"deletes {len(original)} UNet modules without a word: two kinds of names are mixed"
    elif original and family is not None and not family.original_names:
        yield f"loses most of {len(original)} UNet modules: original names in {family.label}"
    lost = {k.partition(".")[0] for k in keys if "_add_embedding_linear" in k}
    if lost:
        yield f"loses {counted(len(lost), 'module')} (add_embedding)"
    layout = MetaPipeline.of_family(family).layout if family and family.original_names else None
    if not diffusers_reads(lora.adapter, layout) and diffusers_reads(lora.adapter):
        yield "loses the first upsampler in these names"
    if not diffusers_reads(lora.adapter):
        yield "does not read so small a part of a text encoder in these names"
    yield from _projection_of_other_rank(lora)
    if wrong := _off_by_alpha(lora):
        yield f"takes {wrong} modules at another strength: it knows one alpha a component there"


def _off_by_alpha(lora: LoRAFile) -> int:
    """Number of modules that get the component's most common alpha instead of their own: in the
    UNet's attention and the text encoders.
    """
    wrong = 0
    for component, modules in lora.places.items():
        alphas = {
            name: float(lora.file[kinds["alpha"]])
            for name, kinds in modules.items()
            if "alpha" in kinds
        }
        if not alphas:
            continue
        common = Counter(alphas.values()).most_common(1)[0][0]
        for name in modules:
            affected = component != "unet" or bool(_ATTENTION.search(name))
            mine = alphas.get(name, lora.adapter[component][name].rank)
            wrong += mine != common and (affected or name not in alphas)
    return wrong


def _comfyui_kohya(lora: LoRAFile, family: Family | None) -> Iterator[str]:
    yield from _only_here(lora)
    if decomposed := _decomposed(lora):
        yield f"normalises {decomposed} weight-decomposed deltas otherwise"
    if nameless := _nameless(lora):
        yield f"passes over {nameless} text-encoder modules (no `text_model`)"


def _a1111_kohya(lora: LoRAFile, family: Family | None) -> Iterator[str]:
    yield from _comfyui_kohya(lora, family)  # A1111 has these faults too, and more
    stems = {key.partition(".")[0] for key in _keys(lora)}
    if family is not None and family.original_names:
        lost = [s for s in stems if "_add_embedding_" in s or "up_blocks_0_upsamplers" in s]
        if lost:
            yield f"loses {counted(len(lost), 'module')}: diffusers' names in {family.label}"
    biases = {
        name
        for modules in lora.places.values()
        for name in modules
        if name.endswith(".bias") and "diff" not in modules.get(name.removesuffix(".bias"), {})
    }
    if biases:
        yield f"passes over {len(biases)} biases"


def _nameless(lora: LoRAFile) -> int:
    """Count the text-encoder modules whose names lack the level `text_model`."""
    return sum(
        not any("text_model" in key or "text_proj" in key for key in kinds.values())
        for component, modules in lora.places.items()
        if component.startswith("text_encoder")
        for kinds in modules.values()
    )
