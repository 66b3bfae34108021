"""Loss weights by timestep, one row a weighting.

A new weighting is a function of a noise schedule and a row of `WEIGHTINGS`; `weighting` of
`config/options/objective.py` names the row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sd_lora.diffusion.schedule import NoiseSchedule


@dataclass(frozen=True)
class Weighting:
    """A row of `WEIGHTINGS`.

    weights: function of a schedule and the weighting's parameters → weights (T,), float32.
    label: its words in the run's summary, with the parameters in braces; empty for no weighting.
    flag: the option that asks for it; empty for the rows that the model itself implies.
    """

    weights: Callable[..., Tensor]
    label: str = ""
    flag: str = ""


def min_snr(schedule: "NoiseSchedule", gamma: float) -> Tensor:
    """Min-SNR-γ weights (T,).

    Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy", section 3.4:
    min(SNR, γ) for the error of x₀, hence divided by SNR for epsilon and by SNR + 1 for v. At zero
    SNR the weight is its limit: 1 for epsilon, 0 for v.
    """
    snr = schedule.snr
    if schedule.prediction_type == "v_prediction":
        return snr.clamp(max=gamma) / (snr + 1)
    return torch.where(snr > gamma, gamma / snr, 1.0)


def edm_style(schedule: "NoiseSchedule") -> Tensor:
    """Weights (T,) for the error of x₀ over σ²: α² = SNR / (SNR + 1) for v, 1 for epsilon.

    diffusers' advanced SDXL DreamBooth script, `--do_edm_style_training`; σ is the noise of EDM's
    form, x₀ + σε.
    """
    if schedule.prediction_type == "v_prediction":
        return schedule.alpha**2
    return torch.ones_like(schedule.alpha)


WEIGHTINGS: dict[str, Weighting] = {
    # every timestep equal: L_simple, Ho et al. 2020, equation 14
    "uniform": Weighting(lambda schedule: torch.ones_like(schedule.alpha)),
    # Hang et al. 2023, section 3.4
    "min_snr": Weighting(min_snr, "min-SNR γ {gamma:g}", "--snr_gamma"),
    # the error of x₀ over σ², for models without EDM's formulation
    "edm_style": Weighting(edm_style, "EDM weighting", "--do_edm_style_training"),
    # c_out² (Karras et al. 2022, table 1): the error of x₀, for models of EDM's formulation
    "edm": Weighting(lambda schedule: (schedule.sigma * schedule.data_std) ** 2, "EDM weighting"),
}
"""Name → weighting."""
