"""How good is the embedded base? Its VAE on colours and textures never seen, its UNet on prompts.

    python dev/score_tiny_sd.py --work WORK --unseen robot=FOLDER --unseen photograph=FOLDER

The VAE: mean pixel error of a round trip, of the range 0 to 1, on sets of drawings whose palettes
and textures no training has, and on folders of images named by --unseen.

The UNet: a classifier, trained here on drawn scenes and shown to be right on scenes that it has
not seen, is asked about images of prompts: the thing, its colour, the background, how many, where,
how big, in which style. Half of what it learns from has been through the VAE, as all has that it
is asked about: trained on clean drawings alone, it was right about the colour of 96.6 % of unseen
clean ones and of 94.8 % of the same ones after the VAE, which no UNet could pass; with 24,000
decoded ones of 98.1 % and 97.0 %. Everything goes
into the pipeline folder's training.json; WORK/wrong.png shows the images whose thing or colour is
judged wrong.
"""

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path

import images
import numpy as np
import patterns
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image, ImageChops, ImageDraw
from pretrain_tiny_sd import (
    GUIDANCE,
    NUM_SCENES,
    draw_scenes,
    first_seed,
    generate,
    parser,
    save_whole,
    scene_of,
)
from pretrain_vae import lr_at, pixel_error, to_unit
from torch import Tensor, nn
from tqdm import tqdm

JUDGE_STEPS = 8000
NUM_DECODED = 24_000
"""Drawings that the judge sees as the VAE gives them back."""
NUM_FRESH = 2000
"""Drawings that the judge is tried on: at 98 % right, this says it within 0.3 % (one sigma)."""

# ---------------------------------------------------------------------------------------------
# The VAE
# ---------------------------------------------------------------------------------------------


def some_scene(rng: random.Random) -> Image.Image:
    return images.draw(images.random_scene(rng))


def mascot(rng: random.Random) -> Image.Image:
    return images.draw(images.mascot(rng.choice(images.BACKGROUNDS), seed=rng.getrandbits(32)))


def snail(rng: random.Random) -> Image.Image:
    return images.draw(images.snail(rng.choice(images.BACKGROUNDS), seed=rng.getrandbits(32)))


def pastel(rng: random.Random) -> Image.Image:
    """A scene in pale colours, its green and blue swapped."""
    r, g, b = some_scene(rng).point(lambda v: 140 + v * 0.45).split()
    return Image.merge("RGB", (r, b, g))


def inverted(rng: random.Random) -> Image.Image:
    return ImageChops.invert(some_scene(rng))


def plaid(rng: random.Random) -> Image.Image:
    """A woven cloth of three colours."""
    y, x = np.mgrid[0:64, 0:64]
    threads = [rng.randint(4, 9) for _ in range(2)]
    across, down = (y // threads[0]) % 2, (x // threads[1]) % 3 == 0
    colours = np.array([images.unnamed_colour(rng) for _ in range(3)])
    cloth = (colours[across] + colours[2 * down.astype(int)]) / 2
    return Image.fromarray(cloth.astype(np.uint8))


def halftone(rng: random.Random) -> Image.Image:
    """A printed gradient: dots of one colour that grow from one side to the other."""
    image = Image.new("RGB", (256, 256), images.unnamed_colour(rng))
    pencil, ink, gap = ImageDraw.Draw(image), images.unnamed_colour(rng), rng.randint(32, 56)
    for y in range(0, 280, gap):
        for x in range(0, 280, gap):
            r = gap * (0.1 + 0.45 * x / 280)
            pencil.ellipse((x - r, y - r, x + r, y + r), fill=ink)
    return image.reduce(4)


DRAWN: dict[str, Callable[[random.Random], Image.Image]] = {
    "mascot": mascot,
    "snail": snail,
    "pastel": pastel,
    "inverted": inverted,
    "plaid": plaid,
    "halftone": halftone,
    "scenes": some_scene,
    "patterns": patterns.pattern,
}


def in_folder(folder: Path, rng: random.Random) -> list[Image.Image]:
    """All images of a folder; of those larger than 64 pixels, sixteen crops each."""
    out = []
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".png", ".jpg")):
        with Image.open(path) as image:
            whole = image.convert("RGB")
        cut = max(whole.size) > images.SIDE
        out += [patterns.crop_of(whole, rng) for _ in range(16)] if cut else [whole]
    return out


def score_vae(pipeline: StableDiffusionPipeline, folders: dict[str, Path]) -> dict[str, float]:
    """Returns set -> mean pixel error, 32 drawings a set, or all images of a folder."""
    sets = {n: [paint(random.Random(f"{n}{i}")) for i in range(32)] for n, paint in DRAWN.items()}
    sets |= {n: in_folder(folder, random.Random(n)) for n, folder in folders.items()}
    return {
        name: pixel_error(pipeline.vae, to_unit(np.stack([np.asarray(i) for i in group])))
        for name, group in sets.items()
    }


