"""Broken, foreign and hostile files: an error of ours or a whole load, and nothing in between."""

import collections
import io
import json
import os
import pickle
import re
import struct
import time
import zipfile
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sd_lora
from sd_lora.adapters.inject import adapted_layers, eject
from sd_lora.files import TensorFile
from sd_lora.formats import diffusers, lycoris, peft
from sd_lora.formats.canonical import each
from sd_lora.formats.lora_file import LoRAFile, open_lora
from sd_lora.models.load import load_parts
from sd_lora.models.original_names import Layout

OURS = (sd_lora.UsageError, sd_lora.RunError)
T = TypeVar("T")
Tensors = dict[str, Tensor]
Data = st.DataObject


def examples(number: int) -> Callable[[Any], Any]:
    """The same examples in every run, however slow the machine is."""
    return settings(
        max_examples=number,
        deadline=None,
        derandomize=True,
        database=None,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(HealthCheck),
    )


class Models(dict[str, nn.Module]):
    """Component → model; hypothesis prints it."""

    def __repr__(self) -> str:
        return f"<{', '.join(self)}>"


class Net(nn.Module):
    """A model by itself, with a layer of every kind that files adapt."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.lin = nn.Linear(6, 8)
        self.conv = nn.Conv2d(4, 6, 3)
        self.norm = nn.LayerNorm(8)
        self.attn = nn.MultiheadAttention(8, 2)


@pytest.fixture(scope="module")
def net() -> Models:
    torch.manual_seed(0)
    return Models({"": Net()})


@pytest.fixture(scope="module")
def sd1(tiny_sd1: Path) -> Models:
    parts = load_parts(str(tiny_sd1))
    return Models(unet=parts.unet, text_encoder=parts.text_encoders["text_encoder"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


# --- the property ---------------------------------------------------------------------------------


def attempt(call: Callable[[], T]) -> tuple[T | None, str]:
    """Returns what a call gives, or the message of an error of ours; any other error is a bug."""
    try:
        return call(), ""
    except OURS as error:
        return None, str(error)


def opened(path: Path) -> LoRAFile | None:
    """Opens and checks a file without a model: either an error of ours that names the file, or
    every key has its place and every delta its file's numbers, finite ones."""
    lora, refusal = attempt(lambda: open_lora(path))
    if lora is not None:
        _, refusal = attempt(lora.check)
    if refusal or lora is None:
        assert path.name in refusal
        assert len(refusal) > len(str(path)) + 10
        return None
    keys = [key for modules in lora.places.values() for kinds in modules.values()
            for key in kinds.values()]  # fmt: skip
    assert sorted(keys) == sorted(lora.file)
    assert {(c, n) for c, n, _ in each(lora.adapter)} == {
        (c, n) for c, modules in lora.places.items() for n in modules
    }
    for component, name, delta in each(lora.adapter):
        for kind, key in lora.places[component][name].items():
            own = "magnitude" if kind == "flat_magnitude" else kind
            if own != "alpha":
                values = delta.tensors()[own]
                assert torch.isfinite(values).all()
                if lora.format != "peft":  # a scale without a rank goes into the factors
                    file = lora.file[key].to(values.dtype)
                    assert torch.equal(values.flatten(), file.flatten())
            elif delta.rank is not None:
                assert delta.alpha == float(lora.file[key])
        assert whole(delta)
    return lora


def whole(delta: Any) -> bool:
    """Whether ΔW can be made, finite and in the weight's shape."""
    with torch.no_grad():
        weight = delta.weight()
    return weight.shape == delta.shape and bool(torch.isfinite(weight).all())


def loaded(models: Mapping[str, nn.Module], path: Path) -> bool:
    """Loads a file into bare models, which are bare afterwards: whether it was taken. A refusal
    names the file, a key, or a module of it; a load has as many tensors as the file."""
    grads = [p.requires_grad for model in models.values() for p in model.parameters()]
    names, refusal = attempt(lambda: sd_lora.load_adapter(models, path))
    if names is None:
        assert not any(adapted_layers(model) for model in models.values())
        after = [p.requires_grad for model in models.values() for p in model.parameters()]
        assert grads == after
        assert names_a_place(refusal, path, keys_of(path))
        return False
    try:
        found_deltas = {component: sd_lora.deltas_of(model) for component, model in models.items()}
        assert {c: set(found) for c, found in found_deltas.items() if found} == {
            c: set(found) for c, found in names.items()
        }
        deltas = [delta for found in found_deltas.values() for delta in found.values()]
        assert all(whole(delta) for delta in deltas)
        count = sum(not key.endswith(("alpha", *OF_BASE)) for key in keys_of(path))
        assert sum(len(delta.tensors()) for delta in deltas) == count
    finally:
        for model in models.values():
            eject(model)
            model.requires_grad_(True)
    return True


