"""The VAE of the embedded base: its images, its loss, its training. See pretrain_tiny_sd.py."""

import argparse
import random
import time
from copy import deepcopy
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import images
import numpy as np
import patterns
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

NUM_CORPUS = 40_000
NUM_UNSEEN = 256


def draw_any(job: tuple[int, Path]) -> np.ndarray:
    """Returns one image (64, 64, 3): a scene, a pattern or a crop of a photograph."""
    seed, photos = job
    rng, kind = random.Random(seed), seed % 20
    if kind < 8:
        return np.asarray(images.draw(images.random_scene(rng)))
    return np.asarray(patterns.pattern(rng) if kind < 15 else patterns.crop(photos, rng))


def draw_corpus(args: argparse.Namespace) -> np.ndarray:
    """Returns images (N, 64, 64, 3) uint8 of all kinds, kept on disk; the last are not learned."""
    kept = args.work / "corpus.npy"
    if not kept.is_file():
        jobs = [(args.seed * 10**6 + i, args.photos) for i in range(NUM_CORPUS + NUM_UNSEEN)]
        part, shape = kept.with_suffix(".part"), (len(jobs), images.SIDE, images.SIDE, 3)
        pixels = np.lib.format.open_memmap(part, "w+", np.uint8, shape)
        with Pool(args.threads) as pool:
            for i, image in enumerate(tqdm(pool.imap(draw_any, jobs, 64), "corpus", len(jobs))):
                pixels[i] = image
        pixels.flush()
        part.rename(kept)
    return np.load(kept, mmap_mode="r")


def save_whole(state: dict[str, Any], path: Path) -> None:
    """Saves a state so that a kill leaves the old one or the new one."""
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


