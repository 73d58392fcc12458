"""What servers say of how busy they are: both ways, recorded shapes, several ranks."""

import json

import pytest

from intellect3.inference import load, protocol


def info(*states, **more):
  return protocol.decode(json.dumps({"internal_states": states, **more}).encode(), load.ServerInfo)


def test_the_embedded_engines_state():
  told = info(
    {"running_requests": 3, "waiting_requests": 1, "reprefilled_tokens": 9, "retractions": 2}
  )
  assert told.tells_load and told.tp_size == 1
  counters = {"reprefilled_tokens": 9, "retractions": 2}
  assert load.load_of_info(told) == load.ServerLoad(3, 1, counters)


def test_sglangs_server_info_tells_none():
  # The shape of the recording: what it holds is not what we look for.
  told = info({"weight_version": "default", "last_gen_throughput": 0.0}, tp_size=4)
  assert not told.tells_load and told.tp_size == 4


def test_ranks_are_added_up_and_a_counter_that_one_does_not_tell_is_left_out():
  told = info(
    {"running_requests": 3, "waiting_requests": 1, "retractions": 2, "prompt_tokens": 5},
    {"running_requests": 4, "retractions": 1},
  )
  assert load.load_of_info(told) == load.ServerLoad(7, 1, {"retractions": 3})


def test_sglangs_loads():
  rank = {"dp_rank": 0, "num_running_reqs": 16, "num_waiting_reqs": 4, "token_usage": 0.16}
  answer = json.dumps({"version": "0.5.23", "loads": [rank, rank]}).encode()
  assert load.parse_loads(answer) == load.ServerLoad(32, 8, {})


@pytest.mark.parametrize(
  "answer", [b"{}", b'{"loads": []}', b'{"loads": [{"num_running_reqs": 1}]}']
)
def test_loads_that_are_none(answer):
  with pytest.raises(protocol.ProtocolError):
    load.parse_loads(answer)


def test_counting_between_two_looks():
  before = {"retractions": 5, "prompt_tokens": 100}
  after = {"retractions": 7, "prompt_tokens": 30, "cached_tokens": 4}
  expected = {"retractions": 2, "prompt_tokens": 30, "cached_tokens": 4}
  assert load.counted(before, after) == expected
