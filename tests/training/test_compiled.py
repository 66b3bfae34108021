"""Compiled blocks: the plain ones' numbers, one program a width, taken where they are faster."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from sd_lora.training import compiled, loop
from sd_lora.training.compiled import of_any_size, try_compiled
from sd_lora.training.fast.blocks import Pass, block_pass
from sd_lora.training.fast.step import FastModel
from sd_lora.training.losses import LossLog
from sd_lora.training.setup import prepared_run
from tests.training.runs import images, text_to_image
from tests.training.test_fast_step import adapted_unet, arguments, assert_same, step


@pytest.fixture(autouse=True)
def _no_program_before() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images(tmp_path_factory.mktemp("images"))


def traced(compute: Pass) -> Pass:
    """All that torch.compile does but the writing of kernels: an error where Python is needed."""
    return torch.compile(compute, dynamic=False, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize(
    ("targets", "dtype"), [("attention", torch.bfloat16), ("all", torch.float32)]
)
def test_blocks_of_a_width_share_a_program(targets: str, dtype: torch.dtype) -> None:
    """Loss and all gradients of a step are those of the plain blocks to the bit. Blocks of a width
    have one program together, which takes any number of images and of their tokens: batches of
    other forms add none."""
    unet = adapted_unet("sd1", targets, dtype)
    model = FastModel(unet)
    widths = {m.norm1.normalized_shape for m in unet.modules() if hasattr(m, "norm3")}
    assert model.way.blocks > len(widths)
    forms = [(2, 8, 8), (3, 16, 8), (2, 16, 16)]
    way, programs = of_any_size(traced(block_pass)), []
    for number, *size in forms:
        given = arguments(unet, dtype, 2)
        given["encoder_hidden_states"] = given["encoder_hidden_states"].repeat(2, 1, 1)[:number]
        given["timestep"] = torch.tensor([3, 700, 20])[:number]
        given["sample"] = torch.randn(number, 4, *size, dtype=dtype)
        model.way.compute = block_pass
        plain = step(unet, given, model)
        model.way.compute = way
        assert_same(step(unet, given, model), plain, tolerance=0)
        programs.append(counters["stats"]["unique_graphs"])
    # the first block of all has an input without a gradient, where nothing before it learns
    assert programs == [len(widths) + (targets == "attention")] * len(forms)


def test_compiled_kernels_are_the_same_function() -> None:
    """Torch's own compiler, with the kernels that it writes for one block of several, gives a
    step's loss and gradients to 1e-5 of the plain one's."""
    unet = adapted_unet("sd1", "transformer")
    given, model = arguments(unet), FastModel(unet)
    plain = step(unet, given, model)
    program, chosen = compiled.inductor(block_pass), set[int]()

    def one(parts: Any, *tensors: Tensor) -> Tensor:
        chosen.add(id(parts)) if not chosen else None
        return (program if id(parts) in chosen else block_pass)(parts, *tensors)

    model.way.compute = one
    assert_same(step(unet, given, model), plain)
    assert counters["stats"]["unique_graphs"] == 1


def slow(compute: Pass) -> Pass:
    """A pass that takes longer than the plain one."""

    def late(*arguments: Any) -> Tensor:
        time.sleep(0.02)
        return compute(*arguments)

    return late


def fails(compute: Pass) -> Pass:
    raise RuntimeError("no C++ compiler\nfound in PATH")


@pytest.mark.parametrize(
    ("plain", "compiler", "words", "taken"),
    [
        (slow, lambda compute: compute, "transformer blocks: a batch takes", True),
        (lambda compute: compute, slow, "no: a batch takes", False),
        (lambda compute: compute, fails, "no: RuntimeError: no C++ compiler", False),
    ],
)
def test_the_faster_way_is_taken(
    plain: Any, compiler: Any, words: str, taken: bool, tiny_sd1: Path, data: Path,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Programs are used if a batch is faster by them, and the summary has both times; where they
    are slower, or the compiler fails, blocks stay plain. Nothing is trained meanwhile: no parameter
    has a gradient, and the random state is as before."""
    monkeypatch.setattr(compiled, "SHORT", 0.0)
    config = text_to_image(tiny_sd1, data, tmp_path, compile="auto", targets="attention")
    events: list[Any] = []
    with prepared_run(config, [events.append]) as run:
        events.clear()
        (model,) = run.fast_models
        model.way.compute = plain(block_pass)
        state = torch.get_rng_state()
        try_compiled(run, loop.accumulate, compiler)
        assert run.summary.rows["compile"].startswith(words)
        assert run.fit.compiled == taken
        assert (model.way.compute is block_pass) == (not taken)
        assert all(p.grad is None for p in run.parameters)
        shown = [(event.label, event.done, event.ended) for event in events]
        assert shown[0] == ("trying compiled blocks", 0, False)
        assert shown[-1] == ("trying compiled blocks", 4 if compiler is fails else 8, True)
        assert torch.equal(torch.get_rng_state(), state)


def other_last_bits(compute: Pass) -> Pass:
    """A pass whose results differ from the plain one's as those of other kernels do."""
    return lambda *arguments: compute(*arguments) * (1 + 2.0**-22)


def test_a_resumed_run_goes_the_way_of_its_checkpoint(
    tiny_sd1: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run whose blocks are compiled says so in checkpoints and log; resumed, they are compiled
    without being measured again, and the rest of it has the same bits. Of a plain checkpoint they
    stay plain; `compile off` makes them plain, with other last bits."""
    monkeypatch.setattr(compiled, "SHORT", 0.0)
    config = text_to_image(
        tiny_sd1, data, tmp_path, compile="auto", max_train_steps=4, checkpointing_steps=2,
        targets="attention",
    )  # fmt: skip

    def weights(config: Any, slow_plain: bool = False) -> tuple[Tensor, str]:
        with prepared_run(config) as run:
            loop.try_largest(run, loop.accumulate)
            (model,) = run.fast_models
            model.way.compute = slow(block_pass) if slow_plain else block_pass
            try_compiled(run, loop.accumulate, other_last_bits)
            run.restore()
            loop.open_output(run)
            loop.train_steps(run, LossLog(run))
            row = run.summary.rows.get("compile", "")
            return torch.cat([p.detach().flatten() for p in run.parameters]), row

    whole, _ = weights(config, slow_plain=True)
    lines = [json.loads(x) for x in (tmp_path / "training_log.jsonl").read_text().splitlines()]
    assert [line["fit/compiled"] for line in lines if "loss" in line] == [1] * 4
    again = config.replace(resume_from_checkpoint="checkpoint-2")
    resumed, row = weights(again)
    assert row == "transformer blocks, as before the checkpoint"
    assert torch.equal(resumed, whole)
    plain, row = weights(again.replace(compile="off"))
    assert not row
    assert not torch.equal(plain, whole)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_dora": True}, "nothing is compiled: no block is Stable Diffusion's"),
        ({}, "no: the run's 6 batches take "),
    ],
)
def test_nothing_is_compiled_in_vain(
    options: dict[str, Any], reason: str, tiny_sd1: Path, data: Path, tmp_path: Path
) -> None:
    """A method without the fast path, and a run that is over before a compiler would be: neither
    compiles, and the summary says why."""

    def never(compute: Pass) -> Pass:
        raise AssertionError

    with prepared_run(text_to_image(tiny_sd1, data, tmp_path, compile="auto", **options)) as run:
        try_compiled(run, loop.accumulate, never)
        said = [*run.summary.notes, run.summary.rows.get("compile", "")]
        assert any(text.startswith(reason) for text in said), said
        assert not run.fit.compiled
