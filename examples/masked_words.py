"""The base of a small RoBERTa: special tokens, batches, and learning to fill in masked words."""

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import RobertaConfig, RobertaForMaskedLM

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]  # with RoBERTa's ids, 0 to 4
PAD, MASK = 1, 4

Batch = dict[str, Tensor]  # input_ids, attention_mask: (N, tokens), and what is learned of each


def batches(examples: Batch, size: int, num: int, generator: torch.Generator) -> Iterator[Batch]:
    for _ in range(num):
        rows = torch.randint(len(examples["input_ids"]), (size,), generator=generator)
        yield {name: tensor[rows] for name, tensor in examples.items()}


def pretrain(
    config: RobertaConfig, texts: Batch, steps: int, generator: torch.Generator
) -> Mapping[str, Tensor]:
    """Returns the encoder's weights after learning to fill in masked words."""
    model = RobertaForMaskedLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for batch in batches(texts, 64, steps, generator):
        ids = batch["input_ids"]
        masked = (torch.rand(ids.shape, generator=generator) < 0.25) & (ids >= len(SPECIAL))
        hidden = model.roberta(ids.masked_fill(masked, MASK), batch["attention_mask"])[0]
        # only the masked places go through the head, the dear part: it scores every word
        F.cross_entropy(model.lm_head(hidden[masked]), ids[masked]).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.roberta.state_dict()
