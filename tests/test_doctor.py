"""The doctor: facts about this machine, faults with which no training runs, a step's time."""

import json
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sd_lora.cli import main
from sd_lora.doctor import device, machine, table
from sd_lora.doctor.install import INSTALL
from sd_lora.report.events import (
    Event,
    RunEnded,
    RunPlanned,
    SamplesDrawn,
    StepRecord,
    StepsLogged,
    TrainingStarted,
)
from sd_lora.report.step_time import StepTimes, path_of, read
from sd_lora.report.summary import Summary
from tests.training.runs import images, text_to_image


def test_this_machine_trains(capsys: pytest.CaptureFixture[str], root: Path) -> None:
    """On a CPU all checks have a result without a fault: each precision goes through a step, math
    runs, each library is in its range, and each extra of pyproject.toml has its use. The same
    stands in the lines for people."""
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    facts = {check["name"]: check["facts"] for check in found["checks"]}
    assert (list(facts), found["can_train"]) == (list(table.CHECKS), True)
    assert [check["faults"] for check in found["checks"]] == [[]] * len(facts)
    assert list(facts["precisions"]) == ["float32", "bfloat16", "float16"]
    assert all(text.startswith("works") for text in facts["precisions"].values())
    assert facts["attention"]["math"] == "runs"
    assert {"torch", "diffusers", "peft"} <= facts["libraries"].keys()
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert {*machine.EXTRAS} == extras["optional-dependencies"].keys() - {"test", "dev"}
    text = table.lines({"precisions": device.precisions(), "extras": machine.extras()})
    assert "float32   works, taken by a run with auto" in text
    assert text.endswith("a training can run here")


def test_faults(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A library below its range, one that is missing, and a check that cannot be done are faults:
    each with its remedy, exit code 1, no traceback. A package of an extra is none."""
    rows = [
        "torch>=999; python_version > '3'",
        "no-such-library[a]>=1",
        "nothing>=2; extra == 'jxl'",
    ]
    monkeypatch.setattr(machine, "requires", lambda name: rows)
    monkeypatch.setattr(
        table, "CHECKS", {n: table.CHECKS[n] for n in ("libraries", "extras")} | {"b": "broken.a"}
    )
    parts = table.examine([*table.CHECKS])
    assert [len(part.faults) for part in parts.values()] == [2, 0, 1]
    torch, missing = parts["libraries"].faults
    assert torch.text.endswith("is not >=999")
    assert torch.remedy == 'pip install "torch>=999"'
    assert missing.text == "no-such-library is not installed"
    assert "nothing not installed" in parts["extras"].facts["jxl"]
    assert "ModuleNotFoundError" in parts["b"].faults[0].text
    monkeypatch.setattr(table, "examine", lambda: parts)
    assert main(["doctor"]) == 1
    shown = capsys.readouterr()
    assert "fault: torch" in shown.out
    assert shown.err == "error: no training can run here: faults 3\n"


def test_a_precision_is_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    """A precision whose gradient is further off than allowed fails: bfloat16 at 1e-4, and float32
    does not. A chosen precision that fails is a fault, another one a warning."""
    monkeypatch.setattr(device, "MOST_APART", 1e-4)
    assert device._proof("no") == ("", False)
    assert device._proof("bf16")[0].endswith("% off")
    assert [p.field for p in device.precisions().warnings] == ["bfloat16", "float16"]
    monkeypatch.setattr(device, "MOST_APART", 0.0)
    assert [p.field for p in device.precisions().faults] == ["float32"]


def test_a_card_that_torch_does_not_see(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A graphics device of AMD, as Linux lists it, without torch's build for it is told with the
    command that installs one."""
    vendor = tmp_path / "renderD128" / "device" / "vendor"
    vendor.parent.mkdir(parents=True)
    vendor.write_text("0x1002\n")
    monkeypatch.setattr(device, "GRAPHICS", tmp_path)
    monkeypatch.setattr(device, "planned", lambda: device.Device("cpu", "no"))
    (warning,) = device.accelerator().warnings
    assert "an AMD card" in warning.text
    assert warning.remedy.startswith(INSTALL["rocm"])


def _run(config: Any, seconds: float) -> None:
    """Tell a listener of 50 steps of so many seconds, with 100 s of samples after step 20."""
    times = SimpleNamespace(now=0.0)
    listener = StepTimes(config, lambda: times.now)

    def tell(event: Event) -> None:
        listener(event)

    tell(RunPlanned(Summary({"device": "cpu, base in float32"})))
    tell(TrainingStarted(0, 50))
    for step in range(10, 60, 10):
        times.now += 10 * seconds + (50 if step == 10 else 0)  # the first steps take longer
        tell(StepsLogged(tuple(StepRecord(step - 9 + i, 0.1, 1e-4, 1.0) for i in range(10))))
        if step == 20:
            times.now += 100
            tell(SamplesDrawn(20, [], []))
    tell(RunEnded(1.0, None, None))  # type: ignore[arg-type]


def test_the_time_of_a_step(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_sd1: Path
) -> None:
    """Closed form: of steps of 0.5 s, between which samples are drawn, 0.5 s are kept, and those of
    the first span and of the one with samples are not counted. The next run with another rank
    takes twice as long: the doctor names the ratio and the option; a third one like the second,
    three times as long, is warned of, with the version that differs."""
    monkeypatch.setenv("SD_LORA_STATE", str(tmp_path / "state"))
    data = images(tmp_path / "data", 1)
    _run(text_to_image(tiny_sd1, data, tmp_path / "a", rank=8), 0.5)
    (first,) = read("cpu")
    assert (first.seconds, first.steps) == (0.5, 30)
    assert "output_dir" not in first.options
    more: dict[str, Any] = {"rank": 16, "use_rslora": True, "lr_pattern": {"*": 1.0}}
    other = text_to_image(tiny_sd1, data, tmp_path / "b", **more)
    _run(other, 1.0)
    part = machine.last_run()
    assert part.facts["ratio"] == (
        "2.00, changed: --rank 8 → 16, --use_rslora off → on, --lr_pattern not given → {'*': 1.0}"
    )
    assert not part.warnings
    path = path_of("cpu")
    path.write_text(path.read_text().replace('"torch": "', '"torch": "1.'))
    assert "torch 1." in machine.last_run().facts["changed since"]
    _run(other, 3.0)
    (warning,) = machine.last_run().warnings
    assert "3.00 times" in warning.text
    assert warning.remedy.startswith("Changed: torch 1.")
    path.write_text("{}")
    assert machine.last_run().facts["time of a step"].startswith("no run of 20 steps")
