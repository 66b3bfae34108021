"""Options of the objective, and of the sample images that show it."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from sd_lora.config.rows import SAME, Section, by_mode, section
from sd_lora.errors import Problem

if TYPE_CHECKING:
    from sd_lora.config.schema import TrainConfig

option = section("objective")


class ObjectiveOptions(Section):
    """Prediction, timesteps, loss weights and noise."""

    # fmt: off
    prediction_type: str | None = option(None,
        "prediction of the model; its scheduler's type if not given",
        choices=("epsilon", "v_prediction"), scripts="AB", kohya="v_parameterization",
        simpletuner=SAME, ai_toolkit="model.is_v_pred")
    rescale_betas_zero_snr: bool | None = option(None,
        "end the schedule in pure noise (zero terminal SNR), for v-prediction models trained "
        "this way; the base's scheduler decides if not given",
        kohya="zero_terminal_snr", onetrainer="rescale_noise_scheduler_to_zero_terminal_snr",
        simpletuner=SAME)
    do_edm_style_training: bool = option(False,
        "weight the losses as EDM does: by SNR / (SNR + 1) for v-prediction, without effect "
        "for epsilon; EDM models are always trained so",
        scripts="D", kohya="scale_v_pred_loss_like_noise_pred")
    min_timestep: int = option(0,
        "first trained timestep",
        ge=0, header="ss_min_timestep", header_form="if given", kohya=SAME,
        onetrainer="min_noising_strength", ai_toolkit="train.min_denoising_steps")
    max_timestep: int | None = option(None,
        "end of the trained timesteps, itself not trained; 1000, for SDXL's refiner 200, if "
        "not given",
        ge=1, kohya=SAME, onetrainer="max_noising_strength",
        ai_toolkit="train.max_denoising_steps")
    snr_gamma: float | None = option(None,
        "gamma of min-SNR weighting; 5 is usual; off if not given",
        gt=0, header="ss_min_snr_gamma", scripts="ABD", kohya="min_snr_gamma",
        onetrainer="loss_weight_strength", simpletuner=SAME, ai_toolkit="train.min_snr_gamma")
    noise_offset: float = option(0.0,
        "strength of a constant added to each noise channel; 0.05 to 0.1 for darker darks",
        ge=0, header="ss_noise_offset", header_form="if given", scripts="AB", kohya=SAME,
        onetrainer="offset_noise_weight", simpletuner=SAME, ai_toolkit="train.noise_offset")
    # fmt: on

    @property
    def weighting(self) -> tuple[str, dict[str, float]]:
        """Name and parameters of the loss weighting, a row of `weightings.WEIGHTINGS`."""
        if self.snr_gamma is not None:
            return "min_snr", {"gamma": self.snr_gamma}
        return ("edm_style" if self.do_edm_style_training else "uniform"), {}


option = section("validation")


class ValidationOptions(Section):
    """Sample images."""

    # fmt: off
    validation_prompt: str | None = option(None,
        "prompt of the sample images; the training prompts if not given",
        may_change=True, scripts="ABCD", kohya="sample_prompts", onetrainer="samples",
        simpletuner=SAME, ai_toolkit="sample.prompts",
        main="prompt of the sample images")
    num_validation_images: int = option(4,
        "sample images before, during and after training, and with class images one more of the "
        "class; 0 for none",
        ge=0, may_change=True, scripts="ABCD", simpletuner=SAME)
    validation_epochs: int = option(None,
        "epochs between samples during training, if validation_prompt is given",
        ge=1, modes=by_mode(1, 50), may_change=True, scripts="ABCD",
        kohya="sample_every_n_epochs", simpletuner="validation_epoch_interval")
    validation_steps: int = option(25,
        "sampler steps of the sample images (DPM-Solver++)",
        ge=1, may_change=True, simpletuner="validation_num_inference_steps",
        ai_toolkit="sample.sample_steps")
    validation_guidance_scale: float = option(7.5,
        "guidance scale of the sample images",
        may_change=True, simpletuner="validation_guidance", ai_toolkit="sample.guidance_scale")
    # fmt: on


MOST_SAMPLER_STEPS = 200
"""DPM-Solver++ needs 20 to 50; above, other trainers' steps between samples are meant."""


def contradictions(config: "TrainConfig") -> Iterator[Problem]:
    """Yield an empty range of timesteps, two weightings, and a prompt of no sample images."""
    if config.max_timestep is not None and config.max_timestep <= config.min_timestep:
        yield Problem("max_timestep", "max_timestep must be above min_timestep")
    if config.do_edm_style_training and config.snr_gamma is not None:
        text = "do_edm_style_training excludes snr_gamma: each weights the losses"
        yield Problem("do_edm_style_training", text)
    if config.validation_steps > MOST_SAMPLER_STEPS:
        text = (
            f"validation_steps {config.validation_steps} is a number of sampler steps, of each "
            f"sample image, and more than {MOST_SAMPLER_STEPS} add nothing"
        )
        yield Problem("validation_steps", text, "The time between samples: validation_epochs")
    if config.validation_prompt and not config.num_validation_images:
        text = "validation_prompt has no effect with num_validation_images 0"
        yield Problem("validation_prompt", text, "Leave it out")
