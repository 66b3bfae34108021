"""Wildcards of texts: `{a|b}` is one of them."""

import re
from collections.abc import Callable

Pick = Callable[[list[str], str], str]
"""Chooses among options; the word names the choice, so that each choice has a draw of its own."""


def expanded(text: str, pick: Pick) -> str:
    """A text with one option in the place of every {a|b|c}; these may be nested.

    {{ and }} are literal braces, but }} ends two wildcards where no {{ is open in the inner one. A
    brace without a partner stays.
    """
    groups = [[""]]  # the text, then the options so far of each wildcard that is open
    literals = [0]  # {{ without }}, in each of them
    made = at = 0
    while at < len(text):
        char, pair = text[at], text[at : at + 2]
        at += 1
        if pair == "{{" or (pair == "}}" and (literals[-1] or len(groups) == 1)):
            literals[-1] = max(0, literals[-1] + (1 if char == "{" else -1))
            at += 1
        elif char == "{":
            groups.append([""])
            literals.append(0)
            continue
        elif len(groups) > 1 and char == "|":
            groups[-1].append("")
            continue
        elif len(groups) > 1 and char == "}":
            char = pick(groups.pop(), f"wildcard {made}")
            literals.pop()
            made += 1
        groups[-1][-1] += char
    text = groups[0][0]
    return text + "".join("{" + "|".join(options) for options in groups[1:])


def has_wildcards(text: str) -> bool:
    """Whether a text has different options to choose from: `{a|b}`."""
    found = []

    def first(options: list[str], what: str) -> str:
        found.append(len(set(options)) > 1)
        return options[0]

    expanded(text, first)
    return any(found)


def has_unread_wildcards(text: str) -> bool:
    """Whether braces without a partner, or other programs' wildcards, are left unread."""
    depth = 0
    for brace in re.findall(r"\{\{|\}\}|\{|\}", text):
        if brace == "}}" and depth >= 2:
            depth -= 2
        elif len(brace) == 1:
            depth += 1 if brace == "{" else -1
        if depth < 0:
            return True
    return depth > 0 or "$$" in text or bool(re.search(r"__\w+__", text))
