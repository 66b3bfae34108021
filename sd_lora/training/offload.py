"""Frozen weights that wait in the memory of the CPU, and are on the device only while their block
computes.

The weights of a residual or transformer block, of the UNet, the VAE or a text encoder, are one
tensor on the CPU, pinned where a card reads it. A block that is about to compute, forward, backward
or for the second time, has them copied into a tensor of the device; while it computes, those of the
block after it are on their way; all others leave. So the weights of two blocks at most are there at
once. They are frozen: nothing is copied back.

Between its computations a block's parameters are those on the CPU, so whoever reads one (an export,
a norm, a sample) finds its numbers. The tensor on the device stays one and the same, with a storage
that is empty while they wait, as FSDP2 has it (torch.distributed.fsdp, `free_storage`): views of it
that autograd has saved are whole again when their block goes backward.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from sd_lora.adapters.fast.copies import Stack
from sd_lora.adapters.inject import deltas_of
from sd_lora.config.schema import RunConfig, TrainConfig
from sd_lora.errors import UsageError
from sd_lora.training.fast.step import FastModel, fast_models
from sd_lora.training.lane import Lane
from sd_lora.training.offload_activations import Activations
from sd_lora.training.sharding import INSTEAD
from sd_lora.transfer import let_wait

BLOCKS = (ResnetBlock2D, BasicTransformerBlock, GradientCheckpointingLayer)
"""Those whose activations `recompute` knows, the last of text encoders: 130 in SDXL with its text
encoders, 87 in its UNet; and the VAE's."""

ALIGNED = 256
"""Bytes at whose multiples tensors begin; CUDA's allocator has 512, and kernels ask for 16."""

