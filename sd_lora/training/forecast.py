"""A run's forecast: rates, schedule and device as lines, and warnings on settings that will not do
as meant. A run and `sd-lora check` show both, before anything is loaded."""

from collections.abc import Callable, Iterator, Sequence

from sd_lora.config.contradictions import why_idle
from sd_lora.config.schema import OPTIONS, RunConfig
from sd_lora.errors import counted
from sd_lora.findings import Finding
from sd_lora.training.optimizers import learning_rates
from sd_lora.training.plan import Plan
from sd_lora.training.processes import Device

LEAST_MOVE = 0.01
"""Steps × learning rate below which a run is taken for a mistake: AdamW moves a number by about the
rate a step, so no entry of B, which starts at 0, is beyond it. 0.01 is 100 steps at 1e-4; the
presets have 0.08 and more."""

USUAL_WIDTH = 320
"""Channels of the first blocks of Stable Diffusion's UNets; the refiner has 384."""


def forecast_rows(plan: Plan, components: Sequence[str], device: Device) -> dict[str, str]:
    """Rows of the summary: learning rates, schedule, device.

    components: those that learn.
    """
    config, given = plan.config, given_options(plan.config)
    rates = learning_rates(config, components, plan.samples_per_step)
    words = [f"{name} {rate:g}" for name, rate in rates.items()]
    words[-1] += " × the rate that it finds" * config.optimizer_facts.finds_rate
    rows = {
        "learning rate": ", ".join([*words, *given.get("learning rate", [])]),
        "schedule": ", ".join([_schedule(plan), *given.get("schedule", [])]),
        "device": device.text,
    }
    return rows


def _schedule(plan: Plan) -> str:
    """The schedule with its warm-up: "cosine after 50 steps of warm-up (0.1 of the run)"."""
    config = plan.config
    steps = config.num_warmup_steps(plan.num_steps)
    if not steps:
        return f"{config.lr_scheduler}, no warm-up"
    share = f" ({config.lr_warmup_steps:g} of the run)" * (config.lr_warmup_steps < 1)
    return f"{config.lr_scheduler} after {counted(steps, 'step')} of warm-up{share}"


def given_options(config: RunConfig) -> dict[str, list[str]]:
    """Row of the summary → texts of the options that are given, by their rows."""
    rows: dict[str, list[str]] = {}
    for name, option in OPTIONS.items():
        value = getattr(config, name)
        if option.summary and option.is_given(value):
            row, text = option.summary
            rows.setdefault(row, []).append(text.format(value))
    return rows


def warnings_of(plan: Plan, device: Device, width: int) -> list[Finding]:
    """All warnings on the settings of a planned run on a device.

    width: channels of the first blocks of the base's UNet.
    """
    findings = [finding for check in CHECKS for finding in check(plan)]
    findings += _narrow_base(plan, width)
    return [*findings, *_device(device), *_gpu_options(plan.config, device)]


def _long_warmup(plan: Plan) -> Iterator[Finding]:
    """A rate that is still rising when the run ends."""
    config, steps = plan.config, plan.num_steps
    warmup = config.num_warmup_steps(steps)
    if warmup < steps or not warmup:
        return
    rate = learning_rates(config, ["unet"], plan.samples_per_step)["unet"]
    reached = rate * (steps - 1) / warmup  # the first step has a rate of 0
    details = (
        f"{warmup} steps of warm-up, and the run has {steps}: the learning rate rises to "
        f"{reached:.2g} and never reaches {rate:g}"
    )
    yield Finding("warmup-too-long", "schedule", details)


def _without_effect(plan: Plan) -> Iterator[Finding]:
    """Options that are given and have no effect, by their rows."""
    config = plan.config
    for name, option in OPTIONS.items():
        value = getattr(config, name)
        if not (option.only_warns and value and option.is_given(value)):
            continue
        for other, why in zip(
            option.missing(config), why_idle(config, option, OPTIONS), strict=True
        ):
            users = " or ".join(map(str, option.requires.get(other) or ()))
            remedy = "leave it out"
            if users not in why:
                remedy += f", or take {other} {users}"
            yield Finding("no-effect", name, f"{value} has no effect {why}; {remedy}")


