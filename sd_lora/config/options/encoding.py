"""Options of encoding: captions, latents, and their caches."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from sd_lora.config.rows import CACHES, SAME, Section, section
from sd_lora.errors import Problem

if TYPE_CHECKING:
    from sd_lora.config.schema import TrainConfig

option = section("data")


class EncodingOptions(Section):
    """Tokens of captions, layers of text encoders, caches of latents and embeddings."""

    # fmt: off
    max_token_length: int = option(75,
        "tokens of a caption at most, a multiple of 75: longer captions are encoded in pieces "
        "of 75, as in A1111 and ComfyUI, and cut here",
        less_memory={"encoding captions": (1, 75)},
        ge=75, multiple_of=75, header="ss_max_token_length", header_form="if given",
        summary=("captions", "up to {} tokens, in pieces of 75"), kohya=SAME)
    weighted_prompts: bool = option(False,
        "captions may weight words: 'a (red)1.3 car++' (compel's syntax; extra: compel)",
        package=("compel", "compel"), summary=("captions", "weighted"),
        kohya="weighted_captions")
    clip_skip: int = option(0,
        "last layers of the text encoders to skip, counted as in diffusers: A1111's and "
        "kohya's clip skip 2 is 1 here; SDXL's usual last layer but one is 0",
        ge=0, header="ss_clip_skip", header_form="counted from 1",
        summary=("captions", "clip skip {}"), diffusers=SAME, kohya=SAME,
        onetrainer="text_encoder_layer_skip")
    dataloader_num_workers: int = option(0,
        "processes that load batches ahead: images without a cache, and caches on disk",
        ge=0, may_change=True, scripts="ABCD", kohya="max_data_loader_n_workers")
    cache_latents: str = option("auto",
        "place of cached latents: disk (shared by all runs, by content), memory, no; auto: "
        "disk if it has room",
        less_memory={"a step": (2, "auto")},
        choices=CACHES, without_value="auto", may_change=True, diffusers=SAME, kohya=SAME,
        onetrainer="latent_caching")  # without a value in the advanced scripts and sd-scripts
    cache_text_embeddings: str = option("auto",
        "place of cached embeddings of captions, as cache_latents",
        less_memory={"a step": (3, "auto")},
        choices=CACHES, may_change=True, kohya="cache_text_encoder_outputs")
    data_cache_dir: str | None = option(None,
        "folder of the caches on disk; $SD_LORA_CACHE or ~/.cache/sd_lora if not given",
        may_change=True, onetrainer="cache_dir", in_record="no")
    data_cache_limit: float = option(50.0,
        "size in GiB of the caches on disk; beyond it, the longest unused entries are removed",
        gt=0, may_change=True)
    # fmt: on

    @property
    def caches_no_latents(self) -> bool:
        """Whether latents are kept nowhere, and each step encodes its images."""
        return self.cache_latents == "no"


def contradictions(config: "TrainConfig") -> Iterator[Problem]:
    """Yield a stream without a cache, and options that weighted prompts exclude."""
    if config.streaming and config.cache_latents == "no":
        text = "streaming can read each image once only, and cache_latents is no"
        yield Problem("streaming", text, "Cache the latents")
    if config.weighted_prompts and config.trains_text:
        text = "weighted_prompts needs text encoders that do not learn: compel encodes once only"
        yield Problem("weighted_prompts", text)
    if config.weighted_prompts and config.clip_skip:
        text = "weighted_prompts excludes clip_skip: compel has none for these models"
        yield Problem("weighted_prompts", text)
