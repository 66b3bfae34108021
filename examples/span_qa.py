"""Adapt a RoBERTa to find answers in a text, or to say that there is none, in three ways.

The set is made here: passages about a person, and questions on them, as in SQuAD. In style v1 the
passage always has the answer. In style v2 a third of the questions, as of SQuAD 2.0's training
part, ask for something it does not tell, often with a wrong answer of the right kind beside it. A
small RoBERTa first learns to fill in masked words of such passages, without questions. From that
base and on the same batches these are trained:

- everything, full fine-tuning;
- a LoRA on all linear layers, with all biases, the LayerNorms and the head `qa_outputs` in full;
- the same on a base in 4 bits (nf4), with AdamW's moments in 8 bits, as in QLoRA (Dettmers et al.
  2023).

    python examples/span_qa.py

needs bitsandbytes, from 0.50 on without a GPU, and takes 90 seconds on one core. For seed 0 full
fine-tuning answers 86.8 % of v1's questions exactly and 73.2 % of v2's, the LoRA 83.5 and 72.5 %,
and on the base in 4 bits, which takes 44 % of the room, 84.5 and 69.8 %.
"""

import copy
import random
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import bitsandbytes as bnb
import torch
from masked_words import PAD, SPECIAL, Batch, batches, pretrain
from measure import MeasuredTraining, file_bytes, seed_of, weight_bytes
from tokenizers import Encoding, Tokenizer, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import RobertaProcessing
from torch import nn
from transformers import RobertaConfig, RobertaForQuestionAnswering

import sd_lora

NAMES = (
    "Ada Ben Cara Dan Ella Finn Gina Hugo Iris Jack Kira Leo Mia Noah Olga Paul Quinn Rosa Sam "
    "Tara Uwe Vera Will Xena Yara Zoe Anna Bert Cleo Dora Emil Fay"
).split()
KINDS = {  # of answers: their first words, and their second ones
    "place": (
        "old new upper lower east west".split(),
        "Lund Porto Turin Bergen Krakow Ghent Cork Basel Riga Split".split(),
    ),
    "date": (
        "January March April June July August October December".split(),
        [str(year) for year in range(1960, 1990, 3)],
    ),
    "thing": (
        "red blue green white black brown".split(),
        "boat piano horse watch bicycle tent parrot lamp violin goat".split(),
    ),
    "job": (
        "night school ship town".split(),
        "baker doctor painter cook guard teacher clerk nurse".split(),
    ),
    "dish": (
        "hot cold sweet sour".split(),
        "soup tea rice bread salad cake pudding porridge".split(),
    ),
}


@dataclass(frozen=True)
class Relation:
    """Relation of a person to an answer, in the words of statements and of questions."""

    kind: str
    statements: tuple[str, str]
    questions: tuple[str, str]


RELATIONS = (
    Relation(
        "place",
        ("{name} lives in {answer}.", "The home of {name} is in {answer}."),
        ("Where does {name} live?", "Where is the home of {name}?"),
    ),
    Relation(
        "place",
        ("{name} works in {answer}.", "The office of {name} is in {answer}."),
        ("Where does {name} work?", "Where is the office of {name}?"),
    ),
    Relation(
        "date",
        ("{name} was born in {answer}.", "The birthday of {name} was in {answer}."),
        ("When was {name} born?", "When was the birthday of {name}?"),
    ),
    Relation(
        "date",
        ("{name} married in {answer}.", "The wedding of {name} was in {answer}."),
        ("When did {name} marry?", "When was the wedding of {name}?"),
    ),
    Relation(
        "thing",
        ("{name} owns a {answer}.", "{name} has a {answer}."),
        ("What does {name} own?", "What has {name}?"),
    ),
    Relation(
        "thing",
        ("{name} lost a {answer}.", "{name} misses a {answer}."),
        ("What did {name} lose?", "What does {name} miss?"),
    ),
    Relation(
        "job",
        ("{name} is a {answer}.", "{name} has become a {answer}."),
        ("What is the job of {name}?", "What has {name} become?"),
    ),
    Relation(
        "dish",
        ("{name} likes {answer}.", "{name} is fond of {answer}."),
        ("What does {name} like to eat?", "What food is {name} fond of?"),
    ),
)
NUM_FACTS = 4  # of a passage
UNANSWERABLE = {"v1": 0.0, "v2": 1 / 3}  # style: share of its questions
NUM_TEXTS, NUM_TRAIN, NUM_TEST = 6000, 16000, 400
MAX_TOKENS, MAX_ANSWER = 48, 4
LINEARS = r"roberta\.encoder\..*(query|key|value|dense)"
FULL, LORA, QLORA = "full fine-tuning", "LoRA, rank 8", "LoRA, nf4, 8 bits"
LEARNING_RATES = {FULL: 2e-3, LORA: 5e-3, QLORA: 5e-3}
# the moments of tensors below 4,096 numbers, here of all factors, else stay in 32 bits
ADAMW_8BIT = partial(bnb.optim.AdamW8bit, min_8bit_size=256)


