"""The loss of a micro-batch: noise, timesteps and conditions of items, the UNet, the objective."""

from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from sd_lora.adapters.merging import mask_ranks, switched_off, whole_ranks
from sd_lora.data.batches.stream import Batch
from sd_lora.diffusion.loss import denoised, sample_losses, target_of, weighted_loss
from sd_lora.diffusion.noise import Noise
from sd_lora.diffusion.objective import Objective
from sd_lora.diffusion.uncertainty import reweighted
from sd_lora.models.caption_encoder import Conditioning
from sd_lora.training.run import Run
from sd_lora.transfer import sent


def batch_loss(run: Run, batch: Batch, step: int) -> Tensor:
    """A process's part of the loss of one micro-batch, a function of its items' addresses and the
    model: the mean over processes and over the step's micro-batches is the step's loss.

    step: number of steps done, since text encoders and new words may stop learning.

    T-LoRA's masks stay for a backward pass, which reads them (`Run.unmasking` is around it).
    """
    with nullcontext() if torch.is_grad_enabled() else run.unmasking():
        parts = batch.by_size(run.fit.at_once)
        return torch.stack([_loss(run, part, step) for part in parts]).sum()


@dataclass(frozen=True)
class Question:
    """What the UNet is asked of B items of one size, and the right answer.

    x_t: its input (B, C, H, W), in the base's dtype. timesteps: as it is told them (B,).
    conditions: of the text. target: the right output (B, C, H, W). t: timesteps (B,). mask: weight
    of each place (B, 1, H, W), None for 1.
    """

    x_t: Tensor
    timesteps: Tensor
    conditions: Conditioning
    target: Tensor
    t: Tensor
    mask: Tensor | None

    def losses(self, unet: nn.Module, objective: Objective) -> Tensor:
        """Loss of each item (B,), float32, weighted by its timestep, of the UNet's answer."""
        answer = unet(self.x_t, self.timesteps, **self.conditions.arguments()).sample
        return self.losses_of(answer, objective)

    def losses_of(self, answer: Tensor, objective: Objective) -> Tensor:
        """The same of an answer (B, C, H, W)."""
        return sample_losses(
            answer, self.target, self.t, objective.schedule, self.mask, objective.loss
        )


@dataclass(frozen=True)
class Weights:
    """How the losses of a batch's items become its loss.

    items: weight of each loss (B,). gradients: factor of each loss's gradient beside it (B,), of
    learned weights; None for 1. scale: see `weighted_loss`.
    """

    items: Tensor
    gradients: Tensor | None
    scale: float

    def loss(self, losses: Tensor) -> Tensor:
        """The loss of a batch, of the losses of its items (B,)."""
        if self.gradients is not None:
            losses = reweighted(losses, self.gradients)
        return weighted_loss(losses, self.items, self.scale)


def _loss(run: Run, batch: Batch, step: int) -> Tensor:
    """Loss of items of one size."""
    question = asked(run, batch, step)
    if run.config.tlora_min_rank:
        share = 1 - question.t / run.objective.schedule.num_timesteps
        mask_ranks(run.models["unet"], share, run.config.tlora_min_rank)
    losses = question.losses(run.prepared["unet"], run.objective)
    return counted_loss(run, batch, step, question, losses)


def counted_loss(run: Run, batch: Batch, step: int, question: Question, losses: Tensor) -> Tensor:
    """The loss of a batch as it counts in its step, of the losses of its items (B,); the ledger and
    the learned weights see those of training."""
    if losses.requires_grad:  # losses without a gradient are of no training
        observe(run, batch, step, losses.detach(), question.t)
    return weights_of(run, batch, question.t).loss(losses)


