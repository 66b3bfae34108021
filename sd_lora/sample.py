"""`sd-lora sample`: images of a model with LoRA files at several strengths, as a grid and alone."""

import argparse
import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from sd_lora.adapters.inject import eject
from sd_lora.adapters.merging import set_strength
from sd_lora.adapters.state import combine, load_lora_state_dict, lora_state_dict
from sd_lora.config.sample_prompts import SamplePrompt, size_faults, with_seeds
from sd_lora.errors import RunError, UsageError
from sd_lora.formats.adapter_files import load_adapter
from sd_lora.formats.canonical import each
from sd_lora.formats.file_names import name_of
from sd_lora.formats.lora_file import LoRAFile, open_lora
from sd_lora.formats.verify import misfits
from sd_lora.models.families import INPAINTING
from sd_lora.models.load import Base, Parts, find_base
from sd_lora.models.meta_pipeline import MetaPipeline
from sd_lora.models.noise_scheduler import usual_rescale
from sd_lora.report.sheets import Sheet, write_image
from sd_lora.report.summary import duration
from sd_lora.sampling.parameters import Parameters
from sd_lora.sampling.sampler import can_generate_images, num_denoising_steps, sample
from sd_lora.tool_flags import MOST_STRENGTH
from sd_lora.training.out_of_memory import OutOfMemory, told_by, wanted
from sd_lora.training.processes import DTYPES

State = Mapping[str, Mapping[str, Tensor]]
"""Component → state of an adapter."""


@dataclass(frozen=True)
class Mix:
    """LoRA files and their strengths; none for the base alone."""

    files: tuple[tuple[Path, float], ...] = ()

    @property
    def strengths(self) -> tuple[tuple[str, float], ...]:
        """Name and strength of each file."""
        return tuple((name_of(path), strength) for path, strength in self.files)

    @property
    def label(self) -> str:
        """The files with their strengths: "my-style 0.5"; "the base" without any."""
        return ", ".join(f"{n} {s:g}" for n, s in self.strengths) or "the base"

    def times(self, strength: float) -> "Mix":
        """The files at `strength` times their strengths; none of them at 0."""
        return Mix(tuple((path, strength * own) for path, own in self.files if strength))

    def beside(self, other: "Mix") -> "Mix":
        """Both together."""
        return Mix(self.files + other.files)


def rows_of(files: Sequence[Path], strengths: Sequence[float]) -> list[Mix]:
    """The rows of a grid: the base for a strength of 0, once, then each file at each other one."""
    base = [Mix()] if 0 in strengths or not files else []
    others = [strength for strength in strengths if strength]
    return base + [Mix(((path, strength),)) for path in files for strength in others]


def beside_of(files: Sequence[Path], strengths: Sequence[float], together: bool) -> list[Mix]:
    """The files that are added to those of all rows: a mix each, or one of all.

    strengths: one for all files, or one each.

    Raises:
        UsageError: another number of strengths.
    """
    if len(strengths) not in (1, len(files)):
        raise UsageError(
            f"--beside_strength has {len(strengths)} strengths for {len(files)} files beside: give "
            "one for all, or one each"
        )
    each = strengths if len(strengths) > 1 else [*strengths] * len(files)
    pairs = tuple(zip(files, each, strict=True))
    return [Mix(pairs)] if together else [Mix((pair,)) for pair in pairs] or [Mix()]


@dataclass
class Loras:
    """LoRA files as states for one model, each read once.

    parts: the model, which has no adapters between two calls of `on`.
    """

    parts: Parts
    states: dict[Path, State] = field(default_factory=dict)

    def state(self, path: Path) -> State:
        """The file's adapter, for this model."""
        if path not in self.states:
            models = self.parts.models
            adapted = load_adapter(models, path)
            self.states[path] = {c: lora_state_dict(models[c]) for c in adapted}
            for component in adapted:
                eject(models[component])
        return self.states[path]

    def put_on(self, mix: Mix) -> None:
        """Give the model the adapters of a mix, in place of those that it has.

        Raises:
            UsageError: several files of which one has no exact sum with others, such as DoRA.
        """
        for model in self.parts.models.values():
            eject(model)
        for component, model in self.parts.models.items():
            found = [(self.state(p).get(component), strength) for p, strength in mix.files]
            states = [(state, strength) for state, strength in found if state]
            if len(states) == 1:
                ((state, strength),) = states
                load_lora_state_dict(model, state)
                set_strength(model, strength)
            elif states:
                try:
                    both = combine([s for s, _ in states], [strength for _, strength in states])
                except UsageError as error:
                    raise UsageError(f"{mix.label} cannot be added up: {error}") from None
                load_lora_state_dict(model, both)


