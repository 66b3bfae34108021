"""One row an option: types, ranges, resolution, the JSON schema, and how few files name one."""

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from sd_lora.cli import main
from sd_lora.config.command_line import parse
from sd_lora.config.config_file import read_config_file
from sd_lora.config.optimizers import OPTIMIZERS
from sd_lora.config.rows import FAMILIES, LOWER, METHODS, PEERS, SCHEDULES, Work
from sd_lora.config.schema import OPTIONS, SECTIONS, RunConfig, TrainConfig, json_schema
from sd_lora.errors import UsageError

WORDS = ["--pretrained_model_name_or_path", "m", "--train_data_dir", "d"]
CONFIG = {"pretrained_model_name_or_path": "m", "train_data_dir": "d"}


def test_rows_are_whole() -> None:
    """Each row has a help text without a full stop at its end, a section and a known type; what it
    requires are options; peers' names are those of known peers; the work in which it saves memory
    is one that messages name, and the value one that it takes."""
    for name, option in OPTIONS.items():
        assert option.help, name
        assert not option.help.endswith("."), name
        assert option.section in SECTIONS, name
        assert option.requires.keys() <= OPTIONS.keys(), name
        assert option.names.keys() <= set(PEERS), name
        assert set(option.scripts) <= set("ABCD"), name
        assert option.less_memory.keys() <= {*get_args(Work)}, name
        for _, value in option.less_memory.values():
            known = value in (LOWER, *option.choices) or option.kind in ("bool", "int")
            assert known, name
        if option.default is not None and option.choices:
            assert option.default in option.choices, name
    headers = [option.header for option in OPTIONS.values() if option.header]
    assert len(set(headers)) == len(headers) == 30