OF_BASE = (".base_layer.weight", ".original_module.weight", ".original_module.bias")


def keys_of(path: Path) -> list[str]:
    try:
        return list(TensorFile(path / peft.WEIGHTS_NAME if path.is_dir() else path))
    except OURS:
        return []


def names_a_place(message: str, path: Path, keys: list[str]) -> bool:
    """Whether an error says where: the file, a key or a module of it, or a component."""
    places = {
        path.name,
        peft.CONFIG_NAME,
        "configuration's pattern",
        "the file adapts ",
        "the layer itself",
    }
    for key in keys:
        bare = re.sub(r"^(base_model\.model|unet|text_encoder|lycoris)[._]|text_model\.", "", key)
        for name in (key, bare):
            words = name.split(".")
            places |= {".".join(words[:end]) for end in (len(words), -1, -2)}
        places |= {(lora_place(key) or ("", "", ""))[1].removeprefix("text_model.")}
    places |= {repr(place)[1:-1] for place in places}
    return any(place in message for place in places - {""})


def lora_place(key: str) -> tuple[str, str, str] | None:
    layout = Layout(1, (False, True, True))
    return diffusers.parse(key, layout) or lycoris.parse(key, layout)


# --- correct files of every format ----------------------------------------------------------------

Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
TEXT_Q = "text_model.encoder.layers.0.self_attn.q_proj"
CONV = (2, 4, 3, 3), (16, 2, 1, 1)
LINEAR = (2, 16), (16, 2)
LINEAR_TEXT = (3, 32), (32, 3)


def pair(stem: str, shapes: tuple[Any, Any], down: str, up: str, alpha: bool = False) -> Any:
    found = {f"{stem}{down}": shapes[0], f"{stem}{up}": shapes[1]}
    return found | ({f"{stem}.alpha": ()} if alpha else {})


def kohya(stem: str, shapes: tuple[Any, Any]) -> Any:
    return pair(stem, shapes, ".lora_down.weight", ".lora_up.weight", alpha=True)


def dense(**kinds: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {kind.replace("__", "."): shape for kind, shape in kinds.items()}


def at(stem: str, kinds: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {f"{stem}.{kind}": shape for kind, shape in kinds.items()}


LOHA = dense(hada_w1_a=(16, 2), hada_w1_b=(2, 16), hada_w2_a=(16, 2), hada_w2_b=(2, 16), alpha=())
TUCKER = dense(
    **{f"hada_w{h}_a": (2, 16) for h in "12"},
    **{f"hada_w{h}_b": (2, 4) for h in "12"},
    **{f"hada_t{h}": (2, 2, 3, 3) for h in "12"},
)
LOKR = dense(lokr_w1=(4, 4), lokr_w2_a=(4, 2), lokr_w2_b=(2, 4), alpha=())
LOKR_CORE = dense(lokr_w1=(4, 2), lokr_w2_a=(2, 4), lokr_w2_b=(2, 2), lokr_t2=(2, 2, 3, 3))
U, T = "lora_unet_", "lora_te_"
KOHYA_Q, KOHYA_TEXT = (name.replace(".", "_") for name in (Q, TEXT_Q))

SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "diffusers": {
        **pair(f"unet.{Q}", LINEAR, ".lora_A.weight", ".lora_B.weight"),
        f"unet.{Q}.lora_magnitude_vector.weight": (16,),
        **pair("unet.conv_in", CONV, ".lora_A.weight", ".lora_B.weight"),
        **pair(f"text_encoder.{TEXT_Q}", LINEAR_TEXT, ".lora_A.weight", ".lora_B.weight"),
    },
    "diffusers of old": {
        **pair(
            "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora",
            LINEAR,
            ".down.weight",
            ".up.weight",
        ),
        **pair("unet.conv_in", CONV, ".lora.down.weight", ".lora.up.weight", alpha=True),
        **pair(
            "text_encoder.text_model.encoder.layers.0.self_attn.to_q",
            LINEAR_TEXT,
            ".lora_linear_layer.down.weight",
            ".lora_linear_layer.up.weight",
        ),
    },
    "kohya": {
        **kohya(U + KOHYA_Q, LINEAR),
        **kohya(U + "conv_in", CONV),
        **kohya(T + KOHYA_TEXT, LINEAR_TEXT),
    },
    "kohya, original names": {
        **kohya(U + "input_blocks_0_0", CONV),
        **kohya(U + "input_blocks_1_1_transformer_blocks_0_attn1_to_q", LINEAR),
        **kohya(T + KOHYA_TEXT, LINEAR_TEXT),
    },
    "LyCORIS": {
        **at(U + KOHYA_Q, LOHA),
        **at(U + KOHYA_Q[:-1] + "k", LOKR | {"dora_scale": (16, 1)}),
        **at(U + "conv_in", TUCKER),
        **at(T + KOHYA_TEXT, dense(diff=(32, 32), diff_b=(32,))),
        **at(U + "conv_norm_out", dense(w_norm=(16,), b_norm=(16,))),
    },
    "LoCon and a core": {
        **at(
            U + "conv_in",
            dense(
                lora_down__weight=(2, 4, 1, 1),
                lora_up__weight=(16, 2, 1, 1),
                lora_mid__weight=(2, 2, 3, 3),
                alpha=(),
            ),
        ),
        **at(U + "down_blocks_0_resnets_0_time_emb_proj", dense(lokr_w1=(4, 8), lokr_w2=(4, 8))),
    },
    "a model by itself": {
        **kohya("lycoris_lin", ((2, 6), (8, 2))),
        **at("lycoris_conv", dense(lokr_w1=(2, 2), lokr_w2_a=(3, 1), lokr_w2_b=(1, 18))),
        **at("lycoris_norm", dense(w_norm=(8,), b_norm=(8,))),
    },
    "a state dict": {
        **pair("lin", ((2, 6), (8, 2)), ".lora_A", ".lora_B", alpha=True),
        "lin.magnitude": (8, 1),
        **at("conv", dense(lokr_w1=(2, 2), lokr_w2_a=(3, 1), lokr_w2_b=(1, 18))),
        **pair("embed", ((2, 7), (6, 2)), ".lora_A", ".lora_B"),
        "norm.bias.diff": (8,),
    },
    "peft": {
        **pair("base_model.model.lin", ((2, 6), (8, 2)), ".lora_A.weight", ".lora_B.weight"),
        "base_model.model.lin.lora_magnitude_vector": (8,),
        **pair(
            "base_model.model.conv",
            ((2, 4, 3, 3), (6, 2, 1, 1)),
            ".lora_A.weight",
            ".lora_B.weight",
        ),
        **pair(
            "base_model.model.embed", ((2, 7), (6, 2)), ".lora_embedding_A", ".lora_embedding_B"
        ),
        **pair("base_model.model.attn", ((2, 8), (24, 2)), ".lora_A.weight", ".lora_B.weight"),
        "base_model.model.norm.modules_to_save.weight": (8,),
        "base_model.model.lin.base_layer.bias": (8,),
    },
}
ALONE = ("a model by itself", "a state dict", "peft")
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "alpha_pattern": {"lin": 5}}


