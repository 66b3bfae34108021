"""The loss of a step against those of diffusers' example scripts (v0.42), fed the same images,
noise and timesteps: their formulas, in diffusers' own classes.

A: examples/text_to_image/train_text_to_image_lora.py, B: its SDXL twin; C:
examples/dreambooth/train_dreambooth_lora.py, D: its SDXL twin; numbers are lines. Where a script is
wrong, the test says how, and what is right.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
)
from diffusers.training_utils import compute_snr
from PIL import Image, ImageOps
from torch import Tensor

from sd_lora.config.schema import TrainConfig
from sd_lora.data.images.decode import decode_with_mask
from sd_lora.diffusion.timesteps import Timesteps
from sd_lora.seeds import generator_for
from sd_lora.training import loop
from sd_lora.training.setup import Run, prepare
from tests.tiny import build_pipeline
from tests.training.runs import dreambooth, images, text_to_image

Folder = Callable[[str], Path]
Pair = tuple[int, int]
SAME = {"rtol": 1e-5, "atol": 0.0}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images that are not square, so that crops are drawn."""
    return images(tmp_path_factory.mktemp("data"), size=(96, 64))


@pytest.fixture(scope="module")
def class_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images of another size."""
    return images(tmp_path_factory.mktemp("class"), size=(128, 192))


@torch.no_grad()
def loud(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """Makes a UNet heed its text and time ids: with random weights they hardly change a loss."""
    factors = {"add_embedding": 8, "attn2": 3, "conv_out": 3}
    for name, parameter in pipeline.unet.named_parameters():
        for part, factor in factors.items():
            if part in name:
                parameter *= factor
    return pipeline


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Kind → folder of a tiny model that heeds what it is told."""

    @cache
    def folder(kind: str) -> Path:
        path = tmp_path_factory.mktemp("models") / kind
        loud(build_pipeline(kind)).save_pretrained(path)
        return path

    return folder


@cache
def loaded(folder: str) -> DiffusionPipeline:
    """diffusers' own reading of a folder; nothing is changed in it."""
    return DiffusionPipeline.from_pretrained(folder)


