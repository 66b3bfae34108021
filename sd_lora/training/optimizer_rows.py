"""Optimisers by name: functions that build them from parameter groups, in a table."""

import contextlib
import importlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sd_lora.adapters.inject import deltas_of
from sd_lora.config.schema import RunConfig

Groups = list[dict[str, Any]]
"""Parameter groups, each with its name, learning rate and weight decay."""

Models = Mapping[str, nn.Module]
"""Component → injected model."""


@dataclass(frozen=True)
class OptimizerRow:
    """An optimiser.

    build: makes it from parameter groups, the configuration and the models. state_bytes: bytes of
    its state a parameter, of factors of rank 16 beside 320 channels. header: its name in
    `ss_optimizer`.
    """

    build: Callable[[Groups, RunConfig, Models], torch.optim.Optimizer]
    state_bytes: float
    header: str


def _moments(config: RunConfig) -> dict[str, Any]:
    """Arguments of AdamW's moments."""
    return {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon}


def arguments(config: RunConfig) -> dict[str, Any]:
    """The arguments that the configuration gives; a list is a tuple there."""
    given = config.optimizer_args or {}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}


def _adamw(groups: Groups, config: RunConfig, models: Models) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019), fused on a GPU and on a CPU, where it takes an eighth of
    the time of a loop over 112 small factors."""
    places = {p.device.type for group in groups for p in group["params"]}
    fused = places in ({"cuda"}, {"cpu"})
    return torch.optim.AdamW(groups, **_moments(config), fused=fused, **arguments(config))


def _bitsandbytes(name: str, **own: Any) -> Callable[..., torch.optim.Optimizer]:
    """A builder of an optimiser of bitsandbytes (Dettmers et al. 2022): moments in 8 bits, by
    blocks of 256; paged ones move to the CPU's memory where the GPU's is full."""

    def build(groups: Groups, config: RunConfig, models: Models) -> torch.optim.Optimizer:
        import bitsandbytes.optim  # an extra: `check_optimizer` has looked for it

        moments = _moments(config) if config.optimizer_facts.moments else {}
        return getattr(bitsandbytes.optim, name)(groups, **(moments | own | arguments(config)))

    return build


def _pytorch_optimizer(name: str, **own: Any) -> Callable[..., torch.optim.Optimizer]:
    """A builder of an optimiser of the package pytorch-optimizer. own: arguments that are others
    here than there, where none are given."""

    def build(groups: Groups, config: RunConfig, models: Models) -> torch.optim.Optimizer:
        import pytorch_optimizer  # an extra: `check_optimizer` has looked for it

        given = {_THEIRS.get(key, key): value for key, value in arguments(config).items()}
        moments = _moments(config) if config.optimizer_facts.moments else {}
        return getattr(pytorch_optimizer, name)(groups, **(moments | own | given))

    return build


_THEIRS = {"use_bias_correction": "bias_correction", "decouple": "weight_decouple"}
"""Arguments as the authors of Prodigy and D-Adaptation name them → as pytorch-optimizer does."""


def _muon(groups: Groups, config: RunConfig, models: Models) -> torch.optim.Optimizer:
    """Muon (Jordan et al. 2024) of each factor as a matrix, with AdamW for vectors.

    Steps are scaled as Moonlight does (Liu et al. 2025, equation 4), to the root mean square of
    AdamW's, so that rates and decays are AdamW's too.
    """
    import pytorch_optimizer

    split: Groups = []
    for group in groups:
        for matrices in (True, False):
            chosen = [p for p in group["params"] if (p.dim() > 1) is matrices]
            own: dict[str, Any] = {"use_muon": matrices}
            own |= {} if matrices else {"name": f"{group['name']}, vectors"} | _moments(config)
            split += [group | {"params": chosen} | own] if chosen else []
    return pytorch_optimizer.Muon(split, **({"use_adjusted_lr": True} | arguments(config)))


def _adafactor(groups: Groups, config: RunConfig, models: Models) -> torch.optim.Optimizer:
    """Adafactor (Shazeer and Stern 2018) of transformers, with the rates given; with relative_step
    steps of its own size."""
    from transformers.optimization import Adafactor

    usual = {"relative_step": False, "scale_parameter": False, "warmup_init": False}
    return Adafactor(groups, lr=None, **(usual | arguments(config)))


def _prodigy_plus(groups: Groups, config: RunConfig, models: Models) -> torch.optim.Optimizer:
    """Prodigy with schedule-free averaging, which finds a rate for each group."""
    from prodigyplus import ProdigyPlusScheduleFree

    usual = {"split_groups": len(groups) > 1}
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it makes of its arguments
        return ProdigyPlusScheduleFree(groups, **(usual | arguments(config)))


class RiemannianAdamW(torch.optim.AdamW):
    """AdamW of gradients that the other factor preconditions (Zhang and Pilanci 2024, section 3).

    ∂A ← (BᵀB + δI)⁻¹ ∂A and ∂B ← ∂B (AAᵀ + δI)⁻¹, r × r matrices, so that steps of B·A do not
    depend on how it is split into factors; at B = 0 the gradient of A is 0, too.

    Args:
        groups: parameter groups.
        pairs: factors (A, B) of one delta: (r, …) and (out, r, …).
        damping: δ.
        **moments: of AdamW.
    """

    def __init__(
        self, groups: Groups, pairs: Sequence[tuple[Tensor, Tensor]], damping: float, **moments: Any
    ) -> None:
        if damping <= 0:
            raise ValueError(f"damping must be above 0, not {damping}")
        super().__init__(groups, **moments)
        self.pairs = pairs
        self.damping = damping

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Precondition the gradients, then do AdamW's step."""
        for A, B in self.pairs:
            down, up = A.flatten(1), B.flatten(1)  # (r, in), (out, r)
            identity = self.damping * torch.eye(len(down), device=A.device)
            left, right = up.T @ up + identity, down @ down.T + identity
            if A.grad is not None:
                A.grad = torch.linalg.solve_ex(left, A.grad.flatten(1))[0].view_as(A)
            if B.grad is not None:  # `solve` would have the host wait for a card's errors
                B.grad = torch.linalg.solve_ex(right, B.grad.flatten(1).T)[0].T.reshape(B.shape)
        return super().step(closure)