@dataclass(frozen=True)
class Column:
    """A column of a grid.

    beside: LoRA files that are added to those of each row. asked: the prompt, with its seed and
    its strength, which multiplies that of each row's files. size: width and height in pixels.
    steps, guidance, negative: the prompt's own, or the flags'.
    """

    beside: Mix
    asked: SamplePrompt
    size: tuple[int, int]
    steps: int
    guidance: float
    negative: str

    @property
    def seed(self) -> int:
        """Of the noise."""
        return self.asked.seed or 0

    def mix(self, row: Mix) -> Mix:
        """The LoRA files of its image in a row."""
        return row.times(self.asked.strength).beside(self.beside)

    @property
    def alike(self) -> tuple[object, ...]:
        """Settings that images of one call of the sampler share."""
        strength = self.asked.strength
        return self.beside, strength, self.size, self.steps, self.guidance, self.negative


def columns_of(
    args: argparse.Namespace, prompts: Sequence[SamplePrompt], beside: Sequence[Mix], side: int
) -> list[Column]:
    """The columns of a grid; a prompt's seeds stand side by side, and what it does not say is by
    the flags.

    beside: LoRA files, a group of columns each. side: of an image in pixels, by default.
    """
    width, height = args.size or (side, side)
    return [
        Column(
            files,
            asked,
            (asked.width or width, asked.height or height),
            asked.steps or args.steps,
            args.guidance if asked.guidance is None else asked.guidance,
            asked.negative or args.negative,
        )
        for files in beside
        for asked in with_seeds(prompts, args.seeds)
    ]


@dataclass(frozen=True)
class Request:
    """The images to draw.

    rows: LoRA files; an empty mix is the base alone. guidance_rescale: None until the model is
    read: its own.
    """

    model: str
    rows: Sequence[Mix]
    columns: Sequence[Column]
    clip_skip: int
    low_memory: bool
    guidance_rescale: float | None

    def parameters(self, row: Mix, column: Column) -> Parameters:
        """The parameters of one image."""
        return Parameters(
            column.asked.prompt,
            column.seed,
            column.steps,
            column.guidance,
            column.size,
            self.model,
            clip_skip=self.clip_skip,
            negative=column.negative,
            strengths=column.mix(row).strengths,
            beside=column.beside.label if column.beside.files else "",
            strength=column.asked.strength,
            guidance_rescale=self.guidance_rescale or 0.0,
        )


def draw(parts: Parts, request: Request, device: torch.device) -> Iterator[list[Image.Image]]:
    """Yield the images of each row, drawn on a device, with a progress bar."""
    loras, encoder = Loras(parts), parts.caption_encoder(clip_skip=request.clip_skip)
    batch_size = 1 if request.low_memory else 4
    if request.low_memory:
        parts.vae.enable_tiling()
    groups = [[*group] for _, group in itertools.groupby(request.columns, lambda c: c.alike)]
    total = sum(num_denoising_steps(len(group), batch_size, group[0].steps) for group in groups)
    label = f"{len(request.rows) * len(request.columns)} images on {device}"
    bar = tqdm(desc=label, total=total * len(request.rows), unit="step", dynamic_ncols=True)
    with bar:
        for row in request.rows:
            images: list[Image.Image] = []
            for group in groups:
                first = group[0]
                loras.put_on(first.mix(row))
                images += sample(
                    parts,
                    encoder,
                    [column.asked.prompt for column in group],
                    [column.seed for column in group],
                    size=first.size,
                    device=device,
                    negative=first.negative or None,
                    steps=first.steps,
                    guidance_scale=first.guidance,
                    guidance_rescale=request.guidance_rescale,
                    batch_size=batch_size,
                    apart=request.low_memory,
                    on_step=bar.update,
                )
            yield images


def fitting(path: Path, model: str, meta_pipeline: MetaPipeline) -> LoRAFile:
    """Open a LoRA file for a model.

    Raises:
        UsageError: a file that cannot be read, or that does not fit the model.
    """
    lora = open_lora(path)
    lora.check()
    if wrong := [*misfits(lora.adapter, meta_pipeline)]:
        more = f", and {len(wrong) - 1} more" * (len(wrong) > 1)
        raise UsageError(f"{path} does not fit {model}: {wrong[0]}{more}")
    return lora


def check(request: Request, base: Base) -> None:
    """Refuse, before the model is loaded, files that do not fit it, and sizes and strengths that it
    cannot draw.

    Raises:
        UsageError: all faults at once.
    """
    faults = []
    if not can_generate_images(base.family) or base.task is INPAINTING:
        faults.append(f"--model {request.model}: {base.family.label} draws no image from a prompt")
    faults += _faults_of_prompts(request, base.pixels_per_latent)
    beside = [column.beside for column in request.columns]
    files = {path for mix in (*request.rows, *beside) for path, _ in mix.files}
    for path in sorted(files):
        try:
            lora = fitting(path, request.model, base.meta_pipeline)
        except UsageError as error:
            faults.append(str(error))
            continue
        most = [max(len(m.files) for m in mixes) for mixes in (request.rows, beside)]
        several = sum(most) > 1
        if several and any(delta.of_base for _, _, delta in each(lora.adapter)):
            faults.append(f"{path} turns the base (OFT), which cannot be added to another file")
        if several and any(delta.magnitude is not None for _, _, delta in each(lora.adapter)):
            faults.append(f"{path} has magnitudes (DoRA), which cannot be added to another file")
    if faults:
        raise UsageError("\n".join(faults))


