"""Facts of the optimisers that a configuration needs before torch is imported: the package of each,
the meaning of its learning rate, the options and arguments that it takes, its names elsewhere.

`training/optimizer_rows.py` builds them; a test compares the names.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

BITSANDBYTES = ("bitsandbytes", "8bit")
PYTORCH_OPTIMIZER = ("pytorch_optimizer", "optimizers")
PRODIGY_PLUS = ("prodigyplus", "optimizers")


@dataclass(frozen=True)
class Optimizer:
    """An optimiser as the configuration sees it.

    args: names that `optimizer_args` may have. package: module that it needs, and the extra that
    installs it. moments: whether it uses the options of AdamW's betas and epsilon. finds_rate:
    whether a learning rate is a factor of the one that it finds, 1 if not given. one_rate: whether
    all parameters share that factor. averages: whether it trains at another point than the average
    of its steps, which is sampled and exported, and needs no schedule. own_steps: whether neither
    rates nor schedules change its steps. on_gpu: whether it needs a GPU. names: peer → its names
    there.
    """

    args: tuple[str, ...] = ()
    package: tuple[str, str] | None = None
    moments: bool = False
    finds_rate: bool = False
    one_rate: bool = False
    averages: bool = False
    own_steps: bool = False
    on_gpu: bool = False
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def schedules(self) -> tuple[str, ...] | None:
        """The learning-rate schedules that go with it, the usual one first; None: all."""
        if self.own_steps:
            return ("constant",)
        return ("constant_with_warmup", "constant") if self.averages else None


_LION = ("betas",)
_8BIT = ("min_8bit_size",)
_FREE = ("weight_lr_power", "r")
_FACTORED = ("betas", "clip_threshold", "eps1", "eps2", "ams_bound")
_PLUS = (
    "betas", "beta3", "d0", "d_coef", "d_limiter", "eps", "factored", "factored_fp32",
    "prodigy_steps", "schedulefree_c", "split_groups", "split_groups_mean", "use_adopt",
    "use_bias_correction", "use_cautious", "use_focus", "use_grams", "use_orthograd",
    "use_schedulefree", "use_speed", "use_stableadamw", "weight_decay_by_lr",
)  # fmt: skip

OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": Optimizer(
        ("amsgrad",), moments=True,
        names={"diffusers": ("AdamW",), "kohya": ("AdamW", "torch.optim.AdamW"),
               "onetrainer": ("ADAMW",), "ai_toolkit": ("adamw",),
               "simpletuner": ("adamw_bf16", "optimi-adamw")}),
    "adamw8bit": Optimizer(
        _8BIT, BITSANDBYTES, True,
        names={"kohya": ("AdamW8bit",), "onetrainer": ("ADAMW_8BIT",), "ai_toolkit": ("adamw8bit",),
               "simpletuner": ("bnb-adamw8bit", "ao-adamw8bit")}),
    "pagedadamw": Optimizer(
        (), BITSANDBYTES, True, on_gpu=True,
        names={"kohya": ("PagedAdamW", "PagedAdamW32bit"), "simpletuner": ("bnb-adamw-paged",)}),
    "pagedadamw8bit": Optimizer(
        _8BIT, BITSANDBYTES, True, on_gpu=True,
        names={"kohya": ("PagedAdamW8bit",), "simpletuner": ("bnb-adamw8bit-paged",)}),
    "adamwschedulefree": Optimizer(
        _FREE, PYTORCH_OPTIMIZER, True, averages=True,
        names={"kohya": ("AdamWScheduleFree",), "onetrainer": ("SCHEDULE_FREE_ADAMW",),
               "simpletuner": ("adamw_schedulefree",)}),
    "adamwriemannian": Optimizer(("damping",), moments=True),
    "adafactor": Optimizer(
        ("eps", "clip_threshold", "decay_rate", "beta1", "scale_parameter", "relative_step",
         "warmup_init"),
        names={"kohya": ("AdaFactor",), "onetrainer": ("ADAFACTOR",),
               "ai_toolkit": ("adafactor",)}),
    "came": Optimizer(
        _FACTORED, PYTORCH_OPTIMIZER,
        names={"kohya": ("pytorch_optimizer.CAME",), "onetrainer": ("CAME",)}),
    "lion": Optimizer(
        _LION, PYTORCH_OPTIMIZER,
        names={"kohya": ("Lion",), "onetrainer": ("LION",), "ai_toolkit": ("lion",),
               "simpletuner": ("optimi-lion", "bnb-lion")}),
    "lion8bit": Optimizer(
        (*_LION, *_8BIT), BITSANDBYTES,
        names={"kohya": ("Lion8bit",), "onetrainer": ("LION_8BIT",), "ai_toolkit": ("lion8bit",),
               "simpletuner": ("bnb-lion8bit",)}),
    "pagedlion8bit": Optimizer(
        (*_LION, *_8BIT), BITSANDBYTES, on_gpu=True,
        names={"kohya": ("PagedLion8bit",), "simpletuner": ("bnb-lion8bit-paged",)}),
    "prodigy": Optimizer(
        ("beta3", "d0", "d_coef", "growth_rate", "safeguard_warmup", "use_bias_correction",
         "decouple"), PYTORCH_OPTIMIZER, True, finds_rate=True, one_rate=True,
        names={"diffusers": ("prodigy",), "kohya": ("Prodigy",), "onetrainer": ("PRODIGY",),
               "ai_toolkit": ("prodigy",), "simpletuner": ("prodigy",)}),
    "prodigyplusschedulefree": Optimizer(
        _PLUS, PRODIGY_PLUS, finds_rate=True, averages=True,
        names={"kohya": ("prodigyplus.ProdigyPlusScheduleFree",),
               "onetrainer": ("PRODIGY_PLUS_SCHEDULE_FREE",)}),
    "dadaptadam": Optimizer(
        ("d0", "decouple", "growth_rate", "use_bias_correction"), PYTORCH_OPTIMIZER, True,
        finds_rate=True, one_rate=True,
        names={"kohya": ("DAdaptAdam", "DAdaptation"), "onetrainer": ("DADAPT_ADAM",),
               "ai_toolkit": ("dadaptation",)}),
    "soap": Optimizer(
        ("betas", "shampoo_beta", "precondition_frequency", "max_precondition_dim",
         "normalize_gradient", "eps"), PYTORCH_OPTIMIZER,
        names={"simpletuner": ("soap",)}),
    "muon": Optimizer(
        ("momentum", "nesterov", "ns_steps", "use_adjusted_lr"), PYTORCH_OPTIMIZER, True,
        names={"onetrainer": ("MUON",), "simpletuner": ("muon",)}),
}  # fmt: skip
"""Name → optimiser."""

IMPORTED = Optimizer()
"""An optimiser by its import path: its arguments are checked when it is imported."""

_KIN: dict[str, Optimizer] = {
    "schedulefree": Optimizer(averages=True),
    "prodigy": Optimizer(finds_rate=True, one_rate=True),
    "dadapt": Optimizer(finds_rate=True, one_rate=True),
}
"""Part of a class's name that tells of its kind → facts of an imported class that is no row: of
ScheduleFreeSGD, DAdaptLion, ProdigyVariant."""

_RELATIVE = "pytorch_optimizer"
"""The package whose Adafactor takes steps of its own size where `relative_step` is not given, and
no heed of the learning rate; that of transformers refuses a rate then."""

_VARIANTS: dict[tuple[str, str, bool], dict[str, Any]] = {
    ("adafactor", "relative_step", True): {
        "finds_rate": True, "one_rate": True, "own_steps": True,
    },
    ("prodigyplusschedulefree", "use_schedulefree", False): {"averages": False},
}  # fmt: skip
"""(optimiser, argument, its value) → facts that it changes."""


def is_import_path(name: str) -> bool:
    """Whether a name is that of a class in a package: "torch.optim.NAdam"."""
    return "." in name


def optimizer_facts(name: str, args: Mapping[str, Any] | None) -> Optimizer:
    """The facts of an optimiser with its arguments.

    An imported class has those of the row that has its name, whichever package it comes from: a
    Prodigy finds its rate by any path.
    """
    row, args = row_called(name), dict(args or {})
    facts = OPTIMIZERS[row] if row else _kin(name)
    if is_import_path(name):
        facts = replace(facts, args=(), package=None, moments=False, names={})
        if row == "adafactor" and name.startswith(_RELATIVE):
            args = {"relative_step": True} | args
    for (of, arg, value), changes in _VARIANTS.items():
        if row == of and args.get(arg) is value:
            facts = replace(facts, **changes)
    return facts


def row_called(name: str) -> str | None:
    """The row of `OPTIMIZERS` that an optimiser's name, or the class's of an import path, is here
    or elsewhere; None if it is none."""
    return name if name in OPTIMIZERS else called_elsewhere(_class(name))


def _class(path: str) -> str:
    """The last name of an import path."""
    return path.rpartition(".")[2]


def _kin(path: str) -> Optimizer:
    """The facts that the name of an imported class tells."""
    name = canonical(_class(path)) if is_import_path(path) else ""
    return next((facts for part, facts in _KIN.items() if part in name), IMPORTED)


def canonical(name: str) -> str:
    """A name in small letters without hyphens and underscores, so that "AdamW8bit" is adamw8bit; an
    import path as it is."""
    return name if is_import_path(name) else name.lower().replace("_", "").replace("-", "")


WITHOUT_MOMENTS = tuple(name for name, facts in OPTIMIZERS.items() if not facts.moments)
"""The optimisers that do not use the options of AdamW's betas and epsilon."""


def called_elsewhere(name: str) -> str | None:
    """The optimiser here that another trainer calls by a name, in any spelling; None if there is
    none."""
    names = {
        canonical(theirs): ours
        for ours, facts in OPTIMIZERS.items()
        for of_peer in facts.names.values()
        for theirs in (ours, *of_peer)
    }
    return names.get(canonical(name))
