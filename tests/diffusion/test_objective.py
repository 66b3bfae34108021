"""Schedules, targets and loss weights against diffusers and the papers' closed forms."""

import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler
from diffusers.training_utils import compute_snr

from sd_lora.diffusion.loss import sample_losses, weighted_loss
from sd_lora.diffusion.schedule import NoiseSchedule, draw_noise, draw_timesteps
from sd_lora.diffusion.weightings import WEIGHTINGS
from sd_lora.errors import UsageError
from tests.tiny import build_pipeline

T = torch.tensor([0, 1, 250, 500, 998, 999])


@pytest.fixture(params=["sd1", "sd2"])
def scheduler(request: pytest.FixtureRequest) -> DDPMScheduler:
    return build_pipeline(request.param).scheduler


def predicting(
    kind: str, scheduler: DDPMScheduler, weighting: str = "uniform", **parameters: float
) -> NoiseSchedule:
    """The schedule of a model with these betas and another prediction type."""
    other = DDPMScheduler.from_config(scheduler.config, prediction_type=kind)
    return NoiseSchedule.of(other, weighting, **parameters)


def test_noising_and_targets_equal_diffusers(scheduler: DDPMScheduler) -> None:
    """x_t and the v target are those of DDPMScheduler.add_noise and get_velocity."""
    g = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, len(T), 4, 8, 8, generator=g)
    schedule = NoiseSchedule.of(scheduler)
    want = scheduler.add_noise(x0, noise, T)
    torch.testing.assert_close(schedule.add_noise(x0, noise, T), want, rtol=1e-5, atol=1e-6)
    v = scheduler.get_velocity(x0, noise, T)
    schedule = predicting("v_prediction", scheduler)
    assert sample_losses(v, x0, noise, T, schedule).max() < 1e-10
    schedule = predicting("epsilon", scheduler)
    assert torch.equal(sample_losses(noise, x0, noise, T, schedule), torch.zeros(len(T)))


def test_prediction_type_comes_from_the_model(scheduler: DDPMScheduler) -> None:
    """SD2's v-prediction is read from its scheduler."""
    assert NoiseSchedule.of(scheduler).prediction_type == scheduler.config.prediction_type
    scheduler.register_to_config(prediction_type="sample")
    with pytest.raises(UsageError, match="has prediction_type 'sample'"):
        NoiseSchedule.of(scheduler)


def test_min_snr_weights_equal_the_scripts(scheduler: DDPMScheduler) -> None:
    """min(SNR, γ)/SNR for epsilon and min(SNR, γ)/(SNR + 1) for v, with diffusers' SNR."""
    snr = compute_snr(scheduler, T)
    torch.testing.assert_close(NoiseSchedule.of(scheduler).snr[T], snr, rtol=1e-4, atol=1e-6)
    clipped = torch.minimum(snr, torch.full_like(snr, 5.0))
    for kind, want in (("epsilon", clipped / snr), ("v_prediction", clipped / (snr + 1))):
        weights = predicting(kind, scheduler, "min_snr", gamma=5.0).weights[T]
        torch.testing.assert_close(weights, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("kind", "limit"), [("epsilon", 1), ("v_prediction", 0)])
def test_min_snr_weights_at_zero_snr(kind: str, limit: float) -> None:
    """At zero terminal SNR the weights are finite: their limits."""
    zero, one = torch.zeros(1), torch.ones(1)
    schedule = NoiseSchedule(zero, one, kind, torch.arange(1), one)
    assert WEIGHTINGS["min_snr"].weights(schedule, gamma=5.0) == limit


@pytest.mark.parametrize(("weighting", "label"), [("min_snr", "min-SNR γ 5"), ("uniform", "")])
def test_a_weighting_multiplies_the_losses(
    weighting: str, label: str, scheduler: DDPMScheduler
) -> None:
    """The losses are the plain ones times the row's weights, bit for bit; the schedule keeps the
    weighting in words."""
    x0, noise, out = torch.randn(3, len(T), 4, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = NoiseSchedule.of(scheduler)
    given = {"gamma": 5.0} if weighting == "min_snr" else {}
    schedule = NoiseSchedule.of(scheduler, weighting, **given)
    want = sample_losses(out, x0, noise, T, plain) * schedule.weights[T]
    assert torch.equal(sample_losses(out, x0, noise, T, schedule), want)
    assert schedule.weighting == label


def test_edm_models_have_their_own_weighting() -> None:
    """EDM's formulation takes no other weighting, and the message names the flag to leave out."""
    scheduler = EDMEulerScheduler()
    style = NoiseSchedule.of(scheduler, "edm_style")
    assert torch.equal(style.weights, NoiseSchedule.of(scheduler).weights)
    with pytest.raises(UsageError, match="leave out --snr_gamma"):
        NoiseSchedule.of(scheduler, "min_snr", gamma=5.0)


def test_prior_preservation_is_the_two_chunk_formula() -> None:
    """Σ w·l · 1 / #instances equals mean(instance) + λ·mean(class), as the DreamBooth script has
    it."""
    g = torch.Generator().manual_seed(0)
    losses = torch.rand(8, generator=g)
    weights = torch.tensor([1.0] * 4 + [0.3] * 4)
    want = losses[:4].mean() + 0.3 * losses[4:].mean()
    torch.testing.assert_close(weighted_loss(losses, weights, 1 / 4), want)


def test_draws_are_functions_of_their_address() -> None:
    """An item's noise and timestep do not depend on its batch; other addresses differ; the noise
    is standard normal and the timesteps cover the range."""
    a, b = (0, "instance", "position", 3), (0, "instance", "position", 4)
    both = draw_noise((4, 8, 8), [a, b])
    assert torch.equal(draw_noise((4, 8, 8), [b])[0], both[1])
    assert not torch.equal(both[0], both[1])
    many = draw_noise((4, 32, 32), [(0, i) for i in range(64)])
    assert abs(float(many.mean())) < 0.01
    assert abs(float(many.std()) - 1) < 0.01
    t = draw_timesteps([(0, i) for i in range(5000)], 1000)
    assert t.min() < 10
    assert t.max() > 989
    assert abs(float(t.float().mean()) - 499.5) < 15


def test_noise_offset_adds_a_constant_per_channel() -> None:
    """Offset noise is the plain noise plus strength × one normal draw a channel."""
    address = [(0, "x")]
    plain, offset = draw_noise((4, 8, 8), address), draw_noise((4, 8, 8), address, offset=0.1)
    difference = (offset - plain).flatten(2)
    assert torch.allclose(difference, difference[..., :1], atol=1e-6)
    assert 0.02 < difference[..., 0].std() < 0.3
