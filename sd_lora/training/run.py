"""A run that is ready for its first step: the parts that the loop works with."""

import contextlib
import hashlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sd_lora.adapters.inject import lora_layers
from sd_lora.adapters.merging import scaled_norms, unmask_ranks
from sd_lora.config.sample_prompts import SamplePrompt
from sd_lora.config.schema import RunConfig
from sd_lora.data.batches.stream import Batch, BatchItem, Stream
from sd_lora.data.cache.encode import Latents
from sd_lora.diffusion.objective import Objective
from sd_lora.errors import RunError
from sd_lora.formats.checkpoints import base_hash
from sd_lora.models.caption_encoder import Conditioning, collate
from sd_lora.models.families import INPAINTING
from sd_lora.models.load import Parts
from sd_lora.models.meta_pipeline import MetaPipeline
from sd_lora.models.noise_scheduler import FLOW
from sd_lora.report.digest import Digest
from sd_lora.report.events import Listener
from sd_lora.report.log_file import LogFile
from sd_lora.report.summary import Summary
from sd_lora.training import checkpoint
from sd_lora.training.average import Average
from sd_lora.training.conditioning import TextConditioning, geometry_of
from sd_lora.training.data import RunImages
from sd_lora.training.fast.step import FastModel
from sd_lora.training.fit import Fit
from sd_lora.training.init_lora import Start
from sd_lora.training.ledger import Ledger
from sd_lora.training.optimizers import (
    averaged,
    averages,
    current_rates,
    load_optimizer,
    use_average,
)
from sd_lora.training.plan import Plan
from sd_lora.training.processes import Device
from sd_lora.training.recompute import Recomputed
from sd_lora.training.sample_schedule import SampleSchedule
from sd_lora.training.scores import Scores
from sd_lora.training.sharding import average_gradients, gather, is_sharded, release
from sd_lora.training.trackers import tracker_runs
from sd_lora.training.validation import Validation

if TYPE_CHECKING:
    from sd_lora.training.graphs import Graphs


class ImageLost(RunError):
    """An image that existed when the run started cannot be read any more."""


