"""A run's own files, measured: metrics worked by hand, a log of known lengths."""

import json

import numpy as np
import pytest

from intellect3 import rollout_log, types
from intellect3.rollouts import credit, difficulty, filters, messages, reports, scheduler
from intellect3.simulation import reality

STEPS = 40
IDLE, PER_SECOND = 0.2, 500.0


def trainer_row(step):
  return {
    "step": step,
    "loop_seconds": 1.0,
    "wait_seconds": 0.3 + 0.1 * (step % 2),
    "step_seconds": 0.4,
    "tokens": 200.0,
    "publish_seconds": 0.1,
    "weights/wait_seconds": 0.02,
    "weights/write_seconds": 0.05,
    "checkpoint_seconds": 0.01,
  }


def orchestrator_row(step):
  """n swings from 10 to 300; the servers stand still for 0.1 of each second."""
  running = 155 - 145 * np.cos(step / 6)
  seconds = (IDLE + running / PER_SECOND) / 0.9
  return {
    "step": step,
    "collect_seconds": 1.0,
    "sampled_tokens": 4 * running / seconds,
    "sampled_length_mean": 4.0,
    "rollout_seconds_mean": seconds,
    "rollouts_running": running,
    "staleness_mean": 1.0 + step % 2,
    "batch_rollouts": 256.0,
    "rollouts_spanning_versions": 256.0,
    "weight_sync_seconds": 0.3,
    "weight_sync/pause_seconds": 0.01,
    "weight_sync/load_seconds": 0.07,
    "weight_sync/resume_seconds": 0.03,
    "weight_sync/first_token_seconds": 0.09,
  }


