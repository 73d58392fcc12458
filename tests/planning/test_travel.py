"""Weights that travel in float32: shapes worked by hand, under every kind of division."""

import math
import types

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from intellect3.models import presets
from intellect3.planning import collectives, hardware, hlo, schedule, travel

PLACES = {
  # 264 words, width 64, four heads of 16, mlp 128; two MoE layers of eight experts, each 24 wide.
  "embedding": ((264, 64), ("tensor", ("fsdp", "expert"))),
  "dense_layers/mlp/gate": ((2, 64, 128), (None, ("fsdp", "expert"), "tensor")),
  "moe_layers/attention/q": ((2, 64, 4, 16), (None, ("fsdp", "expert"), "tensor", None)),
  "moe_layers/moe/router": ((2, 64, 8), (None, ("fsdp", "expert"), None)),
  "moe_layers/moe/gate": ((2, 8, 64, 24), (None, "expert", "fsdp", "tensor")),
  "moe_layers/moe/down": ((2, 8, 24, 64), (None, "expert", "tensor", "fsdp")),
}


def program(dtype="bfloat16", **sizes):
  mesh = AbstractMesh(
    tuple(sizes.get(axis, 1) for axis in ("fsdp", "expert", "tensor")), ("fsdp", "expert", "tensor")
  )
  params = {
    name: jax.ShapeDtypeStruct(
      shape, np.float32, sharding=NamedSharding(mesh, PartitionSpec(*places))
    )
    for name, (shape, places) in PLACES.items()
  }
  return types.SimpleNamespace(config=presets.tiny(dtype=dtype), first=params)


def event(kind, *arrays, axes=("fsdp",), size=2, source="a/all_gather", file="", dtype="f32"):
  shapes = tuple(hlo.Shape(dtype, dims) for dims in arrays)
  one = collectives.Collective("c", kind, shapes, (tuple(range(size)),), axes, False)
  return schedule.Event(one, 3, 1.0, 1.0, False, source, file)


def found(program, *events):
  return travel.float32_weights(program, schedule.Timeline(events=list(events)))


EXPERT = {"fsdp": 2, "expert": 4}
TENSOR = {"fsdp": 4, "tensor": 2}


@pytest.mark.parametrize(
  ("sizes", "dims", "axes", "weight"),
  [
    # Two of the eight experts lie in each group, and their width is gathered over fsdp alone.
    (EXPERT, (2, 64, 24), ("fsdp",), "moe/gate"),
    (EXPERT, (2, 24, 64), ("fsdp",), "moe/down"),
    (EXPERT, (2, 2, 64, 24), ("fsdp",), "moe/gate"),  # the stack of both layers
    (EXPERT, (128, 24), ("fsdp",), "moe/gate"),  # experts and width merged
    (EXPERT, (2, 2, 32, 24), ("fsdp",), "moe/gate"),  # device by device, not yet side by side
    (EXPERT, (8, 64, 24), ("fsdp", "expert"), "moe/gate"),  # all experts everywhere
    (EXPERT, (8, 32, 24), ("expert",), "moe/gate"),
    (EXPERT, (64, 4, 16), ("fsdp", "expert"), "attention/q"),
    (EXPERT, (32, 4, 16), ("fsdp",), "attention/q"),  # the first half of the way
    # Half of the heads, widths and words stay on each tensor rank.
    (TENSOR, (64, 2, 16), ("fsdp",), "attention/q"),
    (TENSOR, (64, 32), ("fsdp",), "attention/q"),  # heads and head_dim merged
    (TENSOR, (64, 64), ("fsdp",), "mlp/gate"),
    (TENSOR, (132, 64), ("fsdp",), "embedding"),
    (TENSOR, (264, 64), ("tensor",), "embedding"),
    (TENSOR, (8, 64, 12), ("fsdp",), "moe/gate"),
    # Nothing of a weight.
    (EXPERT, (2, 32, 24), ("fsdp",), None),  # a device's block is not gathered
    (EXPERT, (2, 64, 33), ("fsdp",), None),
    (EXPERT, (2, 64, 24), ("data",), None),  # no weight is split along it
    (EXPERT, (64, 8), ("fsdp", "expert"), None),  # the router's, which computes in float32
    (TENSOR, (264, 15), ("fsdp",), None),
  ],
)
def test_a_gathered_weight_is_known_by_its_local_shape(sizes, dims, axes, weight):
  size = max(2, math.prod(sizes.get(axis, 1) for axis in axes))
  rows = found(program(**sizes), event("all-gather", dims, axes=axes, size=size))
  assert bool(rows) == (weight is not None)
  if weight is not None:
    (row,) = rows
    assert weight in row["weight"]
    assert (row["count"], row["bytes"]) == (3, 3 * 4 * np.prod(dims))


