"""One run: configuration, loop, checkpoints, validation, report."""
