"""Preserved captions: beside each instance, the same image with a caption that is not to change.

The base model's own answer to it is the target, so that no class images are needed: a word for the
class in the place of the trigger word (differential output preservation), or no caption at all
(blank prompt preservation); both as in ai-toolkit.
"""

from dataclasses import dataclass

from sd_lora.config.sources import CaptionRules
from sd_lora.data.batches.caption_rules import with_other_word


@dataclass(frozen=True)
class Preservation:
    """The captions that are preserved, and their weight.

    class_word: text in the place of the trigger word; None: no caption.
    weight: factor of the instance's weight.
    """

    class_word: str | None
    weight: float

    def captions(self, caption: str | None, rules: CaptionRules) -> list[str | None]:
        """The preserved caption beside an instance's; none beside a dropped one, which learns."""
        if caption is None:
            return []
        if self.class_word is None:
            return [None]
        return [with_other_word(caption, rules.trigger_word or "", self.class_word)]
