"""Schedules, targets and loss weights against diffusers and the papers' closed forms."""

import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler
from diffusers.training_utils import compute_snr

from sd_lora.diffusion.loss import denoised, target_of, weighted_loss
from sd_lora.diffusion.schedule import NoiseSchedule
from sd_lora.diffusion.weightings import WEIGHTINGS
from sd_lora.errors import UsageError
from tests.diffusion.items import losses_of
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
    """x_t and the v target are those of DDPMScheduler.add_noise and get_velocity; the target of a
    model that predicts the sample is x₀, which DDPMScheduler.step gives back for it."""
    g = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, len(T), 4, 8, 8, generator=g)
    schedule = NoiseSchedule.of(scheduler)
    want = scheduler.add_noise(x0, noise, T)
    torch.testing.assert_close(schedule.add_noise(x0, noise, T), want, rtol=1e-6, atol=1e-6)
    v = scheduler.get_velocity(x0, noise, T)
    schedule = predicting("v_prediction", scheduler)
    assert losses_of(v, x0, noise, T, schedule).max() < 1e-10
    schedule = predicting("epsilon", scheduler)
    assert torch.equal(losses_of(noise, x0, noise, T, schedule), torch.zeros(len(T)))
    sample = DDPMScheduler.from_config(scheduler.config, prediction_type="sample")
    target = target_of(x0, noise, T, NoiseSchedule.of(sample))
    stepped = sample.step(target[2:3], 250, schedule.add_noise(x0, noise, T)[2:3])
    torch.testing.assert_close(stepped.pred_original_sample, x0[2:3])


