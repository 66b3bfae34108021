"""Recorded passes of a step: the UNet's forward and backward pass, recorded once for each form of
batch and done from the recording since.

A step of a few images is thousands of kernels, and a fast card is done with each before the host
has sent the next one. Recorded as a CUDA graph, they take one launch. On a CPU modules, autograd
and views are a fifth of the embedded base's pass, and its operators alone are left.

The host's part of a step is outside: images, noise and timesteps by address, captions, text
encoders, clipping, the optimiser. What the host draws reaches the pass through tensors that stay
where they are (`Pass`), and so do its gradients. A pass is used only once it has given another
batch's losses and gradients as the plain pass gives them.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor, nn

from sd_lora.adapters.inject import lora_layers
from sd_lora.data.batches.stream import Batch
from sd_lora.findings import Finding
from sd_lora.report.events import Warned
from sd_lora.training.batch_loss import asked, observe, weights_of
from sd_lora.training.fast.step import FastModel, fast
from sd_lora.training.given import Given, changed, form_of, tensors_of
from sd_lora.training.out_of_memory import is_out_of_memory, let_go
from sd_lora.training.recorders import CudaRecorder, OperatorRecorder, Recorder, told
from sd_lora.training.run import Run

WARM = 3
"""Plain passes of a form before it is recorded: on a card libraries make their handles and
workspaces in the first, and may not do so meanwhile (torch's notes on CUDA graphs ask for
three)."""

MOST = 12
"""Forms that are recorded: each keeps its list of kernels or operators. The memory in which those
of a card compute is one for all."""

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 2e-2}
"""Base's dtype → most relative difference of any tensor's gradient in a recorded pass from that in
the plain one: kernels that add atomically give other last bits each time."""

SPREADS = 10
"""Times the difference of two plain passes that is allowed, too."""

SMALL = 1e-4
"""Share of the whole gradient's norm below which a tensor's is compared with that share: a gradient
of rounding alone is another one each time."""

T = TypeVar("T")


def graphs_of(run: Run, shares: bool = False) -> "Graphs | None":
    """The recorded passes of a run: on a CUDA device where it asks for them, on a CPU by itself. A
    note of its summary says why there are none though it asks. shares: whether other runs of this
    process learn over its base."""
    device, asked = run.accelerator.device.type, run.config.cuda_graphs != "off"
    reason = next((text for holds, text in REASONS if holds(run)), "")
    reason = reason or "several jobs go through one UNet" * shares
    if asked and (told := reason or "this run is on no CUDA device" * (device != "cuda")):
        run.summary.notes.append(f"no CUDA graphs: {told}")
    wanted = asked if device == "cuda" else device == "cpu"
    if reason or not wanted:
        return None
    recorder = CudaRecorder() if device == "cuda" else OperatorRecorder()
    if len(run.stream) < recorder.least:
        return None
    return Graphs(run.models["unet"], run.fast_models, recorder)


REASONS: tuple[tuple[Callable[[Run], bool], str], ...] = (
    (
        lambda run: run.accelerator.num_processes > 1,
        "several processes exchange their gradients in the backward pass",
    ),
    (lambda run: bool(run.config.dropouts), "dropouts draw their numbers in the pass"),
    (lambda run: run.config.offloads, "blocks' weights or activations come and go"),
    (lambda run: run.config.rotates, "oft solves equations, by libraries that may ask the host"),
    (lambda run: run.config.masks_ranks, "tlora_min_rank masks other ranks in each pass"),
)
"""Runs whose passes are not recorded, and why."""


class Gradients:
    """The gradients of the UNet's deltas, in tensors that stay. parameters: those that learn."""

    def __init__(self, unet: nn.Module) -> None:
        self.parameters = [p for p in lora_layers(unet) if p.requires_grad]
        self.kept = [torch.zeros_like(p) for p in self.parameters]

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """Add gradients, one for each parameter, None of those that had no part."""
        pairs = [(k, g) for k, g in zip(self.kept, gradients, strict=True) if g is not None]
        torch._foreach_add_([k for k, _ in pairs], [g for _, g in pairs])

    def since(self, before: Sequence[Tensor]) -> list[Tensor]:
        """The gradients that were added to former ones."""
        return [kept - former for kept, former in zip(self.kept, before, strict=True)]

    def link(self, had_part: Sequence[bool]) -> None:
        """Let these be the gradients of the parameters that had a part, and keep their values."""
        empty = []
        for parameter, kept, part in zip(self.parameters, self.kept, had_part, strict=True):
            if not part or parameter.grad is kept:
                continue
            if parameter.grad is None:
                empty.append(kept)
            else:
                kept.copy_(parameter.grad)
            parameter.grad = kept
        if empty:
            torch._foreach_zero_(empty)


