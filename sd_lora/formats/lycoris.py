"""LyCORIS' keys, for ComfyUI, A1111 and LyCORIS itself: kohya's names, every method's tensors.

`lora_down/up/mid`, `hada_…`, `lokr_…`, `diff` and `diff_b`, `w_norm` and `b_norm`, `dora_scale`; a
registered method's tensors by their own names. LoKr's core is multiplied into its factor.
Each module has its own alpha; for a LoKr of two whole matrices it means nothing, the scale is 1.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from sd_lora.adapters.deltas import Delta
from sd_lora.formats.canonical import Adapter, Modules, each, method_tensors, plain
from sd_lora.formats.names import Naming, from_kohya
from sd_lora.models.original_names import Layout

_WRITTEN = {"lora_A": "lora_down.weight", "lora_B": "lora_up.weight", "lora_mid": "lora_mid.weight"}
_READ = {kind: name for name, kind in _WRITTEN.items()} | {
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "dora_scale": "magnitude",
    "alpha": "alpha",
    "diff": "diff",
    "w_norm": "diff",
    "diff_b": "diff",
    "b_norm": "diff",
}
_OF_BIAS = ("diff_b", "b_norm")

OTHER_METHODS = {
    "oft_blocks": "OFT or BOFT",
    "oft_diag": "OFT",
    "on_input": "(IA)³",
    "a1.weight": "GLoRA",
    "glora_a": "GLoRA",
    "lora_down.weight.0": "DyLoRA",
}
"""Kind of tensor → its method, for methods that cannot be read."""


def _without_core(core: Tensor, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """LoKr's second factor as a product of two matrices: Σ core[i, j, k…] a[i, out] b[j, in].

    ComfyUI ends in torch's error for a core's product, of which `torch.kron` takes no strided view,
    and passes over the module. Rank and alpha stay; the second matrix is as large as the kernel.
    """
    inner = torch.einsum("ij...,jq->iq...", core, b)
    return {"lokr_w2_a": a.T, "lokr_w2_b": inner.flatten(1)}


def parse(
    key: str, layout: Layout, live: Mapping[str, tuple[str, str]] | None = None
) -> tuple[str, str, str] | None:
    """Component, canonical name and kind of tensor of a key; None for a key of another form.

    Args:
        key: in kohya's or LyCORIS' form.
        layout: of the UNet, for original names.
        live: kohya name → (component, canonical name) of models at hand, which go first.
    """
    stem, _, kind = key.partition(".")
    found = (live or {}).get(stem) or from_kohya(stem, layout)
    ours = _READ.get(kind) or (kind if kind in method_tensors() else None)
    if found is None or ours is None:
        return None
    component, name = found
    return component, f"{name}.bias" if kind in _OF_BIAS else name, ours


def write(adapter: Adapter, naming: Naming) -> Iterator[tuple[str, Tensor]]:
    """Yield the file's keys and tensors."""
    for component, name, delta in each(adapter):
        for kind, tensor in _tensors(name, delta, adapter[component]).items():
            module = name.removesuffix(".bias") if kind in _OF_BIAS else name
            yield f"{naming.kohya(component, module)}.{kind}", tensor.contiguous()


def _tensors(name: str, delta: Delta, modules: Modules) -> dict[str, Tensor]:
    """The file's kinds of key → tensor of one delta."""
    if delta.method == "full":
        is_bias = name.endswith(".bias")
        weight = modules.get(name.removesuffix(".bias")) if is_bias else delta
        of_norm = weight is not None and len(weight.shape) == 1
        kind = ("b_norm" if is_bias else "w_norm") if of_norm else ("diff_b" if is_bias else "diff")
        return {kind: delta.weight().detach()}
    kinds = {_WRITTEN.get(kind, kind): t for kind, t in delta.tensors().items()}
    alpha = delta.alpha
    if any(kind.startswith(("start_", "lost_")) for kind in kinds):  # a LoRA of rank 2r
        factors = plain(delta)
        assert factors is not None
        A, B, alpha = factors
        kinds = {"lora_down.weight": A, "lora_up.weight": B}
    if "lokr_t2" in kinds:
        kinds |= _without_core(kinds["lokr_t2"], kinds["lokr_w2_a"], kinds["lokr_w2_b"])
        del kinds["lokr_t2"]
    if delta.magnitude is not None:
        m = delta.magnitude.detach()
        ones = (1,) * (len(delta.shape) - 1)  # a diffusers file has it as a vector
        kinds["dora_scale"] = m.view(-1, *ones) if m.dim() == 1 else m
        kinds.pop("magnitude", None)
    # LyCORIS' reader fails without an alpha, also where it has no use for it
    kinds["alpha"] = torch.tensor(alpha)
    return kinds