def record(step, rollout_id, length, reward):
  versions = np.array([types.NOT_SAMPLED] * 3 + [0] * length, np.int32)
  return types.TrajectoryRecord(
    step=step,
    rollout_id=rollout_id,
    group_id=rollout_id // 2,
    branch=0,
    task_id="words/train/1",
    environment="words",
    reward=reward,
    advantage=0.0,
    trajectory=types.Trajectory(
      tokens=np.zeros(3 + length, np.int32),
      loss_mask=versions >= 0,
      inference_logprobs=np.zeros(3 + length, np.float32),
      policy_versions=versions,
      temperature=1.0,
    ),
  )


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
  path = tmp_path_factory.mktemp("run")
  (path / "metrics").mkdir()
  for name, row in (("trainer", trainer_row), ("orchestrator", orchestrator_row)):
    lines = [json.dumps(row(step)) for step in range(1, STEPS + 1)]
    (path / "metrics" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
  for step in range(1, STEPS + 1):
    records = [record(step, 4 * step + i, 1 + i, float(i > 2)) for i in range(4)]
    shard = rollout_log.write_shard(
      rollout_log.step_directory(path / "rollouts", step) / "worker_0.arrayrecord", records
    )
    rollout_log.commit_manifest(
      path / "rollouts",
      types.Manifest(
        step=step,
        shards=[shard],
        num_rollouts=4,
        num_groups=2,
        loss_tokens=10,
        oldest_version=0,
        newest_version=0,
        metrics={},
        scheduler_state={},
      ),
    )
  return path


def measure(run_dir, first=1, last=STEPS):
  return reality.measured(
    run_dir, range(first, last + 1), num_servers=1, max_running=300, tasks={"words": 70}
  )


def test_the_service_time_is_found_without_the_pauses(run_dir):
  found = measure(run_dir)[1]
  assert found.idle_seconds == pytest.approx(IDLE, rel=0.05)
  assert found.rollouts_per_second == pytest.approx(PER_SECOND, rel=0.05)


def test_the_servers_of_the_scenario_serve_as_measured(run_dir):
  servers = measure(run_dir)[0].servers
  found = measure(run_dir)[1]
  for batch, rate in zip(servers.decode_batch, servers.decode_tokens_per_second, strict=True):
    assert batch * 4 / rate == pytest.approx(found.at(batch))
  assert servers.decode_batch[0] == 1 and servers.decode_batch[-1] == 300
  assert servers.max_running == 300


def test_trainer_and_sync_are_the_means(run_dir):
  scenario = measure(run_dir)[0]
  assert scenario.trainer.seconds_per_token == pytest.approx(0.4 / 200)
  assert scenario.trainer.fixed_seconds == pytest.approx(0.01)
  assert scenario.trainer.gather_seconds == pytest.approx(0.08)
  assert scenario.trainer.write_seconds == pytest.approx(0.05)
  assert scenario.trainer.read_seconds == pytest.approx(0.3)
  sync = scenario.sync
  assert sync.verify_seconds == pytest.approx(0.3 - 0.2)
  assert (sync.pause_seconds, sync.load_seconds, sync.resume_seconds) == pytest.approx(
    (0.01, 0.07, 0.03)
  )
  assert sync.canary_seconds == pytest.approx(0.09)


def test_lengths_prompts_and_difficulties_are_the_logs(run_dir):
  words = measure(run_dir, 1, 2)[0].environments["words"]
  assert words.lengths.empirical == (1, 1, 2, 2, 3, 3, 4, 4)
  assert words.prompt_tokens == 3
  assert words.solved == (0.0, 0.0, 0.5, 0.5)
  assert words.tasks == 70


def test_a_constant_load_gives_a_constant_throughput():
  rows = [{**orchestrator_row(3), "step": step} for step in range(1, 31)]
  found = reality.service(rows)
  running, seconds = rows[0]["rollouts_running"], 0.9 * rows[0]["rollout_seconds_mean"]
  assert found.idle_seconds == 0
  assert found.rollouts_per_second == pytest.approx(running / seconds)


def test_steps_in_which_no_rollout_ended_count_as_time_alone():
  rows = [{**orchestrator_row(3), "step": step} for step in range(1, 31)]
  idle = {"step": 31, "collect_seconds": 5.0, "sampled_tokens": 0, "sampled_length_mean": 4.0}
  assert reality.service([*rows, idle]).running[0] == pytest.approx(rows[0]["rollouts_running"])
  assert len(reality.service([idle, *rows]).running) == reality.BLOCKS


def test_servers_stand_still_once_a_step_whatever_the_rows_tell():
  """A row has the median of its syncs: one with none beside one with two is two steps' syncs."""
  rows = [
    {
      key: value
      for key, value in orchestrator_row(step).items()
      if step % 2 or not key.startswith("weight_sync")
    }
    for step in range(1, STEPS + 1)
  ]
  found = reality.service(rows)
  assert found.idle_seconds == pytest.approx(IDLE, rel=0.05)
  assert found.rollouts_per_second == pytest.approx(PER_SECOND, rel=0.05)


def test_those_that_a_sync_cuts_in_two_are_those_at_once():
  def rows(*spanning):
    return [
      {"step": step, "batch_rollouts": 40.0, "rollouts_spanning_versions": float(count)}
      for step, count in enumerate(spanning)
    ]

  assert reality.at_once(rows(12, 4, 8), num_servers=2, most=64) == 4
  assert reality.at_once(rows(12, 4, 8), num_servers=1, most=6) == 6
  assert reality.at_once(rows(0, 0, 0), num_servers=1, most=64) == 1
  # Of long rollouts nearly all are cut, and tell nothing.
  assert reality.at_once(rows(36, 40, 28), num_servers=1, most=64) == 64


def test_a_batch_is_picked_up_after_its_commit(tmp_path):
  """Steps of a second. The third pick-up is the quickest: it takes as long as reading alone."""
  (tmp_path / "metrics").mkdir()
  waits, commits = (0.5, 0.7, 0.4, 0.1), (0.1, 1.1, 2.1, 3.1)
  trainer = [
    {"step": step + 1, "loop_seconds": 1.0, "wait_seconds": wait} for step, wait in enumerate(waits)
  ]
  orchestrator = [
    {"step": step + 1, "collect_seconds": seconds}
    for step, seconds in enumerate(np.diff(commits, prepend=0.0).tolist())
  ]
  for name, rows in (("trainer", trainer), ("orchestrator", orchestrator)):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics" / f"{name}.jsonl").write_text(text)
  ready = 0.1 + 0.15 * 0.3  # the 5% quantile of four waits
  # The fourth batch lay ready. The others are begun 0.4, 0.6 and 0.3 s after their commits.
  expected = ready + (0.1 + 0.3 + 0.0) / 3
  assert reality.pickup_seconds(tmp_path, range(1, 5)) == pytest.approx(expected)
  assert reality.pickup_seconds(tmp_path, [3]) == pytest.approx(0.4)
  with pytest.raises(ValueError, match="expected 5 steps, got 4; not \\[5\\]"):
    reality.pickup_seconds(tmp_path, [2, 5])


def test_how_many_ran_and_ended(run_dir):
  rows = reality.rows_of(run_dir, "orchestrator", range(1, STEPS + 1))
  assert reality.running(rows) == pytest.approx(np.mean([row["rollouts_running"] for row in rows]))
  ended = np.mean([row["sampled_tokens"] / 4.0 for row in rows])
  assert reality.ended_per_second(rows) == pytest.approx(ended)


def test_halves_alternate_and_share_no_step():
  measured, held_out = reality.alternate(11, 40, 10)
  assert measured == [*range(11, 21), *range(31, 41)]
  assert held_out == list(range(21, 31))


def test_what_came_of_the_steps(run_dir):
  seen = reality.observed(run_dir, range(11, 21))
  assert seen.trainer_idle_share == pytest.approx(0.35)
  assert seen.mean_staleness == pytest.approx(1.5)
  assert seen.step_seconds == pytest.approx(1.0)


def test_missing_steps_and_metrics_are_named(run_dir):
  with pytest.raises(ValueError, match="expected 12 steps, got 11; not"):
    reality.observed(run_dir, range(30, 42))
  rows = [{k: v for k, v in orchestrator_row(1).items() if k != "rollout_seconds_mean"}]
  with pytest.raises(ValueError, match="rollout_seconds_mean: expected it in every row"):
    reality.service(rows)


def summary(rollout_id, seconds):
  return messages.RolloutSummary(
    rollout_id=rollout_id,
    group_id=rollout_id // 2,
    purpose="train",
    environment="words",
    reward=float(rollout_id % 2),
    error=None,
    truncated=False,
    lengths=[7],
    sampled_tokens=4,
    oldest_version=0,
    newest_version=0,
    servers=["http://a"],
    metrics={},
    seconds=seconds,
  )


def test_a_row_tells_how_long_rollouts_took_and_how_many_ran():
  settings = scheduler.Settings(
    steps=1,
    prompts_per_step=1,
    rollouts_per_prompt=2,
    max_off_policy_steps=0,
    max_rollouts_in_flight=2,
  )
  sampler = difficulty.TaskSampler({"words": 5}, {"words": 1.0}, difficulty.Pools(), 0)
  state = scheduler.Scheduler(settings, sampler, filters.Filters(), credit.Credit())
  window = reports.Window()
  window.start(10.0)
  state.weights(0)
  for dispatch, seconds in zip(state.dispatch(), (1.0, 3.0), strict=True):
    done = summary(dispatch.rollout_id, seconds)
    window.add_finished(done)
    state.finished(done)
  plan = state.plan_batch()
  state.commit(plan)
  row = window.close(plan, state, 12.0, {})
  assert row["rollout_seconds_mean"] == 2.0
  assert row["rollouts_running"] == 2.0  # 4 seconds of rollouts in 2 seconds