@dataclass
class Found:
    """Results of a pass. losses: of the items (B,). gradients: of the parameters, None of those
    that had no part. inputs: of the given tensors that need one."""

    losses: Tensor
    gradients: list[Tensor | None]
    inputs: list[Tensor]


class Pass:
    """A recorded pass of one form, with its inputs and results in tensors that stay."""

    def __init__(self, given: Given, compute: Callable[[Given], Found], record: Recorder,
                 gradients: Gradients) -> None:  # fmt: skip
        self.given = changed(given, lambda t: t.detach().clone().requires_grad_(t.requires_grad))
        self.tensors = tensors_of(self.given)
        self.gradients = gradients
        before = [kept.clone() for kept in gradients.kept]
        gradients.add(before)  # a card loads a kernel when it is first launched, and may not later

        def work() -> list[Tensor]:
            found = compute(self.given)
            gradients.add(found.gradients)
            self.had_part = [gradient is not None for gradient in found.gradients]
            return [found.losses, *found.inputs]

        try:
            self.replay = record(work)
        finally:  # a recorder may have done the work, too
            torch._foreach_copy_(gradients.kept, before)

    @torch.no_grad()
    def __call__(self, given: Given) -> Found:
        """Losses and input gradients of a batch; those of the parameters are added up."""
        torch._foreach_copy_(self.tensors, tensors_of(given))
        self.gradients.link(self.had_part)
        losses, *inputs = (result.clone() for result in self.replay())  # a graph's own stay
        return Found(losses, [], inputs)


@dataclass
class Form:
    """A form of batch in a run. seen: its passes. quickest: seconds of a plain one. recorded: None
    before, and where it is refused. step: of the recording, before which so many were done. proved:
    whether the recording has given the results of another batch, in a later step, so that one of
    tensors that an optimiser exchanges is found out."""

    seen: int = 0
    quickest: float = math.inf
    recorded: Pass | None = None
    step: int = 0
    proved: bool = False


