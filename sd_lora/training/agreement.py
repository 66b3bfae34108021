"""Wishes of a run's processes, agreed on in each step while their cards go on."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator

from sd_lora.transfer import Fetched, sent


class Agreement:
    """Whether any process has a wish, the same answer on all: all must save and leave the loop at
    the same step.

    Of several processes the answer to a step's wishes comes with those of the next one. A host that
    asked for it at once would wait until its card has done all that it was sent; so it waits for
    the step before, and stays one ahead.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._asked: Fetched | None = None
        self._met: set[int] = set()

    def __call__(self, wishes: Sequence[bool], wait: bool = False) -> list[bool]:
        """Whether any process has each wish; the same number is asked for each time.

        wait: for an answer now, as after the last step.
        """
        if self.accelerator.num_processes == 1:
            return [*wishes]
        flags = sent(torch.tensor([float(wish) for wish in wishes]), self.accelerator.device)
        asked = Fetched(self.accelerator.reduce(flags, "sum"))
        before, met = self._asked, self._met
        self._asked, self._met = asked, set()
        granted = [False] * len(wishes)
        if before:
            granted = [count > 0 and i not in met for i, count in enumerate(before.numbers())]
        if wait:
            granted = [x or count > 0 for x, count in zip(granted, asked.numbers(), strict=True)]
        return granted

    def meet(self, number: int) -> None:
        """Take a wish of the last call, by its place, as granted: it was done in the same step."""
        self._met.add(number)
