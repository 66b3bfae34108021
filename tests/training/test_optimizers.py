"""Optimisers: each lowers a fixed problem's loss, keeps its state where and as it should, resumes
to the bit, and does its paper's step."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import sd_lora
from sd_lora.config.command_line import parse
from sd_lora.config.optimizers import IMPORTED, optimizer_facts
from sd_lora.config.rows import SCHEDULES
from sd_lora.config.schema import RunConfig, TrainConfig
from sd_lora.errors import UsageError
from sd_lora.training.export_checkpoint import export_checkpoint
from sd_lora.training.optimizer_rows import OPTIMIZERS, RiemannianAdamW
from sd_lora.training.optimizers import (
    averaged,
    averages,
    check_optimizer,
    current_rates,
    load_optimizer,
    optimizer_of,
)
from sd_lora.training.setup import prepare
from sd_lora.training.state_files import read_state, write_state
from tests.training.runs import images, text_to_image

PLACES = {"pretrained_model_name_or_path": "m", "train_data_dir": "d"}
ON_CPU = [name for name in OPTIMIZERS if not name.startswith("paged")]
NEEDS = {"8bit": "bitsandbytes", "optimizers": "pytorch_optimizer"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images(tmp_path_factory.mktemp("set"))


def config_of(optimizer: str, rate: float | None = None, **options: Any) -> RunConfig:
    """A resolved configuration; skips the test where the optimiser's package is not installed."""
    given = {"learning_rate": rate} if rate else {}
    config = TrainConfig(**PLACES, optimizer=optimizer, **given, **options).resolve("sd1", 512)
    if config.optimizer_facts.package:
        pytest.importorskip(config.optimizer_facts.package[0])
    return config


class Problem:
    """min ‖B A X − T X‖², with factors of rank 16 beside 320 channels: those of the table."""

    def __init__(self, config: RunConfig) -> None:
        generator = torch.Generator().manual_seed(0)
        self.A = nn.Parameter(torch.randn(16, 320, generator=generator) / 18)
        self.B = nn.Parameter(torch.zeros(320, 16))
        self.T = torch.randn(320, 320, generator=generator) / 18
        self.X = torch.randn(320, 64, generator=generator)
        rates = {"lr": config.learning_rate, "weight_decay": config.adam_weight_decay}
        groups = [
            {"params": [p], "name": name, "multiple": 1.0} | rates
            for name, p in (("A", self.A), ("B", self.B))
        ]
        self.optimizer = optimizer_of(config).build(groups, config, {})

    def loss(self) -> Tensor:
        return ((self.B @ (self.A @ self.X) - self.T @ self.X) ** 2).mean()

    def steps(self, number: int) -> None:
        for _ in range(number):
            self.optimizer.zero_grad()
            self.loss().backward()
            self.optimizer.step()


def plain(state: Any) -> list[Tensor]:
    """The tensors of a state, which may hold nothing else than numbers, texts and None besides."""
    if isinstance(state, Tensor):
        return [state]
    if isinstance(state, dict):
        assert all(isinstance(key, int | str) for key in state)
        return plain([*state.values()])
    if isinstance(state, list | tuple):
        return [tensor for value in state for tensor in plain(value)]
    assert state is None or isinstance(state, int | float | str | bool), type(state)
    return []


@pytest.mark.parametrize("name", ON_CPU)
def test_it_learns_and_resumes_to_the_bit(name: str, tmp_path: Path) -> None:
    """Each optimiser lowers the loss of a fixed problem; its state is tensors beside plain numbers,
    on the parameters' device, of the bytes a parameter that its row says; from the state as a
    checkpoint has it on disk it goes on to the bit, in bfloat16 too, where torch's own loading
    changes the dtype. The parameters stay float32."""
    finds = config_of(name).optimizer_facts.finds_rate
    config = config_of(name, None if finds else 1e-2)
    problem = Problem(config)
    before = problem.loss().item()
    problem.steps(30)

    write_state(tmp_path, problem.optimizer.state_dict())
    state = read_state(tmp_path)
    tensors = plain(problem.optimizer.state_dict()["state"])
    assert all(tensor.device == problem.A.device for tensor in tensors)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    parameters = problem.A.numel() + problem.B.numel()
    assert size / parameters == pytest.approx(OPTIMIZERS[name].state_bytes, abs=0.05)
    plain({**state, "state": None})

    again = Problem(config)
    again.A.data.copy_(problem.A), again.B.data.copy_(problem.B)
    load_optimizer(again.optimizer, state)
    loaded = plain(again.optimizer.state_dict()["state"])
    assert [tensor.dtype for tensor in loaded] == [tensor.dtype for tensor in tensors]
    for each in (problem, again):
        each.steps(60 if finds else 10)
        assert each.A.dtype == each.B.dtype == torch.float32
    assert torch.equal(problem.A, again.A)
    assert torch.equal(problem.B, again.B)
    with averaged(problem.optimizer):
        assert problem.loss().item() < (0.95 if finds else 0.7) * before


