"""Which kernels a model runs with: `auto` made concrete, once, and said.

Place in the ring: the trainer, fine-tuning, scoring and the engine call it when their devices are
known, before they compile anything.
"""

import dataclasses
import logging
from typing import Any

import jax

from intellect3.kernels import attention, expert_parallel, grouped_matmul
from intellect3.kernels.platform import traced_platform
from intellect3.models.config import ModelConfig

logger = logging.getLogger(__name__)

SPLIT = {"attention": "blockwise", "grouped_matmul": "blocked"}
"""What `auto` is where XLA splits the arrays over several devices by itself, as in the engine: a
kernel for one device (`tokamax`) it cannot split. Training divides the work explicitly."""


def resolve(
  config: ModelConfig,
  platform: str | None = None,
  *,
  compiler_splits: bool = False,
  level: int = logging.INFO,
) -> ModelConfig:
  """The config with concrete kernels; logs what was chosen.

  Args:
    config: of the model.
    platform: cpu, gpu or tpu; None is that of the mesh that is set, else jax's default.
    compiler_splits: whether XLA will split the arrays over several devices.
    level: of the log's lines.

  Raises:
    ValueError: for an unknown kernel, or one that cannot run there.
  """
  platform = platform or traced_platform()
  mesh = jax.sharding.get_abstract_mesh()
  size = 1 if mesh.empty else mesh.size
  chosen: dict[str, Any] = {
    "attention": attention.resolve(config.attention, platform, config.dtype),
    "grouped_matmul": grouped_matmul.resolve(config.grouped_matmul, platform),
    "expert_exchange": expert_parallel.resolve(config.expert_exchange, platform),
  }
  exchanged = not compiler_splits and size > 1 and mesh.shape.get("expert", 1) > 1
  for field in chosen:
    auto = getattr(config, field) == "auto"
    if auto and compiler_splits:
      chosen[field] = SPLIT.get(field, chosen[field])
    where = f"{size} x {platform}" if size > 1 else platform
    if field != "expert_exchange" or exchanged:
      logger.log(level, "%s on %s: %s%s", field, where, chosen[field], " (auto)" if auto else "")
  return dataclasses.replace(config, **chosen)
