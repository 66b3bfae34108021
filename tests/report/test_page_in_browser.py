"""The page of a run in headless Chromium: it shows the numbers of the record, and works."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sd_lora.report.events import Event
from sd_lora.report.measured import by_step, by_timestep, images_of, scores_by_step
from sd_lora.report.record import read_record
from sd_lora.report.run_page import differing_options, write_page
from tests.report.test_run_page import data_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("chromedriver"), reason="no Chromium with its driver here"),
]

TABLES = """
const headings = [...document.querySelectorAll("h2")];
return [...document.querySelectorAll("table:not(.u-legend)")].map(table => {
  const folded = table.closest("details");
  const before = headings.filter(h => h.compareDocumentPosition(table) & 4);
  const title = folded ? folded.querySelector("summary") : before[before.length - 1];
  return [title.textContent.trim(),
    [...table.rows].map(row => [...row.cells].map(cell => cell.textContent.trim()))];
});"""
"""Title and cells of each table, but for the legends of charts: its summary's, else that of the
heading above."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,900"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options)
    yield browser
    browser.quit()


@pytest.fixture
def opened(browser: Any) -> Iterator[Any]:
    """The browser. After a test it has asked for nothing elsewhere, and has nothing to complain
    of; and the page fits a phone, in light and in dark."""
    waits = pytest.importorskip("selenium.webdriver.support.wait")
    for kind in ("performance", "browser"):
        browser.get_log(kind)
    yield browser
    for scheme in ("light", "dark"):
        feature = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": feature})
        metrics = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        waits.WebDriverWait(browser, 20).until(fits)  # charts are drawn anew at another width
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    sent = [json.loads(row["message"])["message"] for row in browser.get_log("performance")]
    requests = [m["params"] for m in sent if m["method"] == "Network.requestWillBeSent"]
    asked = [request["request"]["url"] for request in requests]
    assert asked
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert browser.get_log("browser") == []


def fits(page: Any) -> bool:
    """Whether the page and each of its charts are as wide as a phone at most."""
    return page.execute_script(
        "return [document.documentElement, ...document.querySelectorAll('.uplot')].every("
        "element => element.scrollWidth <= 390)"
    )


def keys(browser: Any, element: str, *names: str) -> Any:
    """Press keys on an element, which is returned."""
    webdriver = pytest.importorskip("selenium.webdriver")
    found = browser.find_element("id", element)
    found.send_keys(*(getattr(webdriver.Keys, name) for name in names))
    return found


def columns(rows: list[list[str]]) -> dict[str, list[float | None]]:
    """Name → numbers of a table of curves; a dash is None."""
    numbers = [[None if text == "–" else float(text) for text in row] for row in rows[1:]]
    return dict(zip(rows[0], map(list, zip(*numbers, strict=True)), strict=True))


def test_every_table_is_the_record(watched: Path, opened: Any) -> None:
    """Each table on the page has the numbers of the log and of report.json, and no other table is
    there; the charts and the UNet are drawn."""
    opened.get((watched / "report.html").as_uri())
    record, (data,) = read_record(watched), data_of((watched / "report.html").read_text("utf-8"))
    found = opened.execute_script(TABLES)
    tables = dict(found)
    assert len(tables) == len(found)
    curves = {
        "numbers as a table": data["curves"],
        "validation loss by step as a table": by_step(record["validation"]),
        "validation loss by timestep as a table": by_timestep(record["validation"]),
        "scores of images, in percent, as a table": scores_by_step(record["scores"]),
    }
    log = [json.loads(x) for x in (watched / "training_log.jsonl").read_text().splitlines()]
    for title, expected in curves.items():
        rows = tables.pop(title)
        found = columns(rows)
        assert [*found] == [*expected]
        for name, values in expected.items():
            assert found[name] == pytest.approx(values, rel=1e-5), (title, name)
        if "timestep" not in title:  # steps are whole numbers
            assert all(row[0].isdecimal() for row in rows[1:])
        assert len(rows) > 2
    assert len(curves["scores of images, in percent, as a table"]) >= 7
    assert len(data["curves"]["loss"]) == len(log) == 48

    images = images_of(record["ledger"])
    assert [image["seen"] for image in images] == [48] * 6 + ["held out"]
    assert any("–" not in (image["loss"], image["change"]) for image in images)
    names = ("name", "seen", "loss", "change", "finding")
    shown = [[*row[1:5], row[6]] for row in tables.pop("Images")[1:]]
    assert shown == [[str(image[name]) for name in names] for image in images]
    windows = tables.pop("loss against the rest over the run as a table")
    assert windows[1:] == [[image["name"], *image["windows"]] for image in images[:6]]
    assert len(opened.find_elements("css selector", "svg.line")) == 6
    pictures = opened.find_elements("css selector", "img.small")
    assert [picture.get_attribute("src") for picture in pictures] == [i["picture"] for i in images]

    changes = tables.pop("Change of the weights, ‖ΔW‖ / ‖W‖")
    assert [row[:2] for row in changes[1:]] == [
        [f"{component} {name}", f"{100 * change:.3g} %"]
        for component, parts in record["changes"].items()
        for name, change in parts.items()
    ]
    assert tables == {}
    assert len(opened.find_elements("css selector", "canvas")) == 6
    assert len(opened.find_elements("css selector", ".unet rect")) == len(record["changes"]["unet"])
    terms = [dt.text for dt in opened.find_elements("css selector", "dl:not(.soft) dt")]
    assert terms == [*record["rows"]]


