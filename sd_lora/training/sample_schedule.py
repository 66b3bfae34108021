"""The steps after which a run draws sample images, and the share of its work that they take."""

from dataclasses import dataclass
from functools import cached_property

from sd_lora.errors import counted
from sd_lora.training.plan import Plan

SHARE = 0.06
"""Share of a run's work that samples take at most, where no option says when they are drawn: with
the validation's 0.04 a run is looked at for less than a tenth of its time."""

MOST_IMAGES = 4
"""Sample images of a set, where no option says how many."""

MOST_SETS = 8
"""Sets of samples in mid-run, where no option says when: the page shows a row for each."""

STRENGTHS = (0.5, 0.75)
"""Strengths of the adapter at which samples are drawn once more after the last step: with the base
and the last step's own, the page shows 0, 0.5, 0.75 and 1."""

STEP_FORWARDS = 2
"""A training step in forward passes of the UNet, an image: one, and a backward pass through frozen
weights, which costs one as well. Activations that are computed again are a third."""

DECODE_FORWARDS = 4
"""Decoding an image in forward passes of the UNet: for SD 1 at 512 pixels 2.5 TFLOP for 0.8."""


def training_forwards(plan: Plan) -> int:
    """Forward passes that the training steps of a run are worth, on this process."""
    images = plan.samples_per_step // plan.num_processes * (1 + plan.beside)
    return plan.num_steps * images * (STEP_FORWARDS + plan.config.recomputes)


def usual_number(plan: Plan, an_image: int, beside: int) -> int:
    """Sample images of what is learned in each set, where no option says how many: as many of 1 to
    MOST_IMAGES as keep the sets before and after below SHARE, and one in any case.

    an_image: forward passes of the UNet for one. beside: other images of a set.
    """
    room = SHARE * training_forwards(plan) / 2 / an_image
    return max(1, min(MOST_IMAGES, int(room) - beside))


@dataclass(frozen=True)
class SampleSchedule:
    """When samples are drawn.

    forwards: of the UNet for one set of samples, a prompt and its guidance counting two a sampler
    step, as if all had the size of training images. 0: nothing is drawn.
    """

    plan: Plan
    forwards: int

    @cached_property
    def steps(self) -> list[int]:
        """Steps in mid-run after which a set is drawn; the last one has its own. Where no option
        says when, sets at other strengths come first, if as many are left in mid-run."""
        config, last = self.plan.config, self.plan.num_steps
        epochs = config.validation_epochs
        if not self.forwards:
            return []
        if config.sample_every is not None:
            every = config.sample_every
            return [*range(every, last, every)] if every else []
        if epochs and config.names_prompts:
            every = epochs * self.plan.epochs.num_steps
            return [*range(every, last, every)]
        room, further = self._most_sets - 2, len(STRENGTHS)
        sets = min(MOST_SETS, room - further if room >= 2 * further else room)
        return [round(last * i / (sets + 1)) for i in range(1, sets + 1)]

    @property
    def _most_sets(self) -> int:
        """Sets that take SHARE of the work."""
        return int(SHARE * training_forwards(self.plan) / self.forwards)

    @property
    def strengths(self) -> tuple[float, ...]:
        """Strengths at which a set is drawn after the last step, beside that at strength 1; none
        where all sets together would take more than SHARE."""
        if not self.forwards or 2 + len(self.steps) + len(STRENGTHS) > self._most_sets:
            return ()
        return STRENGTHS

    @property
    def at_ends(self) -> int:
        """Sets before and after training."""
        return 2 + len(self.strengths)

    def share_of(self, forwards: int) -> float:
        """Share of the whole work that so many forward passes are, beside the training steps."""
        return forwards / (forwards + training_forwards(self.plan))

    @property
    def text(self) -> str:
        """The schedule and its share of the work, for the summary."""
        share = self.share_of(self.forwards * (len(self.steps) + self.at_ends))
        between = f", and after {_listed(self.steps)}" if self.steps else ""
        values = " and ".join(f"{strength:g}" for strength in self.strengths)
        between += f", and after the last step at strengths {values}" if values else ""
        return f"before and after{between}; about {max(1, round(100 * share))} % of the time"


def _listed(steps: list[int]) -> str:
    """Steps in words: "step 50", "steps 50, 100, 150", "every 50 of 20 sets"."""
    if len(steps) > MOST_SETS:
        return f"steps {steps[0]}, {steps[1]}, …, {steps[-1]} ({counted(len(steps), 'set')})"
    return f"step{'s' * (len(steps) > 1)} {', '.join(map(str, steps))}"
