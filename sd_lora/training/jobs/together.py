"""Micro-batches of several runs through one UNet: the base is computed once for all of them."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sd_lora.adapters.fast.layers import takes
from sd_lora.adapters.inject import adapted_layers
from sd_lora.adapters.routed import Routes, route
from sd_lora.data.batches.stream import Batch
from sd_lora.models.caption_encoder import Conditioning
from sd_lora.training.batch_loss import Question, asked, counted_loss
from sd_lora.training.fast.step import FastModel, fast
from sd_lora.training.loop import Turn
from sd_lora.training.recompute import enable_checkpointing
from sd_lora.training.run import Run


def why_alone(run: Run) -> str:
    """The reason why a run does not learn together with others; "" if it does."""
    reasons = {
        "T-LoRA masks its ranks by timestep": run.config.masks_ranks,
        "its memory budget is counted for one run": run.recomputed is not None,
        "--fit auto looks for the way of one run": run.config.fit == "auto",
    }
    found = [reason for reason, holds in reasons.items() if holds]
    layers = adapted_layers(run.models["unet"])
    others = [name for name, layer in layers.items() if not takes(layer)]
    if others:
        where = f"{others[0]} is" if len(others) < len(layers) else "its layers are"
        found.append(f"{where} not plain LoRA, without dropouts, on plain frozen layers")
    return "; ".join(found)


@dataclass(frozen=True)
class _Part:
    """Items of one size of a micro-batch, with their question. place: of its turn among those that
    are learned together."""

    place: int
    turn: Turn
    batch: Batch
    question: Question

    @property
    def form(self) -> tuple[object, ...]:
        """The form that questions have in common which are asked at once."""
        tensors = [self.question.x_t, *_tensors(self.question.conditions)]
        return tuple(t if t is None else (t.shape[1:], t.dtype) for t in tensors)

    def loss(self, answer: Tensor) -> Tensor:
        """Its part of its step's loss. answer: the UNet's, of its items alone."""
        run, done = self.turn.run, self.turn.done
        losses = self.question.losses_of(answer, run.objective)
        loss = counted_loss(run, self.batch, done, self.question, losses)
        return loss / self.batch.accumulation_steps


class Together:
    """Runs that learn together.

    runs: of one base and precision, plain LoRA in the UNet (`why_alone`). unet: the base without
    adapters, which becomes the model of all of them; their own models stay as they are.
    """

    def __init__(self, runs: Sequence[Run], unet: nn.Module) -> None:
        self.runs = list(runs)
        self._routes = Routes((0,) * len(self.runs))
        route(unet, [run.models["unet"] for run in self.runs], self._routes)
        own: Any = self.runs[0].models["unet"]
        if own.is_gradient_checkpointing:
            enable_checkpointing({"unet": unet})
        accelerator: Any = self.runs[0].accelerator
        self._unet = accelerator.prepare_model(unet.train())
        accelerator._models.pop()  # it would hold the factors of jobs that have ended
        self._fast = FastModel(unet)

    def learn(self, turns: Sequence[Turn]) -> list[Tensor]:
        """Add the gradients of a micro-batch of each of some runs; returns their parts of the
        losses of their steps, detached.

        Items of one size and of captions of one length go through the UNet at once.

        turns: in the order of the runs.
        """
        losses: list[list[Tensor]] = [[] for _ in turns]
        with ExitStack() as stack:
            for one in turns:
                stack.enter_context(fast(one.run.fast_models))  # text encoders
            parts = [
                _Part(place, one, part, asked(one.run, part, one.done))
                for place, one in enumerate(turns)
                for part in one.batch.by_size()
            ]
            groups: dict[object, list[_Part]] = {}
            for part in parts:
                groups.setdefault(part.form, []).append(part)
            for group in groups.values():
                for part, loss in zip(group, self._losses(group), strict=True):
                    losses[part.place].append(loss)
        return [torch.stack(of_one).sum() for of_one in losses]

    def _losses(self, group: Sequence[_Part]) -> list[Tensor]:
        """Go forward and backward with parts of one form; returns the loss of each, detached."""
        sizes = {id(part.turn.run): len(part.batch.items) for part in group}
        self._routes.counts = tuple(sizes.get(id(run), 0) for run in self.runs)
        with self._fast:
            return self._pass(group)

    def _pass(self, group: Sequence[_Part]) -> list[Tensor]:
        questions = [part.question for part in group]
        conditions = _joined([question.conditions for question in questions])
        answer = self._unet(
            torch.cat([question.x_t for question in questions]),
            torch.cat([question.timesteps for question in questions]),
            **conditions.arguments(),
        ).sample
        answers = answer.split([len(part.batch.items) for part in group])
        losses = [part.loss(own) for part, own in zip(group, answers, strict=True)]
        scaled = []
        for part, loss in zip(group, losses, strict=True):
            scaler = part.turn.run.accelerator.scaler
            scaled.append(loss if scaler is None else scaler.scale(loss))
        torch.stack(scaled).sum().backward()
        return [loss.detach() for loss in losses]


def _tensors(conditions: Conditioning) -> list[Tensor | None]:
    return [conditions.hidden, conditions.mask, conditions.pooled, conditions.time_ids]


def _joined(conditions: Sequence[Conditioning]) -> Conditioning:
    """The conditions of several batches, of one form, as those of one."""
    columns = zip(*map(_tensors, conditions), strict=True)
    joined = [[t for t in column if t is not None] for column in columns]
    hidden, *others = (torch.cat(tensors) if tensors else None for tensors in joined)
    assert hidden is not None
    return Conditioning(hidden, *others)
