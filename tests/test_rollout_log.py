"""The RolloutLog: atomic commits, and shards that are not what the manifest says."""

import msgspec
import numpy as np
import pytest

from intellect3 import rollout_log, types
from tests.rollouts.helpers import all_records


def make_record(step=1, rollout_id=0, length=5):
  rng = np.random.default_rng(rollout_id)
  versions = np.array([-1, -1] + [0] * (length - 2), np.int32)
  sampled = versions >= 0
  return types.TrajectoryRecord(
    step=step,
    rollout_id=rollout_id,
    group_id=rollout_id // 2,
    branch=0,
    task_id="words/train/3",
    environment="words",
    reward=1.0,
    advantage=0.25,
    trajectory=types.Trajectory(
      tokens=rng.integers(0, 99, length).astype(np.int32),
      loss_mask=sampled,
      inference_logprobs=np.where(sampled, -rng.random(length), 0.0).astype(np.float32),
      policy_versions=versions,
      temperature=0.7,
      routed_experts=rng.integers(0, 8, (length, 2, 2)).astype(np.uint8),
    ),
  )


def commit(tmp_path, records, step=1):
  directory = rollout_log.step_directory(tmp_path, step)
  shard = rollout_log.write_shard(directory / "w0.arrayrecord", records)
  manifest = types.Manifest(
    step=step,
    shards=[shard],
    num_rollouts=len(records),
    num_groups=1,
    loss_tokens=sum(shard.loss_tokens),
    oldest_version=0,
    newest_version=0,
    metrics={"reward": 0.5},
    scheduler_state={"next_step": 2},
  )
  rollout_log.commit_manifest(tmp_path, manifest)
  return manifest


def test_records_come_back_as_written(tmp_path):
  records = [make_record(rollout_id=n, length=4 + n) for n in range(3)]
  written = commit(tmp_path, records)
  manifest = rollout_log.read_manifest(tmp_path, 1)
  assert manifest == written
  assert list(manifest.shards[0].lengths) == [4, 5, 6]
  assert manifest.loss_tokens == 2 + 3 + 4
  for got, want in zip(all_records(tmp_path, manifest), records, strict=True):
    assert (got.rollout_id, got.advantage, got.task_id) == (want.rollout_id, 0.25, want.task_id)
    for field in ("tokens", "loss_mask", "inference_logprobs", "policy_versions", "routed_experts"):
      array, expected = getattr(got.trajectory, field), getattr(want.trajectory, field)
      assert array.dtype == expected.dtype
      np.testing.assert_array_equal(array, expected)


def test_a_step_is_invisible_until_its_manifest_is_renamed(tmp_path):
  rollout_log.write_shard(
    rollout_log.step_directory(tmp_path, 1) / "w0.arrayrecord", [make_record()]
  )
  (rollout_log.step_directory(tmp_path, 1) / "manifest.tmp").write_text("{}")
  assert rollout_log.read_manifest(tmp_path, 1) is None
  assert rollout_log.committed_steps(tmp_path) == []
  commit(tmp_path, [make_record(step=2)], step=2)
  assert rollout_log.committed_steps(tmp_path) == [2]
  assert rollout_log.remove_uncommitted(tmp_path) == ["step_000001"]
  assert rollout_log.committed_steps(tmp_path) == [2]


def test_a_step_is_committed_once(tmp_path):
  manifest = commit(tmp_path, [make_record()])
  with pytest.raises(ValueError, match="already committed"):
    rollout_log.commit_manifest(tmp_path, manifest)