# ---------------------------------------------------------------------------------------------
# The UNet
# ---------------------------------------------------------------------------------------------

QUESTIONS: dict[str, list[str]] = {
    "thing": list(images.THINGS),
    "colour": list(images.COLOURS),
    "background": list(images.BACKGROUNDS),
    "count": ["1", "2", "3"],
    "position": list(images.POSITIONS),
    "size": list(images.SIZES),
    "style": ["", *images.STYLES],
    "left": list(images.THINGS),
    "right": list(images.THINGS),
}


def answers(scene: images.Scene) -> dict[str, str]:
    """Question -> answer, of the questions that a scene's caption answers."""
    said = {"style": scene.style}
    if images.place(scene):
        said["background"] = str(scene.background)
    if scene.other:
        far = {"left": "right", "right": "left"}[scene.position]
        return said | {scene.position: scene.thing, far: scene.other[0]}
    said |= {"thing": scene.thing, "count": str(scene.count)}
    if scene.count == 1:
        said |= {"position": scene.position, "size": scene.size}
    if isinstance(scene.colour, str) and scene.style != "sketch":
        said["colour"] = scene.colour
    return said


def numbers_of(scenes: list[images.Scene]) -> dict[str, Tensor]:
    """Returns question -> number of each scene's answer; -100 where it has none."""
    said = [answers(scene) for scene in scenes]
    return {
        q: torch.tensor([words.index(a[q]) if q in a else -100 for a in said])
        for q, words in QUESTIONS.items()
    }


