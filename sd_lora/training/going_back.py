"""Going back to the last good checkpoint after numbers that are not finite (`on_nan` restore).

The steps from there to the bad one are done once more, on the same images and captions in the same
order, with other noise, timesteps and dropout: the same ones would lead to the same numbers. Every
step after it has those of a run without the incident. (Chowdhery et al. 2022, PaLM, section 5.1,
went around loss spikes so, and found that they come of a batch and a state of the model together,
and not of bad data.)
"""

import copy
from pathlib import Path

from sd_lora.adapters.state import lora_state_dict
from sd_lora.errors import RunError
from sd_lora.findings import Finding
from sd_lora.report.events import TrainingStarted, Warned
from sd_lora.training import checkpoint
from sd_lora.training.checkpoint_folders import PREFIX, fault
from sd_lora.training.losses import LossLog
from sd_lora.training.processes import on_main
from sd_lora.training.run import Run
from sd_lora.training.soundness import Diverged

MOST_RETURNS = 3
"""Times that a run goes back, over all its parts; after them the numbers are no accident."""


def start_of(run: Run) -> checkpoint.Saved | None:
    """The state of a run before its first step, to go back to before its first checkpoint; None for
    a run that does not go back, or was resumed."""
    if run.config.on_nan != "restore" or run.saved:
        return None
    factors = {component: lora_state_dict(model) for component, model in run.models.items()}
    state = copy.deepcopy(run.checkpoint_state())
    return checkpoint.Saved(run.output_dir, run.plan.progress(0), factors, state)


def go_back(run: Run, log: LossLog, diverged: Diverged, start: checkpoint.Saved | None) -> int:
    """Load the last good state, on all processes; returns its number of steps.

    Args:
        run, log: as the bad step left them.
        diverged: the bad step; all processes have it.
        start: of `start_of`.

    Raises:
        RunError: `diverged`, for a run that does not go back, has done so too often, or has no
            whole checkpoint.
    """
    if run.config.on_nan != "restore":
        raise diverged
    times, bad = len(run.redrawn), diverged.step
    if times == MOST_RETURNS:
        raise RunError(f"{diverged}. It went back {times} times before, in vain") from None
    path = on_main(run.accelerator, lambda: _last_whole(run))
    saved = checkpoint.read(path, run.models) if path else copy.deepcopy(start)
    if saved is None:
        raise RunError(f"{diverged}. No checkpoint is whole to go back to") from None
    first, redrawn = saved.progress.step, run.redrawn
    run.optimizer.zero_grad()
    run.load(saved)
    run.redraw([*redrawn, (first, bad)])
    log.go_back(first)
    if run.main:
        run.log.cut(first)
    place = path.name if path else "the start"
    words = f"{diverged.found}; back to {place}, {times + 1} of at most {MOST_RETURNS} times"
    run.emit(Warned([Finding("went-back", f"step {bad}", words)]))
    run.emit(TrainingStarted(first, run.plan.num_steps))
    return first


def _last_whole(run: Run) -> Path | None:
    """The newest whole checkpoint of this run: those of this process's part, or the resumed one."""
    paths = [run.output_dir / f"{PREFIX}{step}" for step in reversed(run.saved_steps)]
    paths += [run.saved.path] if run.saved else []
    return next((path for path in paths if not fault(path)), None)
