"""Training: state, step, loop, losses, optimizers, schedules, metrics, checkpoints and the run directory."""
