"""Findings of a check: a table of their codes, and one finding on one file or setting."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

Level = Literal["left out", "warning", "note"]
LEVELS: tuple[Level, ...] = ("left out", "warning", "note")


class FindingKind(NamedTuple):
    """A row of `FINDINGS`.

    level: "left out": not trained. "warning": trained, but probably not as intended. "note":
    trained after a harmless conversion, or a file that is not part of the data.
    advice: the consequence or the remedy, for every file alike; may be empty.
    """

    level: Level
    advice: str = ""


_GET_AGAIN = "get the file again from its source, or remove it"

FINDINGS: dict[str, FindingKind] = {
    # images that cannot be decoded
    "empty": FindingKind("left out", _GET_AGAIN),
    "truncated": FindingKind("left out", _GET_AGAIN),
    "broken": FindingKind("left out", _GET_AGAIN),
    "not-an-image": FindingKind("left out"),
    "bomb": FindingKind("left out"),
    "no-plugin": FindingKind("left out"),
    "float": FindingKind("left out"),
    "integers": FindingKind("left out"),
    "unreadable": FindingKind("left out"),
    # images that do not fit the run
    "too-small": FindingKind("left out", "bucket_no_upscale forbids enlarging it"),
    "nothing-opaque": FindingKind(
        "left out", "the image is transparent everywhere, and alpha_mask trains opaque pixels only"
    ),
    "bad-mask": FindingKind("left out", "mend the mask, or remove it to train the whole image"),
    # captions that cannot be read
    "missing-caption": FindingKind(
        "left out",
        "write a caption, or give one for all images without: --caption_default (in [[sources]]: "
        "prompt)",
    ),
    "non-utf8-caption": FindingKind("left out"),
    "unreadable-caption": FindingKind("left out"),
    "bad-caption": FindingKind("left out"),
    # files and folders that are not trained
    "missing-image": FindingKind("left out", "the file does not exist"),
    "unreadable-folder": FindingKind("left out", "nothing in it is trained"),
    "outside-folders": FindingKind(
        "left out", "beside the numbered folders: move it into one of them"
    ),
    "folder-without-number": FindingKind("left out"),
    "no-repeats": FindingKind("left out", "not trained"),
    "subset-twice": FindingKind("left out"),
    "subfolder": FindingKind("left out", "subfolders of this source are not read"),
    "run-folder": FindingKind("left out", "the output folder of a run: its images are samples"),
    "mask-file": FindingKind(
        "left out", "--mask_files trains the masked part alone (in [[sources]]: mask_files = true)"
    ),
    "not-a-subject": FindingKind("left out", "rename it if it is an image to learn"),
    "broken-link": FindingKind("left out"),
    "not-a-file": FindingKind("left out", "neither a file nor a folder"),
    "more-in-subfolders": FindingKind(
        "warning", "give the folder that holds them, or train_data_dir, which reads all subfolders"
    ),
    # captions
    "empty-caption": FindingKind(
        "warning",
        "the caption is empty: the prompt is trained in its place; without a prompt only prefix, "
        "suffix and trigger word are",
    ),
    "long-caption": FindingKind("warning"),
    "orphan-caption": FindingKind("warning", "a caption file without an image of its name: unused"),
    "second-caption": FindingKind("warning", "a second caption file for one image: unused"),
    "stem-clash": FindingKind("warning", "rename them if they need different captions"),
    "prompt-for-rest": FindingKind(
        "warning", "they are trained with instance_prompt: is it another folder or extension?"
    ),
    "words-nowhere": FindingKind(
        "warning", "of instance_prompt: what is learned is not bound to a word that no caption has"
    ),
    "named-twice": FindingKind("warning", "one of its captions is drawn each time"),
    "wildcard": FindingKind(
        "warning",
        "a brace without a partner stays as it is, and the only wildcards are {a|b}, not __name__ "
        "or {2$$a|b}",
    ),
    "foreign-syntax": FindingKind("warning", "it is trained as words"),
    # folders
    "many-repeats": FindingKind(
        "warning",
        "if the number is a date or part of a name, rename the folder or use --data_layout plain",
    ),
    "number-not-read": FindingKind(
        "warning",
        "named like kohya's folders, but its number is not read as repeats: give its parent folder "
        "as the source, or --data_layout kohya if other images or metadata lie beside it",
    ),
    # images
    "animated": FindingKind(
        "warning",
        "an animation, trained by its first frame; save other good frames as separate images",
    ),
    "pages": FindingKind(
        "warning",
        "a file of several images, trained by the first; save the others as separate images",
    ),
    "transparent": FindingKind(
        "warning",
        "no pixel is more than half opaque, so the background is nearly all that is left; look at "
        "the image, and remove it if this is not intended",
    ),
    "tiny": FindingKind("warning", "get a larger image, or remove it"),
    "orphan-crop": FindingKind("warning", "a crop by hand without its image: unused"),
    "no-mask": FindingKind("warning", "masks are read, and this image has none: trained whole"),
    "upscaled": FindingKind(
        "warning",
        "enlarged images teach blur: use a larger image, a lower resolution or, with buckets, "
        "--bucket_no_upscale",
    ),
    "duplicate": FindingKind(
        "warning", "keep one, or use repeats for images that should count more"
    ),
    "in-both-sets": FindingKind(
        "warning", "remove it: class images must show other members of the class"
    ),
    # kohya's dataset configuration
    "resolution": FindingKind("warning"),
    "setting-overruled": FindingKind("warning"),
    "resolution-area": FindingKind("note"),
    "buckets": FindingKind("note"),
    "setting-shared": FindingKind("note"),
    "caption-extension": FindingKind("note"),
    "prefix-in-place": FindingKind("note"),
    # settings that will not do as meant
    "warmup-too-long": FindingKind("warning", "--lr_warmup_steps 0.1 is a tenth of the run"),
    "no-effect": FindingKind("warning"),
    "few-steps": FindingKind("warning"),
    "narrow-base": FindingKind("warning"),
    "earlier-work": FindingKind("warning"),
    "batch-above-set": FindingKind(
        "warning", "lower --batch or the accumulation, or train on more images"
    ),
    # numbers
    "graphs": FindingKind("note"),
    "no-graphs": FindingKind("warning", "the run goes on without CUDA graphs"),
    "not-recorded": FindingKind("note", "steps are computed as before, somewhat more slowly"),
    "skipped-step": FindingKind("warning", "the step changed nothing (--on_nan skip)"),
    "went-back": FindingKind("warning", "other noise for these steps (--on_nan restore)"),
    "no-gradient": FindingKind(
        "warning", "they cannot learn; leave them out of the targets, or write an issue"
    ),
    # several jobs
    "job-ended": FindingKind("warning", "the other jobs go on"),
    "jobs-apart": FindingKind("warning", "each learns by itself"),
    # the output folder
    "damaged-checkpoint": FindingKind(
        "warning", "passed over: the run goes on from an earlier one, or anew if none is whole"
    ),
    "little-room": FindingKind(
        "warning", "make room, or lower --checkpoints_total_limit: a full disk ends the run"
    ),
    "sample-request": FindingKind(
        "warning", "nothing of it is drawn, and the run goes on: write the file once more"
    ),
    "not-pushed": FindingKind("warning"),
    "tracker-lost": FindingKind(
        "warning",
        "what it has not yet got of this run is lost to it; the log and the page have all",
    ),
    "best-gone": FindingKind("warning", "the files are of the last step: the best one is lost"),
    # the machine
    "fp16-on-cpu": FindingKind(
        "warning", "--mixed_precision no is float32; bf16 is as fast on some CPUs"
    ),
    "card-not-seen": FindingKind("warning"),
    "gpu-option": FindingKind("warning", "leave it out, or train on a GPU"),
    # resolutions
    "same-shape": FindingKind(
        "note", "the image is smaller than either, and bucket_no_upscale leaves it so"
    ),
    # images that are measured
    "held-out": FindingKind("note", "validated and not trained: --holdout 0 trains all"),
    "scored-on-cpu": FindingKind(
        "warning", "images are looked at on the CPU for the rest of the run, which takes longer"
    ),
    "not-scored": FindingKind("warning", "this step has no score, and the run goes on"),
    "none-better": FindingKind(
        "warning", "no step was better than the start: the files are of the last one"
    ),
    "named-out": FindingKind("note", "left out by its name, as the run was told"),
    # conversions
    "near-duplicate": FindingKind(
        "note", "repeated images are learned by heart: keep the better one"
    ),
    "exif-rotated": FindingKind("note", "rotated or mirrored by EXIF: trained upright"),
    "alpha": FindingKind("note", "partly transparent: laid on the background"),
    "16-bit": FindingKind("note", "more than 8 bits a channel: scaled to 8"),
    "cmyk": FindingKind("note", "CMYK, a mode for print: converted to RGB"),
    "palette": FindingKind("note", "a palette image: it may have few colours"),
    "grey": FindingKind("note", "a grey image"),
    "profile": FindingKind("note", "converted to sRGB from its embedded colour profile"),
    # files and folders that are no data
    "hidden": FindingKind("note", "not read"),
    "other-file": FindingKind("note", "not read"),
    "folder-without-images": FindingKind("note", "no images in this folder"),
    "link-loop": FindingKind("note", "not followed"),
    "linked-twice": FindingKind("note", "not read twice"),
    "outside-folder": FindingKind("note", "trained all the same"),
    "metadata-ignored": FindingKind("note", "not read"),
    "sidecar-ignored": FindingKind(
        "note", "a caption file beside its image: not read, because captions come from elsewhere"
    ),
    "not-kept": FindingKind("note", "the next check will decode the images again"),
}
"""Code → level and advice. Codes are public: scripts read them from `sd-lora check --json`."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A finding on one file, folder or setting.

    code: a key of `FINDINGS`, which gives the level.
    name: path of the file, a dataset's name and row, an option, or a row of the run's summary.
    details: the facts of this file, put before the advice of the code; may be empty.
    other: name of the image that this one repeats; empty for other findings.

    Raises:
        ValueError: an unknown code.
    """

    code: str
    name: str
    details: str = ""
    other: str = ""

    def __post_init__(self) -> None:
        if self.code not in FINDINGS:
            raise ValueError(f"unknown finding code {self.code!r}: add a row to FINDINGS")

    @property
    def level(self) -> Level:
        """Level of the code."""
        return FINDINGS[self.code].level

    @property
    def text(self) -> str:
        """Details and advice, in one line."""
        return "; ".join(part for part in (self.details, FINDINGS[self.code].advice) if part)

    def line(self) -> str:
        """Name and text."""
        return f"{self.name}: {self.text}"

    def as_dict(self) -> dict[str, str]:
        """Level, code, name and text, for JSON; and the name of the image that it repeats."""
        row = {"level": self.level, "code": self.code, "name": self.name, "text": self.text}
        return row | ({"other": self.other} if self.other else {})
