"""Options of DreamBooth: the subject, and class images for prior preservation."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd_lora.config.options.sources import caption_files, captions_of_folder
from sd_lora.config.rows import SAME, Section, section
from sd_lora.config.sources import SourceSpec
from sd_lora.config.wildcards import Pick, expanded, has_unread_wildcards, has_wildcards
from sd_lora.errors import Problem, named
from sd_lora.folders import check_readable

if TYPE_CHECKING:
    from sd_lora.config.schema import TrainConfig

NO_PROMPT = "(no prompt)"
"""The prompt of images to be checked that have no captions and were given none."""

option = section("data")


def generated_name(seed: int, number: int) -> str:
    """The file name of a class image that a run generates."""
    return f"class-{seed}-{number:05}.png"


def is_generated(path: str) -> bool:
    """Whether a file's name is that of a class image that a run has generated."""
    return bool(re.fullmatch(r"class-\d+-\d{5,}\.png", Path(path).name))


@dataclass(frozen=True)
class ClassImages:
    """Class images for prior preservation: their source, and how missing ones are generated.

    folder: filled up to `count` images. prompt: with wildcards, each image has a choice of its own.
    captions, caption_files: of images that are there, as in `SourceSpec`; one that was generated
    has its own words beside it. batch_size: images generated at once.
    precision: "fp16", "fp32", "bf16" or "no"; None: by the device. base_model: draws them.
    """

    folder: Path
    prompt: str
    captions: str
    caption_files: Mapping[str, Any]
    count: int
    batch_size: int
    precision: str | None
    random_flip: bool
    base_model: str

    def check_folder(self) -> None:
        """Raise UsageError for a file in the folder's place, or no permission."""
        with named("class_data_dir"):
            check_readable(self.folder, "class_data_dir")

    def wording(self, pick: Pick) -> str:
        """The prompt with an option for each wildcard."""
        return expanded(self.prompt, pick)

    @property
    def keeps_prompts(self) -> bool:
        """Whether a generated image's prompt is written beside it, for it is one of several."""
        return has_wildcards(self.prompt)

    @property
    def spec(self) -> SourceSpec:
        """The folder as a source. Without its own caption, an image is one of the prompt; of a
        prompt with wildcards nobody knows which it shows, and it is left out."""
        return SourceSpec(
            path=str(self.folder),
            layout="plain",
            captions=self.captions,
            **self.caption_files,
            prompt=None if self.keeps_prompts else self.wording(lambda options, what: options[0]),
            recursive=False,
            kind="class",
            random_flip=self.random_flip,
            label="class_data_dir",
        )


class DreamBoothOptions(Section):
    """The subject, its prompt, and class images."""

    # fmt: off
    instance_data_dir: str | None = option(None,
        "folder with images of the subject",
        only="dreambooth", may_change=True, scripts="CD", in_record="name")
    instance_prompt: str | None = option(None,
        "prompt for the subject, with a rare word: 'a photo of sks dog'",
        only="dreambooth", header="modelspec.trigger_phrase", scripts="CD",
        short="prompt", main="the subject's: 'a photo of sks dog'")
    with_prior_preservation: bool = option(False,
        "train on class images too, to preserve the class",
        only="dreambooth", scripts="CD",
        main="train on images of the class too; with --class_prompt, --class_data_dir")
    class_data_dir: str | None = option(None,
        "folder with class images; filled up to num_class_images",
        only="dreambooth", requires={"with_prior_preservation": None}, may_change=True,
        scripts="CD", kohya="reg_data_dir", in_record="name")
    class_prompt: str | None = option(None,
        "prompt for the class: 'a photo of a dog'. With 'a photo of a {big|small} dog {indoors|on "
        "the grass}' each generated image has words of its own, kept beside it as its caption",
        only="dreambooth", requires={"with_prior_preservation": None}, scripts="CD")
    num_class_images: int = option(100,
        "generate class images up to this number",
        ge=1, only="dreambooth", requires={"with_prior_preservation": None}, scripts="CD")
    sample_batch_size: int = option(4,
        "class images generated at once",
        less_memory={"drawing class images": (1, 1)},
        ge=1, only="dreambooth", requires={"with_prior_preservation": None}, may_change=True,
        scripts="CD")
    prior_loss_weight: float = option(1.0,
        "weight of the class images' loss",
        ge=0, header="ss_prior_loss_weight", scripts="CD", kohya=SAME,
        ai_toolkit="train.reg_weight")
    prior_generation_precision: str | None = option(None,
        "precision for generating class images; fp16 on a GPU, else fp32, if not given",
        less_memory={"drawing class images": (2, "bf16")},
        choices=("no", "fp32", "fp16", "bf16"), only="dreambooth",
        requires={"with_prior_preservation": None}, may_change=True, scripts="CD")
    # fmt: on

    @property
    def subject_prompt(self) -> str | None:
        """The prompt of the one subject, with its word; None for captions of their own, and where
        the images are checked without one."""
        return None if self.lacks_prompt else self.instance_prompt

    @property
    def lacks_prompt(self) -> bool:
        """Whether the images are checked without a prompt."""
        return self.instance_prompt == NO_PROMPT

    @property
    def class_images(self) -> ClassImages | None:
        """The class images; None without prior preservation."""
        if not self.with_prior_preservation:
            return None
        prompt = str(self.class_prompt)
        read = has_wildcards(prompt) or captions_of_folder(self) != "prompt"  # type: ignore[arg-type]
        return ClassImages(
            Path(str(self.class_data_dir)).expanduser(),
            prompt,
            "auto" if read else "prompt",
            caption_files(self),  # type: ignore[arg-type]
            self.num_class_images,
            self.sample_batch_size,
            self.prior_generation_precision,
            self.random_flip,  # type: ignore[attr-defined]
            self.base_model,  # type: ignore[attr-defined]
        )


def contradictions(config: "TrainConfig") -> Iterator[Problem]:
    """Yield missing prompts and folders, and a weight of class images without any."""
    elsewhere = config.has_own_tables
    if config.prior_loss_weight != 1 and not (config.with_prior_preservation or elsewhere):
        text = "prior_loss_weight has no effect without class images"
        yield Problem("prior_loss_weight", text, "Leave it out")
    if config.is_dreambooth and not (config.instance_prompt or elsewhere):
        text = "instance_prompt is required, for example 'a photo of sks dog'"
        yield Problem("instance_prompt", text)
    for name in ("class_data_dir", "class_prompt"):
        wanted = config.is_dreambooth and config.with_prior_preservation
        if wanted and not getattr(config, name):
            yield Problem(name, f"with_prior_preservation needs {name}")
    if config.captions_from == "prompt" and has_wildcards(config.class_prompt or ""):
        text = "class_prompt has wildcards, and captions_from prompt reads none of their words"
        yield Problem("captions_from", text, "Leave captions_from out")
    for name in ("class_prompt", "preservation_class"):
        if has_unread_wildcards(getattr(config, name) or ""):
            text = (
                f"{name} {getattr(config, name)!r} has a brace without a partner, or wildcards of "
            )
            text += "another form than {a|b}"
            yield Problem(name, text, "Literal braces are written {{ and }}")
