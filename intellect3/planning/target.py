"""Accelerators that are not here, as devices to compile for.

Place in the ring: beside it. XLA compiles for a GPU from its description alone; needed are jax's
CUDA plugin and compiler (requirements-plan.lock), neither a GPU nor NVIDIA's libraries.

    device = target.cuda_devices("h200", 1)[0]
    with jax.default_device(device):
      compiled = jax.jit(f, in_shardings=SingleDeviceSharding(device)).lower(*shapes).compile()

Set JAX_PLATFORMS=cpu in such a process: else jax looks for a real GPU, in vain, with a traceback.
"""

import importlib.util
import os

import jax
from jax.experimental import topologies

from intellect3.planning import hardware

PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
NODE = 8
NAMES = ("h100", "h200", "b200", "v5p")
"""What `devices` knows."""

_HOPPER = {"h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200"}
_BLACKWELL = "NVIDIA B200"
# What XLA's cost models and kernels ask of a device, from NVIDIA's data sheets of the SXM boards;
# memory and its rate are `hardware.toml`'s.
_CONFIG = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  core_count: {cores}
  fpus_per_core: 128
  clock_rate_ghz: {clock}
  l2_cache_size: {cache}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  device_memory_size: {memory}
  cuda_compute_capability {{ major: {major} feature_extension: ACCELERATED_FEATURES }}
  name: "{name}"
  runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0"
  cub_version: "3.1.2"
  device_interconnect_info {{ active_links: 18 }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{name}"
"""


def missing() -> str | None:
  """Why `cuda_devices` cannot work here; None where it can."""
  if not any(importlib.util.find_spec(plugin) for plugin in PLUGINS):
    return f"none of {PLUGINS} is installed (pip install --requirement requirements-plan.lock)"
  return None


def cuda_devices(name: str = "h200", count: int = 1) -> list[jax.Device]:
  """Devices of a CUDA machine that is not here: they can be compiled for, not run on.

  Args:
    name: h100 or h200, the SXM boards.
    count: of devices; more than one node of 8 is a multiple of 8.

  Returns:
    `count` devices, node after node.

  Raises:
    ValueError: for another name, a count that does not fill its nodes, or a missing plugin.
  """
  if name not in _HOPPER:
    raise ValueError(f"name: expected one of {tuple(_HOPPER)}, got {name!r}")
  if count < 1 or (count > NODE and count % NODE):
    raise ValueError(f"count: expected 1 to {NODE}, or a multiple of {NODE}, got {count}")
  if (reason := missing()) is not None:
    raise ValueError(f"cuda_devices: expected jax's CUDA plugin, but {reason}")
  return _cuda(name, _HOPPER[name], count, major=9, cores=132, clock=1.98, cache=52_428_800)


def devices(name: str, count: int) -> list[jax.Device]:
  """Devices of any kind in `NAMES` that are not here.

  Args:
    name: h100, h200 or b200 (CUDA), v5p (TPU; needs libtpu).
    count: of devices; of GPUs more than one node is a multiple of 8, of TPUs a multiple of 4.

  Raises:
    ValueError: for another name or count, or where the compiler for it is missing.
  """
  if name not in NAMES:
    raise ValueError(f"target: expected one of {NAMES}, got {name!r}")
  if name == "v5p":
    return _tpu(count)
  if name == "b200":
    cuda_devices("h200", count)  # for its checks
    return _cuda(name, _BLACKWELL, count, major=10, cores=148, clock=1.965, cache=132_644_864)
  return cuda_devices(name, count)


def _cuda(
  name: str, board: str, count: int, *, major: int, cores: int, clock: float, cache: int
) -> list[jax.Device]:
  card = hardware.load(name)
  config = _CONFIG.format(
    name=board,
    bandwidth=int(card.memory_rate),
    memory=card.memory,
    major=major,
    cores=cores,
    clock=clock,
    cache=cache,
  )
  topology = topologies.get_topology_desc(
    platform="cuda",
    target_config=config,
    topology=f"1x{max(1, count // NODE)}x{min(NODE, count)}",
  )
  return list(topology.devices)


def _tpu(count: int) -> list[jax.Device]:
  """Chips of a v5p cuboid whose sides are as equal as they can be; a host has 2 x 2 x 1."""
  if importlib.util.find_spec("libtpu") is None:
    raise ValueError(
      "target: expected libtpu for v5p, but it is not installed (make plan-tpu, or pip install "
      "--requirement requirements-plan-tpu.lock)"
    )
  if count < 4 or count % 4:
    raise ValueError(f"devices: expected a multiple of 4 for v5p, got {count}")
  sides = min(
    (
      (x, y, count // x // y)
      for x in range(2, count + 1, 2)
      for y in range(x, count + 1, 2)
      if count % (x * y) == 0
    ),
    key=lambda sides: max(sides) - min(sides),
  )
  # No machine to ask what it is.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
  topology = topologies.get_topology_desc(
    platform="tpu", topology_name="v5p:" + "x".join(map(str, sides))
  )
  return list(topology.devices)
