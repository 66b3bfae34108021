"""Distributions of timesteps against diffusers and closed forms; stratified draws."""

import math
from functools import partial

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.training_utils import compute_density_for_timestep_sampling
from torch import Tensor

from sd_lora.config.schema import OPTIONS
from sd_lora.diffusion.timesteps import DISTRIBUTIONS, Timesteps, root_shift, shifted
from sd_lora.models.noise_scheduler import dynamic_shift
from sd_lora.seeds import seed_for

PARAMETERS = {
    "logit_normal": {"mean": -0.5, "std": 0.8},
    "mode": {"scale": 1.29},
    "beta": {"alpha": 1.5, "beta": 3.0},
}


def addresses(count: int, seed: int = 0) -> list[tuple[int | str, ...]]:
    """Addresses of batch items, as the stream makes them."""
    return [(seed, "instance", "position", position) for position in range(count)]


def strata(count: int, batch: int) -> list[tuple[int, int]]:
    """Index in the step and samples of it, for steps of `batch` samples."""
    return [(position % batch, batch) for position in range(count)]


def test_draws_are_functions_of_their_address() -> None:
    """A timestep does not depend on its batch; uniform ones are the address's seed modulo their
    number, as they have been in all versions; the others fill their range."""
    a, b = addresses(2)
    uniform = Timesteps(3, 1000)
    assert torch.equal(uniform.draw([b])[0], uniform.draw([a, b])[1])
    many = addresses(2000)
    assert uniform.draw(many).tolist() == [seed_for(*m, "timestep") % 997 + 3 for m in many]
    for name in DISTRIBUTIONS:
        for stratified in (False, True):
            ours = Timesteps(100, 200, name, PARAMETERS.get(name, {}), 1.5, stratified)
            assert torch.equal(ours.draw([b], [(1, 2)])[0], ours.draw([a, b], [(0, 2), (1, 2)])[1])
            drawn = ours.draw(many, strata(2000, 5))
            assert 100 <= drawn.min() <= drawn.max() < 200
            assert drawn.max() - drawn.min() > 80
    assert set(OPTIONS["timestep_sampling"].choices) == set(DISTRIBUTIONS)


def cumulative(name: str, x: Tensor) -> Tensor:
    """The share of a distribution below x in closed form, its density integrated by hand."""
    z = (torch.logit(x) + 0.5) / 0.8
    beta = 1 - (1 - x) ** 4 * (1 + 4 * x)  # of alpha 2 and beta 4
    return {
        "uniform": x,
        "logit_normal": (1 + torch.erf(z / math.sqrt(2))) / 2,
        "cosmap": 2 / math.pi * torch.atan(x / (1 - x)),
        "cubic": 1 - (1 - x) ** (1 / 3),
        "cubic_reversed": x ** (1 / 3),
        "beta": beta,
    }[name]


@pytest.mark.parametrize("name", [name for name in DISTRIBUTIONS if name != "mode"])
def test_quantiles_are_the_closed_forms(name: str) -> None:
    """Near the first timestep, in the middle and near the last, the share of draws below is the
    integral of the paper's density, to 1e-6; all quantiles lie in [0, 1] and grow with u."""
    parameters = {"beta": {"alpha": 2.0, "beta": 4.0}}.get(name, PARAMETERS.get(name, {}))
    quantile = DISTRIBUTIONS[name].quantile
    x = torch.tensor([0.005, 0.25, 0.5, 0.75, 0.98], dtype=torch.float64)
    torch.testing.assert_close(quantile(cumulative(name, x), **parameters), x, rtol=0, atol=1e-6)
    ends = quantile(torch.linspace(0, 1, 1001, dtype=torch.float64), **parameters)
    assert 0 <= ends[0] < 1e-9 < 1 - 1e-9 < ends[-1] <= 1
    assert (ends.diff() >= 0).all()


