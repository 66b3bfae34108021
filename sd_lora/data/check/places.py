"""The places that a configuration names, checked in a blink: before torch is imported."""

from collections.abc import Callable, Sequence
from functools import partial

from sd_lora.config.jobs import Job, told_once
from sd_lora.config.options.sources import source_specs
from sd_lora.config.schema import TrainConfig
from sd_lora.data.sources.open import open_source
from sd_lora.errors import Problem, UsageError, named, refuse


def check_places(config: TrainConfig, *further: Callable[[TrainConfig], object]) -> None:
    """Check paths, permissions, metadata and columns of a configuration; no image is opened.

    further: checks of the same kind by other rooms.

    The run makes the same checks later; data sets of `datasets` are left to it, whose library
    takes seconds to import.

    Raises:
        UsageError: all mistakes at once.
    """
    problems: list[Problem] = []
    checks: list[Callable[[], object]] = [config.check_base, config.check_output, config.check_init]
    checks += [config.class_images.check_folder] if config.class_images else []
    checks += [partial(check, config) for check in further]
    specs = [spec for spec in source_specs(config) if spec.path is not None]
    checks += [partial(open_source, spec) for spec in specs]
    for check in checks:
        try:
            with named(config.places[0]):
                check()
        except UsageError as error:
            problems += error.problems
    refuse(problems)


def check_jobs(jobs: Sequence[Job], *further: Callable[[Job], object]) -> None:
    """Check the places of jobs. further: checks of the same kind by other rooms.

    Raises:
        UsageError: all mistakes of all jobs at once.
    """
    of_jobs: dict[str, list[Problem]] = {}
    for job in jobs:
        try:
            check_places(job.config, *(partial(_of_job, job, check) for check in further))
        except UsageError as error:
            of_jobs[job.name] = error.problems
    refuse(told_once(of_jobs, len(jobs)))


def _of_job(job: Job, check: Callable[[Job], object], _: TrainConfig) -> object:
    return check(job)
