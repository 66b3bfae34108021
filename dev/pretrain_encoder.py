"""Train the encoder of drawings, sample_data/encoder, from nothing.

    python dev/pretrain_encoder.py --work WORK

It draws subjects, styles and scenes (subjects.py, images.py) into WORK, trains on one thread, saves
its state in WORK/encoder.pt as it goes, and the same command takes it up again; then it writes the
encoder, and its curve and figures as training.json beside it. Everything random depends on the seed
and the step alone.

The loss is the error of cosines: 1 for two poses of one subject on two backgrounds, at two scales
and places; the likeness that subjects.py gives for a subject that shares some of it and for a
damaged image; at most OTHERS for another subject. The same for styles. The answers to questions
about captions are learned by cross entropy.
"""

import argparse
import json
import random
from copy import deepcopy
from pathlib import Path
from typing import Any

import images
import numpy as np
import subjects
import torch
import torch.nn.functional as F
from PIL import Image
from pretrain_vae import Clock, lr_at, save_whole, to_unit, update_average
from torch import Tensor, nn
from tqdm import tqdm

from sd_lora.sampling.drawing_encoder import DrawingEncoder, save_encoder

OUT = Path(__file__).parent.parent / "sample_data" / "encoder"
NUM_SUBJECTS, NUM_STYLES, NUM_SCENES, NUM_UNSEEN = 1500, 500, 3000, 128
KINDS = ("pose", "other pose", "hybrid", "repainted", "doubled", "lacking")
IN_STYLE = 3
OTHERS = 0.1
"""Cosine of two subjects, or two styles, that costs nothing."""

QUESTIONS: dict[str, dict[str, Any]] = {
    "thing": {
        "pattern": rf"\b({'|'.join(images.THINGS)})(?:e?s)?\b",
        "answers": list(images.THINGS),
    },
    "colour": {
        "pattern": rf"\b({'|'.join(images.COLOURS)})\b(?! (?:background|stripes|spots))",
        "answers": list(images.COLOURS),
    },
    "background": {
        "pattern": rf"\b(?:({'|'.join(images.PALETTE)}) background"
        rf"|(?:on|in) the ({'|'.join(images.SCENERY)})|at (night))\b",
        "answers": list(images.BACKGROUNDS),
    },
    "count": {
        "pattern": r"\b(an?|one|two|three)\b"
        r"(?! (?:photo|drawing|image|cartoon|pencil|chalk|watercolor))",
        "answers": ["a|an|one", "two", "three"],
    },
}


def answers(scene: images.Scene) -> list[int]:
    """Number of the answer to each question about a scene; -100 where its caption has none."""
    said = {
        "thing": scene.thing,
        "colour": scene.colour if scene.style != "sketch" else "",
        "background": scene.background if images.place(scene) else "",
        "count": {1: "a|an|one", 2: "two", 3: "three"}[scene.count],
    }
    if scene.other:
        said |= {"thing": "", "colour": "", "count": ""}
    numbers = []
    for name, question in QUESTIONS.items():
        known = said[name] in question["answers"]
        numbers.append(question["answers"].index(said[name]) if known else -100)
    return numbers


def draw_subject(seed: int) -> tuple[np.ndarray, list[float]]:
    """One subject in all KINDS (6, 72, 72, 4), and the likeness of each to the first."""
    rng = random.Random(seed)
    a, b = subjects.subject(rng), subjects.subject(rng)
    same = rng.getrandbits(32)
    kinds = [
        a,
        subjects.hybrid(a, b, rng),
        subjects.repainted(a, b, rng),
        subjects.doubled(a, rng),
        subjects.lacking(a, rng),
    ]
    drawn = [subjects.pose(kind, random.Random(same)) for kind in kinds]
    like = [subjects.likeness(drawn[0], other) for other in drawn[1:]]
    # a second face is a defect, however much of the subject is there
    like = [like[0], min(like[1], 0.25), 0.65 * like[2], like[3]]
    drawn.insert(1, subjects.pose(a, rng))
    return np.stack([np.asarray(d) for d in drawn]), [1.0, 1.0, *like]


