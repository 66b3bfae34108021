"""The objective of a run, of its options and its base's scheduler."""

from functools import partial

from sd_lora.config.schema import RunConfig
from sd_lora.diffusion.loss import Loss
from sd_lora.diffusion.noise import Noise
from sd_lora.diffusion.objective import Objective
from sd_lora.diffusion.schedule import NoiseSchedule
from sd_lora.diffusion.timesteps import SizeShift, Timesteps, root_shift
from sd_lora.diffusion.uncertainty import Uncertainty
from sd_lora.errors import UsageError
from sd_lora.models.load import Parts
from sd_lora.models.noise_scheduler import dynamic_shift


def objective_of(config: RunConfig, parts: Parts, resolution: int) -> Objective:
    """Noise levels, timesteps, noise, loss and its learned weights.

    resolution: side in pixels of the base's own training images.

    Raises:
        UsageError: timesteps that the model does not have, or two shifts by size.
    """
    weighting, parameters = config.weighting
    schedule = NoiseSchedule.of(parts.scheduler, weighting, **parameters)
    first, last = trained_timesteps(config, parts, schedule)
    return Objective(
        schedule,
        Timesteps(
            first,
            last,
            *config.timestep_distribution,
            config.timestep_shift,
            config.stratified_timesteps,
            size_shift(config, parts, resolution),
        ),
        Noise(**config.noise),
        Loss.of(schedule, *config.loss),
        Uncertainty(schedule, first, last) if config.edm2_loss_weighting else None,
    )


def size_shift(config: RunConfig, parts: Parts, resolution: int) -> SizeShift | None:
    """The shift of timesteps by an image's size: of the base's scheduler, or as asked for.

    Raises:
        UsageError: both.
    """
    of_base = parts.scheduler.config
    if not of_base.get("use_dynamic_shifting"):
        return partial(root_shift, reference=resolution**2) if config.resolution_shift else None
    if config.resolution_shift:
        raise UsageError(
            "resolution_shift: the base's scheduler shifts its noise levels by an image's size by "
            "itself (use_dynamic_shifting). Leave it out, or give a flow_shift, the same for all"
        )
    return lambda pixels: dynamic_shift(of_base, pixels) / of_base["flow_shift"]


def trained_timesteps(config: RunConfig, parts: Parts, schedule: NoiseSchedule) -> tuple[int, int]:
    """The first timestep that is trained, and the one after the last."""
    num = schedule.num_timesteps
    last = config.max_timestep or min(num, parts.family.max_timestep or num)
    if not config.min_timestep < last <= num:
        raise UsageError(
            f"timesteps from min_timestep {config.min_timestep} to max_timestep {last}: the model "
            f"has {num}, and max_timestep must be above min_timestep"
        )
    return config.min_timestep, last
