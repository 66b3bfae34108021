"""The difference of two checkpoints as a LoRA: a finetune in a file of a few MiB."""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sd_lora.errors import UsageError
from sd_lora.formats.approximate import Cut, Loss, nearest_to, squared_norm
from sd_lora.formats.checkpoints import Checkpoint
from sd_lora.formats.family_of_file import usual_prediction
from sd_lora.formats.output import Origin, Output, Progress, Spool, silently, write
from sd_lora.formats.tools import Result
from sd_lora.formats.verify import shapes_of
from sd_lora.models.families import SHORT_PREDICTIONS

UNCHANGED = 1e-6
"""A module whose ‖tuned − base‖ is below this share of ‖base‖ is unchanged: float32 rounding gives
1e-7 of it."""


@dataclass
class Difference:
    """The difference of two checkpoints by squared Frobenius norm.

    unchanged: modules. without_form: parameters that differ but have no form in a LoRA (norms,
    biases, embeddings), and their share of ‖tuned − base‖².
    """

    unchanged: int = 0
    without_form: list[str] = field(default_factory=list)
    lost: Loss = field(default_factory=Loss)


def extract(
    base: Checkpoint,
    tuned: Checkpoint,
    output: Output,
    cut: Cut,
    components: tuple[str, ...] | None = None,
    prediction_type: str | None = None,
    progress: Progress = silently,
) -> Result:
    """Write the LoRA nearest to tuned − base: linear layers and convolutions, every component.

    Args:
        base, tuned: two models of one architecture, in any of the forms, also different ones.
        output: path, format and dtype.
        cut: number of ranks to keep.
        components: names ("unet", "text_encoder", …); None: all.
        prediction_type: for the header; None takes that of a folder's scheduler.
        progress: shows the work.

    Raises:
        UsageError: different architectures, no difference at all, or a value that is not finite.
        RunError: a failed write, or a file that does not load exactly; none is left.
    """
    if base.family is not tuned.family:
        raise UsageError(
            f"{base.path} is {base.family.label} and {tuned.path} {tuned.family.label}: a LoRA is "
            "the difference of two models of one family"
        )
    _check_same(base, tuned, components)
    output = dataclasses.replace(output, meta_pipeline=output.meta_pipeline or base.meta_pipeline)
    _check_skeleton(tuned, output)
    pairs = [p for p in tuned.places if components is None or p[0] in components]
    losses: dict[tuple[str, str], Loss] = {}
    ranks: dict[tuple[str, str], int] = {}
    difference = Difference()
    with Spool(output.path.parent) as spool, torch.no_grad():
        for component, name in progress(pairs, len(pairs), "extracting"):
            change, norm = _change(base, tuned, component, name)
            squares = squared_norm(change)
            difference.lost.total += squares
            if squares <= (UNCHANGED * norm) ** 2 or _is_rounding(
                change, (base, tuned), component, name
            ):
                difference.unchanged += 1
            elif change.dim() < 2 or ".embeddings." in name or name == "class_embedding":
                difference.without_form.append(f"{component} {name}")
                difference.lost.lost += squares
            else:
                near, loss = nearest_to(change, cut)
                spool.add(component, name, near)
                losses[component, name] = loss
                ranks[component, name] = near.rank or 0
        if not losses:
            raise UsageError(
                f"{tuned.path} differs from {base.path} in no module that a LoRA can hold"
            )
        record = {
            "extracted": {"base": base.path.name, "tuned": tuned.path.name},
            "approximation_error": Loss.sum(losses.values()).error,
        }
        kind = prediction_type or _prediction_of(tuned)
        origin = Origin(prediction_type=kind, computed=True, record=record)
        written = write(spool.adapter, output, tuned.family, origin)
    return Result(written, losses, ranks, list(_notes(difference)))


def _prediction_of(model: Checkpoint) -> str | None:
    """The prediction type of a folder's scheduler."""
    try:
        text = (model.path / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8")
        said = json.loads(text).get("prediction_type")
    except (OSError, ValueError, AttributeError):
        said = None
    return said if said in SHORT_PREDICTIONS else usual_prediction(model.family)


def _change(base: Checkpoint, tuned: Checkpoint, component: str, name: str) -> tuple[Tensor, float]:
    """Tuned − base of a parameter in float32, and ‖base‖."""
    after = tuned.weight(component, name).float()
    # a 1×1 convolution here may be a linear layer there
    before = base.weight(component, name).float().reshape(after.shape)
    change = after - before
    if not torch.isfinite(change).all():
        raise UsageError(f"{component} {name} is not finite in {base.path} or {tuned.path}")
    return change, squared_norm(before) ** 0.5


def _is_rounding(
    change: Tensor, models: tuple[Checkpoint, Checkpoint], component: str, name: str
) -> bool:
    """Whether a difference is nowhere more than half a unit of the coarser stored dtype."""
    largest = change.abs().max()
    for model in models:
        # 0.1 %: the products with a scale are rounded in float32
        half = 1.001 * model.rounding(component, name).reshape(change.shape)
        if largest <= half.max() and (change.abs() <= half).all():
            return True
    return False


def _check_skeleton(tuned: Checkpoint, output: Output) -> None:
    """Raise UsageError, before the work, if the LoRA's model is another one than was given."""
    meta_pipeline = output.meta_pipeline
    if meta_pipeline is None or not output.check:
        return
    if meta_pipeline.family is not tuned.family:
        raise UsageError(
            f"{meta_pipeline.source} is {meta_pipeline.family.label}, not {tuned.family.label}"
        )
    for component in meta_pipeline.models:
        for name, shape in shapes_of(component, meta_pipeline).items():
            if (component, name) not in tuned.places:
                continue
            if _significant(shape) != _significant(tuned.shape(component, name)):
                raise UsageError(
                    f"{component} {name} is {tuned.shape(component, name)} in {tuned.path} and "
                    f"{shape} in {meta_pipeline.source}: give the folder of its model as --model"
                )


def _check_same(base: Checkpoint, tuned: Checkpoint, components: tuple[str, ...] | None) -> None:
    """Raise UsageError naming the first parameter that only one of two models has."""
    mine, theirs = (
        {p for p in m.places if components is None or p[0] in components} for m in (base, tuned)
    )
    for have, lack, only in ((base, tuned, mine - theirs), (tuned, base, theirs - mine)):
        if only:
            component, name = min(only)
            raise UsageError(
                f"{have.path} has {component} {name} and {lack.path} has not ({len(only)} such): "
                "these are not two models of one architecture; --components takes some parts alone"
            )
    if not mine:
        raise UsageError(
            f"{base.path} has none of {', '.join(components or base.meta_pipeline.configs)}"
        )
    for place in sorted(mine):
        shapes = [model.shape(*place) for model in (base, tuned)]
        if _significant(shapes[0]) != _significant(shapes[1]):
            raise UsageError(
                f"{' '.join(place)} is {shapes[0]} in {base.path} and {shapes[1]} in {tuned.path}: "
                "these are not two models of one architecture"
            )


def _significant(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without trailing ones: a 1×1 convolution is a linear layer."""
    return _significant(shape[:-1]) if shape[2:] and shape[-1] == 1 else shape


def _notes(difference: Difference) -> Iterator[str]:
    if difference.unchanged:
        yield f"{difference.unchanged} parameters are unchanged and not in the file"
    if difference.without_form:
        names = ", ".join(difference.without_form[:3])
        yield (
            f"{len(difference.without_form)} parameters changed that no LoRA can hold (norms, "
            f"biases, embeddings: {names}, …): {difference.lost.error:.1%} of the whole difference"
        )
