"""LoRA files: one canonical form, and a reader and a writer for each format around it."""
