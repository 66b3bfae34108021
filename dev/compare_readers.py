"""Do ComfyUI, A1111 and Forge take our files, and does `inspect` say of each what it does?

    python dev/compare_readers.py --comfyui DIR --a1111 DIR --forge DIR          # prints the table
    python dev/compare_readers.py … --case sdxl                                  # some of the cases

The folders are checkouts of the programs, fetched by you; only their LoRA code runs, on a CPU, over
models of the published structure and tiny width (`reader_worlds`). Each file is loaded by each
program, and ΔW of every module compared with the trained one. A module is exact within 1e-4 of its
ΔW. Where the modules that `inspect` counts as lost are others than those that are, the case is
printed, and the exit code is 1. The table is that of docs/files.md.
"""

import argparse
import contextlib
import io
import logging
import re
import sys
import tempfile
import types
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from reader_worlds import World, import_comfyui, stub
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sd_lora
from sd_lora.adapters.inject import deltas_of
from sd_lora.formats.canonical import canonical_name, read_models
from sd_lora.formats.lora_file import open_lora
from sd_lora.formats.programs import untaken
from sd_lora.models.families import FAMILIES
from sd_lora.models.meta_pipeline import MetaPipeline

Place = tuple[str, str]
Got = dict[Place, Tensor]
EXACT = 1e-4


# --- the programs ---------------------------------------------------------------------------------


def by_comfyui(world: World, path: Path, wanted: dict[Place, Tensor]) -> Got:
    """Place → ΔW as ComfyUI applies it."""
    import comfy.lora
    import comfy.lora_convert

    tensors = comfy.lora_convert.convert_lora(load_file(path))
    names = comfy.lora.model_lora_keys_unet(world.comfy_unet, {})
    names = comfy.lora.model_lora_keys_clip(world.comfy_text, names)
    patches = comfy.lora.load_lora(tensors, names, log_missing=False)
    state, changed = world.comfy_state(), {}
    for key, patch in patches.items():
        if key in state:
            one = [(1.0, patch, 1.0, None, None)]
            changed[key] = comfy.lora.calculate_weight(one, state[key].clone(), key) - state[key]
    return _by_comfy_keys(world, changed, wanted)


def _by_comfy_keys(world: World, changed: dict[str, Tensor], wanted: dict[Place, Tensor]) -> Got:
    got = {}
    for component, name in wanted:
        key = world.comfy_key(component, _parameter(world, component, name))
        if key in changed:
            got[component, name] = changed[key]
    return got


def _parameter(world: World, component: str, name: str) -> str:
    """The live parameter of a canonical delta name."""
    names = dict(world.models[component].named_parameters())
    live = {canonical_name(component, n.removesuffix(".weight")): n for n in names}
    return live[name]


def import_a1111(folder: Path) -> None:
    """Import A1111's LoRA code, with stubs for the rest of the web UI."""
    sys.path.insert(0, str(folder / "extensions-builtin" / "Lora"))

    class Anything:
        def __init__(self, *_: object, **__: object) -> None: ...
        def __iter__(self) -> Iterator[object]:
            return iter(())

        def __getattr__(self, name: str) -> Any:
            return Anything()

        def __call__(self, *_: object, **__: object) -> Any:
            return Anything()

    stub("modules")
    options = types.SimpleNamespace(lora_dir=str(folder), lyco_dir_backcompat=str(folder))
    none = lambda *_, **__: []  # noqa: E731
    stub("modules.shared", opts=Anything(), sd_model=None, cmd_opts=options, walk_files=none)
    cpu = torch.device("cpu")
    stub("modules.devices", cpu=cpu, device=cpu, dtype=torch.float32, torch_gc=lambda: None)
    stub("modules.sd_models", read_state_dict=load_file)
    stub("modules.errors", display=lambda *_: None)
    stub("modules.sd_hijack", model_hijack=Anything())
    for name in ("scripts", "textual_inversion", "textual_inversion.textual_inversion"):
        stub(f"modules.{name}")
    stub("modules.models")
    stub("modules.models.sd3")
    stub("modules.models.sd3.mmdit", QkvLinear=type("QkvLinear", (nn.Linear,), {}))
    stub("modules.cache")
    stub("modules.hashes")
    stub("modules.patches", patch=lambda *_: None, undo=lambda *_: None)
    stub("lora_logger", logger=logging.getLogger("lora"))
    import networks  # noqa: F401


