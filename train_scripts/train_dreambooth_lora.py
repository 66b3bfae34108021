"""Train a LoRA on one subject by DreamBooth: for `python`, `accelerate launch` and `torchrun`."""

import sys

from sd_lora.cli import train_script

if __name__ == "__main__":
    sys.exit(train_script("train_dreambooth_lora.py"))