@pytest.mark.parametrize("name", ["logit_normal", "mode"])
def test_distributions_are_diffusers(name: str) -> None:
    """Drawn by compute_density_for_timestep_sampling of diffusers, the shares have our quantiles:
    its own numbers for mode to 1e-6, of as many draws for logit_normal within their error."""
    given = PARAMETERS[name]
    theirs = compute_density_for_timestep_sampling(
        name, 200_000, given.get("mean"), given.get("std"), given.get("scale"),
        generator=torch.Generator().manual_seed(0),
    ).double()  # fmt: skip
    u = torch.rand(200_000, generator=torch.Generator().manual_seed(0)).double()
    if name == "mode":
        ours = DISTRIBUTIONS[name].quantile(1 - u, **given)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    levels = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
    ours = DISTRIBUTIONS[name].quantile(levels, **given)
    torch.testing.assert_close(ours, theirs.quantile(levels), rtol=0, atol=5e-3)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_shift_is_the_flow_schedulers(shift: float) -> None:
    """The shift is FlowMatchEulerDiscreteScheduler's, of its sigmas from 1 to 1/1000."""
    scheduler = FlowMatchEulerDiscreteScheduler(1000, shift=shift)
    plain = torch.linspace(1, 1000, 1000, dtype=torch.float64).flip(0) / 1000
    ours = shifted(plain, shift)
    torch.testing.assert_close(ours.float(), scheduler.sigmas[:1000], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_a_shift_by_size_is_the_flow_schedulers(kind: str) -> None:
    """An image of another size than the noise levels are made for has the levels of
    FlowMatchEulerDiscreteScheduler for its size: the table's shift, and its own beside it."""
    scheduler = FlowMatchEulerDiscreteScheduler(
        1000, use_dynamic_shifting=True, max_shift=2.0, time_shift_type=kind
    )
    of_table = dynamic_shift(scheduler.config, 1024 * 1024)
    plain = torch.linspace(1, 1000, 1000, dtype=torch.float64).flip(0) / 1000
    for pixels in (512 * 512, 1024 * 1024, 1216 * 832):
        scheduler.set_timesteps(
            sigmas=plain.tolist(), mu=calculate_shift(pixels / 256, 256, 4096, 0.5, 2.0)
        )
        of_image = shifted(plain, dynamic_shift(scheduler.config, pixels) / of_table)
        ours = shifted(of_image, of_table).float()
        torch.testing.assert_close(ours, scheduler.sigmas[:1000], rtol=0, atol=1e-6)


def test_a_shift_by_the_root_of_the_pixels_keeps_the_noise_of_their_mean() -> None:
    """Of constant images of m and n pixels, the noise of the mean at the shifted and at the plain
    time is the same, t / (1 − t) / √pixels (Esser et al. 2024, section 5.3.2); timesteps are drawn
    by each image's own size."""
    plain = torch.tensor([0.01, 0.3, 0.9], dtype=torch.float64)
    t = shifted(plain, root_shift(1024**2, 512**2))
    torch.testing.assert_close(t / (1 - t) / 1024, plain / (1 - plain) / 512)
    of_size = Timesteps(0, 1000, shift=1.5, size_shift=partial(root_shift, reference=512**2))
    drawn = of_size.draw(addresses(3), pixels=[512**2, 1024**2, 256**2])
    alone = [Timesteps(0, 1000, shift=shift).draw(addresses(3)) for shift in (1.5, 3.0, 0.75)]
    assert drawn.tolist() == [int(alone[i][i]) for i in range(3)]


def test_the_samples_of_a_step_share_the_timesteps() -> None:
    """Of n samples one falls into each n-th of the timesteps, for every n and kind; each sample
    alone is uniform over seeds, and a filling is drawn without a stratum."""
    stratified = Timesteps(0, 840, stratified=True)
    for n in range(1, 9):
        t = stratified.draw(addresses(20 * n), strata(20 * n, n)).view(20, n)
        assert torch.equal((t * n // 840).sort(1).values, torch.arange(n).expand(20, n))
        assert n == 1 or len({tuple(row.argsort().tolist()) for row in t}) > n / 2
    alone = [stratified.draw([(seed, "x", 3)], [(1, 3)]) for seed in range(2000)]
    counts = torch.histc(torch.cat(alone).float(), 8, 0, 840)
    assert ((counts - 250) ** 2 / 250).sum() < 24.3  # χ², 0.1 % of 7 degrees of freedom
    filling = [(0, "instance", "position", "3 + 1")]
    assert torch.equal(stratified.draw(filling, [None]), Timesteps(0, 840).draw(filling))


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 8])
def test_stratified_draws_vary_less(batch: int) -> None:
    """The variance of a batch's mean loss by its timesteps falls by the square of the number of
    samples for a loss that is a straight line in t, as docs/objectives.md states."""
    places = addresses(1500 * batch), strata(1500 * batch, batch)
    variances = [
        Timesteps(0, 1000, stratified=on).draw(*places).double().view(-1, batch).mean(1).var()
        for on in (False, True)
    ]
    assert 0.8 < float(variances[0] / variances[1]) / batch**2 < 1.25