def by_a1111(world: World, path: Path, wanted: dict[Place, Tensor]) -> Got | None:
    """Place → ΔW as A1111 applies it; None for a file that it refuses."""
    import networks

    networks.shared.sd_model = world.a1111
    networks.assign_network_names_to_compvis_modules(world.a1111)
    try:
        net = networks.load_network("x", types.SimpleNamespace(filename=str(path), name="x"))
    except Exception:  # the web UI shows it and goes on without the file
        return None
    net.te_multiplier = net.unet_multiplier = 1.0
    net.dyn_dim = None
    networks.loaded_networks[:] = [net]
    networks.extra_network_lora = types.SimpleNamespace(errors={})
    changed: dict[tuple[str, str], Tensor] = {}
    classes = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm, nn.MultiheadAttention)
    inner = torch.nn.modules.linear.NonDynamicallyQuantizableLinear  # attention's, never called
    for name, module in world.a1111.network_layer_mapping.items():
        if not isinstance(module, classes) or isinstance(module, inner):
            continue
        before = {n: p.detach().clone() for n, p in module.named_parameters()}
        module.network_current_names = ()
        for backup in ("network_weights_backup", "network_bias_backup"):
            module.__dict__.pop(backup, None)
        with torch.no_grad():
            networks.network_apply_weights(module)
            for n, p in module.named_parameters():
                if not torch.equal(p, before[n]):
                    changed[name, n] = p.detach() - before[n]
                    p.copy_(before[n])
    return {p: t for p in wanted if (t := _in_a1111(world, changed, *p)) is not None}


def _in_a1111(
    world: World, changed: dict[tuple[str, str], Tensor], component: str, name: str
) -> Tensor | None:
    parameter = _parameter(world, component, name)
    own = world.where[component].get(parameter)
    if own is None or own.startswith("text_projection"):
        return None
    module, _, kind = own.rpartition(".")
    flat = module.replace(".", "_")
    if component == "unet":
        return changed.get((f"diffusion_model_{flat}", kind))
    number = {"sd1": "", "sd2": "", "sdxl_refiner": "0_"}.get(world.family)
    if number is None:
        number = "0_" if component == "text_encoder" else "1_"
    if world.prefixes[component] == "clip_l":
        return changed.get((f"{number}transformer_{flat}", kind))
    match = re.search(r"layers\.(\d+)\.(\w+)\.(\w+)$", module)
    if match is None:
        return None
    layer, part, last = match.groups()
    stem = f"{number}model_transformer_resblocks_{layer}"
    if part == "mlp":
        return changed.get((f"{stem}_mlp_{ {'fc1': 'c_fc', 'fc2': 'c_proj'}[last] }", kind))
    if last == "out_proj":
        return changed.get((f"{stem}_attn", f"out_proj.{kind}"))
    packed = changed.get((f"{stem}_attn", f"in_proj_{kind}"))
    return None if packed is None else packed.chunk(3)["qkv".index(last[0])]


def import_forge(folder: Path) -> None:
    """Import Forge's LoRA code, with stubs for its memory management."""
    sys.path.insert(0, str(folder))
    stub("backend")
    move = lambda tensor, device, dtype, copy=False: tensor.to(dtype)  # noqa: E731
    stub("backend.memory_management", cast_to_device=move)
    stub("backend.utils")
    stub("backend.operations")
    sys.modules["backend"].__path__ = [str(folder / "backend")]
    import backend.patcher.lora  # noqa: F401


def by_forge(world: World, path: Path, wanted: dict[Place, Tensor]) -> Got | None:
    """Place → ΔW as Forge applies it; None for a file that it puts aside."""
    from backend.patcher import lora

    net = world.comfy_unet
    net.diffusion_model.config = dict(world.settings)
    net.config = types.SimpleNamespace(huggingface_repo="")
    tensors = load_file(path)
    unet, rest = lora.load_lora(tensors, lora.model_lora_keys_unet(net, {}))
    text, rest = lora.load_lora(rest, lora.model_lora_keys_clip(world.comfy_text, {}))
    if len(rest) > 12:  # as in sd_forge_lora/networks.py
        return None
    state, changed = world.comfy_state(), {}
    for key, patch in {**unet, **text}.items():
        if key in state:
            one = [(1.0, patch, 1.0, None, None)]
            with contextlib.suppress(Exception):  # Forge prints it
                merged = lora.merge_lora_to_weight(one, state[key].clone(), key)
                changed[key] = merged - state[key]
    return _by_comfy_keys(world, changed, wanted)


READERS: dict[str, Callable[[World, Path, dict[Place, Tensor]], Got | None]] = {
    "ComfyUI": by_comfyui,
    "A1111": by_a1111,
    "Forge": by_forge,
}


# --- the cases ------------------------------------------------------------------------------------

