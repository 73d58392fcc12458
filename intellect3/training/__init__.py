"""The train step and what surrounds it: state, optimizers, checkpoints, FLOPs."""
