"""Single files in the original layout: SD1, SD2, SDXL base and refiner, and inpainting.

A single file has no configuration; one is inferred from the tensors' names and shapes. Its parts
are loaded one at a time, without the hub: the UNet by our own names, the others by diffusers'
converters.
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

from sd_lora.errors import UsageError
from sd_lora.files import PARSER_ERRORS, Shape, reason_of
from sd_lora.models.checkpoint_kinds import (
    LABEL_KEY,
    OPEN_CLIP,
    PREFIXES,
    REFINER_TEXT,
    SD2_TEXT,
    name_other_model,
    open_checkpoint,
)
from sd_lora.models.diffusers_folder import without_warnings
from sd_lora.models.families import FAMILIES
from sd_lora.models.infer_unet import count_children, infer_unet
from sd_lora.models.meta_pipeline import build_on_meta, part_class
from sd_lora.models.original_names import Layout, open_clip_parameter, unet_to_original

Config = dict[str, Any]

# Width of a text encoder → its layers in use. SD2 reads OpenCLIP-H's state before the last of 24
# layers, and files come with 23, with 24, and with zeros for the 24th. For SDXL's second encoder
# the pipeline picks a state.
_LAYERS = {768: 12, 1024: 23, 1280: 32}

# Keys in files without a use in the model: the discriminator of a VAE's training, buffers of CLIP,
# and a projection missing from CLIPTextModel.
_UNUSED_KEYS = {
    "unet": "$^",
    "vae": r"loss\.|model_ema\.",
    "text_encoder": r".*\b(position_ids|attn_mask|logit_scale|text_projection)\b",
    "text_encoder_2": r".*\b(position_ids|attn_mask|logit_scale)$",
}

# diffusers' names in a VAE → the original names, to be replaced in this order
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

_EDM_V_KEY = "edm_vpred.sigma_max"


@dataclass(frozen=True)
class SingleFile:
    """A single file, with the configurations inferred from it.

    path: of the file.
    shapes: key → shape of every tensor.
    header: a safetensors file's metadata; {} for a pickle.
    left_out: classes of a pickle's objects beside the tensors, which are not read.
    """

    path: Path
    shapes: Mapping[str, Shape]
    header: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    @classmethod
    def open(cls, path: Path) -> "SingleFile":
        """Read names and shapes, no weights (a pickle before torch 1.6 is read and dropped).

        Raises:
            UsageError: broken, cut off, no checkpoint, a pickle of more than tensors, a LoRA, a VAE
                or text encoder alone, or another kind of model, with its name.
        """
        file = open_checkpoint(path)
        other = name_other_model(file.shapes)
        if other:
            raise UsageError(f"{path} is {other}; needed is a checkpoint of SD 1, SD 2 or SDXL")
        single = cls(path, file.shapes, file.header, tuple(file.left_out))
        _ = single.configs  # inferred now, so that its errors come now
        return single

    @cached_property
    def family(self) -> str:
        """Name of its family: "sd1", "sd2", "sdxl" or "sdxl_refiner", inpainting or not."""
        if LABEL_KEY not in self.shapes:
            return "sd2" if self._unet["use_linear_projection"] else "sd1"
        encoder = self._prefix("text_encoder_2")
        wide = self._unet["cross_attention_dim"] == 1280  # only a refiner's UNet
        return "sdxl_refiner" if encoder == REFINER_TEXT or wide and encoder is None else "sdxl"

    @property
    def prediction_type(self) -> str | None:
        """Prediction type: "epsilon" or "v_prediction"; None if an SD2 file does not say it."""
        said = self.header.get("modelspec.prediction_type")
        marks = {"v_pred", _EDM_V_KEY} & self.shapes.keys()
        if marks or said in ("v", "v_prediction"):
            return "v_prediction"
        return None if self.family == "sd2" and said != "epsilon" else "epsilon"

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether the last step is pure noise: the file has a tensor "ztsnr"."""
        return "ztsnr" in self.shapes

    @property
    def edm(self) -> bool:
        """Whether the model is EDM's kind (Karras et al. 2022): Playground v2.5 has tensors
        "edm_mean" and "edm_std", CosXL its largest and smallest σ."""
        return "edm_mean" in self.shapes or _EDM_V_KEY in self.shapes

    def scheduler_config(self, prediction_type: str) -> Config:
        """Return arguments for `from_config` of the scheduler class named by "_class_name".

        prediction_type: "epsilon" or "v_prediction"; without meaning for an EDM model.
        """
        config: Config = {"_class_name": "EDMEulerScheduler", "num_train_timesteps": 1000}
        if _EDM_V_KEY in self.shapes:
            file = open_checkpoint(self.path)
            ends = {f"sigma_{end}": float(file[f"edm_vpred.sigma_{end}"]) for end in ("min", "max")}
            kind = {"sigma_data": 1.0, "sigma_schedule": "exponential"}
            return config | ends | kind | {"prediction_type": "v_prediction"}
        if self.edm:
            sigmas = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5}
            return config | sigmas | {"prediction_type": "epsilon"}
        zero = self.zero_terminal_snr
        return dict(FAMILIES[self.family].noise_schedule) | {
            "clip_sample": False,
            "set_alpha_to_one": False,
            "steps_offset": 1,
            "prediction_type": prediction_type,
            # "leading" never visits the last step, which has no signal
            "timestep_spacing": "trailing" if zero else "leading",
            "rescale_betas_zero_snr": zero,
        }

    @cached_property
    def configs(self) -> dict[str, Config]:
        """Part ("unet", "vae", …) → arguments of its class's configuration, if it is in the file.

        Raises:
            UsageError: tensors of another kind of model.
        """
        try:
            encoders = [p for p in ("text_encoder", "text_encoder_2") if self._prefix(p)]
            text = {part: self._text_config(part) for part in encoders}
            unet = self._unet_config(text.get("text_encoder_2", {}).get("projection_dim"))
            vae = {"vae": self._vae_config(unet["sample_size"])} if self._prefix("vae") else {}
        except PARSER_ERRORS as error:
            raise UsageError(
                f"{self.path} is incomplete or another kind of model: no configuration can be "
                f"inferred from its tensors ({reason_of(error)})"
            ) from None
        return {"unet": unet, **vae, **text}

    def _prefix(self, part: str) -> str | None:
        """Return the beginning of a part's keys in this file; None if the part is not there."""
        found = (p for p in PREFIXES[part] if any(key.startswith(p) for key in self.shapes))
        return next(found, None)

    def _keys(self, part: str) -> dict[str, str]:
        """Return a part's keys: without their prefix → in the file."""
        prefix = self._prefix(part) or ""
        old = f"{prefix}embeddings.token_embedding.weight" in self.shapes  # CLIP's, in 2022
        more = "text_model." if old else ""
        return {more + k.removeprefix(prefix): k for k in self.shapes if k.startswith(prefix)}

    @cached_property
    def _unet(self) -> Config:
        """The part of the UNet's configuration that its tensors tell."""
        return infer_unet({name: self.shapes[key] for name, key in self._keys("unet").items()})

    def _unet_config(self, pooled: int | None) -> Config:
        """Return the UNet's configuration; pooled: width of the pooled text, None if unknown."""
        if self.family in ("sd1", "sd2"):
            large = self.family == "sd2" and self.prediction_type == "v_prediction"
            return self._unet | {"sample_size": 96 if large else 64}
        width = self.shapes[LABEL_KEY][1]  # pooled text, then the embedded sizes
        numbers = 5 if self.family == "sdxl_refiner" else 6
        if pooled and (width - pooled) % numbers:
            raise ValueError(f"{width} is not a text of {pooled} and {numbers} numbers")
        return self._unet | {
            "sample_size": 128,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": (width - pooled) // numbers if pooled else 256,
            "projection_class_embeddings_input_dim": width,
        }

    def _vae_config(self, sample_size: int) -> Config:
        """Return the VAE's configuration; sample_size: side of the UNet's latents."""
        shapes = {name: self.shapes[key] for name, key in self._keys("vae").items()}
        levels = range(count_children(shapes, "encoder.down."))
        config: Config = {
            "in_channels": shapes["encoder.conv_in.weight"][1],
            "out_channels": shapes["decoder.conv_out.weight"][0],
            "block_out_channels": tuple(
                shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in levels
            ),
            "layers_per_block": count_children(shapes, "encoder.down.0.block."),
            "down_block_types": ("DownEncoderBlock2D",) * len(levels),
            "up_block_types": ("UpDecoderBlock2D",) * len(levels),
            "latent_channels": shapes["decoder.conv_in.weight"][1],
            "sample_size": sample_size * 2 ** (len(levels) - 1),
            "scaling_factor": FAMILIES[self.family].vae_scaling,
        }
        if "edm_mean" in self.shapes:
            file = open_checkpoint(self.path)
            for name in ("mean", "std"):
                config[f"latents_{name}"] = file[f"edm_{name}"].flatten().tolist()
            config["scaling_factor"] = 0.5
        return config

    def _text_config(self, part: str) -> Config:
        """Return a text encoder's configuration."""
        shapes = {name: self.shapes[key] for name, key in self._keys(part).items()}
        open_clip = self._prefix(part) in OPEN_CLIP
        stem = "" if open_clip else "text_model.embeddings."
        layer = "transformer.resblocks." if open_clip else "text_model.encoder.layers."
        vocabulary, width = shapes[f"{stem}token_embedding.weight"]
        positions = "positional_embedding" if open_clip else f"{stem}position_embedding.weight"
        layers = count_children(shapes, layer) - (self._prefix(part) == SD2_TEXT)
        # CLIP's own ids stay the same when words are added
        start = 49406 if vocabulary >= 49408 else vocabulary - 2
        config: Config = {
            "vocab_size": vocabulary,
            "max_position_embeddings": shapes[positions][0],
            "hidden_size": width,
            "intermediate_size": shapes[f"{layer}0.mlp.{'c_fc' if open_clip else 'fc1'}.weight"][0],
            "num_hidden_layers": _LAYERS.get(width, layers),
            "num_attention_heads": max(width // 64, 1),
            "hidden_act": "gelu" if open_clip else "quick_gelu",
            # published configurations say 2, for which transformers pools at the largest id: the
            # same place until words are added
            "bos_token_id": start,
            "eos_token_id": start + 1,
        }
        if part == "text_encoder_2":
            config["projection_dim"] = shapes["text_projection"][1]
        elif not open_clip:
            config["projection_dim"] = width
        return config

    def load(self, part: str, dtype: torch.dtype) -> nn.Module:
        """Return one part with the file's weights, in evaluation mode, on the CPU.

        Memory holds the part in `dtype` and its pages of the file, and nothing of other parts.

        part: "unet", "vae", "text_encoder" or "text_encoder_2" (the refiner's only one).
        dtype: of the parameters.

        Raises:
            UsageError: weights are missing in the file, or left over.
        """
        prefix = self._prefix(part)
        if prefix is None:
            starts = " or ".join(PREFIXES[part])
            raise UsageError(f"{self.path} has no {part}: no tensor's name begins with {starts}")
        try:
            needed = self.check_keys(part)
            file = open_checkpoint(self.path)
            tensors = {prefix + name: file[key] for name, key in needed.items()}
            if part == "unet":
                model = self._load_unet(tensors, dtype)
            else:
                model = self._load_by_diffusers(part, tensors, dtype)
        except UsageError:
            raise
        except PARSER_ERRORS as error:
            raise UsageError(
                f"the {part} of {self.path} does not load: {reason_of(error)}"
            ) from None
        lost = [name for name, p in model.named_parameters() if p.is_meta]
        if lost:
            raise UsageError(f"{self.path} lacks {lost[0]} of its {part}, as diffusers reads it")
        _detach_from_file(model, tensors.values())
        vars(model).pop("hf_device_map", None)  # accelerate's mark; this model is not dispatched
        return model

    def _load_unet(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> nn.Module:
        """The UNet by our own names: diffusers' converter knows the published middle alone."""
        model, prefix = build_on_meta("unet", self.configs["unet"]), self._prefix("unet") or ""
        state = {}
        for name, _ in model.named_parameters():
            key = prefix + _original_key("unet", name, self.configs["unet"], prefix)
            state[name] = tensors[key].to(dtype)
        model.load_state_dict(state, assign=True)
        return model.eval()

    def _load_by_diffusers(
        self, part: str, tensors: Mapping[str, Tensor], dtype: torch.dtype
    ) -> nn.Module:
        with TemporaryDirectory() as folder, without_warnings():
            config = Path(folder, part, "config.json")
            config.parent.mkdir()
            config.write_text(json.dumps(self.configs[part]), encoding="utf-8")
            if part == "vae":
                load = part_class(part).from_single_file
                return load(tensors, config=folder, subfolder=part, torch_dtype=dtype)
            load = create_diffusers_clip_model_from_ldm
            return load(part_class(part), tensors, part, folder, torch_dtype=dtype)

    def check_keys(self, part: str) -> dict[str, str]:
        """Return the keys that make a part: without their prefix → in the file.

        diffusers leaves missing tensors without values, and drops others silently.

        Raises:
            UsageError: tensors of the part are missing in the file, or left over.
        """
        config, prefix, keys = self.configs[part], self._prefix(part) or "", self._keys(part)
        model = build_on_meta(part, config)
        need = {_original_key(part, name, config, prefix) for name, _ in model.named_parameters()}
        lacks = sorted(need - keys.keys())
        unused = re.compile(_UNUSED_KEYS[part])
        after = f"transformer.resblocks.{config.get('num_hidden_layers')}."  # SD2's last, unused
        more = [
            key
            for name, key in keys.items()
            if name not in need
            and not unused.match(name)
            and not (prefix == SD2_TEXT and name.startswith(after))
        ]
        found = []
        if lacks:
            found.append(f"lacks {len(lacks)} tensors of its {part} ({prefix}{lacks[0]}, …)")
        if more:
            found.append(f"has {len(more)} that no {part} of its kind has ({more[0]}, …)")
        if found:
            kind = "incomplete or another kind of model" if lacks else "another kind of model"
            raise UsageError(f"{self.path} {' and '.join(found)}: it is {kind}")
        return {name: key for name, key in keys.items() if name in need}


def _original_key(part: str, name: str, config: Config, prefix: str) -> str:
    """Return the key, less its prefix, of a parameter by its diffusers or transformers name."""
    if part == "unet":
        module, _, kind = name.rpartition(".")
        return f"{unet_to_original(module, Layout.of(config))}.{kind}"
    if part == "vae":
        for ours, original in _VAE_NAMES.items():
            name = name.replace(ours, original)
        # the original numbers up blocks from the largest images, diffusers from the smallest
        last = len(config["block_out_channels"]) - 1
        return re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{last - int(m[1])}", name)
    # transformers 5.6 and newer have no `text_model.` in CLIPTextModel
    name = name if name.startswith("text_") else f"text_model.{name}"
    place = open_clip_parameter(name) if prefix in OPEN_CLIP else None
    return place[0] if place else name


def _detach_from_file(model: nn.Module, tensors: Iterable[Tensor]) -> None:
    """Copy the parameters that are still mapped from the file.

    If another program wrote over the file, a run would go on with its new content, or crash.
    """
    mapped = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    for parameter in model.parameters():
        if parameter.untyped_storage().data_ptr() in mapped:
            parameter.data = parameter.data.clone()