@lru_cache
def seed_of(case: str) -> Tensors:
    """Returns the tensors of a correct file."""
    g = torch.Generator().manual_seed(0)
    tensors = {key: 0.1 * torch.randn(s, generator=g) for key, s in SHAPES[case].items()}
    return {key: t.abs() + 1 if key.endswith("alpha") else t for key, t in tensors.items()}


def save(path: Path, tensors: Tensors, header: Mapping[str, str] | None = None) -> Path:
    kept = {key: t.contiguous() for key, t in tensors.items()}
    path.write_bytes(safetensors.torch.save(kept, dict(header or {}) or None))
    return path


def save_case(
    folder: Path, case: str, tensors: Tensors, config: str | bytes = json.dumps(CONFIG)
) -> Path:
    if case != "peft":
        return save(folder / "mutant.safetensors", tensors)
    path = folder / "mutant"
    path.mkdir(exist_ok=True)
    encoded = config.encode("utf-8", "surrogatepass") if isinstance(config, str) else config
    (path / peft.CONFIG_NAME).write_bytes(encoded)
    save(path / peft.WEIGHTS_NAME, tensors)
    return path


@pytest.mark.parametrize("case", SHAPES)
def test_the_files_that_are_mutated_are_correct(
    case: str, folder: Path, net: Models, sd1: Models
) -> None:
    """What the mutations start from loads, whole: they are mutations of something."""
    path = save_case(folder, case, seed_of(case))
    assert loaded(net if case in ALONE else sd1, path)
    if case not in ALONE:
        assert opened(path) is not None


# --- bytes ----------------------------------------------------------------------------------------


@st.composite
def broken_bytes(draw: st.DrawFn) -> bytes:
    """Bytes of no file, or of a correct one cut, changed, stretched, or with a lie of a length."""
    good = safetensors.torch.save(seed_of(draw(st.sampled_from(["kohya", "diffusers"]))))
    (length,) = struct.unpack("<Q", good[:8])
    kind = draw(st.sampled_from(["random", "cut", "change", "insert", "length", "head"]))
    if kind == "random":
        return draw(st.binary(max_size=300))
    if kind == "cut":
        places = st.sampled_from([0, 1, 7, 8, 9, length + 7, length + 8, len(good) - 1])
        return good[: draw(places | st.integers(0, len(good)))]
    if kind == "length":
        lies = st.sampled_from([0, 1, 2, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1, len(good)])
        lie = draw(lies | st.integers(length - 9, length + 9) | st.integers(0, 2**64 - 1))
        return struct.pack("<Q", lie) + good[8:]
    start = draw(st.integers(0, length + 8 if kind != "change" else len(good) - 1))
    if kind == "head":
        return good[:8] + draw(st.binary(max_size=40)) + good[start:]
    count = draw(st.integers(0, 8)) if kind == "insert" else 0
    new = draw(st.binary(min_size=1, max_size=8))
    return good[:start] + new + good[start + (len(new) if not count else 0) :]


