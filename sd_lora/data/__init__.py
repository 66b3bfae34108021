"""Images and captions to batches."""
