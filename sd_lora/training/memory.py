"""The memory of a step, counted without a device.

On the meta device tensors have shapes and no numbers; each counts from the operator that makes it
until nothing holds it any more.
"""

import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from sd_lora.adapters.inject import lora_layers
from sd_lora.config.schema import RunConfig
from sd_lora.data.images.buckets import Size
from sd_lora.models.caption_encoder import PIECE
from sd_lora.models.families import Family
from sd_lora.models.meta_pipeline import MetaPipeline
from sd_lora.models.quantized_base import quantize_base
from sd_lora.training.adapt import inject_all, prepare_models
from sd_lora.training.average import profiles_of
from sd_lora.training.fast.step import fast
from sd_lora.training.offload import ways_of
from sd_lora.training.optimizers import optimizer_of
from sd_lora.training.processes import DTYPES, chosen_precision
from sd_lora.training.recompute import All, Call, enable_checkpointing

GIB = 2**30

RESERVE = GIB
"""Bytes assumed for all that is not counted: CUDA itself, workspaces of its kernels, fragments."""


Kernel = tuple[int, int]
"""Operations of a product, 0 for a kernel that is none, and the bytes that it reads and writes."""


class HeldBytes(TorchDispatchMode):
    """Bytes of all tensors that are held while the mode is on, their peak, and the kernels: of each
    the operations of its product, and the bytes that it reads and writes.

    held: tensors that exist already.
    """

    def __init__(self, held: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.kernels: list[Kernel] = []
        self._counted: dict[int, int] = {}
        for tensor in held:
            self.add(tensor)

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage by its size now, once, until it is freed."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._counted:
            weakref.finalize(storage, self._remove, key)
        self.now += size - self._counted.get(key, 0)
        self._counted[key] = size
        self.peak = max(self.peak, self.now)

    def _remove(self, key: int) -> None:
        self.now -= self._counted.pop(key)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        for tensor in made:
            self.add(tensor)
        places = {tensor.untyped_storage()._cdata for tensor in read}
        new = [t for t in made if t.untyped_storage()._cdata not in places]
        if new or func._schema.is_mutable:  # others are views, which compute nothing
            count = _operations(func)
            flop = count(*args, **kwargs, out_val=out) if count else 0
            written = new or made
            self.kernels.append((flop, sum(t.nbytes for t in (*read, *written))))
        return out


def _operations(operator: Any) -> Callable[..., int] | None:
    """The function that counts an operator's operations, of its arguments; None where it does no
    products. torch's own counter knows those that make a new tensor alone: it finds a fifth less in
    a float32 step of SDXL, whose low-rank products are added to a tensor (`addmm_`)."""
    found = flop_registry.get(operator._overloadpacket)
    name = operator._overloadpacket.__name__
    if found is None and operator.namespace == "aten" and name.endswith("_"):
        found = flop_registry.get(getattr(torch.ops.aten, name.removesuffix("_"), None))
    return found


def _flash(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, **_: object,
) -> Tensor:  # fmt: skip
    """Attention as a GPU computes it, without the matrix of weights; a mask takes nothing."""
    return torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, dropout_p, is_causal, False, scale=scale
    )[0]


@contextmanager
def flash_attention() -> Iterator[None]:
    """Count attention on the meta device as a GPU computes it, for a while.

    A function mode would be off in the backward pass, where activations are computed again.
    """
    before = F.scaled_dot_product_attention
    functional: Any = F
    functional.scaled_dot_product_attention = _flash
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = before


@dataclass(frozen=True)
class Shape:
    """The images that go through a step at once. number: class images and preserved ones, too.
    size: width and height, pixels."""

    number: int
    size: Size

    @property
    def text(self) -> str:
        """In words: "4 images of 768×512"."""
        images = "1 image" if self.number == 1 else f"{self.number} images"
        return f"{images} of {self.size[0]}×{self.size[1]}"


@dataclass(frozen=True)
class StepBytes:
    """A step, counted.

    frozen: bytes of the frozen weights that stay on the device. trained: of the deltas, their
    gradients, the optimiser's state and moving averages. peak: of all, with everything that the
    backward pass needs. kernels: of the forward and the backward pass. text_learns: whether text
    encoders are trained.
    """

    frozen: int
    trained: int
    peak: int
    kernels: Sequence[Kernel]
    text_learns: bool

    @property
    def flop(self) -> int:
        """Operations of all products."""
        return sum(flop for flop, _ in self.kernels)

    @property
    def rest(self) -> int:
        """Bytes that grow with the images: activations, and copies of factors."""
        return self.peak - self.frozen - self.trained


