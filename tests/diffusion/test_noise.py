"""Noise and its changes, in closed form, by address."""

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor
from torch.nn import functional as F

from sd_lora.diffusion.noise import CHANGES, Noise
from sd_lora.diffusion.schedule import NoiseSchedule
from sd_lora.seeds import Address, generator_for, uniform

A, B = (0, "instance", "position", 3), (0, "instance", "position", 4)
EVERYTHING = Noise(4, 0.1, True, 0.5, 6, 0.4, 0.1, True)


def latents(count: int = 2, size: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return 2 * torch.randn(count, 4, size, size, generator=generator) + 1


def normal(address: Address, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator_for(*address))


@pytest.mark.parametrize("noise", [Noise(), EVERYTHING])
def test_draws_are_functions_of_their_address(noise: Noise) -> None:
    """An item's noise does not depend on its batch, with all changes at once too; other addresses
    differ; plain noise is standard normal."""
    x0 = latents()
    both = noise.draw(x0, [A, B])
    assert torch.equal(noise.draw(x0[1:], [B])[0], both[1])
    assert not torch.equal(both[0], noise.draw(x0[:1], [B])[0])
    assert torch.equal(noise.in_input(both, [A, B])[1], noise.in_input(both[1:], [B])[0])
    assert torch.isfinite(both).all()
    many = Noise().draw(torch.empty(64, 4, 32, 32), [(0, i) for i in range(64)])
    assert abs(float(many.mean())) < 0.01
    assert abs(float(many.std()) - 1) < 0.01
    assert set(CHANGES) <= set(Noise.__dataclass_fields__)


@pytest.mark.parametrize("adaptive", [0.0, 0.5, -1.0])
@pytest.mark.parametrize("random", [False, True])
def test_offset_noise(adaptive: float, random: bool) -> None:
    """Offset noise is the plain noise plus a strength times one normal draw a channel: the given
    strength, or a share of it, plus the adaptive scale times the size of the channel's mean
    latent, not below 0 (sd-scripts' apply_noise_offset)."""
    x0 = latents()
    noise = Noise(offset=0.3, offset_random=random, offset_adaptive=adaptive)
    ours = noise.draw(x0, [A, B])
    for item, address, latent in zip(ours, (A, B), x0, strict=True):
        generator = generator_for(*address, "noise")
        plain = torch.randn(4, 8, 8, generator=generator)
        draw = torch.randn(4, 1, 1, generator=generator)
        share = uniform(*address, "offset strength") if random else 1.0
        size = latent.mean((1, 2), keepdim=True).abs()
        wanted = plain + (0.3 * share + adaptive * size).clamp(min=0) * draw
        torch.testing.assert_close(item, wanted, rtol=0, atol=1e-6)


def test_pyramid_noise() -> None:
    """Pyramid noise is the plain noise plus noises of ever fewer pixels, drawn to full size and
    discounted (sd-scripts' pyramid_noise_like), with standard deviation 1: more of it in the mean
    of a channel, and no more levels than down to one pixel."""
    noise = Noise(pyramid=3, pyramid_discount=0.4)
    x0 = torch.empty(1, 4, 16, 24)
    wanted = normal((*A, "noise"), 4, 16, 24)
    for number in range(3):
        ratio = (2 + 2 * uniform(*A, "pyramid", number, "ratio")) ** number
        coarse = normal((*A, "pyramid", number), 1, 4, int(16 / ratio), int(24 / ratio))
        wanted = wanted + 0.4**number * F.interpolate(coarse, (16, 24), mode="bilinear")[0]
    torch.testing.assert_close(noise.draw(x0, [A])[0], wanted / wanted.std(), rtol=0, atol=1e-6)
    many = [(0, i) for i in range(200)]
    means = [
        Noise(pyramid=levels).draw(torch.empty(200, 4, 16, 24), many).mean((2, 3)).std()
        for levels in (0, 8)
    ]
    assert means[1] > 1.5 * means[0]
    deep = [Noise(pyramid=levels).draw(x0, [A]) for levels in (8, 100)]
    assert torch.equal(*deep)


def test_input_perturbation_is_in_the_input_alone() -> None:
    """The UNet's input is that of DDPMScheduler.add_noise for ε + γ·ξ (diffusers'
    train_text_to_image.py, `--input_perturbation`), at the first, middle and last timestep; the
    target's noise is ε; γ is a share of the strength if it is random."""
    scheduler = DDPMScheduler(beta_schedule="scaled_linear")
    schedule, t = NoiseSchedule.of(scheduler), torch.tensor([0, 500, 999])
    places, x0 = [A, B, (1, "x")], latents(3)
    for random in (False, True):
        noise = Noise(perturbation=0.1, perturbation_random=random)
        drawn = noise.draw(x0, places)
        assert torch.equal(drawn, Noise().draw(x0, places))
        second = torch.stack([normal((*place, "perturbation"), 4, 8, 8) for place in places])
        if random:
            shares = [uniform(*place, "perturbation strength") for place in places]
            second = second * torch.tensor(shares).view(3, 1, 1, 1)
        wanted = scheduler.add_noise(x0, drawn + 0.1 * second, t)
        ours = schedule.add_noise(x0, noise.in_input(drawn, places), t)
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)
    assert noise.in_input(drawn, places).dtype == drawn.dtype


def test_immiscible_noise_is_the_nearest() -> None:
    """Of several noises, the first of which is the plain one, the one at the least distance from
    the latents is taken; more of them lie nearer, and each is a standard normal draw."""
    x0, places = latents(100), [(0, i) for i in range(100)]
    distances = []
    for candidates in (1, 4, 16):
        ours = Noise(candidates=candidates).draw(x0, places)
        for item, latent, place in zip(ours, x0, places, strict=True):
            drawn = [normal((*place, "noise"), 4, 8, 8)]
            drawn += [normal((*place, "noise", n), 4, 8, 8) for n in range(1, candidates)]
            wanted = min(drawn, key=lambda noise: float((noise - latent).square().sum()))
            assert torch.equal(item, wanted)
        distances.append(float((ours - x0).flatten(1).norm(dim=1).mean()))
    assert distances[0] > distances[1] > distances[2]
    assert torch.equal(Noise(candidates=1).draw(x0, places), Noise().draw(x0, places))
