"""Options of the run itself and of its base model."""

from collections.abc import Iterator, Mapping
from os.path import abspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import field_validator

from sd_lora.config.presets import OF_MODE, Length, preset
from sd_lora.config.rows import (
    FAMILIES,
    MODES,
    PRESETS,
    SAME,
    TRACKERS,
    Mode,
    Section,
    by_mode,
    section,
)
from sd_lora.errors import Problem, UsageError, named
from sd_lora.folders import check_writable
from sd_lora.hub import check_hub_id, check_model_path

if TYPE_CHECKING:
    from sd_lora.config.schema import TrainConfig

T = TypeVar("T", bound="ModelOptions")

PUBLISHED = "published:"
"""Beginning of a base model's name, before its family, that stands for a model not given."""

option = section("run")


class RunOptions(Section):
    """Mode, folders, seed and trackers."""

    # fmt: off
    mode: Mode = option("text_to_image",
        "captioned images, or one subject by DreamBooth",
        choices=MODES)
    preset: str | None = option(None,
        "options that suit a purpose: subject, character, style (`sd-lora presets`); options "
        "that are given override it",
        choices=PRESETS, may_change=True,
        main="options for a purpose (sd-lora presets)")
    output_dir: str = option(None,
        "folder for the LoRA files, checkpoints and samples; with a FOLDER alone, my_robot, it is "
        "my_robot-lora",
        modes=by_mode("sd-model-finetuned-lora", "lora-dreambooth-model"), may_change=True,
        scripts="ABCD", kohya=SAME, onetrainer="output_model_destination", simpletuner=SAME,
        ai_toolkit="training_folder",
        main="folder for the LoRA files", in_record="no")
    metadata_paths: str = option("names",
        "folders and files in the metadata of LoRA files: their names alone, or in full, with "
        "this machine's paths",
        choices=("names", "full"), may_change=True)
    overwrite_output_dir: bool = option(False,
        "replace the LoRA files, checkpoints, samples and log of an earlier run in output_dir",
        may_change=True)
    seed: int | None = option(None,
        "seed of all random draws; random, and printed, if not given",
        may_change=True, scripts="ABCD", kohya=SAME, simpletuner=SAME,
        main="of all random draws; random if not given")
    deterministic: bool = option(False,
        "only kernels that give the same bits at each repeat, for one kind of GPU and one torch; "
        "those are slower, and an operator without one is an error",
        of_all_jobs=True,
        without_gpu="changes nothing: a run repeats there anyway", may_change=True)
    report_to: str | None = option(None,
        "tracker of the losses, not a folder; tensorboard, where installed, if not given",
        choices=TRACKERS, may_change=True, scripts="ABCD", kohya="log_with", simpletuner=SAME,
        ai_toolkit="logging.use_wandb")
    logging_dir: str = option("logs",
        "folder for the tracker's files, inside output_dir",
        may_change=True, scripts="ABCD", kohya=SAME, simpletuner=SAME, in_record="no")
    local_rank: int = option(-1,
        "set by launchers; the LOCAL_RANK environment variable wins",
        of_all_jobs=True, may_change=True, scripts="ABCD", simpletuner=SAME)
    # fmt: on

    @field_validator("output_dir", mode="before")
    @classmethod
    def _in_full(cls, folder: Any) -> Any:
        return str(Path(folder).expanduser()) if isinstance(folder, str) else folder

    @property
    def is_dreambooth(self) -> bool:
        """Whether one subject is learned, by DreamBooth."""
        return self.mode == "dreambooth"

    def check_output(self) -> None:
        """Raise UsageError for an output folder that cannot be written, or is a whole disk."""
        with named("output_dir"):
            place = self.output_path.resolve()
            if place == Path(place.anchor):  # the LoRA file would have no name either
                raise UsageError(
                    f"output_dir {self.output_dir} is the root of a disk: name a folder in it"
                )
            check_writable(self.output_path, "output_dir")

    @property
    def default_length(self) -> tuple[str, Length]:
        """Length of a run that names neither steps nor epochs, and the preset that has it."""
        name = self.preset or OF_MODE[self.mode]
        return name, preset(name).length

    @property
    def output_path(self) -> Path:
        """The folder of the run's files."""
        return Path(self.output_dir)


option = section("model")


