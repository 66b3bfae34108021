"""Flags that are no options here: other trainers', and slips of the finger."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd_lora.config.flags import is_flag
from sd_lora.config.schema import FORMER_NAMES, OPTIONS, SHORT_NAMES
from sd_lora.config.translate.diffusers import DIFFUSERS, SWITCHES
from sd_lora.config.translate.rows import Given, Row
from sd_lora.errors import Problem, did_you_mean, near_path

if TYPE_CHECKING:
    from sd_lora.config.translate.peers import Peer

LIKENESS = 0.8
"""Share of letters that a flag has in common with the one that was meant: a slip of the finger, and
not another word."""


def near(name: str, as_flag: bool = False) -> str:
    """Hint with the option that was meant, if the name is a slip of it."""
    # with the dashes, so that a slip in a short name is near too; a file has long names alone
    flags = [f"--{option}" for option in [*OPTIONS, *(SHORT_NAMES if as_flag else ())]]
    return did_you_mean(f"--{name}", flags, LIKENESS).strip().replace("--", "--" * as_flag)


def known_elsewhere(name: str) -> tuple["Peer", Row] | None:
    """The trainer that has a setting of this name, and the setting's row.

    The tables of all trainers take 0.02 s to import, and most commands have no such name.
    """
    from sd_lora.config.translate import peers

    return peers.known_elsewhere(name)


@dataclass(frozen=True)
class Foreign:
    """A flag that is no option here, with its words; peer and row where its name is known."""

    name: str
    words: list[str]
    peer: "Peer"
    row: Row


def take_foreign(words: Iterable[str]) -> tuple[list[str], list[Foreign]]:
    """Words without other trainers' flags and their values, and these flags.

    Before argparse takes a foreign name for the start of one of ours.
    """
    kept: list[str] = []
    foreign: list[Foreign] = []
    values = kept
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if not is_flag(word):
            # a switch of diffusers' scripts takes no value, so the next word is none of its own
            (kept if foreign and foreign[-1].name in SWITCHES else values).append(word)
            continue
        ours = name in OPTIONS or name in FORMER_NAMES or name in SHORT_NAMES
        found = None if ours else known_elsewhere(name)
        if found is None:
            values = kept
            kept.append(word)
        else:
            values = [value] if equals else []
            foreign.append(Foreign(name, values, *found))
    return kept, foreign


def answered(foreign: Sequence[Foreign], values: dict[str, Any]) -> tuple[list[str], list[Problem]]:
    """Notes on flags of diffusers' scripts that ask for the usual course, and a problem for each
    other foreign flag.

    values: the options that are given.
    """
    notes: list[str] = []
    problems: list[Problem] = []
    given = Given(values)
    given.update({flag.name: flag.words[0] if flag.words else True for flag in foreign})
    for flag in foreign:
        if flag.name in DIFFUSERS:
            taken = flag.row.take(given[flag.name], given)
            if taken.kind == "needless":
                notes.append(f"--{flag.name} {taken.reason}")
            else:
                problems.append(Problem(flag.name, f"--{flag.name} {taken.reason}"))
        elif flag.row.here:
            text = f"unknown flag --{flag.name}: here it is {_with_short(flag.row.here)}"
            problems.append(Problem(flag.name, text))
        else:
            problems.append(Problem(flag.name, f"--{flag.name} {flag.row.reason}"))
    peers = [flag.peer.label for flag in foreign if flag.name not in DIFFUSERS]
    if len(peers) >= MANY:
        text = "these are flags of other trainers: sd-lora translate, with the whole command after "
        problems.append(Problem("", f"{text}it, writes a configuration of them"))
    return notes, problems


MANY = 2
"""Foreign flags from which a command is likely one of another trainer."""


def _with_short(flags: str) -> str:
    """Flags in a sentence, each that has a short name with it: "--learning_rate (--lr)"."""

    def both(match: re.Match[str]) -> str:
        option = OPTIONS.get(match[1])
        return f"--{match[1]}" + (f" (--{option.short})" if option and option.short else "")

    return re.sub(r"--(\w+)", both, flags)


def unknown_words(rest: Sequence[str], has_folder: bool) -> list[Problem]:
    """Problems of the words that argparse does not know; those after an unknown flag are its
    values, and those without a flag one problem.

    has_folder: whether a folder of images is given.
    """
    flags, stray = [word for word in rest if is_flag(word)], [*takewhile(_is_no_flag, rest)]
    problems = [_unknown_flag(word) for word in flags]
    if stray:
        words = " ".join(stray)
        text = f"{words!r} is not expected here: no flag, and a value with spaces needs quotes"
        near = "" if has_folder else near_path(Path(words), Path.is_dir)
        problems.append(Problem(words, text + near))
    return problems


def _is_no_flag(word: str) -> bool:
    return not is_flag(word)


def _unknown_flag(word: str) -> Problem:
    """The problem of a flag that there is not."""
    flag = word.partition("=")[0]
    name = flag.lstrip("-")
    for option in OPTIONS.values():
        shortened = len(name) > 3 and option.name.startswith(name)
        if option.only and (name == option.name or shortened):
            text = f"{option.name} has an effect in {option.only} runs only"
            return Problem(option.name, text, "Leave it out")
    return Problem(name, f"unknown flag {flag}", near(name, as_flag=True))