@dataclass
class Fed:
    """What both are given, made as the scripts make it from draws that are ours, and from the model
    in the folder. sizes, corners: (vertical, horizontal), of each image and its crop."""

    pipeline: DiffusionPipeline
    prompts: list[str]
    sizes: list[Pair]
    corners: list[Pair]
    x0: Tensor
    noise: Tensor
    t: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, run: Run) -> "Fed":
        items, r = run.stream.batch(0).items, run.config.resolution
        pipeline = loaded(str(run.config.pretrained_model_name_or_path))
        pixels, sizes, corners = [], [], []
        for item in items:  # B 948-964, D 821-840
            sample = run.stream.sets[item.kind].samples[item.index]
            image, _ = decode_with_mask(sample.read(), sample.name)
            sizes.append((image.height, image.width))
            x, y = item.crop.corner_of(item.flip)
            corners.append((y, x))
            size = [r * n // min(image.size) for n in image.size]
            image = image.resize(size, Image.Resampling.LANCZOS)
            image = ImageOps.mirror(image) if item.flip else image
            array = np.array(image.crop((x, y, x + r, y + r)), dtype=np.float32)
            pixels.append((torch.from_numpy(array).permute(2, 0, 1) / 255 - 0.5) / 0.5)
        latent = pipeline.vae.encode(torch.stack(pixels)).latent_dist
        draws = {"latent": [], "noise": [], "offset": []}
        for item in items:
            shape = latent.mean.shape[1:]
            draws["latent"].append(
                torch.randn(shape, generator=generator_for(*item.address, "latent"))
            )
            generator = generator_for(*item.address, "noise")
            draws["noise"].append(torch.randn(shape, generator=generator))
            draws["offset"].append(torch.randn(shape[0], 1, 1, generator=generator))
        x0 = latent.mean + latent.std * torch.stack(draws["latent"])
        mean, std = (pipeline.vae.config.get(f"latents_{name}") for name in ("mean", "std"))
        if mean is None:
            x0 = x0 * pipeline.vae.config.scaling_factor
        else:  # D 1694
            mean, std = torch.tensor(mean).view(1, 4, 1, 1), torch.tensor(std).view(1, 4, 1, 1)
            x0 = (x0 - mean) * pipeline.vae.config.scaling_factor / std
        noise = torch.stack(draws["noise"])
        noise += run.config.noise_offset * torch.stack(draws["offset"])  # A 866-870
        t = Timesteps(0, 1000).draw([item.address for item in items])
        return cls(pipeline, [str(s.caption) for s in items], sizes, corners, x0, noise, t)

    def scheduler(self, cls: type, **changes: object) -> DDPMScheduler:
        return cls.from_config(self.pipeline.scheduler.config, **changes)

    @torch.no_grad()
    def predicted(self, x: Tensor, t: Tensor) -> Tensor:
        """The UNet's answer (A 903, B 1122, C 1293, D 1748)."""
        pipeline = self.pipeline
        if not hasattr(pipeline, "text_encoder_2"):
            hidden, _ = pipeline.encode_prompt(self.prompts, "cpu", 1, False)
            return pipeline.unet(x, t, hidden).sample
        hidden, _, pooled, _ = pipeline.encode_prompt(
            self.prompts, device="cpu", do_classifier_free_guidance=False
        )
        ids = [[*s, *c, 64, 64] for s, c in zip(self.sizes, self.corners, strict=True)]  # B 1098
        added = {"text_embeds": pooled, "time_ids": torch.tensor(ids, dtype=torch.float32)}
        return pipeline.unet(x, t, hidden, added_cond_kwargs=added).sample

    def errors(self, **changes: object) -> Tensor:
        """Each sample's error of noise or velocity (A 888-907, B 1081-1135, C 1271-1313)."""
        scheduler = self.scheduler(DDPMScheduler, **changes)
        target = {
            "epsilon": lambda *args: self.noise,
            "v_prediction": scheduler.get_velocity,
        }[scheduler.config.prediction_type](self.x0, self.noise, self.t)
        predicted = self.predicted(scheduler.add_noise(self.x0, self.noise, self.t), self.t)
        return F.mse_loss(predicted, target, reduction="none").mean([1, 2, 3])

    def snr(self, gamma: float) -> tuple[Tensor, Tensor]:
        """Signal-to-noise ratios, and what min-SNR makes of them."""
        snr = compute_snr(self.scheduler(DDPMScheduler), self.t)
        return snr, snr.clamp(max=gamma)


def ours(config: TrainConfig) -> tuple[Tensor, Fed]:
    """The loss of our first step in the scripts' squares, and what it was fed."""
    run = prepare(config.replace(aspect_ratio_buckets=False))
    with torch.no_grad():
        loss = loop.batch_loss(run, run.stream.batch(0), 0)
    return loss, Fed.of(run)


NOISY = {"snr_gamma": 5.0, "noise_offset": 0.3}
FLIPPED = {"random_flip": True, "center_crop": True, "train_batch_size": 6}
CASES = [
    *(("sd1", changes) for changes in ({}, NOISY, FLIPPED)),
    *(("sd2", changes) for changes in ({}, NOISY)),
    *(("sdxl", changes) for changes in ({}, NOISY, FLIPPED, {"random_flip": True})),
    *(("sdxl-v", changes) for changes in ({}, NOISY)),
]


@pytest.mark.parametrize(("kind", "changes"), CASES)
def test_text_to_image(kind: str, changes: dict, model: Folder, data: Path, tmp_path: Path) -> None:
    """The losses of A (SD1's noise, SD2's velocity) and B (SDXL's both): plain, with min-SNR and
    noise offset, with flips and centre crops, with flips and random crops. SDXL's see crops."""
    loss, fed = ours(text_to_image(model(kind), data, tmp_path, **changes))
    want = fed.errors()
    if "snr_gamma" in changes:  # A 912-921, B 1144-1153
        snr, clipped = fed.snr(5.0)
        want = want * clipped / (snr + 1 if kind in ("sd2", "sdxl-v") else snr)
    torch.testing.assert_close(loss, want.mean(), **SAME)
    if kind == "sdxl" and changes != NOISY:
        assert len(set(fed.corners)) > 2 or "center_crop" in changes
        fed.corners = [(y, x + 1) for y, x in fed.corners]
        assert abs(fed.errors().mean() / loss - 1) > 1e-3


def test_another_prediction_type(model: Folder, data: Path, tmp_path: Path) -> None:
    """--prediction_type asks an epsilon model for velocities (A 886-888, B 1127-1129)."""
    config = text_to_image(model("sdxl"), data, tmp_path, prediction_type="v_prediction")
    loss, fed = ours(config)
    want = fed.errors(prediction_type="v_prediction").mean()
    torch.testing.assert_close(loss, want, **SAME)
    assert abs(want / fed.errors().mean() - 1) > 0.01


def prior(
    model: Path, data: Path, class_data: Path, output: Path, **changes: object
) -> TrainConfig:
    values: dict[str, object] = {
        "with_prior_preservation": True, "class_data_dir": str(class_data), "num_class_images": 6,
        "class_prompt": "a photo of some other thing", "prior_loss_weight": 0.3,
    }  # fmt: skip
    return dreambooth(model, data, output, **(values | changes))


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_dreambooth(kind: str, model: Folder, data: Path, class_data: Path, tmp_path: Path) -> None:
    """C's loss, alone and with prior preservation, in two chunks (1315-1327)."""
    loss, fed = ours(dreambooth(model(kind), data, tmp_path))
    torch.testing.assert_close(loss, fed.errors().mean(), **SAME)
    loss, fed = ours(prior(model(kind), data, class_data, tmp_path))
    instance, others = fed.errors().chunk(2)
    torch.testing.assert_close(loss, instance.mean() + 0.3 * others.mean(), **SAME)
    assert len(set(fed.prompts)) == 2


def edm_style(fed: Fed, scheduler: EulerDiscreteScheduler | EDMEulerScheduler) -> Tensor:
    """D's loss in EDM's style (1708-1833), of the timesteps that both are fed."""
    edm, v = isinstance(scheduler, EDMEulerScheduler), scheduler.config.prediction_type[0] == "v"
    indices = 999 - fed.t  # its schedule starts with much noise
    t = scheduler.timesteps[indices]
    noisy = scheduler.add_noise(fed.x0, fed.noise, t)
    sigma = scheduler.sigmas[indices].view(-1, 1, 1, 1)  # 1645-1655
    if edm:
        x = scheduler.precondition_inputs(noisy, sigma)
        denoised = scheduler.precondition_outputs(noisy, fed.predicted(x, t), sigma)
    else:
        out = fed.predicted(noisy / (sigma**2 + 1) ** 0.5, t)
        denoised = noisy - sigma * out
        if v:
            denoised = noisy / (sigma**2 + 1) - out * sigma / (sigma**2 + 1) ** 0.5
    weights = torch.ones_like(sigma) if edm else sigma**-2
    return (weights * (denoised - fed.x0) ** 2).mean()


@pytest.mark.parametrize("kind", ["sdxl", "sdxl-v"])
def test_dreambooth_sdxl(kind: str, model: Folder, data: Path, tmp_path: Path) -> None:
    """D's loss, plain and in EDM's style over EulerDiscreteScheduler, of noise and of velocities
    whose schedule ends in pure noise, with flips."""
    config = dreambooth(model(kind), data, tmp_path, random_flip=True, train_batch_size=8)
    loss, fed = ours(config)
    torch.testing.assert_close(loss, fed.errors().mean(), **SAME)
    styled = {"random_flip": True, "train_batch_size": 8, "do_edm_style_training": True}
    loss, fed = ours(dreambooth(model(kind), data, tmp_path, **styled))
    want = edm_style(fed, fed.scheduler(EulerDiscreteScheduler))
    torch.testing.assert_close(loss, want, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("prediction_type", "sigma_schedule"), [("epsilon", "karras"), ("v_prediction", "exponential")]
)
def test_dreambooth_playground(
    prediction_type: str, sigma_schedule: str, data: Path, tmp_path: Path
) -> None:
    """D's loss for a model in EDM's own formulation, with means and deviations of its latents as
    Playground v2.5 has them; the model is recognised by its scheduler's class (1117-1121)."""
    pipeline = loud(build_pipeline("sdxl"))
    of_edm = {"prediction_type": prediction_type, "sigma_schedule": sigma_schedule}
    pipeline.register_modules(scheduler=EDMEulerScheduler(sigma_data=0.5, **of_edm))
    statistics = {"latents_mean": [-1.6, 1.1, 0.2, -0.1], "latents_std": [8.4, 5.9, 0.5, 4.7]}
    pipeline.vae.register_to_config(scaling_factor=0.5, **statistics)
    pipeline.save_pretrained(tmp_path / "model")
    loss, fed = ours(dreambooth(tmp_path / "model", data, tmp_path / "out", train_batch_size=8))
    scheduler = EDMEulerScheduler.from_pretrained(tmp_path / "model", subfolder="scheduler")
    torch.testing.assert_close(loss, edm_style(fed, scheduler), rtol=1e-4, atol=0)


def test_min_snr_for_velocities_is_wrong_in_d(model: Folder, data: Path, tmp_path: Path) -> None:
    """For noise D's min-SNR weights are ours. For velocities it adds 1 (1845-1847), where A and B
    divide by SNR + 1: ours is min(SNR, γ) times the error of x₀, as Hang et al. 2023 define it."""
    options = {"snr_gamma": 5.0, "train_batch_size": 8}
    loss, fed = ours(dreambooth(model("sdxl"), data, tmp_path, **options))
    snr, clipped = fed.snr(5.0)
    torch.testing.assert_close(loss, (fed.errors() * clipped / snr).mean(), **SAME)
    loss, fed = ours(dreambooth(model("sdxl-v"), data, tmp_path, **options))
    snr, clipped = fed.snr(5.0)
    theirs = (fed.errors() * (clipped / snr + 1)).mean()
    scheduler = fed.scheduler(DDPMScheduler)
    alpha = scheduler.alphas_cumprod[fed.t].sqrt().view(-1, 1, 1, 1)
    x_t = scheduler.add_noise(fed.x0, fed.noise, fed.t)
    x0 = alpha * x_t - (1 - alpha**2).sqrt() * fed.predicted(x_t, fed.t)
    want = (clipped * (x0 - fed.x0).square().mean([1, 2, 3])).mean()
    torch.testing.assert_close(loss, want, rtol=1e-4, atol=0)
    assert theirs > 1.5 * loss


def chunks(errors: Tensor) -> Tensor:
    """D's two chunks (1808-1858)."""
    instance, others = errors.chunk(2)
    return instance.mean() + 0.3 * others.mean()


def test_sizes_of_class_images_are_wrong_in_d(
    model: Folder, data: Path, class_data: Path, tmp_path: Path
) -> None:
    """D tells the UNet that class images have the sizes and crops of the instances beside them
    (911-912): its loss is ours but for that; with their own it is ours."""
    config = prior(model("sdxl"), data, class_data, tmp_path, train_batch_size=1, seed=1)
    loss, fed = ours(config)
    torch.testing.assert_close(loss, chunks(fed.errors()), **SAME)
    assert fed.sizes == [(64, 96), (192, 128)]
    right = fed.errors()
    fed.sizes, fed.corners = fed.sizes[:1] * 2, fed.corners[:1] * 2
    theirs = fed.errors()
    torch.testing.assert_close(theirs[0], right[0], **SAME)
    assert abs(theirs[1] / right[1] - 1) > 0.01


def test_prompts_of_a_batch_are_mixed_up_in_d(
    model: Folder, data: Path, class_data: Path, tmp_path: Path
) -> None:
    """With prior preservation and more than one image a batch D repeats (instance, class), while
    the images are instances first: every second one is shown with the other's prompt. With each
    image's own prompt its loss is ours."""
    loss, fed = ours(prior(model("sdxl"), data, class_data, tmp_path, seed=8))
    torch.testing.assert_close(loss, chunks(fed.errors()), **SAME)
    i, c = "a photo of sks thing", "a photo of some other thing"
    assert fed.prompts == [i, i, c, c]
    right = fed.errors()
    fed.prompts = [i, c] * 2  # 1737-1747: repeat(batch size // 2)
    theirs = fed.errors()
    torch.testing.assert_close(theirs[[0, 3]], right[[0, 3]], **SAME)
    assert (theirs / right - 1)[1:3].abs().min() > 0.01
