"""Recorded passes: the plain ones' bytes, from operators alone, and a plain run where they fail."""

import gc
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from sd_lora.adapters.inject import lora_layers
from sd_lora.report.events import Warned
from sd_lora.training import graphs, loop
from sd_lora.training.checkpoint import factors_of
from sd_lora.training.graphs import WARM, Graphs, Pass, _distance
from sd_lora.training.losses import LossLog
from sd_lora.training.processes import determinism
from sd_lora.training.recorders import OperatorRecorder, Work
from sd_lora.training.run import Run
from sd_lora.training.setup import prepared_run
from sd_lora.transfer import sent
from tests.training.runs import dreambooth, images, text_to_image

STEPS = WARM + 5


OWN = object()


class Recorder(OperatorRecorder):
    """A CPU's recorder in runs of a few steps, which counts. recorded: number of works. replayed:
    of the times that any of them was done again."""

    least = 0

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, work: Work) -> Work:
        recorded = super().__call__(work)
        self.recorded += 1

        def replay() -> Sequence[Tensor]:
            self.replayed += 1
            return recorded()

        return replay


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images(tmp_path_factory.mktemp("images"), 8)  # batches of 4 have one form


def trained(
    config: Any, recorder: Any = None, kind: type[Graphs] = Graphs
) -> tuple[list[float], dict[str, Any], Run, list[Any]]:
    """Losses and factors of a run's steps, the run, and its warnings. recorder: of its passes;
    None: they are plain; OWN: the run's."""
    events: list[Any] = []
    with prepared_run(config, [events.append]) as run:
        torch.manual_seed(3)
        for parameter in lora_layers(run.models["unet"]):  # B = 0 would give A no gradient
            parameter.data.normal_(std=0.05)
        if recorder is not OWN:
            run.graphs = None
        if recorder and recorder is not OWN:
            run.graphs = kind(run.models["unet"], run.fast_models, recorder)
        log = LossLog(run)
        loop.train_steps(run, log)
        factors = {name: tensor.clone() for name, tensor in factors_of(run.models).items()}
        said = [f for e in events if isinstance(e, Warned) for f in e.findings]
        codes = ("graphs", "no-graphs", "not-recorded")
        return log.losses, factors, run, [f for f in said if f.code in codes]


CASES: dict[str, dict[str, Any]] = {
    "attention": {"targets": "attention"},
    "conv": {},
    "sdxl": {"targets": "attention"},
    "general path": {"use_dora": True},
    "accumulated": {"gradient_accumulation_steps": 2, "train_batch_size": 2},
    "recomputed": {"gradient_checkpointing": True},
    "learned weights": {"edm2_loss_weighting": True},
    "text": {"train_text_encoder": True},
    "masks": {"alpha_mask": True, "train_batch_size": 1, "max_train_steps": 24},
}


@pytest.mark.parametrize("case", CASES)
def test_a_recorded_run_is_the_plain_one(
    case: str, tiny_sd1: Path, tiny_sdxl: Path, data: Path, tmp_path: Path
) -> None:
    """Losses of all steps and the factors after them are those of a plain run to the bit: each step
    has other images, captions, noise, timesteps and learning rates, which reach the recorded
    operators through tensors alone. No number of the pass comes from the host while it is recorded.
    The first passes of a form are plain, the next one goes both ways, and all others are replays,
    which are counted."""

    def images_of(case: str) -> Path:
        if case != "masks":
            return data
        folder = images(tmp_path / "masked", 8)
        for path in sorted(folder.glob("*.png"))[:2]:  # some batches have masks, and others none
            image = Image.open(path).convert("RGB")
            image.putalpha(Image.linear_gradient("L").resize(image.size))
            image.save(path)
        return folder

    model = tiny_sdxl if case == "sdxl" else tiny_sd1
    more = {"max_train_steps": STEPS, "lr_scheduler": "linear"} | CASES[case]
    make: Callable[..., Any] = dreambooth if case == "text" else text_to_image
    found = []
    for recorder in (None, Recorder()):
        config = make(model, images_of(case), tmp_path / str(bool(recorder)), **more)
        found.append(trained(config, recorder))
    (losses, factors, *_), (mine, my_factors, run, said) = found
    assert mine == losses
    assert factors.keys() == my_factors.keys()
    assert all(torch.equal(my_factors[name], factors[name]) for name in factors)
    assert run.graphs, [f.details for f in said]
    forms = run.graphs.forms.values()
    assert recorder.recorded == sum(form.recorded is not None for form in forms) > 0
    # each pass of a recorded form after the plain ones is a replay
    passes = sum(form.seen - WARM for form in forms if form.proved)
    passes -= case == "accumulated"  # the third pass is the first of its step, and the proof later
    assert recorder.replayed == passes >= STEPS - WARM
    assert not said


