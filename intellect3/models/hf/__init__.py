"""Hugging Face safetensors checkpoints, in and out.

Place in the ring: runs start from one, weights are published as one, servers load one. Bitwise:
what `save` wrote, `load` gives back.

    names        the tables: their tensors' names and layouts, family by family
    layout       one tensor between their layout and ours
    fused        experts in one tensor per layer, seen as one tensor each
    source       a directory opened and checked, no tensor read
    read         load: whole on the host, or each process its slices
    write        save: sharded, streaming, atomic
    companions   what travels along: tokenizer, templates, the rest of config.json, extra tensors
    merge        some tensors in the place of those that are held
"""

from intellect3.models.hf.merge import merge
from intellect3.models.hf.read import load, load_sharded
from intellect3.models.hf.source import check
from intellect3.models.hf.write import save, to_hf
from intellect3.models.stored.shards import SHARD_BYTES

__all__ = [
  "SHARD_BYTES",
  "check",
  "load",
  "load_sharded",
  "merge",
  "save",
  "to_hf",
]
