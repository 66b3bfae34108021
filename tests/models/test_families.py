"""The table of families: each row is whole, and its components are those of diffusers."""

import diffusers
import pytest

from sd_lora.models.families import FAMILIES
from sd_lora.models.load import find_base
from sd_lora.models.meta_pipeline import MetaPipeline
from sd_lora.models.published_configs import CONFIGS


@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_names_its_components(name: str) -> None:
    """Components are the denoiser and the text encoders; each has a prefix of kohya's and a
    published configuration, and is a part of the family's pipelines."""
    family = FAMILIES[name]
    assert family.components == (family.denoiser, *family.text_encoders)
    assert set(family.kohya_prefixes) == set(family.components)
    assert set(CONFIGS[name]) == set(family.components)
    for pipeline in family.pipelines.values():
        parts = getattr(diffusers, pipeline)._get_signature_keys(getattr(diffusers, pipeline))[0]
        assert set(family.components) <= set(parts)
    assert set(MetaPipeline.of_family(family).configs) == set(family.components)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_names_its_noise_schedule(name: str) -> None:
    """The schedule's class takes the row's arguments, and `max_timestep` lies within its steps."""
    family = FAMILIES[name]
    arguments = dict(family.noise_schedule)
    scheduler = getattr(diffusers, arguments.pop("_class_name"))(**arguments)
    assert len(scheduler.alphas_cumprod) == 1000
    assert (family.max_timestep or 1000) <= scheduler.config.num_train_timesteps


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_base_tells_its_factors(family: str, request: pytest.FixtureRequest) -> None:
    """A latent of the test's VAE spans as many pixels as encoding shows, and the sides of latents
    divide by the UNet's multiple after each of its halvings."""
    base = find_base(str(request.getfixturevalue(f"tiny_{family}")))
    parts = base.load()
    assert base.pixels_per_latent == parts.pixels_per_latent
    halvings = sum(block.downsamplers is not None for block in parts.unet.down_blocks)
    assert base.latent_multiple == 2**halvings
    halvings = sum(block.downsamplers is not None for block in parts.vae.encoder.down_blocks)
    assert base.pixels_per_latent == 2**halvings
