"""Train the encoder of drawings, sample_data/encoder, from nothing.

    python dev/pretrain_encoder.py --work WORK

It draws subjects, styles and scenes (subjects.py, images.py), trains on one thread in four stages,
saves its state in WORK/<stage>.pt as it goes, and the same command takes it up again; then it
writes the encoder, and its curves and figures as training.json beside it. Everything random depends
on the seed, the stage and the step alone.

1. trunk: maps of the whole image, styles, and the answers to questions about captions (cross
   entropy). Subjects are learned along with them by a head that is thrown away.
2. outline: the subject's mask, by cross entropy of every pixel.
3. subject: the network of subjects cut out by this mask, from layouts computed once, mirrored and
   with their three colours in any order.
4. comparison: the likeness of two layouts by their measures, cross entropy.

The loss of subjects and styles is the error of cosines: 1 for two poses of one subject on two
backgrounds, at two scales and places; the likeness that subjects.py gives for a subject that shares
some of it and for a damaged image; at most OTHERS for another subject, where the nearest of the
others count most.
"""

import argparse
import json
import random
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from pathlib import Path
from typing import Any

import images
import numpy as np
import subjects
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from pretrain_vae import keep, lr_at, resume, save_whole, to_unit, update_average
from torch import Tensor, nn
from tqdm import tqdm

from sd_lora.sampling.comparison import LAYOUT, PAIRS, measures, mirrored
from sd_lora.sampling.drawing_encoder import (
    OTHERS,
    SUBJECT,
    WIDTHS,
    DrawingEncoder,
    cut_out,
    layout,
    save_encoder,
)

OUT = Path(__file__).parent.parent / "sample_data" / "encoder"
NUM_STYLES, NUM_SCENES, NUM_UNSEEN = 500, 3000, 128
NUM_SUBJECTS, NUM_COMPARED = 8000, 3000
"""Subjects whose layouts the last two stages learn from. From 3,360 to 8,000 the unseen error of
the third stayed the same: its network is the limit."""

STRANGERS = 3
"""Images of other subjects that a subject's is compared with: of the nearest, and of any."""

SAME = 2
"""Weight of two poses of one subject in the comparison's loss."""

STAGES = {"trunk": 3000, "outline": 1000, "subject": 2200, "comparison": 3000}
"""Steps of each stage."""

BATCHES = {"trunk": 16, "outline": 16, "subject": 32, "comparison": 512}
"""Subjects a step; pairs in the last stage."""

RATES = {"trunk": 2e-3, "outline": 2e-3, "subject": 3e-3, "comparison": 3e-3}
KINDS = (
    "first", "other pose", "hybrid", "repainted", "doubled", "lacking", "mixed", "spoilt sticker",
    "spoilt", "spoilt more", "spoilt most",
)  # fmt: skip
"""Images of a subject in a batch. The last three are damaged after they were drawn."""

SPOILT = 3
TRIES = 4
"""Backgrounds tried until one shows the subject."""

RECENT, NEW = 192, 4
"""A step takes its subjects from the last RECENT ones; every step there are NEW more."""

IN_STYLE = 3
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


@lru_cache(2 * RECENT)
def draw_subject(name: str) -> tuple[list[Image.Image], list[float]]:
    """Stickers of one subject in all KINDS but the spoilt images, and the likeness of each to the
    first. The name settles everything random."""
    rng = random.Random(name)
    a, b = subjects.subject(rng), subjects.subject(rng)
    same = rng.getrandbits(32)
    kinds = [
        a,
        subjects.hybrid(a, b, rng),
        subjects.repainted(a, b, rng),
        subjects.doubled(a, rng),
        subjects.lacking(a, rng),
        b,
    ]
    *drawn, foreign = [subjects.pose(kind, random.Random(same)) for kind in kinds]
    like = [subjects.likeness(drawn[0], other) for other in drawn]
    # a second face is a defect, however much of the subject is there
    like[2], like[3] = min(like[2], 0.25), 0.65 * like[3]
    if rng.random() < 0.3:  # the subject itself in other colours
        foreign = subjects._colours(drawn[0], rng)[0]
    for image, level in (
        subjects.mixed(drawn[0], foreign, rng),
        subjects.spoilt_sticker(drawn[0], rng),
    ):
        drawn.append(image)
        like.append(level)
    drawn.insert(1, subjects.pose(a, rng))
    return drawn, [1.0, *like]


