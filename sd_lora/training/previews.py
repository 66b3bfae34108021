"""The images that a run draws as it goes: before, in between and after."""

import itertools

import numpy as np
from PIL import Image

from sd_lora.data.batches.caption_rules import longest_form
from sd_lora.report.sheets import grid, write_image
from sd_lora.sampling.sampler import can_generate_images, sample
from sd_lora.training.setup import Run


def sample_prompts(run: Run) -> list[str]:
    """Returns the prompts of the sample images: one each."""
    config, count = run.config, run.config.num_validation_images
    if config.validation_prompt:
        return [config.validation_prompt] * count
    if config.mode == "dreambooth" and config.instance_prompt:
        return [config.instance_prompt] * count
    samples = run.data.instances.samples
    written = (longest_form(s.captions, s.source.rules)[0] for s in samples)
    distinct = list(itertools.islice(dict.fromkeys(written), count))
    return [distinct[i % len(distinct)] for i in range(count)]


def sample_row(run: Run) -> list[Image.Image]:
    """Returns the run's sample images as the model draws them now, with seeds 0, 1, 2, …"""
    prompts = sample_prompts(run)
    if not prompts or not run.main or not can_generate_images(run.parts.family):
        return []
    images = sample(
        run.parts,
        run.texts.caption_encoder,
        prompts,
        range(len(prompts)),
        resolution=run.config.side,
        device=run.accelerator.device,
        steps=run.config.validation_steps,
        guidance_scale=run.config.validation_guidance_scale,
        batch_size=min(4, run.config.train_batch_size),  # what training has room for
    )
    return list(images)


def validate(run: Run, step: int) -> None:
    """Draws the sample images after an epoch that asks for them."""
    every = run.config.validation_epochs * run.plan.epochs.num_steps
    due = int(step / every) > int((step - 1) / every)
    if not run.config.validation_prompt or not due or step == run.plan.num_steps:
        return
    images = sample_row(run)
    if images:
        sheet = grid([images], [f"step {step}"], sample_prompts(run))
        path = run.output_dir / "samples" / f"step-{step:06}.png"
        write_image(path, sheet)
        array = np.stack([np.asarray(p) for p in images])  # (N, H, W, 3)
        layout = {"tensorboard": {"dataformats": "NHWC"}, "wandb": {}}
        for tracker in run.accelerator.trackers:
            if tracker.name in layout:
                tracker.log_images({"validation": array}, step=step, **layout[tracker.name])
    run.accelerator.wait_for_everyone()