@dataclass(frozen=True)
class Question:
    text: str
    context: str
    answer: str = ""  # none
    start: int = 0  # of the answer, in letters of the context


@dataclass(frozen=True)
class Outcome:
    """One way of training on one style: percentages on test questions, and costs."""

    exact: float
    f1: float
    trained: int  # parameters
    file: int  # bytes to keep beside the base
    weights: int  # bytes
    memory: int  # bytes of gradients, moments and activations in a step
    seconds: float  # of a step


def draw_passage(rng: random.Random) -> tuple[str, dict[Relation, str], list[str]]:
    """Returns a name, the relations that are told with their answers, and the sentences."""
    name = rng.choice(NAMES)
    told = {
        relation: " ".join(map(rng.choice, KINDS[relation.kind]))
        for relation in rng.sample(RELATIONS, NUM_FACTS)
    }
    sentences = [
        rng.choice(relation.statements).format(name=name, answer=answer)
        for relation, answer in told.items()
    ]
    return name, told, sentences


def draw_question(rng: random.Random, unanswerable: float) -> Question:
    """Returns a question, for the given share of them one that the passage does not answer."""
    name, told, sentences = draw_passage(rng)
    untold = [relation for relation in RELATIONS if relation not in told]
    is_untold = rng.random() < unanswerable
    asked = rng.choice(untold if is_untold else list(told))
    text, context = rng.choice(asked.questions).format(name=name), " ".join(sentences)
    if is_untold:
        return Question(text, context)
    place = list(told).index(asked)
    start = sum(len(s) + 1 for s in sentences[:place]) + sentences[place].index(told[asked])
    return Question(text, context, told[asked], start)


def train_tokenizer(texts: Sequence[str]) -> Tokenizer:
    """Returns a tokenizer of whole words and punctuation marks."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(
        texts, trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False)
    )
    tokenizer.post_processor = RobertaProcessing(("</s>", 2), ("<s>", 0))
    tokenizer.enable_padding(pad_id=PAD, pad_token="<pad>")
    return tokenizer


def encode(
    tokenizer: Tokenizer, texts: Sequence[str] | Sequence[tuple[str, str]]
) -> tuple[Batch, list[Encoding]]:
    rows = tokenizer.encode_batch(texts)
    tensors = {
        "input_ids": torch.tensor([row.ids for row in rows]),
        "attention_mask": torch.tensor([row.attention_mask for row in rows]),
    }
    return tensors, rows


class Questions:
    """Questions as tensors, and the answers that a model finds."""

    def __init__(self, questions: Sequence[Question], tokenizer: Tokenizer) -> None:
        self.questions = questions
        self.inputs, self._rows = encode(tokenizer, [(q.text, q.context) for q in questions])
        spans = [self._span(q, row) for q, row in zip(questions, self._rows, strict=True)]
        starts, ends = torch.tensor(spans).unbind(dim=1)
        self.examples = self.inputs | {"start_positions": starts, "end_positions": ends}

    @staticmethod
    def _span(question: Question, row: Encoding) -> tuple[int, int]:
        """Returns the first and the last token of the answer; without one both are <s>."""
        if not question.answer:
            return 0, 0
        last = question.start + len(question.answer) - 1
        return row.char_to_token(question.start, 1), row.char_to_token(last, 1)

    @torch.no_grad()
    def answers(self, model: nn.Module, may_be_none: bool) -> list[str]:
        """Returns the best span of the context; "" where <s> scores higher, if it may."""
        output = model(**self.inputs)
        start, end = output.start_logits, output.end_logits
        scores = start[:, :, None] + end[:, None, :]
        num_tokens = scores.shape[1]
        in_context = torch.tensor([[part == 1 for part in row.sequence_ids] for row in self._rows])
        allowed = torch.ones(num_tokens, num_tokens).triu().tril(MAX_ANSWER - 1).bool()
        allowed = allowed & in_context[:, :, None] & in_context[:, None, :]
        best, places = scores.masked_fill(~allowed, -torch.inf).flatten(1).max(dim=1)
        none = (scores[:, 0, 0] > best) & may_be_none
        found = []
        for i, (question, row) in enumerate(zip(self.questions, self._rows, strict=True)):
            first, last = divmod(int(places[i]), num_tokens)
            text = question.context[row.offsets[first][0] : row.offsets[last][1]]
            found.append("" if none[i] else text)
        return found


def normalise(answer: str) -> list[str]:
    """Returns an answer's words as SQuAD's scripts compare them."""
    letters = "".join(c for c in answer.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", letters).split()


def f1(answer: str, gold: str) -> float:
    """Returns the F1 of words; without words in one of them, 1 if the other has none either."""
    a, b = normalise(answer), normalise(gold)
    common = sum((Counter(a) & Counter(b)).values())
    if not (a and b):
        return float(a == b)
    return 2 * common / (len(a) + len(b))


def quantise(model: nn.Module) -> None:
    """Replaces the encoder's linear layers by ones of the same weights in 4 bits."""
    for name, linear in list(model.named_modules()):
        if not re.fullmatch(LINEARS, name):
            continue
        layer = bnb.nn.Linear4bit(
            *(linear.in_features, linear.out_features),
            quant_type="nf4",
            compute_dtype=torch.float32,
        )
        layer.load_state_dict(linear.state_dict())
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.to("cpu"))  # this quantises it


