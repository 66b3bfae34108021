"""Options of images: resolution, buckets, crops, transparency."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from sd_lora.config.rows import DATASET_FILE, LEFTOVERS, LOWER, SAME, Section, section
from sd_lora.errors import Problem

if TYPE_CHECKING:
    from sd_lora.config.schema import TrainConfig

option = section("data")


class ImageOptions(Section):
    """Resolution, buckets, crops, transparency."""

    # fmt: off
    resolution: int | None = option(None,
        "side in pixels of the training squares; the area of a bucket is its square. If not "
        "given, the base model's: 512, 768 for SD 2 with v-prediction, 1024 for SDXL",
        less_memory={"a step": (8, LOWER), "encoding images": (2, LOWER),
            "drawing sample images": (4, LOWER)},
        ge=1, dataset_key=True, scripts="ABCD", kohya=SAME, onetrainer=SAME, simpletuner=SAME,
        ai_toolkit="datasets.resolution",
        main="side in pixels; the base model's if not given")
    aspect_ratio_buckets: bool = option(True,
        "train each image in a bucket of nearly its own aspect ratio and at most resolution² "
        "pixels; otherwise, as diffusers' scripts do, in squares whose side is the image's "
        "shorter side",
        header="ss_enable_bucket", dataset_key=True, kohya="enable_bucket",
        onetrainer="aspect_ratio_bucketing", ai_toolkit="datasets.buckets")
    bucket_step: int | None = option(None,
        "sides of buckets are multiples of this number of pixels; if not given, the smallest "
        "one for VAE and UNet: 64, 32 for SDXL",
        ge=1, requires={"aspect_ratio_buckets": None}, dataset_key=True,
        kohya="bucket_reso_steps")
    bucket_min_side: int | None = option(None,
        "shortest side of a bucket in pixels; half the resolution if not given",
        ge=1, requires={"aspect_ratio_buckets": None}, dataset_key=True,
        kohya="min_bucket_reso")
    bucket_max_side: int | None = option(None,
        "longest side of a bucket in pixels; twice the resolution if not given",
        ge=1, requires={"aspect_ratio_buckets": None}, dataset_key=True,
        kohya="max_bucket_reso")
    bucket_no_upscale: bool = option(False,
        "never enlarge an image: one smaller than its bucket gets a bucket of its own size, "
        "rounded down",
        requires={"aspect_ratio_buckets": None}, header="ss_bucket_no_upscale", dataset_key=True,
        kohya=SAME)
    bucket_min_images: int = option(1,
        "images × repeats of a bucket at least; images of smaller ones go to the next bucket",
        ge=1, requires={"aspect_ratio_buckets": None}, formerly="bucket_min_pictures")
    bucket_leftovers: str = option("smaller",
        "last, unfilled batch of a bucket: smaller keeps it smaller, pad-batch fills it with "
        "images without weight in the loss (all shapes alike), repeat fills it with images "
        "used once more",
        choices=LEFTOVERS)
    center_crop: bool | None = option(None,
        "crop from the middle; --no-center_crop: at a random place, drawn each time. If not "
        "given, the middle of buckets and a random place of squares",
        scripts="ABCD", kohya="random_crop", onetrainer="image.enable_crop_jitter",
        ignored_by=DATASET_FILE)
    alpha_background: str = option("white",
        "colour behind transparent images: a name or #rrggbb")
    alpha_mask: bool = option(False,
        "train the opaque parts of images alone: opacity is the mask of the loss",
        kohya=SAME, ai_toolkit="datasets.alpha_mask")
    image_interpolation_mode: str = option("lanczos",
        "filter for resizing",
        choices=("nearest", "nearest_exact", "bilinear", "bicubic", "box", "hamming", "lanczos"),
        scripts="ABCD")
    # fmt: on

    @property
    def crops_at_random(self) -> bool:
        """Whether crops are drawn anew each time."""
        return not self.center_crop and (self.center_crop is False or not self.aspect_ratio_buckets)


class ResolvedImages(ImageOptions):
    """Options of images on a known base model."""

    resolution: int


def contradictions(config: "TrainConfig") -> Iterator[Problem]:
    """Yield sides of buckets without any between them, random crops of a stream, and a weight
    outside masks without any."""
    if config.streaming and config.crops_at_random:
        text = "streaming can read each image once only, and crops are random"
        yield Problem("streaming", text, "Give center_crop")
    shortest, longest = config.bucket_min_side, config.bucket_max_side
    if shortest is not None and longest is not None and shortest > longest:
        yield Problem("bucket_min_side", "bucket_min_side must not be above bucket_max_side")
    masks = config.alpha_mask or config.reads_masks or config.has_own_tables
    if config.unmasked_weight and not masks:
        text = "unmasked_weight has no effect without masks"
        yield Problem("unmasked_weight", text, "Give masks: mask_files or alpha_mask")
