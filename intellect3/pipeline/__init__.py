"""The way from the RolloutLog (or demonstrations) to packed batches on the devices."""
