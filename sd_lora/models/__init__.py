"""Stable Diffusion models as rows of a table: loading them, and text to conditioning."""

import logging

from transformers.utils import logging as transformers_logging

# at its first import of a CLIP image processor transformers says that torchvision would be faster;
# none is used here, and a user cannot tell that line from a real warning
transformers_logging.get_logger("transformers")
for _handler in logging.getLogger("transformers").handlers:
    _handler.addFilter(lambda record: "requires torchvision" not in record.getMessage())
