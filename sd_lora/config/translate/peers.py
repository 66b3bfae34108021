"""Other trainers: their names for settings, and where a name of theirs leads here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sd_lora.config.schema import OPTIONS
from sd_lora.config.translate import ai_toolkit, kohya, kohya_gui, onetrainer, simpletuner
from sd_lora.config.translate.diffusers import DIFFUSERS
from sd_lora.config.translate.rows import Given, Row, same


def _as_they_are(settings: dict[str, Any]) -> dict[str, Any]:
    return settings


def _none(given: Given) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Peer:
    """Another trainer.

    column: its name in the options' rows. rows: its names that are no single option. prepare: the
    settings of a file by these names. defaults: its values that are others here, where nothing is
    given. families: beginning of a name → row of all names with it that have none. shown: name →
    the name that its file has. derived: names that `prepare` adds.
    """

    label: str
    column: str
    rows: Mapping[str, Row]
    prepare: Callable[[dict[str, Any]], dict[str, Any]] = _as_they_are
    defaults: Callable[[Given], dict[str, Any]] = _none
    families: Mapping[str, Row] = field(default_factory=dict)
    shown: Mapping[str, str] = field(default_factory=dict)
    derived: tuple[str, ...] = ()
    all_rows: dict[str, Row] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for option in OPTIONS.values():
            if self.column in option.names:
                self.all_rows[option.names[self.column]] = same(option)
        self.all_rows.update(self.rows)

    def row(self, name: str) -> Row | None:
        """The row of a name; None for a name that is not known."""
        of_family = (row for start, row in self.families.items() if name.startswith(start))
        return self.all_rows.get(name) or next(of_family, None)


def _scripts(settings: dict[str, Any]) -> dict[str, Any]:
    """sd-scripts' settings with the parts of network_args and optimizer_args as names of their
    own."""
    found = {key: value for key, value in settings.items() if key not in LISTS}
    for key in LISTS:
        value = settings.get(key)
        words = value if isinstance(value, list) else str(value or "").split()
        for word in words:
            name, equals, part = str(word).partition("=")
            found |= {name.strip(" \"'"): part.strip(" \"'")} if equals else {key: word}
    return found


LISTS = ("network_args", "optimizer_args")


PEERS: dict[str, Peer] = {
    "diffusers": Peer("diffusers' scripts", "diffusers", DIFFUSERS),
    "sd-scripts": Peer("sd-scripts", "kohya", kohya.KOHYA, _scripts, kohya.defaults),
    "kohya_ss": Peer(
        "kohya_ss",
        "kohya",
        kohya_gui.KOHYA_GUI,
        lambda settings: _scripts(kohya_gui.prepare(settings)),
        kohya_gui.defaults,
        kohya_gui.FAMILIES,
        kohya_gui.SHOWN,
        ("network_module", "algo"),
    ),
    "onetrainer": Peer(
        "OneTrainer",
        "onetrainer",
        onetrainer.ONETRAINER,
        onetrainer.prepare,
        onetrainer.defaults,
        onetrainer.PREFIXES,
    ),
    "ai-toolkit": Peer(
        "ai-toolkit",
        "ai_toolkit",
        ai_toolkit.AI_TOOLKIT,
        ai_toolkit.prepare,
        ai_toolkit.defaults,
        ai_toolkit.PREFIXES,
    ),
    "simpletuner": Peer(
        "SimpleTuner",
        "simpletuner",
        simpletuner.SIMPLETUNER,
        simpletuner.prepare,
        simpletuner.defaults,
    ),
}
"""Name on the command line → trainer; a name that several know is the first one's."""


def known_elsewhere(name: str) -> tuple[Peer, Row] | None:
    """The trainer that has a setting of this name, and the setting's row.

    An inner name counts alone too where it is plain: `lr` for ai-toolkit's `train.lr`.
    """
    for peer in PEERS.values():
        if name in peer.all_rows:
            return peer, peer.all_rows[name]
    inner = [
        (peer, row)
        for peer in PEERS.values()
        for full, row in peer.all_rows.items()
        if row.here and "." in full and full.rpartition(".")[2] == name
    ]
    return inner[0] if len({row.here for _, row in inner}) == 1 else None
