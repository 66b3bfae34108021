"""Several LoRAs over one base in one run: each is as if it were alone."""

import gc
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

import sd_lora
from sd_lora.cli import main
from sd_lora.config.jobs import Job
from sd_lora.errors import Interrupted, RunError, UsageError
from sd_lora.report.events import Event, RunPlanned, StepDone, Warned
from sd_lora.training import setup
from sd_lora.training.jobs.base import SharedBase
from sd_lora.training.jobs.together import Together
from sd_lora.training.jobs.train import train_jobs
from sd_lora.training.loop import Turn
from sd_lora.training.run import Run
from sd_lora.training.setup import checked_run, load_base, prepare, ready, released
from tests.training.runs import dreambooth, images, text_to_image

DIFFERENT: dict[str, dict[str, Any]] = {
    "cat": {"rank": 2, "seed": 1, "max_train_steps": 3, "train_batch_size": 2},
    "dog": {
        "rank": 8, "lora_alpha": 3.0, "seed": 2, "learning_rate": 0.3, "max_train_steps": 5,
        "train_batch_size": 3, "train_text_encoder": True,
    },
    "fox": {
        "rank": 4, "seed": 3, "max_train_steps": 2, "gradient_accumulation_steps": 2,
        "train_batch_size": 1, "targets": "attention",
    },
}  # fmt: skip
"""Name of a job → its options: other images, ranks, rates, seeds, targets, batches and lengths."""


PLAIN = {"optimizer": "torch.optim.SGD", "learning_rate": 0.1}
"""Gradient descent, whose factors are as near as the gradients: AdamW divides each by its size."""


def jobs_of(model: Path, place: Path, out: Path, **shared: object) -> list[Job]:
    """A job for each of `DIFFERENT`, each on images of its own."""
    found = []
    for number, (name, options) in enumerate(DIFFERENT.items(), 3):
        data = images(place / name, number) if not (place / name).is_dir() else place / name
        config = text_to_image(
            model,
            data,
            out / name,
            **({"optimizer": "torch.optim.SGD", "learning_rate": 0.1} | shared | options),
        )
        found.append(Job(name, config))
    return found


def factors(folder: Path) -> dict[str, Tensor]:
    """The factors of a run's last checkpoint."""
    (checkpoint,) = folder.glob("checkpoint-*")
    return load_file(checkpoint / "adapter.safetensors")


def test_each_job_is_as_if_alone(tiny_sd1: Path, tmp_path: Path) -> None:
    """Losses and factors of three jobs of other images, ranks, rates, seeds, targets and lengths,
    one with a text encoder that learns, equal those of the runs alone to 1e-5."""
    together = train_jobs(jobs_of(tiny_sd1, tmp_path, tmp_path / "together"))
    assert not together.errors
    for job in jobs_of(tiny_sd1, tmp_path, tmp_path / "alone"):
        alone = sd_lora.train(job.config)
        mine = together.results[job.name]
        assert len(alone.losses) == DIFFERENT[job.name]["max_train_steps"]
        torch.testing.assert_close(
            torch.tensor(mine.losses), torch.tensor(alone.losses), rtol=1e-5, atol=0
        )
        theirs, ours = factors(alone.output_dir), factors(mine.output_dir)
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert (ours[name] - tensor).norm() <= 1e-5 * tensor.norm() + 1e-9, name
        assert [f.path.name for f in mine.files] == [f.path.name for f in alone.files]


def test_the_base_is_there_once(tiny_sd1: Path, tmp_path: Path) -> None:
    """The frozen weights of all jobs and of the UNet that they learn through are the same memory,
    the bytes of one base. The UNet takes no more than a copy of the factors and of the biases that
    the fast path puts side by side."""
    jobs = jobs_of(tiny_sd1, tmp_path, tmp_path / "out", targets="all", train_text_encoder=False)
    with released([job.config for job in jobs]):
        base = SharedBase(load_base)
        runs = [ready(checked_run(job.config), (), base) for job in jobs]
        trained = [p for run in runs for p in run.parameters]
        whole = num_bytes(base.unet().parameters())
        before, unet = num_bytes(living()), base.unet()
        together = Together(runs, unet)
        biases = num_bytes(p for p in unet.parameters() if p.dim() == 1)
        assert num_bytes(living()) - before <= num_bytes(trained) + biases
        together.learn([Turn(run, 0, run.stream.batch(0), 0) for run in runs])
        models = [*(run.parts.unet for run in runs), unet]
        left_out = {id(parameter) for parameter in trained}
        tensors = [p for model in models for p in model.parameters() if id(p) not in left_out]
        assert num_bytes(tensors) == whole
        vaes = {id(p) for run in runs for p in run.parts.vae.parameters()}
        assert len(vaes) == len([*runs[0].parts.vae.parameters()])


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct memory of tensors."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def living() -> list[Tensor]:
    """All tensors of this process."""
    gc.collect()
    # a compiler's tensors, which other tests leave, have no memory
    return [o for o in gc.get_objects() if isinstance(o, Tensor) and not isinstance(o, FakeTensor)]


