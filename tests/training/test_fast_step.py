"""The fast path of a step: the general path's losses and gradients, with fewer operators."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sd_lora
from sd_lora.adapters.fast.layers import lay_out
from sd_lora.adapters.inject import adapted_layers, deltas_of
from sd_lora.adapters.merging import merged, switched_off
from sd_lora.training.fast.step import FastModel, fast, fast_models
from sd_lora.training.memory import flash_attention
from sd_lora.training.recompute import All, enable_checkpointing
from tests.tiny import build_text_encoder, build_tokenizer, build_unet

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

WIDE = (32, 320, 640)
"""Widths of a UNet's blocks, from one of the embedded base's to those of SD 1.5."""


def adapted_unet(
    family: str,
    targets: str = "all",
    dtype: torch.dtype = torch.float32,
    widths: Any = (),
    **options: Any,
) -> nn.Module:
    """A tiny UNet of a dtype with random float32 deltas. widths: of its blocks."""
    unet = build_unet(family, **({"block_out_channels": widths} if widths else {}))
    sd_lora.inject(unet, targets, **({"rank": 4, "alpha": 3.0} | options))
    trained = {id(p) for p in sd_lora.lora_layers(unet)}
    torch.manual_seed(1)
    for parameter in unet.parameters():
        if id(parameter) in trained:
            nn.init.normal_(parameter, std=0.1)
        else:
            parameter.data = parameter.data.to(dtype)
    lay_out(unet, next(unet.parameters()).device)
    return unet.train()


def arguments(unet: Any, dtype: torch.dtype = torch.float32, number: int = 2) -> dict[str, Any]:
    torch.manual_seed(2)
    text = torch.randn(number, 7, unet.config.cross_attention_dim, dtype=dtype)
    given: dict[str, Any] = {
        "sample": torch.randn(number, 4, 8, 8, dtype=dtype),
        "timestep": torch.tensor([3, 700])[:number],
        "encoder_hidden_states": text,
    }
    if unet.config.addition_embed_type:
        pooled, ids = torch.randn(number, 48, dtype=dtype), torch.zeros(number, 6)
        given["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": ids}
    return given


Step = tuple[Tensor, dict[str, Tensor]]


def step(model: nn.Module, given: dict[str, Any], *fast_ones: FastModel, call: Any = None) -> Step:
    """The loss and all gradients of a step, also those of inputs that ask for them."""
    model.zero_grad()
    with fast(fast_ones):
        loss = (model if call is None else call)(**given)[0].float().square().mean()
        loss.backward()
    named = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    inputs = {k: v for k, v in given.items() if isinstance(v, Tensor) and v.requires_grad}
    named |= {k: v.grad.clone() for k, v in inputs.items() if v.grad is not None}
    for value in inputs.values():
        value.grad = None
    return loss.detach(), named


def assert_same(mine: Step, theirs: Step, tolerance: float = 1e-5) -> None:
    """Losses and gradients are the same, each gradient by its norm."""
    torch.testing.assert_close(mine[0], theirs[0], rtol=tolerance, atol=0)
    assert mine[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        assert (mine[1][name] - gradient).norm() <= tolerance * gradient.norm() + 1e-9, name


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("targets", ["attention", "transformer", "conv", "all"])
def test_a_step_is_the_general_one(family: str, targets: str) -> None:
    """Loss and every gradient equal the general path's to 1e-5, over several steps of a fused
    optimiser, which changes the factors without a trace; after them no module has changed."""
    mine, theirs = adapted_unet(family, targets), adapted_unet(family, targets)
    given = arguments(mine)
    forwards = {n: vars(m).get("forward") for n, m in mine.named_modules()}
    fast_one = FastModel(mine)
    ways: list[tuple[nn.Module, tuple[FastModel, ...], Any]] = [
        (model, ones, torch.optim.SGD(sd_lora.lora_layers(model), lr=0.1, fused=True))
        for model, ones in ((mine, (fast_one,)), (theirs, ()))
    ]
    for _ in range(3):
        found = [step(model, given, *ones) for model, ones, _ in ways]
        assert_same(*found)
        for _, _, optimizer in ways:
            optimizer.step()
    assert {n: vars(m).get("forward") for n, m in mine.named_modules()} == forwards
    assert all(f.A.grad_fn is None for f in fast_one.copies.factors)  # the graph is gone


@pytest.mark.parametrize("sizes", [(1, 1), (1, 2)])
def test_blocks_of_two_passes_are_computed_again(sizes: tuple[int, int]) -> None:
    """Two forward passes before one backward pass, as a batch of two shapes has them, with their
    blocks computed again: each finds its own text and time; gradients are the general path's."""
    found = []
    for is_fast in (True, False):
        unet = adapted_unet("sd1")
        enable_checkpointing({"unet": unet}, All())
        parts = [arguments(unet, number=number) for number in sizes]
        parts[1]["encoder_hidden_states"] = parts[1]["encoder_hidden_states"].flip(1)
        parts[1]["timestep"] = parts[1]["timestep"] + 200

        def call(unet: Any = unet, parts: Any = parts, **_: Any) -> Any:
            return [torch.cat([unet(**part).sample.flatten() for part in parts])]

        ones = [FastModel(unet)] if is_fast else []
        found.append(step(unet, {}, *ones, call=call))
    assert_same(*found)


