"""Packed batches for the training tests."""

import msgspec
import numpy as np

from intellect3 import types
from intellect3.pipeline import packing


def records(lengths, *, vocab=32, seed=0):
  """Records of the given lengths; the first two tokens of each are a prompt."""
  rng = np.random.default_rng(seed)
  made = []
  for number, length in enumerate(lengths):
    sampled = np.arange(length) >= 2
    made.append(
      types.TrajectoryRecord(
        step=1,
        rollout_id=number,
        group_id=number // 2,
        branch=0,
        task_id="t",
        environment="t",
        reward=0.0,
        advantage=float(rng.normal()),
        trajectory=types.Trajectory(
          tokens=rng.integers(0, vocab, length, dtype=np.int32),
          loss_mask=sampled,
          inference_logprobs=np.where(
            sampled, np.log(1 / vocab) + 0.2 * rng.normal(size=length), 0
          ).astype(np.float32),
          policy_versions=np.where(sampled, 0, types.NOT_SAMPLED).astype(np.int32),
          temperature=(0.7, 1.0, 1.3)[number % 3],
        ),
      )
    )
  return made


def weighted(made, *, seed=1):
  """The records with weights of all components: some 0, some on tokens that nobody sampled."""
  rng = np.random.default_rng(seed)

  def weights(length):
    drawn = rng.uniform(0.2, 2.0, length) * (rng.random(length) < 0.7)
    return drawn.astype(np.float32)

  return [
    msgspec.structs.replace(
      record,
      token_weights={key: weights(len(record.trajectory.tokens)) for key in types.COMPONENTS},
    )
    for record in made
  ]


def pack(made, plan, *, row_length, row_count):
  """Packs records as a plan says."""
  return packing.pack(
    dict(enumerate(made)),
    plan,
    row_length=row_length,
    row_count=row_count,
    step=1,
    counts=counts(made),
  )


def counts(made):
  """The global counts of a batch of these records."""
  trained = [int(record.trajectory.loss_mask.sum()) for record in made]
  weighted = {}
  for record in made:
    for component, tokens in record.component_tokens().items():
      weighted[component] = weighted.get(component, 0) + tokens
  return packing.Counts(sum(trained), sum(tokens > 0 for tokens in trained), weighted)
