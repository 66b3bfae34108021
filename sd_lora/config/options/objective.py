"""Options of the objective, and of the sample images that show it."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd_lora.config.options.validation import ValidationLossOptions
from sd_lora.config.rows import SAME, Section, by_mode, section
from sd_lora.config.sample_prompts import MOST_SAMPLER_STEPS, SamplePrompt, read_prompts
from sd_lora.errors import Problem, UsageError

if TYPE_CHECKING:
    from sd_lora.config.schema import TrainConfig

option = section("objective")

HUBER = ("huber", "smooth_l1")
"""Losses with a threshold between small and large errors."""


class ObjectiveOptions(Section):
    """Prediction, timesteps, loss weights and noise."""

    # fmt: off
    prediction_type: str | None = option(None,
        "prediction of the model; its scheduler's type if not given",
        of_all_jobs=True,
        choices=("epsilon", "v_prediction", "sample", "flow_prediction"), scripts="AB",
        kohya="v_parameterization", simpletuner=SAME, ai_toolkit="model.is_v_pred")
    rescale_betas_zero_snr: bool | None = option(None,
        "end the schedule in pure noise (zero terminal SNR), for v-prediction models trained "
        "this way; the base's scheduler decides if not given",
        of_all_jobs=True,
        kohya="zero_terminal_snr", onetrainer="rescale_noise_scheduler_to_zero_terminal_snr",
        simpletuner=SAME)
    flow_shift: float | None = option(None,
        "shift of the noise levels of an SDXL base tuned to flow matching; its scheduler's, or 1, "
        "if not given",
        of_all_jobs=True, gt=0, summary=("objective", "flow shift {:g}"))
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
    timestep_sampling: str = option("uniform",
        "how often each timestep is trained: all alike; the middle most often (logit_normal, "
        "mode, cosmap); much noise (cubic) or little (cubic_reversed); beta for any of these",
        choices=("uniform", "logit_normal", "mode", "cosmap", "cubic", "cubic_reversed", "beta"))
    logit_mean: float = option(0.0,
        "middle of logit_normal: above 0 for more noise, below for less",
        requires={"timestep_sampling": ("logit_normal",)})
    logit_std: float = option(1.0,
        "width of logit_normal: smaller for the middle alone",
        gt=0, requires={"timestep_sampling": ("logit_normal",)})
    mode_scale: float = option(1.29,
        "strength of mode: from -1, more of both ends, to 1.75, more of the middle",
        ge=-1, lt=1.752, requires={"timestep_sampling": ("mode",)})
    timestep_alpha: float = option(2.0,
        "alpha of beta: larger for less of the clean end",
        ge=0.5, requires={"timestep_sampling": ("beta",)})
    timestep_beta: float = option(2.0,
        "beta of beta: larger for less of the noisy end",
        ge=0.5, requires={"timestep_sampling": ("beta",)})
    timestep_shift: float = option(1.0,
        "move the timesteps to more noise by a factor above 1, to less by one below",
        gt=0)
    resolution_shift: bool = option(False,
        "move each image's timesteps to more noise by the root of its pixels over those of the "
        "base's own resolution, and to less for smaller ones")
    stratified_timesteps: bool = option(False,
        "share the timesteps evenly among the images of a batch, so that its loss varies less")
    snr_gamma: float | None = option(None,
        "gamma of min-SNR weighting; 5 is usual; off if not given",
        gt=0, header="ss_min_snr_gamma", scripts="ABD", kohya="min_snr_gamma",
        onetrainer="loss_weight_strength", simpletuner=SAME, ai_toolkit="train.min_snr_gamma")
    soft_min_snr_gamma: float | None = option(None,
        "gamma of soft min-SNR weighting, without the corner of min-SNR; 4 is usual; off if not "
        "given",
        gt=0)
    debiased_estimation_loss: bool = option(False,
        "weight the losses by 1 / sqrt(SNR), of the noise's error: more for noisy timesteps",
        header="ss_debiased_estimation")
    p2_gamma: float | None = option(None,
        "gamma of P2 weighting, which counts nearly clean images less; 1 is usual; off if not "
        "given",
        gt=0)
    loss_weights_file: str | None = option(None,
        "CSV file of loss weights by timestep: lines of timestep,weight, with straight lines "
        "between them")
    edm2_loss_weighting: bool = option(False,
        "learn the weight of each timestep beside the LoRA, so that all come to weigh alike (EDM2)")
    loss_type: str = option("l2",
        "loss of each element: squared, absolute, or squared for small errors and absolute for "
        "large ones (huber, smooth_l1)",
        choices=("l2", "l1", "huber", "smooth_l1"), header="ss_loss_type",
        summary=("objective", "{} loss"), kohya=SAME, simpletuner=SAME)
    huber_schedule: str = option("snr",
        "threshold between small and large errors by timestep: from 1 where the image is clean to "
        "huber_c in pure noise (snr, exponential), or huber_c always",
        choices=("snr", "exponential", "constant"), requires={"loss_type": HUBER},
        header="ss_huber_schedule",
        summary=("objective", "threshold {}"), kohya=SAME, simpletuner=SAME)
    huber_c: float = option(0.1,
        "threshold between small and large errors in pure noise",
        gt=0, requires={"loss_type": HUBER}, header="ss_huber_c",
        summary=("objective", "c {:g}"), kohya=SAME, simpletuner=SAME)
    huber_scale: float = option(1.0,
        "factor of the threshold of exponential and constant",
        gt=0, requires={"loss_type": HUBER, "huber_schedule": ("exponential", "constant")},
        summary=("objective", "scale {:g}"), kohya=SAME)
    unmasked_weight: float = option(0.0,
        "weight in the loss of what masks leave out, beside 1 of the rest; 0.1 keeps some of the "
        "background",
        ge=0, lt=1, summary=("objective", "{:g} outside masks"), onetrainer=SAME)
    output_preservation: str | None = option(None,
        "keep the base's own answers, without class images: to captions with the class in the "
        "place of the trigger word, or to no caption (blank). Each step costs about three times "
        "as much",
        choices=("class", "blank"),
        summary=("objective", "answers to the {} caption preserved"))
    preservation_class: str | None = option(None,
        "words for the class, in the place of trigger_word: dog for 'sks dog'; with '{big|small} "
        "dog' others at each use",
        requires={"output_preservation": ("class",)},
        ai_toolkit="train.diff_output_preservation_class")
    preservation_sampler_steps: int = option(2,
        "steps in which the base draws, from noise, the image whose answer is preserved; 0 for "
        "your own image, noised",
        ge=0, requires={"output_preservation": None},
        summary=("objective", "drawn in {} steps"))
    preservation_weight: float = option(1.0,
        "weight of the preserved answers' loss",
        gt=0, requires={"output_preservation": None})
    noise_offset: float = option(0.0,
        "strength of a constant added to each noise channel; 0.05 to 0.1 for darker darks",
        ge=0, header="ss_noise_offset", header_form="if given", scripts="AB", kohya=SAME,
        onetrainer="offset_noise_weight", simpletuner=SAME, ai_toolkit="train.noise_offset")
    noise_offset_random_strength: bool = option(False,
        "draw the noise offset's strength between 0 and noise_offset for each image",
        requires={"noise_offset": None}, summary=("objective", "of random strength"), kohya=SAME)
    adaptive_noise_scale: float = option(0.0,
        "added to noise_offset, times the size of a channel's mean latent: more for images far "
        "from grey; below 0 for less",
        requires={"noise_offset": None}, header="ss_adaptive_noise_scale",
        header_form="if given", summary=("objective", "{:g} × the mean latent"), kohya=SAME)
    multires_noise_iterations: int = option(0,
        "noises added to the noise, the first as fine, each next one coarser (pyramid noise), at "
        "most; 6 to 10 is usual; 0 for none",
        ge=0, header="ss_multires_noise_iterations", header_form="if given",
        summary=("objective", "{} noises of a pyramid"), kohya=SAME)
    multires_noise_discount: float = option(0.3,
        "strength of each coarser noise by that of the one before",
        gt=0, lt=1, requires={"multires_noise_iterations": None},
        header="ss_multires_noise_discount",
        summary=("objective", "discount {:g}"), kohya=SAME)
    input_perturbation: float = option(0.0,
        "strength of a second noise in the input that the model is not to predict; 0.1 is usual",
        ge=0, header="ss_ip_noise_gamma", header_form="if given",
        summary=("objective", "input perturbation {:g}"), kohya="ip_noise_gamma",
        simpletuner=SAME)
    input_perturbation_random_strength: bool = option(False,
        "draw the input perturbation's strength between 0 and input_perturbation for each image",
        requires={"input_perturbation": None}, summary=("objective", "of random strength"),
        kohya="ip_noise_gamma_random_strength")
    immiscible_noise: int = option(0,
        "noises drawn for each image, of which the nearest to it is used; 4 to 16; 0 for one",
        ge=0, summary=("objective", "nearest of {} noises"), onetrainer="k_noise_sampling")
    # fmt: on

    @property
    def preserves(self) -> bool:
        """Whether each image goes through a step once more, for `output_preservation`."""
        return bool(self.output_preservation)

    @property
    def weighting(self) -> tuple[str, dict[str, Any]]:
        """Name and parameters of the loss weighting, a row of `weightings.WEIGHTINGS`."""
        for option, (name, parameters) in WEIGHTINGS.items():
            value = getattr(self, option)
            if value:
                return name, parameters(value)
        return "uniform", {}

    @property
    def timestep_distribution(self) -> tuple[str, dict[str, float]]:
        """Name and parameters of the distribution, a row of `timesteps.DISTRIBUTIONS`."""
        parameters = {
            "logit_normal": {"mean": self.logit_mean, "std": self.logit_std},
            "mode": {"scale": self.mode_scale},
            "beta": {"alpha": self.timestep_alpha, "beta": self.timestep_beta},
        }
        return self.timestep_sampling, parameters.get(self.timestep_sampling, {})

    @property
    def noise(self) -> dict[str, Any]:
        """Parameters of the noise, fields of `noise.Noise`."""
        return {
            "candidates": self.immiscible_noise,
            "offset": self.noise_offset,
            "offset_random": self.noise_offset_random_strength,
            "offset_adaptive": self.adaptive_noise_scale,
            "pyramid": self.multires_noise_iterations,
            "pyramid_discount": self.multires_noise_discount,
            "perturbation": self.input_perturbation,
            "perturbation_random": self.input_perturbation_random_strength,
        }

    @property
    def loss(self) -> tuple[str, str, float, float, float]:
        """Loss of each element: arguments of `loss.Loss.of`."""
        huber = (self.huber_schedule, self.huber_c, self.huber_scale)
        return self.loss_type, *huber, self.unmasked_weight


def read_loss_weights(path: str) -> list[tuple[float, float]]:
    """Points (timestep, weight) of a CSV file, by timestep; a first line without numbers is their
    names.

    Raises:
        ValueError: a file that cannot be read, or lines that are no points, as a clause.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    points: dict[float, float] = {}
    for number, line in enumerate(text.splitlines(), 1):
        cells = [cell.strip() for cell in line.split(",")]
        if cells == [""] or (number == 1 and cells[0].isidentifier()):
            continue
        try:
            timestep, weight = map(float, cells)
        except ValueError:
            raise ValueError(f"line {number} is no timestep,weight: {line!r:.60}") from None
        if not (timestep >= 0 and 0 <= weight < math.inf):
            raise ValueError(f"line {number} has a number below 0, or none: {line!r:.60}")
        if timestep in points:
            raise ValueError(f"line {number} has timestep {timestep:g} a second time")
        points[timestep] = weight
    if not any(points.values()):
        raise ValueError("has no weight above 0")
    return sorted(points.items())