PRESETS: dict[str, tuple[dict[str, Any], bool]] = {
    "attention": ({"targets": "attention"}, False),
    "transformer+conv": ({"targets": "transformer+conv"}, False),
    "all": ({"targets": "all"}, False),
    "text": ({"targets": "text"}, True),
}
METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {"rank": 4, "alpha": 2},
    "DoRA": {"rank": 4, "rule": "decompose"},
    "LoHa": {"rank": 4, "method": "loha", "alpha": 2},
    "LoKr": {"rank": 4, "method": "lokr", "alpha": 2},
    "full": {"method": "full"},
}


@dataclass(frozen=True)
class Case:
    """An adapter and the way in which its file is written. rename: changes the file's keys."""

    family: str
    name: str
    options: dict[str, Any]
    is_text: bool = False
    channels: int = 4
    format: str = ""
    rename: Callable[[str], str] | None = None


def table_cases() -> list[Case]:
    return [
        Case(family, f"{preset} {method}", {**options, **targets}, is_text)
        for family in FAMILIES
        for preset, (targets, is_text) in PRESETS.items()
        for method, options in METHODS.items()
    ]


def _orig_mod(key: str) -> str:
    return re.sub(
        r"^(lora_unet_|unet\.)", r"\1_orig_mod" + ("_" if "lora_unet" in key else "."), key
    )


def special_cases() -> Iterator[Case]:
    """Files whose readers differ: parts of attentions, biases, norms, cores, other names."""
    attention = {"targets": "attention+conv", "rank": 4}
    for family in FAMILIES:
        some = {"targets": ".*(q_proj|v_proj)", "rank": 4}
        yield Case(family, "text q, v", some, True)
        yield Case(family, "text mlp", {"targets": ".*fc[12]", "rank": 4}, True)
        yield Case(family, "inpainting", {"targets": "all", "rank": 4}, channels=9)
        yield Case(family, "biases", attention | {"train_bias": "lora_only"})
        yield Case(
            family, "norms", {"targets": "attention", "rank": 4, "modules_to_save": ["norm"]}
        )
        for method in ("lora", "loha", "lokr"):
            cores = {"targets": "conv", "rank": 2, "alpha": 1, "method": method, "tucker": True}
            yield Case(family, f"cores {method}", cores)
        both = {"method": "lokr", "factor": 4, "decompose_both": True, "rank": 2}
        yield Case(family, "lokr both", {"targets": "transformer+conv"} | both)
        yield Case(family, "loha dora", attention | {"method": "loha", "rule": "decompose"})
        yield Case(family, "peft keys", attention, format="diffusers")
        yield Case(
            family, "peft keys text", {"targets": "text", "rank": 4}, True, format="diffusers"
        )
        yield Case(family, "compiled", attention, rename=_orig_mod)
        yield Case(family, "compiled peft", attention, format="diffusers", rename=_orig_mod)
        default = lambda key: re.sub(r"(lora_[AB])", r"\1.default", key)  # noqa: E731
        yield Case(family, "default", attention, format="diffusers", rename=default)
        lycoris = lambda key: key.replace("lora_unet_", "lycoris_")  # noqa: E731
        yield Case(family, "lycoris_", attention, rename=lycoris)
        doubled = lambda key: f"unet.{key}"  # noqa: E731
        yield Case(family, "unet.unet.", attention, format="diffusers", rename=doubled)
        te = lambda key: re.sub(r"^lora_te\d?_", "lora_te_", key)  # noqa: E731
        yield Case(family, "lora_te_ names", {"targets": "text", "rank": 4}, True, rename=te)
        te1 = lambda key: re.sub(r"^lora_te\d?_", "lora_te1_", key)  # noqa: E731
        if family != "sdxl":
            yield Case(family, "lora_te1_ names", {"targets": "text", "rank": 4}, True, rename=te1)


def files_of(case: Case, world: World, folder: Path) -> tuple[Path, dict[Place, Tensor]]:
    """The file of a case, and place → ΔW."""
    models = world.encoders if case.is_text else {"unet": world.unet}
    if case.name == "lora_te_ names" and world.family == "sdxl":
        models = {"text_encoder": world.encoders["text_encoder"]}
    generator = torch.Generator().manual_seed(0)
    try:
        for model in models.values():
            sd_lora.inject(model, **case.options)
            for p in sd_lora.lora_layers(model):
                p.data += 0.05 * torch.randn(p.shape, generator=generator)
        wanted = _wanted(models)
        paths = sd_lora.save_adapter(models, folder, case.family, "n")
    finally:
        for model in models.values():
            sd_lora.eject(model)
    wish = "pytorch_lora" if case.format == "diffusers" else "n_"
    chosen = [path for path in paths if path.name.startswith(wish)] or paths
    if case.rename:
        with safe_open(chosen[0], "pt") as file:
            header = file.metadata()
        renamed = {case.rename(key): tensor for key, tensor in load_file(chosen[0]).items()}
        save_file(renamed, chosen[0], header)
    return chosen[0], wanted


