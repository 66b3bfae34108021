"""Draw docs/studio.png: a run of the embedded base in the studio, by Chromium without a window.

    .venv/bin/python dev/draw_studio.py [OUT]

Takes about two minutes of one core.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from selenium import webdriver

ROOT = Path(__file__).parent.parent
SIZE = (1280, 1180)

OPTIONS = {
    "f-folder": "my_monster",
    "f-pretrained_model_name_or_path": str(ROOT / "sample_data/tiny-sd"),
    "f-instance_prompt": "a photo of a sks monster",
    "f-max_train_steps": "120",
    "f-train_batch_size": "2",
    "f-learning_rate": "2e-3",
    "f-text_encoder_lr": "4e-4",
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

SEEN = "return document.querySelector('#step') && document.querySelectorAll('canvas').length > 2"
"""Whether there are samples of two steps, and curves."""


def browser() -> webdriver.Chrome:
    """Chromium without a window."""
    options = webdriver.ChromeOptions()
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(word)
    options.binary_location = shutil.which("chromium") or ""
    found = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    found.set_window_size(*SIZE)
    return found


def draw(out: Path) -> None:
    """Start a studio in a new folder, start a run, and take its picture after its first samples."""
    with tempfile.TemporaryDirectory() as place:
        work = Path(place, "work")
        shutil.copytree(ROOT / "sample_data/dreambooth/instance", work / "my_monster")
        studio = subprocess.Popen(
            [sys.executable, "-m", "sd_lora", "studio", "--no_open", "--port", "0"],
            cwd=work, env=os.environ | {"SD_LORA_STUDIO": str(Path(place, "state"))},
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert studio.stdout is not None
        page = browser()
        try:
            page.get(studio.stdout.readline().split()[-1])
            page.execute_script(FILL, OPTIONS)
            time.sleep(2)
            page.find_element("id", "start").click()
            while not page.execute_script(SEEN):
                time.sleep(1)
            time.sleep(6)
            page.save_screenshot(str(out))
        finally:
            page.quit()
            studio.terminate()
            for process in work.glob("my_monster-lora"):
                (process / "stop").touch()
            time.sleep(10)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs/studio.png")