LINE = 64
"""Bytes at whose multiples memory begins on a CPU."""


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """Name → block, of a UNet, a VAE or a text encoder."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BLOCKS)}


def modules_of(model: nn.Module) -> set[nn.Module]:
    """All modules inside of the blocks of a model."""
    return {module for block in blocks_of(model).values() for module in block.modules()}


def frozen_of(block: nn.Module) -> list[Tensor]:
    """The frozen tensors of a block, its buffers too; those of its deltas stay on the device."""
    own = {id(t) for d in deltas_of(block).values() for t in (*d.parameters(), *d.buffers())}
    tensors = (*block.parameters(), *block.buffers())
    return [t for t in tensors if id(t) not in own and not t.requires_grad]


def let_blocks_wait(model: nn.Module) -> None:
    """Let the frozen tensors of a model's blocks stay where they are when it is brought to a
    device.

    Processes of DistributedDataParallel do not send each other those: all have read the same file.
    """
    waiting = [tensor for block in blocks_of(model).values() for tensor in frozen_of(block)]
    let_wait(waiting)
    places = {id(tensor) for tensor in waiting}
    named = [*model.named_parameters(), *model.named_buffers()]
    ignored = [name for name, tensor in named if id(tensor) in places]
    model._ddp_params_and_buffers_to_ignore = ignored  # type: ignore[assignment]


class Weights:
    """The frozen weights of a block.

    home: their bytes, on the CPU. there: those on the device, of a storage that is empty now.
    tensors: each with its view of home and its view of there. stacks: of the fast path, apart.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        stacks: Sequence[Stack],
        lane: Lane,
    ) -> None:
        self.stacks, self._event, self.is_coming = stacks, None, False
        spans: dict[int, tuple[int, int]] = {}  # storage → its first byte in use, and its end
        skews: dict[int, int] = {}
        for tensor in tensors:
            key, (first, end) = tensor.untyped_storage()._cdata, _span(tensor)
            before = spans.get(key, (first, end))
            spans[key] = min(first, before[0]), max(end, before[1])
            # on a CPU sums go by the remainder of an address, and a file's tensors begin anywhere
            start = tensor.untyped_storage().data_ptr() + spans[key][0]
            remainder = start % LINE // tensor.itemsize * tensor.itemsize
            skews[key] = remainder if lane.device.type == "cpu" else 0
        places, self.size = dict[int, int](), 0
        for key, (first, end) in spans.items():
            places[key] = self.size - first + skews[key]
            self.size += -(-(end - first + skews[key]) // ALIGNED) * ALIGNED
        self.home, self.there = lane.home(self.size), lane.there(self.size)
        self.tensors = []
        for tensor in tensors:
            place = places[tensor.untyped_storage()._cdata]
            home, there = (_view(tensor, whole, place) for whole in (self.home, self.there))
            home.copy_(tensor)
            self.tensors.append((tensor, home, there))
        for tensor, home, _ in self.tensors:
            tensor.data = home
        self.there.untyped_storage().resize_(0)

    @property
    def is_there(self) -> bool:
        """Whether they take memory of the device."""
        return self.there.untyped_storage().nbytes() > 0

    def set_out(self, lane: Lane) -> None:
        """Begin to copy them to the device."""
        self.there.untyped_storage().resize_(self.size)
        self._event = lane.copy(self.there, self.home)
        self.is_coming = True  # last: a signal may end this at any place, and the run go on

    def arrive(self, lane: Lane) -> None:
        """Be what the block computes with from now on."""
        lane.join(self._event)
        self._event = None
        for tensor, _, there in self.tensors:
            tensor.data = there

    def leave(self, lane: Lane) -> None:
        """Free their memory of the device."""
        lane.join(self._event)  # a copy that nobody waited for would write into another's memory
        self._event, self.is_coming = None, False
        for tensor, home, _ in self.tensors:
            tensor.data = home
        self.there.untyped_storage().resize_(0)


def _span(tensor: Tensor) -> tuple[int, int]:
    """The first byte of a storage that a tensor reads, and the end of the last one."""
    start = tensor.storage_offset()
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    end = int(start + sum((size - 1) * step for size, step in steps) + 1)
    return int(start) * tensor.itemsize, end * tensor.itemsize


def _view(tensor: Tensor, whole: Tensor, place: int) -> Tensor:
    """The view of bytes that has a tensor's form. place: of the tensor's storage in them."""
    start = (place + tensor.storage_offset() * tensor.itemsize) // tensor.itemsize
    storage = whole.untyped_storage()
    empty = torch.empty(0, dtype=tensor.dtype, device=whole.device)
    return empty.set_(storage, start, tensor.shape, tensor.stride())


class Offload:
    """Models whose blocks' frozen weights wait on the CPU.

    weights: name of a block, "unet/down_blocks.0.resnets.0" → its weights.

    Args:
        models: component → model, not wrapped; their modules are hooked from now on.
        fast_ones: the fast models, made with the blocks' modules as `waiting`.
        device: of the run.
        seen: function of a tensor whose storage has another size now, for counting.
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        fast_ones: Sequence[FastModel],
        device: torch.device,
        seen: Callable[[Tensor], object] = lambda tensor: None,
    ) -> None:
        self.lane, self.seen = Lane(device), seen
        self.weights: dict[str, Weights] = {}
        self._now: Weights | None = None
        self.add(models, fast_ones)

    def add(self, models: Mapping[str, nn.Module], fast_ones: Sequence[FastModel] = ()) -> None:
        """Let the blocks of more models wait, see `Offload`; those that do already are left
        alone."""
        known = {name.partition("/")[0] for name in self.weights}
        stays = {t.untyped_storage()._cdata for one in fast_ones for t in one.shared.weights}
        stacks = [f for one in fast_ones for f in one.copies.factors if isinstance(f, Stack)]
        for component, model in models.items():
            if component in known:
                continue
            let_blocks_wait(model)
            order: list[Weights] = []  # of the forward pass, as it goes
            for name, block in blocks_of(model).items():
                modules = {*block.modules()}
                own = [stack for stack in stacks if stack.apart and stack.layers[0] in modules]
                tensors = [t for stack in own for t in (stack.W, stack.bias) if t is not None]
                tensors += frozen_of(block)
                tensors = [t for t in tensors if t.untyped_storage()._cdata not in stays]
                weights = self.weights[f"{component}/{name}"] = Weights(tensors, own, self.lane)
                self._hook(block, weights, order)

    def _hook(self, block: nn.Module, weights: Weights, order: list[Weights]) -> None:
        """Have a block's weights there when it computes. order: of the blocks of its model."""
        block.register_forward_pre_hook(lambda *_: self._need(weights, 1, order))
        block.register_forward_hook(lambda _, __, out: self._watch(out, weights, order))

    @property
    def waiting(self) -> list[Tensor]:
        """All tensors that wait, parameters and buffers of the models among them."""
        return [tensor for weights in self.weights.values() for tensor, *_ in weights.tensors]

    def _watch(self, out: Tensor, weights: Weights, order: list[Weights]) -> None:
        """Bring a block's weights when its backward pass is about to begin."""
        if out.requires_grad:
            out.register_hook(lambda _: self._need(weights, -1, order))

    def _need(self, weights: Weights, step: int, order: list[Weights]) -> None:
        """Have a block's weights on the device, and those of the model's next block on their way.

        step: 1 forward, -1 backward. A block that is computed again in its backward pass is there
        already. In the backward pass all nodes of a block come before all nodes of the block before
        it, for the engine takes them by the order of the forward pass: so it needs no sign of its
        end.
        """
        if weights is not self._now:
            if weights not in order:
                order.append(weights)
            place = order.index(weights) + step
            following = order[place] if 0 <= place < len(order) else None
            for other in self.weights.values():
                if other.is_there and other not in (weights, following):
                    other.leave(self.lane)
                    self.seen(other.there)
            self._now = None  # until it is there, also where memory is used up on the way
            for one in (weights, following):
                if one is not None and not one.is_coming:
                    one.set_out(self.lane)
                    self.seen(one.there)
            weights.arrive(self.lane)
            self._now = weights
        for stack in weights.stacks:  # the factors may have had a step since
            stack.fill()


OPTIONS = ("offload_weights", "offload_activations")


def check_offload(config: RunConfig, device: torch.device, sharded: bool) -> None:
    """Refuse a device whose storages torch cannot empty and fill again, and shards of weights.

    sharded: whether processes share the UNet.

    Raises:
        UsageError: with the way out.
    """
    name = next((name for name in OPTIONS if getattr(config, name)), None)
    if name and device.type not in ("cuda", "cpu", "meta"):
        raise UsageError(
            f"{name} is for cards with CUDA or ROCm, and this device is {device.type}: leave it out"
        )
    if name and sharded:
        raise UsageError(
            f"{name} moves whole blocks of the UNet, which FSDP2 splits: leave it out, or launch "
            f"with {INSTEAD}"
        )


def check_offload_of_several(config: TrainConfig) -> None:
    """Raise UsageError for an offload of a UNet whose weights other runs share."""
    names = ("offload_weights", "offload_activations")
    if asked := [name for name in names if getattr(config, name)]:
        raise UsageError(
            f"{asked[0]} moves what one run's UNet holds, and [[jobs]] share it: leave it out"
        )


def ways_of(
    config: RunConfig, models: Mapping[str, nn.Module], device: torch.device
) -> tuple[list[FastModel], Offload | None]:
    """The fast models of a run, and its offload of weights where it is asked for; the activations'
    is the UNet's own from now on.

    models: component → adapted model, prepared by `adapt.prepare_models`.
    """
    if (unet := models.get("unet")) is None:
        return fast_models(models, config.masks_ranks), None
    if config.offload_weights:
        waiting = {module for model in models.values() for module in modules_of(model)}
        fast_ones = fast_models(models, config.masks_ranks, waiting)
        moved = Offload(models, fast_ones, device)
    else:
        fast_ones, moved = fast_models(models, config.masks_ranks), None

    def kept() -> Iterable[Tensor]:
        yield from (*unet.parameters(), *unet.buffers())
        yield from (tensor for one in fast_ones for tensor in one.tensors)
        yield from (weights.there for weights in (moved.weights.values() if moved else ()))

    if config.offload_activations:
        Activations(unet, blocks_of(unet), kept, device)
    return fast_ones, moved
