"""EDM's formulation and weights, zero terminal SNR, flow matching, and sampling, by diffusers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from PIL import Image
from torch import Tensor

from sd_lora.diffusion.loss import TARGETS, target_of
from sd_lora.diffusion.schedule import NoiseSchedule
from sd_lora.errors import UsageError
from sd_lora.models.load import load_parts
from sd_lora.sampling.sampler import rescaled, sample
from tests.diffusion.items import losses_of
from tests.tiny import KINDS, build_pipeline, pipeline_of

T = torch.arange(1000)
KIND = pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])


def drawn(seed: int = 0, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """x₀, noise and a network's output for every timestep, at random."""
    x0, noise, out = torch.randn(3, 1000, 4, 2, 2, generator=torch.Generator().manual_seed(seed))
    return scale * x0, noise, out


def vp(kind: str, zero_snr: bool = False) -> dict[str, object]:
    """Stable Diffusion's schedule."""
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return {**betas, "prediction_type": kind, "rescale_betas_zero_snr": zero_snr}


@KIND
@pytest.mark.parametrize("schedule", ["karras", "exponential"])
@pytest.mark.parametrize("data_std", [0.5, 1.0])
def test_edm_is_diffusers(kind: str, schedule: str, data_std: float) -> None:
    """At each of its noise levels the UNet's input and its timestep input are those of
    EDMEulerScheduler's preconditioning; our target, preconditioned as its outputs, is x₀; and the
    loss of any other output is ‖D - x₀‖², as in example script D of diffusers."""
    options = {"sigma_data": data_std, "prediction_type": kind, "sigma_schedule": schedule}
    scheduler = EDMEulerScheduler(**options)
    ours = NoiseSchedule.of(scheduler)
    x0, noise, out = drawn(scale=data_std)
    sigma = scheduler.sigmas[999 - T].view(-1, 1, 1, 1)  # its schedule starts with much noise
    noisy = scheduler.add_noise(x0, noise, scheduler.timesteps[999 - T])
    want = scheduler.precondition_inputs(noisy, sigma)
    torch.testing.assert_close(ours.add_noise(x0, noise, T), want, rtol=1e-6, atol=1e-6)
    told = scheduler.precondition_noise(sigma.flatten())
    torch.testing.assert_close(ours.timesteps, told, rtol=1e-6, atol=1e-6)
    target = TARGETS[ours.prediction_type](x0 / data_std, noise, *ours.coefficients(T))
    denoised = scheduler.precondition_outputs(noisy, target, sigma)
    torch.testing.assert_close(denoised, x0, rtol=0, atol=2e-5)
    denoised = scheduler.precondition_outputs(noisy, out, sigma)
    want = (denoised - x0).square().mean([1, 2, 3])
    torch.testing.assert_close(losses_of(out, x0, noise, T, ours), want, rtol=1e-3, atol=1e-9)
    assert sigma[0] < 0.01
    assert sigma[-1] == 80


@KIND
def test_edm_style_weights_are_the_scripts(kind: str) -> None:
    """For other models EDM's style is script D's (lines 1720-1794): the error of x₀ over σ², of
    EulerDiscreteScheduler's σ; the weight is 1 for epsilon and α² for v."""
    ours = NoiseSchedule.of(DDPMScheduler(**vp(kind)), "edm_style")
    x0, noise, out = drawn()
    scheduler = EulerDiscreteScheduler(**vp(kind))
    sigma = scheduler.sigmas[999 - T].view(-1, 1, 1, 1)
    noisy = scheduler.add_noise(x0, noise, scheduler.timesteps[999 - T])
    want = noisy / (sigma**2 + 1).sqrt()
    torch.testing.assert_close(ours.add_noise(x0, noise, T), want, rtol=1e-6, atol=1e-6)
    denoised = noisy - sigma * out
    if kind == "v_prediction":
        denoised = noisy / (sigma**2 + 1) - out * sigma / (sigma**2 + 1).sqrt()
    want = ((denoised - x0) ** 2 / sigma**2).mean([1, 2, 3])
    torch.testing.assert_close(losses_of(out, x0, noise, T, ours), want, rtol=1e-3, atol=1e-9)
    plain = NoiseSchedule.of(DDPMScheduler(**vp(kind)))
    assert torch.equal(plain.weights, torch.ones(1000))
    assert torch.equal(ours.weights == 1, torch.full((1000,), kind == "epsilon"))


