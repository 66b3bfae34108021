"""Train a LoRA on captioned images: for `python`, `accelerate launch` and `torchrun`."""

import sys

from sd_lora.cli import train_script

if __name__ == "__main__":
    sys.exit(train_script("train_text_to_image_lora.py"))
