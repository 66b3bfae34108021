"""Low-rank adapters for any torch module. Imports torch alone: no diffusion, files or training."""
