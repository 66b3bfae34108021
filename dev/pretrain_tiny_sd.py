"""Train the embedded base, sample_data/tiny-sd, from nothing: tokenizer, VAE, text encoder, UNet.

    python dev/pretrain_tiny_sd.py --work WORK                # all of it
    python dev/pretrain_tiny_sd.py --work WORK --stage data   # draw the images
    python dev/pretrain_tiny_sd.py --work WORK --stage vae    # images <-> latents
    python dev/pretrain_tiny_sd.py --work WORK --stage decoder # other colours
    python dev/pretrain_tiny_sd.py --work WORK --stage unet   # latents, captions -> noise
    python dev/pretrain_tiny_sd.py --work WORK --stage export # the pipeline folder
    python dev/score_tiny_sd.py --work WORK                   # how good is it?

Every stage saves its state as it goes and takes it up again when it is started once more. The
model is an ordinary Stable Diffusion 1.x, small: real diffusers and transformers classes, a
64x64 image, 16x16x4 latents, epsilon prediction.
"""

import argparse
import json
import math
import random
import sys
import time
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import diffusers
import images
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

NUM_IMAGES = 24_000
NUM_HELD_OUT = 256
OUT = Path(__file__).parent.parent / "sample_data" / "tiny-sd"


def draw_one(seed: int) -> tuple[np.ndarray, list[str]]:
    """Returns one image (64, 64, 3) and four ways to caption it."""
    rng = random.Random(seed)
    scene = images.random_scene(rng)
    return np.asarray(images.draw(scene)), [images.caption(scene, rng) for _ in range(4)]


def draw_all(args: argparse.Namespace) -> tuple[Tensor, list[list[str]]]:
    """Returns all training images (N, 3, 64, 64) uint8 and captions, drawn once and kept."""
    kept = args.work / "images.pt"
    if not kept.is_file():
        seeds = range(args.seed * 10**6, args.seed * 10**6 + NUM_IMAGES + NUM_HELD_OUT)
        with Pool(args.threads) as pool:
            drawn = list(tqdm(pool.imap(draw_one, seeds, 64), "images", len(seeds)))
        pixels = torch.from_numpy(np.stack([p for p, _ in drawn])).permute(0, 3, 1, 2).contiguous()
        torch.save((pixels, [c for _, c in drawn]), kept)
    return torch.load(kept)


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


def gradients(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]


def vae_loss(vae: AutoencoderKL, x: Tensor) -> Tensor:
    """Returns the loss of images x (B, 3, 64, 64) in [-1, 1].

    L1 + L2 + half the L1 of the edges (flat colours and sharp borders are all there is here) and
    a small pull of the latents towards a unit normal.
    """
    q = vae.encode(x).latent_dist
    y = vae.decode(q.sample()).sample.float()
    return image_loss(y, x) + 2e-4 * q.kl().mean() / q.mean[0].numel()


def image_loss(y: Tensor, x: Tensor) -> Tensor:
    edges = sum(F.l1_loss(a, b) for a, b in zip(gradients(y), gradients(x), strict=True))
    return F.l1_loss(y, x) + F.mse_loss(y, x) + 0.5 * edges


def psnr(vae: AutoencoderKL, x: Tensor) -> float:
    """Returns the PSNR in dB of decoding the mean latents of images x in [-1, 1]."""
    with torch.no_grad():
        y = torch.cat([vae.decode(vae.encode(c).latent_dist.mean).sample for c in x.split(32)])
    return float(10 * torch.log10(4 / F.mse_loss(y.clamp(-1, 1), x)))


