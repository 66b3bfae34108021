"""sd-scripts' networks: `network_module`, and the parts of `network_args`.

Of networks.lora, networks.lora_fa, networks.oft, and LyCORIS (lycoris.kohya).
"""

import math
from typing import Any

from sd_lora.config.translate.blocks import BLOCKS, block_targets
from sd_lora.config.translate.rows import (
    Given,
    Row,
    Taken,
    absent,
    is_off,
    needless,
    number,
    otherwise,
    read_with,
    switch,
    taking,
)

METHODS = {"networks.lora": "lora", "networks.lora_fa": "lora_fa"}
"""Network module of sd-scripts → method."""

ALGORITHMS = {
    "lora": "lora", "locon": "lora", "loha": "loha", "lokr": "lokr", "diag-oft": "oft",
    "full": "full",
}  # fmt: skip
"""Algorithm of LyCORIS → method."""

PRESETS = {
    "full": "all",
    "unet-only": "all",
    "attn-mlp": "transformer",
    "unet-transformer-only": "transformer",
    "attn-only": "attention",
    "unet-convblock-only": "conv",
}
"""Preset of LyCORIS → targets."""


def is_lycoris(given: Given) -> bool:
    """Whether the network is one of LyCORIS."""
    return str(given.get("network_module")).startswith("lycoris")


def _network(value: Any, given: Given) -> Taken:
    """Method and target modules."""
    if is_lycoris(given):
        return _lycoris(given)
    module = str(value)
    if module == "networks.oft":
        return _oft(given)
    method, known = METHODS.get(module, "lora"), module in METHODS
    conv = "" if is_off(given.get("conv_dim")) else "+conv"
    values = {"method": method, "targets": f"transformer{conv}"}
    values["targets"] = block_targets(given, bool(conv)) or values["targets"]
    reason = f"is method {method} of the modules that it adapts"
    if not known:
        reason = "is not there: plain LoRA of the transformers is written instead"
    return Taken("otherwise" if known else "absent", values, reason)


def _oft(given: Given) -> Taken:
    """sd-scripts' OFT, whose switches count as on with any text, as bool("False") does there."""
    linear, conv = (str(given.get(f"enable_{kind}") or "") for kind in ("all_linear", "conv"))
    targets = ("transformer" if linear else "attention") + "+conv" * bool(conv)
    return Taken(
        "otherwise",
        {"method": "oft", "targets": targets},
        "is method oft of the modules that it adapts; in blocks of one size, and not network_dim "
        "of them, and without the bound that network_alpha is there",
    )


def oft_size(dim: Any) -> tuple[dict[str, Any], str]:
    """The size of blocks that a dim of LyCORIS' diag-oft is, and words on its rates."""
    size = number(dim or 0)
    if size < 2:
        return {}, ""
    further = 4 * math.sqrt(size - 1)
    return {"oft_block_size": int(size)}, f"; a rate turns outputs {further:.3g} times as far there"


def _lycoris(given: Given) -> Taken:
    algorithm = str(given.get("algo") or "lora").lower()
    preset = str(given.get("preset") or "full").lower()
    targets = PRESETS.get(preset, "transformer")
    if targets == "all" and not is_off(given.get("sdxl")):
        targets = "transformer+conv"  # their names of the ends never match on SDXL
    values = {"method": ALGORITHMS.get(algorithm, "lora"), "targets": targets}
    missing = [f"algo {algorithm}"] * (algorithm not in ALGORITHMS)
    missing += [f"preset {preset}"] * (preset not in PRESETS)
    if missing:
        found = f"method {values['method']} of targets {targets}"
        text = f"{' and '.join(missing)} is not there; {found} is written instead"
        return Taken("absent", values, f"has a part without counterpart: {text}")
    size, rate = oft_size(given.get("network_dim")) if algorithm == "diag-oft" else ({}, "")
    return Taken("otherwise", values | size, f"is algo {algorithm}, preset {preset}{rate}")


def _factor(value: Any, given: Given) -> Taken:
    if is_off(value) or str(value) == "-1":
        return Taken("needless", reason="is near the square root, as here without it")
    return Taken("same", {"lokr_factor": value})


def _args(value: Any, given: Given) -> Taken:
    return Taken("needless", reason="has no part")


_BLOCKS = "--targets, --rank_pattern, --alpha_pattern and --lr_pattern (sd-lora help train adapter)"
_RULES = (
    "is not there: ranks of convolutions by block are --rank_pattern (sd-lora help train adapter)"
)

NETWORK: dict[str, Row] = {
    "network_module": taking("--targets and --method", "", _network),
    "network_args": taking("--conv_rank, --conv_alpha and --method", "", _args),
    "algo": read_with("network_module", "--method"),
    "preset": read_with("network_module", "--targets"),
    "factor": taking("--lokr_factor", "", _factor),
    "full_matrix": switch("--lokr_full_matrix", "is lokr's", lokr_full_matrix=True),
    "decompose_both": switch("--lokr_decompose_both", "is lokr's", lokr_decompose_both=True),
    "use_tucker": switch("--use_tucker", "is the same", use_tucker=True),
    "use_cp": switch("--use_tucker", "is called so here", use_tucker=True),
    "use_conv_cp": switch("--use_tucker", "is called so here", use_tucker=True),
    "disable_conv_cp": needless("is the default here"),
    "dora_wd": switch("--use_dora", "is called so here", use_dora=True),
    "wd_on_output": absent("is always so here", idle=(True, "True", "true")),
    "rs_lora": switch("--use_rslora", "is called so here", use_rslora=True),
    "train_norm": switch(
        "--modules_to_save", "is norms trained whole", modules_to_save="norm+norm1+norm2+norm3"),
    "dropout": otherwise("neuron_dropout", "is dropped between A and B"),
    "use_scalar": absent("is not there: B starts at zero"),
    "rank_dropout_scale": absent("is not there: dropped ranks are rescaled"),
    "bypass_mode": needless("is a way of computing there"),
    "constraint": absent("is not there: a rotation has no bound"),
    "rescaled": switch("--oft_rescaled", "is called so here", oft_rescaled=True),
    "enable_all_linear": read_with("network_module", "--targets"),
    "enable_conv": read_with("network_module", "--targets"),
    "block_size": needless("belongs to dylora"),
    "unit": needless("belongs to dylora"),
    "train_on_input": needless("belongs to ia3"),
    "module_dropout": otherwise(
        "module_dropout", "is rescaled by 1 / (1 - p), so that the strength stays"),
    "dim_from_weights": absent(
        "is --init_lora without --rank, which takes the file's ranks", here="--init_lora"),
    "base_weights": absent("is sd-lora bake before the run", here="sd-lora bake"),
    "base_weights_multiplier": needless("belongs to base_weights"),
    "loraplus_unet_lr_ratio": otherwise("loraplus_lr_ratio", "is that of all components"),
    "loraplus_text_encoder_lr_ratio": absent("is not there: --loraplus_lr_ratio is for all"),
    **{name: taking(_BLOCKS, "", take) for name, take in BLOCKS.items()},
    "block_lr_zero_threshold": absent("is not there: leave blocks out by --targets"),
    "conv_block_dims": absent(_RULES),
    "conv_block_alphas": absent(_RULES),
}  # fmt: skip
"""Name → row."""
