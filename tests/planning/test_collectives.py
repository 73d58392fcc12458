"""What a program sends: hand-written collectives in every form XLA has, and one it compiled."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from intellect3.planning import collectives, hardware, hlo

ROOT = pathlib.Path(__file__).resolve().parents[2]
AXES = {"data": 2, "fsdp": 2, "expert": 2}

MODULE = """HloModule m, is_scheduled=true

%wrapped (p: f32[8,4]) -> f32[2,4] {
  %p = f32[8,4]{1,0} parameter(0)
  ROOT %rs = f32[2,4]{1,0} reduce-scatter(%p), replica_groups={{0,1,4,5},{2,3,6,7}}, dimensions={0}
}

ENTRY %main (a: f32[2,4], b: bf16[2,4], c: f32[8,4]) -> f32[2,4] {
  %a = f32[2,4]{1,0} parameter(0)
  %b = bf16[2,4]{1,0} parameter(1)
  %c = f32[8,4]{1,0} parameter(2)
  %gather = f32[4,4]{1,0} all-gather(%a), replica_groups=[4,2]<=[8], dimensions={0}
  %gathers = ((f32[2,4]{1,0}, bf16[2,4]{1,0}), (f32[4,4]{1,0}, bf16[4,4]{1,0})) \
all-gather-start(%a, %b), replica_groups=[4,2]<=[4,2]T(1,0), dimensions={0}
  %gathered = (f32[4,4]{1,0}, bf16[4,4]{1,0}) all-gather-done(%gathers)
  %reduce = f32[8,4]{1,0} all-reduce(%c), \
replica_groups=mesh['axis_0'=2,'axis_1'=2,'axis_2'=2] {'axis_1'}, to_apply=%add
  %everyone = f32[8,4]{1,0} all-reduce(%c), replica_groups={}, to_apply=%add
  %scatter = ((f32[8,4]{1,0}), f32[2,4]{1,0}) async-start(%c), calls=%wrapped
  %scattered = f32[2,4]{1,0} async-done(%scatter)
  %permute = f32[2,4]{1,0} collective-permute(%a), \
source_target_pairs={{0,2},{2,0},{1,3},{3,1},{4,6},{6,4},{5,7},{7,5}}
  %big = bf16[8,4]{1,0} parameter(3)
  %n = s64[2]{0} parameter(4)
  %ragged = bf16[2,4]{1,0} ragged-all-to-all(%big, %b, %n, %n, %n, %n), \
replica_groups={{0,1},{2,3},{4,5},{6,7}}
  ROOT %odd = f32[2,4]{1,0} all-to-all(%a), replica_groups={{0,7},{1,6},{2,5},{3,4}}
}
"""


@pytest.fixture(scope="module")
def found():
  module = hlo.parse(MODULE)
  main = module.computations["main"]
  every = [collectives.find(i, main, AXES, module) for i in main.instructions]
  return {one.name: one for one in every if one is not None}


@pytest.mark.parametrize(
  ("name", "kind", "axes", "size", "wire"),
  [
    ("gather", "all-gather", ("expert",), 64, 32),
    ("gathers", "all-gather", ("fsdp",), 96, 48),
    ("reduce", "all-reduce", ("fsdp",), 128, 128),
    ("everyone", "all-reduce", ("data", "fsdp", "expert"), 128, 224),
    ("scatter", "reduce-scatter", ("data", "expert"), 128, 96),
    ("permute", "collective-permute", ("fsdp",), 32, 32),
    ("ragged", "ragged-all-to-all", ("expert",), 16, 8),  # the smaller of the two buffers
    ("odd", "all-to-all", ("data", "fsdp", "expert"), 32, 16),
  ],
)
def test_kind_axes_and_bytes(found, name, kind, axes, size, wire):
  one = found[name]
  assert (one.kind, one.bytes, one.wire_bytes) == (kind, size, wire)
  assert one.axes == axes
  assert one.partial == (name == "odd")  # pairs across corners: no axis joins just them


def test_only_what_begins_is_counted(found):
  assert set(found) == {
    *("gather", "gathers", "reduce", "everyone", "scatter", "permute", "ragged", "odd"),
  }
  assert found["gathers"].start and found["scatter"].start and not found["gather"].start
  assert found["gathers"].dtype == "f32"


@pytest.mark.parametrize(
  ("text", "groups"),
  [
    ("replica_groups=[2,4]<=[8]", ((0, 1, 2, 3), (4, 5, 6, 7))),
    ("replica_groups=[4,2]<=[2,4]T(1,0)", ((0, 4), (1, 5), (2, 6), (3, 7))),
    ("replica_groups=[4,2]<=[2,2,2]T(0,2,1)", ((0, 2), (1, 3), (4, 6), (5, 7))),
    ("replica_groups=mesh['x'=2,'y'=4] {'x'}", ((0, 4), (1, 5), (2, 6), (3, 7))),
    (
      "replica_groups=mesh['x'=1,'y'=2,'z'=4], device_ids=([4,2]T(1,0)) {'y'}",
      ((0, 1), (2, 3), (4, 5), (6, 7)),
    ),
    (
      "replica_groups=mesh['x'=2,'y'=2], device_ids=(3,1,2,0) {'x'}",
      ((3, 2), (1, 0)),
    ),
    ("replica_groups=mesh['x'=8] {'x':(2)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
    ("replica_groups=mesh['x'=2,'y'=4] {'x','y':(1)2}", ((0, 2, 4, 6), (1, 3, 5, 7))),
    ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", ((0, 4), (1, 5), (2, 6), (3, 7))),
    ("replica_groups={}, dimensions={0}", ((0, 1, 2, 3, 4, 5, 6, 7),)),
  ],
)
def test_groups_in_every_form(text, groups):
  assert collectives.groups_of(f", channel_id=1, {text}, dimensions={{0}}", 8) == groups


def test_groups_of_an_unknown_form_are_refused():
  with pytest.raises(ValueError, match="replica_groups: expected"):
    collectives.groups_of("replica_groups=mesh['x'=8], shape=(8) {'x'}", 8)


def test_time_is_bytes_over_the_slowest_link():
  """1 GB gathered by 16 devices on two nodes: 15/16 GB over a node's eight adapters of 50 GB/s."""
  device = hardware.load("h100")
  link = device.link_share
  nodes = [number // 8 for number in range(16)]
  array = (hlo.Shape("bf16", (500_000_000,)),)
  everyone = (tuple(range(16)),)
  across = tuple((number, number + 8) for number in range(8))
  inside = tuple(tuple(range(node * 8, node * 8 + 8)) for node in range(2))

  def seconds(kind, groups):
    one = collectives.Collective("c", kind, array, groups, (), False)
    return collectives.seconds(one, device, nodes) - device.latency

  assert seconds("all-gather", inside) == pytest.approx(7 / 8 * 1e9 / (450e9 * link))
  assert seconds("all-gather", everyone) == pytest.approx(15 / 16 * 1e9 / (400e9 * link))
  assert seconds("all-gather", across) == pytest.approx(1 / 2 * 1e9 / (50e9 * link))
  assert seconds("all-reduce", across) == pytest.approx(2 * 1 / 2 * 1e9 / (50e9 * link))
  assert seconds("all-to-all", everyone) == pytest.approx(1 / 2 * 1e9 / (50e9 * link))


COMPILED = """
import json
import jax, jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from intellect3.planning import hardware, hlo, schedule
from intellect3.sharding.mesh import make_mesh

mesh = make_mesh(data=2, fsdp=4)

def layer(x, w):  # [16, 32] rows over all devices; w [32, 32], a quarter on each
  w = jax.lax.all_gather(w, "fsdp", axis=0, tiled=True)
  return x @ w, jax.lax.psum(jnp.sum(x), "data")

def step(x, ws):
  x, sums = jax.lax.scan(layer, x, ws)
  y = jax.lax.psum_scatter(x, "fsdp", scatter_dimension=1, tiled=True)
  return jax.lax.all_to_all(y, "data", 0, 1, tiled=True), sums

rows = P(("data", "fsdp"))
step = jax.shard_map(step, mesh=mesh, in_specs=(rows, P(None, "fsdp")), check_vma=False,
                     out_specs=(P(("data", "fsdp")), P()))
shapes = jax.ShapeDtypeStruct((16, 32), "float32"), jax.ShapeDtypeStruct((6, 32, 32), "float32")
module = hlo.parse(jax.jit(step).lower(*shapes).compile().as_text())
line = schedule.timeline(module, hardware.load("cpu"), dict(mesh.shape), [0] * 8)
found = {}
for event in line.events:
  one = event.collective
  key = f"{one.kind} {one.dtype} {'+'.join(one.axes)}"
  count, size = found.get(key, (0, 0))
  found[key] = (count + event.times, size + event.times * one.bytes)
print(json.dumps({"found": found, "flops": line.matrix_flops}))
"""


def test_a_compiled_program_moves_what_was_written():
  """On 8 fake devices, in 6 layers: [32, 32] gathered over fsdp, a scalar summed over data; then
  [2, 32] of a device summed and scattered over fsdp, and the [2, 8] left exchanged over data."""
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
  environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
  result = subprocess.run(
    [sys.executable, "-c", COMPILED], cwd=ROOT, env=environment, capture_output=True, text=True
  )
  assert result.returncode == 0, result.stderr[-3000:]
  told = json.loads(result.stdout.splitlines()[-1])
  assert told["found"] == {
    "all-gather f32 fsdp": [6, 6 * 32 * 32 * 4],
    "all-reduce f32 data": [6, 6 * 4],
    "reduce-scatter f32 fsdp": [1, 2 * 32 * 4],
    "all-to-all f32 data": [1, 2 * 8 * 4],
  }
  assert told["flops"] == 6 * 2 * 2 * 32 * 32
