"""The upload of a run's files to the hub: proved possible before the run, done after it."""

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from sd_lora.config.schema import TrainConfig
from sd_lora.errors import RunError, UsageError, named
from sd_lora.findings import Finding
from sd_lora.report.events import Pushed, Warned
from sd_lora.training.run import Run


def check_hub(config: TrainConfig) -> str:
    """Make the run's repository, if there is none; returns its id, owner/name.

    Raises:
        UsageError: no token, one that the hub does not know, or a repository that it cannot write.
    """
    api = HfApi(token=config.token)
    with named("push_to_hub"):
        try:
            with _told():
                given = config.hub_model_id or config.output_path.resolve().name
                repo = given if "/" in given else f"{api.whoami()['name']}/{given}"
                repo = api.create_repo(
                    repo, exist_ok=True, private=config.hub_private_repo or None
                ).repo_id
                api.auth_check(repo, write=True)
                return str(repo)
        except RunError as error:
            raise UsageError(f"push_to_hub cannot work: {error}") from None


@contextmanager
def _told() -> Iterator[None]:
    """Raise RunError, with the reason and a remedy, for the hub's answers and a missing network."""
    log_in = "give another --hub_token, or log in with `hf auth login`"
    try:
        yield
    except LocalTokenNotFoundError:
        raise RunError(f"there is no token: {log_in}") from None
    except HFValidationError as error:
        raise RunError(f"{error}: give --hub_model_id owner/name") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no answer"
        text = getattr(error, "server_message", None) or str(error).splitlines()[0]
        remedy = f". The token must have write access: {log_in}" * (status in (401, 403, 404))
        raise RunError(f"the hub says {status}, {text}{remedy}") from None
    except Exception as error:  # of the network: httpx's, requests' and the system's own
        raise RunError(f"the hub cannot be reached: {error}") from None


def push(run: Run, files: Sequence[Path]) -> None:
    """Upload files of the output folder in one commit.

    A failure costs a warning, with the command that does it later, and not the run.
    """
    repo, out, api = run.repo, run.output_dir, HfApi(token=run.config.token)
    paths = [(path.relative_to(out).as_posix(), path) for path in files]
    operations = [CommitOperationAdd(name, str(path)) for name, path in paths]
    message = f"LoRA after {run.plan.num_steps} steps"
    try:
        with _told():
            api.create_commit(repo, operations, commit_message=message)
        run.emit(Pushed(f"{api.endpoint}/{repo}"))
    except RunError as error:
        names = [word for name, _ in paths for word in ("--include", name)]
        command = shlex.join(["hf", "upload", repo, str(out), ".", *names])
        details = f"{error}. The files are in {out}; later: {command}"
        run.emit(Warned([Finding("not-pushed", repo, details)]))
