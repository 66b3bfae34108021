"""Adapt a GPT-2 from prose to source code: LoRA against full fine-tuning, in loss, time and memory.

A small byte-level GPT-2 first learns the prose of the standard library's docstrings. From that base
the same batches of Python source then train

- everything, full fine-tuning;
- a LoRA of rank 8 on the attention's and the MLP's projections, which in GPT-2 are transformers'
  `Conv1D`, not `nn.Linear`.

    python examples/gpt2.py

takes half a minute on one core. For seed 0 the loss on code falls from 2.29 to 1.94, and to 1.98 by
the LoRA with 14 % of the parameters. Both unlearn some prose, at this rate the LoRA more of it; but
it can be taken out, and the base is there again to the last bit.
"""

import argparse
import ast
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from measure import MeasuredTraining, file_bytes
from texts import docstrings, sources
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import sd_lora

CONTEXT = 64  # bytes
TARGETS = [r".*\.(c_attn|c_proj|c_fc)"]
NUM_TEST = 64  # sequences a loss is measured on
MAX_BYTES = 400_000  # of each kind of text


@dataclass(frozen=True)
class Row:
    """One way of training: losses in nats a byte on held-out text, and costs."""

    new: float
    old: float
    trained: int = 0
    file: int = 0
    memory: int = 0
    seconds: float = 0.0


def read_texts(seed: int) -> tuple[str, str]:
    """Returns (prose, code): docstrings of the standard library, and its source without them."""
    prose, code = [], []
    for tree in sources("python", seed):
        prose += docstrings(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
                node
            ):
                node.body = node.body[1:] or [ast.Pass()]
        code.append(ast.unparse(tree))
        if sum(map(len, code)) > MAX_BYTES and sum(map(len, prose)) > MAX_BYTES:
            break
    return "\n\n".join(prose)[:MAX_BYTES], "\n\n".join(code)[:MAX_BYTES]


class Text:
    """A text as bytes, its last tenth held out."""

    def __init__(self, text: str) -> None:
        data = torch.tensor(list(text.encode("ascii", "replace")), dtype=torch.long)
        self.train, self.test = data[: len(data) * 9 // 10], data[len(data) * 9 // 10 :]

    def batches(
        self, size: int, steps: int, generator: torch.Generator
    ) -> Iterator[dict[str, Tensor]]:
        for _ in range(steps):
            starts = torch.randint(len(self.train) - CONTEXT, (size,), generator=generator)
            ids = torch.stack([self.train[start : start + CONTEXT] for start in starts])
            yield {"input_ids": ids, "labels": ids}

    @torch.no_grad()
    def loss(self, model: GPT2LMHeadModel) -> float:
        """Returns the mean loss on evenly spaced sequences of the held-out part."""
        starts = torch.linspace(0, len(self.test) - CONTEXT, NUM_TEST).long()
        ids = torch.stack([self.test[start : start + CONTEXT] for start in starts])
        return model(input_ids=ids, labels=ids).loss.item()


def new_model() -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=256, n_positions=CONTEXT, n_embd=64, n_layer=2, n_head=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        initializer_range=0.1,  # GPT-2's 0.02 is for its width; here it learns slowly
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # transformers 5 guesses it otherwise, and says so
    return model


def run(seed: int = 0, base_steps: int = 600, steps: int = 200) -> dict[str, Row]:
    """Trains the base and the two adaptations, and returns what the table shows."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    prose, code = (Text(text) for text in read_texts(seed))
    base = new_model()
    pretraining = MeasuredTraining(base, base.parameters(), 3e-3, base_steps)
    for batch in prose.batches(16, base_steps, generator):
        pretraining.step(batch)

    full, lora = copy.deepcopy(base), copy.deepcopy(base)
    sd_lora.inject(lora, targets=TARGETS, rank=8, alpha=16, seed=seed)
    ways = {
        "full fine-tuning": MeasuredTraining(full, full.parameters(), 1e-3, steps),
        "LoRA, rank 8": MeasuredTraining(lora, sd_lora.lora_layers(lora), 1e-2, steps),
    }
    for batch in code.batches(16, steps, generator):  # a step of each in turn: times compare
        for training in ways.values():
            training.step(batch)

    rows = {"base": Row(code.loss(base), prose.loss(base))}
    for name, training in ways.items():
        losses = code.loss(training.model), prose.loss(training.model)
        # safetensors refuses two names for one tensor: GPT-2's head is its embedding
        kept = sd_lora.lora_state_dict(training.model) or dict(training.model.named_parameters())
        costs = training.num_trained, file_bytes(kept), training.memory, training.seconds
        rows[name] = Row(*losses, *costs)
    sd_lora.eject(lora)
    rows["LoRA taken out"] = Row(code.loss(lora), prose.loss(lora))
    return rows


def table(rows: dict[str, Row]) -> str:
    lines = [
        f"{'':18}{'loss on code':>14}{'on prose':>10}{'trained':>10}{'file':>10}{'memory':>10}"
        f"{'a step':>10}"
    ]
    for name, row in rows.items():
        line = f"{name:18}{row.new:14.3f}{row.old:10.3f}"
        if row.trained:
            line += f"{row.trained:10,}{row.file / 1024:6.0f} KiB{row.memory / 2**20:6.1f} MiB"
            line += f"{row.seconds * 1000:7.1f} ms"
        lines.append(line)
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of weights, texts and batches")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # steps this small get slower with more
    print(table(run(args.seed)))
    print(
        "\nLosses in nats a byte on held-out text; memory: gradients, AdamW's moments, activations."
    )


if __name__ == "__main__":
    main()
