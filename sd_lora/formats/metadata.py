"""What a file says about itself: the keys that A1111, ComfyUI and model sites read, and our own.

Readers of this project never trust any of it over the tensors.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version

from sd_lora.formats.canonical import Adapter
from sd_lora.formats.kohya import common_alpha

_ARCHITECTURES = {
    ("sd1", "epsilon"): "stable-diffusion-v1",
    ("sd1", "v_prediction"): "stable-diffusion-v1",
    ("sd2", "epsilon"): "stable-diffusion-v2-512",
    ("sd2", "v_prediction"): "stable-diffusion-v2-768-v",
}
_BASE_VERSIONS = {"sd1": "sd_v1", "sd2": "sd_v2"}


def _most_common(values: Sequence[float]) -> str:
    return f"{Counter(values).most_common(1)[0][0]:g}"


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
    file_alpha = common_alpha(adapter)  # what is in the file: scales are folded
    factors = [f for modules in adapter.values() for f in modules.values()]
    conv = [f for f in factors if any(k > 1 for k in f.A.shape[2:])]
    network_args = {}
    if conv:
        conv_dim = _most_common([f.rank for f in conv])
        network_args = {"conv_dim": conv_dim, "conv_alpha": f"{file_alpha:g}"}
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
        "ss_network_module": "networks.lora",
        "ss_network_dim": _most_common([f.rank for f in factors]),
        "ss_network_alpha": f"{file_alpha:g}",
        "ss_output_name": name,
        "sd_lora_version": version("sd_lora"),
    }
    if network_args:
        metadata["ss_network_args"] = json.dumps(network_args)
    if extra:
        metadata["sd_lora"] = json.dumps(extra, sort_keys=True)
    return metadata
