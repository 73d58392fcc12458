"""Every field of a scenario, as a file has it, does what it says: one by one, worked by hand.

The cluster's steps take 6 s: two groups of two sample 200 tokens at 100 a second, then 3 s of
training, 0.5 to gather, 0.25 to write and 0.25 to load, one after the other.
"""

import dataclasses
import pathlib

import pytest

from intellect3.simulation import scenario_file, throughput
from tests.simulation import scenes

BASE = {
  "name": "by hand",
  "servers": {
    "count": 1,
    "max_running": 64,
    "decode_batch": [1, 64],
    "decode_tokens_per_second": [100, 6400],
    "prefill_tokens_per_second": 1e12,
  },
  "sync": {"load_seconds": 0.25},
  "trainer": {"fixed_seconds": 3, "gather_seconds": 0.5, "write_seconds": 0.25},
  "clients": {},
  "environments": {"coin": {"prompt_tokens": 8, "lengths": {"median": 200}}},
}
LENGTHS, COIN = "environments.coin.lengths", "environments.coin"


def simulate(changes, **run):
  tables = {name: dict(table) if isinstance(table, dict) else table for name, table in BASE.items()}
  tables["environments"] = {"coin": {**BASE["environments"]["coin"]}}
  tables["environments"]["coin"]["lengths"] = {"median": 200}
  for path, value in changes.items():
    *parents, field = path.split(".")
    table = tables
    for parent in parents:
      table = table[parent]
    table[field] = value
  bounds = {"max_new_tokens": 320, "max_tokens": 330}
  given = scenario_file.parse(tables, pathlib.Path())
  return throughput.simulate(scenes.run(**bounds, **run), given, warm_up_steps=2)


def step(report):
  return report["step_seconds"]["mean"]


def tokens_of_a_step(report):
  return report["trained_tokens_per_second"] * step(report)


def test_the_cluster_itself():
  report = simulate({})
  assert step(report) == pytest.approx(6.0)
  assert tokens_of_a_step(report) == pytest.approx(4 * 208)


# What is changed, and how long a step takes then.
TIMES = [
  ({"servers.max_running": 2}, 8),  # two at a time
  ({"servers.decode_tokens_per_second": [50, 3200]}, 8),
  ({"servers.decode_batch": [1, 2], "servers.decode_tokens_per_second": [100, 200]}, 8),
  # A token's step takes 0.01 s, and 1 ms for each of four times 8, 9, .. 207.5 cached tokens.
  ({"servers.seconds_per_cached_token": 0.001}, 4 + 200 * (0.01 + 0.032) + 0.002 * 200**2),
  ({"servers.prefill_tokens_per_second": 16}, 7),  # the members of a group share their 8 tokens
  ({"servers.latency_seconds": 0.5}, 6.5),
  ({"sync.verify_seconds": 0.5}, 6.5),
  ({"sync.pause_seconds": 0.5}, 6.5),
  ({"sync.load_seconds": 0.75}, 6.5),
  ({"sync.resume_seconds": 0.5}, 6.5),
  ({"sync.canary_seconds": 0.5}, 6.5),
  ({"trainer.fixed_seconds": 3.5}, 6.5),
  ({"trainer.seconds_per_token": 0.01}, 6 + 8.32),
  ({"trainer.read_seconds": 0.5}, 6.5),
  ({"trainer.gather_seconds": 1.0}, 6.5),
  ({"trainer.write_seconds": 0.75}, 6.5),
  ({f"{LENGTHS}.median": 300}, 7),
  ({f"{LENGTHS}.minimum": 300}, 7),
  ({f"{LENGTHS}.maximum": 100}, 5),
  ({f"{LENGTHS}.empirical": [300]}, 7),
  ({f"{COIN}.reward_seconds": 0.5}, 6.5),
  ({"clients.message_seconds": 0.25}, 7),  # dispatched, ended, asked to write, written
  ({"clients.write_seconds_per_token": 0.001}, 6.832),
]


@pytest.mark.parametrize(("changes", "seconds"), TIMES, ids=[next(iter(one)) for one, _ in TIMES])
def test_what_takes_its_time(changes, seconds):
  assert step(simulate(changes)) == pytest.approx(seconds)


