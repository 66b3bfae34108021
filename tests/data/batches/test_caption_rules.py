"""What becomes of captions: every rule a function of the address alone, and no tag made up."""

import pickle
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sd_lora.config.sources import CaptionRules
from sd_lora.data.batches.caption_rules import caption_of, expanded, longest_form

WORDS = st.text("abcdefghij ", min_size=1, max_size=8).map(str.strip).filter(bool)
TAGS = st.lists(WORDS, min_size=1, max_size=8)


def shown(text: str, rules: CaptionRules, n: int = 400) -> list[str | None]:
    """Returns what n addresses show."""
    return [caption_of((text,), rules, (0, "instance", 0, i)) for i in range(n)]


def test_without_rules_a_caption_is_as_written() -> None:
    """No rule, no change: commas, spaces, braces and lines stay."""
    text = " a ,b,,  {c|d} {{e}}\nf"
    assert set(shown(text, CaptionRules())) == {text}
    assert longest_form((text, "b"), CaptionRules()) == [text, "b"]


@given(TAGS, st.integers(0, 9), st.integers(0, 99))
def test_shuffling_keeps_every_tag_and_the_first_in_place(tags: list, keep: int, at: int) -> None:
    """A shuffled caption is a permutation of its tags that fixes the first keep_tokens of them."""
    rules = CaptionRules(shuffle_caption=True, keep_tokens=keep)
    text = caption_of((",".join(tags),), rules, (at,))
    assert text is not None
    got = text.split(", ")
    assert Counter(got) == Counter(tags)
    assert got[:keep] == tags[:keep]
    assert text == caption_of((",".join(tags),), rules, (at,))


def test_shuffling_reaches_every_order() -> None:
    """All 6 orders of 3 tags come, each about as often as the others."""
    orders = Counter(shown("a, b, c", CaptionRules(shuffle_caption=True), 1200))
    assert len(orders) == 6
    assert min(orders.values()) > 140


@given(TAGS, st.integers(0, 4), st.integers(0, 99))
def test_dropped_tags_leave_the_others_in_order(tags: list, keep: int, at: int) -> None:
    """Without shuffling, what tag dropout leaves is a subsequence that starts with those kept."""
    rules = CaptionRules(caption_tag_dropout=0.5, keep_tokens=keep)
    text = caption_of((",".join(tags),), rules, (at,))
    got = text.split(", ") if text else []
    rest = iter(tags)
    assert all(tag in rest for tag in got)
    assert got[:keep] == tags[:keep]


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_rates_are_what_they_say(rate: float) -> None:
    """Over 4000 draws, captions and tags are dropped as often as asked, each tag on its own."""
    dropped = shown("a", CaptionRules(caption_dropout=rate), 4000).count(None)
    assert dropped / 4000 == pytest.approx(rate, abs=0.03)
    texts = shown("a, b", CaptionRules(caption_tag_dropout=rate), 4000)
    for tag in "ab":
        assert sum(tag not in str(t) for t in texts) / 4000 == pytest.approx(rate, abs=0.03)
    assert texts.count("") / 4000 == pytest.approx(rate**2, abs=0.03)


def test_shuffling_does_not_change_what_is_dropped() -> None:
    """Every rule has draws of its own: turning one on leaves the others' as they were."""
    drop = shown("a, b, c, d", CaptionRules(caption_tag_dropout=0.5, caption_dropout=0.2))
    both = shown(
        "a, b, c, d",
        CaptionRules(caption_tag_dropout=0.5, caption_dropout=0.2, shuffle_caption=True),
    )
    assert [t and sorted(t) for t in drop] == [t and sorted(t) for t in both]
    assert drop != both


def test_a_mark_keeps_what_stands_before_it() -> None:
    """keep_tokens_separator fixes what is before it, and after a second one; it is never read."""
    rules = CaptionRules(shuffle_caption=True, caption_tag_dropout=0.4, keep_tokens_separator="|||")
    texts = shown("x, y ||| a, b, c ||| z", rules)
    assert all(t and t.startswith("x, y") and t.endswith("z") and "|" not in t for t in texts)
    assert {"x, y, z", "x, y, c, b, a, z"} <= set(texts)
    still = CaptionRules(keep_tokens_separator="|||")
    assert set(shown("x, y ||| a,b", still)) == {"x, y, a, b"}
    assert set(shown("a,b", still)) == {"a,b"}