def prepare(base: nn.Module, way: str, steps: int, seed: int) -> MeasuredTraining:
    """Returns the training of a copy of the base in one of the ways."""
    model = copy.deepcopy(base)
    if way == FULL:
        return MeasuredTraining(model, model.parameters(), LEARNING_RATES[way], steps)
    if way == QLORA:
        quantise(model)
    sd_lora.inject(
        model, targets=[LINEARS], rank=8, alpha=16, seed=seed,
        train_bias="all", modules_to_save=["LayerNorm", "qa_outputs"],
    )  # fmt: skip
    optimizer: Callable[..., torch.optim.Optimizer] = (
        ADAMW_8BIT if way == QLORA else torch.optim.AdamW
    )
    trained = sd_lora.lora_layers(model)
    return MeasuredTraining(model, trained, LEARNING_RATES[way], steps, optimizer)


def new_base(
    tokenizer: Tokenizer, texts: Sequence[str], steps: int, generator: torch.Generator
) -> RobertaForQuestionAnswering:
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
    )
    base = RobertaForQuestionAnswering(config)
    masked, _ = encode(tokenizer, texts)
    base.roberta.load_state_dict(pretrain(config, masked, steps, generator))
    return base


def outcome(training: MeasuredTraining, test: Questions, may_be_none: bool) -> Outcome:
    model = training.model
    answers = test.answers(model, may_be_none)
    golds = [question.answer for question in test.questions]
    exact = [normalise(a) == normalise(gold) for a, gold in zip(answers, golds, strict=True)]
    f1s = [f1(a, gold) for a, gold in zip(answers, golds, strict=True)]
    return Outcome(
        exact=100 * sum(exact) / len(exact),
        f1=100 * sum(f1s) / len(f1s),
        trained=training.num_trained,
        file=file_bytes(sd_lora.lora_state_dict(model) or dict(model.named_parameters())),
        weights=weight_bytes(model),
        memory=training.memory,
        seconds=training.seconds,
    )


def run(
    seed: int = 0, pretrain_steps: int = 500, steps: int = 500
) -> dict[str, dict[str, Outcome]]:
    """Trains the base and, from it, every way on every style; returns style → way → outcome."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    rng = random.Random(seed)
    texts = [" ".join(draw_passage(rng)[2]) for _ in range(NUM_TEXTS)]
    drawn = {
        style: [draw_question(rng, share) for _ in range(NUM_TRAIN + NUM_TEST)]
        for style, share in UNANSWERABLE.items()
    }
    tokenizer = train_tokenizer([*texts, *(question.text for question in drawn["v1"])])
    base = new_base(tokenizer, texts, pretrain_steps, generator)
    outcomes = {}
    for style, questions in drawn.items():
        train = Questions(questions[:NUM_TRAIN], tokenizer)
        test = Questions(questions[NUM_TRAIN:], tokenizer)
        trainings = {way: prepare(base, way, steps, seed) for way in LEARNING_RATES}
        for batch in batches(train.examples, 32, steps, generator):
            for training in trainings.values():  # in turn, so that a busy machine slows all alike
                training.step(batch)
        outcomes[style] = {
            way: outcome(training, test, UNANSWERABLE[style] > 0)
            for way, training in trainings.items()
        }
    return outcomes


def table(outcomes: Mapping[str, Mapping[str, Outcome]]) -> str:
    """Returns exact matches and F1 of both styles, and the costs, which are the same for both."""
    lines = [
        f"{'':17}{'v1 EM':>7}{'F1':>7}{'v2 EM':>7}{'F1':>7}{'parameters':>12}{'file':>9}"
        f"{'weights':>10}{'memory/step':>13}{'ms/step':>9}"
    ]
    for way, o in outcomes["v2"].items():
        scores = (
            score for style in outcomes.values() for score in (style[way].exact, style[way].f1)
        )
        lines.append(
            f"{way:17}{''.join(f'{score:7.1f}' for score in scores)}{o.trained:12,}"
            f"{o.file / 1e3:6.0f} kB{o.weights / 1e3:7.0f} kB{o.memory / 1e6:10.1f} MB"
            f"{1e3 * o.seconds:9.1f}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    print(table(run(seed_of(argv, __doc__, "of texts, questions and weights"))))


if __name__ == "__main__":
    main()
