"""Four subjects and two styles for the bench of learning, drawn the same every time.

`Lesson.images(count)` are the images to train on, `held_out` others of the same, on other
backgrounds; prompts ask for the subject or style, for its class, and for other things.
"""

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from sd_lora import demo
from sd_lora.sampling.score import Prompts

sys.path.insert(0, str(Path(__file__).parent.parent / "dev"))
import images as world
from subjects import Style, in_style

PLACES = ("white", "grass", "night", "snow", "blue", "beach", "yellow", "grey")
AT_PLACES = f"{{{'|'.join(world.place(world.Scene('car', 'red', background=p)) for p in PLACES)}}}"
"""A wildcard of their words in captions."""
COLOURS = "red|yellow|green|cyan|purple|pink"
HELD_OUT_PLACES = ("pink", "white", "grass", "night", "snow", "beach", "cyan", "black")
UNRELATED = (*demo.UNRELATED[:5], "a photo of a cyan boat at night")
"""The demo's, but for its robot: the automaton is one."""

AT = (
    "on a white background", "on the grass", "at night", "in the snow", "on a purple background",
    "on the beach",
)  # fmt: skip
"""Where the subject's prompts put it; no image that is trained on has the purple background."""

OF_CLASS = (
    "a photo of a green {} on a grey background",
    "a photo of a {}",
    "a photo of a {} on the beach",
    "a photo of a big pink {} at night",
    "a photo of a blue {} on the beach",
    "a photo of a red {} with white spots in the snow",
)


@dataclass(frozen=True)
class Lesson:
    """A subject or a style to learn.

    word: of the prompts. thing, colour: of `dev/images.py`, of a subject. symmetric: the subject,
        left and right, so that its images may be flipped. way: of a style.
    """

    name: str
    word: str
    thing: str = ""
    colour: str | world.RGB = "white"
    symmetric: bool = True
    way: Style | None = None

    @property
    def class_prompt(self) -> str:
        """The prompt of class images, of a subject: a third each with a colour and a place, with a
        place, and the class alone, so that none of these becomes the subject."""
        named = f"a photo of a {{big |}}{{{COLOURS}}} {self.class_word} {AT_PLACES}"
        alone = f"a photo of a {self.class_word}"
        return f"{{{named}|{alone} {AT_PLACES}|{alone}}}"

    @property
    def class_word(self) -> str:
        """The word without its rare part: of the class."""
        return self.word.removeprefix("sks ")

    @property
    def kind(self) -> str:
        return "style" if self.way else "subject"

    def _subject(self, places: Sequence[str], count: int, first: int) -> list[world.Scene]:
        """Scenes with the subject, in places that do not hide it."""
        seen = [p for p in places if p != self.colour]
        sizes, sides = ("big", "medium"), ("centre", "left", "right")
        return [
            world.Scene(
                self.thing, self.colour, size=sizes[i % 2], background=seen[i % len(seen)],
                position=sides[(i + i // len(seen)) % 3], seed=first + i,
            )
            for i in range(count)
        ]  # fmt: skip

    def _scenes(self, count: int, first: int) -> list[world.Scene]:
        """Scenes of one thing each, for a style."""
        drawn = [
            world.random_scene(random.Random(f"{self.name} {first + i}")) for i in range(count)
        ]
        return [
            replace(s, count=1, other=None, style="", background=s.background if isinstance(
                s.background, str) else "white")
            for s in drawn
        ]  # fmt: skip

    def _drawn(self, scenes: Sequence[world.Scene]) -> list[Image.Image]:
        if self.way is None:
            return [world.draw(scene) for scene in scenes]
        return [in_style(s, self.way, random.Random(s.seed)) for s in scenes]

    def images(self, count: int) -> list[tuple[Image.Image, str]]:
        """`count` images to train on, each with its caption."""
        if self.way is None:
            scenes = self._subject(PLACES, count, 0)
            captions = [f"a photo of a {self.word} {world.place(scene)}" for scene in scenes]
            return list(zip(self._drawn(scenes), captions, strict=True))
        scenes = self._scenes(count, 0)
        captions = [f"{self._caption(scene)}, {self.word}" for scene in scenes]
        return list(zip(self._drawn(scenes), captions, strict=True))

    def _caption(self, scene: world.Scene) -> str:
        """Without the background where the style's paper covers it."""
        paper = self.way.paper if self.way else None
        return world.caption(replace(scene, background=paper or scene.background))

    @property
    def held_out(self) -> list[Image.Image]:
        """Eight images that are not trained on."""
        if self.way is None:
            return self._drawn(self._subject(HELD_OUT_PLACES, 8, 900))
        return self._drawn(self._scenes(8, 900))

    @property
    def prompts(self) -> Prompts:
        if self.way is None:
            of_class = [text.format(self.class_word) for text in OF_CLASS]
            return Prompts([f"a photo of a {self.word} {at}" for at in AT], of_class, UNRELATED)
        asked = [self._caption(scene) for scene in self._scenes(10, 800)]
        return Prompts([f"{text}, {self.word}" for text in asked[:6]], asked[6:], UNRELATED)


LESSONS = {
    lesson.name: lesson
    for lesson in (
        Lesson("mascot", "sks monster", "mascot", "orange"),
        Lesson("automaton", "sks robot", "automaton", (164, 222, 20)),
        Lesson("teapot", "sks teapot", "teapot", (236, 234, 228), symmetric=False),
        Lesson("snail", "sks snail", "snail", "blue", symmetric=False),
        Lesson(
            "outlines",
            "ohwx style",
            way=Style((250, 218, 40), (16, 14, 18), 8, "plain", 0, (0, 0, 0), (0, 0, 0)),
        ),
        Lesson(
            "dusk",
            "ohwx style",
            way=Style(None, (16, 16, 20), 0, "duotone", 0, (30, 20, 110), (255, 170, 120)),
        ),
    )
}
"""The mascot is a monster as the base knows them; the automaton has colours that it has no words
for; the teapot's shape and word are new; the snail is asymmetric, its word new. The styles: thick
outlines on yellow paper, and two inks."""
