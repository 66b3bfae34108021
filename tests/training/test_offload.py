"""Weights and activations that wait on the CPU: the same run to the bit, two blocks on the device.

The device is the CPU here, where everything is moved for real: into tensors of their own, which are
empty or gone while the others wait. Streams, events and pinned memory of a card are not tried.
"""

import gc
import re
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import sd_lora
from sd_lora.adapters.inject import deltas_of
from sd_lora.check import check
from sd_lora.training import offload, offload_activations
from sd_lora.training.advice import Place, Rung, beside_of, rungs
from sd_lora.training.data import base_of
from sd_lora.training.fast.step import FastModel
from sd_lora.training.lane import Lane
from sd_lora.training.loop import LossLog, accumulate, train_steps
from sd_lora.training.memory import HeldBytes, Shape, count_step
from sd_lora.training.offload import (
    Offload,
    blocks_of,
    check_offload,
    frozen_of,
    let_blocks_wait,
    modules_of,
)
from sd_lora.training.offload_activations import Activations, Parked
from sd_lora.training.processes import determinism
from sd_lora.training.recompute import All, enable_checkpointing
from sd_lora.training.setup import prepared_run
from sd_lora.training.trial import try_largest
from sd_lora.transfer import brought, places_of, put_aside, put_back
from tests.training.launches import Launch
from tests.training.runs import FEW, images, text_to_image
from tests.training.test_fast_step import adapted_unet, arguments, step


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return images(tmp_path_factory.mktemp("images"), 4)


