"""Adapt a GPT-2 from prose to source code: LoRA against full fine-tuning, in loss, time and memory.

A small byte-level GPT-2 first learns the prose of the standard library's docstrings. From that base
the same batches of Python source then train

- everything, full fine-tuning;
- a LoRA of rank 8 on the attention's and the MLP's projections, which in GPT-2 are transformers'
  `Conv1D`, not `nn.Linear`.

    python examples/gpt2.py
    python examples/gpt2.py --real_size

The first takes half a minute on one core. For seed 0 the loss on code falls from 2.29 to 1.94, and
to 1.98 by the LoRA with 14 % of the parameters. Both unlearn some prose, at this rate the LoRA more
of it; but it can be taken out, and the base is there again to the last bit.

The second does the same at the size of the published GPT-2, 124 million parameters, with random
weights and a few steps, for what a step costs. There is also the LoRA of the paper's GPT-2, rank 4
on the attention's input projection (Hu et al. 2022, section 5.4: query and value; here the key,
too, which `c_attn` holds with them).
"""

import argparse
import ast
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from measure import MeasuredTraining, file_bytes, weight_bytes
from texts import docstrings, sources
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import sd_lora

MAX_BYTES = 400_000  # of each kind of text
PROJECTIONS = r".*\.(c_attn|c_proj|c_fc)"
FULL = "full fine-tuning"


@dataclass(frozen=True)
class LoRA:
    targets: str
    rank: int
    lr: float


@dataclass(frozen=True)
class Size:
    """A model, its batches, and its trainings."""

    config: GPT2Config
    tokens: int  # bytes of a sequence
    batch: int  # sequences
    num_test: int  # sequences a loss is measured on
    base_steps: int
    steps: int
    base_lr: float
    full_lr: float
    loras: Mapping[str, LoRA]


NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
SMALL = Size(
    config=GPT2Config(
        vocab_size=256, n_positions=64, n_embd=64, n_layer=2, n_head=4,
        bos_token_id=0, eos_token_id=0, **NO_DROPOUT,
        initializer_range=0.1,  # GPT-2's 0.02 is for its width; here it learns slowly
    ),
    tokens=64, batch=16, num_test=64, base_steps=600, steps=200, base_lr=3e-3, full_lr=1e-3,
    loras={"LoRA, rank 8": LoRA(PROJECTIONS, 8, 1e-2)},
)  # fmt: skip
REAL = Size(
    config=GPT2Config(**NO_DROPOUT),  # 12 layers of 768, 50,257 tokens of which bytes are 256
    tokens=128, batch=2, num_test=8, base_steps=20, steps=10, base_lr=1e-3, full_lr=3e-4,
    loras={
        "LoRA, c_attn, rank 4": LoRA(r".*\.c_attn", 4, 1e-2),
        "LoRA, all, rank 8": LoRA(PROJECTIONS, 8, 1e-3),
    },
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One way of training: losses in nats a byte on held-out text, and costs."""

    new: float
    old: float
    trained: int = 0
    file: int = 0
    weights: int = 0
    memory: int = 0
    parts: tuple[float, float, float] = (0.0, 0.0, 0.0)  # seconds: forward, backward, optimiser
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

    def __init__(self, text: str, size: Size) -> None:
        data = torch.tensor(list(text.encode("ascii", "replace")), dtype=torch.long)
        self.train, self.test = data[: len(data) * 9 // 10], data[len(data) * 9 // 10 :]
        self.size = size

    def batches(self, steps: int, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
        tokens = self.size.tokens
        for _ in range(steps):
            starts = torch.randint(
                len(self.train) - tokens, (self.size.batch,), generator=generator
            )
            ids = torch.stack([self.train[start : start + tokens] for start in starts])
            yield {"input_ids": ids, "labels": ids}

    @torch.no_grad()
    def loss(self, model: GPT2LMHeadModel) -> float:
        """Returns the mean loss on evenly spaced sequences of the held-out part."""
        tokens = self.size.tokens
        starts = torch.linspace(0, len(self.test) - tokens, self.size.num_test).long()
        ids = torch.stack([self.test[start : start + tokens] for start in starts])
        return model(input_ids=ids, labels=ids).loss.item()


def train_base(prose: Text, size: Size, generator: torch.Generator) -> GPT2LMHeadModel:
    base = GPT2LMHeadModel(size.config)
    base.loss_type = "ForCausalLM"  # transformers 5 guesses it otherwise, and says so
    training = MeasuredTraining(base, base.parameters(), size.base_lr, size.base_steps)
    for batch in prose.batches(size.base_steps, generator):
        training.step(batch)
    return base


def adaptations(base: GPT2LMHeadModel, size: Size, seed: int) -> dict[str, MeasuredTraining]:
    """Returns the ways to train a copy of the base."""
    full = copy.deepcopy(base)
    ways = {FULL: MeasuredTraining(full, full.parameters(), size.full_lr, size.steps)}
    for name, lora in size.loras.items():
        model = copy.deepcopy(base)
        sd_lora.inject(
            model, targets=[lora.targets], rank=lora.rank, alpha=2 * lora.rank, seed=seed
        )
        ways[name] = MeasuredTraining(model, sd_lora.lora_layers(model), lora.lr, size.steps)
    return ways


def run(seed: int = 0, size: Size = SMALL) -> dict[str, Row]:
    """Trains the base and its adaptations, and returns what the table shows."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    prose, code = (Text(text, size) for text in read_texts(seed))
    base = train_base(prose, size, generator)
    rows = {"base": Row(code.loss(base), prose.loss(base))}
    ways = adaptations(base, size, seed)
    for batch in code.batches(size.steps, generator):  # a step of each in turn: times compare
        for training in ways.values():
            training.step(batch)

    for name, training in ways.items():
        model = training.model
        # safetensors refuses two names for one tensor: GPT-2's head is its embedding
        kept = sd_lora.lora_state_dict(model) or dict(model.named_parameters())
        rows[name] = Row(
            new=code.loss(model),
            old=prose.loss(model),
            trained=training.num_trained,
            file=file_bytes(kept),
            weights=weight_bytes(model),
            memory=training.memory,
            parts=training.seconds_by_part,
            seconds=training.seconds,
        )
    sd_lora.eject(model)
    rows["LoRA taken out"] = Row(code.loss(model), prose.loss(model))
    return rows


def table(rows: dict[str, Row]) -> str:
    parts = "".join(f"{part:>10}" for part in ("forward", "backward", "optimiser"))
    lines = [
        f"{'':21}{'loss on code':>14}{'on prose':>10}{'trained':>13}{'file':>12}{'weights':>12}"
        f"{'memory':>12}{parts}{'a step':>10}{'of full':>9}"
    ]
    for name, row in rows.items():
        line = f"{name:21}{row.new:14.3f}{row.old:10.3f}"
        if row.trained:
            line += f"{row.trained:13,}{row.file / 1024:8,.0f} KiB{row.weights / 2**20:8.1f} MiB"
            line += f"{row.memory / 2**20:8.1f} MiB"
            line += "".join(f"{1000 * part:7.1f} ms" for part in (*row.parts, row.seconds))
            line += f"{row.seconds / rows[FULL].seconds:9.0%}"
        lines.append(line)
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of weights, texts and batches")
    parser.add_argument(
        "--real_size",
        action="store_true",
        help="of 124 million parameters: two and a half minutes, and 4.5 GB of memory",
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # steps this small get slower with more
    print(table(run(args.seed, REAL if args.real_size else SMALL)))
    print(
        "\nLosses in nats a byte on held-out text; memory, on top of the weights: gradients, "
        "AdamW's moments, activations; times of one core."
    )


if __name__ == "__main__":
    main()