LR, DECAY = 0.01, 0.1


def adamw(p: Tensor, grads: list[Tensor], decay: float = DECAY) -> Tensor:
    """Loshchilov and Hutter 2019, algorithm 2."""
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for t, g in enumerate(grads, 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        ratio = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        p = p - LR * decay * p - LR * ratio
    return p


def lion(p: Tensor, grads: list[Tensor]) -> Tensor:
    """Chen et al. 2023, program 1."""
    m = torch.zeros_like(p)
    for g in grads:
        p = p - LR * ((0.9 * m + 0.1 * g).sign() + DECAY * p)
        m = 0.99 * m + 0.01 * g
    return p


def adafactor(p: Tensor, grads: list[Tensor]) -> Tensor:
    """Shazeer and Stern 2018, algorithm 4, with the rate in place of ρ and a decoupled decay."""
    rows, columns = torch.zeros(len(p), 1), torch.zeros(1, p.shape[1])
    for t, g in enumerate(grads, 1):
        beta, square = 1 - t**-0.8, g**2 + 1e-30
        rows = beta * rows + (1 - beta) * square.sum(1, keepdim=True)
        columns = beta * columns + (1 - beta) * square.sum(0, keepdim=True)
        u = g / (rows * columns / rows.sum()).sqrt()
        u = u / max(1, u.square().mean().sqrt().item())
        p = p - LR * DECAY * p - LR * u
    return p


def came(p: Tensor, grads: list[Tensor]) -> Tensor:
    """Luo et al. 2023, algorithm 2."""

    def factored(r: Tensor, c: Tensor) -> Tensor:
        return r * c / r.mean()

    shape = ((len(p), 1), (1, p.shape[1]))
    r, c, R, C = (torch.zeros(*s) for s in (*shape, *shape))
    m = torch.zeros_like(p)
    for g in grads:
        square = g**2 + 1e-30
        r = 0.999 * r + 0.001 * square.mean(1, keepdim=True)
        c = 0.999 * c + 0.001 * square.mean(0, keepdim=True)
        u = g / factored(r, c).sqrt()
        u = u / max(1, u.square().mean().sqrt().item())
        m = 0.9 * m + 0.1 * u
        U = (u - m) ** 2 + 1e-16
        R = 0.9999 * R + 0.0001 * U.mean(1, keepdim=True)
        C = 0.9999 * C + 0.0001 * U.mean(0, keepdim=True)
        p = p - LR * DECAY * p - LR * m / factored(R, C).sqrt()
    return p


def schedule_free(p: Tensor, grads: list[Tensor]) -> Tensor:
    """Defazio et al. 2024, algorithm 1: the point x that is exported."""
    z, x, v = p, p, torch.zeros_like(p)
    for t, g in enumerate(grads, 1):
        y = 0.1 * z + 0.9 * x
        v = 0.999 * v + 0.001 * g**2
        z = z - LR * (g / ((v / (1 - 0.999**t)).sqrt() + 1e-8) + DECAY * y)
        x = (1 - 1 / t) * x + z / t
    return x


def prodigy(p: Tensor, grads: list[Tensor]) -> Tensor:
    """Mishchenko and Defazio 2024, algorithm 4, with bias correction and safeguarded warm-up as in
    the authors' code."""
    p0, d, r, beta3 = p, 1e-6, 0.0, math.sqrt(0.999)
    m, v, s = torch.zeros_like(p), torch.zeros_like(p), torch.zeros_like(p)
    for t, g in enumerate(grads, 1):
        rate = d * math.sqrt(1 - 0.999**t) / (1 - 0.9**t)
        r = beta3 * r + (d / 1e-6) * rate * (g * (p0 - p)).sum().item()
        s = beta3 * s + (d / 1e-6) * d * g
        m, v = 0.9 * m + 0.1 * d * g, 0.999 * v + 0.001 * d**2 * g**2
        d = max(d, r / s.abs().sum().item())
        p = p - rate * DECAY * p - rate * m / (v.sqrt() + d * 1e-8)
    return p


def dadapt(p: Tensor, grads: list[Tensor]) -> Tensor:
    """Adam with D-Adaptation (Defazio and Mishchenko 2023), with a decoupled decay; the estimate's
    product is scaled by the second moments before the step, as in the authors' code."""
    d, r, beta = 1e-6, 0.0, math.sqrt(0.999)
    m, v, s = torch.zeros_like(p), torch.zeros_like(p), torch.zeros_like(p)
    for g in grads:
        r = beta * r + (1 - beta) * d * (g * s / (v.sqrt() + 1e-8)).sum().item()
        m, v = 0.9 * m + 0.1 * d * g, 0.999 * v + 0.001 * g**2
        s = beta * s + (1 - beta) * d * g
        p = p - d * DECAY * p - m / (v.sqrt() + 1e-8)
        d = max(d, r / ((1 - beta) * s.abs().sum().item()))
    return p


PAPERS: dict[str, Callable[[Tensor, list[Tensor]], Tensor]] = {
    "adamw": adamw, "lion": lion, "adafactor": adafactor, "came": came,
    "adamwschedulefree": schedule_free, "prodigy": prodigy, "dadaptadam": dadapt,
    "adamw8bit": adamw, "lion8bit": lion,  # tensors below 4,096 numbers stay in 32 bits
}  # fmt: skip


def stepped(
    name: str, p: Tensor, grads: list[Tensor], decay: float = DECAY, **options: Any
) -> Tensor:
    """A parameter after a step of an optimiser for each gradient."""
    finds = config_of(name).optimizer_facts.finds_rate
    config = config_of(name, None if finds else LR, **options)
    parameter = nn.Parameter(p.clone())
    group = {"params": [parameter], "lr": config.learning_rate, "weight_decay": decay}
    optimizer = optimizer_of(config).build([group | {"name": "", "multiple": 1}], config, {})
    for grad in grads:
        parameter.grad = grad.clone()
        optimizer.step()
    if averages(optimizer):
        optimizer.eval()  # type: ignore[attr-defined]
    return parameter.detach()


@pytest.fixture
def drawn() -> tuple[Tensor, list[Tensor]]:
    """A matrix, and gradients of six steps."""
    generator = torch.Generator().manual_seed(1)
    p, *grads = torch.randn(7, 4, 6, generator=generator)
    return p, grads


@pytest.mark.parametrize("name", PAPERS)
def test_steps_are_those_of_the_paper(name: str, drawn: tuple[Tensor, list[Tensor]]) -> None:
    """Six steps equal the paper's algorithm, written out: with its betas, decay and epsilon."""
    p, grads = drawn
    torch.testing.assert_close(stepped(name, p, grads), PAPERS[name](p, grads), atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", [(4, 6), (4, 2, 3, 3), (6, 4, 1, 1)])
def test_muon_orthogonalises_each_factor(shape: tuple[int, ...]) -> None:
    """The first step has the gradient's singular vectors and near equal singular values: of length
    0.2 · √max(m, n) each, so that the root mean square is that of AdamW's steps. A factor of a
    convolution is the matrix of its first dimension by all others."""
    p, grad = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    step = ((p * (1 - LR * DECAY) - stepped("muon", p, [grad])) / LR).flatten(1)
    U, _, V = torch.linalg.svd(grad.flatten(1), full_matrices=False)
    inner = U.T @ step @ V.T / (0.2 * math.sqrt(max(step.shape)))
    assert (inner - inner.diagonal().diag()).abs().max() < 0.02  # its iterations are in bfloat16
    assert 0.6 < inner.diagonal().min() <= inner.diagonal().max() < 1.3


def test_soap_without_a_basis_is_adamw(drawn: tuple[Tensor, list[Tensor]]) -> None:
    """SOAP is Adam in the eigenbasis of Shampoo's factors (Vyas et al. 2024, algorithm 3): with no
    side preconditioned it is AdamW from the second step on, the first being for the basis."""
    p, grads = drawn
    args = {"max_precondition_dim": 1, "betas": [0.9, 0.999]}
    soap = stepped("soap", p, grads, decay=0.0, optimizer_args=args)
    torch.testing.assert_close(soap, adamw(p, grads[1:], decay=0.0), atol=1e-6, rtol=0)


def test_riemannian_steps_do_not_depend_on_the_split(drawn: tuple[Tensor, list[Tensor]]) -> None:
    """Preconditioned gradients are those of the formula, and plain descent with them moves B·A the
    same way for (R·A, B·R⁻¹) as for (A, B), for any invertible R (Zhang and Pilanci 2024)."""
    p, grads = drawn
    moved = []
    for R in (torch.eye(2), 5 * torch.eye(2), torch.tensor([[2.0, 1.0], [-1.0, 3.0]])):
        A, B = nn.Parameter(R @ p[:2]), nn.Parameter(grads[0].T[:, :2] @ torch.linalg.inv(R))
        optimizer = RiemannianAdamW([{"params": [A, B]}], [(A, B)], 1e-6, lr=1e-3, eps=1e-8)
        (B @ A * grads[1].new_ones(6, 6).triu()).sum().backward()
        dA, dB = A.grad, B.grad
        assert dA is not None
        assert dB is not None
        wanted = torch.linalg.inv(B.T @ B + 1e-6 * torch.eye(2)) @ dA
        before_A, before_B = A.detach().clone(), B.detach().clone()
        optimizer.step()
        torch.testing.assert_close(A.grad, wanted, rtol=1e-3, atol=1e-4)
        assert A.grad is not None
        assert B.grad is not None
        moved.append(before_B @ A.grad + B.grad @ before_A)
    for other in moved[1:]:
        torch.testing.assert_close(moved[0], other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--optimizer", "adamm"], "optimizer is one of adamw, .* Did you mean adamw"),
        (["--optimizer", "Prodigy", "--learning_rate", "1e-4"], "1 is usual"),
        (["--optimizer", "prodigy", "--train_text_encoder", "--text_encoder_lr", "0.5"],
         "one rate for all parameters"),
        (["--optimizer", "dadaptadam", "--loraplus_lr_ratio", "16"], "loraplus_lr_ratio excludes"),
        (["--optimizer", "prodigy", "--scale_lr"], "scale_lr excludes prodigy"),
        (["--optimizer", "adafactor", "--optimizer_args", "relative_step=True", "--lr", "1e-3"],
         "--lr excludes relative_step"),
        (["--optimizer", "AdamWScheduleFree", "--lr_scheduler", "cosine"],
         "lr_scheduler cosine excludes adamwschedulefree, which averages its steps"),
        (["--optimizer", "adamw_schedule_free", "--scale_weight_norms", "1"], "another point"),
        (["--optimizer", "lion", "--adam_beta2", "0.9"], "adam_beta2 has no effect with .* lion"),
        (["--optimizer", "prodigy", "--optimizer_args", "d_coeff=2"], "Did you mean d_coef"),
        (["--optimizer_args", "betas=0.9,0.99"], "betas is .*adam_beta1 and .*adam_beta2 here"),
        (["--optimizer_args", "amsgrad"], "'amsgrad' is not key=value"),
        (["--optimizer", "adamwriemannian", "--method", "loha"], "method loha has none"),
        (["--optimizer", "pytorch_optimizer.Prodigy", "--learning_rate", "1e-4"], "1 is usual"),
        (["--optimizer", "prodigyopt.Prodigy", "--loraplus_lr_ratio", "16"], "ratio excludes"),
        (["--optimizer", "dadaptation.DAdaptLion", "--learning_rate", "1e-4"], "1 is usual"),
        (["--optimizer", "pytorch_optimizer.ScheduleFreeAdamW", "--lr_scheduler", "cosine"],
         "lr_scheduler cosine excludes pytorch_optimizer.ScheduleFreeAdamW, which averages"),
        (["--optimizer", "schedulefree.AdamWScheduleFree", "--use_ema"], "use_ema excludes"),
        (["--optimizer", "schedulefree.RAdamScheduleFree", "--scale_weight_norms", "1"],
         "another point"),
        (["--optimizer", "pytorch_optimizer.AdaFactor", "--learning_rate", "1e-3"],
         "learning_rate excludes relative_step"),
        (["--optimizer", "torch.optim.NAdam", "--adam_beta1", "0.5"],
         "adam_beta1 does not reach torch.optim.NAdam.*--optimizer_args betas="),
        (["--optimizer", "torch.optim.NAdam", "--adam_epsilon", "1e-4"],
         "adam_epsilon does not reach .*--optimizer_args eps="),
    ],
)  # fmt: skip
def test_traps_are_refused(words: list[str], found: str) -> None:
    """Combinations that other trainers take in silence are told, with the reason."""
    with pytest.raises(UsageError, match=found):
        parse(["--model", "m", "--train_data_dir", "d", *words])


def test_an_optimisers_usual_rate_and_schedule_stand_for_a_presets() -> None:
    """A preset's rates and schedule are AdamW's: Prodigy's rate is 1 for all components, and a
    schedule-free optimiser keeps the warm-up alone."""
    words = ["--model", "m", "--train_data_dir", "d", "--preset", "subject", "--optimizer"]
    config = parse([*words, "prodigy"]).resolve("sdxl", 1024)
    assert config.learning_rate == config.learning_rate_of("text_encoder") == 1.0
    assert config.lr_scheduler == "cosine"
    config = parse([*words, "adamw_schedulefree"]).resolve("sd1", 512)
    assert (config.lr_scheduler, config.lr_warmup_steps) == ("constant_with_warmup", 0.05)
    assert (config.learning_rate, config.text_encoder_lr) == (1e-4, 5e-5)


def test_a_row_and_its_class_by_path_have_the_same_traps() -> None:
    """Facts by which combinations are refused are a row's for the class of that name in any
    package; arguments are the class's own; other classes have none of them."""
    for path, row in (
        ("pytorch_optimizer.Prodigy", "prodigy"),
        ("prodigyplus.ProdigyPlusScheduleFree", "prodigyplusschedulefree"),
        ("pytorch_optimizer.ScheduleFreeAdamW", "adamwschedulefree"),
        ("schedulefree.AdamWScheduleFree", "adamwschedulefree"),
        ("bitsandbytes.optim.PagedLion8bit", "pagedlion8bit"),
    ):
        ours, theirs = optimizer_facts(row, None), optimizer_facts(path, None)
        for fact in ("finds_rate", "one_rate", "averages", "own_steps", "on_gpu"):
            assert getattr(theirs, fact) is getattr(ours, fact), (path, fact)
        assert (theirs.args, theirs.package, theirs.moments) == ((), None, False)
    plain = optimizer_facts("prodigyplus.ProdigyPlusScheduleFree", {"use_schedulefree": False})
    assert not plain.averages
    assert not optimizer_facts("pytorch_optimizer.AdaFactor", {"relative_step": False}).own_steps
    for path in ("torch.optim.NAdam", "torch.optim.Adafactor", "pytorch_optimizer.Lamb"):
        assert optimizer_facts(path, None) == IMPORTED


@pytest.mark.parametrize(
    ("optimizer", "args", "found"),
    [
        ("torch.optim.NAdamm", None, "cannot be imported: .*NAdamm"),
        ("torch.nn.Linear", None, "no optimiser"),
        (
            "torch.optim.NAdam",
            {"decay": 1},
            "cannot be built .*unexpected .* 'decay'",
        ),
        ("adamwriemannian", {"damping": 0}, "damping must be above 0"),
        ("adafactor", {"warmup_init": True}, "requires"),
        ("pagedadamw8bit", None, "NVIDIA GPU .* Take adamw8bit"),
        ("bitsandbytes.optim.PagedAdamW8bit", None, "NVIDIA GPU .* Take adamw8bit"),
    ],
)
def test_a_broken_optimiser_is_told_before_anything_is_loaded(
    optimizer: str, args: dict[str, Any] | None, found: str
) -> None:
    """A class that cannot be imported or built, and one for a GPU: errors of the first check."""
    config = config_of(optimizer, optimizer_args=args)
    with pytest.raises(UsageError, match=found):
        check_optimizer(config, torch.device("cpu"))


def test_a_schedule_free_run(tiny_sd1: Path, data: Path, tmp_path: Path) -> None:
    """A run with a schedule-free optimiser exports the average of its steps; samples in the middle
    change nothing; and a run that is resumed ends with the same files, to the bit, which are also
    those of its last checkpoint."""
    options = {"optimizer": "AdamWScheduleFree", "learning_rate": 1e-2, "max_train_steps": 4}
    options |= {"checkpointing_steps": 2, "targets": "attention"}
    config_of("adamwschedulefree")
    sd_lora.train(text_to_image(tiny_sd1, data, tmp_path, **options))
    (file,) = tmp_path.glob("*_kohya.safetensors")
    whole = load_file(file)
    again = text_to_image(
        tiny_sd1, data, tmp_path, resume_from_checkpoint="checkpoint-2", **options
    )
    run = prepare(again)
    run.restore()
    trained = [p.detach().clone() for p in run.parameters]
    with run.averaged():
        moved = [not torch.equal(a, b) for a, b in zip(trained, run.parameters, strict=True)]
    assert sum(moved) > len(moved) / 3
    assert all(torch.equal(a, b) for a, b in zip(trained, run.parameters, strict=True))
    assert run.optimizer.param_groups[0]["train_mode"]
    sd_lora.train(again)
    resumed = load_file(file)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    export_checkpoint(tmp_path / "checkpoint-4", tmp_path / "exported", False, None)
    exported = load_file(tmp_path / "exported" / file.name)
    assert all(torch.equal(whole[key], exported[key]) for key in whole)


def test_every_groups_rate_is_logged(tiny_sd1: Path, data: Path, tmp_path: Path) -> None:
    """The log has each group's rate beside that of modules without a factor; with Prodigy the rate
    that it found."""
    config_of("prodigy")
    plus = {"loraplus_lr_ratio": 16.0, "learning_rate": 1e-3, "lr_scheduler": "linear"}
    plus |= {"lr_warmup_steps": 0, "max_train_steps": 2, "targets": "attention"}
    sd_lora.train(text_to_image(tiny_sd1, data, tmp_path / "plus", **plus))
    lines = (tmp_path / "plus" / "training_log.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["lr"] for row in rows] == [1e-3, 5e-4]
    assert [row["lr/unet ×16"] for row in rows] == pytest.approx([16e-3, 8e-3])
    optimizer = Problem(config_of("prodigy")).optimizer
    assert current_rates(optimizer) == {"A": 1e-6, "B": 1e-6}


@pytest.mark.parametrize(("warmup", "rate"), [(False, 1e-2), (True, 1e-6)])
def test_relative_steps_are_logged(warmup: bool, rate: float) -> None:
    """With relative_step the logged rate is the size of Adafactor's step, whose first one moves
    each element of a vector by exactly that; it falls as 1 / √step, and where it warms up it grows
    by 1e-6 a step."""
    config = config_of("adafactor", optimizer_args={"relative_step": True, "warmup_init": warmup})
    vector = nn.Parameter(torch.zeros(5))
    group = {"params": [vector], "lr": 1.0, "weight_decay": 0.0, "name": "A", "multiple": 1.0}
    optimizer = optimizer_of(config).build([group], config, {})
    assert current_rates(optimizer) == {"A": rate}
    vector.grad = torch.tensor([1.0, -2.0, 0.5, 3.0, -0.1])
    optimizer.step()
    assert current_rates(optimizer) == {"A": rate}
    torch.testing.assert_close(vector.detach(), -rate * vector.grad.sign(), rtol=1e-5, atol=0)
    optimizer.state[vector]["step"] = 40_000
    assert current_rates(optimizer)["A"] == pytest.approx(0.005)


def test_a_shared_rate_is_logged() -> None:
    """With split_groups_mean the groups of prodigyplus step by the harmonic mean of the rates that
    they find: that is logged, and not each group's own."""
    args = {"split_groups": True, "split_groups_mean": True, "d0": 1e-4}
    problem = Problem(config_of("prodigyplusschedulefree", optimizer_args=args))
    problem.steps(20)
    found = [group["d"] for group in problem.optimizer.param_groups]
    assert found[0] != found[1]
    mean = 2 / (1 / found[0] + 1 / found[1])
    assert current_rates(problem.optimizer) == {
        "A": pytest.approx(mean),
        "B": pytest.approx(mean),
    }


def test_the_page_has_every_optimiser(root: Path) -> None:
    """docs/optimizers.md has a row for each optimiser and schedule, with the table's bytes."""
    page = (root / "docs" / "optimizers.md").read_text(encoding="utf-8")
    lines = [line.split(" | ") for line in page.splitlines() if line.startswith("| `")]
    found = {name: cells[1] for cells in lines for name in re.findall(r"`(\w+)`", cells[0])}
    assert found.keys() == OPTIMIZERS.keys() | SCHEDULES.keys()
    for name, row in OPTIMIZERS.items():
        assert f"{row.state_bytes:g}" in found[name].split(", "), name
