"""Plain LoRA on plain layers, forward and backward with as few operators as there can be."""
