"""Rules for captions, applied at each use of an image: a function of the use's address.

In this order: one of the image's captions is chosen, or none at all (caption dropout); then
wildcards, tags, the trigger word, and prefix and suffix.
"""

import re

from sd_lora.config.sources import CaptionRules
from sd_lora.config.wildcards import Pick, expanded
from sd_lora.seeds import seed_for, uniform

Address = tuple[int | str, ...]


def caption_of(captions: tuple[str, ...], rules: CaptionRules, address: Address) -> str | None:
    """The caption at an address, None where it is dropped."""
    if uniform(*address, "caption dropout") < rules.caption_dropout:
        return None

    def pick(options: list[str], what: str) -> str:
        return options[seed_for(*address, what) % len(options)]

    text = pick(list(captions), "caption")
    if rules.wildcards:
        text = _one_wording(text, pick)
    return _with_affixes(_with_tags(text, rules, address), rules)


def longest_form(captions: tuple[str, ...], rules: CaptionRules) -> list[str]:
    """Each caption at its longest: its longest line and wildcards, and all of its tags."""

    def pick(options: list[str], what: str) -> str:
        return max(options, key=len)

    texts = [_longest_line(text, pick) if rules.wildcards else text for text in captions]
    return [_with_affixes(_with_tags(text, rules, None), rules) for text in texts]


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.split("\n") if line.strip()] or [""]


def _one_wording(text: str, pick: Pick) -> str:
    return expanded(pick(_lines(text), "line"), pick)


def _longest_line(text: str, pick: Pick) -> str:
    # expanded first: the line that is longest as written may be a wildcard of short words
    return max((expanded(line, pick) for line in _lines(text)), key=len)


def _tag_groups(text: str, rules: CaptionRules) -> tuple[list[str], list[str], list[str]]:
    """The tags that stay in front, the tags that are shuffled or dropped, and the tags that stay
    behind.
    """

    def tags(part: str) -> list[str]:
        return [tag.strip() for tag in part.split(rules.caption_separator) if tag.strip()]

    mark = rules.keep_tokens_separator
    if mark and mark in text:
        first, middle, *last = text.split(mark, 2)
        return tags(first), tags(middle), tags(last[0]) if last else []
    all_tags = tags(text)
    return all_tags[: rules.keep_tokens], all_tags[rules.keep_tokens :], []


def _with_tags(text: str, rules: CaptionRules, address: Address | None) -> str:
    """A text with its tags dropped and shuffled; without an address, with all in place.

    Where the rules say neither, commas and spaces stay as they were written.
    """
    mark = rules.keep_tokens_separator
    marked = mark is not None and mark in text
    if not (rules.shuffle_caption or rules.caption_tag_dropout > 0 or marked):
        return text
    first, middle, last = _tag_groups(text, rules)
    order = list(range(len(middle)))
    if address is not None:
        rate = rules.caption_tag_dropout
        order = [i for i in order if uniform(*address, "tag dropout", i) >= rate]
        if rules.shuffle_caption:
            order.sort(key=lambda i: seed_for(*address, "tag order", i))
    return f"{rules.caption_separator} ".join([*first, *(middle[i] for i in order), *last])


def _with_affixes(text: str, rules: CaptionRules) -> str:
    """A text with trigger word, prefix and suffix."""
    around = (rules.caption_prefix, rules.caption_suffix)
    word = rules.trigger_word
    if word and not any(_has_word(part, word) for part in (text, *around)):
        text = f"{word}{rules.caption_separator} {text}" if text else word
    return " ".join(part for part in (around[0], text, around[1]) if part)


def _has_word(text: str, word: str) -> bool:
    return _pattern(word).search(text) is not None


def _pattern(word: str) -> re.Pattern[str]:
    # any case: CLIP's tokenizers read none
    return re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", re.IGNORECASE)


def with_other_word(text: str, word: str, other: str) -> str:
    """A caption with another word in each place of its trigger word."""
    return _pattern(word).sub(lambda _: other, text)
