"""Train the embedded base, sample_data/tiny-sd, from nothing: tokenizer, VAE, text encoder, UNet.

    python dev/pretrain_tiny_sd.py --work WORK --photos PHOTOS      # all of it
    python dev/pretrain_tiny_sd.py --work WORK --photos PHOTOS --stage vae
    python dev/score_tiny_sd.py --work WORK                         # how good is it?

The stages, in their order: ``corpus`` (images for the VAE: scenes, patterns and crops of the
photographs in PHOTOS), ``vae`` (images <-> latents), ``scenes`` (images with captions),
``latents``, ``unet`` (latents and captions -> noise), ``decoder`` (latents -> sharper images; it
may run beside ``unet``) and ``export`` (the pipeline folder). Each saves its state as it goes, and
the same command takes it up again. More steps than at first go on where the last ones ended.
Everything random depends on the seed and the step alone. The curves are in WORK/*.pt and in
training.json; WORK/vae.png and WORK/samples.png are pages of samples.

PHOTOS is a folder of .png and .jpg files. The base was trained on those that scikit-image 0.26 and
scikit-learn ship (skimage/data, sklearn/datasets/images), all but chelsea.png, kept for the score.

The model is an ordinary Stable Diffusion 1.x, small: real diffusers and transformers classes, a
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
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from pretrain_vae import (
    NUM_CORPUS,
    NUM_UNSEEN,
    build_vae,
    draw_corpus,
    fit,
    keep,
    lr_at,
    resume,
    save_whole,
    to_unit,
    train_vae,
    update_average,
)
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

NUM_SCENES = 48_000
OUT = Path(__file__).parent.parent / "sample_data" / "tiny-sd"
#: The VAE's scaling_factor: its latents, times this, have deviation 1.
SCALING = 0.5
GUIDANCE = 4.0


def first_seed(args: argparse.Namespace) -> int:
    """Returns the seed of the first scene; the others follow it."""
    return 10**9 + int(args.seed) * 10**6


def scene_of(seed: int) -> images.Scene:
    return images.random_scene(random.Random(seed))


def draw_one(seed: int) -> tuple[np.ndarray, list[str]]:
    """Returns one image (64, 64, 3) and four ways to caption it."""
    rng = random.Random(seed)
    scene = images.random_scene(rng)
    return np.asarray(images.draw(scene)), [images.caption(scene, rng) for _ in range(4)]


def draw_scenes(args: argparse.Namespace) -> tuple[np.ndarray, list[list[str]]]:
    """Returns scenes (N, 64, 64, 3) uint8 and captions, drawn once and kept; the last 256 are not
    learned."""
    kept, texts = args.work / "scenes.npy", args.work / "captions.json"
    if not (kept.is_file() and texts.is_file()):
        first = first_seed(args)
        with Pool(args.threads) as pool:
            jobs = pool.imap(draw_one, range(first, first + NUM_SCENES + NUM_UNSEEN), 64)
            drawn = list(tqdm(jobs, "scenes", NUM_SCENES + NUM_UNSEEN, mininterval=30))
        texts.write_text(json.dumps([captions for _, captions in drawn]))
        part = args.work / "scenes.part.npy"
        np.save(part, np.stack([pixels for pixels, _ in drawn]))
        part.rename(kept)
    return np.load(kept, mmap_mode="r"), json.loads(texts.read_text())


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
            hidden_size=128,
            intermediate_size=384,
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
        block_out_channels=(64, 96, 144),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128,
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
def normalised(vae: AutoencoderKL, latents: Tensor, scale: float = 1 / SCALING) -> None:
    """Gives every latent channel the mean 0 and the deviation ``scale``, in place.

    quant_conv and post_quant_conv are linear in each pixel, so an affine map of the latents goes
    into the one and its inverse into the other, and the images stay as they are. Diffusion starts
    from noise of mean 0 and the same deviation in each channel.
    """
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    gain, n = scale / std, len(mean)
    encoder, decoder = vae.quant_conv, vae.post_quant_conv
    decoder.bias += decoder.weight[:, :, 0, 0] @ mean
    decoder.weight /= gain[None, :, None, None]
    encoder.weight[:n] *= gain[:, None, None, None]
    encoder.bias[:n] = (encoder.bias[:n] - mean) * gain
    encoder.bias[n:] += 2 * gain.log()


def load_vae(args: argparse.Namespace) -> AutoencoderKL:
    """Returns the trained VAE, its latents normalised on 2,048 scenes, with the newest decoder."""
    vae, further = build_vae().eval().requires_grad_(False), args.work / "decoder.pt"
    kept = args.work / "vae_normalised.pt"
    if not kept.is_file():
        vae.load_state_dict(torch.load(args.work / "vae.pt")["average"])
        x = to_unit(draw_scenes(args)[0][:2048])
        normalised(vae, torch.cat([vae.encode(c).latent_dist.mean for c in x.split(64)]))
        save_whole(vae.state_dict(), kept)
    vae.load_state_dict(torch.load(further)["average"] if further.is_file() else torch.load(kept))
    vae.register_to_config(scaling_factor=SCALING)
    return vae


def train_decoder(args: argparse.Namespace) -> None:
    """Trains the decoder further, on whole images, for latents that stay as they are: it can go on
    beside the UNet's training. Its state is in <work>/decoder.pt."""
    vae = load_vae(args).train()
    for part in (vae.post_quant_conv, vae.decoder):
        part.requires_grad_(True)
    fit(args, vae, "decoder", args.decoder_steps, args.decoder_lr, whole_from=0.0)


