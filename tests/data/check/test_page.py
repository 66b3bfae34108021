"""A check as lines, JSON and page: complete, and harmless with any file names and captions."""

import json
from base64 import b64decode
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from sd_lora.data.check.page import (
    PageBucket,
    PageImage,
    PageReport,
    alike_groups,
    data_uri,
    findings_as_json,
    page,
    printable,
    report_lines,
    write_page,
)
from sd_lora.errors import RunError
from sd_lora.findings import Finding

THUMBNAIL = data_uri(Image.new("RGB", (16, 12), "teal"))

HOSTILE = (
    "<script>alert(1)</script>",
    "\"'><img src=x onerror=alert(1)>",
    "{{ 7 * 7 }}{% raw %}",
    "</style></title><b>",
    "&lt;b&gt; &amp;",
    "a\0b\x1b[31mc\nd",
    "photo\u202egpj.exe",
    "surrogate \udcff",
    "صورة 猫 🐈",
)


class Page(HTMLParser):
    """The elements of a page: tag, attributes, and the text directly inside."""

    VOID = ("meta", "img", "input", "br", "link")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self._open: list[int] = []
        self.feed(html)
        self.close()
        assert not self._open, "tags that are not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))
        if tag not in self.VOID:
            self._open.append(len(self.elements) - 1)

    def handle_endtag(self, tag: str) -> None:
        assert self.elements[self._open.pop()][0] == tag

    def handle_data(self, data: str) -> None:
        if self._open:
            self.elements[self._open[-1]][2].append(data)

    def of(self, tag: str, kind: str | None = None) -> list[tuple[dict[str, str | None], str]]:
        """Attributes and text of the elements with a tag and a class."""
        return [
            (attrs, "".join(text).strip())
            for found, attrs, text in self.elements
            if found == tag and (kind is None or kind in (attrs.get("class") or "").split())
        ]


def image(name: str = "a.jpg", **changes: object) -> PageImage:
    plain = {
        "name": name,
        "thumbnail": THUMBNAIL,
        "size": (640, 480),
        "crop": (0.125, 0.0, 0.875, 1.0),
        "bucket": "512×512",
    }
    return PageImage(**(plain | changes))  # type: ignore[arg-type]


def test_the_crop_is_where_it_says() -> None:
    """The frame covers the crop's part of the thumbnail, in the image's own shape."""
    shown = image(crop=(0.1, 0.2, 0.6, 0.95))
    html = Page(page(PageReport("t", "v", images=[shown])))
    ((crop, _),) = html.of("div", "crop")
    assert crop["style"] == "left:10.00%;top:20.00%;width:50.00%;height:75.00%"
    ((holder, _),) = html.of("div", "image")
    assert holder["style"] == "--w:640;--h:480"
    ((tag, _),) = html.of("img")
    data = b64decode(str(tag["src"]).removeprefix("data:image/jpeg;base64,"))
    assert Image.open(BytesIO(data)).size == (16, 12)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text(text: str) -> None:
    """Names, captions, titles, labels and findings that are markup, templates or control characters
    are shown as they are: the page has the same elements as with plain words, and asks for nothing
    outside it."""

    def elements(word: str) -> tuple[list[tuple[str, list[str], str | None]], Page]:
        found = Finding("broken", word, word, "b")
        shown = image(f"{word}/{word}", caption=word, tokens=3, findings=(found,), bucket=word)
        other = image("b", of_class=True)
        parsed = Page(
            page(PageReport(word, word, {word: word}, [], word, [shown, other], 9, [found, found]))
        )
        return [(tag, list(attrs), attrs.get("class")) for tag, attrs, _ in parsed.elements], parsed

    plain, _ = elements("word")
    hostile, parsed = elements(text)
    assert hostile == plain
    ((_, caption),) = parsed.of("p", "caption")
    assert caption == printable(text)
    name = printable(f"{text}/{text}")
    assert [tag["alt"] for tag, _ in parsed.of("img")] == ["b", name, name, "b"]
    sources = [v for _, a, _ in parsed.elements for k, v in a.items() if k in ("src", "href")]
    assert set(sources) == {THUMBNAIL}
    page_text = page(PageReport(text, text)).encode()  # no lone surrogates are left
    assert not {0, 0x1B} & set(page_text)
    assert "\u202e".encode() not in page_text