def _idle_objective(plan: Plan) -> Iterator[Finding]:
    """Options of noise and timesteps with a value that changes nothing."""
    config = plan.config
    images = plan.samples_per_step
    if config.bucket_leftovers != "repeat":  # else copies fill the batch
        images = min(images, len(plan.images.entries))
    for name, idle, why in (
        ("multires_noise_iterations", config.multires_noise_iterations == 1,
         "1 adds a noise as fine as the noise itself, which is plain noise again; take 6 to 10"),
        ("immiscible_noise", config.immiscible_noise == 1,
         "the nearest of 1 noise is that noise; take 4 to 16"),
        ("stratified_timesteps", config.stratified_timesteps and images == 1,
         "a step has 1 image, which has all the timesteps for itself; take a larger batch, or "
         "accumulate"),
    ):  # fmt: skip
        if idle:
            yield Finding("no-effect", name, why)


def _few_steps(plan: Plan) -> Iterator[Finding]:
    """A run too short to learn anything at its rate."""
    rates = learning_rates(plan.config, ["unet"], plan.samples_per_step)
    if plan.num_steps * max(rates.values()) >= LEAST_MOVE:
        return
    number, batch = len(plan.images.samples), plan.samples_per_step
    purpose, length = plan.config.default_length
    usual = length.num_steps(number, batch)
    details = (
        f"the run ends after {plan.num_steps} steps of {batch} images at a learning rate of "
        f"{max(rates.values()):g}, when a LoRA has hardly moved from zero"
    )
    if usual > plan.num_steps:
        details += f"; for a {purpose} of {number} images {usual} steps are usual: --steps {usual}"
    yield Finding("few-steps", "steps", details)


def _narrow_base(plan: Plan, width: int) -> Iterator[Finding]:
    """Rates of full-size models with a small one, such as the embedded base.

    On the embedded base (48 channels), 400 steps on its subject at 1e-4 leave a plain monster, and
    the demo's recipe, at 2e-3 for UNet and text encoder, teaches hat, bands and feet.
    """
    rate = learning_rates(plan.config, ["unet"], plan.samples_per_step)["unet"]
    if width >= USUAL_WIDTH / 2 or rate >= 5e-4:
        return
    details = (
        f"{rate:g} suits Stable Diffusion's width, {USUAL_WIDTH} channels; this base has {width} "
        "and needs about 2e-3: --lr 2e-3 --text_encoder_lr 2e-3"
    )
    yield Finding("narrow-base", "learning rate", details)


def _large_batch(plan: Plan) -> Iterator[Finding]:
    """A step that asks for more images than an epoch has."""
    number, batch = len(plan.images.entries), plan.samples_per_step
    if batch <= number:
        return
    rest = LEFTOVERS[plan.config.bucket_leftovers]
    details = f"{batch} images a step are asked for, and an epoch has {number}: {rest}"
    yield Finding("batch-above-set", "batch", details)


LEFTOVERS = {
    "smaller": "each step has as many at most",
    "pad-batch": "the other places of each step are computed and count for nothing",
    "repeat": "each step has images more than once",
}
"""Handling of a batch that is not full → its meaning where no batch is."""

CHECKS: tuple[Callable[[Plan], Iterator[Finding]], ...] = (
    _long_warmup,
    _without_effect,
    _idle_objective,
    _few_steps,
    _large_batch,
)
"""Warnings that the plan alone gives."""


def _device(device: Device) -> Iterator[Finding]:
    """A precision that the device has not, and a card that is not used.

    30 steps of the embedded base took 28 s on a CPU in fp16, and 3 s in float32 (torch 2.13).
    """
    if device.type == "cpu" and device.precision == "fp16":
        details = (
            "fp16 on a CPU is about ten times as slow as float32, and without the scaling of the "
            "loss small gradients are lost"
        )
        yield Finding("fp16-on-cpu", "device", details)
    if device.unseen_card:
        yield Finding("card-not-seen", "device", device.unseen_card)


def _gpu_options(config: RunConfig, device: Device) -> Iterator[Finding]:
    """Options for GPUs on a CPU, by their rows."""
    if device.type != "cpu":
        return
    for name, option in OPTIONS.items():
        if effect := option.effect_without_gpu(getattr(config, name)):
            yield Finding("gpu-option", name, f"on a CPU it {effect}")
