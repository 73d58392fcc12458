"""What the fault lab's judges say of what no planted fault brings: each of them can fail."""

import random

import msgspec
import numpy as np
import pytest
from quiet_worlds import plan

from intellect3 import types
from intellect3.rollouts import conversation, groups, messages
from intellect3.simulation.faults import contracts, pools, truth
from intellect3.simulation.faults import held as held_lib

SEED = 1
TOKENS = (258, 104, 259, 97, 98, 256)
VERSIONS = (-1, -1, -1, 0, 0, 0)
NEWER = np.array([-1, -1, -1, 1, 1, 1], np.int32)
OTHERS = np.array([0.0, 0.0, 0.0, -0.5, -0.5, -0.5], np.float32)


def dispatch(rollout_id, index=0, **changes):
  group_id, sample = divmod(rollout_id, 2)
  return messages.Dispatch(
    rollout_id=rollout_id,
    group_id=group_id,
    sample=sample,
    environment="chat",
    split="train",
    index=index,
    seed=groups.rollout_seed(SEED, "chat", index, group_id, sample),
    temperature=1.0,
    **changes,
  )


def key(rollout_id):
  seed = conversation.derive_seed(dispatch(rollout_id).seed, "random")
  return contracts.rollout_key(random.Random(seed))


def record(rollout_id, step=1, reward=0.5, **changes):
  versions = np.array(VERSIONS, np.int32)
  sampled = versions >= 0
  logprobs = np.where(sampled, truth.logprobs(versions, TOKENS), 0.0).astype(np.float32)
  trajectory = types.Trajectory(
    tokens=np.array(TOKENS, np.int32),
    loss_mask=sampled,
    inference_logprobs=logprobs,
    policy_versions=versions,
    temperature=1.0,
  )
  return types.TrajectoryRecord(
    step=step,
    rollout_id=rollout_id,
    group_id=rollout_id // 2,
    branch=0,
    task_id="chat/train/0",
    environment="chat",
    reward=reward,
    advantage=0.25,
    trajectory=msgspec.structs.replace(trajectory, **changes),
  )


def manifest(step=1, trained=2, members=()):
  return types.Manifest(
    step=step,
    shards=[],
    num_rollouts=2,
    num_groups=1,
    loss_tokens=6,
    oldest_version=0,
    newest_version=0,
    metrics={},
    scheduler_state={
      "accounting": {"trained": trained},
      "sampler": {"cursor": {}, "members": {"chat": list(members)}},
    },
  )


def ledger(**changes):
  """Two rollouts were sent and scored."""
  made = contracts.Ledger(plan(seed=SEED, prompts_per_step=1, steps=1, **changes))
  made.published(0)
  for rollout_id in (0, 1):
    made.dispatched(dispatch(rollout_id))
    made.attempted(key(rollout_id), 0.5)
  return made


def test_a_sound_batch_passes():
  made = ledger()
  made.commits(manifest())
  made.read(manifest(), [record(0), record(1)])
  made.published(1)
  made.complete({1})
  assert made.breach is None


@pytest.mark.parametrize(
  ("says", "records"),
  [
    ("contract 1", [record(0), record(1, loss_mask=np.ones(6, bool))]),
    ("contract 4", [record(0), record(1, reward=0.75)]),
    ("2 rollouts, 1 in the log", [record(0)]),
    ("expected 1 groups", [record(0), record(2)]),
    ("contract 2.* version 1", [record(0), record(1, policy_versions=NEWER)]),
    ("contract 2.* did not make", [record(0), record(1, inference_logprobs=OTHERS)]),
    (
      "experts: step 1, rollout 1: nobody",
      [record(0), record(1, routed_experts=np.zeros((5, 2, 2), np.uint8))],
    ),
  ],
)
def test_an_unsound_batch_does_not(says, records):
  made = ledger()
  made.commits(manifest())
  with pytest.raises(contracts.Breach, match=says):
    made.read(manifest(), records)


def test_a_batch_that_is_another_one_when_it_is_read_again():
  made = ledger()
  made.commits(manifest())
  made.read(manifest(), [record(0), record(1)])
  with pytest.raises(contracts.Breach, match="is another one"):
    made.read(manifest(), [record(1), record(0)])


def test_versions_that_skip_or_come_again_and_a_run_that_is_done_too_early():
  for version in (2, 0):
    with pytest.raises(contracts.Breach, match="was published after"):
      ledger().published(version)
  for committed, read, published in ((False, (), False), (True, (), False), (True, (1,), False)):
    made = ledger()
    if committed:
      made.commits(manifest())
    if published:
      made.published(1)
    with pytest.raises(contracts.Breach, match="the run is done with"):
      made.complete(set(read))


def test_a_tool_called_again_after_its_result_was_used_unless_nothing_is_kept():
  for journal_seconds, let_go, breaks in (
    (0.5, False, True),
    (0.5, True, False),
    (None, False, False),
  ):
    made = ledger(journal_seconds=journal_seconds)
    made.acted(key(0), 0)
    made.went_on(key(0), 0)
    made.let_go([0] if let_go else [1])
    made.dispatched(dispatch(0, attempt=1))
    if breaks:
      with pytest.raises(contracts.Breach, match="contract 7: rollout 0, tool 0"):
        made.acted(key(0), 0)
    else:
      made.acted(key(0), 0)


def summary(rollout_id, reward):
  return messages.RolloutSummary(
    rollout_id=rollout_id,
    group_id=rollout_id // 2,
    purpose="train",
    environment="chat",
    reward=reward,
    error=None,
    truncated=False,
    lengths=[6],
    sampled_tokens=3,
    oldest_version=0,
    newest_version=0,
    servers=[],
    metrics={},
    seconds=1.0,
  )


def test_what_is_in_a_pool_was_earned_and_is_not_sampled_again():
  judge = pools.Judge(pools.POOLS["easy"], tasks=10, rollouts_per_prompt=2)
  for rollout_id, reward in ((0, 0.5), (1, 1.0)):
    assert judge.dispatched(dispatch(rollout_id, index=3)) is None
    judge.summarized(summary(rollout_id, reward))
  assert judge.commits(manifest(members=[[3, "easy"]])) is None  # a mean of 0.75
  assert "task 4 is easy" in judge.commits(manifest(members=[[4, "easy"]]))
  assert "task 3 is hard" in judge.commits(manifest(members=[[3, "hard"]]))
  for _ in range(2):  # it may have moved since the batch before
    judge.commits(manifest(members=[[3, "easy"]]))
  assert "sampled again" in judge.dispatched(dispatch(2, index=3))
  assert judge.dispatched(dispatch(2, index=3, attempt=1)) is None
  assert judge.dispatched(dispatch(4, index=5)) is None


@pytest.mark.parametrize("stages", [True, False])
def test_a_load_that_breaks_off_leaves_the_old_weights_or_a_mixture(stages, tmp_path):
  truth.publish(tmp_path, 1, keep=4)
  held = held_lib.Held(stages, "0", 0)
  held.next_load = "fails"
  with pytest.raises(ValueError, match="could not be read"):
    held.load(tmp_path / "v_000001", "1")
  assert (held.label, held.truth) == ("0", 0 if stages else truth.MIXED)
  held.load(tmp_path / "v_000001", "1")
  assert (held.label, held.truth) == ("1", 1)
  held.begin()
  with pytest.raises(ValueError, match="already open"):
    held.begin()
  held.end(abort=True)
  with pytest.raises(ValueError, match="no session"):
    held.end(abort=False)