def _riemannian(groups: Groups, config: RunConfig, models: Models) -> torch.optim.Optimizer:
    """AdamW with Riemannian preconditioning of pairs of factors."""
    deltas: list[Any] = [d for model in models.values() for d in deltas_of(model).values()]
    pairs = [
        (delta.lora_A, delta.lora_B)
        for delta in deltas
        if hasattr(delta, "lora_B") and delta.lora_mid is None
    ]
    given = {"damping": 1e-6} | arguments(config)
    return RiemannianAdamW(groups, pairs, **given, **_moments(config))


_PACKAGE = "pytorch_optimizer.optimizer"
SOAP_LARGEST = 256
"""Sides up to here have a preconditioner in SOAP: that of the rank, and not that of 320 to 1,280
channels, whose square takes 2 · 4 · 1,280 / 16 = 640 bytes a parameter at rank 16."""

OPTIMIZERS: dict[str, OptimizerRow] = {
    "adamw": OptimizerRow(_adamw, 8, "torch.optim.adamw.AdamW"),
    "adamw8bit": OptimizerRow(_bitsandbytes("AdamW8bit"), 2.4, "AdamW8bit"),
    "pagedadamw": OptimizerRow(_bitsandbytes("PagedAdamW"), 8, "PagedAdamW"),
    "pagedadamw8bit": OptimizerRow(_bitsandbytes("PagedAdamW8bit"), 2.4, "PagedAdamW8bit"),
    "adamwschedulefree": OptimizerRow(
        _pytorch_optimizer("ScheduleFreeAdamW"), 8, f"{_PACKAGE}.schedulefree.ScheduleFreeAdamW"
    ),
    "adamwriemannian": OptimizerRow(_riemannian, 8, "sd_lora.RiemannianAdamW"),
    "adafactor": OptimizerRow(_adafactor, 0.3, "transformers.optimization.Adafactor"),
    "came": OptimizerRow(_pytorch_optimizer("CAME"), 4.5, f"{_PACKAGE}.came.CAME"),
    "lion": OptimizerRow(_pytorch_optimizer("Lion"), 4, f"{_PACKAGE}.lion.Lion"),
    "lion8bit": OptimizerRow(_bitsandbytes("Lion8bit"), 1.2, "Lion8bit"),
    "pagedlion8bit": OptimizerRow(_bitsandbytes("PagedLion8bit"), 1.2, "PagedLion8bit"),
    "prodigy": OptimizerRow(  # as diffusers' scripts, and its authors for diffusion models, have it
        _pytorch_optimizer("Prodigy", bias_correction=True, safeguard_warmup=True),
        16,
        f"{_PACKAGE}.prodigy.Prodigy",
    ),
    "prodigyplusschedulefree": OptimizerRow(
        _prodigy_plus, 4.5, "prodigyplus.ProdigyPlusScheduleFree"
    ),
    "dadaptadam": OptimizerRow(
        _pytorch_optimizer("DAdaptAdam", weight_decouple=True), 12, f"{_PACKAGE}.dadapt.DAdaptAdam"
    ),
    "soap": OptimizerRow(
        _pytorch_optimizer("SOAP", max_precondition_dim=SOAP_LARGEST), 8.4, f"{_PACKAGE}.soap.SOAP"
    ),
    "muon": OptimizerRow(_muon, 4, f"{_PACKAGE}.muon.Muon"),
}
"""Name → optimiser."""


def imported(path: str) -> type[torch.optim.Optimizer]:
    """The optimiser's class at an import path, "package.module.Class".

    Raises:
        ImportError, AttributeError: no such module, or no such name in it.
        TypeError: something that is no optimiser.
    """
    module, _, name = path.rpartition(".")
    found = getattr(importlib.import_module(module), name)
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise TypeError("it is no optimiser of torch")
    return found


def _by_path(path: str) -> OptimizerRow:
    """The row of an optimiser by its import path; its bytes of state are taken for AdamW's."""

    def build(groups: Groups, config: RunConfig, models: Models) -> torch.optim.Optimizer:
        make: Any = imported(path)
        return make(groups, lr=groups[0]["lr"], **arguments(config))

    return OptimizerRow(build, 8, path)


def row_of(name: str) -> OptimizerRow:
    """The row of an optimiser by its name or import path."""
    return OPTIMIZERS.get(name) or _by_path(name)
