"""docs/data.md names the findings, keys and options that there are; its numbers are computed."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from sd_lora import check as checkup
from sd_lora.config import kohya
from sd_lora.config.command_line import parse
from sd_lora.config.config_file import read_config_file
from sd_lora.config.rows import LEFTOVERS
from sd_lora.config.schema import OPTIONS
from sd_lora.config.sources import RULES, SOURCE, CaptionRules
from sd_lora.data.batches.caption_rules import caption_of
from sd_lora.data.batches.epochs import Epochs
from sd_lora.data.images.buckets import CropSettings, Size
from sd_lora.findings import FINDINGS, LEVELS, Finding


@pytest.fixture
def page(root: Path) -> str:
    return (root / "docs/data.md").read_text()


def section(page: str, title: str) -> str:
    """Returns what stands below a heading, up to the next one of its rank or above."""
    found = re.search(rf"^(##+) {re.escape(title)}\n(.*?)(?=^##? |\Z|^\1 )", page, re.M | re.S)
    assert found, title
    return found[2]


def rows(text: str, head: str) -> list[list[str]]:
    """Returns the cells of the table whose head begins with a word, without its head."""
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
        cells = [
            [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            for line in block.splitlines()
        ]
        if cells[0][0] == head:
            assert {len(row) for row in cells} == {len(cells[0])}
            return cells[2:]
    raise AssertionError(head)


def named(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def test_the_page_has_every_finding(page: str) -> None:
    """The page's table has exactly the codes of FINDINGS, each with its level."""
    on_page = {
        code: level
        for codes, level, _ in rows(section(page, "Findings"), "code")
        for code in named(codes)
    }
    assert on_page == {code: kind.level for code, kind in FINDINGS.items()}
    assert set(on_page.values()) == set(LEVELS)


def test_every_finding_is_used(root: Path) -> None:
    """Each code stands in a source file besides the table, so no row is dead."""
    sources = [p for p in (root / "sd_lora").rglob("*.py") if p != root / "sd_lora/findings.py"]
    code = "\n".join(path.read_text() for path in sources)
    assert [name for name in FINDINGS if f'"{name}"' not in code] == []


def test_a_finding_takes_level_and_advice_from_its_row() -> None:
    """An unknown code is an error; the text is the details, then the advice of the row."""
    with pytest.raises(ValueError, match="unknown finding code 'trunkated'"):
        Finding("trunkated", "a.png")
    finding = Finding("tiny", "a.png", "8×8 pixels")
    level, advice = FINDINGS["tiny"]
    assert finding.as_dict() == {
        "level": level,
        "code": "tiny",
        "name": "a.png",
        "text": f"8×8 pixels; {advice}",
    }
    assert Finding("grey", "a.png").text == FINDINGS["grey"].advice


def test_every_key_of_a_source_is_there(page: str) -> None:
    """The table of sources has every key, with its default or the flag that it comes from."""
    table = rows(section(page, "Several sources"), "key")
    assert sorted(name for row in table for name in named(row[0])) == sorted(SOURCE | RULES)
    for keys, unsaid, _ in table[:-1]:
        (name,) = named(keys)
        for word in named(unsaid):
            if word.startswith("--"):
                assert word.removeprefix("--") in OPTIONS, name
            else:
                default = SOURCE[name].default
                shown = str(default).lower() if isinstance(default, bool) else str(default)
                assert word == shown, name


def test_every_key_of_kohyas_file_is_there(page: str) -> None:
    """What is read of kohya's file is in the table, and what is refused is named."""
    text = section(page, "kohya's dataset config")
    read = {name for row in rows(text, "key") for name in named(row[0])}
    assert read == set(kohya.SUBSET | kohya.SHARED | kohya.DATASET)
    refused = re.search(r"^Refused,.*?\n\n", text, re.M | re.S)
    assert refused
    words = set(named(refused[0])) - {"false"}
    assert {word for word in words if not word.startswith("--")} == set(kohya.UNSUPPORTED)


def test_every_option_of_data_is_there(root: Path, page: str) -> None:
    """Each flag of the section data is written out here or in docs/models.md; each one here is a
    flag."""
    text = page + (root / "docs/models.md").read_text()
    flags = [name for name, field in OPTIONS.items() if field.section == "data"]
    assert [f for f in flags if f"--{f}" not in text and f != "sources"] == []
    switches = {f"no-{name}" for name, field in OPTIONS.items() if field.kind == "bool"}
    own = {"json", "page", "no_page", "num_processes", "config", "model"}
    assert set(re.findall(r"--(\w[\w-]*)", page)) - {*OPTIONS, *switches, *own} == set()
    table = rows(section(page, "What is left over"), "`--bucket_leftovers`")
    assert {word for row in table for word in named(row[0])} == set(LEFTOVERS)


