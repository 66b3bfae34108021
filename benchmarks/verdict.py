"""How often the verdict is right, on runs that are made to under- and overfit.

    python benchmarks/verdict.py run ROWS.jsonl [--seeds 5] [--images 4 8 30] [--kinds style]
    python benchmarks/verdict.py fit ROWS.jsonl

`run` trains the embedded base on a drawn subject, character or style for each case: of each kind,
number of images and seed, one run that is far too short, one of usual length, and one far too long,
with a rate and a rank that are too high. A row is written when its run ends, and the sheet of its
last score into the folder ROWS; the same command goes on where it was stopped. `fit` searches the
thresholds of `sd_lora.report.verdict` on the even seeds, and counts right verdicts by them, and by
those of the table, on the odd ones, whose subjects were not seen. The truth is what eyes say of the
sheets, in ROWS/truth.json (name of a sheet → one of the three words, or several of which each is
right), else the way in which a run was made. 8 images are held out of each: verdicts are counted
with their losses, without, as small sets have them, and by scores of images.

    python benchmarks/verdict.py stop ROWS.jsonl [--runs 10]

`stop` trains on two images for far too long, and ends each run by its scores. The step that it
takes and the last one of the same run without an end are scored once more, on seeds that had no
part in the choice.
"""

import argparse
import copy
import itertools
import json
import math
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "dev"))

from images import BACKGROUNDS, COLOURS, Scene, caption, draw, place, random_scene
from PIL import Image, ImageOps

from sd_lora.config.schema import TrainConfig
from sd_lora.report.verdict import GOOD, OVER, THRESHOLDS, UNDER, verdict_of
from sd_lora.sample import Loras, Mix
from sd_lora.sampling.judge import Judge
from sd_lora.training.loop import train
from sd_lora.training.scores import difference, merit
from sd_lora.training.scoring import drawn_sets, taught_to
from sd_lora.training.setup import prepared_run

SAMPLE_DATA = Path(__file__).parent.parent / "sample_data"
BASE, ENCODER = SAMPLE_DATA / "tiny-sd", SAMPLE_DATA / "encoder"

WITNESSES = 8
"""Images held out of each run."""

SCORES, SAMPLER_STEPS = 4, 12
"""Scores of a run after its start, and sampler steps of their images."""

SETTINGS: dict[str, dict[str, Any]] = {
    UNDER: {"max_train_steps": 24, "learning_rate": 5e-4, "rank": 8},
    GOOD: {"max_train_steps": 300, "learning_rate": 1e-3, "rank": 8},
    OVER: {"max_train_steps": 1000, "learning_rate": 1.5e-3, "rank": 64},
}
"""Truth → options of the run that is made so."""

PATIENCE = 3
"""Scores in a row without a better one that end a run."""

TOO_LONG = {"max_train_steps": 2000, "learning_rate": 1e-3, "rank": 64}
"""Options of the runs on two images, which copy them in the end."""

OF_SUBJECT = {
    GOOD: {
        "max_train_steps": 600, "learning_rate": 2e-3, "rank": 16, "train_text_encoder": True,
        "text_encoder_lr": 2e-3, "with_prior_preservation": True, "num_class_images": 24,
    },
}  # fmt: skip
"""Truth → other options for a subject: those of the demo. Without class images and with a frozen
text encoder, every thing of its class becomes the subject within 100 steps."""

KINDS = ("subject", "character", "style")


def subject(rng: random.Random) -> Scene:
    """A look that the base has not seen under its name; place and size vary from image to image."""
    return replace(random_scene(rng), position="centre", other=None)


def images_of(kind: str, seed: int, count: int) -> list[tuple[Image.Image, str]]:
    """Images of a drawn subject, character or style, with captions."""
    rng = random.Random(f"{kind} {seed}")
    look, found = subject(rng), []
    dark, light = rng.sample(sorted(COLOURS), 2)
    for number in range(count):
        if kind != "style":
            places = [b for b in BACKGROUNDS if b != look.colour]
            scene = replace(
                look, background=places[number % len(places)], size=rng.choice(("medium", "big")),
                seed=number,
            )  # fmt: skip
            # captions say where it is, and not how it looks
            plain = replace(scene, colour=(0, 0, 0), texture="plain", body="")
            found.append((draw(scene), caption(plain, name=f"sks {scene.thing}")))
            continue
        scene = random_scene(rng)
        grey = draw(scene).convert("L")
        drawn = ImageOps.colorize(grey, COLOURS[dark], COLOURS[light])
        found.append((drawn, f"{caption(scene)} in sks style"))
    return found