WEIGHTINGS: dict[str, tuple[str, Callable[[Any], dict[str, Any]]]] = {
    "snr_gamma": ("min_snr", lambda gamma: {"gamma": gamma}),
    "soft_min_snr_gamma": ("soft_min_snr", lambda gamma: {"gamma": gamma}),
    "debiased_estimation_loss": ("debiased", lambda on: {}),
    "p2_gamma": ("p2", lambda gamma: {"gamma": gamma}),
    "loss_weights_file": (
        "table", lambda path: {"points": read_loss_weights(path), "file": Path(path).name}),
    "do_edm_style_training": ("edm_style", lambda on: {}),
    "edm2_loss_weighting": ("uniform", lambda on: {}),  # `uncertainty.Uncertainty` learns its own
}  # fmt: skip
"""Option that asks for a weighting → its row in `weightings.WEIGHTINGS`, and its parameters."""


option = section("validation")


class ValidationOptions(ValidationLossOptions):
    """Sample images, and the validation loss."""

    # fmt: off
    validation_prompt: str | None = option(None,
        "prompt of the sample images; the training prompts if not given",
        may_change=True, scripts="ABCD", simpletuner=SAME)
    sample_prompts: str | None = option(None,
        "prompts of the sample images, one image each: a .txt, .toml or .json file, or the lines "
        "themselves, such as a dog on a beach (docs/training.md#samples)",
        may_change=True, kohya=SAME, onetrainer="samples", ai_toolkit="sample.prompts",
        main="file of prompts with their size, seed, …", in_record="name")
    num_validation_images: int | None = option(None,
        "sample images before, during and after training, and with class images one more of the "
        "class; 0 for none; if not given, as many of 1 to 4 as keep those before and after below "
        "6 % of the time, and one in any case",
        less_memory={"drawing sample images": (1, 0)},
        ge=0, of_scripts=by_mode(4, 4), may_change=True, scripts="ABCD", simpletuner=SAME)
    sample_every: int | None = option(None,
        "steps between samples during training, 0 for none; if not given, as many as keep samples "
        "below 10 % of the time. Now: a file named sample in the output "
        "folder",
        ge=0, may_change=True, kohya="sample_every_n_steps",
        simpletuner="validation_step_interval", ai_toolkit="sample.sample_every",
        main="steps between sample images")
    validation_epochs: int | None = option(None,
        "the same in epochs, if validation_prompt or sample_prompts is given",
        ge=1, of_scripts=by_mode(1, 50), may_change=True, scripts="ABCD",
        kohya="sample_every_n_epochs", simpletuner="validation_epoch_interval")
    validation_steps: int = option(25,
        "sampler steps of the sample images (DPM-Solver++)",
        ge=1, may_change=True, simpletuner="validation_num_inference_steps",
        ai_toolkit="sample.sample_steps")
    validation_guidance_scale: float = option(7.5,
        "guidance scale of the sample images",
        may_change=True, simpletuner="validation_guidance", ai_toolkit="sample.guidance_scale")
    validation_guidance_rescale: float | None = option(None,
        "share of the way by which guidance is scaled back to the contrast of the prediction "
        "without it (phi); 0.7 with zero terminal SNR, else 0, if not given",
        ge=0, le=1, may_change=True, simpletuner=SAME)
    # fmt: on

    @property
    def asked_prompts(self) -> list[SamplePrompt]:
        """The prompts of `sample_prompts`; none without. Raises UsageError for mistakes in them."""
        return read_prompts(self.sample_prompts) if self.sample_prompts else []

    @property
    def draws_samples(self) -> bool:
        """Whether any sample images are asked for."""
        return self.num_validation_images != 0

    @property
    def names_prompts(self) -> bool:
        """Whether samples have prompts of their own."""
        return bool(self.validation_prompt or self.sample_prompts)