class ReadsANumber(Recorder):
    """Fails as a CUDA device does where the pass waits for a number."""

    def __call__(self, work: Work) -> Work:
        return super().__call__(lambda: (work(), torch.ones(1).item())[0])


class LeavesOut(Recorder):
    """Replays nothing: the results stay those of the recorded batch, as of a value that Python has
    put into the operators."""

    def __call__(self, work: Work) -> Work:
        results = work()
        return lambda: results


class Loud(LeavesOut):
    """The same of a card, whose results may differ in their last bits."""

    exact = False


class OutOfMemory(Recorder):
    """Has no room for a second set of activations."""

    def __call__(self, work: Work) -> Work:
        raise torch.OutOfMemoryError("CUDA out of memory")


class NoRoomBeside(Graphs):
    """Has no memory for a plain pass once another is recorded, as on a card that is nearly full."""

    def _compute(self, run: Run, given: Any) -> Any:
        if self.number:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super()._compute(run, given)

    def _plain(self, run: Run, given: Any) -> Any:
        if run.graphs is None:  # its memory is needed now
            assert not any(isinstance(one, Pass) for one in gc.get_objects())
        return super()._plain(run, given)


class NoRoomToCompare(NoRoomBeside):
    """Has no memory to compare both passes, whose gradients are added up already."""

    def _compute(self, run: Run, given: Any) -> Any:
        return Graphs._compute(self, run, given)

    def _compared(self, *args: Any) -> Any:
        def no_room(*_: Any) -> float:
            raise torch.OutOfMemoryError("CUDA out of memory")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(graphs, "_distance", no_room)
            return super()._compared(*args)


@pytest.mark.parametrize("kind", [NoRoomBeside, NoRoomToCompare])
def test_recordings_make_room(kind: Any, tiny_sd1: Path, data: Path, tmp_path: Path) -> None:
    """A pass for which there is no memory beside the recorded ones, wherever it ends, is done again
    without them, which are gone: the run goes on, to the bit as one that never records, and says
    why."""
    found = []
    for one in (None, kind):
        config = text_to_image(tiny_sd1, data, tmp_path / str(one), max_train_steps=STEPS)
        found.append(trained(config, Recorder() if one else None, one or Graphs))
    (losses, factors, *_), (mine, my_factors, run, said) = found
    assert mine == losses
    assert all(torch.equal(my_factors[name], factors[name]) for name in factors)
    assert run.graphs is None
    assert "keep the memory that a plain one needs" in said[0].details


def test_each_tensor_is_compared() -> None:
    """A gradient that is wrong by half, and a hundredth of the whole one, as A's are while B is
    nearly 0, is far beyond the limit; one of rounding alone is not, and with an infinite one there
    is nothing to compare."""
    large, small = torch.full((100,), 1.0), torch.full((10,), 0.03)
    assert _distance([large, 1.5 * small], [large, small]) == pytest.approx(0.5)
    assert _distance([large, 2e-7 * small], [large, 1e-7 * small]) < 1e-4
    assert _distance([large, small], [large, None]) == 0
    assert math.isnan(_distance([large, small], [large, small / 0]))
    assert _distance([large, small / 0], [large, small]) == math.inf


@pytest.mark.parametrize(
    ("recorder", "reason"),
    [
        (ReadsANumber, "gives the host a number"),
        (LeavesOut, "a recorded pass does not give the plain one's bits"),
        (Loud, "a recorded pass differs from the plain one by"),
        (OutOfMemory, "there is no memory for a second set of activations"),
    ],
)
def test_a_pass_that_cannot_be_recorded_is_plain(
    recorder: Any, reason: str, tiny_sd1: Path, data: Path, tmp_path: Path
) -> None:
    """A recording that fails, or gives other results than the plain pass, is told with its reason
    once, and the run's losses and factors are those of a run that never records."""
    found = []
    for ours in (None, recorder()):
        config = text_to_image(tiny_sd1, data, tmp_path / str(bool(ours)), max_train_steps=STEPS)
        found.append(trained(config, ours))
    (losses, factors, *_), (mine, my_factors, _, said) = found
    assert mine == losses
    assert all(torch.equal(my_factors[name], factors[name]) for name in factors)
    (finding,) = said
    assert finding.code == ("not-recorded" if ours.exact else "no-graphs")
    assert reason in finding.details


