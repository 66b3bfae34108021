"""kohya's dataset config: what it says is what is trained, or an error that names it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from sd_lora.config.kohya import read_dataset_config
from sd_lora.config.sources import CaptionRules, SourceSpec
from sd_lora.data.batches.caption_rules import caption_of
from sd_lora.data.sources.open import open_source
from sd_lora.errors import UsageError

WHOLE = """
[general]
shuffle_caption = true
caption_extension = '.txt'
keep_tokens = 1
flip_aug = true
color_aug = false
validation_split = 0.0

[[datasets]]
resolution = 512
batch_size = 4
keep_tokens = 2
enable_bucket = true
bucket_no_upscale = true
bucket_reso_steps = 32
min_bucket_reso = 256
max_bucket_reso = 1024

  [[datasets.subsets]]
  image_dir = 'hoge'
  class_tokens = 'hoge girl'
  num_repeats = 10
  caption_dropout_rate = 0.1
  caption_tag_dropout_rate = 0
  alpha_mask = true

  [[datasets.subsets]]
  image_dir = 'fuga'
  class_tokens = 'fuga boy'
  keep_tokens = 3
  flip_aug = false
  random_crop = true
  enable_wildcard = true
  keep_tokens_separator = '|||'
  caption_separator = ';'
  caption_suffix = 'film'
  alpha_mask = true

  [[datasets.subsets]]
  is_reg = true
  image_dir = 'reg'
  class_tokens = 'human'
  shuffle_caption = false
  alpha_mask = true

[[datasets]]
resolution = [512, 512]

  [[datasets.subsets]]
  image_dir = 'piyo'
  metadata_file = 'piyo_md.json'
  alpha_mask = true
