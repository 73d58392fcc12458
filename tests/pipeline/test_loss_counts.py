"""Per-token weights beside their tokens, and global counts from the manifest alone."""

import threading

import msgspec
import numpy as np
import pytest
from pipeline_records import counts, record

from intellect3 import rollout_log, types
from intellect3.losses import components
from intellect3.pipeline import packing, placement, rollout_source, sft_source
from intellect3.sharding.mesh import make_mesh

LENGTHS = [5, 9, 16, 7, 3, 4, 12, 8]


def weighted(number, length, keys=types.COMPONENTS, **options):
  """A record with weights on about half of its tokens, first tokens and prompts included."""
  rng = np.random.default_rng(number)
  draw = lambda: (rng.uniform(0.1, 2.0, length) * (rng.random(length) < 0.6)).astype("f4")  # noqa: E731
  weights = {key: draw() for key in keys}
  for each in weights.values():
    each[0] = 1.5  # nothing predicts it
  return msgspec.structs.replace(record(number, length, **options), token_weights=weights)


def untrained(number, length, **options):
  made = weighted(number, length, **options)
  mask = np.zeros(length, np.bool_)
  return msgspec.structs.replace(
    made, trajectory=msgspec.structs.replace(made.trajectory, loss_mask=mask)
  )


def commit(log_dir, records, shards=2):
  directory = rollout_log.step_directory(log_dir, 1)
  cuts = np.array_split(np.arange(len(records)), shards)
  entries = [
    rollout_log.write_shard(directory / f"worker_{index}.arrayrecord", [records[n] for n in cut])
    for index, cut in enumerate(cuts)
  ]
  manifest = types.Manifest(
    step=1,
    shards=entries,
    num_rollouts=len(records),
    num_groups=1,
    loss_tokens=sum(sum(entry.loss_tokens) for entry in entries),
    oldest_version=0,
    newest_version=0,
    metrics={},
    scheduler_state={},
  )
  rollout_log.commit_manifest(log_dir, manifest)
  return rollout_log.read_manifest(log_dir, 1)


def test_weights_lie_beside_their_tokens_and_only_where_their_term_reaches():
  records = [weighted(number, length) for number, length in enumerate((5, 3, 4))]
  batch = packing.pack(
    dict(enumerate(records)),
    ((0, 1), (2,)),
    row_length=9,
    row_count=3,
    step=1,
    counts=counts(records),
  )
  for number, (row, start) in enumerate(((0, 0), (0, 5), (1, 0))):
    made = records[number]
    span = row, slice(start, start + len(made.trajectory.tokens))
    mask = made.trajectory.loss_mask
    for key in ("rl", "ref_kl"):
      expected = np.where(mask, made.token_weights[key], 0.0)
      np.testing.assert_array_equal(getattr(batch, f"{key}_weights")[span], expected)
    np.testing.assert_array_equal(batch.ce_weights[span][1:], made.token_weights["ce"][1:])
    assert batch.ce_weights[span][0] == 0.0
  for key in types.COMPONENTS:
    array = getattr(batch, f"{key}_weights")
    assert array.dtype == np.float32 and not array[batch.segment_ids == 0].any()
    assert getattr(batch.component_denominators, key) == (array != 0).sum()


def test_a_component_without_weights_has_no_array_and_counts_loss_masked_tokens():
  records = [weighted(number, 6, keys=("ce",)) for number in range(3)]
  batch = packing.pack(
    dict(enumerate(records)),
    ((0, 1), (2,)),
    row_length=12,
    row_count=2,
    step=1,
    counts=counts(records),
  )
  assert batch.rl_weights is None and batch.ref_kl_weights is None
  trained = int(batch.loss_mask.sum())
  ce = int((batch.ce_weights != 0).sum())
  assert batch.component_denominators == components.Denominators(trained, ce, trained)
  plain = [record(number, 6) for number in range(3)]
  batch = packing.pack(
    dict(enumerate(plain)), ((0, 1, 2),), row_length=18, row_count=1, step=1, counts=counts(plain)
  )
  assert batch.ce_weights is None and batch.component_denominators is None


