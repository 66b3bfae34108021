"""Train a LoRA of Stable Diffusion XL on captioned images, as diffusers' script does."""

import sys

from sd_lora.cli import train_script

if __name__ == "__main__":
    sys.exit(train_script("train_text_to_image_lora_sdxl.py"))
