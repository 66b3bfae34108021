"""Files of options as other systems write them: byte order marks, UTF-16, paths of Windows."""

import json
import os
from pathlib import Path

import pytest

from sd_lora.config.command_line import parse
from sd_lora.config.values import read_table
from sd_lora.errors import UsageError


def table(path: Path) -> dict:
    return read_table(str(path), "config file", "a table of options")


def test_a_byte_order_mark_is_left_out(tmp_path: Path) -> None:
    """TOML and JSON saved by Windows' editors are read as without the mark, with CR LF too."""
    for name, text in (
        ("a.toml", '[data]\r\ntrain_data_dir = "f3"\r\n'),
        ("b.json", '{"rank": 4}'),
    ):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert table(tmp_path / "a.toml") == {"data": {"train_data_dir": "f3"}}
    assert table(tmp_path / "b.json") == {"rank": 4}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.toml", "a = " + "[" * 50_000 + "]" * 50_000),
        ("a.toml", "[" + ".".join(["a"] * 50_000) + "]"),
        ("a.toml", ".".join(["a"] * 50_000) + " = 1"),
        ("a.json", '{"a": ' * 50_000 + "1" + "}" * 50_000),
        ("a.json", '{"a": ' + "[" * 60 + "]" * 60 + "}"),
    ],
)
def test_depth_is_bounded(name: str, text: str, tmp_path: Path) -> None:
    """Tables nested 50,000 deep, of each spelling, are told at once: tomllib would take gigabytes
    for a dotted key of 100 KB."""
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match="its tables are nested more than 50 deep"):
        table(tmp_path / name)


def test_size_is_bounded(tmp_path: Path) -> None:
    """A file larger than people write is not read, and a pipe is not waited for."""
    with open(tmp_path / "a.toml", "wb") as file:
        file.truncate(100 * 2**20)
    with pytest.raises(
        UsageError, match=r"a\.toml has 100\.0 MiB, and such a text has 1\.0 MiB at"
    ):
        table(tmp_path / "a.toml")
    os.mkfifo(tmp_path / "b.toml")
    with pytest.raises(UsageError, match=r"b\.toml does not exist"):
        table(tmp_path / "b.toml")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_named(encoding: str, tmp_path: Path) -> None:
    """With its mark or without, it is named with the remedy; no codec's error is shown."""
    path = tmp_path / "a.toml"
    path.write_text('output_dir = "a"', encoding=encoding)
    with pytest.raises(UsageError, match=r"a\.toml is UTF-16.*save it as UTF-8") as caught:
        table(path)
    assert "codec" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (r'train_data_dir = "D:\training\new"', r'train_data_dir = "D:\training\new" holds'),
        (r'train_data_dir = "C:\Users\me"', "Invalid hex value"),
        (r'output_dir = "loras\project"', "Unescaped"),
        (r'output_dir = "loras\new"', r'output_dir = "loras\new" holds a control character'),
        (r'sources = [{ path = "D:\bears" }]', r'path = "D:\bears" holds'),
    ],
)
def test_paths_of_windows(line: str, said: str, tmp_path: Path) -> None:
    r"""`\t`, `\n` and `\b` that became control characters are noticed in a path, and `\U` and `\p`
    fail to parse: all with the hint to single quotes and /. Both ways to write it are read."""
    path = tmp_path / "a.toml"
    path.write_text(f"[data]\n{line}\n", encoding="utf-8")
    with pytest.raises(UsageError, match="in single quotes, .*or with /") as caught:
        parse(["--config", str(path), "--ranc", "4", "--network_dim", "8"])
    assert said in str(caught.value)  # and the command line's own mistakes beside it
    assert {"config", "ranc", "network_dim"} <= {p.field for p in caught.value.problems}
    for right in (line.replace('"', "'"), line.replace("\\", "/")):
        path.write_text(f"[data]\n{right}\n", encoding="utf-8")
        assert table(path)


def test_paths_of_windows_in_json(tmp_path: Path) -> None:
    """JSON has the same fault, and another remedy; both paths of a file are named at once; a
    line break in a prompt is none."""
    path = tmp_path / "a.json"
    path.write_text(r'{"output_dir": "a\new", "train_data_dir": "D:\train"}', encoding="utf-8")
    with pytest.raises(UsageError, match=r"output_dir = .*train_data_dir = .*with two, ") as caught:
        table(path)
    assert str(caught.value).count("holds a control character") == 2
    path.write_text(json.dumps({"validation_prompt": "a\nb", "caption_separator": "\t"}))
    assert table(path)["caption_separator"] == "\t"
