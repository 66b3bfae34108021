"""Several runs in one file: `[[jobs]]` over shared options, and all of their mistakes at once."""

from pathlib import Path

import pytest

from sd_lora.config.command_line import parse, parse_jobs
from sd_lora.config.config_file import read_config_file
from sd_lora.config.jobs import Job
from sd_lora.errors import UsageError

SHARED = """
output_dir = "out"
rank = 8
[model]
pretrained_model_name_or_path = "base"
[training]
learning_rate = 2e-4
"""


def jobs(tmp_path: Path, text: str, *flags: str, shared: str = SHARED) -> list[Job]:
    file = tmp_path / "jobs.toml"
    file.write_text(shared + text)
    return parse_jobs(["--config", str(file), *flags])


def told(tmp_path: Path, text: str, *flags: str, shared: str = SHARED) -> list[str]:
    with pytest.raises(UsageError) as error:
        jobs(tmp_path, text, *flags, shared=shared)
    return str(error.value).replace(str(tmp_path / "jobs.toml"), "FILE").splitlines()


def test_a_job_has_its_own_options_over_the_shared_ones(tmp_path: Path) -> None:
    """Defaults < the file's top < a job's table < flags; each job has its mode by its images, and
    a folder of its name unless it names one."""
    cat, fox = jobs(
        tmp_path,
        '[[jobs]]\nname = "cat"\ninstance_data_dir = "cats"\ninstance_prompt = "a sks cat"\n'
        'rank = 2\n[jobs.training]\nlearning_rate = 1e-3\nmax_train_steps = 5\n'
        '[[jobs]]\nname = "fox"\noutput_dir = "elsewhere"\nsources = [{path = "a"}]\n',
        "--max_train_steps", "7",
    )  # fmt: skip
    assert (cat.name, cat.config.mode, cat.config.rank) == ("cat", "dreambooth", 2)
    assert (cat.config.learning_rate, cat.config.max_train_steps) == (1e-3, 7)
    assert cat.config.output_path == Path("out/cat")
    assert (fox.name, fox.config.mode, fox.config.rank) == ("fox", "text_to_image", 8)
    assert (fox.config.learning_rate, fox.config.max_train_steps) == (2e-4, 7)
    assert fox.config.output_path == Path("elsewhere")


def test_the_output_folder_of_a_flag_is_the_common_one(tmp_path: Path) -> None:
    """`--output_dir` counts above the folders that the file names, and holds one for each job."""
    text = '[[jobs]]\nname = "cat"\ntrain_data_dir = "cats"\noutput_dir = "mine"\n'
    (job,) = jobs(tmp_path, text, "--output_dir", "there")
    assert job.config.output_path == Path("there/cat")


def test_a_file_without_jobs_is_one_run(tmp_path: Path) -> None:
    """Without `[[jobs]]` the one job has no name and the configuration of `parse`."""
    file = tmp_path / "one.toml"
    file.write_text(SHARED + '[data]\ntrain_data_dir = "d"\n')
    assert parse_jobs(["--config", str(file)]) == [Job("", parse(["--config", str(file)]))]


def test_mistakes_of_all_jobs_come_at_once(tmp_path: Path) -> None:
    """Options that are one for all, unknown keys, wrong values, names that are no folder's or are
    there twice, and folders that are another job's: a line each, in one message."""
    lines = told(
        tmp_path,
        '[[jobs]]\nname = "cat"\ntrain_data_dir = "c"\nmixed_precision = "bf16"\nrnak = 3\n'
        '[[jobs]]\nname = "dog"\ntrain_data_dir = "d"\nrank = 0\nmodel = {revision = "x"}\n'
        '[[jobs]]\nname = "a/b"\ntrain_data_dir = "d"\n'
        '[[jobs]]\nname = "fox"\ntrain_data_dir = "d"\noutput_dir = "out/cat"\n'
        '[[jobs]]\nname = "fox"\ntrain_data_dir = "d"\noutput_dir = "out/fox2"\n',
    )
    first = Path("out/cat").resolve()
    assert lines == [
        "FILE: job cat: 'rnak' is not an option. Did you mean rank?",
        "FILE: job cat: mixed_precision is one for all jobs. Put it before [[jobs]]",
        "FILE: job dog: revision is one for all jobs. Put it before [[jobs]]",
        "FILE: job a/b: needs a name of letters, digits, _, - and ., not 'a/b'",
        f"FILE: job fox: its output folder {first} is that of job cat, too. Each job needs its own",
        "FILE: job fox: another job has this name",
        "job dog: rank must be at least 1, not 0",
    ]


