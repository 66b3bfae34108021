"""Preserved captions: beside each instance, the same image with a caption that is not to change.

The base model's own answer to it is the target, so that no class images are needed: a word for the
class in the place of the trigger word (differential output preservation), or no caption at all
(blank prompt preservation); both as in ai-toolkit.
"""

from dataclasses import dataclass

from sd_lora.config.sources import CaptionRules
from sd_lora.config.wildcards import expanded, has_wildcards
from sd_lora.data.batches.caption_rules import with_other_word
from sd_lora.seeds import seed_for


@dataclass(frozen=True)
class Preservation:
    """The captions that are preserved, and their weight.

    class_word: text in the place of the trigger word, with wildcards another at each use; None: no
        caption.
    weight: factor of the instance's weight. seed: of the run, for wildcards.
    """

    class_word: str | None
    weight: float
    seed: int = 0

    @property
    def varies(self) -> bool:
        """Whether one use of a caption preserves another than the next."""
        return has_wildcards(self.class_word or "")

    def captions(
        self, caption: str | None, rules: CaptionRules, use: int | str
    ) -> list[str | None]:
        """The preserved caption beside an instance's; none beside a dropped one, which learns. use:
        the instance's position in the run."""
        if caption is None:
            return []
        if self.class_word is None:
            return [None]

        def pick(options: list[str], what: str) -> str:
            return options[seed_for(self.seed, "preserved caption", use, what) % len(options)]

        word = expanded(self.class_word, pick)
        return [with_other_word(caption, rules.trigger_word or "", word)]
