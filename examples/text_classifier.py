"""Adapt a RoBERTa to a classification task in four ways, and compare what they give and cost.

An example is two docstrings in one row, as in RoBERTa's sentence-pair tasks, and the question is
about the first: is it from networkx, pandas, sympy or Python's own library? The second one is
there to mislead. They are read from the installed files; nothing is downloaded. A small RoBERTa
first learns to fill in masked words, without labels. Then, from that base and on the same batches,
these are trained: a new head alone; the head and all biases (BitFit, Ben Zaken et al. 2022); the
head and a LoRA on query and value (Hu et al. 2021); everything.

    python examples/text_classifier.py

takes a minute on one core. For seed 0: the head alone 53 % right (25 % is chance), BitFit 56 %,
LoRA 68 % with 5 % of the parameters, full fine-tuning 76 % with all of them. Two layers that have
learned for seconds give less to build on than roberta-base, where the paper finds LoRA on par.
"""

import copy
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from masked_words import PAD, SPECIAL, Batch, batches, pretrain
from measure import MeasuredTraining, file_bytes, seed_of
from texts import docstrings, sources
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import RobertaProcessing
from torch import nn
from transformers import RobertaConfig, RobertaForSequenceClassification

import sd_lora

LIBRARIES = ("networkx", "pandas", "python", "sympy")
NUM_TRAIN, NUM_TEST = 900, 200  # docstrings of each library
MAX_TOKENS = 44  # of a pair
QUERY_VALUE = r".*attention\.self\.(query|value)"
LORA = "LoRA, rank 8"
TRAINED = {  # way: parameters of the base that are trained
    "head": r"classifier\..*",
    "biases (BitFit)": r"classifier\..*|.*\.bias",
    "full fine-tuning": r".*",
}
LEARNING_RATES = {"head": 5e-3, "biases (BitFit)": 5e-3, LORA: 5e-3, "full fine-tuning": 1e-3}


@dataclass(frozen=True)
class Outcome:
    accuracy: float
    trained: int  # parameters
    share: float  # of the base's parameters
    file: int  # bytes to keep beside the base
    memory: int  # bytes of gradients, moments and activations in a step
    seconds: float  # of a step


def texts_of(library: str, seed: int) -> Iterator[str]:
    """Yields the beginnings of a library's docstrings that do not give the answer away."""
    giveaway = re.compile("|".join(LIBRARIES), re.IGNORECASE)
    for tree in sources(library, seed):
        for text in docstrings(tree):
            start = " ".join(text.split())[:250]
            if len(start) > 40 and not giveaway.search(start):
                yield start


def load_texts(seed: int) -> tuple[list[str], list[str]]:
    """Returns texts to train on and, from other files, to test on, each ordered by library."""
    train, test = [], []
    for library in LIBRARIES:
        found: dict[str, None] = {}  # an ordered set
        for text in texts_of(library, seed):
            found[text] = None
            if len(found) == NUM_TRAIN + NUM_TEST:
                break
        train += list(found)[:NUM_TRAIN]
        test += list(found)[NUM_TRAIN:]
    return train, test


def train_tokenizer(texts: Sequence[str]) -> Tokenizer:
    """Returns a tokenizer of the most frequent words of four letters or more.

    Shorter ones say little about the topic, and this base has only seconds to learn.
    """
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[a-z]{4,}"), "removed", invert=True)
    trainer = trainers.WordLevelTrainer(
        vocab_size=1500, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = RobertaProcessing(("</s>", 2), ("<s>", 0))
    tokenizer.enable_padding(pad_id=PAD, pad_token="<pad>")
    return tokenizer


def encode(
    tokenizer: Tokenizer, texts: Sequence[str] | Sequence[tuple[str, str]], max_tokens: int
) -> Batch:
    tokenizer.enable_truncation(max_tokens)
    rows = tokenizer.encode_batch(texts)
    return {
        "input_ids": torch.tensor([row.ids for row in rows]),
        "attention_mask": torch.tensor([row.attention_mask for row in rows]),
        "labels": torch.arange(len(LIBRARIES)).repeat_interleave(len(rows) // len(LIBRARIES)),
    }


def pairs(texts: Sequence[str], seed: int) -> list[tuple[str, str]]:
    return list(zip(texts, random.Random(seed).sample(texts, len(texts)), strict=True))


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def prepare(model: nn.Module, way: str) -> list[nn.Parameter]:
    """Makes a model train in one of the ways; returns what the optimiser gets."""
    if way == LORA:
        sd_lora.inject(
            model, targets=[QUERY_VALUE], rank=8, alpha=16, modules_to_save=["classifier"]
        )
        return sd_lora.lora_layers(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(re.fullmatch(TRAINED[way], name) is not None)
    return list(trainable(model).values())


def run(seed: int = 0, pretrain_steps: int = 800, steps: int = 250) -> dict[str, Outcome]:
    """Trains the base and, from it, every way; returns what the table shows."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    train_texts, test_texts = load_texts(seed)
    tokenizer = train_tokenizer(train_texts)
    config = RobertaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=MAX_TOKENS + 2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.05,  # 0.02 is for RoBERTa's width
        num_labels=len(LIBRARIES),
    )
    base = RobertaForSequenceClassification(config)
    texts = encode(tokenizer, train_texts, MAX_TOKENS // 2)
    base.roberta.load_state_dict(pretrain(config, texts, pretrain_steps, generator))

    trainings = {}
    for way in LEARNING_RATES:
        model = copy.deepcopy(base)
        trainings[way] = MeasuredTraining(model, prepare(model, way), LEARNING_RATES[way], steps)
    train = encode(tokenizer, pairs(train_texts, seed), MAX_TOKENS)
    test = encode(tokenizer, pairs(test_texts, seed), MAX_TOKENS)
    for batch in batches(train, 32, steps, generator):
        for training in trainings.values():  # in turn, so that a busy machine slows all alike
            training.step(batch)
    return {name: outcome(training, base, test) for name, training in trainings.items()}


def outcome(training: MeasuredTraining, base: nn.Module, test: Batch) -> Outcome:
    model, num_trained = training.model, training.num_trained
    with torch.no_grad():
        right = model(**test).logits.argmax(dim=1) == test["labels"]
    kept = sd_lora.lora_state_dict(model) or trainable(model)
    return Outcome(
        accuracy=right.float().mean().item(),
        trained=num_trained,
        share=num_trained / sum(p.numel() for p in base.parameters()),
        file=file_bytes(kept),
        memory=training.memory,
        seconds=training.seconds,
    )


def count_in_roberta_base() -> int:
    """Returns how many parameters the same LoRA adds to roberta-base, without its weights."""
    with torch.device("meta"):
        model = RobertaForSequenceClassification(RobertaConfig())
    sd_lora.inject(model, targets=[QUERY_VALUE], rank=8)
    return sum(p.numel() for p in sd_lora.lora_layers(model))


def table(outcomes: Mapping[str, Outcome]) -> str:
    lines = ["trained           accuracy  parameters    of all      file  memory/step  ms/step"]
    for name, o in outcomes.items():
        lines.append(
            f"{name:17}{o.accuracy:9.1%}{o.trained:12,}{o.share:10.1%}{o.file / 1e3:7.0f} kB"
            f"{o.memory / 1e6:10.1f} MB{1e3 * o.seconds:9.1f}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    print(table(run(seed_of(argv, __doc__, "of texts, weights and batches"))))
    print(
        f"\nroberta-base, the same LoRA: {count_in_roberta_base():,} parameters, without the head"
    )


if __name__ == "__main__":
    main()