def test_there_are_no_scripts_and_no_requests() -> None:
    """The page's policy allows only its own style and the images inside."""
    html = Page(page(PageReport("t", "v", images=[image()])))
    assert not html.of("script")
    assert not html.of("link")
    policy = next(a["content"] for a, _ in html.of("meta") if "http-equiv" in a)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    with pytest.raises(ValueError, match="data URI"):
        image(thumbnail="https://example.org/x.png")
    with pytest.raises(ValueError, match="within the image"):
        image(crop=(0.0, 0.0, 1.1, 1.0))


def test_printable_leaves_words_alone() -> None:
    """Letters, marks and emoji of any script stay; characters that steer a terminal are escaped."""
    for text in ("über café 猫.png", "صورة", "नमस्ते", "👩\u200d🚀", "a b\u00a0c"):
        assert printable(text) == text
    assert printable("a\nb\x1b[0m\u202e\udcff") == "a\\nb\\x1b[0m\\u202e\\udcff"


def test_counts_filters_and_what_is_not_shown() -> None:
    """The page gives the number of images shown and of all, and its filters count right."""
    warning, note = Finding("tiny", "a", "x"), Finding("grey", "b", "y")
    shown = [
        image("a", crop_loss=0.25, findings=(warning,)),
        image("b", scale=1.5, findings=(note,)),
        image("c", crop_loss=0.1, random_crop=True),
    ]
    html = Page(page(PageReport("t", "v", images=shown, total=1234)))
    labels = [text for _, text in html.of("label")]
    assert labels == [
        "all · 3",
        "with findings · 2",
        "20 % or more cut away · 1",
        "made larger · 1",
    ]
    assert [a["class"] for a, _ in html.of("article")] == [
        "card found odd cut",
        "card found larger",
        "card ",
    ]
    assert [a["class"] for a, _ in html.of("div", "crop")] == ["crop", "crop", "crop random"]
    assert any("3 of 1,234 images are shown" in text for _, text in html.of("p", "soft"))
    whole = Page(page(PageReport("t", "v", images=shown[:1])))
    assert any(text.startswith("1 image.") for _, text in whole.of("p", "soft"))


def test_class_images_are_marked() -> None:
    """A class image has its mark on its card, and a filter; a page without such has none."""
    shown = [image("a"), image("b", of_class=True), image("c", of_class=True, scale=2.0)]
    html = Page(page(PageReport("t", "v", images=shown)))
    assert [text for _, text in html.of("label")][-1] == "class images · 2"
    assert [a["class"] for a, _ in html.of("article")] == [
        "card ",
        "card of-class",
        "card larger of-class",
    ]
    assert [text for _, text in html.of("span", "class")] == ["class image"] * 2
    plain = Page(page(PageReport("t", "v", images=shown[:1])))
    assert all(a["for"] != "of-class" for a, _ in plain.of("label"))