def test_zero_terminal_snr() -> None:
    """With rescaled betas (Lin et al. 2023, algorithm 1) every x_t and velocity is DDPMScheduler's;
    at the last step x_t is the noise alone, to the bit, the target is -x₀, and the weights of
    min-SNR and of EDM's style are their limit, zero, so that no loss is infinite."""
    scheduler = DDPMScheduler(**vp("v_prediction", zero_snr=True))
    ours, x0, noise, out = NoiseSchedule.of(scheduler), *drawn()
    want = scheduler.add_noise(x0, noise, T)
    torch.testing.assert_close(ours.add_noise(x0, noise, T), want, rtol=1e-6, atol=1e-6)
    velocity = scheduler.get_velocity(x0, noise, T)
    assert losses_of(velocity, x0, noise, T, ours).max() < 1e-10
    assert torch.equal(ours.add_noise(x0, noise, T)[-1], noise[-1])
    assert torch.equal(TARGETS["v_prediction"](x0, noise, *ours.coefficients(T))[-1], -x0[-1])
    min_snr = NoiseSchedule.of(scheduler, "min_snr", gamma=5.0)
    weighted = losses_of(out, x0, noise, T, min_snr)
    assert torch.isfinite(weighted).all()
    assert weighted[-1] == 0 < weighted[:-1].min()
    styled = losses_of(out, x0, noise, T, NoiseSchedule.of(scheduler, "edm_style"))
    assert torch.isfinite(styled).all()
    assert styled[-1] == 0 < losses_of(out, x0, noise, T, ours)[-1]


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_is_diffusers(shift: float) -> None:
    """At every timestep, pure noise included, x_t and the UNet's timestep are those of
    FlowMatchEulerDiscreteScheduler, and the target is noise - x₀, as in diffusers' scripts for such
    models; its step along the target from there to clean gives x₀. No SNR weights it."""
    theirs = FlowMatchEulerDiscreteScheduler(1000, shift=shift)
    flow = {"prediction_type": "flow_prediction", "flow_shift": shift}
    ours = NoiseSchedule.of(DDPMScheduler.from_config(vp("epsilon") | flow))
    x0, noise, out = drawn()
    torch.testing.assert_close(ours.timesteps, theirs.timesteps.flip(0), rtol=1e-6, atol=1e-4)
    want = theirs.scale_noise(x0, theirs.timesteps.flip(0), noise)
    x_t = ours.add_noise(x0, noise, T)
    torch.testing.assert_close(x_t, want, rtol=1e-6, atol=1e-6)
    target = target_of(x0, noise, T, ours)
    assert torch.equal(target, noise - x0)
    torch.testing.assert_close(x_t - ours.sigma.view(-1, 1, 1, 1) * target, x0, rtol=0, atol=2e-6)
    assert torch.equal(x_t[-1], noise[-1])
    losses = losses_of(out.requires_grad_(), x0, noise, T, ours)
    losses.sum().backward()
    assert torch.isfinite(out.grad).all()
    with pytest.raises(UsageError, match="leave out --snr_gamma"):
        NoiseSchedule.of(DDPMScheduler.from_config(vp("epsilon") | flow), "min_snr", gamma=5.0)


