"""Tables from logical axes to mesh axes.

Place in the ring: the model names the axes of its parameters and activations; a table says where
they lie. Another layout is another table. docs/design/0006-layouts.md says which is for what.
"""

from collections.abc import Sequence

from jax.sharding import PartitionSpec

Entry = str | tuple[str, ...] | None
Rules = tuple[tuple[str, Entry], ...]

EXPERTS = "experts"
"""The logical axis that makes a tensor one of experts (see `to_spec`)."""


def _changed(rules: Rules, **entries: Entry) -> Rules:
  return tuple({**dict(rules), **entries}.items())


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
)
"""Parameters over `fsdp` (and `tensor`), experts over `expert`; rows over `data`, `fsdp` and
`expert`. Parameters that are no experts are the same along `expert`: each of its groups gathers
them over `fsdp` alone."""

TRAIN_FSDP_EXPERT: Rules = _changed(TRAIN_FSDP, embed=("fsdp", "expert"), expert_embed="fsdp")
"""As `TRAIN_FSDP`, with the parameters that are no experts over `fsdp` and `expert`: no device
holds what another has, for gathers that also cross `expert`."""

TRAIN_CONTEXT: Rules = _changed(
  TRAIN_FSDP, embed=("fsdp", "expert", "context"), expert_embed=("fsdp", "context")
)
"""As `TRAIN_FSDP_EXPERT` for long sequences: parameters over `context` too, whose devices have
other tokens of the same rows."""

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
)
"""Heads, widths, vocabulary over `tensor`, experts over `expert`, the cache as its kv heads. Every
device has all rows: a decode step is too small to be worth splitting by them."""


def train_fsdp() -> Rules:
  """`TRAIN_FSDP`, for run files to refer to."""
  return TRAIN_FSDP


def train_fsdp_expert() -> Rules:
  """`TRAIN_FSDP_EXPERT`, for run files to refer to."""
  return TRAIN_FSDP_EXPERT


def train_context() -> Rules:
  """`TRAIN_CONTEXT`, for run files to refer to."""
  return TRAIN_CONTEXT


def serve() -> Rules:
  """`SERVE`, for run files to refer to."""
  return SERVE


def axes_of(entry: Entry) -> tuple[str, ...]:
  """The mesh axes of an entry of a table or of a PartitionSpec, outermost first."""
  return (entry,) if isinstance(entry, str) else tuple(entry or ())


def mesh_axes(name: str, rules: Rules) -> tuple[str, ...]:
  """The mesh axes of one logical axis; none where it is not split."""
  return axes_of(dict(rules).get(name))


def to_spec(logical_axes: Sequence[str | None], rules: Rules) -> PartitionSpec:
  """The partition of a tensor with these logical axes.

  A tensor that has the axis `experts` follows, for any other axis, the table's entry
  `expert_<axis>` where there is one: what lies over the mesh axis `expert` by its experts cannot
  lie there by its width too.

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
  if EXPERTS in logical_axes:
    table |= {name: table.get(f"expert_{name}", entry) for name, entry in table.items()}
  entries: list[Entry] = []
  owner: dict[str, str] = {}
  for name in logical_axes:
    if name is None:
      entries.append(None)
      continue
    if name not in table:
      raise ValueError(f"logical axis: expected one of {sorted(table)}, got {name!r}")
    entry = table[name]
    for mesh_axis in axes_of(entry):
      if mesh_axis in owner:
        raise ValueError(
          f"logical axes {tuple(logical_axes)}: expected one per mesh axis, got "
          f"{owner[mesh_axis]!r} and {name!r} both on {mesh_axis!r}"
        )
      owner[mesh_axis] = name
    entries.append(entry)
  return PartitionSpec(*entries)
