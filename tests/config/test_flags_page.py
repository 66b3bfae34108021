"""docs/flags.md names the options that there are, of ours and of diffusers' scripts; its commands
are understood."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from sd_lora.adapters.targets import match_names, plan, select
from sd_lora.config import kohya
from sd_lora.config.command_line import SCRIPTS, parse
from sd_lora.config.schema import OPTIONS, TrainConfig
from sd_lora.config.translate.diffusers import DIFFUSERS, SWITCHES
from sd_lora.config.translate.rows import Given
from sd_lora.errors import UsageError
from sd_lora.formats.names import naming_of
from sd_lora.models.families import family_named
from sd_lora.models.meta_pipeline import MetaPipeline

Table = tuple[list[str], list[list[str]]]
"""The cells of a table's head, and of its rows."""

FOREIGN = (
    "accelerate launch train_network.py",
    "accelerate launch sdxl_train_network.py",
    "python",
)
"""How the other trainers' commands start."""


@pytest.fixture(scope="module")
def page() -> str:
    return (Path(__file__).parents[2] / "docs/flags.md").read_text()


def _prose(page: str) -> str:
    """Returns the page without its blocks of code."""
    return re.sub(r"```.*?```", "", page, flags=re.DOTALL)


def _tables(page: str) -> list[Table]:
    tables = []
    for block in re.findall(r"(?:^\|.*\n)+", _prose(page), re.MULTILINE):
        rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in block.splitlines()]
        cells = [[cell.strip() for cell in row] for row in rows]
        assert {len(row) for row in cells} == {len(cells[0])}, cells[0]
        tables.append((cells[0], cells[2:]))
    return tables


def _names(text: str) -> list[str]:
    """Returns what stands in backticks."""
    return re.findall(r"`([^`]+)`", text)


def _commands(page: str) -> list[list[str]]:
    """Returns the words of our own commands, in the page's order."""
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", page, re.DOTALL)).replace("\\\n", " ")
    lines = [line for line in blocks.splitlines() if line and not line.startswith(("#", *FOREIGN))]
    return [shlex.split(line) for line in lines]


def _parsed(words: list[str]) -> TrainConfig:
    if words[:2] == ["sd-lora", "train"]:
        return parse(words[2:])
    assert words[:2] == ["accelerate", "launch"]
    folder, _, script = words[2].partition("/")
    assert folder == "train_scripts"
    return parse(words[3:], script)


def test_every_flag_of_diffusers_scripts_is_there(page: str) -> None:
    """Each of the four scripts' flags is named in the section of diffusers, each script too."""
    section = page.partition("## diffusers")[2].partition("\n## ")[0]
    named = {word.lstrip("-") for name in _names(section) for word in name.split()}
    for script, known in SCRIPTS.items():
        assert script in named
        assert known.flags - named == set(), script


def test_what_is_called_ours_is_ours(page: str) -> None:
    """Each name with dashes is an option, or the beginning of one of diffusers' flags; no cell of a
    column "ours" has another name."""
    shorter = {"gradient_accumulation"}
    assert all(any(flag.startswith(start) for flag in OPTIONS) for start in shorter)
    switched_off = {f"no-{name}" for name, field in OPTIONS.items() if field.kind == "bool"}
    known = {*OPTIONS, *DIFFUSERS, *shorter, *switched_off, "config"}
    assert set(re.findall(r"--(\w[\w-]*)", _prose(page))) - known == set()
    columns = [(head.index("ours"), rows) for head, rows in _tables(page) if "ours" in head]
    assert len(columns) == 4
    named = [name for at, rows in columns for row in rows for name in _names(row[at])]
    assert [name for name in named if not name.startswith("--")] == []


def test_every_refused_flag_is_there_with_a_reason(page: str) -> None:
    """The table of refused flags has exactly those that are refused, and parsing refuses them."""
    (rows,) = (rows for head, rows in _tables(page) if head[0] == "refused")
    named = [name for row in rows for name in _names(row[0])]
    refused = [n for n, row in DIFFUSERS.items() if row.take("x", Given()).kind == "absent"]
    assert sorted(named) == sorted(refused)
    assert all(len(reason) > 10 for _, reason in rows)
    for name in named:
        with pytest.raises(UsageError, match=rf"^--{name} "):
            parse([f"--{name}", *([] if name in SWITCHES else ["x"])])


def test_what_is_not_there_is_not_there(page: str) -> None:
    """No name of a paragraph "Not there" is an option."""
    paragraphs = re.findall(r"^Not there: .*?\n\n", page, re.MULTILINE | re.DOTALL)
    assert len(paragraphs) == 2
    named = {name for text in paragraphs for name in _names(text)}
    assert len(named) > 20
    assert named & {*OPTIONS} == set()


def test_the_defaults_are_ours(page: str) -> None:
    """Numbers in the column "here" are the defaults: captioned / DreamBooth where they differ."""
    head, rows = _tables(page)[0]
    checked = 0
    for row in rows:
        here = row[head.index("here")]
        field = OPTIONS[_names(row[-1])[0].removeprefix("--")]
        modes = field.modes or field.of_scripts
        values = [modes["text_to_image"], modes["dreambooth"]] if modes else [field.default]
        if re.match(r"[\d.]", here):
            numbers = here.partition(" epochs")[0].split("/")
            assert [float(number) for number in numbers] == values, row
            checked += 1
    assert checked == 5


