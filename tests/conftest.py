"""Shared by all tests: one thread, no hub, and tiny pipelines of the real classes."""

import gc
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, at the first product

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.tiny import build_pipeline

torch.set_num_threads(1)  # on two busy cores two threads make a step 100 times slower

ROOT = Path(__file__).parent.parent
LOADED = {"modules": 0}
"""The number of modules when the libraries' objects were last put aside."""


@pytest.fixture(scope="session")
def tiny_sd1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random SD1-like pipeline folder: 3 UNet levels, 64×64 images, 8×8 latents."""
    path = tmp_path_factory.mktemp("models") / "tiny-sd1"
    build_pipeline("sd1").save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_sd2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random SD2-like pipeline folder: linear projections, gelu text encoder, v-prediction."""
    path = tmp_path_factory.mktemp("models") / "tiny-sd2"
    build_pipeline("sd2").save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random SDXL-like pipeline folder: two text encoders, added conditions, 2 layers a block."""
    path = tmp_path_factory.mktemp("models") / "tiny-sdxl"
    build_pipeline("sdxl").save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Kind of pipeline of `tests.tiny.KINDS` → its folder, made when it is first asked for."""

    @cache
    def folder(kind: str) -> Path:
        path = tmp_path_factory.mktemp("models") / f"tiny-{kind}"
        build_pipeline(kind).save_pretrained(path)
        return path

    return folder


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of caches of all runs of the tests, in place of the user's; beside it the state
    folder."""
    path = tmp_path_factory.mktemp("caches")
    os.environ["SD_LORA_CACHE"] = str(path)
    os.environ["SD_LORA_STATE"] = str(tmp_path_factory.mktemp("state"))
    return path


@pytest.fixture(autouse=True)
def frozen_libraries() -> None:
    """Keep the objects of libraries out of the garbage collector's passes, as a command does
    (`sd_lora.imports.quick_imports`): they are a million and live as long as the process, and a
    pass over them took 0.4 of a tiny run's 1.6 s."""
    if len(sys.modules) > LOADED["modules"] + 50:
        gc.collect()
        gc.freeze()
        LOADED["modules"] = len(sys.modules)


@pytest.fixture
def root() -> Path:
    return ROOT


@pytest.fixture(autouse=True)
def fresh_accelerator() -> None:
    """Accelerate keeps its precision and device in a singleton: each test starts without one."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
