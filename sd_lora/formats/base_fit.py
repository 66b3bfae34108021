"""A LoRA file and the bases that it may be for: its fit, and how programs read it there."""

from dataclasses import dataclass, field

from sd_lora.formats.canonical import Adapter, count
from sd_lora.formats.lora_file import LoRAFile
from sd_lora.formats.programs import by_kinds, readers
from sd_lora.formats.verify import is_other_base, misfits, other_base, published_for
from sd_lora.models.families import FAMILIES
from sd_lora.models.meta_pipeline import MetaPipeline


@dataclass
class Fit:
    """Verdicts on a file. readers: program → "exact", or its losses; {} if they are unknown."""

    readers: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def fit_of(lora: LoRAFile, base: MetaPipeline, wrong: list[str], is_given: bool) -> Fit:
    """The verdicts for a base.

    wrong: the misfits of the file. is_given: whether the base is the user's own, and not the
    published one of the file's family.
    """
    if not is_given and is_other_base(wrong, lora.adapter):
        return Fit(by_kinds(lora), [other_base(base, wrong)])
    found = Fit(readers(lora, base))
    if wrong:
        of = f"{len(wrong)} of {count(lora.adapter)} deltas"
        found.problems.append(f"{of} do not fit {base.source}: {wrong[0]}")
    return found


def fit_of_any(lora: LoRAFile, adapter: Adapter) -> Fit:
    """The verdicts for a file of no known family: those of the published bases that have a place
    for everything, where these agree.

    adapter: the deltas that can be made.
    """
    bases = [published_for(adapter, family) for family in FAMILIES.values()]
    fitting = [base for base in bases if next(misfits(adapter, base), None) is None]
    verdicts = [readers(lora, base) for base in fitting]
    if not verdicts:
        return Fit(notes=["it fits none of the published bases: give --model to check it"])
    if all(verdict == verdicts[0] for verdict in verdicts):
        return Fit(verdicts[0])
    names = " or ".join(base.family.name for base in fitting)
    return Fit(notes=[f"how programs read it depends on the base: give --family {names}"])
