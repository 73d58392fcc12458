"""Where devices come in a mesh, on machines described by slices, processes and coordinates."""

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest

from intellect3.sharding import mesh as meshes
from intellect3.sharding import topology
from tests.kernels import deviceless


@dataclasses.dataclass(frozen=True)
class Device:
  id: int
  process_index: int
  slice_index: int | None = None
  partition_index: int | None = None
  platform: str = "gpu"
  device_kind: str = "NVIDIA H200"
  coords: tuple[int, ...] = (0, 0, 0)
  core_on_chip: int = 0


def nodes(count, each=8):
  """A process a node, as a plan sees them: all of one slice."""
  return [Device(8 * n + i, n, 0) for n in range(count) for i in range(each)]


def sizes(**given):
  return {axis: given.get(axis, 1) for axis in meshes.AXES}


def node_of(placed):
  return np.vectorize(lambda device: device.process_index)(placed)


def crossing(placed):
  """The axes along which some devices are of different domains."""
  keys = topology.domains(list(placed.flat))
  number = np.array([sorted(set(keys)).index(key) for key in keys]).reshape(placed.shape)
  return tuple(axis for n, axis in enumerate(meshes.AXES) if np.ptp(number, axis=n).any())


def test_experts_stay_inside_nodes_and_shards_cross_them():
  placed = topology.arrange(sizes(fsdp=16, expert=8), nodes(16))
  assert placed.shape == (1, 16, 8, 1, 1)
  for n in range(16):
    assert np.all(node_of(placed)[0, n] == n)
  assert crossing(placed) == ("fsdp",)


def test_a_replica_is_whole_nodes():
  placed = topology.arrange(sizes(data=4, fsdp=4, expert=4, tensor=2), nodes(16))
  for replica in range(4):
    assert set(node_of(placed)[replica].flat) == set(range(4 * replica, 4 * replica + 4))
  assert crossing(placed) == ("data", "fsdp")


def test_an_axis_may_lie_in_a_node_and_between():
  placed = topology.arrange(sizes(fsdp=8, tensor=4), nodes(4))
  assert list(node_of(placed)[0, :, 0, 0, 0]) == [0, 0, 1, 1, 2, 2, 3, 3]
  assert crossing(placed) == ("fsdp",)
  assert crossing(topology.arrange(sizes(fsdp=8), nodes(1))) == ()


@pytest.mark.parametrize("index", ["slice_index", "partition_index"])
def test_a_process_a_gpu_is_put_beside_those_of_its_node(index):
  """Processes started round robin: node n has the processes n, n + 2, n + 4, .."""
  numbers: list[dict[str, Any]] = [{index: p % 2} for p in range(16)]
  devices = [Device(p, p, **number) for p, number in enumerate(numbers)]
  placed = topology.arrange(sizes(fsdp=2, expert=8), devices)
  assert [getattr(device, index) for device in placed.flat] == [0] * 8 + [1] * 8
  assert [device.id for device in placed[0, 0].flat] == [0, 2, 4, 6, 8, 10, 12, 14]
  assert crossing(placed) == ("fsdp",)


def test_the_order_that_was_given_stays_inside_a_domain():
  devices = nodes(1)[::-1]
  assert list(topology.arrange(sizes(fsdp=8), devices).flat) == devices


def test_groups_that_straddle_nodes_are_refused():
  with pytest.raises(ValueError, match=r"tensor: expected groups of 3 devices .* domains of 8"):
    topology.arrange(sizes(fsdp=8, tensor=3), nodes(3))
  with pytest.raises(ValueError, match=r"expert: expected groups of 6 devices .* domains of 4"):
    topology.arrange(sizes(fsdp=2, expert=3, tensor=2), nodes(3, each=4))
  with pytest.raises(ValueError, match="devices: expected as many in every domain, got"):
    topology.arrange(sizes(fsdp=12), nodes(2)[:12])


def tpus(slices, shape):
  cells = list(itertools.product(*(range(size) for size in shape)))
  return [
    Device(n * len(cells) + i, n, n, None, "tpu", "TPU v5", coords)
    for n in range(slices)
    for i, coords in enumerate(cells)
  ]


def test_tpu_slices_are_joined_by_the_outermost_axes():
  placed = topology.arrange(sizes(data=2, fsdp=8, expert=4), tpus(4, (4, 2, 2)))
  assert placed.shape == (2, 8, 4, 1, 1)
  index = np.vectorize(lambda device: device.slice_index)(placed)[..., 0, 0]
  # data is between slices, and half of fsdp: slices of 4 x 4.
  np.testing.assert_array_equal(index, np.repeat(np.arange(4), 16).reshape(2, 8, 4))
  assert crossing(placed) == ("data", "fsdp")
  assert {device.id for device in placed.flat} == set(range(64))


def test_an_axis_on_one_slice_is_a_line_of_its_torus():
  placed = topology.arrange(sizes(fsdp=4, tensor=4), tpus(1, (4, 4, 1)))
  for line in placed.reshape(4, 4):
    steps = np.abs(np.diff([device.coords for device in line], axis=0)).sum(axis=1)
    assert np.all(steps == 1)  # a neighbour each


def test_slices_that_no_axes_join_are_refused():
  assert topology.split({"data": 4, "fsdp": 6, "tensor": 2}, 8) == ((4, 2, 1), (1, 3, 2))
  with pytest.raises(ValueError, match=r"mesh: expected axes that divide over 3 slices, got .*4"):
    topology.split({"data": 4, "fsdp": 8}, 3)


DEVICELESS = """
import json
from intellect3.planning import target
from intellect3.sharding import mesh as meshes

mesh = meshes.make_mesh(data=2, fsdp=32, expert=8, devices=target.cuda_devices("h200", 512)[::-1])
print(json.dumps([device.process_index for device in mesh.devices.flat]))
"""


def test_the_512_gpus_of_a_plan_are_laid_out_by_their_nodes():
  found = deviceless.run(DEVICELESS)
  assert found == [device // 8 for device in range(512)]
