"""The fast path of a step: put in around a forward and backward pass, and taken out after it.

Between steps every module is as it was, so that samples, validation, checkpoints and exports know
nothing of it.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from sd_lora.adapters.fast.copies import ConvFactors, Copies, Stack
from sd_lora.adapters.fast.gemm import TORCH, gemm_of
from sd_lora.adapters.fast.layers import (
    Forward,
    adapted_conv,
    fast_layers,
    frozen,
    frozen_conv,
    is_conv,
    is_plain_conv,
    is_plain_linear,
    is_usual,
    models_of,
    takes,
)
from sd_lora.adapters.inject import adapted_layers
from sd_lora.adapters.layers import AdaptedLayer
from sd_lora.adapters.linear_conv import AdaptedConv
from sd_lora.adapters.routed import RoutedLayer
from sd_lora.training.fast.unet import Parts


class FastModel:
    """A model's fast forward passes.

    Base weights of layers that are computed together become views of one tensor, with their
    numbers; parameters, their names and files stay as they are.

    waiting: modules of blocks whose frozen weights are on the device only while a block computes.
    """

    def __init__(self, model: nn.Module, waiting: Collection[nn.Module] = ()) -> None:
        self.model = model
        plain = fast_layers(model)
        self.layers: list[AdaptedLayer] = [own for layer in plain for own in models_of(layer)]
        parts = Parts(model, {*plain}, waiting)
        self.forwards, factors = parts.forwards, parts.factors
        for layer in plain:
            own: Any = layer
            if layer in parts.inside:
                continue
            if isinstance(layer, AdaptedConv):
                conv = ConvFactors(own)
                factors.append(conv)
                self.forwards[layer] = adapted_conv(own, conv)
            elif is_conv(layer):
                self.forwards[layer] = parts.routed_conv(own).forward
            else:
                self.forwards[layer] = parts.alone(own)
        adapted = [m for m in model.modules() if isinstance(m, AdaptedLayer | RoutedLayer)]
        bases = {part for layer in adapted for part in layer.modules()}
        for module in model.modules():
            if module in parts.inside | bases:
                continue
            if is_plain_conv(module):
                self.forwards[module] = frozen_conv(module)
            elif is_plain_linear(module) and gemm_of(module.weight) is not TORCH:  # type: ignore[arg-type]
                self.forwards[module] = frozen(module)
        self.copies, self.shared, self.way = Copies(factors), parts.shared, parts.way
        self._dicts = [(vars(module), forward) for module, forward in self.forwards.items()]
        self._is_in = False
        self._outer: Forward | None = None  # accelerate's own wrapping of the model's forward pass

    @property
    def tensors(self) -> list[Tensor]:
        """All that it holds beside the model's own: working copies, weights of stacks."""
        own = [tensor for factors in self.copies.factors for tensor in factors.buffers]
        stacks = [factors for factors in self.copies.factors if isinstance(factors, Stack)]
        return own + [stack.W for stack in stacks] + self.shared.weights

    @property
    def is_elsewhere(self) -> bool:
        """Whether the model has left the device since: a text encoder that has learned enough."""
        return next(self.model.parameters()).device != self.copies.device

    def __enter__(self) -> "FastModel":
        # first, for it may be out of memory; and not in the forward pass, for a compiler would take
        # the copying into its graph
        if not self.is_elsewhere:
            self.copies.refresh()
        self._outer = vars(self.model).get("forward")
        general = self._outer or self.model.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._applies():
                self._put_in()
                self.shared.read_text(*args, **kwargs)
                return general(*args, **kwargs)
            was_in = self._is_in and not torch.is_grad_enabled()
            self._take_out()
            try:
                return general(*args, **kwargs)
            finally:
                if was_in:  # an earlier pass may be computed again in its backward pass
                    self._put_in()

        vars(self.model)["forward"] = forward
        return self

    def __exit__(self, *_: object) -> None:
        self._take_out()
        if self._outer is None:
            del vars(self.model)["forward"]
        else:
            vars(self.model)["forward"] = self._outer
        self.copies.forget()
        self.shared.forget()

    def _applies(self) -> bool:
        """Whether the next forward pass is one to learn from, in the base's own dtype, where the
        copies are."""
        device = self.copies.masters[0].device.type
        return (
            torch.is_grad_enabled()
            and not self.is_elsewhere
            and not (device != "meta" and torch.is_autocast_enabled(device))
            and all(map(is_usual, self.layers))
        )

    def _put_in(self) -> None:
        if not self._is_in:
            for own, forward in self._dicts:
                own["forward"] = forward
        self._is_in = True

    def _take_out(self) -> None:
        if self._is_in:
            for own, _ in self._dicts:
                del own["forward"]
        self._is_in = False


def fast_models(
    models: Mapping[str, nn.Module],
    masks_ranks: bool = False,
    waiting: Collection[nn.Module] = (),
) -> list[FastModel]:
    """Those of the models that have layers which the fast path takes, component → model.

    masks_ranks: whether each step masks ranks of the denoiser, which then has none. waiting: see
    `FastModel`.
    """
    found = {
        component: adapted_layers(model).values()
        for component, model in models.items()
        if not (masks_ranks and isinstance(model, UNet2DConditionModel))
    }
    return [FastModel(models[c], waiting) for c, layers in found.items() if any(map(takes, layers))]


@contextmanager
def fast(models: Iterable[FastModel]) -> Iterator[None]:
    """Let models compute so for a forward and a backward pass."""
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(model)
        yield
