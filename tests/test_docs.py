"""The documents name what there is, and their code runs."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import torch
from torch import nn

import sd_lora
from sd_lora import cli
from sd_lora.adapters.deltas import METHODS
from sd_lora.adapters.targets import plan
from sd_lora.config import schema as config
from sd_lora.config.presets import preset
from sd_lora.config.rows import PRESETS
from sd_lora.config.sample_prompts import NAMES
from sd_lora.config.schema import SHORT_NAMES
from sd_lora.findings import FINDINGS
from sd_lora.models.families import FAMILIES
from sd_lora.models.load import load_parts
from sd_lora.models.meta_pipeline import MetaPipeline
from sd_lora.tool_flags import judge_parser, sample_parser, tool_parser


def test_every_adapter_flag_is_documented(root: Path) -> None:
    """Each flag of the section adapter, and each way to set a learning rate, is written out."""
    text = (root / "docs/training.md").read_text() + (root / "docs/adapters.md").read_text()
    names = [name for name, field in config.OPTIONS.items() if field.section == "adapter"]
    names += ["loraplus_lr_ratio", "lr_pattern", "scale_weight_norms", "text_encoder_lr"]
    assert len(names) > 20
    assert [name for name in names if f"--{name}" not in text] == []


def test_every_tool_command_is_one(root: Path) -> None:
    """Each `sd-lora` line of a tool, as printed, is understood by it, and each flag of the tools is
    printed."""
    text = "".join((root / name).read_text() for name in ("docs/files.md",))
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if "sd-lora" in line]
    shown = [shlex.split(line, comments=True)[1:] for line in lines]
    tools = [words for words in shown if words[0] in cli._TOOLS]
    assert {words[0] for words in tools} == {*cli._TOOLS}
    for words in tools:
        tool_parser(words[0]).parse(words[1:])
    for tool in cli._TOOLS:
        for action in tool_parser(tool)._actions:
            flags = [flag for flag in action.option_strings if flag.startswith("--")]
            assert all(flag == "--help" or f"{flag}" in text for flag in flags), (tool, flags)


def test_every_method_is_documented(root: Path) -> None:
    """The table of methods has a row for each."""
    text = (root / "docs/adapters.md").read_text()
    assert all(f"| `{name}` |" in text for name in METHODS)


def register_printed_method(root: Path) -> None:
    """Run the class of docs/adapters.md, which registers the method "outer"."""
    text = (root / "docs/adapters.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (code,) = (block for block in blocks if "register_method" in block)
    exec(code, {})


def test_the_method_of_ones_own_works(root: Path) -> None:
    """The class in docs/adapters.md, as printed, is injected, trained, merged and loaded again."""
    register_printed_method(root)
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


@pytest.mark.parametrize("rule", ["add", "decompose"])
def test_files_of_a_method_of_ones_own(
    rule: str, root: Path, tiny_sd1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`save_adapter` writes the printed method, and `load_adapter` reads every ΔW back bit for bit,
    in attention, convolutions and the text encoder; the tools take the file; without the class it
    is refused by the method's name; a second method with such tensors cannot be registered."""
    register_printed_method(root)
    try:
        parts, fresh = load_parts(str(tiny_sd1)), load_parts(str(tiny_sd1))
        for component, targets in (("unet", "attention+conv"), ("text_encoder", "text")):
            sd_lora.inject(parts.models[component], targets, rank=2, method="outer", rule=rule)
        with torch.no_grad():
            for model in parts.models.values():
                for parameter in sd_lora.lora_layers(model):
                    parameter.normal_(std=0.1)
        (path,) = sd_lora.save_adapter(parts.models, tmp_path / "own", family="sd1")
        loaded = sd_lora.load_adapter(fresh.models, path)
        assert {name: len(modules) for name, modules in loaded.items()} == {
            name: len(sd_lora.deltas_of(model)) for name, model in parts.models.items()
        }
        for component, model in parts.models.items():
            again = sd_lora.deltas_of(fresh.models[component])
            for name, delta in sd_lora.deltas_of(model).items():
                assert torch.equal(delta.weight(), again[name].weight()), name
                if rule == "decompose":
                    assert torch.equal(delta.magnitude.flatten(), again[name].magnitude.flatten())
        assert cli.main(["inspect", str(path)]) == 0
        assert "does not know the method outer" in capsys.readouterr().out
        out = tmp_path / "again.safetensors"
        words = ["convert", str(path), "--to", "lycoris", "--out", str(out), "--model"]
        assert cli.main([*words, str(tiny_sd1)]) == 0
        with pytest.raises(ValueError, match="'mine' and 'outer' both have tensors called outer_u"):
            sd_lora.register_method("mine")(type("Mine", (sd_lora.Delta,), {
                "tensor_names": ("outer_u",)
            }))  # fmt: skip
    finally:
        del METHODS["outer"]
    with pytest.raises(sd_lora.UsageError, match="method 'outer', which is not registered here"):
        sd_lora.load_adapter(load_parts(str(tiny_sd1)).models, path)


GUIDES = (
    "README.md", "docs/first-lora.md", "docs/training.md", "docs/troubleshooting.md",
    "docs/memory.md", "docs/windows.md", "docs/python.md", "docs/glossary.md",
)  # fmt: skip
"""Pages of this project's own words alone."""


