"""GPUs that are not here, as devices to compile for.

Place in the ring: beside it. XLA compiles for a GPU from its description alone; needed are jax's
CUDA plugin and compiler (requirements-plan.lock), neither a GPU nor NVIDIA's libraries.

    device = target.cuda_devices("h200", 1)[0]
    with jax.default_device(device):
      compiled = jax.jit(f, in_shardings=SingleDeviceSharding(device)).lower(*shapes).compile()

Set JAX_PLATFORMS=cpu in such a process: else jax looks for a real GPU, in vain, with a traceback.
"""

import importlib.util

import jax
from jax.experimental import topologies

PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
NODE = 8

# What XLA's cost models and kernels ask of a device. From NVIDIA's data sheets of the SXM boards;
# both are Hopper, and differ in memory alone.
_MEMORY = {
  "h100": ("NVIDIA H100 80GB HBM3", 3_350_000_000_000, 85_029_158_912),
  "h200": ("NVIDIA H200", 4_800_000_000_000, 151_397_597_184),
}
_HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  l2_cache_size: 52428800
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  device_memory_size: {memory}
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
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
  if name not in _MEMORY:
    raise ValueError(f"name: expected one of {tuple(_MEMORY)}, got {name!r}")
  if count < 1 or (count > NODE and count % NODE):
    raise ValueError(f"count: expected 1 to {NODE}, or a multiple of {NODE}, got {count}")
  if (reason := missing()) is not None:
    raise ValueError(f"cuda_devices: expected jax's CUDA plugin, but {reason}")
  board, bandwidth, memory = _MEMORY[name]
  topology = topologies.get_topology_desc(
    platform="cuda",
    target_config=_HOPPER.format(name=board, bandwidth=bandwidth, memory=memory),
    topology=f"1x{max(1, count // NODE)}x{min(NODE, count)}",
  )
  return list(topology.devices)
