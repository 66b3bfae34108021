"""Options of `inject` by their names in peft, loralib, LyCORIS and sd-scripts, and as our flags."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from sd_lora.adapters.methods import INITS


def _called(name: str) -> Callable[[Any], str]:
    return lambda value: f"{name}={value!r}"


def _switch(text: str) -> Callable[[Any], str]:
    return lambda value: text if value else "the default: leave it out"


def _targets(value: Any) -> str:
    if isinstance(value, str) or not all(isinstance(name, str) for name in value):
        return "targets: presets such as attention+conv, and regular expressions over whole names"
    names = sorted(re.escape(name) for name in value)  # peft's lists name the ends
    return f'targets=[r"(.*\\.)?({"|".join(names)})"]'


def _init(value: Any) -> str:
    if value is True:
        return "the default: leave it out"
    if value in INITS:
        return f"init={value!r}"
    return f"init, one of {', '.join(INITS)}"


def _algorithm(value: Any) -> str:
    return _called("method")({"locon": "lora", "diag-oft": "oft"}.get(value, value))


_DORA = _switch('rule="decompose"')
_TUCKER = _switch("tucker=True")
_RSLORA = _switch("rslora=True")

ELSEWHERE: Mapping[str, Callable[[Any], str]] = {
    "r": _called("rank"),
    "dim": _called("rank"),
    "lora_rank": _called("rank"),
    "lora_dim": _called("rank"),
    "linear_dim": _called("rank"),
    "network_dim": _called("rank"),
    "lora_alpha": _called("alpha"),
    "linear_alpha": _called("alpha"),
    "network_alpha": _called("alpha"),
    "conv_dim": _called("conv_rank"),
    "target_modules": _targets,
    "preset": _called("targets"),
    "lora_dropout": _called("dropout"),
    "network_dropout": _called("neuron_dropout"),
    "init_lora_weights": _init,
    "bias": _called("train_bias"),
    "algo": _algorithm,
    "use_dora": _DORA,
    "dora_wd": _DORA,
    "weight_decompose": _DORA,
    "use_rslora": _RSLORA,
    "rs_lora": _RSLORA,
    "use_tucker": _TUCKER,
    "use_cp": _TUCKER,
    "use_effective_conv2d": _TUCKER,
    "decompose_factor": _called("factor"),
    "lokr_factor": _called("factor"),
    "lokr_full_matrix": _switch("full_matrix=True"),
    "lokr_decompose_both": _switch("decompose_both=True"),
    "oft_block_size": _called("block_size"),
    "oft_rescaled": _switch("rescaled=True"),
    "fan_in_fan_out": lambda _: "found by itself: leave it out",
}
"""Name elsewhere → its value there → the same in our words."""


def in_our_words(name: str, value: Any) -> str | None:
    """`use_dora=True is rule="decompose" here`; None for a name that no library uses."""
    say = ELSEWHERE.get(name)
    return None if say is None else f"{name}={value!r} is {say(value)} here"
