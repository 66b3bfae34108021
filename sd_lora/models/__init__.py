"""Base models: families as rows of a table, loading, and captions to conditioning."""

import logging

# when it first imports a CLIP image processor, transformers advises torchvision, which is faster;
# no image processor is used here, and users cannot tell the line from a real warning. A filter of
# the logger by name, for importing transformers takes half a second
logging.getLogger("transformers.utils.import_utils").addFilter(
    lambda record: "requires torchvision" not in record.getMessage()
)
