"""The sweep of real runs: which it makes, what it keeps of each, and how it goes on.

The runs are a stand-in's, which writes the metrics files of one; what a real run writes is held by
the loop's own tests, and by the slow test of the ring's notebook.
"""

import dataclasses
import json
import pathlib
import shutil
import sys

import numpy as np
import pytest

from intellect3.lab import ring, ring_results, statistics
from tests.lab import ring_house


@pytest.fixture
def todo(tmp_path):
  return ring_house.sweep(tmp_path, losses=("plain", "careful"), lags=(0, 2), seeds=(0, 1), steps=3)


def run_all(todo, tmp_path):
  lines = []
  return ring.sweep(todo, tmp_path / "out", progress=lines.append), lines


def test_every_point_is_run_once_and_kept(todo, tmp_path):
  told, lines = run_all(todo, tmp_path)
  keys = [result.key for result in told.results]
  assert len(keys) == 8 and set(keys) == {
    (loss, lag, seed) for loss in ("plain", "careful") for lag in (0, 2) for seed in (0, 1)
  }
  assert [key[2] for key in keys] == [0] * 4 + [1] * 4  # a seed is whole before the next begins
  assert lines[0].startswith("8 runs of 3 steps, 8 to make") and len(lines) == 9
  assert ring_results.read(tmp_path / "out" / "results.json") == told
  result = next(result for result in told.results if result.key == ("careful", 2, 1))
  assert result.error is None and result.seconds > 0
  assert (result.eval_start, result.eval_end) == (0.25, ring_house.final("careful", 2, 1))
  assert list(result.curves["token_staleness_mean"]) == [0, 1, 2]
  assert list(result.curves["reward"]) == [1 / 3, 2 / 3, 1.0]
  assert list(result.curves["entropy"]) == [None] * 3  # the stand-in tells none


def test_the_command_line_of_a_run(todo, tmp_path):
  run_all(todo, tmp_path)
  arguments = json.loads((tmp_path / "out/runs/careful_lag2_seed1/arguments.json").read_text())
  assert arguments[:2] == ["--gin", todo.run_files["careful"]]
  assert arguments[-2:] == ["--out", str(tmp_path / "out/runs/careful_lag2_seed1")]
  sets = dict(binding.split("=", 1) for binding in arguments[3:-2:2])
  assert sets == {
    "rl.run.model_path": repr(str(todo.model)),
    "rl.run.steps": "3",
    "rl.run.seed": "1",
    "rl.run.max_off_policy_steps": "2",
    "orchestrator.orchestrator.weights_lag": "2",
    **{name: repr(value) for name, value in ring.SETTINGS.items()},
  }


def test_a_sweep_goes_on_where_it_stopped_and_grows(todo, tmp_path):
  first, _ = run_all(ring_house.changed(todo, seeds=(0,)), tmp_path)
  marker = tmp_path / "out/runs/plain_lag0_seed0/marker"
  marker.touch()
  broken_off = tmp_path / "out/runs/plain_lag0_seed1"
  (broken_off / "metrics").mkdir(parents=True)  # the stand-in does not write over it
  grown, lines = run_all(todo, tmp_path)
  assert lines[0].startswith("8 runs of 3 steps, 4 to make")
  assert grown.results[:4] == first.results and marker.exists()
  assert ring_results.failures(grown.results) == []
  again, lines = run_all(todo, tmp_path)
  assert again == grown and len(lines) == 1


@pytest.mark.parametrize("change", [{"steps": 4}, {"settings": {"a.b": (1, 2)}}])
def test_other_settings_do_not_mix(todo, tmp_path, change):
  run_all(ring_house.changed(todo, seeds=(0,)), tmp_path)
  with pytest.raises(ValueError, match=r"results\.json: settings: expected .*, got "):
    run_all(ring_house.changed(todo, **change), tmp_path)


def test_settings_that_json_changes_still_match_themselves(todo, tmp_path):
  todo = ring_house.changed(todo, settings={"a.b": (1, 2)})
  assert run_all(todo, tmp_path)[0] == run_all(todo, tmp_path)[0]


def test_a_run_that_fails_is_a_point_that_counts_in_no_mean(todo, tmp_path):
  todo = ring_house.changed(todo, settings={ring_house.FAILS: "careful_lag2_seed1"})
  told, lines = run_all(todo, tmp_path)
  assert len(told.results) == 8 and sum("failed: error: it broke" in line for line in lines) == 1
  assert ring_results.failures(told.results) == ["careful, lag 2, seed 1: error: it broke"]
  failed = next(result for result in told.results if result.error is not None)
  assert failed.eval_start == 0.25 and failed.eval_end is None  # what it told before is kept
  assert len(ring_results.points(told.results, ring_results.final)) == 7
  assert len(run_all(todo, tmp_path)[1]) == 1  # and it is not tried again


def test_a_run_that_cannot_start_stops_the_sweep(todo, tmp_path):
  todo = ring_house.changed(todo, command=(sys.executable, "-c", "import sys; sys.exit('no such')"))
  with pytest.raises(ValueError, match="plain, lag 0, seed 0 did not start: no such"):
    run_all(todo, tmp_path)
  assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize(
  ("change", "match"),
  [
    ({"lags": ()}, "lags: expected at least one"),
    ({"lags": (-1,)}, "lags: expected none below 0"),
    ({"seeds": ()}, "seeds: expected"),
    ({"steps": 0}, "steps: expected at least 1, got 0"),
    ({"model": pathlib.Path("weights")}, "model: expected a directory named model, got weights"),
  ],
)
def test_a_sweep_of_nothing_is_refused(todo, change, match):
  with pytest.raises(ValueError, match=match):
    ring_house.changed(todo, **change)