WAYS: dict[str, dict[str, Any]] = {
    "again": {"gradient_checkpointing": True},
    "stacks of bfloat16": {"mixed_precision": "bf16", "targets": "all", "rank": 2},
    "bfloat16 again": {
        "mixed_precision": "bf16", "targets": "attention", "gradient_checkpointing": True,
        "gradient_accumulation_steps": 2, "train_batch_size": 2,
    },
    "LoKr again": {"method": "lokr", "gradient_checkpointing": True},
    "OFT": {"method": "oft", "oft_block_size": 4},
    "int8": {"base_precision": "int8", "targets": "attention+conv", "gradient_checkpointing": True},
    "nf4": {"base_precision": "nf4", "gradient_checkpointing": True},
    "PiSSA": {"init_lora_weights": "pissa"},
    "text": {"train_text_encoder": True, "text_encoder_lr": 1e-3, "gradient_checkpointing": True},
    "text stops": {
        "train_text_encoder": True, "text_encoder_lr": 1e-3, "text_encoder_stop_step": 2,
    },
    "words": {"token_abstraction": "thing", "embedding_lr": 1e-3},
    "masks": {"tlora_min_rank": 1},
    "budget": {"memory_budget": "0.0085GB", "resolution": 128, "train_batch_size": 4},
    "preserved": {"output_preservation": "blank", "fit": "auto"},
    "nothing cached": {"cache_latents": "no", "cache_text_embeddings": "no"},
}  # fmt: skip
BOTH = {"offload_weights": True, "offload_activations": True}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "way", ["again", "stacks of bfloat16", "bfloat16 again", "int8", "text stops", "nothing cached"]
)
def test_the_same_steps_on_a_card(
    way: str, tiny_sd1: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So with streams and pinned memory, by kernels that repeat. Not tried yet: no card was there
    when this was written."""
    monkeypatch.setitem(WAYS, way, WAYS[way] | {"deterministic": True})
    test_the_same_steps(way, tiny_sd1, data, tmp_path, monkeypatch)


class LateLane(Lane):
    """Copies that are done only when somebody waits for them, as late as a card's may be; until
    then what they write is not a number."""

    def copy(self, to: Tensor, source: Tensor) -> Any:
        to.fill_(255)  # the bytes of a NaN, in each dtype
        return to, source

    def join(self, event: Any) -> None:
        if event is not None:
            event[0].copy_(event[1])


@pytest.mark.parametrize("way", ["again", "stacks of bfloat16", "text stops", "nothing cached"])
def test_every_copy_is_waited_for(
    way: str, tiny_sd1: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So where no copy is done before it is waited for: weights and activations that are read, or
    whose memory is given away, without the wait would be NaN, or another tensor's."""
    monkeypatch.setattr(offload, "Lane", LateLane)
    monkeypatch.setattr(offload_activations, "Lane", LateLane)
    test_the_same_steps(way, tiny_sd1, data, tmp_path, monkeypatch)


@pytest.mark.parametrize("way", WAYS)
def test_the_same_steps(
    way: str, tiny_sd1: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses, those of the validation too, and tensors of a run with both are those of a run
    without, to the bit: on the fast path and on the general one, with blocks computed again, on a
    base in few bits. Every saved tensor is moved, small as it is."""
    monkeypatch.setattr(offload_activations, "LEAST", 1)
    values = {"max_train_steps": 3, "validate_every": 2} | WAYS[way]
    found = []
    for name, more in (("whole", {}), ("moved", BOTH)):
        more = more if way != "budget" else {**more, "offload_activations": False}
        config = text_to_image(tiny_sd1, data, tmp_path / name / "run", **values, **more)
        with determinism(config.deterministic), prepared_run(config) as run:
            try_largest(run, accumulate)
            log = LossLog(run)
            train_steps(run, log)
            found.append((log.losses, run.validation.rows, run.digest()))
            if way == "budget":
                assert run.recomputed
                assert 0 < len(run.recomputed.blocks) < run.recomputed.number
    assert found[0] == found[1]


@pytest.mark.parametrize("options", [{}, {"use_dora": True, "targets": "attention+conv"}])
def test_the_same_run(
    options: dict[str, Any], tiny_sd1: Path, data: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """So from the command on: LoRA files, of DoRA too, whose norms are of the base's weights, and
    sample images before and after are the same; a run that is resumed without either goes on as
    the same run."""
    monkeypatch.setattr(offload_activations, "LEAST", 1)
    values: dict[str, Any] = {"max_train_steps": 4, "num_validation_images": 1, "rank": 2}
    values |= {"validation_prompt": "a thing", "validation_steps": 2} | options
    configs = [
        text_to_image(tiny_sd1, data, tmp_path / name / "run", **values, **more)
        for name, more in (("whole", {}), ("moved", BOTH))
    ]
    theirs = sd_lora.train(configs[0])
    sd_lora.train(configs[1].replace(max_train_steps=2))
    again = configs[1].replace(resume_from_checkpoint="latest", offload_weights=not options)
    mine = sd_lora.train(again)
    assert (mine.digest, mine.replayed) == (theirs.digest, theirs.replayed)
    for file in theirs.files:
        tensors = load_file(file.path)
        moved = load_file(tmp_path / "moved" / file.path.relative_to(tmp_path / "whole"))
        assert tensors.keys() == moved.keys()
        assert all(torch.equal(moved[name], tensor) for name, tensor in tensors.items())
    assert theirs.before_after.read_bytes() == mine.before_after.read_bytes()


def moved(
    family: str, is_fast: bool, dtype: torch.dtype = torch.float32, again: bool = False
) -> tuple[Any, list[FastModel], Offload]:
    """A tiny adapted UNet whose blocks' weights wait, its fast models and its offload."""
    unet, cpu = adapted_unet(family, "all", dtype), torch.device("cpu")
    if again:
        enable_checkpointing({"unet": unet}, All())
    let_blocks_wait(unet)
    brought(unet, cpu)
    ones = [FastModel(unet, modules_of(unet))] if is_fast else []
    return unet, ones, Offload({"unet": unet}, ones, cpu)


@pytest.mark.parametrize("is_fast", [True, False])
@pytest.mark.parametrize("again", [True, False])
def test_two_blocks_at_once(is_fast: bool, again: bool) -> None:
    """While a block computes, forward and backward, its own frozen tensors are on the device, and
    those of one other block at most; all others are in their home, byte for byte the base's. The
    bytes that a step holds are the same after each of three steps."""
    unet, ones, offload = moved("sdxl", is_fast, again=again)
    original = adapted_unet("sdxl", "all")
    blocks = {f"unet/{name}": block for name, block in blocks_of(unet).items()}
    assert offload.weights.keys() == blocks.keys()
    looks: list[tuple[str, bool]] = []

    def look(name: str, backward: bool) -> None:
        there = {n for n, w in offload.weights.items() if w.is_there}
        assert name in there
        assert len(there) <= 2
        for other, weights in offload.weights.items():
            whole = weights.there if other == name else weights.home
            assert weights.there.untyped_storage().nbytes() in (0, weights.size)
            for tensor, *_ in weights.tensors:
                if other == name or other not in there:
                    storage = tensor.untyped_storage()
                    assert storage.data_ptr() == whole.untyped_storage().data_ptr()
        looks.append((name, backward))

    for name, block in blocks.items():
        block.register_forward_pre_hook(lambda *_, n=name: look(n, False))
        block.register_forward_hook(
            lambda _, __, out, n=name: out.register_hook(lambda _: look(n, True)) and None
        )
    counter = HeldBytes()
    offload.seen = counter.add
    held = []
    for _ in range(3):
        with counter:
            step(unet, arguments(unet), *ones)
        gc.collect()
        held.append(counter.now)
    passes = [name for name, backward in looks if not backward]
    # diffusers computes the first block of the middle once alone
    assert len(passes) == 3 * (len(blocks) + again * (len(blocks) - 1))
    assert sum(backward for _, backward in looks) >= 3 * len(blocks)
    assert held[0] == held[1] == held[2]
    for (name, tensor), (_, theirs) in zip(
        unet.state_dict().items(), original.state_dict().items(), strict=True
    ):
        assert torch.equal(tensor, theirs), name
    sizes = sorted(w.size for w in offload.weights.values())
    assert sum(w.there.untyped_storage().nbytes() for w in offload.weights.values()) <= sum(
        sizes[-2:]
    )


@pytest.mark.parametrize("text", [True, False])
def test_all_that_computes_waits(
    text: bool, tiny_sdxl: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In steps that encode their own images and captions the weights of two blocks are on the
    device at most, of the UNet, the VAE and both text encoders, whether these learn or not: each
    computes, forward and backward, with those on the device, and one that follows in its model is
    on its way."""
    looks: list[tuple[str, bool, int]] = []

    class Seen(Offload):
        def add(self, models: Any, fast_ones: Any = ()) -> None:
            super().add(models, fast_ones)
            for component, model in models.items():
                for name, block in blocks_of(model).items():
                    seen = partial(self.look, component, f"{component}/{name}")
                    block.register_forward_pre_hook(lambda *_, look=seen: look(False))
                    block.register_forward_hook(lambda _, __, out, look=seen: watch(out, look))

        def look(self, component: str, name: str, backward: bool) -> None:
            there = {other for other, weights in self.weights.items() if weights.is_there}
            assert name in there
            assert {other.partition("/")[0] for other in there} == {component}
            whole = self.weights[name].there.untyped_storage().data_ptr()
            found = {t.untyped_storage().data_ptr() for t, *_ in self.weights[name].tensors}
            assert found == {whole}
            looks.append((component, backward, len(there)))

    def watch(out: Tensor, look: Any) -> None:
        if out.requires_grad:
            out.register_hook(lambda _: look(True))

    monkeypatch.setattr(offload, "Offload", Seen)
    config = text_to_image(
        tiny_sdxl, data, tmp_path / "run", cache_latents="no", cache_text_embeddings="no",
        train_text_encoder=text, offload_weights=True, max_train_steps=2, train_batch_size=1,
    )  # fmt: skip
    with prepared_run(config) as run:
        train_steps(run, LossLog(run))
    encoders = {"text_encoder", "text_encoder_2"}
    counts = {(c, way): {n for d, w, n in looks if (c, way) == (d, w)} for c, way, _ in looks}
    assert {c for c, backward in counts if backward} == {"unet", *(encoders if text else ())}
    assert {c for c, backward in counts if not backward} == {"unet", "VAE encoder", *encoders}
    for (component, backward), numbers in counts.items():
        # of the first encoder the last layer is not read, and one is left
        assert numbers == ({1} if (component, backward) == ("text_encoder", True) else {1, 2})


def test_what_waits_is_not_brought(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is brought to a device leaves its blocks' frozen tensors where they are, and
    brings all others with their gradients, also when adapters come and go around them. One that
    is put aside leaves its adapters there as a whole; one that is put back goes to where its
    tensors were, each to its own device."""
    moved: set[int] = set()

    def to(tensor: Tensor, *_: Any) -> Tensor:  # no device is needed to be asked for one
        moved.add(tensor.data_ptr())
        return tensor

    unet = adapted_unet("sd1", "all")
    let_blocks_wait(unet)
    inside = {t.data_ptr() for block in blocks_of(unet).values() for t in frozen_of(block)}
    sd_lora.eject(unet)
    sd_lora.inject(unet, "all", method="lora_fa")  # whose A is a buffer
    layers = [p for p in sd_lora.lora_layers(unet) if p.requires_grad]
    for layer in layers:
        layer.grad = torch.ones_like(layer)
    monkeypatch.setattr(Tensor, "to", to)
    assert brought(unet, "cuda") is unet
    learned = {t.data_ptr() for layer in layers for t in (layer, layer.grad)}
    deltas = {t.data_ptr() for d in deltas_of(unet).values() for t in d.state_dict().values()}
    rest = {t.data_ptr() for t in (*unet.parameters(), *unet.buffers())} - inside
    assert moved == rest | learned
    moved.clear()
    put_aside(unet)
    assert deltas > learned & rest
    assert moved == rest - deltas
    moved.clear()
    put_back(unet, places_of(unet))
    assert moved == rest | learned


def test_a_pass_without_its_end_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The saved tensors of a forward pass whose backward pass never comes, as where memory is used
    up, are gone with its output: outputs that are saved, as attention's are, hold no graph."""
    monkeypatch.setattr(offload_activations, "LEAST", 2**12)  # some are parked, and some are not
    unet = adapted_unet("sd1", "all")
    made: list[weakref.ref[Parked]] = []

    class Seen(Parked):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(weakref.ref(self))

    monkeypatch.setattr(offload_activations, "Parked", Seen)
    Activations(unet, blocks_of(unet), lambda: [*unet.parameters()], torch.device("cpu"))
    out = unet(**arguments(unet)).sample
    assert len(made) > 20
    del out
    gc.collect()
    assert not any(ref() for ref in made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_orders(dtype: torch.dtype) -> None:
    """Two forward passes before one backward pass, and a pass without gradients between them, each
    of other blocks first than those that are there: loss and gradients are those of a UNet at
    whole, to the bit, though the factors have had a step."""
    found = []
    for waits in (True, False):
        unet: Any = moved("sd1", True, dtype)[:2] if waits else adapted_unet("sd1", "all", dtype)
        unet, ones = unet if waits else (unet, [FastModel(unet)])
        for _ in range(2):
            given = [arguments(unet, dtype), arguments(unet, dtype, number=1)]

            def call(unet: Any = unet, given: Any = given, **_: Any) -> Any:
                outs = [unet(**given[0]).sample.flatten()]
                with torch.no_grad():
                    unet(**given[1])
                return [torch.cat([*outs, unet(**given[1]).sample.flatten()])]

            found.append(step(unet, {}, *ones, call=call))
            with torch.no_grad():
                for parameter in sd_lora.lora_layers(unet):
                    parameter.sub_(0.1 * parameter.grad)
    for mine, theirs in zip(found[:2], found[2:], strict=True):
        assert torch.equal(mine[0], theirs[0])
        assert mine[1].keys() == theirs[1].keys()
        assert all(torch.equal(mine[1][name], value) for name, value in theirs[1].items())


@pytest.mark.parametrize("is_fast", [True, False])
@pytest.mark.parametrize("again", [True, False])
def test_two_laps_at_once(is_fast: bool, again: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a block goes backward, the saved tensors of its lap and of the one before alone are on
    the device, and while it goes forward those of no lap but its own and the last one's, as far as
    nothing else holds them: of the others the device's storage is freed, and there is a copy. With
    blocks computed again these are their inputs. Nothing of a step is left after it."""
    monkeypatch.setattr(offload_activations, "LEAST", 1)
    unet, cpu = adapted_unet("sdxl", "all"), torch.device("cpu")
    if again:
        enable_checkpointing({"unet": unet}, All())
    ones = [FastModel(unet)] if is_fast else []
    held = [*unet.parameters(), *unet.buffers(), *(t for one in ones for t in one.tensors)]
    moved = Activations(unet, blocks_of(unet), lambda: held, cpu)
    found: list[weakref.ref[Parked]] = []
    looks = {"forward": 0, "backward": 0, "gone": 0}

    def look(backward: bool) -> None:
        if moved.lap is not None:
            found.extend(weakref.ref(p) for p in moved.lap.before.saved)
        alive = [parked for ref in found if (parked := ref()) is not None]
        near = {id(p) for lap in moved.near for p in lap.saved} if backward else set()
        assert len(moved.near) <= 2
        for parked in alive:
            assert (parked.there is not None) <= (id(parked) in near)
        looks["backward" if backward else "forward"] += 1
        looks["gone"] += sum(p.origin is None and p.there is None for p in alive)

    for block in blocks_of(unet).values():
        block.register_forward_pre_hook(lambda *_: look(False) if moved.lap else None)
        block.register_forward_hook(
            lambda _, __, out: out.register_hook(lambda _: look(True)) and None
        )
    for _ in range(2):
        step(unet, arguments(unet), *ones)
    gc.collect()
    assert [ref() for ref in found if ref() is not None] == []
    assert looks["forward"] == 2 * len(blocks_of(unet))
    assert looks["backward"] >= looks["forward"]
    assert looks["gone"] > 20 * len(blocks_of(unet))


def test_two_processes(tiny_sd1: Path, data: Path, tmp_path: Path) -> None:
    """Two processes, each with its own waiting weights, train as two without, to the bit."""
    flags = [
        "--pretrained_model_name_or_path", str(tiny_sd1), "--train_data_dir", str(data),
        "--resolution", "64", "--train_batch_size", "2", "--max_train_steps", "3", "--seed", "0",
        "--learning_rate", "1e-3", "--targets", FEW, "--num_validation_images", "0",
        "--train_text_encoder", "--cache_latents", "no",
    ]  # fmt: skip
    factors = []
    for name, more in (("whole", []), ("moved", ["--offload_weights", "--offload_activations"])):
        output = ["--output_dir", str(tmp_path / name / "run")]
        script = "train_text_to_image_lora.py"
        launch = Launch(2, [*flags, *output, *more], tmp_path / f"{name} said", script)
        assert launch.wait() == [0, 0], launch.text
        (file,) = (tmp_path / name).rglob("checkpoint-*/adapter.safetensors")
        factors.append(load_file(file))
    assert factors[0].keys() == factors[1].keys()
    assert all(torch.equal(factors[1][name], value) for name, value in factors[0].items())


def test_other_places_are_refused(tmp_path: Path) -> None:
    """A device of another kind than CUDA's and the CPU, and FSDP2, are told to do without, with the
    option's name."""
    plain = text_to_image(tmp_path, tmp_path, tmp_path / "out")
    check_offload(plain.resolve("sd1", 64), torch.device("mps"), sharded=True)
    for name in ("offload_weights", "offload_activations"):
        config = plain.replace(**{name: True}).resolve("sd1", 64)
        check_offload(config, torch.device("cuda"), sharded=False)
        with pytest.raises(sd_lora.UsageError, match=f"{name} is for cards .* this device is mps"):
            check_offload(config, torch.device("mps"), sharded=False)
        with pytest.raises(sd_lora.UsageError, match=f"{name} moves .* launch with accelerate"):
            check_offload(config, torch.device("cuda"), sharded=True)


def test_the_count_knows_of_it(tiny_sd1: Path, data: Path, tmp_path: Path) -> None:
    """On the meta device a step holds, beside what it holds without, the weights of two blocks at
    most, and none of the others: the frozen bytes are those outside of the blocks, with those that
    the fast path computes with for all blocks at once."""
    config = text_to_image(tiny_sd1, data, tmp_path / "out", gradient_checkpointing=True)
    config = config.replace(targets="attention", train_batch_size=1).resolve("sd1", 64)
    configs, shape = base_of(config).meta_pipeline, Shape(1, (64, 64))
    whole = count_step(config, configs, shape)
    waits = count_step(config.replace(offload_weights=True), configs, shape)
    unet = adapted_unet("sd1", "attention")
    inside = {id(t): t for b in blocks_of(unet).values() for t in frozen_of(b)}
    text = {id(t): t for n, t in unet.named_parameters() if re.search(r"attn2.to_[kv].base.w", n)}
    times = {id(t): t for n, t in unet.named_parameters() if n.endswith("time_emb_proj.weight")}
    stays = sum(t.nbytes for t in (text | times).values())
    gone = sum(t.nbytes for t in inside.values()) - stays
    assert whole.frozen - waits.frozen == gone
    sizes = sorted(sum(t.nbytes for t in frozen_of(b)) for b in blocks_of(unet).values())
    assert 0 < waits.rest - whole.rest <= 1.1 * sum(sizes[-2:])
    encoder = configs.models["text_encoder"]
    layers = sum(t.nbytes for b in blocks_of(encoder).values() for t in b.parameters())
    learns = config.replace(train_text_encoder=True)
    moved = count_step(learns.replace(offload_weights=True), configs, shape)
    assert count_step(learns, configs, shape).frozen - moved.frozen == gone + layers


def test_encoders_beside_a_step_are_counted(tiny_sd1: Path, data: Path, tmp_path: Path) -> None:
    """Beside a step that encodes its own images and captions are the VAE and the text encoder;
    where weights wait, their tensors outside of the blocks."""
    config = text_to_image(
        tiny_sd1, data, tmp_path / "out", cache_latents="no", cache_text_embeddings="no"
    ).resolve("sd1", 64)
    base = base_of(config)
    models = {"cache_text_embeddings": base.meta_pipeline.models["text_encoder"]}
    models["cache_latents"] = base.load().vae
    for waits in (False, True):
        found = beside_of(config.replace(offload_weights=waits), base, encodes=True)
        for option, model in models.items():
            inside = [t for b in blocks_of(model).values() for t in b.parameters() if waits]
            size = sum(t.nbytes for t in model.parameters()) - sum(t.nbytes for t in inside)
            assert found[option] == size > 0


def test_it_is_the_last_advice(tiny_sd1: Path, data: Path, tmp_path: Path) -> None:
    """For a card, waiting weights are proposed with their cost after all that changes no image's
    size, and before smaller images; for a resumed run, which may not change the others, after
    checkpointing; and on a CPU, where they save nothing, never."""
    config = text_to_image(tiny_sd1, data, tmp_path / "out", train_batch_size=1)
    plan = check(config, page=False).plan
    step = Rung("", plan.config, Shape(1, (64, 64)), 0)

    def words(device: str, resumes: bool = False) -> list[str]:
        return [rung.words for rung in rungs(Place(plan, device, {}, resumes=resumes), step)]

    advised = "--offload_weights (the UNet goes to the card twice for each micro-batch)"
    found = words("cuda")
    assert found[0] == "--gradient_checkpointing (a third slower)"
    assert found.index("--base_precision nf4") + 1 == found.index(advised)
    assert all(word.startswith("--resolution") for word in found[found.index(advised) + 1 :])
    assert words("cuda", resumes=True) == [found[0], advised]
    assert advised not in words("cpu")
