"""A person trains in the studio: Chromium without a window, from the first page to the LoRA."""

import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.studio.conftest import Served

pytestmark = [
    pytest.mark.launch,
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("chromium") and shutil.which("chromedriver")),
        reason="no Chromium with its driver here",
    ),
]
webdriver = pytest.importorskip("selenium.webdriver")

PATIENCE = 300.0


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
        element = self.sees(selector)
        element.clear()
        element.send_keys(text)

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


@pytest.fixture
def person() -> Iterator[Person]:
    found = Person()
    yield found
    found.browser.quit()


def test_a_person_trains_a_lora(
    person: Person, starts: Callable[..., Served], root: Path, tmp_path: Path, tiny_sd1: Path
) -> None:
    """From an empty page to verified files and a grid at three strengths, over a mistake, a killed
    studio, a pause and a resume, with nothing in the console and no request to elsewhere.

    Three processes that import torch and diffusers take most of its time.
    """
    work, state = tmp_path / "work", tmp_path / "state"
    shutil.copytree(root / "sample_data/dreambooth/instance", work / "photos")
    served = starts(work, state)
    person.browser.get(served.address)
    person.sees("h1", "New training")

    person.clicks("button", "Choose …")  # the folder, in the dialog
    person.clicks(".entries button", "work/")
    person.clicks(".entries li:has([data-choose$=photos]) button[data-choose]", "Choose")
    person.writes("#f-pretrained_model_name_or_path", str(tiny_sd1))
    person.sees("#at-instance_prompt", "has no captions")  # the page knows before the start
    person.writes("#f-instance_prompt", "a photo of sks monster")
    person.clicks("#more > summary")
    person.writes("#f-rank", "0")
    person.sees("#at-rank .problem", "rank must be at least 1, not 0")
    person.writes("#f-rank", "2")
    person.sees("#at-rank .changed", "usually 16")
    few = {"max_train_steps": "400", "num_validation_images": "1", "validation_steps": "2"}
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
    person.sees("a.run-row", "photos-lora")
    person.complaints()  # of the page whose studio was away
    person.clicks("a.run-row", "photos-lora")  # the same process goes on
    person.clicks("#acts button", "Pause")
    person.sees(".state.paused")
    assert not (work / "photos-lora" / "pytorch_lora_weights.safetensors").exists()
    person.clicks("#acts button", "Resume after step")
    person.sees(".state.done")
    person.sees("#state", "step 400 of 400")
    person.sees("#state", "pytorch_lora_weights.safetensors")
    person.waits(lambda: len(person.browser.find_elements("css selector", "#charts canvas")) == 3)

    person.clicks("#state a", "Try it")
    person.writes("#f-steps", "2")
    person.clicks("button", "Draw")  # at strengths 0, 0.5 and 1
    person.sees("img.sheet")
    kept = f"return fetch('{person.sees('.tried a', 'Keep').get_attribute('href')}')"
    kind = person.browser.execute_script(f"{kept}.then(a => a.headers.get('content-disposition'))")
    assert kind.startswith("attachment")
    assert person.complaints() == []
    served.process.terminate()
    assert served.process.wait(timeout=30) in (0, 143)
