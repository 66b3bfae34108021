"""Masks for inpainting, drawn during training: 1 is to be painted, 0 is kept."""

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from sd_lora.seeds import seed_for, uniform

WHOLE = 0.25
"""Share of masks that cover the whole image, as in the training of Stable Diffusion's inpainting
model (its model card), so that it keeps drawing from the text alone."""

STROKES = 4
"""At most so many strokes in a mask of strokes."""


def draw_mask(size: tuple[int, int], address: tuple[int | str, ...]) -> Tensor:
    """A mask (1, height, width) of zeros and ones, a function of its address.

    size: (width, height) in pixels.

    A quarter cover everything; the others are a rectangle, an ellipse or thick strokes, in equal
    parts (Suvorov et al. 2022, "LaMa", section 3.3 has wide boxes and strokes).
    """

    def u(what: str, low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * uniform(*address, "mask", what)

    if u("whole") < WHOLE:
        return torch.ones(1, size[1], size[0])
    mask = Image.new("1", size)
    draw = ImageDraw.Draw(mask)
    kind = seed_for(*address, "mask", "kind") % 3
    if kind < 2:
        width, height = u("width", 0.2, 0.9) * size[0], u("height", 0.2, 0.9) * size[1]
        left, top = u("left") * (size[0] - width), u("top") * (size[1] - height)
        box = (left, top, left + width, top + height)
        (draw.rectangle if kind == 0 else draw.ellipse)(box, fill=1)
    else:
        for stroke in range(1 + seed_for(*address, "mask", "strokes") % STROKES):
            points = [
                (u(f"x {stroke} {point}") * size[0], u(f"y {stroke} {point}") * size[1])
                for point in range(2 + seed_for(*address, "mask", "points", stroke) % 4)
            ]
            thick = u(f"thickness {stroke}", 0.05, 0.2) * min(size)
            draw.line(points, fill=1, width=max(1, round(thick)), joint="curve")
            for x, y in points:  # round ends
                r = thick / 2
                draw.ellipse((x - r, y - r, x + r, y + r), fill=1)
    bits = torch.frombuffer(bytearray(mask.convert("L").tobytes()), dtype=torch.uint8)
    return (bits.view(1, size[1], size[0]) > 0).float()
