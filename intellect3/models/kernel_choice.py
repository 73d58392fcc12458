"""Which kernels a model runs with: `auto` made concrete, once, and said.

Place in the ring: the trainer, fine-tuning, scoring and the engine call it when their devices are
known, before they compile anything.
"""

import dataclasses
import logging
from typing import Any

import jax

from intellect3.kernels import attention, grouped_matmul
from intellect3.kernels.platform import traced_platform
from intellect3.models.config import ModelConfig

logger = logging.getLogger(__name__)

SPLIT = {"attention": "blockwise", "grouped_matmul": "blocked"}
"""What `auto` is on a mesh of several devices: XLA splits these by itself. A kernel for one device
(`tokamax`) it cannot split."""


def resolve(
  config: ModelConfig, platform: str | None = None, *, level: int = logging.INFO
) -> ModelConfig:
  """The config with concrete kernels; logs what was chosen.

  Args:
    config: of the model.
    platform: cpu, gpu or tpu; None is that of the mesh that is set, else jax's default.
    level: of the log's lines.

  Raises:
    ValueError: for an unknown kernel, or one that cannot run there.
  """
  platform = platform or traced_platform()
  mesh = jax.sharding.get_abstract_mesh()
  several = not mesh.empty and mesh.size > 1
  chosen: dict[str, Any] = {
    "attention": attention.resolve(config.attention, platform, config.dtype),
    "grouped_matmul": grouped_matmul.resolve(config.grouped_matmul, platform),
  }
  for field in chosen:
    auto = getattr(config, field) == "auto"
    if auto and several:
      chosen[field] = SPLIT[field]
    where = f"{mesh.size} x {platform}" if several else platform
    logger.log(level, "%s on %s: %s%s", field, where, chosen[field], " (auto)" if auto else "")
  return dataclasses.replace(config, **chosen)
