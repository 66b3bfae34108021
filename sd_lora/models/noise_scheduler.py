"""A base model's noise scheduler, from its configuration and the options that overrule it."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from diffusers import DDPMScheduler, EDMEulerScheduler

from sd_lora.errors import UsageError
from sd_lora.models.diffusers_folder import read_part
from sd_lora.models.families import Family

FLOW = "flow_prediction"
"""Prediction type of flow matching, by diffusers' name."""


def is_flow(config: Mapping[str, Any]) -> bool:
    """Whether a scheduler's configuration is one of flow matching."""
    by_class = str(config.get("_class_name")).startswith("FlowMatch")
    return by_class or config.get("prediction_type") == FLOW or bool(config.get("use_flow_sigmas"))


def usual_rescale(scheduler: DDPMScheduler | EDMEulerScheduler) -> float:
    """φ of rescaled guidance for a model by its scheduler: 0.7 with zero terminal SNR (Lin et al.
    2023, section 3.4), else 0."""
    ends_in_noise = scheduler.config.get("rescale_betas_zero_snr") and not is_flow(scheduler.config)
    return 0.7 if ends_in_noise else 0.0


def dynamic_shift(config: Mapping[str, Any], pixels: int) -> float:
    """The shift of the noise levels of an image of so many pixels, by a scheduler with
    `use_dynamic_shifting`: diffusers' `calculate_shift` and FlowMatchEulerDiscreteScheduler, with a
    position for 16 × 16 pixels, as SD3 and Flux count."""
    least, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    mu = float(low + (high - low) * (pixels / 256 - least) / (most - least))
    return mu if config.get("time_shift_type") == "linear" else math.exp(mu)


def build_scheduler(
    name: str,
    family: Family,
    config: Mapping[str, Any],
    prediction_type: str | None,
    zero_terminal_snr: bool | None,
    flow_shift: float | None,
    resolution: int,
) -> DDPMScheduler | EDMEulerScheduler:
    """The scheduler of a model's configuration.

    Args:
        name, family: of the model.
        config: of its scheduler, with "_class_name".
        prediction_type, zero_terminal_snr, flow_shift: in place of its own; None keeps these.
        resolution: side in pixels of the model's own images, for noise levels that depend on it.

    Raises:
        UsageError: a scheduler of another kind of model, or options that it excludes.
    """
    changes: dict[str, Any] = {"prediction_type": prediction_type} if prediction_type else {}
    if zero_terminal_snr is not None:
        changes["rescale_betas_zero_snr"] = zero_terminal_snr
    if changes.get("rescale_betas_zero_snr", config.get("rescale_betas_zero_snr")):
        changes["timestep_spacing"] = "trailing"  # sampling must start from the last step
    kind = str(config.get("_class_name"))
    edm = kind.startswith("EDM")
    flow = not edm and is_flow({**config, **changes})
    if not (edm or flow) and not {"beta_start", "trained_betas"} & config.keys():
        raise UsageError(
            f"the scheduler of {name} is a {kind}, which has no betas: a model made with "
            "it is not a Stable Diffusion, and cannot be trained here"
        )
    if flow and FLOW not in family.architectures:
        raise UsageError(
            f"{name} is a flow-matching model of {family.label}: only those of "
            "Stable Diffusion XL can be trained here"
        )
    if (edm or flow) and zero_terminal_snr:
        which = "an EDM" if edm else "a flow-matching"
        raise UsageError(
            f"{name} is {which} model, and its noise levels have no betas to rescale: "
            "leave out rescale_betas_zero_snr"
        )
    if flow:
        of_size = bool(config.get("use_dynamic_shifting")) and flow_shift is None
        own = dynamic_shift(config, resolution**2) if of_size else config.get("shift")
        shift = flow_shift or config.get("flow_shift") or own or 1.0
        changes["use_dynamic_shifting"] = of_size
        changes |= {"prediction_type": FLOW, "use_flow_sigmas": True, "flow_shift": shift}
    elif flow_shift is not None:
        raise UsageError(
            f"{name} is no flow-matching model by its scheduler, so flow_shift has no "
            f"effect: leave it out, or give the prediction type {FLOW} too"
        )
    cls = EDMEulerScheduler if edm else DDPMScheduler
    return read_part("scheduler", name, partial(cls.from_config, {**config, **changes}))
