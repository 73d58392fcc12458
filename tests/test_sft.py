"""Supervised fine-tuning end to end: the loss falls, a resumed run is the same run, bit for bit."""

import json
import threading

import jax
import numpy as np
import pytest

from intellect3 import sft, telemetry
from intellect3.environments.reverse_text import ReverseText
from intellect3.models import hf, presets
from intellect3.pipeline import examples
from intellect3.rendering.bytes import ByteRenderer
from intellect3.rendering.tokenizer_files import write_tokenizer
from intellect3.training import optimizer, schedule

CONFIG = presets.tiny(
  embed_dim=16, head_dim=8, num_heads=2, num_kv_heads=1, mlp_dim=16, expert_mlp_dim=8
)
STEPS = 12


def _run(run_dir, **changes):
  arguments = {
    "example": examples.from_environments([ReverseText()], ByteRenderer(), seed=1),
    "steps": STEPS,
    "examples_per_step": 16,
    "row_length": 32,
    "micro_rows": 4,
    "row_counts": (8,),
    "optimizer": optimizer.adamw(learning_rate=schedule.linear(1e-2, steps=STEPS)),
    "model_config": CONFIG,
    "head_chunk_size": 64,
    "write_tokenizer": write_tokenizer,
    "report": lambda row: None,
  }
  return sft.run(run_dir=run_dir, **{**arguments, **changes})()


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
  run_dir = tmp_path_factory.mktemp("sft") / "run"
  return run_dir, _run(run_dir)


def _params(run_dir):
  return hf.load(run_dir / "model")[1]


def test_the_loss_falls_and_everything_is_written(straight):
  run_dir, summary = straight
  assert summary["loss_end"] < summary["loss_start"] - 1.0
  assert abs(summary["loss_start"] - np.log(264)) < 0.5
  assert json.loads((run_dir / "summary.json").read_text()) == summary
  assert summary["steps"] == STEPS and not summary["stopped"]
  assert summary["tokens_per_second"] > 0
  rows = telemetry.read_metrics(telemetry.metrics_path(run_dir, "sft"))
  assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
  for name in ("loss", "entropy", "grad_norm", "learning_rate", "max_violation", "mfu", "tokens"):
    assert all(np.isfinite(row[name]) for row in rows), name
  assert (run_dir / "model" / "tokenizer.json").exists()
  assert not [thread for thread in threading.enumerate() if "prefetch" in thread.name]


def test_an_interrupted_run_resumes_bit_for_bit(straight, tmp_path):
  run_dir = tmp_path / "run"

  def interrupt(row):
    if row["step"] == 7:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    _run(run_dir, checkpoint_every=5, report=interrupt)
  assert not (run_dir / "model").exists()
  assert not [thread for thread in threading.enumerate() if "prefetch" in thread.name]
  with pytest.raises(ValueError, match="run_dir"):
    _run(run_dir)
  seen = []
  summary = _run(run_dir, resume=True, report=lambda row: seen.append(row["step"]))
  assert seen == list(range(6, STEPS + 1))
  jax.tree.map(np.testing.assert_array_equal, _params(run_dir), _params(straight[0]))
  rows = [
    [(row["step"], row["loss"]) for row in telemetry.read_metrics(path)]
    for path in (telemetry.metrics_path(d, "sft") for d in (run_dir, straight[0]))
  ]
  assert rows[0] == rows[1]
  assert summary["loss_end"] == straight[1]["loss_end"]


def test_a_stopped_run_ends_with_a_checkpoint_and_goes_on(straight, tmp_path):
  run_dir, stop = tmp_path / "run", threading.Event()
  summary = _run(run_dir, stop=stop, report=lambda row: row["step"] == 2 and stop.set())
  assert summary["stopped"] and summary["steps"] < STEPS
  assert not (run_dir / "model").exists()
  summary = _run(run_dir, resume=True)
  assert not summary["stopped"] and summary["steps"] == STEPS
  jax.tree.map(np.testing.assert_array_equal, _params(run_dir), _params(straight[0]))


@pytest.mark.parametrize(
  ("changes", "field"),
  [
    ({"steps": 0}, "steps"),
    ({"checkpoint_every": 0}, "checkpoint_every"),
    ({"model_config": None}, "model_path"),
    ({"micro_rows": 3}, "row_counts"),
    ({"examples_per_step": 0}, "examples_per_step"),
    ({"keep_checkpoints": 0}, "keep_checkpoints"),
    ({"head_chunk_size": 0}, "chunk_size"),
  ],
)
def test_bad_values_are_named_before_anything_starts(tmp_path, changes, field):
  with pytest.raises(ValueError, match=field):
    _run(tmp_path / "run", **changes)
  assert not (tmp_path / "run").exists()


def test_a_missing_run_is_not_resumed_and_a_file_is_no_run_directory(tmp_path):
  run_dir = tmp_path / "run"
  for _ in range(2):  # first missing, then empty but for a configuration
    with pytest.raises(ValueError, match=r"run_dir: expected a run, got .*no run to resume"):
      _run(run_dir, resume=True)
    run_dir.mkdir(exist_ok=True)
    (run_dir / "config.gin").write_text("")
  (tmp_path / "file").write_text("")
  with pytest.raises(ValueError, match="run_dir: expected a directory, got the file"):
    _run(tmp_path / "file")
  assert [entry.name for entry in run_dir.iterdir()] == ["config.gin"]


def test_an_example_that_does_not_fit_is_named(tmp_path):
  with pytest.raises(ValueError, match="row_length"):
    _run(tmp_path / "run", row_length=4)
