"""The layers and the methods that the adapter tests run through: every kind, every method."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sd_lora.adapters.inject import adapted_layers
from sd_lora.adapters.layer_classes import adapted_class_of, wrap
from sd_lora.adapters.layers import AdaptedLayer
from sd_lora.adapters.variants import Variant, new_delta


def images(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(shape),)


def ids() -> tuple[Tensor, ...]:
    return (torch.randint(0, 12, (3, 7)),)


def attention_inputs(kdim: int = 8) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(2, 5, 8), torch.randn(2, 6, kdim), torch.randn(2, 6, kdim))


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    "linear": (lambda: nn.Linear(12, 10), images(3, 5, 12)),
    "linear without bias": (lambda: nn.Linear(12, 10, bias=False), images(3, 12)),
    "gpt2 conv1d": (lambda: Conv1D(10, 12), images(3, 5, 12)),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, stride=2, padding=1), images(2, 6, 11)),
    "conv1d dilated": (lambda: nn.Conv1d(6, 8, 3, dilation=2, padding=2), images(2, 6, 11)),
    "conv2d 3x3": (lambda: nn.Conv2d(6, 8, 3, padding=1), images(2, 6, 7, 7)),
    "conv2d 1x1": (lambda: nn.Conv2d(6, 8, 1), images(2, 6, 7, 7)),
    "conv2d stride": (lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1), images(2, 6, 7, 7)),
    "conv2d 3x1": (lambda: nn.Conv2d(6, 8, (3, 1), padding=(1, 0)), images(2, 6, 7, 7)),
    "conv2d dilated": (lambda: nn.Conv2d(6, 8, 3, dilation=2, padding=1), images(2, 6, 7, 7)),
    "conv2d same": (lambda: nn.Conv2d(6, 8, 3, dilation=2, padding="same"), images(2, 6, 7, 7)),
    "conv2d circular": (
        lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="circular"),
        images(2, 6, 7, 7),
    ),
    "conv2d reflect": (
        lambda: nn.Conv2d(6, 8, 3, padding=2, padding_mode="reflect"),
        images(2, 6, 7, 7),
    ),
    "conv2d groups": (lambda: nn.Conv2d(6, 8, 3, padding=1, groups=2), images(2, 6, 7, 7)),
    "conv2d depthwise": (lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6), images(2, 6, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(4, 8, 3, padding=1, stride=(1, 2, 2)), images(2, 4, 3, 6, 5)),
    "conv3d 1x1": (lambda: nn.Conv3d(4, 8, 1), images(2, 4, 3, 4, 5)),
    "conv3d (1,3,3), grouped, dilated": (
        lambda: nn.Conv3d(4, 8, (1, 3, 3), padding=(0, 2, 2), dilation=(1, 2, 2), groups=4),
        images(2, 4, 3, 6, 5),
    ),
    "conv transpose 1d": (
        lambda: nn.ConvTranspose1d(6, 8, 3, stride=2, padding=1, output_padding=1),
        images(2, 6, 5),
    ),
    "conv transpose 2d, grouped, dilated": (
        lambda: nn.ConvTranspose2d(6, 8, (3, 2), stride=2, dilation=(1, 2), groups=2, bias=False),
        images(2, 6, 4, 3),
    ),
    "conv transpose 3d": (
        lambda: nn.ConvTranspose3d(4, 6, (1, 2, 2), stride=(1, 2, 2)),
        images(2, 4, 2, 3, 2),
    ),
    "embedding": (lambda: nn.Embedding(12, 10), ids),
    "embedding padding_idx": (lambda: nn.Embedding(12, 10, padding_idx=3), ids),
    "embedding max_norm": (lambda: nn.Embedding(12, 10, max_norm=2.5), ids),
    "attention": (lambda: nn.MultiheadAttention(8, 2, batch_first=True), attention_inputs()),
    "attention kdim": (
        lambda: nn.MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=True),
        attention_inputs(6),
    ),
}
"""Name → (makes the layer, makes its inputs)."""

VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora"},
    "rslora": {"method": "lora", "rslora": True},
    "lora tucker": {"method": "lora", "options": {"tucker": True}},
    "lora_fa": {"method": "lora_fa"},
    "loha": {"method": "loha"},
    "loha tucker": {"method": "loha", "options": {"tucker": True}},
    "lokr": {"method": "lokr", "options": {"factor": 2}},
    "lokr full matrix": {"method": "lokr", "options": {"full_matrix": True}},
    "lokr both": {"method": "lokr", "options": {"decompose_both": True, "factor": 4}},
    "lokr tucker": {"method": "lokr", "options": {"tucker": True, "factor": 2}},
    "oft": {"method": "oft", "options": {"block_size": 4}},
    "oft rescaled": {"method": "oft", "options": {"block_size": 6, "rescaled": True}},
    "full": {"method": "full"},
}
RULES = ("add", "decompose")


def cannot(layer: str, variant: str) -> bool:
    """The combinations that are refused: a Kronecker product cannot leave out one row, and a
    rotation of all."""
    return layer == "embedding padding_idx" and variant.startswith(("lokr", "oft"))


def build(
    layer: str,
    variant: str = "lora",
    rule: str = "add",
    dtype: torch.dtype = torch.float32,
    trained: bool = True,
    rank: int | None = None,
    alpha: float = 2.0,
    **more: Any,
) -> tuple[AdaptedLayer, tuple[Tensor, ...]]:
    """Returns an adapted layer (every tensor random if trained) and its inputs, in `dtype`."""
    torch.manual_seed(0)
    make, inputs = LAYERS[layer]
    base = make().to(dtype).requires_grad_(False)
    args = tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs())
    kind = adapted_class_of(base, "full")
    assert kind is not None
    chosen = Variant(**VARIANTS[variant], rule=rule, **more)
    if rank is None:  # LoKr's factors are this small that a higher rank would be none
        rank = 1 if variant.startswith("lokr") else 3
    deltas = {}
    for path in kind.paths_in(base):
        deltas[path] = new_delta(chosen, kind.weight_of(base, path), rank, alpha)
        kind.prepare_delta(base, deltas[path])
    dropouts = {n: getattr(chosen, n) for n in ("dropout", "neuron_dropout", "module_dropout")}
    adapted = wrap(base, deltas, **dropouts)
    if trained:
        randomise(adapted)
    return adapted, args


def randomise(adapted: AdaptedLayer, std: float = 0.4) -> None:
    """Gives every trained tensor values as after training, an embedding's padding row left out."""
    padding = getattr(adapted.base, "padding_idx", None)
    with torch.no_grad():
        for delta in adapted.deltas_by_path().values():
            for name, tensor in delta.named_parameters():
                if name == "magnitude":
                    tensor.mul_(1 + 0.3 * torch.rand_like(tensor))
                else:
                    tensor.add_(std * torch.randn_like(tensor))
            if padding is not None:
                if delta.method == "full":
                    delta.diff[:, padding] = 0
                else:
                    delta.zero_input_row(padding)


def randomise_model(model: nn.Module, std: float = 0.1, seed: int = 1) -> None:
    """The same for every adapted layer of a model."""
    torch.manual_seed(seed)
    for layer in adapted_layers(model).values():
        randomise(layer, std)


def out(adapted: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
    y = adapted(*args)
    return y[0] if isinstance(y, tuple) else y
