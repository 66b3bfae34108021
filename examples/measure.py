"""What a way of training costs: bytes and seconds of a step, and bytes of the file; and a seed."""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


def file_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Returns the size of the safetensors file that holds `tensors`, by writing it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kept.safetensors"
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)
        return path.stat().st_size


def weight_bytes(model: nn.Module) -> int:
    """Returns the bytes of a model's weights; of quantised ones, their codes and scales."""
    storages = [tensor.untyped_storage() for tensor in model.state_dict().values()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def count_activations(model: nn.Module, forward: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """Runs `forward`; returns its output, and the bytes that autograd keeps for the way back.

    A storage counts once however many operations keep it; a parameter, which is there anyway, not
    at all.
    """
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    return output, sum(kept.values())


class MeasuredTraining:
    """AdamW, its rate falling to zero over `num_steps`, on a model whose output has a `loss`.

    Times are the processor's, so that other programs on a busy machine do not count.

    Args:
        new_optimizer: AdamW, or one that takes and keeps the same in fewer bits.

    Attributes:
        memory: bytes of gradients, AdamW's moments and kept activations, counted in the first
            step. The weights come on top (`weight_bytes`).
    """

    def __init__(
        self,
        model: nn.Module,
        trained: Iterable[nn.Parameter],
        lr: float,
        num_steps: int,
        new_optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    ) -> None:
        self.model, self.trained = model, list(trained)
        self.optimizer = new_optimizer(self.trained, lr=lr)
        self.schedule = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, 0.0, num_steps)
        self.memory = 0
        self._times: list[tuple[float, float, float, float]] = []

    def step(self, batch: Mapping[str, Tensor]) -> None:
        if not self.memory:
            self._first_step(batch)
            return
        start = time.process_time()
        loss = self.model(**batch).loss
        forward = time.process_time()
        loss.backward()
        backward = time.process_time()
        self._update()
        self._times.append((start, forward, backward, time.process_time()))

    def _first_step(self, batch: Mapping[str, Tensor]) -> None:
        loss, activations = count_activations(self.model, lambda: self.model(**batch).loss)
        loss.backward()
        gradients = sum(p.grad.nbytes for p in self.model.parameters() if p.grad is not None)
        self._update()
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        # the 256 values of 8-bit codes are one tensor for all parameters
        moments = {value.data_ptr(): value.nbytes for value in states if isinstance(value, Tensor)}
        self.memory = gradients + sum(moments.values()) + activations

    def _update(self) -> None:
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()

    @property
    def num_trained(self) -> int:
        return sum(p.numel() for p in self.trained)

    @property
    def seconds(self) -> float:
        """The median of a step, without the first."""
        return statistics.median(times[-1] - times[0] for times in self._times)

    @property
    def seconds_by_part(self) -> tuple[float, float, float]:
        """The medians of the forward pass, the backward pass and the optimiser."""
        forward, backward, update = (
            statistics.median(times[part + 1] - times[part] for times in self._times)
            for part in range(3)
        )
        return forward, backward, update


def seed_of(argv: Sequence[str] | None, about: str | None, of: str) -> int:
    """Returns the seed that an example is given, and keeps its small steps to one thread.

    about: the example's docstring. of: what the seed is of.
    """
    parser = argparse.ArgumentParser(description=(about or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help=of)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # steps this small get slower with more
    return int(args.seed)
