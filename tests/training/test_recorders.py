"""A CPU's recordings: the operators of a work, done again on other numbers of the same tensors."""

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sd_lora.training.recorders import OperatorRecorder


def written_into_a_view_of_its_own(x: Tensor, _: Tensor) -> list[Tensor]:
    y = x * 2
    y[1:, ::2].add_(x[1:, ::2]).t().mul_(3)
    return [y, y.t()[1]]


def written_into_a_view_of_what_stays(x: Tensor, kept: Tensor) -> list[Tensor]:
    kept.t()[0].add_(x[0])
    return [kept.clone()]


def several_results(x: Tensor, _: Tensor) -> list[Tensor]:
    values, places = x.max(1)
    parts = x.exp().split(2, 1)
    torch._foreach_mul_(list(parts), 2.0)
    return [values, places, *torch._foreach_add(list(parts), 1.0), parts[1]]


def saved_by_autograd(x: Tensor, _: Tensor) -> list[Tensor]:
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        y = F.layer_norm(F.silu(leaf), (4,)).softmax(-1).unbind(1)
        loss = (y[0] * y[2]).sum() + F.gelu(leaf).square().mean()
    return [loss.detach(), *torch.autograd.grad(loss, leaf)]


def memory_that_is_used_again(x: Tensor, _: Tensor) -> list[Tensor]:
    total = x
    for factor in range(2, 20):
        part = total * factor  # freed in each round, and so others' place
        total = part.flip(1) - x
        del part
    return [total]


def a_number_of_the_host(x: Tensor, _: Tensor) -> list[Tensor]:
    found = []
    for number in range(20):
        own = x * number
        del own
        found.append(x + torch.tensor(3.0 + number))
    return found


@pytest.mark.parametrize(
    "work",
    [
        written_into_a_view_of_its_own, written_into_a_view_of_what_stays, several_results,
        saved_by_autograd, memory_that_is_used_again, a_number_of_the_host,
    ],
)  # fmt: skip
def test_a_recording_is_the_work(work: Callable[[Tensor, Tensor], Sequence[Tensor]]) -> None:
    """On other numbers, and on others again, a recording gives and leaves the bits of the work
    itself: through views of its own tensors and of those that stay, operators in place and of
    several results, gradients, and memory that is freed and used again."""
    x, kept = torch.randn(3, 4), torch.randn(4, 3)
    with torch.no_grad():
        again = OperatorRecorder()(lambda: work(x, kept))
        for _ in range(2):
            x.copy_(torch.randn(3, 4))
            before = kept.clone()
            right = [t.clone() for t in (*work(x, kept), kept)]
            kept.copy_(before)
            found = [*again(), kept]
            assert len(found) == len(right)
            assert all(map(torch.equal, found, right))


@pytest.mark.parametrize(
    ("work", "reason"),
    [
        (lambda x: [x * float(x.sum())], "gives the host a number"),
        (lambda x: [x + torch.tensor([1.0, 2.0, 3.0, 4.0])], "made of numbers of the host"),
        (lambda x: [(x * 2).view(torch.int32) + 1], "read as another dtype"),
    ],
)
def test_what_would_not_come_again_is_refused(
    work: Callable[[Tensor], list[Tensor]], reason: str
) -> None:
    """A number that the host reads, a tensor of its numbers, and bytes that are read as another
    dtype are errors while the work is recorded."""
    x = torch.randn(3, 4)
    with pytest.raises(RuntimeError, match=reason):
        OperatorRecorder()(lambda: work(x))
