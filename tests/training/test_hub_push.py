"""A run's files reach the hub: proved possible before the run, and never at the run's cost."""

import base64
import json
import shutil
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import ModelCard

import sd_lora
from sd_lora.cli import main
from sd_lora.errors import UsageError
from sd_lora.report.events import Event, Pushed, Warned
from sd_lora.terminal import Terminal
from sd_lora.training import loop
from sd_lora.training.hub_push import check_hub, push
from sd_lora.training.run import Run
from tests.training.runs import dreambooth, images, text_to_image

TOKEN = "hf_" + "s3cretS3cret" * 3

COMMIT = "a" * 40
"""Of the base model on the stand-in."""


class Hub(ThreadingHTTPServer):
    """A stand-in for the hub's API: one user, one token, repositories as dictionaries of files.

    private: repositories that were made so. refuses: whether commits fail. public: id of a base
    model → its folder, whose files have to be in the cache.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.repos: dict[str, dict[str, bytes]] = {"other/taken": {}}
        self.private = set[str]()
        self.public: dict[str, Path] = {}
        self.refuses = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: object) -> None:
        """Say nothing."""

    def _send(self, status: int, found: dict[str, object]) -> None:
        data = json.dumps(found).encode()
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", "Content-Length": len(data)}.items():
            self.send_header(key, str(value))
        self.end_headers()
        self.wfile.write(data)

    def _body(self) -> bytes:
        if self.headers.get("transfer-encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("content-length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_HEAD(self) -> None:
        """Facts about a file of a public model, by which the cache knows that it has the newest."""
        repo, _, file = self.path.removeprefix("/").partition("/resolve/")
        found = self.server.public[repo] / file.partition("/")[2]
        known = {"ETag": '"1"', "X-Repo-Commit": COMMIT, "Content-Length": "1"}
        self.send_response(200 if found.is_file() else 404)
        for key, value in (known if found.is_file() else {"X-Error-Code": "EntryNotFound"}).items():
            self.send_header(key, value)
        self.end_headers()

    def do_GET(self) -> None:
        asked = self.path.removeprefix("/api/models/").partition("/revision/")[0]
        if asked in self.server.public:
            return self._send(200, {"id": asked, "sha": COMMIT, "siblings": []})
        if self.headers.get("authorization") != f"Bearer {TOKEN}":
            return self._send(401, {"error": "Invalid user token."})
        if self.path == "/api/whoami-v2":
            return self._send(200, {"name": "me", "type": "user", "orgs": []})
        repo = self.path.removeprefix("/api/models/").removesuffix("/auth-check/write")
        return self._send(200 if repo.startswith("me/") else 403, {"error": "Forbidden."})

    def do_POST(self) -> None:
        body = self._body()
        if self.headers.get("authorization") != f"Bearer {TOKEN}":
            return self._send(401, {"error": "Invalid user token."})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
            status = 409 if repo in self.server.repos else 200
            if status == 200:
                # newer clients say it by "visibility"
                private = asked.get("private") is True or asked.get("visibility") == "private"
                self.server.private |= {repo} if private else set()
                self.server.repos[repo] = {}
            return self._send(status, {"url": f"{self.server.url}/{repo}", "error": "is there"})
        if self.path == "/api/validate-yaml":  # of a card's header
            return self._send(200, {"errors": [], "warnings": []})
        repo, work, _ = self.path.removeprefix("/api/models/").rsplit("/", 2)
        if work == "preupload":
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for f in json.loads(body)["files"]]  # fmt: skip
            return self._send(200, {"files": files})
        if self.server.refuses:
            return self._send(403, {"error": "Storage is full."})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                data = base64.b64decode(line["value"]["content"])
                self.server.repos[repo][line["value"]["path"]] = data
        found = {"commitUrl": f"{self.server.url}/{repo}/commit/1", "commitOid": "1" * 40}
        return self._send(200, found | {"success": True})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The stand-in, asked in place of the hub, by a client that believes to be online."""
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    files = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes()
            for p in folder.rglob("*") if p.is_file()}  # fmt: skip


def publish(hub: Hub, name: str, base: Path, cache: Path) -> None:
    """Put a base model onto the stand-in, and into a cache in the hub's own layout."""
    home = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(base, home / "snapshots" / COMMIT)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(COMMIT)
    hub.public[name] = base


