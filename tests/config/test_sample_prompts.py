"""Prompts of sample images are read from lines and files, and all mistakes are told at once."""

from dataclasses import replace
from pathlib import Path

import pytest

from sd_lora.config.sample_prompts import SamplePrompt, read_prompts
from sd_lora.config.schema import TrainConfig
from sd_lora.errors import UsageError

DOG = SamplePrompt("a dog -- my dog", "low, bad", 768, 512, 7, 28, 7.5, 0.5)
CAT = SamplePrompt("a cat")

FILES = {
    # sd-scripts' marks, in any case, with a comment and an empty line; --m is ai-toolkit's
    "lines.txt": "# seen\n\na dog -- my dog --n low, bad --W 768 --h 512 --d 7 --s 28 --l 7.5 "
    "--m 0.5\na cat\n",
    "ai_toolkit.txt": "a dog -- my dog --n low, bad --w 768 --h 512 --seed 7 --steps 28 --cfg 7.5 "
    "--network_multiplier 0.5\na cat",
    "ours.toml": 'prompts = [{prompt = "a dog -- my dog", negative = "low, bad", width = 768, '
    "height = 512, seed = 7, steps = 28, guidance = 7.5, strength = 0.5}, "
    '"a cat"]',
    "sd_scripts.json": '[{"prompt": "a dog -- my dog", "negative_prompt": "low, bad", "width": 768,'
    '"height": 512, "seed": 7, "sample_steps": 28, "scale": 7.5, "strength": 0.5}, "a cat"]',
}


@pytest.mark.parametrize("name", FILES)
def test_each_form_gives_the_same_prompts(tmp_path: Path, name: str) -> None:
    """The same two images in four forms; a written line is read back as itself."""
    path = tmp_path / name
    path.write_text(FILES[name], encoding="utf-8")
    found = [replace(prompt, place="") for prompt in read_prompts(str(path))]
    assert found == [DOG, CAT]
    again = read_prompts("\n".join(prompt.line for prompt in found))
    assert [replace(prompt, place="") for prompt in again] == found
    assert [prompt.place for prompt in again] == ["line 1", "line 2"]


def test_a_subset_of_sd_scripts_has_the_settings_of_all(tmp_path: Path) -> None:
    """[prompt] holds what its subsets do not say; a prompt's place is the line of its header."""
    path = tmp_path / "prompts.toml"
    path.write_text('[prompt]\nwidth = 64\nseed = 1\n[[prompt.subset]]\nprompt = "a"\n'
                    '[[prompt.subset]]\nprompt = "b"\nseed = 2\n')  # fmt: skip
    assert [(p.prompt, p.width, p.seed, p.place) for p in read_prompts(str(path))] == [
        ("a", 64, 1, "prompts.toml:4"), ("b", 64, 2, "prompts.toml:6"),
    ]  # fmt: skip


def test_all_mistakes_are_told_with_their_places(tmp_path: Path) -> None:
    """Every line's mistakes come at once, as a problem of the option beside those of others."""
    path = tmp_path / "prompts.txt"
    path.write_text(
        "fine\n--w 60 --s 500\na dog --ss euler --d -1\nb --weight 64\nc --l nan\nd --d 1 --d 2"
    )
    with pytest.raises(UsageError) as told:
        TrainConfig(train_data_dir="d", pretrained_model_name_or_path="m", rank=0,
                    sample_prompts=str(path))  # fmt: skip
    assert [problem.field for problem in told.value.problems] == ["rank", "sample_prompts"]
    known = "they are --n, --w, --h, --d, --s, --l, --m"
    assert told.value.problems[1].text.splitlines() == [
        "prompts.txt:2: the prompt is missing; --w is a multiple of 8 from 8 to 8192, not 60; --s "
        "is a whole number from 1 to 200, not 500",
        f"prompts.txt:3: --ss is no setting of a prompt: {known}; --d is a whole number from 0 to "
        "9223372036854775807, not -1",
        f"prompts.txt:4: --weight is no setting of a prompt: {known}. Did you mean height?",
        "prompts.txt:5: --l is a number, not nan",
        "prompts.txt:6: a setting stands there twice: --d 1 --d 2",
    ]


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("gone.txt", None, "prompts .*gone.txt: No such file"),
        ("bad.txt", b"\xff\xfe", "no text in UTF-8"),
        ("bad.toml", b"[[prompts]\n", r"bad\.toml cannot be read: .*line 1"),
        ("deep.json", b"[" * 100_000, "cannot be read"),
        ("table.toml", b'prompt = "a"', r"table\.toml has no \[\[prompts\]\]"),
        ("number.json", b'[3, {"prompt": 4}]', "(?s)entry 1: 3 is no prompt.*entry 2: prompt is a"),
        ("empty.txt", b"# none\n", "no prompt is given"),
    ],
)
def test_files_that_hold_no_prompts(
    tmp_path: Path, name: str, text: bytes | None, told: str
) -> None:
    """A file that is missing, broken or empty is told as such."""
    if text is not None:
        (tmp_path / name).write_bytes(text)
    with pytest.raises(UsageError, match=told):
        read_prompts(str(tmp_path / name))