def test_every_option_of_kohyas_data_is_there(page: str) -> None:
    """What kohya's dataset config says, and what is refused of it, stands in the section of
    sd-scripts, but for what its scripts have no option for."""
    section = page.partition("## sd-scripts")[2].partition("\n## ")[0]
    words = {word for name in _names(section) for word in name.split()}
    of_files = {
        *("image_dir", "metadata_file", "num_repeats", "class_tokens", "batch_size"),
        *("cache_info", "custom_attributes", "network_multiplier", "validation_seed"),
        "token_warmup_min",
    }
    keys = {*kohya.SUBSET, *kohya.SHARED, *kohya.DATASET, *kohya.UNSUPPORTED}
    assert keys - of_files - words == set()


def test_every_command_is_understood(page: str) -> None:
    """Our commands parse; those of a run that all three have are as many."""
    commands = _commands(page)
    for words in commands:
        _parsed(words)
    assert len(commands) == 5
    files = [json.loads(text) for text in re.findall(r"```json\n(.*?)```", page, re.DOTALL)]
    assert len(files) == 3
    for file, words in zip(files, commands[-3:], strict=True):
        config = _parsed(words)
        assert (file["lora_rank"], file["learning_rate"]) == (config.rank, config.learning_rate)
        alpha = config.rank if config.lora_alpha is None else config.lora_alpha
        assert file["lora_alpha"] == alpha
        assert file["base_model_name"] == config.pretrained_model_name_or_path


def _place(name: str) -> int:
    """Returns where a module stands in kohya's block lists, by its name in kohya's files."""
    found = re.match(r"lora_unet_(input|middle|output)_blocks?_(\d+)_", name)
    if found:
        return {"input": 1, "middle": 10, "output": 13}[found[1]] + int(found[2])
    if name.startswith("lora_unet_mid_block_"):
        return 12
    found = re.match(r"lora_unet_(down|up)_blocks_(\d+)_(\w+?)_(\d+)_", name)
    assert found
    j = 2 if found[3].endswith("samplers") else int(found[4])
    return {"down": 1, "up": 13}[found[1]] + 3 * int(found[2]) + j


@pytest.mark.parametrize(
    ("family", "number", "down", "up"), [("sd1", 0, 0, 13), ("sdxl", 1, 1, 13)]
)
def test_the_block_lists_mean_the_same(
    page: str, family: str, number: int, down: int, up: int
) -> None:
    """The worked examples: kohya's lists and our patterns give each module of the published UNet
    the same rank, alpha and factor of the learning rate, and leave out the same ones."""
    written = re.findall(r"^# network_args .*\n#.*$", page, re.MULTILINE)[number]
    lists = {
        key: [float(value) for value in values.split(",")]
        for key, values in re.findall(r"(\w+)=([\d.,]+)", written)
    }
    dims, alphas = lists["block_dims"], lists["block_alphas"]
    assert len(dims) == len(alphas) == {"sd1": 25, "sdxl": 23}[family]
    factors = [1.0] * len(dims)
    for key, first in (("down_lr_weight", down), ("up_lr_weight", up)):
        if key in lists:
            assert len(lists[key]) == {"sd1": 12, "sdxl": 9}[family]
            factors[first : first + len(lists[key])] = lists[key]
    unet, naming = MetaPipeline.of_family(family_named(family)).models["unet"], naming_of(family)
    theirs = {}
    for name in select(unet, "transformer"):
        place = _place(naming.kohya("unet", name))
        if dims[place] and factors[place]:
            theirs[name] = (dims[place], alphas[place], factors[place])

    config = _parsed(_commands(page)[number])
    planned = plan(
        unet,
        config.targets,
        config.rank,
        config.lora_alpha,
        rank_pattern=config.rank_pattern,
        alpha_pattern=config.alpha_pattern,
    )
    rates = match_names(config.lr_pattern, [target.name for target in planned], "lr_pattern")
    ours = {t.name: (t.rank, t.alpha, rates.get(t.name, 1.0)) for t in planned}
    assert ours == theirs


def test_the_places_of_sdxl_are_right(page: str) -> None:
    """Each number of SDXL's column is the place of the modules beside it, for all of kohya's LoCon;
    places go with j = 0, 1, … where a pattern has a j."""
    (rows,) = (rows for head, rows in _tables(page) if head[0] == "place")
    listed = {}
    for row in rows:
        for numbers, pattern in re.findall(r"(\d+(?:, \d+)*): `([^`]+)`", row[2]):
            for j, place in enumerate(numbers.split(", ")):
                listed[int(place)] = pattern.replace("\\|", "|").replace(".j", f".{j}")
    unet, naming = MetaPipeline.of_family(family_named("sdxl")).models["unet"], naming_of("sdxl")
    places = {name: _place(naming.kohya("unet", name)) for name in select(unet, "transformer+conv")}
    assert {place for place in places.values() if place < 13} == {*listed}
    for name, place in places.items():
        found = re.match(r"up_blocks\.(\d)\.(resnets|attentions|upsamplers)\.(\d)", name)
        if found:
            j = 2 if found[2] == "upsamplers" else int(found[3])
            assert place == 13 + 3 * int(found[1]) + j
        else:
            assert re.search(listed[place], name), (place, name)


def test_the_tables_of_options_are_those_of_the_rows(root: Path) -> None:
    """The generated part of the page equals what the generator writes, for every option."""
    done = subprocess.run(
        [sys.executable, "dev/write_flags_page.py", "--check"], cwd=root, capture_output=True,
        text=True, env={"PYTHONPATH": str(root), "PATH": ""},
    )  # fmt: skip
    assert (done.stdout.strip(), done.returncode) == ("the same", 0)
