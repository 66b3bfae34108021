"""What a low-rank update is. Knows torch alone: nothing of diffusion, files or training."""
