"""Tables from logical axes to mesh axes.

Place in the ring: the model names the axes of its parameters and activations; a table says where
they lie. Another layout is another table.
"""

from collections.abc import Sequence

from jax.sharding import PartitionSpec

Rules = tuple[tuple[str, str | tuple[str, ...] | None], ...]

TRAIN_FSDP: Rules = (
  ("vocab", "tensor"),
  ("embed", "fsdp"),
  ("heads", "tensor"),
  ("kv_heads", "tensor"),
  ("head_dim", None),
  ("mlp", "tensor"),
  ("experts", "expert"),
  ("layers", None),
  ("act_batch", ("data", "fsdp", "expert")),
  ("act_length", "context"),
  ("act_embed", None),
)
"""Parameters over `fsdp` (and `tensor`), experts over `expert`; rows over all three."""

SERVE: Rules = (
  ("vocab", "tensor"),
  ("embed", None),
  ("heads", "tensor"),
  ("kv_heads", "tensor"),
  ("head_dim", None),
  ("mlp", "tensor"),
  ("experts", "expert"),
  ("layers", None),
  ("act_batch", None),
  ("act_length", None),
  ("act_embed", None),
)
"""Heads, widths, vocabulary over `tensor`, experts over `expert`, the cache as its kv heads. Every
device has all rows: a decode step is too small to be worth splitting by them."""


def to_spec(logical_axes: Sequence[str | None], rules: Rules) -> PartitionSpec:
  """The partition of a tensor with these logical axes.

  Args:
    logical_axes: one name per dimension; None is not sharded.
    rules: the table.

  Raises:
    ValueError: for a name that the table does not have, or has twice, or where two axes of the
      tensor lie on one mesh axis.
  """
  table = dict(rules)
  if len(table) != len(rules):
    raise ValueError(f"rules: expected each logical axis once, got {[name for name, _ in rules]}")
  entries: list[str | tuple[str, ...] | None] = []
  owner: dict[str, str] = {}
  for name in logical_axes:
    if name is None:
      entries.append(None)
      continue
    if name not in table:
      raise ValueError(f"logical axis: expected one of {sorted(table)}, got {name!r}")
    entry = table[name]
    for mesh_axis in (entry,) if isinstance(entry, str) else entry or ():
      if mesh_axis in owner:
        raise ValueError(
          f"logical axes {tuple(logical_axes)}: expected one per mesh axis, got "
          f"{owner[mesh_axis]!r} and {name!r} both on {mesh_axis!r}"
        )
      owner[mesh_axis] = name
    entries.append(entry)
  return PartitionSpec(*entries)