def count_step(
    config: RunConfig,
    configs: MetaPipeline,
    shape: Shape,
    blocks: Container[str] | None = None,
    watched: Callable[[HeldBytes], Call] | None = None,
) -> StepBytes:
    """Count one step, with the optimiser's state there already.

    Args:
        config: its targets, ranks, precision, optimiser and checkpointing count.
        configs: of the base model; its modules stay as they are.
        shape: images at once.
        blocks: those whose activations are computed again, by a budget of memory.
        watched: function of the counter that gives a `seen` of `enable_checkpointing`, with which
            all blocks are computed again.
    """
    family, precision = configs.family, chosen_precision(config)
    models: dict[str, Any] = replace(configs).models  # its own, to be adapted
    encoders = {name: models[name] for name in family.text_encoders if name in models}
    for model in models.values():
        model.requires_grad_(False)
    if config.base_precision:
        quantize_base(models["unet"], config.base_precision)
    adapted = inject_all(config, family, models, 0)
    device = torch.device("meta")
    accelerator: Any = SimpleNamespace(
        mixed_precision=precision, device=device, prepare_model=lambda model, **_: model
    )
    text: Any = SimpleNamespace(encoders=encoders, tokens=None)
    prepare_models(config, accelerator, adapted, text, blocks=blocks)
    unet = models["unet"]
    learns = len(adapted) > 1
    others = encoders if learns else {}
    used = [unet, *others.values()]
    layers = [p for model in adapted.values() for p in lora_layers(model)]
    trained = {id(p) for p in layers}
    fast_ones, offload = ways_of(config, adapted, device)
    if offload:
        offload.add(others)
    waiting = trained | {id(t) for t in (offload.waiting if offload else ())}
    frozen = [p for m in used for p in (*m.parameters(), *m.buffers()) if id(p) not in waiting]
    averages = 4 * len(profiles_of(config))
    state = round(sum(p.numel() for p in layers) * (optimizer_of(config).state_bytes + averages))
    moments = torch.empty(state, dtype=torch.uint8, device="meta")
    x, conditions = _inputs(config, configs, unet, shape, DTYPES[precision])
    earlier = []  # gradients of a step's earlier micro-batches
    if config.gradient_accumulation_steps > 1:
        earlier = [torch.empty_like(p) for p in layers]
        for parameter, gradient in zip(layers, earlier, strict=True):
            parameter.grad = gradient
    copies = [b for one in fast_ones for f in one.copies.factors for b in f.buffers]
    held = [*frozen, *layers, *copies, *earlier, moments, x, *tree_leaves(conditions)]
    with HeldBytes(held) as counter:
        if offload:
            offload.seen = counter.add
        if watched:
            enable_checkpointing(adapted, All(), watched(counter))
        with flash_attention(), fast(fast_ones):
            if learns:
                conditions["encoder_hidden_states"] = _encode(config, family, encoders, shape)
            out = unet(x, torch.zeros(shape.number, device="meta"), **conditions).sample
            loss = (out.float() - x[:, : out.shape[1]].float()).square().mean()
            loss.backward()
    return StepBytes(
        frozen=sum(p.nbytes for p in frozen),
        trained=sum(p.nbytes for p in layers) * 2 + state,
        peak=counter.peak,
        kernels=counter.kernels,
        text_learns=learns,
    )


def _inputs(
    config: RunConfig, configs: MetaPipeline, unet: Any, shape: Shape, dtype: torch.dtype
) -> tuple[Tensor, dict[str, Any]]:
    """Latents and conditions of the UNet, on the meta device."""
    family, number = configs.family, shape.number
    width, height = (side // configs.pixels_per_latent for side in shape.size)

    def empty(*sizes: int) -> Tensor:
        return torch.empty(*sizes, device="meta", dtype=dtype)

    tokens = config.max_token_length // PIECE * (PIECE + 2)
    conditions: dict[str, Any] = {
        "encoder_hidden_states": empty(number, tokens, unet.config.cross_attention_dim)
    }
    if family.is_xl:
        ids = sum(1 if name == "aesthetic_score" else 2 for name in family.time_ids)
        wide = unet.config.projection_class_embeddings_input_dim
        pooled = wide - ids * unet.config.addition_time_embed_dim
        more = {"text_embeds": empty(number, pooled), "time_ids": empty(number, ids)}
        conditions["added_cond_kwargs"] = more
    return empty(number, unet.config.in_channels, height, width), conditions


def _encode(config: RunConfig, family: Family, encoders: Mapping[str, Any], shape: Shape) -> Tensor:
    """Embeddings by the text encoders, with gradients."""
    pieces = config.max_token_length // PIECE
    ids = torch.zeros(shape.number * pieces, PIECE + 2, dtype=torch.long, device="meta")
    states = [
        encoder(ids, output_hidden_states=True).hidden_states for encoder in encoders.values()
    ]
    hidden = torch.cat([layers[-(1 + family.penultimate)] for layers in states], dim=-1)
    return hidden.view(shape.number, pieces * (PIECE + 2), -1)


def count_vae(vae: nn.Module, work: Callable[[nn.Module], object]) -> int:
    """Peak bytes of a VAE on the meta device while it encodes or decodes."""
    with torch.no_grad(), HeldBytes([*vae.parameters()]) as counter, flash_attention():
        work(vae)
    return counter.peak


def peak_of(device: torch.device) -> int:
    """Most bytes that this process has held at once: on a card those that torch reserved, else of
    the whole process, libraries and mapped files too; 0 where the system does not tell."""
    if device.type in ("cuda", "xpu"):
        return int(getattr(torch, device.type).max_memory_reserved(device))
    if device.type != "cpu":
        return 0
    status = Path("/proc/self/status")  # of Linux; psutil has the peak of Windows alone
    if not status.exists():
        return int(getattr(psutil.Process().memory_info(), "peak_wset", 0))
    lines = status.read_text(encoding="ascii", errors="replace").splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def room_of(device: torch.device, held: int) -> int | None:
    """Bytes that a run can have on its device: those that it holds, and the free ones; None where
    the device does not tell.

    held: bytes of the tensors that stay there.
    """
    if device.type in ("cuda", "xpu"):
        backend = getattr(torch, device.type)
        return int(backend.mem_get_info(device)[0] + backend.memory_reserved(device))
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory())
    if device.type != "cpu":
        return None
    free, process = psutil.virtual_memory().available, psutil.Process()
    if hasattr(process, "rlimit"):  # Linux alone; -1 is no limit
        limit = process.rlimit(psutil.RLIMIT_AS)[0]
        free = free if limit < 0 else min(free, max(0, limit - process.memory_info().vms))
    return int(free + held)