@given(broken_bytes())
@examples(200)
def test_any_bytes(folder: Path, sd1: Models, data: bytes) -> None:
    """Random bytes, cuts, flips and lying lengths: refused by the file's name, or read whole."""
    path = folder / "bytes.safetensors"
    path.write_bytes(data)
    if opened(path) is not None:
        loaded(sd1, path)


JSONS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.sampled_from(["", "F32", "lora", "é\0", "(", 10**400]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["r", "lin", "shape", "(a+)+$", ""]), inner, max_size=3)
    ),
    max_leaves=5,
)
SIZES = st.sampled_from([0, 1, 2, 3, 16, -1, 2**31, 2**32, 2**62, 2**63, 2**64 - 1, 2**64, 1.5])
DTYPES = st.sampled_from(
    "F32 F16 BF16 F64 F8_E4M3 F8_E5M2 F8_E8M0 F4 F6_E2M3 I64 U16 U64 C64 BOOL f32 X".split()
)


@st.composite
def broken_headers(draw: st.DrawFn) -> bytes:
    """A correct file's header with entries that lie about dtype, shape and place."""
    good = safetensors.torch.save(seed_of("kohya"))
    (length,) = struct.unpack("<Q", good[:8])
    table, body = json.loads(good[8 : 8 + length]), good[8 + length :]
    for _ in range(draw(st.integers(1, 3))):
        entry = table[draw(st.sampled_from(sorted(table)))]
        if not isinstance(entry, dict):
            continue
        field = draw(st.sampled_from(["dtype", "shape", "data_offsets", "new", "gone", "twin"]))
        if field == "dtype":
            entry["dtype"] = draw(DTYPES | JSONS)
        elif field == "shape":
            entry["shape"] = draw(st.lists(SIZES, max_size=6) | JSONS)
        elif field == "data_offsets":
            places = st.integers(-9, len(body) + 9) | SIZES
            entry["data_offsets"] = draw(st.lists(places, max_size=3) | JSONS)
        elif field == "new":
            entry[draw(st.sampled_from(["x", "dtypes", ""]))] = draw(JSONS)
        elif field == "gone":
            entry.pop(draw(st.sampled_from(sorted(entry) or [""])), None)
        else:  # the same bytes under two names
            table[draw(st.sampled_from(["twin", "lora_unet_conv_in.diff"]))] = dict(entry)
    if draw(st.integers(0, 3)) == 0:
        table["__metadata__"] = draw(JSONS)
    if draw(st.integers(0, 9)) == 0:
        table = draw(JSONS)
    text = json.dumps(table).encode()
    damage = draw(st.sampled_from(["none"] * 6 + ["utf-8", "deep", "same key", "blank"]))
    if damage == "utf-8":
        text = text.replace(b"lora", draw(st.sampled_from([b"\xff\xfe", b"\xc3", b"\\ud800"])), 1)
    elif damage == "deep":
        many = draw(st.sampled_from([100, 10_000, 200_000]))
        text = b'{"a":' * many + b"1" + b"}" * many
    elif damage == "same key":
        text = text.replace(b"lora_down", b"lora_up")
    elif damage == "blank":
        text = b" " * 9 + text + b"\0"
    return struct.pack("<Q", len(text)) + text + body


@given(broken_headers())
@examples(250)
def test_any_header(folder: Path, sd1: Models, data: bytes) -> None:
    """Wrong dtypes, shapes and offsets, twins, nesting, metadata of another kind: as above."""
    path = folder / "header.safetensors"
    path.write_bytes(data)
    if opened(path) is not None:
        loaded(sd1, path)


# --- keys and tensors -----------------------------------------------------------------------------

