"""Loss weights by timestep, one row a weighting.

A new weighting is a function of a noise schedule and a row of `WEIGHTINGS`; `weighting` of
`config/options/objective.py` names the row.

Papers weight the error of x₀ or of ε. Both are errors of the network's output times a function of
the signal-to-noise ratio: ‖ε − ε̂‖² = SNR·‖x₀ − x̂₀‖², ‖v − v̂‖² = (SNR + 1)·‖x₀ − x̂₀‖². So each
weighting is one objective, whatever the model predicts, and its weights differ by these factors.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
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


def _of_output(schedule: "NoiseSchedule", of_x0: Tensor, of_epsilon: Tensor) -> Tensor:
    """Weights of the network's output: those of x₀'s error, or the same ones of ε's error.

    of_x0, of_epsilon: (T,), related by of_x0 = SNR · of_epsilon; both finite at zero SNR, where
    one cannot be made of the other.
    """
    of_output = {
        "v_prediction": of_x0 * schedule.sigma**2,  # 1 / (SNR + 1) = σ²
        "sample": of_x0,
        "epsilon": of_epsilon,
    }
    return of_output[schedule.prediction_type]


def min_snr(schedule: "NoiseSchedule", gamma: float) -> Tensor:
    """Min-SNR-γ weights (T,).

    Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy", section 3.4:
    min(SNR, γ) for the error of x₀, hence divided by SNR for epsilon and by SNR + 1 for v. At zero
    SNR the weight is its limit: 1 for epsilon, 0 for v.
    """
    snr = schedule.snr
    of_epsilon = torch.where(snr > gamma, gamma / snr, 1.0)
    return _of_output(schedule, snr.clamp(max=gamma), of_epsilon)


def soft_min_snr(schedule: "NoiseSchedule", gamma: float) -> Tensor:
    """Soft-min-SNR weights (T,): SNR·γ / (SNR + γ) for the error of x₀, min-SNR without its corner.

    Crowson et al. 2024, "Scalable High-Resolution Pixel-Space Image Synthesis with Hourglass
    Diffusion Transformers": 1 / (1/SNR + 1/γ).
    """
    snr = schedule.snr
    of_epsilon = gamma / (snr + gamma)
    return _of_output(schedule, snr * of_epsilon, of_epsilon)


def debiased(schedule: "NoiseSchedule") -> Tensor:
    """Debiased-estimation weights (T,): 1/√SNR for the error of ε, so √SNR for that of x₀.

    Yu et al. 2024, "Unmasking Bias in Diffusion Model Training". At zero SNR the weight is 0 for v;
    epsilon is refused there.
    """
    root = schedule.alpha / schedule.sigma  # √SNR
    return _of_output(schedule, root, 1 / root)


def p2(schedule: "NoiseSchedule", gamma: float) -> Tensor:
    """P2 weights (T,): 1 / (1 + SNR)^γ for the error of ε.

    Choi et al. 2022, "Perception Prioritized Training of Diffusion Models", k = 1.
    """
    of_epsilon = (1 + schedule.snr) ** -gamma
    return _of_output(schedule, schedule.snr * of_epsilon, of_epsilon)


def edm_style(schedule: "NoiseSchedule") -> Tensor:
    """Weights (T,) for the error of x₀ over σ²: α² = SNR / (SNR + 1) for v, SNR for x₀, 1 for
    epsilon.

    diffusers' advanced SDXL DreamBooth script, `--do_edm_style_training`; σ is the noise of EDM's
    form, x₀ + σε.
    """
    return _of_output(schedule, schedule.snr, torch.ones_like(schedule.alpha))


def table(schedule: "NoiseSchedule", points: Sequence[tuple[float, float]], file: str) -> Tensor:
    """Weights (T,) of a table: straight lines between its points, level beyond its ends.

    points: (timestep, weight), by timestep. file: where they come from, for the summary.
    """
    timesteps, weights = zip(*points, strict=True)
    found = np.interp(np.arange(schedule.num_timesteps), timesteps, weights)
    return torch.from_numpy(found).float()


WEIGHTINGS: dict[str, Weighting] = {
    # every timestep equal: L_simple, Ho et al. 2020, equation 14
    "uniform": Weighting(lambda schedule: torch.ones_like(schedule.alpha)),
    # Hang et al. 2023, section 3.4
    "min_snr": Weighting(min_snr, "min-SNR γ {gamma:g}", "--snr_gamma"),
    # Crowson et al. 2024
    "soft_min_snr": Weighting(soft_min_snr, "soft min-SNR γ {gamma:g}", "--soft_min_snr_gamma"),
    # Yu et al. 2024
    "debiased": Weighting(debiased, "debiased estimation", "--debiased_estimation_loss"),
    # Choi et al. 2022
    "p2": Weighting(p2, "P2 γ {gamma:g}", "--p2_gamma"),
    # points of a file
    "table": Weighting(table, "weights of {file}", "--loss_weights_file"),
    # the error of x₀ over σ², for models without EDM's formulation
    "edm_style": Weighting(edm_style, "EDM weighting", "--do_edm_style_training"),
    # c_out² (Karras et al. 2022, table 1): the error of x₀, for models of EDM's formulation
    "edm": Weighting(lambda schedule: (schedule.sigma * schedule.data_std) ** 2, "EDM weighting"),
}
"""Name → weighting."""
