"""A small encoder of drawings, 64×64: subject, style, and answers to questions of the prompt.

It ships with the embedded base and is trained by ``dev/pretrain_encoder.py``. Images of one subject
have near embeddings at any scale and place and on any background, and images of one style at any
content; an image that is damaged, or shares a part of the subject, is the less near the less of
the subject it shows.
"""

import json
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SIDE = 64
WIDTHS = (48, 96, 136)
"""Channels at 16×16, 8×8 and 4×4 pixels."""

SUBJECT, STYLE = 128, 64
"""Sizes of the embeddings."""


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
        self.subject = nn.Sequential(nn.Linear(2 * c, 192), nn.SiLU(), nn.Linear(192, SUBJECT))
        self.style = nn.Linear(2 * (a + b), STYLE)
        self.answers = nn.ModuleDict(
            {name: nn.Linear(16 * c, len(q["answers"])) for name, q in questions.items()}
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Unit vectors (B, SUBJECT) and (B, STYLE), and question → logits (B, answers)."""
        fine = self.fine(x)
        middle = self.middle(fine)
        coarse = self.coarse(middle).float()
        pooled = torch.cat([coarse.mean((2, 3)), coarse.amax((2, 3))], 1)
        style = self.style(torch.cat([statistics(fine), statistics(middle)], 1))
        said = {name: head(coarse.flatten(1)) for name, head in self.answers.items()}
        return F.normalize(self.subject(pooled).float()), F.normalize(style.float()), said

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
