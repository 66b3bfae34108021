"""Single checkpoints in the original layout: SD1, SD2, SDXL base and refiner, and inpainting.

Such a file has no configuration: it is inferred from the tensors' names and shapes, and diffusers'
own converters then load one part at a time, with no hub.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm
from torch import Tensor, nn
from transformers import CLIPTextConfig

from sd_lora.errors import UsageError
from sd_lora.models import recognise
from sd_lora.models.families import FAMILIES
from sd_lora.models.folder import CLASSES, quiet
from sd_lora.models.original import Layout, open_clip_parameter, unet_to_original

Config = dict[str, Any]


# Width → layers in use. SD2 reads OpenCLIP-H's state before the last of its 24 layers, and files
# come with 23, with 24, and with zeros for the 24th; of SDXL's second the pipeline picks a state.
_LAYERS = {768: 12, 1024: 23, 1280: 32}

# What files have and models do not use: the discriminator that a VAE was trained with, buffers of
# CLIP, and a projection that CLIPTextModel has not.
_UNUSED = {
    "unet": "$^",
    "vae": r"loss\.|model_ema\.",
    "text_encoder": r".*\b(position_ids|attn_mask|logit_scale|text_projection)\b",
    "text_encoder_2": r".*\b(position_ids|attn_mask|logit_scale)$",
}

# diffusers' names in a VAE → the original's, in this order
_VAE_NAMES = {
    "mid_block.attentions.0.group_norm": "mid.attn_1.norm",
    "mid_block.attentions.0.to_out.0": "mid.attn_1.proj_out",
    "mid_block.attentions.0.to_": "mid.attn_1.",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "resnets": "block",
    "down_blocks": "down",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
}


_EDM_V = "edm_vpred.sigma_max"


@dataclass(frozen=True)
class SingleFile:
    """A single checkpoint: what its tensors' names and shapes say of the model.

    path: of the file. shapes: key → shape of every tensor. header: a safetensors file's metadata.
    """

    path: Path
    shapes: Mapping[str, recognise.Shape]
    header: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path) -> "SingleFile":
        """Reads names and shapes, no weights (of pickles before torch 1.6 all, to be dropped).

        Raises:
            UsageError: broken, cut off, no checkpoint, a pickle of more than tensors, a LoRA, a VAE
                or text encoder alone, or a model of another kind, which is named.
        """
        file = recognise.TensorsOfFile(path)
        other = recognise.other_kind(file.shapes)
        if other:
            raise UsageError(f"{path} is {other}; what is needed is a checkpoint of SD 1, 2 or XL")
        single = cls(path, file.shapes, file.header)
        _ = single.configs  # what cannot be understood is told now
        return single

    @cached_property
    def family(self) -> str:
        """Name of its family: "sd1", "sd2", "sdxl" or "sdxl_refiner", inpainting or not."""
        if recognise.ADDED not in self.shapes:
            return "sd2" if len(self.shapes[recognise.PROJ_IN]) == 2 else "sd1"
        encoder = self._prefix("text_encoder_2")
        wide = self.shapes[recognise.TEXT_KEYS][-1] == 1280  # of a refiner's UNet alone
        return (
            "sdxl_refiner" if encoder == recognise.REFINER or wide and encoder is None else "sdxl"
        )

    @property
    def prediction_type(self) -> str | None:
        """What it predicts: "epsilon" or "v_prediction"; None for an SD2 that does not say it."""
        said = self.header.get("modelspec.prediction_type")
        marks = {"v_pred", _EDM_V} & self.shapes.keys()
        if marks or said in ("v", "v_prediction"):
            return "v_prediction"
        return None if self.family == "sd2" and said != "epsilon" else "epsilon"

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether it says that the last step has no signal (a tensor "ztsnr")."""
        return "ztsnr" in self.shapes

    @property
    def edm(self) -> bool:
        """Whether it is in EDM's formulation, as Playground v2.5 ("edm_mean", "edm_std") and CosXL
        (its largest and smallest σ)."""
        return "edm_mean" in self.shapes or _EDM_V in self.shapes

    def scheduler_config(self, prediction_type: str) -> Config:
        """Returns what `from_config` of the scheduler named in it ("_class_name") takes.

        Args:
            prediction_type: "epsilon" or "v_prediction"; EDM has its own, whatever is said here.
        """
        config: Config = {"_class_name": "EDMEulerScheduler", "num_train_timesteps": 1000}
        if _EDM_V in self.shapes:
            file = recognise.TensorsOfFile(self.path)
            ends = {f"sigma_{end}": float(file[f"edm_vpred.sigma_{end}"]) for end in ("min", "max")}
            kind = {"sigma_data": 1.0, "sigma_schedule": "exponential"}
            return config | ends | kind | {"prediction_type": "v_prediction"}
        if self.edm:
            sigmas = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5}
            return config | sigmas | {"prediction_type": "epsilon"}
        zero = self.zero_terminal_snr
        return config | {
            "_class_name": "DDPMScheduler",
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "clip_sample": False,
            "set_alpha_to_one": False,
            "steps_offset": 1,
            "prediction_type": prediction_type,
            # "leading" never visits the last step, the one without signal
            "timestep_spacing": "trailing" if zero else "leading",
            "rescale_betas_zero_snr": zero,
        }

    @cached_property
    def configs(self) -> dict[str, Config]:
        """Part ("unet", …) → arguments of its class's configuration, for the parts in the file.

        Raises:
            UsageError: tensors that no such model has.
        """
        try:
            encoders = [p for p in ("text_encoder", "text_encoder_2") if self._prefix(p)]
            text = {part: self._text(part) for part in encoders}
            unet = self._unet(text.get("text_encoder_2", {}).get("projection_dim"))
            vae = {"vae": self._vae(unet["sample_size"])} if self._prefix("vae") else {}
        except recognise.FAILURES as error:
            raise UsageError(
                f"{self.path} is incomplete or another kind of model: no configuration can be told "
                f"from its tensors ({recognise.reason(error)})"
            ) from None
        return {"unet": unet, **vae, **text}

    def _prefix(self, part: str) -> str | None:
        """Returns what a part's keys begin with in this file, None if it has no such part."""
        found = (
            p for p in recognise.PREFIXES[part] if any(key.startswith(p) for key in self.shapes)
        )
        return next(found, None)

    def _keys(self, part: str) -> dict[str, str]:
        """Returns a part's keys, without their prefix → the keys in the file."""
        prefix = self._prefix(part) or ""
        old = f"{prefix}embeddings.token_embedding.weight" in self.shapes  # CLIP's, in 2022
        more = "text_model." if old else ""
        return {more + k.removeprefix(prefix): k for k in self.shapes if k.startswith(prefix)}

    def _unet(self, pooled: int | None) -> Config:
        shapes = {name: self.shapes[key] for name, key in self._keys("unet").items()}
        levels: list[tuple[int, int]] = []  # channels, transformer blocks
        channels = depth = per_block = 0
        for i in range(1, _count(shapes, "input_blocks.")):
            if f"input_blocks.{i}.0.op.weight" in shapes:
                levels.append((channels, depth))
                per_block = per_block or i - 1
                depth = 0
            else:
                channels = shapes[f"input_blocks.{i}.0.in_layers.2.weight"][0]
                depth = max(depth, _count(shapes, f"input_blocks.{i}.1.transformer_blocks."))
        # diffusers takes the middle's depth from the last level, which may have no attention
        middle = _count(shapes, "middle_block.1.transformer_blocks.")
        widths = (*(width for width, _ in levels), channels)
        depths = (*(depth for _, depth in levels), depth)
        first = range(0, _count(shapes, "output_blocks."), per_block + 1)
        up = (f"output_blocks.{i}.1.norm.weight" in shapes for i in first)
        linear = len(self.shapes[recognise.PROJ_IN]) == 2
        config: Config = {
            "sample_size": 96 if self.prediction_type == "v_prediction" else 64,
            "in_channels": self.shapes[recognise.CONV_IN][1],
            "out_channels": shapes["out.2.weight"][0],
            "block_out_channels": widths,
            "layers_per_block": per_block,
            "down_block_types": tuple(f"{'CrossAttn' * bool(d)}DownBlock2D" for d in depths),
            "up_block_types": tuple(f"{'CrossAttn' * attends}UpBlock2D" for attends in up),
            "transformer_layers_per_block": (*(d or 1 for d in depths[:-1]), depth or middle),
            "cross_attention_dim": self.shapes[recognise.TEXT_KEYS][1],
            "use_linear_projection": linear,
            # a number of heads, whatever diffusers calls it: SD1 has 8 of any width, the others as
            # many of width 64 as fit
            "attention_head_dim": tuple(max(w // 64, 1) for w in widths) if linear else 8,
        }
        if self.family == "sd1":
            return config | {"sample_size": 64}
        if self.family == "sd2":
            return config
        width = shapes["label_emb.0.0.weight"][1]  # pooled text, then the embedded sizes
        numbers = 5 if self.family == "sdxl_refiner" else 6
        if pooled and (width - pooled) % numbers:
            raise ValueError(f"{width} is not a text of {pooled} and {numbers} numbers")
        return config | {
            "sample_size": 128,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": (width - pooled) // numbers if pooled else 256,
            "projection_class_embeddings_input_dim": width,
        }

    def _vae(self, sample_size: int) -> Config:
        shapes = {name: self.shapes[key] for name, key in self._keys("vae").items()}
        levels = range(_count(shapes, "encoder.down."))
        config: Config = {
            "in_channels": shapes["encoder.conv_in.weight"][1],
            "out_channels": shapes["decoder.conv_out.weight"][0],
            "block_out_channels": tuple(
                shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in levels
            ),
            "layers_per_block": _count(shapes, "encoder.down.0.block."),
            "down_block_types": ("DownEncoderBlock2D",) * len(levels),
            "up_block_types": ("UpDecoderBlock2D",) * len(levels),
            "latent_channels": shapes["decoder.conv_in.weight"][1],
            "sample_size": sample_size * 2 ** (len(levels) - 1),
            "scaling_factor": FAMILIES[self.family].vae_scaling,
        }
        if "edm_mean" in self.shapes:
            file = recognise.TensorsOfFile(self.path)
            for name in ("mean", "std"):
                config[f"latents_{name}"] = file[f"edm_{name}"].flatten().tolist()
            config["scaling_factor"] = 0.5
        return config

    def _text(self, part: str) -> Config:
        shapes = {name: self.shapes[key] for name, key in self._keys(part).items()}
        open_clip = self._prefix(part) in recognise.OPEN_CLIP
        stem = "" if open_clip else "text_model.embeddings."
        layer = "transformer.resblocks." if open_clip else "text_model.encoder.layers."
        vocabulary, width = shapes[f"{stem}token_embedding.weight"]
        positions = "positional_embedding" if open_clip else f"{stem}position_embedding.weight"
        layers = _count(shapes, layer) - (self._prefix(part) == recognise.SD2)
        # CLIP's own stay where they are when words are added
        start = 49406 if vocabulary >= 49408 else vocabulary - 2
        config: Config = {
            "vocab_size": vocabulary,
            "max_position_embeddings": shapes[positions][0],
            "hidden_size": width,
            "intermediate_size": shapes[f"{layer}0.mlp.{'c_fc' if open_clip else 'fc1'}.weight"][0],
            "num_hidden_layers": _LAYERS.get(width, layers),
            "num_attention_heads": max(width // 64, 1),
            "hidden_act": "gelu" if open_clip else "quick_gelu",
            # not the 2 of published configurations, with which transformers pools at the largest
            # id: the same place, until words are added
            "bos_token_id": start,
            "eos_token_id": start + 1,
        }
        if part == "text_encoder_2":
            config["projection_dim"] = shapes["text_projection"][1]
        elif not open_clip:
            config["projection_dim"] = width
        return config

    def load(self, part: str, dtype: torch.dtype) -> nn.Module:
        """Returns one part with the file's weights, in evaluation mode, on the CPU.

        In memory are the part in `dtype` and what is read of the file for it, no other part.

        Args:
            part: "unet", "vae", "text_encoder" or "text_encoder_2" (the refiner's only one).
            dtype: of the parameters.

        Raises:
            UsageError: weights that the file lacks, or has and the part has not.
        """
        prefix = self._prefix(part)
        if prefix is None:
            starts = " or ".join(recognise.PREFIXES[part])
            raise UsageError(f"{self.path} has no {part}: no tensor's name begins with {starts}")
        try:
            needed = self._needed(part)
            file = recognise.TensorsOfFile(self.path)
            tensors = {prefix + name: file[key] for name, key in needed.items()}
            with TemporaryDirectory() as folder, quiet():
                config = Path(folder, part, "config.json")
                config.parent.mkdir()
                config.write_text(json.dumps(self.configs[part]), encoding="utf-8")
                if part in ("unet", "vae"):
                    load = CLASSES[part].from_single_file
                    model = load(tensors, config=folder, subfolder=part, torch_dtype=dtype)
                else:
                    load = create_diffusers_clip_model_from_ldm
                    model = load(CLASSES[part], tensors, part, folder, torch_dtype=dtype)
        except UsageError:
            raise
        except recognise.FAILURES as error:
            raise UsageError(
                f"the {part} of {self.path} does not load: {recognise.reason(error)}"
            ) from None
        lost = [name for name, p in model.named_parameters() if p.is_meta]
        if lost:
            raise UsageError(f"{self.path} lacks {lost[0]} of its {part}, as diffusers reads it")
        _own(model, tensors.values())
        vars(model).pop("hf_device_map", None)  # accelerate's; this is a model like any other
        return model

    def _needed(self, part: str) -> dict[str, str]:
        """Returns the keys that a part is made of, without their prefix → the keys in the file.

        diffusers keeps no values for tensors that it misses, and drops others without a word.

        Raises:
            UsageError: tensors that the part needs and the file lacks, or the reverse.
        """
        config, prefix, keys = self.configs[part], self._prefix(part) or "", self._keys(part)
        cls = CLASSES[part]
        with torch.device("meta"):
            text = part.startswith("text_encoder")
            model = cls(CLIPTextConfig(**config)) if text else cls.from_config(config)
        need = {_original(part, name, config, prefix) for name, _ in model.named_parameters()}
        lacks = sorted(need - keys.keys())
        unused = re.compile(_UNUSED[part])
        after = f"transformer.resblocks.{config.get('num_hidden_layers')}."  # SD2's last, not read
        more = [
            key
            for name, key in keys.items()
            if name not in need
            and not unused.match(name)
            and not (prefix == recognise.SD2 and name.startswith(after))
        ]
        found = []
        if lacks:
            found.append(f"lacks {len(lacks)} tensors of its {part} ({prefix}{lacks[0]}, …)")
        if more:
            found.append(f"has {len(more)} that no {part} of its kind has ({more[0]}, …)")
        if found:
            what = "incomplete or another kind of model" if lacks else "another kind of model"
            raise UsageError(f"{self.path} {' and '.join(found)}: it is {what}")
        return {name: key for name, key in keys.items() if name in need}


def _original(part: str, name: str, config: Config, prefix: str) -> str:
    """Returns the key, less its prefix, of a parameter of diffusers' or transformers' name."""
    if part == "unet":
        module, _, kind = name.rpartition(".")
        return f"{unet_to_original(module, Layout.of(config))}.{kind}"
    if part == "vae":
        for ours, original in _VAE_NAMES.items():
            name = name.replace(ours, original)
        # the original counts the way up from the largest images, diffusers from the smallest
        last = len(config["block_out_channels"]) - 1
        return re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{last - int(m[1])}", name)
    # transformers 5.6 and newer have no `text_model.` in CLIPTextModel
    name = name if name.startswith("text_") else f"text_model.{name}"
    place = open_clip_parameter(name) if prefix in recognise.OPEN_CLIP else None
    return place[0] if place else name


def _count(keys: Iterable[str], stem: str) -> int:
    """Returns how many numbers follow a stem: 2 for "a.0.b" and "a.1.b" after "a."."""
    found = {key[len(stem) :].partition(".")[0] for key in keys if key.startswith(stem)}
    return sum(number.isdigit() for number in found)


def _own(model: nn.Module, tensors: Iterable[Tensor]) -> None:
    """Copies the parameters that are still the file's own memory: if someone wrote over the file,
    a run would go on with what is there then, or die of it."""
    mapped = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    for parameter in model.parameters():
        if parameter.untyped_storage().data_ptr() in mapped:
            parameter.data = parameter.data.clone()
