"""The training objective: noise schedule, targets, loss weights, losses of batch items."""
