"""Options of the adapter: target modules, ranks, method, dropouts."""

from typing import Annotated

from pydantic import Field

from sd_lora.config.rows import METHODS, PLAIN_LORA, RANKED, SAME, Section, section

option = section("adapter")


class AdapterOptions(Section):
    """Target modules, ranks, method and dropouts."""

    # fmt: off
    targets: str = option("attention",
        "target modules in the UNet: attention, transformer, conv, all, or regular "
        "expressions, joined by +",
        onetrainer="layer_filter_preset")
    rank: int = option(4,
        "rank r of the low-rank factors",
        ge=1, requires={"method": RANKED}, scripts="ABCD", kohya="network_dim",
        onetrainer="lora_rank", simpletuner="lora_rank")
    lora_alpha: float | None = option(None,
        "alpha; the delta is scaled by alpha / rank; each module's rank if not given",
        gt=0, requires={"method": RANKED}, kohya="network_alpha", onetrainer=SAME,
        simpletuner=SAME)
    conv_rank: int | None = option(None,
        "rank of convolutions larger than 1x1; rank if not given",
        ge=1, requires={"method": RANKED}, kohya="conv_dim")
    conv_alpha: float | None = option(None,
        "alpha of these convolutions; conv_rank, or else lora_alpha, if not given",
        gt=0, requires={"method": RANKED}, kohya=SAME)
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] | None = option(None,
        "ranks by module: pattern=rank …, as in peft",
        requires={"method": RANKED})
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] | None = option(None,
        "alphas by module: pattern=alpha …, as in peft",
        requires={"method": RANKED})
    method: str = option("lora",
        "form of the delta: lora, lora_fa (A is frozen), loha, lokr, full (full rank)",
        choices=METHODS, kohya="network_module", onetrainer="peft_type")
    use_dora: bool = option(False,
        "train a magnitude per output beside the direction (DoRA), with any method",
        scripts="D", onetrainer="lora_decompose", simpletuner=SAME)
    use_rslora: bool = option(False,
        "scale by alpha / sqrt(rank) instead of alpha / rank",
        requires={"method": RANKED})
    init_lora_weights: str | None = option(None,
        "initial factors of lora; kaiming if not given; pissa: the base's principal singular "
        "vectors",
        choices=("kaiming", "gaussian", "orthogonal", "pissa"),
        requires={"method": PLAIN_LORA}, simpletuner="lora_init_type")
    use_tucker: bool = option(False,
        "give convolutions larger than 1x1 a small core instead of a large factor (lora, "
        "loha, lokr)",
        requires={"method": RANKED}, onetrainer="lokr_use_tucker")
    lokr_factor: int | None = option(None,
        "side of lokr's first factor; near the square root if not given",
        ge=1, requires={"method": ("lokr",)}, onetrainer="lokr_decompose_factor")
    lokr_full_matrix: bool = option(False,
        "keep lokr's second factor whole, for any rank",
        requires={"method": ("lokr",)}, onetrainer=SAME)
    lokr_decompose_both: bool = option(False,
        "give lokr's first factor the rank too",
        requires={"method": ("lokr",), "lokr_full_matrix": (False,)}, onetrainer=SAME)
    lora_dropout: float = option(0.0,
        "probability of dropping an input element of the delta",
        ge=0, lt=1, scripts="CD", simpletuner=SAME)
    neuron_dropout: float = option(0.0,
        "probability of dropping an element between the factors A and B",
        ge=0, lt=1, requires={"method": PLAIN_LORA, "use_dora": (False,)},
        kohya="network_dropout", onetrainer="dropout_probability")
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
        scripts="BCD", onetrainer="text_encoder.train", simpletuner=SAME)
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
        diffusers=SAME, onetrainer="additional_embeddings.placeholder")
    num_new_tokens_per_abstraction: int = option(2,
        "vectors of each new word",
        ge=1, requires={"token_abstraction": None}, diffusers=SAME,
        onetrainer="additional_embeddings.token_count")
    initializer_token: str | None = option(None,
        "words whose embeddings are the start of new words: 'monster'; random if not given",
        requires={"token_abstraction": None}, diffusers=SAME,
        onetrainer="additional_embeddings.initial_embedding_text")
    # fmt: on
