"""Training of several LoRAs over one base in one run: each as if it were alone."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from sd_lora.config.jobs import Job
from sd_lora.errors import Interrupted, RunError, UsageError
from sd_lora.findings import Finding
from sd_lora.report.events import JobsPlanned, Listener, Warned, to_all
from sd_lora.report.run_page import RunPage
from sd_lora.training.checkpoint_folders import Found
from sd_lora.training.interruption import listening
from sd_lora.training.jobs.base import SharedBase
from sd_lora.training.jobs.together import Together, why_alone
from sd_lora.training.looks import timed
from sd_lora.training.loop import (
    Begun,
    Result,
    Steps,
    Turn,
    begin,
    end,
    look_before,
    rescued,
    steps_of,
)
from sd_lora.training.offload import check_offload_of_several
from sd_lora.training.out_of_memory import is_out_of_memory, let_go, wanted
from sd_lora.training.output_folder import Finished
from sd_lora.training.processes import check_one_process, determinism
from sd_lora.training.run import Run
from sd_lora.training.setup import CheckedRun, checked_run, load_base, ready, released
from sd_lora.training.trackers import check_trackers_of_several
from sd_lora.training.trial import Parts, forget, later_bytes, step_memory

T = TypeVar("T")
R = TypeVar("R")

ListenersOf = Callable[[str], Sequence[Listener]]
"""Name of a job → its listeners."""


@dataclass
class Outcome:
    """The ends of jobs, by name.

    results: of those that have done all steps. left: sentences on those that had before. errors:
    of those that ended early.
    """

    results: dict[str, Result] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    errors: dict[str, RunError | UsageError] = field(default_factory=dict)

    def refuse(self) -> None:
        """Raise the errors as one: Interrupted where every job that ended early was asked to."""
        if not self.errors:
            return
        text = "\n".join(f"job {name}: {error}" for name, error in self.errors.items())
        asked = all(isinstance(error, Interrupted) for error in self.errors.values())
        raise Interrupted(text) if asked else RunError(text)


def train_jobs(
    jobs: Sequence[Job],
    listeners_of: ListenersOf = lambda name: (),
    found: Mapping[str, Found] | None = None,
    *of_all: Listener,
) -> Outcome:
    """Train the LoRAs of several jobs over one base, which is loaded once and computed once for
    the items of all jobs that can learn together; write each as `train` does.

    A job that fails ends with its error, and the others go on.

    Args:
        jobs: with one base, precision and device (`config.jobs`). A job that is the only one with
            steps to do is a run alone, to the bit.
        listeners_of: called once for each job.
        found: name → the checkpoint to resume, where it is verified already.
        of_all: functions of one event, on all jobs.

    Raises:
        UsageError: options, folders or images with which a job cannot start, before any work.
    """
    check_one_process()
    outcome, started = Outcome(), time.monotonic()
    configs = [job.config for job in jobs]
    with determinism(configs[0].deterministic), released(configs):
        listeners: dict[str, Sequence[Listener]] = {
            job.name: [*listeners_of(job.name), RunPage(job.config)] for job in jobs
        }
        checked = _checked(jobs, listeners, found or {}, outcome)
        base = SharedBase(load_base)
        several = base if len(checked) > 1 else None
        runs = _each(
            checked, lambda name, one: ready(one, listeners[name], several), listeners, outcome
        )
        base.let_go()
        reasons = {name: why_alone(run) if several else "" for name, run in runs.items()}
        for name, reason in reasons.items():
            notes = runs[name].summary.notes
            notes += [f"learns by itself, not together with other jobs: {reason}"] * bool(reason)
        begun = _each(runs, lambda _, run: begin(run, started), listeners, outcome)
        reasons = {name: reasons[name] for name in begun}
        to_all(of_all)(JobsPlanned(_rows(jobs, outcome, reasons)))
        loop = _Loop(base)
        loop.jobs += [
            _Active(name, one, bool(several) and not reasons[name], outcome)
            for name, one in begun.items()
        ]
        for names in (runs, begun, checked):  # a run that ends leaves its memory to the others
            names.clear()
        if loop.jobs:
            loop.train()
    return outcome


def _each(
    things: Mapping[str, T],
    work: Callable[[str, T], R],
    listeners: Mapping[str, Sequence[Listener]],
    outcome: Outcome,
) -> dict[str, R]:
    """Name → result of a work of each job; a job for which it fails ends, and the others go on."""
    results = {}
    for name, thing in things.items():
        try:
            results[name] = work(name, thing)
        except (UsageError, RunError) as error:
            if isinstance(error, Interrupted) or len(things) == 1:
                raise
            error.__traceback__ = error.__context__ = None  # they hold the run's memory
            outcome.errors[name] = error
            to_all(listeners[name])(Warned([Finding("job-ended", name, str(error))]))
    return results


def _checked(
    jobs: Sequence[Job],
    listeners: Mapping[str, Sequence[Listener]],
    found: Mapping[str, Found],
    outcome: Outcome,
) -> dict[str, CheckedRun]:
    """The jobs that have steps to do, checked; raises UsageError with the faults of all."""
    checked, faults = {}, []
    for job in jobs:
        try:
            check_trackers_of_several(job.config)
            check_offload_of_several(job.config)
            checked[job.name] = checked_run(job.config, listeners[job.name], found.get(job.name))
        except Finished as error:
            outcome.left[job.name] = str(error)
        except UsageError as error:
            faults.append(f"job {job.name}: {error}")
    if not checked and not faults:
        raise Finished("\n".join(f"job {name}: {text}" for name, text in outcome.left.items()))
    if faults:
        raise UsageError("\n".join(faults))
    return checked


def _rows(jobs: Sequence[Job], outcome: Outcome, reasons: Mapping[str, str]) -> dict[str, str]:
    """Label → text on all jobs. reasons: name → the reason to learn by itself, or ""."""
    rows = {"base": f"{jobs[0].config.base_model}, in memory once"}
    together = [name for name, reason in reasons.items() if not reason]
    alone = [f"{name} ({reason})" for name, reason in reasons.items() if reason]
    rows |= {"together": ", ".join(together)} if len(together) > 1 else {}
    rows |= {"by itself": "; ".join(alone)} if alone else {}
    rows |= {"done before": "; ".join(outcome.left.values())} if outcome.left else {}
    return rows


class _Active:
    """A job between its first step and its end.

    name: its own. begun: its run. joins: whether it learns together with others. outcome: takes
    its end. turn: the micro-batch that it waits for; None when it has ended.
    """

    def __init__(self, name: str, begun: Begun, joins: bool, outcome: Outcome) -> None:
        self.name, self.begun, self.joins, self._outcome = name, begun, joins, outcome
        self._steps: Steps | None = None
        self.turn: Turn | None = None

    @property
    def run(self) -> Run:
        return self.begun.run

    def open(self) -> None:
        """Look at the model before its first step, and go to its first micro-batch."""
        self._ending(self._open)

    def go_on(self, loss: Tensor) -> None:
        """Take the loss of the micro-batch, and go to the next one."""
        self._ending(lambda: self._next(loss))

    def learn(self) -> None:
        """Learn the micro-batch by itself, and go to the next one."""
        self._ending(self._learn)

    def fail(self, error: Exception) -> None:
        """End with an error of memory in a micro-batch that was learned together with others."""

        def again() -> None:
            assert self.turn
            with step_memory(self.run, self.turn.number, self.turn.done):
                raise error

        self._ending(again)

    def _open(self) -> None:
        look_before(self.begun)
        self._steps = steps_of(self.run, self.begun.log, self.begun.requests)
        self._next(None)

    def _learn(self) -> None:
        assert self.turn
        with timed(self.run, "training"):
            loss = self.turn.learn()
        self._next(loss)

    def _next(self, loss: Tensor | None) -> None:
        """Run to the next micro-batch, or to the end."""
        assert self._steps
        try:
            with timed(self.run, "training"):
                self.turn = self._steps.send(loss)  # type: ignore[arg-type]
        except StopIteration as last:
            self.turn = None
            self._outcome.results[self.name] = end(self.begun, last.value)

    def _ending(self, work: Callable[[], None]) -> None:
        """Do work of this job; an error of it is the job's end, and of no other."""
        try:
            with rescued(self.run, self.begun.log):
                work()
        except (UsageError, RunError) as error:
            self.turn = self._steps = None
            error.__traceback__ = error.__context__ = None  # they hold the run's memory
            self._outcome.errors[self.name] = error
            self.run.emit(Warned([Finding("job-ended", self.name, str(error))]))