class Products(TorchDispatchMode):
    """Counts the matrix products and convolutions with each tensor among its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[int] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        if any(word in str(func) for word in ("mm", "convolution")):
            storages = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
            self.counts.update(storages)
        return func(*args, **(kwargs or {}))


def test_the_base_is_computed_once(tiny_sd1: Path, tmp_path: Path) -> None:
    """Frozen weights go into as many products, forward and backward, with three jobs as in a run
    alone, whatever is adapted."""
    rules: dict[str, Any] = {"train_text_encoder": False, "targets": "all"}
    jobs = [
        Job(job.name, job.config.replace(gradient_accumulation_steps=1, **rules))
        for job in jobs_of(tiny_sd1, tmp_path, tmp_path / "out")
    ]
    alone = jobs[0].config.replace(output_dir=str(tmp_path / "alone"))
    with released([alone, *(job.config for job in jobs)]):
        one = prepare(alone)
        base = SharedBase(load_base)
        runs = [ready(checked_run(job.config), (), base) for job in jobs]
        together = Together(runs, base.unet())

        def of_all() -> None:
            together.learn([Turn(run, 0, run.stream.batch(0), 0) for run in runs])

        counts = products_of(Turn(one, 0, one.stream.batch(0), 0).learn, one)
        assert products_of(of_all, runs[0]) == counts > 100


def products_of(work: Callable[[], object], run: Run) -> int:
    """Frozen weights of a run's UNet among the operands of the products of some work."""
    trained = {id(p) for p in run.parameters}
    frozen = [p for p in run.parts.unet.parameters() if id(p) not in trained]
    with Products() as products:
        work()
    return sum(products.counts[place] for place in {p.untyped_storage().data_ptr() for p in frozen})


