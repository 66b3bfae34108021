"""Losses of elements, thresholds and masks, in closed form and by other trainers' formulas."""

import math

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from sd_lora.config.schema import OPTIONS
from sd_lora.diffusion.loss import HUBER_SCHEDULES, L2, LOSSES, Loss
from sd_lora.diffusion.schedule import NoiseSchedule

T = torch.tensor([0, 500, 999])
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def schedule_of(zero_snr: bool = False) -> NoiseSchedule:
    scheduler = DDPMScheduler(
        **BETAS, prediction_type="v_prediction", rescale_betas_zero_snr=zero_snr
    )
    return NoiseSchedule.of(scheduler)


def drawn() -> tuple[Tensor, Tensor]:
    """A prediction and a target for each of `T`."""
    return torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("huber_schedule", HUBER_SCHEDULES)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_the_formulas(name: str, huber_schedule: str) -> None:
    """At the first, middle and last timestep each loss is the mean of its formula, written out in
    float64 as sd-scripts has it (train_util.py, conditional_loss and
    get_huber_threshold_if_needed), to 1e-6; so is its gradient."""
    schedule, c, scale = schedule_of(), 0.1, 0.5
    loss = Loss.of(schedule, name, huber_schedule, c, scale, 0.0)
    prediction, target = drawn()
    sigma = (schedule.sigma / schedule.alpha)[T].double()
    threshold = {
        "constant": torch.full((3,), c * scale, dtype=torch.float64),
        "exponential": torch.exp(math.log(c) / 1000 * T.double()) * scale,
        "snr": (1 - c) / (1 + sigma) ** 2 + c,
    }[huber_schedule].view(3, 1, 1, 1)
    wanted = prediction.double().requires_grad_()
    error = wanted - target.double()
    root = (error**2 + threshold**2).sqrt() - threshold
    formula = {
        "l2": error**2,
        "l1": error.abs(),
        "huber": 2 * threshold * root,
        "smooth_l1": 2 * root,
    }[name].mean((1, 2, 3))
    prediction.requires_grad_()
    ours = loss.losses(prediction, target, T)
    torch.testing.assert_close(ours.double(), formula, rtol=1e-6, atol=1e-6)
    formula.sum().backward()
    ours.sum().backward()
    torch.testing.assert_close(prediction.grad.double(), wanted.grad, rtol=1e-5, atol=1e-8)


def test_huber_losses_are_squares_and_lines() -> None:
    """Far below the threshold huber is the square, to the last digits that float32 has, and
    smooth_l1 the square over it; far above, both are lines; with a small one smooth_l1 is 2·l1."""
    for error, c, huber in [(1e-5, 1.0, 1e-10), (1e4, 0.1, 2 * 0.1 * (1e4 - 0.1))]:
        e, threshold = torch.tensor(error), torch.tensor(c)
        torch.testing.assert_close(float(LOSSES["huber"](e, threshold)), huber, rtol=1e-6, atol=0)
        smooth = float(LOSSES["smooth_l1"](e, threshold))
        torch.testing.assert_close(smooth, huber / c, rtol=1e-6, atol=0)
    prediction, target = drawn()
    small = Loss.of(schedule_of(), "smooth_l1", "constant", 1e-6, 1.0, 0.0)
    l1 = Loss("l1").losses(prediction, target, T)
    torch.testing.assert_close(small.losses(prediction, target, T), 2 * l1, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_finite_everywhere(name: str) -> None:
    """With zero terminal SNR thresholds, losses and gradients are finite at every timestep, also of
    errors of exactly 0; the threshold in pure noise is c."""
    schedule = schedule_of(zero_snr=True)
    assert schedule.alpha[-1] == 0
    for huber_schedule in HUBER_SCHEDULES:
        loss = Loss.of(schedule, name, huber_schedule, 0.1, 1.0, 0.0)
        assert torch.isfinite(loss.thresholds).all()
        t = torch.arange(1000)
        prediction = torch.randn(1000, 1, 2, 2, requires_grad=True)
        target = prediction.detach().clone()
        target[:, :, 0] = 0
        values = loss.losses(prediction, target, t)
        values.sum().backward()
        assert torch.isfinite(values).all()
        assert torch.isfinite(prediction.grad).all()
    assert float(Loss.of(schedule, name, "snr", 0.1, 1.0, 0.0).thresholds[-1]) == pytest.approx(0.1)


@pytest.mark.parametrize("name", ["l2", "smooth_l1"])
def test_masks_are_weights_of_a_mean(name: str) -> None:
    """A masked loss is the mean of the elements' losses over the mask, not below `unmasked_weight`
    (OneTrainer's clamped mask over its own mean); a mask of one value changes nothing, and with
    `unmasked_weight` 0 what lies outside does not count at all."""
    prediction, target = drawn()
    plain = Loss.of(schedule_of(), name, "snr", 0.1, 1.0, 0.0)
    mask = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(1)).round()
    for least in (0.0, 0.1):
        loss = Loss.of(schedule_of(), name, "snr", 0.1, 1.0, least)
        clamped = mask.clamp(least, 1)
        c = loss.thresholds[T].view(3, 1, 1, 1)
        weighted = LOSSES[name](prediction - target, c) * clamped
        wanted = (weighted / clamped.mean((1, 2, 3), keepdim=True)).mean((1, 2, 3))
        ours = loss.losses(prediction, target, T, mask)
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-7)
        whole = loss.losses(prediction, target, T, torch.full_like(mask, 0.4))
        torch.testing.assert_close(whole, plain.losses(prediction, target, T))
    outside = torch.where(mask.bool(), prediction, prediction + 100)
    same = plain.losses(outside, target, T, mask), plain.losses(prediction, target, T, mask)
    torch.testing.assert_close(*same)


def test_the_options_name_the_rows() -> None:
    """The choices of loss_type and huber_schedule are the tables' rows; the plain loss is l2."""
    assert set(OPTIONS["loss_type"].choices) == set(LOSSES)
    assert set(OPTIONS["huber_schedule"].choices) == set(HUBER_SCHEDULES)
    prediction, target = drawn()
    wanted = torch.nn.functional.mse_loss(prediction, target, reduction="none").mean((1, 2, 3))
    torch.testing.assert_close(L2.losses(prediction, target, T), wanted)
