"""The scenario where none is given: worked by hand, and by the trainer's own count of FLOPs."""

import dataclasses
import math
import tomllib

import numpy as np
import pytest

from intellect3.models import presets
from intellect3.planning import hardware
from intellect3.simulation import assumed, roofline, scenario_file, throughput
from intellect3.training import flops
from tests.simulation import scenes

H200 = hardware.load("h200")
SAID = assumed.Said(model=presets.glm_4_5_air(), train_dtype="bf16", trainer_devices=16)


def make(run=None, **said):
  run = run or scenes.run(max_new_tokens=8000, max_tokens=8192)
  return assumed.make(run, dataclasses.replace(SAID, **said), H200, "h200")


def test_the_trainer_takes_the_steps_flops_at_the_stated_mfu():
  """A float64 sample of the lengths, and the count that the trainer's own MFU is of."""
  given, notes = make()
  rng = np.random.default_rng(0)
  sampled = np.exp(math.log(1600) + 0.8 * rng.standard_normal(400_000)).clip(1, 8000)
  whole = 192 + sampled
  needed = flops.train_flops(
    SAID.model, tokens=int(whole.sum()), attended_pairs=int((whole * (whole + 1) / 2).sum())
  )
  seconds = needed / whole.sum() / (16 * 989e12 * assumed.MFU)
  assert given.trainer.seconds_per_token == pytest.approx(seconds, rel=0.01)
  assert notes["trainer.seconds_per_token"].startswith("assumed: the model's FLOPs at 25%")


def test_servers_are_rooflines_on_devices_that_hold_the_model():
  given, notes = make()
  # 212 GB of weights: four times 151 GB, 85% of it, are the first of which they take no half.
  assert given.servers.devices == 4
  assert given.servers.count == 3 * 16 / 4
  of = roofline.sizes(SAID.model)
  step = roofline.step_seconds(of, H200, devices=4, running=64)
  rates = dict(zip(given.servers.decode_batch, given.servers.decode_tokens_per_second, strict=True))
  assert rates[64] == pytest.approx(64 / step, rel=1e-3)
  assert given.servers.cache_tokens == roofline.cache_tokens(of, H200, devices=4)
  assert notes["servers.decode_tokens_per_second"].startswith("roofline")
  for field in ("count", "devices", "max_running"):
    assert notes[f"servers.{field}"].startswith("assumed: ")


def test_what_the_run_file_says_is_taken_and_not_called_assumed():
  given, notes = make(servers=5, server_devices=8, max_running=48, memory_share=0.7)
  assert (given.servers.count, given.servers.devices, given.servers.max_running) == (5, 8, 48)
  assert given.servers.decode_batch == (1, 2, 4, 8, 16, 32, 48)
  of = roofline.sizes(SAID.model)
  assert given.servers.cache_tokens == roofline.cache_tokens(of, H200, devices=8, memory_share=0.7)
  for field in ("count", "devices", "max_running"):
    assert notes[f"servers.{field}"] == "run file"


def test_lengths_stay_within_the_runs_bounds():
  given, _ = make(scenes.run(max_new_tokens=100, max_tokens=120))
  environment = given.environment("coin")
  assert (environment.prompt_tokens, environment.lengths.maximum) == (20, 100)
  assert environment.lengths.median == 20
  # A run whose two bounds are the same still has a prompt.
  given, _ = make(scenes.run(max_new_tokens=120, max_tokens=120))
  environment = given.environment("coin")
  assert (environment.prompt_tokens, environment.lengths.maximum) == (1, 119)


def test_it_can_be_simulated_written_edited_and_read_again(tmp_path):
  run = scenes.run(max_new_tokens=800, max_tokens=900, steps=3)
  given, notes = make(run)
  report = throughput.simulate(run, given)
  path = tmp_path / "mine.toml"
  path.write_text(scenario_file.dump(given, notes))
  assert throughput.simulate(run, scenario_file.load(path)) == report
  text = path.read_text()
  for field, note in notes.items():
    assert f"{field.rsplit('.', 1)[1]} = " in text and f"  # {note}" in text
  path.write_text(text.replace("count = 12 ", "count = 2 "))
  assert scenario_file.load(path).servers.count == 2


def test_any_scenario_can_be_dumped(tmp_path):
  given = scenes.cluster(
    environments={"a b": scenes.environment(solved=(0.25,)), "default": scenes.environment()}
  )
  path = tmp_path / "x.toml"
  path.write_text(scenario_file.dump(given, {}))
  assert scenario_file.load(path) == given
  assert "clients" not in tomllib.loads(path.read_text())  # all at their defaults


def test_a_model_that_fits_nowhere_is_refused():
  with pytest.raises(ValueError, match="devices: expected enough for 212 GB of weights, got 1"):
    make(server_devices=1)


@pytest.mark.parametrize(
  ("said", "message"),
  [
    ({"trainer_devices": 0}, "trainer_devices: expected an integer of at least 1, got 0"),
    ({"servers": "x"}, "servers: expected an integer of at least 1, got 'x'"),
    ({"server_devices": 2.0}, "server_devices: expected an integer of at least 1, got 2.0"),
    ({"max_running": True}, "max_running: expected an integer of at least 1, got True"),
    ({"memory_share": 85}, "memory_share: expected a share above 0 and at most 1, got 85"),
  ],
)
def test_what_a_run_file_cannot_mean_is_refused(said, message):
  with pytest.raises(ValueError, match=message):
    make(**said)
