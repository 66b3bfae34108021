"""What a LoRA file is: one canonical form, and a reader and a writer for each format around it."""
