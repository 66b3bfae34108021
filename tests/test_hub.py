"""Names of models that are not here."""

from pathlib import Path

import pytest

from sd_lora.errors import UsageError, near_path
from sd_lora.hub import check_hub_id, check_model_path


def test_a_near_path_is_proposed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path on disk that differs in one name, of the wanted kind; none where none is near."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos/my_robot").mkdir(parents=True)
    (tmp_path / "photos/my_robots.txt").touch()
    missing = {
        "photos/my_robt": "photos/my_robot",
        "photo/my_robot": "photos/my_robot",
        "photos/cat": "",
        "nowhere/at/all": "",
    }
    for name, near in missing.items():
        found = f". Did you mean {Path(near)}?" if near else ""
        assert near_path(Path(name), Path.is_dir) == found
    assert near_path(Path("photos/my_robot.txt"), Path.is_file).endswith("my_robots.txt?")


def test_a_path_is_not_taken_for_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """owner/model is an error where owner is a folder here, or the hub is off, and else a note
    before it is asked; a model in the cache, and a path, are neither."""
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/tiny-sd").mkdir(parents=True)
    kept = tmp_path / "cache/models--owner--kept"
    (kept / "snapshots/abc").mkdir(parents=True)
    (kept / "refs").mkdir()
    (kept / "refs/main").write_text("abc")
    (kept / "snapshots/abc/model_index.json").touch()

    def note(name: str) -> str:
        return check_hub_id(name, ("model_index.json",), str(tmp_path / "cache"))

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert note("models/tiny-sd") == note("owner/kept") == ""
    assert note("owner/other") == "there is no folder owner/other here: asking the hub for it"
    with pytest.raises(UsageError, match=r"does not exist.*Did you mean models.tiny-sd\?"):
        note("models/tinysd")
    with pytest.raises(UsageError, match=r"does not exist.*Did you mean models.tiny-sd\?"):
        check_model_path("./models/tinysd")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert note("owner/kept") == ""
    with pytest.raises(UsageError, match="not in the cache .* HF_HUB_OFFLINE forbids"):
        note("owner/other")
