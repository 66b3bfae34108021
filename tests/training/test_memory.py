"""Bytes of a step: counted without a device as they are held on one."""

from pathlib import Path

import pytest
import torch

from sd_lora.training import loop
from sd_lora.training.memory import HeldBytes, Shape, count_step
from sd_lora.training.setup import prepare
from tests.training.runs import images, text_to_image


def test_bytes_are_counted_as_they_are_held() -> None:
    """Closed form of y = relu(x W₁) W₂ with x (8, 100), W (100, 100), float32, and y's sum: the
    peak is where dW₁ = xᵀ·dh is made. The weights, x, dW₂, dh and the sum with its gradient are
    held then; at the end, the weights, x and both gradients. 2·m·k·n operations a product: two
    forward, three backward."""
    x, first, second = (torch.empty(n, 100, device="meta") for n in (8, 100, 100))
    first.requires_grad_(), second.requires_grad_()
    with HeldBytes([x, first, second]) as counter:
        (torch.relu(x @ first) @ second).sum().backward()
    small, large, number = 8 * 100 * 4, 100 * 100 * 4, 4
    assert counter.peak == 2 * large + small + large + small + large + 2 * number
    assert counter.now == 2 * large + small + 2 * large
    assert counter.flop == 5 * 2 * 8 * 100 * 100


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}])
def test_a_step_is_counted_as_it_goes(
    options: dict[str, object], tiny_sd1: Path, tmp_path: Path
) -> None:
    """The bytes that a real forward and backward pass holds at its peak, text encoder included,
    with and without checkpointing, are those counted on the meta device within 10 %: the rest, and
    the gradients."""
    data = images(tmp_path / "data", 8, (64, 128))
    changes: dict[str, object] = {"train_batch_size": 8, "resolution": 128} | options
    run = prepare(text_to_image(tiny_sd1, data, tmp_path / "o", train_text_encoder=True, **changes))
    batch = run.stream.batch(0)
    with HeldBytes() as held:
        loop.accumulate(run, 0, batch, 0)
    count = count_step(run.config, run.meta_pipeline, Shape(8, batch.items[0].crop.size))
    layers = sum(p.nbytes for p in run.parameters)
    assert count.trained == 4 * layers
    assert count.rest + layers == pytest.approx(held.peak, rel=0.1)
