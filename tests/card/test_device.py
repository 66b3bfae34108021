"""The card of the CPU's kernels is as strict as a card."""

import gc

import pytest
import torch
from torch import nn

from sd_lora.transfer import Fetched
from tests.card.device import NAME

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_name() != NAME,
        reason="python -m tests.card has the device",
    ),
]


def test_numbers_are_those_of_the_cpu() -> None:
    """A network's output and its weights after AdamW's step, with convolution and attention, are
    the CPU's to its rounding."""

    def stepped(device: str) -> list[torch.Tensor]:
        torch.manual_seed(0)
        convolution, linear = nn.Conv2d(3, 8, 3).to(device), nn.Linear(8, 8).to(device)
        parameters = [*convolution.parameters(), *linear.parameters()]
        optimizer = torch.optim.AdamW(parameters, 0.1, fused=True)
        x = linear(convolution(torch.randn(2, 3, 6, 6).to(device)).flatten(2).mT)[:, None]
        attended = nn.functional.scaled_dot_product_attention(x, x, x)
        attended.square().sum().backward()
        optimizer.step()
        return [attended.detach(), *parameters]

    for mine, theirs in zip(stepped("cuda"), stepped("cpu"), strict=True):
        assert mine.is_cuda
        torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-5, atol=1e-6)


def test_devices_do_not_mix() -> None:
    """A product or a sum with a tensor of the CPU is refused, in place too; one number is not."""
    x, y = torch.ones(3, device="cuda"), torch.ones(3)
    for work in (lambda: x + y, lambda: x.add_(y), lambda: torch.stack([x, y]), lambda: x @ y):
        with pytest.raises(RuntimeError, match="on the same device|is on cpu|be on cuda"):
            work()
    assert (x + torch.tensor(1.0)).is_cuda


def test_waits_of_the_host_are_told() -> None:
    """Where a card is asked for that, reading a number, looking for places and copying memory that
    is not pinned are refused, and what needs no wait is not."""
    x, host = torch.ones(3, device="cuda"), torch.ones(3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for work in (x.sum().item, x.nonzero, x.cpu, x.unique, lambda: host.to("cuda"),
                     lambda: x[x > 0], lambda: x.index_put_((x > 0,), x), lambda: x[host.long()],
                     lambda: host.to("cuda", non_blocking=True),
                     lambda: host.copy_(x, non_blocking=True)):  # fmt: skip
            with pytest.raises(RuntimeError, match="called a synchronizing CUDA operation"):
                work()
        there = host.pin_memory().to("cuda", non_blocking=True) * 2
        back = Fetched(there)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert back.numbers() == [2.0] * 3


def test_memory_counts() -> None:
    """Tensors take their bytes in blocks of 512 until nothing holds them, and the peak is kept."""
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    x = torch.ones(1000, device="cuda")
    assert torch.cuda.memory_allocated() - before == 4096
    y = x[10:].view(2, -1)
    del x
    assert torch.cuda.memory_allocated() - before == 4096
    del y
    assert torch.cuda.memory_allocated() == before
    assert torch.cuda.max_memory_allocated() - before >= 4096


def test_a_graph_is_its_kernels() -> None:
    """A recorded work is done again on new numbers at the same places, gradients and writes in
    place included; one that waits for the card, or reads memory of the host, cannot be recorded."""
    weight = torch.full((3, 3), 2.0, device="cuda", requires_grad=True)
    x, total = torch.ones(3, device="cuda"), torch.zeros(3, 3, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = (weight @ x).square().sum()
        total.add_(torch.autograd.grad(y, weight)[0])
    total.zero_()
    x.copy_(torch.tensor([1.0, 2.0, 3.0]))
    for _ in range(2):
        graph.replay()
    assert y.item() == 3 * 12.0**2
    assert torch.equal(total.cpu(), 2 * 24 * torch.tensor([[1.0, 2.0, 3.0]] * 3))
    for work in (x.sum().item, lambda: x.add_(torch.ones(3))):
        with pytest.raises(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph()):
            work()
    assert not torch.cuda.is_current_stream_capturing()
