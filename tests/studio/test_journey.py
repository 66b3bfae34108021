"""A person trains in the studio: Chromium without a window, from the first page to the LoRA."""

import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from PIL import Image

from tests.studio.conftest import Served, busy
from tests.studio.test_many import many_images
from tests.studio.test_pages import post
from tests.studio.test_pages import work as work_of

pytestmark = [
    pytest.mark.launch,
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("chromium") and shutil.which("chromedriver")),
        reason="no Chromium with its driver here",
    ),
]
webdriver = pytest.importorskip("selenium.webdriver")
ActionChains, Keys = webdriver.ActionChains, webdriver.Keys

PATIENCE = 300.0


FAINT = """
const parse = text => (text.match(/[\\d.]+/g) || []).map(Number);
const light = rgb => rgb.slice(0, 3).map(v => v / 255)
  .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
const ground = e => {
  for (; e; e = e.parentElement) {
    const found = parse(getComputedStyle(e).backgroundColor);
    if (found.length === 3 || found[3] === 1) return found;
  }
  return [255, 255, 255];
};
return [...document.querySelectorAll("main *, header *, footer *")].filter(e =>
  [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()) && e.checkVisibility() &&
  !e.closest("svg, option, :disabled")
).map(e => {
  const [a, b] = [parse(getComputedStyle(e).color), ground(e)].map(light).sort((x, y) => y - x);
  return [(a + .05) / (b + .05), e.outerHTML.slice(0, 120)];
}).filter(([ratio]) => ratio < 4.5);
"""
"""Texts whose contrast with their ground is below that of WCAG 2, level AA."""