def anchors(page: Path) -> set[str]:
    """Anchors that GitHub makes of a page's headings."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_every_link_leads_somewhere(root: Path) -> None:
    """Each relative link and image of README, docs and the other pages is a file of the project,
    and each anchor a heading in it; every page of docs is reached from the README."""
    pages = [*root.glob("*.md"), *root.glob("docs/*.md"), *root.glob("*/README.md")]
    reached: dict[Path, set[Path]] = {}
    for page in pages:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match(r"\w+:", link):
                continue
            place, _, anchor = link.partition("#")
            target = (page.parent / place).resolve() if place else page
            assert target.exists(), (page, link)
            assert not anchor or anchor in anchors(target), (page, link)
            reached.setdefault(page, set()).add(target)
    docs = {page.resolve() for page in root.glob("docs/*.md")}
    assert docs - reached[root / "README.md"] == set()


def test_flags_in_guides_exist(root: Path) -> None:
    """Each flag in the pages that begin is an option of a run, one of its short names, a flag of a
    tool, or a mark in a line of sample prompts."""
    known = {f"--{name}" for name in (*config.OPTIONS, *SHORT_NAMES)}
    known |= {f"--no-{name}" for name, option in config.OPTIONS.items() if option.kind == "bool"}
    known |= {"--config", "--help", "--out", "--python", "--torch-backend", "--index-url", "--card"}
    known |= {"--json"}
    known |= {f"--{marks[0]}" for marks in NAMES.values()}
    for parser in (sample_parser(), judge_parser()):
        known |= {flag for action in parser._actions for flag in action.option_strings}
    for page in GUIDES:
        flags = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", (root / page).read_text("utf-8")))
        assert flags - known == set(), page


def test_the_table_of_presets(root: Path) -> None:
    """The rows of docs/training.md are the presets' own numbers."""
    text = (root / "docs/training.md").read_text(encoding="utf-8")
    for name in PRESETS:
        found, length = preset(name), preset(name).length
        learns = "trained" if found.options["train_text_encoder"] else "not"
        words = f"| `{name}` | {found.title} | {found.options['targets']}, {found.options['rank']} "
        words += f"| {learns} | {found.options['train_batch_size']} "
        words += f"| each {length.uses:g} times, {length.least} to {length.most} in all |"
        assert words in text


def test_messages_in_troubleshooting_are_said(root: Path) -> None:
    """The messages that docs/troubleshooting.md quotes stand in the code."""
    page = (root / "docs/troubleshooting.md").read_text(encoding="utf-8")
    code = "".join(path.read_text("utf-8") for path in (root / "sd_lora").rglob("*.py"))
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # texts over several lines
    for words in (
        "the run has diverged", "NaN or infinite latents for", "ends at", "of an earlier run",
        "the model generated NaN or infinite pixels", "take bfloat16 or float32",
        "has no captions, so its images need a prompt", "interrupted by", "computed in each step",
        "out of memory in the run's largest batch, tried before step ",
    ):  # fmt: skip
        assert words in page, words
        assert words in code, words
    codes = set(re.findall(r"^\| (`[a-z-]+`(?:, `[a-z-]+`)*) \| ", page, re.M))
    named = {code.strip("`") for cell in codes for code in cell.split(", ")}
    assert named <= FINDINGS.keys()
    assert {"warmup-too-long", "few-steps", "card-not-seen"} <= named


def test_the_page_of_memory_is_counted(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of docs/memory.md, counted again; its frozen and trained bytes are those of the page's
    formulas, by the numbers of parameters of the published UNet and of a rank-32 LoCon."""
    monkeypatch.syspath_prepend(str(root / "dev"))
    counting = importlib.import_module("write_memory_page")
    page = (root / "docs/memory.md").read_text(encoding="utf-8")
    (setting,) = (s for s in counting.settings("sd1") if s.title == "`--preset style`")
    count = counting.count_setting(setting)
    unet = MetaPipeline.of_family(FAMILIES["sd1"]).models["unet"]
    assert count.frozen == 2 * sum(p.numel() for p in unet.parameters())
    planned = plan(unet, "transformer+conv", 32)
    shapes = [unet.get_submodule(target.name).weight.shape for target in planned]
    factors = sum(32 * (shape[0] + shape[1:].numel()) for shape in shapes)
    assert count.trained == 16 * factors
    numbers = (count.frozen, count.trained, count.rest, count.peak)
    words = " | ".join(f"{number / 2**30:.2f}" for number in numbers)
    assert f"| {setting.title} | {words} | " in page
    assert f"| {count.flop / 1e12:.1f} |" in page


def test_the_page_of_scale_is_computed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/scale.md has the tables that its script computes from docs/memory.md today; a ring
    all-reduce's bytes are those of summing n parts step by step."""
    monkeypatch.syspath_prepend(str(root / "dev"))
    scale = importlib.import_module("write_scale_page")
    found = list(scale.rows((root / "docs/memory.md").read_text(encoding="utf-8")))
    assert len(found) == 9
    page = (root / "docs/scale.md").read_text(encoding="utf-8")
    tables = (scale.exchange_rows, scale.shard_rows, scale.subject_rows)
    for line in (*scale.most_rows(), *(line for table in tables for line in table(found))):
        assert line in page
    for n in (2, 3, 8):  # a part is sent n - 1 times to be summed, and n - 1 times to be known
        sent = sum(found[0].gradients / n for _ in range(2 * (n - 1)))
        assert found[0].exchange("10 Gb/s", n) == pytest.approx(sent / 1.25e9)