class _Loop:
    """The steps of all jobs. base: makes the UNet of those that learn together. jobs: those that
    have not ended."""

    def __init__(self, base: SharedBase) -> None:
        self._base = base
        self.jobs: list[_Active] = []
        self._together: Together | None = None

    def train(self) -> None:
        """Do the steps of all jobs."""
        with listening(*(job.begun.requests for job in self.jobs)):
            self._try()
            self._open()
            while self.jobs:
                self._round()

    def _open(self) -> None:
        """Look at all models before their first steps."""
        for job in self.jobs:
            job.open()

    def _round(self) -> None:
        """Learn one micro-batch of each job."""
        there = [job for job in self.jobs if job.turn]
        if len(there) < len(self.jobs):  # some have ended, and the UNet holds their factors
            self.jobs, self._together = there, None
        for job in there:
            if not job.joins:
                job.learn()
        if joined := [job for job in there if job.joins]:
            self._learn_together(joined)

    def _learn_together(self, joined: Sequence[_Active]) -> None:
        """Learn the micro-batches of jobs together, and go to their next ones."""
        if self._together is None:
            self._together = Together([job.run for job in joined], self._base.unet())
        before = [(job.run, len(job.run.ledger.waiting)) for job in joined]
        fresh = all(_is_fresh(run) for run, _ in before)
        try:
            with ExitStack() as stack:
                for job in joined:  # each waits for all
                    stack.enter_context(timed(job.run, "training"))
                losses = self._together.learn([job.turn for job in joined if job.turn])
        except RunError:  # of one of them, before anything was learned: who it is ends by itself
            for job in joined:
                job.learn()
            return
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            let_go(error)
            if not fresh:
                for job in joined:
                    job.fail(error)
                return
            for run, seen in before:
                forget(run)
                del run.ledger.waiting[seen:]
            self._part(joined, error)
            for job in joined:
                job.learn()
            return
        for job, loss in zip(joined, losses, strict=True):
            job.go_on(loss)

    def _try(self) -> None:
        """Learn the largest micro-batches together, and forget them: jobs whose batches the device
        has no room for at once go by themselves."""
        joined = [job for job in self.jobs if job.joins]
        if len(joined) < 2:
            return
        runs = [job.run for job in joined]
        together = Together(runs, self._base.unet())
        try:
            room = torch.empty(
                sum(map(later_bytes, runs)), dtype=torch.uint8, device=runs[0].accelerator.device
            )
            together.learn([_largest(run) for run in runs])
            del room
            self._together = together
        except RunError:  # a lost image, of which its own step tells
            return
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            let_go(error)
            self._part(joined, error)
        finally:
            for run in runs:
                forget(run)
                run.ledger.waiting.clear()

    def _part(self, joined: Sequence[_Active], error: BaseException) -> None:
        """Let jobs whose micro-batches the device has no room for at once go by themselves."""
        self._together = None
        words = f"{wanted(error)} for the micro-batches of {len(joined)} jobs at once"
        for job in joined:
            job.joins = False
            job.run.emit(Warned([Finding("jobs-apart", job.name, words)]))


def _is_fresh(run: Run) -> bool:
    """Whether a run's step has added up nothing yet, so that a micro-batch can be learned again."""
    return not run.objective.uncertainty and all(p.grad is None for p in run.parameters)


def _largest(run: Run) -> Turn:
    """The run's micro-batch that takes the most memory."""
    number = Parts.of(run).largest(None)
    return Turn(run, number, run.stream.batch(number), run.first_step)
