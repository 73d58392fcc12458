"""A trainer of several processes, none of them started: who would be, and what all of them tell."""

import numpy as np
import pytest

from intellect3.distributed import cluster
from intellect3.pipeline import packing
from intellect3.rl import batch_sums, roles
from tests.test_rl_publisher import shared


@pytest.mark.parametrize("count", [1, 3])
def test_all_starts_so_many_trainers_that_know_each_other(tmp_path, count):
  children = roles._children(shared(tmp_path), ["run"], [], 0, count)
  trainers = [child for child in children if "trainer" in child.command]
  assert [child.name for child in trainers] == ["trainer", "trainer_1", "trainer_2"][:count]
  assert len({child.log for child in trainers}) == count
  # Inside a Slurm step, whose own variables are of other processes.
  slurm = {"SLURM_STEP_NODELIST": "gpu[1-4]", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}
  found = [cluster.detect({**slurm, **child.environment}) for child in trainers]
  assert [each.process_id for each in found] == list(range(count))
  assert {each.num_processes for each in found} == {count}
  assert len({each.coordinator for each in found}) == 1
  assert all(child.ends_run and child.group is None for child in trainers)


def rows(seed, count):
  """Rows of a batch of step 5 with some of everything."""
  rng = np.random.default_rng(seed)
  batch = packing.empty_batch(count, 8, step=5, loss_tokens=20, loss_sequences=6)
  batch.segment_ids[:] = np.sort(rng.integers(0, 3, (count, 8)), axis=1)[:, ::-1]
  batch.positions[:] = rng.integers(0, 8, (count, 8))
  batch.loss_mask[:] = rng.random((count, 8)) < 0.4
  batch.policy_versions[:] = rng.integers(0, 5, (count, 8))
  return batch


def test_sums_of_blocks_make_up_those_of_the_batch():
  whole = rows(0, 6)
  share = packing.Share((0, 1, 2), 3)
  parts = [
    packing.Batch(*(leaf[at] if np.ndim(leaf) else leaf for leaf in whole[:11]))
    for at in (slice(0, 4), slice(2, 6))
  ]
  told = [
    batch_sums.of_blocks(parts[0], packing.Share((0, 1), 3)),
    batch_sums.of_blocks(parts[1], packing.Share((1, 2), 3)),  # both hold block 1
  ]
  sums = batch_sums.merge(told, 3)
  assert sums == batch_sums.merge([batch_sums.of_blocks(whole, share)], 3)
  tokens = pairs = 0
  staleness = []
  for row, column in np.ndindex(6, 8):
    if whole.segment_ids[row, column]:
      tokens, pairs = tokens + 1, pairs + int(whole.positions[row, column]) + 1
    if whole.loss_mask[row, column]:
      staleness.append(4 - int(whole.policy_versions[row, column]))
  metrics = batch_sums.metrics(whole, sums)
  assert (sums.tokens, sums.attended_pairs) == (tokens, pairs)
  assert metrics["rows"] == 6 and metrics["loss_tokens"] == 20 and metrics["loss_sequences"] == 6
  assert metrics["padding_share"] == pytest.approx(1 - tokens / 48)
  assert metrics["token_staleness_mean"] == pytest.approx(sum(staleness) / len(staleness))
  assert metrics["token_staleness_max"] == max(staleness)


def test_a_block_that_nobody_holds_is_an_error():
  told = [batch_sums.of_blocks(rows(0, 2), packing.Share((0,), 2))]
  with pytest.raises(ValueError, match=r"blocks: expected 0 to 1, got \[0\]"):
    batch_sums.merge(told, 2)