@pytest.mark.parametrize(
  ("kind", "arrays", "there"),
  [
    # The gate's block of one layer is [2, 32, 24]: whole, or one of two pieces.
    ("all-to-all", [(2, 32, 24)], True),
    ("all-to-all", [(2, 32, 12), (2, 32, 12)], True),
    ("all-to-all", [(2, 2, 16, 24)], True),
    ("all-to-all", [(2, 64, 30)], False),
    ("ragged-all-to-all", [(2, 32, 24)], True),
    ("ragged-all-to-all", [(2 * 32 * 24,)], False),  # a number for each token
    ("collective-permute", [(2, 32, 24)], True),
    ("collective-permute", [(2, 32, 17)], False),
    ("collective-broadcast", [(2, 64, 24)], True),
    ("all-reduce", [(2, 64, 24)], False),  # gradients
    ("reduce-scatter", [(2, 64, 24)], False),
  ],
)
def test_whatever_moves_a_weight_is_looked_at(kind, arrays, there):
  assert bool(found(program(**EXPERT), event(kind, *arrays))) == there


@pytest.mark.parametrize(
  "changes",
  [
    {"dtype": "bf16"},
    {"source": "transpose(jvp(Transformer))/reduce_scatter"},  # a sum that XLA wrote otherwise
    {"file": "intellect3/training/muon.py:300"},  # the momentum, in newton_schulz_dtype
  ],
)
def test_gradients_and_momentum_are_no_weights(changes):
  assert found(program(**EXPERT), event("all-gather", (2, 64, 24)))
  assert found(program(**EXPERT), event("all-gather", (2, 64, 24), **changes)) == []


def test_a_float32_model_moves_float32():
  assert found(program("float32", **EXPERT), event("all-gather", (2, 64, 24))) == []


def test_nothing_is_split_on_one_device():
  assert found(program(), event("all-gather", (8, 64, 24))) == []


@pytest.mark.parametrize(
  ("dims", "into", "same"),
  [
    ((4, 16, 64), (64, 64), True),
    ((4, 16, 64), (64, 16, 4), True),
    ((4, 16, 64), (1, 256, 16), True),  # 4 x 64, 16
    ((4, 16, 64), (32, 128), False),
    ((4, 16), (4, 16, 2), False),
    ((2, 3), (6,), True),
  ],
)
def test_dimensions_in_any_order_and_merged(dims, into, same):
  assert travel.merges(dims, into) == same


def test_where_a_collective_was_written_is_kept():
  """The innermost frame of the package, which tells the optimizer's exchanges."""
  text = """HloModule m, is_scheduled=true

FileNames
1 "/x/intellect3/training/muon.py"
2 "/x/jax/lax.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=1 function_name_id=1 line=340}
2 {file_name_id=2 function_name_id=1 line=7}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}

ENTRY %main (a: f32[4]) -> f32[8] {
  %a = f32[4]{0} parameter(0)
  ROOT %g = f32[8]{0} all-gather(%a), replica_groups={{0,1}}, metadata={stack_frame_id=2}
}
"""
  card = hardware.load("h200")
  (event,) = schedule.timeline(hlo.parse(text), card, {"fsdp": 2}, [0, 0]).events
  assert event.file == "intellect3/training/muon.py:340"
