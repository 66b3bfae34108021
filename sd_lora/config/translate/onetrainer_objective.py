"""OneTrainer's keys of the objective: timesteps, weights, losses, masks."""

from typing import Any

from sd_lora.config.translate.rows import Given, Row, Taken, is_off, number, read_with, taking

NOT_THERE = "is not there"


def _strength(option: str) -> Row:
    def take(value: Any, given: Given) -> Taken:
        timestep = round(1000 * number(value))
        if timestep in (0, 1000):
            return Taken("needless", reason="is the default")
        return Taken("otherwise", {option: timestep}, "is a timestep, 1000 times as large")

    return Row(f"--{option}, times 1000", "is a timestep here", take)


def _weighting(value: Any, given: Given) -> Taken:
    word, strength = str(value).upper(), given.get("loss_weight_strength", 5)
    if word == "CONSTANT":
        return Taken("needless", reason="is the default")
    if word not in WEIGHTINGS:
        return Taken("absent", reason=NOT_THERE)
    option, reason = WEIGHTINGS[word]
    on = True if word == "DEBIASED_ESTIMATION" else strength
    return Taken("otherwise", {option: on}, reason)


WEIGHTINGS = {
    "MIN_SNR_GAMMA": ("snr_gamma", "is on if a gamma is given"),
    "P2": ("p2_gamma", "is the same objective for v-prediction; there another"),
    "DEBIASED_ESTIMATION": (
        "debiased_estimation_loss", "is the same objective for v-prediction; there another"),
}  # fmt: skip
"""Loss weighting there → option, and its difference."""


def _distribution(value: Any, given: Given) -> Taken:
    word = str(value).upper()
    if word == "UNIFORM":
        return Taken("needless", reason="is the default")
    weight, bias = number(given.get("noising_weight", 0)), number(given.get("noising_bias", 0))
    found: dict[str, dict[str, Any]] = {
        "LOGIT_NORMAL": {
            "timestep_sampling": "logit_normal", "logit_mean": bias, "logit_std": weight + 1.0,
        },
        "HEAVY_TAIL": {"timestep_sampling": "mode", "mode_scale": weight},
        "COS_MAP": {"timestep_sampling": "cosmap"},
    }  # fmt: skip
    if word not in found:
        return Taken("absent", reason=f"{NOT_THERE}: --timestep_sampling has other shapes")
    return Taken("otherwise", found[word], "is --timestep_sampling, with the same shape")


def _mae(value: Any, given: Given) -> Taken:
    if is_off(value):
        return Taken("needless", reason="is off")
    if not is_off(given.get("mse_strength", 1)):
        return Taken(
            "absent", reason="is not there beside mse_strength: --loss_type is one of them"
        )
    return Taken("otherwise", {"loss_type": "l1"}, "is a type of loss here")


def _unmasked(value: Any, given: Given) -> Taken:
    if is_off(given.get("masked_training")):
        return Taken("needless", reason="belongs to masked_training")
    return Taken("same", {} if is_off(value) else {"unmasked_weight": number(value)})


def _zero_snr(value: Any, given: Given) -> Taken:
    if is_off(value):
        return Taken("needless", reason="is off")
    found = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    return Taken("otherwise", found, "is two options")


OBJECTIVE: dict[str, Row] = {
    "unmasked_weight": taking("--unmasked_weight", "", _unmasked),
    "rescale_noise_scheduler_to_zero_terminal_snr": taking(
        "--prediction_type v_prediction --rescale_betas_zero_snr", "", _zero_snr
    ),
    "min_noising_strength": _strength("min_timestep"),
    "max_noising_strength": _strength("max_timestep"),
    "timestep_distribution": taking("--timestep_sampling", "", _distribution),
    **dict.fromkeys(("noising_weight", "noising_bias"), read_with("timestep_distribution")),
    "loss_weight_fn": taking("--snr_gamma, --p2_gamma, …", "", _weighting),
    "mae_strength": taking("--loss_type l1", "", _mae),
}
"""Key → its answer here."""