def _faults_of_prompts(request: Request, pixels_per_latent: int) -> list[str]:
    """A line for each size and strength that cannot be drawn, with its flag or its prompt."""
    faults = []
    for column in request.columns:
        asked = column.asked
        given = zip(column.size, (asked.width, asked.height), strict=True)
        for side in (side for side, own in given if own is None):
            if side % pixels_per_latent or side <= 0:
                faults.append(f"--size: {side} is no multiple of {pixels_per_latent}")
        faults += size_faults([asked], pixels_per_latent)
        strengths = [strength for row in request.rows for _, strength in row.files]
        most = max((abs(asked.strength * strength) for strength in strengths), default=0)
        if most > MOST_STRENGTH:
            faults.append(
                f"{asked.place}: its strength {asked.strength:g} times the row's is {most:g}: "
                f"{MOST_STRENGTH} at most"
            )
        if asked.strength != 1 and column.beside.files and not strengths:
            faults.append(
                f"{asked.place}: its strength {asked.strength:g} is of the files of --lora, and no "
                "row has one; --beside_strength is of those beside"
            )
    return list(dict.fromkeys(faults))


def run(args: argparse.Namespace, prompts: Sequence[SamplePrompt]) -> str:
    """Draw the images that the flags ask for, and write the grid; returns lines for the terminal.

    prompts: of columns, each with its own settings.

    Raises:
        UsageError, RunError: for people.
    """
    started = time.monotonic()
    base = find_base(args.model, variant=args.variant, vae=args.vae)
    beside = beside_of(args.beside, args.beside_strength, args.beside_together)
    request = Request(
        args.model,
        rows_of(args.lora, args.strengths),
        columns_of(args, prompts, beside, base.resolution),
        args.clip_skip,
        args.low_memory,
        args.guidance_rescale,
    )
    check(request, base)
    device = known_device(args.device) if args.device else best_device()
    dtype = DTYPES[args.dtype] if args.dtype else best_dtype(device)
    drawn = []
    try:
        with told_by(partial(_out_of_memory, request, device)):
            parts = base.load(dtype=dtype)
            if request.guidance_rescale is None:
                request = replace(request, guidance_rescale=usual_rescale(parts.scheduler))
            for row, images in zip(request.rows, draw(parts, request, device), strict=True):
                drawn.append(images)
                for column, image in zip(request.columns, images, strict=True):
                    if args.images:
                        _write_alone(args.images, request.parameters(row, column), image)
    except RunError as error:  # no memory, or NaN pixels
        if not 0 < len(drawn) < len(request.rows):
            raise
        label = request.rows[len(drawn)].label
        note = f"{error}. It was drawing {label}; the rows before are in {args.out}"
        _sheet(request, drawn).write(args.out)
        raise RunError(note) from None
    _sheet(request, drawn).write(args.out)
    lines = [f"done in {duration(time.monotonic() - started)}", f"  look at {args.out}"]
    lines += [f"  {sum(map(len, drawn))} images in {args.images}"] * bool(args.images)
    return "\n".join(lines)


def _out_of_memory(request: Request, device: torch.device, error: BaseException) -> OutOfMemory:
    largest = max(request.columns, key=lambda column: math.prod(column.size))
    smaller = f"add --size {min(largest.size) // 2}"
    if largest.asked.width or largest.asked.height:
        smaller = f"make the image of {largest.asked.place} smaller"
    return OutOfMemory(
        f"{device} has too little memory to draw with {request.model}, {wanted(error)}: "
        f"{smaller if request.low_memory else 'add --low_memory'}"
    )


def _sheet(request: Request, drawn: list[list[Image.Image]]) -> Sheet:
    """The grid of the rows that are drawn."""
    rows = request.rows[: len(drawn)]
    columns = [request.parameters(rows[-1], column) for column in request.columns]
    labels = [row.label for row in rows]
    longest = max(side for column in columns for side in column.size)
    return Sheet(drawn, labels, columns, min(512, max(256, longest)))


def _write_alone(folder: Path, parameters: Parameters, image: Image.Image) -> None:
    """Write one image under the next free number, with its parameters."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = (int(p.stem) for p in folder.glob("*.png") if p.stem.isdecimal())
    write_image(folder / f"{max(numbers, default=-1) + 1:05}.png", image, [parameters])


def known_device(name: str) -> torch.device:
    """A device by its name; raises UsageError for one that computes nothing here."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"--device {name} cannot be used here: {error}") from None
    return device


def best_device() -> torch.device:
    """The accelerator of this machine, else its CPU."""
    here = torch.accelerator.is_available()  # else the one that torch is built for
    return (torch.accelerator.current_accelerator() if here else None) or torch.device("cpu")


def best_dtype(device: torch.device) -> torch.dtype:
    """Half precision where the device computes in it, else float32."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16
    return torch.float32 if device.type == "cpu" else torch.float16