ENDS = (
    "lora_A.weight lora_B.weight lora_down.weight lora_up.weight lora_mid.weight alpha diff diff_b "
    "dora_scale hada_w1_a hada_t1 lokr_w1 lokr_t2 lokr_w2_b w_norm b_norm magnitude lora_A lora_B "
    "lora_magnitude_vector lora_magnitude_vector.weight lora_A.default.weight lora_embedding_A "
    "lora.down.weight processor.to_q_lora.up.weight weight bias base_layer.weight oft_blocks "
    "original_module.weight modules_to_save.weight hada_x start_A"
).split()
STARTS = (
    "unet. text_encoder. text_encoder_2. lora_unet_ lora_te_ lora_te1_ lora_te2_ lycoris_ "
    "base_model.model. diffusion_model. transformer. model."
).split()
DTYPES_OF_TORCH = [
    *(torch.int64, torch.uint8, torch.uint16, torch.bool, torch.complex64, torch.float64),
    *(torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
]


def other_name(data: Data, key: str) -> str:
    """Returns a key near another: letters more, fewer, or others, another start or end."""
    kind = data.draw(st.sampled_from(["letter", "letter", "start", "end", "piece", "digits"]))
    place = data.draw(st.integers(0, len(key)))
    letters = data.draw(st.text("._01aABq\n é", max_size=3) | st.text(max_size=2))
    if kind == "letter":
        return key[:place] + letters + key[place + data.draw(st.integers(0, 2)) :]
    if kind == "start":
        rest = next((key[len(s) :] for s in STARTS if key.startswith(s)), key)
        return data.draw(st.sampled_from(STARTS)) + rest
    if kind == "end":
        stem = data.draw(st.sampled_from([key.partition(".")[0], key.rpartition(".")[0]]))
        return f"{stem}.{data.draw(st.sampled_from(ENDS))}"
    if kind == "digits":
        digits = data.draw(st.sampled_from(["9", "-1", "٣", "9" * 30, "9" * 5000]))
        return key.replace("0", digits, 1)
    start, end = sorted((place, data.draw(st.integers(0, len(key)))))
    return key[:start] + key[start:end] * data.draw(st.integers(0, 3)) + key[end:]


def other_tensor(data: Data, tensor: Tensor, is_alpha: bool) -> Tensor:
    """Returns a tensor of another shape or dtype, or with other values."""
    kind = data.draw(st.sampled_from(["shape", "dtype", "value"]))
    if kind == "shape":
        old = list(tensor.shape)
        cut = data.draw(st.integers(0, len(old)))
        shape = data.draw(
            st.lists(st.integers(0, 4), max_size=5)
            | st.sampled_from(
                [old[:cut], [*old, 1], [1, *old], old[::-1], [0, *old], [2, *old[1:]]]
            )
        )
        return torch.full(shape, 0.25)
    if kind == "dtype":
        return tensor.to(data.draw(st.sampled_from(DTYPES_OF_TORCH)))
    if not tensor.is_floating_point() or tensor.dtype.itemsize == 1:
        return tensor.clone()
    values = [float("nan"), float("inf"), -float("inf"), 0.0, -1.0, 1e38, 1e-40]
    value, changed = data.draw(st.sampled_from(values)), tensor.clone()
    if is_alpha or data.draw(st.booleans()):
        changed.fill_(value)
    elif changed.numel():
        changed.view(-1)[data.draw(st.integers(0, changed.numel() - 1))] = value
    return changed


def mutated(data: Data, tensors: Tensors) -> Tensors:
    """Returns a file's tensors with one to three of its keys dropped, renamed, or changed."""
    tensors = dict(tensors)
    for _ in range(data.draw(st.integers(1, 3))):
        if not tensors:
            break
        key = data.draw(st.sampled_from(sorted(tensors)))
        kind = data.draw(st.sampled_from(["drop", "rename", "copy", "change", "change", "foreign"]))
        if kind == "drop":
            del tensors[key]
        elif kind == "rename":
            tensors[other_name(data, key)] = tensors.pop(key).clone()
        elif kind == "copy":
            tensors[other_name(data, key)] = tensors[key].clone()
        elif kind == "change":
            tensors[key] = other_tensor(data, tensors[key], key.endswith("alpha"))
        else:
            other = seed_of(data.draw(st.sampled_from(sorted(SHAPES))))
            foreign = data.draw(st.sampled_from(sorted(other)))
            tensors[foreign] = other[foreign].clone()
    return {k.encode("utf-8", "replace").decode(): t for k, t in tensors.items()}


@pytest.mark.parametrize("case", SHAPES)
@given(st.data())
@examples(80)
def test_any_keys(case: str, folder: Path, net: Models, sd1: Models, data: Data) -> None:
    """Keys dropped, renamed, doubled, of another format, tensors of other shapes, dtypes and
    values: refused by name, or every tensor of the file is in the models, and every ΔW finite."""
    path = save_case(folder, case, mutated(data, seed_of(case)))
    if case not in ALONE:
        opened(path)
    loaded(net if case in ALONE else sd1, path)


@pytest.mark.parametrize("case", ["kohya", "diffusers", "a state dict"])
@given(st.data())
@examples(25)
def test_any_pickled_keys(case: str, folder: Path, net: Models, sd1: Models, data: Data) -> None:
    """The same of pickled files, whole and cut or changed in a byte."""
    path = folder / "mutant.bin"
    torch.save(mutated(data, seed_of(case)), path)
    if data.draw(st.booleans()):
        good = path.read_bytes()
        place = data.draw(st.integers(0, len(good) - 1))
        rest = data.draw(st.sampled_from([b"", good[place + 1 :], b"\0" + good[place:]]))
        path.write_bytes(good[:place] + rest)
    if case not in ALONE:
        opened(path)
    loaded(net if case in ALONE else sd1, path)


# --- configurations -------------------------------------------------------------------------------

PATTERNS = st.sampled_from(
    ["lin", ".*", "(", "[", "(a+)+$", "(.*)*x", "(?x:(.+) +)x", "a{99999999999}", "(((" * 300]
    + [
        "(.*.*.*.*.*)*x",
        "(.|.)+x",
        "(.?.?.?.?)" * 9 + "x",
        "(a|b|)" * 40,
        "(?i)lin",
        "\\1",
        "((?R))",
    ]
    + [".*a.*a.*a.*ax", "^lin$", "", "\\", "text_model.*q_proj", "conv_in"]
)
FIELDS = "r r r lora_alpha lora_alpha use_rslora init_lora_weights peft_type alpha x".split()
NUMBERS = st.sampled_from([0, 1, 2, -1, True, "2", "x", None, 1e-300, 1e300, 10**400, [2], {}])


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """A peft configuration with some of its values of any kind."""
    config: dict[str, Any] = dict(CONFIG)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(FIELDS))
        config[name] = draw(NUMBERS | st.floats() | JSONS)
    for name in ("rank_pattern", "alpha_pattern"):
        if draw(st.booleans()):
            config[name] = draw(st.dictionaries(PATTERNS, NUMBERS, max_size=3) | JSONS)
    for name in draw(st.sets(st.sampled_from(sorted(config)), max_size=2)):
        del config[name]
    return config