def config_of(
    kind: str, seed: int, count: int, options: dict[str, Any], folder: Path, scores: int = SCORES
) -> TrainConfig:
    """A run on images that are written into the folder. scores: of it, after its start."""
    data = folder / "data"
    data.mkdir(parents=True)
    rows = []
    for number, (image, text) in enumerate(images_of(kind, seed, count + WITNESSES)):
        image.save(data / f"{number:02}.png")
        rows.append(json.dumps({"file_name": f"{number:02}.png", "text": text}))
    (data / "metadata.jsonl").write_text("\n".join(rows))
    return TrainConfig(
        pretrained_model_name_or_path=str(BASE), output_dir=str(folder / "out"),
        data_cache_dir=str(folder / "cache"), resolution=64, train_batch_size=4,
        targets="transformer+conv", seed=seed, holdout=WITNESSES, num_validation_images=0,
        validate_every=max(4, options["max_train_steps"] // 12), report_to="none",
        checkpointing_steps=100_000, score_features=str(ENCODER),
        score_every=options["max_train_steps"] // scores, validation_steps=SAMPLER_STEPS,
        score_kind="style" if kind == "style" else "subject", validation_guidance_scale=4.0,
        **of_images(kind, seed, data, options), **options,
    )  # fmt: skip


def record_of(
    kind: str, seed: int, count: int, truth: str, folder: Path, sheet: Path
) -> dict[str, Any]:
    """The record of a run that is made so; its images go into a sheet."""
    options = SETTINGS[truth] | (OF_SUBJECT.get(truth, {}) if kind == "subject" else {})
    train(config_of(kind, seed, count, options, folder))
    shutil.copy(max((folder / "out" / "samples").glob("score-*.png")), sheet)
    record: dict[str, Any] = json.loads((folder / "out" / "report.json").read_text())
    return {name: record.get(name, {}) for name in ("validation", "changes", "scores")}


def of_images(kind: str, seed: int, data: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Mode, folder and prompts of the images."""
    of_class = f"a photo of a {subject(random.Random(f'{kind} {seed}')).thing}"
    if options.get("with_prior_preservation"):
        return {
            "mode": "dreambooth",
            "instance_data_dir": str(data),
            "instance_prompt": of_class.replace("a photo of a", "a photo of a sks"),
            "captions_from": "metadata",
            "class_data_dir": str(data.parent / "class"),
            "class_prompt": varied(of_class),
            "score_class_prompt": of_class,
        }
    prompt = {} if kind == "style" else {"score_class_prompt": of_class}
    return {"mode": "text_to_image", "train_data_dir": str(data), **prompt}


def varied(of_class: str) -> str:
    """A class prompt of many looks and places."""
    colours = "|".join(sorted(COLOURS))
    places = "|".join(place(Scene("car", "red", background=b)) for b in BACKGROUNDS)
    return f"{of_class.replace('photo of a', f'photo of a {{big |}}{{{colours}}}')} {{{places}}}"


def other_seeds(config: TrainConfig, paths: list[Path | None]) -> dict[str, Any]:
    """Merits of checkpoints, None for the base, on seeds that no run has; and the first one's above
    the last."""
    with prepared_run(config.replace(output_dir=f"{config.output_dir}-judged")) as run:
        assert run.scores is not None
        prompts, loras, seen = run.scores.prompts, Loras(run.parts), []
        loras.put_on(Mix())
        before = drawn_sets(run, prompts, "base")[1:]
        taught = taught_to(run, config.score_kind)
        scale = Judge(run.scores.features, taught, prompts, before)
        for path in paths:
            mix = Mix(((path, 1.0),)) if path else Mix()
            loras.put_on(mix)
            seen.append(scale.judge(drawn_sets(run, prompts, mix.label)[1:])[0])
        return {"merits": [merit(v) for v in seen], "difference": difference(seen[0], seen[-1])}


def of_losses(record: dict[str, Any]) -> dict[str, Any]:
    """The record as it is without scores."""
    return {**record, "scores": {}}


def unwitnessed(record: dict[str, Any]) -> dict[str, Any]:
    """The record as it is without scores and images held out."""
    found = copy.deepcopy(of_losses(record))
    measured = found["validation"]
    measured["judged_by"] = "trained"
    measured["best"] = measured["rows"][-1]["step"]
    measured["since_best"] = [0.0, 0.0]  # the trained images' loss hardly ever rises
    return found


def stop(args: argparse.Namespace) -> None:
    """Do the runs on two images that the file does not have, and count those that ended well."""
    path = Path(args.rows)
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for number in range(len(done), args.runs):
        kind, seed = "subject", 100 + number
        with tempfile.TemporaryDirectory(prefix="verdict-") as kept:
            config = config_of(kind, seed, 2, TOO_LONG, Path(kept), scores=10)
            config = config.replace(keep_best=True)
            train(config)
            out = Path(kept) / "out"
            rows = json.loads((out / "report.json").read_text())["scores"]["rows"]
            ended = ended_at([row["merit"] for row in rows])
            steps = [rows[ended]["step"], TOO_LONG["max_train_steps"]]
            found = {"merits": [0.0, 0.0], "difference": [0.0, 0.0]}
            if steps[0] != steps[1]:
                paths = [out / f"checkpoint-{step}" if step else None for step in steps]
                found = other_seeds(config, paths)
        done.append({"kind": kind, "seed": seed, "steps": steps, "scores": rows, **found})
        with path.open("a") as file:
            file.write(json.dumps(done[-1]) + "\n")
        print(kind, seed, steps, found, flush=True)
    pairs = [row["difference"] for row in done]
    better, clear = (sum(d > h for d, h in apart) for apart in ([(d, 0) for d, _ in pairs], pairs))
    print(f"{better} of {len(done)} runs ended at a better step, {clear} beyond the interval")


def ended_at(merits: list[float]) -> int:
    """The place of the score at which a run with PATIENCE would have taken its files."""
    best = 0
    for at, merit_there in enumerate(merits):
        if merit_there > merits[best]:
            best = at
        elif at - best >= PATIENCE:
            break
    return best


def run(args: argparse.Namespace) -> None:
    """Do the cases that the file does not have."""
    path = Path(args.rows)
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    known = {(r["kind"], r["images"], r["seed"], r["truth"]) for r in done}
    sheets = path.with_suffix("")
    sheets.mkdir(parents=True, exist_ok=True)
    cases = [*itertools.product(range(args.seeds), args.kinds, args.images, SETTINGS)]
    random.Random(0).shuffle(cases)  # a sheet's number tells nothing of its run
    for number, (seed, kind, count, truth) in enumerate(cases):
        if (kind, count, seed, truth) in known:
            continue
        folder = Path(tempfile.mkdtemp(prefix="verdict-"))
        try:
            sheet = sheets / f"{kind}, {count} images, seed {seed}, {number:03}.png"
            record = record_of(kind, seed, count, truth, folder, sheet)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        row = {"kind": kind, "images": count, "seed": seed, "truth": truth}
        row |= {"sheet": sheet.name, "record": record}
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        found = verdict_of(record)
        print(f"{kind} of {count} images, seed {seed}: {truth}; {found and found.text}", flush=True)


GRID = {
    "still_falling": (0.1, 0.2, 0.3, 0.5),
    "most_gain": (math.inf, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7),
    "most_apart": (math.inf, 0.2, 0.3, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0),
    "most_rise": (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0),
    "most_change": (math.inf, 0.05, 0.1, 0.2, 0.35, 0.5, 0.8, 1.2),
    "least_fidelity": (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6),
    "most_lost": (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, math.inf),
    "most_copies": (math.inf, 0.1, 0.3, 0.5),
    "most_leak": (math.inf, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6),
    "most_spread": (math.inf, 0.25, 0.3, 0.33, 0.35, 0.4, 0.45),
    "most_redrawn": (math.inf, 0.3, 0.33, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6),
    "most_changed": (math.inf, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6),
    "most_harm": (math.inf, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5),
}

WAYS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "by losses, with images held out": of_losses,
    "by losses of trained images": unwitnessed,
    "by images": lambda record: record,
}
"""Way to judge a run → the record that it sees."""


def rights(rows: list[dict[str, Any]], thresholds: dict[str, float], way: str) -> list[bool]:
    """Whether each verdict is the truth of its run."""
    found = []
    for row in rows:
        verdict = verdict_of(WAYS[way](row["record"]), thresholds)
        found.append(verdict is not None and verdict.state in row["right"])
    return found


def fit(args: argparse.Namespace) -> None:
    """Search thresholds on the even seeds, and count right verdicts on the odd ones."""
    rows = [json.loads(line) for line in Path(args.rows).read_text().splitlines()]
    truths = Path(args.rows).with_suffix("") / "truth.json"
    by_eye = json.loads(truths.read_text()) if truths.exists() else {}
    for row in rows:
        seen = by_eye.pop(row.get("sheet"), row["truth"])
        row["right"] = [seen] if isinstance(seen, str) else seen
        if not {*row["right"]} <= {*SETTINGS}:
            raise SystemExit(f"{row['sheet']} in {truths}: {seen} is none of {', '.join(SETTINGS)}")
    if by_eye:
        raise SystemExit(f"{truths} names sheets that no row has: {', '.join(by_eye)}")
    parts = [[row for row in rows if row["seed"] % 2 == part] for part in (0, 1)]
    best = dict(THRESHOLDS)
    for _ in range(2):  # one threshold at a time
        for name, values in GRID.items():
            choices = [best | {name: value} for value in values]
            best = max(choices, key=lambda t: sum(sum(rights(parts[0], t, way)) for way in WAYS))
    print("found:", best)
    for label, thresholds in (("table", THRESHOLDS), ("found", best)):
        for way in WAYS:
            counts = [rights(part, thresholds, way) for part in parts]
            words = ", ".join(
                f"{name} seeds {sum(c)} of {len(c)}"
                for name, c in zip(("even", "odd"), counts, strict=True)
            )
            print(f"{label}, {way}: right in {words}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run")
    runs.add_argument("rows")
    runs.add_argument("--seeds", type=int, default=5)
    runs.add_argument("--images", type=int, nargs="+", default=[4, 8, 30])
    runs.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    commands.add_parser("fit").add_argument("rows")
    ends = commands.add_parser("stop")
    ends.add_argument("rows")
    ends.add_argument("--runs", type=int, default=10)
    args = parser.parse_args()
    {"run": run, "fit": fit, "stop": stop}[args.command](args)


if __name__ == "__main__":
    main()
