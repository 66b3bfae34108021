"""The objective: noise schedule, targets, weightings, per-sample loss."""
