"""What one process wishes is granted on all of them, at one step."""

import json
import os
from pathlib import Path

import pytest
from accelerate import Accelerator

from sd_lora.training.agreement import Agreement
from tests.training.launches import FORK, forget, free_port

CALLS = 8


def test_one_process_is_answered_at_once() -> None:
    """A run of one process has its own wishes, at the step that has them."""
    agreed = Agreement(Accelerator(cpu=True))
    assert [agreed([True, False]), agreed([True, True])] == [[True, False], [True, True]]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_a_wish_of_one_is_granted_to_all_once(tmp_path: Path) -> None:
    """Of two processes both have the same answers. A wish of a moment is granted in the next step,
    and one of the last step at once; one that stays until it is granted is granted once, and so is
    one that something else has granted in its step."""
    port = free_port()

    def process(rank: int) -> None:
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
        os.environ |= {name: str(value) for name, value in own.items()}
        forget()
        agreed, waits, said = Agreement(Accelerator()), True, []
        for call in range(CALLS):
            last = call == CALLS - 1
            moment, met = rank == 0 and call in (1, 5), rank == 0 and call == 3
            wishes = [moment, rank == 1 and call >= 3 and waits, met, rank == 1 and last]
            said.append(agreed(wishes, wait=last))
            if said[-1][1]:
                waits = False
                agreed.meet(1)
            if call == 3:
                agreed.meet(2)
        (tmp_path / str(rank)).write_text(json.dumps(said))
        os._exit(0)

    processes = [FORK.Process(target=process, args=(rank,)) for rank in range(2)]
    for started in processes:
        started.start()
    for started in processes:
        started.join(60)
    assert [started.exitcode for started in processes] == [0, 0]
    ours, theirs = (json.loads((tmp_path / str(rank)).read_text()) for rank in range(2))
    assert ours == theirs
    granted = [[call for call in range(CALLS) if ours[call][i]] for i in range(4)]
    assert granted == [[2, 6], [4], [], [CALLS - 1]]