@torch.no_grad()
def drawing(kind: str) -> DiffusionPipeline:
    """A pipeline that draws with contrast, heeding its text, and whose VAE knows one latent of an
    image: an inpainting pipeline draws one from it."""
    pipeline = build_pipeline("sdxl" if kind in ("edm", "flow") else kind)
    torch.manual_seed(2)
    for name, parameter in pipeline.unet.named_parameters():
        parameter *= 3 if "attn2" in name or "conv_out" in name else 1
    # tiny's VAE norms each channel by itself, which makes noise of a constant image's rounding
    pipeline.vae = AutoencoderKL.from_config(pipeline.vae.config, norm_num_groups=2)
    pipeline.vae.decoder.conv_out.weight *= 6
    pipeline.vae.quant_conv.weight[4:] = 0
    pipeline.vae.quant_conv.bias[4:] = -30
    if kind == "flow":
        pipeline.register_modules(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
    if kind == "edm":
        pipeline.register_modules(scheduler=EDMEulerScheduler(sigma_data=0.5))
        statistics = {"latents_mean": [-1.6, 1.1, 0.2, -0.1], "latents_std": [2.4, 1.9, 0.5, 1.7]}
        pipeline.vae.register_to_config(scaling_factor=0.5, **statistics)
    return pipeline


@pytest.mark.parametrize("phi", [0.0, 0.3, 0.7, 1.0])
def test_guidance_is_rescaled_as_diffusers_does(phi: float) -> None:
    """A guided prediction of each image is diffusers' `rescale_noise_cfg` of it, and for φ = 1 it
    has the conditional one's standard deviation."""
    generator = torch.Generator().manual_seed(0)
    conditional, guided = torch.randn(2, 3, 4, 8, 6, generator=generator) * torch.tensor(3.0)
    guided = guided * torch.tensor([1.0, 2.0, 5.0]).view(3, 1, 1, 1) + 0.5
    ours = rescaled(guided, conditional, phi)
    want = rescale_noise_cfg(guided, conditional, phi)
    torch.testing.assert_close(ours, want, rtol=1e-6, atol=1e-6)
    if phi == 1:
        for mine, theirs in zip(ours, conditional, strict=True):
            torch.testing.assert_close(mine.std(), theirs.std(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", [*(k for k in KINDS if k != "refiner"), "edm", "flow"])
def test_samples_are_the_pipelines(kind: str, tmp_path: Path) -> None:
    """An image of ours is that of diffusers' own pipeline with the same noise, guidance and
    sampler, to 1 of 255 in every pixel: of every kind, zero terminal SNR with the paper's rescaled
    guidance, EDM's formulation and flow matching included, and inpainting models that paint the
    whole image (mask white, strength 1)."""
    drawing(kind).save_pretrained(tmp_path)
    parts = load_parts(str(tmp_path))
    prompts, seeds, options = ["a cat", "a dog, by the sea"], [3, 4], {"guidance_scale": 3.0}
    device = torch.device("cpu")
    drawn = sample(
        parts,
        parts.caption_encoder(),
        prompts,
        seeds,
        size=(64, 64),
        device=device,
        steps=6,
        **options,
    )
    ours = list(drawn)
    cls = EDMDPMSolverMultistepScheduler if kind == "edm" else DPMSolverMultistepScheduler
    pipeline = pipeline_of(parts)
    own = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    config = {"num_train_timesteps": 1000} | own if kind == "flow" else parts.scheduler.config
    pipeline.scheduler = cls.from_config(config)
    noise = [torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in seeds]
    if "inpainting" in kind:
        random = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        options |= {"image": Image.fromarray(random), "strength": 1.0}
        options |= {"mask_image": Image.new("L", (64, 64), 255)}
    pipeline.set_progress_bar_config(disable=True)
    if kind == "sdxl-v":  # zero terminal SNR
        options["guidance_rescale"] = 0.7
    made = pipeline(prompts, num_inference_steps=6, latents=torch.stack(noise), **options)
    for mine, their in zip(ours, made.images, strict=True):
        mine, their = (np.asarray(image, dtype=np.int16) for image in (mine, their))
        assert abs(mine - their).max() <= 1
        assert mine.std() > 20
    assert np.abs(np.asarray(ours[0], dtype=np.int16) - np.asarray(ours[1])).max() > 50