class Graphs:
    """The passes of a run: plain first, then recorded.

    Args:
        unet: with its deltas, on its device.
        fast_models: of the run.
        record: records a pass.
    """

    def __init__(self, unet: nn.Module, fast_models: Sequence[FastModel], record: Recorder) -> None:
        self.of_unet = [model for model in fast_models if model.model is unet]
        self.of_text = [model for model in fast_models if model.model is not unet]
        self.unet, self.record = unet, record
        self.forms: dict[tuple[object, ...], Form] = {}

    def learn(self, run: Run, batch: Batch, step: int) -> Tensor:
        """Add the gradients of a micro-batch; returns its part of the step's loss, detached.

        step: number of steps done.
        """
        losses = []
        for part in batch.by_size(run.fit.at_once):
            with fast(self.of_text):
                question = asked(run, part, step)
                weights = weights_of(run, part, question.t)
                given = Given(question, weights, part.accumulation_steps)
                found = self._found(run, given, step)
                if found.inputs:  # what the text has learned goes back into its encoders
                    wants = [t for t in tensors_of(given) if t.requires_grad]
                    torch.autograd.backward(wants, found.inputs)
            observe(run, part, step, found.losses, question.t)
            losses.append(weights.loss(found.losses) / part.accumulation_steps)
        return torch.stack(losses).sum()

    def _found(self, run: Run, given: Given, step: int) -> Found:
        """The results of a pass, whose parameters' gradients are added to theirs."""
        form = self.forms.setdefault(form_of(given), Form())
        form.seen += 1
        if form.recorded and form.proved:
            return form.recorded(given)
        try:
            if form.recorded and step > form.step:
                return self._compared(run, form, given)
            started = time.perf_counter()
            found = self._plain(run, given)
        except Exception as error:
            if not (is_out_of_memory(error) and self.number):
                raise
            form.recorded = None  # nobody holds the recordings now, and their memory goes
            self._refuse(run, "recorded passes keep the memory that a plain one needs beside them")
            let_go(error)
            return self._plain(run, given)
        seconds = time.perf_counter() - started  # of the host: a card's are in nobody's way
        form.quickest = min(form.quickest, seconds)
        if self._is_due(run, form, step):
            form.step = step
            self._record(run, form, given)
        return found

    def _is_due(self, run: Run, form: Form, step: int) -> bool:
        """Whether a form is to be recorded after a plain pass. step: number of steps before."""
        passes = form.seen / (step + 1 - run.first_step)  # of each step
        return (
            form.seen >= WARM
            and form.recorded is None
            and self.number < MOST
            and form.quickest <= self.record.slowest
            and passes * (run.plan.num_steps - step - 1) >= self.record.least
            and (self.record.compiled or not run.fit.compiled)
        )

    @property
    def number(self) -> int:
        """How many forms are recorded."""
        return sum(form.recorded is not None for form in self.forms.values())

    @cached_property
    def gradients(self) -> Gradients:
        """The gradients that stay: made for the first recording, for they take a second set."""
        return Gradients(self.unet)

    def _loss(self, run: Run, given: Given) -> tuple[Tensor, Tensor]:
        """The losses of the items, detached, and the loss of the batch."""
        losses = given.question.losses(run.prepared["unet"], run.objective)
        return losses.detach(), given.weights.loss(losses) / given.accumulation_steps

    def _compute(self, run: Run, given: Given) -> Found:
        """A pass; its gradients are in no parameter."""
        inputs = [t for t in tensors_of(given) if t.requires_grad]
        scaler = run.accelerator.scaler
        with fast(self.of_unet):
            losses, loss = self._loss(run, given)
            scaled = loss if scaler is None else scaler.scale(loss)
            wanted = [*self.gradients.parameters, *inputs]
            gradients = torch.autograd.grad(scaled, wanted, allow_unused=True)
        number = len(self.gradients.parameters)
        of_inputs = [
            torch.zeros_like(t) if g is None else g
            for t, g in zip(inputs, gradients[number:], strict=True)
        ]
        return Found(losses, [*gradients[:number]], of_inputs)

    def _plain(self, run: Run, given: Given) -> Found:
        """A pass that adds its gradients to the parameters'."""
        if not self.number:  # as in a run that records nothing, also those of the inputs
            with fast(self.of_unet):
                losses, loss = self._loss(run, given)
                run.accelerator.backward(loss)
            return Found(losses, [], [])
        found = self._compute(run, given)  # all or none: it may be done again
        self.gradients.link([gradient is not None for gradient in found.gradients])
        with torch.no_grad():
            self.gradients.add(found.gradients)
        return found

    def _record(self, run: Run, form: Form, given: Given) -> None:
        """Record a form, or tell why it cannot be, and go on without for the rest of the run."""
        try:
            form.recorded = Pass(
                given, lambda kept: self._compute(run, kept), self.record, self.gradients
            )
        except Exception as error:  # torch and the card's libraries raise what they like
            if is_out_of_memory(error):
                reason = "there is no memory for a second set of activations"
            else:
                reason = told(error)
            let_go(error)
            self._refuse(run, reason)

    def _compared(self, run: Run, form: Form, given: Given) -> Found:
        """The results of a pass by both ways: the recording is used from now on if they are the
        same, and else forgotten, and the plain ones count. Where an overflow of float16 leaves
        nothing to compare, the next batch is."""
        recorded, exact = form.recorded, self.record.exact
        assert recorded
        plain, slow = _timed(lambda: self._compute(run, given), given)
        spread = 0.0 if exact else self._spread(run, given, plain)
        self.gradients.link([gradient is not None for gradient in plain.gradients])
        before = [kept.clone() for kept in self.gradients.kept]
        try:
            found, quick = _timed(lambda: recorded(given), given)
            added = self.gradients.since(before)
            torch._foreach_copy_(self.gradients.kept, before)
            self.gradients.add(plain.gradients)  # the plain ones count, in any case
            ways = (
                ([found.losses], [plain.losses]), (added, self.gradients.since(before)),
                (found.inputs, plain.inputs),
            )  # fmt: skip
            apart = [_distance(mine, theirs) for mine, theirs in ways]
        except BaseException:  # as if it had not been: the pass may be done again
            torch._foreach_copy_(self.gradients.kept, before)
            raise
        if any(map(math.isnan, apart)):
            return plain
        if exact:
            if not all(map(_is_equal, *zip(*ways, strict=True))):
                self._refuse(run, "a recorded pass does not give the plain one's bits")
                return plain
        elif max(apart) > max(TOLERANCE[given.question.x_t.dtype], SPREADS * spread):
            self._refuse(run, f"a recorded pass differs from the plain one by {max(apart):.1%}")
            return plain
        form.proved = True
        if not exact:
            let_go(None)  # the plain pass's memory, which the recorded ones have beside theirs
        first = sum(known.proved for known in self.forms.values()) == 1
        if first and not exact:
            height, width = given.question.x_t.shape[2:]
            text = (
                f"{len(plain.losses)} × {width}×{height} latents: forward and backward take "
                f"{quick * 1e3:.3g} ms, {slow * 1e3:.3g} ms without graphs, measured once"
            )
            run.emit(Warned([Finding("graphs", "cuda_graphs", text)]))
        return plain

    def _spread(self, run: Run, given: Given, plain: Found) -> float:
        """How far two plain passes are apart, whose kernels may add in any order."""
        again = self._compute(run, given).gradients
        known = [torch.zeros(()) if gradient is None else gradient for gradient in again]
        return _distance(known, plain.gradients)

    def _refuse(self, run: Run, reason: str) -> None:
        """Forget all recordings, and let the run go on without."""
        self.forms.clear()
        run.graphs = None
        own = self.record.exact
        code, place = ("not-recorded", "training") if own else ("no-graphs", "cuda_graphs")
        run.emit(Warned([Finding(code, place, reason)]))


