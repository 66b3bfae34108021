"""Train a LoRA of Stable Diffusion XL on one subject by DreamBooth, as diffusers' script does."""

import sys

from sd_lora.cli import train_script

if __name__ == "__main__":
    sys.exit(train_script("train_dreambooth_lora_sdxl.py"))