@pytest.mark.parametrize(
    "kind", ["epsilon", "v_prediction", "sample", "flow_prediction", "edm", "edm v_prediction"]
)
def test_an_output_stands_for_latents_and_noise(kind: str) -> None:
    """Latents and noise come back from their target and x_t, for every kind of prediction and at
    zero terminal SNR, where v alone is left of the latents."""
    if kind.startswith("edm"):
        predicts = kind.removeprefix("edm ").replace("edm", "epsilon")
        schedule = NoiseSchedule.of(EDMEulerScheduler(prediction_type=predicts))
    else:
        zero = kind == "v_prediction"
        schedule = NoiseSchedule.of(
            DDPMScheduler(prediction_type=kind, rescale_betas_zero_snr=zero)
        )
        assert schedule.zero_terminal_snr is zero
    g = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, len(T), 4, 8, 8, generator=g)
    x0 = x0 * schedule.data_std
    x_t, target = schedule.add_noise(x0, noise, T), target_of(x0, noise, T, schedule)
    found, found_noise = denoised(target, x_t, T, schedule)
    alpha, sigma = schedule.coefficients(T)
    # an error of float32 is divided by α or σ, whichever the prediction leaves
    torch.testing.assert_close(found, x0 / schedule.data_std, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found_noise, noise, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(alpha * found + sigma * found_noise, x_t, rtol=1e-5, atol=1e-5)


def test_prediction_type_comes_from_the_model(scheduler: DDPMScheduler) -> None:
    """SD2's v-prediction is read from its scheduler."""
    assert NoiseSchedule.of(scheduler).prediction_type == scheduler.config.prediction_type
    for other in (EDMEulerScheduler(), scheduler):
        kind = "sample" if isinstance(other, EDMEulerScheduler) else "score"
        other.register_to_config(prediction_type=kind)
        with pytest.raises(UsageError, match=f"Scheduler with prediction_type '{kind}'; only"):
            NoiseSchedule.of(other)


def test_min_snr_weights_equal_the_scripts(scheduler: DDPMScheduler) -> None:
    """min(SNR, γ)/SNR for epsilon and min(SNR, γ)/(SNR + 1) for v, with diffusers' SNR."""
    snr = compute_snr(scheduler, T)
    torch.testing.assert_close(NoiseSchedule.of(scheduler).snr[T], snr, rtol=1e-6, atol=0)
    clipped = torch.minimum(snr, torch.full_like(snr, 5.0))
    for kind, want in (("epsilon", clipped / snr), ("v_prediction", clipped / (snr + 1))):
        weights = predicting(kind, scheduler, "min_snr", gamma=5.0).weights[T]
        torch.testing.assert_close(weights, want, rtol=1e-6, atol=0)


OTHERS = {
    # weighting → parameters, weight of ε's error by SNR
    "min_snr": ({"gamma": 5.0}, lambda snr: torch.where(snr > 5, 5 / snr, 1.0)),
    "soft_min_snr": ({"gamma": 4.0}, lambda snr: 4 / (snr + 4)),
    "debiased": ({}, lambda snr: snr**-0.5),
    "p2": ({"gamma": 0.5}, lambda snr: (1 + snr) ** -0.5),
    "edm_style": ({}, torch.ones_like),
}


@pytest.mark.parametrize("weighting", OTHERS)
def test_weightings_are_one_objective_for_all_predictions(
    weighting: str, scheduler: DDPMScheduler
) -> None:
    """At the first, middle and last timestep the weights of epsilon are the paper's, to 1e-6, and
    those of v and of x₀ weight the same error alike: of a guess of x₀, ‖ε − ε̂‖², ‖v − v̂‖² and
    ‖x₀ − x̂₀‖² times their weights are equal."""
    parameters, of_epsilon = OTHERS[weighting]
    bar = scheduler.alphas_cumprod[T].double()
    snr = bar / (1 - bar)
    of_noise = predicting("epsilon", scheduler, weighting, **parameters)
    wanted = of_epsilon(snr)
    torch.testing.assert_close(of_noise.weights[T].double(), wanted, rtol=1e-6, atol=0)
    of_v = predicting("v_prediction", scheduler, weighting, **parameters)
    x0, noise, guess = torch.randn(3, len(T), 4, 8, 8, generator=torch.Generator().manual_seed(0))
    alpha, sigma = of_v.coefficients(T)
    x_t = alpha * x0 + sigma * noise
    epsilon = (x_t - alpha * guess) / sigma
    v = alpha * epsilon - sigma * guess
    wanted = losses_of(epsilon, x0, noise, T, of_noise)
    torch.testing.assert_close(losses_of(v, x0, noise, T, of_v), wanted, rtol=1e-3, atol=0)
    of_x0 = predicting("sample", scheduler, weighting, **parameters)
    torch.testing.assert_close(losses_of(guess, x0, noise, T, of_x0), wanted, rtol=1e-3, atol=0)


@pytest.mark.parametrize("weighting", OTHERS)
def test_weights_are_finite_at_zero_snr(weighting: str) -> None:
    """With zero terminal SNR all weights of v and x₀ are finite, and 0 in pure noise."""
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    for kind in ("v_prediction", "sample"):
        scheduler = DDPMScheduler(**betas, prediction_type=kind, rescale_betas_zero_snr=True)
        weights = NoiseSchedule.of(scheduler, weighting, **OTHERS[weighting][0]).weights
        assert torch.isfinite(weights).all()
        assert weights[-1] == 0 < weights[:-1].min()


def test_a_table_of_weights(scheduler: DDPMScheduler) -> None:
    """Weights of a table lie on straight lines between its points, and level beyond them."""
    points = [(100.0, 2.0), (300.0, 1.0), (500.0, 0.0)]
    schedule = predicting("epsilon", scheduler, "table", points=points, file="w.csv")
    assert schedule.weights[[0, 100, 200, 400, 500, 999]].tolist() == [2, 2, 1.5, 0.5, 0, 0]
    assert schedule.weighting == "weights of w.csv"


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
    want = losses_of(out, x0, noise, T, plain) * schedule.weights[T]
    assert torch.equal(losses_of(out, x0, noise, T, schedule), want)
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