def _distance(mine: Sequence[Tensor], theirs: Sequence[Tensor | None]) -> float:
    """The largest ‖a − b‖ / ‖b‖ of two tensors, those without a counterpart left out; NaN where one
    of the second ones is not finite."""
    pairs = [(a.float(), b.float()) for a, b in zip(mine, theirs, strict=True) if b is not None]
    if not pairs:
        return 0.0
    norms = torch.stack([b.norm() for _, b in pairs])
    if not norms.isfinite().all():
        return math.nan
    apart = torch.stack([(a - b).norm() for a, b in pairs])
    worst = (apart / norms.clamp(min=max(SMALL * float(norms.norm()), 1e-30))).max()
    return float(worst.nan_to_num(math.inf, math.inf))


def _is_equal(mine: Sequence[Tensor], theirs: Sequence[Tensor | None]) -> bool:
    """Whether tensors are the same bits, those without a counterpart left out."""
    pairs = zip(mine, theirs, strict=True)
    return all(torch.equal(a, b) for a, b in pairs if b is not None)


def _timed(work: Callable[[], T], given: Given) -> tuple[T, float]:
    """The result of a work, and its seconds with the device's part."""
    wait = torch.cuda.synchronize if given.question.x_t.is_cuda else lambda: None
    wait()
    started = time.perf_counter()
    result = work()
    wait()
    return result, time.perf_counter() - started
