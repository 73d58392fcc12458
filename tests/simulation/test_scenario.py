"""Scenario files: what they hold, and one line for whatever does not fit."""

import json

import numpy as np
import pytest

from intellect3 import rollout_log, types
from intellect3.simulation import scenario_file

GOOD = {
  "name": "small",
  "servers": {
    "count": 2,
    "max_running": 8,
    "decode_batch": [1, 8],
    "decode_tokens_per_second": [50, 300],
    "prefill_tokens_per_second": 1000,
  },
  "trainer": {"fixed_seconds": 2, "seconds_per_token": 0.5},
  "environments": {"math": {"prompt_tokens": 10, "lengths": {"median": 20, "sigma": 0.5}}},
}


def written(tmp_path, tables, name="scenario.json"):
  path = tmp_path / name
  path.write_text(json.dumps(tables))
  return path


def changed(where, value):
  tables = json.loads(json.dumps(GOOD))
  *parents, last = where.split(".")
  table = tables
  for name in parents:
    table = table.setdefault(name, {})
  if value is None:
    del table[last]
  else:
    table[last] = value
  return tables


def test_a_file_becomes_records(tmp_path):
  given = scenario_file.load(written(tmp_path, GOOD))
  assert given.servers.decode_batch == (1, 8)
  assert given.trainer.step_seconds(10) == 7.0
  assert given.environment("math").lengths.median == 20
  with pytest.raises(ValueError, match="expected code or default, got \\['math'\\]"):
    given.environment("code")


def test_toml_says_the_same(tmp_path):
  path = tmp_path / "scenario.toml"
  path.write_text(
    'name = "small"\n[servers]\ncount = 2\nmax_running = 8\ndecode_batch = [1, 8]\n'
    "decode_tokens_per_second = [50, 300]\nprefill_tokens_per_second = 1000\n"
    "[trainer]\nfixed_seconds = 2\nseconds_per_token = 0.5\n"
    "[environments.math]\nprompt_tokens = 10\nlengths = { median = 20, sigma = 0.5 }\n"
  )
  assert scenario_file.load(path) == scenario_file.load(written(tmp_path, GOOD))


@pytest.mark.parametrize(
  ("where", "value", "message"),
  [
    ("name", None, "name: expected a value, got none"),
    ("servers.count", 0, "servers.count: expected an integer of at least 1, got 0"),
    ("servers.count", 1.5, "servers.count: expected an integer of at least 1, got 1.5"),
    ("servers.max_running", None, "servers.max_running: expected a value, got none"),
    ("servers.speed", 3, "servers.speed: expected one of count, .*, got an unknown key"),
    ("servers.decode_batch", [2, 8], "servers.decode_batch: expected 1 first, then ascending"),
    ("servers.decode_batch", [1], "decode_tokens_per_second: expected 1 numbers, .* got 2"),
    ("servers.decode_tokens_per_second", [50, 0], "a list of numbers of at least 1e-09"),
    ("trainer.fixed_seconds", -1, "trainer.fixed_seconds: expected a number of at least 0, got -1"),
    ("trainer.fixed_seconds", "2", "trainer.fixed_seconds: expected a number .*, got '2'"),
    ("trainer.plan", "plan.json", "trainer: expected one of plan and seconds_per_token, got both"),
    ("sync.load_seconds", True, "sync.load_seconds: expected a number of at least 0, got True"),
    ("environments.math.error_rate", 2, "environments.math.error_rate: .*at most 1, got 2"),
    ("environments.math.solved", [0.5, 1.5], "environments.math.solved: .* at most 1, got"),
    ("environments.math.lengths.sigma", -1, "environments.math.lengths.sigma: expected a number"),
    ("environments.math.lengths.maximum", 0, "environments.math.lengths.maximum: expected an int"),
    ("environments.math.lengths.empirical", [1.5, 2], "lengths.empirical: expected whole numbers"),
    ("servers.max_running", 10**10, "servers.max_running: .* at most 1e\\+06, got 10000000000"),
    ("failures.server_mean_seconds", -1, "failures.server_mean_seconds: expected a number of at"),
    (
      "failures.often",
      1,
      "failures.often: expected one of server_mean_seconds, .*, got an unknown",
    ),
    ("environments.math.lengths", 3, "environments.math.lengths: expected a table, got 3"),
    ("environments.math.lengths.rollout_log", "no", "expected a RolloutLog with committed steps"),
    ("environments", {}, "environments: expected at least `default`, got none"),
  ],
)
def test_what_does_not_fit_is_named(tmp_path, where, value, message):
  path = written(tmp_path, changed(where, value))
  with pytest.raises(ValueError, match=f"^{path}: .*{message}") as caught:
    scenario_file.load(path)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("name", "text"),
  [("a.json", "{"), ("a.toml", "= 3"), ("a.yaml", "a: 3"), ("missing.toml", None), ("a.json", "3")],
)
def test_what_cannot_be_read_is_named(tmp_path, name, text):
  if text is not None:
    (tmp_path / name).write_text(text)
  with pytest.raises(ValueError, match=f"^{tmp_path / name}: "):
    scenario_file.load(tmp_path / name)


def test_a_plan_tells_the_trainers_speed(tmp_path):
  tables = changed("trainer", {"plan": "plan.json"})
  (tmp_path / "plan.json").write_text('{"predicted_step_seconds": 30, "tokens_per_step": 60}')
  given = scenario_file.load(written(tmp_path, tables))
  assert given.trainer.seconds_per_token == 0.5
  (tmp_path / "plan.json").write_text('{"predicted_step_seconds": 30}')
  with pytest.raises(ValueError, match=r"trainer.plan: .*tokens_per_step"):
    scenario_file.load(tmp_path / "scenario.json")
  (tmp_path / "plan.json").unlink()
  with pytest.raises(
    ValueError, match=r"scenario.json: trainer.plan: .* got .*plan.json: .*No such"
  ):
    scenario_file.load(tmp_path / "scenario.json")


def test_a_rollout_log_tells_the_lengths(tmp_path):
  def record(rollout, branch, sampled):
    versions = np.array([-1, *[0] * sampled], np.int32)
    return types.TrajectoryRecord(
      step=1,
      rollout_id=rollout,
      group_id=0,
      branch=branch,
      task_id="a/train/0",
      environment="a",
      reward=1.0,
      advantage=0.5,
      trajectory=types.Trajectory(
        tokens=np.zeros(sampled + 1, np.int32),
        loss_mask=versions >= 0,
        inference_logprobs=np.zeros(sampled + 1, np.float32),
        policy_versions=versions,
        temperature=1.0,
      ),
    )

  log = tmp_path / "rollouts"
  records = [record(0, 0, 5), record(0, 1, 2), record(1, 0, 3)]  # rollout 0 has two branches
  shard = rollout_log.write_shard(
    rollout_log.step_directory(log, 1) / "worker_0_1.arrayrecord", records
  )
  manifest = types.Manifest(
    step=1,
    shards=[shard],
    num_rollouts=2,
    num_groups=1,
    loss_tokens=10,
    oldest_version=0,
    newest_version=0,
    metrics={},
    scheduler_state={},
  )
  rollout_log.commit_manifest(log, manifest)
  tables = changed("environments.math.lengths", {"rollout_log": "rollouts"})
  given = scenario_file.load(written(tmp_path, tables))
  assert given.environment("math").lengths.empirical == (3, 7)
