"""Exports against diffusers' own loader, and the way back, for every rank and alpha."""

import json
import logging
import re
from pathlib import Path

import peft
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.training_utils import _collate_lora_metadata
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sd_lora
from sd_lora import files as tensors
from sd_lora.adapters.inject import adapted_layers
from sd_lora.formats import adapter_files as files
from sd_lora.formats import verify
from sd_lora.formats.canonical import read_models
from sd_lora.formats.lora_file import open_lora
from sd_lora.formats.output import format_for
from sd_lora.formats.programs import readers
from sd_lora.models.load import Parts, load_parts
from tests.adapters.layers import randomise_model
from tests.formats.trained import MIXED
from tests.tiny import pipeline_of


def trained_parts(path: Path, **options: object) -> Parts:
    """A pipeline's parts with random adapters on the UNet and the text encoder."""
    parts = load_parts(str(path))
    sd_lora.inject(parts.unet, **(MIXED | options))
    sd_lora.inject(parts.text_encoders["text_encoder"], targets="text", rank=3, alpha=1.5)
    g = torch.Generator().manual_seed(0)
    for model in (parts.unet, parts.text_encoders["text_encoder"]):
        for delta in sd_lora.deltas_of(model).values():
            delta.lora_B.data.normal_(std=0.1, generator=g)
    return parts