def test_what_repeats_stands_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each image that others repeat stands with them in one group, first, and the others say how;
    an image that two sources read, or whose twin is not on the page, makes no group; of very many
    the page says how many it leaves out."""

    def repeat(name: str, other: str, code: str) -> PageImage:
        return image(name, findings=(Finding(code, name, "", other),))

    shown = [
        repeat("b", "a", "near-duplicate"), image("a"), repeat("c", "a", "duplicate"), image("d"),
        repeat("e", "e", "duplicate"), repeat("f", "not shown", "duplicate"),
        repeat("g", "d", "in-both-sets"),
    ]  # fmt: skip
    groups = [[(i.name, code) for i, code in group] for group in alike_groups(shown)]
    assert groups == [
        [("a", ""), ("b", "near-duplicate"), ("c", "duplicate")],
        [("d", ""), ("g", "in-both-sets")],
    ]
    html = Page(page(PageReport("t", "v", images=shown)))
    assert len(html.of("div", "alike")) == 2
    assert len(html.of("figure")) == 5
    monkeypatch.setattr("sd_lora.data.check.page.MAX_GROUPS", 1)
    monkeypatch.setattr("sd_lora.data.check.page.MAX_ALIKE", 2)
    html = Page(page(PageReport("t", "v", images=shown)))
    assert len(html.of("figure")) == 2
    said = [text for _, text in html.of("p", "soft")]
    assert "… and 1 more" in said
    assert "… and 1 more groups: see the findings." in said


def test_the_bucket_table() -> None:
    """Every bucket is a row with its numbers, its shape and its share."""
    buckets = [PageBucket(512, 512, 30, 1200, 300), PageBucket(768, 384, 5, 300, 76, 2)]
    html = Page(page(PageReport("t", "v", buckets=buckets, leftovers="smaller batches")))
    cells = [text for _, text in html.of("td")]
    assert cells[:6] == ["512×512", "30", "1,200", "", "300", "–"]
    assert cells[6:] == ["768×384", "5", "300", "", "76", "2"]
    styles = [a["style"] for a, _ in html.of("i")]
    assert styles[0] == "width:26.0px;height:26.0px"
    assert styles[1:] == ["width:100.0%", "width:26.0px;height:13.0px", "width:25.0%"]


FINDINGS = [
    Finding("long-caption", "t.png", "90 tokens"),
    *(Finding("bomb", f"{i}.jpg", "too many pixels") for i in range(17)),
    Finding("float", "e\n.png", "no range"),
]


def test_the_learning_rate_is_drawn() -> None:
    """The schedule's row has a line over the run, highest where the rate is, and none without."""
    report = PageReport("t", "v", rows={"schedule": "cosine"}, rates=[0, 1, 0.5])
    assert '<polyline points="0,40 100,0 200,20"/>' in page(report)
    assert "<svg" not in page(PageReport("t", "v", rows={"schedule": "cosine"}))


def test_findings_in_groups() -> None:
    """A terminal shows the gravest level first, the first of a code and the number of the others;
    the page shows all."""
    assert report_lines(FINDINGS, limit=2) == [
        "left out: 18",
        "  bomb: 17: too many pixels",
        "    0.jpg",
        "    1.jpg",
        "    … and 15 more (sd-lora check --json names all)",
        "  float: 1",
        "    e\\n.png: no range",
        "warning: 1",
        "  long-caption: 1",
        "    t.png: 90 tokens",
    ]
    assert report_lines([]) == []
    different = [Finding("buckets", "x", "one"), Finding("buckets", "y", "two")]
    assert report_lines(different) == ["note: 2", "  buckets: 2", "    x: one", "    y: two"]
    html = Page(page(PageReport("t", "v", findings=FINDINGS)))
    assert len(html.of("li")) == len(FINDINGS)
    assert [a["class"] for a, _ in html.of("details")] == ["left-out", "left-out", "warning"]
    assert html.of("p", "verdict")[0][0]["class"] == "verdict left-out"
    assert Page(page(PageReport("t", "v"))).of("p", "verdict")[0][0]["class"] == "verdict good"


def test_json_names_all() -> None:
    """JSON has every finding in order, and a count for every level, also for an empty one."""
    shape = json.loads(json.dumps(findings_as_json(FINDINGS)))
    assert shape["counts"] == {"left out": 18, "warning": 1, "note": 0}
    assert shape["findings"] == [finding.as_dict() for finding in FINDINGS]
    first = {"level": "warning", "code": "long-caption", "name": "t.png", "text": "90 tokens"}
    assert shape["findings"][0] == first


def test_it_is_written_whole_or_not(tmp_path: Path) -> None:
    """An old page is replaced by the whole new one; the error of a failed write names the file."""
    path = tmp_path / "check.html"
    path.write_text("old")
    report = PageReport("t", "v", images=[image(name) for name in HOSTILE])
    write_page(path, report)
    assert path.read_text(encoding="utf-8") == page(report)
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(RunError, match=r"check\.html"):
        write_page(path / "check.html", report)
