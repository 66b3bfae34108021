"""Imports that wait: who asks gets the module itself, its code runs once, and a training's first
step needs no large package that its options do not use."""

import inspect
import json
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from sd_lora.errors import RunError
from sd_lora.imports import Waiting, let_wait

RUNS = "import sys; sys.waited.append(__name__)\n"
FILES = {
    "whole/__init__.py": RUNS + "from whole import part\nname = 'of whole'\n",
    "whole/part.py": RUNS + "name = 'of part'\n",
    "room/__init__.py": RUNS,
    "room/inner.py": RUNS + "name = 'of inner'\n",
    "tools.py": RUNS + "def add(a, b=0):\n    return a + b\n",
    "broken.py": RUNS + "import no_such_module_anywhere\n",
}
"""Modules of two packages and two alone, each of which notes that its code runs."""

ROOTS = ("whole", "room", "tools", "broken")


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the modules of `FILES` whose code has run, in order."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    monkeypatch.setattr(sys, "waited", [], raising=False)
    yield sys.waited  # type: ignore[attr-defined]
    for name in [n for n in sys.modules if n.partition(".")[0] in ROOTS]:
        del sys.modules[name]


def test_a_module_waits_for_its_first_name(runs: list[str]) -> None:
    """An import of a waiting module runs no code, and neither does a search for it or a look at all
    modules, as `inspect.getmodule` takes; its first name does, once, for all who have imported it,
    and later imports give the module itself."""
    let_wait({"whole": (), "room.inner": ()})
    early = import_module("whole")
    assert find_spec("whole").origin == early.__file__
    inspect.getmodule(test_a_module_waits_for_its_first_name.__code__)
    assert isinstance(early, Waiting)
    assert runs == ["room"]  # a module is found by its package's path, which is its package's code
    assert early.name == "of whole"
    late = import_module("whole")
    assert runs == ["room", "whole", "whole.part"]
    assert not isinstance(late, Waiting)
    assert early.part is late.part is sys.modules["whole.part"]
    room = import_module("room")
    assert room.inner.name == "of inner"
    assert not isinstance(room.inner, Waiting)
    assert runs == ["room", "whole", "whole.part", "room.inner"]


def test_a_function_waits_for_its_first_call(runs: list[str]) -> None:
    """A function of a waiting module that is imported by name runs the module's code when it is
    first called, and is the module's own; whoever imports it from then on has that itself."""
    let_wait({"tools": ["add"]})
    early = import_module("tools")
    add = early.add
    assert runs == []
    assert add(1, b=2) == add(3) == 3
    assert runs == ["tools"]
    assert early.add is import_module("tools").add is not add


def test_a_part_of_a_waiting_package_runs_once(runs: list[str]) -> None:
    """`import whole.part` brings the package, whose own code imports the part: the code of each
    runs once, and the part that everybody has is one."""
    let_wait({"whole": ()})
    part = import_module("whole.part")
    assert runs == ["whole", "whole.part"]
    assert part is sys.modules["whole"].part
    assert part.__spec__.origin == part.__file__
    assert sys.modules["whole"].name == "of whole"


def test_an_import_that_fails_says_so_where_it_is_used(runs: list[str]) -> None:
    """A broken module's own error comes with each use, with what to do about it, also for libraries
    that go on without a package; one that is not installed never waits."""
    let_wait({"broken": ["called"], "no_such_module": (), "no_such_package.part": ()})
    module = import_module("broken")
    for _ in range(2):
        with pytest.raises(ImportError, match="no_such_module_anywhere.*or uninstall it") as error:
            module.name  # noqa: B018
        assert isinstance(error.value, RunError)
    with pytest.raises(RunError, match="no_such_module_anywhere"):
        module.called()
    assert runs == ["broken"] * 3
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        import_module("no_such_module")


HEAVY = (
    *("bitsandbytes.nn", "scipy.stats._stats_py", "scipy.optimize._optimize"),
    *("torch._inductor.compile_fx", "torch._inductor.lowering", "networkx"),
    *("datasets", "pyarrow", "pandas", "matplotlib", "tensorflow", "lycoris", "pytorch_optimizer"),
    "sd_lora.config.translate.peers",
)
"""Modules that cost 0.02 to 0.5 s each, which only some options use."""

START = """
import json, os, sys
reads = []
source = os.path.join("transformers", "models", "vit", "modeling_vit.py")
sys.addaudithook(
    lambda event, args: reads.append(1) if event == "open" and str(args[0]).endswith(source) else 0
)
from sd_lora.config.command_line import parse
from sd_lora.imports import quick_imports
config = parse(sys.argv[2:])
with quick_imports():
    from sd_lora.report.events import StepDone
    from sd_lora.training.loop import train

def listen(event):
    if not isinstance(event, StepDone):
        return
    loaded = [name for name in json.loads(sys.argv[1]) if name in sys.modules]
    import diffusers.quantizers.bitsandbytes.utils as user
    import peft, scipy.stats, torch
    assert scipy.stats.norm.cdf(0) == 0.5
    from transformers.loss.loss_for_object_detection import linear_sum_assignment
    assert linear_sum_assignment([[1.0, 0.0], [0.0, 1.0]])[1].tolist() == [1, 0]
    if hasattr(user, "bnb"):
        import bitsandbytes.nn
        assert user.bnb.nn is bitsandbytes.nn and bitsandbytes.nn.Linear4bit(2, 2).bias is not None
    model = peft.inject_adapter_in_model(
        peft.LoraConfig(r=2, target_modules=["0"]), torch.nn.Sequential(torch.nn.Linear(2, 2))
    )
    assert isinstance(model[0], peft.tuners.lora.Linear)
    assert len(reads) == 1, f"transformers' models were read {len(reads)} times"
    sys.stdout.write(json.dumps(loaded) + "\\n")
    sys.stdout.flush()
    os._exit(0)

train(config, [listen])
"""


@pytest.mark.launch
def test_the_first_step_needs_no_package_of_options(root: Path, tmp_path: Path) -> None:
    """A training with default samples, validation and trackers comes to its first step without the
    packages of options that it has not, and transformers looks into its models once; peft,
    bitsandbytes and scipy's, imported from then on, are whole, also for diffusers, which imported
    them while they waited."""
    words = (
        "--pretrained_model_name_or_path sample_data/tiny-sd --train_data_dir "
        f"sample_data/captioned --caption_column text --steps 100 --output_dir {tmp_path / 'out'}"
    ).split()
    command = [sys.executable, "-c", START, json.dumps(HEAVY), *words]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == []
