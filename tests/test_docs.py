"""The documents name what there is, and their code runs."""

import re
import shlex
from pathlib import Path

import torch
from torch import nn

import sd_lora
from sd_lora import cli, commands
from sd_lora.adapters.deltas import METHODS
from sd_lora.config import schema as config


def test_every_adapter_flag_is_documented(root: Path) -> None:
    """Each flag of the section adapter, and each way to set a learning rate, is written out."""
    text = (root / "README.md").read_text() + (root / "docs/adapters.md").read_text()
    names = [name for name, field in config.OPTIONS.items() if field.section == "adapter"]
    names += ["loraplus_lr_ratio", "lr_pattern", "scale_weight_norms", "text_encoder_lr"]
    assert len(names) > 20
    assert [name for name in names if f"--{name}" not in text] == []


def test_every_tool_command_is_one(root: Path) -> None:
    """Each `sd-lora` line of a tool, as printed, is understood by it, and each flag of the tools is
    printed."""
    text = "".join((root / name).read_text() for name in ("README.md", "docs/files.md"))
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if "sd-lora" in line]
    shown = [shlex.split(line, comments=True)[1:] for line in lines]
    tools = [words for words in shown if words[0] in cli._TOOLS]
    assert {words[0] for words in tools} == {*cli._TOOLS}
    for words in tools:
        commands._parser(words[0]).parse(words[1:])
    for tool in cli._TOOLS:
        for action in commands._parser(tool)._actions:
            flags = [flag for flag in action.option_strings if flag.startswith("--")]
            assert all(flag == "--help" or f"{flag}" in text for flag in flags), (tool, flags)


def test_every_method_is_documented(root: Path) -> None:
    """The table of methods has a row for each."""
    text = (root / "docs/adapters.md").read_text()
    assert all(f"| `{name}` |" in text for name in METHODS)


def test_the_method_of_ones_own_works(root: Path) -> None:
    """The class in docs/adapters.md, as printed, is injected, trained, merged and loaded again."""
    text = (root / "docs/adapters.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (code,) = (block for block in blocks if "register_method" in block)
    exec(code, {})
    try:
        model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 1))
        bare = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 1))
        bare.load_state_dict(model.state_dict())
        sd_lora.inject(model, targets=["0", "2"], method="outer", rule="decompose")
        x = torch.randn(2, 4, 5, 5)
        before = model(x)
        optimizer = torch.optim.SGD(sd_lora.lora_layers(model), lr=0.1)
        before.square().sum().backward()
        optimizer.step()
        after = model(x)
        assert not torch.allclose(after, before, atol=1e-3)
        sd_lora.load_lora_state_dict(bare, sd_lora.lora_state_dict(model))
        torch.testing.assert_close(bare(x), after)
        with sd_lora.merged(model):
            torch.testing.assert_close(model(x), after)
    finally:
        del METHODS["outer"]