class Person:
    """A browser, and the eyes and hands before it."""

    def __init__(self) -> None:
        options = webdriver.ChromeOptions()
        for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,1000"):
            options.add_argument(word)
        options.binary_location = shutil.which("chromium") or ""
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.browser = webdriver.Chrome(
            options, webdriver.ChromeService(shutil.which("chromedriver"))
        )

    def sees(self, selector: str, text: str = "") -> Any:
        """The first element that a selector finds and that shows a text; waits for it."""
        look = (
            "return [...document.querySelectorAll(arguments[0])].find(e => "
            "e.textContent.includes(arguments[1]) && e.checkVisibility()) || null"
        )
        return self.waits(lambda: self.browser.execute_script(look, selector, text), selector, text)

    def waits(self, true: Callable[[], Any], *about: object) -> Any:
        """The first value of a function that is not false."""
        end = time.monotonic() + PATIENCE
        while not (found := true()):
            assert time.monotonic() < end, (about, self.browser.page_source[-6000:])
            time.sleep(0.1)
        return found

    def clicks(self, selector: str, text: str = "") -> None:
        element = self.sees(selector, text)
        self.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def writes(self, selector: str, text: str) -> None:
        """Put a text in the place of a field's, as one change: `clear` would be one of its own."""
        element = self.sees(selector)
        element.send_keys(Keys.CONTROL + "a")
        element.send_keys(text or Keys.DELETE)

    def goes(self, served: Served, path: str) -> None:
        """Open a page of a studio."""
        self.browser.get(f"http://127.0.0.1:{served.port}{path}")

    def has(self, width: int) -> None:
        """Have a screen of another width in pixels; 0: the window's own."""
        devtools = self.browser.execute_cdp_cmd
        screen = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": True}
        if width:
            devtools("Emulation.setDeviceMetricsOverride", screen)
        else:
            devtools("Emulation.clearDeviceMetricsOverride", {})

    def likes(self, scheme: str) -> None:
        """Prefer pages in another scheme of colours."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def tabs(self, selector: str) -> Any:
        """Go on by the tabulator to the element that a selector finds. Each stop on the way is seen
        to have the focus."""
        look = (
            "const a = document.activeElement, s = getComputedStyle(a);"
            "return [a, a.matches(arguments[0]), a === document.body || s.outlineStyle !== 'none' "
            "|| s.boxShadow !== 'none', a.outerHTML.slice(0, 200)]"
        )
        for _ in range(300):
            ActionChains(self.browser).send_keys(Keys.TAB).perform()
            element, found, shown, text = self.browser.execute_script(look, selector)
            assert shown, text
            if found:
                return element
        raise AssertionError(f"no stop is {selector}")

    def complaints(self) -> list[str]:
        """Lines of the console, and requests to elsewhere."""
        lines = [entry["message"] for entry in self.browser.get_log("browser")]
        for entry in self.browser.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                address = message["params"]["request"]["url"]
                local = address.startswith(("http://127.0.0.1:", "data:", "chrome", "about:"))
                lines += [] if local else [address]
        return lines


@pytest.fixture(scope="module")
def chromium() -> Iterator[Person]:
    found = Person()
    yield found
    found.browser.quit()


@pytest.fixture
def friend() -> Iterator[Person]:
    """A second person, before a browser of their own."""
    found = Person()
    yield found
    found.browser.quit()


@pytest.fixture
def person(chromium: Person) -> Person:
    """A person before the one browser of these tests, on an empty page, with nothing said yet."""
    chromium.browser.get("about:blank")
    chromium.complaints()
    return chromium


def test_a_person_trains_a_lora(
    person: Person, starts: Callable[..., Served], root: Path, tmp_path: Path
) -> None:
    """From an empty page, the sample images, the embedded base and the preset of a subject to
    verified files and a grid at three strengths, over a mistake, a killed studio, a pause and a
    resume, with nothing in the console and no request to elsewhere.

    Three processes that import torch and diffusers take most of its time.
    """
    work, state = tmp_path / "work", tmp_path / "state"
    work.mkdir()
    served = starts(work, state)
    person.browser.get(served.address)
    person.sees("h1", "New training")

    person.clicks("button", "Choose …")  # the folder, in the dialog
    person.clicks(".entries button", "work/")
    person.clicks(".entries button", "opened folders")
    person.clicks(".entries button[data-choose$=instance]")
    person.clicks("button[hx-get*=model]", "Choose …")
    person.clicks(".entries button[data-choose$=tiny-sd]")
    person.clicks(".purpose", "A subject")
    person.sees("#at-instance_prompt", "has no captions")  # the page knows before the start
    person.writes("#f-instance_prompt", "a photo of sks monster")
    person.clicks("#more > summary")
    person.writes("#f-rank", "0")
    person.sees("#at-rank .problem", "rank must be at least 1, not 0")
    person.writes("#f-rank", "2")
    person.sees("#at-rank .changed", "usually 16")
    few = {"max_train_steps": "100", "num_validation_images": "1", "validation_steps": "20"}
    for field, text in few.items():
        person.writes("#find", field)
        person.writes(f"#f-{field}", text)
    person.clicks("#start")
    person.sees(".state.running")
    person.sees("#samples img")  # of the base, before the first step
    served.process.send_signal(signal.SIGKILL)
    served.process.wait()
    served = starts(work, state)
    person.browser.get(served.address)
    person.sees("a.run-row", "instance-lora")
    person.complaints()  # of the page whose studio was away
    person.clicks("a.run-row", "instance-lora")  # the same process goes on
    person.clicks("#acts button", "Pause")
    person.sees(".state.paused")
    assert not (work / "instance-lora" / "pytorch_lora_weights.safetensors").exists()
    person.clicks("#acts button", "Resume after step")
    person.sees(".state.done")
    person.sees("#state", "step 100 of 100")
    person.sees("#state", "pytorch_lora_weights.safetensors")
    person.waits(lambda: len(person.browser.find_elements("css selector", "#charts canvas")) == 3)

    person.clicks("#state a", "Try it")
    person.writes("#f-steps", "2")
    person.clicks("button", "Draw")  # at strengths 0, 0.5 and 1
    slider = person.sees("[data-pick=strength]")
    shown = "return document.querySelector('[data-column]').src"
    assert person.browser.execute_script(shown).endswith("/image/2")
    slider.send_keys(Keys.ARROW_LEFT)
    person.sees(".tried output", "0.5")
    assert person.browser.execute_script(shown).endswith("/image/1")
    person.clicks(".tried summary", "as one grid")
    person.sees("img.sheet")
    kept = f"return fetch('{person.sees('.tried a', 'Keep').get_attribute('href')}')"
    kind = person.browser.execute_script(f"{kept}.then(a => a.headers.get('content-disposition'))")
    assert kind.startswith("attachment")
    assert person.complaints() == []
    served.process.terminate()
    assert served.process.wait(timeout=30) in (0, 143)


ODD = '"><svg onload="window.struck=1"> <script>window.struck=1</script>'
"""A text that would be a page's own script, were it not taken as a text."""