def draw_pool(args: argparse.Namespace) -> dict[str, np.ndarray]:
    """Styles, scenes and their answers, drawn once and kept."""
    kept = args.work / "encoder_pool.npz"
    if not kept.is_file():
        first = args.seed * 10**7
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
            "styles": styles,
            "scenes": np.stack([np.asarray(images.draw(s)) for s in tqdm(scenes, "scenes")]),
            "answers": np.array([answers(s) for s in scenes]),
        }
        part = kept.with_suffix(".part.npz")
        np.savez(part, **pool)
        part.rename(kept)
    with np.load(kept) as pool:
        return dict(pool)


@dataclass
class Subjects:
    """Images of B subjects in K KINDS: pixels (B·K, 64, 64, 3), masks (B·K, 64, 64), likenesses
    (B, K), and numbers of their backgrounds (B·K,)."""

    pixels: np.ndarray
    masks: np.ndarray
    like: Tensor
    grounds: Tensor


def visible(image: Image.Image, back: Image.Image, mask: Image.Image) -> bool:
    """Do most of the subject's pixels differ from the background?"""
    there = np.asarray(mask) > 127
    change = np.abs(np.asarray(image, np.int16) - np.asarray(back, np.int16)).max(2)
    return float((change[there] > 40).mean()) > 0.7 if there.any() else False


def subject_batch(names: list[str], rng: random.Random) -> Subjects:
    """Images of the subjects of these names."""
    count = len(names)
    drawn, masks, like, grounds = [], [], [], []
    backs = [subjects.ground(rng) for _ in range(count)]  # shared: they tell nothing
    for name in names:
        faces, levels = draw_subject(name)
        mirrored = rng.random() < 0.5
        for k in range(len(KINDS)):
            spoilt = k - len(faces)
            face = faces[k] if spoilt < 0 else faces[spoilt % 2]
            level = levels[k] if spoilt < 0 else -1
            if mirrored != (rng.random() < 0.15):
                face = ImageOps.mirror(face)
            for back in rng.sample(backs, min(count, TRIES)):
                image, mask = subjects.compose(face, back[0], rng)
                if visible(image, back[0], mask):
                    break
            number = back[1]
            if spoilt < 0:
                image = subjects.lightly(image, rng)
            else:
                image, level = subjects.spoilt(image, rng)
                number = -100
            drawn.append(np.asarray(image))
            masks.append(np.asarray(mask))
            like.append(level)
            grounds.append(number)
    shape = (count, len(KINDS))
    return Subjects(
        np.stack(drawn), np.stack(masks), torch.tensor(like).view(shape), torch.tensor(grounds)
    )


def channels_last(*parts: np.ndarray) -> Tensor:
    return to_unit(np.concatenate(parts)).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def layouts_of(encoder: DrawingEncoder, names: Sequence[str], seed: str) -> dict[str, Tensor]:
    """Layouts of subjects in all KINDS (N, K, LAYOUT, 11, 11), in half precision, and likenesses
    (N, K)."""
    layouts, like, few = [], [], 16
    for i in tqdm(range(0, len(names), few), "layouts", mininterval=30):
        seen = subject_batch(list(names[i : i + few]), random.Random(f"{seed} {i}"))
        with torch.autocast("cpu", torch.bfloat16):
            alone = encoder.alone(channels_last(seen.pixels))
        shape = (len(seen.like), len(KINDS), LAYOUT, 11, 11)
        layouts.append(layout(alone.float()).half().view(shape))
        like.append(seen.like)
    return {"layouts": torch.cat(layouts), "like": torch.cat(like)}


