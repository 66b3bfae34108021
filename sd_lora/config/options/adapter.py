"""Options of the adapter: target modules, ranks, method, dropouts."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from sd_lora.config.rows import LOWER, METHODS, PLAIN_LORA, RANKED, SAME, Section, section
from sd_lora.errors import Problem, UsageError

if TYPE_CHECKING:
    from sd_lora.config.schema import TrainConfig

option = section("adapter")

OF_FILE = (
    "targets", "rank", "lora_alpha", "conv_rank", "conv_alpha", "rank_pattern", "alpha_pattern",
    "text_encoder_rank", "text_encoder_alpha", "text_encoder_2_rank", "text_encoder_2_alpha",
)  # fmt: skip
"""Options that stay open in a run with `init_lora`: its file answers those that are not given."""


class AdapterOptions(Section):
    """Target modules, ranks, method and dropouts."""

    # fmt: off
    targets: str | None = option("attention",
        "target modules in the UNet: attention, transformer, conv, all, for SDXL blora_content and "
        "blora_style, or regular expressions, joined by +; with init_lora those of its file if not "
        "given",
        onetrainer="layer_filter_preset",
        main="attention, transformer, conv, all, or patterns")
    rank: int | None = option(4,
        "rank r of the low-rank factors; with init_lora each module's in its file if not given",
        less_memory={"updating the weights": (2, LOWER)},
        ge=1, requires={"method": RANKED}, scripts="ABCD", kohya="network_dim",
        onetrainer="lora_rank", simpletuner="lora_rank", ai_toolkit="network.linear",
        main="rank of the low-rank factors")
    lora_alpha: float | None = option(None,
        "alpha; the delta is scaled by alpha / rank; each module's rank, or with init_lora its "
        "alpha in the file, if not given",
        gt=0, requires={"method": RANKED}, kohya="network_alpha", onetrainer=SAME,
        simpletuner=SAME, ai_toolkit="network.linear_alpha",
        short="alpha", main="deltas are scaled by alpha / rank")
    conv_rank: int | None = option(None,
        "rank of convolutions larger than 1x1; rank if not given",
        ge=1, requires={"method": RANKED}, kohya="conv_dim", ai_toolkit="network.conv")
    conv_alpha: float | None = option(None,
        "alpha of these convolutions; conv_rank, or else lora_alpha, if not given",
        gt=0, requires={"method": RANKED}, kohya=SAME, ai_toolkit="network.conv_alpha")
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] | None = option(None,
        "ranks by module: pattern=rank …, as in peft",
        requires={"method": RANKED})
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] | None = option(None,
        "alphas by module: pattern=alpha …, as in peft",
        requires={"method": RANKED})
    method: str = option("lora",
        "form of the delta: lora, lora_fa (A is frozen), loha, lokr, oft (outputs turned in "
        "blocks), full (full rank)",
        choices=METHODS, kohya="network_module", onetrainer="peft_type", ai_toolkit="network.type")
    use_dora: bool = option(False,
        "train a magnitude per output beside the direction (DoRA), with any method but oft",
        unless={"method": ("oft",)}, summary=("method", "with magnitudes (DoRA)"), scripts="D",
        onetrainer="lora_decompose", simpletuner=SAME)
    use_rslora: bool = option(False,
        "scale by alpha / sqrt(rank) instead of alpha / rank",
        requires={"method": RANKED}, summary=("method", "scaled by alpha / sqrt(rank)"))
    init_lora_weights: str | None = option(None,
        "initial factors of lora; kaiming if not given; svd: A of the base's principal singular "
        "vectors; pissa: A and B of them",
        choices=("kaiming", "gaussian", "orthogonal", "svd", "pissa"),
        requires={"method": PLAIN_LORA}, summary=("method", "started by {}"),
        simpletuner="lora_init_type")
    init_lora: str | None = option(None,
        "LoRA file in anybody's format to start from: its deltas, with its target modules, ranks "
        "and alphas where these are not given; given ranks are at least its own",
        kohya="network_weights", onetrainer="lora_model_name", simpletuner=SAME,
        ai_toolkit="network.pretrained_lora_path", in_record="name")
    tlora_min_rank: int | None = option(None,
        "T-LoRA: train the first ranks alone where there is noise, this many in pure noise and all "
        "in clean images; half the rank is usual; off if not given",
        ge=1, requires={"method": PLAIN_LORA, "use_dora": (False,)},
        summary=("method", "from rank {} in noise (T-LoRA)"))
    use_tucker: bool = option(False,
        "give convolutions larger than 1x1 a small core instead of a large factor (lora, "
        "loha, lokr)",
        requires={"method": RANKED}, summary=("method", "with Tucker cores"),
        onetrainer="lokr_use_tucker")
    lokr_factor: int | None = option(None,
        "side of lokr's first factor; near the square root if not given",
        ge=1, requires={"method": ("lokr",)}, onetrainer="lokr_decompose_factor",
        ai_toolkit="network.lokr_factor")
    lokr_full_matrix: bool = option(False,
        "keep lokr's second factor whole, for any rank",
        requires={"method": ("lokr",)}, onetrainer=SAME, ai_toolkit="network.lokr_full_rank")
    lokr_decompose_both: bool = option(False,
        "give lokr's first factor the rank too",
        requires={"method": ("lokr",), "lokr_full_matrix": (False,)}, onetrainer=SAME)
    oft_block_size: int | None = option(None,
        "outputs that oft turns together, at most: each layer has its largest divisor up to this; "
        "16, and no more than the blocks, if not given",
        ge=2, requires={"method": ("oft",)}, onetrainer=SAME)
    oft_rescaled: bool = option(False,
        "train a factor of each output beside oft's rotation",
        requires={"method": ("oft",)}, summary=("method", "with factors of outputs"))
    lora_dropout: float = option(0.0,
        "probability of dropping an input element of the delta",
        ge=0, lt=1, scripts="CD", simpletuner=SAME)
    neuron_dropout: float = option(0.0,
        "probability of dropping an element between the factors A and B",
        ge=0, lt=1, requires={"method": PLAIN_LORA, "use_dora": (False,)},
        header="ss_network_dropout", header_form="if given", kohya="network_dropout",
        onetrainer="dropout_probability", ai_toolkit="network.dropout")
    rank_dropout: float = option(0.0,
        "probability of dropping a rank of the delta",
        ge=0, lt=1, requires={"method": RANKED}, kohya=SAME)
    module_dropout: float = option(0.0,
        "probability of dropping a module's whole delta",
        ge=0, lt=1, kohya=SAME)
    train_bias: str = option("none",
        "trained biases: none, those of adapted layers (lora_only), all",
        choices=("none", "lora_only", "all"))
    modules_to_save: str | None = option(None,
        "UNet modules to train whole, for example conv_norm_out: patterns at the end of "
        "names, joined by +")
    train_text_encoder: bool = option(False,
        "adapt the text encoders too",
        scripts="BCD", onetrainer="text_encoder.train", simpletuner=SAME,
        ai_toolkit="train.train_text_encoder",
        main="adapt the text encoders too")
    text_encoder_rank: int | None = option(None,
        "rank in the text encoders; rank if not given; 0 leaves them out",
        ge=0, requires={"train_text_encoder": None})
    text_encoder_alpha: float | None = option(None,
        "alpha in the text encoders; text_encoder_rank, or else lora_alpha, if not given",
        gt=0, requires={"train_text_encoder": None, "method": RANKED})
    text_encoder_2_rank: int | None = option(None,
        "rank in SDXL's second text encoder; text_encoder_rank if not given; 0 leaves it out",
        ge=0, requires={"train_text_encoder": None})
    text_encoder_2_alpha: float | None = option(None,
        "alpha in SDXL's second text encoder; text_encoder_2_rank, or else "
        "text_encoder_alpha, if not given",
        gt=0, requires={"train_text_encoder": None, "method": RANKED})
    token_abstraction: str | None = option(None,
        "new words, joined by commas, with embeddings trained beside the LoRA (pivotal "
        "tuning): '<monster>'; captions must use them",
        diffusers=SAME, onetrainer="additional_embeddings.placeholder",
        ai_toolkit="embedding.trigger")
    num_new_tokens_per_abstraction: int = option(2,
        "vectors of each new word",
        ge=1, requires={"token_abstraction": None}, diffusers=SAME,
        onetrainer="additional_embeddings.token_count", ai_toolkit="embedding.tokens")
    initializer_token: str | None = option(None,
        "words whose embeddings are the start of new words: 'monster'; random if not given",
        requires={"token_abstraction": None}, diffusers=SAME,
        onetrainer="additional_embeddings.initial_embedding_text",
        ai_toolkit="embedding.init_words")
    # fmt: on

    @property
    def trains_text(self) -> bool:
        """Whether anything in the text encoders learns."""
        return self.train_text_encoder or self.token_abstraction is not None

    @property
    def masks_ranks(self) -> bool:
        """Whether each step masks ranks of the denoiser."""
        return self.tlora_min_rank is not None

    @property
    def rotates(self) -> bool:
        """Whether the deltas are rotations."""
        return self.method == "oft"

    @property
    def dropouts(self) -> list[str]:
        """The dropouts of deltas that are on."""
        names = ("lora_dropout", "neuron_dropout", "rank_dropout", "module_dropout")
        return [name for name in names if getattr(self, name)]

    @property
    def new_words(self) -> list[str]:
        """The words of pivotal tuning."""
        return [word.strip() for word in (self.token_abstraction or "").split(",") if word.strip()]

    @property
    def has_idle_parameters(self) -> bool:
        """Whether some trained parameters may get no gradient: biases of layers that nothing
        reads, such as those that a clip skip leaves out."""
        return self.train_text_encoder and self.train_bias == "all"

    def check_init(self) -> None:
        """Raise UsageError for a LoRA file to start from that is not there; a checkpoint needs it
        no more."""
        path, resumes = self.init_path, self.resumes  # type: ignore[attr-defined]
        if path and not resumes and not path.exists():
            text = f"init_lora {self.init_lora}: there is no such file or folder"
            raise UsageError(text, [Problem("init_lora", text)])

    @property
    def init_path(self) -> Path | None:
        """The LoRA file to start from, or the folder with it."""
        return Path(self.init_lora).expanduser() if self.init_lora else None

    def rank_and_alpha_of(self, component: str) -> tuple[int | None, float | None]:
        """Rank and alpha of a component; a component of rank 0 is left out.

        None stands for each module's rank in the file of `init_lora`. An alpha that is not given is
        the rank if that is given, and else the more general alpha; None stands for each module's
        alpha in this file where the rank is the file's, and else for its rank.
        """
        rank, alpha = self.rank, self.lora_alpha
        if component != "unet" and not self.train_text_encoder:
            return 0, alpha
        names = ["text_encoder"] if component != "unet" else []
        names += ["text_encoder_2"] if component == "text_encoder_2" else []
        for name in names:  # from the general to the particular
            own_rank, own_alpha = getattr(self, f"{name}_rank"), getattr(self, f"{name}_alpha")
            if own_rank is not None:
                rank, alpha = own_rank, float(own_rank)
            alpha = alpha if own_alpha is None else own_alpha
        return rank, alpha

    @property
    def method_text(self) -> str:
        """Method, rank and alpha in words."""
        if self.method not in RANKED:
            return self.method
        if self.rank is None:
            return f"{self.method}, ranks of {Path(self.init_lora or '').name}"
        alpha = self.rank if self.lora_alpha is None else self.lora_alpha
        return f"{self.method}, rank {self.rank}, alpha {alpha:g}"


def contradictions(config: "TrainConfig") -> Iterator[Problem]:
    """Yield ranks without effect, new words without a word, exclusions of PiSSA, and
    masks of no rank."""
    left_out = config.text_encoder_rank == 0 and not config.text_encoder_2_rank
    if config.train_text_encoder and left_out:
        text = "train_text_encoder with text_encoder_rank 0 trains no text encoder"
        yield Problem("text_encoder_rank", text)
    for name in ("text_encoder_rank", "text_encoder_2_rank"):
        if config.method not in RANKED and getattr(config, name):  # 0 leaves an encoder out
            yield Problem(name, f"{name} has no effect with method {config.method}", "Leave it out")
    if config.token_abstraction is not None and not config.new_words:
        yield Problem("token_abstraction", "token_abstraction names no word")
    least = config.tlora_min_rank
    if least is not None and config.rank is not None and least >= config.rank:
        text = f"tlora_min_rank {least} has no effect with rank {config.rank}"
        yield Problem("tlora_min_rank", text, f"Half the rank is usual: {max(1, config.rank // 2)}")
    names = ("use_tucker", "scale_weight_norms", "init_lora")
    excluded = [name for name in names if getattr(config, name)]
    if config.init_lora_weights == "pissa" and excluded:
        text = f"init_lora_weights pissa excludes {' and '.join(excluded)}"
        yield Problem("init_lora_weights", text)