class Clock:
    """The log of one stage: a row every so many steps, seconds counted across restarts."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows, self._losses = rows, list[float]()
        self._before, self._began = (rows[-1]["seconds"] if rows else 0), time.time()

    def add(self, loss: Tensor) -> None:
        self._losses.append(loss.item())

    def row(self, step: int, **more: float) -> None:
        seconds = self._before + round(time.time() - self._began)
        loss = round(float(np.mean(self._losses)), 5)
        self.rows.append({"step": step, "loss": loss, **more, "seconds": seconds})
        self._losses.clear()
        print(self.rows[-1], flush=True)


def resume(state: Path, parts: dict[str, Any]) -> tuple[int, Clock]:
    """Load the parts that `keep` saved, where there is a state; returns the step to go on from and
    the log."""
    if not state.is_file():
        return 0, Clock([])
    saved = torch.load(state)
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    return saved["step"], Clock(saved["log"])


def keep(state: Path, parts: dict[str, Any], step: int, clock: Clock) -> None:
    """Save the parts (models, an optimiser), the number of steps done and the log."""
    kept = {name: part.state_dict() for name, part in parts.items()}
    save_whole(kept | {"step": step, "log": clock.rows}, state)


def lr_at(step: int, steps: int, peak: float, cooldown: float, warmup: int = 200) -> float:
    """Linear warm-up, constant, then linear to zero over the last ``cooldown`` of the steps."""
    left = (steps - step) / max(1.0, steps * cooldown)
    return peak * min(1.0, (step + 1) / warmup, left)


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(32, 64, 96),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    )


def to_unit(pixels: np.ndarray) -> Tensor:
    """Returns images (B, 3, H, W) in [-1, 1] of pixels (B, H, W, 3) uint8."""
    return torch.tensor(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def recoloured(x: Tensor, rng: np.random.Generator) -> Tensor:
    """Returns images of which every other one has its channels swapped and stretched or inverted
    between two random levels: palettes without end, at the price of one multiplication."""
    out = []
    for image in x:
        if rng.random() < 0.5:
            low, high = (torch.from_numpy(rng.uniform(-1, 1, (3, 1, 1))).float() for _ in range(2))
            wide = torch.where((high - low).abs() < 0.5, high.sign(), high)
            image = low + (wide - low) * (image[rng.permutation(3)] + 1) / 2
        out.append(image)
    return torch.stack(out)


def cut_together(x: Tensor, rng: np.random.Generator) -> Tensor:
    """Returns images (B, 3, H, W) of which one in three is cut together with another one, in
    bands or in a disc: colours side by side as no scene has them."""
    h, w = x.shape[2:]
    y, z = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    masks = []
    for _ in range(len(x)):
        kind, u, v, size = rng.random(4)
        mask = torch.zeros(h, w, dtype=torch.bool)
        if kind < 0.2:
            mask = (((y if kind < 0.12 else z) + u * 64) / (3 + 13 * size)).long() % 2 == 0
        elif kind < 0.33:
            mask = (y - u * h) ** 2 + (z - v * w) ** 2 < (6 + 20 * size) ** 2
        masks.append(mask)
    return torch.where(torch.stack(masks)[:, None], x.roll(1, 0), x)


def draw_batch(corpus: np.ndarray, rng: np.random.Generator, batch: int, side: int) -> Tensor:
    """Returns images (B, 3, side, side) in [-1, 1], cropped, mirrored, recoloured, cut together."""
    top, left = (int(rng.integers(images.SIDE - side + 1)) for _ in range(2))
    rows = rng.integers(len(corpus) - NUM_UNSEEN, size=batch)
    x = to_unit(np.stack([corpus[i, top : top + side, left : left + side] for i in rows]))
    x = recoloured(x, rng)
    if rng.random() < 0.5:
        x = x.flip(3)
    return cut_together(x, rng)


def image_loss(y: Tensor, x: Tensor) -> Tensor:
    """L1 + L2 + half the L1 of the edges: flat colours and sharp borders are most of it."""
    down = F.l1_loss(y[..., 1:, :] - y[..., :-1, :], x[..., 1:, :] - x[..., :-1, :])
    along = F.l1_loss(y[..., 1:] - y[..., :-1], x[..., 1:] - x[..., :-1])
    return F.l1_loss(y, x) + F.mse_loss(y, x) + 0.5 * (down + along)


@torch.no_grad()
def round_trip(vae: AutoencoderKL, x: Tensor) -> Tensor:
    """Returns images in [-1, 1], decoded from the mean latents of images x in [-1, 1]."""
    y = [vae.decode(vae.encode(c).latent_dist.mean).sample for c in x.split(32)]
    return torch.cat(y).clamp(-1, 1)


def pixel_error(vae: AutoencoderKL, x: Tensor) -> float:
    """Returns the mean pixel error of a round trip, of the range 0 to 1."""
    return round(float((round_trip(vae, x) - x).abs().mean() / 2), 4)


def write_pairs(vae: AutoencoderKL, x: Tensor, path: Path) -> None:
    """Writes a page of images x, each with its round trip below it, twice as large."""
    both = torch.stack([x, round_trip(vae, x)])  # (2, N, 3, H, W)
    both = both.unflatten(1, (-1, 16)).permute(1, 0, 4, 2, 5, 3)  # rows, 2, H, 16, W, 3
    pixels = ((both + 1) * 127.5).round().byte().numpy()
    pixels = pixels.reshape(-1, 16 * x.shape[3], 3)
    Image.fromarray(pixels.repeat(2, 0).repeat(2, 1)).save(path)


def train_vae(args: argparse.Namespace) -> None:
    """Trains the VAE; its state is in <work>/vae.pt.

    The first four fifths on crops of 32 pixels, four for the price of one image; then on whole
    images, because group normalisation sees the whole image.
    """
    torch.manual_seed(args.seed)
    fit(args, build_vae(), "vae", args.vae_steps, args.vae_lr, whole_from=0.8)


def fit(
    args: argparse.Namespace,
    vae: AutoencoderKL,
    name: str,
    steps: int,
    rate: float,
    whole_from: float,
) -> None:
    """Trains those parameters of a VAE that require it, on the corpus; the state is in
    <work>/<name>.pt. From the share ``whole_from`` of the steps on, images are whole."""
    corpus = draw_corpus(args)
    unseen = to_unit(corpus[-NUM_UNSEEN:])
    trained, average = [p for p in vae.parameters() if p.requires_grad], deepcopy(vae)
    optimizer = torch.optim.AdamW(trained, rate, weight_decay=1e-4, fused=True)
    state, parts = (
        args.work / f"{name}.pt",
        {"vae": vae, "average": average, "optimizer": optimizer},
    )
    start, clock = resume(state, parts)
    for step in tqdm(range(start, steps), name, steps, initial=start, mininterval=30):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, steps, rate, args.cooldown)
        side, batch = (32, args.batch) if step < whole_from * steps else (64, args.batch // 2)
        x = draw_batch(corpus, np.random.default_rng((args.seed, step)), batch, side)
        g = torch.Generator().manual_seed(args.seed * 10**7 + step)
        with torch.autocast("cpu", torch.bfloat16):
            q = vae.encode(x).latent_dist
            y = vae.decode(q.sample(g)).sample.float()
        loss = image_loss(y, x) + 2e-4 * q.kl().mean() / q.mean[0].numel()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        update_average(average, vae, step)
        clock.add(loss)
        if (step + 1) % 500 == 0 or step + 1 == steps:
            clock.row(step + 1, pixel_error=pixel_error(average, unseen))
            keep(state, parts, step + 1, clock)
            write_pairs(average, unseen[:64], args.work / f"{name}.png")


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, step: int) -> None:
    """Moves the average of the weights: over the last thousand steps, over fewer at first."""
    kept = min(0.999, (step + 1) / (step + 10))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - kept)