def test_by_keyboard_by_two_and_by_strangers(
    person: Person, friend: Person, starts: Callable[..., Served], root: Path, tmp_path: Path,
    tiny_sd1: Path,
) -> None:  # fmt: skip
    """By keys alone a run comes into the queue, out of it and off the list, a caption and a crop
    are changed, and a mask is drawn; each stop shows that it has the focus. A second browser sees
    the same fields, runs, crops, masks and captions, runs without asking, and the first sees its
    captions. Script in names of folders, files, runs and in captions does nothing on any page. Each
    page fits a phone, and its text stands out from its ground in light and in dark."""
    work, state = tmp_path / "work", tmp_path / "state"
    folder = work / f"<img src=x onerror=alert(1)> {ODD.replace('/', '')}"
    shutil.copytree(root / "sample_data/dreambooth/instance", folder)
    wide = Image.new("RGB", (128, 64), "red")
    wide.save(folder / f"0 {ODD.replace('/', '')}.png")
    (folder / f"0 {ODD.replace('/', '')}.txt").write_text(ODD)
    served = starts(work, state)
    person.browser.get(served.address)
    person.sees("h1", "New training")
    with busy(state) as store:
        person.tabs("#f-folder").send_keys(str(folder))
        person.tabs("#f-pretrained_model_name_or_path").send_keys(str(tiny_sd1))
        person.tabs("#f-instance_prompt").send_keys("a photo of sks monster")
        person.tabs("#f-output_dir").send_keys(str(work / f"out {ODD.replace('/', '')}"))
        person.tabs("#start").send_keys(Keys.ENTER)
        person.sees(".state.queued")
        (job,) = store.jobs("state = 'queued'")

        person.clicks("footer button", "Address for another browser")
        address = person.sees("#another code").text
        friend.browser.get(address)
        friend.clicks("nav a", "New training")
        assert friend.sees("#f-instance_prompt").get_attribute("value").endswith("sks monster")
        friend.clicks("nav a", "Runs")
        friend.sees(f".run-row[href='/runs/{job.id}'] .queued")
        person.tabs("button[hx-post$=stop]").send_keys(Keys.ENTER)
        person.sees(".state.stopped")
        assert store.job(job.id).state == "stopped"
        friend.sees(f".run-row[href='/runs/{job.id}'] .stopped")  # that page asks by itself
        person.tabs("button[hx-post$=forget]").send_keys(Keys.ENTER)
        person.sees("h1", "Runs")
        store.add("train", f"theirs {ODD}", [], folder=str(work / "theirs"))
        for one in (person, friend):
            one.sees(".run-row b", "theirs")

        check = store.add("check", "images", [], state="done", folder=str(folder))
        facts = {"name": str(min(folder.glob("0*.png"))), "size": [128, 64], "bucket": [64, 64],
                 "resized": [128, 64], "crop": [32, 0], "random_crop": False,
                 "crop_loss": 0.5, "repeats": 1}  # fmt: skip
        report = {"images": [facts], "findings": [], "verdict": ODD}
        (state / "log" / f"{check}.txt").write_text(json.dumps(report, indent=1))
        person.goes(served, f"/images?folder={quote(str(folder))}")
        person.sees(".image svg")
        person.tabs(".image [data-crop]").send_keys(Keys.ARROW_LEFT, "-")
        person.sees(".said", "crop saved")
        person.sees("[data-enlarged]", "enlarged 1.05 times")
        assert json.loads((folder / "crops.json").read_text()).popitem()[1] == [0.49, 0.5, 0.95]
        frame = person.sees(".image .crop")
        right, down = frame.size["width"] / 2 - 3, frame.size["height"] / 2 - 3
        mouse = ActionChains(person.browser).move_to_element_with_offset(frame, right, down)
        mouse.click_and_hold().move_by_offset(-20, -20).release().perform()  # by its corner
        person.waits(lambda: json.loads((folder / "crops.json").read_text()).popitem()[1][2] < 0.95)
        x, y, part = json.loads((folder / "crops.json").read_text()).popitem()[1]
        assert (x < 0.49, y < 0.5, 0.5 < part < 0.9) == (True, True, True)
        pixels = person.sees("[data-seen]").text
        person.tabs(".image [data-mask]").send_keys(Keys.ENTER)
        person.sees("#mask h2", "script")
        canvas = person.sees("#mask canvas:focus")
        canvas.send_keys(
            " ", Keys.ARROW_RIGHT * 2, " ", "+", Keys.SHIFT, Keys.ARROW_UP, Keys.NULL, " z"
        )
        person.sees(
            "#mask-said", "56 % from the left, 30 % from above; brush up, 7 % wide, not trained"
        )
        person.tabs("[data-keep-mask]").send_keys(Keys.ENTER)
        person.sees(".said", "mask saved")
        with Image.open(next(folder.glob("*-masklabel.png"))) as mask:
            assert [mask.getpixel((x, 32)) for x in (40, 64, 71, 90)] == [255, 0, 0, 255]
            assert mask.getpixel((71, 19)) == 255  # taken back
        person.tabs(".image textarea").send_keys("by hand ", Keys.TAB)
        person.sees(".image .at", "saved")
        friend.goes(served, f"/images?folder={quote(str(folder))}")
        assert friend.sees(".image textarea").get_attribute("value") == f"by hand {ODD}"
        assert friend.sees("[data-seen]").text == pixels
        friend.sees(".masked")
        friend.writes("[aria-label='caption of 00-white.png']", "theirs" + Keys.TAB)
        friend.sees(".image .at", "saved")
        person.has(width=390)
        for path in ("/runs", "/new", "/try", "/shelf", f"/images?folder={quote(str(folder))}"):
            person.goes(served, path)
            assert person.browser.execute_script("return window.struck === undefined"), path
            wide = "return document.documentElement.scrollWidth"
            assert person.browser.execute_script(wide) <= 390, path
            for scheme in ("light", "dark"):
                person.likes(scheme)
                assert person.browser.execute_script(FAINT) == [], (path, scheme)
        person.has(width=0)
        texts = "return [...document.querySelectorAll('.image textarea')].map(t => t.value)"
        found = person.waits(lambda: person.browser.execute_script(texts))
        assert found[:2] == [f"by hand {ODD}", "theirs"]
    assert person.complaints() == friend.complaints() == []


def test_five_thousand_images_are_scrolled(person: Person, studio: Served) -> None:
    """From the top to the last of 5,000 images, whose caption is edited, in time (4 s on one core);
    the page makes cards near the window alone."""
    folder = work_of(studio) / "many"
    many_images(folder, 5000)
    _, text, _ = post(studio, "/another")
    person.browser.get(text.partition(">")[2].partition("<")[0])
    began = time.monotonic()
    person.goes(studio, f"/images?folder={quote(str(folder))}")
    person.sees(".file", "0000.png")
    end = (
        "scrollTo(0, document.body.scrollHeight); return document.querySelectorAll('.image').length"
    )
    last = "return !!document.querySelector('textarea[aria-label=\"caption of 4999.png\"]')"
    person.waits(
        lambda: (person.browser.execute_script(end), person.browser.execute_script(last))[1]
    )
    person.writes("textarea[aria-label='caption of 4999.png']", "the last" + Keys.TAB)
    person.sees(".image .at", "saved")
    assert (folder / "4999.txt").read_text() == "the last"
    assert person.browser.execute_script(end) < 1000
    assert time.monotonic() - began < 30
    assert person.complaints() == []
