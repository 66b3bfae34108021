"""The score agrees with the eye: sheets made by hand and of real LoRAs, ordered before it saw them.

`sheets/marks.json` holds two readers' marks and says how they were given.
"""

import json
from collections.abc import Callable

import pytest
import torch

from sd_lora.sampling.features import Features, load_features
from sd_lora.sampling.judge import Scale, copied, towards, way
from sd_lora.sampling.score import Taught
from tests.sampling import fakes
from tests.sampling.fakes import Images

MARKS = json.loads((fakes.SHEETS / "marks.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def features() -> Features:
    return load_features(fakes.ROOT / "sample_data" / "encoder")


def taught(subject: str) -> Taught:
    """Training and held-out images of the mascot, the robot or the style."""
    folder = fakes.SHEETS / f"{subject}-training"
    if subject == "mascot":
        folder = fakes.ROOT / "sample_data" / "dreambooth" / "instance"
    held_out = {"instance": "holdout"}.get(folder.name, f"{subject}-held-out")
    images = [fakes.opened(f) for f in (folder, folder.parent / held_out)]
    return Taught(*images, "style" if subject == "style" else "subject")


def ruler(features: Features, subject: str, base: Images) -> Callable[[Images], float]:
    """Fidelity of a sheet: 0 at the base's images, 1 at real ones."""
    scale = Scale(features, taught(subject))
    start = scale.nearness(base).mean()
    return lambda sheet: float(way(start, scale.nearness(sheet), scale.level).mean())


def base_of(subject: str) -> Images:
    return fakes.cells("robot-base-subject" if subject == "robot" else "base-subject-0")


def by_eye(kind: str, group: str, name: str) -> float:
    """Mean of the readers' marks of a sheet."""
    marks = MARKS[kind][group][name]["marks"]
    return float(sum(marks) / len(marks))


def ranks(values: list[float]) -> torch.Tensor:
    """Ranks from 1, equal values sharing the mean of theirs."""
    x = torch.tensor(values, dtype=torch.float64)
    below, equal = (x[:, None] > x).sum(1), (x[:, None] == x).sum(1)
    return below + (equal + 1) / 2


def spearman(a: list[float], b: list[float]) -> float:
    """Spearman's rank correlation."""
    return float(torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1])


def test_spearman_is_scipys() -> None:
    """Our rank correlation equals SciPy's, ties included."""
    stats = pytest.importorskip("scipy.stats")
    a, b = [3.0, 1.0, 1.0, 7.0, 5.0, 5.0], [1.0, 2.0, 0.0, 9.0, 9.0, 4.0]
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)


@pytest.mark.parametrize("subject", ["mascot", "robot"])
def test_spoilt_subjects_are_far_and_moved_ones_near(features: Features, subject: str) -> None:
    """Upside down, in tiles, noised, with doubled parts: below 60 % of a real rendition's fidelity.
    Moved, small, on a wrong background: above 80 % of it. Another subject and the base's images:
    below a quarter."""
    fidelity = ruler(features, subject, base_of(subject))
    got = {name: fidelity(sheet) for name, sheet in fakes.fidelity_sheets()[subject].items()}
    parts = {name: value / got["real"] for name, value in got.items()}
    assert got["real"] > 0.85, got
    for name in ("upside down", "tiles", "noised", "doubled"):
        assert parts[name] < 0.6, parts
    for name in ("moved", "small", "wrong background"):
        assert parts[name] > 0.8, parts
    assert max(parts["another subject"], parts["base"]) < 0.25, parts


@pytest.mark.parametrize("subject", ["mascot", "robot", "style"])
def test_copies_are_called_copies(subject: str) -> None:
    """Every training image is a copy, also after a decoder's blur; no held-out image, rendition or
    image of a real LoRA is one."""
    known = taught(subject)
    for image in known.training:
        assert copied(image, known.training)
        assert copied(fakes.blurred(image, 0.7), known.training)
    others = list(known.held_out)
    for name, sheet in fakes.fidelity_sheets().get(subject, {}).items():
        others += sheet if name != "copied" else []
    assert sum(copied(image, known.training) for image in others) == 0


def test_fidelity_agrees_with_the_eye(features: Features) -> None:
    """Rank correlation of fidelity and the two readers' mean marks, of all sheets of two subjects:
    0.9."""
    scores, marks = [], []
    for subject, sheets in fakes.fidelity_sheets().items():
        fidelity = ruler(features, subject, base_of(subject))
        assert sheets.keys() == MARKS["fidelity"][subject].keys()
        for name, sheet in sheets.items():
            scores.append(fidelity(sheet))
            marks.append(by_eye("fidelity", subject, name))
    assert len(marks) >= 24
    assert spearman(scores, marks) >= 0.9, list(zip(scores, marks, strict=True))


def test_leak_agrees_with_the_eye(features: Features) -> None:
    """Rank correlation of leak and the two readers' mean marks, of images of the class and of other
    things: above 0.8. Most sheets are near 0, and those that a run has ruined count for 5 % where
    the readers give 0."""
    scale = Scale(features, taught("mascot"))
    scores, marks = [], []
    for kind, sheets in fakes.leak_sheets().items():
        base = torch.stack([scale.nearness(fakes.cells(f"base-{kind}-{i}")) for i in range(3)])
        assert sheets.keys() == MARKS["leak"][kind].keys()
        for name, sheet in sheets.items():
            scores.append(float(towards(scale.nearness(sheet), base, scale.level).mean()))
            marks.append(by_eye("leak", kind, name))
    assert len(marks) >= 24
    assert spearman(scores, marks) > 0.8, list(zip(scores, marks, strict=True))


def test_styles_are_seen(features: Features) -> None:
    """Other things in the style are near; without its outlines, on other paper, noised or in other
    hues they are farther, and photographs of the same things farthest."""
    plain = fakes.styled("grass", 0)
    fidelity = ruler(features, "style", plain)
    right = fidelity(fakes.styled())
    spoilt = {
        "no outlines": fakes.styled(width=0),
        "white paper": fakes.styled("white"),
        "noised": fakes.each(fakes.noised, fakes.styled()),
        "recoloured": fakes.each(fakes.recoloured, fakes.styled()),
    }
    got = {name: fidelity(sheet) for name, sheet in spoilt.items()}
    assert right > 0.75, (right, got)
    assert max(got.values()) < 0.7 * right, (right, got)
