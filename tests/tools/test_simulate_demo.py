"""A run that the simulator itself made, written as a run's files: it has to be found again."""

import json

import numpy as np
import pytest

from experiments import gin_config
from intellect3 import rollout_log, types
from intellect3.simulation import scenario, scenario_file, throughput
from tools import simulate_demo, simulated_run

STEPS = 60
CONFIG = "\n".join(
  [
    f"rl.run.steps = {STEPS}",
    "rl.run.max_off_policy_steps = 2",
    "orchestrator.orchestrator.prompts_per_step = 4",
    "orchestrator.orchestrator.rollouts_per_prompt = 4",
    "orchestrator.orchestrator.max_rollouts_in_flight = 32",
    "orchestrator.orchestrator.evaluation_tasks = 0",
    "worker.worker.max_concurrency = 32",
  ]
)
TRUTH = scenario.Scenario(
  name="truth",
  servers=scenario.Servers(
    count=1,
    max_running=32,
    decode_batch=(1.0, 32.0),
    decode_tokens_per_second=(40.0, 320.0),
    prefill_tokens_per_second=1e9,
  ),
  sync=scenario.Sync(
    verify_seconds=0.02,
    pause_seconds=0.01,
    load_seconds=0.05,
    resume_seconds=0.01,
    canary_seconds=0.02,
  ),
  trainer=scenario.Trainer(
    seconds_per_token=1e-3, read_seconds=0.01, gather_seconds=0.01, write_seconds=0.03
  ),
  environments={
    "reverse_text": scenario.Environment(
      lengths=scenario.Lengths(empirical=(4, 5, 6)), prompt_tokens=6, tasks=500
    )
  },
)


def write_run(run_dir, report, config):
  """The files that a run with this report would have left."""
  (run_dir / "metrics").mkdir(parents=True)
  (run_dir / "config.gin").write_text(config)
  trainer = []
  for marks in report["training"]:
    trainer.append(
      {
        "step": marks["step"],
        "wait_seconds": marks["begun"] - marks["waiting"],
        "step_seconds": marks["stepped"] - marks["begun"],
        "publish_seconds": marks["ended"] - marks["stepped"],
        "loop_seconds": marks["ended"] - marks["waiting"],
        "checkpoint_seconds": 0.0,
        "tokens": marks["tokens"],
        "weights/wait_seconds": 0.0,
        "weights/write_seconds": 0.03,
      }
    )
  for name, rows in (("trainer", trainer), ("orchestrator", report["rows"])):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (run_dir / "metrics" / f"{name}.jsonl").write_text(text)
  for step in range(1, STEPS + 1):
    records = [record(step, 3 * step + i, 4 + i) for i in range(3)]
    directory = rollout_log.step_directory(run_dir / "rollouts", step)
    shard = rollout_log.write_shard(directory / "worker_0.arrayrecord", records)
    rollout_log.commit_manifest(
      run_dir / "rollouts",
      types.Manifest(
        step=step,
        shards=[shard],
        num_rollouts=3,
        num_groups=1,
        loss_tokens=15,
        oldest_version=0,
        newest_version=0,
        metrics={},
        scheduler_state={},
      ),
    )


def record(step, rollout_id, length):
  versions = np.array([types.NOT_SAMPLED] * 6 + [0] * length, np.int32)
  return types.TrajectoryRecord(
    step=step,
    rollout_id=rollout_id,
    group_id=step,
    branch=0,
    task_id="reverse_text/train/1",
    environment="reverse_text",
    reward=float(rollout_id % 2),
    advantage=0.0,
    trajectory=types.Trajectory(
      tokens=np.zeros(6 + length, np.int32),
      loss_mask=versions >= 0,
      inference_logprobs=np.zeros(6 + length, np.float32),
      policy_versions=versions,
      temperature=1.0,
    ),
  )


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
  bindings = [*CONFIG.splitlines()]
  config = gin_config.read(["experiments/configs/runs/demo.gin"], bindings)
  run = simulated_run.read(config, without_jax=False)
  path = tmp_path_factory.mktemp("run") / "truth"
  write_run(path, throughput.simulate(run, TRUTH), config)
  return path


def test_a_run_of_known_rates_is_predicted(run_dir):
  result = simulate_demo.compare(run_dir, first=11, block=10, steps=STEPS)
  errors = {row["name"]: row["error"] for row in result["figures"]}
  assert result["measured_steps"] == result["held_out_steps"] == 20
  assert abs(errors["trainer_idle_share"]) < 0.1
  assert abs(errors["mean_staleness"]) < 0.15
  assert abs(errors["step_seconds"]) < 0.1


def test_the_table_says_each_error_and_the_exit_code_whether_it_is_fit(run_dir, capsys, tmp_path):
  options = ["--run", str(run_dir), "--first", "11", "--steps", "40"]
  out = tmp_path / "out.json"
  assert simulate_demo.main([*options, "--json", str(out)]) == 0
  printed = capsys.readouterr().out
  result = json.loads(out.read_text())
  for row, name in zip(result["figures"], ("trainer idle", "mean staleness", "step"), strict=True):
    line = next(line for line in printed.splitlines() if line.startswith(f"| {name}"))
    assert f"{row['error']:+.1%}" in line
  assert simulate_demo.main([*options, "--within", "1e-9"]) == 1


def test_what_was_measured_is_a_scenario_that_can_be_read_again(run_dir, tmp_path):
  out = tmp_path / "measured.json"
  options = ["--run", str(run_dir), "--first", "11", "--steps", "12", "--within", "10"]
  assert simulate_demo.main([*options, "--scenario", str(out)]) == 0
  given = scenario_file.load(out)
  assert given.trainer.seconds_per_token == pytest.approx(1e-3)
  assert given.sync.load_seconds == pytest.approx(0.05)


def test_a_run_that_is_too_short_or_not_there_is_refused(run_dir, tmp_path, capsys):
  assert simulate_demo.main(["--run", str(run_dir), "--first", "55"]) == 2
  assert "--first, --block: expected 74 steps" in capsys.readouterr().err
  assert simulate_demo.main(["--run", str(tmp_path / "none")]) == 2
  assert "config.gin" in capsys.readouterr().err
