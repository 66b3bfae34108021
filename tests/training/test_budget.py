"""A budget of memory: the blocks that are computed again, their bytes, the same run to the bit."""

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sd_lora.folders
from sd_lora.check import check
from sd_lora.config.schema import TrainConfig
from sd_lora.errors import UsageError
from sd_lora.report.events import RunPlanned
from sd_lora.training import loop
from sd_lora.training.budget import Block, count_blocks, largest_shape, least_recomputed
from sd_lora.training.data import base_of
from sd_lora.training.memory import count_step
from sd_lora.training.recompute import All, enable_checkpointing
from sd_lora.training.setup import prepare
from tests.training.runs import images, text_to_image


def most(blocks: list[Block], peaks: dict[int, int], chosen: frozenset[str]) -> int:
    """The largest lap, written out: its peak and all earlier blocks that are not computed again."""
    return max(
        peak + sum(b.saved for b in blocks[:number] if b.name not in chosen)
        for number, peak in peaks.items()
    )


def test_the_choice_is_the_best_one() -> None:
    """Against all 2^9 choices for 200 random steps: the chosen one fits, and none that fits has
    fewer operations; there is none only where all blocks are not enough."""
    draw = random.Random(0)
    for _ in range(200):
        blocks = [Block(str(i), draw.randint(0, 30), draw.randint(1, 20)) for i in range(9)]
        peaks = {number: draw.randint(0, 60) for number in range(10)}
        room = draw.randint(20, 200)
        names = [block.name for block in blocks]
        every = [
            frozenset(choice) for n in range(10) for choice in itertools.combinations(names, n)
        ]
        costs = [
            sum(b.flop for b in blocks if b.name in choice)
            for choice in every
            if most(blocks, peaks, choice) <= room
        ]
        chosen = least_recomputed(blocks, peaks, room)
        assert (chosen is None) == (not costs)
        if chosen is not None:
            assert most(blocks, peaks, chosen) <= room
            assert sum(b.flop for b in blocks if b.name in chosen) == min(costs)


@pytest.fixture
def config(tiny_sd1: Path, tmp_path: Path) -> TrainConfig:
    """Two steps of eight images, in which activations are most of the memory."""
    data = images(tmp_path / "data", 8, (128, 128))
    changes: dict[str, Any] = {"train_batch_size": 8, "resolution": 128, "max_train_steps": 2}
    changes |= {"train_text_encoder": True, "text_encoder_lr": 1e-3, "lora_dropout": 0.1}
    changes["targets"] = "attention"
    return text_to_image(tiny_sd1, data, tmp_path / "plain", **changes)


def saved_bytes(run: Any) -> int:
    """Bytes of the tensors that autograd saves in a forward pass, but for parameters; those of a
    block that is computed again are not among them."""
    own = {p.untyped_storage()._cdata for m in run.models.values() for p in m.parameters()}
    found: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            found[storage._cdata] = storage.nbytes()
        return tensor

    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loop.batch_loss(run, run.stream.batch(0), 0)
    loss.backward()
    return sum(found.values())


def test_a_run_within_a_budget(config: TrainConfig, tmp_path: Path) -> None:
    """With a budget between the bytes of no block and of all, some blocks are computed again. The
    bytes that autograd saves in a real forward pass fall by the
    counted ones, within 5 %. The run's losses and tensors are the same to the bit, dropout and text
    encoder included."""
    run = prepare(config)
    shape, configs = largest_shape(run.plan), run.meta_pipeline
    blocks, peaks, flop = count_blocks(run.config, configs, shape)
    none = count_step(run.config, configs, shape)
    assert flop == pytest.approx(none.flop, rel=0.01)
    assert most(blocks, peaks, frozenset()) == pytest.approx(none.peak, rel=0.02)
    budget = (none.peak + 3 * max(peaks.values())) // 4
    chosen = least_recomputed(blocks, peaks, budget)
    assert chosen
    assert len(chosen) < len(blocks)
    before = saved_bytes(run)
    enable_checkpointing(run.models, chosen)
    predicted = sum(block.saved for block in blocks if block.name in chosen)
    assert before - saved_bytes(run) == pytest.approx(predicted, rel=0.05)
    sd_lora.folders.disown(config.output_path)

    values = {"memory_budget": f"{budget / 2**30:.9f}GB", "output_dir": str(tmp_path / "within")}
    told: list[str] = []

    def listen(event: object) -> None:
        if isinstance(event, RunPlanned):
            told.append(event.summary.rows.get("memory budget", ""))

    digests = [sd_lora.train(c, [listen]).digest for c in (config, config.replace(**values))]
    assert digests[0] == digests[1]
    assert told[0] == ""
    assert f" by count, {len(chosen)} of {len(blocks)} blocks recomputed (+" in told[1]


def test_a_budget_that_is_too_small(config: TrainConfig) -> None:
    """The message has the bytes with all blocks computed again, and flags with which the step is
    counted below the budget; nothing is loaded before it. With a budget that is large enough no
    block is computed again."""
    config = config.replace(train_text_encoder=False, text_encoder_lr=None)
    plan = check(config, page=False).plan
    every = count_step(plan.config, base_of(config).meta_pipeline, largest_shape(plan), All())
    least = config.replace(memory_budget=f"{0.9 * every.peak / 2**30:.6f}GB")
    with pytest.raises(UsageError, match="too small: with all .* blocks recomputed") as told:
        check(least, page=False)
    assert "beside --batch 4 " in str(told.value)
    assert str(told.value).endswith("which fits")
    rows = check(config.replace(memory_budget="8 GB"), page=False).rows
    assert "of 8.0 GiB by count, 0 of" in rows["memory budget"]


def test_one_rule_for_checkpointing(config: TrainConfig) -> None:
    """A budget decides which activations are recomputed: gradient_checkpointing beside it is a
    contradiction, and a preset's gives way. A size that is none is named."""
    with pytest.raises(UsageError, match="gradient_checkpointing has no effect with memory_budget"):
        config.replace(memory_budget="8GB", gradient_checkpointing=True)
    values = config.as_dict() | {"gradient_checkpointing": None, "preset": "style"}
    given = {name: value for name, value in values.items() if value is not None}
    assert TrainConfig(**given).gradient_checkpointing
    assert not TrainConfig(**given, memory_budget="8GB").gradient_checkpointing
    for wrong in ("0GB", "much", "8"):
        with pytest.raises(UsageError, match="memory_budget must be a size above 0"):
            config.replace(memory_budget=wrong)
