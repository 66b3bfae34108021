"""The upload of a run's files to the hub: proved possible before the run, done after it."""

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from sd_lora.config.schema import TrainConfig
from sd_lora.errors import RunError, UsageError, named
from sd_lora.files import utf8_text
from sd_lora.findings import Finding
from sd_lora.report.events import Pushed, Warned
from sd_lora.report.page_images import SAMPLES
from sd_lora.report.record import read_record
from sd_lora.training.output_folder import CARD
from sd_lora.training.run import Run


def check_hub(config: TrainConfig) -> str:
    """Make the run's repository, if there is none; returns its id, owner/name.

    Raises:
        UsageError: no token, one that the hub does not know, or a repository that it cannot write.
    """
    name = config.hub_model_id or config.output_path.resolve().name
    with named("push_to_hub"):
        try:
            return _made(HfApi(token=config.token), name, config.hub_private_repo)
        except RunError as error:
            raise UsageError(f"push_to_hub cannot work: {error}") from None


def _made(api: HfApi, name: str, private: bool) -> str:
    """The id of a repository that can be written, made if there is none.

    name: owner/name, or a name alone of the token's owner. Raises: RunError, as `_told`.
    """
    with _told():
        repo = name if "/" in name else f"{api.whoami()['name']}/{name}"
        repo = api.create_repo(repo, exist_ok=True, private=private or None).repo_id
        api.auth_check(repo, write=True)
        return str(repo)


def push_folder(folder: Path, name: str, private: bool, token: str | None) -> str:
    """Upload a finished run's model card, its LoRA files, and the images that the card shows;
    returns the repository's address.

    folder: output folder of the run. name: of the repository; "": the folder's.

    Raises:
        UsageError: a folder that is none of a finished run.
        RunError: the hub takes nothing, or a file is gone.
    """
    files = _files_of(folder)
    api = HfApi(token=token)
    repo = _made(api, name or folder.resolve().name, private)
    operations = [CommitOperationAdd(file, str(folder / file)) for file in files]
    with _told():
        api.create_commit(repo, operations, commit_message=f"LoRA of {folder.resolve().name}")
    return f"{api.endpoint}/{repo}"


def _files_of(folder: Path) -> list[str]:
    """The files of a run's repository, as paths in its folder."""
    record = read_record(folder)
    if not record["files"]:
        raise UsageError(f"{folder} has no LoRA files of a finished run yet")
    if lost := [name for name in record["files"] if not (folder / name).is_file()]:
        raise RunError(f"{folder} has no {', '.join(lost)} any more, which its run has written")
    card = folder / CARD
    text = utf8_text(card) if card.is_file() else ""
    named_there = [*folder.glob("*.safetensors"), *folder.glob(f"{SAMPLES}/*/*.png")]
    places = sorted(path.relative_to(folder).as_posix() for path in named_there)
    shown = [place for place in places if place in text and place not in record["files"]]
    return [*([CARD] if text else []), *record["files"], *shown]


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