def test_each_form_of_batch_has_its_recording(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images of two shapes make two forms, both recorded, in a run to the bit as the plain one;
    with room for one recording the other form stays plain, with the same bytes."""
    data = images(tmp_path / "wide", 2, (128, 64))
    more = images(tmp_path / "square", 2)
    for path in more.glob("*.png"):
        path.rename(data / f"square_{path.name}")
    (data / "metadata.jsonl").unlink()
    found = []
    for name, most in (("plain", 0), ("two", 2), ("one", 1)):
        monkeypatch.setattr(graphs, "MOST", most)
        config = text_to_image(
            tiny_sd1, data, tmp_path / name, max_train_steps=4 * WARM, train_batch_size=2,
            caption_default="a thing",
        )  # fmt: skip
        recorder = Recorder() if most else None
        losses, factors, *_ = trained(config, recorder)
        assert (recorder.recorded if recorder else 0) == most
        found.append((losses, factors))
    for losses, factors in found[1:]:
        assert losses == found[0][0]
        assert all(torch.equal(factors[name], found[0][1][name]) for name in factors)


@pytest.mark.parametrize("fails", [False, True])
def test_a_cpu_records_by_itself(
    fails: bool, tiny_sd1: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that asks for nothing is recorded on a CPU without a word, where enough passes follow,
    and a note says why where that fails. A shorter run is not."""

    def refused(*_: Any) -> Any:
        raise RuntimeError("no operators here")

    monkeypatch.setattr(OperatorRecorder, "least", STEPS - WARM)
    if fails:
        monkeypatch.setattr(OperatorRecorder, "__call__", refused)
    for steps in (STEPS, STEPS - 1):
        config = text_to_image(tiny_sd1, data, tmp_path / str(steps), max_train_steps=steps)
        *_, run, said = trained(config, OWN)
        notes = ["not-recorded"] * (fails and steps == STEPS)
        assert [f.code for f in said] == notes
        forms = run.graphs.forms.values() if run.graphs else ()
        assert any(form.proved for form in forms) == (steps == STEPS and not fails)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "this run is on no CUDA device"),
        ({"cuda_graphs": "off"}, None),
    ],
)
def test_a_run_without_graphs_says_why(
    options: dict[str, Any], reason: str | None, tiny_sd1: Path, data: Path, tmp_path: Path
) -> None:
    """A run that asks for graphs and cannot have them has the reason among its summary's notes."""
    config = text_to_image(tiny_sd1, data, tmp_path, **({"cuda_graphs": "auto"} | options))
    with prepared_run(config) as run:
        notes = [note for note in run.summary.notes if "CUDA graphs" in note]
    assert notes == ([f"no CUDA graphs: {reason}"] if reason else [])


def test_losses_without_a_gradient_are_no_training(
    tiny_sd1: Path, data: Path, tmp_path: Path
) -> None:
    """A batch that is measured alone leaves no losses in the ledger; a trained one leaves its."""
    with prepared_run(text_to_image(tiny_sd1, data, tmp_path)) as run:
        batch = run.batch(0)
        assert batch is not None
        with torch.no_grad():
            loop.batch_loss(run, batch, 0)
        assert not run.ledger.waiting
        loop.batch_loss(run, batch, 0)
        assert len(run.ledger.waiting) == 1


@pytest.mark.gpu
@pytest.mark.fast_gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_host_does_not_wait_for_the_card() -> None:
    """A batch of another size, sent while the card is busy, arrives with its numbers, and the host
    goes on before the card has done its work."""
    device = torch.device("cuda")
    sent(torch.zeros(300_000), device)  # the first pinned memory of a process may wait
    a = torch.randn(8192, 8192, device=device)
    torch.cuda.synchronize()
    for _ in range(20):
        a = a @ a
    done = torch.cuda.Event()
    done.record()
    numbers = torch.arange(300_000.0)
    there = sent(numbers, device)
    assert not done.query()
    assert torch.equal(there.cpu(), numbers)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_card_records_the_same_run(tiny_sd1: Path, data: Path, tmp_path: Path) -> None:
    """On a GPU, a run with graphs has the losses and factors of one without, and its form is
    proved."""
    found = []
    for word in ("off", "auto"):
        config = text_to_image(
            tiny_sd1, data, tmp_path / word, max_train_steps=STEPS, cuda_graphs=word,
        )  # fmt: skip
        with determinism(True):
            found.append(trained(config, OWN))
    (losses, factors, *_), (mine, my_factors, run, said) = found
    assert run.graphs
    assert [finding.code for finding in said] == ["graphs"], said
    torch.testing.assert_close(mine, losses, rtol=1e-4, atol=0)
    for name, tensor in factors.items():
        torch.testing.assert_close(my_factors[name], tensor, rtol=1e-3, atol=1e-6)
