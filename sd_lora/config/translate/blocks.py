"""sd-scripts' lists of ranks, alphas and rates by block → patterns over the UNet's modules.

25 places for SD 1 and 2, 23 for SDXL; a place's modules are those of docs/flags.md.
"""

from collections import Counter
from typing import Any

from sd_lora.config.translate.rows import Given, Taken, is_off, number

BOTH = "(resnets|attentions)"


def places(sdxl: bool, conv: bool) -> dict[int, str]:
    """Place in the lists → pattern of its modules.

    sdxl: 23 places instead of 25. conv: with ResNets and samplers, else the transformers alone.
    """
    parts = BOTH if conv else "attentions"
    resnets: tuple[int, ...]
    ups = {
        13 + 3 * i + j: f"up_blocks.{i}." + (
            "(resnets.2|attentions.2|upsamplers)" if conv and j == 2 else f"{parts}.{j}"
        )
        for i in range(3 if sdxl else 4) for j in range(3)
    }  # fmt: skip
    if not sdxl:
        downs = {1 + 3 * i + j: f"down_blocks.{i}.{parts}.{j}" for i in range(4) for j in range(2)}
        downs |= {3 + 3 * i: f"down_blocks.{i}.downsamplers" for i in range(3) if conv}
        found = downs | {12: "mid_block"} | ups
        resnets = (10, 11, 13, 14, 15)  # blocks of ResNets alone
    else:
        found = {2 + 3 * i + j: f"down_blocks.{i}.{parts}.{j}" for i in range(3) for j in range(2)}
        found |= {4 + 3 * i: f"down_blocks.{i}.downsamplers" for i in range(2) if conv}
        found |= {10: "mid_block.resnets.0", 11: "mid_block.attentions.0"}
        found |= {12: "mid_block.resnets.1"} | ups
        resnets = (2, 3, 10, 12, 19, 20, 21)
    return {p: f"{name}.*" for p, name in sorted(found.items()) if conv or p not in resnets}


def _numbers(value: Any, count: int) -> list[float]:
    parts = value if isinstance(value, list) else str(value).split(",")
    found = [number(part) for part in parts]
    if len(found) != count:
        raise ValueError(f"has {len(found)} values, and {count} are needed")
    return found


def _ranks(given: Given, name: str) -> dict[str, float]:
    """Pattern → value of a list of ranks or alphas."""
    sdxl = not is_off(given.get("sdxl"))
    values = _numbers(given[name], 23 if sdxl else 25)
    found = places(sdxl, not is_off(given.get("conv_dim")))
    return {pattern: values[place] for place, pattern in found.items()}


def _rates(given: Given) -> dict[str, float]:
    """Pattern → factor of the three lists of rates."""
    sdxl = not is_off(given.get("sdxl"))
    sizes = {"down": (1, 9), "mid": (10, 3), "up": (13, 9)} if sdxl else {
        "down": (0, 12), "mid": (12, 1), "up": (13, 12)
    }  # fmt: skip
    by_place: dict[int, float] = {}
    for part, (start, count) in sizes.items():
        value = given.get(f"{part}_lr_weight")
        if value not in (None, "", []):
            by_place |= dict(enumerate(_numbers(value, count), start))
    found = places(sdxl, not is_off(given.get("conv_dim")))
    return {pattern: by_place[place] for place, pattern in found.items() if place in by_place}


def _kept(given: Given) -> list[str]:
    """Patterns of the places whose rank and rate are not 0."""
    ranks = _ranks(given, "block_dims") if not is_off(given.get("block_dims")) else {}
    rates = _rates(given)
    found = places(not is_off(given.get("sdxl")), not is_off(given.get("conv_dim")))
    return [p for p in found.values() if ranks.get(p, 1) and rates.get(p, 1)]


def block_targets(given: Given, conv: bool) -> str:
    """Targets without the blocks of rank or rate 0; empty if all blocks stay."""
    try:
        kept = _kept(given)
    except ValueError:  # the lists' own rows say it
        return ""
    if len(kept) == len(places(not is_off(given.get("sdxl")), conv)):
        return ""
    shown = [name.removesuffix(".*") for name in kept]
    shown = ["mid_block.attentions" if n == "mid_block" and not conv else n for n in shown]
    return f"({'|'.join(shown)}).*"


def _of_ranks(option: str, single: str, name: str, convert: type) -> Any:
    """The row's function for a list of ranks or alphas: the most common value, and the others."""

    def take(value: Any, given: Given) -> Taken:
        if value in (None, "", []):
            return Taken("needless", reason="is not given")
        values = _ranks(given, name)
        found = {pattern: values[pattern] for pattern in _kept(given)}
        if not found:
            raise ValueError("leaves out every block")
        common = Counter(found.values()).most_common(1)[0][0]
        others = {pattern: convert(v) for pattern, v in found.items() if v != common}
        taken: dict[str, Any] = {single: convert(common)} | ({option: others} if others else {})
        return Taken("otherwise", taken, "is patterns over modules here")

    return take


def _of_rates(value: Any, given: Given) -> Taken:
    if value in (None, "", []):
        return Taken("needless", reason="is not given")
    rates = _rates(given)
    found = {p: rates[p] for p in _kept(given) if rates.get(p, 1) != 1}
    values = {"lr_pattern": found} if found else {}
    return Taken("otherwise", values, "is patterns over modules here")


BLOCKS: dict[str, Any] = {
    "block_dims": _of_ranks("rank_pattern", "rank", "block_dims", int),
    "block_alphas": _of_ranks("alpha_pattern", "lora_alpha", "block_alphas", float),
    "down_lr_weight": _of_rates,
    "mid_lr_weight": _of_rates,
    "up_lr_weight": _of_rates,
}
"""Name of a list → the function of its row."""
