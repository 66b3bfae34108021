"""Likeness of two subjects by their layouts: where colours, edges and outlines agree.

An embedding keeps a subject's look at large and lets a second pair of eyes pass; two layouts laid
over each other differ where the eyes are. `measures` says in MEASURES numbers how well two layouts
agree, over all and in their least alike parts. None of them depends on the names of colours or on
the place of a difference, so a small network, `Comparison`, learns their meaning from any subjects.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

COLOURS, EDGES = 27, 8
LAYOUT = COLOURS + EDGES + 2
"""Channels of a subject's layout: colours, directions of edges, the mask and its enlargement."""

GROUPS = (slice(0, COLOURS), slice(COLOURS, COLOURS + EDGES), slice(LAYOUT - 2, LAYOUT - 1))
"""Channels of colours, of edges, and of the mask."""

WORST = ((0.1, 0.25, 0.5), (0.25, 0.5), (0.1, 0.25, 0.5))
"""Least alike shares of a subject that are looked at: by colours, by edges, by both."""

MEASURES, HIDDEN = 30, 64
PAIRS = 2000
"""Pairs compared at a time."""


def mirrored(layouts: Tensor) -> Tensor:
    """Layouts (..., LAYOUT, 11, 11) of mirrored subjects, about a line 1.5 pixels from the
    middle."""
    edges = [COLOURS + (-i) % EDGES for i in range(EDGES)]
    order = [*range(COLOURS), *edges, LAYOUT - 2, LAYOUT - 1]
    return layouts.flip(-1)[..., order, :, :]


def worst(dot: Tensor, mean: Tensor, shares: tuple[float, ...]) -> list[Tensor]:
    """Mean agreement (P,) of the least alike shares of P subjects' cells (P, 121), each cell
    counting by the mean of its two squares."""
    agreement, order = (dot / mean.clamp(min=1e-3)).sort(1)
    weight = mean.gather(1, order)
    # on the CPU: a card's running sums are refused where results must repeat
    reached = weight.cpu().cumsum(1).to(weight.device)
    reached = reached / weight.sum(1, keepdim=True).clamp(min=1e-6)
    out = []
    for share in shares:
        taken = (reached <= share).float() * weight + 1e-6 * weight
        out.append((agreement * taken).sum(1) / taken.sum(1).clamp(min=1e-9))
    return out


def agreement(a: Tensor, b: Tensor) -> list[Tensor]:
    """Of layouts laid over each other (P, LAYOUT, 11, 11): 11 numbers (P,), 1 where they are equal:
    products as parts of the mean square, of each group over all and of the worst parts."""
    out, cells = [], []
    for group in GROUPS:
        x, y = a[:, group].flatten(2), b[:, group].flatten(2)
        dot, mean = (x * y).sum(1), (x.square().sum(1) + y.square().sum(1)) / 2
        out.append(dot.sum(1) / mean.sum(1).clamp(min=1e-6))
        cells.append((dot, mean))
    (colours, squares), (edges, edge_squares), _ = cells
    both = colours + 4 * edges, squares + 4 * edge_squares  # edges are as strong as colours then
    for pair, shares in zip(((colours, squares), (edges, edge_squares), both), WORST, strict=True):
        out += worst(*pair, shares)
    return out


def amounts(a: Tensor, b: Tensor) -> list[Tensor]:
    """Of the same: 6 numbers (P,) of how much there is, wherever it lies: two of colours, the
    logarithms of ratios of edges and of masks, difference and maximum of enlargements."""
    x, y = a.square().sum((2, 3)), b.square().sum((2, 3))
    p, q = (F.normalize(v[:, :COLOURS], p=1, dim=1, eps=1e-6) for v in (x, y))
    out = [(p * q).sqrt().sum(1), torch.minimum(p, q).sum(1)]
    for group in GROUPS[1:]:
        u, v = (w[:, group].sum(1).clamp(min=1e-3) for w in (x, y))
        out.append((u / v).log().abs())
    u, v = (w[:, -1] / w[:, -2].clamp(min=1e-3) for w in (x, y))
    return [*out, (u - v).abs(), torch.maximum(u, v)]


def profiles(a: Tensor, b: Tensor) -> list[Tensor]:
    """Of the same: agreement (P,) of the contents of columns, and of rows."""
    out = []
    for way in (2, 3):
        x, y = (w[:, :-1].square().sum(way).sqrt() for w in (a, b))
        out.append((x * y).sum((1, 2)) / ((x.square() + y.square()) / 2).sum((1, 2)))
    return out


def measures(a: Tensor, b: Tensor) -> Tensor:
    """How well P pairs of layouts (P, LAYOUT, 11, 11) agree, (P, MEASURES); of `b` or its mirror
    image, whichever is nearer to `a`. Blurred layouts forgive a shift of a few pixels."""
    a, b = a.float(), b.float()
    other = mirrored(b)
    straight = (a * b).sum((1, 2, 3)) >= (a * other).sum((1, 2, 3))
    b = torch.where(straight[:, None, None, None], b, other)
    soft = (F.avg_pool2d(x, 3, 1, 1) for x in (a, b))
    return torch.stack([*agreement(a, b), *agreement(*soft), *amounts(a, b), *profiles(a, b)], 1)


class Comparison(nn.Module):
    """Measures of pairs (P, MEASURES) → logits of their likeness (P,).

    middle, spread: of the measures in training, by which they are brought to one scale.
    """

    middle: Tensor
    spread: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("middle", torch.zeros(MEASURES))
        self.register_buffer("spread", torch.ones(MEASURES))
        self.layers = nn.Sequential(
            nn.Linear(MEASURES, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, HIDDEN), nn.SiLU(),
            nn.Linear(HIDDEN, 1),
        )  # fmt: skip

    def forward(self, measured: Tensor) -> Tensor:
        return self.layers(((measured - self.middle) / self.spread).clamp(-5, 5))[:, 0]

    def likeness(self, a: Tensor, b: Tensor) -> Tensor:
        """Likeness, 0 to 1, of each of N layouts to each of M, (N, M), where the weights are."""
        a, b = (layouts.to(self.middle.device) for layouts in (a, b))
        rows = torch.arange(len(a) * len(b), device=a.device).split(PAIRS)
        pairs = [measures(a[r // len(b)], b[r % len(b)]) for r in rows]
        return self(torch.cat(pairs)).sigmoid().view(len(a), len(b))
