"""`python -m sd_lora`: the same commands as `sd-lora`, where its script is not on the PATH."""

import sys

from sd_lora.cli import main

if __name__ == "__main__":
    sys.exit(main())
