"""What a file says about itself: the keys that A1111, ComfyUI and model sites read, and our own.

Readers of this project never trust any of it over the tensors.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version

from sd_lora.formats import kohya
from sd_lora.formats.canonical import Adapter

_ARCHITECTURES = {
    ("sd1", "epsilon"): "stable-diffusion-v1",
    ("sd1", "v_prediction"): "stable-diffusion-v1",
    ("sd2", "epsilon"): "stable-diffusion-v2-512",
    ("sd2", "v_prediction"): "stable-diffusion-v2-768-v",
}
_BASE_VERSIONS = {"sd1": "sd_v1", "sd2": "sd_v2"}


def _most_common(values: Sequence[float | str]) -> str:
    value = Counter(values).most_common(1)[0][0]
    return value if isinstance(value, str) else f"{value:g}"


def build(
    adapter: Adapter,
    family: str,
    name: str,
    prediction_type: str = "epsilon",
    extra: Mapping[str, object] | None = None,
) -> dict[str, str]:
    """Returns a safetensors header's metadata: every value a string.

    Args:
        adapter: what is written.
        family: "sd1" or "sd2".
        name: of the output, shown by model sites.
        prediction_type: "epsilon" or "v_prediction".
        extra: our own record (configuration, data set, base model), kept as JSON.
    """
    deltas = [d for modules in adapter.values() for d in modules.values()]
    ranked = [d for d in deltas if d.rank is not None]
    conv_ranks = [d.rank or 0 for d in ranked if any(k > 1 for k in d.shape[2:])]
    plain = kohya.can_write(adapter)
    # what is in the file: kohya's has its scales folded
    file_alpha = kohya.common_alpha(adapter)
    alpha = f"{file_alpha:g}" if plain else _most_common([d.alpha for d in ranked] or [1])
    network_args = {} if plain else {"algo": _most_common([d.method for d in deltas])}
    if conv_ranks:
        network_args |= {"conv_dim": _most_common(conv_ranks), "conv_alpha": alpha}
    if any(d.magnitude is not None for d in deltas):
        network_args["dora_wd"] = "True"
    metadata = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{_ARCHITECTURES[family, prediction_type]}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": name,
        "modelspec.date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S"),
        "modelspec.prediction_type": "v" if prediction_type == "v_prediction" else "epsilon",
        "ss_base_model_version": _BASE_VERSIONS[family],
        "ss_v2": str(family == "sd2"),
        "ss_network_module": "networks.lora" if plain else "lycoris.kohya",
        "ss_network_dim": _most_common([d.rank or 0 for d in ranked] or [0]),
        "ss_network_alpha": alpha,
        "ss_output_name": name,
        "sd_lora_version": version("sd_lora"),
    }
    if network_args:
        metadata["ss_network_args"] = json.dumps(network_args)
    if extra:
        metadata["sd_lora"] = json.dumps(extra, sort_keys=True)
    return metadata
