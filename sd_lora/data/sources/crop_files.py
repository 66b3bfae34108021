"""Crops by hand, kept in `crops.json` beside the images: a name → its crop."""

import json
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sd_lora.data.images.hand_crops import LEAST_PART, HandCrop
from sd_lora.data.sources.folders import FolderTree
from sd_lora.data.sources.samples import printable_path
from sd_lora.errors import UsageError
from sd_lora.files import utf8_text, write_whole
from sd_lora.findings import Finding

CROPS = "crops.json"
"""Name of the file, in the folder of the images that it names."""

LARGEST = 2**26
"""Bytes of the file: a million images."""


def is_crop_file(path: Path) -> bool:
    """Whether a file of a folder holds the crops of its images, by its name."""
    return path.name == CROPS


def crops_of(tree: FolderTree) -> dict[Path, HandCrop]:
    """Image of a tree → its crop by hand; adds findings on crops of images that are not there.

    Raises:
        UsageError: as `read_crops`.
    """
    files = [path for path in tree.files if is_crop_file(path)]
    images = {_key(path): path for path in tree.images} if files else {}
    found = {}
    for file in files:
        for name, crop in read_crops(file).items():
            image = images.get(_key(file.parent / name))
            if image is None:
                details = f"{printable_path(file)} names it"
                place = printable_path(file.parent / name)
                tree.findings.append(Finding("orphan-crop", place, details))
                continue
            found[image] = crop
    return found


def _key(path: Path) -> Path:
    """A path whose name is in composed Unicode form: macOS writes é as two signs."""
    return path.with_name(unicodedata.normalize("NFC", path.name))


def read_crops(file: Path) -> dict[str, HandCrop]:
    """Name of an image in the file's folder → its crop.

    Raises:
        UsageError: a file that cannot be read, or an entry that is no crop; all of these.
    """
    where = printable_path(file)
    try:
        values = json.loads(utf8_text(file, LARGEST))
    except UsageError as error:
        raise UsageError(f"{where} {error}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} is no JSON: {error}") from None
    if not isinstance(values, dict):
        raise UsageError(f'{where} holds no object such as {{"1.png": [0.5, 0.3]}}')
    wrong = [name for name, value in values.items() if not _is_entry(name, value)]
    if wrong:
        lines = "".join(f"\n  {name!r}: {json.dumps(values[name])[:60]}" for name in wrong[:20])
        raise UsageError(
            f"{where} gives the name of an image in its folder and two numbers from 0 to 1, the "
            "middle of its crop as parts of width and height, and with a third one, from "
            f"{LEAST_PART} to 1, its size as part of the largest; but not in:{lines}"
        )
    return {name: HandCrop(*map(float, value)) for name, value in values.items()}


def _is_entry(name: str, value: Any) -> bool:
    if "\0" in name or name in ("", ".", "..") or Path(name).name != name:
        return False
    return isinstance(value, list) and is_crop(value)


def is_crop(numbers: Sequence[Any]) -> bool:
    """Whether numbers are a crop by hand: two parts of sides, and the part of the largest crop."""
    leasts = (0, 0, LEAST_PART)[: len(numbers)]
    return len(numbers) in (2, 3) and all(
        isinstance(n, int | float) and not isinstance(n, bool) and least <= n <= 1
        for n, least in zip(numbers, leasts, strict=True)
    )


def write_crops(folder: Path, changes: Mapping[str, HandCrop | None]) -> None:
    """Write the crops of images of a folder beside them; None takes one away. A file that names
    none is removed.

    Raises:
        UsageError: as `read_crops`, of the file that is there.
        RunError: a file that cannot be written.
    """
    file = folder / CROPS
    crops: dict[str, HandCrop | None] = {}
    crops.update(read_crops(file) if file.is_file() else {})
    crops.update(changes)
    lines = [
        f"{json.dumps(name, ensure_ascii=False)}: {json.dumps(crop.numbers)}"
        for name, crop in sorted(crops.items())
        if crop is not None
    ]
    if lines:
        write_whole(file, ("{\n" + ",\n".join(lines) + "\n}\n").encode())
    else:
        file.unlink(missing_ok=True)