def test_the_text_encoder_learns_through_both() -> None:
    """A trained text encoder and the UNet that reads it get the general path's gradients: those of
    the text pass through the keys and values of all layers at once. Two forward passes of the
    encoder before one backward pass are two parts of one graph."""
    tokenizer = build_tokenizer()
    ids = torch.tensor(tokenizer(["a cat", "dogs"], padding="max_length").input_ids)[:, :9]
    found = []
    for is_fast in (True, False):
        unet, encoder = adapted_unet("sd1"), build_text_encoder(tokenizer)
        sd_lora.inject(encoder, "text", rank=4)
        for parameter in sd_lora.lora_layers(encoder):
            torch.manual_seed(parameter.numel())
            nn.init.normal_(parameter, std=0.1)
        both = nn.ModuleDict({"unet": unet, "text_encoder": encoder}).train()

        def call(
            encoder_hidden_states: Tensor, unet: Any = unet, encoder: Any = encoder, **more: Any
        ) -> Any:
            text = torch.cat([encoder(row[None]).last_hidden_state for row in ids])
            return unet(encoder_hidden_states=text, **more)

        ones = fast_models(dict(both.items())) if is_fast else []
        assert len(ones) == 2 * is_fast
        found.append(step(both, arguments(unet), *ones, call=call))
    assert_same(*found)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("blocks", [None, All()])
def test_activations_can_be_computed_again(family: str, blocks: Any) -> None:
    """With gradient checkpointing, by diffusers' own way and by blocks, a step is the same bit for
    bit as without."""
    plain, again = adapted_unet(family), adapted_unet(family)
    enable_checkpointing({"unet": again}, blocks)
    given = arguments(plain)
    found = [step(model, given, FastModel(model)) for model in (plain, again)]
    assert_same(*found, tolerance=0)


def test_autocast_takes_the_general_path() -> None:
    """Under autocast, and with a layer masked, weakened or merged, a step is the general one bit
    for bit, also with activations computed again."""
    mine, theirs = adapted_unet("sd1"), adapted_unet("sd1")
    for model in (mine, theirs):
        enable_checkpointing({"unet": model})
    given, fast_one = arguments(mine), FastModel(mine)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(step(mine, given, fast_one), step(theirs, given), tolerance=0)
    for model in (mine, theirs):
        [*adapted_layers(model).values()][5].strength = 0.5
    assert_same(step(mine, given, fast_one), step(theirs, given), tolerance=0)


def test_a_step_may_ask_the_base_in_between() -> None:
    """The base's own answer, without gradients and between a forward and a backward pass, is the
    base's, and leaves the step as it is: preserved images ask for it."""
    mine, theirs = adapted_unet("sd1"), adapted_unet("sd1")
    for model in (mine, theirs):
        enable_checkpointing({"unet": model})
    given, plain = arguments(mine), build_unet("sd1").requires_grad_(False)
    lay_out(plain, torch.device("cpu"))
    base = plain(**given).sample

    def call(**given: Any) -> Any:
        out = mine(**given)
        with torch.no_grad(), switched_off(mine) as unet:
            assert torch.equal(unet(**given).sample, base)
        return out

    assert_same(step(mine, given, FastModel(mine), call=call), step(theirs, given))


def test_what_is_written_is_the_same() -> None:
    """Deltas, state, merged weights and what `eject` gives back are the same bits under the same
    names after a step as before it."""
    unet = adapted_unet("sdxl", dtype=torch.bfloat16)
    before = {n: t.clone() for n, t in unet.state_dict().items()}
    with merged(unet):
        merged_before = {n: layer.base.weight.clone() for n, layer in adapted_layers(unet).items()}
    bases = {n: layer.base for n, layer in adapted_layers(unet).items()}
    step(unet, arguments(unet, torch.bfloat16), FastModel(unet))
    state = unet.state_dict()
    assert state.keys() == before.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
    with merged(unet):
        for name, layer in adapted_layers(unet).items():
            assert torch.equal(layer.base.weight, merged_before[name])
    sd_lora.eject(unet)
    assert all(unet.get_submodule(name) is base for name, base in bases.items())