def asked(run: Run, batch: Batch, step: int) -> Question:
    """The question of a batch of items of one size, a function of their addresses.

    step: number of steps done, since text encoders and new words may stop learning.
    """
    objective, device = run.objective, run.accelerator.device
    schedule, items = objective.schedule, batch.items
    addresses = [item.address for item in items]
    drawn = run.latents.latents(items, batch.loaded)
    x0, mask = drawn.x0, drawn.mask
    noise = objective.noise.draw(x0 / schedule.data_std, addresses)
    strata, pixels = [item.stratum for item in items], [item.crop.pixels for item in items]
    t = sent(objective.timesteps.draw(addresses, strata, pixels), device)
    noisy = schedule.add_noise(x0, objective.noise.in_input(noise, addresses), t)
    places = [i for i, item in enumerate(items) if item.preserves]
    there = sent(torch.tensor(places, dtype=torch.long), device)
    if places and run.config.preservation_sampler_steps:
        noisy[there] = _drawn_by_base(run, batch.part(places), x0[there], t[there], step)
    x_t, conditions = run.unet_input(noisy, batch), run.conditions(items, step)
    target = target_of(x0, noise, t, schedule)
    if places:
        target[there] = _base_answer(run, batch.part(places), x_t[there], t[there], step)
        if mask is not None:
            mask = mask.index_fill(0, there, 1.0)
    return Question(x_t, schedule.timesteps[t], conditions, target, t, mask)


def weights_of(run: Run, batch: Batch, t: Tensor) -> Weights:
    """Weights of a batch's losses. t: timesteps (B,)."""
    items = sent(torch.tensor([item.weight for item in batch.items]), t.device)
    learned = run.objective.uncertainty
    return Weights(items, learned.factors(t) if learned else None, batch.loss_scale)


def observe(run: Run, batch: Batch, step: int, losses: Tensor, t: Tensor) -> None:
    """Take the trained losses of a batch's items into the ledger and the learned weights.

    step: number of steps done. losses, t: detached losses and timesteps (B,).
    """
    run.ledger.add(step, batch.items, losses, t)
    if run.objective.uncertainty:
        learned = [float(not item.preserves) for item in batch.items]  # those start at a loss of 0
        shares = sent(torch.tensor(learned), t.device) * batch.loss_scale / batch.accumulation_steps
        run.objective.uncertainty.observe(losses, t, shares)


@torch.no_grad()
def _base_answer(run: Run, batch: Batch, x_t: Tensor, t: Tensor, step: int) -> Tensor:
    """The base model's output for preserved items, float32: the adapter is switched off.

    x_t: the UNet's input (B, C, H, W). t: timesteps (B,).
    """
    conditions = run.conditions(batch.items, step)
    timesteps = run.objective.schedule.timesteps[t]
    with switched_off(run.models["unet"]) as unet, whole_ranks(unet):
        return unet(x_t, timesteps, **conditions.arguments()).sample.float()


@torch.no_grad()
def _drawn_by_base(run: Run, batch: Batch, x0: Tensor, t: Tensor, step: int) -> Tensor:
    """x_t (B, C, H, W) on the base model's own way from pure noise to an image of the preserved
    caption: `preservation_sampler_steps` steps of DDIM (Song et al. 2021, equation 12, without
    noise) from the last timestep to t (B,), without guidance.

    x0: latents of the items' images (B, C, H, W), of which the form counts. The way begins in plain
    noise of the items' addresses, as an image's does, whatever noise is trained on.
    """
    schedule, steps = run.objective.schedule, run.config.preservation_sampler_steps
    last = torch.full_like(t, schedule.num_timesteps - 1)
    levels = [last + (t - last) * k // steps for k in range(steps + 1)]
    addresses = [item.address for item in batch.items]
    x = Noise().draw(x0, addresses)
    for now, following in pairwise(levels):
        answer = _base_answer(run, batch, run.unet_input(x, batch), now, step)
        found, epsilon = denoised(answer, x, now, schedule)
        alpha, sigma = schedule.coefficients(following)
        x = alpha * found + sigma * epsilon
    return x
