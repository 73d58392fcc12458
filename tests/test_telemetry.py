"""Metrics files survive a crash in the middle of a line and a resume."""

import json

import numpy as np
import pytest

from intellect3 import telemetry


def test_rows_are_on_disk_at_once_and_read_back(tmp_path):
  writer = telemetry.MetricsWriter(tmp_path, "trainer")
  writer.write(1, {"loss": np.float32(0.5), "load": np.arange(3), "name": "a", "bad": float("nan")})
  rows = telemetry.read_metrics(telemetry.metrics_path(tmp_path, "trainer"))
  assert rows == [{"step": 1, "loss": 0.5, "load": [0, 1, 2], "name": "a", "bad": None}]
  writer.close()
  writer.close()
  assert list((tmp_path / "metrics" / "tensorboard" / "trainer").glob("events*"))


def test_half_a_line_is_skipped_and_cut_off_by_the_next_writer(tmp_path):
  path = telemetry.metrics_path(tmp_path, "x")
  with telemetry.MetricsWriter(tmp_path, "x") as writer:
    writer.write(1, {"loss": 1.0})
  with open(path, "ab") as file:
    file.write(b'{"step":2,"lo')
  assert [row["step"] for row in telemetry.read_metrics(path)] == [1]
  with telemetry.MetricsWriter(tmp_path, "x") as writer:
    writer.write(2, {"loss": 2.0})
  assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_a_broken_line_in_the_middle_is_an_error(tmp_path):
  path = tmp_path / "m.jsonl"
  path.write_text('{"step":1}\n{"st\n{"step":3}\n')
  with pytest.raises(ValueError, match="line 2"):
    telemetry.read_metrics(path)


def test_a_resumed_run_writes_each_step_once(tmp_path):
  with telemetry.MetricsWriter(tmp_path, "x") as writer:
    for step in range(1, 6):
      writer.write(step, {"run": 1})
  with telemetry.MetricsWriter(tmp_path, "x") as writer:
    writer.truncate_after(3)
    writer.write(4, {"run": 2})
    with pytest.raises(RuntimeError):
      writer.truncate_after(1)
  rows = telemetry.read_metrics(writer.path)
  assert [(row["step"], row["run"]) for row in rows] == [(1, 1), (2, 1), (3, 1), (4, 2)]


def test_a_missing_file_holds_no_rows(tmp_path):
  assert telemetry.read_metrics(tmp_path / "none.jsonl") == []
