"""A small encoder of drawings, 64×64: subject, style, and answers to questions of the prompt.

It ships with the embedded base and is trained by ``dev/pretrain_encoder.py``. It finds the subject,
cuts it out and brings it to one size, so that images of one subject have near embeddings at any
scale and place and on any background; an image that is damaged, or shares a part of the subject, is
the less near the less of the subject it shows. Two subjects cut out are also compared part by part
(comparison.py). Images of one style are near at any content.
"""

import json
import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sd_lora.sampling.comparison import LAYOUT, Comparison, mirrored

SIDE = 64
WIDTHS = (48, 96, 136)
"""Channels at 16×16, 8×8 and 4×4 pixels."""

REACH = 4.0
"""Side of the square cut out, in root mean squares of distance: a disc is 0.71 of it wide."""

SUBJECT, STYLE = 128, 64
"""Sizes of the embeddings."""

OTHERS = 0.1
"""Cosine of two subjects, or two styles, that costs nothing in training, and so means nothing."""


class Block(nn.Module):
    """x + conv(silu(norm(x))), of images (B, C, H, W)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(8, width), nn.Conv2d(width, width, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(F.silu(self.norm(x)))


def statistics(x: Tensor) -> Tensor:
    """Mean and deviation of every channel of a map (B, C, H, W): (B, 2·C)."""
    x = x.float()
    return torch.cat([x.mean((2, 3)), x.var((2, 3)).add(1e-5).sqrt()], 1)


def cut_out(x: Tensor, chance: Tensor) -> Tensor:
    """The subject alone, brought to one size and to the middle: (B, 5, 64, 64). The last two
    channels are its mask, and how much it was enlarged, so that a small subject is no blurred one.

    chance: (B, 1, 64, 64), of every pixel to be of the subject, taken as parts of the largest: some
    pixel is. The square cut out has its middle at the mask's centroid, and a side of
    REACH root mean squares of the distance from it.
    """
    mask = (2 * chance / chance.amax((2, 3), keepdim=True).clamp(min=0.2) - 0.6).clamp(0, 1)
    at = (torch.arange(SIDE, dtype=torch.float32, device=x.device) + 0.5) * 2 / SIDE - 1
    inside = torch.ones_like(mask[:, 0])
    for _ in range(3):  # what lies beyond the square is no part of the subject
        weight = mask[:, 0] * inside + 1e-6
        share = weight / weight.sum((1, 2), keepdim=True)
        across, down = share.sum(1), share.sum(2)  # (B, 64), of columns and of rows
        x0, y0 = across @ at, down @ at
        spread = across @ at.square() - x0.square() + down @ at.square() - y0.square()
        half = (REACH / 2 * spread.clamp(min=0).sqrt()).clamp(0.1, 1.5)  # rounding: below 0
        dx, dy = at - x0[:, None], at - y0[:, None]
        far = dx.square()[:, None] + dy.square()[:, :, None]
        inside = (far < half.square()[:, None, None]).float()
    zero = torch.zeros_like(half)
    rows = torch.stack([half, zero, x0, zero, half, y0], 1).view(-1, 2, 3)
    grid = F.affine_grid(rows, [len(x), 4, SIDE, SIDE], align_corners=False)
    cut = F.grid_sample(torch.cat([x * mask, mask], 1), grid, "bicubic", align_corners=False)
    return torch.cat([cut, -half.log().view(-1, 1, 1, 1) * cut[:, 3:]], 1)


def layout(alone: Tensor) -> Tensor:
    """Where the colours and edges of a subject cut out (B, 5, 64, 64) lie: (B, LAYOUT, 11, 11).

    Square roots of sums around 11 × 11 points, weighted by a Gaussian three pixels wide: of pixels
    near to each of 27 colours, of edges in 8 directions (Dalal and Triggs 2005, "Histograms of
    oriented gradients"), of the mask and of its enlargement.
    """
    mask, rgb = alone[:, 3:4], alone[:, :3]
    levels = torch.linspace(-1, 1, 3, device=alone.device).view(1, 1, 3, 1, 1)
    near = torch.softmax(-2 * ((rgb / mask.clamp(min=0.05))[:, :, None] - levels).square(), 2)
    r, g, b = near[:, 0, :, None, None], near[:, 1, None, :, None], near[:, 2, None, None, :]
    colours = (r * g * (b * mask[:, None, None])).flatten(1, 3)
    dx = (rgb[:, :, 1:-1, 2:] - rgb[:, :, 1:-1, :-2]) / 2
    dy = (rgb[:, :, 2:, 1:-1] - rgb[:, :, :-2, 1:-1]) / 2
    steepest = (dx.square() + dy.square()).argmax(1, keepdim=True)
    dx, dy = dx.gather(1, steepest), dy.gather(1, steepest)
    square = dx.square() + dy.square() + 1e-8
    turns = (torch.arange(8, device=alone.device) * math.pi / 4).view(1, 8, 1, 1)
    along = (dx.square() - dy.square()) * turns.cos() + 2 * dx * dy * turns.sin()
    edges = F.pad((along / square).clamp(min=0).square() * square.sqrt(), (1, 1, 1, 1))
    ends = ((3.0, SIDE, 6.0), (float(SIDE),))
    points, pixels = (torch.arange(*end, device=alone.device) for end in ends)
    weights = torch.exp(-(pixels - points[:, None]).square() / 18) / 7.52
    maps = torch.cat([colours, edges, alone[:, 3:].clamp(min=0)], 1)
    return (weights @ (maps @ weights.T)).clamp(min=0).sqrt()


class SubjectNet(nn.Module):
    """Layouts of subjects (B, LAYOUT, 11, 11) → (B, SUBJECT)."""

    def __init__(self) -> None:
        super().__init__()
        self.mixed, self.near = nn.Conv2d(LAYOUT, 64, 1), nn.Conv2d(64, 64, 3, 1, 1)
        self.coarse = nn.Sequential(
            nn.SiLU(), nn.Conv2d(64, 80, 3, 2, 1), Block(80), nn.SiLU(), nn.Conv2d(80, 32, 1),
            nn.SiLU(),
        )  # fmt: skip
        self.head = nn.Linear(36 * 32, SUBJECT)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mixed(2 * x)
        return self.head(self.coarse(x + self.near(F.silu(x))).flatten(1))


class DrawingEncoder(nn.Module):
    """Images (B, 3, 64, 64) in [-1, 1] → embeddings of subject and style, and answers.

    questions: name → its pattern, a regular expression whose group finds the answer in a prompt,
        and the answers, one a class. `config.json` holds them.
    """

    def __init__(self, questions: dict[str, dict]) -> None:
        super().__init__()
        self.questions = questions
        a, b, c = WIDTHS
        self.fine = nn.Sequential(
            nn.Conv2d(3, a, 3, 2, 1), nn.SiLU(), nn.Conv2d(a, a, 3, 2, 1), Block(a)
        )
        self.middle = nn.Sequential(nn.SiLU(), nn.Conv2d(a, b, 3, 2, 1), Block(b), Block(b))
        self.coarse = nn.Sequential(
            nn.SiLU(), nn.Conv2d(b, c, 3, 2, 1), Block(c), nn.GroupNorm(8, c), nn.SiLU()
        )
        self.outline = nn.Sequential(
            nn.Conv2d(a + b, 48, 1), nn.SiLU(), nn.Conv2d(48, 48, 3, 1, 1), nn.SiLU(),
            nn.Conv2d(48, 16, 1), nn.PixelShuffle(4),
        )  # fmt: skip
        self.subject = SubjectNet()
        self.comparison = Comparison()
        self.style = nn.Linear(2 * (a + b), STYLE)
        self.answers = nn.ModuleDict(
            {name: nn.Linear(16 * c, len(q["answers"])) for name, q in questions.items()}
        )

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.comparison.middle.device

    def maps(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Maps of an image at 16×16, 8×8 and 4×4 pixels."""
        fine = self.fine(x)
        middle = self.middle(fine)
        return fine, middle, self.coarse(middle).float()

    def outlined(self, fine: Tensor, middle: Tensor) -> Tensor:
        """Logits (B, 1, 64, 64): is the pixel one of the subject, and not of the background?"""
        larger = F.interpolate(middle.float(), scale_factor=2.0, mode="bilinear")
        return self.outline(torch.cat([fine, larger], 1)).float()

    def alone(self, x: Tensor) -> Tensor:
        """The subject cut out, (B, 5, 64, 64)."""
        fine = self.fine(x)
        return cut_out(x, self.outlined(fine, self.middle(fine)).sigmoid())

    def embedded(self, layouts: Tensor) -> Tensor:
        """Unit vectors (B, SUBJECT) of layouts: of them and their mirror images."""
        both = [F.normalize(self.subject(x).float()) for x in (layouts, mirrored(layouts))]
        return F.normalize(both[0] + both[1])

    def styled(self, fine: Tensor, middle: Tensor) -> Tensor:
        """Unit vectors (B, STYLE)."""
        style = self.style(torch.cat([statistics(fine), statistics(middle)], 1))
        return F.normalize(style.float())

    def answered(self, coarse: Tensor) -> dict[str, Tensor]:
        """Question → logits (B, answers)."""
        return {name: head(coarse.flatten(1)) for name, head in self.answers.items()}

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Layouts (B, LAYOUT, 11, 11), unit vectors (B, STYLE), and question → logits
        (B, answers)."""
        fine, middle, coarse = self.maps(x)
        alone = cut_out(x, self.outlined(fine, middle).sigmoid())
        return layout(alone), self.styled(fine, middle), self.answered(coarse)

    def asked(self, prompt: str) -> dict[str, int]:
        """Question → class of the answer that a prompt names; questions without one are left out.

        An answer may be a list of words for the same; a count of one is said by "a" or "an".
        """
        found = {}
        for name, question in self.questions.items():
            words = [answer.split("|") for answer in question["answers"]]
            for match in re.finditer(question["pattern"], prompt):
                (word,) = (group for group in match.groups() if group)
                found[name] = next(i for i, several in enumerate(words) if word in several)
                break
        return found


def save_encoder(encoder: DrawingEncoder, folder: Path) -> None:
    """Write config.json and model.safetensors, in half precision."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "drawing_encoder", "questions": encoder.questions}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    save_file(
        {name: v.half().contiguous() for name, v in encoder.state_dict().items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )


def load_encoder(folder: Path) -> DrawingEncoder:
    """An encoder, float32, from the folder that `save_encoder` wrote."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    encoder = DrawingEncoder(config["questions"])
    state = load_file(folder / "model.safetensors")
    encoder.load_state_dict({name: v.float() for name, v in state.items()})
    return encoder.eval().requires_grad_(False)