@pytest.mark.parametrize("damage", ["cut", "flip", "missing"])
def test_a_damaged_shard_is_refused(tmp_path, damage):
  manifest = commit(tmp_path, [make_record(rollout_id=n) for n in range(4)])
  path = rollout_log.step_directory(tmp_path, 1) / manifest.shards[0].file
  data = bytearray(path.read_bytes())
  if damage == "cut":
    path.write_bytes(data[: len(data) // 2])
  elif damage == "flip":
    data[100] ^= 1
    path.write_bytes(data)
  else:
    path.unlink()
  with pytest.raises(ValueError, match="w0"):
    all_records(tmp_path, manifest)


def test_a_trajectory_that_breaks_contract_1_is_not_written(tmp_path):
  good = make_record().trajectory
  bad = types.Trajectory(
    tokens=good.tokens,
    loss_mask=np.ones_like(good.loss_mask),
    inference_logprobs=good.inference_logprobs,
    policy_versions=good.policy_versions,
    temperature=1.0,
  )
  with pytest.raises(ValueError, match="not sampled"):
    bad.check()
  broken = np.array([np.nan] * 5, np.float32)
  with pytest.raises(ValueError, match="finite"):
    types.Trajectory(
      tokens=good.tokens,
      loss_mask=good.loss_mask,
      inference_logprobs=np.where(good.loss_mask, broken, 0).astype(np.float32),
      policy_versions=good.policy_versions,
      temperature=1.0,
    ).check()
  with pytest.raises(ValueError, match="tokens: expected int32"):
    types.Trajectory(
      tokens=good.tokens.astype(np.int64),
      loss_mask=good.loss_mask,
      inference_logprobs=good.inference_logprobs,
      policy_versions=good.policy_versions,
      temperature=1.0,
    ).check()


def weighted(record, **weights):
  arrays = {key: np.asarray(value, np.float32) for key, value in weights.items()}
  return msgspec.structs.replace(record, token_weights=arrays)


def test_token_weights_come_back_and_the_manifest_counts_what_they_leave_in(tmp_path):
  # Two unsampled tokens, then three sampled ones: the first cannot be predicted, and only `ce`
  # lives outside the loss mask.
  first = weighted(make_record(), rl=[1, 1, 0, 2, -1], ce=[0.5, 0.1, 0, 0, 1])
  second = weighted(make_record(rollout_id=1), rl=[0] * 5, ce=[0] * 5)
  manifest = commit(tmp_path, [first, second])
  assert manifest.shards[0].component_tokens == {"rl": [2, 0], "ce": [2, 0]}
  assert rollout_log.read_manifest(tmp_path, 1) == manifest
  got = all_records(tmp_path, manifest)
  for key in ("rl", "ce"):
    np.testing.assert_array_equal(got[0].token_weights[key], first.token_weights[key])
    assert got[0].token_weights[key].dtype == np.float32
  assert dict(make_record().token_weights) == {}


@pytest.mark.parametrize(
  ("weights", "message"),
  [
    ({"kl": np.ones(5, np.float32)}, r"token_weights: expected components of .*, got 'kl'"),
    ({"ce": np.ones(4, np.float32)}, r"\['ce'\]: expected float32\[5\], got float32\[4\]"),
    ({"ce": np.ones(5)}, r"\['ce'\]: expected float32\[5\], got float64\[5\]"),
    ({"rl": [1.0] * 5}, r"\['rl'\]: expected a NumPy array"),
    ({"rl": np.full(5, np.nan, np.float32)}, r"\['rl'\]: expected finite values"),
  ],
)
def test_unsound_token_weights_are_named(tmp_path, weights, message):
  record = msgspec.structs.replace(make_record(), token_weights=weights)
  with pytest.raises(ValueError, match=message):
    rollout_log.write_shard(tmp_path / "w0.arrayrecord", [record])


def test_records_of_a_step_weight_the_same_components(tmp_path):
  plain, with_ce = make_record(), weighted(make_record(), ce=[0, 1, 0, 0, 0])
  with pytest.raises(ValueError, match=r"expected the components of the other records, \[\], got"):
    rollout_log.write_shard(tmp_path / "w0.arrayrecord", [plain, with_ce])
  with pytest.raises(ValueError, match=r"expected the components of the other records, \['ce'\]"):
    rollout_log.write_shard(tmp_path / "w0.arrayrecord", [with_ce, plain])
  manifest = commit(tmp_path, [with_ce])
  (entry,) = manifest.shards
  other = msgspec.structs.replace(entry, component_tokens={})
  with pytest.raises(ValueError, match="expected the same components in every shard"):
    rollout_log.check_manifest(
      msgspec.structs.replace(manifest, shards=[entry, other], loss_tokens=6), 1
    )
  short = msgspec.structs.replace(entry, component_tokens={"ce": []})
  with pytest.raises(ValueError, match="expected one number a record"):
    rollout_log.check_manifest(msgspec.structs.replace(manifest, shards=[short]), 1)
  wrong = msgspec.structs.replace(entry, component_tokens={"ce": [3]})
  with pytest.raises(ValueError, match=r"component tokens: expected {'ce': 3}, got {'ce': 1}"):
    all_records(tmp_path, msgspec.structs.replace(manifest, shards=[wrong]))