def draw_pool(args: argparse.Namespace) -> dict[str, np.ndarray]:
    """Subjects, their likenesses, styles, scenes and their answers, drawn once and kept."""
    kept = args.work / "encoder_pool.npz"
    if not kept.is_file():
        first = args.seed * 10**7
        count = NUM_SUBJECTS + NUM_UNSEEN
        drawn = [draw_subject(first + i) for i in tqdm(range(count), "subjects", mininterval=30)]
        styles = np.empty((NUM_STYLES + NUM_UNSEEN, IN_STYLE, 64, 64, 3), np.uint8)
        for i in tqdm(range(len(styles)), "styles", mininterval=30):
            rng = random.Random(first + 2 * 10**6 + i)
            way = subjects.style(rng)
            for k in range(IN_STYLE):
                styles[i, k] = subjects.in_style(images.random_scene(rng), way, rng)
        scenes = [
            images.random_scene(random.Random(first + 4 * 10**6 + i))
            for i in range(NUM_SCENES + 4 * NUM_UNSEEN)
        ]
        pool = {
            "subjects": np.stack([d[0] for d in drawn]),
            "likeness": np.array([d[1] for d in drawn], np.float32),
            "styles": styles,
            "scenes": np.stack([np.asarray(images.draw(s)) for s in tqdm(scenes, "scenes")]),
            "answers": np.array([answers(s) for s in scenes]),
        }
        part = kept.with_suffix(".part.npz")
        np.savez(part, **pool)
        part.rename(kept)
    with np.load(kept) as pool:
        return dict(pool)


def subject_batch(
    pool: dict[str, np.ndarray], rows: list[int], rng: random.Random
) -> tuple[np.ndarray, Tensor, Tensor]:
    """Images of subjects (B·8, 64, 64, 3): KINDS, then two damaged ones; their likenesses (B, 8);
    numbers of their backgrounds (B·8,)."""
    drawn, like, grounds = [], [], []
    backs = [subjects.ground(rng) for _ in range(len(rows))]  # shared: they tell nothing
    for row in rows:
        faces = [Image.fromarray(s) for s in pool["subjects"][row]]
        for face, level in zip([*faces, *faces[:2]], [*pool["likeness"][row], -1, -1], strict=True):
            back, number = rng.choice(backs)
            image = subjects.compose(face, back, rng)
            if level < 0:
                image, level = subjects.spoil(image, rng)
                number = -100
            else:
                image = subjects.lightly(image, rng)
            drawn.append(np.asarray(image))
            like.append(float(level))
            grounds.append(number)
    return np.stack(drawn), torch.tensor(like).view(len(rows), -1), torch.tensor(grounds)


def style_batch(
    pool: dict[str, np.ndarray], rows: list[int], rng: random.Random
) -> tuple[np.ndarray, Tensor]:
    """Images of styles (B·3, 64, 64, 3): two scenes and a damaged one; likenesses (B, 3)."""
    drawn, like = [], []
    damages = (subjects._noise, subjects._blur, subjects._colours)
    for row in rows:
        picked = rng.sample(range(IN_STYLE), 2)
        scenes = [Image.fromarray(pool["styles"][row, i]) for i in (*picked, picked[1])]
        spoilt, level = rng.choice(damages)(scenes[2], rng)
        drawn += [np.asarray(subjects.lightly(s, rng)) for s in scenes[:2]] + [np.asarray(spoilt)]
        like.append([1.0, 1.0, level])
    return np.stack(drawn), torch.tensor(like)


def likeness_loss(embedded: Tensor, like: Tensor) -> Tensor:
    """Error of cosines. embedded (B·K, D): K images of each of B subjects; like (B, K): likeness of
    each image to the first one of its subject, which is also its likeness to others like 1."""
    count, kinds = like.shape
    cosines = (embedded @ embedded.T).view(count, kinds, count, kinds)
    own = torch.arange(count)
    first, second = cosines[own, 0, own], cosines[own, 1, own]  # (B, K)
    same = (first[:, 1] - 1).square().mean()
    graded = (first[:, 2:] - like[:, 2:]).square() + (second[:, 2:] - like[:, 2:]).square()
    foreign = (own[:, None] != own[None, :])[:, None, :, None]
    above = (cosines[:, :2] - OTHERS).clamp(min=0).square() * foreign
    return 2 * same + graded.mean() + 4 * above.sum() / (foreign.sum() * 2 * kinds).clamp(min=1)


