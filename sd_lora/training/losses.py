"""The losses of a run: read from the device together, told, and watched for divergence."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sd_lora.errors import RunError
from sd_lora.report.events import StepRecord, StepsLogged
from sd_lora.training.checkpoint_folders import RESUME
from sd_lora.training.run import Run


@dataclass
class LossLog:
    """Losses and gradient norms, kept on the device until they are read together.

    waiting: step, learning rate, loss and norm of steps that were not read yet. losses: all read
    ones. step: the last one added.
    """

    run: Run
    waiting: list[tuple[int, float, Tensor, Tensor]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.step = self.run.first_step

    def add(self, step: int, loss: Tensor, norm: Tensor) -> None:
        """Keep the numbers of a step, with the learning rate that it used."""
        self.step = step
        self.waiting.append((step, self.run.learning_rate, loss, norm))

    def flush(self) -> None:
        """Read the waiting numbers and tell them.

        Raises:
            RunError: a loss or gradient norm that is not finite.
        """
        if not self.waiting:
            return
        values = torch.stack([torch.stack([loss, norm]) for _, _, loss, norm in self.waiting])
        values = self.run.accelerator.reduce(values, "mean").tolist()
        steps = [(step, rate) for step, rate, _, _ in self.waiting]
        self.waiting.clear()
        records = []
        for (step, rate), (loss, norm) in zip(steps, values, strict=True):
            self._refuse_divergence(step, loss, norm)
            records.append(StepRecord(step, loss, rate, norm if math.isfinite(norm) else None))
        self.losses += [record.loss for record in records]
        self.run.emit(StepsLogged(tuple(records)))

    def _refuse_divergence(self, step: int, loss: float, norm: float) -> None:
        # under fp16 the scaler meets infinite gradients now and then, and skips their step
        bad_norm = not math.isfinite(norm) and self.run.accelerator.scaler is None
        if math.isfinite(loss) and not bad_norm:
            return
        finite = math.isfinite(loss)
        found = f"gradient's norm became {norm}" if finite else f"loss became {loss}"
        raise RunError(
            f"the {found} at step {step}: the run has diverged and stops here. Lower "
            f"--learning_rate, and start anew or with {RESUME}"
        )
