"""The published sizes: modules adapted by each preset, and training of the real UNets."""

import math

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import nn

import sd_lora
from sd_lora.adapters.inject import deltas_of
from sd_lora.adapters.targets import select
from sd_lora.formats.adapter_files import DIFFUSERS, KOHYA
from sd_lora.formats.canonical import Adapter
from sd_lora.formats.names import naming_of
from sd_lora.models.caption_encoder import Geometry, time_ids
from sd_lora.models.families import FAMILIES
from sd_lora.models.meta_pipeline import MetaPipeline, build_on_meta
from sd_lora.models.published_configs import CONFIGS

RANK = 16
# family → preset → modules: a fact of the configurations
UNETS = {
    "sd1": {"attention": 128, "transformer": 192, "transformer+conv": 278, "all": 282},
    "sd2": {"attention": 128, "transformer": 192, "transformer+conv": 278, "all": 282},
    "sdxl": {
        "attention": 560,
        "transformer": 722,
        "transformer+conv": 788,
        "all": 794,
        "blora_content": 80,
        "blora_style": 80,
        "blora_content+blora_style": 160,
    },
    "sdxl_refiner": {"attention": 352, "transformer": 462, "transformer+conv": 548, "all": 554},
}
TEXT = {
    ("sd1", "text_encoder"): 72,
    ("sd2", "text_encoder"): 138,
    ("sdxl", "text_encoder"): 72,
    ("sdxl", "text_encoder_2"): 192,
    ("sdxl_refiner", "text_encoder_2"): 192,
}
MIB = 2**20
# family → preset → size in MiB of the file for diffusers at rank 16 in float16, to the next one
SIZES = {
    ("sd1", "attention"): 7, ("sd1", "transformer"): 13, ("sd1", "transformer+conv"): 33,
    ("sd1", "all"): 33, ("sd2", "attention"): 7, ("sd2", "transformer"): 14,
    ("sd2", "transformer+conv"): 33, ("sd2", "all"): 33, ("sdxl", "attention"): 45,
    ("sdxl", "transformer"): 82, ("sdxl", "transformer+conv"): 94, ("sdxl", "all"): 95,
}  # fmt: skip


def closed_form(model: nn.Module, names: list[str]) -> int:
    """Parameters of a LoRA of rank r on each layer: r (in·k + out), k elements a kernel."""
    layers = dict(model.named_modules())
    total = 0
    for name in names:
        layer = layers[name]
        out, into = layer.weight.shape[:2]
        total += RANK * (into * math.prod(layer.weight.shape[2:]) + out)
    return total


def on_meta(family: str, component: str) -> nn.Module:
    """A model of the published size; a new one, as all tests share the meta pipeline's."""
    return build_on_meta(component, MetaPipeline.of_family(FAMILIES[family]).configs[component])


@pytest.mark.parametrize("family", UNETS)
def test_presets_of_the_unets(family: str) -> None:
    """Each preset adapts the known number of modules of each published UNet, trains as many
    parameters as the closed form says, and its files have just these, in both formats."""
    unet, naming = on_meta(family, "unet"), naming_of(FAMILIES[family])
    for preset, count in UNETS[family].items():
        names = list(select(unet, preset))
        want = closed_form(unet, names)
        assert len(names) == count
        sd_lora.inject(unet, preset, rank=RANK)
        assert sum(p.numel() for p in sd_lora.lora_layers(unet)) == want
        adapter: Adapter = {"unet": deltas_of(unet)}
        for kind in (DIFFUSERS, KOHYA):
            size = sum(t.numel() * 2 for _, t in kind.write(adapter, naming))
            assert 2 * want <= size <= 2 * (want + 2 * count)  # kohya's alphas
        if (family, preset) in SIZES:
            assert math.ceil(2 * want / MIB) == SIZES[family, preset]
        sd_lora.eject(unet)