def test_a_full_cache_puts_the_newest_back():
  """Four of 208 tokens in a cache of 330, all of it by hand.

  All begin, and fill it after 74.5 tokens each: the fourth is put back, the third after 102, the
  second after 157; the first ends after 200. The second goes on for 43, then the third with the
  fourth for 98, of which the fourth, put back once more, has 68.75; it ends 56.75 later. Tokens are
  whole, which is what the sum is off by.
  """
  report = simulate({"servers.cache_tokens": 330})
  assert step(report) == pytest.approx(4 + (200 + 43 + 98 + 56.75) / 100, abs=0.02)
  assert report["queues"]["evicted"] == 4 * 8  # of each measured step


def test_servers_share_the_requests():
  one, two = (simulate({"servers.count": count})["queues"] for count in (1, 2))
  assert two["running_per_server"] == pytest.approx(one["running_per_server"] / 2)


def test_a_slow_server_holds_up_a_sync():
  assert 6.01 < step(simulate({"sync.spread_seconds": 1.0})) < 7.0


def test_prompts_and_what_comes_in_between_turns_are_trained_on():
  assert tokens_of_a_step(simulate({f"{COIN}.prompt_tokens": 16})) == pytest.approx(4 * 216)
  turns = {f"{COIN}.turns": 3, f"{COIN}.turn_tokens": 10}
  assert tokens_of_a_step(simulate(turns)) == pytest.approx(4 * (208 + 20))


def test_tools_take_their_mean_before_each_later_turn():
  """A step waits for the longer of two rollouts of two waits each: 2.75 means of one.

  (The larger of two sums of two exponentials.) 200 steps keep that to 5%; thrice is allowed.
  """
  one = {"prompts_per_step": 1, "max_rollouts_in_flight": 2, "steps": 202}
  turns = {f"{COIN}.turns": 3}
  without = step(simulate(turns, **one))
  with_tools = step(simulate({**turns, f"{COIN}.tool_seconds": 2.0}, **one))
  assert with_tools - without == pytest.approx(2.75 * 2.0, rel=0.15)


def test_lengths_are_drawn_with_their_spread_and_the_tasks_share_of_it():
  spread = {f"{LENGTHS}.sigma": 0.5}

  def deciles(changes, **run):
    return simulate({**spread, **changes}, **{"steps": 52, **run})["by_length_decile"]

  drawn = deciles({})
  assert drawn[0]["low"] < 100 < drawn[4]["high"] < 250 and drawn[-1]["high"] == 320
  # All of the spread is the tasks': the members of a group end together.
  groups = simulate({**spread, f"{LENGTHS}.task_share": 1.0})["groups"]
  assert groups["first_seconds"] == pytest.approx(groups["last_seconds"])
  assert simulate(spread)["groups"]["last_seconds"]["p50"] > 2.0
  # And with one task there is one length.
  alike = deciles({f"{LENGTHS}.task_share": 1.0, f"{COIN}.tasks": 1})
  assert alike[0]["low"] == alike[-1]["high"]


def test_environments_fail_and_solve():
  report = simulate({f"{COIN}.error_rate": 0.4}, steps=60)
  assert report["errored_share"] == pytest.approx(0.4, abs=0.12)
  for solved in (0.0, 1.0):
    assert simulate({f"{COIN}.solved": [solved]})["rows"][-1]["reward"] == solved


def test_another_seed_draws_others():
  spread = {f"{LENGTHS}.sigma": 0.5}
  assert step(simulate({**spread, "seed": 1})) != step(simulate(spread))
  assert step(simulate({"seed": 1})) == step(simulate({}))


ELSEWHERE = {
  "name": "printed",
  "servers.devices": "sweeps alone: test_sweep",
  "trainer.devices": "sweeps alone: test_sweep",
  "clients.shared_balance": "test_throughput",
  "failures.server_mean_seconds": "test_simulated_failures",
  "failures.server_repair_seconds": "test_simulated_failures",
  "failures.worker_mean_seconds": "test_simulated_failures",
  "failures.worker_repair_seconds": "test_simulated_failures",
}


def test_no_field_is_left_out():
  """What the tests above change, with what is tested elsewhere, is all that there is."""
  made = dataclasses.asdict(scenario_file.parse(BASE, pathlib.Path()))
  fields = set()
  for table, values in made.items():
    if table == "environments":
      fields |= {f"{COIN}.{field}" for field in values["coin"] if field != "lengths"}
      fields |= {f"{LENGTHS}.{field}" for field in values["coin"]["lengths"]}
    else:
      fields |= {f"{table}.{field}" for field in values} if isinstance(values, dict) else {table}
  text = pathlib.Path(__file__).read_text().replace("{LENGTHS}", LENGTHS).replace("{COIN}", COIN)
  assert {field for field in fields if f'"{field}"' not in text} == set()