"""


def read(tmp_path: Path, text: str, name: str = "set.toml") -> tuple:
    (tmp_path / name).write_text(text, encoding="utf-8")
    return read_dataset_config(str(tmp_path / name))


def test_a_whole_config(tmp_path: Path) -> None:
    """Every key that is read arrives, the nearest table that says it wins, and what the second
    dataset leaves unsaid is noted."""
    specs, settings, notes = read(tmp_path, WHOLE)
    hoge = SourceSpec(
        path="hoge",
        layout="plain",
        recursive=False,
        captions="sidecar",
        caption_extension=".txt",
        prompt="hoge girl",
        repeats=10,
        random_flip=True,
        random_crop=False,
        rules=CaptionRules(caption_dropout=0.1, shuffle_caption=True, keep_tokens=2),
    )
    assert specs[0] == hoge
    assert specs[1].rules == CaptionRules(
        shuffle_caption=True,
        keep_tokens=3,
        keep_tokens_separator="|||",
        caption_separator=";",
        caption_suffix="film",
        wildcards=True,
    )
    assert (specs[1].random_flip, specs[1].random_crop) == (False, True)
    assert (specs[2].kind, specs[2].prompt, specs[2].rules.shuffle_caption) == (
        "class",
        "human",
        False,
    )
    assert (specs[3].captions, specs[3].metadata_file) == ("metadata", "piyo_md.json")
    assert specs[3].rules.keep_tokens == 1
    assert settings == {
        "resolution": 512,
        "train_batch_size": 4,
        "aspect_ratio_buckets": True,
        "bucket_no_upscale": True,
        "bucket_step": 32,
        "bucket_min_side": 256,
        "bucket_max_side": 1024,
        "alpha_mask": True,
    }
    assert {note.code for note in notes} == {"setting-shared", "prefix-in-place"}
    assert "dataset 2: says nothing of batch_size" in notes[1].line()


def test_json_says_the_same(tmp_path: Path) -> None:
    """A JSON config is read as a TOML one."""
    data = {"datasets": [{"batch_size": 2, "subsets": [{"image_dir": "a", "num_repeats": 3}]}]}
    (spec,), settings, notes = read(tmp_path, json.dumps(data), "set.json")
    assert (spec.path, spec.repeats, settings) == ("a", 3, {"train_batch_size": 2})
    assert [note.code for note in notes] == ["caption-extension"]


SUBSET = "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SUBSET + "num_repeat = 2", "dataset 1, subset 1: num_repeat is unknown. Did you mean num"),
        (SUBSET + "num_repeats = '2'", "num_repeats must be a whole number, not '2'"),
        (SUBSET + "num_repeats = true", "num_repeats must be a whole number, not True"),
        (SUBSET + "flip_aug = 1", "flip_aug must be true or false, not 1"),
        (SUBSET + "num_repeats = -1", "repeats must be at least 1, not -1"),
        (SUBSET + "caption_dropout_rate = 2", "caption_dropout must be at least 0 and below 1"),
        (SUBSET + "caption_separator = ''", "caption_separator must not be empty"),
        (SUBSET + "batch_size = 2", "batch_size belongs in [[datasets]] or [general]"),
        (
            "[general]\nimage_dir = 'a'\n" + SUBSET,
            "[general]: image_dir belongs in [[datasets.subs",
        ),
        ("[general]\nresolution = 'x'\n" + SUBSET, "resolution must be a whole number"),
        ("[general]\nresolution = [1, 2, 3]\n" + SUBSET, "resolution must be a whole number"),
        ("[general]\nbatch_size = 0\n" + SUBSET, "train_batch_size must be at least 1, not 0"),
        ("[genral]\n" + SUBSET, "'genral' is not [general] or [[datasets]]. Did you mean general"),
        ("[[datasets]]\n[[datasets.subsets]]\nis_reg = true", "subset 1 has no image_dir"),
        ("[[datasets]]\nbatch_size = 1", "dataset 1 has no [[datasets.subsets]]"),
        ("[general]\n", "needs [[datasets]] with [[datasets.subsets]]"),
        ("[datasets]\n", "needs [[datasets]] with [[datasets.subsets]]"),
        (SUBSET + "num_repeats = 0", "every subset is left out"),
        ("datasets = [", "is not TOML"),
        (
            SUBSET + "[[datasets.subsets]]\nimage_dir='b'\nalpha_mask=true",
            "subset 2 has alpha_mask",
        ),
    ],
)
def test_what_cannot_be_meant(text: str, message: str, tmp_path: Path) -> None:
    """Unknown keys, keys in a wrong table, wrong types and ranges, each with where it stands."""
    with pytest.raises(UsageError) as caught:
        read(tmp_path, text)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "set.toml"))


def test_what_is_not_supported_is_named_at_once(tmp_path: Path) -> None:
    """All keys that would change something are in one error with their reasons; those that change
    nothing are not."""
    text = """
    [general]
    color_aug = true
    cache_info = false
    token_warmup_min = 3
    token_warmup_step = 0
    secondary_separator = ';;;'
    [[datasets]]
    validation_split = 0.1
    validation_seed = 3
    network_multiplier = 1.0
    [[datasets.subsets]]
    image_dir = 'a'
    face_crop_aug_range = [1.0, 2.0]
    caption_dropout_every_n_epochs = 2
    numrepeats = 2
    """
    with pytest.raises(UsageError) as caught:
        read(tmp_path, text)
    said = str(caught.value)
    for key in (
        "color_aug ([general]): colours",
        "secondary_separator ([general])",
        "validation_split (dataset 1)",
        "face_crop_aug_range",
        "caption_dropout_every_n_epochs (dataset 1, subset 1): use caption_dropout_rate",
        "numrepeats is unknown",
    ):
        assert key in said
    for key in ("cache_info", "token_warmup", "validation_seed", "network_multiplier"):
        assert key not in said


def test_datasets_that_disagree(tmp_path: Path) -> None:
    """A run has one batch size and one way to make shapes: the error names both datasets and both
    values; what one of them leaves unsaid is no difference."""
    second = SUBSET.replace("[[datasets]]", "[[datasets]]\nenable_bucket = false\nbatch_size = 2")
    first = SUBSET.replace("[[datasets]]", "[[datasets]]\nenable_bucket = true")
    with pytest.raises(UsageError) as caught:
        read(tmp_path, first + second)
    assert "dataset 1 has enable_bucket = True, dataset 2 has False" in str(caught.value)
    assert "batch_size" not in str(caught.value)


def test_datasets_of_several_resolutions(tmp_path: Path) -> None:
    """One folder in several datasets, each with a resolution and sides of its own, which its
    sources have; the largest is the run's, and a dataset that says none is noted."""
    tables = ("resolution = 512\nmax_bucket_reso = 768", "resolution = [768, 512]", "")
    tables += ("resolution = [1024, 1024]\nmax_bucket_reso = 2048\nmin_bucket_reso = 512",)
    text = "[general]\nenable_bucket = true\n"
    text += "".join(SUBSET.replace("[[datasets]]", f"[[datasets]]\n{table}") for table in tables)
    specs, settings, notes = read(tmp_path, text)
    assert [spec.path for spec in specs] == ["a"] * 4
    assert [spec.resolutions for spec in specs] == [[512], [624], None, [1024]]
    assert [spec.bucket_max_side for spec in specs] == [768, None, None, 2048]
    assert settings == {"resolution": 1024, "aspect_ratio_buckets": True, "bucket_min_side": 512}
    silent = [note.line() for note in notes if note.code == "setting-shared"]
    assert [line.split(": ")[0].rpartition(", ")[2] for line in silent] == ["dataset 3", "3", "3"]
    text = text.replace("resolution = 512", "resolution = 0")
    with pytest.raises(UsageError, match="dataset 1: resolution must be at least 1, not 0"):
        read(tmp_path, text)