def models(parts: Parts) -> dict[str, torch.nn.Module]:
    return {"unet": parts.unet, "text_encoder": parts.text_encoders["text_encoder"]}


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_both_files_load_exactly_in_diffusers(
    family: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Mixed ranks and alphas, convolutions, time embeddings and text encoder: each file, loaded
    by diffusers into a pipeline from disk, gives every trained ΔW within 1e-5, and no warning."""
    folder = request.getfixturevalue(f"tiny_{family}")
    parts = trained_parts(folder)
    paths = sd_lora.save_adapter(models(parts), tmp_path / "mine", family=family)
    assert [p.name for p in paths] == [
        "pytorch_lora_weights.safetensors",
        "mine_kohya.safetensors",
    ]
    adapter = read_models(models(parts))
    for path in [*paths, tmp_path / "mine"]:
        pipeline = StableDiffusionPipeline.from_pretrained(
            folder, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
        with verify.captured_complaints() as complaints:
            pipeline.load_lora_weights(path)
        assert complaints == []
        count, worst, wrong = verify.compare(adapter, verify.loaded_adapter(pipeline))
        assert wrong == []
        assert count == sum(len(m) for m in adapter.values()) > 140
        assert worst < 1e-6
    both = zip(paths, (files.DIFFUSERS, files.KOHYA), strict=True)
    checked = [verify.verify(p, adapter, parts.meta_pipeline, kind).modules for p, kind in both]
    assert checked == [count, count]


def test_images_are_the_trained_models(tiny_sd1: Path, tmp_path: Path) -> None:
    """The latents that diffusers samples with the loaded file are those of our injected model."""
    parts = trained_parts(tiny_sd1)
    paths = sd_lora.save_adapter(models(parts), tmp_path)
    want = sample(pipeline_of(parts))
    for path in paths:
        pipeline = pipeline_of(load_parts(str(tiny_sd1)))
        assert (sample(pipeline) - want).abs().max() > 1e-3
        pipeline.load_lora_weights(path)
        torch.testing.assert_close(sample(pipeline), want, rtol=1e-4, atol=1e-4)


def sample(pipeline: StableDiffusionPipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(
        "a photo", num_inference_steps=2, generator=generator, output_type="latent"
    ).images


def test_reading_back_is_the_identity(tiny_sd1: Path, tmp_path: Path) -> None:
    """Either file loads into bare models as the same function: same modules, same ΔW to 1e-6."""
    parts = trained_parts(tiny_sd1)
    adapter = read_models(models(parts))
    for path in sd_lora.save_adapter(models(parts), tmp_path):
        bare = load_parts(str(tiny_sd1))
        names = sd_lora.load_adapter(models(bare), path)
        assert {c: len(n) for c, n in names.items()} == {c: len(m) for c, m in adapter.items()}
        again = read_models(models(bare))
        for component, modules in adapter.items():
            for name, delta in modules.items():
                loaded = again[component][name].weight()
                torch.testing.assert_close(loaded, delta.weight(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
@pytest.mark.parametrize("method", ["lora", "loha"])
def test_a_model_by_itself_takes_our_files(
    component: str, method: str, tiny_sd1: Path, tmp_path: Path
) -> None:
    """`load_adapter(unet, file)`: every file that `save_adapter` writes of one component, and the
    state of the model, load into that model given alone as by its name, the same ΔW to 1e-6."""
    parts = load_parts(str(tiny_sd1))
    model = parts.models[component]
    targets = "attention+conv" if component == "unet" else "text"
    sd_lora.inject(model, targets, rank=2, alpha=3.0, method=method)
    randomise_model(model)
    paths = sd_lora.save_adapter({component: model}, tmp_path)
    assert len(paths) == (2 if method == "lora" else 1)
    state = tmp_path / "state.safetensors"
    save_file(sd_lora.lora_state_dict(model), state)
    want = sd_lora.deltas_of(model)
    for path in (*paths, state):
        for alone in (True, False):
            bare = load_parts(str(tiny_sd1)).models[component]
            names = sd_lora.load_adapter(bare if alone else {component: bare}, path)
            assert names == {"" if alone else component: [*want]}
            for name, delta in sd_lora.deltas_of(bare).items():
                torch.testing.assert_close(
                    delta.weight(), want[name].weight(), rtol=1e-6, atol=1e-7
                )


def test_what_a_model_by_itself_cannot_take(tiny_sd1: Path, tmp_path: Path) -> None:
    """A file for two components, another model, a pipeline, and a file's tensors given for a
    state: each is told with the call that is right, and the models stay bare."""
    path, _ = sd_lora.save_adapter(models(trained_parts(tiny_sd1)), tmp_path)
    bare = load_parts(str(tiny_sd1))
    encoder = bare.text_encoders["text_encoder"]
    only_unet = {k: t for k, t in load_file(path).items() if k.startswith("unet")}
    save_file(only_unet, tmp_path / "unet.safetensors")
    call = r'load_adapter\({"text_encoder": …, "unet": …}, path\)'
    for given, name, message in (
        (bare.unet, path.name, f"adapts text_encoder and unet, and one model was given: {call}"),
        (encoder, "unet.safetensors", r"which the unet has not \(a CLIPTextModel was given\)"),
        (pipeline_of(bare), path.name, "no StableDiffusionPipeline: as in load_adapter"),
    ):
        with pytest.raises(sd_lora.UsageError, match=message):
            sd_lora.load_adapter(given, tmp_path / name)
    with pytest.raises(sd_lora.UsageError, match=r"sd_lora.load_adapter\(model, path\) reads"):
        sd_lora.load_lora_state_dict(bare.unet, only_unet)
    assert not adapted_layers(bare.unet)
    assert not adapted_layers(encoder)


@pytest.mark.parametrize("merged", [False, True])
def test_rules_by_module_are_exact_in_diffusers(
    merged: bool, tiny_sd1: Path, tmp_path: Path
) -> None:
    """DoRA on convolutions beside plain LoRA on attention: diffusers makes DoRA of a whole
    component, so the plain ones are written with m = ‖W + ΔW‖, row by row. Its loader, ours, and
    the injected model compute the same W', also where the file is written while merged."""
    parts = load_parts(str(tiny_sd1))
    sd_lora.inject(
        parts.unet, "attention+conv", rank=2, alpha=3.0, rule_pattern={r"conv\w*": "decompose"}
    )
    randomise_model(parts.unet)
    want = {name: layer.effective_weight() for name, layer in adapted_layers(parts.unet).items()}
    plain = {n: d.weight() for n, d in sd_lora.deltas_of(parts.unet).items() if d.magnitude is None}
    assert 0 < len(plain) < len(want)
    if merged:
        sd_lora.merge(parts.unet)
    path = sd_lora.save_adapter({"unet": parts.unet}, tmp_path)[0]
    assert path.name == files.DIFFUSERS.end
    assert sum(d.magnitude is None for d in sd_lora.deltas_of(parts.unet).values()) == len(plain)
    tensors, bare = load_file(path), load_parts(str(tiny_sd1))
    base = dict(bare.unet.named_modules())
    for name, dW in plain.items():
        m = tensors[f"unet.{name}.lora_magnitude_vector.weight"]
        V = base[name].weight + dW
        torch.testing.assert_close(m.flatten(), V.flatten(1).norm(dim=1))
    kind = verify.verify(path, read_models({"unet": parts.unet}), parts.meta_pipeline)
    assert kind.modules == len(want)
    pipeline = pipeline_of(load_parts(str(tiny_sd1)))
    pipeline.load_lora_weights(path)
    pipeline.fuse_lora()
    sd_lora.load_adapter(bare.unet, path)
    for name, W in want.items():
        ours = bare.unet.get_submodule(name).effective_weight()
        torch.testing.assert_close(ours, W, rtol=1e-5, atol=1e-6)
        theirs = pipeline.unet.get_submodule(name).base_layer.weight
        torch.testing.assert_close(theirs, W, rtol=1e-5, atol=1e-6)


def test_files_of_both_rules_are_told(tiny_sd1: Path, tmp_path: Path) -> None:
    """A file of diffusers' keys with a magnitude in some modules only: its loader leaves the
    others' without a value, as `inspect` says and `verify` finds; such a file is not written, and
    the remedy is named."""
    parts = load_parts(str(tiny_sd1))
    sd_lora.inject(parts.unet, "attention", rank=2, rule="decompose")
    randomise_model(parts.unet)
    path = sd_lora.save_adapter({"unet": parts.unet}, tmp_path)[0]
    gone = re.compile(r".*(to_q|to_k)\.lora_magnitude_vector.*")
    tensors = {key: t for key, t in load_file(path).items() if not gone.fullmatch(key)}
    save_file(tensors, path)
    lora = open_lora(path)
    line = readers(lora, parts.meta_pipeline)["diffusers"]
    assert line == "leaves 28 magnitudes of the unet without a value: others have one"
    assert len(lora.adapter["unet"]) == 56
    with pytest.raises(sd_lora.RunError, match="unet .*to_[qk] was left without a value"):
        verify.verify_file(path, parts.meta_pipeline)
    with pytest.raises(sd_lora.UsageError, match="take all of unet as DoRA or none of it"):
        format_for(lora.adapter, "diffusers")
    assert format_for(lora.adapter, None) is files.LYCORIS


def test_rules_by_module_of_other_methods(tiny_sd1: Path, tmp_path: Path) -> None:
    """LoHa with and without magnitudes: LyCORIS' file has a rule for each module, and reads back
    with it."""
    parts, bare = load_parts(str(tiny_sd1)), load_parts(str(tiny_sd1))
    pattern = {r"conv\w*": "decompose"}
    sd_lora.inject(parts.unet, "attention+conv", rank=2, method="loha", rule_pattern=pattern)
    randomise_model(parts.unet)
    path = sd_lora.save_adapter({"unet": parts.unet}, tmp_path)[0]
    sd_lora.load_adapter(bare.unet, path)
    want, got = sd_lora.lora_state_dict(parts.unet), sd_lora.lora_state_dict(bare.unet)
    assert got.keys() == want.keys()
    assert any(key.endswith(".magnitude") for key in want)
    assert all(torch.equal(got[key], want[key]) for key in want)


def test_kohya_names_and_metadata(tiny_sd1: Path, tmp_path: Path) -> None:
    """kohya's key names, one alpha for the file, and the header that A1111 and sites read."""
    parts = trained_parts(tiny_sd1)
    _, path = sd_lora.save_adapter(models(parts), tmp_path, name="mascot")
    keys = load_file(path)
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
    assert {f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha"} <= keys.keys()
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight" in keys
    (alpha,) = {float(v) for k, v in keys.items() if k.endswith(".alpha")}
    with safe_open(path, "pt") as file:
        header = file.metadata()
    assert header["ss_base_model_version"] == "sd_v1"
    assert header["ss_output_name"] == "mascot"
    assert json.loads(header["ss_network_args"]) == {
        "conv_dim": "2",
        "conv_alpha": f"{alpha:g}",
    }
    assert header["ss_network_alpha"] == f"{alpha:g}"


@pytest.mark.parametrize(
    "fault", ["lost module", "wrong strength", "lost partner", "loader warning"]
)
def test_verify_finds_what_loaders_pass_over(fault: str, tiny_sd1: Path, tmp_path: Path) -> None:
    """A lost module, a wrong scale, a factor without partner, and a mere log line each fail."""
    parts = trained_parts(tiny_sd1)
    path, _ = sd_lora.save_adapter(models(parts), tmp_path)
    tensors = load_file(path)
    key = "unet.conv_in.lora_B.weight"
    if fault == "lost module":
        del tensors[key], tensors["unet.conv_in.lora_A.weight"]
        message = "conv_in was not loaded"
    elif fault == "wrong strength":
        tensors[key] *= 2
        message = "conv_in is off by 100"
    elif fault == "lost partner":
        del tensors[key]
        message = "size mismatch for conv_in"
    else:
        message = "this is only a log line"
        load = StableDiffusionPipeline.load_lora_weights
        logger = logging.getLogger("diffusers.loaders")

        def noisy(self: object, *args: object, **kwargs: object) -> None:
            logger.warning(message)
            load(self, *args, **kwargs)

        pytest.MonkeyPatch().setattr(StableDiffusionPipeline, "load_lora_weights", noisy)
    save_file(tensors, path)
    try:
        with pytest.raises(sd_lora.RunError, match=message):
            verify.verify(path, read_models(models(parts)), parts.meta_pipeline, files.DIFFUSERS)
    finally:
        if fault == "loader warning":
            StableDiffusionPipeline.load_lora_weights = load


def test_not_finite_factors_are_not_written(tiny_sd1: Path, tmp_path: Path) -> None:
    """A NaN is refused by module name before a file exists."""
    parts = trained_parts(tiny_sd1)
    parts.unet.conv_in.delta.lora_B.data[0, 0] = float("nan")
    with pytest.raises(sd_lora.RunError, match="unet conv_in holds NaN"):
        sd_lora.save_adapter(models(parts), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing_behind(
    tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the second file cannot be written, neither is left, and the error says the size."""
    parts = trained_parts(tiny_sd1)
    fsync, calls = tensors.os.fsync, []

    def full(fd: int) -> None:
        calls.append(fd)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        fsync(fd)

    monkeypatch.setattr(tensors.os, "fsync", full)
    with pytest.raises(sd_lora.RunError, match=r"KiB\) could not be written: No space left"):
        sd_lora.save_adapter(models(parts), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_families_that_cannot_be_written_are_refused(family: str, tmp_path: Path) -> None:
    """Only families whose names are proved are written."""
    with pytest.raises(sd_lora.UsageError, match="unknown family"):
        files.write_adapter({}, tmp_path, family, "x")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"unet.conv_in.lora_A.weight": (2, 4, 3, 3)}, "come in pairs"),
        (
            {"unet.conv_in.lora_C.weight": (2, 2), "unet.x.lora_A.weight": (1,)},
            "not of the diffusers",
        ),
        ({"lora_unet_conv_in.hada_w1_a": (2, 4)}, "loha needs hada_w1_a, hada_w1_b"),
        (
            {
                "lora_unet_nothing.lora_down.weight": (2, 4),
                "lora_unet_nothing.lora_up.weight": (4, 2),
            },
            "nothing, which the unet has not",
        ),
        ({"model.weight": (2, 2)}, "no LoRA that can be read"),
        (
            {
                "unet.conv_in.lora_A.weight": (2, 4, 1, 1),
                "unet.conv_in.lora_B.weight": (16, 2, 1, 1),
            },
            r"conv_in: ΔW is 16×4 and the weight \(16, 4, 3, 3\)",
        ),
        (
            {"unet.nowhere.lora_A.weight": (2, 4), "unet.nowhere.lora_B.weight": (4, 2)},
            "nowhere, which the unet has not",
        ),
    ],
)
def test_foreign_files_are_refused_whole(
    tensors: dict, message: str, tiny_sd1: Path, tmp_path: Path
) -> None:
    """What cannot be read is refused by key, and the model is left without adapters."""
    path = tmp_path / "file.safetensors"
    save_file({k: torch.zeros(s) for k, s in tensors.items()}, path)
    parts = load_parts(str(tiny_sd1))
    with pytest.raises(sd_lora.UsageError, match=message):
        sd_lora.load_adapter(models(parts), path)
    assert not adapted_layers(parts.unet)


def test_unreadable_files(tiny_sd1: Path, tmp_path: Path) -> None:
    """A missing file and one that is not safetensors are named."""
    parts = load_parts(str(tiny_sd1))
    with pytest.raises(sd_lora.UsageError, match="is not a file"):
        sd_lora.load_adapter(models(parts), tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("hello, this is not a safetensors file")
    with pytest.raises(
        sd_lora.UsageError, match="text.safetensors cannot be read: not a safetensors file"
    ):
        sd_lora.load_adapter(models(parts), tmp_path / "text.safetensors")


def test_the_configuration_in_a_header_is_obeyed(tiny_sd1: Path, tmp_path: Path) -> None:
    """diffusers' own files may carry r and alpha in the header, and diffusers obeys them: so do
    we, rather than to take alpha = rank (4 times too weak here)."""
    parts = load_parts(str(tiny_sd1))
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["to_q"], init_lora_weights=False)
    parts.unet.add_adapter(config)
    layers = peft.get_peft_model_state_dict(parts.unet)
    header = _collate_lora_metadata({"unet": parts.unet})
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers, **header)
    pipeline = pipeline_of(load_parts(str(tiny_sd1)))
    pipeline.load_lora_weights(tmp_path)
    bare = load_parts(str(tiny_sd1))
    sd_lora.load_adapter({"unet": bare.unet}, tmp_path)
    loaded = verify.loaded_adapter(pipeline)
    count, worst, wrong = verify.compare(read_models({"unet": bare.unet}), loaded)
    assert wrong == []
    assert count > 10
    assert {d.scale for d in sd_lora.deltas_of(bare.unet).values()} == {4.0}


def test_a_failed_load_leaves_every_model_as_it_was(tiny_sd1: Path, tmp_path: Path) -> None:
    """With the second component refused, the first is bare again and its parameters trainable."""
    parts = trained_parts(tiny_sd1)
    path, _ = sd_lora.save_adapter(models(parts), tmp_path)
    bare = load_parts(str(tiny_sd1))
    bare.text_encoders["text_encoder"].requires_grad_(True)
    sd_lora.inject(bare.unet)
    with pytest.raises(sd_lora.UsageError, match="unet: the model has adapters already"):
        sd_lora.load_adapter(dict(reversed(bare.models.items())), path)
    assert not adapted_layers(bare.text_encoders["text_encoder"])
    assert all(p.requires_grad for p in bare.text_encoders["text_encoder"].parameters())


def test_embeddings_are_not_written(tiny_sd1: Path, tmp_path: Path) -> None:
    """No reader of Stable Diffusion LoRAs takes an embedding's delta: an error, before a file."""
    parts = load_parts(str(tiny_sd1))
    sd_lora.inject(parts.text_encoders["text_encoder"], targets="text+.*token_embedding")
    with pytest.raises(sd_lora.UsageError, match="token_embedding: no reader .* class Embedding"):
        sd_lora.save_adapter(
            {"text_encoder": parts.text_encoders["text_encoder"]}, tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({"init": "pissa"}, {"ss_network_dim": "8", "ss_network_module": "networks.lora"}),
        ({"rule": "decompose", "alpha": 1.0}, {"ss_network_dim": "4", "ss_network_alpha": "4"}),
        ({"method": "loha", "alpha": 8.0}, {"ss_network_alpha": "8"}),
    ],
)
def test_metadata_says_what_is_in_the_file(
    options: dict, want: dict, tiny_sd1: Path, tmp_path: Path
) -> None:
    """Rank and alpha as the file has them: PiSSA's doubled rank, DoRA's folded alpha, and LoHa's
    convolutions with their own."""
    parts = load_parts(str(tiny_sd1))
    conv = {} if options.get("init") else {"conv_rank": 2, "conv_alpha": 1.0}
    targets = "attention" if options.get("init") else "attention+conv"
    sd_lora.inject(parts.unet, targets=targets, rank=4, **conv, **options)
    path = sd_lora.save_adapter({"unet": parts.unet}, tmp_path)[0]
    with safe_open(path, "pt") as file:
        header = file.metadata()
    assert {key: header[key] for key in want} == want
    if options.get("method") == "loha":
        args = json.loads(header["ss_network_args"])
        assert args == {"algo": "loha", "conv_dim": "2", "conv_alpha": "1"}
