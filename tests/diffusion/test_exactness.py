"""Every objective to float32's rounding: closed forms in float64, and gradients at both ends."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler
from torch import Tensor

from sd_lora.diffusion.loss import HUBER_SCHEDULES, LOSSES, Loss, sample_losses, target_of
from sd_lora.diffusion.schedule import NoiseSchedule
from sd_lora.diffusion.weightings import WEIGHTINGS

T = torch.tensor([0, 500, 999])
"""The first timestep, the middle one and the last."""

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

SCHEDULERS: dict[str, DDPMScheduler | EDMEulerScheduler] = {
    "epsilon": DDPMScheduler(**BETAS, prediction_type="epsilon"),
    "v": DDPMScheduler(**BETAS, prediction_type="v_prediction"),
    "sample": DDPMScheduler(**BETAS, prediction_type="sample"),
    "zero v": DDPMScheduler(**BETAS, prediction_type="v_prediction", rescale_betas_zero_snr=True),
    "zero sample": DDPMScheduler(**BETAS, prediction_type="sample", rescale_betas_zero_snr=True),
    "flow": DDPMScheduler.from_config({"prediction_type": "flow_prediction", "flow_shift": 3.0}),
    "edm": EDMEulerScheduler(prediction_type="epsilon"),
    "edm v": EDMEulerScheduler(prediction_type="v_prediction"),
}
"""Kind of model → its scheduler; "zero": zero terminal SNR."""


def levels(kind: str) -> tuple[Tensor, Tensor]:
    """α and σ of `T` in float64: √ᾱ and √(1 − ᾱ); of flows 1 − σ and σ = s·u / (1 + (s − 1)·u);
    of EDM σ_data / √(σ² + σ_data²) and σ / √(σ² + σ_data²)."""
    scheduler = SCHEDULERS[kind]
    if isinstance(scheduler, EDMEulerScheduler):
        sigma = scheduler.sigmas[999 - T].double()  # its schedule starts with much noise
        length = (sigma**2 + 0.5**2).sqrt()
        return 0.5 / length, sigma / length
    if kind == "flow":
        u = (T.double() + 1) / 1000
        sigma = 3 * u / (1 + 2 * u)
        return 1 - sigma, sigma
    bar = scheduler.alphas_cumprod[T].double()
    return bar.sqrt(), (1 - bar).sqrt()


TARGETS: dict[str, Callable[..., tuple[Any, Any]]] = {
    # factors of x₀ / σ_data and of the noise
    "epsilon": lambda alpha, sigma: (0, 1), "v": lambda alpha, sigma: (-sigma, alpha),
    "sample": lambda alpha, sigma: (1, 0), "flow": lambda alpha, sigma: (-1, 1),
    "edm": lambda alpha, sigma: (sigma, -alpha),
}  # fmt: skip


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_inputs_and_targets_are_exact(kind: str) -> None:
    """x_t and the target of each prediction type are their closed forms of ᾱ, computed in float64:
    each element is within 1e-6 of the size of its two terms, at the first, middle and last
    timestep."""
    schedule = NoiseSchedule.of(SCHEDULERS[kind])
    x0, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    alpha, sigma = (level.view(3, 1, 1, 1) for level in levels(kind))
    unit = x0.double() / schedule.data_std
    a, b = TARGETS[kind.removeprefix("zero ").removeprefix("edm ")](alpha, sigma)
    for found, of_x0, of_noise in (
        (schedule.add_noise(x0, noise, T), alpha, sigma),
        (target_of(x0, noise, T, schedule), a, b),
    ):
        terms = of_x0 * unit, of_noise * noise.double()
        size = terms[0].abs() + terms[1].abs()
        assert ((found.double() - sum(terms)).abs() <= 1e-6 * size).all()


OF_X0: dict[str, tuple[dict[str, float], Callable[[Tensor], Tensor]]] = {
    # weighting → parameters, weight of x₀'s error by SNR; that of ε's error is SNR times smaller
    "uniform": ({}, lambda snr: snr), "min_snr": ({"gamma": 5.0}, lambda snr: snr.clamp(max=5)),
    "soft_min_snr": ({"gamma": 4.0}, lambda snr: 4 * snr / (snr + 4)),
    "debiased": ({}, torch.sqrt), "p2": ({"gamma": 0.5}, lambda snr: snr / (1 + snr).sqrt()),
    "edm_style": ({}, lambda snr: snr),
}  # fmt: skip


@pytest.mark.parametrize("kind", [k for k in SCHEDULERS if "edm" not in k and k != "flow"])
@pytest.mark.parametrize("weighting", [name for name in OF_X0 if name != "uniform"])
def test_weights_are_exact(weighting: str, kind: str) -> None:
    """Each weighting's weights are the paper's closed form of SNR = ᾱ / (1 − ᾱ) in float64, to
    1e-6, for every prediction type: divided by SNR for epsilon, by SNR + 1 for v; at zero SNR 0."""
    parameters, of_x0 = OF_X0[weighting]
    bar = SCHEDULERS[kind].alphas_cumprod[T].double()
    snr = bar / (1 - bar)
    divisor = {"epsilon": snr, "v": snr + 1}.get(kind.removeprefix("zero "), 1.0)
    wanted = of_x0(snr) / divisor
    found = NoiseSchedule.of(SCHEDULERS[kind], weighting, **parameters).weights[T].double()
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    assert (found[-1] == 0) == kind.startswith("zero")


@pytest.mark.parametrize("kind", ["edm", "edm v"])
def test_weights_of_edm_are_exact(kind: str) -> None:
    """EDM's weights are c_out² = σ²·σ_data² / (σ² + σ_data²), to 1e-6 (Karras et al. 2022, table
    1)."""
    sigma = levels(kind)[1]
    found = NoiseSchedule.of(SCHEDULERS[kind]).weights[T].double()
    torch.testing.assert_close(found, (0.5 * sigma) ** 2, rtol=1e-6, atol=0)


def weightings_of(kind: str) -> list[str]:
    """The weightings that a kind of model takes."""
    if "edm" in kind:
        return ["uniform"]
    return ["uniform", "table"] if kind == "flow" else [w for w in WEIGHTINGS if w != "edm"]


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_gradients_are_finite_at_both_ends(kind: str) -> None:
    """The gradient through every weighting and loss is finite at the first timestep and at the
    last, zero SNR included, for an output that is far off, near and exactly right; and it is not
    zero where an output is off and its weight is above 0."""
    x0, noise, off = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    off[:, 1] *= 1e-4
    off[:, 2] = 0
    off[:, 3] *= 1e3
    ends = torch.tensor([0, 999])
    for weighting, loss, by_timestep in itertools.product(
        weightings_of(kind), LOSSES, HUBER_SCHEDULES
    ):
        parameters: dict[str, Any] = dict(OF_X0[weighting][0]) if weighting in OF_X0 else {}
        if weighting == "table":
            parameters = {"points": [(0.0, 2.0), (999.0, 0.5)], "file": "w.csv"}
        schedule = NoiseSchedule.of(SCHEDULERS[kind], weighting, **parameters)
        target = target_of(x0, noise, ends, schedule)
        output = (target + off).requires_grad_()
        row = Loss.of(schedule, loss, by_timestep, 0.1, 1.0, 0.0)
        losses = sample_losses(output, target, ends, schedule, loss=row)
        (gradient,) = torch.autograd.grad(losses.sum(), output)
        where = (weighting, loss, by_timestep)
        assert torch.isfinite(gradient).all(), where
        assert torch.isfinite(losses).all(), where
        moved = gradient[:, [0, 3]].flatten(1).abs().amax(1) > 0
        assert torch.equal(moved, schedule.weights[ends] > 0), where
        assert not gradient[:, 2].any(), where
