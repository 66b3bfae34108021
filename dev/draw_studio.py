"""Draw the studio's pictures in the docs, by Chromium without a window: a person's first training.

    .venv/bin/python dev/draw_studio.py [FOLDER]

Writes studio.png (a run of the embedded base), studio_new.png, studio_images.png, studio_mask.png,
studio_try.png and studio_shelf.png into the folder, docs unless given. Takes about four minutes of
one core.
"""

import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver import Keys

ROOT = Path(__file__).parent.parent
SIZE = (1280, 1180)

OPTIONS = {
    "f-folder": "my_monster",
    "f-pretrained_model_name_or_path": "tiny-sd",
    "f-instance_prompt": "a photo of a sks monster",
    "f-max_train_steps": "400",
    "f-train_batch_size": "4",
    "f-learning_rate": "2e-3",
    "f-text_encoder_lr": "2e-3",
    "f-validation_prompt": "a photo of a sks monster on the grass",
    "f-num_validation_images": "5",
    "f-validation_steps": "12",
    "f-validation_epochs": "10",
    "f-seed": "0",
}
"""Field → its text."""

FILL = """for (const [id, text] of Object.entries(arguments[0])) {
  const field = document.getElementById(id);
  field.value = text;
  field.dispatchEvent(new Event("change", {bubbles: true}));
}"""

CROP = """for (const svg of [...document.querySelectorAll("[data-crop]")].slice(0, 3)) {
  svg.focus();
  for (const key of arguments[0])
    svg.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
}
scrollTo(0, 0);"""
"""Three crops made smaller, and moved."""

SEEN = """const step = document.querySelector("#step");
return step && step.max >= 8 && document.querySelectorAll("canvas").length > 2;"""
"""Whether there are samples of nine steps, which show the subject, and curves."""


def browser() -> webdriver.Chrome:
    """Chromium without a window."""
    options = webdriver.ChromeOptions()
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(word)
    options.binary_location = shutil.which("chromium") or ""
    found = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    found.set_window_size(*SIZE)
    return found


def wait(page: webdriver.Chrome, script: str) -> None:
    """Wait until a script finds something."""
    while not page.execute_script(script):
        time.sleep(0.5)
    time.sleep(1)


def shoot(page: webdriver.Chrome, place: Path, height: int = SIZE[1], top: str = "body") -> None:
    """Write what the browser shows from an element on, in 256 colours."""
    page.set_window_size(SIZE[0], height)
    page.execute_script(f"document.querySelector('{top}').scrollIntoView()")
    time.sleep(1)
    with Image.open(io.BytesIO(page.get_screenshot_as_png())) as image:
        image.convert("RGB").quantize(256).save(place, optimize=True)


def draw(out: Path) -> None:
    """Go through the studio with a new folder as a person does, and take pictures on the way."""
    with tempfile.TemporaryDirectory() as place:
        work = Path(place, "work")
        shutil.copytree(ROOT / "sample_data/dreambooth/instance", work / "my_monster")
        shutil.copytree(ROOT / "sample_data/tiny-sd", work / "tiny-sd")
        studio = subprocess.Popen(
            [sys.executable, "-m", "sd_lora", "studio", "--no_open", "--port", "0"],
            cwd=work, env=os.environ | {"SD_LORA_STUDIO": str(Path(place, "state"))},
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert studio.stdout is not None
        page = browser()
        try:
            page.get(studio.stdout.readline().split()[-1])
            home = page.current_url.partition("/new")[0]
            page.execute_script(FILL, OPTIONS)
            time.sleep(2)
            shoot(page, out / "studio_new.png")

            page.get(f"{home}/images?from=draft")
            page.find_element("xpath", "//button[contains(., 'Show crops')]").click()
            wait(page, "return document.querySelector('[data-crop]')")
            page.execute_script(CROP, ["-", "-", "-", "-", "-", "-", "ArrowDown"])
            time.sleep(2)
            shoot(page, out / "studio_images.png", 1000)
            page.find_element("css selector", "[data-mask]").click()
            wait(page, "return document.querySelector('#mask[open]')")
            canvas = page.find_element("css selector", "#mask canvas")
            canvas.send_keys("+++", " ", Keys.ARROW_DOWN * 2, Keys.ARROW_RIGHT * 4, " ")
            shoot(page, out / "studio_mask.png", 1000)

            page.get(f"{home}/new")
            page.find_element("id", "start").click()
            wait(page, SEEN)
            time.sleep(5)
            shoot(page, out / "studio.png")
            wait(page, "return document.querySelector('.state.done')")
            page.find_element("css selector", "#state a[href*=try]").click()
            page.find_element("id", "f-prompts").send_keys("\na photo of a sks monster at night")
            page.find_element("xpath", "//button[.='Draw']").click()
            wait(page, "return document.querySelector('[data-grid]')")
            shoot(page, out / "studio_try.png", 760, ".tried")
            page.get(f"{home}/shelf")
            page.find_element("css selector", "[data-add]").click()
            shoot(page, out / "studio_shelf.png", 760)
        finally:
            page.quit()
            studio.terminate()


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs")
