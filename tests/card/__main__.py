"""pytest, or a module or script after --run, in a process that has the card:

python -m tests.card -m gpu
python -m tests.card --run sd_lora train …
python -m tests.card --run benchmarks/peak.py
"""

import runpy
import sys
from pathlib import Path

from tests.card.device import plugged_in

if __name__ == "__main__":
    plugged_in(Path(__file__).parents[2] / ".pytest_cache" / "card")
    if sys.argv[1:2] == ["--run"]:
        sys.argv[:] = sys.argv[2:]
        run = runpy.run_path if sys.argv[0].endswith(".py") else runpy.run_module
        run(sys.argv[0], run_name="__main__")
    else:
        import pytest

        sys.exit(pytest.main(["-p", "no:cacheprovider", *sys.argv[1:]]))