LONG = "lin" + "a" * 60
DEEP = "[" * 100_000


@given(configs(), st.sampled_from(["", "", "", DEEP, "{", "\ud800", "[]", "null"]), st.booleans())
@examples(150)
def test_any_peft_configuration(
    folder: Path, net: Models, config: dict[str, Any], text: str, long: bool
) -> None:
    """Numbers, patterns and tables of any kind in adapter_config.json, patterns too that would
    keep Python's matcher busy for centuries: an error or a finite load, within a second."""
    tensors = seed_of("peft")
    if long:  # a name that such patterns take for ever on
        tensors = {key.replace("lin", LONG): value for key, value in tensors.items()}
    path = save_case(folder, "peft", tensors, text or json.dumps(config))
    start = time.monotonic()
    loaded(net, path)
    assert time.monotonic() - start < 5


@given(
    st.dictionaries(st.sampled_from(["unet", "text_encoder", ""]), configs(), max_size=2),
    st.sampled_from(["", "", "", DEEP, "{", "[]", "null", "1" * 5000]),
)
@examples(100)
def test_any_configuration_in_a_header(
    folder: Path, sd1: Models, tables: dict[str, dict[str, Any]], text: str
) -> None:
    """The same of a safetensors header's `lora_adapter_metadata`, which diffusers writes."""
    flat = {f"{c}.{name}": value for c, table in tables.items() for name, value in table.items()}
    header = {diffusers.HEADER_KEY: text or json.dumps(flat)}
    path = save(folder / "header.safetensors", seed_of("diffusers"), header)
    start = time.monotonic()
    lora = opened(path)
    assert loaded(sd1, path) == (lora is not None)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    "pattern", ["to_q", "a.to_q", ".*to_q", "(to_q|c)", r"b\.c", "x", "", "a.b"]
)
def test_a_pattern_means_what_it_means_in_peft(pattern: str) -> None:
    """The guarded match is the expression that peft itself uses, on names near and far."""
    for name in ("to_q", "a.to_q", "ato_q", "a.b.c", "b.c", "c", "a.b", "to_q.0", "x"):
        theirs = re.match(rf"(.*\.)?({pattern})$", name) is not None
        assert peft._fits(pattern, name) == theirs


# --- pickles --------------------------------------------------------------------------------------