def loss_of(
    encoder: DrawingEncoder, pool: dict[str, np.ndarray], args: argparse.Namespace, step: int
) -> Tensor:
    """Loss of one step, drawn by seed and step."""
    rng = random.Random(args.seed * 10**8 + step)
    rows = rng.sample(range(NUM_SUBJECTS), args.batch)
    pixels, like, grounds = subject_batch(pool, rows, rng)
    styled, style_like = style_batch(pool, rng.sample(range(NUM_STYLES), args.batch // 2), rng)
    picked = rng.sample(range(NUM_SCENES), args.batch)
    scenes = pool["scenes"][picked]
    if rng.random() < 0.5:
        scenes = scenes[:, :, ::-1]
    n, m = len(pixels), len(styled)
    x = to_unit(np.concatenate([pixels, styled, scenes])).contiguous(
        memory_format=torch.channels_last
    )
    with torch.autocast("cpu", torch.bfloat16):
        subject, style, said = encoder(x)
    total = likeness_loss(subject[:n], like) + 0.5 * likeness_loss(style[n : n + m], style_like)
    wanted = torch.from_numpy(pool["answers"][picked])
    asked = [(said[q][n + m :], wanted[:, i]) for i, q in enumerate(QUESTIONS)]
    for logits, right in [*asked, (said["background"][:n], grounds)]:
        error = F.cross_entropy(logits.float(), right, reduction="sum")  # of those with an answer
        total = total + 0.05 * error / len(right)
    return total


@torch.no_grad()
def figures(encoder: DrawingEncoder, pool: dict[str, np.ndarray]) -> dict[str, float]:
    """Cosines of unseen subjects, by kind, and shares of right answers about unseen scenes."""
    rng, rows = random.Random(1), range(NUM_SUBJECTS, NUM_SUBJECTS + NUM_UNSEEN)
    pixels, _, _ = subject_batch(pool, list(rows), rng)
    e = torch.cat([encoder(to_unit(p))[0] for p in np.split(pixels, 8)]).view(NUM_UNSEEN, 8, -1)
    out = {k: float((e[:, 0] * e[:, i]).sum(-1).mean()) for i, k in enumerate(KINDS) if i}
    out["other subject"] = float((e[:, 0] * e[:, 1].roll(1, 0)).sum(-1).mean())
    for damage in subjects.DAMAGES:
        spoilt = [
            damage(Image.fromarray(p), rng)[0] for p in pixels.reshape(-1, 8, 64, 64, 3)[:, 1]
        ]
        f = encoder(to_unit(np.stack([np.asarray(i) for i in spoilt])))[0]
        out[damage.__name__.strip("_")] = float((e[:, 0] * f).sum(-1).mean())
    styled, _ = style_batch(pool, list(range(NUM_STYLES, NUM_STYLES + NUM_UNSEEN)), rng)
    s = encoder(to_unit(styled))[1].view(NUM_UNSEEN, 3, -1)
    out["same style"] = float((s[:, 0] * s[:, 1]).sum(-1).mean())
    out["damaged style"] = float((s[:, 0] * s[:, 2]).sum(-1).mean())
    out["other style"] = float((s[:, 0] * s[:, 1].roll(1, 0)).sum(-1).mean())
    said = encoder(to_unit(pool["scenes"][NUM_SCENES:]))[2]
    wanted = torch.from_numpy(pool["answers"][NUM_SCENES:])
    for i, name in enumerate(QUESTIONS):
        known = wanted[:, i] >= 0
        out[f"right {name}"] = float((said[name].argmax(1) == wanted[:, i])[known].float().mean())
    return {name: round(value, 3) for name, value in out.items()}


def train(args: argparse.Namespace) -> None:
    """Train, and write the encoder with the moving average of the weights."""
    pool = draw_pool(args)
    torch.manual_seed(args.seed)
    encoder = DrawingEncoder(QUESTIONS).to(memory_format=torch.channels_last)
    average = deepcopy(encoder).eval()
    optimizer = torch.optim.AdamW(encoder.parameters(), args.lr, weight_decay=0.02, fused=True)
    state, clock, start = args.work / "encoder.pt", Clock([]), 0
    if state.is_file():
        saved = torch.load(state)
        encoder.load_state_dict(saved["encoder"])
        average.load_state_dict(saved["average"])
        optimizer.load_state_dict(saved["optimizer"])
        start, clock = saved["step"], Clock(saved["log"])
    for step in tqdm(range(start, args.steps), "encoder", initial=start, mininterval=30):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, args.steps, args.lr, args.cooldown)
        loss = loss_of(encoder, pool, args, step)
        loss.backward()
        nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        update_average(average, encoder, step)
        clock.add(loss)
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            clock.row(step + 1, **figures(average, pool))
            saved = {"encoder": encoder.state_dict(), "average": average.state_dict()}
            saved |= {"optimizer": optimizer.state_dict(), "log": clock.rows, "step": step + 1}
            save_whole(saved, state)
    save_encoder(average, args.out)
    record = {"seed": args.seed, "batch": args.batch, "steps": args.steps, "lr": args.lr}
    record |= {"versions": {"torch": torch.__version__}, "log": clock.rows}
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("--work", type=Path, required=True, help="folder for the pool and the state")
    p.add_argument("--out", type=Path, default=OUT)
    p.add_argument("--steps", type=int, default=2400)
    p.add_argument("--batch", type=int, default=20, help="subjects a step, 8 images each")
    p.add_argument("--lr", type=float, default=2e-3)
    p.add_argument("--cooldown", type=float, default=0.4, help="last share of steps, rate to 0")
    p.add_argument("--every", type=int, default=200, help="steps from one record to the next")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    train(args)


if __name__ == "__main__":
    main()