def lr_at(step: int, steps: int, peak: float, warmup: int = 200) -> float:
    """Linear warm-up, then cosine to 2 % of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))))


def to_unit(x: Tensor, device: str) -> Tensor:
    return (x.to(device).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def train_vae(args: argparse.Namespace) -> None:
    """Trains the VAE; its state is in <work>/vae.pt."""
    images, _ = draw_all(args)
    train, held_out = images[:NUM_IMAGES], to_unit(images[NUM_IMAGES:], args.device)
    torch.manual_seed(args.seed)
    vae = build_vae().to(args.device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), args.vae_lr, weight_decay=1e-4, fused=True)
    state, clock, start = args.work / "vae.pt", Clock([]), 0
    if state.is_file():
        saved = torch.load(state)
        vae.load_state_dict(saved["vae"])
        optimizer.load_state_dict(saved["optimizer"])
        start, clock = saved["step"], Clock(saved["log"])
    for step in tqdm(range(start, args.vae_steps), "vae", args.vae_steps, initial=start):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, args.vae_steps, args.vae_lr)
        g = torch.Generator().manual_seed(args.seed + step)
        x = to_unit(train[torch.randint(NUM_IMAGES, (args.batch,), generator=g)], args.device)
        with torch.autocast(args.device, torch.bfloat16):
            loss = vae_loss(vae, x)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.add(loss)
        if (step + 1) % 250 == 0 or step + 1 == args.vae_steps:
            clock.row(step + 1, psnr=round(psnr(vae, held_out), 2))
            saved = {"vae": vae.state_dict(), "optimizer": optimizer.state_dict()}
            save_whole(saved | {"step": step + 1, "log": clock.rows}, state)


def cut_together(x: Tensor, g: torch.Generator) -> Tensor:
    """Returns images (B, 3, H, W) of which three in four are cut together with another one, in
    bands or in a disc: colours side by side that no scene has."""
    b, _, h, w = x.shape
    y, z = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    other, masks = x[torch.randperm(b, generator=g)], []
    for _ in range(b):
        kind, u, v, size = torch.rand(4, generator=g).tolist()
        if kind < 0.5:
            along = y if kind < 0.35 else z
            mask = ((along + u * 64) / (3 + 13 * size)).long() % 2 == 0
        elif kind < 0.75:
            mask = (y - u * h) ** 2 + (z - v * w) ** 2 < (6 + 20 * size) ** 2
        else:
            mask = torch.zeros(h, w, dtype=torch.bool)
        masks.append(mask)
    return torch.where(torch.stack(masks)[:, None].to(x.device), other, x)


def train_decoder(args: argparse.Namespace) -> None:
    """Trains the decoder further, for fixed latents; its state is in <work>/decoder.pt.

    On drawn scenes alone it learns their colours by heart: a subject with other combinations (the
    mascot's purple bands on orange) came back with 20 dB. The encoder, and so the UNet, stays.
    """
    images, _ = draw_all(args)
    train, held_out = images[:NUM_IMAGES], to_unit(images[NUM_IMAGES:], args.device)
    vae = load_vae(args)
    trained = [*vae.post_quant_conv.parameters(), *vae.decoder.parameters()]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, args.decoder_lr, weight_decay=1e-4, fused=True)
    mixed = cut_together(held_out, torch.Generator().manual_seed(args.seed))
    clock = Clock([])
    clock.rows.append({"step": 0, "psnr": round(psnr(vae, held_out), 2), "seconds": 0})
    clock.rows[0]["psnr_cut_together"] = round(psnr(vae, mixed), 2)
    print(clock.rows, flush=True)
    for step in tqdm(range(args.decoder_steps), "decoder", mininterval=15):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, args.decoder_steps, args.decoder_lr)
        g = torch.Generator().manual_seed(args.seed + step)
        x = to_unit(train[torch.randint(NUM_IMAGES, (args.batch,), generator=g)], args.device)
        x = cut_together(x, g)
        with torch.autocast(args.device, torch.bfloat16):
            with torch.no_grad():
                latents = vae.encode(x).latent_dist.sample()
            loss = image_loss(vae.decode(latents).sample.float(), x)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.add(loss)
        if (step + 1) % 250 == 0 or step + 1 == args.decoder_steps:
            clock.row(
                step + 1,
                psnr=round(psnr(vae, held_out), 2),
                psnr_cut_together=round(psnr(vae, mixed), 2),
            )
            saved = {"vae": vae.state_dict(), "step": step + 1, "log": clock.rows}
            save_whole(saved, args.work / "decoder.pt")


ENGLISH = """a photo of sks dog cat person man woman child toy mascot monster creature animal
bird horse painting sketch drawing image style in the of an art watercolor oil pixel cartoon
portrait closeup wearing hat sitting standing running on beach forest mountain city street room
table with and under over small big large tiny red orange yellow green cyan blue purple pink
white grey gray black brown best quality masterpiece blurry low bad background snow night grass
day sun moon sky water"""


def build_tokenizer(captions: list[list[str]]) -> CLIPTokenizer:
    """Returns a CLIP tokenizer over a small byte-level BPE: any text tokenises.

    Merges are learned on the captions, on words that people put into prompts, and on the English
    of Python's own documentation strings.
    """
    documentation = " ".join(str(getattr(json, n).__doc__) for n in dir(json)) + str(random.__doc__)
    for module in (argparse, time, sys, math, nn, Path):
        documentation += " ".join(str(getattr(module, name).__doc__) for name in dir(module))
    texts = [c for group in captions[:3000] for c in group] + [ENGLISH] * 300 + [documentation]
    words = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), "removed", invert=True
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = words
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1150, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator([t.lower() for t in texts], trainer)
    merges = [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]]
    symbols = [*alphabet, *(a + "</w>" for a in alphabet), *(a + b for a, b in merges)]
    symbols = [*dict.fromkeys(symbols), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            hidden_act="quick_gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(48, 80, 120),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=96,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def build_scheduler() -> DDPMScheduler:
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
    )


@torch.no_grad()
def encode_all(
    args: argparse.Namespace, vae: AutoencoderKL, images: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns means and deviations (N, 4, 16, 16) of all images, computed once and kept."""
    kept = args.work / "latents.pt"
    if not kept.is_file():
        parts = []
        for chunk in tqdm(images.split(64), "latents", mininterval=15):
            q = vae.encode(to_unit(chunk, args.device)).latent_dist
            parts.append((q.mean.cpu(), q.std.cpu()))
        torch.save(tuple(torch.cat(p) for p in zip(*parts, strict=True)), kept)
    return torch.load(kept)


def load_vae(args: argparse.Namespace) -> AutoencoderKL:
    vae = build_vae()
    further = args.work / "decoder.pt"
    state = further if further.is_file() else args.work / "vae.pt"
    vae.load_state_dict(torch.load(state)["vae"])
    return vae.to(args.device, memory_format=torch.channels_last).eval().requires_grad_(False)


class Pair(nn.Module):
    """Text encoder and UNet, trained together: token ids and noisy latents to predicted noise."""

    def __init__(self, text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.text_encoder, self.unet = text_encoder, unet

    def forward(self, x_t: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        return self.unet(x_t, t, self.text_encoder(ids)[0]).sample


class Examples:
    """Latents and captions, ready to be drawn by step."""

    def __init__(self, args: argparse.Namespace) -> None:
        images, captions = draw_all(args)
        self.mean, self.std = encode_all(args, load_vae(args), images)
        some = torch.randn(
            self.std[:4096].shape, generator=torch.Generator().manual_seed(args.seed)
        )
        self.scaling = 1 / float((self.mean[:4096] + self.std[:4096] * some).std())
        self.tokenizer = build_tokenizer(captions)
        flat = [c for group in captions for c in group]
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        self.ids = self.tokenizer(flat, **options).input_ids.view(len(captions), -1, 77)
        self.empty = self.tokenizer("", **options).input_ids[0]

    def draw(self, g: torch.Generator, batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns latents x0 and noise (B, 4, 16, 16), token ids (B, 77), timesteps (B,); a tenth
        of the captions is empty, for guidance."""
        pick = torch.randint(len(self.mean) - NUM_HELD_OUT, (batch,), generator=g)
        way = torch.randint(self.ids.shape[1], (batch,), generator=g)
        dropped = torch.rand(batch, generator=g) < 0.1
        ids = torch.where(dropped[:, None], self.empty, self.ids[pick, way])
        draws = torch.randn(2, batch, *self.mean.shape[1:], generator=g)
        x0 = (self.mean[pick] + self.std[pick] * draws[0]) * self.scaling
        return x0, draws[1], ids, torch.randint(1000, (batch,), generator=g)


def train_unet(args: argparse.Namespace) -> None:
    """Trains text encoder and UNet on latents; their state is in <work>/unet.pt.

    Min-SNR weights with gamma 5 (Hang et al. 2023), and a moving average of the weights, which is
    what is exported.
    """
    examples = Examples(args)
    torch.manual_seed(args.seed)
    pair = Pair(build_text_encoder(examples.tokenizer), build_unet()).to(args.device)
    average = [p.detach().clone() for p in pair.parameters()]
    optimizer = torch.optim.AdamW(pair.parameters(), args.unet_lr, weight_decay=1e-3, fused=True)
    state, clock, start = args.work / "unet.pt", Clock([]), 0
    if state.is_file():
        saved = torch.load(state)
        pair.load_state_dict(saved["pair"])
        optimizer.load_state_dict(saved["optimizer"])
        average, start, clock = saved["average"], saved["step"], Clock(saved["log"])
    alphas = build_scheduler().alphas_cumprod.to(args.device)
    weights = (5 * (1 - alphas) / alphas).clamp(max=1)
    for step in tqdm(range(start, args.unet_steps), "unet", args.unet_steps, initial=start):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, args.unet_steps, args.unet_lr)
        drawn = examples.draw(torch.Generator().manual_seed(args.seed + step), args.batch)
        x0, noise, ids, t = (d.to(args.device) for d in drawn)
        a = alphas[t].view(-1, 1, 1, 1)
        prediction = pair(a.sqrt() * x0 + (1 - a).sqrt() * noise, t, ids)
        loss = ((prediction - noise).square().mean((1, 2, 3)) * weights[t]).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(pair.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        kept = min(0.9995, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(average, list(pair.parameters()), 1 - kept)
        clock.add(loss)
        if (step + 1) % 500 == 0 or step + 1 == args.unet_steps:
            clock.row(step + 1)
            saved = {"pair": pair.state_dict(), "optimizer": optimizer.state_dict()}
            more = {"average": average, "step": step + 1, "scaling": examples.scaling}
            save_whole(saved | more | {"log": clock.rows}, state)


def export(args: argparse.Namespace) -> None:
    """Writes the pipeline folder in half precision, from whatever state training is in."""
    _, captions = draw_all(args)
    tokenizer = build_tokenizer(captions)
    saved = torch.load(args.work / "unet.pt", map_location="cpu")
    pair = Pair(build_text_encoder(tokenizer), build_unet())
    for p, value in zip(pair.parameters(), saved["average"], strict=True):
        p.data = value
    vae = load_vae(args)
    vae.register_to_config(scaling_factor=round(saved["scaling"], 5))
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=pair.text_encoder,
        tokenizer=tokenizer,
        unet=pair.unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(args.out)
    logs = {
        name: torch.load(args.work / f"{name}.pt")["log"] for name in ("vae", "decoder", "unet")
    }
    rates = {"vae": args.vae_lr, "decoder": args.decoder_lr, "unet": args.unet_lr}
    record: dict[str, Any] = {"seed": args.seed, "batch": args.batch, "images": NUM_IMAGES}
    record["versions"] = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    for name, log in logs.items():
        thinned = [*log[:: max(1, len(log) // 8)], log[-1]]
        record[name] = {"steps": log[-1]["step"], "lr": rates[name], "log": thinned}
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")


STAGES = {
    "data": draw_all,
    "vae": train_vae,
    "decoder": train_decoder,
    "unet": train_unet,
    "export": export,
}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--work", type=Path, required=True, help="folder for states and logs")
    p.add_argument("--out", type=Path, default=OUT, help="folder of the pipeline")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="cpu")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--vae_steps", type=int, default=4500)
    p.add_argument("--vae_lr", type=float, default=2e-3)
    p.add_argument("--decoder_steps", type=int, default=1500)
    p.add_argument("--decoder_lr", type=float, default=8e-4)
    p.add_argument("--unet_steps", type=int, default=20_000)
    p.add_argument("--unet_lr", type=float, default=1.5e-3)
    return p


def main() -> None:
    p = parser()
    p.add_argument("--stage", choices=[*STAGES, "all"], default="all")
    args = p.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    for name, stage in STAGES.items():
        if args.stage in (name, "all"):
            stage(args)


if __name__ == "__main__":
    main()