def turned(layouts: Tensor, rng: random.Random) -> Tensor:
    """Layouts of other subjects, (B, K, LAYOUT, 11, 11): all mirrored or none (about a line 1.5
    pixels from the middle), and each subject with red, green and blue in another order."""
    rest = list(range(27, LAYOUT))
    if rng.random() < 0.5:
        layouts = mirrored(layouts)
    out = []
    for one in layouts:
        order = rng.choice(list(permutations(range(3))))
        colours = torch.arange(27).view(3, 3, 3).permute(order).flatten().tolist()
        out.append(one[:, colours + rest])
    return torch.stack(out)


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
    foreign = (own[:, None] != own[None, :])[:, None, :, None].expand(-1, 2, -1, kinds)
    above = (cosines[:, :2] - OTHERS).clamp(min=0).square()[foreign].view(2 * count, -1)
    hardest = above.topk(max(1, above.shape[1] // 20)).values
    return 2 * same + 4 * graded.mean() + 2 * above.mean() + hardest.mean()


@dataclass(frozen=True)
class Step:
    """The number of a step, its random numbers, subjects a batch, and the pool."""

    number: int
    rng: random.Random
    batch: int
    pool: dict[str, Any]

    def subjects(self) -> Subjects:
        """Of names that no other step than the next RECENT / NEW can take."""
        first = NEW * self.number
        picked = self.rng.sample(range(first, first + RECENT), self.batch)
        return subject_batch([str(i) for i in picked], self.rng)


Loss = Callable[[nn.ModuleDict, Step], Tensor]


def trunk_loss(net: nn.ModuleDict, step: Step) -> Tensor:
    """Loss of styles, answers and, by the head thrown away, subjects."""
    encoder, pool, rng, batch = net["encoder"], step.pool, step.rng, step.batch
    seen = step.subjects()
    styled, style_like = style_batch(pool, rng.sample(range(NUM_STYLES), batch // 2), rng)
    picked = rng.sample(range(NUM_SCENES), batch)
    scenes = pool["scenes"][picked]
    if rng.random() < 0.5:
        scenes = scenes[:, :, ::-1]
    n, m = len(seen.pixels), len(styled)
    with torch.autocast("cpu", torch.bfloat16):
        fine, middle, coarse = encoder.maps(channels_last(seen.pixels, styled, scenes))
        pooled = torch.cat([coarse.mean((2, 3)), coarse.amax((2, 3))], 1)
        subject = net["pooled"](pooled[:n])
        style = encoder.styled(fine[n : n + m], middle[n : n + m])
        said = encoder.answered(coarse)
    total = likeness_loss(F.normalize(subject.float()), seen.like)
    total = total + 0.5 * likeness_loss(style, style_like)
    wanted = torch.from_numpy(pool["answers"][picked])
    asked = [(said[q][n + m :], wanted[:, i]) for i, q in enumerate(QUESTIONS)]
    for logits, right in [*asked, (said["background"][:n], seen.grounds)]:
        error = F.cross_entropy(logits.float(), right, reduction="sum")  # of those with an answer
        total = total + 0.05 * error / len(right)
    return total


def outline_loss(net: nn.ModuleDict, step: Step) -> Tensor:
    """Cross entropy of the subject's pixels, the background turned over in some images."""
    encoder = net["encoder"]
    seen = step.subjects()
    whole = np.arange(len(seen.masks)) % len(KINDS) < len(KINDS) - SPOILT
    pixels, masks = seen.pixels[whole], seen.masks[whole] / np.float32(255)
    for i in range(0, len(pixels), 2):
        image = Image.fromarray(pixels[i])
        if i % 4:
            pixels[i], masks[i] = pixels[i, ::-1], masks[i, ::-1]
        else:
            damage = step.rng.choice((subjects._noise, subjects._blur, subjects._colours))
            pixels[i] = damage(image, step.rng)[0]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        fine, middle, _ = encoder.maps(channels_last(pixels))
    with torch.autocast("cpu", torch.bfloat16):
        said = encoder.outlined(fine, middle)
    return F.binary_cross_entropy_with_logits(said[:, 0], torch.from_numpy(masks))


def subject_loss(net: nn.ModuleDict, step: Step) -> Tensor:
    """Loss of subjects, by their layouts."""
    layouts, like = step.pool["layouts"], step.pool["like"]
    rows = step.rng.sample(range(len(like)), step.batch)
    x = turned(layouts[rows].float(), step.rng)
    with torch.autocast("cpu", torch.bfloat16):
        subject = net["encoder"].subject(x.flatten(0, 1))
    return likeness_loss(F.normalize(subject.float()), like[rows])


def measured_pairs(layouts: Tensor, like: Tensor, rng: random.Random) -> dict[str, Tensor]:
    """Measures of pairs (P, MEASURES) and their likenesses (P,): the first two images of each
    subject with all its others, and with STRANGERS images of the subjects nearest by their first
    layouts and of any others."""
    first = F.normalize(layouts[:, 0].float().flatten(1))
    nearest = (first @ first.T).fill_diagonal_(-1).topk(STRANGERS, 1).indices.tolist()
    pairs, wanted = [], []
    for s in range(len(like)):
        others = [i for i in range(len(like)) if i != s]
        for a in (0, 1):
            strangers = [*nearest[s], *(rng.choice(others) for _ in range(STRANGERS))]
            own = [(s, k, 1.0 if k == 1 else float(like[s, k])) for k in range(a + 1, len(KINDS))]
            foreign = [(o, rng.randrange(len(KINDS)), 0.0) for o in strangers]
            for subject, kind, level in own + foreign:
                pairs.append((s, a, subject, kind))
                wanted.append(level)
    parts = torch.tensor(pairs).split(PAIRS)
    found = [measures(layouts[p[:, 0], p[:, 1]], layouts[p[:, 2], p[:, 3]]) for p in parts]
    return {"measures": torch.cat(found), "wanted": torch.tensor(wanted)}


def comparison_loss(net: nn.ModuleDict, step: Step) -> Tensor:
    """Cross entropy of the likeness of pairs. Two poses of one subject, one pair of sixteen, count
    SAME times: a small one, enlarged, looks like a blurred one, and is the subject."""
    comparison, pool = net["encoder"].comparison, step.pool
    rows = step.rng.sample(range(len(pool["wanted"])), step.batch)
    said, wanted = comparison(pool["measures"][rows]), pool["wanted"][rows]
    weight = 1 + (SAME - 1) * (wanted == 1)
    return F.binary_cross_entropy_with_logits(said, wanted, weight)


LOSSES: dict[str, tuple[Loss, tuple[str, ...]]] = {
    "trunk": (
        trunk_loss,
        ("pooled", "encoder.fine", "encoder.middle", "encoder.coarse", "encoder.style",
         "encoder.answers"),
    ),
    "outline": (outline_loss, ("encoder.outline",)),
    "subject": (subject_loss, ("encoder.subject",)),
    "comparison": (comparison_loss, ("encoder.comparison",)),
}  # fmt: skip
"""Stage → its loss, and the modules that it trains."""


@torch.no_grad()
def figures(encoder: DrawingEncoder, pool: dict[str, np.ndarray]) -> dict[str, float]:
    """Cosines of unseen subjects, by kind, and shares of right answers about unseen scenes."""
    rng, kinds, count = random.Random(-1), len(KINDS), NUM_UNSEEN // 2
    seen = subject_batch([f"unseen {i}" for i in range(count)], rng)
    layouts, outlines = [], []
    for part in to_unit(seen.pixels).chunk(kinds):
        fine = encoder.fine(part)
        outlines.append(encoder.outlined(fine, encoder.middle(fine)))
        layouts.append(layout(cut_out(part, outlines[-1].sigmoid())))
    e = encoder.embedded(torch.cat(layouts)).view(count, kinds, -1)
    cosines = (e[:, :1] * e).sum(-1)
    error = (cosines - seen.like).abs().mean(0)
    out = {f"error {k}": float(error[i]) for i, k in enumerate(KINDS) if i}
    each = torch.cat(layouts).unflatten(0, (count, kinds))
    compared = torch.stack([encoder.comparison.likeness(x[:1], x)[0] for x in each])
    error = (compared - seen.like).abs().mean(0)
    out |= {f"compared, error {k}": float(error[i]) for i, k in enumerate(KINDS) if i}
    strangers = encoder.comparison.likeness(each[:, 0], each[:, 1])
    out["compared, other subject"] = float(strangers.fill_diagonal_(0).sum() / count / (count - 1))
    out["other pose"] = float(cosines[:, 1].mean())
    foreign = (e[:, 0] @ e[:, 1].T)[~torch.eye(count, dtype=torch.bool)].view(count, -1)
    out["other subject"] = float(foreign.mean())
    out["nearest other subject"] = float(foreign.amax(1).mean())
    out["nearest is the subject"] = float((cosines[:, 1] > foreign.amax(1)).float().mean())
    whole = torch.arange(count * kinds) % kinds < kinds - SPOILT
    mask, wanted = torch.cat(outlines)[:, 0] > 0, torch.from_numpy(seen.masks) > 127
    shared = (mask & wanted).sum((1, 2)) / (mask | wanted).sum((1, 2)).clamp(min=1)
    out["outline, intersection over union"] = float(shared[whole].mean())
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


def prepared(stage: str, encoder: DrawingEncoder, work: Path) -> dict[str, Any]:
    """Layouts for the third stage, measured pairs for the fourth; computed once and kept. The
    comparison's scale is set by them."""
    layouts, pairs = work / "layouts.pt", work / "pairs.pt"
    if stage == "subject":
        if not layouts.is_file():
            these = [f"train {i}" for i in range(NUM_SUBJECTS)]
            save_whole(layouts_of(encoder, these, "train "), layouts)
        return dict(torch.load(layouts))
    if stage != "comparison":
        return {}
    if not pairs.is_file():
        seen = torch.load(layouts, mmap=True)
        few = seen["layouts"][:NUM_COMPARED].clone(), seen["like"][:NUM_COMPARED]
        save_whole(measured_pairs(*few, random.Random("pairs")), pairs)
    pool = dict(torch.load(pairs))
    comparison = encoder.comparison
    comparison.middle.copy_(pool["measures"].mean(0))
    comparison.spread.copy_(pool["measures"].std(0) + 1e-3)
    return pool


def train(stage: str, net: nn.ModuleDict, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Train a stage's modules; `net` holds the moving average of their weights then. The curve."""
    pool = draw_pool(args) | prepared(stage, net["encoder"], args.work)
    loss_of, names = LOSSES[stage]
    steps, rate = args.steps.get(stage, STAGES[stage]), RATES[stage]
    torch.manual_seed(args.seed + len(stage))
    average = net.requires_grad_(False)
    trained = deepcopy(net)
    parameters = [p for name in names for p in trained.get_submodule(name).parameters()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, rate, weight_decay=0.02, fused=True)
    state = args.work / f"{stage}.pt"
    parts = {"net": trained, "average": average, "optimizer": optimizer}
    start, clock = resume(state, parts)
    for step in tqdm(range(start, steps), stage, steps, initial=start, mininterval=30):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, steps, rate, args.cooldown)
        rng = random.Random(f"{args.seed} {stage} {step}")
        loss = loss_of(trained, Step(step, rng, BATCHES[stage], pool))
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        update_average(average, trained, step)
        clock.add(loss)
        if (step + 1) % args.every == 0 or step + 1 == steps:
            clock.row(step + 1, **figures(average["encoder"], pool))
            keep(state, parts, step + 1, clock)
    return clock.rows


def train_all(args: argparse.Namespace) -> None:
    """Train all stages, and write the encoder."""
    torch.manual_seed(args.seed)
    wide = 2 * WIDTHS[-1]
    pooled = nn.Sequential(nn.Linear(wide, 192), nn.SiLU(), nn.Linear(192, SUBJECT))
    net = nn.ModuleDict({"encoder": DrawingEncoder(QUESTIONS), "pooled": pooled})
    net = net.to(memory_format=torch.channels_last)
    curves = {stage: train(stage, net, args) for stage in STAGES}
    save_encoder(net["encoder"], args.out)
    record = {"seed": args.seed, "batch": BATCHES, "steps": STAGES | args.steps, "lr": RATES}
    # a few rows of each stage tell the curve; the folder has 2 MB in all
    few = {k: [*rows[:-1][:: max(1, len(rows) // 4)], rows[-1]] for k, rows in curves.items()}
    record |= {"versions": {"torch": torch.__version__}, "curves": few}
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("--work", type=Path, required=True, help="folder for the pool and the state")
    p.add_argument("--out", type=Path, default=OUT)
    p.add_argument("--steps", type=json.loads, default={}, help='other steps: {"outline": 300}')
    p.add_argument("--cooldown", type=float, default=0.4, help="last share of steps, rate to 0")
    p.add_argument("--every", type=int, default=200, help="steps from one record to the next")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    train_all(args)


if __name__ == "__main__":
    main()
