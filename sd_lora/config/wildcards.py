"""Wildcards of texts: `{a|b}` is one of them."""

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
    """Whether a text has an option to choose: `{a|b}`."""
    return expanded(text, lambda options, what: options[0]) != expanded(
        text, lambda options, what: options[-1]
    )