def test_a_run_is_pushed(
    tiny_sd1: Path, tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    """The card, the LoRA files and the last samples are in the private repository that
    --hub_model_id names, as they are in the folder. The card's header, read by the hub's own class,
    is all that the hub's page shows: base model, licence, tags, trigger words, and images that are
    there. Neither the token nor a path of this machine is in a file of the run or on its output."""
    out, events = tmp_path / "out", list[Event]()
    publish(hub, "someone/small-sd", tiny_sd1, tmp_path / "cache")
    config = dreambooth(
        Path("someone/small-sd"), images(tmp_path / "data", 2), out, max_train_steps=1,
        cache_dir=str(tmp_path / "cache"), push_to_hub=True, hub_token=TOKEN,
        hub_model_id="me/robot", hub_private_repo=True, num_validation_images=1, validation_steps=1,
        trigger_word="vexa",
    )  # fmt: skip
    with Terminal() as terminal:
        sd_lora.train(config, [events.append, terminal])
    assert {*hub.repos} == {"other/taken", "me/robot"}
    assert hub.private == {"me/robot"}
    pushed, here = hub.repos["me/robot"], files_of(out)
    lora = {"pytorch_lora_weights.safetensors", "out_kohya.safetensors"}
    assert pushed.keys() == {"README.md", "samples/step-000001/00.png", *lora}
    assert all(here[name] == data for name, data in pushed.items())
    assert [e.address for e in events if isinstance(e, Pushed)] == [f"{hub.url}/me/robot"]
    card = ModelCard(pushed["README.md"].decode())
    assert card.data.to_dict() == {
        "base_model": "someone/small-sd",
        "instance_prompt": "a photo of sks thing",
        "library_name": "diffusers",
        "license": "creativeml-openrail-m",
        "tags": ["stable-diffusion", "stable-diffusion-diffusers", "text-to-image", "diffusers",
                 "lora", "sd_lora"],
        "widget": [{"text": "a photo of sks thing",
                    "output": {"url": "samples/step-000001/00.png"}}],
    }  # fmt: skip
    assert "- `a photo of sks thing`\n- `vexa`\n" in card.text
    assert "[someone/small-sd](https://huggingface.co/someone/small-sd)" in card.text
    assert "from_pretrained('someone/small-sd', dtype=torch.float32)\n" in card.text
    assert "load_lora_weights('me/robot', weight_name='pytorch_lora_weights.saf" in card.text
    printed = capsys.readouterr()
    said = (printed.out + printed.err).encode()
    assert f"on the hub: {hub.url}/me/robot".encode() in said
    assert [name for name, data in here.items() if TOKEN.encode() in data] == []
    assert TOKEN.encode() not in said
    assert str(tmp_path).encode() not in pushed["README.md"]
    later = ["push", str(out), "--repo", "me/later", "--token", TOKEN]  # once more, by hand
    assert main(later) == 0
    assert hub.repos["me/later"] == pushed
    assert hub.private == {"me/robot"}  # and none without --hub_private_repo
    assert main(["push", str(tmp_path), "--repo", "me/none"]) == 2
    (out / "out_kohya.safetensors").unlink()
    assert main([*later[:-3], "me/lost", "--token", TOKEN]) == 1
    assert "me/lost" not in hub.repos
    assert TOKEN not in "".join(capsys.readouterr())


def test_a_push_that_fails_costs_no_run(
    tiny_sd1: Path, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The LoRA is written, and a warning says what failed and the command that pushes later, to the
    public repository of the folder's name. A README.md of the user's own stays as it was. The same
    push to a hub that takes it brings the files there."""
    hub.refuses = True
    warned, addresses = list[str](), list[str]()

    def listen(event: Event) -> None:
        if isinstance(event, Warned):
            warned.extend(finding.line() for finding in event.findings)
        if isinstance(event, Pushed):
            addresses.append(event.address)

    def twice(run: Run, files: Sequence[Path]) -> None:
        push(run, files)
        assert hub.repos["me/out"] == {}
        hub.refuses = False
        push(run, files)

    monkeypatch.setattr(loop, "push", twice)
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("notes of my own")
    sd_lora.train(
        text_to_image(tiny_sd1, images(tmp_path / "data", 2), out, max_train_steps=1,
                      push_to_hub=True, hub_token=TOKEN),
        [listen],
    )  # fmt: skip
    assert (out / "pytorch_lora_weights.safetensors").is_file()
    assert (out / "README.md").read_text() == "notes of my own"
    assert warned[-1].startswith("me/out: the hub says 403, Storage is full.")
    assert f"later: hf upload me/out {out} . --include README.md --include" in warned[-1]
    pushed = hub.repos["me/out"]
    assert pushed.keys() == {
        "README.md",
        "pytorch_lora_weights.safetensors",
        "out_kohya.safetensors",
    }
    assert all((out / name).read_bytes() == data for name, data in pushed.items())
    assert addresses == [f"{hub.url}/me/out"]
    assert hub.private == set()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"hub_token": "hf_wrong"}, "the hub says 401, Invalid user token.*hf auth login"),
        ({"hub_model_id": "other/taken"}, "the hub says 403, Forbidden.*write access"),
        ({"hub_model_id": "me/a b"}, "Repo id must.*give --hub_model_id owner/name"),
    ],
)
def test_what_cannot_be_pushed_is_told_first(
    tmp_path: Path, hub: Hub, changes: dict[str, object], told: str
) -> None:
    """A token that the hub does not know, another's repository and an id that is none are errors
    before anything is loaded; so is a hub that does not answer. No message has the token."""
    config = text_to_image(tmp_path, tmp_path, tmp_path / "out", push_to_hub=True, hub_token=TOKEN)
    with pytest.raises(UsageError, match=told) as error:
        check_hub(config.replace(**changes))
    assert [problem.field for problem in error.value.problems] == ["push_to_hub"]
    assert "hf_" not in str(error.value)
    hub.shutdown()
    hub.server_close()
    with pytest.raises(UsageError, match="the hub cannot be reached"):
        check_hub(config)