def test_sliders_move_the_images(watched: Path, opened: Any) -> None:
    """By the keys of one slider the samples go from step to step, and by those of the other from
    strength to strength after the last step: 0 is the base, 1 the last step. Both say where they
    stand. The scored images are three sheets, each of which follows its own slider."""
    opened.get((watched / "report.html").as_uri())
    (data,) = data_of((watched / "report.html").read_text("utf-8"))
    drawn, sheets = data["drawn"]["Samples"], data["drawn"]["Scored images"]
    assert (drawn["steps"], sheets["steps"]) == ([0, 24, 48], [0, 48])
    assert [*drawn["strengths"]] == ["0.5", "0.75"]
    image = opened.find_element("css selector", ".samples img")

    def shown() -> str:
        return image.get_attribute("src")

    strength = opened.find_element("id", "strength-0-0")
    assert shown() == drawn["images"]["48"][0]
    for name, uri, text in (
        ("ARROW_LEFT", drawn["strengths"]["0.75"][0], "0.75"),
        ("ARROW_LEFT", drawn["strengths"]["0.5"][0], "0.5"),
        ("HOME", drawn["images"]["0"][0], "0: the base"),
        ("END", drawn["images"]["48"][0], "1"),
        ("ARROW_LEFT", drawn["strengths"]["0.75"][0], "0.75"),
    ):
        assert keys(opened, "strength-0-0", name).get_attribute("aria-valuetext") == text
        assert shown() == uri
    assert len({uris[0] for uris in (*drawn["strengths"].values(), *drawn["images"].values())}) == 5
    step = keys(opened, "step-0-0", "ARROW_LEFT")
    assert step.get_attribute("aria-valuetext") == "24 steps"
    assert shown() == drawn["images"]["24"][0]
    assert strength.get_attribute("disabled")
    assert keys(opened, "step-0-0", "HOME").get_attribute("aria-valuetext") == "0 steps: the base"
    assert shown() == drawn["images"]["0"][0]
    keys(opened, "step-0-0", "END")
    assert shown() == drawn["strengths"]["0.75"][0]  # as it was set
    scored = opened.find_elements("css selector", ".samples.sheets img")
    assert [image.get_attribute("src") for image in scored] == sheets["images"]["48"]
    keys(opened, "step-0-1", "HOME")
    assert [image.get_attribute("src") for image in scored] == sheets["images"]["0"]
    assert len({*sheets["images"]["0"], *sheets["images"]["48"]}) == 6


def test_an_image_that_a_step_lacks_is_hidden(watched: Path, tmp_path: Path, opened: Any) -> None:
    """It is not left from another step, and is back at one that has it."""
    folder = tmp_path / "run"
    shutil.copytree(watched, folder)
    for step in ("000000", "000048"):
        there = folder / "samples" / f"step-{step}" / "00.png"
        shutil.copy(there, there.with_name("01.png"))
    write_page([folder], folder / "report.html")
    opened.get((folder / "report.html").as_uri())
    figures = opened.find_elements("css selector", ".samples:not(.sheets) figure")
    seen = []
    for name in ("HOME", "ARROW_RIGHT", "ARROW_RIGHT"):
        keys(opened, "step-0-0", name)
        seen.append([figure.is_displayed() for figure in figures])
    assert seen == [[True, True], [True, False], [True, True]]


def test_runs_side_by_side(
    watched: Path, told: tuple[list[Event], Path, str], tmp_path: Path, opened: Any
) -> None:
    """Sliders of two runs with the same prompt move together, each to the nearest step that its run
    has, and that of the strength too where both have one; the table of options is that of the
    configurations; tables of both runs are there."""
    again = tmp_path / "again"
    shutil.copytree(watched, again)
    folders = [watched, told[1], again]
    write_page(folders, tmp_path / "runs.html")
    opened.get((tmp_path / "runs.html").as_uri())
    text = (tmp_path / "runs.html").read_text("utf-8")
    drawn = [data["drawn"]["Samples"] for data in data_of(text)]
    images = opened.find_elements("css selector", ".samples:not(.sheets) img")

    def shown() -> list[str]:
        return [image.get_attribute("src") for image in images]

    def at(*steps: int) -> list[str]:
        return [d["images"][str(step)][0] for d, step in zip(drawn, steps, strict=True)]

    assert shown() == at(48, 6, 48)
    keys(opened, "strength-0-0", "HOME")
    assert shown() == at(0, 6, 0)
    keys(opened, "strength-2-0", "ARROW_RIGHT")
    half = [drawn[number]["strengths"]["0.5"][0] for number in (0, 2)]
    assert shown() == [half[0], at(48, 6, 48)[1], half[1]]
    keys(opened, "step-0-0", "HOME")
    assert shown() == at(0, 0, 0)
    keys(opened, "step-1-0", "ARROW_RIGHT")
    assert shown() == at(0, 4, 0)
    keys(opened, "step-0-0", "ARROW_RIGHT")
    assert shown() == at(24, 6, 24)
    tables = opened.execute_script(TABLES)
    (options,) = (rows for title, rows in tables if title == "Where they differ")
    assert {row[0]: row[1:] for row in options[1:]} == differing_options(folders)
    names = options[0][1:]
    assert names == ["watched0/out", "told0/out", "again"]
    for name in names:
        assert f"numbers of {name} as a table" in [title for title, _ in tables]
