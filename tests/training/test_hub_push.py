"""A run's files reach the hub: proved possible before the run, and never at the run's cost."""

import base64
import json
import threading
from collections.abc import Iterator
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
from sd_lora.training.hub_push import check_hub
from tests.training.runs import dreambooth, images, text_to_image

TOKEN = "hf_" + "s3cretS3cret" * 3


class Hub(ThreadingHTTPServer):
    """A stand-in for the hub's API: one user, one token, repositories as dictionaries of files.

    refuses: whether commits fail.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.repos: dict[str, dict[str, bytes]] = {"other/taken": {}}
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

    def do_GET(self) -> None:
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
            self.server.repos.setdefault(repo, {})
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
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes()
            for p in folder.rglob("*") if p.is_file()}  # fmt: skip


def test_a_run_is_pushed(
    tiny_sd1: Path, tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    """The card, the LoRA files and the last samples are in the repository as they are in the
    folder; the card's header has what the hub's page reads, and the images that it shows are there.
    Neither the token nor a path of this machine is in a file of the run or on its output."""
    out, events = tmp_path / "out", list[Event]()
    config = dreambooth(
        tiny_sd1, images(tmp_path / "data", 2), out, max_train_steps=1, push_to_hub=True,
        hub_token=TOKEN, num_validation_images=1, validation_steps=1,
    )  # fmt: skip
    with Terminal() as terminal:
        sd_lora.train(config, [events.append, terminal])
    pushed, here = hub.repos["me/out"], files_of(out)
    lora = {"pytorch_lora_weights.safetensors", "out_kohya.safetensors"}
    assert pushed.keys() == {"README.md", "samples/step-000001/00.png", *lora}
    assert all(here[name] == data for name, data in pushed.items())
    assert [e.address for e in events if isinstance(e, Pushed)] == [f"{hub.url}/me/out"]
    card = ModelCard(pushed["README.md"].decode())
    header = card.data.to_dict()
    assert header["library_name"] == "diffusers"
    assert header["license"] == "creativeml-openrail-m"
    assert header["instance_prompt"] == "a photo of sks thing"
    assert {"lora", "stable-diffusion", "text-to-image"} <= {*header["tags"]}
    assert "base_model" not in header  # a folder here
    (shown,) = header["widget"]
    assert shown["text"] == "a photo of sks thing"
    assert shown["output"]["url"] in pushed
    assert "load_lora_weights" in card.text
    printed = capsys.readouterr()
    said = (printed.out + printed.err).encode()
    assert f"on the hub: {hub.url}/me/out".encode() in said
    assert [name for name, data in here.items() if TOKEN.encode() in data] == []
    assert TOKEN.encode() not in said
    assert str(tmp_path).encode() not in pushed["README.md"]
    later = ["push", str(out), "--repo", "me/later", "--token", TOKEN]  # once more, by hand
    assert main(later) == 0
    assert hub.repos["me/later"] == pushed
    assert main(["push", str(tmp_path), "--repo", "me/none"]) == 2
    (out / "out_kohya.safetensors").unlink()
    assert main([*later[:-3], "me/lost", "--token", TOKEN]) == 1
    assert "me/lost" not in hub.repos
    assert TOKEN not in "".join(capsys.readouterr())


def test_a_push_that_fails_costs_no_run(tiny_sd1: Path, tmp_path: Path, hub: Hub) -> None:
    """The LoRA is written, and a warning says what failed and the command that pushes later. A
    README.md of the user's own stays as it was."""
    hub.refuses = True
    warned: list[str] = []

    def listen(event: Event) -> None:
        if isinstance(event, Warned):
            warned.extend(finding.line() for finding in event.findings)

    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("notes of my own")
    sd_lora.train(
        text_to_image(tiny_sd1, images(tmp_path / "data", 2), out, max_train_steps=1,
                      push_to_hub=True, hub_token=TOKEN, hub_model_id="me/robot"),
        [listen],
    )  # fmt: skip
    assert (out / "pytorch_lora_weights.safetensors").is_file()
    assert (out / "README.md").read_text() == "notes of my own"
    assert warned[-1].startswith("me/robot: the hub says 403, Storage is full.")
    assert f"later: hf upload me/robot {out} . --include README.md --include" in warned[-1]


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