class ModelOptions(Section):
    """The base model and its parts."""

    # fmt: off
    pretrained_model_name_or_path: str | None = option(None,
        "base model: a diffusers folder, a hub id, or a single .safetensors or .ckpt "
        "checkpoint (required)",
        of_all_jobs=True, may_change=True, scripts="ABCD", kohya=SAME, onetrainer="base_model_name",
        simpletuner=SAME, ai_toolkit="model.name_or_path",
        short="model", main="base model: folder, hub id or checkpoint", in_record="name")
    revision: str | None = option(None,
        "hub revision of the base model",
        of_all_jobs=True, scripts="ABCD", simpletuner=SAME)
    variant: str | None = option(None,
        "file variant of the base model, for example fp16",
        of_all_jobs=True, scripts="ABCD", simpletuner=SAME)
    tokenizer_name: str | None = option(None,
        "another tokenizer: a folder or a hub id; single checkpoints contain none",
        of_all_jobs=True, may_change=True, scripts="C", in_record="name")
    pretrained_vae_model_name_or_path: str | None = option(None,
        "another VAE: a folder, a hub id or a single file",
        of_all_jobs=True,
        may_change=True, header="ss_vae_name", summary=("VAE", "{}"), scripts="BD", kohya="vae",
        onetrainer="vae.model_name", simpletuner=SAME, ai_toolkit="model.vae_path",
        in_record="name")
    base_precision: str | None = option(None,
        "precision in which the UNet's frozen linear layers are stored, that of the run if not "
        "given; products are in the run's. nf4 takes 4.5 bits a weight, int8 and fp8 take 8, and a "
        "step takes longer",
        of_all_jobs=True,
        choices=("int8", "fp8", "nf4"), package={"nf4": ("bitsandbytes", "quantized")},
        summary=("precision", "linear layers of the UNet stored in {}"),
        less_memory={"a step": (6, "nf4"), "bringing the models to the device": (2, "nf4")})
    offload_weights: bool = option(False,
        "frozen weights of the UNet's blocks wait in the CPU's memory, and those of two blocks at "
        "a time are on the GPU, as those of text encoders and of the VAE where steps need them; "
        "they are copied for each pass, twice for each micro-batch",
        may_change=True, in_record="no", without_gpu="copies weights, and saves no memory",
        less_memory={"a step": (7, True),
            "drawing sample images": (3, True), "bringing the models to the device": (3, True)},
        costs="the UNet goes to the card twice for each micro-batch",
        summary=("offload", "frozen weights of the models' blocks"))
    offload_activations: bool = option(False,
        "what the UNet's backward pass needs of the forward pass waits in the CPU's memory",
        may_change=True, in_record="no", without_gpu="copies activations, and saves no memory",
        summary=("offload", "saved activations"))
    vae_precision: str = option("fp32",
        "precision of the VAE; SDXL's own overflows in fp16",
        of_all_jobs=True, less_memory={"encoding images": (1, "bf16")},
        choices=("fp32", "fp16", "bf16"), summary=("VAE", "{}"), ai_toolkit="model.vae_dtype")
    family: str | None = option(None,
        "required family of the base model, an error for another one; any if not given",
        of_all_jobs=True, choices=FAMILIES, may_change=True, ai_toolkit="model.arch")
    cache_dir: str | None = option(None,
        "folder for downloaded models and data sets",
        of_all_jobs=True, may_change=True, scripts="ABD", simpletuner=SAME, in_record="no")
    # fmt: on

    @property
    def offloads(self) -> bool:
        """Whether weights or activations wait on the CPU."""
        return self.offload_weights or self.offload_activations

    @property
    def base_model(self) -> str:
        """The base model: a folder, a file or a hub id."""
        return str(self.pretrained_model_name_or_path)

    @property
    def hub_options(self) -> dict[str, str | None]:
        """Options of diffusers' `from_pretrained` for files of the hub."""
        return {"revision": self.revision, "variant": self.variant, **self.hub_places}

    @property
    def hub_places(self) -> dict[str, str | None]:
        """Those of `hub_options` that are places of this machine."""
        return {"cache_dir": self.cache_dir}

    def with_base(self: T, name: str) -> T:
        """The same options for another base model: a folder, a file or a hub id."""
        return self.replace(pretrained_model_name_or_path=name)  # type: ignore[attr-defined]

    @property
    def published_family(self) -> str | None:
        """The family whose published shapes stand for a base model that is not given."""
        name = self.base_model
        return name.removeprefix(PUBLISHED) if name.startswith(PUBLISHED) else None

    def check_base(self) -> None:
        """Raise UsageError for a base model or VAE that is not there; the hub is not asked."""
        if self.published_family:
            return
        with named("pretrained_model_name_or_path"):
            check_model_path(self.base_model)
        _ = self.downloads

    @property
    def downloads(self) -> list[str]:
        """Notes on models that the hub will be asked for.

        Raises:
            UsageError: a model that is neither here nor, as far as is known, on the hub.
        """
        models = {
            "pretrained_model_name_or_path": ("model_index.json",),
            "pretrained_vae_model_name_or_path": ("config.json", "vae/config.json"),
        }
        notes = []
        for name, files in models.items():
            with named(name):
                if model := getattr(self, name):
                    notes.append(check_hub_id(model, files, self.cache_dir))
        return [note for note in notes if note]

    def refuse_other_family(self, family: str) -> None:
        """Raise UsageError for a base model of another family than the required one."""
        if self.family not in (None, family):
            raise UsageError(
                f"{self.base_model} is a model of family {family}, and family says {self.family} "
                "(--family, which the _sdxl scripts set)"
            )


def named_after(folder: str) -> dict[str, str]:
    """Options named after a folder of images that is given alone: photos/my_robot → my_robot-lora.

    Empty for a folder without a name, such as /.
    """
    name = Path(folder).expanduser().resolve().name
    return {"output_dir": f"{name}-lora"} if name else {}


def folder_of_job(name: str, own: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, str]:
    """The output folder of one run of several: the one that its table names, or one of its name in
    the common one.

    own: option → value of its table, as far as they count. values: of all runs.
    """
    if own.get("output_dir"):
        return {"output_dir": str(own["output_dir"])}
    usual = RunOptions.model_fields["output_dir"].json_schema_extra
    common = values.get("output_dir") or usual["modes"][values.get("mode", MODES[0])]  # type: ignore[index]
    return {"output_dir": str(Path(str(common)).expanduser() / name)}


def contradictions(config: "TrainConfig") -> Iterator[Problem]:
    """Yield a missing base model, and images in the output folder."""
    name = "pretrained_model_name_or_path"
    if not config.pretrained_model_name_or_path:
        yield Problem(name, f"{name} is required: a folder, a file or a hub id")
    images = [path for name in config.places if isinstance(path := getattr(config, name), str)]
    if config.output_dir and abspath(config.output_dir) in map(abspath, images):
        text = f"output_dir {config.output_dir} is the folder of images"
        remedy = "The next run would train this one's samples: choose another"
        yield Problem("output_dir", text, remedy)