@dataclass
class Run:
    """Everything that the loop needs.

    emit: tells an event to the listeners; on the main process alone. log: the file of losses.
    device: facts about it. models: component → injected model. prepared: component → model as
    Accelerate wrapped it, for those that learn. text: captions → embeddings. meta_pipeline: the
    modules that the LoRA is for. fit: the way of a step through the device. validation: the images
    and noise by which the run is measured. ledger: of its images. average: of the steps, which is
    exported; None for the last step, or the optimiser's own average. saved: the checkpoint to
    resume. fast_models: on the fast path. graphs: recorded passes, None without. start: the
    LoRA file to start from. losses: hash of those so far. redrawn: steps done before and at the end
    of each part that was done once more. saved_steps: those of this process's checkpoints.
    schedule: of the sample images. spent: kind of work → its seconds. repo: of the hub, or "".
    recomputed: blocks of the memory budget. scores: or None. thumbnails: group and index of an
    image → its picture.
    """

    plan: Plan
    emit: Listener
    log: LogFile
    accelerator: Accelerator
    device: Device
    parts: Parts
    models: dict[str, nn.Module]
    prepared: dict[str, nn.Module]
    objective: Objective
    latents: Latents
    text: TextConditioning
    meta_pipeline: MetaPipeline
    stream: Stream
    images: RunImages
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LambdaLR
    summary: Summary
    validation: Validation
    ledger: Ledger
    average: Average | None = None
    fast_models: Sequence[FastModel] = ()
    graphs: "Graphs | None" = None
    fit: Fit = field(default_factory=Fit)
    saved: checkpoint.Saved | None = None
    start: Start | None = None
    losses: str = ""
    redrawn: list[tuple[int, int]] = field(default_factory=list)
    saved_steps: list[int] = field(default_factory=list)
    spent: dict[str, float] = field(default_factory=dict)
    repo: str = ""
    recomputed: Recomputed | None = None
    scores: Scores | None = None
    thumbnails: dict[tuple[str, int], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.schedule = SampleSchedule(self.plan, 0)

    @property
    def config(self) -> RunConfig:
        return self.plan.config

    @property
    def output_dir(self) -> Path:
        return self.config.output_path

    @cached_property
    def asked_prompts(self) -> list[SamplePrompt]:
        """The prompts of sample images that the configuration names, read once."""
        return self.config.asked_prompts

    @cached_property
    def base_hash(self) -> str | None:
        """SHA-256 of the base; it takes seconds, and each checkpoint has it in a header."""
        return base_hash(self.config.base_model, **self.config.hub_options)

    @property
    def main(self) -> bool:
        """Whether this is the main process."""
        return self.accelerator.is_main_process

    @cached_property
    def joint(self) -> bool:
        """Whether the UNet computes on all processes at once only, since each holds a part."""
        return is_sharded(self.models["unet"])

    @property
    def judged(self) -> Validation | Scores:
        """The measurements by which steps are compared: scores where images are scored."""
        return self.scores or self.validation

    @property
    def prediction_type(self) -> str:
        """The prediction type by the base's scheduler; for EDM, its own sign convention."""
        return str(self.parts.scheduler.config.prediction_type)

    @property
    def given_noise_settings(self) -> dict[str, object]:
        """Settings of diffusers' scheduler that the options say, in place of the base's own."""
        settings: dict[str, object] = {}
        if self.prediction_type == FLOW:  # also for a folder, whose own scheduler no pipeline takes
            scheduler: Any = self.parts.scheduler
            names = ("prediction_type", "use_flow_sigmas", "flow_shift")
            return {name: scheduler.config[name] for name in names}
        if self.config.prediction_type:
            settings["prediction_type"] = self.prediction_type
        if self.config.rescale_betas_zero_snr:
            settings |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return settings

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters: deltas, and embeddings of new words; 4 ms to look for."""
        layers = [p for model in self.models.values() for p in lora_layers(model)]
        return [*layers, *(self.text.tokens.parameters() if self.text.tokens else [])]

    @property
    def first_step(self) -> int:
        """Steps done before this process started: those of the resumed checkpoint."""
        return self.saved.progress.step if self.saved else 0

    @property
    def learning_rates(self) -> dict[str, float]:
        """Name of a parameter group → its current learning rate."""
        return current_rates(self.optimizer)

    @property
    def averages(self) -> bool:
        """Whether other weights are sampled and exported than those that are trained."""
        return self.average is not None or averages(self.optimizer)

    def anywhere(self, fact: bool) -> bool:
        """Whether a fact holds on any process that does joint work; else on this one."""
        if not self.joint:
            return fact
        flag = torch.tensor(float(fact), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)

    def batch(self, number: int) -> Batch | None:
        """This process's part of a micro-batch; None where an image of a joint one is lost."""
        batch = None
        with contextlib.suppress(RunError):
            batch = self.stream.batch(number)
        return None if self.anywhere(batch is None) else batch

    @contextlib.contextmanager
    def exportable(self) -> Iterator[None]:
        """A context of all processes; in it the main one has all tensors that an export reads."""
        self._gather_base()
        yield
        if self.joint:
            release(self.models["unet"])

    def _gather_base(self) -> None:
        if self.joint and self.config.use_dora:
            gather(self.models["unet"])

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """A context in which the weights are those that are sampled and exported."""
        return self.average.shown() if self.average else averaged(self.optimizer)

    def use_average(self) -> None:
        """Give the weights the values that are exported, for good."""
        if self.average:
            self.average.use()
        else:
            use_average(self.optimizer)

    def next_rate(self) -> None:
        """Go on with the schedule, also after a skipped first step, of which torch would warn."""
        if self.lr_scheduler.last_epoch:
            self.lr_scheduler.step()
            return
        with warnings.catch_warnings():  # once: it lets each library repeat its own warnings
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            self.lr_scheduler.step()

    def restore(self) -> None:
        """Load the LoRA file to start from, or the checkpoint to resume, with this run's learning
        rates."""
        self.ledger.waiting.clear()  # of trials of the batch
        if self.start is not None:
            self.start.apply()
        if self.saved is not None:
            self.load(self.saved)

    def load(self, saved: checkpoint.Saved) -> None:
        """Take the state of a checkpoint, with this run's learning rates."""
        self.losses = saved.state["losses"]
        self.validation.load(saved.state["validation"])
        if self.scores:
            self.scores.load(saved.state["scores"])
        self.ledger.load(saved.state["ledger"])
        self.redraw([(first, last) for first, last in saved.state["redrawn"]])
        rates = [group["initial_lr"] for group in self.optimizer.param_groups]
        saved.load_factors(self.models)
        if self.text.learning:
            self.text.table = None  # of encoders that may have learned on since
        if self.text.tokens:
            trained = saved.state["trained"] or saved.state
            self.text.tokens.load_state_dict(trained["tokens"])
        if self.average:
            self.average.load_state_dict(saved.state["average"])
        if self.objective.uncertainty:
            self.objective.uncertainty.load_state_dict(saved.state["uncertainty"])
        load_optimizer(self.optimizer, saved.state["optimizer"])
        self.lr_scheduler.load_state_dict(saved.state["schedule"])
        schedule = self.lr_scheduler
        schedule.base_lrs = rates
        factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
        for group, rate, factor in zip(self.optimizer.param_groups, rates, factors, strict=True):
            group["initial_lr"], group["lr"] = rate, rate * factor
        if self.accelerator.scaler is not None and saved.state.get("scaler"):
            self.accelerator.scaler.load_state_dict(saved.state["scaler"])

    def redraw(self, parts: list[tuple[int, int]]) -> None:
        """Draw other noise, timesteps and dropout for parts of the run. parts: steps done before
        and at the end of each; steps of several are drawn anew for each of them."""
        epochs, self.redrawn = self.plan.epochs, parts

        def position(step: int) -> int:
            return epochs.micro_batch(epochs.first_of_step(step)).position

        self.stream.redrawn = [(position(first), position(last)) for first, last in parts]

    def batches(self, step: int | None = None) -> Iterator[tuple[int, Batch]]:
        """Yield this process's micro-batches from a step on, with their numbers.

        step: number of steps done; those before this process started if not given.

        Raises:
            ImageLost: an image that cannot be read any more.
        """
        start = self.plan.epochs.first_of_step(self.first_step if step is None else step)
        loader = DataLoader(
            self.stream,
            batch_size=None,
            sampler=range(start, len(self.stream)),
            num_workers=self.config.dataloader_num_workers,
            collate_fn=_unchanged,
        )
        for number, batch in enumerate(loader, start):
            if isinstance(batch, RunError):
                raise ImageLost(str(batch))
            yield number, batch

    def conditions(self, items: list[BatchItem], step: int) -> Conditioning:
        """Conditions of the UNet for batch items, on the device, in the base's dtype.

        step: number of steps done, since text encoders may stop learning.
        """
        embeddings = self.text.embeddings([item.caption for item in items], step)
        geometries = [geometry_of(item) for item in items]
        conditions = collate(embeddings, geometries, self.parts.family)
        return conditions.to(self.text.device, self.text.dtype)

    def unet_input(self, x_t: Tensor, batch: Batch) -> Tensor:
        """Input of the UNet in the base's dtype: x_t (B, C, H, W), for inpainting with the mask
        and the masked image's latents (B, 2C + 1, H, W)."""
        if self.parts.task is INPAINTING:
            x_t = torch.cat([x_t, self.latents.masked(batch.items, batch.loaded)], dim=1)
        return x_t.to(self.text.dtype)

    def gradient_exchange(self, enabled: bool) -> contextlib.ExitStack:
        """A context: whether a backward pass in it averages gradients over processes. The last
        micro-batch of a step does; the others add up on their own process."""
        stack = contextlib.ExitStack()
        if self.joint:
            if enabled:
                stack.push(self._average)
        elif not enabled:
            for model in self.prepared.values():
                stack.enter_context(self.accelerator.no_sync(model))
        return stack

    @contextlib.contextmanager
    def unmasking(self) -> Iterator[None]:
        """A context after which all ranks of the UNet's deltas are in use again (T-LoRA)."""
        try:
            yield
        finally:
            if self.config.masks_ranks:
                unmask_ranks(self.models["unet"])

    def _average(self, error: object, *_: object) -> None:
        """Average the gradients after a backward pass, unless it failed."""
        if error is None:
            average_gradients(self.accelerator, self.parameters)

    def learn_weights(self, skipped: bool) -> None:
        """Take a step of the learned loss weights, the same on all processes; none if skipped."""
        uncertainty = self.objective.uncertainty
        if uncertainty and skipped:
            uncertainty.forget()
        elif uncertainty:
            uncertainty.gradient.copy_(self.accelerator.reduce(uncertainty.gradient, "mean"))
            uncertainty.step()

    def limit_norms(self, step: int) -> None:
        """Scale deltas down to `scale_weight_norms`, but for those that stopped learning."""
        bound = self.config.scale_weight_norms
        for component, model in self.models.items():
            if bound is not None and not self.text.stops.lora_has_stopped(component, step):
                scaled_norms(model, bound)

    def checkpoint_state(self) -> dict[str, Any]:
        """Name → state of a checkpoint, besides the factors."""
        scaler, trained = self.accelerator.scaler, None
        if self.averages:
            trained = {"factors": checkpoint.factors_of(self.models), "tokens": self.words_state()}
        runs = self.saved.state["trackers"] if self.saved else {}
        uncertainty = self.objective.uncertainty
        return {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.lr_scheduler.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "average": self.average.state_dict() if self.average else None,
            "uncertainty": uncertainty.state_dict() if uncertainty else None,
            "trained": trained,
            "tokens": self.words_state(),
            "losses": self.losses,
            "redrawn": self.redrawn,
            "validation": self.validation.state(),
            "scores": self.scores.state() if self.scores else {},
            "ledger": self.ledger.state(),
            "trackers": runs | tracker_runs(self.accelerator),
        }

    def words_state(self) -> dict[str, Any] | None:
        """A copy of the new words' embeddings; None without any."""
        return self.text.tokens.state_dict() if self.text.tokens else None

    def digest(self) -> Digest:
        """Hashes of the data, the losses so far and the tensors as they are."""
        named = checkpoint.factors_of(self.models) | (self.words_state() or {})
        tensors = hashlib.sha256()
        for name, tensor in sorted(named.items()):
            tensors.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            tensors.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return Digest(self.plan.data_hash(self.redrawn), self.losses, tensors.hexdigest())

    def release_distributed(self) -> None:
        """End the joint work of the processes; the others do not wait for the main one's exports.

        DistributedDataParallel goes first, while all processes are alive: destroyed after its
        process group, it waits for a thread that waits for the interpreter (torch 2.13, gloo).
        """
        self._gather_base()  # for these exports
        self.prepared.clear()
        self.text.learning.clear()
        self.accelerator.free_memory()
        self.accelerator.wait_for_everyone()


def _unchanged(batch: Any) -> Any:
    return batch
