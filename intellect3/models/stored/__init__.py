"""Tensors in safetensors files: their headers, reading parts of them, writing shards. No jax.

formats     headers, dtypes, what can be wrong with a file
directory   the tensors of a checkpoint directory, and slices of them
overflow    conversions to a dtype too small for the values
shards      writing, several files at a time
"""
