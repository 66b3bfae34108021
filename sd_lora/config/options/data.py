"""Options of the data: sources, captions, crops and caches."""

from typing import Any

from sd_lora.config.rows import (
    CACHES,
    CAPTIONS,
    LAYOUTS,
    LEFTOVERS,
    SAME,
    Section,
    by_mode,
    section,
)

option = section("data")


class PerSourceOptions(Section):
    """Options that each source may have of its own: caption rules, columns, repeats, flips."""

    # fmt: off
    shuffle_caption: bool = option(False,
        "shuffle the tags of captions each time",
        header="ss_shuffle_caption", kohya=SAME, onetrainer="text.enable_tag_shuffling")
    keep_tokens: int = option(0,
        "tags at the start of captions to keep in place, neither shuffled nor dropped",
        ge=0, kohya=SAME, onetrainer="text.keep_tags_count")
    keep_tokens_separator: str | None = option(None,
        "mark in captions, for example |||: tags before it are neither shuffled nor dropped",
        kohya=SAME)
    caption_separator: str = option(",",
        "separator between tags",
        kohya=SAME, onetrainer="text.tag_delimiter")
    caption_tag_dropout: float = option(0.0,
        "share of the tags dropped each time",
        ge=0, lt=1, kohya="caption_tag_dropout_rate",
        onetrainer="text.tag_dropout_probability")
    caption_prefix: str | None = option(None,
        "text before each caption, with a space",
        kohya=SAME)
    caption_suffix: str | None = option(None,
        "text after each caption, with a space",
        kohya=SAME)
    wildcards: bool = option(False,
        "captions may have {a|b}: one of them each time; of captions with several lines one "
        "is used",
        kohya="enable_wildcard")
    trigger_word: str | None = option(None,
        "first tag of each caption, unless the caption has it already")
    caption_dropout: float = option(0.0,
        "share of the instances trained without their caption, so that guidance learns too; "
        "0.1 is usual. Without a caption means zeros for SDXL, as its guidance has it, and "
        "the empty prompt for SD 1 and 2; class images keep theirs",
        ge=0, lt=1, header="ss_caption_dropout_rate", kohya="caption_dropout_rate",
        onetrainer="text_encoder.dropout_probability",
        simpletuner="caption_dropout_probability")
    caption_extension: str | None = option(None,
        "extension of caption files; .txt and .caption if not given",
        kohya=SAME)
    image_column: str = option("image",
        "column of the images",
        scripts="ABD")
    repeats: int = option(1,
        "uses of each image per epoch; sources and kohya's folders have their own",
        ge=1, scripts="D", kohya="dataset_repeats")
    random_flip: bool = option(False,
        "mirror images half of the time",
        header="ss_flip_aug", scripts="ABD", kohya="flip_aug",
        onetrainer="image.enable_random_flip")
    # fmt: on


