"""How good is the embedded base? Ask a classifier of drawings what it sees in generated images.

    python dev/score_tiny_sd.py --work WORK

The classifier is trained here on the drawn images (what, which colour, which background), shown
to be right on drawings it has not seen, and then asked about images of prompts. The answers go
into the pipeline folder's training.json.
"""

import argparse
import json
import random

import images
import torch
import torch.nn.functional as F
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from pretrain_tiny_sd import NUM_IMAGES, draw_all, lr_at, parser, to_unit
from torch import Tensor, nn
from tqdm import tqdm

QUESTIONS = {
    "thing": list(images.THINGS),
    "colour": list(images.COLOURS),
    "background": list(images.BACKGROUNDS),
}
GUIDANCE = (3.0, 4.0, 6.0)


class Judge(nn.Module):
    """A small classifier of images (B, 3, 64, 64) in [-1, 1]: question -> logits (B, words)."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 96, 128)
        layers: list[nn.Module] = []
        for a, b in zip(widths, widths[1:], strict=False):
            layers += [nn.Conv2d(a, b, 3, 2, 1), nn.GroupNorm(8, b), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.Flatten())
        self.heads = nn.ModuleDict(
            {name: nn.Linear(128 * 16, len(words)) for name, words in QUESTIONS.items()}
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.body(x)
        return {name: head(h) for name, head in self.heads.items()}


def scene_of(seed: int) -> images.Scene:
    return images.random_scene(random.Random(seed))


def answers_of(scenes: list[images.Scene]) -> dict[str, Tensor]:
    return {
        q: torch.tensor([words.index(getattr(s, q)) for s in scenes])
        for q, words in QUESTIONS.items()
    }


def num_right(out: dict[str, Tensor], answers: dict[str, Tensor]) -> dict[str, int]:
    return {q: int((out[q].argmax(1) == answers[q]).sum()) for q in QUESTIONS}


def train_judge(args: argparse.Namespace) -> tuple[Judge, dict[str, float]]:
    """Returns the classifier, and how often it is right on drawings that it has not seen."""
    images, _ = draw_all(args)
    first = args.seed * 10**6
    answers = answers_of([scene_of(seed) for seed in range(first, first + len(images))])
    torch.manual_seed(args.seed)
    judge, steps = Judge(), 1500
    optimizer = torch.optim.AdamW(judge.parameters(), 2e-3, weight_decay=0.01, fused=True)
    for step in tqdm(range(steps), "judge", mininterval=5):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, steps, 2e-3)
        pick = torch.randint(NUM_IMAGES, (64,))
        out = judge(to_unit(images[pick], "cpu"))
        sum(F.cross_entropy(out[q], answers[q][pick]) for q in QUESTIONS).backward()
        optimizer.step()
        optimizer.zero_grad()
    unseen = images[NUM_IMAGES:]
    with torch.no_grad():
        out = judge.eval()(to_unit(unseen, "cpu"))
    right = num_right(out, {q: a[NUM_IMAGES:] for q, a in answers.items()})
    return judge, {q: round(n / len(unseen), 3) for q, n in right.items()}


@torch.no_grad()
def judged(
    judge: Judge, pipeline: StableDiffusionPipeline, scenes: list[images.Scene], guidance: float
) -> dict[str, float]:
    """Returns question -> share of generated images that show what their prompt asks for."""
    right = dict.fromkeys(QUESTIONS, 0)
    for start in tqdm(range(0, len(scenes), 16), f"guidance {guidance}", mininterval=5):
        chunk = scenes[start : start + 16]
        drawn = pipeline(
            [images.caption(s) for s in chunk],
            num_inference_steps=20,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(start + i) for i in range(len(chunk))],
            output_type="np",
        ).images
        out = judge(torch.from_numpy(drawn).permute(0, 3, 1, 2) * 2 - 1)
        for q, n in num_right(out, answers_of(chunk)).items():
            right[q] += n
    return {q: round(n / len(scenes), 3) for q, n in right.items()}


def main() -> None:
    p = parser()
    p.add_argument("--prompts", type=int, default=256)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    judge, on_drawings = train_judge(args)
    off = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline = StableDiffusionPipeline.from_pretrained(args.out, torch_dtype=torch.float32, **off)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    scenes = [scene_of(10**9 + i) for i in range(args.prompts)]
    score = {"judge on unseen drawings": on_drawings, "prompts": len(scenes)}
    for guidance in GUIDANCE:
        score[f"guidance {guidance:g}"] = judged(judge, pipeline, scenes, guidance)
        print(score, flush=True)
    path = args.out / "training.json"
    record = json.loads(path.read_text()) | {"score": score}
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
