"""The time of messages is found again in the rows of a run that was simulated with it."""

import dataclasses

import pytest

from intellect3.simulation import reality, scenario, throughput, waits
from tests.simulation import scenes

RUN = scenes.run(
  steps=60, prompts_per_step=4, max_rollouts_in_flight=16, max_off_policy_steps=3, num_workers=2
)
GIVEN = scenes.cluster(
  servers=scenes.servers(max_running=4, decode_tokens_per_second=(100.0, 400.0)),
  trainer=scenario.Trainer(fixed_seconds=0.5),
  sync=scenario.Sync(load_seconds=0.05),
  environments={"coin": scenes.environment(lengths=scenario.Lengths(median=50, sigma=0.5))},
)


def rows(seconds):
  clients = scenario.Clients(message_seconds=seconds)
  return throughput.simulate(RUN, dataclasses.replace(GIVEN, clients=clients))["rows"][20:]


@pytest.mark.parametrize("seconds", [0.0, 0.2])
def test_what_messages_took_is_found(seconds):
  seen = rows(seconds)
  found = waits.message_seconds(
    RUN,
    GIVEN,
    running=reality.running(seen),
    ended_per_second=reality.ended_per_second(seen),
  )
  assert found == pytest.approx(seconds, rel=0.1, abs=0.02)


def test_where_all_that_may_run_do_messages_took_no_time():
  assert waits.message_seconds(RUN, GIVEN, running=16.0, ended_per_second=5.0) == 0.0
