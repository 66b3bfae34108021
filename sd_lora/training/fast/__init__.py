"""The fast path of a training step: a model's layers computed together where they can be."""
