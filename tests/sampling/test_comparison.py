"""Measures of two layouts, in closed form."""

import pytest
import torch

from sd_lora.sampling.comparison import LAYOUT, MEASURES, Comparison, measures, mirrored, worst


@pytest.fixture
def some() -> torch.Tensor:
    """Layouts of two subjects that are not alike: each fills a corner with colours of its own."""
    layouts = torch.zeros(2, LAYOUT, 11, 11)
    layouts[0, :5, :6, :4] = torch.rand(5, 6, 4, generator=torch.Generator().manual_seed(0))
    layouts[1, 9:13, 6:, 2:9] = 0.5
    layouts[:, 30] = 0.3 * layouts.sum(1)
    layouts[:, -2] = layouts[:, :27].sum(1).clamp(max=1)
    return layouts


def test_equal_and_mirrored_layouts_agree(some: torch.Tensor) -> None:
    """Agreement of a layout with itself and with its mirror image is 1, ratios are 1; mirroring
    twice changes nothing, and the order of the two does not count."""
    torch.testing.assert_close(mirrored(mirrored(some)), some)
    same = measures(some, mirrored(some))
    assert same.shape == (2, MEASURES)
    assert same[:, :24] == pytest.approx(1, abs=1e-3)  # 22 agreements, 2 of amounts of colours
    assert same[:, 24:27] == pytest.approx(0, abs=1e-6)  # ratios of edges and masks; enlargements
    torch.testing.assert_close(measures(some[:1], some[1:]), measures(some[1:], some[:1]))


def test_the_worst_parts_by_hand() -> None:
    """Four cells of weights 1, 2, 1, 4 agree by 1, 1/2, 0 and 1: the worst eighth is 0, the worst
    three eighths (0 + 2/2) / 3, all of them (1 + 1 + 0 + 4) / 8."""
    weight = torch.tensor([[1.0, 2, 1, 4]])
    dot = weight * torch.tensor([[1, 0.5, 0, 1]])
    got = worst(dot, weight, (0.125, 0.375, 1.0))
    assert [float(v) for v in got] == pytest.approx([0, 1 / 3, 0.75], abs=1e-4)


def test_likeness_is_one_row_an_image(some: torch.Tensor) -> None:
    """N × M likenesses, in parts, are those of the pairs one by one."""
    comparison = Comparison()
    got = comparison.likeness(some, some[1:])
    pairs = comparison(measures(some, some[[1, 1]])).sigmoid()
    torch.testing.assert_close(got[:, 0], pairs)
