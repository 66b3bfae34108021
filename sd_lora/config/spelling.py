"""The names by which a person gives options: flags as typed, keys of a file, FOLDER."""

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from sd_lora.config.options.sources import FOLDER
from sd_lora.config.rows import Option
from sd_lora.errors import RunError, UsageError


@dataclass(frozen=True)
class Spelling:
    """Option → its name in messages; a configuration made in Python has the options' own names.

    given: option → the word that gave it: "--lr", "FOLDER", or its key in a file.
    others: option → its name where it is not given. They make no configuration another one.
    """

    given: Mapping[str, str] = field(default_factory=dict, compare=False)
    others: Mapping[str, str] = field(default_factory=dict, compare=False)

    def name_of(self, option: str) -> str:
        """The name of an option."""
        return self.given.get(option) or self.others.get(option, option)

    def text(self, text: str) -> str:
        """A message with these names.

        A name of one word, such as rank, is an English word too: it is the option's where it begins
        a line. Quoted words, flags and parts of paths stay as they are.
        """
        if not self.others:
            return text
        long = "|".join(sorted((n for n in self.others if "_" in n), key=len, reverse=True))
        plain = "|".join(n for n in self.others if "_" not in n)
        found = rf"(?<![\w/\\.'\"-])({long})(?![\w/\\'\"=]|\.\w)|^({plain})(?= )"
        return re.sub(found, lambda match: self.name_of(match[0]), text, flags=re.MULTILINE)

    @contextmanager
    def in_errors(self) -> Iterator[None]:
        """Put these names into the errors of a block."""
        try:
            yield
        except (UsageError, RunError) as error:
            error.args = (self.text(str(error)), *error.args[1:])
            if isinstance(error, UsageError):
                error.problems = [
                    replace(p, text=self.text(p.text), remedy=self.text(p.remedy))
                    for p in error.problems
                ]
            raise


def spelling_of(
    options: Mapping[str, Option],
    flags: Mapping[str, str],
    keys: Collection[str] | None,
    of_script: bool,
) -> Spelling:
    """The names that a command line gives to options.

    Args:
        options: all rows.
        flags: option → the word that gave it.
        keys: options in the configuration file; None without a file.
        of_script: whether the flags are diffusers', which have no short ones.
    """
    given = {name: name for name in keys or ()} | dict(flags)
    if keys is not None:  # the place for what is missing
        return Spelling(given, {name: name for name in options})
    if of_script:
        return Spelling(given, {name: f"--{name}" for name in options})
    short = {name: f"--{option.short or name}" for name, option in options.items()}
    return Spelling(given, short | dict.fromkeys(FOLDER.values(), "FOLDER"))
