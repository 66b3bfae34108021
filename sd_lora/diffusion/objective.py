"""The parts of a run's objective together."""

from dataclasses import dataclass, replace

import torch

from sd_lora.diffusion.loss import Loss
from sd_lora.diffusion.noise import Noise
from sd_lora.diffusion.schedule import NoiseSchedule
from sd_lora.diffusion.timesteps import Timesteps
from sd_lora.diffusion.uncertainty import Uncertainty


@dataclass(frozen=True)
class Objective:
    """What is learned: noise levels with their weights, the timesteps drawn, noise, and loss.

    uncertainty: the weights by timestep that are learned; None without.
    """

    schedule: NoiseSchedule
    timesteps: Timesteps
    noise: Noise
    loss: Loss
    uncertainty: Uncertainty | None = None

    def to(self, device: torch.device) -> "Objective":
        """The same objective with its tables and its learned weights on a device."""
        learned = self.uncertainty
        return replace(
            self,
            schedule=self.schedule.to(device),
            loss=self.loss.to(device),
            uncertainty=learned and learned.to(device),
        )

    @property
    def text(self) -> str:
        """Prediction, weighting and timesteps as a line: "v_prediction, min-SNR γ 5, …"."""
        schedule, timesteps = self.schedule, self.timesteps
        words = [schedule.prediction_type]
        words += ["zero terminal SNR"] if schedule.zero_terminal_snr else []
        words += [schedule.weighting] if schedule.weighting else []
        words += ["weights learned by timestep"] if self.uncertainty else []
        if (timesteps.first, timesteps.last) != (0, schedule.num_timesteps):
            words.append(f"timesteps {timesteps.first} to {timesteps.last - 1}")
        words += [timesteps.label] if timesteps.label else []
        return ", ".join(words)