class DataOptions(PerSourceOptions):
    """Sources, class images, crops, and caches."""

    # fmt: off
    train_data_dir: str | None = option(None,
        "folder of images with metadata.jsonl, metadata.csv or .txt captions",
        only="text_to_image", may_change=True, scripts="AB", kohya=SAME, onetrainer="concepts")
    dataset_name: str | None = option(None,
        "a `datasets` set: a hub name or a local folder",
        may_change=True, scripts="ABD")
    dataset_config_name: str | None = option(None,
        "configuration of the set",
        requires={"dataset_name": None}, scripts="ABD")
    streaming: bool = option(False,
        "read the set row by row instead of downloading it first, for sets larger than the "
        "disk; needs cached latents",
        requires={"dataset_name": None})
    sources: list[dict[str, Any]] | None = option(None,
        "several sources in one run: [[sources]] tables of a TOML file, each with a path or "
        "dataset, repeats, weight, and caption rules",
        may_change=True)
    dataset_config: str | None = option(None,
        "kohya's dataset configuration: a TOML or JSON file with [[datasets]] and "
        "[[datasets.subsets]]",
        may_change=True, kohya=SAME)
    data_layout: str = option("auto",
        "meaning of subfolders: kohya's 'N_token class' folders with their repeats, or a "
        "plain tree; auto: kohya's where nothing else lies beside them",
        choices=LAYOUTS)
    captions_from: str = option("auto",
        "origin of captions: metadata files, sidecar files (.txt, .caption), file names of "
        "the images, or caption_default for all; auto: metadata, else sidecars",
        choices=CAPTIONS, onetrainer="text.prompt_source")
    caption_default: str | None = option(None,
        "caption of images without one; if not given, they are left out",
        only="text_to_image")
    strict: bool = option(False,
        "stop if the check of the data leaves out an image or warns",
        may_change=True)
    caption_column: str | None = option(None,
        "column of the captions, each a text or a list of texts; in dreambooth runs "
        "instance_prompt if not given",
        modes=by_mode("text", None), scripts="ABD")
    max_train_samples: int | None = option(None,
        "train on this number of images, chosen by the seed",
        ge=1, only="text_to_image", scripts="AB")
    instance_data_dir: str | None = option(None,
        "folder with images of the subject",
        only="dreambooth", may_change=True, scripts="CD")
    instance_prompt: str | None = option(None,
        "prompt for the subject, with a rare word: 'a photo of sks dog'",
        only="dreambooth", scripts="CD")
    with_prior_preservation: bool = option(False,
        "train on class images too, to preserve the class",
        only="dreambooth", scripts="CD")
    class_data_dir: str | None = option(None,
        "folder with class images; filled up to num_class_images",
        only="dreambooth", requires={"with_prior_preservation": None}, may_change=True,
        scripts="CD", kohya="reg_data_dir")
    class_prompt: str | None = option(None,
        "prompt for the class: 'a photo of a dog'",
        only="dreambooth", requires={"with_prior_preservation": None}, scripts="CD")
    num_class_images: int = option(100,
        "generate class images up to this number",
        ge=1, only="dreambooth", requires={"with_prior_preservation": None}, scripts="CD")
    sample_batch_size: int = option(4,
        "class images generated at once",
        ge=1, only="dreambooth", requires={"with_prior_preservation": None}, may_change=True,
        scripts="CD")
    prior_loss_weight: float = option(1.0,
        "weight of the class images' loss",
        ge=0, header="ss_prior_loss_weight", scripts="CD", kohya=SAME)
    prior_generation_precision: str | None = option(None,
        "precision for generating class images; fp16 on a GPU, else fp32, if not given",
        choices=("no", "fp32", "fp16", "bf16"), only="dreambooth",
        requires={"with_prior_preservation": None}, may_change=True, scripts="CD")
    resolution: int | None = option(None,
        "side in pixels of the training squares; the area of a bucket is its square. If not "
        "given, the base model's: 512, 768 for SD 2 with v-prediction, 1024 for SDXL",
        ge=1, scripts="ABCD", kohya=SAME, onetrainer=SAME, simpletuner=SAME)
    aspect_ratio_buckets: bool = option(True,
        "train each image in a bucket of nearly its own aspect ratio and at most resolution² "
        "pixels; otherwise, as diffusers' scripts do, in squares whose side is the image's "
        "shorter side",
        header="ss_enable_bucket", kohya="enable_bucket", onetrainer="aspect_ratio_bucketing")
    bucket_step: int | None = option(None,
        "sides of buckets are multiples of this number of pixels; if not given, the smallest "
        "one for VAE and UNet: 64, 32 for SDXL",
        ge=1, requires={"aspect_ratio_buckets": None}, kohya="bucket_reso_steps")
    bucket_min_side: int | None = option(None,
        "shortest side of a bucket in pixels; half the resolution if not given",
        ge=1, requires={"aspect_ratio_buckets": None}, kohya="min_bucket_reso")
    bucket_max_side: int | None = option(None,
        "longest side of a bucket in pixels; twice the resolution if not given",
        ge=1, requires={"aspect_ratio_buckets": None}, kohya="max_bucket_reso")
    bucket_no_upscale: bool = option(False,
        "never enlarge an image: one smaller than its bucket gets a bucket of its own size, "
        "rounded down",
        requires={"aspect_ratio_buckets": None}, header="ss_bucket_no_upscale", kohya=SAME)
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
        scripts="ABCD", kohya="random_crop", onetrainer="image.enable_crop_jitter")
    alpha_background: str = option("white",
        "colour behind transparent images: a name or #rrggbb")
    alpha_mask: bool = option(False,
        "train the opaque parts of images alone: opacity is the mask of the loss",
        kohya=SAME)
    image_interpolation_mode: str = option("lanczos",
        "filter for resizing",
        choices=("nearest", "nearest_exact", "bilinear", "bicubic", "box", "hamming", "lanczos"),
        scripts="ABCD")
    max_token_length: int = option(75,
        "tokens of a caption at most, a multiple of 75: longer captions are encoded in pieces "
        "of 75, as in A1111 and ComfyUI, and cut here",
        ge=75, multiple_of=75, kohya=SAME)
    weighted_prompts: bool = option(False,
        "captions may weight words: 'a (red)1.3 car++' (compel's syntax; extra: compel)",
        package=("compel", "compel"), kohya="weighted_captions")
    clip_skip: int = option(0,
        "last layers of the text encoders to skip, counted as in diffusers: A1111's and "
        "kohya's clip skip 2 is 1 here; SDXL's usual last layer but one is 0",
        ge=0, diffusers=SAME, kohya=SAME, onetrainer="text_encoder_layer_skip")
    dataloader_num_workers: int = option(0,
        "processes that load batches ahead: images without a cache, and caches on disk",
        ge=0, may_change=True, scripts="ABCD", kohya="max_data_loader_n_workers")
    cache_latents: str = option("auto",
        "place of cached latents: disk (shared by all runs, by content), memory, no; auto: "
        "disk if it has room",
        choices=CACHES, may_change=True, diffusers=SAME, kohya=SAME,
        onetrainer="latent_caching")
    cache_text_embeddings: str = option("auto",
        "place of cached embeddings of captions, as cache_latents",
        choices=CACHES, may_change=True, kohya="cache_text_encoder_outputs")
    data_cache_dir: str | None = option(None,
        "folder of the caches on disk; $SD_LORA_CACHE or ~/.cache/sd_lora if not given",
        may_change=True, onetrainer="cache_dir")
    data_cache_limit: float = option(50.0,
        "size in GiB of the caches on disk; beyond it, the longest unused entries are removed",
        gt=0, may_change=True)
    # fmt: on
