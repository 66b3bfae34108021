"""Images from a model and its adapters, and the score of learning."""
