"""What a step's batch itself says: its size, its padding, the staleness of its trained tokens.

Each process has some of the rows; the sums are exact integers, so the metrics do not depend on how
the rows lie.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from intellect3.pipeline import packing


class Sums(NamedTuple):
  """Over rows of one step's batch.

  Attributes:
    rows: of the arrays, padding included.
    slots: rows times their length.
    tokens: that are no padding.
    attended_pairs: (query, key) pairs of the causal attention within segments.
    trained: loss-masked tokens.
    staleness: sum over those, in steps.
    stalest: the largest of them; 0 where there are none.
  """

  rows: int
  slots: int
  tokens: int
  attended_pairs: int
  trained: int
  staleness: int
  stalest: int


def of_blocks(batch: packing.Batch, share: packing.Share) -> dict[str, Any]:
  """The sums of each block of a share, by its number (a string: JSON's keys are)."""
  size = len(batch.tokens) // len(share.blocks)
  return {
    str(block): list(_of_rows(batch, slice(place * size, (place + 1) * size)))
    for place, block in enumerate(share.blocks)
  }


def _of_rows(batch: packing.Batch, rows: slice) -> Sums:
  real, trained = batch.segment_ids[rows] > 0, batch.loss_mask[rows]
  staleness = (int(batch.step) - 1 - batch.policy_versions[rows])[trained]
  return Sums(
    rows=len(real),
    slots=real.size,
    tokens=int(real.sum()),
    attended_pairs=int((batch.positions[rows].astype(np.int64) + 1)[real].sum()),
    trained=int(trained.sum()),
    staleness=int(staleness.sum()),
    stalest=int(staleness.max(initial=0)),
  )


def merge(told: Sequence[dict[str, Any]], num_blocks: int) -> Sums:
  """The sums of the whole batch, of what every process told; a block that two hold counts once.

  Raises:
    ValueError: a block is missing.
  """
  blocks = {int(number): Sums(*sums) for each in told for number, sums in each.items()}
  if sorted(blocks) != list(range(num_blocks)):
    raise ValueError(f"blocks: expected 0 to {num_blocks - 1}, got {sorted(blocks)}")
  total = Sums(*(sum(column) for column in zip(*blocks.values(), strict=True)))
  return total._replace(stalest=max(block.stalest for block in blocks.values()))


def metrics(batch: packing.Batch, sums: Sums) -> dict[str, float]:
  """The metrics of a whole batch; its counts are in every share of it."""
  return {
    "rows": float(sums.rows),
    "tokens": float(sums.tokens),
    "loss_tokens": float(batch.loss_tokens),
    "loss_sequences": float(batch.loss_sequences),
    "padding_share": 1.0 - sums.tokens / sums.slots,
    "token_staleness_mean": sums.staleness / sums.trained if sums.trained else 0.0,
    "token_staleness_max": float(sums.stalest),
  }