class Payload:
    """What runs code of its choice when a pickle of it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("end", [".bin", ".pt", ".pth", ".ckpt"])
@pytest.mark.parametrize("kind", ["torch", "torch of old", "pickle", "protocol 0"])
def test_code_in_a_pickle_is_not_run(kind: str, end: str, tmp_path: Path, sd1: Models) -> None:
    """A pickle that would run a command, beside good tensors: not opened, and it says so; no
    advice from torch to open it all the same."""
    marker, path = tmp_path / "marker", tmp_path / f"file{end}"
    found: dict[str, Any] = {**seed_of("kohya"), "payload": Payload(marker)}
    if kind.startswith("torch"):
        torch.save(found, path, _use_new_zipfile_serialization=kind == "torch")
    else:
        path.write_bytes(
            pickle.dumps(Payload(marker), protocol=0 if kind == "protocol 0" else None)
        )
    for read in (lambda: open_lora(path), lambda: sd_lora.load_adapter(sd1, path)):
        with pytest.raises(sd_lora.UsageError, match="was not opened") as refusal:
            read()
        assert "weights_only" not in str(refusal.value)
    assert not marker.exists()
    assert not adapted_layers(sd1["unet"])


def test_a_state_dict_within_a_pickle_is_read(tmp_path: Path, sd1: Models) -> None:
    """`{"state_dict": …}` with other things beside it is the tensors; tensors beside it are not
    passed over."""
    tensors = seed_of("kohya")
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "file.pt")
    lora = opened(tmp_path / "file.pt")
    assert lora is not None
    assert sorted(lora.file) == sorted(tensors)
    assert loaded(sd1, tmp_path / "file.pt")
    torch.save({"state_dict": tensors, "lora_unet_x.alpha": torch.ones(())}, tmp_path / "file.pt")
    with pytest.raises(sd_lora.UsageError, match="lora_unet_x.alpha"):
        open_lora(tmp_path / "file.pt")


def endless() -> dict[str, Any]:
    found: dict[str, Any] = {}
    found["state_dict"] = found
    return found


class Greedy:
    """What asks for ten terabytes when a pickle of it is read."""

    def __reduce__(self) -> Any:
        return bytearray, (10**13,)


def ones() -> Tensor:
    return torch.ones(2, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: [ones()], "by positions, and a position is missing"),
        (lambda: {"a": {"b": ones()}}, "'a', a dict and no tensor"),
        (lambda: {"state_dict": {"a": {"b": ones()}}}, "'a', a dict and no tensor"),
        (lambda: {1: ones()}, "holds 1"),
        (dict, "no tensors"),
        (lambda: collections.OrderedDict(a=3), "no tensors"),
        (endless, "'state_dict', a dict and no tensor"),
        (lambda: {"a": Greedy()}, "more memory than there is"),
        (lambda: {"a": ones().to_sparse()}, "'a' is sparse, quantised"),
        (lambda: {"a": torch.ones(1).expand(10**6, 10**7)}, "without values of its own"),
        (lambda: {"a": torch.ones(2, device="meta")}, "without values of its own"),
        (lambda: {"conv_in": ones()}, "is no LoRA that can be read"),
    ],
)  # fmt: skip
def test_pickles_of_other_things(make: Callable[[], Any], message: str, tmp_path: Path) -> None:
    """Lists, tables within tables, one that holds itself, tensors without values: each refused by
    name, at once."""
    torch.save(make(), tmp_path / "file.bin")
    with pytest.raises(OURS, match=message) as refusal:
        open_lora(tmp_path / "file.bin")
    assert "file.bin" in str(refusal.value)


def test_a_pickle_that_unpacks_to_far_more_is_not_opened(tmp_path: Path) -> None:
    """A zip of 20 KB that would become 20 MB of zeros is refused by name; weights that somebody
    zipped anew, with compression, are read."""
    plain, path = tmp_path / "plain.pt", tmp_path / "file.pt"
    for tensors in ({"a": torch.zeros(5 * 2**20)}, seed_of("kohya")):
        torch.save(tensors, plain)
        with (
            zipfile.ZipFile(plain) as archive,
            zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as again,
        ):
            for name in archive.namelist():
                again.writestr(name, archive.read(name))
        if "a" in tensors:
            with pytest.raises(sd_lora.UsageError, match=r"file\.pt was not opened: its \d+ bytes"):
                open_lora(path)
    assert sorted(open_lora(path).file) == sorted(tensors)


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", "hello")
    return file.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize("end", [".bin", ".safetensors"])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", ""),
        (b"hello, this is a text\n", ""),
        (b"<!DOCTYPE html><html>404</html>", ""),
        (zipped(), ""),
        (b"PK\5\6" + bytes(18), ""),
        (bytes(1000), ""),
        (POINTER, "git lfs pull"),
    ],
)
def test_files_of_other_kinds(data: bytes, message: str, end: str, tmp_path: Path) -> None:
    """Nothing, text, a web page, a zip, zeros, a git-lfs pointer: refused by the file's name."""
    path = tmp_path / f"file{end}"
    path.write_bytes(data)
    with pytest.raises(sd_lora.UsageError, match=message) as refusal:
        open_lora(path)
    assert str(path) in str(refusal.value)


