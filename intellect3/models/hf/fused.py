"""Experts that a checkpoint holds in one tensor per layer, seen as one tensor per expert.

Place in the ring: between a directory and `source`. transformers 5 writes experts so when told
not to restore the published layout: `experts.gate_up_proj` is [E, 2 F, D], gate above up, and
`experts.down_proj` [E, D, F]. Each expert's matrix is one run of bytes, so only places change.
"""

import re
from collections.abc import Iterator, Mapping

from intellect3.models.config import ModelConfig
from intellect3.models.hf import names
from intellect3.models.stored.formats import Place

_FUSED = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)")
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def split(places: Mapping[str, Place], config: ModelConfig) -> dict[str, Place]:
  """Places by tensor, those of fused experts replaced by those of the experts.

  A tensor of another shape than experts would have stays as it is, and is then unexpected.
  """
  found: dict[str, Place] = {}
  for name, place in places.items():
    match = _FUSED.fullmatch(name)
    if match is None or names.is_extra(name, config):
      found[name] = place
      continue
    parts = _PARTS[match[2]]
    wide, narrow = config.embed_dim, config.expert_mlp_dim
    matrix = (2 * narrow, wide) if len(parts) == 2 else (wide, narrow)
    if place.shape != (config.num_experts, *matrix):
      found[name] = place
      continue
    found |= dict(_experts(match[1], parts, place))
  return found


def _experts(prefix: str, parts: tuple[str, ...], place: Place) -> Iterator[tuple[str, Place]]:
  experts, rows, columns = place.shape
  size = place.bytes // (experts * len(parts))
  shape = (rows // len(parts), columns)
  for number in range(experts * len(parts)):
    expert, part = divmod(number, len(parts))
    start = place.start + number * size
    yield (
      f"{prefix}.{expert}.{parts[part]}.weight",
      Place(place.file, place.dtype, shape, start, size),
    )
