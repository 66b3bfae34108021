"""Base models: families as rows of a table, loading, and captions to conditioning."""

import logging

from transformers.utils import logging as transformers_logging

# when it first imports a CLIP image processor, transformers advises torchvision, which is faster;
# no image processor is used here, and users cannot tell the line from a real warning
transformers_logging.get_logger("transformers")
for _handler in logging.getLogger("transformers").handlers:
    _handler.addFilter(lambda record: "requires torchvision" not in record.getMessage())