@pytest.mark.parametrize("end", [".bin", ".safetensors"])
@pytest.mark.parametrize("kind", ["fifo", "loop", "missing", "long", "folder", "socket of zeros"])
def test_paths_that_are_no_files(kind: str, end: str, tmp_path: Path, net: Models) -> None:
    """A pipe that nobody writes to, a link to itself, nothing, a name beyond the system's limit, a
    folder of nothing, a device without an end: errors at once."""
    path = tmp_path / f"file{end}"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "long":
        path = tmp_path / ("x" * 300 + end)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket of zeros":
        path.symlink_to("/dev/zero")
    for read in (open_lora, lambda path: sd_lora.load_adapter(net, path)):
        with pytest.raises(sd_lora.UsageError) as refusal:
            read(path)
        assert str(path) in str(refusal.value)


# --- what the examples above found ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (LOHA | {"hada_t1": (2, 2, 3, 3)}, "hada_t1 and hada_t2 come in pairs"),
        ({"lokr_w1": (4, 4), "lokr_w2": (4, 4), "lokr_t2": (2, 2, 3, 3)}, "lokr_t2 comes with"),
        (LOKR | {"dora_scale": (7, 3)}, r"a magnitude of \(7, 3\)"),
        (LOKR | {"dora_scale": ()}, "one number for the whole weight"),
        (LOKR | {"alpha": (2,)}, "and not one number"),
        ({"lora_down.weight": (0, 16), "lora_up.weight": (16, 0)}, r"lora_[AB] is empty"),
        ({"lora_down.weight": (2, 16), "lora_up.weight": (16, 3)}, "of different ranks"),
        ({"lora_down.weight": (2,), "lora_up.weight": (16, 2)}, r"lora_A \(2,\), lora_B \(16, 2\)"),
    ],
)
def test_parts_that_are_passed_over_by_no_one(
    tensors: dict[str, tuple[int, ...]], message: str, tmp_path: Path
) -> None:
    """A core without its pair, a magnitude of no axis, an alpha of two numbers, a rank of 0: each
    is an error, though ΔW could be computed without it."""
    made = {key: torch.ones(shape) for key, shape in at(U + KOHYA_Q, tensors).items()}
    with pytest.raises(sd_lora.UsageError, match=message):
        open_lora(save(tmp_path / "file.safetensors", made)).check()


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("lin.lora_A.weight", (2, 6), "by two names"),
        ("base_model.model.lin.lora_embedding_A", (2, 6), "by two names"),
        ("base_model.model.lin.lora_magnitude_vector.weight", (8,), "by two names"),
        ("base_model.model.lin.weight", (8, 6), "both whole and as a delta"),
        ("base_model.model.attn.in_proj_weight", (24, 8), "both whole and as a delta"),
        ("base_model.model.norm.weight", (8,), "by two names"),
        ("base_model.model.attn.weight", (8,), "which the model has not"),
        ("base_model.model.norm.original_module.shift", (8,), "shift"),
    ],
)
def test_peft_keys_that_mean_the_same(
    key: str, shape: tuple[int, ...], message: str, tmp_path: Path, net: Models
) -> None:
    """Two keys of one tensor, or a module that is there whole and updated: neither is dropped."""
    path = save_case(tmp_path, "peft", seed_of("peft") | {key: torch.ones(shape)})
    with pytest.raises(sd_lora.UsageError, match=message):
        sd_lora.load_adapter(net, path)
    assert not adapted_layers(net[""])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1j, 3])
def test_whole_modules_of_peft_that_are_no_numbers(
    bad: complex, tmp_path: Path, net: Models
) -> None:
    """NaN, infinity, complex numbers and integers in a module that is saved whole, too."""
    tensors = seed_of("peft")
    key = "base_model.model.norm.modules_to_save.weight"
    path = save_case(tmp_path, "peft", tensors | {key: torch.full((8,), bad)})
    with pytest.raises(sd_lora.UsageError, match="norm.* holds"):
        sd_lora.load_adapter(net, path)


def test_numbers_too_large_for_their_product(tmp_path: Path) -> None:
    """Factors that are finite and whose product is not: an error, by the module's name."""
    tensors = {key: torch.full_like(t, 1e30) for key, t in seed_of("kohya").items()}
    with pytest.raises(sd_lora.UsageError, match="so large that ΔW would be infinite"):
        open_lora(save(tmp_path / "file.safetensors", tensors)).check()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float64])
def test_factors_of_other_widths_are_read(dtype: torch.dtype, tmp_path: Path, sd1: Models) -> None:
    """8-bit and 64-bit factors, also beside 32-bit ones, are the numbers that they are."""
    tensors = {k: t.to(dtype) if "up" in k else t for k, t in seed_of("kohya").items()}
    path = save(tmp_path / "file.safetensors", tensors)
    assert opened(path) is not None
    assert loaded(sd1, path)
