"""LyCORIS' keys, for ComfyUI, A1111 and LyCORIS itself: kohya's names, every method's tensors.

`lora_down/up/mid`, `hada_…`, `lokr_…`, `oft_blocks` and `rescale`, `diff` and `diff_b`, `w_norm`
and `b_norm`, `dora_scale`; a registered method's tensors by their own names. LoKr's core is
multiplied into its factor. Each module has its own alpha; for a LoKr of two whole matrices it means
nothing, the scale is 1. For OFT it bounds the rotation, in LyCORIS, sd-scripts and A1111 by alpha
times the outputs, in ComfyUI by alpha itself; 0 is no bound, but one of 0 in sd-scripts. So a bound
is folded into the blocks that are read, and one is written that no reader comes to.
"""

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from sd_lora.adapters.deltas import Delta
from sd_lora.adapters.oft import OFT
from sd_lora.adapters.state import alpha_of, checked, make_delta
from sd_lora.errors import UsageError
from sd_lora.formats import of_base
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
    "oft_diag": "OFT, in a form of before 2024",
    "on_input": "(IA)³",
    "a1.weight": "GLoRA",
    "glora_a": "GLoRA",
    "lora_down.weight.0": "DyLoRA",
}
"""Kind of tensor → its method, for methods that are no deltas by themselves."""

WAY_OUT = (
    "whose ΔW depends on the base: `sd-lora convert FILE --model BASE --to lycoris` writes it as "
    "ΔW, and with --rank N --to kohya as the nearest LoRA"
)

OFT_KINDS = ("oft_blocks", "rescale")
"""Kinds of OFT's tensors; BOFT has the same, with blocks of one more dimension."""

_LARGEST = 1024
"""Outputs in a block at most that stands for blocks of one: memory goes by its square."""

NEAR_ONE = ".rescale"
"""End of keys whose numbers stay float32 in every file: they are 1 but for a small rest, which
bfloat16 rounds by 0.4 % of the 1."""

SPARSE = {"bias_indices", "bias_values", "bias_size"}
"""Kinds of the sparse remainder of ΔW that LyCORIS' extraction may keep beside a LoCon."""


def with_sparse(title: str, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A LoCon with its sparse remainder as one whole ΔW.

    Raises:
        UsageError: positions outside the weight.
    """
    factors = {kind: tensor for kind, tensor in parts.items() if kind not in SPARSE}
    delta = make_delta(title, factors)
    with torch.no_grad():
        matrix = delta.weight()
        size, rows, columns = parts["bias_size"].tolist(), len(matrix), matrix[0].numel()
        places, values = parts["bias_indices"].long(), parts["bias_values"].float()
        if size != [rows, columns] or places.shape != (2, values.numel()):
            raise UsageError(f"{title}: its sparse remainder does not fit ΔW")
        outside = (places < 0) | (places >= torch.tensor([[rows], [columns]]))
        if outside.any():
            raise UsageError(f"{title}: its sparse remainder lies outside ΔW")
        rest = torch.zeros(rows, columns)
        rest[places[0], places[1]] = values.flatten()
        return {"diff": matrix + delta.scale * rest.reshape(matrix.shape)}


def with_rotation(title: str, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of OFT by a file's blocks, with its bound folded in.

    Raises:
        UsageError: blocks that are not square.
    """
    rest = {k: t for k, t in parts.items() if k not in (*OFT_KINDS, "alpha")}
    own = {k: checked(f"{title}.{k}", parts[k], False) for k in OFT_KINDS if k in parts}
    blocks = own["oft_blocks"]
    if blocks.dim() != 3 or blocks.shape[1] != blocks.shape[2]:
        raise UsageError(f"{title}: oft_blocks {tuple(blocks.shape)} are no square blocks")
    outputs = len(blocks) * blocks.shape[1]
    if blocks.shape[1] == 1:  # LyCORIS has 4 of 1 for 4 outputs: as larger ones that do not turn
        size = next((b for b in range(2, _LARGEST + 1) if outputs % b == 0), None)
        if size is None:
            raise UsageError(f"{title}: {outputs} blocks of one output, which do not turn")
        blocks = blocks.new_zeros(outputs // size, size, size)
    alpha = alpha_of(title, parts["alpha"]) if "alpha" in parts else 0.0
    return rest | OFT.of_blocks(blocks, alpha * outputs, own.get("rescale"))


def _without_core(core: Tensor, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """LoKr's second factor as a product of two matrices: Σ core[i, j, k…] a[i, out] b[j, in].

    ComfyUI ends in torch's error for a core's product, of which `torch.kron` takes no strided view,
    and passes over the module. Rank and alpha stay; the second matrix is as large as the kernel.
    """
    inner = torch.einsum("ij...,jq->iq...", core, b)
    return {"lokr_w2_a": a.T, "lokr_w2_b": inner.flatten(1)}


def parse(
    key: str,
    layout: Layout,
    live: Mapping[str, tuple[str, str]] | None = None,
    with_base: bool = False,
) -> tuple[str, str, str] | None:
    """Component, canonical name and kind of tensor of a key; None for a key of another form.

    Args:
        key: in kohya's or LyCORIS' form.
        layout: of the UNet, for original names.
        live: kohya name → (component, canonical name) of models at hand, which go first.
        with_base: take the methods of `of_base` too.
    """
    stem, _, kind = key.partition(".")
    stem = stem.replace("oft_unet_", "lora_unet_", 1)  # sd-scripts' OFT
    found = (live or {}).get(stem) or from_kohya(stem, layout)
    kinds = {*method_tensors(), *OFT_KINDS, *SPARSE, *(of_base.KINDS if with_base else ())}
    ours = _READ.get(kind) or (kind if kind in kinds else None)
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
    if isinstance(delta, OFT):
        ones = (1,) * (max(2, len(delta.shape)) - 1)
        blocks = delta.blocks().detach()
        own = {"oft_blocks": blocks}
        if delta.rescale is not None:
            own["rescale"] = delta.rescale.detach().view(-1, *ones)
        kinds = {k: t for k, t in kinds.items() if k == "magnitude"} | own
        _, exponent = math.frexp(math.sqrt(2) * float(blocks.norm()))
        alpha = 2.0 ** max(0, exponent)  # above ‖Q‖, and the same number in every dtype
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