@pytest.mark.parametrize(("preset", "number"), [("blora_content", 0), ("blora_style", 1)])
def test_blora_trains_the_blocks_of_the_paper(preset: str, number: int) -> None:
    """Content is the attention of SDXL's `up_blocks.0.attentions.0`, style that of `.1` (Frenkel et
    al. 2024, section 4.1, and `BLOCKS` of the authors' code): every linear layer of diffusers'
    Attention there, and nothing else in the UNet."""
    unet = on_meta("sdxl", "unet")
    block = unet.get_submodule(f"up_blocks.0.attentions.{number}")
    wanted = {
        linear
        for attention in block.modules() if isinstance(attention, Attention)
        for linear in attention.modules() if isinstance(linear, nn.Linear)
    }  # fmt: skip
    assert {unet.get_submodule(name) for name in select(unet, preset)} == wanted
    assert len(wanted) == 80


@pytest.mark.parametrize(("family", "component"), TEXT)
def test_presets_of_the_text_encoders(family: str, component: str) -> None:
    """So for the six linears of each layer of each published text encoder."""
    encoder = on_meta(family, component)
    names = list(select(encoder, "text"))
    want = closed_form(encoder, names)
    sd_lora.inject(encoder, "text", rank=RANK)
    assert len(names) == TEXT[family, component]
    assert sum(p.numel() for p in sd_lora.lora_layers(encoder)) == want


def real_unet(family: str, device: str, dtype: torch.dtype) -> UNet2DConditionModel:
    """A published UNet with random weights: small normal ones, norms as they start."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**CONFIGS[family]["unet"])
    unet = unet.to(dtype).to_empty(device=device).requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in unet.parameters():
        if parameter.ndim > 1:
            fan_in = parameter[0].numel()
            parameter.normal_(0, 0.5 * fan_in**-0.5, generator=generator)
        else:
            parameter.zero_()
    for module in unet.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            module.weight.fill_(1)
    return unet


def train(unet: UNet2DConditionModel, family: str, steps: int, side: int) -> list[float]:
    """Losses of steps on one batch: a LoRA on attention and convolutions learns fixed noise."""
    sd_lora.inject(unet, "attention+conv", rank=4)
    parameter = next(unet.parameters())
    device, dtype = parameter.device, parameter.dtype
    layers = sd_lora.lora_layers(unet)
    optimizer = torch.optim.AdamW(layers, lr=1e-3)
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    config = CONFIGS[family]["unet"]
    x, target = noise(1, 4, side, side), noise(1, 4, side, side)
    arguments = {"encoder_hidden_states": noise(1, 77, config["cross_attention_dim"])}
    if FAMILIES[family].is_xl:
        whole = Geometry((1024, 1024), (0, 0), (1024, 1024))
        ids = time_ids(FAMILIES[family], [whole]).to(device)
        width = config["projection_class_embeddings_input_dim"] - 256 * ids.shape[1]
        arguments["added_cond_kwargs"] = {"text_embeds": noise(1, width), "time_ids": ids}
    losses = []
    for _ in range(steps):
        prediction = unet(x, torch.tensor([500], device=device), **arguments).sample
        loss = (prediction.float() - target.float()).square().mean()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in layers)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


@pytest.mark.slow
def test_the_real_sd15_trains_on_a_cpu() -> None:
    """Two steps of the real-size SD1.5 UNet with random weights at small latents: finite, every
    factor has a gradient, the loss falls."""
    losses = train(real_unet("sd1", "cpu", torch.float32), "sd1", steps=2, side=8)
    assert all(map(math.isfinite, losses))
    assert losses[1] < losses[0]


@pytest.mark.gpu
@pytest.mark.fast_gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("family", "side"), [("sd1", 64), ("sd2", 96), ("sdxl", 128), ("sdxl_refiner", 128)]
)
def test_the_real_sizes_train_on_a_gpu(family: str, side: int, dtype: torch.dtype) -> None:
    """Twenty steps of each published UNet with random weights, at its own latents, in bf16 and
    fp16: finite, and the loss falls."""
    unet = real_unet(family, "cuda", dtype)
    unet.enable_gradient_checkpointing()
    losses = train(unet.train(), family, steps=20, side=side)
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]