def test_five_mistakes_in_a_file_are_told_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An unknown key, a wrong type, a value out of range, a wrong choice and a contradiction in a
    file, with an unknown flag and a pattern without a number beside it: exit code 2, a line each;
    each problem names its field."""
    file = tmp_path / "broken.toml"
    file.write_text(
        'mode = "text_to_image"\n[model]\npretrained_model_name_or_path = "m"\n'
        '[data]\ntrain_data_dir = "d"\n[adapter]\nnetwork_dim = 8\nrank = "4"\n'
        'lora_dropout = 1.5\nmethod = "lokar"\n[training]\nlr_power = 2\n'
    )
    words = ["train", "--config", str(file), "--snr_gama", "5", "--rank_pattern", "to_q"]
    assert main(words) == 2
    lines = capsys.readouterr().err.removeprefix("error: ").splitlines()
    assert sorted(lines) == sorted(
        [
            "unknown flag --snr_gama. Did you mean --snr_gamma?",
            f"{file}: 'network_dim' is not an option. Here it is --rank",
            "--rank_pattern 'to_q' is not pattern=number",
            "rank must be a whole number, not '4'",
            "lora_dropout must be at least 0 and below 1, not 1.5",
            "method is one of lora, lora_fa, loha, lokr, oft, full, not 'lokar'. "
            "Did you mean lokr?",
            "lr_power has no effect without lr_scheduler polynomial. Leave it out",
        ]
    )
    with pytest.raises(UsageError) as error:
        parse(words[1:])
    fields = {problem.field for problem in error.value.problems}
    wrong = {"network_dim", "snr_gama", "rank_pattern", "rank", "lora_dropout", "method"}
    assert fields == wrong | {"lr_power"}


def test_a_byte_order_mark_is_no_content(tmp_path: Path) -> None:
    """Notepad writes a mark before UTF-8: TOML and JSON with it are read as without."""
    for name, text in (("a.toml", "rank = 8"), ("a.json", '{"rank": 8}')):
        file = tmp_path / name
        file.write_text(text, encoding="utf-8-sig")
        assert file.read_bytes().startswith(b"\xef\xbb\xbf")
        assert read_config_file(str(file)) == {"rank": 8}


def test_every_unknown_flag_is_translated() -> None:
    """A usual command of sd-scripts: all foreign flags in one error, each with its option."""
    with pytest.raises(UsageError) as error:
        parse([*WORDS, "--network_dim", "8", "--network_alpha=4", "--unet_lr", "1e-4",
               "--min_snr_gamma", "5", "--flip_aug", "--max_train_epochs", "3"])  # fmt: skip
    remedies = {"--rank", "--lora_alpha", "--learning_rate", "--snr_gamma", "--random_flip"}
    remedies |= {"--num_train_epochs"}
    told = [problem.line() for problem in error.value.problems]
    assert len(told) == 7
    assert told[-1].startswith("these are flags of other trainers: sd-lora translate")
    assert all(any(f"here it is {remedy}" in line for line in told) for remedy in remedies)
    assert any(line.endswith("here it is --learning_rate (--lr)") for line in told)


def test_the_resolved_configuration_has_its_numbers() -> None:
    """Raw and resolved are two types: learning rates, decay and resolution of the resolved one are
    numbers for every component, the more general where none is given."""
    raw = TrainConfig(**CONFIG, mode="text_to_image", train_text_encoder=True, text_encoder_lr=1e-5)
    assert raw.resolution is None
    run = raw.resolve("sdxl", 1024)
    assert isinstance(run, RunConfig)
    assert (run.resolution, run.learning_rate_of("unet")) == (1024, 1e-4)
    assert run.learning_rate_of("text_encoder") == run.learning_rate_of("text_encoder_2") == 1e-5
    assert run.weight_decay_of("text_encoder") == run.adam_weight_decay == 1e-2
    assert run.new_words_learning_rate == 1e-5
    assert run.rank_and_alpha_of("text_encoder_2") == (4, None)
    own = raw.replace(text_encoder_rank=8, text_encoder_2_alpha=2.0, text_encoder_stop_step=5)
    run = own.resolve("sdxl", 1024)
    assert run.rank_and_alpha_of("unet") == (4, None)
    assert run.rank_and_alpha_of("text_encoder") == (8, 8.0)
    assert run.rank_and_alpha_of("text_encoder_2") == (8, 2.0)
    assert run.stop_step_of("text_encoder_2") == 5


def test_a_runs_configuration_can_be_given_back(tmp_path: Path) -> None:
    """`config.json` as `--config` gives the same configuration, tables of patterns included."""
    config = TrainConfig(
        **CONFIG, mode="text_to_image", rank=8, rank_pattern={"to_q": 2}, seed=3, lora_alpha=4.0,
        lr_scheduler="polynomial", lr_power=2.0, train_text_encoder=True,
    ).resolve("sd1", 512)  # fmt: skip
    file = tmp_path / "config.json"
    file.write_text(config.to_json())
    again = parse(["--config", str(file)])
    assert again.resolve("sd1", 512).as_dict() == config.as_dict()
    file.write_text("[1]")
    with pytest.raises(UsageError, match="needs a table of options"):
        read_config_file(str(file))
    file.write_text('{"rnak": 1, "rakn": 2}')
    with pytest.raises(UsageError) as error:
        read_config_file(str(file))
    assert [problem.field for problem in error.value.problems] == ["rnak", "rakn"]


def test_a_former_name_is_understood_with_a_note(tmp_path: Path) -> None:
    """A renamed option is taken under its old name, from flags and files, and the run notes it."""
    note = ("bucket_min_pictures is called bucket_min_images now",)
    config = parse([*WORDS, "--bucket_min_pictures", "3"])
    assert (config.bucket_min_images, config.notes) == (3, note)
    assert config.resolve("sd1", 512).notes == note
    file = tmp_path / "old.toml"
    file.write_text("[data]\nbucket_min_pictures = 4\n")
    config = parse([*WORDS, "--config", str(file)])
    assert (config.bucket_min_images, config.notes) == (4, note)


def test_the_schema_describes_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    """`sd-lora schema` prints JSON with a type, help and section for each option, ranges and
    choices where there are some; beside them it has the tables of several runs."""
    assert main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema == json.loads(json.dumps(json_schema()))
    rows = dict(schema["properties"])
    assert rows.pop("jobs")["items"]["required"] == ["name"]
    assert rows.keys() == OPTIONS.keys()
    assert schema["x-sections"] == list(SECTIONS)
    assert all(row["description"] and row["x-section"] in SECTIONS for row in rows.values())
    row = rows["checkpointing_steps"]
    assert (row["type"], row["minimum"], row["default"]) == ("integer", 1, 500)
    assert rows["lr_scheduler"]["enum"] == list(SCHEDULES)
    assert rows["mixed_precision"]["enum"] == ["no", "fp16", "bf16", "auto", None]
    assert rows["rank"]["x-names"]["kohya"] == "network_dim"
    assert rows["learning_rate"]["x-sdxl"] == {"dreambooth": 1e-4}
    assert main(["schema", "x"]) == 2


def test_the_options_know_the_tables_of_other_rooms() -> None:
    """Names that options spell out, since they import neither torch nor diffusers, are those of the
    tables: methods, families, schedules, optimisers, precisions."""
    from diffusers.optimization import SchedulerType

    from sd_lora.adapters.variants import method_class
    from sd_lora.formats.adapter_files import BUILT_IN
    from sd_lora.models import families
    from sd_lora.training import optimizer_rows
    from sd_lora.training.lr_schedules import SHAPES

    assert METHODS == BUILT_IN
    assert all(method_class(name) for name in METHODS)
    assert FAMILIES == tuple(families.FAMILIES)
    theirs = {kind.value for kind in SchedulerType}
    assert set(SCHEDULES) == theirs | SHAPES.keys()
    assert OPTIMIZERS.keys() == optimizer_rows.OPTIMIZERS.keys()


def test_few_files_name_an_option(root: Path) -> None:
    """Half of the options are named in at most two files, their row and their consumer, and none in
    more than four; the counter prints each with its files."""
    done = subprocess.run(
        [sys.executable, "dev/count_options.py"], cwd=root, capture_output=True, text=True,
        check=True, env={"PYTHONPATH": str(root), "PATH": ""},
    )  # fmt: skip
    *rows, by_file = done.stdout.splitlines()
    counts = [int(row.split()[0]) for row in rows]
    assert len(counts) == len(OPTIONS)
    assert by_file == f"by file: median {statistics.median(counts):g}, most {max(counts)}"
    most = [row for row in rows if int(row.split()[0]) > 4]
    assert statistics.median(counts) <= 2, by_file
    assert not most