@torch.no_grad()
def encode_scenes(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Returns scaled means and deviations (N, 4, 16, 16), float16, of all scenes, kept."""
    kept = args.work / "latents.pt"
    if not kept.is_file():
        pixels, _ = draw_scenes(args)
        vae, parts = load_vae(args), []
        for start in tqdm(range(0, len(pixels), 64), "latents", mininterval=30):
            q = vae.encode(to_unit(pixels[start : start + 64])).latent_dist
            parts.append(((q.mean * SCALING).half(), (q.std * SCALING).half()))
        mean, std = (torch.cat(p) for p in zip(*parts, strict=True))
        save_whole({"mean": mean, "std": std}, kept)
    saved = torch.load(kept)
    return saved["mean"], saved["std"]


class Pair(nn.Module):
    """Text encoder and UNet, trained together: token ids and noisy latents to predicted noise."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.text_encoder, self.unet = build_text_encoder(tokenizer), build_unet()

    def forward(self, x_t: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        return self.unet(x_t, t, self.text_encoder(ids)[0]).sample


PAIR, TEXTURED = 6.0, 6.0
"""How often two things side by side, and striped or spotted ones, are drawn against the others.
Drawn evenly, with pairs a tenth of the scenes, 20,000 steps left it to chance which of two things
is on the left. The committed base saw them up to three and four times as often until step 40,000,
and six times in its last 4,000."""


class Examples:
    """Latents and captions, ready to be drawn by step."""

    def __init__(self, args: argparse.Namespace) -> None:
        _, captions = draw_scenes(args)
        self.mean, self.std = encode_scenes(args)
        scenes = [scene_of(first_seed(args) + i) for i in range(NUM_SCENES)]
        self.weights = torch.tensor(
            [PAIR if s.other else 1 if s.texture == "plain" else TEXTURED for s in scenes]
        )
        self.tokenizer = build_tokenizer(captions)
        flat = [c for group in captions for c in group]
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        self.ids = self.tokenizer(flat, **options).input_ids.view(len(captions), -1, 77)
        self.empty = self.tokenizer("", **options).input_ids[0]

    def draw(self, g: torch.Generator, batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns latents x0 and noise (B, 4, 16, 16), token ids (B, 77), timesteps (B,).

        A tenth of the captions is empty, for guidance. The timesteps are spread evenly.
        """
        pick = torch.multinomial(self.weights, batch, generator=g)
        dropped = torch.rand(batch, generator=g) < 0.1
        return self.at(pick, dropped, g)

    def at(
        self, pick: Tensor, dropped: Tensor, g: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns the same of the scenes numbered ``pick`` (B,)."""
        batch = len(pick)
        way = torch.randint(self.ids.shape[1], (batch,), generator=g)
        ids = torch.where(dropped[:, None], self.empty, self.ids[pick, way])
        draws = torch.randn(2, batch, *self.mean.shape[1:], generator=g)
        x0 = self.mean[pick].float() + self.std[pick].float() * draws[0]
        spread = (torch.arange(batch) + torch.rand(batch, generator=g)) / batch
        return x0, draws[1], ids, (1000 * spread).long()


class Objective:
    """Weighted noise prediction.

    The weight of a timestep, for an error of the image, is its signal-to-noise ratio, at most 5
    (min-SNR, Hang et al. 2023) and at least 0.1: without a floor the first steps of sampling, which
    settle the background's colour, are hardly learned.
    """

    def __init__(self) -> None:
        self.alphas = build_scheduler().alphas_cumprod
        ratio = self.alphas / (1 - self.alphas)
        self.weights = ratio.clamp(0.1, 5) / ratio

    def __call__(self, pair: Pair, drawn: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        x0, noise, ids, t = drawn
        a = self.alphas[t].view(-1, 1, 1, 1)
        prediction = pair(a.sqrt() * x0 + (1 - a).sqrt() * noise, t, ids)
        return ((prediction - noise).square().mean((1, 2, 3)) * self.weights[t]).mean()


@torch.no_grad()
def unseen_loss(pair: Pair, examples: Examples, objective: Objective) -> float:
    """Returns the loss on scenes that are not learned, always with the same noise."""
    count, g = len(examples.mean), torch.Generator().manual_seed(0)
    picks = torch.arange(count - NUM_UNSEEN, count).split(32)
    kept = torch.zeros(32, dtype=torch.bool)
    losses = [objective(pair, examples.at(pick, kept, g)) for pick in picks]
    return round(float(torch.stack(losses).mean()), 5)


def train_unet(args: argparse.Namespace) -> None:
    """Trains text encoder and UNet on latents; their state is in <work>/unet.pt.

    A moving average of the weights is exported.
    """
    examples, objective = Examples(args), Objective()
    torch.manual_seed(args.seed)
    pair, average = Pair(examples.tokenizer), Pair(examples.tokenizer).eval()
    average.load_state_dict(pair.state_dict())
    optimizer = torch.optim.AdamW(pair.parameters(), args.unet_lr, weight_decay=1e-3, fused=True)
    state = args.work / "unet.pt"
    parts = {"pair": pair, "average": average, "optimizer": optimizer}
    start, clock = resume(state, parts)
    left, total = range(start, args.unet_steps), args.unet_steps
    for step in tqdm(left, "unet", total, initial=start, mininterval=30):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, args.unet_steps, args.unet_lr, args.cooldown)
        g = torch.Generator().manual_seed(args.seed * 10**7 + step)
        loss = objective(pair, examples.draw(g, args.batch))
        loss.backward()
        # At 1.2e-3, in bfloat16, one step of the first 4,000 had ruined the weights for good.
        nn.utils.clip_grad_norm_(pair.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        update_average(average, pair, step)
        clock.add(loss)
        if (step + 1) % 500 == 0 or step + 1 == args.unet_steps:
            clock.row(step + 1, unseen=unseen_loss(average, examples, objective))
            keep(state, parts, step + 1, clock)
        if (step + 1) % 2000 == 0 or step + 1 == args.unet_steps:
            write_samples(assemble(args, examples.tokenizer, average), args.work / "samples.png")


def assemble(
    args: argparse.Namespace, tokenizer: CLIPTokenizer, pair: Pair
) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=load_vae(args),
        text_encoder=pair.text_encoder,
        tokenizer=tokenizer,
        unet=pair.unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def generate(pipeline: StableDiffusionPipeline, prompts: list[str], guidance: float) -> np.ndarray:
    """Returns an image (N, 64, 64, 3) in [0, 1] for each prompt, in 20 steps, seeds 0, 1, 2, …"""
    options = pipeline.components | {"requires_safety_checker": False}
    pipeline = StableDiffusionPipeline(**options)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    drawn = []
    for start in range(0, len(prompts), 16):
        chunk = prompts[start : start + 16]
        seeds = [torch.Generator().manual_seed(start + i) for i in range(len(chunk))]
        more = {"num_inference_steps": 20, "guidance_scale": guidance, "output_type": "np"}
        drawn.append(pipeline(chunk, generator=seeds, **more).images)
    return np.concatenate(drawn)


def write_samples(pipeline: StableDiffusionPipeline, path: Path) -> None:
    """Writes a page of the images of 48 prompts, eight in a row, twice as large; the prompts go
    into a text file beside it."""
    rng = random.Random(2)
    prompts = [images.caption(images.random_scene(rng)) for _ in range(48)]
    drawn = (generate(pipeline, prompts, GUIDANCE) * 255).round().astype(np.uint8)
    page = drawn.reshape(6, 8, 64, 64, 3).transpose(0, 2, 1, 3, 4).reshape(384, 512, 3)
    Image.fromarray(page.repeat(2, 0).repeat(2, 1)).save(path)
    path.with_suffix(".txt").write_text("\n".join(prompts) + "\n")


def export(args: argparse.Namespace) -> None:
    """Writes the pipeline folder in half precision, from whatever state training is in."""
    tokenizer = build_tokenizer(draw_scenes(args)[1])
    pair = Pair(tokenizer)
    saved = torch.load(args.work / "unet.pt")
    pair.load_state_dict(saved["average"])
    assemble(args, tokenizer, pair).to(torch.float16).save_pretrained(args.out)
    record: dict[str, Any] = {"seed": args.seed, "batch": args.batch}
    record["images"] = {"vae": NUM_CORPUS, "unet": NUM_SCENES}
    record["versions"] = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    rates = {"vae": args.vae_lr, "decoder": args.decoder_lr, "unet": args.unet_lr}
    for name in rates:
        if not (args.work / f"{name}.pt").is_file():
            continue
        log = torch.load(args.work / f"{name}.pt")["log"]
        thinned = [*log[: -1 : max(1, len(log) // 8)], log[-1]]
        record[name] = {"steps": log[-1]["step"], "lr": rates[name], "log": thinned}
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")


STAGES = {
    "corpus": draw_corpus,
    "vae": train_vae,
    "scenes": draw_scenes,
    "latents": encode_scenes,
    "unet": train_unet,
    "decoder": train_decoder,
    "export": export,
}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--work", type=Path, required=True, help="folder for states and logs")
    p.add_argument("--photos", type=Path, help="folder of photographs, for the corpus")
    p.add_argument("--out", type=Path, default=OUT, help="folder of the pipeline")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--vae_steps", type=int, default=10_000)
    p.add_argument("--vae_lr", type=float, default=2e-3)
    p.add_argument("--decoder_steps", type=int, default=4000)
    p.add_argument("--decoder_lr", type=float, default=1e-3)
    p.add_argument("--unet_steps", type=int, default=44_000)
    p.add_argument("--unet_lr", type=float, default=6e-4)
    p.add_argument(
        "--cooldown", type=float, default=0.25, help="last share of the steps, with falling rate"
    )
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
