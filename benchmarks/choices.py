"""Rows for the bench of learning: every optimiser, method and objective beside the recipe.

Each differs from the recipe of a subject or a style by its options alone, at equal steps and batch;
`--rows` of learning.py takes their names. Rates are the recipe's, but where an
optimiser or method takes another size of step, and then the one that docs/optimizers.md names.
"""

from typing import Any

Row = dict[str, Any]


def _rates(factor: float) -> Row:
    """The recipe's rates times a factor."""
    return {"learning_rate": 2e-3 * factor, "text_encoder_lr": 2e-3 * factor}


_FOUND = {"learning_rate": 1.0, "text_encoder_lr": 1.0}
_LEVEL = {"lr_scheduler": "constant_with_warmup"}

OPTIMIZERS: dict[str, Row] = {
    "adamw8bit": {"optimizer": "adamw8bit"},
    "adamw, lora+ 4": {"loraplus_lr_ratio": 4.0, **_rates(0.5)},
    "adamwriemannian": {"optimizer": "adamwriemannian"},
    "adamwriemannian, rate × 2": {"optimizer": "adamwriemannian", **_rates(2)},
    "adamwschedulefree": {"optimizer": "adamwschedulefree", **_LEVEL},
    "adamwschedulefree, rate × 2": {"optimizer": "adamwschedulefree", **_LEVEL, **_rates(2)},
    "adafactor": {"optimizer": "adafactor"},
    "came": {"optimizer": "came"},
    "came, rate / 2": {"optimizer": "came", **_rates(0.5)},
    "came, rate / 10": {"optimizer": "came", **_rates(0.1)},
    "lion, rate / 5": {"optimizer": "lion", **_rates(0.2)},
    "lion8bit, rate / 5": {"optimizer": "lion8bit", **_rates(0.2)},
    "prodigy": {"optimizer": "prodigy", **_FOUND},
    "prodigyplusschedulefree": {"optimizer": "prodigyplusschedulefree", **_LEVEL, **_FOUND},
    "dadaptadam": {"optimizer": "dadaptadam", **_FOUND},
    "dadaptadam, rate / 10": {
        "optimizer": "dadaptadam", "learning_rate": 0.1, "text_encoder_lr": 0.1,
    },
    "soap": {"optimizer": "soap"},
    "muon": {"optimizer": "muon"},
    "muon, rate / 2": {"optimizer": "muon", **_rates(0.5)},
}  # fmt: skip
"""Name → options. The recipe is AdamW's; paged ones are the same numbers elsewhere. Bytes of state
a parameter stand in `sd_lora.training.optimizer_rows.OPTIMIZERS`."""

METHODS: dict[str, Row] = {
    "lora_fa": {"method": "lora_fa"},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "loha": {"method": "loha"},
    "lokr": {"method": "lokr"},
    "lokr, rate × 4": {"method": "lokr", **_rates(4)},
    "lokr, rate × 8": {"method": "lokr", **_rates(8)},
    "oft": {"method": "oft"},
    "oft, rate × 8": {"method": "oft", **_rates(8)},
    "oft, rate × 24": {"method": "oft", **_rates(24)},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "svd": {"init_lora_weights": "svd"},
    "pissa": {"init_lora_weights": "pissa"},
    "t-lora": {"tlora_min_rank": 8},
    "t-lora, pissa": {"tlora_min_rank": 8, "init_lora_weights": "pissa"},
    "rank 4": {"rank": 4, "lora_alpha": 4.0},
    "rank 64": {"rank": 64, "lora_alpha": 64.0},
}
"""Name → options."""

OBJECTIVES: dict[str, Row] = {
    "min-SNR 5": {"snr_gamma": 5.0},
    "soft min-SNR 4": {"soft_min_snr_gamma": 4.0},
    "debiased": {"debiased_estimation_loss": True},
    "P2 1": {"p2_gamma": 1.0},
    "EDM2's learned weights": {"edm2_loss_weighting": True},
    "huber": {"loss_type": "huber"},
    "stratified": {"stratified_timesteps": True},
    "logit-normal": {"timestep_sampling": "logit_normal"},
    "cubic": {"timestep_sampling": "cubic"},
    "cubic, reversed": {"timestep_sampling": "cubic_reversed"},
    "noise offset 0.05": {"noise_offset": 0.05},
    "pyramid noise": {"multires_noise_iterations": 6, "multires_noise_discount": 0.2},
    "input perturbation 0.1": {"input_perturbation": 0.1},
    "nearest of 8 noises": {"immiscible_noise": 8},
}
"""Name → options."""