def test_masks_of_a_subset(tmp_path: Path) -> None:
    """conditioning_data_dir is the folder of a subset's masks; empty, there is none."""
    specs = read(tmp_path, SUBSET + "conditioning_data_dir = 'masks'")[0]
    assert [spec.mask_folder for spec in specs] == ["masks"]
    assert read(tmp_path, SUBSET + "conditioning_data_dir = ''")[0][0].mask_folder is None


@pytest.mark.parametrize(
    ("buckets", "code", "level"),
    [("true", "resolution-area", "note"), ("false", "resolution", "warning")],
)
def test_resolutions_that_are_no_square(
    buckets: str, code: str, level: str, tmp_path: Path
) -> None:
    """[width, height] is the side of a square of that area at most; without buckets, a warning."""
    text = f"[general]\nresolution = [768, 512]\nenable_bucket = {buckets}\n{SUBSET}"
    _, settings, notes = read(tmp_path, text)
    assert settings["resolution"] == 624
    assert 624**2 <= 768 * 512 < 632**2
    (note,) = [note for note in notes if note.code == code]
    assert note.level == level
    assert "768×512 is read as 624×624" in note.text


def test_subsets_that_are_left_out(tmp_path: Path) -> None:
    """A subset with 0 repeats, and one that is given twice in a dataset, are left out by name."""
    text = SUBSET + (
        "[[datasets.subsets]]\nimage_dir = './a'\n"
        "[[datasets.subsets]]\nimage_dir = 'b'\nnum_repeats = 0\n"
    )
    specs, _, notes = read(tmp_path, text)
    assert [spec.path for spec in specs] == ["a"]
    assert [(n.level, n.code) for n in notes[1:]] == [
        ("left out", "subset-twice"),
        ("left out", "no-repeats"),
    ]


def test_a_prefix_with_marks(tmp_path: Path) -> None:
    """The example of kohya's documentation: tags of prefix and suffix stay, and the marks go; the
    tags of a prefix count among those that are kept."""
    text = SUBSET + (
        "shuffle_caption = true\nkeep_tokens_separator = '|||'\n"
        "caption_prefix = '1girl, hatsune miku, vocaloid |||'\n"
        "caption_suffix = ', anime screencap ||| masterpiece, rating: general'\n"
    )
    (spec,), _, notes = read(tmp_path, text)
    assert caption_of(("x",), spec.rules, (0,)) == (
        "1girl, hatsune miku, vocaloid, x , anime screencap, masterpiece, rating: general"
    )
    assert [note.code for note in notes] == ["prefix-in-place", "caption-extension"]
    text = SUBSET + "shuffle_caption = true\nkeep_tokens = 3\ncaption_prefix = 'good, best, '"
    assert read(tmp_path, text)[0][0].rules.keep_tokens == 1


def test_the_images_of_a_config(tmp_path: Path) -> None:
    """Without caption_extension both .txt and kohya's .caption are read; class tokens are for
    images without one; folders below and metadata beside are not read."""
    folder = tmp_path / "10_name that says nothing"
    (folder / "below").mkdir(parents=True)
    for name in ("a", "b", "c", "below/d"):
        Image.new("RGB", (8, 8)).save(folder / f"{name}.png")
    (folder / "a.txt").write_text("an a")
    (folder / "b.caption").write_text("a b")
    (folder / "metadata.jsonl").write_text("broken")
    text = SUBSET.replace("'a'", f"'{folder}'") + "class_tokens = 'some class'\n"
    (spec,), _, _ = read(tmp_path, text)
    (source,) = open_source(spec)
    assert [sample.captions for sample in source.rows()] == [("an a",), ("a b",), ("some class",)]
    assert [(f.level, f.code) for f in source.findings] == [
        ("left out", "subfolder"),
        ("note", "metadata-ignored"),
    ]


def test_missing_and_unreadable_configs(tmp_path: Path) -> None:
    """No file, no UTF-8, no object."""
    with pytest.raises(UsageError, match="does not exist"):
        read_dataset_config(str(tmp_path / "none.toml"))
    (tmp_path / "a.json").write_bytes(b'"\xff"')
    with pytest.raises(UsageError, match="a.json is not UTF-8 text"):
        read_dataset_config(str(tmp_path / "a.json"))
    with pytest.raises(UsageError, match=r"needs \[\[datasets\]\]"):
        read(tmp_path, "[1]", "b.json")


def test_reading_needs_no_torch() -> None:
    """Specifications and configs are read before anything heavy is loaded."""
    code = "import sys, sd_lora.config.kohya, sd_lora.config.sources; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
