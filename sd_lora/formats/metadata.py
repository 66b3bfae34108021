"""What a file says about itself: the keys that A1111, ComfyUI and model sites read, and our own.

Readers of this project never trust any of it over the tensors.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version

from sd_lora.formats import diffusers, kohya
from sd_lora.formats.canonical import Adapter, file_rank

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
    conv = [d for d in ranked if any(k > 1 for k in d.shape[2:])]
    plain = kohya.can_write(adapter)
    dim, conv_dim = (_most_common([file_rank(d) or 0 for d in ds] or [0]) for ds in (ranked, conv))
    # what is in the file: kohya's has one alpha, diffusers' none, which means the rank
    if plain:
        alpha = conv_alpha = f"{kohya.common_alpha(adapter):g}"
    elif diffusers.can_write(adapter):
        alpha, conv_alpha = dim, conv_dim
    else:
        alpha, conv_alpha = (_most_common([d.alpha for d in ds] or [1]) for ds in (ranked, conv))
    network_args = {} if plain else {"algo": _most_common([d.method for d in ranked or deltas])}
    if conv:
        network_args |= {"conv_dim": conv_dim, "conv_alpha": conv_alpha}
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
        "ss_network_dim": dim,
        "ss_network_alpha": alpha,
        "ss_output_name": name,
        "sd_lora_version": version("sd_lora"),
    }
    if network_args:
        metadata["ss_network_args"] = json.dumps(network_args)
    if extra:
        metadata["sd_lora"] = json.dumps(extra, sort_keys=True)
    return metadata
