"""Which kernels a model runs with: `auto` made concrete, once, and said.

Place in the ring: the trainer, fine-tuning, scoring and the engine call it when their devices are
known, before they compile anything.
"""

import dataclasses
import logging
from typing import Any

from intellect3.kernels import attention, grouped_matmul
from intellect3.kernels.attention.interface import traced_platform
from intellect3.models.config import ModelConfig

logger = logging.getLogger(__name__)


def resolve(config: ModelConfig, platform: str | None = None) -> ModelConfig:
  """The config with concrete kernels; logs what was chosen.

  Args:
    config: of the model.
    platform: cpu, gpu or tpu; None is that of the mesh that is set, else jax's default.

  Raises:
    ValueError: for an unknown kernel, or one that cannot run there.
  """
  platform = platform or traced_platform()
  chosen: dict[str, Any] = {
    "attention": attention.resolve(config.attention, platform, config.dtype),
    "grouped_matmul": grouped_matmul.resolve(config.grouped_matmul, platform),
  }
  for field, name in chosen.items():
    asked = getattr(config, field)
    logger.info("%s on %s: %s%s", field, platform, name, " (auto)" if asked == "auto" else "")
  return dataclasses.replace(config, **chosen)
