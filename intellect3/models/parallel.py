"""How a model's forward pass is divided over a mesh: which parameter dims are gathered, which not.

Place in the ring: the train step makes one from the mesh and the table of rules and hands it to the
model, which then runs inside a `shard_map` over the whole mesh, on its device's shards. Heads,
widths and experts stay split; everything else of a layer is gathered just before the layer runs,
and once more before its backward pass.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from intellect3.sharding import collectives
from intellect3.sharding.rules import EXPERTS, Rules, axes_of, mesh_axes, to_spec

KEPT = ("heads", "kv_heads", "mlp", EXPERTS)
"""Logical axes that stay split: the layer works on its part of them."""


@dataclasses.dataclass(frozen=True)
class Parallel:
  """A division of the forward pass; the default is one device.

  Attributes:
    sizes: of the mesh axes above 1.
    heads: mesh axes of the attention heads.
    mlp: mesh axes of the MLPs' widths.
    experts: mesh axis of the experts, or None.
    length: mesh axis of a row's tokens, or None.
    rows: mesh axes of the rows.
    dims: by parameter (`a/b/c`), the mesh axes that each dimension is gathered over.
  """

  sizes: tuple[tuple[str, int], ...] = ()
  heads: tuple[str, ...] = ()
  mlp: tuple[str, ...] = ()
  experts: str | None = None
  length: str | None = None
  rows: tuple[str, ...] = ()
  dims: tuple[tuple[str, collectives.Dims], ...] = ()

  def parts(self, axes: tuple[str, ...] | str | None) -> int:
    """In how many parts something over these mesh axes is split."""
    return collectives.size((axes,) if isinstance(axes, str) else axes or (), dict(self.sizes))

  @property
  def copies(self) -> tuple[str, ...]:
    """The mesh axes along which devices have the same rows."""
    return tuple(axis for axis, _ in self.sizes if axis not in self.rows)

  @property
  def axes(self) -> tuple[str, ...]:
    """All mesh axes above 1."""
    return tuple(axis for axis, _ in self.sizes)

  def gather(self, params: Any, prefix: str, dtype: str) -> Any:
    """The parameters of a part of the model, gathered; see `collectives.gather`.

    Args:
      params: tree of this device's shards.
      prefix: where the tree stands among all parameters: `moe_layers/`, or nothing.
      dtype: that they travel in.
    """
    dims = dict(self.dims)

    def one(path: Any, leaf: jax.Array) -> jax.Array:
      name = prefix + jax.tree_util.keystr(path, simple=True, separator="/")
      return collectives.gather(leaf, dims[name], dtype)

    return jax.tree_util.tree_map_with_path(one, params) if self.sizes else params


ONE_DEVICE = Parallel()


def divide(axes_tree: Any, sizes: Mapping[str, int], rules: Rules) -> Parallel:
  """The division that a table says.

  Args:
    axes_tree: logical axes of all parameters, of `transformer.abstract`.
    sizes: of the mesh axes.
    rules: the table.

  Raises:
    ValueError: for a table whose heads, widths or experts lie on axes that no layer can be divided
      over.
  """
  above = {axis: size for axis, size in sizes.items() if size > 1}

  def on(name: str) -> tuple[str, ...]:
    return tuple(axis for axis in mesh_axes(name, rules) if axis in above)

  for name, like in (("kv_heads", "heads"), ("expert_mlp", "mlp")):
    if name in dict(rules) and on(name) != on(like):
      raise ValueError(
        f"rules: expected {name} on the mesh axes of {like} {on(like)}, got {on(name)}"
      )
  for name in (EXPERTS, "act_length"):
    if len(on(name)) > 1:
      raise ValueError(f"rules: expected {name} on one mesh axis, got {on(name)}")
  copied = [axis for axis in (*on("heads"), *on("mlp")) if axis in on("act_batch")]
  if copied:
    raise ValueError(f"rules: expected heads and mlp on axes without rows, got {copied}")
  if set(on(EXPERTS)) - set(on("act_batch")):
    raise ValueError(f"rules: expected experts on an axis of act_batch, got {on(EXPERTS)}")

  def dims(path: Any, axes: tuple[str | None, ...]) -> tuple[str, collectives.Dims]:
    stacked = axes[:1] == ("layers",)
    spec = to_spec(axes, rules)
    gathered = tuple(
      () if name in KEPT else tuple(axis for axis in axes_of(entry) if axis in above)
      for name, entry in zip(axes, spec, strict=True)
    )
    return jax.tree_util.keystr(path, simple=True, separator="/"), gathered[stacked:]

  is_axes = lambda leaf: isinstance(leaf, tuple)  # noqa: E731
  leaves = jax.tree_util.tree_flatten_with_path(axes_tree, is_leaf=is_axes)[0]
  return Parallel(
    sizes=tuple(above.items()),
    heads=on("heads"),
    mlp=on("mlp"),
    experts=next(iter(on(EXPERTS)), None),
    length=next(iter(on("act_length")), None),
    rows=on("act_batch"),
    dims=tuple(dims(path, axes) for path, axes in leaves),
  )