@pytest.mark.parametrize(
  ("change", "named"),
  [
    (
      lambda made: {"token_weights": {"ce": made.token_weights["ce"]}},
      r"token_weights: expected components \['ce'",
    ),
    (
      lambda made: {"token_weights": {**made.token_weights, "kl": made.token_weights["ce"]}},
      "token_weights: expected components of",
    ),
    (
      lambda made: {"token_weights": {**made.token_weights, "ce": np.ones(4, np.float32)}},
      r"token_weights\['ce'\]: expected float32\[5\], got float32\[4\]",
    ),
    (
      lambda made: {"token_weights": {**made.token_weights, "rl": np.full(5, np.nan, np.float32)}},
      r"token_weights\['rl'\]: expected finite values",
    ),
  ],
)
def test_weights_that_do_not_fit_are_refused(change, named):
  made = weighted(0, 5)
  bad = msgspec.structs.replace(made, **change(made))
  with pytest.raises(ValueError, match=f"rollout 0 branch 0: {named}"):
    packing.pack({0: bad}, ((0,),), row_length=5, row_count=1, step=1, counts=counts([made]))


def test_every_host_has_the_counts_of_the_whole_step(tmp_path):
  records = [weighted(number, length) for number, length in enumerate(LENGTHS)]
  records[2] = untrained(2, LENGTHS[2])  # a trajectory of which nothing is trained on
  manifest = commit(tmp_path, records)
  assert rollout_source.count(manifest) == counts(records)
  load = {"row_length": 16, "micro_rows": 2}
  whole = rollout_source.load_batch(tmp_path, manifest, **load)
  assert whole.loss_sequences == len(LENGTHS) - 1
  assert whole.loss_tokens == whole.loss_mask.sum()
  for key in types.COMPONENTS:
    array = getattr(whole, f"{key}_weights")
    assert getattr(whole.component_denominators, key) == (array != 0).sum() > 0
  for process in (0, 1):
    share = packing.Share((process,), 2)
    part = rollout_source.load_batch(tmp_path, manifest, **load, share=share)
    assert part.component_denominators == whole.component_denominators
    assert part.loss_sequences == whole.loss_sequences
    assert 0 < (part.ce_weights != 0).sum() < whole.component_denominators.ce


def test_a_log_without_components_still_reads(tmp_path):
  """As it was written before there were any."""
  records = [record(number, length) for number, length in enumerate(LENGTHS)]
  manifest = commit(tmp_path, records)
  path = rollout_log.step_directory(tmp_path, 1) / rollout_log.MANIFEST
  fields = msgspec.json.decode(path.read_bytes())
  for shard in fields["shards"]:
    del shard["component_tokens"]
  path.write_bytes(msgspec.json.encode(fields))
  manifest = rollout_log.read_manifest(tmp_path, 1)
  batch = rollout_source.load_batch(tmp_path, manifest, row_length=16, micro_rows=2)
  assert batch.component_denominators is None and batch.ce_weights is None
  assert batch.loss_sequences == sum(length > 2 for length in LENGTHS)


def test_placement_lays_rows_and_counts_out():
  records = [weighted(number, 6) for number in range(2)]
  batch = packing.pack(
    dict(enumerate(records)),
    ((0,), (1,)),
    row_length=6,
    row_count=2,
    step=1,
    counts=counts(records),
  )
  mesh = make_mesh()
  placed = placement.place(batch, mesh)
  assert placed.ref_logprobs is None
  np.testing.assert_array_equal(placed.ce_weights, batch.ce_weights)
  assert placed.ce_weights.sharding == placement.row_sharding(mesh)
  assert placed.component_denominators.rl.sharding.is_fully_replicated
  assert placed.component_denominators == batch.component_denominators


def test_supervised_batches_count_their_examples():
  def example(number):
    length = 4 + number % 3
    return np.arange(length, dtype=np.int32), np.arange(length) >= (2 if number % 3 else length)

  arguments = {"examples_per_step": 6, "first_step": 1, "last_step": 2, "row_length": 12}
  with sft_source.batches(example, **arguments, micro_rows=1, stop=threading.Event()) as batches:
    for batch in batches:
      assert batch.loss_sequences == 4  # of each six, two are not trained on