def contradictions(config: "TrainConfig") -> Iterator[Problem]:
    """Yield an empty range of timesteps, two weightings, a preservation that cannot be, a file of
    weights that has none, and samples that cannot be drawn."""
    if config.max_timestep is not None and config.max_timestep <= config.min_timestep:
        yield Problem("max_timestep", "max_timestep must be above min_timestep")
    given = [option for option in WEIGHTINGS if getattr(config, option)]
    if len(given) > 1:
        text = f"{given[-1]} excludes {', '.join(given[:-1])}: each weights the losses"
        yield Problem(given[-1], text)
    yield from _preservation(config)
    if config.loss_weights_file:
        try:
            read_loss_weights(config.loss_weights_file)
        except ValueError as error:
            yield Problem(
                "loss_weights_file", f"loss_weights_file {config.loss_weights_file} {error}"
            )
    if config.validation_steps > MOST_SAMPLER_STEPS:
        text = (
            f"validation_steps {config.validation_steps} is a number of sampler steps, of each "
            f"sample image, and more than {MOST_SAMPLER_STEPS} add nothing"
        )
        yield Problem("validation_steps", text, "The time between samples: sample_every")
    yield from _samples(config)


def _samples(config: "TrainConfig") -> Iterator[Problem]:
    """Yield prompts of no sample images, two of their kinds, and mistakes in a file of them."""
    for name in ("validation_prompt", "sample_prompts"):
        if getattr(config, name) and not config.draws_samples:
            text = f"{name} has no effect with num_validation_images 0"
            yield Problem(name, text, "Leave it out")
    if config.sample_prompts and config.validation_prompt:
        text = "sample_prompts excludes validation_prompt: each says what the samples show"
        yield Problem("sample_prompts", text, "Give one of them")
    try:
        _ = config.asked_prompts
    except UsageError as error:
        yield Problem("sample_prompts", str(error))


def _preservation(config: "TrainConfig") -> Iterator[Problem]:
    if config.output_preservation == "class" and not config.preservation_class:
        text = "output_preservation class needs preservation_class, a word for the class: dog"
        yield Problem("preservation_class", text)
    if config.output_preservation and config.train_text_encoder:
        text = "output_preservation needs text encoders that do not learn"
        yield Problem("output_preservation", text, "Leave out train_text_encoder")
