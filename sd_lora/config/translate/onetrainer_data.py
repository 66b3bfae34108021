"""OneTrainer's concepts, samples and new words → `[[sources]]` tables, a prompt, and words."""

from typing import Any

from sd_lora.config.translate.prompts import of_list
from sd_lora.config.translate.rows import Given, Taken, is_off, number, truth, whole


def concept_table(concept: dict[str, Any]) -> dict[str, Any]:
    """A `[[sources]]` table of a concept."""
    text, image = concept.get("text") or {}, concept.get("image") or {}
    table: dict[str, Any] = {"path": str(concept.get("path", ""))}
    if is_off(concept.get("include_subdirectories")):
        table["recursive"] = False
    repeats = number(concept.get("balancing", concept.get("repeats", 1)) or 1)
    if repeats >= 2 and str(concept.get("balancing_strategy", "REPEATS")).upper() == "REPEATS":
        table["repeats"] = round(repeats)
    if number(concept.get("loss_weight", 1)) != 1:
        table["weight"] = number(concept["loss_weight"])
    if str(concept.get("type", "STANDARD")).upper() == "PRIOR_PREDICTION":
        table["kind"] = "class"
    captions = {"sample": "sidecar", "filename": "filename"}
    source = str(text.get("prompt_source", "sample")).lower()
    if source in captions:
        table["captions"] = captions[source]
        table |= {"wildcards": True} if source == "sample" else {}  # one of several lines
    if truth(text.get("enable_tag_shuffling", False)):
        table |= {"shuffle_caption": True, "keep_tokens": whole(text.get("keep_tags_count", 1))}
        table |= {"caption_separator": text["tag_delimiter"]} if text.get("tag_delimiter") else {}
    if truth(text.get("tag_dropout_enable", False)):
        table["caption_tag_dropout"] = number(text.get("tag_dropout_probability", 0))
    if truth(image.get("enable_random_flip", False)):
        table["random_flip"] = True
    return table


CHANGES = {
    *(f"enable_{how}_{name}" for how in ("random", "fixed")
      for name in ("rotate", "brightness", "contrast", "saturation", "hue")),
    "enable_fixed_flip", "enable_resolution_override", "enable_random_circular_mask_shrink",
    "enable_random_mask_rotate_crop",
}  # fmt: skip
"""Keys of a concept's image that change it, and are not there."""


def concept_losses(concept: dict[str, Any]) -> list[str]:
    """Settings of a concept that are not there."""
    text, image = concept.get("text") or {}, concept.get("image") or {}
    found = [f"image.{key}" for key, value in image.items() if key in CHANGES and not is_off(value)]
    if image.get("enable_crop_jitter", True):
        found.append("image.enable_crop_jitter (random_crop = true cuts anywhere, without a cache)")
    if str(text.get("prompt_source", "sample")).lower() == "concept":
        found.append("text.prompt_source concept (prompt says one caption)")
    mode = str(text.get("tag_dropout_mode", "FULL")).upper()
    if truth(text.get("tag_dropout_enable", False)) and mode != "RANDOM":
        found.append(f"text.tag_dropout_mode {mode} (each tag is dropped by itself)")
    found += [f"text.{key}" for key in ("caps_randomize_enable",) if not is_off(text.get(key))]
    if str(concept.get("balancing_strategy", "REPEATS")).upper() == "SAMPLES":
        found.append("balancing_strategy SAMPLES (repeats count uses of each image)")
    return found


def concepts(value: Any, given: Given) -> Taken:
    rows = [row for row in value or [] if isinstance(row, dict) and row.get("enabled", True)]
    left_out = [r for r in rows if str(r.get("type", "")).upper() == "VALIDATION"]
    rows = [row for row in rows if row not in left_out]
    if not rows:
        return Taken("absent", reason="has no concept to train; give --train_data_dir")
    losses = sorted({loss for row in rows for loss in concept_losses(row)})
    losses += [f"validation concept {row.get('path')}" for row in left_out]
    reason = f"not there: {', '.join(losses)}" if losses else ""
    return Taken("otherwise", {"sources": [concept_table(row) for row in rows]}, reason)


def concept_file(value: Any, given: Given) -> Taken:
    if given.get("concepts"):
        return Taken("needless", reason="counts for nothing: concepts are given")
    rows = _rows_of(str(value), given)
    if rows is None:
        return Taken("absent", reason="is a file that cannot be read here; give --train_data_dir")
    return concepts(rows, given)


def sample_file(value: Any, given: Given) -> Taken:
    if given.get("samples"):
        return Taken("needless", reason="counts for nothing: samples are given")
    rows = _rows_of(str(value), given)
    if rows is None:
        reason = "is a file that cannot be read here; give --sample_prompts"
        return Taken("absent", reason=reason)
    return of_list([row for row in rows if row.get("enabled", True)])


def _rows_of(path: str, given: Given) -> list[dict[str, Any]] | None:
    """The tables in a JSON list; None if there is no such file."""
    rows = given.load(path)
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else None


def embeddings(value: Any, given: Given) -> Taken:
    rows = [row for row in value or [] if isinstance(row, dict) and row.get("train", True)]
    if not rows:
        return Taken("needless", reason="is empty")
    counts = {whole(row.get("token_count") or 1) for row in rows}
    found: dict[str, Any] = {
        "token_abstraction": ",".join(str(row.get("placeholder", "<embedding>")) for row in rows),
        "num_new_tokens_per_abstraction": max(counts),
        "initializer_token": ",".join(str(r.get("initial_embedding_text", "*")) for r in rows),
    }
    return Taken("otherwise", found, "is files of their own, with one count of vectors for all")