@pytest.mark.parametrize("targets", ["attention", "all"])
def test_a_step_of_wide_blocks_is_the_general_one(targets: str) -> None:
    """From a narrow block to wide ones, whose convolutions are products of columns on a CPU and
    whose linears another library multiplies, loss and gradients equal the general path's to 2e-5:
    sums of 2,880 and more numbers put both up to 1e-5 from float64's."""
    from steps import Operators

    mine, theirs = (adapted_unet("sd1", targets, widths=WIDE) for _ in range(2))
    given = arguments(mine, number=1)
    assert_same(step(mine, given, FastModel(mine)), step(theirs, given), tolerance=2e-5)
    with Operators() as operators:
        step(mine, given, FastModel(mine))
    # 320 at 8² and 640 at 4²: all but conv_in and conv_out, and the first blocks'
    own, padded = (
        operators.names[f"aten.{name}.default"] for name in ("convolution", "constant_pad_nd")
    )
    assert padded > 15
    assert 0 < own < (12 if targets == "attention" else 40)


@pytest.mark.parametrize("widths", [(), WIDE])
def test_bfloat16_is_no_worse(widths: Any) -> None:
    """On a bfloat16 base the gradients are as near to those of float32 as the general path's, on
    average over the factors, and float32 themselves."""
    found: list[list[dict[str, Tensor]]] = []
    for dtype, is_fast in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)):
        unet = adapted_unet("sdxl", dtype=torch.bfloat16, widths=widths)
        unet.to(dtype)  # the same rounded weights
        ones = [FastModel(unet)] if is_fast else []
        given = arguments(unet, torch.bfloat16)
        given |= {k: v.to(dtype) for k, v in given.items() if k != "added_cond_kwargs"}
        more = given["added_cond_kwargs"]
        given["added_cond_kwargs"] = {k: v.to(dtype) for k, v in more.items()}
        torch.manual_seed(5)
        found.append([])
        for _ in range(3):  # rounding in one early place is the error of all that follow it
            given["sample"] = torch.randn(given["sample"].shape).bfloat16().to(dtype)
            found[-1].append(step(unet, given, *ones)[1])
    exact, general, ours = found
    assert {g.dtype for g in ours[0].values()} == {torch.float32}

    def error(gradients: list[dict[str, Tensor]]) -> float:
        pairs = [(m[n], g) for m, e in zip(gradients, exact, strict=True) for n, g in e.items()]
        return float(torch.stack([(mine - g).norm() / g.norm() for mine, g in pairs]).mean())

    assert error(ours) < 1.1 * error(general)


@pytest.mark.parametrize(("family", "most"), [("sd1", 0.55), ("sdxl", 0.53)])
def test_operators_are_counted(family: str, most: float) -> None:
    """With everything adapted on a bfloat16 base, at a rank as small beside the width as that of
    published models, a step takes at most this share of the general path's operators:
    self-attention has one projection, the text one for each width, the time embedding one silu, and
    nothing is divided by 1."""
    from steps import Operators

    counts = []
    with torch.device("meta"), flash_attention():
        for is_fast in (True, False):
            unet = adapted_unet(family, dtype=torch.bfloat16, rank=1)
            ones, given = [FastModel(unet)] * is_fast, arguments(unet, torch.bfloat16)
            with Operators() as operators, fast(ones):
                unet(**given).sample.float().square().mean().backward()
            counts.append(operators.names)
    ours, general = counts
    assert ours.total() <= most * general.total()
    assert ours["aten.div.Tensor"] <= 2  # of the time embedding
    assert ours["aten._foreach_copy_.default"] == 2  # to the working copies, and gradients back


def test_other_methods_in_a_unet_are_left_as_they_are() -> None:
    """A UNet of another method has no fast model; DoRA on some modules beside plain LoRA trains as
    in the general path."""
    unet = build_unet("sd1")
    sd_lora.inject(unet, "all", method="loha", rank=2)
    assert fast_models({"unet": unet}) == []
    rules = {"to_k": "decompose", "conv1": "decompose", "time_emb_proj": "decompose"}
    mine, theirs = (adapted_unet("sd1", rule_pattern=rules) for _ in range(2))
    assert {d.magnitude is None for d in deltas_of(mine).values()} == {True, False}
    assert_same(step(mine, arguments(mine), FastModel(mine)), step(theirs, arguments(theirs)))


def test_blocks_compile() -> None:
    """A compiled transformer block and a compiled residual block take the fast path, forward and
    backward, through torch's tracer without a break, and give the same step."""
    mine, theirs = adapted_unet("sd1"), adapted_unet("sd1")
    given, fast_one = arguments(mine), FastModel(mine)
    blocks: list[Any] = [
        mine.mid_block.attentions[0].transformer_blocks[0],  # type: ignore[union-attr]
        mine.mid_block.resnets[0],  # type: ignore[union-attr]
    ]
    for block in blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    assert_same(step(mine, given, fast_one), step(theirs, given))