@pytest.mark.parametrize(("kind", "tolerance"), [("sdxl", 1e-5), ("sd1", 1e-5), ("sd2", 5e-2)])
def test_other_ways_of_a_step(
    kind: str, tolerance: float, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    """Gradients of two jobs are those of each alone to 1e-5: with SDXL's pooled text and sizes and
    learned loss weights; with activations computed again and captions that are preserved. On a
    bfloat16 base they are, to its rounding, in which the order of sums is seen."""
    shared: dict[str, Any] = {"targets": "all", "max_train_steps": 2}
    of_kind: dict[str, dict[str, Any]] = {
        "sdxl": {"edm2_loss_weighting": True, "noise_offset": 0.1},
        "sd1": {"gradient_checkpointing": True, "output_preservation": "blank"},
        "sd2": {"mixed_precision": "bf16", "gradient_checkpointing": True},
    }
    data = images(tmp_path / "data", 3)
    own = [{"rank": 2, "train_batch_size": 1}, {"rank": 3, "seed": 5, "train_batch_size": 2}]
    configs = [
        text_to_image(tiny(kind), data, tmp_path / str(i), **(shared | of_kind[kind] | one))
        for i, one in enumerate(own)
    ]
    with released(configs):
        alone = [prepare(config) for config in configs]
        losses = [Turn(run, 0, run.stream.batch(0), 0).learn() for run in alone]
        base = SharedBase(load_base)
        runs = [ready(checked_run(config), (), base) for config in configs]
        together = Together(runs, base.unet())
        ours = together.learn([Turn(run, 0, run.stream.batch(0), 0) for run in runs])
        torch.testing.assert_close(torch.stack(ours), torch.stack(losses), rtol=tolerance, atol=0)
        for mine, theirs in zip(runs, alone, strict=True):
            for p, q in zip(mine.parameters, theirs.parameters, strict=True):
                if p.grad is None or q.grad is None:
                    assert p.grad is q.grad is None
                else:
                    assert (p.grad - q.grad).norm() <= tolerance * q.grad.norm() + 1e-9


def test_shapes_that_differ_go_one_by_one(tiny_sd1: Path, tmp_path: Path) -> None:
    """Jobs on images of other sizes, and one with class images of a third size beside its own,
    learn the losses of the runs alone to 1e-5, though no question has another's form."""
    wide, tall = images(tmp_path / "wide", 2, (96, 48)), images(tmp_path / "tall", 2, (48, 96))
    classes = images(tmp_path / "classes", 2)
    of_class: dict[str, object] = {
        "with_prior_preservation": True, "class_data_dir": str(classes), "num_class_images": 2,
        "class_prompt": "a thing",
    }  # fmt: skip
    for folder in (tall, classes):
        (folder / "metadata.jsonl").unlink()

    def jobs(out: Path) -> list[Job]:
        shared = PLAIN | {"max_train_steps": 2, "train_batch_size": 2}
        return [
            Job("wide", text_to_image(tiny_sd1, wide, out / "wide", **shared)),
            Job("tall", dreambooth(tiny_sd1, tall, out / "tall", **(shared | of_class))),
        ]

    together = train_jobs(jobs(tmp_path / "together"))
    for job in jobs(tmp_path / "alone"):
        alone = torch.tensor(sd_lora.train(job.config).losses)
        mine = torch.tensor(together.results[job.name].losses)
        torch.testing.assert_close(mine, alone, rtol=1e-5, atol=0)


def test_one_job_is_a_run_alone(tiny_sd1: Path, tmp_path: Path) -> None:
    """A single job has the digest of the run alone: of data, losses and tensors, bit for bit."""
    (job,) = jobs_of(tiny_sd1, tmp_path, tmp_path / "one")[:1]
    mine = train_jobs([job]).results["cat"]
    assert mine.digest == sd_lora.train(job.config.replace(output_dir=str(tmp_path / "b"))).digest


def two_jobs(model: Path, place: Path, out: str = "out", **rest: Any) -> list[Job]:
    """Two jobs on the same images, of other seeds."""
    data = place / "data" if (place / "data").is_dir() else images(place / "data", 3)
    shared = PLAIN | {"checkpointing_steps": 2, "train_batch_size": 1} | rest
    return [
        Job(name, text_to_image(model, data, place / out / name, seed=seed, **shared))
        for name, seed in {"a": 1, "b": 2}.items()
    ]


def test_a_job_that_diverges_leaves_the_others_alone(tiny_sd1: Path, tmp_path: Path) -> None:
    """A job whose numbers become NaN ends with its message; the losses of the other one, which
    learned together with it until then, are those of the run alone to 1e-5."""
    good, bad = two_jobs(tiny_sd1, tmp_path, max_train_steps=12)
    ruined = Job("b", bad.config.replace(learning_rate=1e18))
    outcome = train_jobs([ruined, good])
    assert [*outcome.errors] == ["b"]
    assert "diverged" in str(outcome.errors["b"])
    with pytest.raises(RunError, match="^job b: "):
        outcome.refuse()
    alone = sd_lora.train(good.config.replace(output_dir=str(tmp_path / "alone")))
    mine, theirs = torch.tensor(outcome.results["a"].losses), torch.tensor(alone.losses)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=0)


def test_jobs_are_ended_and_go_on(tiny_sd1: Path, tmp_path: Path) -> None:
    """A signal ends all jobs with a checkpoint each; resumed, each has the losses of an
    uninterrupted run to 1e-5, and a job that is done is named and left alone. Asked once more, the
    jobs are refused: all are done."""
    whole = train_jobs(two_jobs(tiny_sd1, tmp_path, "whole")).results

    def end(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    short, long = two_jobs(tiny_sd1, tmp_path)
    short = Job("a", short.config.replace(max_train_steps=2))
    outcome = train_jobs([short, long], lambda name: [end] if name == "b" else [])
    assert ([*outcome.results], [*outcome.errors]) == (["a"], ["b"])
    assert isinstance(outcome.errors["b"], Interrupted)
    with pytest.raises(Interrupted, match="job b: interrupted by SIGTERM at step 3 of 6"):
        outcome.refuse()
    again = [
        Job(job.name, job.config.replace(resume_from_checkpoint="latest")) for job in (short, long)
    ]
    resumed = train_jobs(again)
    assert [*resumed.left] == ["a"]
    assert "has done all steps" in resumed.left["a"]
    mine, theirs = resumed.results["b"].losses, whole["b"].losses[3:]
    torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs), rtol=1e-5, atol=0)
    with pytest.raises(UsageError, match="job a: .* has done all steps"):
        train_jobs(again)