def test_captions_and_lines_take_turns() -> None:
    """Several captions, and with wildcards several lines, are all shown."""
    loaded = {caption_of(("one", "two"), CaptionRules(), (i,)) for i in range(40)}
    assert loaded == {"one", "two"}
    assert set(shown("one\n\n two\r\nthree\n", CaptionRules(wildcards=True))) == {
        "one",
        "two",
        "three",
    }


def test_every_option_of_wildcards_occurs() -> None:
    """Options, empty and nested ones too, come in all their combinations, independently."""
    rules = CaptionRules(wildcards=True)
    assert set(shown("a {red|blue} {hat|coat}", rules)) == {
        f"a {colour} {thing}" for colour in ("red", "blue") for thing in ("hat", "coat")
    }
    assert set(shown("{a|{b|c}d|}", rules)) == {"a", "bd", "cd", ""}
    counts = Counter(shown("{a|b|c|d}", rules, 4000))
    assert len(counts) == 4
    assert min(counts.values()) > 900


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("{{retro}} | x", "{retro} | x"),
        ("{a|{b|long}}", "long"),
        ("{a|{{long}}}", "{long}"),
        ("{{{a|long}}}", "{long}"),
        ("{a|long}}", "long}"),
        ("a } {b", "a } {b"),
        ("{a|{b|long", "{a|{b|long"),
        ("{long}", "long"),
        ("{}", ""),
    ],
)
def test_braces(text: str, want: str) -> None:
    """Doubled braces are literal, wildcards nest, and a brace without a partner stays."""
    assert expanded(text, lambda options, what: max(options, key=len)) == want


@given(st.text("{}|a", max_size=60))
def test_any_braces_can_be_read(text: str) -> None:
    """No text of braces fails, or takes more than one look at each character to read."""
    assert isinstance(expanded(text, lambda options, what: options[-1]), str)


def test_trigger_word_prefix_and_suffix() -> None:
    """The trigger word comes first, once, whatever was dropped; prefix and suffix go around it."""
    rules = CaptionRules(trigger_word="sks", caption_prefix="photo of", caption_suffix=", film")
    assert shown("a dog", rules, 1) == ["photo of sks, a dog , film"]
    assert shown("a SKS dog", rules, 1) == ["photo of a SKS dog , film"]
    for word in ("sksy", "usks"):
        assert shown(f"a {word} dog", rules, 1) == [f"photo of sks, a {word} dog , film"]
    assert shown("", CaptionRules(trigger_word="sks"), 1) == ["sks"]
    prefixed = CaptionRules(trigger_word="sks", caption_prefix="a sks thing,")
    assert shown("x", prefixed, 1) == ["a sks thing, x"]
    dropping = CaptionRules(trigger_word="sks", caption_tag_dropout=0.9)
    assert all(str(t).count("sks") == 1 for t in shown("dog, sks", dropping))


def test_separators_may_be_other_than_commas() -> None:
    """Tags split and join at the separator that is given."""
    rules = CaptionRules(caption_separator=";", shuffle_caption=True, trigger_word="t")
    assert set(shown("a, b;c", rules)) == {"t; a, b; c", "t; c; a, b"}


@given(st.lists(st.text("ab,{}|\n ", max_size=12), min_size=1, max_size=3), st.integers(0, 50))
def test_the_longest_form_is_the_longest(texts: list[str], at: int) -> None:
    """Nothing that is shown is longer than the longest form of one of the captions."""
    rules = CaptionRules(
        shuffle_caption=True, caption_tag_dropout=0.3, wildcards=True, trigger_word="x"
    )
    forms = longest_form(tuple(texts), rules)
    assert len(forms) == len(texts)
    text = caption_of(tuple(texts), rules, (at,))
    # a dropped or chosen blank tag may cost the comma that another choice has
    assert len(str(text)) <= max(map(len, forms)) + 2 * max(t.count(",") + 1 for t in texts)


def test_the_longest_form_of_lines_and_wildcards() -> None:
    """The longest line is the one that is longest when its wildcards are chosen."""
    rules = CaptionRules(wildcards=True, trigger_word="sks", caption_tag_dropout=0.5)
    text = "{a|b|c|d|e|f|g|h}\nlonger, {x|{y|zzzz}}"
    assert longest_form((text, "b"), rules) == ["sks, longer, zzzz", "sks, b"]


def test_the_rules_travel_to_workers() -> None:
    """Rules survive pickling, and give the same captions after it."""
    rules = CaptionRules(shuffle_caption=True, wildcards=True)
    copy = pickle.loads(pickle.dumps(rules))
    assert shown("{a|b}, c, d", rules) == shown("{a|b}, c, d", copy)
