"""Verdicts on other programs: what their own code did, measured by `dev/compare_readers.py`."""

import re
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sd_lora
from sd_lora.adapters.deltas import METHODS, Delta
from sd_lora.formats import adapter_files as files
from sd_lora.formats import inspect, verify
from sd_lora.formats.canonical import each
from sd_lora.formats.lora_file import open_lora
from sd_lora.formats.names import naming_of
from sd_lora.formats.programs import PROGRAMS, untaken
from sd_lora.formats.verify import shapes_of
from sd_lora.models.families import FAMILIES
from sd_lora.models.meta_pipeline import MetaPipeline
from tests.formats.trained import saved, trained

ATTENTION = r".*attn[12]\.to_(q|k|v|out\.0)"
CONV = r".*(resnets\.\d\.(conv1|conv2|conv_shortcut|time_emb_proj)|samplers\.0\.conv)"
BOTH = f"{ATTENTION}|{CONV}"
TEXT = r".*(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])"

CASES: dict[str, tuple[str, str, str, dict[str, object]]] = {
    "attention+conv": (BOTH, "lora", "", {}),
    "biases": (f"({BOTH})(\\.bias)?", "lora", "", {}),
    "cores lokr": (CONV, "lokr", "", {"tucker": True}),
    "peft keys": (BOTH, "lora", "unet.", {}),
    "lycoris_": (BOTH, "lora", "lycoris_", {}),
    "compiled": (BOTH, "lora", "lora_unet__orig_mod_", {}),
    "text": (TEXT, "lora", "", {}),
    "text q, v": (r".*self_attn\.(q|v)_proj", "lora", "", {}),
    "text peft keys": (TEXT, "lora", "unet.", {}),
    "text lora_te_": (TEXT, "lora", "lora_te_", {}),
    "text lora_te2_": (TEXT, "lora", "lora_te2_", {}),
}
"""Form → modules, method, beginning of its keys where they are others, options."""

FACTS = {
    ("sd1", "attention+conv"): (214, 214, 214),
    ("sd1", "biases"): (332, 214, 332),
    ("sd1", "cores lokr"): (36, 86, 36),
    ("sd1", "peft keys"): (86, 0, 0),
    ("sd1", "lycoris_"): (214, 0, 214),
    ("sd1", "compiled"): (0, 0, 0),
    ("sd1", "text q, v"): (24, 24, 24),
    ("sd1", "text peft keys"): (72, 0, 72),
    ("sd1", "text lora_te_"): (72, 72, 72),
    ("sd2", "text q, v"): (46, 0, 46),
    ("sd2", "text peft keys"): (138, 0, 138),
    ("sdxl", "text"): (264, 264, 264),
    ("sdxl", "text q, v"): (88, 24, 88),
    ("sdxl", "cores lokr"): (28, 66, 28),
    ("sdxl_refiner", "text"): (192, 0, 192),
    ("sdxl_refiner", "text lora_te2_"): (0, 0, 0),
    ("sdxl_refiner", "biases"): (612, 438, 612),
}
"""(Family, form) → exact modules in ComfyUI a125cd84, A1111 82a973c0 and Forge dfdcbab6."""


def written(family: str, case: str, folder: Path) -> Path:
    """A file of rank 1 in a form, of the published base's modules."""
    pattern, method, start, options = CASES[case]
    base = MetaPipeline.of_family(FAMILIES[family])
    adapter: dict[str, dict[str, Delta]] = {}
    for component in base.configs:
        if (component == "unet") == case.startswith("text"):
            continue
        for name, shape in shapes_of(component, base).items():
            if not re.fullmatch(pattern, name):
                continue
            cls = METHODS["full" if len(shape) == 1 else method]
            kernel = {k: v for k, v in options.items() if max(shape[2:], default=1) > 1}
            ones = {
                key: torch.ones_like(tensor)
                for key, tensor in cls.create(shape, 1, torch.Generator(), **kernel).items()
            }
            adapter.setdefault(component, {})[name] = cls(shape, ones)
    if start == "unet.":
        tensors = dict(files.DIFFUSERS.write(adapter, naming_of(family)))
    elif method == "lora":
        tensors = dict(files.LYCORIS.write(adapter, naming_of(family)))
    else:  # as it is, and not as our writer would have it
        tensors = {
            f"{naming_of(family).kohya(component, name)}.{kind}": tensor
            for component, name, delta in each(adapter)
            for kind, tensor in delta.tensors().items()
        }
    if start not in ("", "unet."):
        tensors = {re.sub(r"^lora_(unet|te\d?)_", start, k): t for k, t in tensors.items()}
    path = folder / "file.safetensors"
    save_file({key: tensor.detach().clone() for key, tensor in tensors.items()}, path)
    return path


@pytest.mark.parametrize(("family", "case"), FACTS)
def test_verdicts_are_the_facts(family: str, case: str, tmp_path: Path) -> None:
    """As many modules are said to be exact as the program's own code applied exactly."""
    base = MetaPipeline.of_family(FAMILIES[family])
    lora = open_lora(written(family, case, tmp_path))
    total = sum(len(modules) for modules in lora.places.values())
    said = [total - len(untaken(p, lora, base)) for p in PROGRAMS if p != "diffusers"]
    assert tuple(said) == FACTS[family, case]


@pytest.mark.parametrize("start", ["unet.unet.", "unet._orig_mod."])
def test_names_that_diffusers_lacks(start: str, tiny_sd1: Path, tmp_path: Path) -> None:
    """Files of scripts that add `unet.` twice or train a compiled model are read here, and said to
    be lost in diffusers, which raises, or leaves its parameters without a value."""
    base, unet = MetaPipeline.of_folder(str(tiny_sd1)), trained(tiny_sd1, text=False)
    path = saved(tmp_path / "a.safetensors", files.DIFFUSERS, unet, tiny_sd1)
    keys = {key.replace("unet.", start, 1): tensor for key, tensor in load_file(path).items()}
    save_file(keys, path, {"sd_lora_version": "0"})
    assert not inspect.inspect(path, base).problems
    assert re.match("refuses the file|leaves all", inspect.inspect(path, base).readers["diffusers"])
    with suppress(sd_lora.RunError):  # a parameter without a value
        _, wrong = verify.verify_file(path, base)
        assert any("was not loaded" in line for line in wrong)


def test_a_file_for_another_base_is_no_misfit(tiny_sd1: Path, tmp_path: Path) -> None:
    """Without its base a LoRA of unpublished widths has no verdict and no fault, but the question
    for --model, in inspect and in verify; with it, both are as for any."""
    base = MetaPipeline.of_folder(str(tiny_sd1))
    path = saved(tmp_path / "a.safetensors", files.KOHYA, trained(tiny_sd1), tiny_sd1)
    found = inspect.inspect(path)
    assert (found.problems, found.readers) == ([], {})
    assert "made for another base than the published ones" in found.notes[0]
    with pytest.raises(sd_lora.UsageError, match="another base.*give --model"):
        verify.verify_file(path, MetaPipeline.of_family(FAMILIES["sd1"]), is_given=False)
    assert inspect.inspect(path, base).readers["diffusers"] == "exact"
    assert verify.verify_file(path, base)[1] == []
