"""Loss weights that are learned: they become the inverse of the mean loss at each timestep."""

import copy
import math

import pytest
import torch
from torch import Tensor

from sd_lora.diffusion.schedule import NoiseSchedule
from sd_lora.diffusion.uncertainty import BETAS, CHANNELS, RATE, Uncertainty, reweighted
from tests.tiny import build_pipeline


@pytest.fixture(scope="module")
def schedule() -> NoiseSchedule:
    return NoiseSchedule.of(build_pipeline("sd1").scheduler)


def loss_of(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """About an SD model's own mean loss: SNR / (1 + SNR), from 1 down to 0.005."""
    return schedule.snr[t] / (1 + schedule.snr[t])


def test_each_timestep_comes_to_weigh_alike(schedule: NoiseSchedule) -> None:
    """u becomes ln of the mean loss at each timestep, the closed minimum of E[l]·e^(−u) + u, from
    losses that scatter around it by a factor of e; the weights are e^(−u), of mean 1 over the
    trained timesteps."""
    uncertainty = Uncertainty(schedule, 100, 900)
    assert torch.equal(uncertainty.weights, torch.ones(1000))
    generator = torch.Generator().manual_seed(0)
    for _ in range(1500):
        t = torch.randint(100, 900, (16,), generator=generator)
        scatter = torch.empty(16).exponential_(generator=generator)  # of mean 1
        uncertainty.observe(loss_of(schedule, t) * scatter, t, torch.full((16,), 1 / 16))
        uncertainty.step()
    t = torch.arange(100, 900)
    off = uncertainty.u[t] - loss_of(schedule, t).log()
    assert off.abs().mean() < 0.1
    assert off.abs().max() < 0.5
    torch.testing.assert_close(uncertainty.weights[t].mean(), torch.tensor(1.0))
    product = uncertainty.weights[t] * uncertainty.u[t].exp()
    torch.testing.assert_close(product, product[:1].expand(800))


def test_values_stay_and_gradients_are_weighted(schedule: NoiseSchedule) -> None:
    """The losses keep their values to the bit, and each gradient is its weight times the plain one;
    what u observes is the derivative of Σ share·(l·e^(−u) + u) by autograd, whatever its parts."""
    uncertainty = Uncertainty(schedule, 0, 1000)
    uncertainty.parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    uncertainty._renew()
    t = torch.tensor([0, 20, 500, 999])
    losses = torch.tensor([0.1, 2.0, 0.7, 0.01], requires_grad=True)
    weighted = reweighted(losses, uncertainty.factors(t))
    assert torch.equal(weighted, losses)
    (gradient,) = torch.autograd.grad(weighted.sum(), losses)
    torch.testing.assert_close(gradient, uncertainty.weights[t])

    shares = torch.tensor([0.5, 0.25, 0.25, 0.0])
    u = uncertainty.features[t] @ uncertainty.parameter
    (wanted,) = torch.autograd.grad(
        (shares * (losses.detach() * (-u).exp() + u)).sum(), uncertainty.parameter
    )
    for part in (slice(0, 1), slice(1, 4)):
        uncertainty.observe(losses[part], t[part], shares[part])
    torch.testing.assert_close(uncertainty.gradient, wanted)
    uncertainty.forget()
    assert not uncertainty.gradient.any()


@pytest.mark.parametrize("share", [0.5, 0.0])
def test_a_loss_that_is_not_finite_is_forgotten(schedule: NoiseSchedule, share: float) -> None:
    """A step with an infinite loss, of a preserved item too, leaves u as it was, to the bit, and
    the steps after it go on as if it had not been."""
    t = torch.tensor([10, 700])
    seen = [torch.tensor([0.3, 0.9]), torch.tensor([0.2, 1.1])]
    other, plain = Uncertainty(schedule, 0, 1000), Uncertainty(schedule, 0, 1000)
    for losses in (seen[0], torch.tensor([math.inf, 0.9]), seen[1]):
        other.observe(losses, t, torch.tensor([share, 0.5]))
        other.step()
    for losses in seen:
        plain.observe(losses, t, torch.tensor([share, 0.5]))
        plain.step()
    assert torch.equal(other.u, plain.u)
    assert torch.isfinite(other.weights).all()
    assert other.u.any()


def test_a_state_of_an_earlier_version_goes_on(schedule: NoiseSchedule) -> None:
    """A state whose Adam is not fused, as earlier versions saved it, is taken over: the next step
    is that of the Adam that saved it."""
    parameter = torch.zeros(CHANNELS, requires_grad=True)
    theirs = torch.optim.Adam([parameter], lr=RATE, betas=BETAS)
    ours = Uncertainty(schedule, 0, 1000)
    for step in range(3):
        gradient = torch.linspace(-1, 1, CHANNELS) * (step + 1)
        parameter.grad = gradient.clone()
        theirs.step()
        if step == 1:
            state = {"parameter": parameter.detach().clone(), "optimizer": theirs.state_dict()}
            ours.load_state_dict(copy.deepcopy(state))
        if step == 2:
            ours.gradient.copy_(gradient)
            ours.step()
    torch.testing.assert_close(ours.parameter, parameter)
    assert ours.optimizer.param_groups[0]["fused"]


def test_features_are_finite_at_both_ends() -> None:
    """Pure noise and no noise at all have features too, so that zero SNR and flows have weights."""
    alpha = torch.tensor([1.0, 0.5, 0.0])
    schedule = NoiseSchedule(alpha, 1 - alpha, "flow_prediction", 1000 * (1 - alpha), alpha)
    uncertainty = Uncertainty(schedule, 0, 3)
    assert torch.isfinite(uncertainty.features).all()
    assert (uncertainty.features[1:] - uncertainty.features[:-1]).abs().max() > 0.01