class Judge(nn.Module):
    """A small classifier of images (B, 3, 64, 64) in [-1, 1]: question -> logits (B, words)."""

    def __init__(self) -> None:
        super().__init__()
        widths = (32, 64, 96, 128)

        def layer(a: int, b: int, stride: int) -> list[nn.Module]:
            return [nn.Conv2d(a, b, 3, stride, 1), nn.GroupNorm(8, b), nn.SiLU()]

        layers = layer(3, widths[0], 2)
        for a, b in zip(widths, widths[1:], strict=False):
            layers += [*layer(a, a, 1), *layer(a, b, 2)]
        self.body = nn.Sequential(*layers, nn.Flatten())
        self.heads = nn.ModuleDict(
            {name: nn.Linear(widths[-1] * 16, len(words)) for name, words in QUESTIONS.items()}
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.body(x)
        return {name: head(h) for name, head in self.heads.items()}


def share_right(out: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Returns question -> share of right answers, where there is one."""
    right = {q: (out[q].argmax(1) == wanted[q])[wanted[q] >= 0] for q in QUESTIONS}
    return {q: round(float(r.float().mean()), 3) for q, r in right.items()}


def only(wanted: dict[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
    """Returns the answers of the scenes that a mask (N,) holds."""
    return {q: torch.where(mask, w, -100) for q, w in wanted.items()}


@torch.no_grad()
def through_vae(vae: AutoencoderKL, pixels: np.ndarray) -> np.ndarray:
    """Returns images (N, 64, 64, 3), 0 to 255, as the VAE gives them back."""
    out = []
    for start in tqdm(range(0, len(pixels), 64), "decoded drawings", mininterval=30):
        latents = vae.encode(to_unit(pixels[start : start + 64])).latent_dist.mean
        image = (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1) * 255
        out.append(image.round().permute(0, 2, 3, 1).to(torch.uint8).numpy())
    return np.concatenate(out)


def train_judge(args: argparse.Namespace, vae: AutoencoderKL) -> Judge:
    """Returns the classifier, trained on drawings of which a half is decoded."""
    pixels, _ = draw_scenes(args)
    first = first_seed(args)
    scenes = [scene_of(first + i) for i in range(NUM_SCENES)]
    wanted = numbers_of(scenes)
    torch.manual_seed(args.seed)
    judge, kept = Judge(), args.work / "judge.pt"
    if kept.is_file():
        judge.load_state_dict(torch.load(kept))
        return judge
    decoded = args.work / "decoded.npy"
    if not decoded.is_file():
        np.save(decoded, through_vae(vae, pixels[:NUM_DECODED]))
    decoded_pixels = np.load(decoded)
    textured = torch.tensor([1.0 if s.texture == "plain" else 3.0 for s in scenes])
    optimizer = torch.optim.AdamW(judge.parameters(), 2e-3, weight_decay=0.05, fused=True)
    for step in tqdm(range(JUDGE_STEPS), "judge", mininterval=30):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, JUDGE_STEPS, 2e-3, 0.5)
        clean = textured.multinomial(32, replacement=True)
        through = textured[:NUM_DECODED].multinomial(32, replacement=True)
        shown = np.concatenate([pixels[clean.numpy()], decoded_pixels[through.numpy()]])
        pick = torch.cat([clean, through])
        out = judge(to_unit(shown))
        said = {q: w[pick] for q, w in wanted.items()}
        losses = [F.cross_entropy(out[q], said[q], reduction="sum") / 64 for q in QUESTIONS]
        torch.stack(losses).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    save_whole(judge.state_dict(), kept)
    return judge


@torch.no_grad()
def try_judge(judge: Judge, vae: AutoencoderKL) -> dict[str, dict[str, float]]:
    """Returns how often the judge is right on drawings that it has not seen, as they are drawn and
    as the VAE gives them back; the second is what a perfect UNet would get."""
    scenes = [images.random_scene(random.Random(3 * 10**9 + i)) for i in range(NUM_FRESH)]
    pixels = np.stack([np.asarray(images.draw(scene)) for scene in scenes])
    wanted = numbers_of(scenes)
    return {
        "judge on unseen drawings": share_right(judge(to_unit(pixels)), wanted),
        "judge on unseen drawings after the VAE": share_right(
            judge(to_unit(through_vae(vae, pixels))), wanted
        ),
    }


def write_wrong(
    drawn: np.ndarray,
    scenes: list[images.Scene],
    out: dict[str, Tensor],
    wanted: dict[str, Tensor],
    path: Path,
) -> None:
    """Writes a page of the images whose thing or colour is judged wrong, eight in a row, twice as
    large; their prompts and the judge's answers go into a text file beside it."""
    lines, tiles = [], []
    for i, scene in enumerate(scenes):
        for q in ("thing", "colour", "left", "right"):
            answer = int(out[q][i].argmax())
            if wanted[q][i] not in (-100, answer):
                lines.append(f"{images.caption(scene)}: {q} judged {QUESTIONS[q][answer]}")
                tiles.append((drawn[i] * 255).round().astype(np.uint8).repeat(2, 0).repeat(2, 1))
    page = Image.new("RGB", (8 * 128, max(1, -(-len(tiles) // 8)) * 128), "white")
    for i, tile in enumerate(tiles):
        page.paste(Image.fromarray(tile), (i % 8 * 128, i // 8 * 128))
    page.save(path)
    path.with_suffix(".txt").write_text("\n".join(lines) + "\n")


@torch.no_grad()
def score_unet(
    pipeline: StableDiffusionPipeline, judge: Judge, count: int, guidance: float, page: Path
) -> dict[str, float]:
    """Returns question -> share of generated images that show what their prompt asks for; the
    others are drawn on a page."""
    scenes = [images.random_scene(random.Random(2 * 10**9 + i)) for i in range(count)]
    drawn = generate(pipeline, [images.caption(scene) for scene in scenes], guidance)
    out = judge(torch.from_numpy(drawn).permute(0, 3, 1, 2).float() * 2 - 1)
    wanted = numbers_of(scenes)
    score = share_right(out, wanted)
    write_wrong(drawn, scenes, out, wanted, page)
    plain = torch.tensor([scene.background in images.PLAIN_BACKGROUNDS for scene in scenes])
    score["plain background"] = share_right(out, only(wanted, plain))["background"]
    # a striped thing shows two colours, and either may seem to be its own
    plain = torch.tensor([scene.texture == "plain" for scene in scenes])
    score["colour of plain things"] = share_right(out, only(wanted, plain))["colour"]
    return score


def named_folder(text: str) -> tuple[str, Path]:
    name, _, folder = text.partition("=")
    return name, Path(folder)


def main() -> None:
    p = parser()
    p.add_argument("--prompts", type=int, default=512)
    p.add_argument(
        "--unseen", type=named_folder, action="append", default=[], metavar="NAME=FOLDER"
    )
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    off = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline = StableDiffusionPipeline.from_pretrained(args.out, torch_dtype=torch.float32, **off)
    score: dict[str, object] = {"round trip": score_vae(pipeline, dict(args.unseen))}
    print(score, flush=True)
    judge = train_judge(args, pipeline.vae).eval()
    score |= try_judge(judge, pipeline.vae) | {"prompts": args.prompts}
    print(score, flush=True)
    score[f"guidance {GUIDANCE:g}"] = score_unet(
        pipeline, judge, args.prompts, GUIDANCE, args.work / "wrong.png"
    )
    print(score, flush=True)
    path = args.out / "training.json"
    record = json.loads(path.read_text()) | {"score": score}
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
