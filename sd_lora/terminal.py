"""The terminal as a listener of a run: its summary, progress bars and results."""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from tqdm.auto import tqdm

from sd_lora.data.check.page import printable
from sd_lora.files import size_text
from sd_lora.findings import Finding
from sd_lora.report.events import (
    BestTaken,
    Event,
    Exported,
    ImagesScored,
    JobsPlanned,
    Progress,
    Pushed,
    RunEnded,
    RunPlanned,
    StepDone,
    StepsLogged,
    TrainingStarted,
    Validated,
    ValidationDone,
    Warned,
)
from sd_lora.report.record import kept_steps
from sd_lora.report.summary import Summary, duration, shares_of, verified_files
from sd_lora.report.verdict import verdict_of
from sd_lora.streams import encode_everything


class Terminal:
    """Shows a run to the person who started it.

    Use as a context, which ends the bar of a run that stops early:
    `with Terminal() as terminal: train(config, [terminal])`.

    title: first line above the summary. job: name of the run among several.
    """

    def __init__(self, title: str = "sd_lora trains a LoRA:", job: str = "") -> None:
        encode_everything()  # for those who call `train` from Python
        self.title = title
        self._of_job = f"job {job}: " if job else ""
        self._bar: tqdm | None = None  # of the steps
        self._beside: tqdm | None = None  # of work before, between and after them
        self._warned: list[str] = []
        self._validated: Validated | None = None
        self._measured: ValidationDone | None = None
        self._scored: Mapping[str, Any] = {}
        self._exported: Exported | None = None
        self._pushed: Pushed | None = None

    def __call__(self, event: Event) -> None:
        """Show one event. Findings and samples are in the summary and in files already."""
        match event:
            case Progress():
                self._advance(event)
            case Warned():
                self._warned += [f.code for f in event.findings if _kind(f) == "warning"]
                self._say(
                    "\n".join(
                        f"{_kind(f)}: {self._of_job}{printable(f.line())}" for f in event.findings
                    )
                )
            case RunPlanned():
                self._say(f"{self.title}\n{event.summary.text()}")
            case TrainingStarted():
                self._close()  # of the steps before a return to a checkpoint
                total, first = event.num_steps, event.first_step
                self._bar = _new_bar(f"{self._of_job}training", total, "step", initial=first)
            case StepDone() if self._bar is not None:
                self._bar.update()
            case StepsLogged() if self._bar is not None:
                self._bar.set_postfix(loss=f"{event.mean_loss:.4f}")
            case Validated():
                self._close()
                self._validated = event
            case ValidationDone():
                self._measured = event
            case ImagesScored():
                self._scored = event.record
                self._say(f"{self._of_job}step {event.step}: {event.score.line()}")
            case BestTaken():
                self._close()
                self._scored = event.record
                self._say(f"{self._of_job}{event.text()}")
            case Exported():
                self._exported = event
            case Pushed():
                self._pushed = event
            case RunEnded():
                self._close()
                self._say(self._result(event))
            case _:
                pass

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def _advance(self, event: Progress) -> None:
        if self._beside is None:
            self._beside = _new_bar(event.label, event.total, event.unit, leave=False)
        self._beside.update(event.done - self._beside.n)
        if event.ended:
            self._beside.close()
            self._beside = None

    def _close(self) -> None:
        for bar in (self._beside, self._bar):
            if bar is not None:
                bar.close()
        self._beside = self._bar = None

    def _result(self, event: RunEnded) -> str:
        """The lines after the last step."""
        lines = [f"{self._of_job}done in {duration(event.seconds)}"]
        if self._validated:
            v = self._validated
            known = v.first == v.first  # else NaN
            before = f"{v.first:.4f} in the first steps, " * known
            lines[0] += f"; loss on the same images and noise: {before}{v.trained:.4f} after"
        if shares := shares_of(event.spent, event.seconds):
            lines[0] += f"; {shares}"
        if event.peak_bytes:
            lines[0] += f"; at most {size_text(event.peak_bytes)} of memory"
        if self._exported:
            lines += [verified_files(self._exported.files), *self._exported.usage]
        if self._exported:
            facts: dict[str, Any] = {
                "validation": self._measured.record if self._measured else {},
                "changes": self._exported.changes,
                "scores": self._scored,
                "files": [file.path.name for file in self._exported.files],
            }
            if event.page:
                folder = event.page.parent
                facts |= {"folder": str(folder), "checkpoints": kept_steps(folder)}
            if verdict := verdict_of(facts):
                lines.append(f"  verdict: {verdict.text}")
        if seen := [str(path) for path in (event.sheet, event.page) if path]:
            lines.append(f"  look at {' and '.join(seen)}")
        if self._pushed:
            lines.append(f"  on the hub: {self._pushed.address}")
        if self._warned:
            lines.append(f"  warnings, above: {', '.join(dict.fromkeys(self._warned))}")
        lines.append(f"  {event.digest.text}")
        return "\n".join(lines)

    @staticmethod
    def _say(text: str) -> None:
        print(text, flush=True)


def _kind(finding: Finding) -> str:
    """The word before an event's finding: "note", or "warning"."""
    return "note" if finding.level == "note" else "warning"


class Terminals:
    """Shows several runs to the person who started them, each by a bar and lines of its own.

    Use as a context: `with Terminals() as terminals: train_jobs(jobs, terminals.of, …, terminals)`.
    """

    def __init__(self) -> None:
        self._open = ExitStack()

    def of(self, job: str) -> list[Terminal]:
        """The listeners of a job."""
        return [self._open.enter_context(Terminal(f"sd_lora trains {job}:", job))]

    def __call__(self, event: Event) -> None:
        """Show the facts that the runs share."""
        if isinstance(event, JobsPlanned):
            print(f"shared by all jobs:\n{Summary(dict(event.rows)).text()}", flush=True)

    def __enter__(self) -> "Terminals":
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()


def _new_bar(label: str, total: int | None, unit: str, **more: Any) -> tqdm:
    return tqdm(desc=label, total=total, unit=unit, dynamic_ncols=True, **more)
