"""What needs a card, without one: on a CUDA device whose kernels are the CPU's (`tests.card`)."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.launch
@pytest.mark.skipif(torch.cuda.is_available(), reason="the tests themselves have a card")
@pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch has a device of its own")
@pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("g++"), reason="g++ compiles the device on Linux"
)
def test_what_needs_a_card_passes_on_the_cpus_kernels() -> None:
    """All tests that need a CUDA device, but for those of its speed, pass in a process that has one
    whose kernels are the CPU's, and none is left out."""
    # those files alone: to collect all tests takes ten seconds
    files = [str(p) for p in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in p.read_text()]
    command = ["-q", "-m", "gpu and not fast_gpu", "--tb=short", "--show-capture=no", *files]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "tests.card", *command], cwd=ROOT, env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
    last = done.stdout.strip().splitlines()[-1]
    found = re.search(r"(\d+) passed", last)
    assert found, last
    assert int(found[1]) >= 35
    assert "skipped" not in last
