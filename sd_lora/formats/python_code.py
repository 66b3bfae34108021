"""Python code to paste: diffusers' pipeline of a base model, with LoRA files, drawing an image."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class PipelineCode:
    """A pipeline of diffusers, in Python code.

    Parts of a base may be stored in several dtypes, and libraries load each as it is stored: the
    code names one dtype for all.

    base: a folder, a hub id or a single file.
    of_file: diffusers' class for a single file.
    options: further arguments of `from_pretrained`.
    scheduler: settings that differ from the base's own.
    gpu: whether to compute on a GPU.
    dtype: torch's name of the dtype there; on a CPU it is float32, where half precision is slow.
    """

    base: str
    of_file: str
    options: Mapping[str, Any] = field(default_factory=dict)
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    gpu: bool = False
    dtype: str = "float16"

    def lines(
        self, loading: Sequence[str], prompt: str | None, arguments: Mapping[str, Any] | None = None
    ) -> list[str]:
        """Lines of code, without indentation: they run as pasted, in any folder.

        loading: lines that load LoRA files and new words into `pipe`.
        prompt: of the image; None for a pipeline that needs an image to start from.
        arguments: of the call that draws.
        """
        path = Path(self.base).expanduser()
        base, name, load = self.base, "DiffusionPipeline", "from_pretrained"
        given = {key: value for key, value in self.options.items() if value is not None}
        if path.is_file():
            name, load, given = self.of_file, "from_single_file", {}
        if path.exists():
            base = str(path.resolve())
        dtype, place = (self.dtype, '.to("cuda")') if self.gpu else ("float32", "")
        found = f"{base!r}, dtype=torch.{dtype}{_arguments(given)}"
        kind, imported = "type(pipe.scheduler)", name
        if "use_flow_sigmas" in self.scheduler:  # which few schedulers know
            kind = "DPMSolverMultistepScheduler"
            imported = f"{name}, {kind}"
        code = ["import torch", f"from diffusers import {imported}", ""]
        code.append(f"pipe = {name}.{load}({found}){place}")
        if self.scheduler:
            changed = f"pipe.scheduler.config{_arguments(self.scheduler)}"
            code.append(f"pipe.scheduler = {kind}.from_config({changed})")
        code += loading
        if prompt is not None:
            drawn = f"pipe({prompt!r}{_arguments(arguments or {})})"
            code.append(f'{drawn}.images[0].save("image.png")')
        return code


def _arguments(values: Mapping[str, Any]) -> str:
    return "".join(f", {name}={value!r}" for name, value in values.items())


def loading_line(path: Path) -> str:
    """The line that loads a LoRA file into `pipe`.

    With a folder and a name, since diffusers looks a file's own path up on the hub when offline.
    """
    folder = str(path.parent.resolve())
    return f"pipe.load_lora_weights({folder!r}, weight_name={path.name!r})"


def skipping_lines(layers: int) -> list[str]:
    """The lines that leave out the text encoder's last layers, of a pipeline with one encoder.

    diffusers' own argument for that fails with transformers 5 (diffusers 0.42.1).
    """
    return [
        'encoder = getattr(pipe.text_encoder, "text_model", pipe.text_encoder).encoder',
        f"del encoder.layers[-{layers}:]  # clip skip {layers}",
    ]