def test_a_job_of_another_kind_learns_by_itself(tiny_sd1: Path, tmp_path: Path) -> None:
    """A LoKr among the jobs learns by itself, says so before its first step, and has the losses of
    the run alone; so has the other one."""
    lora, other = two_jobs(tiny_sd1, tmp_path, max_train_steps=2)
    lokr = Job("b", other.config.replace(method="lokr"))
    told: list[Event] = []
    outcome = train_jobs([lora, lokr], lambda name: [told.append] if name == "b" else [])
    (planned,) = (event for event in told if isinstance(event, RunPlanned))
    assert any("not plain LoRA" in note for note in planned.summary.notes)
    for job in (lora, lokr):
        alone = sd_lora.train(job.config.replace(output_dir=str(tmp_path / f"alone-{job.name}")))
        mine = torch.tensor(outcome.results[job.name].losses)
        torch.testing.assert_close(mine, torch.tensor(alone.losses), rtol=1e-5, atol=0)


def codes_of(told: Sequence[Event]) -> list[str]:
    """The codes of all findings that were told."""
    return [f.code for event in told if isinstance(event, Warned) for f in event.findings]


def test_jobs_without_room_for_each_other_go_by_themselves(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the largest micro-batches do not fit together, which is tried before the first step,
    each job learns by itself, with a warning and the losses of the run alone."""

    def limited(self: Together, turns: Sequence[Turn]) -> list[Tensor]:
        raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Together, "learn", limited)
    told: list[Event] = []
    jobs = two_jobs(tiny_sd1, tmp_path, max_train_steps=2)
    outcome = train_jobs(jobs, lambda name: [told.append])
    assert codes_of(told).count("jobs-apart") == 2
    alone = sd_lora.train(jobs[0].config.replace(output_dir=str(tmp_path / "alone")))
    mine = torch.tensor(outcome.results["a"].losses)
    torch.testing.assert_close(mine, torch.tensor(alone.losses), rtol=1e-5, atol=0)


def test_jobs_that_are_out_of_memory_later_go_by_themselves(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the memory is used up in the third step, in which gradients are added up already, the
    step is learned again by each job alone, and so are all later ones: the losses of the run alone.
    """
    learned, calls = Together.learn, []

    def limited(self: Together, turns: Sequence[Turn]) -> list[Tensor]:
        calls.append(turns)
        losses = learned(self, turns)
        if len(calls) == 4:  # the trial, and two steps before
            raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")
        return losses

    monkeypatch.setattr(Together, "learn", limited)
    told: list[Event] = []
    jobs = two_jobs(tiny_sd1, tmp_path, max_train_steps=5)
    outcome = train_jobs(jobs, lambda name: [told.append])
    assert codes_of(told).count("jobs-apart") == 2
    assert len(calls) == 4
    assert not outcome.errors
    for job in jobs:
        alone = sd_lora.train(job.config.replace(output_dir=str(tmp_path / f"alone-{job.name}")))
        mine = torch.tensor(outcome.results[job.name].losses)
        torch.testing.assert_close(mine, torch.tensor(alone.losses), rtol=1e-5, atol=0)


@pytest.mark.parametrize("when", ["start", "step"])
def test_an_error_of_one_job_is_its_own(
    when: str, tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of one job's own, where it is made ready or in the question of a step that is
    learned together, ends that job, which is told at once; the other one does its steps."""
    jobs = two_jobs(tiny_sd1, tmp_path, max_train_steps=3)
    if when == "start":
        original_log = setup.Ledger.of

        def of(images: Any, *more: Any) -> Any:
            if calls:
                raise RunError("the disk is full")
            calls.append(images)
            return original_log(images, *more)

        calls: list[Any] = []
        monkeypatch.setattr(setup.Ledger, "of", of)
    else:
        original = Run.conditions

        def conditions(self: Run, items: Any, step: int) -> Any:
            if step == 1 and self.output_dir.name == "b":
                raise RunError("a latent is not finite")
            return original(self, items, step)

        monkeypatch.setattr(Run, "conditions", conditions)
    told: list[Event] = []
    outcome = train_jobs(jobs, lambda name: [told.append] if name == "b" else [])
    assert [*outcome.errors] == ["b"]
    assert codes_of(told) == ["job-ended"]
    assert len(outcome.results["a"].losses) == 3


def test_faults_of_all_jobs_come_before_work(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jobs with earlier work in their folders are refused together, a line each; trackers that
    follow one run of a process are, and several processes."""
    jobs = two_jobs(tiny_sd1, tmp_path)
    for job in jobs:
        (job.config.output_path / "checkpoint-2").mkdir(parents=True)
        (job.config.output_path / "checkpoint-2" / "state.json").write_text("{}")
    with pytest.raises(UsageError) as error:
        train_jobs(jobs)
    assert [line.split(":")[0] for line in str(error.value).splitlines()] == ["job a", "job b"]
    watched = [Job(job.name, job.config.replace(report_to="all")) for job in jobs]
    with pytest.raises(UsageError, match="job a: report_to all follows one run of a process"):
        train_jobs(watched)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="train in one process, and the launcher started 2"):
        train_jobs(jobs)


def test_class_images_are_drawn_once(tiny_sd1: Path, tmp_path: Path) -> None:
    """Jobs with one folder of class images have those that the first of them drew, as two runs one
    after another."""
    classes = tmp_path / "classes"
    shared: dict[str, object] = {
        "with_prior_preservation": True, "class_data_dir": str(classes), "num_class_images": 2,
        "class_prompt": "a thing", "max_train_steps": 1, "train_batch_size": 1,
    }  # fmt: skip
    data = images(tmp_path / "data", 2)
    (data / "metadata.jsonl").unlink()
    jobs = [
        Job(name, dreambooth(tiny_sd1, data, tmp_path / name, seed=seed, **shared))
        for name, seed in {"a": 1, "b": 2}.items()
    ]
    assert len(train_jobs(jobs).results) == 2
    assert len([*classes.glob("*.png")]) == 2


def test_the_command_line_says_what_is_shared(
    tiny_sd1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`sd-lora train` prints a block a job, then what they share, and the end of each; asked to go
    on, it says that all are done."""
    data = images(tmp_path / "data", 2)
    file = tmp_path / "jobs.toml"
    file.write_text(
        f'pretrained_model_name_or_path = "{tiny_sd1.as_posix()}"\nresolution = 64\n'
        f'train_data_dir = "{data.as_posix()}"\noutput_dir = "{(tmp_path / "out").as_posix()}"\n'
        'targets = "down.*to_q"\nmax_train_steps = 3\ntrain_batch_size = 1\nreport_to = "none"\n'
        'num_validation_images = 0\n[[jobs]]\nname = "a"\n[[jobs]]\nname = "b"\n'
        '[[jobs]]\nname = "c"\nmethod = "loha"\n'
    )
    assert main(["train", "--config", str(file)]) == 0
    said = capsys.readouterr().out
    titles = [line for line in said.splitlines() if line.endswith(":")]
    assert titles[:4] == [*(f"sd_lora trains {name}:" for name in "abc"), "shared by all jobs:"]
    assert "  together   a, b\n" in said
    assert "  by itself  c (its layers are not plain LoRA" in said
    assert [line[:13] for line in said.splitlines() if line.startswith("job ")] == [
        f"job {name}: done in"[:13] for name in ("c", "a", "b")
    ]
    again = ["train", "--config", str(file), "--resume_from_checkpoint", "latest"]
    assert main([*again, "--max_train_steps", "3"]) == 2
    assert capsys.readouterr().err.count("has done all steps") == 3


@pytest.mark.parametrize("fails", [False, True])
def test_a_job_that_ends_leaves_its_memory(fails: bool, tiny_sd1: Path, tmp_path: Path) -> None:
    """When one of two jobs has ended, by itself or by an error, its run is gone, and the memory of
    its factors and optimiser with it."""
    short, long = two_jobs(tiny_sd1, tmp_path, max_train_steps=14)
    changes = {"learning_rate": 1e18} if fails else {"max_train_steps": 2}
    there: dict[int, int] = {}

    def count(event: Event) -> None:
        if isinstance(event, StepDone) and event.step in (1, 14):  # a look takes half a second
            gc.collect()
            there[event.step] = sum(isinstance(found, Run) for found in gc.get_objects())

    before = sum(isinstance(found, Run) for found in gc.get_objects())
    jobs = [Job("a", short.config.replace(**changes)), long]
    outcome = train_jobs(jobs, lambda name: [count] if name == "b" else [])
    assert [*outcome.errors] == ["a"] * fails
    assert (there[1] - before, there[14] - before) == (2, 1)