def test_jobs_fit_each_other(tmp_path: Path) -> None:
    """A preset that changes for one job what all share is told with both values; so are one
    repository and one folder of logs for several, and a folder that is another job's by ~."""
    home = Path("~/loras").expanduser()
    two = (
        '[[jobs]]\nname = "cat"\ninstance_data_dir = "c"\ninstance_prompt = "a"\n'
        'preset = "subject"\n[[jobs]]\nname = "dog"\ntrain_data_dir = "d"\n'
    )
    lines = told(
        tmp_path, two, "--push_to_hub", "--hub_model_id", "me/x", "--logging_dir", "/tmp/logs"
    )
    assert lines == [
        "gradient_checkpointing is one for all jobs, and by their options and presets cat has "
        "True, dog has False. Put it before [[jobs]]",
        "mixed_precision is one for all jobs, and by their options and presets cat has auto, dog "
        "has None. Put it before [[jobs]]",
        "hub_model_id me/x is that of several jobs, which would write over each other. Give each "
        "its own, or leave it out",
        "logging_dir /tmp/logs is that of several jobs, which would write over each other. Give "
        "each its own, or leave it out",
    ]
    tables = two.replace('preset = "subject"', f'output_dir = "{home}"')
    (line,) = told(tmp_path, tables.replace('"dog"\n', '"dog"\noutput_dir = "~/loras"\n'))
    assert "is that of job cat, too" in line
    assert told(tmp_path, '[[job]]\nname = "a"\n')[0].endswith("Did you mean [[jobs]]?")


def test_a_mistake_of_all_jobs_is_told_once(tmp_path: Path) -> None:
    """A missing base model, which no job can name, is one line, and so is a wrong shared value."""
    two = '[[jobs]]\nname = "a"\ntrain_data_dir = "x"\n[[jobs]]\nname = "b"\ntrain_data_dir = "y"\n'
    lines = told(tmp_path, two, shared="rank = 0\n")
    assert lines == [
        "rank must be at least 1, not 0",
        "pretrained_model_name_or_path is required: a folder, a file or a hub id",
    ]


@pytest.mark.parametrize("value", ["jobs = []", "jobs = 3", "[jobs]\nname = 'a'"])
def test_jobs_are_a_list_of_tables(value: str, tmp_path: Path) -> None:
    """Anything else under the key is refused."""
    (line,) = told(tmp_path, f"{value}\n", shared="")
    assert line.startswith("FILE: jobs must be a list of tables, [[jobs]] in TOML, not ")


def test_jobs_are_refused_where_one_run_is_meant(tmp_path: Path) -> None:
    """A command of one run, the studio, and a folder of images beside the jobs: each says so."""
    text = '[[jobs]]\nname = "a"\ntrain_data_dir = "x"\n'
    jobs(tmp_path, text)
    file = str(tmp_path / "jobs.toml")
    for read in (lambda: parse(["--config", file]), lambda: read_config_file(file)):
        with pytest.raises(UsageError, match="are several runs, which `sd-lora train` and"):
            read()
    (tmp_path / "images").mkdir()
    with pytest.raises(UsageError, match="^FOLDER holds the images of one run, and the file has"):
        parse_jobs([str(tmp_path / "images"), "--config", file])