def test_the_buckets_are_those_of_the_page(page: str) -> None:
    """The numbers of buckets, and each row of the table of images."""
    text = section(page, "Shapes")
    sdxl, sd1 = CropSettings(1024, step=32), CropSettings(512, step=64)
    counts = f"SD 1 at 512 has {len(sd1.buckets)}, SDXL at 1024 {len(sdxl.buckets)}"
    assert counts in " ".join(text.split())

    def pair(cell: str) -> Size:
        width, height = cell.split("×")
        return int(width), int(height)

    table = rows(text, "image")
    assert len(table) == 5
    for size, base, bucket, resized, cut in table:
        crop_settings = {"SDXL, 1024": sdxl, "SD 1, 512": sd1}[base]
        crop = crop_settings.crop(pair(size), crop_settings.bucket(pair(size)) or (0, 0), None)
        assert (crop.size, crop.resized) == (pair(bucket), pair(resized)), size
        assert f"{round(100 * crop.crop_loss, 1):g} %" == cut
    assert "500×400 becomes 448×384" in " ".join(text.split())
    assert CropSettings(512, step=64, upscale=False).bucket((500, 400)) == (448, 384)


def test_the_arithmetic_is_right(page: str) -> None:
    """The example of leftovers and steps: batches, samples, steps with accumulation and on two
    processes."""
    entries = [(512, 512)] * 23 + [(448, 576)] * 10 + [(576, 448)] * 7
    text = section(page, "What is left over")
    example = "23 entries at 512×512, 10 at 448×576, 7 at 576×448, batch 4: 6 + 3 + 2 = 11 batches"
    assert example in " ".join(text.split())
    told = {named(row[0])[0]: row[1:] for row in rows(text, "`--bucket_leftovers`")}
    for policy in LEFTOVERS:
        epochs = Epochs(entries, 4, leftovers=policy)
        assert epochs.num_micro_batches == 11
        sizes = sorted(len(m.entries) for m in epochs.epoch(0))
        assert sizes == ([2, 3, 3] if policy == "smaller" else [4] * 3) + [4] * 8
        assert told[policy][1] == str(epochs.num_samples)
    assert Epochs(entries, 4, leftovers="pad-batch").empty == 4
    assert "of which 4 places do not count" in told["pad-batch"][0]
    assert Epochs(entries, 4, leftovers="repeat").extra == 4
    twice, on_two = Epochs(entries, 4, 2), Epochs(entries, 8, 2)
    assert (twice.num_steps, twice.epoch(0)[-1].accumulation_steps) == (6, 1)
    assert (on_two.num_steps, on_two.num_micro_batches) == (3, 6)
    epoch = " ".join(section(page, "What an epoch is").split())
    assert "6 with accumulation 2, the last one of a single batch; 3 with accumulation 2" in epoch


def test_the_caption_becomes_what_the_page_says(page: str) -> None:
    """The rules of the example, from its block, give the captions that it shows."""
    text = section(page, "What happens to captions")
    (block,) = re.findall(r"```toml\n(.*?)```", text, re.S)
    rules = CaptionRules(**tomllib.loads(block)["data"])
    table = dict(rows(text, ""))
    lines = [line.replace("\\|", "|") for line in named(table["the file, two lines"])]
    shown = named(" ".join(text.partition("With seed 0")[2].split()))[:2]
    epochs = {5: named(table["prefix"])[0], 1: shown[0], 2: shown[1]}
    for epoch, caption in epochs.items():
        assert caption_of(("\n".join(lines),), rules, (0, "instance", epoch, 0)) == caption


def test_the_commands_are_understood(root: Path, page: str) -> None:
    """Each command of the page parses; it names the two examples of sources."""
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", page, re.S)).replace("\\\n", " ")
    commands = [shlex.split(line) for line in blocks.splitlines() if line]
    assert len(commands) == 3
    for words in commands:
        assert words[:2] == ["sd-lora", "check"]
        config = parse(words[2:])
        assert (root / config.pretrained_model_name_or_path).is_dir()  # type: ignore[operator]


@pytest.mark.parametrize("name", ["sources", "dataset_kohya"])
def test_the_example_files_can_be_trained(
    name: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two files of sources hold sound images by a check: images, repeats, and class images."""
    monkeypatch.chdir(root)
    file = f"sample_data/configs/{name}.toml"
    words = ["--data_cache_dir", str(tmp_path)]
    if name == "sources":
        assert "sources" in read_config_file(file)
        words += ["--config", file]
    else:
        model = "sample_data/tiny-sd"
        words += ["--pretrained_model_name_or_path", model, "--dataset_config", file]
    checked = checkup.check(parse(words), page=False)
    assert [f for f in checked.images.findings if f.level != "note"] == []
    counts = {kind: len(found.set.samples) for kind, found in checked.images.by_kind.items()}
    entries = len(checked.images.instances.entries)
    expected = {"sources": ((36, 24), 60), "dataset_kohya": ((8, 24), 80)}
    assert ((counts["instance"], counts["class"]), entries) == expected[name]


def test_the_output_is_what_is_printed(
    root: Path, page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sample of `sd-lora check` is what it prints today."""
    monkeypatch.chdir(root)
    (shown,) = re.findall(r"```\n(sd_lora check:\n.*?)```", page, re.S)
    words = ["--config", "sample_data/configs/text_to_image.toml"]
    checked = checkup.check(parse([*words, "--data_cache_dir", str(tmp_path)]), page=False)
    printed = f"sd_lora check:\n{checkup.lines(checked)}\n  {checked.verdict}"
    assert f"{printed}\n  look at check.html\n" == shown
