"""What kind of device a program is traced for.

Place in the ring: under the kernels' `resolve`, which chooses by it.
"""

import jax

PLATFORMS = ("cpu", "gpu", "tpu")


def traced_platform() -> str:
  """The platform of the mesh that is set, else of the default backend: cpu, gpu or tpu."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  platform = jax.default_backend() if device is None else device.platform
  return "gpu" if platform in ("cuda", "rocm") else platform
