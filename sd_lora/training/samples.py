"""Sample images that a run draws: before, during and after training."""

import itertools

from PIL import Image

from sd_lora.data.batches.caption_rules import longest_form
from sd_lora.report.events import SamplesDrawn
from sd_lora.report.sheets import grid, write_image
from sd_lora.sampling.sampler import can_generate_images, sample
from sd_lora.training.run import Run


def prompts_of(run: Run) -> list[str]:
    """Distinct prompts to draw samples of: the one given, or captions, at least one."""
    config = run.config
    prompt = config.validation_prompt or config.instance_prompt
    if prompt:
        return [prompt]
    samples = run.images.instances.samples
    captions = (longest_form(s.captions, s.source.rules)[0] for s in samples)
    return list(itertools.islice(dict.fromkeys(captions), max(1, config.num_validation_images)))


def sample_prompts(run: Run) -> list[str]:
    """Prompts of the sample images, one each."""
    count = run.config.num_validation_images
    return list(itertools.islice(itertools.cycle(prompts_of(run)), count))


def draw_samples(run: Run) -> list[Image.Image]:
    """Sample images of the model as it is now, with seeds 0, 1, 2, …; none on other processes than
    the main one."""
    prompts = sample_prompts(run)
    if not prompts or not run.main or not can_generate_images(run.parts.family):
        return []
    images = sample(
        run.parts,
        run.text.caption_encoder,
        prompts,
        range(len(prompts)),
        resolution=run.images.crop_settings.resolution,
        device=run.accelerator.device,
        steps=run.config.validation_steps,
        guidance_scale=run.config.validation_guidance_scale,
        batch_size=min(4, run.config.train_batch_size),  # training has room for it
    )
    return list(images)


def samples_are_due(run: Run, step: int) -> bool:
    """Whether an epoch that asks for samples ends with this step; never at the run's end."""
    every = run.config.validation_epochs * run.plan.epochs.num_steps
    crossed = int(step / every) > int((step - 1) / every)
    return bool(run.config.validation_prompt) and crossed and step < run.plan.num_steps


def show_samples(run: Run, step: int) -> None:
    """Draw sample images in mid-run, and write their sheet."""
    images = draw_samples(run)
    if images:
        prompts = sample_prompts(run)
        path = run.output_dir / "samples" / f"step-{step:06}.png"
        write_image(path, grid([images], [f"step {step}"], prompts))
        run.emit(SamplesDrawn(step, prompts, images, path))
    run.accelerator.wait_for_everyone()
