"""Small arrays of a program of several processes, on the host of each.

Place in the ring: metrics and canary logprobs, which every process computes alike.
"""

from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec


def fetch(tree: Any) -> Any:
  """Every array of a tree as NumPy, whole, on every process; waits for them.

  An array whose parts lie with several processes is gathered first: then all must call this.
  """

  def whole(array: Any) -> Any:
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
      return array
    assert isinstance(array.sharding, NamedSharding)
    replicated = NamedSharding(array.sharding.mesh, PartitionSpec())
    return jax.jit(lambda part: part, out_shardings=replicated)(array)

  return jax.device_get(jax.tree.map(whole, tree))
