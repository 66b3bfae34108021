"""The examples do what they say: their own figures, on their own data, at their own size."""

import importlib
import math
import random
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch


@pytest.fixture
def example(
    root: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> ModuleType:
    """The script named by the test, imported as `python examples/<name>.py` would."""
    monkeypatch.syspath_prepend(str(root / "examples"))
    yield importlib.import_module(request.param)
    for path in (root / "examples").glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.mark.parametrize("example", ["digits"], indirect=True)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_rank_one_update_repairs_a_digit(example: ModuleType, seed: int) -> None:
    """With less than 1 % of the parameters the worst digit's errors fall to a third or less; both
    routes give the same ΔW; taken out, every weight and every error is as before."""
    result = example.run(seed)
    worst = result.worst
    assert result.before[worst] >= 8
    assert result.adapted[worst] <= result.before[worst] / 3
    assert 0 < result.added < 0.01 * result.parameters
    assert result.max_difference < 1e-5
    assert result.weights_identical
    assert result.ejected == result.before
    assert f"{worst:5}" in example.table(result)


@pytest.mark.slow
@pytest.mark.parametrize("example", ["text_classifier"], indirect=True)
def test_lora_on_query_and_value(example: ModuleType) -> None:
    """LoRA is clearly better than the head alone and than biases, with a twentieth of the
    parameters and of the file of full fine-tuning, which is better still on so small a base and
    needs more memory; and the published count of roberta-base."""
    outcomes = example.run(seed=0)
    head, biases, lora, full = outcomes.values()
    assert lora.accuracy > max(head.accuracy, biases.accuracy) + 0.03
    assert full.accuracy > lora.accuracy > 0.55
    assert head.trained < biases.trained < lora.trained < 0.06 * full.trained
    assert lora.file < 0.06 * full.file
    assert head.memory < lora.memory < 0.75 * full.memory
    assert example.count_in_roberta_base() == 294_912
    assert all(name in example.table(outcomes) for name in outcomes)


@pytest.mark.slow
@pytest.mark.parametrize("example", ["gpt2"], indirect=True)
def test_lora_on_gpt2(example: ModuleType) -> None:
    """LoRA wins at least three quarters of what full fine-tuning does on the new text, with a
    seventh of the parameters and less memory; taken out, both losses are the base's exactly."""
    rows = example.run(seed=0)
    base, full, lora, ejected = rows.values()
    assert base.new - full.new > 0.25
    assert base.new - lora.new > 0.75 * (base.new - full.new)
    assert lora.trained < 0.15 * full.trained
    assert lora.file < 0.15 * full.file
    assert lora.memory < full.memory
    assert (ejected.new, ejected.old) == (base.new, base.old)
    assert "LoRA taken out" in example.table(rows)


@pytest.mark.parametrize("example", ["gpt2"], indirect=True)
def test_a_step_of_a_gpt2_with_its_vocabulary(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the published vocabulary and fewer, narrower layers: a LoRA keeps neither gradients nor
    moments of the frozen weights, its backward pass and its optimiser take less time than those of
    full fine-tuning, and so does its step. All of them lower the loss."""
    config = replace_config(example.REAL.config, n_embd=192, n_layer=2, n_head=4)
    size = replace(example.REAL, config=config, tokens=32, num_test=4, base_steps=4, steps=6)
    monkeypatch.setattr(example, "MAX_BYTES", 20_000)
    rows = example.run(seed=0, size=size)
    base, full, *loras, ejected = rows.values()
    assert full.trained == full.weights // 4  # the head is the embedding, and counted once
    for lora in loras:
        assert lora.trained < 0.02 * full.trained
        assert lora.file < 0.02 * full.file
        assert full.memory - lora.memory > 2.7 * full.weights  # of three times, and activations
        assert full.weights < lora.weights < 1.02 * full.weights
        assert lora.parts[1] < 0.9 * full.parts[1]
        assert lora.parts[2] < 0.2 * full.parts[2]
        assert lora.seconds < 0.85 * full.seconds
    assert base.new < math.log(50257)
    assert full.new < base.new
    assert loras[1].new < base.new
    assert (ejected.new, ejected.old) == (base.new, base.old)
    assert all(name in example.table(rows) for name in rows)


def replace_config(config: Any, **changes: int) -> Any:
    """Returns a copy of a transformers configuration with other values."""
    return type(config).from_dict(config.to_dict() | changes)


@pytest.mark.parametrize("example", ["gpt2"], indirect=True)
def test_the_real_size_is_the_published_one(example: ModuleType) -> None:
    """GPT-2 has 124,439,808 parameters, and the LoRA of rank 4 on its 12 `c_attn` layers 12 · 4 ·
    (768 + 2304): counted without weights."""
    with torch.device("meta"):
        model = example.GPT2LMHeadModel(example.REAL.config)
    assert sum(p.numel() for p in model.parameters()) == 124_439_808
    lora = example.REAL.loras["LoRA, c_attn, rank 4"]
    example.sd_lora.inject(model, targets=[lora.targets], rank=lora.rank)
    assert sum(p.numel() for p in example.sd_lora.lora_layers(model)) == 147_456


@pytest.mark.parametrize("example", ["span_qa"], indirect=True)
@pytest.mark.parametrize(
    ("answer", "gold", "exact", "f1"),
    [
        ("a Red Boat.", "the red boat", True, 1.0),
        ("old red boat", "red boat", False, 0.8),  # precision 2/3, recall 1
        ("boat boat", "boat", False, 2 / 3),  # a word counts as often as it is there
        ("old Lund", "March 1960", False, 0.0),
        ("", "", True, 1.0),  # SQuAD 2.0: no answer is right where there is none,
        ("old Lund", "", False, 0.0),  # and nothing else
        ("", "old Lund", False, 0.0),
    ],
)
def test_squads_metrics(
    example: ModuleType, answer: str, gold: str, exact: bool, f1: float
) -> None:
    """Answers are compared without case, punctuation and articles, exactly and by the F1 of their
    words."""
    assert (example.normalise(answer) == example.normalise(gold)) is exact
    assert example.f1(answer, gold) == pytest.approx(f1)


@pytest.mark.parametrize("example", ["span_qa"], indirect=True)
def test_the_questions(example: ModuleType) -> None:
    """An answer stands in its passage where its question says, comes back from its tokens, and is
    of a relation that is told; an unanswerable question asks for one that is not."""
    rng = random.Random(0)
    questions = [example.draw_question(rng, 1 / 3) for _ in range(600)]
    for question in questions:
        stop = question.start + len(question.answer)
        assert question.context[question.start : stop] == question.answer
        (asked,) = (
            relation
            for relation in example.RELATIONS
            if any(matches(words, question.text) for words in relation.questions)
        )
        told = any(
            matches(words, sentence)
            for words in asked.statements
            for sentence in re.findall(r"[^.]+\.", question.context)
        )
        assert told is bool(question.answer)
    assert 0.25 < sum(not question.answer for question in questions) / 600 < 0.42
    tokenizer = example.train_tokenizer([f"{q.text} {q.context}" for q in questions])
    asked = example.Questions(questions, tokenizer)
    assert asked.examples["input_ids"].shape[1] <= example.MAX_TOKENS
    assert (asked.examples["input_ids"] != 3).all()  # <unk>
    assert asked.answers(Oracle(asked.examples), True) == [q.answer for q in questions]
    # forced to answer, it takes a span of the passage
    spans = asked.answers(Oracle(asked.examples), False)
    assert all(span and span in q.context for span, q in zip(spans, questions, strict=True))


def matches(words: str, text: str) -> bool:
    """Whether a text is these words, with some name and some answer."""
    pattern = re.escape(words).replace(r"\{name\}", r"\w+").replace(r"\{answer\}", r"\w+ \w+")
    return re.fullmatch(pattern, text.strip()) is not None


class Oracle:
    """A model that knows the spans: logits of 5 at their ends, 0 elsewhere."""

    def __init__(self, examples: dict[str, torch.Tensor]) -> None:
        self.examples = examples

    def __call__(self, input_ids: torch.Tensor, **_: torch.Tensor) -> SimpleNamespace:
        starts, ends = self.examples["start_positions"], self.examples["end_positions"]
        one_hot = torch.nn.functional.one_hot
        width = input_ids.shape[1]
        return SimpleNamespace(
            start_logits=5.0 * one_hot(starts, width), end_logits=5.0 * one_hot(ends, width)
        )


@pytest.mark.parametrize("example", ["span_qa"], indirect=True)
def test_ways_of_training_on_spans(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few steps of every way on both styles: what is trained, its file, and the room that the
    base takes in 4 bits and the moments in 8."""
    monkeypatch.setattr(example, "NUM_TEXTS", 200)
    monkeypatch.setattr(example, "NUM_TRAIN", 400)
    monkeypatch.setattr(example, "NUM_TEST", 40)
    outcomes = example.run(seed=0, pretrain_steps=5, steps=10)
    assert list(outcomes) == ["v1", "v2"]
    full, lora, qlora = outcomes["v2"].values()
    assert lora.trained == qlora.trained < 0.25 * full.trained
    assert lora.file == qlora.file < 0.35 * full.file
    # two layers of 4 · 64 · 64 + 2 · 64 · 128 weights: from 4 bytes to half of one, and 12 layers'
    # scales with their tables
    saved = lora.weights - qlora.weights
    assert 0.8 * 4 * 65_536 < saved < 0.875 * 4 * 65_536
    # moments of 4 bytes, twice, become codes of one; not those of biases and norms
    assert 0.6 * 6 * lora.trained < lora.memory - qlora.memory < 6 * lora.trained
    assert lora.memory < full.memory
    assert all(0 <= o.exact <= o.f1 <= 100 for ways in outcomes.values() for o in ways.values())
    assert all(way in example.table(outcomes) for way in outcomes["v1"])


@pytest.mark.parametrize("example", ["digits", "text_classifier", "gpt2", "span_qa"], indirect=True)
def test_bad_flags_are_told(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong flag ends with the parser's message, before anything is trained."""
    threads = torch.get_num_threads()
    with pytest.raises(SystemExit):
        example.main(["--sede", "1"])
    assert "--sede" in capsys.readouterr().err
    assert torch.get_num_threads() == threads
