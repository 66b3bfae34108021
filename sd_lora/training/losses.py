"""The losses of a run: read from the device together, told, and watched for divergence."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sd_lora.errors import RunError
from sd_lora.findings import Finding
from sd_lora.report.digest import with_loss
from sd_lora.report.events import StepRecord, StepsLogged, Warned
from sd_lora.training.run import Run
from sd_lora.training.soundness import LOWER, diverged, images_of

MOST_SKIPPED = 10
"""Steps in a row that may be skipped, with the one that ends the run."""

LEAST_SCALE = 1e-4
"""Loss scale of fp16 below which a run ends, as fairseq's; it starts at 65,536, and each overflow
halves it."""


@dataclass
class LossLog:
    """Losses and gradient norms, kept on the device until they are read together.

    waiting: step, learning rates of the groups, loss and norm of steps that were not read yet.
    losses: all read ones. step: the last one added. skipped: steps in a row without an update
    (`on_nan` skip).
    """

    run: Run
    waiting: list[tuple[int, dict[str, float], Tensor, Tensor]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    skipped: int = 0

    def __post_init__(self) -> None:
        self.step = self.run.first_step

    def add(self, step: int, loss: Tensor, norm: Tensor) -> None:
        """Keep the numbers of a step, with the learning rates that it used."""
        self.step = step
        self.waiting.append((step, self.run.learning_rates, loss, norm))

    def flush(self) -> None:
        """Read the waiting numbers and tell them.

        A step that was skipped has no record.

        Raises:
            Diverged: a loss or gradient norm that is not finite, with the step's images.
            RunError: latents that are not finite, with their image; a loss scale of fp16 that
                falls for ever.
        """
        if not self.waiting:
            return
        self.run.latents.check()
        self.run.ledger.flush(self.run.accelerator, self.step)
        values = torch.stack([torch.stack([loss, norm]) for *_, loss, norm in self.waiting])
        values = self.run.accelerator.reduce(values, "mean").tolist()
        steps = [(step, rates) for step, rates, _, _ in self.waiting]
        self.waiting.clear()
        multiple = self.run.optimizer.param_groups[0]["multiple"]
        fit = self.run.fit.numbers()
        records: list[StepRecord] = []
        try:
            for (step, rates), (loss, norm) in zip(steps, values, strict=True):
                sound = self._is_sound(step, loss, norm)
                self.run.losses = with_loss(self.run.losses, step, loss if sound else None)
                if sound:
                    norm_or_none = norm if math.isfinite(norm) else None
                    rate = next(iter(rates.values())) / multiple
                    records.append(StepRecord(step, loss, rate, norm_or_none, rates, fit))
        finally:  # the steps before a diverged one are in the log
            if records:
                self.losses += [record.loss for record in records]
                self.run.emit(StepsLogged(tuple(records)))
        self._refuse_fallen_scale()

    def go_back(self, step: int) -> None:
        """Forget the numbers of all steps after this one, which are done once more."""
        self.step, self.skipped = step, 0
        self.waiting.clear()
        del self.losses[step - self.run.first_step :]

    def _is_sound(self, step: int, loss: float, norm: float) -> bool:
        """Whether a step has a record; False for one that was skipped, of which it tells.

        Raises:
            Diverged: a number that is not finite, or too many skipped steps.
        """
        # under fp16 the scaler meets infinite gradients now and then, and skips their step
        bad_norm = not math.isfinite(norm) and self.run.accelerator.scaler is None
        if math.isfinite(loss) and not bad_norm:
            self.skipped = 0
            return True
        finite = math.isfinite(loss)
        found = f"gradient's norm became {norm}" if finite else f"loss became {loss}"
        images = f"Images of the step: {images_of(self.run, step)}"
        self.skipped += 1
        skips = self.run.config.on_nan == "skip" and not math.isfinite(norm)
        if not skips or self.skipped >= MOST_SKIPPED:
            row = f", as in the {MOST_SKIPPED - 1} before it" * skips
            saved = self.run.saved
            if saved and step == self.run.first_step + 1:
                images += f". {saved.path} may hold the cause: resume an earlier one by its name"
            remedy = f": the run has diverged and stops here. {LOWER}. {images}"
            raise diverged(step, f"the {found} at step {step}{row}", remedy)
        self.run.emit(Warned([Finding("skipped-step", f"step {step}", f"the {found}. {images}")]))
        return False

    def _refuse_fallen_scale(self) -> None:
        """Raise RunError where fp16's loss scale has fallen so far that nothing is learned."""
        scaler = self.run.accelerator.scaler
        if scaler is not None and (scale := scaler.get_scale()) < LEAST_SCALE:
            raise RunError(
                f"fp16's loss scale has fallen to {scale:.1e} at step {self.step}: the gradients "
                "overflow in each step, and nothing is learned. Take bf16, or float32 (no)"
            )


def skips(run: Run, norm: Tensor) -> bool:
    """Whether a step is left out for its gradient; fp16's loss scaling leaves it out by itself.

    norm: of the gradient, over all processes, so that all decide the same.
    """
    asked = run.config.on_nan == "skip" and run.accelerator.scaler is None
    return asked and not math.isfinite(float(norm))