@torch.no_grad()
def _wanted(models: dict[str, nn.Module]) -> dict[Place, Tensor]:
    wanted = {}
    read_models(models)
    for component, model in models.items():
        for name, delta in deltas_of(model).items():
            module, _, last = name.rpartition(".")
            layer = model.get_submodule(module if last in ("bias", "weight") else name)
            base: Any = getattr(layer, "base", layer)
            W = (base.bias if last == "bias" else base.weight).detach()
            wanted[component, canonical_name(component, name)] = delta.compose(W) - W
    return wanted


def exact_ones(got: Got | None, wanted: dict[Place, Tensor]) -> set[Place]:
    """The places whose ΔW is the trained one."""
    if got is None:
        return set()
    return {
        place
        for place, want in wanted.items()
        if place in got
        and got[place].shape == want.shape
        and (got[place] - want).norm() <= EXACT * want.norm()
    }


def measure(case: Case, world: World) -> dict[str, tuple[int, int, bool]]:
    """Program → exact modules, all of them, whether `inspect` says the same; prints where not."""
    with tempfile.TemporaryDirectory() as folder:
        path, wanted = files_of(case, world, Path(folder))
        base = MetaPipeline.of_models(world.models, FAMILIES[case.family])
        lora, found = open_lora(path, base.layout), {}
        for program, read in READERS.items():
            with contextlib.redirect_stdout(io.StringIO()):
                exact = exact_ones(read(world, path, wanted), wanted)
            held = {(c, name) for c, modules in lora.places.items() for name in modules}
            said = {*wanted} & held - untaken(program, lora, base)
            if said != exact:
                more, fewer = sorted(said - exact), sorted(exact - said)
                title = f"{case.family} {case.name}, {program}"
                print(f"{title}: inspect says {len(said)} exact, it is {len(exact)}; wrongly "
                      f"{more[:2]} {fewer[:2]}", flush=True)  # fmt: skip
            found[program] = len(exact), len(wanted), said == exact
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for program in ("comfyui", "a1111", "forge"):
        parser.add_argument(f"--{program}", type=Path, required=True, help="its checkout")
    parser.add_argument("--case", default="", help="pattern of the cases to run")
    args = parser.parse_args()
    import_comfyui(args.comfyui)
    import_a1111(args.a1111)
    import_forge(args.forge)
    cells: dict[tuple[str, str], dict[str, tuple[int, int, bool]]] = {}
    worlds: dict[tuple[str, int], World] = {}
    agree = True
    for case in [*table_cases(), *special_cases()]:
        if not re.search(args.case, f"{case.family} {case.name}"):
            continue
        key = case.family, case.channels
        if key not in worlds:
            worlds = {key: World(*key)}
        found = measure(case, worlds[key])
        cells[case.family, case.name] = found
        agree &= all(same for _, _, same in found.values())
        counts = ", ".join(f"{p} {exact}/{total}" for p, (exact, total, _) in found.items())
        print(f"{case.family:13} {case.name:28} {counts}", file=sys.stderr, flush=True)
    print("\n".join(table(cells)))
    return 0 if agree else 1


def table(cells: dict[tuple[str, str], dict[str, tuple[int, int, bool]]]) -> Iterator[str]:
    """The table of docs/files.md: exact modules of all, by program where they differ."""
    yield "| family | preset | " + " | ".join(METHODS) + " |"
    yield "|---|---|" + "---|" * len(METHODS)
    for family in FAMILIES:
        for preset in PRESETS:
            found = [cells.get((family, f"{preset} {method}")) for method in METHODS]
            if any(found):
                yield f"| {family} | {preset} | " + " | ".join(map(_cell, found)) + " |"


def _cell(found: dict[str, tuple[int, int, bool]] | None) -> str:
    if found is None:
        return "–"
    counts = {program: exact for program, (exact, _, _) in found.items()}
    total = next(iter(found.values()))[1]
    usual, _ = Counter(counts.values()).most_common(1)[0]
    others = [f"{program} {exact}" for program, exact in counts.items() if exact != usual]
    return ", ".join([f"{usual}/{total}", *others])


if __name__ == "__main__":
    sys.exit(main())