def test_points_and_curves(todo, tmp_path):
  told, _ = run_all(todo, tmp_path)
  by_loss = statistics.by_staleness(ring_results.points(told.results, ring_results.final))
  assert list(by_loss) == ["plain", "careful"] and by_loss["careful"].x.tolist() == [0, 2]
  expected = [(ring_house.final("careful", 2, 0) + ring_house.final("careful", 2, 1)) / 2]
  assert by_loss["careful"].mean[1:].tolist() == pytest.approx(expected)
  staleness = ring_results.points(told.results, ring_results.mean_of("token_staleness_mean"))
  assert {(p.staleness, p.value) for p in staleness} == {(0, 0), (2, 1)}
  last = ring_results.points(told.results, ring_results.mean_of("token_staleness_mean", last=1))
  assert {(p.staleness, p.value) for p in last} == {(0, 0), (2, 2)}
  assert ring_results.points(told.results, ring_results.mean_of("entropy")) == []
  broken = [dataclasses.replace(told.results[0], error="late"), *told.results[1:]]
  assert ring_results.points(broken, ring_results.final) == ring_results.points(
    told.results[1:], ring_results.final
  )

  lines = ring_results.curves(told.results, "reward", smooth=2)
  assert list(lines) == ["plain", "careful"] and list(lines["plain"]) == ["0", "2"]
  assert lines["plain"]["2"].x.tolist() == [1, 2, 3]
  assert lines["plain"]["2"].mean.tolist() == pytest.approx([1 / 3, 1 / 2, 5 / 6])
  with pytest.raises(ValueError, match=r"curves\['entropy'\] of \('plain', 0, 0\)"):
    ring_results.curves(told.results, "entropy")
  with pytest.raises(ValueError, match="smooth: expected at least 1, got 0"):
    ring_results.curves(told.results, "reward", smooth=0)


def test_a_file_that_holds_no_results_is_refused(tmp_path):
  path = tmp_path / "results.json"
  path.write_text('{"results": [{"loss": "plain"}]}')
  with pytest.raises(ValueError, match="expected the results of a sweep, got"):
    ring_results.read(path)


def test_a_loss_without_a_run_at_a_lag_has_an_empty_line(todo, tmp_path):
  told, _ = run_all(todo, tmp_path)
  some = [result for result in told.results if (result.loss, result.lag) != ("plain", 2)]
  lines = ring_results.curves(some, "reward")
  assert list(lines["plain"]) == list(lines["careful"]) == ["0", "2"]
  assert np.all(np.isnan(lines["plain"]["2"].mean)) and lines["plain"]["2"].x.tolist() == [1, 2, 3]
  assert ring_results.curves([], "reward") == {}


def test_a_number_of_every_run_over_the_lags(todo, tmp_path):
  told, _ = run_all(todo, tmp_path)
  some = [result for result in told.results if (result.loss, result.lag) != ("plain", 2)]
  lines = ring_results.by_lag(some, ring_results.final)
  assert lines["plain"].x.tolist() == lines["careful"].x.tolist() == [0, 2]
  assert lines["plain"].mean[0] == pytest.approx(0.91) and np.isnan(lines["plain"].mean[1])
  stale = [result for result in told.results if (result.loss, result.lag) != ("plain", 0)]
  plain = ring_results.by_lag(stale, ring_results.final)["plain"]
  assert np.isnan(plain.mean[0]) and plain.mean[1] == pytest.approx(0.71)
  full = statistics.by_staleness(ring_results.points(some, ring_results.final))["careful"]
  for name in ("mean", "low", "high"):
    assert getattr(lines["careful"], name).tolist() == getattr(full, name).tolist()
  assert ring_results.by_lag(some, ring_results.mean_of("entropy")) == {}
  seconds = sorted(result.seconds for result in some)
  assert ring_results.median_seconds(some) == (seconds[2] + seconds[3]) / 2
  with pytest.raises(ValueError, match="results: expected at least one run"):
    ring_results.median_seconds([])


def test_the_model_is_warmed_up_once_and_only_for_runs(todo, tmp_path):
  cold = ring_house.changed(todo, warm_up=ring_house.warm_up_command(tmp_path))
  shutil.rmtree(todo.model)
  for _ in range(2):
    run_all(cold, tmp_path)
  assert (tmp_path / "warm_ups").read_text() == "made\n"
  shutil.rmtree(todo.model)
  run_all(cold, tmp_path)  # there is nothing left to run
  assert not todo.model.exists()
  failing = ring_house.changed(cold, seeds=(7,), warm_up=(sys.executable, "-c", "exit('no data')"))
  with pytest.raises(RuntimeError, match="the warm-up ended with 1: no data"):
    run_all(failing, tmp_path)


def test_the_run_files_of_the_standard_sweep_exist(tmp_path):
  todo = ring.standard(tmp_path, seeds=(3,))
  assert list(todo.run_files) == list(ring.LOSSES) and todo.seeds == (3,)
  for file in todo.run_files.values():
    with open(file, encoding="utf-8") as opened:
      assert "Purpose" in opened.readline()
  assert list(ring.standard(tmp_path, losses=["cispo"]).run_files) == ["cispo"]
